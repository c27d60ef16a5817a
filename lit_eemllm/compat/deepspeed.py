"""What we use of DeepSpeed's ZeRO optimiser that is private. Its package is an extra, so it is imported where it is used."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def compile_nothing() -> None:
    """On a CPU it would compile an all-reduce of its own at the first start, for a minute and with a compiler; gloo's does."""
    import deepspeed

    compatible = deepspeed.ops.__compatible_ops__
    compatible.update(dict.fromkeys(compatible, False))


def gradient_shares(zero: Any) -> list[Tensor]:
    """This rank's share of the gradients, between the backward pass and the step; to be changed in place."""
    return [share for shares in zero.averaged_gradients.values() for share in shares]


def link_states(zero: Any) -> None:
    """Let parameters find their parts of the shares. (DeepSpeed does it once, after the first group's first step, when the other
    groups have no states.)"""
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def is_shared_out(parameter: nn.Parameter) -> bool:
    """Whether ZeRO keeps the parameter's gradient and states in shares."""
    return hasattr(parameter, "_hp_mapping")
