"""Protect the work of a run: save checkpoints on time, and stop on request after a whole step.

A step is an optimiser step: a checkpoint in the middle of one would lose the gradients accumulated so far, and the continued
run would not equal the unbroken one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from ..compat.lightning import begin_validation_anew, set_max_steps, validate_now, validation_ahead
from ..compat.torch import lost_rank
from ..console import console, unfinished
from ..data.workers import lost_worker
from ..errors import UserError, WriteError
from .best import Best
from .checkpoint import FOLDER, all_checkpoints, save, set_aside, step_of
from .fsdp2 import settle
from .sharded import forget_unfinished

if TYPE_CHECKING:
    from ..config.keys import Config

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SLURM = "SLURM_JOB_ID"
BEST = "best.ckpt"
"""Beside the checkpoints, a link to the best."""


class Stopped(SystemExit):
    """The run has stopped on request. Rank 0 exits as a process ended by the signal does, with status 128 + its number.

    Other ranks exit with 0: launchers take any other status of theirs for a failure.
    """


class Checkpoints(Checkpoint):
    """Saves every `optim.save_every` steps, keeps the newest `optim.keep` and the best, and stops the run when a signal asks for it or no
    validation has been better for `optim.patience` of them.

    After the first SIGTERM or SIGINT all ranks finish the optimiser step (`check_step` tells them), save and exit. In a validation,
    which may be long, they finish one pack; it begins anew on resume. A second signal stops at once. Lightning's own handlers, which
    would stop or save between micro-batches, are replaced. Under Slurm SIGUSR1 does the same and requeues the job, as Lightning's.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.out) / FOLDER
        self.asked: signal.Signals | None = None
        self.best = Best(config)
        self._module: Any = None
        self._process = os.getpid()
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._module, self.config = pl_module, pl_module.config  # where `fit` has turned epochs into steps
        self._listen()

    def state_dict(self) -> dict[str, Any]:
        return self.best.state() if self.best.wanted else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best.restore(state)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._listen()  # again: Lightning has installed its own handlers since
        self._step = trainer.global_step
        if trainer.is_global_zero:
            for unfinished in self.folder.glob(".*.unfinished"):  # of a process that was killed while it saved
                unfinished.unlink(missing_ok=True)
            forget_unfinished(self.folder)
            folder = (
                None
                if trainer.ckpt_path is None
                else set_aside(self.folder.parent, Path(trainer.ckpt_path), self._step)
            )
            if folder is not None:
                console.print(f"the run went back to step {self._step}: its later checkpoints were moved to {folder}")
        self._link_best(trainer)
        trainer.should_stop = self.best.exhausted
        if self._somebody_was_asked(trainer):
            self._stop(trainer, "before this process trained anything")
        if self._step == self.config.optim.steps:  # all steps are done, only the last validation is left
            validate_now(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        if step == self._step:  # the optimiser step goes on
            return
        self._step = step
        if trainer.logger.failed is not None:  # type: ignore[union-attr]
            pl_module.step.stop_asked = True  # the other ranks learn it in the next step
        asked = pl_module.step.stop_agreed if trainer.world_size > 1 else pl_module.step.stop_asked
        optim, validates = self.config.optim, self.config.data.val is not None
        stop = asked and step < optim.steps
        if step == optim.steps:
            validate_now(trainer)
        if stop or step % optim.save_every == 0:
            due = validates and (step % optim.val_every == 0 or step == optim.steps)
            with (
                validation_ahead(trainer) if due else contextlib.nullcontext()
            ):  # the run may be killed before that validation has ended
                path = self._save(trainer)
        if stop:
            settle(trainer)
            self._stop(trainer, f"after step {step}, saved as {path}")

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        set_max_steps(trainer, self.config.optim.steps)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        step, better = trainer.global_step, False
        if self.best.wanted:
            better = self.best.note(float(trainer.callback_metrics[self.best.monitored]), step)
            trainer.should_stop = self.best.exhausted
        if better:  # the one before is there until this one is
            save(trainer, self.folder / f"step-{step}.ckpt")
            settle(trainer)
            self._link_best(trainer)
            self._remove_old(trainer)
        elif trainer.should_stop or step == self.config.optim.steps:
            self._save(trainer)  # without a validation that is pending

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking and self._somebody_was_asked(trainer):
            begin_validation_anew(trainer)
            path = self._save(trainer)
            settle(trainer)
            self._stop(trainer, f"in the validation after step {trainer.global_step}, saved as {path}")

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        settle(trainer)
        self._remove_old(trainer)
        if self.best.exhausted and trainer.global_step < self.config.optim.steps:
            console.print(
                f"stopped early: {self.best.waited} validations since step {self.best.step} were no better, and optim.patience is "
                f"{self.best.patience}; a larger one continues the run"
            )

    def _save(self, trainer: Trainer) -> Path:
        path = self.folder / f"step-{trainer.global_step}.ckpt"
        save(trainer, path)
        self._remove_old(trainer)
        return path

    def _remove_old(self, trainer: Trainer) -> None:
        """Delete checkpoints but the best and the newest `optim.keep`; one that is still being written does not count."""
        if trainer.is_global_zero:
            for old in all_checkpoints(Path(self.config.out))[: -self.config.optim.keep]:
                if step_of(old) != self.best.step:
                    trainer.strategy.remove_checkpoint(old)

    def _link_best(self, trainer: Trainer) -> None:
        """Let `BEST` name the best checkpoint; there may be none, or it is another run's."""
        link, best = self.folder / BEST, self.folder / f"step-{self.best.step}.ckpt"
        if trainer.is_global_zero and self.best.wanted:
            new = unfinished(link)
            try:
                if not best.is_file():
                    link.unlink(missing_ok=True)
                    return
                new.unlink(missing_ok=True)
                new.symlink_to(best.name)
                os.replace(new, link)
            except OSError as error:  # a file system without links: the run knows which is best
                console.print(f"{link} could not be made: {error.strerror}; the best checkpoint is {best}")

    def _somebody_was_asked(self, trainer: Trainer) -> bool:
        asked = torch.tensor(int(self.asked is not None or trainer.received_sigterm), device=self._module.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked)

    def _listen(self) -> None:
        if _may_listen():
            for number in (*SIGNALS, *([signal.SIGUSR1] if SLURM in os.environ else [])):
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a loader process that has just begun
            return
        if self.asked is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.asked = signal.Signals(number)
        self._module.step.stop_asked = True
        # os.write, since a handler must not use print, which it may have interrupted
        text = f"{self.asked.name}: the run stops after this optimiser step; once more stops it at once\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())

    def _stop(self, trainer: Trainer, where: str) -> None:
        failed = trainer.logger.failed  # type: ignore[union-attr]
        if failed is not None:
            raise WriteError(f"{failed}. The run stopped {where}. Make room, and repeat the command to continue it.")
        by = self.asked or signal.SIGTERM  # another rank was asked
        how = "The same command continues it" if self.config.resume == "auto" else "It continues with resume=auto"
        console.print(f"stopped by {by.name} {where}. {how}.")
        if by == signal.SIGUSR1 and trainer.is_global_zero:
            _requeue()
        raise Stopped(128 + by if trainer.is_global_zero else 0)


def _requeue() -> None:
    """Requeue this Slurm job, which ends it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ[SLURM] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        console.print(f"the job could not be put back into the queue: {error}")


def _lost(error: BaseException) -> UserError | None:
    reason = lost_rank(error)
    if reason is None:
        return None
    return UserError(
        f"another rank has ended or cannot be reached, for which rank {os.environ.get('RANK', os.environ.get('LOCAL_RANK', 0))} "
        f"waited: {reason}. Its own output says why. Repeat the command to continue from the last checkpoint."
    )


def _may_listen() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """A context for `Trainer.fit`. It restores signal handlers, raises a UserError for a loader process or another rank that has died,
    and keeps Ctrl-C a KeyboardInterrupt until `Checkpoints` listens.

    PyTorch reports a dead loader process from a signal handler, so the exception may come from anywhere and be wrapped in others:
    all causes are searched.
    """
    handlers = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGUSR1)}
    try:
        yield
    except Exception as error:
        causes: list[BaseException] = [error]
        # causes may form a circle
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
            causes.append(cause)
        known = next(
            (cause for cause in causes if isinstance(cause, UserError)), None
        )  # it came first, and a process may have been ended for it
        explained = (
            known or next(filter(None, map(lost_worker, causes)), None) or next(filter(None, map(_lost, causes)), None)
        )
        if explained is None or explained is error:
            raise
        raise explained from None
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # which Lightning turns into a silent exit with status 1
            raise KeyboardInterrupt from None
        raise
    finally:
        if _may_listen():
            for number, handler in handlers.items():
                signal.signal(number, handler)
