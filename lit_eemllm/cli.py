"""The command line: one verb, one function. Nothing heavy is imported before a verb has been chosen."""

from __future__ import annotations

import argparse
import gc
import io
import json
import logging
import os
import re
import select
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lit_eemllm import __version__
from lit_eemllm.cli_start import add_verbs
from lit_eemllm.data.sources import SOURCES
from lit_eemllm.errors import ConfigError, UserError, did_you_mean, not_one_of
from lit_eemllm.terminal import VisibleFormatter, say, say_error, visible

if TYPE_CHECKING:
    from lit_eemllm.config.keys import Config
    from lit_eemllm.model import Processor

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
# Procedural data sets: name -> "file:function" in data_recipes/. The function (out, split, number of
# rows) writes out/images/ and returns the path of the rows' JSON file.
_SOURCES = {
    "shapes": "shapes.py:write",
    "puzzles": "puzzles.py:write",
    "puzzles_search": "puzzles.py:write_search",
}


# --- verbs
def _fit(args: Namespace) -> None:
    config = _config(args)
    from lit_eemllm.training.fit import fit

    # What is imported by now stays, so the garbage collector need not know it. Else each loader process, and every validation
    # starts its own, walks half a million objects when it starts, and both sides copy the memory that they share: half a second.
    gc.collect()  # what nobody needs any more shall not stay
    gc.freeze()
    fit(config)


def _validate(args: Namespace) -> None:
    config = _config(args)
    from lit_eemllm.evaluation.run import validate

    validate(config, args.checkpoint)


def _generate(args: Namespace) -> None:
    config = _config(args)
    from lit_eemllm.evaluation.run import generate

    tokens = config.eval.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
    generate(config, args.checkpoint, args.image, args.prompt, tokens, args.temperature)


def _calibrate(args: Namespace) -> None:
    config = _config(args)
    from lit_eemllm.evaluation.calibrate import calibrate

    calibrate(config, args.checkpoint, args.target, args.layers, args.budget, args.by, args.samples, args.out)


def _convert(args: Namespace) -> None:
    overrides = [text for text in args.inputs if _OVERRIDE.match(text)]
    sources = [text for text in args.inputs if text not in overrides]
    if len(sources) != 1:
        raise ConfigError(f"convert: expected one source, found {' '.join(sources) or 'none'}")
    if args.mechanism is not None:
        overrides.insert(0, f"model.mechanism.preset={args.mechanism}")
    from lit_eemllm.formats.convert import convert

    convert(Path(sources[0]), args.out, overrides, args.to_llava)


def _shaped(args: Namespace) -> Any:
    """The configuration, whose parts --shape can stand in for."""
    with tempfile.TemporaryDirectory() as folder:
        if args.shape is not None:
            from lit_eemllm.cost.weightless import SHAPE_ALONE, SHAPE_CONFIG

            alone = all(map(_OVERRIDE.match, args.inputs))
            texts = [SHAPE_CONFIG, SHAPE_ALONE] if alone else [SHAPE_CONFIG]
            bases = [Path(folder) / f"shape{number}.yaml" for number in range(len(texts))]
            for base, text in zip(bases, texts, strict=True):
                base.write_text(text, encoding="utf-8")
            args.inputs = [*map(str, bases), *args.inputs]
        return _config(args)


def _estimate(args: Namespace) -> None:
    config = _shaped(args)
    from lit_eemllm.cost.estimate import estimate

    names = ("shape", "text", "visual", "targets", "documents", "gpus", "memory", "only")
    estimate(config, **{name: getattr(args, name) for name in names}, as_json=args.json)


def _explain(args: Namespace) -> None:
    config = _shaped(args)
    from lit_eemllm.cost.explain import explain

    names = ("shape", "text", "visual", "out")
    explain(config, **{name: getattr(args, name) for name in names})


def _merge(args: Namespace) -> None:
    config = _config(args)
    from lit_eemllm.formats.merge import merge

    merge(config, args.checkpoint, args.to, args.adapter)


def _report(args: Namespace) -> None:
    from lit_eemllm.report import report

    report(args.runs, args.out, baseline=args.baseline)


