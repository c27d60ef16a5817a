"""VLMEvalKit on runs: ``python -m lit_eemllm.evaluation.harnesses.vlmeval --run mine=runs/mine --data MME``.

VLMEvalKit knows the models that its own source lists. This adds runs to the list in memory and hands on to its ``run.py``;
all options but a few are its.

Nothing heavy is imported before that: ``run.py`` first gives each process its devices.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import UserError
from ...terminal import say


def main(arguments: Sequence[str] | None = None) -> int:
    """What VLMEvalKit's ``run.py`` does; exit status 2 after a mistake that you can mend."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}",
        description="VLMEvalKit on runs of lit_eemllm. Any other option is one of VLMEvalKit's run.py.",
        allow_abbrev=False,
    )
    text = "a run directory, or a folder that holds a whole model, and a name for the results; repeatable"
    parser.add_argument("--run", action="append", default=[], metavar="[NAME=]DIR", help=text)
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME", help="models of VLMEvalKit, beside the runs")
    text = "a key of the runs' configuration, such as model.attention=sdpa; repeatable"
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=text)
    text = "a Python file of your own that registers encoders or attention backends; repeatable"
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="FILE", help=text)
    parser.add_argument("--max-new-tokens", type=int, default=2048, metavar="N", help="of an answer, default 2048")
    text = "ask multiple choice in each data set's words (default), or in those that VLMEvalKit uses for its LLaVA"
    parser.add_argument("--prompts", choices=("dataset", "llava"), default="dataset", help=text)
    args, rest = parser.parse_known_args(arguments)
    try:
        runs = _named(args.run)
        module = _load_run()
        options = {"overrides": args.overrides, "imports": args.imports}
        _register(module, runs, **options, max_new_tokens=args.max_new_tokens, prompts=args.prompts)
    except UserError as error:
        say(f"error: {error}", file=sys.stderr)
        return 2
    models = [*args.model, *runs]
    sys.argv = [str(module.__file__), *rest, *(["--model", *models] if models else [])]
    module.main()
    return 0


def _named(runs: Sequence[str]) -> dict[str, str]:
    """Folder by name. Raises UserError if one is missing or a name is given twice."""
    found: dict[str, str] = {}
    for text in runs:
        name, _, folder = text.partition("=") if not Path(text).is_dir() else ("", "", text)
        if not folder or not Path(folder).is_dir():
            raise UserError(f"--run {text}: no such folder: {folder or text}")
        name = name or Path(folder).resolve().name
        if name in found:
            raise UserError(f"--run {text}: {name} stands for {found[name]} already; choose another: --run NAME=DIR")
        found[name] = folder
    return found


def _load_run() -> ModuleType:
    """VLMEvalKit's ``run.py``, imported: beside the package in its repository, or in the package."""
    spec = find_spec("vlmeval")
    places = [Path(spec.origin).parent / up / "run.py" for up in ("..", ".")] if spec and spec.origin else []
    file = next((place.resolve() for place in places if place.is_file()), None)
    if file is None:
        why = "its run.py is not where its repository has it" if places else "it is not installed"
        raise UserError(f"VLMEvalKit: {why}; install it from its source (github.com/open-compass/VLMEvalKit)")
    found = spec_from_file_location("run", file)
    assert found is not None and found.loader is not None
    module = module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


def _register(module: ModuleType, runs: dict[str, str], **options: Any) -> None:
    import vlmeval.vlm

    from .vlmeval_model import LitEEMLLM

    vlmeval.vlm.LitEEMLLM = LitEEMLLM  # "class": "LitEEMLLM" in a file for --config
    if taken := sorted(set(runs) & set(module.supported_VLM)):
        raise UserError(f"--run {taken[0]}={runs[taken[0]]}: VLMEvalKit has a model of this name; choose another")
    module.supported_VLM.update({name: partial(LitEEMLLM, run=folder, **options) for name, folder in runs.items()})


if __name__ == "__main__":
    sys.exit(main())
