"""MFU: FLOPs of packs against PyTorch's counter in real steps, and the log line that shows them."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from statistics import mean

import pytest
import tiny
import torch
from lightning import Trainer

from lit_eemllm.compat.torch import flop_counter
from lit_eemllm.cost.trace import Document, trace
from lit_eemllm.cost.utilisation import TEXTS, RunFlops, StepFlops, peak_flops
from lit_eemllm.cost.weightless import SHAPES, build_weightless, parts_of_shape
from lit_eemllm.data.packing import balance_packs, emptiest, plan_packs
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
    module = LitEEMLLM(model, tiny.config(tmp_path, "unused", tmp_path, f"optim.tuning.llm={tuning}"))
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_flops_of_a_run_are_those_of_its_steps_by_their_shares(tmp_path):
    schedule = ["optim.mechanisms=[{weight: 3, mechanism: {preset: llava}}, {weight: 1}]"]
    module = LitEEMLLM(tiny.model(), tiny.config(tmp_path, "unused", tmp_path, *schedule))
    found = RunFlops(module.config, module.model, module.mechanisms)
    assert pickle.dumps(found), "loader processes get it"
    pack, by_hand = tiny.pack([[0, 30]]), 0.0
    for preset, share in (("llava", 0.75), ("ee_mllm", 0.25)):
        by_hand += share * StepFlops(module.config, module.model, Entry(build_mechanism(preset, 3))).of(pack.layout)
    assert found(30, tiny.TOKENS) == pytest.approx(by_hand)


def mixed(draw: random.Random) -> tuple[int, int]:
    """Text and visual tokens of a document: captions, conversations, text alone, tiled pages, several images."""
    kinds = [
        lambda: (draw.randint(30, 200), 576),
        lambda: (draw.randint(100, 1500), 576),
        lambda: (min(2000, int(draw.lognormvariate(6, 1)) + 10), 0),
        lambda: (draw.randint(30, 300), 2880),
        lambda: (draw.randint(30, 300), 576 * draw.randint(2, 4)),
    ]
    return draw.choices(kinds, [3, 2, 2, 2, 1])[0]()


def step_flops_of_a_rank(seed: int, flops: Callable[[int, int], float], balanced: bool, steps: int) -> list[float]:
    """Of its packs of 4,096 tokens, chosen from 256 documents at a time as a loader process does."""
    draw, waiting, done = random.Random(seed), list[tuple[int, int]](), list[float]()
    while len(done) < steps:
        held = waiting + [mixed(draw) for _ in range(256 - len(waiting))]
        lengths, each = [sum(document) for document in held], [flops(*document) for document in held]
        packs = balance_packs(lengths, each, 4096) if balanced else plan_packs(lengths, 4096)
        waits = emptiest([[lengths[i] for i in pack] for pack in packs])
        waiting = [held[i] for i in packs.pop(waits)]
        done += [sum(each[i] for i in pack) for pack in packs]
    return done[:steps]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "two", "eight"),
    [
        ("llava", (1.03, 1.01), (1.06, 1.03)),
        ("ee_mllm", (1.04, 1.02), (1.09, 1.06)),
        ("vica", (1.33, 1.21), (2.16, 1.66)),
    ],
)
def test_ranks_need_as_long_for_a_step(tmp_path, preset, two, eight):
    """The slowest of the ranks beside their mean, in FLOPs of a 7B model, packed by tokens and by FLOPs: the numbers in
    docs/performance.md."""
    config, parts, mechanism = (
        tiny.config(tmp_path, "x", tmp_path),
        parts_of_shape("vicuna-7b"),
        build_mechanism(preset, 32),
    )
    model, _ = build_weightless(config, parts, mechanism)
    flops = StepFlops(config, model, Entry(mechanism)).of_document
    ranks = [[step_flops_of_a_rank(seed, flops, way, 400) for seed in range(8)] for way in (False, True)]
    for many, expected in ((2, two), (8, eight)):
        steps = [list(zip(*way[:many], strict=True)) for way in ranks]
        found = tuple(round(mean(max(step) / mean(step) for step in way), 2) for way in steps)
        assert found == expected, many


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
