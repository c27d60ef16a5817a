"""Operator skipping (2606.31903): a layer may skip attention, the feed-forward network, or both, for visual tokens; text does neither.

    H_I = I + a_l attention        I' = H_I + f_l FFN(norm2(H_I))        a_l, f_l in {0, 1}

Printed: the idea, training-free, layer by layer. Our reading: without attention nothing replaces it (no path through W_v and W_o), and
text sees the images in all layers. The layers are not the paper's, which were not found: attention in the first half and feed-forward
networks in the first three quarters; ``lit-eemllm calibrate`` finds those of your own model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..core.table import LayerPlan
from .base import NO_ALIGNER, Layers, Mechanism, contains, register_mechanism, stretch

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class OperatorSkipping(Mechanism):
    """Attention is in ``dense_layers``. Option: the layers whose feed-forward network updates visual tokens."""

    ffn_layers: Layers = tuple(range(24))

    def plan(self, layer: int, layers: int) -> LayerPlan:
        row = super().plan(layer, layers)
        return replace(row, update=row.update - {"ffn"} | ({"ffn"} if contains(self.ffn_layers, layer) else set()))

    def stretched(self, num_layers: int, of: int = 32) -> Self:
        return replace(super().stretched(num_layers, of), ffn_layers=stretch(self.ffn_layers, num_layers, of))

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        layers = self.ffn_layers
        if self.aligner.ffn:
            return [
                (
                    "aligner.ffn",
                    "options.ffn_layers says where the feed-forward network updates visual tokens: set false",
                )
            ]
        listed = isinstance(layers, tuple) and all(type(n) is int and 0 <= n < num_layers for n in layers)
        if listed or layers in ("all", "none"):
            return super().problems(num_layers)
        expected = f'"all", "none" or a list of layers from 0 to {num_layers - 1}'
        return [("options.ffn_layers", f"found {layers!r}, expected {expected}")]


register_mechanism("operator_skipping", OperatorSkipping(dense_layers=tuple(range(16)), aligner=NO_ALIGNER))
