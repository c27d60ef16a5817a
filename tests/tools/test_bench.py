"""The attention benchmark: its FLOPs, its files, and what it says of backends that cannot run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_eemllm.attention import AttentionBackend
from lit_eemllm.attention.base import _BACKENDS
from lit_eemllm.layout import Chunk, Run, SequenceLayout, Visibility

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_attention

SDPA = _BACKENDS["sdpa"]


def bench(out: Path, *words: str) -> dict[str, Any]:
    sizes = ["--device", "cpu", "--text", "4", "--heads", "2", "--kv-heads", "1", "--head-size", "16"]
    bench_attention.main([*sizes, "--repeats", "2", "--out", str(out), *words])
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize(
    "visibility",
    [Visibility(True), Visibility(False), Visibility(True, window=2), Visibility(True, window=Chunk(3))],
    ids=str,
)
@pytest.mark.parametrize(
    "layout",
    [
        bench_attention.layout_of(9, 4, 3),
        SequenceLayout.of([[Run(True, 3), Run(False, 2), Run(True, 4), Run(True, 1), Run(False, 1)], [Run(False, 5)]]),
    ],
    ids=["usual", "mixed"],
)
def test_pairs_are_those_of_the_mask(layout: SequenceLayout, visibility: Visibility) -> None:
    assert bench_attention.visible_pairs(layout, visibility) == layout.mask(visibility).sum()


def test_flops_by_hand() -> None:
    """t V V t: the dense mask has 1 + 2 + 3 + 4 ones, its text rows 1 + 4."""
    layout = bench_attention.layout_of(visual=2, text=2, documents=1)
    assert layout.documents == ((Run(False, 1), Run(True, 2), Run(False, 1)),)
    for visibility, pairs in ((Visibility(True), 10), (Visibility(False), 5)):
        assert bench_attention.visible_pairs(layout, visibility) == pairs
        # Two products: each pair costs a multiplication and an addition per element, in each head.
        forward = 2 * (2 * pairs * 16) * 3
        assert bench_attention.needed_flops(pairs, heads=3, head_size=16, backward=False) == forward
        assert bench_attention.needed_flops(pairs, heads=3, head_size=16, backward=True) == 3.5 * forward


def test_usual_layout_begins_with_the_templates_text() -> None:
    assert bench_attention.layout_of(576, 64, 2).documents == ((Run(False, 35), Run(True, 576), Run(False, 29)),) * 2


def test_peak_memory_counts_what_lives_at_once() -> None:
    def call() -> torch.Tensor:
        for _ in range(3):
            torch.empty(1000)
        kept, other = torch.empty(1000), torch.empty(500)
        del other
        return kept

    assert bench_attention.peak_memory(call, torch.device("cpu")) == pytest.approx(4 * 1500, abs=256)  # rounded up


def test_a_run_writes_its_files(tmp_path: Path) -> None:
    result = bench(tmp_path, "--visual", "6", "12", "--documents", "2", "--backends", "sdpa", "reference", "flash")
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "report.md", "plot.png"}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert result["backends"] == ["sdpa", "reference"]
    assert result["unavailable"] == {"flash": "needs a CUDA device, found cpu"}
    assert result["environment"]["versions"]["torch"] == version("torch")
    assert len(result["rows"]) == 2 * 2 * 2 * 2  # sizes, layers, backends, passes
    for row in result["rows"]:
        assert row["status"] == "measured" and row["seconds"] > 0 and row["peak_bytes"] > 0 and not row["wrong"]
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"])
        assert (row["error"] is None) == (row["backend"] == "reference")
    speeds = [row["speed"] for row in result["rows"] if row["backend"] == "sdpa" and row["layer"] == "dense"]
    assert speeds == [1] * 4
    report = (tmp_path / "report.md").read_text()
    assert "- flash: needs a CUDA device, found cpu" in report and "| 12 | 4 | 2 | 1.00 / " in report


class Providers(SDPA):
    """Two providers of one kernel, of which the first is not installed."""

    name = "fake"

    @classmethod
    def candidates(cls) -> Iterator[Any]:
        def missing() -> AttentionBackend:
            raise ModuleNotFoundError("fast_kernels is not installed")

        yield "fast kernels", missing
        yield "slow kernels", cls


class Hungry(SDPA):
    """Fits six tokens only."""

    name = "fake"

    def attend(self, q_QNH: torch.Tensor, k_SKH: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(k_SKH) > 6:
            raise torch.OutOfMemoryError
        return super().attend(q_QNH, k_SKH, *rest)


class Wrong(SDPA):
    """Doubles its output, but not for six tokens, which the probe tries."""

    name = "fake"

    def attend(self, q_QNH: torch.Tensor, k_SKH: torch.Tensor, *rest: Any) -> torch.Tensor:
        return super().attend(q_QNH, k_SKH, *rest) * (2 if len(k_SKH) > 6 else 1)


def test_every_provider_is_measured_or_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_BACKENDS, "fake", Providers)
    result = bench(tmp_path, "--visual", "6", "--documents", "1", "--backends", "sdpa", "fake")
    assert result["backends"] == ["sdpa", "fake (slow kernels)"]
    assert result["unavailable"] == {"fake (fast kernels)": "ModuleNotFoundError: fast_kernels is not installed"}
    assert "fast_kernels is not installed" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(("backend", "shown"), [(Hungry, "| out of memory / out of memory |"), (Wrong, " wrong / ")])
def test_a_bad_kernel_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: type[AttentionBackend], shown: str
) -> None:
    monkeypatch.setitem(_BACKENDS, "fake", backend)
    result = bench(tmp_path, "--visual", "6", "--documents", "1", "--backends", "sdpa", "fake")
    rows = {name: [row for row in result["rows"] if row["backend"] == name] for name in ("sdpa", "fake")}
    assert [row["status"] for row in rows["sdpa"]] == ["measured"] * 4
    for row in rows["fake"]:
        assert row["status"] == "out of memory" if backend is Hungry else row["wrong"]
    assert shown in (tmp_path / "report.md").read_text()


def test_the_reference_is_skipped_where_it_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention, "REFERENCE_LIMIT", 2 * 4 * 10 * 10 - 1)  # one byte less than the dense matrix
    result = bench(tmp_path, "--visual", "6", "--documents", "1", "--backends", "sdpa", "reference")
    dense, composite = ([row for row in result["rows"] if row["layer"] == layer] for layer in ("dense", "composite"))
    assert {(row["backend"], row["status"]) for row in dense} == {("sdpa", "measured"), ("reference", "skipped")}
    assert {row["status"] for row in composite} == {"measured"}


def test_flex_is_measured_forward_only_on_a_cpu(tmp_path: Path) -> None:
    result = bench(tmp_path, "--visual", "6", "--documents", "1", "--backends", "flex")
    assert {row["pass"] for row in result["rows"]} == {"forward"}
    assert "no backward on the CPU" in result["unavailable"]["flex, backward"]
    assert {row["speed"] for row in result["rows"]} == {None}  # nothing to compare with
    assert "| 6 | 4 | 1 | – / – |" in (tmp_path / "report.md").read_text()


def test_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="none of these backends can run here"):
        bench(tmp_path / "out", "--visual", "6", "--backends", "flash", "xformers")
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_a_run_on_the_gpu(tmp_path: Path) -> None:
    sizes = [
        "--visual",
        "64",
        "--text",
        "40",
        "--documents",
        "2",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--head-size",
        "64",
    ]
    bench_attention.main([*sizes, "--repeats", "2", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert {"sdpa", "flex", "reference"} <= {row["backend"] for row in rows}
    for row in rows:
        assert row["status"] == "measured" and row["seconds"] > 0 and row["peak_bytes"] > 0 and not row["wrong"], row


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--kv-heads", "3"], "no multiple"), (["--text", "1"], "2 or more"), (["--backends", "x"], "x")],
)
def test_mistakes_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_attention.main(["--device", "cpu", "--heads", "4", *words])
    assert message in capsys.readouterr().err
