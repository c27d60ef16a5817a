"""`estimate` and `explain`: what a configuration costs and does, without weights."""

from __future__ import annotations

import re
import tempfile
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_eemllm.cli.common import config_of, named, separated, takes_config, verb

if TYPE_CHECKING:
    from lit_eemllm.config.keys import Config


def add(verbs: Any) -> None:
    examples = (
        "lit-eemllm estimate configs/stages/finetune.yaml --shape vicuna-7b --gpus 8 --memory 80",
        "lit-eemllm estimate --shape qwen2.5-vl-7b --image 1280x960 --gpus 1 --memory 24",
    )
    text = "Show FLOPs, cache size and training memory of every mechanism; reads config files, no weights."
    made = _takes_shape(takes_config(verb(verbs, "estimate", _estimate, text, *examples)))
    made.add_argument("--targets", type=int, metavar="N", help="its supervised tokens, default: all its text")
    text = "documents in a pack and sequences in a cache, default: as many as fill data.pack_tokens"
    made.add_argument("--batch", dest="documents", type=int, metavar="N", help=text)
    made.add_argument("--gpus", type=int, default=8, metavar="N", help="default 8")
    made.add_argument("--memory", type=float, default=80.0, metavar="GIB", help="of each GPU, default 80")
    made.add_argument("--only", action="store_true", help="the configured mechanism alone")
    made.add_argument("--json", action="store_true", help="all of it as JSON")

    examples = (
        "lit-eemllm explain --shape vicuna-7b model.mechanism.preset=vica --out vica.png",
        "lit-eemllm explain configs/demo/ee_mllm.yaml",
    )
    text = "Show what each layer does with visual tokens, and its FLOPs; reads config files, no weights."
    made = _takes_shape(takes_config(verb(verbs, "explain", _explain, text, *examples)))
    made.add_argument("--out", type=Path, metavar="FILE", help="draw it too, with masks (.png, .svg or .pdf)")


def _takes_shape(made: ArgumentParser) -> ArgumentParser:
    text = (
        "a published model, such as vicuna-7b (with CLIP-L/14-336) or qwen2.5-vl-7b (docs/models.md), or a folder with a model's config files, "
        "in place of the configuration's parts; a CONFIG is then optional"
    )
    named("shapes", made.add_argument("--shape", metavar="NAME", help=text))
    made.add_argument("--text", type=int, default=64, metavar="N", help="text tokens of a document, default 64")
    made.add_argument("--visual", type=int, metavar="N", help="its visual tokens, default: those of one image, at most")
    made.add_argument("--image", type=_size, metavar="WIDTHxHEIGHT", help="those of an image of this size")
    return made


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if found is None:
        raise ArgumentTypeError(f"found {text!r}, expected width and height in pixels, such as 640x480")
    return int(found[1]), int(found[2])


def _estimate(args: Namespace) -> None:
    config = _config(args)
    from lit_eemllm.cost.estimate import estimate

    names = ("shape", "text", "visual", "image", "targets", "documents", "gpus", "memory", "only")
    estimate(config, **{name: getattr(args, name) for name in names}, as_json=args.json)


def _explain(args: Namespace) -> None:
    config = _config(args)
    from lit_eemllm.cost.explain import explain

    names = ("shape", "text", "visual", "image", "out")
    explain(config, **{name: getattr(args, name) for name in names})


def _config(args: Namespace) -> Config:
    """The configuration, whose parts --shape can stand in for."""
    with tempfile.TemporaryDirectory() as folder:
        if args.shape is not None:
            from lit_eemllm.cost.weightless import SHAPE_ALONE, SHAPE_CONFIG

            files, _ = separated(args.inputs)
            texts = [SHAPE_CONFIG] if files else [SHAPE_CONFIG, SHAPE_ALONE]
            bases = [Path(folder) / f"shape{number}.yaml" for number in range(len(texts))]
            for base, text in zip(bases, texts, strict=True):
                base.write_text(text, encoding="utf-8")
            args.inputs = [*map(str, bases), *args.inputs]
        return config_of(args)
