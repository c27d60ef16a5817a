"""Energon's loader state as JSON text and back, without loss and without pickle.

The state is a tree of Energon's own dataclasses, dict subclasses, tuples, bytes, tensors and arrays. JSON lists and scalars
stand for themselves; every JSON object has one key, the type it stands for, and that type must be known here. So a checkpoint
that holds the text loads with ``torch.load(weights_only=True)``, and a forged one can build nothing but loader states.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from lit_eemllm.compat.energon import STATES, FlexState
from lit_eemllm.errors import CheckpointError

_STATES = {cls.__name__: cls for cls in STATES}


def dumps(state: Any) -> str:
    """Loader state to JSON. Raises TypeError for a type that is not known here, which would be lost."""
    return json.dumps(_encode(state), separators=(",", ":"))


def loads(text: str) -> Any:
    """JSON to loader state. Raises CheckpointError where it is not one that `dumps` wrote."""
    try:
        return _decode(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the loader state in the checkpoint cannot be read: {error}") from error


def _encode(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [_encode(item) for item in value]
    if kind is tuple:
        return {"tuple": [_encode(item) for item in value]}
    if kind in (dict, FlexState):
        if not all(type(key) is str for key in value):
            raise TypeError(f"loader state has a dict with keys that are not text: {list(value)[:3]}")
        return {kind.__name__: {key: _encode(item) for key, item in value.items()}}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if kind is torch.Tensor:
        return {"tensor": _encode_array(value.numpy())}
    if kind is np.ndarray:
        return {"array": _encode_array(value)}
    if _STATES.get(kind.__name__) is kind:
        return {kind.__name__: {field.name: _encode(getattr(value, field.name)) for field in fields(value)}}
    raise TypeError(f"loader state holds a {kind.__module__}.{kind.__qualname__}, which cannot be written as JSON")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    return _DECODERS[kind](content)


def _encode_array(array: np.ndarray) -> list[Any]:
    if array.dtype.kind not in "biuf":
        raise TypeError(f"loader state holds an array of {array.dtype}")
    return [array.dtype.str, list(array.shape), base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()]


def _decode_array(content: list[Any]) -> np.ndarray:
    dtype, shape, data = content
    return np.frombuffer(base64.b64decode(data), dtype=np.dtype(dtype)).reshape(shape).copy()


def _fields(content: dict[str, Any]) -> dict[str, Any]:
    return {key: _decode(item) for key, item in content.items()}


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "tuple": lambda content: tuple(_decode(item) for item in content),
    "dict": _fields,
    "FlexState": lambda content: FlexState(_fields(content)),
    "bytes": base64.b64decode,
    "tensor": lambda content: torch.from_numpy(_decode_array(content)),
    "array": _decode_array,
    **{name: lambda content, cls=cls: cls(**_fields(content)) for name, cls in _STATES.items()},  # type: ignore[misc]
}
