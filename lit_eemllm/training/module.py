"""`LitEEMLLM`: the LightningModule. Token-weighted loss over the whole optimiser step, slim self-describing checkpoints."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
import torch.distributed as dist
import transformers
from lightning import seed_everything
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor
from torchmetrics import MeanMetric

from .. import __version__
from ..compat.lightning import has_trainer, saved_packs
from ..compat.torch import scale_
from ..console import console
from ..errors import CheckpointError
from ..layout import PackedBatch, Run, SequenceLayout
from ..mechanisms.base import Mechanism
from ..mechanisms.schedule import Schedule
from ..model.build import fingerprint
from ..model.fp8 import use_fp8
from .adapters import MARK, WHOLE
from .checkpoint import tensors, using
from .fsdp2 import FSDP2, shard
from .step import Step, check_step, own_gradients
from .tuning import adamw, apply_tuning, parameter_groups, schedule, set_modes, submodules

if TYPE_CHECKING:
    from ..config.keys import Config
    from ..inputs.images import Transform
    from ..model import EEMLLM, Processor


def compute_dtype(config: Config) -> torch.dtype | None:
    """The dtype of autocast; None without autocast."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.trainer.get("precision", ""))


class LitEEMLLM(LightningModule):
    """Trains an `EEMLLM`.

    Every supervised token of an optimiser step weighs the same, however it was split into micro-batches and ranks: sums
    are back-propagated, and the gradients are divided once, before clipping, by the step's token count over all ranks.

    Args:
        model: the model; frozen, cast and moved here as the config says.
        config: the whole configuration, kept in every checkpoint.
        processor: of the model; its fingerprint is kept and compared likewise. None = unknown.
    """

    def __init__(self, model: EEMLLM, config: Config, processor: Processor | None = None) -> None:
        super().__init__()
        self.config, self.processor = config, processor
        self.tokenizer = "" if processor is None else processor.fingerprint()
        self.trained = apply_tuning(model, config.optim, config.model.dtype)
        model.activation_checkpointing = config.optim.activation_checkpointing
        model.activation_offload = config.optim.activation_offload
        self.model = model
        self.mechanisms = Schedule.of(config, model.mechanism, model.config.text_config)
        for mechanism in self.mechanisms.all:  # now, and not in the step that draws it
            model.refuse(model.problems(mechanism))
        self.entry = self.mechanisms.entries[-1]  # of the last step
        self.strict_loading = False  # a checkpoint holds trained weights only; `on_load_checkpoint` is stricter
        self.val_loss = MeanMetric()
        self.step = Step()
        self._restored_rng: list[dict[str, Any]] | None = None  # one for each rank that saved
        self.has_begun = False  # training has begun, so all that a checkpoint restores is restored
        self.begun_with = config.optim.max_steps  # max_steps when the run began; a longer run keeps its warm-up

    def configure_model(self) -> None:
        # now, of whole tensors as they were loaded: the first use of quantised ones may rearrange and round them
        assert self._frozen_fingerprint
        if isinstance(self.trainer.strategy, FSDP2):
            strategy = self.trainer.strategy
            shard(self.model, strategy.mesh, compute_dtype(self.config), strategy.offload)

    def on_fit_start(self) -> None:
        self._use(max(self.mechanisms.all, key=lambda one: one.visual_positions == "unrotated"))  # the widest heads
        choice = self.model.set_attention(self.config.model.attention, compute_dtype(self.config))
        self._use(self.mechanisms.own)
        if self.trainer.is_global_zero:
            console.print(f"attention: {choice}", markup=False, highlight=False)
            if self.device.type == "cuda" and not self.config.model.liger:
                console.print(f"loss: logits of {self.model.loss_rows:,} supervised tokens at a time")
        if self.config.model.compile:
            self.model.compile_layers()
        if self.config.model.fp8:
            use_fp8(self.model)

    def on_train_batch_end(self, outputs: Any, batch: PackedBatch, batch_idx: int) -> None:
        self.step.ended = time.perf_counter()  # after all callbacks, so also after a checkpoint was written

    # --- one optimiser step ---

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        self.entry = entry = self.mechanisms.at(self.global_step + 1)
        kl = None
        if entry.teacher is None:
            self._use(entry.mechanism)
            loss = self._loss(batch)
        else:
            whole = self._complete(batch)
            teacher_nv = self._logits_of_teacher(whole, entry.teacher)
            self._use(entry.mechanism)
            loss, kl = self.model.packed_loss_and_kl(whole, teacher_nv, entry.temperature)
        self.step.add(batch, loss, kl)
        return loss if kl is None else loss + entry.kl * kl

    def on_after_backward(self) -> None:
        self._use(self.mechanisms.own)  # not before: a layer that is computed again must do what it did

    def _use(self, mechanism: Mechanism) -> None:
        if mechanism != self.model.mechanism:
            self.model.set_mechanism(mechanism)

    def _logits_of_teacher(self, batch: PackedBatch, teacher: Mechanism) -> Tensor:
        """The logits of the model as it is, by another mechanism, [n, vocabulary]; without gradient, and in evaluation mode: the
        teacher's dropout is off, so it draws no random numbers, and its batch norms learn no statistics."""
        self._use(teacher)
        self.model.eval()
        with torch.no_grad():
            logits_nv = self.model.packed_logits(batch)
        torch.clear_autocast_cache()  # before pytorch#165068 it holds copies of weights through which no gradient would flow
        set_modes(self.model, self.trained)
        return logits_nv

    def _loss(self, batch: PackedBatch) -> Tensor:
        """Loss, summed over the pack."""
        return self.model.packed_loss(self._complete(batch))

    def _complete(self, batch: PackedBatch) -> PackedBatch:
        """A trained encoder, and every module that FSDP2 shards, must run in every pass on every rank: a pack without images gets a
        blank one, which no token sees."""
        if batch.pixel_values is None and ("vision" in self.trained or isinstance(self.trainer.strategy, FSDP2)):
            batch = with_blank_image(batch, self.model.vision.transform)
        return batch

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn what Lightning accumulated (sums, divided by micro-batches and averaged over ranks) into the token mean."""
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / self.step.total(self.device)
        gradients = own_gradients(self.model.parameters())
        scale_(gradients, scale.to(gradients[0].device))  # gradients are on the CPU if offloaded
        self.step.rates = {group["name"].partition(",")[0]: group["lr"] for group in reversed(optimizer.param_groups)}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        step, most = self.step, self.config.optim.clip_grad_norm
        gradients = own_gradients(self.model.parameters())
        step.grad_norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(self.trainer.strategy, FSDP2):  # so far the norm of this rank's shards
            square = step.grad_norm**2
            dist.all_reduce(square, group=self.trainer.strategy.mesh.get_group("shares"))
            step.grad_norm = square.sqrt()
        # before clipping, which would spread NaN to all gradients
        step.stop_agreed = check_step(step, self.model, self.trainer, self.config.out)
        step.packs.clear()
        if most is not None:
            scale_(gradients, (most / (step.grad_norm + 1e-6)).clamp(max=1))  # as torch.nn.utils.clip_grads_with_norm_

    def configure_optimizers(self) -> Any:
        optim = self.config.optim
        optimizer = adamw(parameter_groups(self.model, optim), optim)
        optimizer.register_load_state_dict_post_hook(keep_own_copies)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(optim, self.begun_with)(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        scheduler.step()

    # --- validation: token-weighted loss ---

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        self.val_loss.update(self._loss(batch) / batch.num_targets, batch.num_targets)

    def on_validation_epoch_end(self) -> None:
        self.log(
            "val_loss", self.val_loss.compute(), logger=False
        )  # `RunLog` logs it, at the right step even after a resume
        self.val_loss.reset()

    # --- checkpoints ---

    def _kept(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The part of a state dict that a checkpoint holds, which is all that training changes: components tuned in full; of those
        with LoRA the adapters, tensors trained beside them, and buffers, such as batch-norm statistics."""
        choices = asdict(self.config.optim.tuning)
        whole, adapted = (
            tuple(
                f"model.{name}."
                for word in self.trained
                if choices[word] == how
                for name in submodules(self.model, word)
            )
            for how in ("full", "lora")
        )
        ends = WHOLE if choices["projector"] == "lora" else ()
        buffers = {name for name, _ in self.named_buffers() if name.startswith(adapted)}
        return {n: x for n, x in state.items() if n.startswith(whole) or MARK in n or n.endswith(ends) or n in buffers}

    @cached_property
    def _frozen_fingerprint(self) -> str:
        """Fingerprint of what is not trained. That cannot change, so it is computed once, not at every save."""
        state = self.state_dict()
        kept = self._kept(state)
        return fingerprint({name: tensor for name, tensor in state.items() if name not in kept})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self._kept(checkpoint["state_dict"])
        checkpoint["lit_eemllm"] = {
            "config": asdict(self.config),
            "frozen": self._frozen_fingerprint,
            "mechanism": self.mechanisms.own.to_dict(),
            "tokenizer": self.tokenizer,
            "ranks": self.trainer.world_size,
            "begun_with": self.begun_with,
            "versions": {
                "lit_eemllm": __version__,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
                "lightning": lightning.__version__,
            },
        }
        checkpoint["rng"] = states = [rng_state()]
        if self.trainer.world_size > 1:  # a collective call: every rank comes here
            states *= self.trainer.world_size
            dist.all_gather_object(states, states[0])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises CheckpointError unless the checkpoint holds exactly the trained weights of this model."""
        own, saved = self._kept(self.state_dict()), tensors(checkpoint)
        expected, found = set(own), set(saved)
        if expected != found:
            raise CheckpointError(
                f"the checkpoint does not hold what this configuration trains ({', '.join(self.trained)}): "
                f"missing {_some(expected - found)}, unexpected {_some(found - expected)}. "
                "Set optim.tuning as it was, or start from its weights with init_from."
            )
        if wrong := {n for n in own if own[n].shape != saved[n].shape or own[n].dtype != saved[n].dtype}:
            raise CheckpointError(
                f"the checkpoint holds weights of other shapes or dtypes than this model: {_some(wrong)}"
            )
        tokenizer = checkpoint["lit_eemllm"].get("tokenizer") or self.tokenizer
        if self.tokenizer and tokenizer != self.tokenizer:
            raise CheckpointError(
                f"it was trained with another vocabulary (fingerprint {tokenizer}, here {self.tokenizer}): use the same "
                "model.tokenizer"
            )
        frozen = checkpoint["lit_eemllm"]["frozen"]
        if frozen != self._frozen_fingerprint:
            raise CheckpointError(
                f"the frozen parts differ from those it was trained with (fingerprint {frozen}, here "
                f"{self._frozen_fingerprint}): use the same model.decoder, model.vision.path and model.dtype"
            )
        meta = checkpoint["lit_eemllm"]
        self.begun_with = meta.get("begun_with", meta["config"]["optim"]["max_steps"])
        if not isinstance(self.begun_with, int):  # used in the first step
            raise TypeError(f"begun_with: found {self.begun_with!r:.99}, expected a number of steps")
        self._restored_rng = checkpoint["rng"]
        if has_trainer(self):
            if not has_numbers(checkpoint["loops"]["fit_loop"], self.trainer.fit_loop.state_dict()):
                raise TypeError("loops: found counters that are not numbers")
            rescale_pack_counts(checkpoint, self.trainer.world_size)

    def on_train_start(self) -> None:
        set_modes(self.model, self.trained)  # not in on_train_epoch_start, which Lightning skips on resume
        if self.trainer.world_size > 1:
            steps: list[Any] = [None] * self.trainer.world_size
            dist.all_gather_object(steps, self.global_step)
            if len(set(steps)) > 1:
                raise CheckpointError(
                    f"the ranks begin at different steps: {steps}. They must find the same checkpoint: name an `out` that all "
                    "nodes share, or copy the checkpoint to each."
                )
        if self._restored_rng is not None:
            with using(Path(str(self.trainer.ckpt_path))):
                self._restore(self._restored_rng)
            self._restored_rng = None
        self.has_begun = True

    def _restore(self, rng: list[dict[str, Any]]) -> None:
        """Set the learning rates of this run's schedule, and the random generators. rng: states, one for each rank that saved."""
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            for group, base, factor in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = base * factor(
                    scheduler.last_epoch
                )  # the saved rate is of another schedule if the run was extended
        if self.global_rank < len(rng):  # as late as possible: building loaders may draw numbers
            set_rng_state(rng[self.global_rank])
        else:  # saved by fewer ranks
            seed_everything((self.config.seed + self.global_step + self.global_rank) % 2**32, verbose=False)


