"""MFU: the FLOPs that packs need, as a share of what the device could have done meanwhile."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from ..layout import SequenceLayout
from .formulas import prefill_flops
from .trace import Document, trace
from .weightless import Parts

if TYPE_CHECKING:
    from ..config.keys import Config
    from ..mechanisms.schedule import Entry, Schedule
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
        self._known: dict[tuple[int, int], int] = {}
        steps = [trace(config, parts, self.mechanism, Document(text, visual, text), entry.teacher) for text in TEXTS]
        less, more = (step.forward_flops + step.teacher_flops + step.backward_flops for step in steps)
        few, many = (self._layers(text, visual) for text in TEXTS)
        self.share = (more - less) / (many - few)
        self.image = (less - self.share * few) / visual

    def _layers(self, text: int, visual: int) -> int:
        if (text, visual) not in self._known:
            self._known[text, visual] = prefill_flops(self.mechanism, self.decoder, text, visual, **self.connected)
        return self._known[text, visual]

    def of_document(self, text: int, visual: int) -> float:
        """Of a document with so many tokens of each kind."""
        return self.share * self._layers(text, visual) + self.image * visual

    def of(self, layout: SequenceLayout) -> float:
        """Of a pack."""
        lengths = [
            [sum(run.length for run in document if run.visual == kind) for kind in (False, True)]
            for document in layout.documents
        ]
        return sum(self.of_document(text, visual) for text, visual in lengths)


class RunFlops:
    """FLOPs of a document in the steps of a run: of each entry of the schedule that is used, by its share of the steps."""

    def __init__(self, config: Config, model: EEMLLM, schedule: Schedule) -> None:
        shares = zip(schedule.entries, schedule.shares(config.optim.max_steps), strict=True)
        self.parts = [(share, StepFlops(config, model, entry)) for entry, share in shares if share]

    def __call__(self, text: int, visual: int) -> float:
        return sum(share * flops.of_document(text, visual) for share, flops in self.parts)


def peak_flops(device: torch.device, dtype: torch.dtype, size: int = 8192, repeats: int = 10) -> float:
    """FLOP/s of the device, measured: the fastest of some large matrix products."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        (a @ b).sum().item()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)
