"""FlashAttention's varlen kernels: from a flash-attn package where one is installed, else PyTorch's own copy of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import upload
from .base import AttentionBackend, half_on_cuda, register_backend
from .varlen import Call, VarlenBackend

PROVIDERS = {
    "flash-attn 3": ("flash_attn_interface", "flash_attn_varlen_func"),
    "flash-attn 4": ("flash_attn.cute", "flash_attn_varlen_func"),
    "flash-attn 2": ("flash_attn", "flash_attn_varlen_func"),
    "PyTorch": ("torch.nn.attention.varlen", "varlen_attn"),
}
"""Module and function of each provider: who built a special one wants it, so it is tried earlier."""


@dataclass(frozen=True)
class Segments:
    """Cumulative lengths [segments + 1] as int32 on the device, and the longest segments."""

    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int
    window: int | None
    causal: bool


@dataclass(frozen=True)
class Kernel:
    """A provider's function behind one calling convention; see `bind`."""

    call: Callable[[Tensor, Tensor, Tensor, Segments, float], Tensor]
    grouped: bool
    windowed: bool


def bind(function: Callable[..., Any]) -> Kernel:
    """One calling convention for all providers and versions, read off a function's signature.

    They name the same things differently, and older ones lack some: without ``scale`` the queries are scaled before.
    """
    names = inspect.signature(function).parameters

    def first(*known: str) -> str | None:
        return next((name for name in known if name in names), None)

    starts_q, starts_k = first("cu_seqlens_q", "cu_seq_q"), first("cu_seqlens_k", "cu_seq_k")
    longest_q, longest_k = first("max_seqlen_q", "max_q"), first("max_seqlen_k", "max_k")
    scaling, causal = first("softmax_scale", "scale"), first("causal", "is_causal")

    def varlen(q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, segments: Segments, scale: float) -> Tensor:
        arguments = (
            (starts_q, segments.starts_q),
            (starts_k, segments.starts_k),
            (longest_q, segments.longest_q),
            (longest_k, segments.longest_k),
            (scaling, scale),
            (causal, segments.causal),
        )
        options: dict[str, Any] = {name: value for name, value in arguments if name is not None}
        if scaling is None:
            q_QNH = q_QNH * (scale * q_QNH.shape[-1] ** 0.5)
        if segments.window is not None:
            options["window_size"] = (segments.window, 0 if segments.causal else -1)
        elif causal is None and segments.causal:
            options["window_size"] = (-1, 0)
        if "enable_gqa" in names:
            options["enable_gqa"] = q_QNH.shape[1] != k_SKH.shape[1]
        width, most = v_SKH.shape[-1], q_QNH.shape[-1]
        out: Tensor | tuple[Tensor, ...] = function(
            q_QNH, k_SKH, v_SKH if width == most else pad(v_SKH, (0, most - width)), **options
        )
        return (out[0] if isinstance(out, tuple) else out)[..., :width]  # some versions return the log-sum-exp too

    # The flash-attn packages group queries by themselves, PyTorch since it has a word for it.
    return Kernel(varlen, grouped=causal == "causal" or "enable_gqa" in names, windowed="window_size" in names)


@register_backend("flash")
class Flash(VarlenBackend):
    """FlashAttention varlen. bfloat16 and float16 on CUDA; grouped queries without expanding heads where it can."""

    priority = 40

    def __init__(self, provider: str) -> None:
        module, function = PROVIDERS[provider]
        try:
            self.bound = bind(getattr(import_module(module), function))
        except ModuleNotFoundError as error:
            hint = "; pip install 'lit_eemllm[flash]'" if provider == "flash-attn 2" else ""
            raise ModuleNotFoundError(f"{error.name} is not installed{hint}") from None
        self.provider, self.grouped = provider, self.bound.grouped

    @classmethod
    def candidates(cls) -> Iterator[tuple[str, Callable[[], AttentionBackend]]]:
        for provider in PROVIDERS:
            yield provider, partial(cls, provider)

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, training: bool) -> str | None:
        return half_on_cuda(device, dtype)

    def windows(self, call: Call) -> bool:
        return self.bound.windowed

    def prepare(self, call: Call, window: int | None, device: torch.device) -> Segments:
        starts_q, starts_k = (
            upload(torch.tensor([0, *lengths]).cumsum(0).int(), device)
            for lengths in (call.query_lengths, call.key_lengths)
        )
        return Segments(starts_q, starts_k, max(call.query_lengths), max(call.key_lengths), window, call.causal)

    def kernel(self, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, prepared: Segments, scale: float) -> Tensor:
        return self.bound.call(q_QNH, k_SKH, v_SKH, prepared, scale)
