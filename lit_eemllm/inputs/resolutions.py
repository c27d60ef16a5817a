"""Transforms whose number of visual tokens depends on the picture: its own aspect ratio (`native`), or tiles (`anyres`).

Counts need the picture's width and height only, so a header tells them before any pixel is decoded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image

from lit_eemllm.errors import ConfigError
from lit_eemllm.inputs.images import (
    RESAMPLING,
    ImageTransform,
    Transform,
    check_normalisation,
    check_sizes,
    resized,
    within_max_side,
)
from lit_eemllm.inputs.reduction import EACH, Grids, Reduction
from lit_eemllm.layout import Pixels

GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Rows and columns of tiles that LLaVA-1.6 chooses from: 336 x 672, 672 x 336, 672 x 672, 1008 x 336 and 336 x 1008 pixels."""


@dataclass(frozen=True)
class NativeTransform(Transform):
    """A picture in its own aspect ratio, in whole squares of patches (`Reduction.side`; without a reduction, in whole patches); a
    remainder at the right and the bottom is dropped.

    Its size is found in one of two ways, as in the image processors of transformers:

    - `most`: as large as so many patches allow, small pictures too; sides are rounded up to whole squares (SigLIP 2 NaFlex).
    - `edges`: reduced until its longer side is at most the second, then both sides at least the first (Idefics2).
    """

    patch: int  # side in pixels of the square that becomes a feature
    mean: tuple[float, float, float]  # of the values 0..1 of each channel
    std: tuple[float, float, float]
    most: int | None = None  # patches
    edges: tuple[int, int] | None = None  # pixels
    resample: str = "bilinear"
    policy: str = "native"
    reduction: Reduction = field(default=EACH, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("mean", "std", "edges"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        check_normalisation(self.mean, self.std, self.resample)
        if (self.most is None) == (self.edges is None):
            raise ConfigError(f"an image in its own aspect ratio is bounded by either patches or edges, found {self}")
        check_sizes(patch=self.patch, patches=1 if self.most is None else self.most)
        if self.edges is not None:
            check_sizes(**dict(zip(("shortest edge", "longest edge"), self.edges, strict=True)))
        if self.edges is not None and not self.patch <= self.edges[0] <= self.edges[1]:
            raise ConfigError(
                f"image edges are the shortest, of a patch ({self.patch}) at least, and the longest; found {self.edges}"
            )
        side, room = (
            self.reduction.side,
            math.isqrt(self.most or 0) if self.edges is None else self.edges[0] // self.patch,
        )
        if room < side:
            raise ConfigError(
                f"model.connector.options: found squares of {side} x {side} patches, but images are as small as {room} x {room}: make "
                "the squares smaller, or raise model.vision.max_tokens"
            )

    @property
    def unit(self) -> int:
        """Side in pixels of a square of patches."""
        return self.patch * self.reduction.side

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture is resized to."""
        if self.most is not None:
            from lit_eemllm.compat.transformers import naflex_size

            height, width = naflex_size(height, width, self.unit, self.most // self.reduction.side**2)
            return width, height
        assert self.edges is not None
        (shortest, longest), aspect = self.edges, width / height
        if max(width, height) > longest:
            width, height = (longest, int(longest / aspect)) if width >= height else (int(longest * aspect), longest)
        return max(width, shortest), max(height, shortest)

    def view_grids(self, sizes: Sequence[tuple[int, int]]) -> Grids:
        side, fitted = self.reduction.side, [self.resized(*size) for size in sizes]
        return tuple((height // self.unit * side, width // self.unit * side) for width, height in fitted)

    def num_tokens(self, width: int, height: int) -> int:
        return self.reduction.count(self.view_grids([(width, height)]))

    @property
    def largest(self) -> tuple[int, int]:
        if self.edges is not None:
            return (self.edges[1],) * 2
        return self.unit, self.unit * ((self.most or 1) // self.reduction.side**2)

    def _pixels(self, picture: torch.Tensor) -> torch.Tensor:
        _, height, width = picture.shape
        size = self.resized(width, height)
        width, height = (length // self.unit * self.unit for length in size)
        return resized(within_max_side(picture), *size, self.resample)[:, :height, :width].contiguous()

    def within(self, most: int) -> NativeTransform:
        """The same with at most so many tokens."""
        if self.edges is None:
            return replace(self, most=most)
        longest = math.isqrt(most) * self.patch
        return replace(self, edges=(min(self.edges[0], longest), longest))

    @classmethod
    def from_preprocessor_config(cls, config: Mapping[str, Any], patch: int) -> NativeTransform:
        """Of SigLIP 2 NaFlex (``max_num_patches``) or Idefics2 (``size`` with both edges); whether pictures are also split
        into four is not read. Raises ConfigError."""
        size = config.get("size") or {}
        edges = (size.get("shortest_edge"), size.get("longest_edge")) if isinstance(size, Mapping) else (None, None)
        most = config.get("max_num_patches")
        if most is None and None in edges:
            raise ConfigError(
                "preprocessor config: expected max_num_patches (SigLIP 2 NaFlex), or size with shortest_edge and "
                f"longest_edge (Idefics2), found size={config.get('size')}"
            )
        names = {int(method): name for name, method in RESAMPLING.items()}
        resample = config.get("resample", 2)
        mean, std = (config.get(f"image_{name}") or (0.5, 0.5, 0.5) for name in ("mean", "std"))
        resample = names.get(resample, resample)
        return cls(patch, mean, std, most, edges if most is None else None, resample)  # type: ignore[arg-type]


@dataclass(frozen=True)
class AnyresTransform(Transform):
    """A view of the whole picture and, of the picture in more detail, tiles of the encoder's size, [1 + tiles, 3, side, side].

    LLaVA-1.6: of `grids` that one is chosen which keeps most of the picture's pixels and then wastes least; the picture is
    fitted into it, in its aspect ratio, on black. Its tokens are those of the view, then the rows of patches of all tiles
    together, without those that are padding, and after each row the learned newline (``spatial_unpad``).

    A connector that makes fewer tokens does so in each view; of tokens that stand for a whole tile none is dropped, and the newline
    comes after each row of tiles.
    """

    view: ImageTransform  # of the whole picture, and of each tile: square
    grids: tuple[tuple[int, int], ...] = GRIDS  # rows and columns of tiles
    policy: str = "anyres"
    reduction: Reduction = field(default=EACH, kw_only=True)

    def __post_init__(self) -> None:
        view = self.view if isinstance(self.view, ImageTransform) else ImageTransform.from_dict(self.view)
        if view.height != view.width:
            raise ConfigError(
                f"image policy 'anyres' needs a square encoder, found {view.height} x {view.width} pixels"
            )
        object.__setattr__(self, "view", replace(view, policy="resize", shortest=None))
        object.__setattr__(self, "grids", tuple((int(rows), int(columns)) for rows, columns in self.grids))
        if not self.grids or any(min(grid) < 1 for grid in self.grids):
            raise ConfigError(f"image policy 'anyres' needs grids of 1 x 1 tile at least, found {self.grids}")

    @property
    def mean(self) -> tuple[float, float, float]:  # type: ignore[override]
        return self.view.mean

    @property
    def std(self) -> tuple[float, float, float]:  # type: ignore[override]
        return self.view.std

    @property
    def side(self) -> int:
        """Patches of a view in a row."""
        return self.view.width // self.view.patch

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles for a picture."""
        from lit_eemllm.compat.transformers import best_grid

        pixels = self.view.height
        best = best_grid((height, width), [(rows * pixels, columns * pixels) for rows, columns in self.grids])
        return best[0] // pixels, best[1] // pixels

    @property
    def tokens(self) -> tuple[int, int]:
        """Rows and columns of the tokens of a view."""
        return self.reduction.grid(self.side, self.side)

    def kept(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Of the tokens of all tiles, those of the picture, not of the padding: left, top, right, bottom.

        As LLaVA's ``unpad_image``: what lies on one side of the picture is dropped on the other side as well.
        """
        rows, columns = (tiles * tokens for tiles, tokens in zip(self.grid(width, height), self.tokens, strict=True))
        if not self.reduction.spatial:
            return 0, 0, columns, rows
        if width / height > columns / rows:
            top = (rows - int(round(height * (columns / width), 7))) // 2
            return 0, top, columns, rows - top
        left = (columns - int(round(width * (rows / height), 7))) // 2
        return left, 0, columns - left, rows

    def num_tokens(self, width: int, height: int) -> int:
        left, top, right, bottom = self.kept(width, height)
        return math.prod(self.tokens) + (bottom - top) * (right - left + 1)

    def view_grids(self, sizes: Sequence[tuple[int, int]]) -> Grids:
        return ((self.side, self.side),) * sum(1 + math.prod(self.grid(*size)) for size in sizes)

    @property
    def largest(self) -> tuple[int, int]:
        sizes = [(columns * self.view.width, rows * self.view.height) for rows, columns in self.grids]
        return max(sizes, key=lambda size: self.num_tokens(*size))

    def _pixels(self, picture: torch.Tensor) -> torch.Tensor:
        size, pixels = (picture.shape[2], picture.shape[1]), self.view.width
        rows, columns = self.grid(*size)
        picture = within_max_side(picture)
        width, height = columns * pixels, rows * pixels
        scale = min(width / size[0], height / size[1])
        fitted = (min(math.ceil(size[0] * scale), width), min(math.ceil(size[1] * scale), height))
        canvas = torch.zeros(3, height, width, dtype=torch.uint8)
        left, top = (width - fitted[0]) // 2, (height - fitted[1]) // 2
        canvas[:, top : top + fitted[1], left : left + fitted[0]] = resized(picture, *fitted, self.view.resample)
        tiles = canvas.unflatten(1, (rows, pixels)).unflatten(3, (columns, pixels)).permute(1, 3, 0, 2, 4).flatten(0, 1)
        return torch.cat([self.view(picture)[None], tiles])

    def picture(self, pixels: torch.Tensor) -> Image.Image:
        """The view and the tiles side by side."""
        return self.view.picture(torch.cat(list(pixels), dim=-1))

    def views(self, pixels: Pixels) -> Pixels:
        return super().views(torch.cat(list(pixels)))

    def order(self, sizes: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, int]:
        (high, wide), start = self.tokens, 0
        parts = [torch.zeros(0, dtype=torch.long)]
        for width, height in sizes:
            left, top, right, bottom = self.kept(width, height)
            rows, columns = self.grid(width, height)
            tiles = torch.arange(rows * columns * high * wide).view(rows, columns, high, wide)
            tokens = tiles.transpose(1, 2).reshape(rows * high, columns * wide)[top:bottom, left:right]
            lines = torch.cat([tokens + start + high * wide, torch.full((bottom - top, 1), -1)], dim=1)
            parts += [start + torch.arange(high * wide), lines.flatten()]
            start += (1 + rows * columns) * high * wide
        order = torch.cat(parts)
        return order.masked_fill(order < 0, start), start


def transform_from_dict(values: Mapping[str, Any]) -> Transform:
    """Of any kind, from what its `to_dict` gave. Raises ConfigError."""
    kinds: dict[Any, type[Transform]] = {"native": NativeTransform, "anyres": AnyresTransform}
    return kinds.get(values.get("policy"), ImageTransform).from_dict(values)


def with_policy(transform: Transform, policy: str) -> Transform:
    """The transform of the same encoder under another policy. Raises ConfigError where the encoder does not allow it."""
    if (policy == "native") != isinstance(transform, NativeTransform):
        if policy == "native":
            raise ConfigError(
                "model.vision.policy: this encoder takes images of one size: set pad, resize, crop or anyres"
            )
        raise ConfigError(
            f"model.vision.policy: this encoder takes images in their own aspect ratio: set native, not {policy}"
        )
    if policy == transform.policy:
        return transform
    view = transform.view if isinstance(transform, AnyresTransform) else transform
    assert isinstance(view, ImageTransform)
    return AnyresTransform(view) if policy == "anyres" else replace(view, policy=policy)
