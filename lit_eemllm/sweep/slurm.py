"""Tasks as jobs of a Slurm cluster, through submitit: those that are ready together are one job array.

A job runs the commands of its task one after the other. Before its time is up it saves and goes back into the queue. What it
has done is seen in the task's folder, which all machines share; nothing that a job returns is unpickled.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..console import console, read_object, write_atomically
from ..errors import UserError
from .execute import Job, devices
from .plan import Task
from .spec import Sweep, slug

COMMON = ("timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node")  # submitit's names; others are Slurm's own
DEFAULTS = {"timeout_min": 240, "signal_delay_s": 180, "max_num_timeout": 20}
LOOK = 2.0  # seconds between looks at the jobs
LAG = 30.0  # seconds until files that another machine has written are seen here
# Slurm sends SIGUSR2 to all processes of a job that must end. Submitit's own answers for the others.
WITHOUT_USR2 = ("sh", "-c", 'trap "" USR2; exec "$@"', "sh")
# Lightning starts a process per device by itself, as anywhere, instead of expecting a Slurm task per device.
ENVIRONMENT = {"SLURM_JOB_NAME": "interactive"}


class Cluster:
    """A `Place`. Jobs outlive a sweep that is killed: they stand in ``slurm/jobs.json``, and the next call waits for them.

    Args:
        jobs: at most so many in the queue; None = all that are ready.
        cluster: submitit's name of it.

    Raises:
        UserError: submitit or Slurm is not here.
    """

    def __init__(
        self, spec: Sweep, jobs: int | None, command: Sequence[str], imports: Sequence[Path], cluster: str = "slurm"
    ) -> None:
        try:
            import submitit
        except ImportError:
            raise UserError("--slurm needs submitit; install it with: pip install 'lit_eemllm[slurm]'") from None
        if cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
            raise UserError("--slurm: no sbatch and srun here; call it on a login node, or without --slurm")
        self.folder = spec.out / "slurm"
        options = {**DEFAULTS, **spec.slurm}
        timeouts = options.pop("max_num_timeout")
        self._executor = submitit.AutoExecutor(self.folder, cluster=cluster, slurm_max_num_timeout=timeouts)
        named = {name if name in COMMON else f"slurm_{name}": value for name, value in options.items()}
        self._executor.update_parameters(name=f"sweep-{slug(spec.file.stem)}", tasks_per_node=1, **named)
        self._count_devices = "gpus_per_node" not in options
        self._earlier = submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob
        self.jobs, self.command, self.imports = jobs, (*WITHOUT_USR2, *command), imports
        self._running: dict[str, tuple[Task, Any]] = {}
        self.file = self.folder / "jobs.json"
        known = read_object(self.file, mend="end its jobs (scancel), then remove it") if self.file.is_file() else {}
        self._known = {name: number for name, number in known.items() if re.fullmatch(r"\d+(_\d+)?", str(number))}
        self._over: dict[str, float] = {}  # jobs that have ended -> when that was seen
        self._looked = 0.0

    def start(self, tasks: Sequence[Task]) -> list[Task]:
        tasks = tasks if self.jobs is None else tasks[: max(0, self.jobs - len(self._running))]
        new = []
        for task in tasks:
            number = self._known.pop(task.name, None)
            job: Any = self._earlier(self.folder, number) if number is not None else None
            if job is not None and not job.done(force_check=True):
                console.print(
                    f"{task.name}: job {job.job_id} of an earlier call goes on (remove {self.file} if that is wrong)"
                )
                self._running[task.name] = task, job
            else:
                new.append(task)
        if new:
            if self._count_devices:
                most = max(devices(task.config) for task in new if task.config is not None)
                self._executor.update_parameters(gpus_per_node=most)
            with self._executor.batch():
                jobs = [self._executor.submit(Job(task, self.command, self.imports, ENVIRONMENT)) for task in new]
            self._running |= {task.name: (task, job) for task, job in zip(new, jobs, strict=True)}
        self._note()
        return list(tasks)

    def _note(self) -> None:
        running = {name: job.job_id for name, (_, job) in self._running.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, json.dumps({**self._known, **running}))

    def ended(self) -> list[tuple[Task, str]]:
        now = time.monotonic()
        if now - self._looked < LOOK:
            return []
        self._looked = now
        found = []
        for name, (task, job) in list(self._running.items()):
            if job.done() and (task.done or now - self._over.setdefault(name, now) >= LAG):
                del self._running[name]
                self._over.pop(name, None)
                found.append((task, f"job {job.job_id}: {job.state}"))
        if found:
            self._note()
        return found

    def stop(self) -> None:
        for _, job in self._running.values():
            job.cancel(check=False)
