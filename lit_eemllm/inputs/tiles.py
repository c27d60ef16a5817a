"""Pictures cut into tiles of the encoder's size: LLaVA-1.6's `anyres`, InternVL's `tiles`, Idefics3's and SmolVLM's `split`.

Counts need the picture's width and height only, so a header tells them before any pixel is decoded.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image

from lit_eemllm.errors import ConfigError
from lit_eemllm.inputs.images import LATER, WHOLE, ImageTransform, Transform, resized, within_max_side
from lit_eemllm.inputs.reduction import EACH, Grids, Order, Reduction
from lit_eemllm.inputs.spans import Pieces
from lit_eemllm.layout import Pixels

GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Rows and columns of tiles that LLaVA-1.6 chooses from: 336 x 672, 672 x 336, 672 x 672, 1008 x 336 and 336 x 1008 pixels."""


MOST_TILES = 128
MOST_LONGEST = 4096
"""Pixels; as many as Idefics3's processor makes at most."""
BESIDE = "<fake_token_around_image>"


@dataclass(frozen=True)
class Tiled(Transform):
    """A picture as several views of the encoder's size, [views, 3, side, side]: tiles of it, and it as a whole.

    Attributes:
        view: what becomes of the whole picture, and of a tile; square.
    """

    view: ImageTransform
    reduction: Reduction = field(default=EACH, kw_only=True)

    def __post_init__(self) -> None:
        view = self.view if isinstance(self.view, ImageTransform) else ImageTransform.from_dict(self.view)
        if view.height != view.width:
            raise ConfigError(
                f"image policy {self.policy!r} needs a square encoder, found {view.height} x {view.width} pixels"
            )
        object.__setattr__(self, "view", replace(view, policy="resize", shortest=None))

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

    @property
    def tokens(self) -> tuple[int, int]:
        """Rows and columns of the tokens of a view."""
        return self.reduction.grid(self.side, self.side)

    @abstractmethod
    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles for a picture."""

    @abstractmethod
    def num_views(self, width: int, height: int) -> int:
        """Views of a picture."""

    def num_tokens(self, width: int, height: int) -> int:
        return self.num_views(width, height) * self.reduction.count(((self.side, self.side),))

    def view_grids(self, sizes: Sequence[tuple[int, int]]) -> Grids:
        return ((self.side, self.side),) * sum(self.num_views(*size) for size in sizes)

    def cut(self, canvas: torch.Tensor) -> torch.Tensor:
        """[3, rows x pixels, columns x pixels] to its tiles, row by row."""
        pixels = self.view.width
        tiles = canvas.unflatten(1, (-1, pixels)).unflatten(3, (-1, pixels))
        return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)

    def picture(self, pixels: torch.Tensor) -> Image.Image:
        """The views side by side."""
        return self.view.picture(torch.cat(list(pixels), dim=-1))

    def views(self, pixels: Pixels) -> Pixels:
        return super().views(torch.cat(list(pixels)))


@dataclass(frozen=True)
class AnyresTransform(Tiled):
    """A view of the whole picture and, of the picture in more detail, tiles of the encoder's size.

    LLaVA-1.6: of `grids` that one is chosen which keeps most of the picture's pixels and then wastes least; the picture is
    fitted into it, in its aspect ratio, on black. Its tokens are those of the view, then the rows of patches of all tiles
    together, without those that are padding, and after each row the learned newline (``spatial_unpad``).

    A connector that makes fewer tokens does so in each view; of tokens that stand for a whole tile none is dropped, and the newline
    comes after each row of tiles.

    Attributes:
        grids: rows and columns of tiles.
        most: LLaVA-OneVision (2408.03326, ``anyres_max_9``): where the tokens of the tiles are clearly more than so many tiles have, their
            grid is made smaller, bilinear.
        lone: likewise: of several pictures in a conversation only the view is shown, of the picture in a square, and one newline.
    """

    grids: tuple[tuple[int, int], ...] = GRIDS
    most: int | None = field(default=None, metadata=LATER)
    lone: bool = field(default=False, metadata=LATER)
    policy: str = "anyres"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "grids", tuple(map(tuple, self.grids)))
        wrong = [
            grid for grid in self.grids if len(grid) != 2 or not all(map(_count, grid)) or math.prod(grid) > MOST_TILES
        ]
        if not 1 <= len(self.grids) <= MOST_TILES or wrong:
            raise ConfigError(
                f"image policy 'anyres' chooses from 1 to {MOST_TILES} grids, (rows, columns), of 1 to {MOST_TILES} tiles each; found "
                f"{len(self.grids)} grids" + (f", such as {wrong[0]!r:.99}" if wrong else "")
            )
        if self.most is not None and not _count(self.most):
            raise ConfigError(f"image policy 'anyres' keeps the tokens of 1 tile at least, found {self.most!r}")

    def size_among(self, size: tuple[int, int], pictures: int) -> tuple[int, int]:
        return WHOLE if self.lone and pictures > 1 else size

    def grid(self, width: int, height: int) -> tuple[int, int]:
        from lit_eemllm.compat.transformers import best_grid

        pixels = self.view.height
        best = best_grid((height, width), [(rows * pixels, columns * pixels) for rows, columns in self.grids])
        return best[0] // pixels, best[1] // pixels

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

    def made(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the tokens of the tiles."""
        left, top, right, bottom = self.kept(width, height)
        rows, columns = bottom - top, right - left
        ratio = math.sqrt(rows * columns / ((self.most or math.inf) * math.prod(self.tokens)))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def num_tokens(self, width: int, height: int) -> int:
        if (width, height) == WHOLE:
            return math.prod(self.tokens) + 1
        rows, columns = self.made(width, height)
        return math.prod(self.tokens) + rows * (columns + 1)

    def num_views(self, width: int, height: int) -> int:
        return 1 if (width, height) == WHOLE else 1 + math.prod(self.grid(width, height))

    @property
    def largest(self) -> tuple[int, int]:
        sizes = [(columns * self.view.width, rows * self.view.height) for rows, columns in self.grids]
        return max(sizes, key=lambda size: self.num_tokens(*size))

    def _whole(self, picture: torch.Tensor) -> torch.Tensor:
        return replace(self.view, policy="pad")(picture)[None]

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
        return torch.cat([self.view(picture)[None], self.cut(canvas)])

    def order(self, sizes: Sequence[tuple[int, int]]) -> Order:
        start, parts, single = 0, [(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4))], True
        for size in sizes:
            view = math.prod(self.tokens)
            parts.append(alone(torch.arange(start, start + view)))
            start += view
            if size == WHOLE:
                parts.append(alone(NEWLINE))
                continue
            (high, wide), (rows, columns), (left, top, right, bottom) = self.tokens, self.grid(*size), self.kept(*size)
            tiles = torch.arange(rows * columns * high * wide).view(rows, columns, high, wide) + start
            grid = tiles.transpose(1, 2).reshape(rows * high, columns * wide)[top:bottom, left:right]
            lines, weights = smaller(grid, *self.made(*size))
            single &= lines.shape[:2] == grid.shape
            ends, whole = alone(NEWLINE.expand(len(lines)))
            parts.append(
                (
                    torch.cat([lines, ends[:, None]], 1).flatten(0, 1),
                    torch.cat([weights, whole[:, None]], 1).flatten(0, 1),
                )
            )
            start += rows * columns * view
        index, weights = (torch.cat(each) for each in zip(*parts, strict=True))
        index = index.masked_fill(index < 0, start)
        return Order(index[:, 0], start) if single else Order(index, start, weights)


