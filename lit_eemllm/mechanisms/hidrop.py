"""HiDrop (2602.23699): visual tokens enter late, thin out in the middle, and leave early.

Below layer ``begin`` text runs alone. There they enter, as the projector made them; in the layers of ``pyramid`` those that text attends
to least leave, so that the named share is left; from layer ``end`` on text runs alone again. Printed: the three steps, positions that
stay, nine tenths fewer visual tokens over all layers; attention of all text before the answers, mean over heads, ranks (its code). Our
reading: the numbers below, since the paper's were not found, and ranks without a soft mask, which in the code passes no gradient either.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..core.select import NOTHING, Top
from ..core.table import LayerPlan
from .base import Mechanism, register_mechanism

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class HiDrop(Mechanism):
    """Options: first layer with visual tokens, first without, and pairs of a layer and the share that is left from it on."""

    begin: int = 9
    end: int = 20
    pyramid: tuple[tuple[int, float], ...] = ((10, 0.5), (12, 0.25), (15, 0.125))

    def plan(self, layer: int, layers: int) -> LayerPlan:
        row = super().plan(layer, layers)
        if not self.begin <= layer < self.end:
            return replace(row, tokens=NOTHING)
        steps = [Top(1 - share, first, by="text") for first, share in self.pyramid if first <= layer]
        if not steps:
            return row
        return replace(row, tokens=replace(steps[-1], before=steps[-2].dropped if steps[1:] else 0.0))

    def stretched(self, num_layers: int, of: int = 32) -> Self:
        begin, end = self.begin * num_layers // of, -(-self.end * num_layers // of)
        found = {
            max(begin, first * num_layers // of): share for first, share in self.pyramid
        }  # the last of those that meet
        return replace(super().stretched(num_layers, of), begin=begin, end=end, pyramid=tuple(found.items()))

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        pairs = isinstance(self.pyramid, tuple) and all(
            isinstance(step, tuple) and len(step) == 2 and type(step[0]) is int and isinstance(step[1], float)
            for step in self.pyramid
        )
        if not pairs:
            return [
                (
                    "options.pyramid",
                    f"found {self.pyramid!r}, expected pairs of a layer and a share, such as [[10, 0.5]]",
                )
            ]
        wrong = []
        if not 0 <= self.begin < self.end <= num_layers:
            text = (
                f"found {self.begin} to {self.end}, expected layers from 0 to {num_layers}, the first before the other"
            )
            wrong.append(("options.begin", text))
        firsts, shares = [first for first, _ in self.pyramid], [share for _, share in self.pyramid]
        if firsts != sorted(set(firsts)) or not all(self.begin <= first < self.end for first in firsts):
            wrong.append(("options.pyramid", f"found layers {firsts}, expected them to ascend between begin and end"))
        if shares != sorted(set(shares), reverse=True) or not all(0 < share < 1 for share in shares):
            wrong.append(("options.pyramid", f"found shares {shares}, expected them to descend between 1 and 0"))
        return wrong or super().problems(num_layers)


register_mechanism("hidrop", HiDrop(dense_layers="all"))
