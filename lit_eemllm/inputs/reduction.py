"""How a connector turns the grid of a view's features into rows: all that counting them needs to know of it; and which rows become
visual tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lit_eemllm.layout import upload

Grids = tuple[tuple[int, int], ...]
"""Rows and columns of the encoder's features of several views, row by row one view after the other. A view is what the encoder sees
at once: a picture, or a tile of one."""


@dataclass(frozen=True)
class Reduction:
    """How a connector turns the grid of a view's features into visual tokens; this one makes a token of each.

    The grid is all that it needs, so a header tells how many tokens a picture has.
    """

    spatial: ClassVar[bool] = True
    """A token stands for a place in the view; False: each stands for the whole view."""

    @property
    def side(self) -> int:
        """Of the squares of features that become a token each. Pictures in their own aspect ratio become whole squares."""
        return 1

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of a view's tokens, of those of its features. A square at the right or the bottom may be cut off."""
        return -(-rows // self.side), -(-columns // self.side)

    def count(self, grids: Grids) -> int:
        """Tokens of views with these grids of features."""
        return sum(math.prod(self.grid(*grid)) for grid in grids)

    @property
    def by_place(self) -> bool:
        """Whether tokens are made of features by their place in the grid, which then must be known. So it is where a subclass overrides
        `side` or `grid`."""
        return type(self).side is not Reduction.side or type(self).grid is not Reduction.grid


EACH = Reduction()
"""The reduction of a connector that makes a token of each feature."""


class Order(NamedTuple):
    """Which row of what the connector makes each visual token is.

    Attributes:
        index_V: [V]; or [V, 4], where pictures are made smaller (bilinear): the rows that a token is a mean of.
        rows: how many there are. The row after the last stands for a newline.
        weights_V4: of those rows.
    """

    index_V: Tensor
    rows: int
    weights_V4: Tensor | None = None

    def of(self, x_R: Tensor) -> Tensor:
        """The tokens' values, [V, ...], from those of the rows and the newline, [rows + 1, ...]."""
        if self.weights_V4 is None:
            return x_R.index_select(0, self.index_V)
        weights_V4 = self.weights_V4.to(x_R.dtype).view(*self.index_V.shape, *[1] * (x_R.ndim - 1))
        return (x_R.index_select(0, self.index_V.flatten()).unflatten(0, self.index_V.shape) * weights_V4).sum(1)

    def to(self, device: torch.device) -> Order:
        weights_V4 = None if self.weights_V4 is None else upload(self.weights_V4, device)
        return Order(upload(self.index_V, device), self.rows, weights_V4)