def _count(value: object) -> bool:
    """Whether a value of a configuration is a whole number from 1."""
    return type(value) is int and value >= 1


NEWLINE = torch.tensor([-1])


def alone(index_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that are one row each, as rows and weights of four, [V, 4]."""
    return index_V[:, None].expand(-1, 4), torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(len(index_V), 4)


def smaller(grid: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a grid of rows made smaller (bilinear, without antialiasing), the four that each place is a mean of, and their weights, [rows, columns, 4]."""
    if grid.shape == (rows, columns):
        index, weights = alone(grid.flatten())
        return index.unflatten(0, grid.shape), weights.unflatten(0, grid.shape)
    ends = []
    for made, found in ((rows, grid.shape[0]), (columns, grid.shape[1])):
        at = ((torch.arange(made) + 0.5) * (found / made) - 0.5).clamp(min=0)
        first = at.long()
        ends.append((torch.stack([first, (first + 1).clamp(max=found - 1)], 1), torch.stack([1 - at % 1, at % 1], 1)))
    (row, row_weight), (column, column_weight) = ends
    index = grid[row[:, None, :, None], column[None, :, None, :]]
    weights = row_weight[:, None, :, None] * column_weight[None, :, None, :]
    return index.flatten(2), weights.flatten(2)


@dataclass(frozen=True)
class TilesTransform(Tiled):
    """InternVL (2404.16821): tiles in that of the grids of `least` to `most` tiles whose aspect ratio is nearest to the picture's, which
    is stretched to fill it; then, if there are several, a view of the whole picture. Their tokens are one run, with a text on each side."""

    least: int = 1
    most: int = 12
    around: tuple[str, str] = ("", "")
    policy: str = "tiles"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "around", tuple(self.around))
        if not (_count(self.least) and _count(self.most) and self.least <= self.most <= MOST_TILES):
            raise ConfigError(
                f"image policy 'tiles' cuts pictures into 1 to {MOST_TILES} tiles, found {self.least!r} to {self.most!r}"
            )
        if len(self.around) != 2 or not all(isinstance(text, str) and len(text) <= 99 for text in self.around):
            raise ConfigError(f"image policy 'tiles' puts two short texts around an image, found {self.around!r:.99}")

    def grid(self, width: int, height: int) -> tuple[int, int]:
        from lit_eemllm.compat.transformers import nearest_grid

        return nearest_grid((height, width), self.view.width, self.least, self.most)

    def num_views(self, width: int, height: int) -> int:
        tiles = math.prod(self.grid(width, height))
        return tiles + (tiles > 1)

    def pieces(self, width: int, height: int) -> Pieces:
        before, after = self.around
        return tuple(piece for piece in (before, self.num_tokens(width, height), after) if piece)

    @property
    def largest(self) -> tuple[int, int]:
        return self.view.width * self.most, self.view.width

    def _pixels(self, picture: torch.Tensor) -> torch.Tensor:
        rows, columns = self.grid(picture.shape[2], picture.shape[1])
        picture, pixels = within_max_side(picture), self.view.width
        tiles = self.cut(resized(picture, columns * pixels, rows * pixels, self.view.resample))
        return tiles.contiguous() if len(tiles) == 1 else torch.cat([tiles, self.view(picture)[None]])


