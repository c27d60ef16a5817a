"""RMSNorms of a decoder as PyTorch's one kernel on CUDA, where a norm computes what PyTorch's does. Legend of shapes in `lit_eemllm.layout`."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

_FUSED: dict[type[Any], type[Any]] = {}  # class of a norm -> the class that fuses it


def fuse_norms(decoder: nn.Module) -> None:
    """Let norms that `is_rms_norm` run as one kernel on CUDA, where transformers' starts six and moves some nine times the bytes.

    A norm stays the module that it is, with its weight and its hooks. Its numbers on CUDA are rounded once, after the weight; most of
    transformers' round to 16 bits before the weight too, so in 16 bits they differ by that rounding. In float32 they do not.
    """
    for module in decoder.modules():
        if type(module) not in _FUSED.values() and is_rms_norm(module):
            # not its forward alone: a method that it keeps would keep it, in a circle
            module.__class__ = _fused(type(module))


def is_rms_norm(module: Any) -> bool:
    """Whether it computes x / sqrt(mean(x^2) + eps) times its weight, as a copy with other weights shows: Gemma's adds 1 to them."""
    if _eps(module) is None or [(name, p.ndim) for name, p in module.named_parameters()] != [("weight", 1)]:
        return False
    with torch.no_grad():
        trial = deepcopy(module).to_empty(device="cpu").float()
        weight_h = torch.linspace(-1, 2, len(trial.weight), device="cpu", dtype=torch.float32)
        trial.weight.copy_(weight_h)
        x_Rh = torch.stack([weight_h.cos(), 1e-3 * weight_h.exp()])  # beside the second, eps counts
        return torch.allclose(trial(x_Rh), rms_norm(x_Rh, weight_h.shape, weight_h, _eps(module)))


def _eps(norm: Any) -> float | None:
    """What a norm adds to the mean of squares, by transformers' two names for it."""
    eps: float | None = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps


def _fused(kind: type[Any]) -> type[Any]:
    """The norm's class, with PyTorch's kernel where there is one, else its own."""

    class Fused(kind):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            weight_h = self.weight
            if not (x.is_cuda and len(x) and x.dtype == weight_h.dtype):  # of two types PyTorch has no kernel
                own: Tensor = super().forward(x)
                return own
            with torch.autocast("cuda", enabled=False):  # which would compute it, and hand it on, in float32
                return rms_norm(x, weight_h.shape, weight_h, _eps(self))

    Fused.__name__, Fused.__qualname__ = kind.__name__, kind.__qualname__
    return _FUSED.setdefault(kind, Fused)
