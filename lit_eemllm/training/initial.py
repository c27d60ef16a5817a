"""The model that a run begins with, and the one that it has trained: parts, the weights that `init_from` names, a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import seed_everything
from lightning.pytorch.utilities.seed import isolate_rng
from rich.table import Table
from torch import Tensor

from ..config import flat, load_config
from ..errors import CheckpointError, UserError
from ..model.build import build, quantize
from ..model.folders import tensors_of
from .adapters import MARK, merge_adapters
from .checkpoint import FOLDER, newest_checkpoint, read_checkpoint, tensors, using
from .module import LitEEMLLM
from .tuning import COMPONENTS, submodules

if TYPE_CHECKING:
    from ..model import EEMLLM, Processor
    from ..schema import Config


def initial_model(
    config: Config, needed: bool = True, chain: tuple[Path, ...] = ()
) -> tuple[EEMLLM, Processor, Table | None]:
    """The parts joined, with the weights of `init_from` in their place; quantised last, so that these may be of any kind.

    Args:
        config: of the run. Seed torch before: the projector is fresh.
        needed: whether a missing `init_from` is an error; a checkpoint may hold all of it.
        chain: the checkpoints whose beginning this is.

    Returns:
        the model, its processor, and what `load_weights` tells.
    """
    path = None if config.init_from is None else Path(config.init_from)
    if path is None or not (needed or path.exists()):
        return *build(config.model), None
    model, processor = build(config.model, quantized_now=False)
    table = load_weights(model, path, chain)
    if config.model.quantization is not None:
        quantize(model, config.model)
    return model, processor, table


def trained_model(config: Config, checkpoint: Path | None, chain: tuple[Path, ...] = ()) -> tuple[EEMLLM, Processor]:
    """A run's model with the weights of a checkpoint, or, without one, as it begins.

    Raises:
        CheckpointError: the checkpoint does not fit, or was trained with other frozen parts.
    """
    seed_everything(config.seed, verbose=False)
    model, processor, _ = initial_model(config, needed=False, chain=chain)
    module = LitEEMLLM(model, config, processor.fingerprint())
    if checkpoint is not None:
        trained = read_checkpoint(checkpoint)
        with using(checkpoint):
            module.on_load_checkpoint(trained)
            module.load_state_dict(trained["state_dict"], strict=False)
    return model, processor


def load_weights(model: EEMLLM, path: Path, chain: tuple[Path, ...] = ()) -> Table:
    """Start from the trained weights of a run directory, a checkpoint or a `save_pretrained` folder; nothing else of it.

    Adapters are folded into the weights that they were trained on, quantised or not, which their run's own configuration names.

    Args:
        model: not quantised.
        chain: see `initial_model`.

    Returns:
        what was loaded and what keeps its values, by component.

    Raises:
        CheckpointError: there is nothing to load, or tensors that this model has not, or of another shape.
    """
    state, source = weights_of(path, chain)
    own = model.state_dict()
    wrong = [
        f"{name}: found {list(tensor.shape)}, expected {list(own[name].shape) if name in own else 'no such tensor'}"
        for name, tensor in state.items()
        if name not in own or own[name].shape != tensor.shape
    ]
    if wrong or not state:
        listed = "\n  ".join(wrong[:5] + (["..."] if len(wrong) > 5 else []))
        raise CheckpointError(
            f"init_from={source}: {len(wrong)} of {len(state)} tensors do not fit this model:\n  {listed}"
        )
    model.load_state_dict(state, strict=False)
    table = Table(
        "component", "tensors loaded", "keep their values", title=f"weights from {source}", title_justify="left"
    )
    for part, _ in model.named_children():
        mine = [name for name in own if name.startswith(f"{part}.")]
        kept = [name for name in mine if name not in state]
        some = f"{len(kept)}, such as {kept[0].removeprefix(f'{part}.')}" if kept else "none"
        if mine:
            table.add_row(part, str(len(mine) - len(kept)), some)
    return table


def weights_of(path: Path, chain: tuple[Path, ...] = ()) -> tuple[dict[str, Tensor], Path]:
    """The tensors that `load_weights` loads, under the names of an unquantised model without adapters, and where they are from."""
    state, source, checkpoint = stored_weights(path)
    if checkpoint is None or not any(MARK in name for name in state):
        return state, source
    if source.resolve() in chain:
        raise CheckpointError(f"init_from={source}: the run begins from itself")
    with using(source):
        values = flat(checkpoint["lit_eemllm"]["config"])
    try:
        config = load_config([], [f"{key}={json.dumps(value)}" for key, value in values.items()])
        with isolate_rng():
            trained, _ = trained_model(config, source, (*chain, source.resolve()))
    except UserError as error:
        raise CheckpointError(
            f"init_from={source}: its adapters belong to weights that cannot be made again: {error}"
        ) from error
    merge_adapters(trained)
    changed = [
        f"{name}."
        for word in COMPONENTS
        if getattr(config.optim.tuning, word) != "frozen"
        for name in submodules(trained, word)
    ]
    return {name: x for name, x in trained.state_dict().items() if name.startswith(tuple(changed))}, source


def stored_weights(path: Path) -> tuple[dict[str, Tensor], Path, dict[str, Any] | None]:
    """The tensors that `init_from` names as they are stored, adapters apart; where they are from; the checkpoint, if they are of one.
    A checkpoint's are mapped: names and shapes cost no memory."""
    if not path.exists():
        raise CheckpointError(f"init_from={path}: no such run directory, checkpoint or folder of a model")
    if path.is_dir() and any(path.glob("model*.safetensors")):
        return tensors_of(path, "init_from"), path, None
    source = path if not path.is_dir() else newest_checkpoint(path)
    if source is None:
        raise CheckpointError(f"init_from={path}: no checkpoint in {path / FOLDER} and no model.safetensors")
    checkpoint = read_checkpoint(source)
    with using(source):
        return {name.removeprefix("model."): x for name, x in tensors(checkpoint).items()}, source, checkpoint
