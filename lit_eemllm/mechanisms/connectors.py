"""Modules that a mechanism adds to encoder and decoder, and the two that many share: one projector, or one for each layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Added(nn.Module):
    """A module that is neither the encoder's nor the decoder's, so that its initial values are ours."""

    def reset_parameters(self) -> None:
        """Torch's initial values, as LLaVA: biases of zero would keep a visual token whose features are zero at zero in every
        layer, with gradients that explode in the norms. A subclass adds those of parameters of its own."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.LayerNorm):
                part.reset_parameters()

    def own(self, x: Tensor) -> Tensor:
        """In the type of the weights here: the decoder may be frozen in 16 bits, or these be gathered in them."""
        return x.to(next(self.parameters()).dtype)


class Projector(Added):
    """Two linear layers with a GELU between them, from the encoder's width to the decoder's (LLaVA-1.5's connector).

    Args:
        vision_width: of the features.
        hidden: the decoder's width.
        newline: with the learned row that LLaVA-1.6 puts after each row of an image cut into tiles.
    """

    def __init__(self, vision_width: int, hidden: int, newline: bool = False) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, hidden)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden, hidden)
        self.newline = nn.Parameter(torch.empty(hidden)) if newline else None
        self._reset_newline()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_newline()

    def _reset_newline(self) -> None:
        if self.newline is not None:
            nn.init.normal_(self.newline, std=len(self.newline) ** -0.5)

    def forward(self, features: Tensor, order_V: Tensor | None = None) -> Tensor:
        """Features to as many visual tokens or, with a newline, those that `order_V` names, as `Transform.order` does."""
        rows = self.linear_2(self.act(self.linear_1(features)))
        if self.newline is None or order_V is None:
            return rows
        return torch.cat([rows, self.newline[None].to(rows.dtype)]).index_select(0, order_V)


class LayerwiseProjector(nn.Module):
    """A projector of its own for each decoder layer (SAISA)."""

    def __init__(self, vision_width: int, hidden: int, num_layers: int, newline: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Projector(vision_width, hidden, newline) for _ in range(num_layers))

    def forward(self, features: Tensor, layer: int, order_V: Tensor | None = None) -> Tensor:
        return self.layers[layer](features, order_V)
