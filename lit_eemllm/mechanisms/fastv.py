"""FastV (2403.06764 and its code): visual tokens that the last instruction token attends to least leave after an early layer.

Attention of layer ``after - 1``, mean over heads, ranks; layers from ``after`` on run without a share ``drop`` of each image. The rest
keep their positions, as in the code. The paper's K = 2, R = 0.5 for LLaVA-1.5 are the default. Our reading: in training the token
before each answer ranks (the paper does not train), and each image of several keeps its own share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..core.select import Top
from ..core.table import LayerPlan
from .base import Mechanism, number_problems, register_mechanism, share_problems

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class FastV(Mechanism):
    """Options: the first layer without them, and the share that leaves."""

    after: int = 2
    drop: float = 0.5

    def plan(self, layer: int, layers: int) -> LayerPlan:
        row = super().plan(layer, layers)
        return replace(row, tokens=Top(self.drop, self.after - 1)) if layer >= self.after else row

    def stretched(self, num_layers: int, of: int = 32) -> Self:
        return replace(super().stretched(num_layers, of), after=max(1, self.after * num_layers // of))

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        wrong = number_problems("after", self.after, 1, num_layers) + share_problems("drop", self.drop)
        return wrong or super().problems(num_layers)


register_mechanism("fastv", FastV(dense_layers="all"))
