"""A worked example: one question about one picture, and where each run looks when it answers.

    python tools/attention_maps.py RUN [RUN ...] --image FILE --question TEXT --answer TEXT --out FOLDER

Each run is shown with what it finds most likely, and for each layer the attention to each visual token, mean over heads: of the row that
predicts the answer's first token, and the mean of the question's rows before it, after the picture. Attention is linear in its values, so with values that are one-hot in the visual tokens, as many at a
time as a head is wide, it gives its weights, under any backend. Writes example.png and example.json. Only for encoders that make one square grid
of tokens of a picture.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_eemllm.attention import AttentionBackend
from lit_eemllm.config import load_config
from lit_eemllm.console import quiet_libraries, write_atomically
from lit_eemllm.data.packing import collate
from lit_eemllm.data.samples import SampleEncoder
from lit_eemllm.doctor import provenance
from lit_eemllm.errors import UserError
from lit_eemllm.evaluation.calibrate.attention import Watched
from lit_eemllm.evaluation.run import load
from lit_eemllm.layout import PackedBatch
from lit_eemllm.model import EEMLLM


class Mapped(Watched):
    """A backend that also keeps the weights of text on each visual token.

    Attributes:
        weights: of each layer, [T, V], mean over heads; shorter than T where only some text queries.
    """

    def __init__(self, inner: AttentionBackend) -> None:
        super().__init__(inner)
        self.weights: dict[int, Tensor] = {}

    def attend(self, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, plan: Any, scale: float) -> Tensor:
        own, visual_V, text = plan
        if self.layer is not None and text is not None:
            wide, parts = v_SKH.shape[-1], []
            for some_V in visual_V.split(wide):
                one_hot_SKH = torch.zeros_like(v_SKH)
                one_hot_SKH[some_V, :, torch.arange(len(some_V))] = 1
                parts.append(self.inner.attend(q_QNH, k_SKH, one_hot_SKH, own, scale)[text].mean(1)[:, : len(some_V)])
            self.weights[self.layer] = torch.cat(parts, 1)
        return self.inner.attend(q_QNH, k_SKH, v_SKH, own, scale)


@torch.inference_mode()
def looked_at(model: EEMLLM, pack: PackedBatch) -> tuple[list[int], dict[str, list[list[float]]]]:
    """The most likely token of each supervised position; of the answer's row and the question's, for each layer the weights [V]."""
    mapped = Mapped(model.backend)
    with mapped.on(model):
        likely = model.packed_logits(pack).argmax(-1).tolist()
    answer = int(pack.target_rows[0])
    question = (~pack.layout.prefix()).nonzero().flatten()
    rows = {"answer": pack.target_rows[:1], "question": question[question < answer]}
    nothing = torch.zeros(pack.layout.num_text, pack.layout.num_visual)
    weights = [mapped.weights.get(layer, nothing) for layer in range(len(model.language_model.model.layers))]
    weights = [one if one.shape[1] else nothing for one in weights]  # a layer in which text sees no image
    if any(one.shape != nothing.shape for one in weights):
        raise UserError(
            f"model.mechanism: visual tokens leave under {model.mechanism.name}, so that there is no map of them"
        )
    return likely, {name: [one[some].mean(0).tolist() for one in weights] for name, some in rows.items()}


def draw(picture: Image.Image, title: str, runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Two lines of panels for each run, of the question and of the answer: for each layer, red where it looks, over the picture in grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [(run, rows) for run in runs for rows in ("question", "answer")]
    depth = max(len(run["answer"]) for run in runs)
    size = 2.4 * (depth + 1), 2.6 * len(lines) + 0.4
    figure, axes = plt.subplots(len(lines), depth + 1, figsize=size, squeeze=False, layout="constrained")
    for line, (run, rows) in zip(axes, lines, strict=True):
        line[0].imshow(picture)
        line[0].set_title(f"{run['preset']} says {run['said']}; {rows}:", fontsize="small")
        for layer, (axis, weights) in enumerate(zip(line[1:], run[rows], strict=False)):
            side = isqrt(len(weights))
            everywhere = {"extent": (0, side, side, 0)}
            axis.imshow(picture.convert("L"), cmap="gray", alpha=0.35, **everywhere)
            axis.imshow(np.reshape(weights, (side, side)), cmap="Reds", alpha=0.7, vmin=0, **everywhere)
            axis.set_title(f"layer {layer}: {sum(weights):.0%} on the picture", fontsize="small")
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def example(folders: Sequence[Path], image: Path, question: str, answer: str, out: Path, command: str) -> None:
    """Ask and write, with the command that did it. Raises UserError."""
    quiet_libraries()
    row = {"conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]}
    members, runs = {"json": json.dumps(row).encode(), "0.png": image.read_bytes()}, []
    for folder in folders:
        config = load_config([folder / "config.yaml"], [])
        model, processor, _ = load(config, None)
        limits = config.data.max_length, config.data.truncation, config.data.max_image_pixels
        encoder = SampleEncoder(processor.template, model.vision.transform, *limits)
        pack = collate([encoder.load_pixels(encoder.tokenize(str(image), members))]).to(model.device)
        if pack.layout.image_lengths != [isqrt(pack.layout.num_visual) ** 2]:
            raise UserError(f"{folder}: expected one image of a square of tokens, found {pack.layout.image_lengths}")
        likely, maps = looked_at(model, pack)
        said = processor.tokenizer.decode(likely, skip_special_tokens=True)
        runs.append({"run": str(folder), "preset": config.model.mechanism.preset, "said": said, **maps})
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(
        out / "example.json",
        json.dumps({"question": question, "answer": answer, "runs": runs, "made": provenance(command)}),
    )
    with Image.open(image) as picture:
        draw(picture.convert("RGB"), f"{question} ({answer})", runs, out / "example.png")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories")
    parser.add_argument("--image", type=Path, required=True, help="a PNG or JPEG file")
    parser.add_argument("--question", required=True)
    parser.add_argument("--answer", required=True, help="the right one")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is written")
    args = parser.parse_args(argv)
    try:
        command = shlex.join(["python", "tools/attention_maps.py", *argv])
        example(args.runs, args.image, args.question, args.answer, args.out, command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
