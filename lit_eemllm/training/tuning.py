"""Which components are trained and how: tuning by component, parameter groups, the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..compat.bitsandbytes import adamw8bit_moments
from ..errors import ConfigError
from .adapters import add_adapters

if TYPE_CHECKING:
    from ..config.keys import LoraConfig, OptimConfig
    from ..model import EEMLLM
    from ..model.vision import VisionEncoder

COMPONENTS = {"vision": "vision", "projector": "projector", "llm": "language_model"}
"""Components, the keys of ``optim.tuning`` (`word` below) -> the submodule of the model."""


def submodules(model: EEMLLM, word: str) -> list[str]:
    """Names of the submodules of a component; the mechanism says to which one its blocks belong."""
    return [COMPONENTS[word], *[model.mechanism.blocks_name] * (word == model.mechanism.component)]


def component(model: EEMLLM, word: str) -> nn.ModuleDict:
    """The submodules of a component, by name."""
    return nn.ModuleDict({name: getattr(model, name) for name in submodules(model, word)})


def apply_tuning(model: EEMLLM, config: OptimConfig, frozen_dtype: str) -> list[str]:
    """Freeze, cast and adapt the components: trained parameters are float32, frozen ones `frozen_dtype`.

    Returns:
        the components that are trained, in full or by adapters.
    """
    choices = asdict(config.tuning)
    for word in COMPONENTS:
        part = component(model, word)
        part.requires_grad_(choices[word] == "full")
        cast(part, torch.float32 if choices[word] == "full" else getattr(torch, frozen_dtype))
        if choices[word] == "lora":
            adapt(model, word, config.lora)
    for unused in model.vision.unused():
        unused.requires_grad_(False)
    return [word for word, choice in choices.items() if choice != "frozen"]


def cast(part: nn.Module, dtype: torch.dtype) -> None:
    """Cast all floating-point tensors but the rotary frequencies, which in bfloat16 would be far off after some hundred tokens.
    Quantised weights are integers and stay."""
    for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
        if tensor.is_floating_point() and not name.endswith("inv_freq"):
            tensor.data = tensor.data.to(dtype)


def adapt(model: EEMLLM, word: str, section: LoraConfig) -> None:
    """Add LoRA adapters to a component."""
    for name in submodules(model, word):
        module: nn.Module = getattr(model, name)
        if next(module.parameters(), None) is not None:  # most mechanisms add no modules
            add_adapters(module, section, word)


def set_modes(model: EEMLLM, trained: list[str]) -> None:
    """Training mode for trained components only: a frozen encoder's dropout and batch statistics stay off."""
    model.train()
    for word in COMPONENTS:
        component(model, word).train(word in trained)


def parameter_groups(model: EEMLLM, config: OptimConfig) -> list[dict[str, Any]]:
    """AdamW's parameter groups: by component, with its learning rate, and by weight decay, which biases and norms do not get."""
    rates = {"vision": config.vision_lr, "projector": config.projector_lr}
    groups: list[dict[str, Any]] = []
    for word in COMPONENTS:
        rate = rates.get(word)
        parts = {word: (list(component(model, word).parameters()), config.lr if rate is None else rate)}
        if word == "vision" and config.vision_layer_decay is not None:
            parts = _by_depth(model.vision, parts[word][1], config.vision_layer_decay)
        for name, (parameters, lr) in parts.items():
            for decays in (True, False):
                members = [p for p in parameters if p.requires_grad and (p.ndim > 1) == decays]
                if members:
                    groups.append(
                        {
                            "name": name if decays else f"{name}, no decay",
                            "params": members,
                            "lr": lr,
                            "weight_decay": config.weight_decay if decays else 0.0,
                        }
                    )
    return groups


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW of the groups, with its moments as ``optim.states`` says."""
    betas = (config.betas[0], config.betas[1])
    if config.states == "8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, betas=betas, eps=config.eps)
    fused = all(p.is_cuda for group in groups for p in group["params"]) or None  # else as torch chooses
    return torch.optim.AdamW(groups, betas=betas, eps=config.eps, fused=fused)


def require_states(config: OptimConfig) -> None:
    """Raises ConfigError if what ``optim.states`` needs is not installed."""
    if config.states == "8bit" and find_spec("bitsandbytes") is None:
        raise ConfigError("optim.states=8bit: bitsandbytes is not installed; pip install 'lit_eemllm[qlora]'")


def moments(weight: Tensor, states: str) -> dict[str, Tensor]:
    """AdamW's moments of a weight by their names, with what they are scaled by, without data."""
    if states == "8bit":
        return adamw8bit_moments(weight)
    return dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.empty_like(weight, device="meta"))


def moment_bytes(weight: Tensor, states: str) -> int:
    return sum(x.nbytes for name, x in moments(weight, states).items() if not name.startswith("qmap"))


def in_order(groups: list[dict[str, Any]], module: nn.Module) -> dict[str, nn.Parameter]:
    """An optimiser's parameters by their names in the module, in the order in which torch numbers them."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(parameter)]: parameter for group in groups for parameter in group["params"]}


def _by_depth(vision: VisionEncoder, lr: float, decay: float) -> dict[str, tuple[list[nn.Parameter], float]]:
    """The encoder's parameters by layer, with their learning rates. The highest layer that is read, and a norm after it, get `lr`;
    each lower layer gets `decay` times the rate of the one above; embeddings count as a layer below the first."""
    blocks = vision.blocks()
    if not blocks:
        raise ConfigError(
            "optim.vision_layer_decay: this vision encoder does not tell the order of its layers (VisionEncoder.blocks); set null"
        )
    layers = [list(block.parameters()) for block in blocks]
    inside, everything = {p for layer in layers for p in layer}, list(vision.parameters())
    last = max(i for i, p in enumerate(everything) if p in inside)
    layers[-1] += [p for p in everything[last:] if p not in inside]
    parts = {"vision, below": [p for p in everything[:last] if p not in inside]}
    parts |= {f"vision, layer {i}": layer for i, layer in enumerate(layers)}
    rates = [(name, (part, lr * decay ** (len(blocks) - i))) for i, (name, part) in enumerate(parts.items())]
    return dict(reversed(rates))  # logs show the rate of the first group, the highest layer


def schedule(config: OptimConfig, begun_with: int | None = None) -> Callable[[int], float]:
    """From an optimiser step to the factor of the peak learning rate: linear warm-up, then decay, then the last value.

    begun_with: the run's max_steps when it began, which decides the warm-up; extending a run must not lengthen that.
    """
    warmup = math.ceil(config.warmup_ratio * (begun_with or config.steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, config.steps - warmup))
        return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.schedule]

    return factor
