"""The contract of an attention backend, the registry and the choice by probing."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import ConfigError
from ..layout import Run, SequenceLayout, Visibility

log = logging.getLogger(__name__)


class AttentionBackend(ABC):
    """Computes attention for packed documents. Stateless; legend of shapes in `lit_eemllm.layout`."""

    name: ClassVar[str]
    priority: ClassVar[int] = 0
    """`auto` tries the backends from the highest priority down."""

    @abstractmethod
    def plan(self, layout: SequenceLayout, visibility: Visibility) -> Any:
        """What the kernel needs to know of a batch, made once per batch and distinct visibility."""

    @abstractmethod
    def attend(self, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, plan: Any, scale: float) -> Tensor:
        """Attention of the query rows over all rows, [Q, N, H]. N is a multiple of K (grouped queries)."""

    def attend_cached(self, q_BNQH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, mask_BQL: Tensor, scale: float) -> Tensor:
        """Decoding over a padded cache, [B, N, Q, H]; `mask_BQL` is True where a query sees a key."""
        return scaled_dot_product_attention(
            q_BNQH, k_BKLH, v_BKLH, attn_mask=mask_BQL[:, None], scale=scale, enable_gqa=True
        )


_BACKENDS: dict[str, type[AttentionBackend]] = {}


def register_backend(name: str) -> Callable[[type[AttentionBackend]], type[AttentionBackend]]:
    """Class decorator that makes a backend available as ``model.attention=NAME``. Raises ValueError if taken."""

    def register(cls: type[AttentionBackend]) -> type[AttentionBackend]:
        if name in _BACKENDS or name == "auto":
            raise ValueError(f"attention backend {name!r} is registered already; registered: {registered_backends()}")
        cls.name = name
        _BACKENDS[name] = cls
        return cls

    return register


def registered_backends() -> list[str]:
    return sorted(_BACKENDS, key=lambda name: -_BACKENDS[name].priority)


def probe(name: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Run a four-token forward and backward. Returns None if it worked, otherwise the reason why not."""
    layout = SequenceLayout.of([[Run(False, 1), Run(True, 2), Run(False, 1)]]).to(device)
    backend = _BACKENDS[name]()
    try:
        for visual_queries in (False, True):
            q_QNH = torch.ones(4 if visual_queries else 2, 2, 16, device=device, dtype=dtype, requires_grad=True)
            k_SKH, v_SKH = (torch.ones(4, 1, 16, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
            plan = backend.plan(layout, Visibility(visual_queries))
            backend.attend(q_QNH, k_SKH, v_SKH, plan, scale=0.25).sum().backward()
    except Exception as error:  # noqa: BLE001  a kernel may fail in any way; the reason is reported, not hidden
        return f"{type(error).__name__}: {error}"
    return None


def resolve_backend(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> AttentionBackend:
    """The backend of that name, or for ``auto`` the first that really runs here.

    Raises:
        ConfigError: the name is unknown, or the named backend cannot run (there is no silent fallback).
    """
    if name != "auto" and name not in _BACKENDS:
        raise ConfigError(f"model.attention: unknown backend {name!r}; choose auto or one of {registered_backends()}")
    refused: dict[str, str] = {}
    for candidate in registered_backends() if name == "auto" else [name]:
        reason = probe(candidate, device, dtype)
        if reason is None:
            others = "".join(f"; {other} refused: {why}" for other, why in refused.items())
            log.info("attention backend: %s on %s, %s%s", candidate, device, dtype, others)
            return _BACKENDS[candidate]()
        refused[candidate] = reason
    raise ConfigError(f"model.attention={name}: cannot run on {device} with {dtype}: {refused}")
