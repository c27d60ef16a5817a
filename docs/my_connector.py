"""A connector of one's own: a token for each strip of an image, the mean of a few rows of patches.

    lit-eemllm explain --import docs/my_connector.py --shape vicuna-7b model.connector.name=strips
    lit-eemllm fit my_config.yaml --import docs/my_connector.py model.connector.name=strips model.connector.options.rows=1

docs/vision.md explains every line. R = features of all views of a pack, row by row and one view after the other, d = their width.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_eemllm.mechanisms import Connector, ConnectorModule, Projector, Sizes, register_connector


@register_connector("strips")
@dataclass(frozen=True)
class Strips(Connector):
    """Its fields are keys: ``model.connector.options.rows``."""

    rows: int = 2
    spatial: ClassVar[bool] = (
        False  # a strip has no place from left to right, so none is cut off where an image is padded
    )

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        return -(-rows // self.rows), 1

    def module(self, sizes: Sizes) -> ConnectorModule:
        return StripsModule(sizes, self.rows)

    def problems(self) -> list[tuple[str, str]]:
        return [] if self.rows >= 1 else [("rows", f"found {self.rows}, expected 1 or more")]


class StripsModule(Projector):
    """The two-layer MLP over what `pool` gives."""

    def __init__(self, sizes: Sizes, rows: int) -> None:
        super().__init__(sizes)
        self.rows = rows

    def pool(self, features_Rd: Tensor, grids: tuple[tuple[int, int], ...]) -> Tensor:
        strips, start = [features_Rd[:0]], 0  # of a pack without images: none
        for rows, columns in grids:
            view = features_Rd[start : start + rows * columns].view(rows, columns, -1)
            strips += [strip.mean((0, 1))[None] for strip in view.split(self.rows)]
            start += rows * columns
        return torch.cat(strips)
