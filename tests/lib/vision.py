"""Models of images of many sizes and of tiles, and packs for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image

from lit_eemllm.layout import PackedBatch, Run, SequenceLayout, join_images
from lit_eemllm.mechanisms import Connector
from lit_eemllm.mechanisms.connectors import DEFAULT
from lit_eemllm.model import EEMLLM

PICTURES = [(40, 20), (9, 30), (5, 5), (40, 20), (64, 17)]


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def make_model(encoder: str, mechanism: str = "ee_mllm", seed: int = 0, connector: Connector = DEFAULT) -> EEMLLM:
    return tiny.model("llama-gqa", mechanism, encoder, seed, connector=connector)


def pack(model: EEMLLM, documents: list[list[int | tuple[int, int]]], seed: int = 0) -> PackedBatch:
    """Of documents: a number is that much text, a pair the picture of this size, random by its place in the pack."""
    transform, generator = model.vision.transform, torch.Generator().manual_seed(seed)
    sizes = [item for document in documents for item in document if isinstance(item, tuple)]
    layout = SequenceLayout.of(
        [
            [Run(True, transform.num_tokens(*x)) if isinstance(x, tuple) else Run(False, x) for x in document]
            for document in documents
        ]
    )
    ids = torch.randint(3, tiny.VOCAB, (layout.num_tokens,), generator=generator)
    rows = [t for t, s in enumerate(layout.text_index.tolist()[:-1]) if layout.text_index[t + 1] == s + 1]
    rows = [t for t in rows if layout.positions[layout.text_index[t + 1]] > 0]
    pixels = [transform(picture(size, seed + i)) for i, size in enumerate(sizes)]
    return PackedBatch(
        input_ids=ids.index_fill(0, layout.visual_index, 0),
        target_rows=torch.tensor(rows),
        targets=ids[layout.text_index][torch.tensor(rows) + 1],
        pixel_values=join_images(pixels) if pixels else None,
        layout=layout,
        keys=[str(i) for i in range(len(documents))],
        image_sizes=sizes,
    )


def alone(batch: PackedBatch) -> list[PackedBatch]:
    """Each document as a pack of its own."""
    packs, row, text, image = [], 0, 0, 0
    for document in batch.layout.documents:
        layout = SequenceLayout.of([document])
        images = slice(image, image + len(layout.image_lengths))
        mine = (batch.target_rows >= text) & (batch.target_rows < text + layout.num_text)
        pixels = list(batch.pixel_values[images]) if batch.pixel_values is not None else []
        packs.append(
            replace(
                batch,
                input_ids=batch.input_ids[row : row + layout.num_tokens],
                target_rows=batch.target_rows[mine] - text,
                targets=batch.targets[mine],
                pixel_values=join_images(pixels) if pixels else None,
                layout=layout,
                image_sizes=batch.image_sizes[images],
            )
        )
        row, text, image = row + layout.num_tokens, text + layout.num_text, images.stop
    return packs


def prompts(model: EEMLLM, documents: list[list[int | tuple[int, int]]], seed: int = 0) -> dict[str, Any]:
    """Left-padded ids of documents, with their images."""
    packs = [pack(model, [document], seed + 10 * i) for i, document in enumerate(documents)]
    ids = [b.input_ids.index_fill(0, b.layout.visual_index, tiny.VOCAB) for b in packs]
    longest = max(map(len, ids))
    return {
        "input_ids": torch.stack([torch.nn.functional.pad(x, (longest - len(x), 0)) for x in ids]),
        "attention_mask": torch.stack([(torch.arange(longest) >= longest - len(x)).long() for x in ids]),
        "pixel_values": [image for b in packs if b.pixel_values is not None for image in b.pixel_values],
        "image_sizes": [size for b in packs for size in b.image_sizes],
    }
