"""`completion`, in a real bash and a real zsh."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import time
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


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("est", ["estimate "]),
        ("fit my_", ["fit my_model.yaml "]),
        ("shards make --source shap", ["--source shapes "]),
        ("convert --mechanism ee_", ["ee_mllm ", "ee_mllm_f"]),
        ("explain --shape vic", ["vicuna-13b ", "vicuna-7b"]),
    ],
)
def test_zsh_completes(tmp_path: Path, capfd: pytest.CaptureFixture[str], typed: str, completed: list[str]) -> None:
    """As somebody types it and presses Tab twice."""
    assert cli.main(["completion", "zsh"]) == 0
    (tmp_path / "_lit-eemllm").write_text(capfd.readouterr().out)
    (tmp_path / "my_model.yaml").touch()
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe("zsh", ["zsh", "-f", "-i"], {"PATH": os.environ["PATH"], "TERM": "dumb", "HOME": str(tmp_path)})
    shown = ""

    def until(words: list[str]) -> None:
        nonlocal shown
        end = time.monotonic() + 30
        while not all(word in shown for word in words):
            assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], (words, shown)
            shown += os.read(terminal, 1 << 16).decode()

    try:
        os.write(
            terminal, f"fpath=('{tmp_path}' $fpath); autoload -Uz compinit; compinit -u -D; echo rea''dy\n".encode()
        )
        until(["ready"])
        shown = ""
        os.write(terminal, f"lit-eemllm {typed}\t\t".encode())
        until(completed)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)
