"""What runs on the fake device in several tests: backends by their stand-ins, and an optimiser step as Lightning takes it."""

from __future__ import annotations

import copy
import sys
from contextlib import redirect_stderr
from functools import cache
from io import StringIO
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import tiny
import torch
from torch import Tensor

from lib.fake_cuda import kernels
from lib.fake_cuda.world import Note, World
from lit_eemllm.attention import AttentionBackend, resolve_backend
from lit_eemllm.config import Config, load_config
from lit_eemllm.layout import PackedBatch
from lit_eemllm.mechanisms import NO_ALIGNER, Mechanism
from lit_eemllm.model import EEMLLM
from lit_eemllm.training.module import LitEEMLLM, compute_dtype
from lit_eemllm.training.tuning import set_modes

PACK = [[3, 0, 4], [2, 0, 1, 0, 3], [7], [0, 2]]
OTHERS = {
    "unrotated": Mechanism(visual_positions="unrotated"),
    "shared": Mechanism(visual_positions="shared", freeze_prefix=True),
    "window": Mechanism(visual_window=3),
    "some": Mechanism(aligner=NO_ALIGNER, rows=(("1", (("tokens", "every 2"), ("seen", "every 4"))),)),
    "apart": Mechanism(dense_layers="all", rows=(("1", (("seen", "every 2"),)),)),
    "dropping": Mechanism(aligner=NO_ALIGNER, visual_drop=((1, 0.5),)),
    "sliding": Mechanism(rows=(("1-2", (("attend", "image"), ("tokens", "every 2"))),)),
    "chunks": Mechanism(dense_layers="all", visual_drop=((1, 0.5),)),
}
"""What no preset does; the last two in the decoders of `DECODERS`."""
DECODERS = {"sliding": "gemma3_text", "chunks": "llama4_text"}

ALLOWED = {
    "known = [x.detach()": "the look at loss and norm before the optimiser takes a step: it replaces all others",
    "loss, norm, stop = torch.stack(known).tolist()": "the look at loss and norm before the optimiser takes a step",
}
"""Where an optimiser step may make the host wait: a part of the line, and why."""


ANSWERING = {
    "visual_BL, real_BL = torch.stack(": "once a prompt: the runs of text and images decide what is computed",
    "if is_first_iteration and (input_ids": "once a prompt: one that ends with an image is refused",
    "ids = model.generate(": "transformers asks after every token whether all have ended; then the answers are read",
    "sums = zip(*torch.stack(found).tolist()": "the losses of all packs, once",
}
"""Likewise where prompts are answered and losses of validation computed."""


def unexpected(world: World, allowed: dict[str, str]) -> list[Note]:
    return [note for note in world.notes if not any(line in note.where for line in allowed)]


@cache
def backend(name: str, kind: str = "bfloat16", head_size: int = 8) -> AttentionBackend:
    """As the program finds it on the device, by a stand-in where the kernel is no part of PyTorch."""
    dtype = torch.float32 if kind == "exact" else torch.bfloat16
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = kernels.flash_attn_2()  # type: ignore[attr-defined]
    with patch.dict(sys.modules, {"flash_attn": package} if name == "flash-attn" else {}):
        chosen = resolve_backend(name.partition("-")[0], "cuda", dtype, True, head_size)
    assert chosen.backend.provider == {"flash-attn": "flash-attn 2", "xformers": "xFormers", "cudnn": "cuDNN"}.get(
        name, "PyTorch"
    )
    return chosen.backend


def stand_in() -> None:
    """For kernels that a CPU cannot run."""
    with redirect_stderr(StringIO()):  # xFormers says that it has none
        import xformers.ops

    from lit_eemllm.attention import flex

    xformers.ops.memory_efficient_attention = kernels.xformers()
    flex._compiled = kernels.flex


def configuration(tuning: str, checkpointing: bool = False, kind: str = "bfloat16", *overrides: str) -> Config:
    """Kind: of frozen weights, under autocast to bfloat16; ``exact``: all is float32."""
    dtype, precision = ("float32", "32-true") if kind == "exact" else (kind, "bf16-mixed")
    return load_config([], [
        "model.decoder=x", "model.vision.path=x", "data.train=x", "optim.lr=1e-3", "optim.max_steps=2",
        f"optim.tuning.llm={tuning}", "optim.lora.dropout=0", f"model.dtype={dtype}", f"trainer.precision={precision}",
        f"optim.activation_checkpointing={str(checkpointing).lower()}", *overrides,
    ])  # fmt: skip


class SimpleTrainer(SimpleNamespace):
    """What a step asks of it."""

    accumulate_grad_batches = world_size = 1
    global_step, global_rank, is_global_zero = 0, 0, True
    strategy = precision_plugin = None


TRAINER = SimpleTrainer()


def training_module(model: EEMLLM, config: Config, device: str) -> LitEEMLLM:
    """As Lightning has it when training begins."""
    torch.manual_seed(0)  # of adapters
    module = LitEEMLLM(model, config)
    module.trainer = TRAINER  # type: ignore[assignment]
    module.to(device)
    set_modes(module.model, module.trained)
    return module


def optimiser_step(module: LitEEMLLM, batch: PackedBatch, optimizer: Any = None) -> tuple[Tensor, Tensor]:
    """Of a batch on the CPU: the loss of the pack, and the norm of the gradients."""
    device, dtype = module.device, compute_dtype(module.config)
    if device.type == "cuda":
        batch = batch.pin_memory().to(device)  # as the loader and Lightning
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        loss = module.training_step(batch, 0)
    loss.backward()
    module.on_after_backward()
    optimizer = optimizer or module.configure_optimizers()["optimizer"]
    assert all(p.device == device and (p.grad is None or p.grad.device == device) for p in module.parameters())
    module.on_before_optimizer_step(optimizer)
    module.configure_gradient_clipping(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    return tuple(getattr(x, "held", x).detach() for x in (loss, module.step.grad_norm))


@cache
def _model(mechanism: str) -> EEMLLM:
    return tiny.model(DECODERS.get(mechanism, "llama-gqa"), OTHERS.get(mechanism, mechanism))


def model(mechanism: str) -> EEMLLM:
    return copy.deepcopy(_model(mechanism))
