"""VisiPruner (2510.17205 and its code): text reads images in a middle band of layers, over few of their tokens.

    layer 0            LLaVA's                  layers below ``band``     text sees no image; images go on among themselves
    from ``band`` on   a share ``drop`` leaves, those that the question's last token attends to least
    from ``end`` on  text alone

Printed: shallow layers need no look at the image (``band`` is 6 in its code), few tokens matter in the middle, none in deep layers. Our
reading: the code finds how many stay, and when they leave, for each sample; here both are options, so that a step's cost is known.
Layer 0 is whole (the code lets one token stand for all), and attention ranks (the code takes what a value changes in the output).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..core.select import NOTHING, Top
from ..core.table import LayerPlan
from .base import Mechanism, register_mechanism, share_problems

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class VisiPruner(Mechanism):
    """Options: the first layer of the band, the first layer after it, and the share that leaves where it begins."""

    band: int = 6
    end: int = 20
    drop: float = 0.75

    def plan(self, layer: int, layers: int) -> LayerPlan:
        row = super().plan(layer, layers)
        if 0 < layer < self.band:
            return replace(row, seen=NOTHING)
        if layer >= self.end:
            return replace(row, tokens=NOTHING)
        return replace(row, tokens=Top(self.drop, self.band)) if layer >= self.band else row

    def stretched(self, num_layers: int, of: int = 32) -> Self:
        band, end = self.band * num_layers // of, -(-self.end * num_layers // of)
        return replace(super().stretched(num_layers, of), band=band, end=max(end, band + 1))

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        wrong = share_problems("drop", self.drop)
        if not 0 <= self.band < self.end <= num_layers:
            text = (
                f"found {self.band} to {self.end}, expected layers from 0 to {num_layers}, the first before the other"
            )
            wrong.append(("options.band", text))
        return wrong or super().problems(num_layers)


register_mechanism("visipruner", VisiPruner(dense_layers="all"))