def _sweep(args: Namespace) -> int:
    overrides = [text for text in args.inputs if _OVERRIDE.match(text)]
    files = [text for text in args.inputs if text not in overrides]
    if len(files) != 1:
        raise ConfigError(f"sweep: expected one sweep file, found {' '.join(files) or 'none'}")
    from lit_eemllm.sweep import sweep

    return sweep(Path(files[0]), overrides, args.jobs, args.dry_run, args.slurm, args.imports)


def _doctor(args: Namespace) -> None:
    from lit_eemllm.doctor import doctor

    doctor(args.device, args.head_size, args.json)


def _config_show(args: Namespace) -> None:
    config = _config(args)
    from lit_eemllm.config import to_yaml

    print(to_yaml(config, comments=True), end="")  # YAML escapes by itself


def _config_check(args: Namespace) -> None:
    problems = []
    for file in _split(args.inputs)[0]:
        try:
            _config(args, file)
            say(f"{file}: good")
        except ConfigError as error:
            problems.append(f"{file}: {error}")
            if ": required, but not set" in str(error):
                text = "if it is an overlay, to be merged onto another file, check them together"
                problems[-1] += f"\n  {text}: lit-eemllm config show OTHER.yaml {file}"
    if problems:
        raise ConfigError("\n".join(problems))


def _shards_make(args: Namespace) -> None:
    options = {"shard_size": args.shard_size, "follow_links": args.follow_links}
    options |= {"max_image_pixels": args.max_image_pixels, **({"workers": args.workers} if args.workers else {})}
    if args.source in SOURCES:
        if args.root is None:
            raise UserError(f"shards make: --source {args.source} needs --root, the folder of the release; "
                            f"lit-eemllm configs show data_recipes/{args.source}.py says what is expected there")  # fmt: skip
        from lit_eemllm.data.sources import convert

        wishes = {"splits": args.splits, "turns": args.turns, "format_prompts": not args.bare, "holdout": args.holdout}
        say(convert(args.source, args.root, args.out, **wishes, **options))
        return
    if args.root is not None:
        raise UserError(f"shards make: --root is the folder of a published --source, one of {', '.join(SOURCES)}")
    from lit_eemllm.data.shards import make
    from lit_eemllm.data.sources import run_recipe

    with tempfile.TemporaryDirectory() as folder:
        rows, images = {split: Path(path) for split, path in args.rows}, args.images
        if len(rows) < len(args.rows):
            raise UserError("shards make: a split is given twice; join its JSON files first")
        if args.source is not None:
            file, _, function = _SOURCES[args.source].partition(":")
            write = getattr(run_recipe(file), function)
            counts = {"train": args.train, "val": args.val}
            rows = {split: write(Path(folder), split, count) for split, count in counts.items() if count}
            images = Path(folder) / "images"
        say(make(rows, images, args.out, **options))


def _source(name: str) -> str:
    known = sorted({*_SOURCES, *SOURCES})
    if name not in known:
        raise argparse.ArgumentTypeError(not_one_of(name, known))
    return name


def _rows(text: str) -> tuple[str, str]:
    split, equals, file = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected SPLIT=JSON, such as train={text}")
    return split, file


def _shards_prepare(args: Namespace) -> None:
    from lit_eemllm.data.shards import prepare

    for split, count in prepare(args.folder).items():
        say(f"{split}: {count:,} samples")


def _shards_check(args: Namespace) -> int:
    config = _config(args) if args.inputs else None
    from lit_eemllm.data.check import check

    encoder = None
    if config is not None:
        from lit_eemllm.data.samples import SampleEncoder

        parts, data = _processor(config), config.data
        limits = data.max_length, data.truncation, data.max_image_pixels
        encoder = SampleEncoder(parts.template, parts.transform, *limits)
    report = check(args.data, encoder)
    say(report)
    return 0 if report.ok else 1


def _shards_inspect(args: Namespace) -> None:
    config = _config(args)
    from lit_eemllm.data.preview import inspect

    parts, out = _processor(config), args.out or Path(config.out) / "inspect"
    options = {"split": args.split, "packs": args.packs, "seed": config.seed}
    for path in inspect(config.data, parts.template, parts.transform, out, **options):
        say(path)


def _processor(config: Config) -> Processor:
    from lit_eemllm.console import quiet_libraries
    from lit_eemllm.model.build import build_processor

    quiet_libraries()
    return build_processor(config.model)[0]


