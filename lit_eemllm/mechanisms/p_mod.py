"""p-MoD (2412.04449 and its code): in each layer a router lets some of the visual tokens through, ever fewer with depth.

    layer l of L lets a share R_l = max(least, cos(pi l / (L - 1)) / 2 + average) of each image through, those it scores highest;
    where the cosine's share exceeds ``most`` the layer is LLaVA's. With score s = r x + b and w = 1 + 0.2 tanh(s)::

        let through   H = x + attention, y = H + w FFN(norm2(H))        passing by   y = w x

Those let through attend with all text, at their own positions, and text sees no others there. Scores rank anew in every routed layer;
gradients reach the router through w. Printed: routers on visual tokens, shares by a cosine, weights by a tanh. Facts of the code: the
numbers, routers that begin at zero, w for tokens that pass by too, and routers in fine-tuning alone, on a projector trained under LLaVA.
Our reading: each image of several keeps its own share, one token at least, and of equal scores the first are taken. The last layer takes
evenly spaced tokens: what it does to visual rows nobody reads, so that a router there would learn nothing (in the code it stays zero).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from math import cos, pi

import torch
from torch import Tensor, nn

from ..core.decoder import Inner
from ..core.select import Routed, Share
from ..core.table import LayerPlan, executed
from .base import BlockCost, Mechanism, register_mechanism
from .connectors import Added, Sizes


class Router(Added):
    """Scores [V] of visual rows [V, h], and their weights [V, 1]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.score = nn.Linear(hidden, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, x_Vh: Tensor) -> tuple[Tensor, Tensor]:
        scores_V1 = self.score(self.own(x_Vh)).float()
        return scores_V1[:, 0], 1 + 0.2 * torch.tanh(scores_V1)


@dataclass(frozen=True)
class PMoD(Mechanism):
    """Options: the shift of the cosine, the share that a layer lets through at least, and the largest that is routed."""

    average: float = 0.5
    least: float = 0.15
    most: float = 0.85

    blocks_name = "routers"
    blocks_begin = "routers begin at zero: until they are trained, they let the first tokens of an image through"
    no_adapters = "a router starts from scratch and must be trained as a whole: set full"

    @property
    def modules(self) -> Hashable:
        return self  # its table, options and rows, decides which layers have a router

    @property
    def weights(self) -> Hashable:
        return type(self).__name__

    def share(self, layer: int, layers: int) -> float:
        return cos(pi * layer / max(1, layers - 1)) / 2 + self.average

    def plan(self, layer: int, layers: int) -> LayerPlan:
        row, share = super().plan(layer, layers), self.share(layer, layers)
        if share > self.most:
            return row
        kept = max(share, self.least)
        return replace(row, tokens=Routed(kept, layer) if layer < layers - 1 else Share(kept))

    def block(self, layer: int, sizes: Sizes) -> nn.Module | None:
        return Inner(router=Router(sizes.hidden)) if self._routed(layer, sizes.layers) else None

    def block_cost(self, layer: int, sizes: Sizes, text: int, visual: int) -> BlockCost:
        return BlockCost(prefill=2 * sizes.hidden * visual * self._routed(layer, sizes.layers))

    def _routed(self, layer: int, layers: int) -> bool:
        return isinstance(self.table(layers)[layer].tokens, Routed)

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        if not 0 <= self.average <= 1:
            return [("options.average", f"found {self.average:g}, expected a share from 0 to 1")]
        if not 0 < self.least <= self.most < 1:
            found = f"found {self.least:g} to {self.most:g}, expected shares between 0 and 1, the smaller first"
            return [("options.least", found)]
        if self.visual_drop:
            return [("visual_drop", "routers choose among all tokens: set []")]
        wrong = super().problems(num_layers)
        rows = executed(self.table(num_layers))
        idle = [n for n, row in enumerate(rows) if self._routed(n, num_layers) and not row.update]
        if idle:
            text = f"layers {idle} have a router that would learn nothing: no later layer reads what it weighs"
            wrong.append(("cross_layers", text))
        return wrong


register_mechanism("p_mod", PMoD(dense_layers="all"))
