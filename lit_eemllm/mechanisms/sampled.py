"""A control: a share of each image's tokens whatever they hold, evenly spaced or drawn at random, as if the encoder gave fewer.

Choices by rank must beat this at equal FLOPs. ``random`` draws the same places for all images of a length, by ``seed``; which keeps
training and resuming exact. Layers below ``first`` have all tokens. Positions stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.select import Share
from ..core.table import LayerPlan
from .base import Mechanism, number_problems, register_mechanism, share_problems


@dataclass(frozen=True)
class Sampled(Mechanism):
    """Options: the share that is left, whether it is drawn, by which seed, and the first layer with fewer tokens."""

    share: float = 0.25
    random: bool = False
    seed: int = 0
    first: int = 0

    def plan(self, layer: int, layers: int) -> LayerPlan:
        row = super().plan(layer, layers)
        if layer < self.first:
            return row
        return replace(row, tokens=Share(self.share, self.seed if self.random else None))

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        wrong = share_problems("share", self.share) + number_problems("seed", self.seed, 0, 10**9 - 1)
        wrong += number_problems("first", self.first, 0, num_layers - 1)
        return wrong or super().problems(num_layers)


register_mechanism("sampled", Sampled(dense_layers="all"))
