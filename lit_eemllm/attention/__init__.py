"""Attention backends: a kernel behind one contract, chosen by name or by probing.

A backend turns a `SequenceLayout` and a `Visibility` into its own plan, once per batch and kind of layer, and computes
attention with it. `reference` is the law; every other backend is tested against it, gradients included.
Adding one is a decorator and one file (see `register_backend`).
"""

from . import flash, flex, reference, sdpa, xformers  # noqa: F401  registers the built-in backends
from .base import (
    AttentionBackend,
    Choice,
    fused_attention,
    probe,
    register_backend,
    registered_backends,
    resolve_backend,
    without_cudnn,
)

__all__ = [
    "AttentionBackend",
    "Choice",
    "fused_attention",
    "probe",
    "register_backend",
    "registered_backends",
    "resolve_backend",
    "without_cudnn",
]
