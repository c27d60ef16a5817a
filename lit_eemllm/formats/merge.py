"""`merge`: a run's trained weights as a whole model, or its decoder's adapter as peft writes it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from ..config import to_yaml
from ..config.keys import Config
from ..console import console, quiet_libraries, write_atomically
from ..errors import UserError
from ..model.configuration import load_decoder_config
from ..report.card import write_card
from ..training.adapters import drop_adapters, merge_adapters, save_adapter
from ..training.checkpoint import new_folder
from ..training.initial import run_model, stored_weights

BASE = "base"
"""Folder beside an adapter for the decoder that it was trained on, where no other folder holds that."""


def merge(config: Config, checkpoint: str | None, out: Path, adapter: bool) -> None:
    """Write what a run has trained into a folder, which appears whole or not at all.

    Args:
        config: of the run.
        checkpoint: a file; None takes the run's newest.
        out: a new folder.
        adapter: only the decoder's adapter, for ``peft.PeftModel.from_pretrained`` on the base decoder, which is written beside it
            if the run began from other weights than its `model.decoder` holds; else the whole model with adapters folded
            in, for ``init_from`` and `EEMLLM.from_pretrained`.

    Raises:
        UserError: the folder exists, or there is no adapter.
    """
    quiet_libraries()
    if adapter and config.optim.tuning.llm != "lora":
        raise UserError(
            f"{config.out} has no decoder adapter: its optim.tuning.llm is {config.optim.tuning.llm}, not lora"
        )
    with new_folder(out) as folder:
        model, processor, source = run_model(config, checkpoint, only_weights=True)
        if adapter:
            own = _has_own_base(config)
            base = str(out / BASE) if own else config.model.decoder
            save_adapter(model.language_model, base, config.optim.lora, folder)
            if own:
                drop_adapters(model.language_model)
                model.language_model.save_pretrained(folder / BASE)
            done = f"adapter of {base}"
        else:
            done = f"model, {merge_adapters(model)} adapters folded in"
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            whole = replace(config, init_from=str(out), out=str(out), resume="auto")
            whole.model = replace(config.model, quantization=None)
            write_atomically(folder / "config.yaml", to_yaml(whole, comments=True))
            write_card(folder, out.name, model, asdict(config), (Path(config.out), source))
    console.print(f"{done}: {source} -> {out}")


def _has_own_base(config: Config) -> bool:
    """Whether the adapter was trained on a decoder that transformers finds nowhere: one that `init_from` has trained, or one that is
    a part of an EEMLLM's folder."""
    _, part = load_decoder_config(config.model.decoder)
    start = Path(config.init_from) if config.init_from is not None else None
    trained = (
        start is not None and start.exists() and any(n.startswith("language_model.") for n in stored_weights(start)[0])
    )
    return bool(part) or trained
