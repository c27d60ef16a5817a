"""What all layers of one forward pass share, and the attention that they call.

A layer's rows are all text rows, then the rows of the visual tokens in that layer. Only keys are put into stream order, by the
index of a `View`. Legend of shapes in `lit_eemllm.layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..attention import AttentionBackend
from ..compat.torch import storage_id
from ..layout import SequenceLayout, Visibility, Window, first_place, span, upload
from .ranking import Highest, Ranking
from .select import ALL, Routed, Scored, Select, Top

if TYPE_CHECKING:
    from ..model.cache import CachedPass, Grid, StreamCache

Made = TypeVar("Made")
Angles = tuple[Tensor, Tensor]
"""Cos and sin of rotary positions, [rows, 1, H] each."""

VisualKeys = list[tuple[Tensor, Tensor] | None]
"""For each layer, keys (before rotation) and values of its visual tokens, [v, K, H] each; None where it has none."""


@dataclass(frozen=True)
class Tokens:
    """The visual tokens in a layer.

    Attributes:
        select: the selection that they are.
        rows_v: their indices among all V, ascending; None = all.
        lengths: how many of each image.
        alone: the others have left for good, so the rows that layers hand on are these.
    """

    select: Select
    rows_v: Tensor | None
    lengths: list[int]
    alone: bool = False

    def among(self, x_V: Tensor) -> Tensor:
        """The rows of these tokens, taken from those of all visual tokens."""
        return x_V if self.rows_v is None else x_V.index_select(0, self.rows_v)

    def of(self, x_V: Tensor) -> Tensor:
        """The rows of these tokens, taken from those that the layer before has handed on."""
        return x_V if self.alone else self.among(x_V)

    def put(self, x_V: Tensor, x_v: Tensor) -> Tensor:
        """What to hand on: `x_V` with the rows of these tokens replaced by `x_v`."""
        return x_v if self.alone or self.rows_v is None else x_V.index_copy(0, self.rows_v, x_v.to(x_V.dtype))


@dataclass(frozen=True)
class View:
    """Keys of a layer, in stream order: all text with some visual tokens, text alone, or images alone.

    Attributes:
        name: under which the cache knows these keys; the same in every pass.
        layout: of these keys.
        order: the index of each among the layer's rows; None = they are its first rows.
        kept: text sees them, so when generating they are cached.
    """

    name: str
    layout: SequenceLayout
    order: Tensor | None
    kept: bool = True

    def of(self, x_R: Tensor) -> Tensor:
        """The rows of this view, taken from a layer's rows."""
        return x_R[: self.layout.num_tokens] if self.order is None else x_R.index_select(0, self.order)

    @cached_property
    def text_first(self) -> Tensor:
        """Indices of its text rows, then of its visual rows: from stream order back to the order of a layer's rows."""
        return torch.cat([self.layout.text_index, self.layout.visual_index])


def rotate(x_QNH: Tensor, angles: Angles) -> Tensor:
    """Rotary position embedding of queries or keys, as in transformers' Llama; without gradients in half the bytes, as no half is moved or
    negated. (With them what is written in place is copied in the backward pass, and takes longer.)"""
    cos_Q1H, sin_Q1H = angles
    half = x_QNH.shape[-1] // 2
    rotated_QNH = x_QNH * cos_Q1H
    if torch.is_grad_enabled():
        return rotated_QNH + torch.cat([-x_QNH[..., half:], x_QNH[..., :half]], dim=-1) * sin_Q1H
    # not addcmul_, which rounds otherwise than with gradients
    rotated_QNH[..., :half].sub_(x_QNH[..., half:] * sin_Q1H[..., :half])
    rotated_QNH[..., half:].add_(x_QNH[..., :half] * sin_Q1H[..., half:])
    return rotated_QNH


def joined(x_Th: Tensor, x_Vh: Tensor) -> Tensor:
    """Text rows, then visual rows, [T + V, h]. Without gradients nothing is copied where they lie so already, as those do that a layer
    hands on to the next."""
    storages = {storage_id(x.untyped_storage()) for x in (x_Th, x_Vh)}
    follow = x_Vh.storage_offset() == x_Th.storage_offset() + x_Th.numel() and len(storages) == 1
    if torch.is_grad_enabled() or not (follow and x_Th.is_contiguous() and x_Vh.is_contiguous()):
        return torch.cat([x_Th, x_Vh])
    return x_Th.as_strided((len(x_Th) + len(x_Vh), x_Th.shape[1]), x_Th.stride())


