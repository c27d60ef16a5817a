"""`lit-eemllm convert`: a run, an EEMLLM folder or a LLaVA checkpoint under another mechanism or behind another connector, or as a LLaVA
again."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..config import load_config, strict_yaml
from ..console import console, progress, quiet_libraries
from ..errors import CheckpointError, ConfigError, UserError
from ..mechanisms.build import without_nulls
from ..mechanisms.connectors import DEFAULT
from ..model import EEMLLM, Processor
from ..model.folders import finder, read_config, refuse_adapter
from ..model.processor import template_of
from ..names import check_names
from ..plugins import warn_if_changed
from ..report.card import write_card
from ..training.adapters import merge_adapters
from ..training.checkpoint import new_folder, newest_checkpoint
from ..training.initial import run_model
from .mechanism import Fate, change_mechanism, choose_connector, choose_mechanism, mechanism_settings
from .vlm import FORMATS, SOURCE, check_vlm, load_tokenizer, load_vlm, load_whole, save_vlm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MECHANISM, CONNECTOR = "model.mechanism.", "model.connector."
_REQUIRED = ("model.decoder=x", "model.vision.path=x", "data.train=x", "optim.lr=1", "optim.max_steps=1")  # not read


@dataclass
class Source:
    """What is converted.

    Attributes:
        name: of the folder or checkpoint, in words.
        model: on the CPU.
        tokenizer: None if the source holds none.
        config: keys of a configuration that goes with the model.
        template: name of the chat template that it was trained with; None if that is the one that its tokenizer has.
        checkpoint: of the run, if it is one.
    """

    name: str
    model: EEMLLM
    tokenizer: PreTrainedTokenizerBase | None
    config: dict[str, Any]
    template: str | None
    checkpoint: str = ""

    def processor(self, model: EEMLLM) -> Processor | None:
        """What made the prompts in training, if that is known."""
        if self.template is None or self.tokenizer is None:
            return None
        return Processor(self.tokenizer, self.template, model.vision.transform, model.config.image_token_id)


def convert(source: Path, out: Path, overrides: Sequence[str], to_transformers: bool) -> None:
    """Write the source's model under another mechanism, behind another connector, or both.

    Args:
        source: folder of a model in one of transformers' formats (`vlm.FORMATS`) or of an EEMLLM (`save_pretrained`), or a run directory, of
            which the newest checkpoint is taken.
        out: folder to create; appears only when it is complete.
        overrides: ``model.mechanism.*``, ``model.connector.*`` and ``seed``; without a preset or a name they change the source's own
            mechanism or connector.
        to_transformers: write one of transformers' own models instead of an EEMLLM: of a family that has the encoder and the connector.

    Raises:
        UserError: the source, the mechanism, the connector or `out` cannot be used; nothing has been written.
    """
    quiet_libraries()
    wanted, other, seed = _wanted(overrides)
    with new_folder(out) as folder, progress("converting", 3) as advance:
        found = open_source(source)
        layers = _num_layers(found.model)
        mechanism = choose_mechanism(found.model.mechanism, layers, wanted)
        connector = choose_connector(found.model.connector, other)
        named = json.dumps(mechanism_settings(mechanism, layers))
        if to_transformers and not mechanism.is_llava(layers):
            raise ConfigError(
                f"--to-transformers: the mechanism is {named}, which transformers' formats cannot say. With --mechanism llava the same "
                "weights are written to be computed as there."
            )
        if to_transformers and found.tokenizer is None:
            raise ConfigError(f"--to-transformers: {source} holds no tokenizer; convert the run it was made from")
        same = (mechanism, connector) == (found.model.mechanism, found.model.connector)
        scored = (source, found.checkpoint) if same and found.checkpoint else None
        advance(1)
        model, fates = change_mechanism(found.model, mechanism, seed, connector)
        advance(1)
        checked = ""
        if to_transformers:
            assert found.tokenizer is not None
            save_vlm(model, found.tokenizer, folder, found.template)
            checked = check_vlm(model, folder, found.processor(model))
        else:
            model.save_pretrained(folder)
            _save_texts(found, model, folder)
            (folder / "config.yaml").write_text(_configuration(found.config, model, source, out))
        write_card(folder, out.name, model, found.config, scored, foreign=to_transformers)
        advance(1)
    behind = f", connector {connector}" if connector != DEFAULT else ""
    console.print(_table(fates, f"{found.name} -> {out}, mechanism {named}{behind}"))
    fresh = {fate.name.partition(".")[0] for fate in fates if fate.fate == "fresh"}
    if fresh:
        begins = f"; {mechanism.blocks_begin}" if mechanism.blocks_name in fresh and mechanism.blocks_begin else ""
        console.print(f"fresh is untrained, from seed {seed}: {', '.join(sorted(fresh))}{begins}")
    console.print(checked or f"to train it further: lit-eemllm fit {out} out=runs/NAME")


def _save_texts(found: Source, model: EEMLLM, folder: Path) -> None:
    """The processor, or the tokenizer alone where that has no chat template that could be used."""
    if found.tokenizer is None:
        return
    try:
        told = found.template or "jinja", model.vision.transform, model.config.image_token_id
        Processor(found.tokenizer, *told).save_pretrained(folder)
    except UserError:
        found.tokenizer.save_pretrained(folder)


def _wanted(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Keys of ``model.mechanism`` and of ``model.connector`` that were given, and the seed. Raises ConfigError naming every mistake."""
    strays = [text for text in overrides if not text.startswith((MECHANISM, CONNECTOR, "seed="))]
    if strays:
        raise ConfigError(f"convert takes {MECHANISM}*, {CONNECTOR}* and seed, found {' '.join(strays)}")
    config = load_config([], [*_REQUIRED, *overrides], checks=[check_names])
    mechanism, connector = (without_nulls(asdict(part)) for part in (config.model.mechanism, config.model.connector))
    for given, name in ((mechanism, f"{MECHANISM}preset"), (connector, f"{CONNECTOR}name")):
        if not any(text.startswith(f"{name}=") for text in overrides):
            del given[name.rpartition(".")[2]]
    return mechanism, connector, config.seed


