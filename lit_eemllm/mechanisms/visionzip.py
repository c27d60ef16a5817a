"""VisionZip (2412.04467 and its code): before the decoder all visual tokens leave but those that the vision encoder attends to most.

    importance of a patch = attention of CLIP's class token in the layer that is read, summed over heads

Printed: this importance, and 192, 128 or 64 tokens left of LLaVA-1.5's 576; in encoders without class token the mean attention that a
patch gets from all. Our reading: dominant tokens only. The paper's 64 are 54 of these, the class token among them, and 10 that are merged
of the rest; here all are patches. Positions stay, which its code numbers anew. Of tiles, tokens of the whole image are ranked together,
where its code keeps as many of each; newlines leave first, and its code drops them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.select import Top
from ..core.table import LayerPlan
from .base import Mechanism, register_mechanism, share_problems


@dataclass(frozen=True)
class VisionZip(Mechanism):
    """Option: the share that leaves; 0.6667, 0.7778 and 0.8889 leave 192, 128 and 64 of 576."""

    drop: float = 0.8889

    def plan(self, layer: int, layers: int) -> LayerPlan:
        return replace(super().plan(layer, layers), tokens=Top(self.drop, 0, by="encoder"))

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        return share_problems("drop", self.drop) or super().problems(num_layers)


register_mechanism("visionzip", VisionZip(dense_layers="all"))
