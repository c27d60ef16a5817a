"""`convert`: a trained model under another mechanism or behind another connector, from and to transformers' formats."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from lit_eemllm.cli.common import named, separated, takes_imports, verb
from lit_eemllm.errors import ConfigError


def add(verbs: Any) -> None:
    examples = (
        "lit-eemllm convert runs/stage1 --out runs/stage1-saisa --mechanism saisa",
        "lit-eemllm convert llava-1.5-7b-hf --out runs/ee --mechanism ee_mllm",
        "lit-eemllm convert Qwen2.5-VL-3B-Instruct --out runs/vica --mechanism vica",
        "lit-eemllm convert runs/llava --out my-llava-hf --to-transformers",
    )
    text = "Write a trained model under another mechanism; read and write transformers' models of images and text."
    made = takes_imports(verb(verbs, "convert", _convert, text, *examples))
    text = "a run directory (its newest checkpoint), a folder of an EEMLLM (save_pretrained) or of a model of images "
    text += "and text in transformers' format (LLaVA, LLaVA-OneVision, SmolVLM, InternVL, Qwen2.5-VL, ...); then overrides: model.mechanism.*, which without a preset change the source's own "
    text += "mechanism, model.connector.* likewise, and seed, of modules that are fresh"
    made.add_argument("inputs", nargs="*", metavar="SOURCE|key=value", help=text)
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    named(
        "mechanisms",
        made.add_argument("--mechanism", metavar="PRESET", help="such as ee_mllm or saisa; default: the source's own"),
    )
    text = "write one of transformers' own models, which loads anywhere without this package, and check that it computes the same; "
    text += "mechanism llava"
    made.add_argument("--to-transformers", "--self-contained", "--to-llava", action="store_true", help=text)


def _convert(args: Namespace) -> None:
    sources, overrides = separated(args.inputs)
    if len(sources) != 1:
        raise ConfigError(f"convert: expected one source, found {' '.join(sources) or 'none'}")
    if args.mechanism is not None:
        overrides.insert(0, f"model.mechanism.preset={args.mechanism}")
    from lit_eemllm.formats.convert import convert

    convert(Path(sources[0]), args.out, overrides, args.to_transformers)
