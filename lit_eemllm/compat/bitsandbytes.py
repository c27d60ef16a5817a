"""What `AdamW8bit` of bitsandbytes keeps for a weight, which it nowhere says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SMALL, _BLOCK = 4096, 256


def adamw8bit_moments(weight: Tensor) -> dict[str, Tensor]:
    """By name, without data: two moments of a byte a number, a float32 scale for each 256 of them, and the 256 values that the bytes
    stand for, which all weights share. A weight of less than 4,096 numbers has moments in float32."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if weight.numel() < _SMALL:
        return {f"state{n}": empty(*weight.shape) for n in (1, 2)}
    parts = {"state": empty(*weight.shape, dtype=torch.uint8), "qmap": empty(256)}
    parts["absmax"] = empty(-(-weight.numel() // _BLOCK))
    return {f"{name}{n}": x for name, x in parts.items() for n in (1, 2)}


def adamw8bit_state(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A weight's part of its state dict, as the optimiser has it: without the section in which newer versions hide moments from FSDP1."""
    state = dict(saved)
    return state | state.pop("__bnb_optimizer_quant_state__", {})
