"""Connectors that make fewer visual tokens than there are features: one of each square of features, or a fixed number of each view.

Squares are those of f x f features, from the top left of a view, which is a tile where an image is cut into tiles. Where f does not divide
the grid, those at the right and the bottom are incomplete: only with encoders of one size, as images in their own aspect ratio are
resized to whole squares (`NativeTransform`).
Legend of shapes in `lit_eemllm.layout`, and here:
    R features of all views, row by row and one view after the other; in [G, R], of a view, padded
    G views    P features of a square    n queries
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..attention import fused_attention
from ..errors import ConfigError
from ..inputs.reduction import Grids
from ..layout import upload
from .connectors import (
    Connector,
    ConnectorModule,
    CrossAttention,
    Projector,
    Sizes,
    lengths_mask,
    padded,
    register_connector,
)

MOST = {"factor": 16, "tokens": 1024, "heads": 128}
"""Of options: a configuration may come from anywhere, and modules of these sizes are built before weights are read."""


def out_of_bounds(**options: int) -> list[tuple[str, str]]:
    """`Connector.problems` of options that have a maximum."""
    return [
        (name, f"found {value}, expected 1 to {MOST[name]}")
        for name, value in options.items()
        if not 1 <= value <= MOST[name]
    ]


# --- squares
@lru_cache(maxsize=4)  # the connectors of all layers ask for the same
def squares(grids: Grids, side: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[tokens, P] which row of the features each place of a square is, row by row; past the last where the view has ended."""
    last, start = sum(rows * columns for rows, columns in grids), 0
    found = [np.zeros((0, side**2), dtype=np.int64)]
    for rows, columns in grids:
        high, wide = -(-rows // side), -(-columns // side)
        index = np.full((high * side, wide * side), last)
        index[:rows, :columns] = np.arange(start, start + rows * columns).reshape(rows, columns)
        found.append(index.reshape(high, side, wide, side).swapaxes(1, 2).reshape(-1, side**2))
        start += rows * columns
    return np.concatenate(found)


def in_squares(features_Rd: Tensor, grids: Grids, side: int) -> tuple[Tensor, Tensor]:
    """The features of each square, [tokens, P, d], and whether they are there, [tokens, P]: zeros where the view has ended."""
    index_VP = upload(torch.from_numpy(squares(grids, side)), features_Rd.device)
    rows = torch.cat([features_Rd, features_Rd.new_zeros(1, features_Rd.shape[1])])
    squares_VPd = rows.index_select(0, index_VP.flatten()).view(*index_VP.shape, rows.shape[1])
    return squares_VPd, index_VP < len(features_Rd)


@dataclass(frozen=True)
class Squares(Connector):
    """A token of each square.

    Args:
        factor: f, its side.
    """

    factor: int = 2

    @property
    def side(self) -> int:
        return self.factor

    def importance(self, importance_R: Tensor, grids: Grids) -> Tensor:
        """The mean of the features of a square that there are."""
        squares_VP1, there_VP = in_squares(importance_R[:, None], grids, self.side)
        return squares_VP1.sum((1, 2)) / there_VP.sum(1)

    def problems(self) -> list[tuple[str, str]]:
        return out_of_bounds(factor=self.factor)


@register_connector("pixel_shuffle")
@dataclass(frozen=True)
class PixelShuffle(Squares):
    """InternVL's (2404.16821; also the 2 x 2 merger of Qwen2-VL, whose norm is over each feature): the features of a square side by
    side, row by row, with zeros for those past the edge, as VILA (2312.07533)::

        token = MLP(norm([z_1; ...; z_P]))
    """

    def module(self, sizes: Sizes) -> ConnectorModule:
        return ShuffleModule(sizes, self.factor)


class ShuffleModule(Projector):
    def __init__(self, sizes: Sizes, factor: int) -> None:
        super().__init__(sizes, factor**2 * sizes.vision)
        self.factor = factor
        self.norm = nn.LayerNorm(factor**2 * sizes.vision)

    def pool(self, features_Rd: Tensor, grids: Grids) -> Tensor:
        squares_VPd, _ = in_squares(self.own(features_Rd), grids, self.factor)
        return self.norm(squares_VPd.flatten(1))


@register_connector("linear_shuffle")
@dataclass(frozen=True)
class LinearShuffle(Squares):
    """Idefics3's (2408.12637) and SmolVLM's: as `PixelShuffle`, through one matrix::

    token = W [z_1; ...; z_P]
    """

    def module(self, sizes: Sizes) -> ConnectorModule:
        return LinearShuffleModule(sizes, self.factor)


class LinearShuffleModule(ConnectorModule):
    def __init__(self, sizes: Sizes, factor: int) -> None:
        super().__init__(sizes)
        self.factor = factor
        self.linear = nn.Linear(factor**2 * sizes.vision, sizes.hidden, bias=False)

    def tokens(self, features_Rd: Tensor, grids: Grids) -> Tensor:
        squares_VPd, _ = in_squares(self.own(features_Rd), grids, self.factor)
        return self.linear(squares_VPd.flatten(1))


@register_connector("merger")
@dataclass(frozen=True)
class Merger(Squares):
    """Qwen2.5-VL's (2502.13923) and Qwen3-VL's (2511.21631): each feature of a square is normalised by itself::

        token = W_2 GELU(W_1 [norm z_1; ...; norm z_P] + b_1) + b_2        W_1 square

    Qwen3-VL's encoder gives the states of lower layers too, d of each side by side. A merger of their own for each, which normalises
    the whole square, makes what is added to the tokens after the first decoder layers.

    Args:
        rms: the norm is RMSNorm (Qwen2.5-VL), else LayerNorm.
        levels: lower layers.
    """

    rms: bool = False
    levels: int = 0

    @property
    def deep(self) -> int:
        return self.levels

    def problems(self) -> list[tuple[str, str]]:
        bounds = {"factor": (1, 4), "levels": (0, 16)}  # a matrix is factor^2 features wide and high
        return [
            (name, f"found {getattr(self, name)}, expected {least} to {most}")
            for name, (least, most) in bounds.items()
            if not least <= getattr(self, name) <= most
        ]

    def module(self, sizes: Sizes) -> ConnectorModule:
        return MergerModule(sizes, self)


class OneMerger(nn.Module):
    """Squares [tokens, P, d] to tokens; the norm is over each feature, or `whole` squares."""

    def __init__(self, width: int, places: int, hidden: int, rms: bool, whole: bool) -> None:
        super().__init__()
        self.whole, inner = whole, width * places
        self.norm = (nn.RMSNorm if rms else nn.LayerNorm)(inner if whole else width, eps=1e-6)
        self.linear_1, self.act, self.linear_2 = nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, hidden)

    def forward(self, squares_VPd: Tensor) -> Tensor:
        rows = self.norm(squares_VPd.flatten(1) if self.whole else squares_VPd).flatten(1)
        return self.linear_2(self.act(self.linear_1(rows)))


