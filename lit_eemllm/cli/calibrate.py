"""`calibrate`: find what a model can do without for its visual tokens: layers for a target, or operators under a budget; or compare runs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from lit_eemllm.cli.common import config_of, named, separated, takes_config, verb
from lit_eemllm.errors import UserError


def add(verbs: Any) -> None:
    examples = (
        "lit-eemllm calibrate runs/llava --target shortv --layers 19",
        "lit-eemllm calibrate runs/llava --budget 0.66 --operators attention,ffn",
        "lit-eemllm calibrate runs/llava --beside runs/ee_mllm",
    )
    text = "Find what a model can do without for its visual tokens: layers (--target) or operators (--budget); or compare runs (--beside)."
    made = takes_config(verb(verbs, "calibrate", _calibrate, text, *examples), checkpoint=True)
    text = "rank layers for a mechanism such as ee_mllm_f, shortv or vica"
    named("mechanisms", made.add_argument("--target", metavar="PRESET", help=text))
    text = "with --target: how many layers to convert or, as for vica, in how many text sees the image, or their share of all, such as 0.6; default: the preset's"
    made.add_argument("--layers", type=float, metavar="N|SHARE", help=text)
    text = "with --target: rank by the KL of the output or, as for vica, by the cosine similarity of text states; default kl"
    made.add_argument("--by", choices=("kl", "cosine"), help=text)
    text = "skip single operators until a prompt takes at most this share of the model's FLOPs, such as 0.66"
    made.add_argument("--budget", type=float, metavar="SHARE", help=text)
    text = "with --budget: which may be skipped for visual tokens, of attention, ffn and seen (text's sight of them); default all"
    made.add_argument("--operators", metavar="NAMES", help=text)
    text = "what each operator is worth in each layer, and the attention to visual tokens, in the run and these; of the others the newest checkpoint is taken"
    made.add_argument("--beside", nargs="*", metavar="RUN", help=text)
    made.add_argument("--samples", type=int, default=40, metavar="N", help="of data.val, with images; default 40")
    text = "default: calibrate-TARGET, calibrate-operators or calibrate-beside in the run directory"
    made.add_argument("--out", type=Path, metavar="DIR", help=text)


def _calibrate(args: Namespace) -> None:
    ways = [name for name in ("target", "budget", "beside") if getattr(args, name) is not None]
    if not ways:
        raise UserError(
            "calibrate needs --target PRESET, to rank layers for it, --budget SHARE, to skip single operators, or --beside RUN, to compare runs"
        )
    if ways == ["target", "budget"]:
        raise UserError(
            f"--budget {args.budget:g} is a share of FLOPs, for single operators, and --target {args.target} ranks whole layers: give one "
            "of them. How many layers is said by --layers: --layers 19 or, as a share of them all, --layers 0.6"
        )
    if len(ways) > 1:
        raise UserError(f"found --{' and --'.join(ways)}, expected one of them: --beside only measures")
    for option, way in (("layers", "target"), ("by", "target"), ("operators", "budget")):
        if getattr(args, option) is not None and ways != [way]:
            raise UserError(f"--{option} goes with --{way}")
    from lit_eemllm.evaluation.calibrate import calibrate_beside, calibrate_layers, calibrate_operators

    if args.beside is not None:
        runs, overrides = separated(args.beside)  # an override may stand behind the last run
        args.inputs += overrides
        others = [Namespace(**{**vars(args), "inputs": [run, *separated(args.inputs)[1]]}) for run in runs]
        calibrate_beside([config_of(each) for each in (args, *others)], args.checkpoint, args.samples, args.out)
    elif args.target is not None:
        config = config_of(args)
        calibrate_layers(config, args.checkpoint, args.target, args.layers, args.by or "kl", args.samples, args.out)
    else:
        calibrate_operators(config_of(args), args.checkpoint, args.budget, args.operators, args.samples, args.out)
