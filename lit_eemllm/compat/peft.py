"""What we use of peft, and of bitsandbytes through it, that has no documented place."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

__all__ = ["LoraLayer", "adapter_delta", "dequantized_weight", "is_quantized", "keep_packing"]


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a linear layer of bitsandbytes, in 4 or 8 bits."""
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def keep_packing(model: nn.Module) -> None:
    """Evaluation on some CPUs rounds and rearranges 4-bit weights for a kernel that not all widths fit: not these ones."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dequantized_weight(module: Any) -> Tensor:
    """Of a layer of bitsandbytes, float32."""
    return dequantize_module_weight(module).float()


def adapter_delta(layer: LoraLayer) -> Tensor:
    """What the adapter adds to the layer's weight."""
    return layer.get_delta_weight("default")
