"""An attention backend of one's own: exact attention for some query rows at a time, so that no large mask exists.

    lit-eemllm doctor --import docs/my_backend.py
    lit-eemllm fit my_config.yaml --import docs/my_backend.py model.attention=chunked

docs/backends.md explains every line. Legend of shape suffixes: lit_eemllm/layout.py; C = query rows of a chunk, G = query
heads that share a key/value head, L = key rows that a chunk looks at.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_eemllm.attention import AttentionBackend, register_backend
from lit_eemllm.layout import SequenceLayout, Visibility

CHUNK = 256  # query rows computed together


@dataclass(frozen=True)
class Plan:
    """Query row q sees the rows first_Q[q] to last_Q[q] of the stream. Per chunk: the rows that any of its queries see."""

    first_Q: Tensor
    last_Q: Tensor
    keys: list[slice]


@register_backend("chunked")
class Chunked(AttentionBackend):
    """Softmax over chunks of query rows, in plain PyTorch."""

    priority = -50  # `auto` takes it before the reference, and after everything faster

    def plan(self, layout: SequenceLayout, visibility: Visibility) -> Plan:
        first, last = [], []  # lengths are Python numbers: nothing is read from a device
        start = 0
        for document in layout.documents:
            row = start
            for run in document:
                if visibility.queries(run.visual):
                    whole = run.visual and visibility.both_ways  # a visual token sees all of its image
                    last += [row + run.length - 1] * run.length if whole else range(row, row + run.length)
                    first += [start] * run.length
                row += run.length
            start = row
        # Both ascend, so a chunk looks at what lies between its first and its last row's limits.
        chunks = range(0, len(last), CHUNK)
        keys = [slice(first[c], last[min(c + CHUNK, len(last)) - 1] + 1) for c in chunks]
        device, rows = layout.positions.device, layout.query_rows(visibility)
        first_Q = torch.tensor(first, device=device)
        if visibility.window is not None:  # it counts positions, which lie on the device
            first_Q = layout.first_seen(visibility)
            first_Q = first_Q if rows is None else first_Q[rows]
        return Plan(first_Q, torch.tensor(last, device=device), keys)

    def attend(self, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, plan: Plan, scale: float) -> Tensor:
        results = []
        rows = zip(q_QNH.split(CHUNK), plan.first_Q.split(CHUNK), plan.last_Q.split(CHUNK), plan.keys, strict=False)
        for q_CNH, first_C, last_C, keys in rows:
            k_LKH, v_LKH = k_SKH[keys], v_SKH[keys]
            q_CKGH = q_CNH.unflatten(1, (k_LKH.shape[1], -1))  # heads n*G to n*G + G-1 share key/value head n
            scores_CKGL = torch.einsum("ckgh,lkh->ckgl", q_CKGH, k_LKH) * scale
            key_L = torch.arange(keys.start, keys.stop, device=first_C.device)
            sees_CL = (first_C[:, None] <= key_L) & (key_L <= last_C[:, None])
            scores_CKGL = scores_CKGL.masked_fill(~sees_CL[:, None, None], float("-inf"))
            weights_CKGL = scores_CKGL.softmax(-1, dtype=torch.float32).to(v_LKH.dtype)
            results.append(torch.einsum("ckgl,lkh->ckgh", weights_CKGL, v_LKH).flatten(1, 2))
        return torch.cat(results)
