"""Stand-ins for the attention kernels of a GPU: as strict about types, memory and shapes, computed plainly.

The rules of `choice` are those of PyTorch's sdp_utils.cpp for compute capability 9.0, where it prefers cuDNN.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
MATH, FLASH, EFFICIENT, CUDNN = 0, 1, 2, 3  # torch.nn.attention.SDPBackend


# --- which kernel scaled_dot_product_attention takes
def choice(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> int:
    """The first of cuDNN, flash, efficient and math that is enabled and can."""
    head, value_head = query.shape[-1], value.shape[-1]
    half, grouped = query.dtype in HALF, query.shape[1] != key.shape[1]
    rows = all(x.stride(-1) == 1 and x.shape[2] for x in (query, key, value)) and query.dim() == 4
    aligned = 8 if half else 4
    can = {
        CUDNN: rows and half and head % 8 == value_head % 8 == 0 and head <= 256 and key.shape[2] > 1,
        FLASH: rows and half and attn_mask is None and head == value_head <= 256
        and not (is_causal and query.shape[2] != key.shape[2]),
        EFFICIENT: rows and not grouped and head % aligned == value_head % aligned == 0
        and query.dtype in (*HALF, torch.float32),
        MATH: True,
    }  # fmt: skip
    enabled = {
        CUDNN: torch.backends.cuda.cudnn_sdp_enabled(),
        FLASH: torch.backends.cuda.flash_sdp_enabled(),
        EFFICIENT: torch.backends.cuda.mem_efficient_sdp_enabled(),
        MATH: torch.backends.cuda.math_sdp_enabled(),
    }
    found = [kernel for kernel in (CUDNN, FLASH, EFFICIENT, MATH) if can[kernel] and enabled[kernel]]
    if not found:
        raise RuntimeError("No available kernel. Aborting execution.")
    return found[0]


# --- what they demand
def demand(half: bool, *tensors: Tensor) -> None:
    """Queries, keys and values: of one type, heads in one piece, and every row at an address that 16 divides."""
    types = {x.dtype for x in tensors}
    assert len(types) == 1, f"queries, keys and values of several types: {types}"
    assert not half or types <= set(HALF), f"computes in 16 bits, found {types}"
    for x in tensors:
        assert x.stride(-1) == 1, f"the last dimension is not contiguous: {x.shape}, strides {x.stride()}"
        steps = [x.storage_offset(), *(s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1)]
        assert all(step * x.itemsize % 16 == 0 for step in steps), (
            f"not at addresses that 16 divides: {x.shape}, {steps}"
        )


def demand_segments(q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, starts: tuple[Any, Any], longest: Any = None) -> None:
    """Of varlen FlashAttention."""
    demand(True, q_QNH, k_SKH, v_SKH)
    assert q_QNH.shape[-1] == k_SKH.shape[-1] == v_SKH.shape[-1] <= 256 and q_QNH.shape[-1] % 8 == 0, "head sizes"
    for x, rows in zip(starts, (len(q_QNH), len(k_SKH)), strict=True):
        assert x.dtype == torch.int32 and x.is_contiguous() and x.dim() == 1, (x.dtype, x.shape)
        if not x.is_meta:
            assert x[0] == 0 and x[-1] == rows and (x.diff() >= 0).all(), f"{x.tolist()} of {rows} rows"
    if longest is not None and not starts[0].is_meta:
        assert all(most >= int(x.diff().max()) for most, x in zip(longest, starts, strict=True))


def check(packet: Any, func: Any, args: Any, kwargs: Any) -> None:
    """Refuse what the kernel behind an operator would."""
    if packet in DEMANDS:
        DEMANDS[packet](**named(func, args, kwargs))


def named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _flash(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> None:
    demand(True, query, key, value)
    assert query.shape[-1] % 8 == 0


def _efficient(query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None, **rest: Any) -> None:
    demand(False, query, key, value)
    assert query.shape[1] == key.shape[1] == value.shape[1], "no grouped queries"
    if attn_bias is not None:
        assert attn_bias.dtype == query.dtype and attn_bias.shape == (*query.shape[:3], key.shape[2])
        assert all(s % 8 == 0 for s, n in zip(attn_bias.stride()[:-1], attn_bias.shape[:-1], strict=True) if n > 1)


def _cudnn(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> None:
    demand(True, query, key, value)


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Any, cu_seq_k: Any, **rest: Any) -> None:
    demand_segments(query, key, value, (cu_seq_q, cu_seq_k), (rest["max_q"], rest["max_k"]))


# --- plain computation
def attention(
    q_BNQH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """In float32: the result in the type of the queries, rows before heads in memory, and logarithms of sums of exponentials."""
    k_BNSH, v_BNSH = (_heads(x, q_BNQH) for x in (k_BKSH, v_BKSH))
    scores = _scores(q_BNQH, k_BNSH, bias, scale)
    out = (scores.softmax(-1) @ v_BNSH).to(q_BNQH.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), scores.logsumexp(-1)


def gradients(
    gradient: Tensor, q_BNQH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """By hand: where this is called from, autograd is off."""
    k_BNSH, v_BNSH = (_heads(x, q_BNQH) for x in (k_BKSH, v_BKSH))
    weights, gradient = _scores(q_BNQH, k_BNSH, bias, scale).softmax(-1), gradient.float()
    of_weights = gradient @ v_BNSH.mT
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * _scale(q_BNQH, scale)
    of_k, of_v = of_scores.mT @ q_BNQH.float(), weights.mT @ gradient
    of_k, of_v = (x.unflatten(1, (k_BKSH.shape[1], -1)).sum(2) for x in (of_k, of_v))
    return (of_scores @ k_BNSH).to(q_BNQH.dtype), of_k.to(k_BKSH.dtype), of_v.to(v_BKSH.dtype)


def _heads(x_BKSH: Tensor, q_BNQH: Tensor) -> Tensor:
    return x_BKSH.float().repeat_interleave(q_BNQH.shape[1] // x_BKSH.shape[1], dim=1)


def _scale(q_BNQH: Tensor, scale: float | None) -> float:
    return q_BNQH.shape[-1] ** -0.5 if scale is None else scale


def _scores(q_BNQH: Tensor, k_BNSH: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    scores = q_BNQH.float() @ k_BNSH.mT * _scale(q_BNQH, scale)
    return scores if bias is None else scores + bias.float()


def _where(sees: Tensor) -> Tensor:
    """A bias. What sees nothing is padding, which nobody reads."""
    return torch.zeros(sees.shape).masked_fill(~sees, -1e30)


def _packed(x_QNH: Tensor) -> Tensor:
    return x_QNH.transpose(0, 1)[None]


# --- operators of PyTorch
def _about(a: dict[str, Any]) -> tuple[Tensor | None, float | None]:
    """Bias and scale of a call."""
    bias = a.get("attn_bias")
    if a.get("is_causal"):
        assert bias is None
        bias = _where(torch.ones(a["query"].shape[2], a["key"].shape[2], dtype=torch.bool).tril())
    return bias, a.get("scale")


def forward(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Of flash, cuDNN and efficient, which gives less."""
    a = named(func, args, kwargs)
    count = torch.zeros((), dtype=torch.long)
    found = attention(a["query"], a["key"], a["value"], *_about(a))
    if len(func._schema.returns) == 4:
        return *found, count, count.clone()
    return *found, None, None, a["query"].shape[2], a["key"].shape[2], count, count.clone(), torch.empty(0)


