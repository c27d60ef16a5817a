"""Backends that a CPU can run: sdpa, and those of a GPU by stand-ins for their kernels."""

import itertools

import pytest
import torch

from lit_eemllm.attention.flash import Flash, bind
from lit_eemllm.attention.sdpa import Sdpa
from lit_eemllm.attention.xformers import XFormers


def bottom_right(q_QNH, k_SKH, v_SKH, starts_q, starts_k, scale, window=None):
    """Segment i of q over segment i of k; the last query is level with the last key, a row without keys is zero."""
    assert starts_q[-1] == len(q_QNH) and starts_k[-1] == len(k_SKH) == len(v_SKH), "segments cover all rows"
    groups = q_QNH.shape[1] // k_SKH.shape[1]
    out = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(starts_q), itertools.pairwise(starts_k), strict=True):
        k, v = (x[k0:k1].repeat_interleave(groups, dim=1) for x in (k_SKH, v_SKH))
        distance = (torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)) - torch.arange(k1 - k0)
        sees = (distance >= 0) & (distance <= (k1 if window is None else window))
        scores = torch.einsum("qnh,knh->nqk", q_QNH[q0:q1], k) * scale
        weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        out.append(torch.einsum("nqk,knh->qnh", torch.where(sees, weights, torch.zeros(())), v))
    return torch.cat(out)


def emulate(q, k, v, starts_q, starts_k, longest_q, longest_k, scale, window):
    assert starts_q.dtype == starts_k.dtype == torch.int32
    starts_q, starts_k = starts_q.tolist(), starts_k.tolist()
    assert longest_q >= max(b - a for a, b in itertools.pairwise(starts_q))
    assert longest_k >= max(b - a for a, b in itertools.pairwise(starts_k))
    return bottom_right(q, k, v, starts_q, starts_k, scale, window)


# The functions' signatures, from the packages' documentation, shortened by what we do not use.
def flash_attn_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                 causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False, block_table=None):  # fmt: skip
    assert causal and window_size[1] in (-1, 0)
    window = None if window_size[0] == -1 else window_size[0]
    return emulate(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window)


def flash_attn_4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, softmax_scale=None,
                 causal=False, window_size=(None, None), return_lse=False):  # fmt: skip
    assert causal
    return emulate(q, k, v, cu_seqlens_q, cu_seqlens_k, 999, 999, softmax_scale, window_size[0]), None


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal and query.shape == (len(query), *key.shape[1:])
    return emulate(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, query.shape[-1] ** -0.5, None)


def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1)):  # fmt: skip
    assert query.shape[1:] == key.shape[1:] and window_size[1] == 0
    window = None if window_size[0] == -1 else window_size[0]
    return emulate(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window)


def torch_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size[1] == 0
    window = None if window_size[0] == -1 else window_size[0]
    return emulate(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window)


def flash(function):
    backend = Flash("PyTorch")
    backend.bound = bind(function)
    backend.grouped = backend.bound.grouped
    return backend


def xformers():
    """With xFormers' own masks, which can say what they mean: their dense form is the emulation."""
    pytest.importorskip("xformers")
    backend = XFormers()

    def attention(q_1QNH, k_1SNH, v_1SNH, attn_bias, scale):
        bias_QS = attn_bias.materialize((q_1QNH.shape[1], k_1SNH.shape[1]))
        scores = torch.einsum("bqnh,bknh->bnqk", q_1QNH, k_1SNH) * scale + bias_QS
        return torch.einsum("bnqk,bknh->bqnh", scores.softmax(-1), v_1SNH)

    backend._attention = attention
    return backend


EMULATED = {
    f.__name__: (lambda f=f: flash(f)) for f in (flash_attn_2, flash_attn_4, torch_2_10, torch_2_11, torch_2_13)
}


EMULATED["xformers"] = xformers


TRAINABLE = {"sdpa": Sdpa, **EMULATED}
