"""The contract of an attention backend, the registry and the choice by probing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..errors import ConfigError
from ..layout import Run, SequenceLayout, Visibility


class AttentionBackend(ABC):
    """Computes attention for packed documents. Stateless; legend of shapes in `lit_eemllm.layout`."""

    name: ClassVar[str]
    priority: ClassVar[int] = 0
    """`auto` tries the backends from the highest priority down."""
    provider: str = "PyTorch"
    """Whose kernel this is, for people."""

    @classmethod
    def candidates(cls) -> Iterator[tuple[str, Callable[[], AttentionBackend]]]:
        """Providers of the kernel, best first, and how to make the backend with each; making one may fail."""
        yield cls.provider, cls

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, training: bool) -> str | None:
        """Why this cannot run there, with what to do about it, if that is known without trying."""
        return None

    @abstractmethod
    def plan(self, layout: SequenceLayout, visibility: Visibility) -> Any:
        """What the kernel needs to know of a batch, made once per batch and distinct visibility."""

    @abstractmethod
    def attend(self, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, plan: Any, scale: float) -> Tensor:
        """Attention of the query rows over all rows, [Q, N, H]. N is a multiple of K (grouped queries); Q is never 0.

        The head size of the values may be smaller than that of queries and keys, whose size the result then has not.
        """

    def attend_cached(self, q_BNQH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, mask_BQL: Tensor, scale: float) -> Tensor:
        """Decoding over a padded cache, [B, N, Q, H]; `mask_BQL` is True where a query sees a key."""
        return fused_attention(q_BNQH, k_BKLH, v_BKLH, mask_BQL, scale)


KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of scaled dot-product attention, in the order in which they are tried. cuDNN's, which PyTorch prefers on some GPUs, plans for tens
of milliseconds for every new shape, and a cache grows by one with every token; see `Cudnn`."""


def fused_attention(
    q_BNQH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, mask_BQL: Tensor | None, scale: float | None = None
) -> Tensor:
    """PyTorch's scaled dot-product attention through one of `KERNELS`, plainly causal without a mask, [B, N, Q, H].

    The mask may be [B, 1, L], the same for all queries.
    """
    heads, rows = k_BKLH.shape[1], q_BNQH.shape[2]
    groups = q_BNQH.shape[1] // heads
    # On CUDA only the kernel without masks, for 16 bits, groups queries by itself; the others would fall back to plain math.
    if groups > 1 and q_BNQH.device.type == "cuda" and (mask_BQL is not None or q_BNQH.dtype == torch.float32):
        if mask_BQL is not None and rows <= heads * (k_BKLH.shape[3] + v_BKLH.shape[3]):
            # The heads of a group become rows of one: their masks, repeated, are smaller than keys and values would be.
            q_BKMH = torch.unflatten(q_BNQH, 1, (heads, groups)).flatten(2, 3)
            mask_BML = mask_BQL if mask_BQL.shape[1] == 1 else mask_BQL.repeat(1, groups, 1)
            out_BKMH = fused_attention(q_BKMH, k_BKLH, v_BKLH, mask_BML, scale)
            return torch.unflatten(out_BKMH, 2, (groups, rows)).flatten(1, 2)
        k_BKLH, v_BKLH = (x.repeat_interleave(groups, dim=1) for x in (k_BKLH, v_BKLH))
    if torch.compiler.is_compiling():  # which knows this way, and not the flag
        with sdpa_kernel(KERNELS):
            return scaled_attention(q_BNQH, k_BKLH, v_BKLH, mask_BQL, scale)
    with without_cudnn():  # the same, at a tenth of the time
        return scaled_attention(q_BNQH, k_BKLH, v_BKLH, mask_BQL, scale)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Whoever calls PyTorch's attention within does not get cuDNN's kernel; any other choice of the caller's stays."""
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]  # torch's own
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


def scaled_attention(
    q_BNQH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, mask_BQL: Tensor | None, scale: float | None
) -> Tensor:
    """PyTorch's scaled dot-product attention, through whichever kernel is enabled."""
    mask = None if mask_BQL is None else mask_BQL[:, None]
    return scaled_dot_product_attention(
        q_BNQH, k_BKLH, v_BKLH, attn_mask=mask, is_causal=mask is None, scale=scale,
        enable_gqa=q_BNQH.shape[1] != k_BKLH.shape[1],
    )  # fmt: skip


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


NEEDS_CUDA = "needs a CUDA device"


def half_on_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    """`AttentionBackend.refusal` of kernels that compute in 16 bits on CUDA alone."""
    if device.type != "cuda":
        return f"{NEEDS_CUDA}, found {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, found {dtype}; set trainer.precision=bf16-mixed"
    return None


@dataclass(frozen=True)
class Probe:
    """What trying a backend showed: it with the first provider that works, or None; and why providers do not ("": all)."""

    backend: AttentionBackend | None
    refused: dict[str, str]

    def __str__(self) -> str:
        return "; ".join(f"{provider}: {reason}" if provider else reason for provider, reason in self.refused.items())


TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Largest error of a working kernel in the probe, relative to the reference's largest value: roundings, TF32's included."""


def probe(
    name: str, device: torch.device | str, dtype: torch.dtype, training: bool = True, head_size: int = 64
) -> Probe:
    """Run a six-token forward, and backward if `training`, and compare them with the reference."""
    refused: dict[str, str] = {}
    device = torch.device(device)
    if dtype not in TOLERANCE:
        return Probe(None, {"": f"computes in float32, bfloat16 or float16, found {dtype}"})
    try:
        reason = _BACKENDS[name].refusal(device, dtype, training)
        if reason is not None:
            return Probe(None, {"": reason})
        for provider, make in _BACKENDS[name].candidates():
            try:
                backend = make()
                with torch.autocast(device.type, enabled=False):  # the trial may be asked for under it
                    reason = disagreement(backend, device, dtype, training, head_size)
            except Exception as error:  # noqa: BLE001  a kernel may fail in any way; the reason is reported, not hidden
                reason = f"{type(error).__name__}: {error}".strip()
            if reason is None:
                return Probe(backend, refused)
            refused[provider] = reason
    except Exception as error:  # noqa: BLE001  so may a backend of one's own, before it is tried
        refused[""] = f"{type(error).__name__}: {error}".strip()
    return Probe(None, refused)


@torch.inference_mode(False)  # the trial may be asked for in the middle of `generate`
@torch.enable_grad()
def disagreement(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, training: bool, head_size: int
) -> str | None:
    """What a text-image-text-image document shows to be wrong, if anything."""
    layout = SequenceLayout.of([[Run(visual, 1 + visual) for visual in (False, True, False, True)]]).to(device)
    generator = torch.Generator().manual_seed(0)
    visibilities = [Visibility(True), Visibility(False)]
    visibilities += [Visibility(True, text_queries=False, both_ways=both_ways) for both_ways in (False, True)]
    for visibility in visibilities:
        queries = sum(run.length for run in layout.documents[0] if visibility.queries(run.visual))
        shapes = ((queries, 2, head_size), (6, 1, head_size), (6, 1, head_size))
        q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        found = _results(backend, q, k, v, layout, visibility, training)
        true = _results(_BACKENDS["reference"](), q.float(), k.float(), v.float(), layout, visibility, training)
        for what, result in found.items():
            error = ((result - true[what]).abs().max() / true[what].abs().max()).item()
            if not error <= TOLERANCE[dtype]:
                return f"it runs, but its {what} is off the reference by {error:.0%}"
    return None


def _results(
    backend: AttentionBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    visibility: Visibility,
    training: bool,
) -> dict[str, Tensor]:
    q, k, v = (x.requires_grad_(training) for x in (q, k, v))
    out = backend.attend(q, k, v, backend.plan(layout, visibility), q.shape[-1] ** -0.5)
    if not training:
        return {"output": out}
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    gradients = torch.autograd.grad((out * weights).sum(), (q, k, v))
    return {"output": out, **{f"gradient of {name}": g for name, g in zip("qkv", gradients, strict=True)}}


@dataclass(frozen=True)
class Choice:
    """The backend that was chosen and why others were not, for people."""

    backend: AttentionBackend
    refused: dict[str, str]

    def __str__(self) -> str:
        """That a kernel is for another kind of device is no news: `doctor` says it."""
        told = {name: reason for name, reason in self.refused.items() if not reason.startswith(NEEDS_CUDA)}
        others = "".join(f"\n  not {name}: {reason}" for name, reason in told.items())
        return f"{self.backend.name} ({self.backend.provider}){others}"


def resolve_backend(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    training: bool = True,
    head_size: int = 64,
) -> Choice:
    """The backend of that name, or for ``auto`` the first that really runs here.

    Args:
        name: a registered name or ``auto``.
        device: where the model is.
        dtype: the type that queries, keys and values will have.
        training: whether gradients are needed.
        head_size: the decoder's.

    Raises:
        ConfigError: the name is unknown, or the named backend cannot run (there is no silent fallback).
    """
    if name != "auto" and name not in _BACKENDS:
        raise ConfigError(f"model.attention: unknown backend {name!r}; choose auto or one of {registered_backends()}")
    refused: dict[str, str] = {}
    for candidate in registered_backends() if name == "auto" else [name]:
        tried = probe(candidate, device, dtype, training, head_size)
        if tried.backend is not None:
            refused |= {f"{candidate} by {provider}": reason for provider, reason in tried.refused.items()}
            return Choice(tried.backend, refused)
        refused[candidate] = str(tried)
    reasons = "".join(f"\n  {candidate}: {reason}" for candidate, reason in refused.items())
    kind = str(dtype).removeprefix("torch.")
    raise ConfigError(f"model.attention={name}: cannot run on {device} in {kind}; see `lit-eemllm doctor`{reasons}")
