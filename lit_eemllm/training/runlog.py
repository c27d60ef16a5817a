"""What a run prints and logs: a summary at the start, a line per logged step, a progress bar with the time left."""

from __future__ import annotations

import resource
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.table import Table

from ..config import flat, to_yaml
from ..console import console, progress_bar, write_atomically
from ..core.table import LayerPlan
from ..core.table import Table as Rows
from ..doctor import origin
from ..layout import PackedBatch
from ..mechanisms.connectors import DEFAULT
from ..plugins import record
from .best import MONITORED
from .logs import Logs, quiet_threads
from .tuning import COMPONENTS, component

if TYPE_CHECKING:
    from ..config.keys import Config
    from .module import LitEEMLLM


LINES = 10
"""Least number of log lines of a run, if it has as many steps."""


def peak_memory_gib() -> float:
    """Peak memory of this process: allocated on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def print_summary(module: LitEEMLLM, config: Config, accumulate: int, world_size: int, packs: int | None) -> None:
    """Print what is trained of each component, the mechanism and the tokens per step.

    packs: packs of an epoch, if known.
    """
    table = Table("component", "parameters", "trained", "peak lr", title=f"{config.out}", title_justify="left")
    rates = {"vision": config.optim.vision_lr, "projector": config.optim.projector_lr, "llm": None}
    for word in COMPONENTS:
        parameters = list(component(module.model, word).parameters())
        count, trained = (
            sum(p.numel() for p in some) for some in (parameters, [p for p in parameters if p.requires_grad])
        )
        how = {"full": "all", "lora": f"adapters of rank {config.optim.lora.r}"}.get(getattr(config.optim.tuning, word))
        rate = f"{config.optim.lr if rates[word] is None else rates[word]:g}"
        table.add_row(
            word,
            f"{count:,}",
            f"{trained:,} ({how})" if trained else f"frozen, {config.model.dtype}",
            rate if trained else "",
        )
    console.print(table)
    model, preset = module.model, config.model.mechanism.preset
    parts = {key: value for key, value in flat(model.config.mechanism).items() if value not in (None, [])}
    console.print(f"mechanism {preset}: {', '.join(f'{key} {value}'.lower() for key, value in parts.items())}")
    if model.connector != DEFAULT:
        console.print(f"connector {model.connector}")
    for text in module.mechanisms.lines(config.optim.steps):
        console.print(f"trained by a schedule, {text}", markup=False, highlight=False)
    if preset != "llava" and model.mechanism.is_llava(layers := len(model.language_model.model.layers)):
        console.print(f"warning: in a decoder of {layers} layers this computes what llava does, bit for bit")
    if unseen := unseen_positions(config, module.model.config.text_config):
        console.print(f"warning: {unseen}")
    budget = config.data.pack_tokens
    console.print(
        f"tokens per step: at most {budget:,} per pack x {accumulate} packs x {world_size} ranks = "
        f"{budget * accumulate * world_size:,}; {config.optim.steps:,} steps; seed {config.seed}"
    )
    if packs is not None:
        epoch = packs / (accumulate * world_size)
        console.print(f"steps per epoch: {epoch:,.1f} ({packs:,} packs); {config.optim.steps / epoch:.2f} epochs")


def unseen_positions(config: Config, decoder: Any) -> str | None:
    """A warning if conversations may be longer than the decoder's positions reach; else None."""
    known = getattr(decoder, "max_position_embeddings", None)
    if known is None or config.data.max_length <= known:
        return None
    return (
        f"data.max_length={config.data.max_length:,}, but the decoder knows {known:,} positions (max_position_embeddings): in longer "
        f"conversations it reads positions that it has never seen. Set data.max_length={known} to leave them out"
    )


