"""Modules that a mechanism adds to encoder and decoder, and the two that many share: one projector, or one for each layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Added(nn.Module):
    """A module that is neither the encoder's nor the decoder's, so that its initial values are ours."""

    def reset_parameters(self) -> None:
        """PyTorch's default initialisation, as in LLaVA; a subclass adds that of its own parameters. With zero biases, a visual
        token of zero features would stay zero in every layer, and its gradients would explode in the norms."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.LayerNorm):
                part.reset_parameters()

    def own(self, x: Tensor) -> Tensor:
        """`x` in the dtype of this module's weights: the decoder may be frozen in 16 bits, or FSDP2 gather these in 16 bits."""
        return x.to(next(self.parameters()).dtype)


class Projector(Added):
    """Two linear layers with a GELU between them, from the encoder's width to the decoder's (LLaVA-1.5's connector).

    Args:
        vision_width: of the features.
        hidden: the decoder's width.
        newline: whether to learn the visual token that LLaVA-1.6 puts after each row of patches of an image cut into tiles.
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
        """One visual token for each row of features or, with a newline, those that `order_V` names; see `Transform.order`."""
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
