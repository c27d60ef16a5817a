"""Sweeps that are broken, killed and stopped, and several at once: what goes on, what waits, what is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lib.sweeps import FAKE, SEARCH, STAGES, SWEEP, calls, ran, run, start, started, until, wish, write
from rich.console import Console

from lit_eemllm import cli
from lit_eemllm.errors import UserError
from lit_eemllm.locks import try_lock
from lit_eemllm.sweep import sweep
from lit_eemllm.sweep.execute import Job, visible_devices


def test_the_others_go_on_when_one_fails_and_the_next_call_tries_again(reports, capsys):
    wish(fail=["pretrain/seed0", "all/seed1"])
    assert run(SWEEP + STAGES) == 1
    index = json.loads(Path("out/sweep.json").read_text())
    assert index["rows"] == [{"name": "V+O", "runs": ["v-o/seed1"]}] and len(reports) == 1
    why = {one["run"]: one["why"] for one in index["failed"]}
    assert list(why) == [
        "pretrain/seed0", "v-o/middle/seed0", "v-o/seed0", "all/middle/seed0", "all/seed0", "all/seed1"
    ]  # fmt: skip
    assert why["v-o/middle/seed0"] == "it needs pretrain/seed0, which failed"
    assert why["all/seed1"].startswith("exit status 2; out/all/seed1/log.txt ends:\n    line 29\n")
    assert why["all/seed1"].endswith("error: the disk is full")
    assert "error: the disk is full" in capsys.readouterr().out
    wish()
    count = len(calls())
    assert run(SWEEP + STAGES) == 0
    assert [name for verb, name in ran()[count:] if verb == "fit"] == [
        "pretrain/seed0", "v-o/middle/seed0", "v-o/seed0", "all/middle/seed0", "all/seed0", "all/seed1"
    ]  # fmt: skip
    assert json.loads(Path("out/sweep.json").read_text())["failed"] == []


def test_a_run_that_ends_well_but_leaves_nothing_has_failed(reports):
    assert sweep(write(SWEEP), command=("true",)) == 1
    why = json.loads(Path("out/sweep.json").read_text())["failed"][0]["why"]
    assert (
        why
        == "exit status 0; out/v-o/seed0/log.txt ends:\n    $ lit-eemllm fit out/v-o/seed0\n    $ lit-eemllm validate out/v-o/seed0"
    )
    assert sweep(write(SWEEP), command=("/no/such/program",)) == 1
    why = json.loads(Path("out/sweep.json").read_text())["failed"][0]["why"]
    assert why.startswith("FileNotFoundError: [Errno 2] No such file or directory: '/no/such/program'")
    assert not reports


def test_a_report_without_its_baseline(reports):
    wish(fail=["v-o/seed0", "v-o/seed1"])
    assert run() == 1
    assert reports[0][2]["baseline"] is None and [row["name"] for row in reports[0][2]["rows"]] == ["all"]


def test_two_sweeps_on_one_directory_and_signals(folder, reports):
    wish(seconds=30)
    write(SWEEP)
    process = start()
    until(lambda: len(started()) == 2, process)
    with pytest.raises(UserError, match=rf"out: another sweep is running here \(process {process.pid} on "):
        run()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert "SIGTERM: 2 running save and end; once more ends them at once" in out
    assert "0 of 4 done; the same command continues" in out
    assert sorted(path.parent.parent.name for path in Path("out").rglob("saved")) == ["all", "v-o"]
    assert json.loads(Path("out/sweep.json").read_text())["failed"] == []
    wish()
    assert run() == 0


def test_what_a_killed_sweep_left_running_is_asked_to_save_and_then_continued(reports):
    wish(seconds=30)
    write(SWEEP)
    process = start()
    until(lambda: len(started()) == 2, process)
    process.kill()
    process.communicate()
    orphans = started()
    wish()
    assert run(jobs=2) == 0
    assert [call["end"] for call in calls()[:2]] == ["stopped"] * 2 and {c["pid"] for c in calls()[:2]} == set(orphans)
    log = Path("out/v-o/seed0/log.txt").read_text()
    assert "which an earlier call has left, to save and end" in log and log.count("$ lit-eemllm fit") == 2


def test_a_report_can_be_made_of_what_has_ended_and_is_made_again_when_more_has(reports):
    """While a sweep runs, and after it was killed; its own report is made anew if the tables are newer."""
    wish(slow=["all/seed1"], fail=["v-o/seed1"])
    write(SWEEP)
    process = start("jobs=1")
    until(lambda: len(started()) == 4, process)
    index = json.loads(Path("out/sweep.json").read_text())
    process.kill()
    process.communicate()
    assert index["rows"] == [{"name": "V+O", "runs": ["v-o/seed0"]}, {"name": "all", "runs": ["all/seed0"]}]
    assert [one["run"] for one in index["failed"]] == ["v-o/seed1"]
    assert json.loads(Path("out/sweep.json").read_text()) == index
    wish()
    assert run() == 0 and len(reports) == 1
    assert run() == 0 and len(reports) == 1
    later = Path("out/report/report.md").stat().st_mtime_ns + 10**9
    os.utime("out/sweep.json", ns=(later, later))
    assert run() == 0 and len(reports) == 2


def test_a_process_of_another_machine_is_waited_for_but_not_signalled():
    """Its number may be that of any process here."""
    process = subprocess.Popen(["sleep", "60"])
    with Path(".lock").open("w") as lock:
        assert try_lock(lock)
        print("elsewhere", process.pid, file=lock, flush=True)
        job = Job(SimpleNamespace(commands=list, folder=Path()), FAKE, [], {})
        thread = threading.Thread(target=job)
        thread.start()
        log = Path("log.txt")
        until(lambda: log.is_file() and f"waiting for process {process.pid} on elsewhere" in log.read_text())
        time.sleep(0.1)
        waits, status = thread.is_alive(), process.poll()
    thread.join(20)
    process.kill()
    process.wait()
    assert waits and status is None and not thread.is_alive()


@pytest.mark.parametrize(
    ("named", "expected"),
    [("4,GPU-7", ["4", "GPU-7"]), ("-1", []), ("", []), ("1,-1,2", ["1"]), ("NoDevFiles", []), ("3,,2", ["3"])],
)
def test_devices_end_at_the_first_that_is_none(named, expected, monkeypatch):
    """As CUDA reads the list."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_devices() == expected