def backward(func: Any, *args: Any, **kwargs: Any) -> Any:
    a = named(func, args, kwargs)
    gradient = a["grad_out_" if "grad_out_" in a else "grad_out"]
    found = gradients(gradient, a["query"], a["key"], a["value"], *_about(a))
    return (*found, None) if len(func._schema.returns) == 4 else found


def segments(starts_q: Tensor, starts_k: Tensor, window: Any, causal: bool) -> Tensor:
    """The bias of segments aligned at their ends."""
    left = -1 if window is None or window[0] is None else window[0]
    sees = torch.zeros(int(starts_q[-1]), int(starts_k[-1]), dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True):
        distance = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        sees[q0:q1, k0:k1] = (distance >= (0 if causal else -k1)) & (distance <= (left if left >= 0 else k1))
    return _where(sees)


def _segments(a: dict[str, Any]) -> tuple[Tensor, float | None]:
    causal = a.get("is_causal") or a["window_size"][1] == 0
    return segments(a["cu_seq_q"], a["cu_seq_k"], a.get("window_size"), causal), a.get("scale")


def varlen(func: Any, *args: Any, **kwargs: Any) -> Any:
    a = named(func, args, kwargs)
    out, sums = attention(*(_packed(a[name]) for name in ("query", "key", "value")), *_segments(a))
    return out[0].transpose(0, 1), sums[0], torch.zeros(2, dtype=torch.uint64)


def varlen_backward(func: Any, *args: Any, **kwargs: Any) -> Any:
    a = named(func, args, kwargs)
    found = gradients(*(_packed(a[name]) for name in ("grad_out", "query", "key", "value")), *_segments(a))
    return tuple(x[0].transpose(0, 1).contiguous() for x in found)


