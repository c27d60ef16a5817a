"""Build the model that a run begins with (parts, `init_from`) and the one that it has trained (with a checkpoint)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import seed_everything
from lightning.pytorch.utilities.seed import isolate_rng
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..config import flat, load_config
from ..errors import CheckpointError, UserError
from ..model.build import build
from ..model.configuration import load_decoder_config
from ..model.folders import finder, refuse_adapter, tensors_of
from ..model.pretrained import without_weights
from ..shipped import nowhere
from .adapters import MARK, merge_adapters
from .checkpoint import FOLDER, newest_checkpoint, read_checkpoint, tensors, using
from .module import LitEEMLLM
from .tuning import COMPONENTS, submodules

if TYPE_CHECKING:
    from ..config.keys import Config
    from ..model import EEMLLM, Processor

UNTRAINED = "none"
"""In place of a checkpoint: the parts as they are, before any training."""
_DECODER = "language_model."


def initial_model(
    config: Config, needed: bool = True, chain: tuple[Path, ...] = ()
) -> tuple[EEMLLM, Processor, Table | None]:
    """Join the parts, then load the weights of `init_from`. If these include the decoder's, the decoder is built from them and its
    own folder's weights are not loaded: main memory holds one decoder, and quantisation applies to the right weights.

    Args:
        config: of the run. Seed torch before: the projector is randomly initialised.
        needed: whether a missing `init_from` is an error. It is not, where a checkpoint loaded later may hold all of it.
        chain: the checkpoints whose `init_from` led here, to notice a circle.

    Returns:
        the model, its processor, and a table of what was loaded and what was not, by component.

    Raises:
        CheckpointError: `init_from` has no tensors, tensors that this model does not have, or tensors of other shapes.
    """
    path = None if config.init_from is None else Path(config.init_from)
    if path is None or not (needed or path.exists()):
        return *build(config.model), None
    state, source = weights_of(path, chain)
    names = list(state)
    decoder = {name.removeprefix(_DECODER): state.pop(name) for name in names if name.startswith(_DECODER)}
    if decoder:
        _refuse_other_decoder(decoder, config.model.decoder, source)
    model, processor = build(config.model, decoder)
    own = {name: x for name, x in model.state_dict().items() if not name.startswith(_DECODER)}
    _refuse_unfit(state, own, source)
    model.load_state_dict(state, strict=False)
    kept = [] if decoder else [name for name, _ in model.named_parameters() if name.startswith(_DECODER)]
    kept += [name for name in own if name not in state]
    return model, processor, _table(model, names, kept, source)


def trained_model(config: Config, checkpoint: Path | None, chain: tuple[Path, ...] = ()) -> tuple[EEMLLM, Processor]:
    """A run's model with the weights of a checkpoint; without one, the model that the run begins with.

    Raises:
        CheckpointError: the checkpoint does not fit, or was trained with other frozen parts.
    """
    seed_everything(config.seed, verbose=False)
    model, processor, _ = initial_model(config, needed=False, chain=chain)
    module = LitEEMLLM(model, config, processor)
    if checkpoint is not None:
        trained = read_checkpoint(checkpoint, shares=["state_dict"])
        with using(checkpoint):
            module.on_load_checkpoint(trained)
            module.load_state_dict(trained["state_dict"], strict=False)
    return model, processor


def run_model(config: Config, checkpoint: str | None, only_weights: bool = False) -> tuple[EEMLLM, Processor, str]:
    """A run's model in evaluation mode and in main memory, and where its weights came from.

    Args:
        config: of the run.
        checkpoint: a file, or UNTRAINED; None takes the run's newest.
        only_weights: they are written elsewhere and never run, so kernels of a GPU are not asked for.

    Raises:
        CheckpointError: there is none, it does not fit, or was trained with other frozen parts.
    """
    path, source = None, "before training"
    if checkpoint != UNTRAINED:
        path = Path(checkpoint) if checkpoint is not None else newest_checkpoint(Path(config.out))
        converted = config.init_from is not None and Path(config.init_from).resolve() == Path(config.out).resolve()
        if path is None and not converted:
            raise CheckpointError(f"{config.out}: no checkpoint in it; train first, or use --checkpoint {UNTRAINED}")
        source = str(path or config.init_from)
    if only_weights:
        config = replace(config, model=replace(config.model, liger=False))
    model, processor = trained_model(config, path)
    return model.eval(), processor, source


def _refuse_other_decoder(state: Mapping[str, Tensor], path: str, source: Path) -> None:
    """Raises CheckpointError unless these are all the tensors of the decoder in the folder `path`: none may be missing."""
    own = without_weights(AutoModelForCausalLM, load_decoder_config(path)[0]).state_dict(keep_vars=True)
    _refuse_unfit(state, own, source, _DECODER)
    present = {id(own[name]) for name in state}  # a tied weight has two names
    missing = [name for name, x in own.items() if id(x) not in present]
    if missing:
        raise CheckpointError(
            f"init_from={source}: of the {len(own)} tensors of model.decoder={path} it lacks {len(missing)}, such as {missing[0]}: "
            "expected all or none. Set model.decoder to the one that it was trained with."
        )


def _refuse_unfit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: Path, prefix: str = "") -> None:
    """Raises CheckpointError unless the model's `own` tensors include all of these, in the same shapes."""
    wrong = [
        f"{prefix}{name}: found {list(tensor.shape)}, expected {list(own[name].shape) if name in own else 'no such tensor'}"
        for name, tensor in state.items()
        if name not in own or own[name].shape != tensor.shape
    ]
    if wrong:
        listed = "\n  ".join(wrong[:5] + (["..."] if len(wrong) > 5 else []))
        raise CheckpointError(
            f"init_from={source}: {len(wrong)} of {len(state)} tensors do not fit this model:\n  {listed}"
        )


