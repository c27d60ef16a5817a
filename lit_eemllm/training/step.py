"""The optimiser step: its packs so far, the results of the last one, and a check before the optimiser changes any weight."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..console import write_atomically
from ..errors import UserError
from ..layout import PackedBatch
from .checkpoint import save
from .tuning import COMPONENTS, component

if TYPE_CHECKING:
    from ..model import EEMLLM

SMALLEST_SCALE = 2.0**-16
"""Smallest loss scale in float16 that may still help. The scale begins at 2^16 and is halved with every step that is skipped for
infinite gradients; losses are sums over a pack's tokens, so it may fall below 1, but not this far."""
MOST_NAMED = 20
"""Sample keys in a message; the evidence has all of them."""


class Pack(NamedTuple):
    """The keys of a pack's samples, its number of supervised tokens, and its loss and KL from a teacher, summed over them; the KL is
    None on all ranks where the step has no teacher."""

    keys: list[str]
    targets: int
    loss: Tensor
    kl: Tensor | None


@dataclass
class Step:
    """State of the optimiser step on one rank.

    Attributes:
        packs: packs of the current step so far.
        mean_loss, mean_kl, grad_norm: of the last step: mean loss of a supervised token over all ranks, its mean KL from a teacher
            (None without one), norm of its gradients.
        rates: of the last step: learning rates by trained component.
        stop_asked: this rank was asked, by a signal, to stop after a step.
        stop_agreed: all ranks stop after this step, since one was asked.
        votes: number of ranks that were asked to stop.
        ended: time at which the last batch was done, of `time.perf_counter`.
    """

    packs: list[Pack] = field(default_factory=list)
    mean_loss: Tensor = field(default_factory=lambda: torch.tensor(torch.nan))
    mean_kl: Tensor | None = None
    grad_norm: Tensor = field(default_factory=lambda: torch.tensor(torch.nan))
    rates: dict[str, float] = field(default_factory=dict)
    stop_asked: bool = False
    stop_agreed: bool = False
    votes: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    ended: float = 0.0

    def add(self, batch: PackedBatch, loss: Tensor, kl: Tensor | None) -> None:
        """Note a pack, its summed loss and its summed KL."""
        self.packs.append(Pack(batch.keys, batch.num_targets, loss.detach(), None if kl is None else kl.detach()))

    def total(self, device: torch.device) -> Tensor:
        """The number of supervised tokens on all ranks. A collective call, which also sets `mean_loss`, `mean_kl` and `votes`."""
        kls = [pack.kl for pack in self.packs if pack.kl is not None]
        loss, kl = (
            sum((x.float() for x in sums), torch.zeros((), device=device))
            for sums in ([pack.loss for pack in self.packs], kls)
        )
        numbers = (sum(pack.targets for pack in self.packs), self.stop_asked)
        # torch.full runs on the device; copying the numbers to it would wait for it
        totals = torch.stack([loss, kl, *(torch.full((), float(number), device=device) for number in numbers)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
        loss, kl, tokens, self.votes = totals
        self.mean_loss, self.mean_kl = loss / tokens, kl / tokens if kls else None
        return tokens

    @property
    def lr(self) -> float:
        """The decoder's learning rate; if that is frozen, the projector's, else the encoder's."""
        return next(rate for word in reversed(COMPONENTS) if (rate := self.rates.get(word)) is not None)


def check_step(step: Step, model: EEMLLM, trainer: Trainer, out: str) -> bool:
    """Check that loss and gradients are finite before the optimiser uses them.

    The one place where an ordinary step waits for the device. Without waiting, a bad gradient could be zeroed on the device, but
    an AdamW step with zeros changes weights and moments too; here the optimiser is not called at all. Only clipping and the
    optimiser remain to be launched after the wait, so the device idles for a fraction of a millisecond.

    In float16, gradients become infinite when the scaled loss is too large; the scaler skips that step and lowers the scale.
    They count as bad only once the scale has fallen to `SMALLEST_SCALE`.

    Args:
        step: with mean loss, gradient norm and votes of this step.
        model: with its gradients.
        trainer: saves the last good state.
        out: the run directory.

    Returns:
        Whether some rank was asked to stop; the same on all.

    Raises:
        UserError: loss or gradient is not finite; on all ranks at once.
    """
    device = step.mean_loss.device
    known = [x.detach().to(device, torch.float32) for x in (step.mean_loss, step.grad_norm, step.votes)]
    loss, norm, stop = torch.stack(known).tolist()
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if math.isfinite(loss) and (math.isfinite(norm) or (scaler is not None and scaler.get_scale() > SMALLEST_SCALE)):
        return stop > 0
    raise _not_finite(step, model, trainer, Path(out) / "nan", loss, norm)


def _not_finite(step: Step, model: EEMLLM, trainer: Trainer, folder: Path, loss: float, norm: float) -> UserError:
    """Save the evidence and the last good state; return the error to raise. A collective call."""
    mine: list[Any] = [
        {"rank": trainer.global_rank, "loss": loss.item() / targets, "targets": targets, "keys": keys}
        for keys, targets, loss, _ in step.packs
    ]
    ranks = [mine]
    if dist.is_available() and dist.is_initialized():
        ranks = [[] for _ in range(trainer.world_size)]
        dist.all_gather_object(ranks, mine)
    packs = [pack for rank in ranks for pack in rank]
    bad = [pack for pack in packs if not math.isfinite(pack["loss"])]
    number, bad_gradients = trainer.global_step + 1, []
    for word in COMPONENTS:
        names = [name for name, p in component(model, word).named_parameters() if _bad_gradient(p)]
        if names:
            bad_gradients.append(f"{word} ({len(names)} tensors, such as {names[0]})")
    problem = (
        f"the loss is {loss} in {len(bad)} of {len(packs)} packs" if bad else "the losses are finite, a gradient is not"
    )
    if bad_gradients:
        problem += f"; gradients that are not finite: {', '.join(bad_gradients)}"
    evidence = {"step": number, "found": problem, "loss": loss, "grad_norm": norm, "lr": step.lr, "packs": packs}
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"step-{number}.json", json.dumps(evidence, indent=1))
    good = folder / f"before-step-{number}.ckpt"
    save(trainer, good)
    keys = [key for pack in bad or packs for key in pack["keys"]]
    named = ", ".join(keys[:MOST_NAMED]) + (f" and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else "")
    return UserError(
        f"step {number}: {problem}. Samples: {named}. The optimiser did not take this step: {good} holds the weights before it, "
        f"{folder / f'step-{number}.json'} all keys and losses. Look at these samples (shards inspect, shards check); if they "
        f"are good, lower optim.lr, lengthen optim.warmup_ratio or set optim.clip_grad_norm, in a new run with "
        f"init_from={good}."
    )


def _bad_gradient(parameter: nn.Parameter) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return False
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return not bool(local.isfinite().all())


def own_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """This rank's gradients as plain tensors, to change in place: whole, or this rank's shards."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return [x.to_local() if isinstance(x, DTensor) else x for x in gradients]
