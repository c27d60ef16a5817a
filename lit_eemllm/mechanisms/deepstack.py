"""DeepStack (2406.04334) as in Qwen3-VL: features of lower encoder layers enter the first decoder layers, added to the visual tokens.

    before layer l, the i-th of those named:    I <- I + connector_i(Z_i)        Z_i the states after the i-th encoder layer

Each connector is of the kind that makes the visual tokens, with weights of its own. Qwen3-VL reads layers 8, 16 and 24 of 27 and adds
them after decoder layers 0, 1 and 2, so before 1, 2 and 3. Our reading: encoder layers as shares of those below what ``select_layer``
reads. The paper of 2024 adds tokens of the image in higher resolution instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.select import Top
from ..core.stream import Stream
from ..core.table import executed
from .base import BlockCost, Features, Mechanism, register_mechanism
from .connectors import Added, Connector, Sizes

if TYPE_CHECKING:
    from typing_extensions import Self


class Injection(Added):
    """Adds what a connector makes of the features of one encoder layer; `place`: which of those side by side, 0 what the encoder gives."""

    def __init__(self, sizes: Sizes, place: int) -> None:
        super().__init__()
        self.connector = sizes.connector.module(sizes)
        self.columns = slice(place * sizes.vision, (place + 1) * sizes.vision)

    def forward(self, x_Th: Tensor, x_Vh: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        features: Features | None = stream.shared
        if features is None:  # images are in the cache
            return x_Th, x_Vh
        tokens_Vh = self.connector(self.own(features.rows[:, self.columns]), *features[1:3])
        return x_Th, x_Vh + tokens_Vh.to(x_Vh.dtype)


@dataclass(frozen=True)
class DeepStack(Mechanism):
    """Options: the decoder layers before which features are added, and for each the share of the encoder's layers after which they are
    read."""

    layers: tuple[int, ...] = (1, 2, 3)
    depths: tuple[float, ...] = (0.333, 0.667, 1.0)

    @property
    def encoder_depths(self) -> tuple[float, ...]:
        return self.depths

    def refuses(self, connector: Connector) -> str:
        if connector.deep:
            return f"found {connector.name}, which reads layers inside the encoder itself: set levels=0"
        if connector.spatial:
            return ""
        return f"found {connector.name}, but deepstack adds tokens that stand for places: set mlp, linear, average or pixel_shuffle"

    def block(self, layer: int, sizes: Sizes) -> nn.Module | None:
        return Injection(sizes, 1 + self.layers.index(layer)) if layer in self.layers else None

    def enter(self, connector: nn.Module, features: Features, x_Th: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        width = features.rows.shape[1] // (1 + len(self.depths))
        first = features._replace(rows=features.rows[:, :width])
        return super().enter(connector, first, x_Th, replace(stream, shared=features))

    def block_cost(self, layer: int, sizes: Sizes, text: int, visual: int) -> BlockCost:
        """Of the connector's matrices, each of which has a product with every token that it makes."""
        if layer not in self.layers or not sizes.vision:
            return BlockCost()
        with torch.device("meta"):
            connector = sizes.connector.module(sizes)
        return BlockCost(
            prefill=2 * visual * sum(weight.numel() for weight in connector.parameters() if weight.ndim == 2)
        )

    def stretched(self, num_layers: int, of: int = 32) -> Self:
        """In a decoder of fewer layers, the first of them: they are layers from below."""
        layers = tuple(layer for layer in self.layers if layer < num_layers) or (0,)
        return replace(super().stretched(num_layers, of), layers=layers, depths=self.depths[: len(layers)])

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        wrong, lists = [], isinstance(self.layers, tuple) and isinstance(self.depths, tuple)
        if not lists or {type(n) for n in self.layers} - {int} or {type(x) for x in self.depths} - {int, float}:
            text = f"found {self.layers!r} with depths {self.depths!r}, expected lists such as [1, 2, 3] and [0.3, 0.6, 1.0]"
            return [("options.layers", text)]
        layers, depths = list(self.layers), list(self.depths)
        if not layers or layers != sorted(set(layers)) or not all(0 <= layer < num_layers for layer in layers):
            wrong.append(("options.layers", f"found {layers}, expected layers from 0 to {num_layers - 1}, in order"))
        if len(depths) != len(layers) or not all(0 <= depth <= 1 for depth in depths):
            wrong.append(
                ("options.depths", f"found {depths}, expected a share from 0 to 1 for each of the layers {layers}")
            )
        if self.visual_source != "stream":
            wrong.append(
                ("visual_source", f"found {self.visual_source}, but deepstack adds to the states of the layer before")
            )
        found = wrong or super().problems(num_layers)
        table = self.table(num_layers)
        if not found and any(isinstance(row.tokens, Top) and row.tokens.layer < layers[-1] for row in table):
            found = [
                ("options.layers", f"found {layers}, but tokens that features are added to have left by rank before")
            ]
        if not found and all(row.idle for row in executed(table)[layers[-1] :]):
            found = [("options.layers", f"found {layers}, but no layer reads what is added before layer {layers[-1]}")]
        return found


register_mechanism("deepstack", DeepStack(dense_layers="all"))
