"""CUDA graphs without CUDA: what a step calls is recorded once, with the tensors that it was given, and called again on the same tensors.

As in a real graph, recording computes nothing that stays, a replay reads no value from Python, and whatever a step should take from
outside must lie where it lay.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_eemllm import layout
from lit_eemllm.core import stream
from lit_eemllm.model import cache


class Graph(TorchDispatchMode):
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.replays = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given, told in zip(args, call._schema.arguments, strict=False):
            if told.alias_info is not None and told.alias_info.is_write:
                self.before.setdefault(given.data_ptr(), (given, given.clone()))
        out = call(*args, **(kwargs or {}))
        self.calls.append((call, args, kwargs or {}, tree_leaves(out)))
        return out

    def replay(self) -> None:
        self.replays += 1
        for call, args, kwargs, made in self.calls:
            for old, new in zip(made, tree_leaves(call(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def graph(recorded: Graph) -> Any:
    """In place of `torch.cuda.graph`."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("a copy from the host cannot be recorded")

    with ExitStack() as stack:
        for module in (layout, stream, cache):
            stack.enter_context(patch.object(module, "upload", refuse))
        stack.enter_context(recorded)
        yield
    for tensor, value in recorded.before.values():
        tensor.copy_(value)


def pretend(monkeypatch: Any) -> list[Graph]:
    """Record on the CPU what would be recorded on a GPU. Returns the graphs, as they are made."""
    made: list[Graph] = []

    def new() -> Graph:
        made.append(Graph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return made
