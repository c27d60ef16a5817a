"""xFormers' memory-efficient attention under a block-diagonal mask; trains in float32 too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import NEEDS_CUDA, register_backend
from .varlen import Call, VarlenBackend


@register_backend("xformers")
class XFormers(VarlenBackend):
    """`memory_efficient_attention` with `BlockDiagonalCausalFromBottomRightMask`, the aligned mask that has a backward.

    Its backward knows no grouped queries, so key/value heads are repeated.
    """

    priority = 30
    grouped = False
    provider = "xFormers"

    def __init__(self) -> None:
        try:
            from xformers.ops import memory_efficient_attention
            from xformers.ops.fmha import attn_bias
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error.name} is not installed; pip install 'lit_eemllm[xformers]'") from None
        self._attention, self._masks = memory_efficient_attention, attn_bias

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, training: bool) -> str | None:
        return None if device.type == "cuda" else f"{NEEDS_CUDA}, found {device.type}"

    def windows(self, call: Call) -> bool:
        """Not all of its kernels have a backward for windows aligned at the bottom right."""
        return call.causal and call.query_lengths == call.key_lengths

    def prepare(self, call: Call, window: int | None, device: torch.device) -> Any:
        lengths = call.query_lengths, call.key_lengths
        if not call.causal:
            return self._masks.BlockDiagonalMask.from_seqlens(*lengths, device=device)
        if window is None:
            return self._masks.BlockDiagonalCausalFromBottomRightMask.from_seqlens(*lengths, device=device)
        return self._masks.BlockDiagonalMask.from_seqlens(*lengths, device=device).make_local_attention(window + 1)

    def kernel(self, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, prepared: Any, scale: float) -> Tensor:
        out_1QNH: Tensor = self._attention(q_QNH[None], k_SKH[None], v_SKH[None], attn_bias=prepared, scale=scale)
        return out_1QNH[0]
