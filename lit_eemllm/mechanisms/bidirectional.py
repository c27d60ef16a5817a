"""Attention both ways inside an image, in LLaVA's layers (Gemma 3, 2503.19786; Molmo 2, 2601.10611; 2505.18605).

A visual token sees everything before it, as in LLaVA, and all of its own image; text sees what is before it. For ``t V V V t``::

    1 0 0 0 0
    1 1 1 1 0
    1 1 1 1 0
    1 1 1 1 0
    1 1 1 1 1

Where the decoder's layer has a sliding window, neither sees farther back than that, as in transformers' Gemma 3 (its 5.24).

Our reading: tiles of one image see each other too; several images see those before them only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.table import LayerPlan
from .base import Mechanism, register_mechanism


@dataclass(frozen=True)
class Bidirectional(Mechanism):
    """Dense layers see both ways."""

    def plan(self, layer: int, layers: int) -> LayerPlan:
        row = super().plan(layer, layers)
        return replace(row, attend="image") if row.dense else row


register_mechanism("bidirectional", Bidirectional(dense_layers="all"))