@dataclass(frozen=True)
class Stream:
    """What every layer of one forward pass shares. It never changes; plans, views and angles are computed once and kept.

    Attributes:
        layout: documents, runs and positions of text and visual tokens.
        rotary: from positions and how a layer turns queries or keys (`Family.rotary`) to angles.
        backend: computes attention.
        states: layer -> the visual states that enter it, [V, h], where the source of its row is ``own``.
        keys: precomputed, of all images; then no visual rows run through the layers.
        added: for each of the first layers, what is added to the visual rows after it, [V, h] (DeepStack in Qwen3-VL's connector).
        importance_V: float32, of each visual token to the encoder, where a layer ranks by it; see `Top`.
        cached: the pass over a padded cache, when generating.
        rotate: turns queries or keys by rotary angles.
        shared: what the mechanism's added modules share, such as the media of gated cross-attention.
    """

    layout: SequenceLayout
    rotary: Callable[[Tensor, str], Angles]
    backend: AttentionBackend
    states: Callable[[int], Tensor] | None = None
    keys: VisualKeys | None = None
    added: Sequence[Tensor] = ()
    importance_V: Tensor | None = None
    cached: CachedPass | None = None
    rotate: Callable[[Tensor, Angles], Tensor] = rotate
    shared: Any = None
    _computed: dict[Any, Any] = field(default_factory=dict)

    def _once(self, key: Any, make: Callable[[], Made]) -> Made:
        if key not in self._computed:
            self._computed[key] = make()
        made: Made = self._computed[key]
        return made

    def with_added(self, layer: int, x_Vh: Tensor, kept: Tokens | None = None) -> Tensor:
        """The visual rows that a layer hands on, of those that have not left, with what is added after it."""
        if layer >= len(self.added) or not len(x_Vh):
            return x_Vh
        return x_Vh + (self.added[layer] if kept is None else kept.among(self.added[layer]))

    @property
    def cache(self) -> StreamCache | None:
        """The KV cache to append to, when generating."""
        return None if self.cached is None else self.cached.cache

    @property
    def generating(self) -> bool:
        return self.cache is not None

    @cached_property
    def prefix_T1(self) -> Tensor:
        """True for text before the first image of its document; False for all that follows cached tokens."""
        if self.cached is not None and self.cached.past:
            return torch.zeros(self.layout.num_text, 1, dtype=torch.bool, device=self.layout.positions.device)
        return self.layout.prefix()[:, None]

    # --- which rows
    def tokens(self, select: Select) -> Tokens:
        """The visual tokens of a selection; of those that scores tell, all."""

        def make() -> Tokens:
            lengths = self.layout.image_lengths
            if select == ALL or isinstance(select, Scored) or not lengths:
                return Tokens(select, None, lengths)
            rows_v = upload(select.flags(lengths).nonzero().flatten(), self.layout.positions.device)
            return Tokens(select, rows_v, self._counts(select))

        return self._once(("tokens", select), make)

    def rows(self, here: Tokens, select: Select) -> Tensor:
        """Indices of all text and of a layer's visual tokens that are in a selection, among the layer's rows."""

        def make() -> Tensor:
            images, text = self.layout.image_lengths, self.layout.num_text
            among = select.flags(images)[here.select.flags(images)].nonzero().flatten()
            return upload(torch.cat([torch.arange(text), text + among]), self.layout.positions.device)

        return self._once(("rows", here.select, select), make)

    def places(self, here: Tokens) -> Tensor:
        """Positions of a layer's rows, [R]."""
        text_T, visual_V = self.layout.text_index, self.layout.visual_index
        return self.layout.positions[torch.cat([text_T, here.among(visual_V)])]

    def angles(self, here: Tokens, kind: str) -> Angles:
        """Rotary angles of a layer's rows."""
        return self._once(("angles", here.select, kind), lambda: self.rotary(self.places(here), kind))

    def rotated(self, x_RNH: Tensor, here: Tokens, kind: str | None, whole: View | None = None) -> Tensor:
        """Rotate queries or keys of a layer's rows, or of its text alone; with `whole`, rows in that view's order. None = not."""
        if kind is None:
            return x_RNH
        cos_R1H, sin_R1H = self.angles(here, kind)
        if whole is not None and whole.order is not None:
            key = "angles of", whole.name, kind
            cos_R1H, sin_R1H = self._once(key, lambda: tuple(map(whole.of, self.angles(here, kind))))
        return self.rotate(x_RNH, (cos_R1H[: len(x_RNH)], sin_R1H[: len(x_RNH)]))

    def view(self, here: Tokens, seen: Select) -> View:
        """All text and those visual tokens of a layer that are in `seen`."""

        def make() -> View:
            if seen.empty:
                return View("text", self.layout.text_only(), None)
            if not self.layout.num_visual:
                return View(str(seen), self.layout, None)
            if seen == here.select:
                layout = self.layout.with_visual(here.rows_v, here.lengths)
                return View(str(seen), layout, layout.merge_index)
            those = self.tokens(seen)
            layout = self.layout.with_visual(those.rows_v, those.lengths)
            return View(str(seen), layout, self.rows(here, seen)[layout.merge_index])

        return self._once(("view", here.select, seen), make)

    def images(self, here: Tokens) -> View:
        """A layer's visual tokens alone, every image a document."""

        def make() -> View:
            layout, text = self.layout.with_visual(here.rows_v, here.lengths).images_only(), self.layout.num_text
            return View(f"images, {here.select}", layout, text + layout.visual_index, kept=False)

        return self._once(("images", here.select), make)

    # --- choosing by score
    def routed(self, select: Routed, scores_V: Tensor) -> Tokens:
        """The tokens that a router scores highest."""
        images = self.layout.image_lengths
        if not images:
            return self.tokens(select)
        counts = self._counts(select)
        return Tokens(select, self._highest(images, counts)(scores_V), counts)

    def _counts(self, select: Select) -> list[int]:
        """How many tokens of each image a selection holds."""
        return [select.count(length) for length in self.layout.image_lengths]

    def _highest(self, lengths: list[int], counts: list[int]) -> Highest:
        """Which of so many tokens of each image score highest, so many of them."""

        def make() -> Highest:
            places = torch.split(torch.arange(sum(lengths)), lengths)
            return Highest.of(list(places), sum(lengths), counts).to(self.layout.positions.device)

        return self._once(("highest", *lengths, *counts), make)

    def ranking(self, top: Top, before: Tokens) -> Ranking:
        """Who ranks the visual tokens that are left."""

        def make() -> Ranking:
            return Ranking.of(self.layout, top.by, before.lengths, self._counts(top))

        return self._once(("ranking", top), make)

    def rank(
        self,
        layer: int,
        top: Top,
        before: Tokens,
        q_nNH: Tensor,
        k_RKH: Tensor,
        scale: float,
        view: str,
        window: Window | None,
    ) -> tuple[Tensor, Tokens]:
        """Rank the visual tokens in a layer; see `Top`.

        Args:
            layer: its number; if its cache holds earlier turns, attention is over those keys too.
            top: how many stay.
            before: the visual tokens that were left.
            q_nNH: rotated queries of the rows that rank, see `Ranking`.
            k_RKH: rotated keys of the text and of `before`.
            scale: of the scores.
            view: under which the cache knows the layer's keys.
            window: the layer's; what lies outside gets no attention.

        Returns:
            indices of those that stay, among `before`, and these.
        """
        past = self.cached.earlier_keys(layer, view) if self.cached is not None else None
        near = None if window is None else (self.places(before), window)
        return self._stay(top, before, self.ranking(top, before).most_attended(q_nNH, k_RKH, scale, past, near))

    def rank_by_encoder(self, top: Top, before: Tokens) -> tuple[Tensor, Tokens]:
        """As `rank`, but by the importance that the encoder gave."""
        assert self.importance_V is not None
        highest = self._highest(before.lengths, self._counts(top))
        return self._stay(top, before, highest(before.among(self.importance_V)))

    def _stay(self, top: Top, before: Tokens, stay_v: Tensor) -> tuple[Tensor, Tokens]:
        rows_v = stay_v if before.rows_v is None else before.rows_v[stay_v]
        return stay_v, Tokens(top, rows_v, self._counts(top), alone=True)

    # --- attention
    def attend(
        self, layer: int, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, view: View, kind: Visibility, scale: float
    ) -> Tensor:
        """Attention of a view's querying rows over its keys and those that the cache holds of it, [Q, N, H].

        Args:
            layer: its number.
            q_QNH: rotated queries, in stream order.
            k_SKH: rotated keys of the view.
            v_SKH: its values.
            view: the keys.
            kind: which rows query, and what they see.
            scale: of the scores.
        """
        q_QNH, k_SKH = q_QNH.to(v_SKH.dtype), k_SKH.to(v_SKH.dtype)  # under autocast, rotary angles are float32
        if view.kept and self.cached is not None and self.cache is not None:
            grid = self._grid(view)
            k_BKLH, v_BKLH = self.cached.update(grid.pad(k_SKH), grid.pad(v_SKH), layer)
            mask_BQL = self._mask(view, grid, kind.window)
            if self.cached.past:
                rows = view.layout.query_rows(kind)
                q_BNQH = grid.pad(q_QNH, rows)
                return grid.unpad(self.backend.attend_cached(q_BNQH, k_BKLH, v_BKLH, mask_BQL, scale), rows)
        return self._packed(q_QNH, k_SKH, v_SKH, view, kind, scale)

    def attend_apart(
        self,
        layer: int,
        q_RNH: Tensor,
        k_RKH: Tensor,
        v_RKH: Tensor,
        here: Tokens,
        seen: Select,
        alone: Visibility,
        scale: float,
    ) -> Tensor:
        """Attention where text sees less than images do, [R, N, H]: visual rows, `alone`, see everything before them and perhaps all of
        their image; text sees `seen`. All keys are cached, for images of later turns. Arguments as in `attend`, but of the layer's
        rows."""
        q_RNH, k_RKH, text = q_RNH.to(v_RKH.dtype), k_RKH.to(v_RKH.dtype), self.layout.num_text
        view, visible = self.view(here, here.select), self.view(here, seen)
        k_SKH, v_SKH = view.of(k_RKH), view.of(v_RKH)
        if self.cached is not None and self.cache is not None:
            grid = self._grid(view)
            k_BKLH, v_BKLH = self.cached.update(grid.pad(k_SKH), grid.pad(v_SKH), layer)
            seen_BL = self._once(("marked", view.name, seen), lambda: self._marked(here, seen, view, grid))
            mask_BQL = self._mask(view, grid, alone.window)
            if self.cached.past:
                parts = [(view.layout.text_index, q_RNH[:text], mask_BQL & seen_BL[:, None])]
                if self.layout.num_visual:
                    if alone.both_ways:
                        mask_BQL = self._mask(view, grid, alone.window, both_ways=True)
                    parts.append((view.layout.visual_index, q_RNH[text:], mask_BQL))
                attend, pad = self.backend.attend_cached, grid.pad
                return torch.cat(
                    [grid.unpad(attend(pad(q, rows), k_BKLH, v_BKLH, mask, scale), rows) for rows, q, mask in parts]
                )
        of_text = Visibility(False, alone.window)
        mixed_TNH = self._packed(q_RNH[:text], visible.of(k_RKH), visible.of(v_RKH), visible, of_text, scale)
        if not self.layout.num_visual:
            return mixed_TNH
        return torch.cat([mixed_TNH, self._packed(q_RNH[text:], k_SKH, v_SKH, view, alone, scale)])

    def _packed(
        self, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, view: View, kind: Visibility, scale: float
    ) -> Tensor:
        if not len(q_QNH):  # of an image that no text follows yet
            return q_QNH[..., : v_SKH.shape[-1]]
        if kind.window is not None and span(kind.window) >= self._longest:
            kind = replace(kind, window=None)  # nothing is farther away
        plan = self._once(("plan", view.name, kind), lambda: self.backend.plan(view.layout, kind))
        return self.backend.attend(q_QNH, k_SKH, v_SKH, plan, scale)

    @cached_property
    def _longest(self) -> int:
        """Tokens of the longest document."""
        return max(sum(run.length for run in document) for document in self.layout.documents)

    def _mask(self, view: View, grid: Grid, window: Window | None, both_ways: bool = False) -> Tensor:
        """[B, W, past + W] bool, True where a new column of a cached view sees a column: one before it or, `both_ways`, of its image."""
        if window is None and not both_ways:
            return grid.mask_BQL

        def make() -> Tensor:
            mask_BQL = grid.mask_BQL
            if both_ways:
                mask_BQL = mask_BQL | grid.same(view.layout.image_of_row())
            if window is None:
                return mask_BQL
            place_BL = self._once(("places", view.name), lambda: self._places(view, grid))
            first_BQ = first_place(grid.columns(view.layout.positions), window)
            return mask_BQL & (first_BQ[:, :, None] <= place_BL[:, None])

        return self._once(("mask", view.name, window, both_ways), make)

    def _places(self, view: View, grid: Grid) -> Tensor:
        """[B, past + W] positions of the columns of a cached view."""
        assert self.cached is not None
        return self.cached.marked(f"{view.name}, positions", grid, view.layout.positions)

    def _marked(self, here: Tokens, seen: Select, view: View, grid: Grid) -> Tensor:
        """[B, past + W] bool, True for the columns of a cached view that text sees."""
        assert self.cached is not None
        seen_R = torch.ones(self.layout.num_text, dtype=torch.bool, device=self.layout.positions.device)
        if self.layout.num_visual:
            seen_V = upload(seen.flags(self.layout.image_lengths), seen_R.device)
            seen_R = torch.cat([seen_R, here.among(seen_V)])
        return self.cached.marked(f"{view.name}, {seen}", grid, view.of(seen_R))

    def _grid(self, view: View) -> Grid:
        """The grid of a view in the cache; a view that leaves nothing out has the columns of the ids."""
        assert self.cached is not None
        lengths: list[int] = []
        if view.name == "text" and self.layout.num_visual:  # its layout lacks documents without text
            lengths = self.layout.text_lengths
        elif view.name != str(ALL) and self.layout.num_visual:
            lengths = [sum(run.length for run in document) for document in view.layout.documents]
        return self.cached.grid(view.name, lengths)
