"""PyTorch's scaled dot-product attention, for every device and layout; the cost grows with the sum of the documents.

Documents of similar length are computed together as one padded batch, so no mask spans the pack. Text-only documents
and dense layers need no mask at all; composite rows get the causal order of their document.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from ..layout import SequenceLayout, Visibility, upload, visual_flags
from .base import AttentionBackend, fused_attention, half_on_cuda, register_backend, scaled_attention

PADDING = 1.25  # documents share a batch while the longest has at most so many times the rows of the shortest


@dataclass(frozen=True)
class Group:
    """Documents computed in one call: which rows they take (None: all, as they lie), and what their queries see (None: plainly
    causal)."""

    documents: int
    q_rows_BQ: Tensor | None
    k_rows_BL: Tensor | None
    mask_BQL: Tensor | None


@dataclass(frozen=True)
class Plan:
    groups: list[Group]
    restore_Q: (
        Tensor | None
    )  # where query row q lies in the concatenated results of all groups, padding included; None: at q


def in_order(rows: Tensor, count: int) -> bool:
    """Whether these are all rows, one after the other: a copy of them would be the same."""
    return rows.numel() == count and bool((rows.flatten() == torch.arange(count)).all())


def in_document(first_S: Tensor, last_S: Tensor, rows_BQ: Tensor, start_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last key that rows see, counted in their documents; of a row that is padding, the first key."""
    return (first_S[rows_BQ] - start_B1).clamp(min=0), (last_S[rows_BQ] - start_B1).clamp(min=0)


def of_documents(x_RNH: Tensor, rows_BR: Tensor | None, documents: int) -> Tensor:
    """Rows of documents side by side, [B, N, R, H]."""
    x_BRNH = torch.unflatten(x_RNH, 0, (documents, -1)) if rows_BR is None else x_RNH[rows_BR]
    return x_BRNH.transpose(1, 2)


@register_backend("sdpa")
class Sdpa(AttentionBackend):
    """Grouped documents through `scaled_dot_product_attention`."""

    priority = 20

    def kernel(self, q_BNQH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, mask_BQL: Tensor | None, scale: float) -> Tensor:
        """Of one group, [B, N, Q, H]; plainly causal without a mask."""
        return fused_attention(q_BNQH, k_BKLH, v_BKLH, mask_BQL, scale)

    def plan(self, layout: SequenceLayout, visibility: Visibility) -> Plan:
        device = layout.positions.device
        # per document: rows of the stream, rows among the queries, rows of the stream that these are
        keys, queries, querying = list[Tensor](), list[Tensor](), list[Tensor]()
        k_start = q_start = 0
        for document in layout.documents:
            visual = visual_flags(document)
            keys.append(torch.arange(k_start, k_start + len(visual)))
            querying.append(keys[-1][visual & visibility.visual_queries | ~visual & visibility.text_queries])
            queries.append(torch.arange(q_start, q_start + len(querying[-1])))
            k_start, q_start = k_start + len(visual), q_start + len(queries[-1])

        groups: list[Group] = []
        slots_Q = torch.empty(q_start, dtype=torch.long)
        offset = 0
        by_length = sorted(
            (d for d in range(len(keys)) if len(queries[d])), key=lambda d: (-len(keys[d]), -len(queries[d]))
        )
        while by_length:
            first, limit = by_length[0], len(keys[by_length[0]])
            members = [
                d
                for d in by_length
                if len(keys[d]) * PADDING >= limit and len(queries[d]) * PADDING >= len(queries[first])
            ]
            by_length = [d for d in by_length if d not in set(members)]
            q_BQ = pad_sequence([queries[d] for d in members], batch_first=True)  # padding repeats row 0: discarded
            k_BL = pad_sequence([keys[d] for d in members], batch_first=True)
            causal = not visibility.both_ways and all(
                len(queries[d]) == len(keys[d]) for d in members
            )  # padding lies after the rows, nothing sees it
            mask_BQL = None
            if not causal or visibility.window is not None:
                rows_BQ = pad_sequence([querying[d] for d in members], batch_first=True)
                start_B1, first_S = torch.stack([keys[d][:1] for d in members]), layout.first_seen(visibility)
                seen = first_S, *(upload(x, first_S.device) for x in (layout.last_seen(visibility), rows_BQ, start_B1))
                first_BQ1, last_BQ1 = (upload(x, device)[..., None] for x in in_document(*seen))
                key_L = torch.arange(k_BL.shape[1], device=device)
                mask_BQL = (first_BQ1 <= key_L) & (key_L <= last_BQ1)
            q_rows_BQ = None if in_order(q_BQ, q_start) else upload(q_BQ, device)
            k_rows_BL = None if in_order(k_BL, k_start) else upload(k_BL, device)
            groups.append(Group(len(members), q_rows_BQ, k_rows_BL, mask_BQL))
            for b, d in enumerate(members):
                slots_Q[queries[d]] = torch.arange(len(queries[d])) + offset + b * q_BQ.shape[1]
            offset += q_BQ.numel()
        as_they_lie = offset == q_start and in_order(slots_Q, q_start)  # padding may lie after them
        return Plan(groups, None if as_they_lie else upload(slots_Q, device))

    def attend(self, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, plan: Plan, scale: float) -> Tensor:
        results = []
        for group in plan.groups:
            q_BNQH = of_documents(q_QNH, group.q_rows_BQ, group.documents)
            k_BKLH, v_BKLH = (of_documents(x, group.k_rows_BL, group.documents) for x in (k_SKH, v_SKH))
            out_BNQH = self.kernel(q_BNQH, k_BKLH, v_BKLH, group.mask_BQL, scale)
            results.append(out_BNQH.transpose(1, 2).flatten(0, 1))
        found_QNH = results[0] if len(results) == 1 else torch.cat(results)
        return found_QNH if plan.restore_Q is None else found_QNH.index_select(0, plan.restore_Q)


@register_backend("cudnn")
class Cudnn(Sdpa):
    """The same through cuDNN's kernel, which makes a plan for every new shape: for packs of few shapes. It decodes as the others do."""

    priority = 5
    provider = "cuDNN"

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, training: bool) -> str | None:
        return half_on_cuda(device, dtype)

    def kernel(self, q_BNQH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, mask_BQL: Tensor | None, scale: float) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_attention(q_BNQH, k_BKLH, v_BKLH, mask_BQL, scale)
