"""What a training leaves, how it is broken off, and whether two are the same."""

import csv

import pytest
import torch

from lit_eemllm.console import metrics_files
from lit_eemllm.training.fit import fit
from lit_eemllm.training.module import LitEEMLLM


def metrics(run):
    """step -> row of all metrics files, later files win."""
    rows = {}
    for file in metrics_files(run):
        with file.open() as lines:
            rows |= {int(row["step"]): row for row in csv.DictReader(lines) if row["loss"]}
    return rows


def assert_same(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.equal(b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


def steps(run):
    """Of the checkpoints in its folder, in which there is nothing else but their shares."""
    names = [path.name for path in (run / "checkpoints").iterdir() if ".shards-" not in path.name]
    return sorted(int(name[5:-5]) for name in names)


def at_pack(monkeypatch, number, do):
    """`do(module, batch, loss)` gives the loss of the pack of that number, counted from 0."""
    right, seen = LitEEMLLM._loss, []

    def loss(self, batch):
        seen.append(batch.keys)
        value = right(self, batch)
        return do(self, batch, value) if len(seen) == number + 1 else value

    monkeypatch.setattr(LitEEMLLM, "_loss", loss)
    return seen


def validation_losses(run):
    """step -> loss, of all attempts."""
    rows = []
    for file in metrics_files(run):
        with file.open() as lines:
            rows += [(int(row["step"]), float(row["val_loss"])) for row in csv.DictReader(lines) if row.get("val_loss")]
    assert len(dict(rows)) == len(rows), "each once"
    return dict(rows)


class Killed(Exception):
    """Stands for a process that ends without a word."""


def killed(*_):
    raise Killed


def fit_until(step, config, asking=None):
    """Killed when the next step begins."""
    right = LitEEMLLM.training_step

    def killed(module, *arguments):
        if module.global_step == step:
            raise Killed
        return right(module, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LitEEMLLM, "training_step", killed)
        fit(config, asking)
