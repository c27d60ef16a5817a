"""MFU: FLOPs of packs against PyTorch's counter in real steps, and the log line that shows them."""

from __future__ import annotations

import pytest
import tiny
import torch
from lightning import Trainer

from lit_eemllm.compat.torch import flop_counter
from lit_eemllm.cost.trace import Document, trace
from lit_eemllm.cost.utilisation import TEXTS, StepFlops, peak_flops
from lit_eemllm.cost.weightless import SHAPES, build_weightless, parts_of_shape
from lit_eemllm.layout import Run, SequenceLayout
from lit_eemllm.mechanisms import build_mechanism
from lit_eemllm.mechanisms.schedule import Entry
from lit_eemllm.training import runlog
from lit_eemllm.training.fit import fit
from lit_eemllm.training.module import LitEEMLLM


def counted(model, batch) -> int:
    """Of a real step; the reference computes whole matrices of scores, as is counted."""
    model.set_attention("reference")
    with flop_counter() as counter:
        model.packed_loss(batch).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("preset", "tuning"),
    [("llava", "full"), ("ee_mllm", "lora"), ("saisa", "frozen"), ("vica", "frozen"), ("flamingo", "lora")],
)
def test_flops_are_those_of_a_real_step(tmp_path, preset, tuning):
    model = tiny.model(mechanism=preset)
    module = LitEEMLLM(model, tiny.config(tmp_path, "unused", tmp_path, f"optim.tuning.llm={tuning}"), "")
    flops = StepFlops(module.config, model, module.entry)
    for text in TEXTS:
        pack = tiny.pack([[0, text]])
        assert flops.of(pack.layout) == pytest.approx(counted(model, pack), rel=0.01)


def test_flops_of_a_step_with_a_teacher(tmp_path):
    schedule = [
        "model.mechanism.preset=llava",
        "optim.mechanisms=[{mechanism: {preset: ee_mllm}, teacher: {preset: naavit}}]",
    ]
    module = LitEEMLLM(tiny.model(mechanism="llava"), tiny.config(tmp_path, "unused", tmp_path, *schedule))
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    flops = StepFlops(module.config, module.model, module.mechanisms.at(1))
    for text in TEXTS:
        pack = tiny.pack([[0, text]])
        with flop_counter() as counter:
            module.training_step(pack, 0).backward()
        assert flops.of(pack.layout) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("preset", ["ee_mllm", "flamingo"])
def test_other_documents_at_the_widths_of_a_large_model(tmp_path, monkeypatch, preset):
    """Two layers of it: most of what is needed is in the weights, as in all of them."""
    monkeypatch.setitem(SHAPES, "vicuna-7b", {**SHAPES["vicuna-7b"], "num_hidden_layers": 2})
    config, parts = tiny.config(tmp_path, "unused", tmp_path), parts_of_shape("vicuna-7b")
    mechanism = build_mechanism(preset, 2)
    model, _ = build_weightless(config, parts, mechanism)
    flops = StepFlops(config, model, Entry(mechanism))
    for text, visual in ((1000, 576), (64, 2880)):
        step = trace(config, parts, mechanism, Document(text, visual, text))
        layout = SequenceLayout.of([[Run(False, 1), Run(True, visual), Run(False, text - 1)]] * 3)
        assert flops.of(layout) == pytest.approx(3 * (step.forward_flops + step.backward_flops), rel=0.05)


def test_the_peak_is_of_a_product_of_matrices(monkeypatch):
    times = iter([0.0, 2.0, 2.0, 2.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert peak_flops(torch.device("cpu"), torch.float32, size=10, repeats=2) == 2 * 10**3 / 0.5


def test_the_log_has_it_where_the_device_is_the_trainings_own(tmp_path, parts, shapes, monkeypatch, capsys):
    rows = []
    monkeypatch.setattr(runlog.Logs, "log_metrics", lambda self, values, step: rows.append(values))
    fit(tiny.config(parts, shapes, tmp_path / "cpu", "optim.max_steps=1", "data.val=null"))
    assert "MFU" not in capsys.readouterr().out and not any("mfu_percent" in row for row in rows)
    monkeypatch.setattr("lit_eemllm.cost.utilisation.peak_flops", lambda device, dtype: 1e12)
    start = runlog.RunLog.on_train_start
    monkeypatch.setattr(runlog.RunLog, "on_train_start", lambda self, t, m: (self._measure_peak(m), start(self, t, m)))
    schedule = "optim.mechanisms=[{teacher: {preset: llava}}, {steps: 5-}]"
    fit(
        tiny.config(
            parts, shapes, tmp_path / "gpu", "optim.max_steps=1", "data.val=null", "optim.log_every=1", schedule
        )
    )
    said = capsys.readouterr().out
    assert "a large matrix product runs at 1 TFLOP/s here" in said
    (row,) = (row for row in rows if "mfu_percent" in row)
    assert f"  MFU {row['mfu_percent']:.1f}%" in said and 0 < row["mfu_percent"] < 100
