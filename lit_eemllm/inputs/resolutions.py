"""Pictures in their own aspect ratio (`native`), and the choice of a transform by its word.

Counts need the picture's width and height only, so a header tells them before any pixel is decoded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lit_eemllm.errors import ConfigError, SampleError
from lit_eemllm.inputs.images import (
    LARGEST_SIZE,
    LATER,
    POLICIES,
    RESAMPLING,
    ImageTransform,
    Transform,
    check_normalisation,
    check_sizes,
    resized,
    within_max_side,
)
from lit_eemllm.inputs.reduction import EACH, Grids, Reduction
from lit_eemllm.inputs.tiles import TILED, Tiled


@dataclass(frozen=True)
class NativeTransform(Transform):
    """A picture in its own aspect ratio, in whole squares of patches (`Reduction.side`; without a reduction, in whole patches); a
    remainder at the right and the bottom is dropped.

    Its size is found in one of three ways, as in the image processors of transformers:

    - `most`: as large as so many patches allow, small pictures too; sides are rounded up to whole squares (SigLIP 2 NaFlex).
    - `edges`: reduced until its longer side is at most the second, then both sides at least the first (Idefics2).
    - `area`: to whole squares, within so many pixels in all, the least and the most (Qwen2-VL and later); a side may be at most 200
      times as long as the other.
    """

    patch: int  # side in pixels of the square that becomes a feature
    mean: tuple[float, float, float]  # of the values 0..1 of each channel
    std: tuple[float, float, float]
    most: int | None = None  # patches
    edges: tuple[int, int] | None = None  # pixels
    resample: str = "bilinear"
    policy: str = "native"
    area: tuple[int, int] | None = field(default=None, kw_only=True, metadata=LATER)  # pixels
    merges: int = field(
        default=1, kw_only=True, metadata=LATER
    )  # side in patches of the squares that the encoder itself needs
    reduction: Reduction = field(default=EACH, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("mean", "std", "edges", "area"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        check_normalisation(self.mean, self.std, self.resample)
        if [self.most, self.edges, self.area].count(None) != 2:
            raise ConfigError(f"an image in its own aspect ratio is bounded by patches, edges or area, found {self}")
        numbers = self.area is None or (len(self.area) == 2 and {type(length) for length in self.area} == {int})
        if not numbers or (self.area is not None and not 1 <= self.area[0] <= self.area[1] <= LARGEST_SIZE**2):
            raise ConfigError(
                f"image area: found {self.area}, expected the least and the most pixels, 1 to {LARGEST_SIZE**2}"
            )
        check_sizes(patch=self.patch, merges=self.merges, patches=1 if self.most is None else self.most)
        if self.edges is not None:
            check_sizes(**dict(zip(("shortest edge", "longest edge"), self.edges, strict=True)))
        if self.edges is not None and not self.patch <= self.edges[0] <= self.edges[1]:
            raise ConfigError(
                f"image edges are the shortest, of a patch ({self.patch}) at least, and the longest; found {self.edges}"
            )
        side = self.side
        if self.area is not None:
            room = math.isqrt(self.area[1]) // self.patch
        else:
            room = math.isqrt(self.most or 0) if self.edges is None else self.edges[0] // self.patch
        if room < side:
            raise ConfigError(
                f"model.connector.options: found squares of {side} x {side} patches, but images are as small as {room} x {room}: make "
                "the squares smaller, or raise model.vision.max_tokens"
            )

    @property
    def side(self) -> int:
        """In patches, of the squares that a picture is resized to whole ones of: those of the connector, and of the encoder."""
        return math.lcm(self.reduction.side, self.merges)

    @property
    def unit(self) -> int:
        """Side in pixels of a square of patches."""
        return self.patch * self.side

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture is resized to."""
        if self.most is not None:
            from lit_eemllm.compat.transformers import naflex_size

            height, width = naflex_size(height, width, self.unit, self.most // self.side**2)
            return width, height
        if self.area is not None:
            return self._within_area(width, height, *self.area)
        assert self.edges is not None
        (shortest, longest), aspect = self.edges, width / height
        if max(width, height) > longest:
            width, height = (longest, int(longest / aspect)) if width >= height else (int(longest * aspect), longest)
        return max(width, shortest), max(height, shortest)

    def _within_area(self, width: int, height: int, least: int, most: int) -> tuple[int, int]:
        """As Qwen2-VL's processor. Raises SampleError for a picture that it refuses."""
        if max(width, height) > 200 * min(width, height):
            found = f"a picture of {width} x {height} pixels: a side is more than 200 times as long as the other"
            raise SampleError("bad_image", f"{found}, which this encoder's family refuses; cut it")
        unit, (rows, columns) = self.unit, (round(height / self.unit), round(width / self.unit))
        if rows * columns * unit**2 > most:
            scale = math.sqrt(height * width / most)
            rows, columns = (max(1, math.floor(length / scale / unit)) for length in (height, width))
        elif rows * columns * unit**2 < least:
            scale = math.sqrt(least / (height * width))
            rows, columns = (math.ceil(length * scale / unit) for length in (height, width))
        return columns * unit, rows * unit

    def view_grids(self, sizes: Sequence[tuple[int, int]]) -> Grids:
        side, fitted = self.side, [self.resized(*size) for size in sizes]
        return tuple((height // self.unit * side, width // self.unit * side) for width, height in fitted)

    def num_tokens(self, width: int, height: int) -> int:
        return self.reduction.count(self.view_grids([(width, height)]))

    @property
    def largest(self) -> tuple[int, int]:
        if self.edges is not None:
            return (self.edges[1],) * 2
        if self.area is not None:
            squares = self.area[1] // self.unit**2
            rows = range(math.ceil(math.sqrt(squares / 200)), math.isqrt(squares) + 1)
            most = max(rows, key=lambda n: squares // n * n)
            sizes = [(squares // most * self.unit, most * self.unit), (200 * self.unit, self.unit)]
            return max(
                sizes, key=lambda size: self.num_tokens(*size)
            )  # the longest too, of which there is a row at least
        return self.unit, self.unit * ((self.most or 1) // self.side**2)

    def _pixels(self, picture: torch.Tensor) -> torch.Tensor:
        _, height, width = picture.shape
        size = self.resized(width, height)
        width, height = (length // self.unit * self.unit for length in size)
        return resized(within_max_side(picture), *size, self.resample)[:, :height, :width].contiguous()

    def within(self, most: int) -> NativeTransform:
        """The same with at most so many features; of an area, a picture that is much longer than wide has at least a row of squares."""
        if self.area is not None:
            area = max(
                most * self.patch**2, self.unit**2
            )  # with room between the two, so that rounding up to the least stays below
            return replace(self, area=(min(self.area[0], area // 4), area))
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
        return cls(patch, mean, std, most, edges if most is None else None, resample=resample)  # type: ignore[arg-type]


def transform_from_dict(values: Mapping[str, Any]) -> Transform:
    """Of any kind, from what its `to_dict` gave. Raises ConfigError."""
    kinds: dict[Any, type[Transform]] = {"native": NativeTransform, **TILED}
    return kinds.get(values.get("policy"), ImageTransform).from_dict(values)


def with_policy(transform: Transform, policy: str) -> Transform:
    """The transform of the same encoder under another policy. Raises ConfigError where the encoder does not allow it."""
    if (policy == "native") != isinstance(transform, NativeTransform):
        if policy == "native":
            raise ConfigError(
                f"model.vision.policy: this encoder takes images of one size: set {', '.join([*POLICIES, *TILED])}"
            )
        raise ConfigError(
            f"model.vision.policy: this encoder takes images in their own aspect ratio: set native, not {policy}"
        )
    if policy == transform.policy:
        return transform
    view = transform.view if isinstance(transform, Tiled) else transform
    assert isinstance(view, ImageTransform)
    return TILED[policy](view) if policy in TILED else replace(view, policy=policy)
