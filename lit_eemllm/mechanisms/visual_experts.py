"""Weights of their own for visual rows, in LLaVA's layers (CogVLM, 2311.03079; Mixture-of-Transformers, 2411.04996; BAGEL, 2505.14683).

Text T takes the layer's weights, images I take copies W', and all attend together, as in LLaVA::

    q, k, v = norm1(T) W_qkv, norm1'(I) W_qkv'        H = [T; I] + [a_T W_o; a_I W_o'], a = attention(q, k, v)
    T' = H_T + FFN(norm2(H_T))                        I' = H_I + FFN'(norm2'(H_I))

Printed: CogVLM copies ``qkv ffn`` in every layer, and its code ``output`` too; Mixture-of-Transformers and BAGEL copy ``norms`` as well.
They begin as copies of the decoder's weights (CogVLM: from the language model), which is LLaVA. A weight that never touches a visual row
that is read later is not copied: of the last layer, keys and values alone. Copies are trained with the projector: ``optim.tuning.llm=frozen``
is CogVLM's recipe, which leaves answers without an image as they were.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import nn

from ..core.decoder import COPIES, Inner
from .base import Mechanism, number_problems, register_mechanism
from .connectors import Sizes


@dataclass(frozen=True)
class VisualExperts(Mechanism):
    """Options: which parts of a layer are copied, of `COPIES`, and the first layer with copies."""

    parts: str = "qkv ffn"
    first: int = 0

    blocks_name = "experts"

    @property
    def modules(self) -> Hashable:
        """The whole table says which weights touch visual rows."""
        return self

    @property
    def weights(self) -> Hashable:
        return type(self).__name__

    def block(self, layer: int, sizes: Sizes) -> nn.Module | None:
        return Inner(self.parts.split()) if layer >= self.first else None

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        wrong, parts = [], self.parts.split()
        if not parts or not set(parts) <= set(COPIES):
            wrong.append(("options.parts", f"found {self.parts!r}, expected some of {' '.join(COPIES)}"))
        wrong += number_problems("first", self.first, 0, num_layers - 1)
        if all(row.blind for row in self.table(num_layers)):
            wrong.append(("cross_layers", "text sees the image in no layer"))
        return wrong or super().problems(num_layers)


register_mechanism("visual_experts", VisualExperts(dense_layers="all"))
