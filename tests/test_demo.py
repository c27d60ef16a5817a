"""The demo's commands, and what is tried before any of them: a break is named before minutes of training are spent on it."""

from __future__ import annotations

import re
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_eemllm import cli, demo, preflight
from lit_eemllm.errors import UserError
from lit_eemllm.model import EEMLLM

GIB = 2**30
TEMPORARY = f"disk of {tempfile.gettempdir()}"
EE_MLLM = "configs/demo/ee_mllm.yaml"


@pytest.fixture(autouse=True)
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("runs")


@pytest.mark.slow
def test_all_is_well_and_nothing_is_left(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight.preflight([EE_MLLM, "configs/demo/saisa.yaml"], out)
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"[^:]+: good, .+", line) for line in lines), lines
    names = [line.partition(":")[0] for line in lines]
    assert names[:4] == ["Python", "disk of runs", TEMPORARY, "memory"]
    steps = [
        "pictures",
        "tokenizer and encoder",
        "decoder",
        "answer of the untrained ee_mllm",
        "answer of the untrained saisa",
    ]
    assert names[-8:] == [*steps, "training", "scoring", "report"]
    assert f"torch: good, {metadata.version('torch')}" in lines
    assert {"transformers", "megatron-energon", "pillow"} < set(names) and "pytest" not in names, "no extra"
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("disk", "memory", "python", "failed"),
    [
        (
            0.2,
            8,
            (3, 10),
            {"disk of runs": "FAILED: 0.2 GiB are free, 1 GiB are needed", TEMPORARY: ": 0.2 GiB are free, 0.5 "},
        ),
        (8, 0.5, (3, 10), {"memory": "FAILED: 0.5 GiB are free, 2 GiB are needed"}),
        (8, 1.996, (3, 10), {"memory": "FAILED: 1.99 GiB are free, 2 GiB are needed"}),
        (0.7, 0.5, (3, 10), {"disk of runs": "FAILED: 0.7 ", "memory": "FAILED: 0.5 "}),
        (8, 8, (4, 1), {"Python": "expected 4.1 or newer"}),
    ],
)
def test_too_small_a_machine(out, monkeypatch, capsys, disk, memory, python, failed):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=int(disk * GIB)))
    monkeypatch.setattr(preflight, "free_memory", lambda: int(memory * GIB))
    monkeypatch.setattr(preflight, "PYTHON", python)
    monkeypatch.setattr(preflight, "library_checks", list)
    assert not preflight.preflight([EE_MLLM], out)
    lines = capsys.readouterr().out.splitlines()
    found = {line.partition(": FAILED: ")[0]: line for line in lines if "FAILED" in line}
    assert found.keys() == failed.keys() and all(text in found[name] for name, text in failed.items())
    advice = [line for line in lines if line.startswith("    ")]
    assert len(advice) == len(failed), "what to do, and no library is blamed"
    assert len(lines) == 4 + len(failed), "no step is tried"


