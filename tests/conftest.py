"""Fixtures and marks for all tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; processes that tests start inherit it
os.environ["HF_HUB_OFFLINE"] = "1"  # tests download nothing, and do not wait for an answer

import pytest
from lib.order import LONGEST

# PyTorch and what else takes seconds to import are imported where they are needed: not by the process that only starts workers.


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder and encoder as transformers folders; not to be changed."""
    import tiny

    folder = tmp_path_factory.mktemp("parts")
    tiny.write_parts(folder)
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared shards of the embedded set."""
    import tiny

    return tiny.write_shards(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and weights: $LIT_EEMLLM_SHARED, else a folder `shared` beside the repository, else skip."""
    named = os.environ.get("LIT_EEMLLM_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "weights").is_dir():
        pytest.skip("needs real data and weights: set LIT_EEMLLM_SHARED")
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of `-n auto`: one a CPU that this process may use, while each has 2 GB of memory, and no more than eight."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cpus, int(memory / 2e9), 8))


def pytest_collection_finish() -> None:
    """What is imported by now stays. Left to the garbage collector it costs seconds wherever a test starts loader processes:
    each of them walks all objects that it knows, and both sides then copy the memory that they shared."""
    gc.collect()
    gc.freeze()


# Of tests that need a GPU one line tells the number. Under xdist they are collected by each worker, which tells the process
# that writes the summary.
LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)  # when -m and -k have left out what they leave out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    without = [item for item in items if item.get_closest_marker("gpu")]
    if without and not torch.cuda.is_available():
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.stash[LEFT_OUT] = len(without)
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)  # xdist's
def pytest_testnodedown(node: Any) -> None:
    if left_out := getattr(node, "workeroutput", {}).get("left_out"):
        node.config.stash[LEFT_OUT] = left_out


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left_out := config.stash.get(LEFT_OUT, 0):
        tests = "1 test that needs a GPU was" if left_out == 1 else f"{left_out} tests that need a GPU were"
        terminalreporter.write_line(f"{tests} not run (no CUDA device)")
