"""What is used of Lightning."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from . import compat, contract, no_attribute


def trained_steps(train: bool = True, **more: Any) -> tuple[Any, Any]:
    """A module that has seen four packs in two steps (or none yet), and its trainer."""
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader

    class Steps(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))
            self.seen: list[tuple[int, int]] = []

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            packs = compat("lightning").packs(self.trainer)
            self.seen.append((packs.ready, packs.processed))
            return self.weight * batch.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Steps()
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(
        max_steps=2, accumulate_grad_batches=2, accelerator="cpu", devices=1, num_sanity_val_steps=0, **options, **more
    )
    if train:
        trainer.fit(module, DataLoader(torch.ones(8)))
    return module, trainer


@contract(
    "lightning",
    "loops count packs, also in checkpoints",
    lambda patch: (
        patch.setattr("lightning.pytorch.loops.progress._ProcessedTracker.processed", 0, raising=False)
        or patch.setattr("lit_eemllm.compat.lightning.packs", lambda trainer: SimpleNamespace(ready=0, processed=0))
    ),
)
def packs_are_counted():
    module, trainer = trained_steps()
    assert module.seen == [(1, 0), (2, 1), (3, 2), (4, 3)]
    saved = compat("lightning").saved_packs(trainer._checkpoint_connector.dump_checkpoint())
    assert {name: (count["ready"], count["processed"]) for name in ("total", "current") for count in [saved[name]]} == {
        "total": (4, 4),
        "current": (4, 4),
    }
    compat("lightning").begin_validation_anew(trainer)
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    assert (progress.current.ready, progress.current.started, progress.current.processed) == (1, 1, 0)


@contract(
    "lightning",
    "a validation begins after the pack whose number val_check_batch divides, and one that is pending when a run goes on",
    lambda patch: (
        patch.setattr("lightning.pytorch.loops.evaluation_loop._EvaluationLoop.batch_progress", None, raising=False)
        or patch.setattr("lit_eemllm.compat.lightning.validate_now", lambda trainer: None)
    ),
)
def validations_are_begun():
    from lightning.pytorch import Callback
    from torch.utils.data import DataLoader

    lightning, begun = compat("lightning"), []

    class Last(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index == 3:
                with lightning.validation_ahead(trainer):
                    begun.append(lightning.validation_pending(trainer._checkpoint_connector.dump_checkpoint()))
                lightning.validate_now(trainer)

        def on_validation_start(self, trainer: Any, module: Any) -> None:
            begun.append((trainer.global_step, trainer.max_steps))

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            begun.append(lightning.validation_pending(trainer._checkpoint_connector.dump_checkpoint()))

    module, trainer = trained_steps(
        train=False, callbacks=[Last()], val_check_interval=100, check_val_every_n_epoch=None
    )
    lightning.set_max_steps(trainer, 3)
    lightning.set_max_steps(trainer, 2)
    type(module).validation_step = lambda self, batch, index: None
    loader = DataLoader(torch.ones(8))
    trainer.fit(module, loader, loader)
    assert begun == [True, (2, 2), False]


@contract(
    "lightning",
    "modules are restored in _restore_modules_and_callbacks, optimisers in restore_training_state, and nothing else is done there",
    lambda patch: patch.setattr("lit_eemllm.compat.lightning.around_restoring", lambda trainer, context: None),
)
def restoring_is_in_two_methods(tmp_path):
    from torch.utils.data import DataLoader

    within, seen = [], []

    @contextmanager
    def context():
        within.append(None)
        yield
        within.pop()

    _, first = trained_steps()
    first.save_checkpoint(tmp_path / "two.ckpt")
    module, trainer = trained_steps(train=False)
    for hook in ("on_load_checkpoint", "on_fit_start", "configure_optimizers", "on_train_start"):
        own = getattr(module, hook)
        setattr(module, hook, lambda *given, hook=hook, own=own: (seen.append((hook, len(within))), own(*given))[1])
    own_load = torch.optim.SGD.load_state_dict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.optim.SGD,
            "load_state_dict",
            lambda *given: (seen.append(("optimizer", len(within))), own_load(*given))[1],
        )
        compat("lightning").around_restoring(trainer, context())
        trainer.fit_loop.epoch_loop.max_steps = 3
        trainer.fit(module, DataLoader(torch.ones(8)), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert sorted(seen) == [
        ("configure_optimizers", 0),
        ("on_fit_start", 0),
        ("on_load_checkpoint", 1),
        ("on_train_start", 0),
        ("optimizer", 1),
    ]


@contract(
    "lightning",
    "a module without a trainer has the attribute _trainer",
    no_attribute("lightning.pytorch.LightningModule", "_trainer"),
)
def a_module_has_a_trainer_or_none():
    has_trainer = compat("lightning").has_trainer
    assert not has_trainer(trained_steps(train=False)[0]) and has_trainer(trained_steps()[0])


@contract(
    "lightning",
    "ModelParallelStrategy keeps its sizes in _data_parallel_size and _tensor_parallel_size until the environment is set up",
    no_attribute("lightning.pytorch.strategies.ModelParallelStrategy", "_data_parallel_size"),
)
def all_processes_share_the_data():
    strategy = compat("lightning").DataParallel()
    assert {"_data_parallel_size", "_tensor_parallel_size"} <= vars(strategy).keys()
    strategy.parallel_devices = [torch.device("cpu")] * 3
    asked = []
    parent = type(strategy).__mro__[1]
    original, parent.setup_environment = (
        parent.setup_environment,
        lambda self: asked.append((self._data_parallel_size, self._tensor_parallel_size)),
    )
    try:
        strategy.setup_environment()
    finally:
        parent.setup_environment = original
    assert asked == [(3, 1)]
