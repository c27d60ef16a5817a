"""Products of visual rows with frozen weights of the decoder in 8-bit floats (E4M3), by torchao: text keeps its precision.

Rows and weights are scaled, row by row and column by column, to what 8 bits hold, as they are multiplied; the weights stay as they are.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config.keys import ModelConfig

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")
"""What visual rows run through beside norms and the feed-forward network."""


def require_fp8(config: ModelConfig) -> None:
    """Raises ConfigError if what ``model.fp8`` needs is not installed: before minutes of loading."""
    if config.fp8 and find_spec("torchao") is None:
        raise ConfigError("model.fp8: torchao is not installed; pip install 'lit_eemllm[fp8]'")


def use_fp8(model: Any, emulate: bool = False) -> None:
    """Give visual rows twins of the decoder's frozen linear layers, on the same weights.

    Args:
        model: an EEMLLM; the decoder is frozen.
        emulate: round as 8-bit floats do, and multiply in float32, on any device.

    Raises:
        ConfigError: no such GPU, or a decoder whose widths are no multiples of 16.
    """
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    if not emulate and (model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < (8, 9)):
        raise ConfigError(
            "model.fp8: needs a CUDA device of compute capability 8.9 (Ada, Hopper) or more; set it to false"
        )
    how = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=emulate)
    for layer in model.language_model.model.layers:
        names = (*LINEAR, layer.family.ffn)
        layer.narrow = {name: _twin(layer._own(name), lambda one: Float8Linear.from_float(one, how)) for name in names}


def _twin(module: nn.Module, made: Any) -> nn.Module:
    """The module with twins of the linear layers in it, and all else shared."""
    if isinstance(module, nn.Linear):
        if any(width % 16 for width in module.weight.shape):
            found = " x ".join(map(str, module.weight.shape))
            raise ConfigError(f"model.fp8: found a weight of {found}, expected multiples of 16; set it to false")
        twin: nn.Module = made(module)
        return twin
    twin = copy(module)
    twin._modules = {name: part and _twin(part, made) for name, part in module._modules.items()}
    return twin