def with_blank_image(batch: PackedBatch, transform: Transform) -> PackedBatch:
    """The pack with one more document: a text token, then a blank image, which no text sees."""
    picture = Image.new("RGB", (1, 1))
    document = (Run(False, 1), *(Run(True, tokens) for tokens in transform.runs(*picture.size)))
    answers = [*batch.layout.answers, ()] if batch.layout.answers else ()
    layout = SequenceLayout.of([*batch.layout.documents, document], answers).to(batch.input_ids.device)
    ids = torch.cat([batch.input_ids, batch.input_ids.new_zeros(layout.num_tokens - len(batch.input_ids))])
    pixels = torch.zeros_like(transform(picture)[None], device=ids.device)
    sizes, runs = [picture.size], [len(document) - 1]
    return replace(batch, input_ids=ids, pixel_values=pixels, layout=layout, image_sizes=sizes, image_runs=runs)


def has_numbers(found: Any, own: Any) -> bool:
    """Whether `found` has a number wherever `own` has one. Lightning restores any value unchecked, and fails later or not at all."""
    if isinstance(own, dict):
        return isinstance(found, dict) and all(
            has_numbers(found[key], value) for key, value in own.items() if key in found
        )
    return not isinstance(own, int) or isinstance(found, int)


def keep_own_copies(optimizer: torch.optim.Optimizer) -> None:
    """Copy the CPU tensors of a restored optimiser state, such as step counts. PyTorch keeps those of the checkpoint itself, and one
    of them would keep the whole file mapped."""
    for state in optimizer.state.values():
        state.update({name: x.clone() for name, x in state.items() if x.device.type == "cpu"})


def rescale_pack_counts(checkpoint: dict[str, Any], ranks: int) -> None:
    """Convert Lightning's pack counters to another number of ranks. They count the packs of one rank, and a step ends at multiples of
    the gradient accumulation; with as many packs per step on other ranks, each rank has seen more packs, or fewer."""
    saved_ranks = checkpoint["lit_eemllm"].get("ranks", ranks)
    progress = saved_packs(checkpoint)
    for count in (progress["total"], progress["current"]):
        more = count["ready"] * saved_ranks // ranks - count["ready"]
        count.update({key: value + more for key, value in count.items()})


def _some(names: set[str]) -> str:
    return f"{len(names)} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})" if names else "none"


def rng_state() -> dict[str, Any]:
    """States of all generators of this process, as types that load with ``weights_only=True``."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    _, numbers, second = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": list(numbers),
        "python_gauss": second,
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    second = state.get("python_gauss")  # of `random.gauss`, which makes two numbers at once
    random.setstate((3, tuple(state["python"]), None if second is None else float(second)))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
