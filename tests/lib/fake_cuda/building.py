"""The library of device.cpp: compiled once for a source and a PyTorch, into a cache outside the repository."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).with_name("device.cpp")
COMPILER = "g++"


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_eemllm-tests"


def compile_library(folder: Path) -> Path:
    """The shared library in a folder, compiled unless it is there; other processes wait. Raises CalledProcessError."""
    root = Path(torch.__file__).parent
    about = SOURCE.read_bytes() + f"{torch.__version__} {root}".encode()
    library = folder / f"fake_cuda-{hashlib.sha256(about).hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            paths = (f"-I{root}/include", f"-L{root}/lib", "-ltorch_cpu", "-lc10")
            abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
            command = [COMPILER, "-shared", "-fPIC", "-std=c++20", abi, str(SOURCE), "-o", str(unfinished), *paths]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
            unfinished.rename(library)
    return library


def library() -> Path:
    """Skips the test where there is no compiler, or a real device; a compiler that fails fails it."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"the fake CUDA device needs a C++ compiler, {COMPILER}")
    if torch.version.cuda is not None:
        pytest.skip("the fake CUDA device is for a CPU build of PyTorch")
    return compile_library(cache())
