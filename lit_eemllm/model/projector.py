"""From the encoder's features to what the decoder sees of them."""

from __future__ import annotations

from torch import Tensor, nn


class Projector(nn.Module):
    """Two linear layers with a GELU between them, from the encoder's width to the decoder's (LLaVA-1.5's connector)."""

    def __init__(self, vision_width: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, hidden)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class LayerwiseProjector(nn.Module):
    """A projector of its own for each decoder layer (SAISA)."""

    def __init__(self, vision_width: int, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Projector(vision_width, hidden) for _ in range(num_layers))

    def forward(self, features: Tensor, layer: int) -> Tensor:
        return self.layers[layer](features)