def norm_backward(
    func: Any, grad_out: Tensor, x: Tensor, shape: Any, rstd: Tensor, weight: Tensor | None, wanted: Any
) -> tuple[Tensor, Tensor]:
    """Of RMSNorm with a weight, by hand, in float32."""
    gradient, normed = grad_out.float(), x.float() * rstd
    weighted = gradient * weight.float()
    of_x = rstd * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    return of_x.to(x.dtype), (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)


def _registered() -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Computation and demands by operator."""
    import torch.nn.attention.varlen

    own = torch.ops.torch_attn
    kernels = {own._varlen_attn: varlen, own._varlen_attn_backward: varlen_backward}
    kernels[aten._fused_rms_norm_backward] = norm_backward
    demands = {own._varlen_attn: _varlen}
    for name, wants in (("flash", _flash), ("efficient", _efficient), ("cudnn", _cudnn)):
        fused = getattr(aten, f"_scaled_dot_product_{name}_attention")
        kernels |= {fused: forward, getattr(aten, f"_scaled_dot_product_{name}_attention_backward"): backward}
        demands[fused] = wants
    return kernels, demands


KERNELS, DEMANDS = _registered()


# --- kernels of other packages
def _world() -> Any:
    from lib.fake_cuda import world

    return world.current


class Emulated(torch.autograd.Function):
    """A kernel that is no operator of PyTorch, under a bias, [B, N, Q, H]."""

    @staticmethod
    def forward(ctx: Any, name: str, bias: Tensor, scale: float, *tensors: Tensor) -> Tensor:
        world = _world()
        world.launches[name] += 1
        ctx.about = name, bias, scale
        ctx.save_for_backward(*tensors)
        return world.wrap(attention(*(x.held for x in tensors), bias, scale)[0])

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Any, ...]:
        world, (name, bias, scale) = _world(), ctx.about
        world.launches[f"{name} backward"] += 1
        found = gradients(gradient[0].held, *(x.held for x in ctx.saved_tensors), bias, scale)
        return None, None, None, *(world.wrap(x) for x in found)


def flash_attn_2() -> Callable[..., Tensor]:
    """Of flash_attn/flash_attn_interface.py, flash-attn 2.8.0 to 2.8.3."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert all(x.is_cuda for x in (q, k, v, cu_seqlens_q, cu_seqlens_k))
        starts = cu_seqlens_q.held, cu_seqlens_k.held
        demand_segments(q, k, v, starts, (max_seqlen_q, max_seqlen_k))
        bias = segments(*starts, window_size, causal)
        out = Emulated.apply("flash-attn 2", bias, softmax_scale, *(_packed(x) for x in (q, k, v)))
        return out[0].transpose(0, 1)

    return flash_attn_varlen_func


def flex() -> Callable[..., Tensor]:
    """Compiled FlexAttention: of torch/nn/attention/flex_attention.py, PyTorch 2.10.0 to 2.14.1."""

    def flex_attention(
        query, key, value, score_mod=None, block_mask=None, scale=None, enable_gqa=False, return_lse=False,
        kernel_options=None, *, return_aux=None,
    ):  # fmt: skip
        parts = [x for x in vars(block_mask).values() if isinstance(x, Tensor)]
        assert all(x.is_cuda for x in (query, key, value, *parts)), "tensors that are not on CUDA"
        assert len({x.dtype for x in (query, key, value)}) == 1
        assert enable_gqa or query.shape[1] == key.shape[1]
        rows, keys = (torch.arange(x.shape[2], device="cuda") for x in (query, key))
        sees = block_mask.mask_mod(0, 0, rows[:, None], keys[None])
        return Emulated.apply("flex", _where(sees.held), scale, query, key, value)

    return flex_attention


def xformers() -> Callable[..., Tensor]:
    """Under its own masks: of xformers/ops/fmha/__init__.py, xFormers 0.0.35."""

    def memory_efficient_attention(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):  # fmt: skip
        assert all(x.is_cuda for x in (query, key, value, attn_bias.q_seqinfo.seqstart, attn_bias.k_seqinfo.seqstart))
        demand(False, query, key, value)
        assert query.shape[2] == key.shape[2] == value.shape[2], "no grouped queries in its backward"
        assert query.shape[-1] % (8 if query.dtype in HALF else 4) == 0
        bias = attn_bias.materialize((query.shape[1], key.shape[1]), device="cpu")
        tensors = (x.transpose(1, 2) for x in (query, key, value))
        return Emulated.apply("xformers", bias, scale, *tensors).transpose(1, 2)

    return memory_efficient_attention
