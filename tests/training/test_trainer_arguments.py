"""Arguments of lightning.Trainer that a configuration may set do what they say, and change nothing else; and what Slurm asks for."""

import gzip
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny
import torch
from lib.runs import assert_same, at_pack, metrics, steps

from lit_eemllm.errors import ConfigError
from lit_eemllm.training.checkpoint import newest_checkpoint, read_checkpoint
from lit_eemllm.training.fit import fit
from lit_eemllm.training.guard import Stopped
from lit_eemllm.training.module import LitEEMLLM

OPTIONS = ("optim.max_steps=4", "optim.val_every=4", "optim.save_every=99")
SECTIONS = ("state_dict", "optimizer_states", "rng", "global_step")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, parts, shapes):
    out = tmp_path_factory.mktemp("plain")
    fit(tiny.config(parts, shapes, out, *OPTIONS))
    return out


def assert_same_end(out, plain):
    ends = [read_checkpoint(newest_checkpoint(run)) for run in (out, plain)]
    for section in SECTIONS:
        assert_same(ends[0][section], ends[1][section], section)


def test_what_can_be_set_works(tmp_path, parts, shapes, plain, monkeypatch):
    """Of the others, accelerator, devices, nodes, strategy, precision and accumulation, the tests of training and of many ranks tell."""
    seen = {"validation": []}
    validated = LitEEMLLM.validation_step

    def validation_step(module, batch, index):
        seen["validation"].append((module.global_step, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return validated(module, batch, index)

    def look(module, batch, loss):
        seen["modes"] = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_anomaly_enabled(),
            torch.backends.cudnn.benchmark,
        )
        return loss

    monkeypatch.setattr(LitEEMLLM, "validation_step", validation_step)
    at_pack(monkeypatch, 2, look)
    arguments = [
        "num_sanity_val_steps=1",
        "deterministic=true",
        "detect_anomaly=true",
        "benchmark=true",
        "inference_mode=false",
    ]
    try:
        fit(
            tiny.config(
                parts, shapes, tmp_path, *OPTIONS, *(f"trainer.{one}" for one in arguments), "trainer.profiler=simple"
            )
        )
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
    assert seen["modes"] == (True, True, True)
    assert seen["validation"] == [(0, False, False), *[(4, False, False)] * 2], "one pack before training"
    assert "run_training_batch" in (tmp_path / "fit-simple.txt").read_text()
    assert_same_end(tmp_path, plain)
    assert set(metrics(tmp_path)) == {1, 2, 3, 4}
    with pytest.raises(ConfigError, match=r"trainer.profiler: found 'xla', expected simple or advanced or pytorch"):
        fit(tiny.config(parts, shapes, tmp_path, *OPTIONS, "trainer.profiler=xla"))


def test_a_trace_is_of_three_packs(tmp_path, parts, shapes):
    """Whatever is validated before and meanwhile."""
    options = ("optim.max_steps=14", "optim.val_every=4", "optim.val_batches=1", "optim.save_every=99")
    fit(tiny.config(parts, shapes, tmp_path, *options, "trainer.profiler=pytorch"))
    with gzip.open(tmp_path / "fit-pytorch-0.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert [name for name in names if name.startswith("ProfilerStep")] == [f"ProfilerStep#{n}" for n in (10, 11, 12)]
    assert names.count("[pl][profile]run_training_batch") == 3 and any("self_attn.q_proj" in name for name in names)
    assert "run_training_batch" in (tmp_path / "fit-pytorch.txt").read_text()


def test_under_slurm_a_run_is_saved_after_a_step_and_begins_from_none_of_others(
    tmp_path, parts, shapes, plain, monkeypatch, capfd
):
    """In the current folder lies what Lightning saved there for another run. SIGUSR1 comes in the middle of an accumulation."""
    job = {
        "JOB_ID": "5",
        "JOB_NAME": "train",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
        "NTASKS": "1",
        "NNODES": "1",
    }
    for name, value in {**job, "JOB_NUM_NODES": "1", "NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    programs, here = tmp_path / "bin", tmp_path / "here"
    for folder in (programs, here):
        folder.mkdir()
    (programs / "scontrol").write_text("#!/bin/sh\necho scontrol $*\n")
    (programs / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(here)
    shutil.copy(newest_checkpoint(plain), here / "hpc_ckpt_1.ckpt")
    options = (*OPTIONS, "data.val=null", "trainer.accumulate_grad_batches=2")
    whole, config = (tiny.config(parts, shapes, tmp_path / name, *options) for name in ("whole", "run"))
    fit(whole)
    assert sorted(metrics(tmp_path / "whole")) == [1, 2, 3, 4]

    def ask(module, batch, loss):
        os.kill(os.getpid(), signal.SIGUSR1)
        return loss

    with monkeypatch.context() as patch:
        at_pack(patch, 2, ask)
        with pytest.raises(Stopped) as stopped:
            fit(config)
    assert stopped.value.code == 128 + signal.SIGUSR1 and steps(tmp_path / "run") == [2]
    assert capfd.readouterr().out.endswith("scontrol requeue 5\n")
    fit(config)
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    assert [path.name for path in tmp_path.rglob("hpc_*")] == ["hpc_ckpt_1.ckpt"] and Path.cwd() == here
