"""What earlier versions wrote goes on: runs resume, and folders hold the mechanism that they held.

tests/old/before_tables.tar.gz was written by the last commit before mechanisms were tables (43cf7dd): parts and shards of
tests/tiny.py, two runs stopped after 4 of 8 steps, and the weights with which that commit ended them.
"""

import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import max_error

from lit_eemllm import cli
from lit_eemllm.mechanisms import PRESETS, Aligner, Mechanism
from lit_eemllm.mechanisms.flamingo import Flamingo, Gated

OLD = Path(__file__).parent / "old" / "before_tables.tar.gz"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The current folder is the one in which that version ran."""
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("run", ["ee_mllm", "flamingo"])
def test_a_run_of_before_goes_on_as_it_would_have(run, old, capsys):
    assert cli.main(["fit", f"runs/{run}"]) == 0
    out = capsys.readouterr().out
    assert "step      8" in out and "step      4" not in out
    found = torch.load(f"runs/{run}/checkpoints/step-8.ckpt", weights_only=True)["state_dict"]
    true = load_file(f"runs/{run}/step-8.safetensors")
    assert found.keys() == true.keys()
    assert (
        max(max_error(found[name], tensor) for name, tensor in true.items()) <= 1e-4
    )  # kernels add up in another order


def test_a_run_under_a_strategy_that_has_gone_goes_on_under_another(old, capsys):
    config = Path("runs/ee_mllm/config.yaml")
    written = yaml.safe_load(config.read_text())
    written["trainer"]["strategy"] = "deepspeed_stage_2"
    config.write_text(yaml.safe_dump(written))
    assert cli.main(["fit", "runs/ee_mllm"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "trainer.strategy: found 'deepspeed_stage_2', expected auto or ddp or fsdp2 or fsdp2_offload or hsdp. Instead"
        in said
    )
    assert "trainer.strategy=fsdp2 " in said and said.endswith("goes on under it.") and "Traceback" not in said
    assert cli.main(["fit", "runs/ee_mllm", "trainer.strategy=auto"]) == 0
    assert "step      8" in (out := capsys.readouterr().out) and "step      4" not in out


def test_mechanisms_in_configs_of_before():
    """Every field stood in every mechanism, that of gated cross-attention too."""
    old = {
        "dense_layers": "none",
        "cross_layers": "all",
        "visual_source": "stream",
        "visual_window": 0,
        "visual_drop": [],
    }
    old |= {
        "aligner": {"value": True, "output": True, "ffn": True},
        "visual_positions": "sequence",
        "freeze_prefix": False,
    }
    assert Mechanism.from_dict({**old, "gated": None}) == PRESETS["ee_mllm"] == Mechanism.from_dict(old)
    changed = {**old, "dense_layers": [0, 2], "aligner": {"value": False, "output": False, "ffn": True}, "gated": None}
    changed["visual_drop"] = [[1, 0.25]]
    expected = Mechanism((0, 2), aligner=Aligner(False, False), visual_drop=((1, 0.25),))
    assert Mechanism.from_dict(changed) == expected
    off = {"value": False, "output": False, "ffn": False}
    gated = {"every": 2, "latents": 5, "heads": 3, "head_size": 7, "depth": 4, "immediate": False}
    flamingo = {**old, "cross_layers": "none", "aligner": off, "visual_positions": "none", "gated": gated}
    assert Mechanism.from_dict(flamingo) == Flamingo(gated=Gated(2, 5, 3, 7, 4, False))
