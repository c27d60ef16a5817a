"""Write the table of training memory in docs/models.md: published models x mechanisms x configs/checkpoints, as `lit-eemllm estimate` says.

python tools/estimate_models.py                     # all: about five minutes on two cores, no weights, no network
python tools/estimate_models.py smolvlm2-500m       # one row of models; the others stay
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path

from lit_eemllm import cli

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "models.md"
MODELS = ("smolvlm2-2.2b", "idefics3-8b", "internvl3-8b", "llava-onevision-7b", "qwen2.5-vl-7b", "qwen3-vl-8b")
MECHANISMS = ("llava", "ee_mllm", "vica", "pyramid_drop")
HARDWARE = {"lora_24gb": (1, 24), "lora_80gb": (1, 80), "full_8x80gb": (8, 80)}
"""File of configs/checkpoints -> GPUs, and GB of each."""


def command(model: str, mechanism: str, hardware: str) -> list[str]:
    """Arguments of `lit-eemllm` that say what a step takes: an image of 640 x 480 and 256 tokens of text a document, packs filled with them."""
    files = [f"configs/checkpoints/{name}.yaml" for name in ["qwen_vl"] * model.startswith("qwen") + [hardware]]
    gpus, memory = HARDWARE[hardware]
    options = f"--shape {model} --image 640x480 --text 256 --gpus {gpus} --memory {memory} --only --json"
    return ["estimate", *files, f"model.mechanism.preset={mechanism}", *options.split()]


def memory(model: str, mechanism: str, hardware: str) -> float:
    """GiB a GPU."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        if cli.main(command(model, mechanism, hardware)):
            sys.exit(f"{model}, {mechanism}, {hardware}: estimate failed")
    (row,) = json.loads(printed.getvalue())["mechanisms"].values()
    return float(row["fits"]["fsdp_recomputing" if HARDWARE[hardware][0] > 1 else "ddp_recomputing"]["bytes"] / 2**30)


def line(model: str, mechanism: str) -> str:
    """A row of the table."""
    cells = [f"{memory(model, mechanism, hardware):.1f}" for hardware in HARDWARE]
    return f"| `{model}` | `{mechanism}` | {' | '.join(cells)} |"


def main(models: Iterable[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for model in models:
        for mechanism in MECHANISMS:
            made = line(model, mechanism)
            page, rows = re.subn(rf"^\| `{re.escape(model)}` \| `{mechanism}` \|.*$", made, page, flags=re.MULTILINE)
            if not rows:
                sys.exit(f"{PAGE} has no row for {made}")
            print(made, flush=True)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or MODELS)
