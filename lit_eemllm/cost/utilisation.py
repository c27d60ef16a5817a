"""MFU: the FLOPs that packs need, as a share of what the device could have done meanwhile."""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ..layout import SequenceLayout
from .formulas import prefill_flops
from .trace import Document, trace
from .weightless import Parts

if TYPE_CHECKING:
    from ..config.keys import Config
    from ..mechanisms.schedule import Entry
    from ..model import EEMLLM

TEXTS = (64, 256)
"""Text tokens, all supervised, of two documents with an image, by which all but the decoder's layers are known."""


class StepFlops:
    """FLOPs of packs in steps of an entry of the schedule, forward and backward, as `estimate` counts them: attention full, nothing that is computed again.

    Those of the decoder's layers in the forward pass go by the table, document by document. All others are in part proportional to
    them, as head, backward pass and teacher, and in part to the visual tokens, as encoder and connector: by what two documents need (our
    reading: exact enough for a gauge).
    """

    def __init__(self, config: Config, model: EEMLLM, entry: Entry) -> None:
        self.mechanism, self.decoder = entry.mechanism, model.config.text_config
        transform = model.vision.transform
        visual = transform.num_tokens(*transform.largest)
        vision = model.config.vision
        parts = Parts(self.decoder, vision["encoder"], vision["config"], model.connector)
        width = model.vision.hidden_size
        self.connected: dict[str, Any] = {"vision_width": width, "connector": model.connector, "view": parts.view}
        self.layers = cache(self._layers)
        steps = [trace(config, parts, self.mechanism, Document(text, visual, text), entry.teacher) for text in TEXTS]
        less, more = (step.forward_flops + step.teacher_flops + step.backward_flops for step in steps)
        few, many = (self.layers(text, visual) for text in TEXTS)
        self.share = (more - less) / (many - few)
        self.image = (less - self.share * few) / visual

    def _layers(self, text: int, visual: int) -> int:
        return prefill_flops(self.mechanism, self.decoder, text, visual, **self.connected)

    def of(self, layout: SequenceLayout) -> float:
        """Of a pack."""
        lengths = [
            [sum(run.length for run in document if run.visual == kind) for kind in (False, True)]
            for document in layout.documents
        ]
        return sum(self.share * self.layers(text, visual) + self.image * visual for text, visual in lengths)


def peak_flops(device: torch.device, dtype: torch.dtype, size: int = 8192, repeats: int = 10) -> float:
    """FLOP/s of the device, measured: the fastest of some large matrix products."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        (a @ b).sum().item()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)
