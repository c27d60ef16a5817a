"""Prove that a real checkpoint is read right: transformers' own model and processor beside ours, on a few pictures.

    python tools/check_model.py Qwen2.5-VL-3B-Instruct                       # a folder, in transformers' format
    python tools/check_model.py InternVL3-8B-hf --device cuda --image a.jpg  # with pictures of your own

Of each conversation it compares the ids, the pixels (in levels of 255; filters differ by a few here and there) and the logits of all text
positions, both from our pixels, in float32. One model is in memory at a time: 4 bytes a parameter. Prints a table; ends with 1 if
anything differs. transformers' processors of most families need torchvision, SmolVLM's num2words too.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor
from transformers import AutoProcessor

from lit_eemllm.console import console, quiet_libraries
from lit_eemllm.errors import UserError
from lit_eemllm.formats.vlm import load_vlm, read_format
from lit_eemllm.inputs.conversation import IMAGE, Conversation, Turn
from lit_eemllm.model import Processor

SIZES = ((640, 480), (300, 1000), (1600, 400), (90, 60))
LEVELS = 8.0, 0.3
"""Of 255, the most anywhere and on average that resizing by another library may differ by."""
LOGITS = 1e-3
"""Largest difference of a logit, of the largest logit."""


@dataclass
class Row:
    """What differs in a conversation: ids (how many, of how many), pixels (most and mean, in levels), logits; None = not compared."""

    name: str
    ids: tuple[int, int]
    levels: tuple[float, float] | None
    logits: float | None

    @property
    def equal(self) -> bool:
        near = self.levels is None or all(found <= most for found, most in zip(self.levels, LEVELS, strict=True))
        return self.ids[0] == 0 and near and self.logits is not None and self.logits <= LOGITS

    def cells(self) -> list[str]:
        levels = "-" if self.levels is None else f"{self.levels[0]:.1f}, mean {self.levels[1]:.3f}"
        logits = "-" if self.logits is None else f"{self.logits:.1e}"
        return [self.name, f"{self.ids[0]} of {self.ids[1]:,}", levels, logits, "equal" if self.equal else "DIFFERENT"]


def drawn(size: tuple[int, int]) -> Image.Image:
    """A picture of waves, whose resized pixels a filter decides."""
    x, y = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="xy")
    waves = [torch.sin(x / 17 + k) * torch.cos(y / 11 - k) for k in range(3)]
    return Image.fromarray((127.5 + 127 * torch.stack(waves, dim=-1)).to(torch.uint8).numpy())


def conversations(pictures: Sequence[Image.Image]) -> list[tuple[str, list[str], Image.Image | None]]:
    """Name, turns (a human's first) and the picture of the first."""
    asked = [(f"{p.width} x {p.height}", ["What is in this picture?"], p) for p in pictures]
    turns = ("three turns", ["What is it?", "A cat.", "Are you sure?"], pictures[0])
    return [("no picture", ["Name a colour."], None), *asked, turns]


@torch.inference_mode()
def compare(folder: Path, pictures: Sequence[Image.Image], processor: Any, device: str = "cpu") -> list[Row]:
    """A row for each conversation; `processor` is transformers' own."""
    form, _ = read_format(folder)
    model, tokenizer = load_vlm(folder)
    template = "jinja" if tokenizer.chat_template else form.template
    own = Processor(tokenizer, template, model.vision.transform, model.config.image_token_id)
    model.float().to(device).set_attention("sdpa", training=False)
    rows, given = list[Row](), list[tuple[dict[str, Any], Tensor, Tensor]]()
    for name, texts, shown in conversations(pictures):
        images, mark = [] if shown is None else [shown], "" if shown is None else f"{IMAGE}\n"
        turns = tuple(Turn(("human", "gpt")[i % 2], text) for i, text in enumerate([mark + texts[0], *texts[1:]]))
        ours = own.prompts([Conversation(name, turns, len(images))], [images], device)
        theirs = dict(processor(text=asked(processor, texts, shown), images=images or None, return_tensors="pt"))
        a, b = ours["input_ids"][0].cpu(), theirs["input_ids"][0]
        rows.append(Row(name, (int((a != b).sum()) if a.shape == b.shape else max(len(a), len(b)), len(b)), None, None))
        if shown is not None:
            pixels = model.vision.transform.views(list(ours["pixel_values"]))
            views = form.pixels(model, pixels if isinstance(pixels, Tensor) else pixels[0][None])
            if views.shape == theirs["pixel_values"].shape:
                levels = (views - theirs["pixel_values"]).abs() * min(model.vision.transform.std) * 255
                rows[-1].levels = levels.max().item(), levels.mean().item()
            else:
                rows[-1].levels = math.inf, math.inf
            theirs["pixel_values"] = views
        text = a != model.config.image_token_id
        given.append((theirs, text, model(**ours).logits[0, text.to(device)].cpu()))
    image, kind = model.config.image_token_id, form.model_class
    del model
    gc.collect()

    twin = kind.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    known = torch.arange(twin.config.text_config.vocab_size) != image
    for row, (inputs, text, found) in zip(rows, given, strict=True):
        fits = row.ids[0] == 0 and (row.levels is None or row.levels[0] < math.inf)
        if fits:
            inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
            true = twin(**inputs).logits[0, text.to(device)].cpu()[:, known]
            row.logits = ((found[:, known] - true).abs().max() / true.abs().max()).item()
    return rows


def asked(processor: Any, texts: Sequence[str], shown: Image.Image | None) -> str:
    """The prompt that transformers' template makes."""
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(texts)
    ]
    if shown is not None:
        messages[0]["content"].insert(0, {"type": "image"})
    return str(processor.apply_chat_template(messages, add_generation_prompt=True))


def main(words: Sequence[str]) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path)
    made.add_argument("--image", type=Path, action="append", default=[], help="a picture of your own; repeatable")
    made.add_argument("--device", default="cpu")
    args = made.parse_args(words)
    quiet_libraries()
    pictures = [Image.open(path).convert("RGB") for path in args.image] or [drawn(size) for size in SIZES]
    try:
        rows = compare(args.folder, pictures, AutoProcessor.from_pretrained(args.folder), args.device)
    except (UserError, ImportError, ValueError) as error:
        console.print(f"error: {error}", markup=False)
        return 2
    table = Table("conversation", "ids that differ", "pixels, levels of 255", "logits", "", title=str(args.folder))
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)
    return int(not all(row.equal for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
