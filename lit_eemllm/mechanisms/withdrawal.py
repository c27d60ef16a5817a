"""Visual-token withdrawal (VTW, 2405.05803): all visual tokens leave after layer ``after``; text goes on alone.

Printed: layer 16 of 32 for LLaVA-1.5-7B, found by the KL of the output on a few samples. Positions keep the images' gap (our reading).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..core.select import NOTHING
from ..core.table import LayerPlan
from .base import Mechanism, number_problems, register_mechanism

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Withdrawal(Mechanism):
    """Option: the first layer without visual tokens."""

    after: int = 16

    def plan(self, layer: int, layers: int) -> LayerPlan:
        row = super().plan(layer, layers)
        return replace(row, tokens=NOTHING) if layer >= self.after else row

    def stretched(self, num_layers: int, of: int = 32) -> Self:
        return replace(super().stretched(num_layers, of), after=max(1, self.after * num_layers // of))

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        return number_problems("after", self.after, 1, num_layers) or super().problems(num_layers)


register_mechanism("withdrawal", Withdrawal(dense_layers="all"))
