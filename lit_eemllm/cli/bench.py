"""`bench`: mechanisms beside transformers' own LLaVA on this machine."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from lit_eemllm.cli.common import named, takes_imports, verb


def add(verbs: Any) -> None:
    examples = (
        "lit-eemllm bench",
        "lit-eemllm bench --shape smollm2-135m --layers 6 --visual 64 256 1024 --systems llava ee_mllm vica --minutes 10",
    )
    text = "Measure prefill, a second question, decoding and training over the number of visual tokens, every mechanism beside transformers' own LLaVA."
    made = takes_imports(verb(verbs, "bench", _bench, text, *examples))
    text = "of the decoder: small, smollm2-135m, 7b; default: small, 7b on a GPU"
    named("sizes", made.add_argument("--shape", metavar="NAME", help=text))
    made.add_argument("--layers", type=int, metavar="N", help="in place of the shape's")
    made.add_argument(
        "--visual", nargs="+", type=int, metavar="V", help="visual tokens of a picture; default: 64 to 4,096"
    )
    made.add_argument("--text", type=int, metavar="T", help="text tokens of a prompt; default: 64, 256 on a GPU")
    made.add_argument("--tokens", type=int, metavar="N", help="of an answer; default: 8, 32 on a GPU")
    made.add_argument("--documents", type=int, metavar="N", help="in a training step; default: 2, 4 on a GPU")
    text = "mechanisms, and hf eager, hf sdpa, hf flash; default: all mechanisms beside hf sdpa"
    named("mechanisms", made.add_argument("--systems", nargs="+", metavar="NAME", help=text))
    made.add_argument(
        "--measures",
        nargs="+",
        metavar="NAME",
        help="of prefill, second, decode, training, and graph on a GPU; default: all",
    )
    named("backends", made.add_argument("--attention", metavar="NAME", help="this project's backend; default: auto"))
    made.add_argument("--rounds", type=int, metavar="N", help="at most; default: 5")
    made.add_argument("--minutes", type=float, metavar="M", help="in which rounds begin; default: 2, 10 on a GPU")
    text = "folder of report.md, report.png and result.json; default: %(default)s"
    made.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help=text)


def _bench(args: Namespace) -> None:
    from lit_eemllm.bench import bench, setting

    given = {name: value for name, value in vars(args).items() if name not in ("run", "parser", "imports", "out")}
    bench(setting(**given), args.out)