def _table(model: EEMLLM, loaded: Sequence[str], kept: Sequence[str], source: Path) -> Table:
    table = Table(
        "component", "tensors loaded", "keep their values", title=f"weights from {source}", title_justify="left"
    )
    for part, _ in model.named_children():
        mine, others = (
            [name.removeprefix(f"{part}.") for name in names if name.startswith(f"{part}.")] for names in (loaded, kept)
        )
        if mine or others:
            table.add_row(part, str(len(mine)), f"{len(others)}, such as {others[0]}" if others else "none")
    return table


def weights_of(path: Path, chain: tuple[Path, ...] = ()) -> tuple[dict[str, Tensor], Path]:
    """The trained weights of a run directory, a checkpoint or a `save_pretrained` folder, under the names of an unquantised model
    without adapters, and where they are from. Adapters are merged into the weights that they were trained on, quantised or
    not; the configuration of their run names those.

    Raises:
        CheckpointError: there are none, or the weights below the adapters cannot be rebuilt.
    """
    state, source, checkpoint = stored_weights(path)
    if not state:
        raise CheckpointError(f"init_from={source}: no tensors in it")
    if checkpoint is None:
        return state, source
    if not any(MARK in name for name in state):
        return {name: x.clone() for name, x in state.items()}, source  # a mapped file keeps its disk space when deleted
    if source.resolve() in chain:
        raise CheckpointError(f"init_from={source}: the run begins from itself")
    with using(source):
        values = flat(checkpoint["lit_eemllm"]["config"])
    try:
        config = load_config([], [f"{key}={json.dumps(value)}" for key, value in values.items()])
        with isolate_rng():
            trained, _ = trained_model(config, source, (*chain, source.resolve()))
        words = [word for word in COMPONENTS if getattr(config.optim.tuning, word) != "frozen"]
        parts = {name: trained.get_submodule(name) for word in words for name in submodules(trained, word)}
        for part in parts.values():
            merge_adapters(part)
    except UserError as error:
        raise CheckpointError(
            f"init_from={source}: its adapters belong to weights that cannot be rebuilt: {error}"
        ) from error
    return {f"{name}.{key}": x for name, part in parts.items() for key, x in part.state_dict().items()}, source


def stored_weights(path: Path) -> tuple[dict[str, Tensor], Path, dict[str, Any] | None]:
    """The tensors that `init_from` names as they are stored, adapters not merged; where they are from; the checkpoint, if it is one.
    Tensors of a checkpoint are memory-mapped: to look at names and shapes costs no memory."""
    if not path.exists():
        raise CheckpointError(
            f"init_from={path}: no such run directory, checkpoint or folder of a model{nowhere(path)}"
        )
    if path.is_dir():
        refuse_adapter(finder(str(path), "init_from"), "init_from", str(path))
    if path.is_dir() and any(path.glob("model*.safetensors")):
        return tensors_of(path, "init_from"), path, None
    source = path if not path.is_dir() else newest_checkpoint(path)
    if source is None:
        raise CheckpointError(f"init_from={path}: no checkpoint in {path / FOLDER} and no model.safetensors")
    checkpoint = read_checkpoint(source, shares=["state_dict"])
    with using(source):
        return {name.removeprefix("model."): x for name, x in tensors(checkpoint).items()}, source, checkpoint
