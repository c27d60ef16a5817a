"""FSDP2 (`torch.distributed.fsdp.fully_shard`) through Lightning's `ModelParallelStrategy`, with ordinary checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer

from ..compat.lightning import DataParallel
from ..errors import ConfigError
from ..mechanisms.connectors import LayerwiseProjector
from .tuning import in_order

if TYPE_CHECKING:
    from ..model import EEMLLM


def shared_out(model: EEMLLM) -> list[nn.Module]:
    """Parts that are sharded by themselves, and whole only while they are used: decoder layers, projectors, the mechanism's blocks."""
    projectors = model.projector.layers if isinstance(model.projector, LayerwiseProjector) else [model.projector]
    return [*model.language_model.model.layers, *projectors, *model.blocks.values()]


def shard(model: EEMLLM, mesh: DeviceMesh, compute: torch.dtype | None, offload: bool = False) -> None:
    """Shard in place: each of `shared_out` by itself, the rest (encoder, embeddings, head) together.

    Every rank must then call the same modules in every pass, whether its pack has an image or not.

    Args:
        model: frozen and cast.
        mesh: of all processes.
        compute: what autocast computes in, None without it. In 16 bits, the weights of `shared_out` are gathered in them, so
            that autocast makes no copies, which would stay whole until the backward pass; gradients are summed over ranks in
            float32. Streams keep their type, and the rest its weights': a lookup is no product, and an encoder of one's own
            may have buffers to match.
        offload: shares of weights, gradients and optimiser states stay in main memory, where the optimiser steps.
    """
    if isinstance(model, FSDPModule):
        return
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for part in shared_out(model):
        fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=place)
    fully_shard(model, mesh=mesh, offload_policy=place)
    register_fsdp_forward_method(model, "packed_loss")


class FSDP2(DataParallel):
    """Data parallel over all processes. A checkpoint is one file of whole tensors, as every other strategy writes it, so that
    a run resumes under another strategy, or on one device. Every rank reads it; rank 0 gathers it in its main memory.

    Args:
        offload: see `shard`. The norm of gradients is then summed over ranks in main memory.
    """

    def __init__(self, offload: bool = False) -> None:
        backend = "cpu:gloo,cuda:nccl" if offload and torch.cuda.is_available() else None
        super().__init__(save_distributed_checkpoint=False, process_group_backend=backend)
        self.offload = offload

    def model_to_device(self) -> None:
        """All but offloaded shares, which torch would not take back."""
        if not self.offload:
            return super().model_to_device()
        module: Any = self.model
        model: EEMLLM = module.model
        saved = model.state_dict().keys()
        if kept := [name for name, _ in model.named_buffers() if name in saved]:
            raise ConfigError(
                f"trainer.strategy=fsdp2_offload: found {len(kept)} saved buffers, such as {kept[0]}, which stay on the device, and "
                "torch restores no checkpoint that is on both; use fsdp2, or an encoder without batch norms"
            )
        module.model = None
        module.to(self.root_device)
        module.model = model
        for part in model.modules():
            for name, x in list(part.named_buffers(recurse=False)):
                setattr(part, name, x.to(self.root_device))

    def _names(self, optimizer: Optimizer) -> list[str]:
        assert self.model is not None
        return list(in_order(optimizer.param_groups, self.model))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As `Optimizer.state_dict`, with whole tensors, on rank 0; nothing on the others. (Lightning's would number the
        parameters as the model lists them, frozen ones included.)"""
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        assert self.model is not None
        named: dict[str, Any] = get_optimizer_state_dict(
            self.model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if not named:
            return {}
        number = {name: n for n, name in enumerate(self._names(optimizer))}
        groups = [{**g, "params": [number[name] for name in g["params"]]} for g in named["param_groups"]]
        return {"state": {number[name]: x for name, x in named["state"].items()}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Into model and optimiser, and returned whole for `on_load_checkpoint`."""
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=options)  # it fills in the rest
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = _by_name(state, self._names(optimizer))
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return checkpoint


def _by_name(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimiser's state with parameters named instead of numbered."""
    groups = [{**group, "params": [names[n] for n in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[n]: x for n, x in state["state"].items()}, "param_groups": groups}