class MergerModule(ConnectorModule):
    def __init__(self, sizes: Sizes, options: Merger) -> None:
        super().__init__(sizes)
        if sizes.vision % (1 + options.levels):
            raise ConfigError(
                f"model.connector.options.levels: found {options.levels}, but the encoder's features, {sizes.vision} wide, are no states "
                f"of {1 + options.levels} layers side by side"
            )
        self.factor, self.width = options.factor, sizes.vision // (1 + options.levels)
        size = self.width, self.factor**2, sizes.hidden
        self.main = OneMerger(*size, options.rms, whole=False)
        self.deep = nn.ModuleList(OneMerger(*size, options.rms, whole=True) for _ in range(options.levels))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for part in self.modules():
            if isinstance(part, nn.RMSNorm):
                part.reset_parameters()

    def tokens(self, features_Rd: Tensor, grids: Grids) -> Tensor:
        squares_VPd, _ = in_squares(self.own(features_Rd), grids, self.factor)
        layers = torch.split(squares_VPd, self.width, dim=2)
        return torch.cat([merger(x) for merger, x in zip([self.main, *self.deep], layers, strict=True)], dim=1)


@register_connector("average")
@dataclass(frozen=True)
class Average(Squares):
    """Pooling before the MLP, as DeCo (2405.20985)::

        token = MLP(mean of z_1, ..., z_P)

    The mean is of those features of a square that there are.
    """

    def module(self, sizes: Sizes) -> ConnectorModule:
        return AverageModule(sizes, self.factor)


class AverageModule(Projector):
    def __init__(self, sizes: Sizes, factor: int) -> None:
        super().__init__(sizes)
        self.factor = factor

    def pool(self, features_Rd: Tensor, grids: Grids) -> Tensor:
        squares_VPd, there_VP = in_squares(features_Rd, grids, self.factor)
        return squares_VPd.sum(1) / there_VP.sum(1, keepdim=True)


# --- queries
@register_connector("attention")
@dataclass(frozen=True)
class AttentionPool(Connector):
    """Learned queries Q read each view, as in Qwen-VL (2308.12966), but without its position embeddings: the features have the encoder's::

        token_i = MLP(norm(P_i))        P = attention(norm(Q) W_q, norm(Z) W_k, norm(Z) W_v) W_o

    Args:
        tokens: of a view: of an image, or of each tile.
        heads: of the attention, as wide together as a feature.
    """

    tokens: int = 64
    heads: int = 8
    spatial: ClassVar[bool] = False

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        return 1, self.tokens

    def problems(self) -> list[tuple[str, str]]:
        return out_of_bounds(tokens=self.tokens, heads=self.heads)

    def module(self, sizes: Sizes) -> ConnectorModule:
        if sizes.vision % self.heads:
            raise ConfigError(
                f"model.connector.options.heads: found {self.heads}, expected a divisor of {sizes.vision}, the width of the encoder's features"
            )
        return AttentionModule(sizes, self)


class AttentionModule(Projector):
    def __init__(self, sizes: Sizes, options: AttentionPool) -> None:
        super().__init__(sizes)
        width = sizes.vision
        self.queries = nn.Parameter(torch.empty(options.tokens, width))
        self.features_norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, width, options.heads, width // options.heads)
        self.norm = nn.LayerNorm(width)
        self._reset_queries()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_queries()

    def _reset_queries(self) -> None:
        nn.init.normal_(self.queries, std=0.02)

    def pool(self, features_Rd: Tensor, grids: Grids) -> Tensor:
        lengths = [prod(grid) for grid in grids]
        pair = self.attention.keys_values(self.features_norm(self.own(features_Rd)))
        k_GNRH, v_GNRH = (padded(x, lengths).transpose(1, 2) for x in pair)
        q_GNnH = self.attention.queries(self.queries).transpose(0, 1).expand(len(grids), -1, -1, -1)
        sees_G1R = lengths_mask(lengths, k_GNRH.shape[2], features_Rd.device)[:, None]
        mixed_GnNH = fused_attention(q_GNnH, k_GNRH, v_GNRH, sees_G1R).transpose(1, 2)
        return self.norm(self.attention.o_proj(mixed_GnNH.flatten(2)).flatten(0, 1))
