"""How a connector turns the grid of a view's features into visual tokens: all that counting them needs to know of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

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
