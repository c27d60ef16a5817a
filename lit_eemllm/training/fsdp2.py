"""FSDP2 (`torch.distributed.fsdp.fully_shard`) through Lightning's `ModelParallelStrategy`, with ordinary checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
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
from ..core.decoder import Inner
from ..errors import CheckpointError, ConfigError, WriteError
from ..mechanisms.connectors import LayerwiseProjector
from .checkpoint import read_checkpoint
from .sharded import begin_saving, changed, fill_shares, folder_of
from .tuning import in_order

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from ..config.keys import Config
    from ..model import EEMLLM


def sums_late(config: Config) -> bool:
    """Whether gradients are reduced over ranks once a step, after all packs that it accumulates. Until then each rank holds them
    whole. Where the decoder is tuned in full that would take too much memory, so they are reduced with every pack."""
    return config.optim.tuning.llm != "full"


def shared_out(model: EEMLLM) -> list[nn.Module]:
    """The modules that are sharded each by itself, and gathered only while they run: decoder layers, projectors, the mechanism's
    blocks, or what these hold where a layer calls it."""
    projectors = model.projector.layers if isinstance(model.projector, LayerwiseProjector) else [model.projector]
    blocks = [
        each for block in model.blocks.values() for each in (block.values() if isinstance(block, Inner) else [block])
    ]
    return [*model.language_model.model.layers, *projectors, *blocks]


def shard(model: EEMLLM, mesh: DeviceMesh, compute: torch.dtype | None, offload: bool = False) -> None:
    """Shard in place: each module of `shared_out` by itself, the rest (encoder, embeddings, head) together.

    Every rank must then call the same modules in every pass, whether its pack has an image or not.

    Args:
        model: frozen and cast.
        mesh: of all processes.
        compute: the dtype of autocast, None without it. If 16 bits, the weights of `shared_out` are gathered in it: autocast
            would make copies, and these would stay whole until the backward pass. Gradients are summed over ranks in float32.
            Activations keep their dtype, and so do the weights of the rest: an embedding is no product, and a user's encoder
            may have buffers of that dtype.
        offload: keep the shards of weights, gradients and optimiser states in main memory, where the optimiser steps.
    """
    if isinstance(model, FSDPModule):
        return
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for part in shared_out(model):
        fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=place)
    fully_shard(model, mesh=mesh, offload_policy=place)
    for method in ("packed_logits", "packed_loss", "packed_loss_and_kl"):
        register_fsdp_forward_method(model, method)


class FSDP2(DataParallel):
    """FSDP2 over all processes. Each rank writes its shares of a checkpoint while training goes on, and reads its shares of any
    checkpoint; so a run can resume on another number of ranks, under another strategy, or on one device (`sharded`).

    Args:
        offload: see `shard`. The gradient norm is then summed over ranks in main memory.
        hybrid: shard the weights over the processes of a node, and replicate them on every node (HSDP).
    """

    def __init__(self, offload: bool = False, hybrid: bool = False) -> None:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None
        super().__init__(save_distributed_checkpoint=True, process_group_backend=backend)
        self.offload, self.hybrid = offload, hybrid
        self._saving: Future[Any] | None = None
        self._savers: dist.ProcessGroup | None = None

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The mesh of all processes; if `hybrid`, nodes x processes of a node."""
        shape = (self.num_nodes, self.world_size // self.num_nodes) if self.hybrid else (self.world_size,)
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=("nodes", "shares")[-len(shape) :])

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        module: Any = self.model
        module.model.set_requires_gradient_sync(not sums_late(module.config))
        try:
            yield
        finally:
            module.model.set_requires_gradient_sync(True)

    def model_to_device(self) -> None:
        """Move everything to the device but offloaded shards, which torch would not move back."""
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
        """As `Optimizer.state_dict`, with DTensors. (Lightning's version would number parameters in the model's order, frozen ones
        too.)"""
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        assert self.model is not None
        named: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer)
        number = {name: n for n, name in enumerate(self._names(optimizer))}
        groups = [{**g, "params": [number[name] for name in g["params"]]} for g in named["param_groups"]]
        return {"state": {number[name]: x for name, x in named["state"].items()}, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Begin to save. First wait for the save before it (`settle`), of which a WriteError raised here may be."""
        self.settle()
        if self._savers is None:
            self._savers = dist.new_group(backend="gloo")
        with _as_write_errors():
            path = Path(self.broadcast(filepath))
            self._saving = begin_saving(checkpoint, path, self.checkpoint_io.save_checkpoint, self._savers)

    def settle(self) -> None:
        """Wait for the checkpoint that is being written. Raises WriteError, on all ranks, if it could not be."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with _as_write_errors():
                saving.result()

    def teardown(self) -> None:
        self.settle()
        super().teardown()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint into model and optimisers, and return it for `on_load_checkpoint`."""
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = read_checkpoint(path, verified=True, shares=())
        assert self.model is not None
        folder = folder_of(checkpoint, path)
        if folder is not None:
            self._refuse_changed(checkpoint, folder)
            own, names = dict(self.model.named_parameters()), [self._names(optimizer) for optimizer in self.optimizers]

            def like(name: str) -> Tensor:
                section, _, rest = name.partition(".")
                if section == "state_dict":
                    return own[rest]
                index, _, number, _ = rest.split(".")
                return own[names[int(index)][int(number)]]

            fill_shares(checkpoint, folder, like)
        options = StateDictOptions(full_state_dict=folder is None, strict=False)
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=options)  # it adds the missing keys
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = _by_name(state, self._names(optimizer))
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return checkpoint

    def _refuse_changed(self, checkpoint: Mapping[str, Any], folder: Path) -> None:
        """Each rank compares the checksums of some files. Raises CheckpointError on all."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, changed(checkpoint, folder, slice(self.global_rank, None, self.world_size)))
        if wrong := [name for names in found for name in names]:
            raise CheckpointError(f"{', '.join(wrong)}: its bytes have changed since they were written")


@contextlib.contextmanager
def _as_write_errors() -> Iterator[None]:
    try:
        yield
    except (CheckpointException, OSError) as error:
        causes = [each[0] for each in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        write_error = next((cause for cause in causes if isinstance(cause, WriteError)), None)
        if write_error is not None:
            raise write_error from error
        reason = causes[0].__context__ or causes[0]
        raise WriteError(
            f"the shares of a checkpoint could not be written: {reason}. Earlier checkpoints are as they were."
        ) from error


def settle(trainer: Trainer) -> None:
    """Wait until a checkpoint that is being written is complete. Raises WriteError on all ranks if it could not be."""
    if isinstance(trainer.strategy, FSDP2):
        trainer.strategy.settle()


def _by_name(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimiser's state with parameters named instead of numbered."""
    groups = [{**group, "params": [names[n] for n in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[n]: x for n, x in state["state"].items()}, "param_groups": groups}
