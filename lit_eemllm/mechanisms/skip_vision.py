"""Skip-Vision (2503.21817): all visual tokens attend, but the feed-forward network updates only some; the others pass it by.

    H_I = I + attention        I'_J = H_J + FFN(norm2(H_J)) for J, a share of I        I' = H elsewhere

Printed: the idea, and its savings. Our reading: J is a share ``fed`` of each image, evenly spaced, from layer ``first`` on (the paper's
own tokens at the end of each scale belong to its encoder), and the cache keeps all (the paper drops the others' keys when generating).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.select import Share
from ..core.table import LayerPlan
from .base import Mechanism, number_problems, register_mechanism, share_problems


@dataclass(frozen=True)
class SkipVision(Mechanism):
    """Options: the share of each image that the feed-forward network updates, and the first layer in which that is so."""

    fed: float = 0.25
    first: int = 0

    def plan(self, layer: int, layers: int) -> LayerPlan:
        row = super().plan(layer, layers)
        return replace(row, ffn=Share(self.fed)) if layer >= self.first else row

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        wrong = share_problems("fed", self.fed) + number_problems("first", self.first, 0, num_layers - 1)
        return wrong or super().problems(num_layers)


register_mechanism("skip_vision", SkipVision(dense_layers="all"))
