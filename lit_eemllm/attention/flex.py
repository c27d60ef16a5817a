"""PyTorch's FlexAttention under a block mask: built from the layout once per batch, compiled once per shape bucket."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from ..compat.torch import allow_recompiles
from ..layout import SequenceLayout, Visibility, upload, visual_flags
from .base import AttentionBackend, register_backend

BLOCK = 128
BUCKETS_PER_DOUBLING = 4


def bucket(rows: int) -> int:
    """A length to pad to, a multiple of `BLOCK`, out of few: at most a quarter more, so that few shapes are compiled."""
    blocks = -(-rows // BLOCK)
    step: int = max(1, 2 ** (blocks.bit_length() - 1) // BUCKETS_PER_DOUBLING)
    return -(-blocks // step) * step * BLOCK


@dataclass(frozen=True)
class Plan:
    """The block mask, and the rows [queries, keys] that the streams are padded to."""

    mask: BlockMask
    padded: tuple[int, int]


@cache
def _compiled() -> Any:
    # Past its limit of recompilations dynamo would go on uncompiled, which is dense: allow every bucket, and fail rather.
    allow_recompiles(2048)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def block_mask(layout: SequenceLayout, visibility: Visibility) -> BlockMask:
    """The layout's visibility in blocks of 128 queries x 128 keys, without a dense mask anywhere.

    Query row i sees the stream from `first[i]`, where its document or window begins, to `last[i]`, itself or its image's end. Over a block
    of queries, in stream order, both ascend: the keys that some query sees are a range, those that all see another.
    """
    first_S = layout.first_seen(visibility)
    where = first_S.device  # the blocks are made there: what a window of positions holds, only the device may know
    visual_S = visual_flags([run for document in layout.documents for run in document])
    rows_Q = (visual_S & visibility.visual_queries | ~visual_S & visibility.text_queries).nonzero().flatten()
    queries, keys = bucket(len(rows_Q)), bucket(layout.num_tokens)
    # Padding sees nothing: its range is empty.
    first_Q = pad(first_S[upload(rows_Q, where)], (0, queries - len(rows_Q)), value=keys)
    last_Q = upload(pad(layout.last_seen(visibility)[rows_Q], (0, queries - len(rows_Q)), value=-1), where)

    first_BQ, last_BQ = first_Q.view(-1, BLOCK), last_Q.view(-1, BLOCK)
    start_BK = torch.arange(0, keys, BLOCK, device=where)[None]
    end_BK = start_BK + BLOCK - 1
    some = (first_BQ.amin(1)[:, None] <= end_BK) & (last_BQ.amax(1)[:, None] >= start_BK)
    every = (first_BQ.amax(1)[:, None] <= start_BK) & (last_BQ.amin(1)[:, None] >= end_BK)
    device = layout.positions.device
    first_Q, last_Q = upload(first_Q, device), upload(last_Q, device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first_Q[query] <= key) & (key <= last_Q[query])

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks of keys each block of queries has, and which, those first."""
        counts = upload(blocks.sum(1).int(), device)
        which = upload(blocks.int().argsort(dim=1, descending=True, stable=True).int(), device)
        return counts[None, None], which[None, None]

    return BlockMask.from_kv_blocks(
        *ordered(some & ~every), *ordered(every), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(queries, keys)
    )


@register_backend("flex")
class Flex(AttentionBackend):
    """FlexAttention. Trains on CUDA; on the CPU PyTorch has its forward only, here uncompiled and dense inside."""

    priority = 10

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, training: bool) -> str | None:
        if training and device.type == "cpu":
            return "PyTorch's FlexAttention has no backward on the CPU: it can evaluate there, not train"
        return None

    def plan(self, layout: SequenceLayout, visibility: Visibility) -> Plan:
        mask = block_mask(layout, visibility)
        return Plan(mask, mask.seq_lengths)

    def attend(self, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, plan: Plan, scale: float) -> Tensor:
        queries, keys = plan.padded
        q_1NQH = pad(q_QNH, (0, 0, 0, 0, 0, queries - len(q_QNH))).transpose(0, 1)[None]
        k_1KSH, v_1KSH = (
            pad(x, (0, 0, 0, 0, 0, keys - len(x))).transpose(0, 1)[None].contiguous() for x in (k_SKH, v_SKH)
        )
        attention = flex_attention if q_QNH.device.type == "cpu" else _compiled()
        out_1NQH: Tensor = attention(q_1NQH, k_1KSH, v_1KSH, block_mask=plan.mask, scale=scale, enable_gqa=True)
        return out_1NQH[0].transpose(0, 1)[: len(q_QNH)]
