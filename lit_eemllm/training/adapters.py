"""LoRA through peft: adapters beside a component's linear layers, merged into them or written as peft's own folder.

peft is imported where it is used: with bitsandbytes, which it loads, that takes longer than PyTorch, and most runs have no adapter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import nn

from ..console import write_atomically
from ..errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig

    from ..config.keys import LoraConfig as LoraSection

MARK = "lora_"
"""In the name of every tensor that belongs to an adapter."""
WHOLE = (".newline", ".queries")
"""Suffixes of the names of tensors of a connector that cannot have an adapter and are trained in full beside adapters."""


def linear_layers(part: nn.Module, key: str) -> list[str]:
    """Of a connector all linear layers, else those in repeated blocks: all but embeddings, head and patch projection (as LLaVA). Not
    what transformers derives from a linear layer: a router, which makes more than rows."""
    lists = [name for name, module in part.named_modules() if isinstance(module, nn.ModuleList) and key != "projector"]
    inside = tuple(f"{name}." for name in lists) or ("",)
    return [
        name
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear)
        and not type(module).__module__.startswith("transformers.")
        and name.startswith(inside)
    ]


def add_adapters(part: nn.Module, section: LoraSection, key: str) -> None:
    """Put adapters beside the linear layers of a component, in place. They are float32, and change no output
    until they are trained. What is in `WHOLE` is trained in full.

    Raises:
        ConfigError: a target that the component does not have.
    """
    from peft import inject_adapter_in_model

    layers = linear_layers(part, key)
    known = {_last(name) for name in layers}
    targets = known if section.targets is None else set(section.targets)
    if not targets or not targets <= known:
        raise ConfigError(
            f"optim.lora.targets: {key} has no linear layer {sorted(targets - known)}; it has {sorted(known)}"
        )
    inject_adapter_in_model(_peft_config(section, [name for name in layers if _last(name) in targets]), part)
    whole = WHOLE if key == "projector" else ()
    for name, parameter in part.named_parameters():
        if MARK in name or f".{name}".endswith(whole):
            parameter.data = parameter.data.float()
            parameter.requires_grad_()


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _peft_config(section: LoraSection, targets: list[str], **more: Any) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=section.r, lora_alpha=section.alpha, lora_dropout=section.dropout, use_rslora=section.rslora,
        use_dora=section.dora, target_modules=targets, bias="none", **more,
    )  # fmt: skip


def merge_adapters(model: nn.Module) -> int:
    """Merge all adapters into their layers, in place; returns how many there were. Quantised layers become ordinary ones, and
    all is float32: a narrower type would round the update away.

    Raises:
        CheckpointError: merged weights are NaN or infinite.
    """
    from ..compat.peft import LoraLayer, adapter_delta, is_quantized

    nn.Module.float(model)  # transformers' own refuses quantised models
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, layer in layers:
        base = layer.get_base_layer()
        if is_quantized(base):
            base = _dequantized(base)
            base.weight.data += adapter_delta(layer)
        else:
            layer.merge()
        if not base.weight.isfinite().all():
            raise CheckpointError(
                f"{name}: with its adapter the weights are NaN or infinite; take an earlier checkpoint"
            )
        _replace(model, name, base)
    _dequantize(model)
    return len(layers)


def drop_adapters(decoder: nn.Module) -> None:
    """Remove all adapters, in place; the weights below them stay. Quantised layers become ordinary ones."""
    from ..compat.peft import LoraLayer

    for name, layer in [(name, layer) for name, layer in decoder.named_modules() if isinstance(layer, LoraLayer)]:
        _replace(decoder, name, layer.get_base_layer())
    _dequantize(decoder)


def _dequantize(model: nn.Module) -> None:
    from ..compat.peft import is_quantized

    for name, module in [(name, module) for name, module in model.named_modules() if is_quantized(module)]:
        _replace(model, name, _dequantized(module))
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config


def _dequantized(module: Any) -> nn.Linear:
    from ..compat.peft import dequantized_weight

    plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    plain.weight.data = dequantized_weight(module)
    if module.bias is not None:
        plain.bias.data = module.bias.data.float()
    return plain


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def save_adapter(decoder: nn.Module, base: str, section: LoraSection, folder: Path) -> None:
    """The decoder's adapter as a folder that plain peft loads on top of the base model `base`."""
    from peft import get_peft_model_state_dict

    from ..compat.peft import LoraLayer

    state = get_peft_model_state_dict(decoder, adapter_name="default", save_embedding_layers=False)
    save_file(
        {f"base_model.model.{name}": x.contiguous() for name, x in state.items()}, folder / "adapter_model.safetensors"
    )
    targets = sorted({_last(name) for name, module in decoder.named_modules() if isinstance(module, LoraLayer)})
    config = _peft_config(section, targets, task_type="CAUSAL_LM", base_model_name_or_path=base, inference_mode=True)
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    write_atomically(folder / "adapter_config.json", json.dumps(plain, indent=2, default=str))
