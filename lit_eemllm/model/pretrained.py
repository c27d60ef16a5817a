"""Loading pretrained parts with transformers: nothing in a folder is executed, nothing is silently random."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import CheckpointError, ConfigError


def load_pretrained(kind: Any, path: str, key: str, **options: Any) -> Any:
    """``kind.from_pretrained(path)``, which never runs code of the folder.

    Args:
        kind: a class of transformers.
        path: folder or hub id.
        key: the configuration key that named it, for messages.

    Raises:
        ConfigError: it is not there, or not of this kind.
    """
    try:
        return kind.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"{key}: {kind.__name__} cannot load {path!r}: {reason}") from error


def load_weighted(kind: Any, path: str, key: str) -> Any:
    """A model with its weights in float32, from safetensors. Raises CheckpointError if a tensor is missing or misshapen."""
    model, info = load_pretrained(kind, path, key, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    missing = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if missing:
        raise CheckpointError(
            f"{key}: {path!r} lacks {len(missing)} tensors of a {type(model).__name__}, such as {sorted(missing)[0]}; "
            "they would be random. Copy the folder again."
        )
    return model
