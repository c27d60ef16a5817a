"""What is used of peft and, beneath it, of bitsandbytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import compat, contract, lacks


def adapted(layer: torch.nn.Module) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    return inject_adapter_in_model(config, torch.nn.Sequential(layer))[0]


@contract("peft", "a LoraLayer tells what its adapter adds", lacks("peft.tuners.lora.Linear.get_delta_weight"))
def an_adapter_has_a_delta():
    module, layer = compat("peft"), adapted(torch.nn.Linear(4, 3))
    assert isinstance(layer, module.LoraLayer)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(module.adapter_delta(layer), 3 * up @ down)


@contract(
    "peft",
    "dequantize_module_weight gives the weight of bitsandbytes' layers, whose weights are Params4bit or Int8Params",
    lacks("peft.utils.integrations.dequantize_module_weight"),
)
def a_quantized_layer_has_a_weight():
    bnb = pytest.importorskip("bitsandbytes")
    module, plain = compat("peft"), torch.nn.Linear(64, 64, bias=False)
    small = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    small.load_state_dict(plain.state_dict())
    small.to("cpu")
    assert module.is_quantized(small) and not module.is_quantized(plain)
    found = module.dequantized_weight(small)
    assert found.dtype == torch.float32
    assert (found - plain.weight).abs().max() < 0.2 * plain.weight.abs().max()


def rename_the_switch(patch):
    bnb = pytest.importorskip("bitsandbytes")
    set_ = bnb.nn.Linear4bit.__setattr__
    patch.setattr(
        bnb.nn.Linear4bit,
        "__setattr__",
        lambda self, name, value: set_(self, name.replace("avx512bf16", "fast"), value),
    )


@contract(
    "peft",
    "bitsandbytes' Linear4bit has a switch for the kernel of CPUs that rearranges its weights",
    rename_the_switch,
)
def four_bits_stay_as_they_are():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, bias=False)
    compat("peft").keep_packing(layer)
    rearranges = hasattr(bnb.nn.modules, "_convert_weight_packed_for_cpu")  # earlier versions do not
    assert not rearranges or layer.support_avx512bf16_for_cpu is False