def grouped(table: Rows) -> tuple[list[str], list[list[str]]]:
    """The columns of a mechanism's table and its rows as texts, one for each stretch of equal layers."""
    rows: list[list[str]] = []
    for row, same in groupby(enumerate(table), key=lambda pair: pair[1]):
        layers = [layer for layer, _ in same]
        where = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
        rows.append([where, *map(str, row.to_dict().values())])
    return ["layers", *LayerPlan().to_dict()], rows


class RunLog(Callback):
    """Writes one line and one row of metrics per logged step, and keeps a progress bar over all steps.

    Args:
        config: as it was given; the run directory gets it.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.logs = config, Logs(Path(config.out), config.logger)
        self._bar = progress_bar()
        self._flops_of, self._peak = (lambda entry, layout: 0.0), 0.0
        self._start_window()

    def _start_window(self) -> None:
        self._tokens = self._targets = self._samples = self._crc = 0
        self._flops = 0.0
        self._waited, self._window_start = 0.0, time.perf_counter()
        self._losses: list[torch.Tensor] = []
        self._kls: list[torch.Tensor] = []  # of steps with a teacher

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._bar, quiet_threads():
            yield

    def _print(self, what: Any) -> None:
        """Print in the middle of a step, which a full disk must not break."""
        self.logs.attempt(lambda: self._bar.console.print(what), "what is printed")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:  # only now: a refused checkpoint must leave the run as it was
            write_atomically(Path(self.config.out) / "config.yaml", to_yaml(self.config, comments=True))
            record(Path(self.config.out))
            self.logs.log_hyperparams(asdict(self.config))
            model = pl_module.model
            table = model.mechanism.table(len(model.language_model.model.layers))
            self.logs.log_table("mechanism", *grouped(table))
            on_gpu = pl_module.device.type == "cuda"
            self.logs.log_table("machine", ["machine"], [[origin(on_gpu)]])
            if on_gpu:  # no MFU on a CPU, which the loader uses too
                self._measure_peak(pl_module)
        self.steps = pl_module.config.optim.steps
        self.every = min(self.config.optim.log_every, max(1, self.steps // LINES))
        self._task = self._bar.add_task("step", total=self.steps, completed=trainer.global_step)
        self._logged, self._first = trainer.global_step, True
        self._start_window()
        self._callbacks_start = self._validation_end = self._window_start

    def _measure_peak(self, module: LitEEMLLM) -> None:
        from ..cost.utilisation import StepFlops, peak_flops
        from .module import compute_dtype

        config, model = module.config, module.model
        shares = zip(module.mechanisms.entries, module.mechanisms.shares(config.optim.steps), strict=True)
        flops = {id(entry): StepFlops(config, model, entry) for entry, share in shares if share}
        self._flops_of = lambda entry, layout: flops[id(entry)].of(layout)
        self._peak = peak_flops(module.device, compute_dtype(config) or model.language_model.dtype)
        self._print(f"a large matrix product runs at {self._peak / 1e12:,.0f} TFLOP/s here, of which MFU is a share")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: PackedBatch, batch_idx: int) -> None:
        if pl_module.step.ended > self._callbacks_start:  # not in the first batch
            self._window_start += (
                pl_module.step.ended - self._callbacks_start
            )  # writing a checkpoint is no training time
            self._callbacks_start = pl_module.step.ended
        self._waited += time.perf_counter() - max(self._validation_end, self._callbacks_start)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        self._tokens += batch.layout.num_tokens
        self._targets += batch.num_targets
        self._samples += len(batch.keys)
        self._flops += self._flops_of(pl_module.entry, batch.layout)
        self._crc = zlib.crc32("\n".join(batch.keys).encode(), self._crc)
        step = trainer.global_step
        if step > self._logged + len(self._losses):  # an optimiser step has ended with this batch
            self._losses.append(pl_module.step.mean_loss)
            if pl_module.step.mean_kl is not None:
                self._kls.append(pl_module.step.mean_kl)
            self._bar.update(self._task, completed=step)
            if step % self.every == 0 or step == self.steps:
                self._log(trainer, pl_module, step)
                self._logged = step
                self._start_window()
            elif self._first and trainer.is_global_zero:  # a sign of life where steps are slow
                seconds = time.perf_counter() - self._window_start
                text = f"step {step:>6}  loss {pl_module.step.mean_loss:.4f}  after {seconds:.1f} s"
                self._print(f"{text}; then a line every {self.every} steps")
            self._first = False
        self._callbacks_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        found = {name: float(trainer.callback_metrics[name]) for name in MONITORED if name in trainer.callback_metrics}
        if trainer.is_global_zero and found and not trainer.sanity_checking:
            self.logs.log_metrics(found, trainer.global_step)
            score = f"  score {found['val_score']:.3f}" if "val_score" in found else ""
            self._print(f"step {trainer.global_step:>6}  validation loss {found['val_loss']:.4f}{score}")
        self._validation_end = time.perf_counter()
        # Neither validation nor starting its loader is training time; a resumed run may validate before its first step.
        self._window_start += self._validation_end - max(pl_module.step.ended, self._window_start)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        drawn = self._drawn(trainer)
        if trainer.is_global_zero and drawn:
            table = Table(
                "source", "asked for", "of samples", "of tokens", title="realised blend", title_justify="left"
            )
            for source, shares in drawn.items():
                table.add_row(source, *(f"{share:.1%}" for share in shares))
            self._print(table)

    def _drawn(self, trainer: Trainer) -> dict[str, tuple[float, float, float]]:
        """`ShardDataModule.drawn`. A collective call: all ranks must make it."""
        return trainer.datamodule.drawn() if trainer.datamodule is not None else {}  # type: ignore[attr-defined]

    def _log(self, trainer: Trainer, module: LitEEMLLM, step: int) -> None:
        seconds = time.perf_counter() - self._window_start
        world = trainer.world_size
        metrics: dict[str, float] = {
            "loss": torch.stack(self._losses).mean().item(),
            "lr": module.step.lr,
            "grad_norm": module.step.grad_norm.item(),
            "tokens_per_second": world * self._tokens / seconds,
            "samples_per_second": world * self._samples / seconds,
            "step_seconds": seconds / len(self._losses),
            "data_wait_percent": 100 * self._waited / seconds,
            "memory_gib": peak_memory_gib(),
            "targets_per_step": world * self._targets / len(self._losses),
            "keys_crc": self._crc,
        }
        if self._kls:
            metrics["kl"] = torch.stack(self._kls).mean().item()
        if self._peak:
            metrics["mfu_percent"] = 100 * self._flops / seconds / self._peak
        skipped = sum(trainer.datamodule.skipped.values()) if trainer.datamodule is not None else 0  # type: ignore[attr-defined]
        metrics["skipped"] = skipped
        for source, (_, samples, tokens) in self._drawn(trainer).items():
            metrics |= {f"share_of_samples/{source}": samples, f"share_of_tokens/{source}": tokens}
        self.logs.log_metrics(metrics, step)
        others = [f"{word} {rate:.2e}" for word, rate in module.step.rates.items() if rate != module.step.lr]
        rates = f"{module.step.lr:.2e}" + (f" ({', '.join(others)})" if others else "")
        kl = f"  KL {metrics['kl']:.4f}" if self._kls else ""
        if trainer.is_global_zero:
            self._print(
                f"step {step:>6}  loss {metrics['loss']:.4f}{kl}  lr {rates}  grad {metrics['grad_norm']:.2f}  "
                f"{metrics['tokens_per_second']:,.0f} tokens/s  data wait {metrics['data_wait_percent']:.0f}%  "
                f"memory {metrics['memory_gib']:.2f} GiB"
                + (f"  MFU {metrics['mfu_percent']:.1f}%" if self._peak else "")
                + (f"  skipped {skipped}" if skipped else "")
                + (
                    f"  {timedelta(seconds=round((self.steps - step) * metrics['step_seconds']))} left"
                    if step < self.steps
                    else ""
                )
            )
