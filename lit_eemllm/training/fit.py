"""A training run from start to end: seed, build, connect data, summarise, train or continue, save."""

from __future__ import annotations

import fcntl
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.profiler import profile, schedule

from ..compat.lightning import around_restoring, set_max_steps, validation_pending
from ..config.keys import Config
from ..console import console, quiet_libraries
from ..data.module import ShardDataModule
from ..errors import CheckpointError, ConfigError, UserError, not_one_of
from ..locks import locked
from ..model.build import build_processor
from ..model.fp8 import require_fp8
from .checkpoint import (
    FOLDER,
    AtomicCheckpointIO,
    blaming,
    newest_checkpoint,
    read_checkpoint,
    refuse_changes,
    refuse_incomplete,
    refuse_moments,
    save,
    using,
)
from .fsdp2 import FSDP2, settle
from .guard import Checkpoints, guarded
from .initial import initial_model
from .module import LitEEMLLM
from .runlog import RunLog, print_summary
from .tuning import in_order, parameter_groups, require_states

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "fsdp2": FSDP2,
    "fsdp2_offload": partial(FSDP2, offload=True),
    "hsdp": partial(FSDP2, hybrid=True),
}
"""Values of `trainer.strategy` that Lightning does not have, or that mean something else there."""


class Trace(PyTorchProfiler):
    """Records the packs 11 to 13 that a process trains on, each rank in a file that Perfetto and chrome://tracing open. Lightning's own
    also counts packs of validations, and where these are few it records the whole run, until the memory is full."""

    STEP_FUNCTIONS = {"training_step"}

    def __init__(self, dirpath: str, filename: str) -> None:
        moments = schedule(wait=8, warmup=2, active=3, repeat=1)
        super().__init__(dirpath, filename, schedule=moments, on_trace_ready=self._write)

    def _write(self, recorded: profile) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        recorded.export_chrome_trace(f"{self.dirpath}/fit-{self.filename}-{rank}.json.gz")