# --- from arguments to a configuration
def _config(args: Namespace, only: Path | None = None) -> Config:
    from lit_eemllm.config import load_config
    from lit_eemllm.config.keys import check_names
    from lit_eemllm.plugins import warn_if_changed

    files, overrides = _split(args.inputs)
    config = load_config(files if only is None else [only], overrides, checks=[check_names])
    warn_if_changed(Path(config.out))
    return config


def _split(inputs: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files and overrides. A run directory stands for its config.yaml, with `out` set to where it lies now."""
    overrides = [text for text in inputs if _OVERRIDE.match(text)]
    paths = [Path(text) for text in inputs if not _OVERRIDE.match(text)]
    if not paths:
        raise ConfigError("name a configuration file or a run directory; key=value overrides follow it")
    for path in paths:
        if path.is_dir() and not (path / "config.yaml").is_file():
            raise ConfigError(_no_run(path))
    moved = [f"out={json.dumps(str(path))}" for path in paths if path.is_dir()]
    return [path / "config.yaml" if path.is_dir() else path for path in paths], moved + overrides


def _no_run(folder: Path) -> str:
    """What a folder is that stands where a run directory could."""
    if next(folder.rglob("*.tar"), None) is not None:
        return f"{folder}: a folder of shards, expected a configuration or a run directory; data are named by a key: CONFIG data.train={folder}"
    files = sorted(str(file) for file in folder.glob("*.yaml"))
    inside = f" Configurations in it: {', '.join(files[:3])}{', ...' * (len(files) > 3)}" if files else ""
    return f"{folder}: no run directory: there is no config.yaml in it.{inside}"


# --- the command line
class Parser(ArgumentParser):
    """Tells mistakes in what was typed, which a shell may have filled in from names of files."""

    def error(self, message: str) -> NoReturn:
        """With what was probably meant, where one of a few words was expected."""
        if wrong := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            hint = did_you_mean(wrong[1], re.findall(r"[\w-]+", wrong[2]))
            message += f"; {hint}" if hint else ""
        super().error(visible(message))


def build_parser() -> ArgumentParser:
    """The whole command line. Every verb's namespace has `run`, the function to call."""
    text = "Train multimodal LLMs in which the treatment of visual tokens is an experiment variable."
    parser = Parser("lit-eemllm", description=text)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def group(name: str, text: str) -> Any:
        return verbs.add_parser(name, help=text, description=text).add_subparsers(metavar="VERB", required=True)

    def verb(to: Any, name: str, run: Callable[[Namespace], int | None], text: str, example: str) -> ArgumentParser:
        looks = {"epilog": f"example:\n  {example}", "formatter_class": argparse.RawDescriptionHelpFormatter}
        made = to.add_parser(name, help=text, description=text, allow_abbrev=False, **looks)
        made.set_defaults(run=run, parser=made, imports=None)
        return made

    def takes_imports(made: ArgumentParser) -> ArgumentParser:
        text = "a Python file of your own that registers encoders or attention backends; repeatable"
        made.add_argument("--import", dest="imports", type=Path, action="append", default=[], metavar="FILE", help=text)
        return made

    def takes_config(made: ArgumentParser, checkpoint: bool = False) -> ArgumentParser:
        text = "YAML files, merged from left to right, or a run directory; then overrides, which win"
        made.add_argument("inputs", nargs="*", metavar="CONFIG|key=value", help=text)
        takes_imports(made)
        if checkpoint:
            text = "default: the run's newest; none = before any training"
            made.add_argument("--checkpoint", metavar="FILE", help=text)
        return made

    def shaped(made: ArgumentParser) -> ArgumentParser:
        text = "vicuna-7b or vicuna-13b with CLIP-L/14-336, in place of the configuration's parts; a CONFIG is then optional"
        made.add_argument("--shape", metavar="NAME", help=text)
        made.add_argument("--text", type=int, default=64, metavar="N", help="text tokens of a document, default 64")
        made.add_argument("--visual", type=int, metavar="N", help="its visual tokens, default: those of one image")
        return made

    example = "lit-eemllm fit configs/demo/ee_mllm.yaml optim.lr=1e-3 out=runs/mine"
    takes_config(verb(verbs, "fit", _fit, "Train, or continue the run found in `out`.", example))

    example = "lit-eemllm validate runs/demo/ee_mllm-0 eval.samples=100"
    example += "\n  lit-eemllm validate runs/finetune eval.suite=benchmarks.yaml trainer.devices=8"
    example += "\n  lit-eemllm validate runs/finetune eval.data=pope.json eval.images=val2014 eval.metric=pope"
    text = "Score a run's model on data.val, on eval.data or on a suite of sets; goes on where it was killed."
    takes_config(verb(verbs, "validate", _validate, text, example), checkpoint=True)

    example = 'lit-eemllm generate runs/demo/ee_mllm-0 --image photo.jpg --prompt "What is this?"'
    made = takes_config(verb(verbs, "generate", _generate, "Answer one prompt about images.", example), checkpoint=True)
    made.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="repeatable")
    made.add_argument("--prompt", required=True, help="images come first, or where the prompt says <image>")
    made.add_argument("--max-new-tokens", type=int, metavar="N", help="default: eval.max_new_tokens of the run")
    made.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")

    example = "lit-eemllm calibrate runs/llava --target shortv --layers 19"
    text = "Find the layers of a self-attention model that can treat visual tokens more cheaply."
    made = takes_config(verb(verbs, "calibrate", _calibrate, text, example), checkpoint=True)
    made.add_argument("--target", required=True, choices=("ee_mllm_f", "shortv", "vica"), help="the mechanism to find")
    many = made.add_mutually_exclusive_group()
    text = "layers to convert, for vica those in which text sees the image; default: the preset's share of all"
    many.add_argument("--layers", type=int, metavar="N", help=text)
    many.add_argument("--budget", type=float, metavar="SHARE", help="the same as a share of all layers, such as 0.6")
    text = "rank by the KL of the output or, vica only, by the cosine similarity of text states; default kl"
    made.add_argument("--by", choices=("kl", "cosine"), default="kl", help=text)
    made.add_argument("--samples", type=int, default=40, metavar="N", help="of data.val, with images; default 40")
    made.add_argument("--out", type=Path, metavar="DIR", help="default: calibrate-TARGET in the run directory")

    example = "lit-eemllm convert runs/stage1 --out runs/stage1-saisa --mechanism saisa"
    example += "\n  lit-eemllm convert llava-1.5-7b-hf --out runs/ee --mechanism ee_mllm"
    example += "\n  lit-eemllm convert runs/llava --out my-llava-hf --to-llava"
    text = "Write a trained model under another mechanism; read and write LLaVA checkpoints."
    made = takes_imports(verb(verbs, "convert", _convert, text, example))
    text = "a run directory (its newest checkpoint), a folder of an EEMLLM (save_pretrained) or of a LLaVA-1.5, 1.6 in "
    text += "transformers' format; then overrides: model.mechanism.*, which without a preset change the source's own "
    text += "mechanism, and seed, of modules that are fresh"
    made.add_argument("inputs", nargs="*", metavar="SOURCE|key=value", help=text)
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    made.add_argument("--mechanism", metavar="PRESET", help="such as ee_mllm or saisa; default: the source's own")
    text = "write a LlavaForConditionalGeneration of transformers and check that it computes the same; mechanism llava"
    made.add_argument("--to-llava", action="store_true", help=text)

    example = "lit-eemllm estimate configs/stages/finetune.yaml --shape vicuna-7b --gpus 8 --memory 80"
    text = "Show FLOPs, cache size and training memory of every mechanism; reads config files, no weights."
    made = shaped(takes_config(verb(verbs, "estimate", _estimate, text, example)))
    made.add_argument("--targets", type=int, metavar="N", help="its supervised tokens, default: all its text")
    text = "documents in a pack and sequences in a cache, default: as many as fill data.pack_tokens"
    made.add_argument("--batch", dest="documents", type=int, metavar="N", help=text)
    made.add_argument("--gpus", type=int, default=8, metavar="N", help="default 8")
    made.add_argument("--memory", type=float, default=80.0, metavar="GIB", help="of each GPU, default 80")
    made.add_argument("--only", action="store_true", help="the configured mechanism alone")
    made.add_argument("--json", action="store_true", help="all of it as JSON")

    example = "lit-eemllm explain --shape vicuna-7b model.mechanism.preset=vica --out vica.png"
    text = "Show what each layer does with visual tokens, and its FLOPs; reads config files, no weights."
    made = shaped(takes_config(verb(verbs, "explain", _explain, text, example)))
    made.add_argument("--out", type=Path, metavar="FILE", help="draw it too, with masks (.png, .svg or .pdf)")

    example = "lit-eemllm merge runs/demo/ee_mllm-0 --to merged"
    made = takes_config(verb(verbs, "merge", _merge, "Write a run's trained model.", example), checkpoint=True)
    made.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new folder")
    made.add_argument("--adapter", action="store_true", help="only the decoder's LoRA adapter, as peft loads it")

    example = (
        "lit-eemllm report runs/sweeps/aligner\n  lit-eemllm report runs/a-0 runs/a-1 runs/b-0 --baseline runs/b-0"
    )
    text = "Compare runs, or a sweep's rows, in a table, a page and a picture."
    made = verb(verbs, "report", _report, text, example)
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or one sweep's directory")
    text = "a row, by its name or one of its runs, that the others are compared with; default: the sweep's"
    made.add_argument("--baseline", metavar="ROW", help=text)
    text = "default: report in the sweep's directory, else runs/report"
    made.add_argument("--out", type=Path, metavar="DIR", help=text)

    example = "lit-eemllm sweep configs/sweeps/aligner.yaml --jobs 2"
    example += (
        "\n  lit-eemllm sweep configs/sweeps/mechanisms.yaml seeds=[0] out=runs/quick optim.max_steps=100 --dry-run"
    )
    text = "Run what is left of a sweep: all its cells and seeds, then the report."
    made = takes_imports(verb(verbs, "sweep", _sweep, text, example))
    text = "a sweep file; then overrides of its keys, such as seeds, or of the configurations of all its runs"
    made.add_argument("inputs", nargs="*", metavar="SWEEP|key=value", help=text)
    made.add_argument("--jobs", type=int, metavar="N", help="runs at once; default 1, with --slurm all")
    made.add_argument("--dry-run", action="store_true", help="show the runs and what would be done with them")
    made.add_argument("--slurm", action="store_true", help="on a Slurm cluster; needs the extra `slurm`")

    example = "lit-eemllm doctor --head-size 128 --json > bug-report.json"
    text = "Show the machine, versions, and which attention backends really run here."
    made = takes_imports(verb(verbs, "doctor", _doctor, text, example))
    made.add_argument(
        "--device", metavar="DEVICE", help="such as cpu or cuda:1; default: cuda if there is any, else cpu"
    )
    made.add_argument("--head-size", type=int, default=64, metavar="H", help="of the decoder, default 64")
    made.add_argument("--json", action="store_true", help="all of it as JSON, for bug reports")

    shards = group("shards", "Make, index, check and look at training data.")
    example = "lit-eemllm shards make --rows train=train.json --rows val=val.json --images images --out shards"
    example += "\n  lit-eemllm shards make --source shapes --train 1000 --val 100 --out shards"
    example += "\n  lit-eemllm shards make --source chartqa --root 'ChartQA Dataset' --out shards"
    text = "Turn rows of JSON and images into shards; every image is decoded once, damaged ones are left out."
    made = verb(shards, "make", _shards_make, text, example)
    what = made.add_mutually_exclusive_group(required=True)
    text = "rows (JSON or JSON lines) of train, val or test, in the form of LLaVA, LLaMA-Factory, ms-swift or TRL; repeatable"
    what.add_argument("--rows", type=_rows, action="append", default=[], metavar="SPLIT=JSON", help=text)
    text = "instead of files, a procedural set, or a published one as it was released, found in --root"
    what.add_argument("--source", type=_source, metavar="NAME", help=text)
    made.add_argument("--root", type=Path, metavar="DIR", help="with --source: the folder of the release")
    text = "with --root: those to convert, such as train,val; default: all that the release has"
    made.add_argument("--splits", type=lambda text: text.split(","), metavar="SPLIT,...", help=text)
    text = "with --root: most questions about an image in one conversation of train, default 10"
    made.add_argument("--turns", type=int, default=10, metavar="N", help=text)
    text = "with --root: without LLaVA-1.5's prompts for short answers"
    made.add_argument("--bare", action="store_true", help=text)
    text = "with --root: share of train that becomes val, by a hash of the image, where the release has no other split"
    made.add_argument("--holdout", type=float, default=0.0, metavar="SHARE", help=text)
    made.add_argument("--workers", type=int, metavar="N", help="processes, default: one per core")
    made.add_argument("--images", type=Path, metavar="DIR", help="what the rows' image paths are relative to")
    made.add_argument(
        "--train", type=int, default=32_000, metavar="N", help="of a procedural set: training rows, default 32000"
    )
    made.add_argument(
        "--val", type=int, default=7_000, metavar="N", help="of a procedural set: validation rows, default 7000"
    )
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    made.add_argument("--shard-size", type=int, default=1000, metavar="N", help="rows per shard, default 1000")
    text = "accept images that links put outside of --images or --root"
    made.add_argument("--follow-links", action="store_true", help=text)
    text = "refuse larger images, as data.max_image_pixels does in training; default 50000000"
    made.add_argument("--max-image-pixels", type=int, default=50_000_000, metavar="N", help=text)

    example = "lit-eemllm shards prepare runs/demo/data"
    made = verb(shards, "prepare", _shards_prepare, "Index existing shards.", example)
    made.add_argument("folder", type=Path, metavar="DIR", help="holds the .tar files; val* and test* are such splits")

    example = "lit-eemllm shards check runs/demo/data configs/demo/ee_mllm.yaml"
    text = "Read every sample, with a configuration as training would. Exit status 1 if any is bad."
    made = verb(shards, "check", _shards_check, text, example)
    made.add_argument("data", type=Path, metavar="DATA", help="a recipe or a folder of shards")
    takes_config(made)

    example = "lit-eemllm shards inspect configs/demo/ee_mllm.yaml --packs 3"
    made = takes_config(verb(shards, "inspect", _shards_inspect, "Draw packs as the model gets them.", example))
    made.add_argument("--out", type=Path, metavar="DIR", help="default: inspect/ in the run directory")
    made.add_argument("--split", choices=("train", "val"), default="train")
    made.add_argument("--packs", type=int, default=2, metavar="N")

    config = group("config", "Show or check configurations.")
    example = "lit-eemllm config show configs/demo/ee_mllm.yaml optim.lr=1e-3"
    takes_config(verb(config, "show", _config_show, "Print what `fit` would use, every key explained.", example))
    example = "lit-eemllm config check configs/demo/ee_mllm.yaml configs/demo/llava.yaml"
    takes_config(verb(config, "check", _config_check, "Check each file on its own, list all mistakes.", example))

    add_verbs(verbs, group, verb)
    return parser


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    """Overrides may stand before and after options, which argparse's verbs only know as left-over arguments."""
    args, rest = build_parser().parse_known_args(arguments)
    strays = [text for text in rest if text.startswith("-")] if hasattr(args, "inputs") else rest
    if strays:
        hint = "; overrides are written without dashes: key=value" if any("=" in text for text in strays) else ""
        args.parser.error(f"unknown arguments: {' '.join(strays)}{hint}")
    if rest:
        args.inputs += rest
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 0 good, 1 bad samples found or a disk that fails, 2 a mistake you can mend, 130
    interrupted.

    `fit` that was asked to stop exits by itself with 143 (SIGTERM) or 130 (SIGINT) after saving.
    """
    args = parse(arguments)
    sys.excepthook = say_error
    log = logging.StreamHandler()
    log.setFormatter(VisibleFormatter("%(message)s"))
    logging.basicConfig(handlers=[log])
    logging.getLogger("lit_eemllm").setLevel(logging.WARNING if int(os.environ.get("LOCAL_RANK", 0)) else logging.INFO)
    try:
        if args.imports is not None:
            from lit_eemllm.plugins import import_user_code

            import_user_code(args.imports)
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        say(f"error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        say("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 141  # as of a process that SIGPIPE has ended
    except OSError as error:  # of a disk: what is not there, and what was meant, is told where it is looked for
        say(f"error: {error.filename or 'what is printed, or a file'}: {error.strerror or error}", file=sys.stderr)
        _print_nothing_more()
        return 1


def _reader_is_gone() -> bool:
    """Whether nobody reads what is printed any more, such as `head` that has seen enough; if so, it is thrown away from here on."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in output.poll(0))
    if gone:
        _print_nothing_more()
    return gone


def _print_nothing_more() -> None:
    """What is left to print would fail once more, when Python ends."""
    with suppress(io.UnsupportedOperation):  # it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
