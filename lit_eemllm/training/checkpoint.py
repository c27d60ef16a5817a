"""Checkpoint files: written atomically, read without executing anything, found again for `resume` and `init_from`."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ..errors import CheckpointError

if TYPE_CHECKING:
    from ..model import EEMLLM

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d+)\.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint exists whole under its name or not at all: written beside it, flushed to disk, renamed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents, on the CPU. Raises CheckpointError for a file that is missing, broken, foreign or would execute code."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as a checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(checkpoint, dict) or "lit_eemllm" not in checkpoint:
        raise CheckpointError(f"{path}: not a checkpoint of lit_eemllm (it has no section 'lit_eemllm')")
    return checkpoint


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the most steps in a run directory."""
    found = {int(match[1]): path for path in (run / FOLDER).glob("*.ckpt") if (match := _NAME.fullmatch(path.name))}
    return found[max(found)] if found else None


def load_weights(model: EEMLLM, path: Path) -> str:
    """Start from the trained weights of a run directory, a checkpoint or a `save_pretrained` folder; nothing else of it.

    Returns:
        what was loaded, in words.

    Raises:
        CheckpointError: it holds tensors that this model has not, or of another shape.
    """
    if (path / "model.safetensors").is_file() or (path / "model.safetensors.index.json").is_file():
        from ..model import EEMLLM as Model

        state = Model.from_pretrained(path).state_dict()
        source = path
    else:
        source_or_none = newest_checkpoint(path) if path.is_dir() else path
        if source_or_none is None:
            raise CheckpointError(f"init_from={path}: no checkpoint in {path / FOLDER} and no model.safetensors")
        source = source_or_none
        state = {name.removeprefix("model."): tensor for name, tensor in read_checkpoint(source)["state_dict"].items()}
    own = model.state_dict()
    wrong = [
        f"{name}: found {list(tensor.shape)}, expected {list(own[name].shape) if name in own else 'no such tensor'}"
        for name, tensor in state.items()
        if name not in own or own[name].shape != tensor.shape
    ]
    if wrong:
        listed = "\n  ".join(wrong[:5] + (["..."] if len(wrong) > 5 else []))
        raise CheckpointError(f"init_from={source}: {len(wrong)} tensors do not fit this model:\n  {listed}")
    model.load_state_dict(state, strict=False)
    parts = {name.split(".")[0] for name in state}
    return f"{len(state)} tensors ({', '.join(sorted(parts))}) from {source}; {len(own) - len(state)} keep their values"
