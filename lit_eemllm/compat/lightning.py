"""What we use of Lightning that is private: its counters of packs, and what its strategies keep to themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ContextDecorator, contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy


# --- counters of packs
def packs(trainer: Trainer) -> Any:
    """Of this rank in training: attributes ready, started, processed and completed."""
    return trainer.fit_loop.epoch_loop.batch_progress.current


def saved_packs(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The same counters as a checkpoint has them, under ``total`` and ``current``; to be changed in place."""
    return checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]


def begin_validation_anew(trainer: Trainer) -> None:
    """Count the validation under way as begun and no pack of it as done, as Lightning finds one that it is to run."""
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.reset()
    progress.increment_ready()
    progress.increment_started()


@contextmanager
def validation_ahead(trainer: Trainer) -> Iterator[None]:
    """What is saved meanwhile begins with a validation when it goes on."""
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    before = progress.state_dict()
    begin_validation_anew(trainer)
    try:
        yield
    finally:
        progress.load_state_dict(before)


def validation_pending(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was saved before a validation that was to follow it, or within one."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["current"]
    return progress["processed"] < progress["ready"]


def validate_now(trainer: Trainer) -> None:
    """Let the validation that is looked for after a pack begin after the one in hand, or at once where a run goes on."""
    trainer.val_check_batch = trainer.fit_loop.total_batch_idx + 1


def set_max_steps(trainer: Trainer, steps: int) -> None:
    """After the trainer was made. A run that has all its steps would not even begin to look for a validation that is pending."""
    trainer.fit_loop.epoch_loop.max_steps = steps


def around_restoring(trainer: Trainer, context: ContextDecorator) -> None:
    """Let all that takes something from the checkpoint of `Trainer.fit`, and only that, run in a context."""
    connector = trainer._checkpoint_connector
    for name in ("_restore_modules_and_callbacks", "restore_training_state"):
        setattr(connector, name, context(getattr(connector, name)))


def has_trainer(module: LightningModule) -> bool:
    """`LightningModule.trainer` raises where there is none."""
    return module._trainer is not None


# --- strategies
class DataParallel(ModelParallelStrategy):
    """All processes share the data, none a layer. (The sizes are known only after the strategy was made.)"""

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
