"""The layout of a packed batch: which tokens are text or visual, of which document, at which position. Decided once per batch.

A *pack* holds documents back to back, without padding. A document is a list of runs, each text or visual (one run per
image). The layout knows nothing of mechanisms: which rows query is a `Visibility`, chosen by the mechanism. *Stream order* is
the order of the tokens in the pack.

Legend of shape suffixes, used all over the package: `q_RNH` has shape [R, N, H], and a digit is a size, as in `cos_R1H`.
    S all tokens of the pack    T its text tokens    V its visual tokens    v the visual tokens in a layer
    R rows of a layer or view, text first, then visual ones    Q rows that query    n some of the text tokens
    N query heads    K key/value heads    H head size    w all heads side by side: N x H, or K x H
    h hidden size    d width of the vision encoder    I images
    B sequences of a padded batch    L padded length, that of cached tokens included    W columns that a pass adds to a cache
As the last of several letters, v is the vocabulary. Letters of one file alone are in its legend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor, usually from the CPU, to the device without making the CPU wait for it."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


Pixels = Tensor | list[Tensor]
"""Several images: one tensor [I, 3, height, width] where all have one shape, else a list of [3, height, width]."""


def join_images(pixels: Sequence[Tensor]) -> Pixels:
    """Images [3, height, width], at least one, as `Pixels`."""
    return torch.stack(list(pixels)) if len({image.shape for image in pixels}) == 1 else list(pixels)


def map_images(pixels: Pixels, function: Callable[[Tensor], Tensor]) -> Pixels:
    return function(pixels) if isinstance(pixels, Tensor) else [function(image) for image in pixels]


def take_images(pixels: Pixels, indices: Sequence[int]) -> Pixels:
    if not isinstance(pixels, Tensor):
        return [pixels[i] for i in indices]
    return pixels.index_select(0, upload(torch.tensor(indices, dtype=torch.long), pixels.device))


class Run(NamedTuple):
    """A stretch of tokens of one kind; a visual run is one image, or one tile of an image whose tiles have text between them, which is
    an image of its own to all that follows."""

    visual: bool
    length: int


Stretches = tuple[tuple[int, int], ...]
"""Pairs of a first row and the one after the last."""


def stretches(rows: Sequence[int]) -> Stretches:
    """Ascending rows as pairs of the first of each stretch and the one after its last."""
    groups = groupby(enumerate(rows), key=lambda each: each[1] - each[0])
    return tuple((part[0][1], part[-1][1] + 1) for part in (list(group) for _, group in groups))


def visual_flags(runs: Sequence[Run]) -> Tensor:
    """[tokens] bool, True where a token of the runs is visual."""
    visual, lengths = zip(*runs, strict=True)
    return torch.repeat_interleave(torch.tensor(visual), torch.tensor(lengths))


class Chunk(NamedTuple):
    """In place of a window: a query sees nothing before its chunk, of the positions that `size` divides alike."""

    size: int


Window = int | Chunk
"""How far a query sees back, in positions."""


def first_place(place: Tensor, window: Window) -> Tensor:
    """The first position that each position sees."""
    return place - (place % window.size if isinstance(window, Chunk) else window)


def span(window: Window) -> int:
    """How many positions one position sees at most, itself included."""
    return window.size if isinstance(window, Chunk) else window + 1


@dataclass(frozen=True)
class Visibility:
    """Which rows of a layer query, and how far back they see. Keys are always all rows.

    Args:
        visual_queries: visual tokens query and see everything earlier in their document (a dense, LLaVA-like layer).
            Otherwise only text queries (composite attention, EE-MLLM Eq. 1).
        window: a query sees nothing that stands more positions than this before it, or before its chunk; None = no limit.
        text_queries: whether text queries. False needs visual_queries, and visual tokens then see the text before them.
        both_ways: a visual token sees all of its image, too. Only where visual tokens query alone.
    """

    visual_queries: bool
    window: Window | None = None
    text_queries: bool = True
    both_ways: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and span(self.window) < 1:
            raise ValueError(f"a window is 0 or more, found {self}")
        if not self.visual_queries and not self.text_queries:
            raise ValueError(f"some rows must query, found {self}")
        if self.both_ways and self.text_queries:
            raise ValueError(f"both ways needs visual tokens that query alone, found {self}")

    def queries(self, visual: bool) -> bool:
        """Whether rows of a kind query: visual rows if `visual`, else text rows."""
        return self.visual_queries if visual else self.text_queries


@dataclass(frozen=True)
class SequenceLayout:
    """Documents, runs and positions of one pack. Build it with `SequenceLayout.of`, on the CPU.

    The text of a document sees every earlier token of the same document, text or visual, and itself. With one document
    ``t t V V t`` the dense mask and, beside it, the composite one (text rows only) are::

        1 0 0 0 0        1 0 0 0 0
        1 1 0 0 0        1 1 0 0 0
        1 1 1 0 0        1 1 1 1 1
        1 1 1 1 0
        1 1 1 1 1

    Attributes:
        documents: the runs of each document, as Python integers, so that lengths are never read from a device.
        text_index: [T] indices in the stream of the text tokens, ascending.
        visual_index: [V] likewise of the visual tokens.
        merge_index: [S] index of each token in the concatenation of all text rows and all visual rows.
        positions: [S] rotary position; LLaVA's sequence positions, counted from 0 in each document. Or [S, 3], see
            `with_grid_positions`.
        answers: for each document the text that is supervised, as pairs of first row and the one after the last, counted among its
            text rows; empty where that is not known, as of a prompt.
        stepwise: positions of a document are known to rise by one with each row, so that a window of positions is one of rows.
    """

    documents: tuple[tuple[Run, ...], ...]
    text_index: Tensor
    visual_index: Tensor
    merge_index: Tensor
    positions: Tensor
    answers: tuple[Stretches, ...] = ()
    stepwise: bool = True

    @classmethod
    def of(cls, documents: Sequence[Sequence[Run]], answers: Sequence[Stretches] = ()) -> SequenceLayout:
        """Lay the documents out back to back. Raises ValueError for an empty document or run."""
        docs = tuple(tuple(Run(*run) for run in doc) for doc in documents)
        if not docs or any(not doc or any(run.length < 1 for run in doc) for doc in docs):
            raise ValueError(f"a layout needs documents of non-empty runs, found {documents!r}")
        visual_S = visual_flags([run for doc in docs for run in doc])
        text_index, visual_index = (~visual_S).nonzero().flatten(), visual_S.nonzero().flatten()
        positions = torch.cat([torch.arange(sum(run.length for run in doc)) for doc in docs])
        merge_index = torch.cat([text_index, visual_index]).argsort()
        return cls(docs, text_index, visual_index, merge_index, positions, tuple(answers))

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    @property
    def num_text(self) -> int:
        return len(self.text_index)

    @property
    def num_visual(self) -> int:
        return len(self.visual_index)

    @property
    def image_lengths(self) -> list[int]:
        """Visual tokens of each image, in stream order."""
        return [run.length for doc in self.documents for run in doc if run.visual]

    def merge(self, text: Tensor, visual: Tensor) -> Tensor:
        """Interleave text rows [T, ...] and visual rows [V, ...] into stream order [S, ...]."""
        return torch.cat([text, visual]).index_select(0, self.merge_index)

    @property
    def text_lengths(self) -> list[int]:
        """Text tokens of each document."""
        return [sum(run.length for run in doc if not run.visual) for doc in self.documents]

    def text_only(self) -> SequenceLayout:
        """The text rows by themselves, at the positions they have here. Documents without text vanish."""
        rows = torch.arange(self.num_text, device=self.positions.device)
        documents = tuple((Run(False, length),) for length in self.text_lengths if length)
        stepwise = self.stepwise and not self.num_visual
        return SequenceLayout(documents, rows, rows[:0], rows, self.positions[self.text_index], stepwise=stepwise)

    def images_only(self) -> SequenceLayout:
        """The visual rows by themselves, every image a document, at positions that count its rows from 0."""
        rows = torch.arange(self.num_visual, device=self.positions.device)
        documents = tuple((Run(True, length),) for length in self.image_lengths)
        places = torch.cat([torch.arange(0), *map(torch.arange, self.image_lengths)])
        return SequenceLayout(documents, rows[:0], rows, rows, upload(places, rows.device))

    def with_image_positions(self, taken: int) -> SequenceLayout:
        """The layout where each image takes `taken` positions in all (0 or 1), not one for each token: its tokens share one."""
        if not self.num_visual:
            return self
        positions = []
        for document in self.documents:
            start = 0
            for run in document:
                positions.append(torch.full((run.length,), start) if run.visual else start + torch.arange(run.length))
                start += taken if run.visual else run.length
        positions_S = upload(torch.cat(positions), self.positions.device)
        return replace(self, positions=positions_S, stepwise=False)

    def with_grid_positions(self, grids: Sequence[tuple[int, int]]) -> SequenceLayout:
        """The layout with positions [S, 3], of time, row and column (multimodal rotary positions, Qwen2-VL): a text token's are the same
        three times; an image's tokens, a grid of so many rows and columns, have one time and count rows and columns from it. Text
        goes on after the longer side."""
        if [rows * columns for rows, columns in grids] != self.image_lengths:
            raise ValueError(f"images of {self.image_lengths} tokens have positions of grids {list(grids)}")
        left, positions = iter(grids), []
        for document in self.documents:
            start = 0
            for run in document:
                if not run.visual:
                    positions.append((start + torch.arange(run.length))[:, None].expand(-1, 3))
                    start += run.length
                    continue
                rows, columns = next(left)
                places = torch.cartesian_prod(
                    torch.zeros(1, dtype=torch.long), torch.arange(rows), torch.arange(columns)
                )
                positions.append(start + places)
                start += max(rows, columns)
        positions_S3 = upload(torch.cat(positions), self.positions.device)
        return replace(self, positions=positions_S3, stepwise=self.stepwise and not self.num_visual)

    def prefix(self) -> Tensor:
        """[T] bool, True for text before the first image of its document."""
        flags = []
        for document in self.documents:
            first = next((i for i, run in enumerate(document) if run.visual), 0)
            flags += [i < first for i, run in enumerate(document) if not run.visual for _ in range(run.length)]
        return upload(torch.tensor(flags, dtype=torch.bool), self.positions.device)

    def image_of_row(self) -> Tensor:
        """[S] the number of the image that a row belongs to, from 1; 0 for text."""
        runs = [run for document in self.documents for run in document]
        visual, lengths = zip(*runs, strict=True)
        visual_r = torch.tensor(visual)
        numbers = torch.repeat_interleave(visual_r.cumsum(0) * visual_r, torch.tensor(lengths))
        return upload(numbers, self.positions.device)

    def first_seen(self, visibility: Visibility) -> Tensor:
        """[S] the first row of the stream that each row sees: of its document, its window or its chunk. On the CPU, or with a window beside the positions."""
        lengths = torch.tensor([sum(run.length for run in document) for document in self.documents])
        if visibility.window is None:
            return torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        far = torch.repeat_interleave(torch.arange(len(lengths)) * 2**40, lengths)  # no window reaches another document
        far_S = upload(far, self.positions.device)
        first_S = first_place(self.positions, visibility.window)
        return torch.searchsorted(far_S + self.positions, far_S + first_S)  # neither ever falls

    def last_seen(self, visibility: Visibility) -> Tensor:
        """[S] on the CPU, the last row of the stream that each row sees: itself or, both ways, the last of its image."""
        last, end = [torch.arange(self.num_tokens)], 0
        if visibility.both_ways:
            for run in (run for document in self.documents for run in document):
                end += run.length
                last.append(torch.full((run.length,), end - 1) if run.visual else torch.arange(end - run.length, end))
            last = last[1:]
        return torch.cat(last)

    def query_rows(self, visibility: Visibility) -> Tensor | None:
        """Indices of the rows that query, ascending; None = all."""
        if not visibility.text_queries:
            return self.visual_index
        return None if visibility.visual_queries or not self.num_visual else self.text_index

    def with_visual(self, rows_v: Tensor | None, lengths: Sequence[int]) -> SequenceLayout:
        """The layout without some of its visual tokens; the rest keep their positions.

        Args:
            rows_v: indices of those that stay among all V, ascending; None = all stay.
            lengths: how many stay of each image.
        """
        if rows_v is None:
            return self
        left = iter(lengths)
        documents = [[run._replace(length=next(left)) if run.visual else run for run in doc] for doc in self.documents]
        documents = [[run for run in doc if run.length] for doc in documents]
        smaller = SequenceLayout.of([doc for doc in documents if doc])
        smaller = smaller._map_tensors(lambda tensor: upload(tensor, self.positions.device))
        rows_S = smaller.merge(self.text_index, self.visual_index[rows_v])
        return replace(smaller, positions=self.positions[rows_S], stepwise=False)

    def mask(self, visibility: Visibility) -> Tensor:
        """The dense mask, [Q, S] bool, True where a query row sees a key row. For the reference backend and tests."""
        row_S = torch.arange(self.num_tokens, device=self.positions.device)
        seen = self.first_seen(visibility), self.last_seen(visibility)
        first_S, last_S = (upload(x, row_S.device) for x in seen)
        sees_SS = (first_S[:, None] <= row_S) & (row_S <= last_S[:, None])
        rows_Q = self.query_rows(visibility)
        return sees_SS if rows_Q is None else sees_SS[rows_Q]

    def to(self, device: torch.device | str) -> SequenceLayout:
        return self._map_tensors(lambda tensor: upload(tensor, torch.device(device)))

    def pin_memory(self) -> SequenceLayout:
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def _map_tensors(self, function: Any) -> SequenceLayout:
        tensors = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("documents", "answers", "stepwise")
        }
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})


@dataclass
class PackedBatch:
    """One pack, ready for the model: what `data/` gives to `training/`.

    Attributes:
        input_ids: [S] token ids; 0 in visual rows, where they are not read.
        target_rows: [n] text rows (0..T-1) that predict a supervised token.
        targets: [n] the token ids they should predict.
        pixel_values: the images, see `Pixels`; None without images.
        layout: documents, runs, positions.
        keys: keys of the samples, in pack order.
        image_sizes: original (width, height) of each image; not read where the encoder takes images of one size.
        image_runs: of how many visual runs each image is; empty = one each.
    """

    input_ids: Tensor
    target_rows: Tensor
    targets: Tensor
    pixel_values: Pixels | None
    layout: SequenceLayout
    keys: list[str]
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    image_runs: list[int] = field(default_factory=list)

    @property
    def num_targets(self) -> int:
        return len(self.targets)

    def with_images_moved(self, origin: Sequence[int]) -> PackedBatch:
        """The batch with image `origin[i]`, which has as many runs, in the place of image i, with as many tokens as that image has."""
        assert self.pixel_values is not None
        left = iter(self.layout.image_lengths)
        images = [list(islice(left, runs)) for runs in self.image_runs or [1] * len(origin)]
        moved = iter([length for i in origin for length in images[i]])
        documents = [
            [Run(True, next(moved)) if run.visual else run for run in document] for document in self.layout.documents
        ]
        layout = SequenceLayout.of(documents, self.layout.answers).to(self.input_ids.device)
        text = self.input_ids[self.layout.text_index]
        return replace(
            self,
            input_ids=layout.merge(text, text.new_zeros(layout.num_visual)),
            pixel_values=take_images(self.pixel_values, origin),
            image_sizes=[self.image_sizes[i] for i in origin] if self.image_sizes else [],
            layout=layout,
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        return self._map_tensors(
            lambda x: x.to(device) if isinstance(x, SequenceLayout) else upload(x, torch.device(device))
        )

    def pin_memory(self) -> PackedBatch:
        return self._map_tensors(lambda x: x.pin_memory())

    def _map_tensors(self, function: Any) -> PackedBatch:
        movable = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: function(v) for k, v in movable.items() if isinstance(v, Tensor | SequenceLayout)}
        if isinstance(self.pixel_values, list):
            moved["pixel_values"] = map_images(self.pixel_values, function)
        return replace(self, **moved)
