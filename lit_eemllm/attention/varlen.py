"""What varlen kernels share (FlashAttention, xFormers): a layout as segments, with hardly a key copied and no dense mask.

Such a kernel takes queries and keys cut into as many segments, and lets query segment i see key segment i under a
causal mask aligned at the *ends* (bottom right). Text that ends where its keys end is therefore exact::

    keys          t t V V t t          the last text run of each document queries in the first call, over the
    call 1  t     1 1 1 1 1 0          document's keys where they lie; the run before it in the second, and so
            t     1 1 1 1 1 1          on: two calls for text-image-text, one where the image comes first.
    call 2  t     1 0
            t     1 1

A later call copies its keys if they are few beside the pack (`COPIED`), as a prompt's first words are. Else it takes all
keys in place, and those without a query get one whose result is dropped: segments without queries are a corner that
kernels disagree about.

A window is the kernel's own where it can say it: of rows, and aligned likewise. Else, as of keys between which tokens have left, it is
a mask, and `sdpa` computes it; and so is a chunk.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..layout import Chunk, Run, SequenceLayout, Visibility, upload
from .base import AttentionBackend
from .sdpa import Plan as Masked
from .sdpa import Sdpa

COPIED = 0.25  # of the pack's keys, that a later call may copy instead of passing over all of them in place


@dataclass(frozen=True)
class Call:
    """One call of a varlen kernel.

    Attributes:
        query_lengths, key_lengths: rows of each segment; keys are never fewer than queries.
        query_rows: which query rows, in order; None = all of them.
        key_rows: which keys, copied; None = all of them, in place.
        causal: else a query sees all keys of its segment: an image, all before its end.
    """

    query_lengths: list[int]
    key_lengths: list[int]
    query_rows: Tensor | None
    key_rows: Tensor | None
    causal: bool = True


@dataclass(frozen=True)
class Plan:
    """Calls, each with what the kernel wants to know (`VarlenBackend.prepare`).

    Attributes:
        calls: query rows, key rows (None = all) and the prepared segments of each call.
        restore_Q: where a query row lies in the concatenated results; None when they are in order.
    """

    calls: list[tuple[Tensor | None, Tensor | None, Any]]
    restore_Q: Tensor | None


def split(layout: SequenceLayout, visibility: Visibility) -> tuple[list[Call], Tensor | None]:
    """The calls that compute a layout, on the CPU, and how to restore the order of their results (see `Plan`)."""
    rounds: list[list[tuple[int, int, int, int]]] = []  # per call: first query, queries, first key, keys
    queries = keys = 0
    everyone = visibility.visual_queries and visibility.text_queries

    def kind(place: int, run: Run) -> tuple[bool, int]:
        """The same for neighbours that make one segment: an image that sees all of itself is one of its own."""
        return run.visual, place if run.visual and visibility.both_ways else -1

    for document in layout.documents:
        start, segments = keys, []
        for (visual, _), runs in groupby(enumerate(document), key=lambda each: kind(*each)):
            length = sum(run.length for _, run in runs)
            keys += length
            if visibility.queries(visual) and not everyone:
                segments.append((queries, length, start, keys - start))
                queries += length
        if everyone:
            segments.append((queries, keys - start, start, keys - start))
            queries += keys - start
        for i, segment in enumerate(reversed(segments)):
            if i == len(rounds):
                rounds.append([])
            rounds[i].append(segment)

    calls: list[Call] = []
    slots_Q, offset = torch.empty(queries, dtype=torch.long), 0
    for segments in rounds:
        copied = bool(calls) and sum(seen for *_, seen in segments) <= COPIED * keys
        query_lengths, key_lengths, query_rows, key_rows, end = [], [], [], [], 0
        for first_query, length, first_key, seen in [*segments, (0, 0, keys, 0)]:
            if first_key > end and not copied:
                query_lengths.append(1)
                key_lengths.append(first_key - end)
                query_rows.append(torch.zeros(1, dtype=torch.long))
                offset += 1
            if length:
                query_lengths.append(length)
                key_lengths.append(seen)
                query_rows.append(torch.arange(first_query, first_query + length))
                key_rows.append(torch.arange(first_key, first_key + seen))
                slots_Q[query_rows[-1]] = torch.arange(offset, offset + length)
                offset += length
            end = first_key + seen
        rows_Q = torch.cat(query_rows)
        all_rows = rows_Q.equal(torch.arange(queries))
        copies = torch.cat(key_rows) if copied else None
        call = Call(query_lengths, key_lengths, None if all_rows else rows_Q, copies, not visibility.both_ways)
        calls.append(call)
    in_order = len(calls) == 1 and calls[0].query_rows is None
    return calls, None if in_order else slots_Q


class VarlenBackend(AttentionBackend):
    """A backend whose kernel works on segments aligned at the bottom right."""

    grouped = True
    """The kernel takes fewer key/value heads than heads; otherwise they are repeated, once a layer."""

    @abstractmethod
    def windows(self, call: Call) -> bool:
        """Whether the kernel can let a query of this call see a window of rows only."""

    @abstractmethod
    def prepare(self, call: Call, window: int | None, device: torch.device) -> Any:
        """What the kernel needs for one call, on the device."""

    @abstractmethod
    def kernel(self, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, prepared: Any, scale: float) -> Tensor:
        """One call, [Q, N, H]."""

    def plan(self, layout: SequenceLayout, visibility: Visibility) -> Plan | Masked:
        device = layout.positions.device
        calls, restore_Q = split(layout, visibility)
        window = visibility.window
        if isinstance(window, Chunk) or (
            window is not None and not (layout.stepwise and all(map(self.windows, calls)))
        ):
            return Sdpa().plan(layout, visibility)

        def there(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else upload(rows, device)

        prepared = [
            (there(call.query_rows), there(call.key_rows), self.prepare(call, window, device)) for call in calls
        ]
        return Plan(prepared, there(restore_Q))

    def attend(self, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, plan: Plan | Masked, scale: float) -> Tensor:
        if isinstance(plan, Masked):
            return Sdpa().attend(q_QNH, k_SKH, v_SKH, plan, scale)
        groups = q_QNH.shape[1] // k_SKH.shape[1]
        if groups > 1 and not self.grouped:
            k_SKH, v_SKH = (x.repeat_interleave(groups, dim=1) for x in (k_SKH, v_SKH))

        def some(x: Tensor, rows: Tensor | None) -> Tensor:
            return x if rows is None else x.index_select(0, rows)

        results = [
            self.kernel(some(q_QNH, queries), some(k_SKH, keys), some(v_SKH, keys), prepared, scale)
            for queries, keys, prepared in plan.calls
        ]
        return results[0] if plan.restore_Q is None else torch.cat(results).index_select(0, plan.restore_Q)
