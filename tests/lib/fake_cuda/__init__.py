"""A CUDA device for a CPU build of PyTorch: what a GPU would refuse, wait for or copy badly is seen without one.

Tensors on it are `CudaTensor`s (world.py), whose numbers are computed on the CPU, or, for models too large for that, whose
shapes alone are. Every operator passes a `World`, which refuses a mix of devices as CUDA does, and notes waiting and copies.
Attention is computed by stand-ins that have the kernels' own demands (kernels.py). Autograd takes part through a small library
(device.cpp), which changes what PyTorch thinks of the machine: so a test that has the device runs in a process of its own.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from lib.fake_cuda.building import library
from lib.processes import Started


def on_fake_cuda(test: Callable[..., None]) -> Callable[..., None]:
    """The body of this test runs in a process that has the device. Its arguments are pickled."""

    @functools.wraps(test)
    def within(*args: Any, **options: Any) -> None:
        process = Started(_run, str(library()), test.__module__, test.__qualname__, args, options)
        said = "\n".join(process.communicate(250))
        assert process.returncode == 0, said

    return within


def _run(library: str, module: str, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    from lib.fake_cuda.world import begin

    begin(library)
    getattr(importlib.import_module(module), name).__wrapped__(*args, **options)
