"""`calibrate`: find what a model can do without for its visual tokens: layers for a target, or operators under a budget."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from lit_eemllm.cli.common import config_of, named, takes_config, verb
from lit_eemllm.errors import UserError


def add(verbs: Any) -> None:
    examples = (
        "lit-eemllm calibrate runs/llava --target shortv --layers 19",
        "lit-eemllm calibrate runs/llava --budget 0.66 --operators attention,ffn",
    )
    text = "Find what a self-attention model can do without for its visual tokens: layers (--target) or operators (--budget)."
    made = takes_config(verb(verbs, "calibrate", _calibrate, text, *examples), checkpoint=True)
    text = "rank layers for a mechanism such as ee_mllm_f, shortv or vica"
    named("mechanisms", made.add_argument("--target", metavar="PRESET", help=text))
    text = "with --target: how many layers to convert or, as for vica, in how many text sees the image, or their share of all, such as 0.6; default: the preset's"
    made.add_argument("--layers", type=float, metavar="N|SHARE", help=text)
    text = "with --target: rank by the KL of the output or, as for vica, by the cosine similarity of text states; default kl"
    made.add_argument("--by", choices=("kl", "cosine"), help=text)
    text = "skip single operators until a prompt takes at most this share of the dense model's FLOPs, such as 0.66"
    made.add_argument("--budget", type=float, metavar="SHARE", help=text)
    text = "with --budget: which may be skipped for visual tokens, of attention, ffn and seen (text's sight of them); default all"
    made.add_argument("--operators", metavar="NAMES", help=text)
    made.add_argument("--samples", type=int, default=40, metavar="N", help="of data.val, with images; default 40")
    text = "default: calibrate-TARGET, or calibrate-operators, in the run directory"
    made.add_argument("--out", type=Path, metavar="DIR", help=text)


def _calibrate(args: Namespace) -> None:
    if args.target is None and args.budget is None:
        raise UserError(
            "calibrate needs --target PRESET, to rank layers for it, or --budget SHARE, to skip single operators"
        )
    if args.target is not None and args.budget is not None:
        raise UserError(
            f"--budget {args.budget:g} is a share of FLOPs, for single operators, and --target {args.target} ranks whole layers: give one "
            "of them. How many layers is said by --layers: --layers 19 or, as a share of them all, --layers 0.6"
        )
    strays = ("operators",) if args.target is not None else ("layers", "by")
    if stray := next((name for name in strays if getattr(args, name) is not None), None):
        raise UserError(f"--{stray} goes with {'--budget' if stray == 'operators' else '--target'}")
    config = config_of(args)
    from lit_eemllm.evaluation.calibrate import calibrate_layers, calibrate_operators

    if args.target is not None:
        calibrate_layers(config, args.checkpoint, args.target, args.layers, args.by or "kl", args.samples, args.out)
    else:
        calibrate_operators(config, args.checkpoint, args.budget, args.operators, args.samples, args.out)