def test_a_folder_that_cannot_be_written(out, monkeypatch, capsys):
    def refused(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    assert not preflight.passes(preflight.machine_checks(out)[1])
    said = capsys.readouterr().out
    assert "disk of runs: FAILED: PermissionError: [Errno 13]" in said and "another disk" in said


def test_memory_that_is_not_known_is_not_asked_for(out, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "free_memory", lambda: None)
    assert preflight.passes(preflight.machine_checks(out)[3])
    assert capsys.readouterr().out == "memory: good, not known here, so not checked\n"


def test_free_memory_is_the_machines_or_what_a_container_leaves(tmp_path):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    assert preflight.free_memory(proc, cgroup) is None
    for folder, name, text in (
        (proc, "meminfo", "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n"),
        (cgroup, "memory.current", "700000\n"),
        (cgroup, "memory.stat", "anon 9\nactive_file 5\ninactive_file 20000\n"),
    ):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    assert preflight.free_memory(proc, cgroup) == 4_096_000, "no container"
    for limit, free in (("max", 4_096_000), ("1000000", 320_000), ("9000000000", 4_096_000)):
        (cgroup / "memory.max").write_text(limit)
        assert preflight.free_memory(proc, cgroup) == free


def test_a_library_that_cannot_be_imported_is_named(out, monkeypatch, capsys):
    def import_module(name: str) -> None:
        if name == "megatron.energon":
            raise ImportError("cannot import name 'renamed'")

    monkeypatch.setattr(preflight, "import_module", import_module)
    monkeypatch.setattr(preflight, "step_checks", None)
    assert not preflight.preflight([EE_MLLM], out)
    lines = capsys.readouterr().out.splitlines()
    (where,) = [i for i, line in enumerate(lines) if "FAILED" in line]
    version = metadata.version("megatron-energon")
    assert lines[where] == "megatron-energon: FAILED: ImportError: cannot import name 'renamed'"
    assert f"megatron-energon {version}" in lines[where + 1] and f"'megatron-energon<{version}'" in lines[where + 1]
    assert "pip install --force-reinstall --no-deps megatron-energon" in lines[where + 1]
    assert len(lines) > where + 2, "the other libraries are tried too"


def test_a_library_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(metadata, "requires", lambda name: ["no-such-package>=2"])
    (check,) = preflight.library_checks()
    assert not preflight.passes(check)
    said = "no-such-package: FAILED: not installed; pip install 'no-such-package>=2'\n"
    assert capsys.readouterr().out == said


def test_a_version_outside_of_the_bounds_is_said_but_tried(monkeypatch, capsys):
    version, asked = metadata.version("peft"), ["peft<0.1", "pytest; extra == 'test'"]
    monkeypatch.setattr(metadata, "requires", lambda name: asked)
    (check,) = preflight.library_checks()
    assert preflight.passes(check)
    assert capsys.readouterr().out == f"peft: good, {version}, but <0.1 is what lit_eemllm was tested with\n"


def test_a_generate_that_a_new_version_broke_is_named(out, monkeypatch, capsys):
    """transformers hands an argument that it has renamed to our method, as it happened."""
    method = "prepare_inputs_for_generation"
    monkeypatch.setattr(EEMLLM, method, lambda self, input_ids, attention_mask=None, pixel_values=None: {})
    monkeypatch.setattr(preflight, "library_checks", list)
    assert not preflight.preflight([EE_MLLM], out)
    lines = capsys.readouterr().out.splitlines()
    (where,) = [i for i, line in enumerate(lines) if "FAILED" in line]
    assert lines[where].startswith("answer of the untrained ee_mllm: FAILED: TypeError: ")
    assert "got an unexpected keyword argument" in lines[where]
    version = metadata.version("transformers")
    assert lines[where + 1].startswith(
        f"    This comes from transformers {version}, in transformers/generation/utils.py, line "
    )
    assert f"try an older one: pip install 'transformers<{version}'; if its files are" in lines[where + 1]
    assert not any(line.startswith(("training", "scoring")) for line in lines), "steps end with the first that fails"
    assert not list(out.iterdir())


def test_an_error_of_our_own_code_blames_what_the_step_uses(capsys):
    def broken() -> str:
        return preflight._enough("a", 1)  # type: ignore[arg-type]

    assert not preflight.passes(preflight.Check("step", broken, ("torch", "no-such-package")))
    assert f"    This probably comes from torch {metadata.version('torch')}. If" in capsys.readouterr().out

    called_back = torch.inference_mode()(broken)  # a frame of torch lies around ours, which has not failed
    assert not preflight.passes(preflight.Check("step", called_back, ("transformers",)))
    assert f"    This probably comes from transformers {metadata.version('transformers')}. " in capsys.readouterr().out

    def refused() -> str:
        print("what was said before")
        raise UserError("the disk is full")

    assert not preflight.passes(preflight.Check("step", refused, ("torch",)))
    said = "step: FAILED: the disk is full\n    what was said before\n"
    assert capsys.readouterr().out == said, "a message of ours says itself what to do"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the demo asks of a process of its own, run in this one."""
    found: list[list[str]] = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        found.append(command[2:])
        return SimpleNamespace(returncode=cli.main(command[2:]))

    monkeypatch.setattr(demo.subprocess, "run", run)
    return found


@pytest.mark.parametrize("name", demo.JOURNEYS)
def test_every_command_of_a_journey_is_one(name, monkeypatch, capsys, asked):
    commands: list[list[str]] = []
    monkeypatch.setattr(demo, "run", lambda *words: commands.append([str(word) for word in words]))
    monkeypatch.setattr(demo, "kill_and_resume", lambda *_: None)
    monkeypatch.setattr(demo, "preflight", lambda configs, out: all(cli.parse(["fit", config]) for config in configs))
    assert cli.main(["demo", name]) == 0 and asked == [["demo", name, "--check"]]
    headings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("=== ")]
    assert len(headings) == len(commands) + (name == "demo"), "each command has its own, and so has what is killed"
    left = [int(re.search(r"about (\d+) minutes left", line)[1]) for line in headings]
    assert left == sorted(left, reverse=True) and left[0] == {"demo": 9, "compare": 25, "mechanisms": 52}[name]
    last = {"demo": ["report", "bench"]}.get(name, ["report"])
    assert (
        headings[-len(last)].endswith("minutes left on two CPU cores")
        and f" {len(headings)}: compare all" in headings[-len(last)]
    )
    for words in commands:
        cli.parse(words)
        for word in words:
            assert not word.startswith("configs/") or cli.main(["config", "check", word]) == 0 or "long" in word
    trained = [words for words in commands if words[0] == "fit"]
    assert len(trained) == {"demo": 2, "compare": 6, "mechanisms": 16}[name]
    assert commands[0][:2] == ["shards", "make"] and [words[0] for words in commands[-len(last) :]] == last
    assert len(commands[-len(last)]) - 3 == len(trained) + len(demo.FREE) * (name == "mechanisms")


def test_nothing_is_trained_where_a_check_fails(monkeypatch, capsys, asked):
    commands: list[tuple] = []
    monkeypatch.setattr(demo, "run", lambda *words: commands.append(words))
    monkeypatch.setattr(demo, "kill_and_resume", lambda *_: None)
    monkeypatch.setattr(demo, "preflight", lambda configs, out: False)
    assert cli.main(["demo", "--check"]) == 2
    assert cli.main(["demo"]) == 2 and not commands
    said = capsys.readouterr()
    assert "mend what failed above, or try all the same: --force" in said.err and "All is well" not in said.out
    assert cli.main(["demo", "--force"]) == 0 and commands
    assert asked == [["demo", "demo", "--check"]] * 2
    monkeypatch.setattr(demo, "preflight", lambda configs, out: True)
    capsys.readouterr()
    assert cli.main(["demo", "--check"]) == 0 and capsys.readouterr().out.startswith("All is well, after 0 s.")
