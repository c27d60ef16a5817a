"""Sweeps under Slurm: by submitit's local executor, and a stand-in of its commands."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from lib.sweeps import STAGES, SWEEP, calls, ran, run, start, started, until, wish, write

from lit_eemllm.errors import UserError
from lit_eemllm.sweep.plan import make_plan
from lit_eemllm.sweep.spec import read_sweep


@pytest.fixture
def local_cluster(monkeypatch):
    pytest.importorskip("submitit")
    from lit_eemllm.sweep import slurm

    monkeypatch.setattr(slurm, "LOOK", 0.2)
    monkeypatch.setattr(slurm, "LAG", 0.5)
    return {"slurm": True, "cluster": "local"}


@pytest.mark.slow
def test_slurm_jobs_by_submitit_on_this_machine(reports, local_cluster):
    wish(fail=["all/seed0"])
    text = SWEEP + STAGES + "slurm: {timeout_min: 7, partition: gpu, gpus_per_node: 0}\n"
    assert run(text, "data.train=only/there", **local_cluster) == 1
    assert sorted(ran()) == sorted(
        [("fit", f"pretrain/seed{s}") for s in (0, 1)]
        + [("fit", f"{c}/middle/seed{s}") for s in (0, 1) for c in ("v-o", "all")]
        + [("fit", f"{c}/seed{s}") for s in (0, 1) for c in ("v-o", "all")]
        + [("validate", name) for name in ("v-o/seed0", "v-o/seed1", "all/seed1")]
    )
    ends = {call["name"]: call for call in calls() if call["verb"] == "fit"}
    assert ends["pretrain/seed0"]["start"] < ends["v-o/middle/seed0"]["start"] < ends["v-o/seed0"]["start"]
    assert {call["SLURM_JOB_NAME"] for call in calls()} == {"interactive"}
    ((name, why),) = ((one["run"], one["why"]) for one in reports[0][2]["failed"])
    assert name == "all/seed0" and why.startswith("job ") and why.endswith("error: the disk is full")
    assert json.loads(Path("out/slurm/jobs.json").read_text()) == {}
    wish()
    assert run(text, "data.train=only/there", **local_cluster) == 0
    assert ran()[-2:] == [("fit", "all/seed0"), ("validate", "all/seed0")]


def test_jobs_of_an_earlier_call_go_on(monkeypatch):
    """Also those that become ready while others run, and those of calls before that one."""
    slurm = pytest.importorskip("lit_eemllm.sweep.slurm")
    monkeypatch.setattr(pytest.importorskip("submitit"), "LocalJob", lambda folder, number: SimpleNamespace(
        job_id=number, done=lambda force_check: False
    ))  # fmt: skip
    spec = read_sweep(write(SWEEP))
    file, tasks = Path("out/slurm/jobs.json"), list(make_plan(spec).tasks.values())
    slurm.Cluster(spec, None, ("false",), [], "local").start([])
    known = {"v-o/seed0": "11", "all/seed0": "12_3"}
    file.write_text(json.dumps(known))
    place = slurm.Cluster(spec, None, ("false",), [], "local")
    for ready in ([], tasks[:1], tasks[1:2]):
        assert place.start(ready) == ready and json.loads(file.read_text()) == known
    assert place.start([]) == []


def test_a_torn_list_of_jobs_is_named_with_what_to_do():
    slurm = pytest.importorskip("lit_eemllm.sweep.slurm")
    pytest.importorskip("submitit")
    file = Path("out/slurm/jobs.json")
    file.parent.mkdir(parents=True)
    file.write_text('{"v-o')
    with pytest.raises(UserError, match=r"jobs\.json: not valid JSON: .*; end its jobs \(scancel\), then remove it"):
        slurm.Cluster(read_sweep(write(SWEEP)), None, ("false",), [], "local")


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_and_goes_on(reports, local_cluster, monkeypatch):
    """As Slurm does it: SIGUSR2 to all processes of the job. The child must not die of it, but save."""
    wish(seconds=30)
    write("base: [base.yaml]\nout: out\nseeds: [0]\ncells: {a: {}}\n")
    process = start("slurm=True, cluster='local'")
    until(started, process)
    (child,) = started()
    job = int(Path(f"/proc/{child}/stat").read_text().split()[3])
    wish()
    os.kill(child, signal.SIGUSR2)
    os.kill(job, signal.SIGUSR2)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert Path("out/a/seed0/saved").is_file()
    assert [(call["verb"], call["end"]) for call in calls()] == [
        ("fit", "stopped"), ("fit", "done"), ("validate", "done")
    ]  # fmt: skip


SLURM = {
    "sbatch": """#!/bin/sh
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
cp "$1" "$PWD/$$.sh"
for i in $(seq 0 ${last:-0}); do
  [ -n "$last" ] && export SLURM_ARRAY_JOB_ID=$$ SLURM_ARRAY_TASK_ID=$i
  SLURM_JOB_ID=$(($$ + i)) sh "$PWD/$$.sh" > /dev/null 2>&1 &
done
echo "Submitted batch job $$"
""",
    "srun": """#!/bin/sh
while true; do
  case "$1" in --output | --error) shift 2 ;; --*) shift ;; *) break ;; esac
done
exec "$@"
""",
    "sacct": "#!/bin/sh\necho 'JobID|State|NodeList'\n",
}


@pytest.mark.slow
def test_slurm_gets_arrays_of_what_is_ready(reports, monkeypatch, folder):
    """Submitit's Slurm part, with programs that stand in for Slurm's and start the jobs here."""
    pytest.importorskip("submitit")
    monkeypatch.setattr("lit_eemllm.sweep.slurm.LOOK", 0.2)
    for name, text in SLURM.items():
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    text = SWEEP + "stages: [{name: first, shared: true}, {name: last}]\n"
    text += "slurm: {timeout_min: 7, partition: gpu, account: me}\n"
    assert run(text, "trainer.accelerator=gpu", "trainer.devices=3", slurm=True) == 0
    assert sorted(ran()[:2]) == [("fit", "first/seed0"), ("fit", "first/seed1")]
    assert sorted(ran()[2:]) == [
        (v, f"{c}/seed{s}") for v in ("fit", "validate") for c in ("all", "v-o") for s in (0, 1)
    ]
    scripts = sorted(Path().glob("[0-9]*.sh"), key=lambda path: path.stat().st_mtime)
    assert len(scripts) >= 2
    lines = scripts[0].read_text().splitlines()
    for line in ("array=0-1%2", "partition=gpu", "account=me", "time=7", "gpus-per-node=3", "signal=USR2@180",
                 "ntasks-per-node=1", "job-name=sweep-sweep"):  # fmt: skip
        assert f"#SBATCH --{line}" in lines, lines


def test_slurm_without_slurm(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no sbatch and srun here"):
        run(slurm=True)
