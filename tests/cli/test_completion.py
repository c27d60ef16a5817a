"""`completion`, in a real bash."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lit_eemllm import cli


@pytest.fixture
def script(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    assert cli.main(["completion", "bash"]) == 0
    made = tmp_path / "completion.bash"
    made.write_text(capfd.readouterr().out)
    return made


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        (["est"], ["estimate"]),
        (["shards", "pre"], ["prepare"]),
        (["bench", "--doc"], ["--documents"]),
        (["demo", "comp"], ["compare"]),
        (["fit", "my_"], ["my_model.yaml"]),
        (["report", "runs/fir"], ["runs/first"]),
        (["sweep", "my_"], ["my_model.yaml"]),
        (["convert", "--mechanism", "ee_"], ["ee_mllm", "ee_mllm_f"]),
        (["shards", "make", "--source", "shap"], ["shapes"]),
        (["explain", "--shape", "vic"], ["vicuna-7b", "vicuna-13b"]),
        (["bench", "--shape", "sma"], ["small"]),
        (["bench", "--systems", "llava", "shor"], ["shortv"]),
        (["configs", "copy", "configs/demo/ee_mllm."], ["configs/demo/ee_mllm.yaml"]),
        (["validate", "--checkpoint", "my_"], ["my_model.yaml"]),
    ],
)
def test_bash_completes(script: Path, tmp_path: Path, typed: list[str], completed: list[str]) -> None:
    (tmp_path / "my_model.yaml").touch()
    (tmp_path / "runs" / "first").mkdir(parents=True)
    words = ["lit-eemllm", *typed]
    program = r"""
        source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        function=$(complete -p lit-eemllm | sed 's/.*-F \([^ ]*\).*/\1/')
        "$function"; printf '%s\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", program, "bash", str(script), *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == completed, done.stderr


def test_zsh_knows_every_verb(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "zsh"]) == 0
    said = capfd.readouterr().out
    assert said.startswith("#compdef lit-eemllm") and all(
        name in said for name in ("estimate", "prepare", "--documents", "ee_mllm_f", "shapes", "vicuna-7b")
    )