PROFILERS: dict[str, Callable[..., Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": Trace,
}


def fit(config: Config, asking: Callback | None = None) -> None:
    """Train, or continue the run found in `config.out`.

    asking: an `evaluation.during.Asking`, if `config.asks`.

    Raises:
        UserError: the configuration, data or checkpoint cannot be used, or another process trains in `config.out`.
    """
    if config.asks and asking is None:
        raise UserError(
            "eval.during_training and optim.samples_every ask while it trains: fit(config, lit_eemllm.evaluation.during.Asking(config))"
        )
    quiet_libraries()
    runlog = RunLog(config)
    trainer = make_trainer(config, runlog, asking)
    console.quiet = not trainer.is_global_zero
    # not flock, which loader processes inherit: they may briefly outlive a killed process
    alone = locked(Path(config.out), "training", ".fit.lock", fcntl.lockf) if trainer.is_global_zero else nullcontext()
    with alone:
        _fit(config, trainer, runlog)


def _fit(config: Config, trainer: Trainer, runlog: RunLog) -> None:
    require_states(config.optim)
    require_fp8(config.model)
    resume, data = find_resume(config), ShardDataModule(config.data, config.seed)
    if config.optim.epochs is not None:
        config = in_steps(config, data, trainer)
    steps_before = None if resume is None else accept(resume, config, trainer)

    # Seed before any module is built: the projector is randomly initialised.
    seed_everything(config.seed, verbose=False)
    data.setup("fit")
    model, processor, loaded = initial_model(config)  # on resume too: checkpoints leave out what is frozen
    if loaded is not None:
        console.print(loaded)
    module = LitEEMLLM(model, config, processor)
    flops = None
    if config.data.pack_by == "flops":
        from ..cost.utilisation import RunFlops

        flops = RunFlops(config, model, module.mechanisms)
    data.connect(processor.template, model.vision.transform, flops)
    if resume is not None:
        with using(resume):
            trained = in_order(parameter_groups(model, config.optim), module)
            refuse_moments(read_checkpoint(resume, verified=True, shares=()), trained, config.optim.states)

    if trainer.is_global_zero:
        print_summary(module, config, trainer.accumulate_grad_batches, trainer.world_size, data.packs(count=False))
        if resume is not None:
            console.print(f"continuing from {resume}")
            if steps_before != config.optim.steps:
                console.print(
                    f"optim.max_steps was {steps_before:,} and is {config.optim.steps:,}: from here on the learning rate follows the "
                    "schedule of the new length; the warm-up keeps its length"
                )
    if resume is not None:
        around_restoring(trainer, using(resume))
    with runlog.running(), guarded(), blaming(resume, lambda: module.has_begun):
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    out = Path(config.out)
    last = out / FOLDER / f"step-{trainer.global_step}.ckpt"
    if not trainer.strategy.broadcast(last.is_file()):  # all ranks save, or none
        save(trainer, last)
        settle(trainer)
    if runlog.logs.failed is not None:
        raise runlog.logs.failed
    if trainer.is_global_zero:
        if module.has_begun:
            console.print(f"done: {trainer.global_step} steps; run directory {out}")
        else:
            console.print(
                f"nothing to do: {out} is finished, at step {trainer.global_step} of as many. To train it further: lit-eemllm fit {out} "
                "optim.max_steps=MORE; to begin anew, name another folder (out=FOLDER)"
            )


def in_steps(config: Config, data: ShardDataModule, trainer: Trainer) -> Config:
    """The configuration with `optim.epochs` turned into `optim.max_steps`; the trainer gets the steps too."""
    epochs = config.optim.epochs
    assert epochs is not None
    processor, vision = build_processor(config.model)
    data.connect(processor.template, vision.transform)
    data.setup("fit")  # says what is wrong with the data before they are read through
    packs, packs_per_step = data.packs(count=True), trainer.accumulate_grad_batches * trainer.world_size
    assert packs is not None
    steps = max(1, math.ceil(epochs * packs / packs_per_step - 1e-9))  # 0.1 of 30 is 3, whatever 0.1 is in binary
    console.print(
        f"optim.epochs={epochs:g} is optim.max_steps={steps}: {packs:,} packs per epoch, {packs_per_step} per step"
    )
    set_max_steps(trainer, steps)
    return replace(config, optim=replace(config.optim, max_steps=steps, epochs=None))


def find_resume(config: Config) -> Path | None:
    """The checkpoint to continue from, if any, as `config.resume` says."""
    if config.resume == "never":
        newest = newest_checkpoint(Path(config.out))
        if newest is not None:
            raise CheckpointError(f"resume=never, but {newest} exists: name another `out` or remove the run")
        return None
    if config.resume == "auto":
        return newest_checkpoint(Path(config.out))
    if not Path(config.resume).is_file():
        raise CheckpointError(f"resume={config.resume}: no such checkpoint; expected auto, never or a file")
    return Path(config.resume)


def accept(resume: Path, config: Config, trainer: Trainer) -> int:
    """Refuse a checkpoint that this run cannot continue from. No tensor of it is kept: the file is memory-mapped, and a mapped file
    keeps its disk space when it is deleted.

    Returns:
        its `optim.max_steps`.
    """
    checkpoint = read_checkpoint(resume, shares=())
    with using(resume):
        refuse_incomplete(checkpoint)
        refuse_changes(checkpoint, config, trainer.world_size)
        done = checkpoint["global_step"] == config.optim.steps
        if done and validation_pending(checkpoint) and config.data.val is not None:
            # so that Lightning enters its loop; `Checkpoints` sets it back when the validation starts
            set_max_steps(trainer, config.optim.steps + 1)
        return int(checkpoint["lit_eemllm"]["config"]["optim"]["max_steps"])


def make_trainer(config: Config, runlog: RunLog, asking: Callback | None = None) -> Trainer:
    """Lightning's Trainer with the arguments in `config.trainer`, `STRATEGIES` resolved, and what this project decides added."""
    optim, options = config.optim, dict(config.trainer)
    strategy = str(options.get("strategy", "auto"))
    if strategy in STRATEGIES:
        options["strategy"] = STRATEGIES[strategy]()
    elif strategy not in ("auto", "ddp"):
        raise ConfigError(
            f"trainer.strategy: {not_one_of(strategy, ('auto', 'ddp', *STRATEGIES))}. Instead of "
            "DeepSpeed's ZeRO and FSDP1: trainer.strategy=fsdp2 (fsdp2_offload keeps the shares in main memory). A run that was "
            "trained under another strategy goes on under it."
        )
    if (profiler := options.get("profiler")) is not None:  # Lightning's own would print it where nobody sees it
        if profiler not in PROFILERS:
            raise ConfigError(f"trainer.profiler: {not_one_of(profiler, PROFILERS)}")
        options["profiler"] = PROFILERS[profiler](dirpath=config.out, filename=profiler)
    if config.data.val is None:
        validation: dict[str, Any] = {"limit_val_batches": 0}
    else:  # Lightning counts packs, the config steps
        every = optim.val_every * options.get("accumulate_grad_batches", 1)
        validation = {
            "val_check_interval": every,
            "check_val_every_n_epoch": None,
            "limit_val_batches": optim.val_batches,
        }
    arguments = {
        "default_root_dir": config.out,  # under Slurm Lightning looks for checkpoints there, by default in the current folder
        "max_steps": optim.max_steps or 1,  # with epochs, `in_steps` sets it later
        "logger": runlog.logs,
        "log_every_n_steps": optim.log_every,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        **validation,
        **options,
        # what comes after runlog is no training time
        "callbacks": [runlog, *([] if asking is None else [asking]), Checkpoints(config)],
        "plugins": [AtomicCheckpointIO()],
    }
    try:
        return Trainer(**arguments)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(f"trainer: lightning.Trainer refuses {config.trainer}: {error}") from error
