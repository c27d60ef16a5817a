"""Loading pretrained parts with transformers: nothing in a folder is executed, nothing is silently random."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from ..errors import CheckpointError, ConfigError
from ..shipped import find, nowhere


def load_pretrained(kind: Any, path: str, key: str, **options: Any) -> Any:
    """``kind.from_pretrained(path)``, which never runs code of the folder.

    Args:
        kind: a class of transformers.
        path: folder, the user's own or a shipped one, or hub id.
        key: the configuration key that named it, for messages.

    Raises:
        ConfigError: it is not there, or not of this kind.
    """
    folder = find(path)
    # what cannot be a hub id is not looked for on the hub
    if (path.startswith(("/", ".", "~")) or path.count("/") > 1) and not os.path.exists(folder):
        home = "; ~ is not expanded after a key, write your home folder out" if path.startswith("~") else ""
        raise ConfigError(f"{key}: no such folder: {path}{home or nowhere(path)}")
    try:
        return kind.from_pretrained(
            str(folder) if path and folder.is_dir() else path, trust_remote_code=False, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"{key}: {kind.__name__} cannot load {path!r}: {reason}") from error


def quantized(how: str, compute: torch.dtype) -> Any:
    """What transformers needs to load a model with linear layers in 4 ("nf4") or 8 bits ("int8").

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"model.quantization={how}: bitsandbytes is not installed; pip install 'lit_eemllm[qlora]'")
    if how == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def load_weighted(kind: Any, path: str, key: str, **options: Any) -> Any:
    """A model with its weights in float32, from safetensors. Raises CheckpointError if a tensor is missing or misshapen."""
    model, info = load_pretrained(
        kind,
        path,
        key,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    missing = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if missing:
        raise CheckpointError(
            f"{key}: {path!r} lacks {len(missing)} tensors of a {type(model).__name__}, such as {sorted(missing)[0]}; "
            "they would be random. Copy the folder again."
        )
    return model
