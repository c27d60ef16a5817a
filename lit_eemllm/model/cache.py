"""The KV cache of generation: between the packed stream and transformers' cache, left-padded like the ids of `generate`.

A layer caches the keys that its text sees: all columns, or the text columns alone where a mechanism hides the image. Each
such *view* of the columns has its own left-padded grid, so layers of one cache differ in length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from ..layout import Run, SequenceLayout, upload


class StreamCache(DynamicCache):
    """transformers' KV cache, and what else must be remembered of its columns.

    Attributes:
        columns: columns of ids so far; a layer may hold fewer.
        masks: for each view [B, width], True where its columns are no padding; and other marks of its columns, see `CachedPass.marked`.
        next_position_B: the position of the next token of each sequence.
        media: per block that attends, keys and values that new text sees [B, heads, R, H], with their mask [B, R].
        window_marks: of the columns of windows, likewise.
        room: columns at the end of all views, and of their keys and values, that are kept for new tokens.
        room_1: the same number on the device, [1].
        grows: a block appends to what it holds of a window.
        replay: the step of one new token for each sequence, recorded; see `Replay`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.columns, self.room, self.grows = 0, 0, False
        self.masks: dict[str, Tensor] = {}
        self.window_marks: dict[str, Tensor] = {}
        self.next_position_B: Tensor | None = None
        self.room_1: Tensor | None = None
        self.media: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.replay: Any = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values; not of room."""
        held = [x[:, :, : x.shape[2] - self.room] for layer in self.layers for x in (layer.keys, layer.values)]
        return sum(x.nbytes for x in (*held, *(x for k, v, _ in self.media.values() for x in (k, v))))

    def make_room(self, columns: int) -> None:
        """Keep room for so many new tokens of each sequence: as long as it lasts, nothing that a `StepPass` touches moves."""
        self.settle()
        for layer in self.layers:
            layer.keys, layer.values = (pad(x, (0, 0, 0, columns)) for x in (layer.keys, layer.values))
        self.masks = {name: pad(mask, (0, columns)) for name, mask in self.masks.items()}
        assert self.next_position_B is not None
        self.next_position_B = self.next_position_B.clone()
        self.room, self.room_1 = columns, torch.full((1,), columns, device=self.next_position_B.device)

    def settle(self) -> None:
        """Give up what is left of the room."""
        if self.room:
            for layer in self.layers:
                layer.keys, layer.values = (x[:, :, : -self.room] for x in (layer.keys, layer.values))
            self.masks = {name: mask[:, : -self.room] for name, mask in self.masks.items()}
        self.room, self.room_1, self.replay = 0, None, None

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.replay = None
        self.masks = {view: function(mask) for view, mask in self.masks.items()}
        self.window_marks = {name: function(mark) for name, mark in self.window_marks.items()}
        self.media = {layer: (function(k), function(v), function(mask)) for layer, (k, v, mask) in self.media.items()}
        if self.next_position_B is not None:
            self.next_position_B = function(self.next_position_B)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map(lambda x: x[indices])

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("layers of this cache differ in length: it cannot be cut back (assisted generation)")


@dataclass(frozen=True)
class Grid:
    """Where the rows of a view lie among the new columns of its padded grid, and what those see.

    Attributes:
        slots_R: row of the view -> place in [B * W]; None = its rows fill the grid in order.
        shape: B, W.
        mask_BQL: [B, W, past + W], True where a new column sees a column.
    """

    slots_R: Tensor | None
    shape: tuple[int, int]
    mask_BQL: Tensor

    def pad(self, x_RNH: Tensor, rows: Tensor | None = None) -> Tensor:
        """Rows of the view (all, or the given ones) in the grid, [B, N, W, H], zeros elsewhere."""
        slots, (batch, width) = self._slots(rows), self.shape
        if slots is not None:
            x_RNH = x_RNH.new_zeros(batch * width, *x_RNH.shape[1:]).index_copy(0, slots, x_RNH)
        return x_RNH.unflatten(0, self.shape).transpose(1, 2)

    def unpad(self, x_BNWH: Tensor, rows: Tensor | None = None) -> Tensor:
        """The inverse of `pad`."""
        slots, x_RNH = self._slots(rows), x_BNWH.transpose(1, 2).flatten(0, 1)
        return x_RNH if slots is None else x_RNH[slots]

    def columns(self, mark_R: Tensor) -> Tensor:
        """One number for each row of the view, in the grid, [B, W]; 0 or False elsewhere."""
        return self.pad(mark_R[:, None, None])[:, 0, :, 0]

    def same(self, number_R: Tensor) -> Tensor:
        """[B, W, past + W], True where a new column sees one of the same number; 0 is none. `number_R`: of the view's rows."""
        number_BW = self.columns(number_R)
        same_BWW = (number_BW[:, :, None] == number_BW[:, None]) & (number_BW[:, :, None] > 0)
        return pad(same_BWW, (self.mask_BQL.shape[2] - number_BW.shape[1], 0))

    def _slots(self, rows: Tensor | None) -> Tensor | None:
        """Slots of the given rows of the view, or of all; None = the grid is filled in order."""
        return rows if self.slots_R is None else self.slots_R if rows is None else self.slots_R[rows]


