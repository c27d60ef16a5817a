"""`calibrate`: find the layers that can treat visual tokens more cheaply."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from lit_eemllm.cli.common import config_of, takes_config, verb


def add(verbs: Any) -> None:
    example = "lit-eemllm calibrate runs/llava --target shortv --layers 19"
    text = "Find the layers of a self-attention model that can treat visual tokens more cheaply."
    made = takes_config(verb(verbs, "calibrate", _calibrate, text, example), checkpoint=True)
    made.add_argument(
        "--target", required=True, metavar="PRESET", help="the mechanism to find, such as ee_mllm_f, shortv or vica"
    )
    many = made.add_mutually_exclusive_group()
    text = "layers to convert or, as for vica, those in which text sees the image; default: the preset's share of all"
    many.add_argument("--layers", type=int, metavar="N", help=text)
    many.add_argument("--budget", type=float, metavar="SHARE", help="the same as a share of all layers, such as 0.6")
    text = "rank by the KL of the output or, as for vica, by the cosine similarity of text states; default kl"
    made.add_argument("--by", choices=("kl", "cosine"), default="kl", help=text)
    made.add_argument("--samples", type=int, default=40, metavar="N", help="of data.val, with images; default 40")
    made.add_argument("--out", type=Path, metavar="DIR", help="default: calibrate-TARGET in the run directory")


def _calibrate(args: Namespace) -> None:
    config = config_of(args)
    from lit_eemllm.evaluation.calibrate import calibrate

    calibrate(config, args.checkpoint, args.target, args.layers, args.budget, args.by, args.samples, args.out)