def test_jobs_at_once_each_with_its_devices_or_threads(reports, monkeypatch):
    wish(seconds=0.5)
    monkeypatch.setattr("lit_eemllm.sweep.execute.cores", lambda: 8)
    assert run(SWEEP, "seeds=[0, 1, 2]", jobs=3) == 0
    fits = [call for call in calls() if call["verb"] == "fit"]
    assert {call["OMP_NUM_THREADS"] for call in calls()} == {"2"} and {c["CUDA_VISIBLE_DEVICES"] for c in fits} == {
        None
    }
    most = max(sum(a["start"] <= b["start"] < a["start"] + 0.5 for a in fits) for b in fits)
    assert most == 3

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run(SWEEP, "trainer.accelerator=auto", "trainer.devices=2", "out=out/two", jobs=3) == 0
    assert run(SWEEP, "trainer.accelerator=gpu", "out=out/one", jobs=3) == 0
    two, one = ([c for c in calls() if c["name"].startswith(name)] for name in ("two", "one"))
    assert {c["CUDA_VISIBLE_DEVICES"] for c in two} <= {"4,5", "5,GPU-7", "4,GPU-7", "GPU-7,4"} and two
    starts = sorted(c["start"] for c in two if c["verb"] == "fit")
    assert all(b - a >= 0.5 for a, b in zip(starts, starts[1:], strict=False)), "devices for one at a time"
    assert {c["CUDA_VISIBLE_DEVICES"] for c in one} == {"4", "5", "GPU-7"}
    assert {c["OMP_NUM_THREADS"] for c in two + one} == {"1"}


def test_user_code_is_handed_on(reports):
    assert run(imports=[Path("mine.py")]) == 0
    assert {tuple(call["rest"]) for call in calls()} == {("--import", "mine.py")}
    assert reports[0][2]["command"] == "lit-eemllm sweep sweep.yaml --import mine.py"


def test_the_verb(monkeypatch, capsys):
    made = []
    monkeypatch.setattr("lit_eemllm.sweep.sweep", lambda *args: made.append(args) or 1)
    Path("mine.py").write_text("")
    line = ["sweep", "seeds=[0]", "a.yaml", "--jobs", "3", "--import", "mine.py", "--dry-run", "optim.lr=1"]
    assert cli.main(line) == 1 and cli.main(["sweep", "a.yaml", "--slurm"]) == 1
    assert made == [
        (Path("a.yaml"), ["seeds=[0]", "optim.lr=1"], 3, True, False, [Path("mine.py")]),
        (Path("a.yaml"), [], None, False, True, []),
    ]
    assert cli.main(["sweep", "a.yaml", "b.yaml"]) == 2
    assert "expected one sweep file, found a.yaml b.yaml" in capsys.readouterr().err


def test_the_table_on_a_terminal(reports, monkeypatch):
    console = Console(force_terminal=True, width=100, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    monkeypatch.setattr("lit_eemllm.sweep.status.console", console)
    wish(seconds=1.5, fail=["v-o/seed0"])
    assert run(SWEEP + SEARCH.replace("1e-4, 1e-3, 1e-2", "1e-3"), jobs=2) == 1
    shown = console.export_text()
    assert (
        "step 3/5, loss 1.500" in shown
        and "step 3/10, loss 1.500, 2 s" in shown
        and "0.990" in shown
        and "failed" in shown
    )
    assert "min left" in shown or "s left" in shown


def test_torn_results_are_named_with_what_to_do(reports, monkeypatch):
    """A trial's score is needed. A run's is only shown, by the table on a terminal too, which must not end the sweep."""
    assert run(SWEEP + SEARCH) == 0
    shown, trial = Path("out/v-o/seed0/eval/results.json"), Path("out/search/v-o/lr-0.001/eval/results.json")
    shown.write_text('{"average": ')
    Path("out/all/seed0/eval/results.json").unlink()
    console = Console(force_terminal=True, width=100, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    monkeypatch.setattr("lit_eemllm.sweep.status.console", console)
    assert run(SWEEP + SEARCH) == 0 and "unreadable" in console.export_text()

    trial.write_text("[]")
    with pytest.raises(UserError, match=f"{trial}: found a list, .*; remove it; the sweep evaluates that run again"):
        run(SWEEP + SEARCH)
    trial.unlink()
    assert run(SWEEP + SEARCH) == 0 and json.loads(trial.read_text())["loss"]