class CachedPass:
    """One forward pass over new left-padded ids, which are appended to a cache. Without a cache only the grid of the ids is used.

    Args:
        cache: the cache to append to, or None.
        mask_BL: [B, L], 1 where a new id is no padding.
        real_BL: the same on the CPU, bool.
    """

    def __init__(self, cache: StreamCache | None, mask_BL: Tensor, real_BL: Tensor) -> None:
        self.cache = cache
        self.past = cache.columns if cache is not None else 0
        self._mask_BL, self._real_BL = mask_BL, real_BL
        self._grids: dict[str, Grid] = {}
        if cache is not None:
            cache.columns += mask_BL.shape[1]

    def update(self, k_BKWH: Tensor, v_BKWH: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append new columns to a layer's keys and values, and return all of them, [B, K, past + W, H]."""
        assert self.cache is not None
        k_BKLH, v_BKLH = self.cache.update(k_BKWH, v_BKWH, layer)
        return k_BKLH, v_BKLH

    def windows(self, row_R: Tensor | None, image_R: Tensor, last_B: Tensor, longest: int | None) -> WindowPass:
        """For blocks that attend to windows; arguments as there."""
        return WindowPass(self, row_R, image_R, last_B, longest)

    def earlier_keys(self, layer: int, view: str) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """The rotated keys of earlier passes in a layer's cache, [B, K, L, H], which are no padding, [B, L], and if a window needs
        them their positions, [B, L]; None if there are none."""
        mask_BL = self.cache.masks.get(view) if self.cache is not None and self.past else None
        if self.cache is None or mask_BL is None:
            return None
        keys_BKLH = self.cache.layers[layer].keys  # a layer before may have noted this pass's columns already
        place_BL, length = self.cache.masks.get(f"{view}, positions"), keys_BKLH.shape[2]
        return keys_BKLH, mask_BL[:, :length], None if place_BL is None else place_BL[:, :length]

    def marked(self, name: str, grid: Grid, mark_R: Tensor) -> Tensor:
        """[B, past + W], marks of a view's columns: those of earlier passes, which the cache keeps under `name`, and new ones.

        Args:
            mark_R: flags or positions of the view's new rows.
        """
        new_BW = grid.columns(mark_R)
        return new_BW if self.cache is None else _appended(self.cache.masks, name, new_BW)

    def grid(self, view: str, lengths: list[int]) -> Grid:
        """The grid of a view.

        Args:
            view: its name; ``all`` takes the columns of the ids.
            lengths: rows of the view in each sequence; empty when they are all columns of the ids.
        """
        if view not in self._grids:
            known_BW, new_BW = self._real_BL, self._mask_BL.bool()
            if lengths:
                known_BW = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
                new_BW = upload(known_BW, new_BW.device)
            slots_R = None if known_BW.all() else upload(known_BW.flatten().nonzero().flatten(), new_BW.device)
            real_BL = new_BW if self.cache is None else _appended(self.cache.masks, view, new_BW)
            column_L = torch.arange(real_BL.shape[1], device=real_BL.device)
            sees_QL = column_L <= column_L[real_BL.shape[1] - new_BW.shape[1] :, None]
            self._grids[view] = Grid(slots_R, tuple(new_BW.shape), real_BL[:, None] & sees_QL)
        return self._grids[view]


def _appended(marks: dict[str, Tensor], name: str, new_BW: Tensor) -> Tensor:
    """The marks of that name with those of new columns, which they then have."""
    marks[name] = torch.cat([marks[name], new_BW], dim=1) if name in marks else new_BW
    return marks[name]


class WindowPass(CachedPass):
    """The same pass for blocks that attend to windows, each an image and the text after it up to the next one. Of every sequence the cache
    holds the last window alone, in `StreamCache.media`.

    Args:
        whole: the pass.
        row_R: rows of the stream that are in windows, ascending; None = all.
        image_R: of each of these the number of its image among those of its sequence in this pass, from 1; 0 = it goes on in the
            window that the cache holds, if that has an image.
        last_B: of each sequence the number of its last image; 0 = it has none in this pass.
        longest: rows of the longest last window, before which all columns are dropped; None = old windows go on.
    """

    def __init__(
        self, whole: CachedPass, row_R: Tensor | None, image_R: Tensor, last_B: Tensor, longest: int | None
    ) -> None:
        assert whole.cache is not None
        main, self.cache = whole.grid("all", []), whole.cache
        held = next((mask for _, _, mask in self.cache.media.values()), None)
        self.past = int(held is not None)
        held_BR = last_B.new_zeros(len(last_B), 0, dtype=torch.bool) if held is None else held
        self.lengths_B = held_BR.sum(1)
        """Rows of the windows that are held; 0 = none."""
        grid = replace(main, slots_R=row_R if row_R is not None and main.slots_R is None else main._slots(row_R))
        image_BW = grid.columns(image_R + 1)  # 0 is padding
        column_W = torch.arange(main.shape[1], device=image_R.device)
        same_BWW = (image_BW[:, :, None] == image_BW[:, None]) & (image_BW > 0)[:, None]
        new_BWW = same_BWW & (column_W <= column_W[:, None])
        old_BWR = (image_BW == 1)[:, :, None] & held_BR[:, None]
        self._window_grid = replace(grid, mask_BQL=torch.cat([old_BWR, new_BWW], 2))
        goes_on_B1 = (last_B == 0)[:, None] & (self.lengths_B > 0)[:, None]
        last_BW = (image_BW == last_B[:, None] + 1) & (goes_on_B1 | (last_B > 0)[:, None])
        mask_BL = torch.cat([held_BR & goes_on_B1, last_BW], 1)
        self._dropped = 0 if longest is None else mask_BL.shape[1] - longest
        self._mask_BL = mask_BL[:, self._dropped :]

    def grid(self, view: str, lengths: list[int]) -> Grid:
        return self._window_grid

    def marked(self, name: str, grid: Grid, mark_R: Tensor) -> Tensor:
        """Likewise; of the columns that are dropped, marks are too."""
        assert self.cache is not None
        mark_BL = _appended(self.cache.window_marks, name, grid.columns(mark_R))
        self.cache.window_marks[name] = mark_BL[:, self._dropped :]
        return mark_BL

    def update(self, k_BKWH: Tensor, v_BKWH: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        assert self.cache is not None
        if self.past:
            k, v, _ = self.cache.media[layer]
            k_BKWH, v_BKWH = torch.cat([k, k_BKWH], 2), torch.cat([v, v_BKWH], 2)
        k, v = (x[:, :, self._dropped :].clone() if self._dropped else x for x in (k_BKWH, v_BKWH))
        self.cache.media[layer] = k, v, self._mask_BL
        return k_BKWH, v_BKWH


def one_token_each(sequences: int, device: torch.device) -> SequenceLayout:
    """The layout of sequences of one text token each, at position 0; nothing is copied to the device."""
    rows = torch.arange(sequences, device=device)
    return SequenceLayout(((Run(False, 1),),) * sequences, rows, rows[:0], rows, torch.zeros_like(rows))


def layout_of_padded(visual_BL: Tensor, real_BL: Tensor, image_lengths: list[int]) -> SequenceLayout:
    """The layout of left-padded ids, in which each image is one or more runs of its token repeated; positions count from 0.

    Args:
        visual_BL: on the CPU, bool: where an id is an image token.
        real_BL: likewise, where it is no padding.
        image_lengths: tokens of each run, in order.

    Raises:
        ValueError: the images have other lengths than the runs of image tokens.
    """
    pairs = zip(visual_BL.tolist(), real_BL.tolist(), strict=True)
    kept = [[visual for visual, valid in zip(*pair, strict=True) if valid] for pair in pairs]
    tokens = sum(map(sum, kept))
    if tokens != sum(image_lengths):
        text = f"{len(image_lengths)} images give {sum(image_lengths)} visual tokens, but the ids hold {tokens} image tokens"
        raise ValueError(text)
    lengths, documents = iter(image_lengths), []
    for doc in kept:
        runs: list[Run] = []
        for visual, run in groupby(doc):
            left = len(list(run))
            while left:  # images may lie side by side
                runs.append(Run(visual, next(lengths) if visual else left))
                left -= runs[-1].length
                if left < 0:
                    raise ValueError(
                        f"an image of {runs[-1].length} tokens has only {runs[-1].length + left} image tokens"
                    )
        documents.append(runs)
    return SequenceLayout.of(documents)


def continue_positions(layout: SequenceLayout, cache: StreamCache, images_take: Sequence[int] | None) -> SequenceLayout:
    """The layout at the positions after those in the cache. The cache then notes where the next pass begins.

    Args:
        layout: the new tokens, at positions from 0.
        cache: with one sequence for each document.
        images_take: positions taken by each run of visual tokens; None = one for each token.
    """
    left = iter(layout.image_lengths if images_take is None else images_take)
    taken = [sum(next(left) if run.visual else run.length for run in document) for document in layout.documents]
    before_B, device = cache.next_position_B, layout.positions.device
    if before_B is None:
        cache.next_position_B = upload(torch.tensor(taken), device)
        return layout
    if (
        layout.num_text == len(layout.documents) == layout.num_tokens
    ):  # one new token each: nothing to copy to the device
        layout = replace(layout, positions=layout.positions + before_B)
        cache.next_position_B = before_B.add_(1) if cache.room else before_B + 1
        return layout
    lengths = upload(torch.tensor([sum(run.length for run in document) for document in layout.documents]), device)
    cache.next_position_B = before_B + upload(torch.tensor(taken), device)
    before_S = before_B.repeat_interleave(lengths, output_size=layout.num_tokens)
    before = before_S if layout.positions.ndim == 1 else before_S[:, None]
    return replace(layout, positions=layout.positions + before)
