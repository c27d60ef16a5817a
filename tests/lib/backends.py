"""Backends that a CPU can run: sdpa, and those of a GPU by stand-ins for their kernels."""

import itertools

import pytest
import torch

from lit_eemllm.attention.flash import Flash, bind
from lit_eemllm.attention.sdpa import Sdpa
from lit_eemllm.attention.xformers import XFormers


def bottom_right(q_QNH, k_SKH, v_SKH, starts_q, starts_k, scale, window=None, causal=True):
    """Segment i of q over segment i of k; the last query is level with the last key, a row without keys is zero."""
    assert starts_q[-1] == len(q_QNH) and starts_k[-1] == len(k_SKH) == len(v_SKH), "segments cover all rows"
    groups = q_QNH.shape[1] // k_SKH.shape[1]
    out = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(starts_q), itertools.pairwise(starts_k), strict=True):
        k, v = (x[k0:k1].repeat_interleave(groups, dim=1) for x in (k_SKH, v_SKH))
        distance = (torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)) - torch.arange(k1 - k0)
        sees = (distance >= (0 if causal else -k1)) & (distance <= (k1 if window is None else window))
        scores = torch.einsum("qnh,knh->nqk", q_QNH[q0:q1], k) * scale
        weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        out.append(torch.einsum("nqk,knh->qnh", torch.where(sees, weights, torch.zeros(())), v))
    return torch.cat(out)


def emulate(q, k, v, starts_q, starts_k, longest_q, longest_k, scale, window, causal):
    assert starts_q.dtype == starts_k.dtype == torch.int32
    starts_q, starts_k = starts_q.tolist(), starts_k.tolist()
    assert longest_q >= max(b - a for a, b in itertools.pairwise(starts_q))
    assert longest_k >= max(b - a for a, b in itertools.pairwise(starts_k))
    return bottom_right(q, k, v, starts_q, starts_k, scale, window, causal)


def window_of(window_size):
    """Keys before a query's own that it sees, None for all."""
    left, right = window_size
    assert right in (None, -1, 0)
    return None if left in (None, -1) else left


# Functions of the packages with their whole signatures, under the file and the versions that have them.
# test_attention.py compares them with those of the packages that are installed.


# flash_attn/flash_attn_interface.py, flash-attn 2.8.0 to 2.8.3
def flash_attn_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                 causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                 return_attn_probs=False, block_table=None):  # fmt: skip
    window = window_of(window_size)
    return emulate(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window, causal)


# hopper/flash_attn_interface.py, flash-attn 3 of the repository of flash-attn 2.8.0 to 2.8.3
def flash_attn_3_beta(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
                      softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                      window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
                      deterministic=False, sm_margin=0):  # fmt: skip
    window = window_of(window_size)
    return emulate(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window, causal)


# hopper/flash_attn_interface.py, flash-attn 3.0.0, commit 0251105
def flash_attn_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
                 softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                 window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
                 deterministic=False, sm_margin=0, return_attn_probs=False):  # fmt: skip
    window = window_of(window_size)
    return emulate(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window, causal)


# flash_attn/cute/interface.py, flash-attn 2.8.3 (which refuses a backward pass), without lengths
def flash_attn_4_alpha(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, page_table=None,
                       softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
                       pack_gqa=None):  # fmt: skip
    return emulate(q, k, v, cu_seqlens_q, cu_seqlens_k, 999, 999, softmax_scale, window_of(window_size), causal), None


# flash_attn/cute/interface.py, flash-attn-4 4.0.0b0 to 4.0.0b8
def flash_attn_4_beta(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                      seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None, causal=False,
                      window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
                      deterministic=False, score_mod=None, aux_tensors=None, return_lse=False):  # fmt: skip
    window = window_of(window_size)
    return emulate(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window, causal), None


# flash_attn/cute/interface.py, flash-attn-4 4.0.0b36; qv is the fourth from 4.0.0b9 on
def flash_attn_4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                 min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
                 softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
                 num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
                 block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
                 scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
                 gather_bwd_recompute_p=False, gather_bwd_token_chunk=None):  # fmt: skip
    assert qv is None
    window = window_of(window_size)
    return emulate(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window, causal), None


# torch/nn/attention/varlen.py, PyTorch 2.10.0
def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert query.shape == (len(query), *key.shape[1:])
    return emulate(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, query.shape[-1] ** -0.5, None, is_causal)


# the same, PyTorch 2.11.0
def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1)):  # fmt: skip
    assert query.shape[1:] == key.shape[1:] and window_size[1] in (0, -1)
    return emulate(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_of(window_size), window_size[1] == 0
    )


# the same, PyTorch 2.12.0 to 2.14.1
def torch_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size[1] in (0, -1)
    return emulate(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_of(window_size), window_size[1] == 0
    )


FLASH = {
    "flash-attn 2": (flash_attn_2,),
    "flash-attn 3": (flash_attn_3_beta, flash_attn_3),
    "flash-attn 4": (flash_attn_4_alpha, flash_attn_4_beta, flash_attn_4),
    "PyTorch": (torch_2_10, torch_2_11, torch_2_13),
}
"""By provider, as in `PROVIDERS`."""


def flash(function):
    backend = Flash("PyTorch")
    backend.bound = bind(function)
    backend.grouped = backend.bound.grouped
    return backend


# xformers/ops/fmha/__init__.py, xFormers 0.0.35
def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    bias_QS = attn_bias.materialize((query.shape[1], key.shape[1]))
    scores = torch.einsum("bqnh,bknh->bnqk", query, key) * scale + bias_QS
    return torch.einsum("bnqk,bknh->bqnh", scores.softmax(-1), value)


def xformers():
    """With xFormers' own masks, which can say what they mean: their dense form is the emulation."""
    pytest.importorskip("xformers")
    backend = XFormers()
    backend._attention = memory_efficient_attention
    return backend


EMULATED = {f.__name__: (lambda f=f: flash(f)) for functions in FLASH.values() for f in functions}


EMULATED["xformers"] = xformers


TRAINABLE = {"sdpa": Sdpa, **EMULATED}
