"""`shards make`, `prepare`, `check` and `inspect`: training data."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_eemllm.cli.common import config_of, group, named, takes_config, takes_imports, verb
from lit_eemllm.errors import UserError, not_one_of
from lit_eemllm.terminal import say

if TYPE_CHECKING:
    from lit_eemllm.config.keys import Config
    from lit_eemllm.model import Processor


def add(verbs: Any) -> None:
    shards = group(verbs, "shards", "Make, index, check and look at training data.")
    _add_make(shards)

    examples = (
        "lit-eemllm shards prepare runs/demo/data",
        "lit-eemllm shards prepare /data/captions",
    )
    made = verb(shards, "prepare", _prepare, "Index existing shards.", *examples)
    made.add_argument("folder", type=Path, metavar="DIR", help="holds the .tar files; val* and test* are such splits")

    examples = (
        "lit-eemllm shards check runs/demo/data configs/demo/ee_mllm.yaml",
        "lit-eemllm shards check data_recipes/blends/llava_v1_5.yaml configs/stages/finetune.yaml",
    )
    text = "Read every sample, with a configuration as training would. Exit status 1 if any is bad."
    made = verb(shards, "check", _check, text, *examples)
    made.add_argument("data", type=Path, metavar="DATA", help="a recipe or a folder of shards")
    takes_config(made)

    examples = (
        "lit-eemllm shards inspect configs/demo/ee_mllm.yaml --packs 3",
        "lit-eemllm shards inspect runs/demo/ee_mllm-0 --split val --out inspected",
    )
    made = takes_config(verb(shards, "inspect", _inspect, "Draw packs as the model gets them.", *examples))
    made.add_argument("--out", type=Path, metavar="DIR", help="default: inspect/ in the run directory")
    made.add_argument("--split", choices=("train", "val"), default="train")
    made.add_argument("--packs", type=int, default=2, metavar="N")


def _add_make(shards: Any) -> None:
    examples = (
        "lit-eemllm shards make --rows train=train.json --rows val=val.json --images images --out shards",
        "lit-eemllm shards make --source shapes --train 1000 --val 100 --out shards",
        "lit-eemllm shards make --source chartqa --root 'ChartQA Dataset' --out shards",
    )
    text = "Turn rows of JSON and images into shards; every image is decoded once, damaged ones are left out."
    made = takes_imports(verb(shards, "make", _make, text, *examples))
    what = made.add_mutually_exclusive_group(required=True)
    text = (
        "rows (JSON or JSON lines) of train, val or test, in the form of LLaVA, LLaMA-Factory, ms-swift or TRL, or parquet with the "
        "images inside, a file or a folder; a folder alone: each split that its files' names say; repeatable"
    )
    what.add_argument("--rows", type=_rows, action="append", default=[], metavar="SPLIT=FILE", help=text)
    text = "instead of files, a procedural set, or a published one, or one of your own, as it was released, found in --root"
    named("sources", what.add_argument("--source", metavar="NAME", help=text))
    text = "of parquet: those to read, by their names or under others, such as image,question=query,answer=label; default: all"
    made.add_argument("--columns", type=_columns, metavar="NAME=COLUMN,...", help=text)
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
    made.add_argument(
        "--images", type=Path, metavar="DIR", help="what the rows' paths of images and videos are relative to"
    )
    text = "of a procedural set: training rows, default 32000"
    made.add_argument("--train", type=int, default=32_000, metavar="N", help=text)
    text = "of a procedural set: validation rows, default 7000"
    made.add_argument("--val", type=int, default=7_000, metavar="N", help=text)
    text = "most frames of a video, each of which becomes an image; default 8"
    made.add_argument("--frames", type=int, default=8, metavar="N", help=text)
    text = "frames for each second of a video, up to --frames; default: --frames of any video"
    made.add_argument("--frame-rate", type=float, metavar="R", help=text)
    text = "text that tells the times of frames: plain (none), internvl, smolvlm or qwen3_vl; default plain"
    named("markers", made.add_argument("--markers", default="plain", metavar="NAME", help=text))
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    made.add_argument("--shard-size", type=int, default=1000, metavar="N", help="rows per shard, default 1000")
    text = "accept images that links put outside of --images or --root"
    made.add_argument("--follow-links", action="store_true", help=text)
    text = "refuse larger images, as data.max_image_pixels does in training; default 50000000"
    made.add_argument("--max-image-pixels", type=int, default=50_000_000, metavar="N", help=text)


def _rows(text: str) -> tuple[str, str]:
    split, equals, file = text.partition("=")
    return (split, file) if equals else ("", text)


def _columns(text: str) -> dict[str, str]:
    return {name: column or name for name, _, column in (item.partition("=") for item in text.split(","))}


def _make(args: Namespace) -> None:
    options: dict[str, Any] = {"shard_size": args.shard_size, "follow_links": args.follow_links}
    options |= {"max_image_pixels": args.max_image_pixels, **({"workers": args.workers} if args.workers else {})}
    from lit_eemllm.config.keys import VideoConfig

    options["video"] = VideoConfig(args.frames, args.frame_rate, args.markers)
    from lit_eemllm.data.sources import PROCEDURAL, SOURCES, convert, names, run_recipe

    if args.source is not None and args.source not in names():
        args.parser.error(f"argument --source: {not_one_of(args.source, names())}; one of your own needs --import FILE")
    if args.columns is not None and args.source is not None:
        raise UserError("shards make: --columns are those of parquet files in --rows; a --source reads its own")
    if args.source is not None and args.source not in PROCEDURAL:
        if args.root is None:
            hint = f"; lit-eemllm configs show data_recipes/{args.source}.py says what is expected there"
            raise UserError(f"shards make: --source {args.source} needs --root, the folder of the release"
                            + hint * (args.source in SOURCES))  # fmt: skip
        wishes = {"splits": args.splits, "turns": args.turns, "format_prompts": not args.bare, "holdout": args.holdout}
        say(convert(args.source, args.root, args.out, **wishes, **options))
        return
    if args.root is not None:
        raise UserError(f"shards make: --root is the folder of a published --source, one of {', '.join(SOURCES)}")
    from lit_eemllm.data.shards import make

    with tempfile.TemporaryDirectory() as folder:
        rows, images = {split: Path(path) for split, path in args.rows}, args.images
        if len(rows) < len(args.rows):
            raise UserError(
                "shards make: a split is given twice; join its JSON files first, or put parquet files into a folder"
            )
        if "" in rows and not rows[""].is_dir():
            raise UserError(
                f"shards make: --rows: found {str(rows[''])!r}, expected SPLIT=FILE, such as train={rows['']}"
            )
        if args.source is not None:
            file, _, function = PROCEDURAL[args.source].partition(":")
            write = getattr(run_recipe(file), function)
            counts = {"train": args.train, "val": args.val}
            rows = {split: write(Path(folder), split, count) for split, count in counts.items() if count}
            images = Path(folder) / "images"
        say(make(rows, images, args.out, columns=args.columns, **options))


def _prepare(args: Namespace) -> None:
    from lit_eemllm.data.shards import prepare

    for split, count in prepare(args.folder).items():
        say(f"{split}: {count:,} samples")


def _check(args: Namespace) -> int:
    config = config_of(args) if args.inputs else None
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


def _inspect(args: Namespace) -> None:
    config = config_of(args)
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