# --- sources


def open_source(path: Path) -> Source:
    """Raises UserError if the path is none of the three kinds of source, or one that cannot be used."""
    if not path.is_dir():
        expected = (
            "a checkpoint of transformers (one from a hub: download it first), an EEMLLM folder or a run directory"
        )
        raise UserError(f"{path}: no such folder; expected {expected}")
    refuse_adapter(finder(str(path), SOURCE), SOURCE, str(path))
    checkpoint = newest_checkpoint(path)
    if checkpoint is not None:
        found = _open_run(path, checkpoint)
    elif not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: neither config.json nor a checkpoint of a run in it: nothing to convert")
    elif read_config(path / "config.json", SOURCE).get("model_type") == "eemllm":
        found = _open_eemllm(path)
    else:
        model, tokenizer = load_vlm(path)
        form = FORMATS[read_config(path / "config.json", SOURCE)["model_type"]]
        template = None if tokenizer.chat_template else form.template
        config = {"model": {**_parts(model, path), "template": form.template}}
        found = Source(f"{type(form).__name__} {path}", model, tokenizer, config, template)
    return found


def _open_run(path: Path, checkpoint: Path) -> Source:
    config = load_config([path / "config.yaml"], [f"out={json.dumps(str(path))}"], checks=[check_names])
    warn_if_changed(path)
    model, processor, _ = run_model(config, str(checkpoint), only_weights=True)
    merged = merge_adapters(model)
    name = f"run {checkpoint}" + (f", {merged} adapters folded in" if merged else "")
    return Source(
        name, model, processor.tokenizer, _read_yaml(path / "config.yaml"), config.model.template, str(checkpoint)
    )


def _open_eemllm(path: Path) -> Source:
    model = load_whole(EEMLLM, path).eval()
    has_tokenizer = (path / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(path) if has_tokenizer else None
    file, config = path / "config.yaml", {}  # of an earlier conversion
    if file.is_file():
        load_config([file], _REQUIRED, checks=[check_names])  # refuses what is none
        config = _read_yaml(file) or {}
    given = {name: value for name, value in (config.get("model") or {}).items() if value is not None}
    told = "vicuna_v1" if tokenizer is None else template_of(path, tokenizer)
    template = given.get("template", None if told == "jinja" else told)
    config["model"] = {**_parts(model, path), **given}
    return Source(f"EEMLLM {path}", model, tokenizer, config, template)


def _parts(model: EEMLLM, path: Path) -> dict[str, Any]:
    """Keys of ``model`` that name the parts of a folder that holds all of them."""
    vision = model.vision
    return {
        "decoder": str(path),
        "vision": {
            "encoder": model.config.vision["encoder"],
            "path": str(path),
            "select_layer": getattr(vision, "select_layer", -2),
            "policy": vision.transform.policy,
        },
    }


def _num_layers(model: EEMLLM) -> int:
    return len(model.language_model.model.layers)


def _read_yaml(file: Path) -> dict[str, Any]:
    return strict_yaml.parse(file.read_bytes())


# --- what is written and said


def _configuration(config: dict[str, Any], model: EEMLLM, source: Path, out: Path) -> str:
    """The source's configuration for the new folder: its mechanism, its weights, its parts if it holds them."""
    section = config["model"]
    section |= {"mechanism": mechanism_settings(model.mechanism, _num_layers(model)), "quantization": None}
    section["connector"] = model.connector.to_dict()
    for part, key in ((section, "decoder"), (section, "tokenizer"), (section["vision"], "path")):
        if part.get(key) and Path(part[key]).resolve() == source.resolve():
            part[key] = str(out)
    values = {**config, "init_from": str(out), "out": str(out), "resume": "auto"}
    head = f"# Of lit-eemllm convert. To train the model further:\n#   lit-eemllm fit {out} out=runs/NAME\n"
    return head + strict_yaml.dump(values)


def _table(fates: Iterable[Fate], title: str) -> Table:
    """Tensors and parameters by part of the model and by what became of them."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for fate in fates:
        row = sums[fate.name.partition(".")[0], fate.fate]
        row[0] += 1
        row[1] += fate.numel
    table = Table("part", "tensors", "parameters", "", title=title, title_justify="left")
    for (part, what), (tensors, numel) in sums.items():
        table.add_row(part, f"{tensors:,}", f"{numel:,}", what)
    return table
