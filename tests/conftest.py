"""Fixtures and marks for all tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; processes that tests start inherit it
os.environ["HF_HUB_OFFLINE"] = "1"  # tests download nothing, and do not wait for an answer

import pytest
import tiny
import torch


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder and encoder as transformers folders; not to be changed."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.write_parts(folder)
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared shards of the embedded set."""
    return tiny.write_shards(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and weights: $LIT_EEMLLM_SHARED, else a folder `shared` beside the repository, else skip."""
    named = os.environ.get("LIT_EEMLLM_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "weights").is_dir():
        pytest.skip("needs real data and weights: set LIT_EEMLLM_SHARED")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