@dataclass(frozen=True)
class SplitTransform(Tiled):
    """Idefics3 (2408.12637) and SmolVLM (2504.05299): the picture is resized until its longer side has so many pixels, then up to whole tiles,
    and cut; then comes a view of the whole. Each view is a run of tokens, and texts say where in the picture it is::

        <fake_token_around_image><row_1_col_1>....<fake_token_around_image><row_1_col_2>....
        <fake_token_around_image><row_2_col_1>....<fake_token_around_image><row_2_col_2>....

        <fake_token_around_image><global-img>....<fake_token_around_image>

    Attributes:
        longest: pixels of the longer side; 0 = four tiles, as Idefics3's.
        cuts: whether pictures are cut at all; else the view of the whole is all that there is.
    """

    longest: int = 0
    cuts: bool = True
    policy: str = "split"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longest == 0:
            object.__setattr__(self, "longest", 4 * self.view.width)
        most = min(MOST_LONGEST, 6 * self.view.width)
        if not _count(self.longest) or self.longest > most:
            raise ConfigError(
                f"image policy 'split' resizes pictures to a longer side of 1 to {most} pixels, six tiles, found {self.longest!r}"
            )

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height before the picture is cut; the shorter side is made even. Rounded as Idefics3's processor does."""
        aspect = width / height
        shorter = int(self.longest / aspect if width >= height else self.longest * aspect)
        shorter = max(1, shorter + shorter % 2)
        return (self.longest, shorter) if width >= height else (shorter, self.longest)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """The longer side is made whole tiles; the shorter grows with it, and is then made whole tiles."""
        if not self.cuts:
            return 1, 1
        (width, height), tile = self._resized(width, height), self.view.width
        longer, aspect = -(-max(width, height) // tile), width / height
        shorter = int(longer * tile / aspect if width >= height else longer * tile * aspect)
        shorter = max(1, -(-shorter // tile))
        return (shorter, longer) if width >= height else (longer, shorter)

    def num_views(self, width: int, height: int) -> int:
        tiles = math.prod(self.grid(width, height))
        return 1 + tiles * (tiles > 1)

    def pieces(self, width: int, height: int) -> Pieces:
        rows, columns = self.grid(width, height)
        tokens, text, pieces = self.reduction.count(((self.side, self.side),)), "", list[str | int]()
        if rows * columns > 1:
            for row in range(1, rows + 1):
                for column in range(1, columns + 1):
                    pieces += [f"{text}{BESIDE}<row_{row}_col_{column}>", tokens]
                    text = ""
                text = "\n"
            text = "\n\n"
        return (*pieces, f"{text}{BESIDE}<global-img>", tokens, BESIDE)

    @property
    def largest(self) -> tuple[int, int]:
        return self.longest, self.longest

    def _pixels(self, picture: torch.Tensor) -> torch.Tensor:
        size = (picture.shape[2], picture.shape[1])
        rows, columns = self.grid(*size)
        picture = resized(within_max_side(picture), *self._resized(*size), self.view.resample)
        if not self.cuts:
            return self.view(picture)[None]
        pixels = self.view.width
        picture = resized(picture, columns * pixels, rows * pixels, self.view.resample)
        whole = self.view(picture)[None]
        return torch.cat([self.cut(picture), whole]) if rows * columns > 1 else whole


TILED: dict[str, type[Tiled]] = {"anyres": AnyresTransform, "tiles": TilesTransform, "split": SplitTransform}
"""By the word in ``model.vision.policy``."""
