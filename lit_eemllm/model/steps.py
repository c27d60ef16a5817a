"""One new token for each sequence of a cache: written into room that the cache has kept, so that from token to token nothing changes its
shape or place, no key is copied again, and a GPU can record the step and launch its kernels at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .cache import CachedPass, Grid, StreamCache, WindowPass

ROOM = 64
"""Columns that are kept at a time. Keys are copied once for so many tokens; a 7B model without grouped heads keeps 32 MiB of them for each sequence."""


class StepPass(CachedPass):
    """The pass of one new token for each sequence, into the room of a cache. The room is counted by who calls it.

    Args:
        cache: with room.
        mask_B1: 1 where the new id is no padding.
    """

    cache: StreamCache

    def __init__(self, cache: StreamCache, mask_B1: Tensor) -> None:
        self.cache, self.past = cache, cache.columns
        self._mask_BL, self._grids = mask_B1, {}

    def update(self, k_BK1H: Tensor, v_BK1H: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values; returns all, room included, which the grid's mask hides."""
        held = self.cache.layers[layer]
        return self._write(held.keys, 2, k_BK1H), self._write(held.values, 2, v_BK1H)

    def grid(self, view: str, lengths: list[int]) -> Grid:
        if view not in self._grids:
            real_BL = self._write(self.cache.masks[view], 1, self._mask_BL)
            self._grids[view] = Grid(None, tuple(self._mask_BL.shape), real_BL[:, None])
        return self._grids[view]

    def marked(self, name: str, grid: Grid, mark_R: Tensor) -> Tensor:
        return self._write(self.cache.masks[name], 1, grid.columns(mark_R))

    def windows(self, row_R: Tensor | None, image_R: Tensor, last_B: Tensor, longest: int | None) -> WindowPass:
        self.cache.grows = True
        return super().windows(row_R, image_R, last_B, longest)

    def _write(self, held: Tensor, dim: int, new: Tensor) -> Tensor:
        """Into the first column of the room, whose number only the device knows."""
        return held.index_copy_(dim, held.shape[dim] - self.cache.room_1, new.to(held.dtype))


class Replay:
    """A step recorded as a CUDA graph. It goes on where the cache is, as long as nothing of the cache moves.

    Args:
        step: from ids and mask, [B, 1] each, to logits [B, 1, words]; all else that it reads or writes stays where it is.
        ids_B1, mask_B1: of the next step; recording computes nothing.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], ids_B1: Tensor, mask_B1: Tensor) -> None:
        self.ids_B1, self.mask_B1, self.graph = ids_B1.clone(), mask_B1.clone(), torch.cuda.CUDAGraph()
        # what autocast casts and keeps would lie in the graph's memory, where others must not read it
        casts: AbstractContextManager[object] = nullcontext()
        if torch.is_autocast_enabled("cuda"):
            casts = torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)
        with casts, torch.cuda.graph(self.graph):
            self.logits = step(self.ids_B1, self.mask_B1)

    def __call__(self, ids_B1: Tensor, mask_B1: Tensor) -> Tensor:
        self.ids_B1.copy_(ids_B1)
        self.mask_B1.copy_(mask_B1)
        self.graph.replay()
        return self.logits.clone()
