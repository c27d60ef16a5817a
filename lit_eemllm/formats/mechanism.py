"""A trained model under another mechanism or behind another connector: which modules stay, are copied, begin fresh or go.

Mechanisms that need the same modules share every weight. Where they differ it is in what connects encoder and decoder: one
connector, one for each layer, or modules of the mechanism's own. Another connector begins fresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ..config import flat
from ..config.keys import MechanismConfig
from ..errors import ConfigError
from ..mechanisms import PRESETS, Connector, ConnectorModule, Mechanism, build_connector, build_mechanism
from ..mechanisms.connectors import LayerwiseProjector
from ..model.modeling import EEMLLM

SETTINGS = {option.name for option in fields(MechanismConfig)}


@dataclass(frozen=True)
class Fate:
    """What became of a tensor in a conversion: kept, copied, fresh or dropped."""

    name: str
    numel: int
    fate: str


def mechanism_settings(mechanism: Mechanism, num_layers: int) -> dict[str, Any]:
    """Keys of ``model.mechanism`` that `build_mechanism` turns into this one: the nearest preset and what differs."""
    found = []
    for name, preset in PRESETS.items():
        if type(preset) is type(mechanism):
            base = preset.stretched(num_layers)
            changed = {key: value for key, value in mechanism.to_dict().items() if value != base.to_dict().get(key)}
            options = {key: changed.pop(key) for key in [*changed] if key not in SETTINGS}
            found.append({**changed, **({"options": options} if options else {}), "preset": name})
    return min(found, key=lambda settings: len(flat(settings)))


def choose_mechanism(current: Mechanism, num_layers: int, wanted: Mapping[str, Any]) -> Mechanism:
    """A preset with changes or, if `wanted` names no preset, the current mechanism with changes.

    Args:
        current: the model's.
        num_layers: the decoder's.
        wanted: keys of ``model.mechanism``, without nulls. Raises ConfigError naming every key that is wrong.
    """
    settings = {} if "preset" in wanted else mechanism_settings(current, num_layers)
    settings = _merged(settings, wanted)
    preset = settings.pop("preset")
    return build_mechanism(preset, num_layers, settings)


def choose_connector(current: Connector, wanted: Mapping[str, Any]) -> Connector:
    """A registered one with changes or, if `wanted` has no name, the current one with changes: keys of ``model.connector``."""
    return build_connector(_merged({} if "name" in wanted else current.to_dict(), wanted))


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Section by section, the new over the old."""
    both = {
        key: _merged(old.get(key, {}), value) if isinstance(value, Mapping) else value for key, value in new.items()
    }
    return {**old, **both}


def change_mechanism(
    model: EEMLLM, mechanism: Mechanism, seed: int, connector: Connector | None = None
) -> tuple[EEMLLM, list[Fate]]:
    """The same encoder and decoder under another mechanism; of what connects them, whatever can be taken over.

    One projector becomes those of all layers by copying, as SAISA's second stage begins; layerwise projectors become one
    only if they are all equal. Anything else that is new begins as in a fresh model, gates at zero.

    Args:
        model: is used up.
        mechanism: contradicts neither itself nor the decoder.
        seed: of what is fresh.
        connector: None = the model's.

    Raises:
        ConfigError: several projectors would have to become one.
    """
    before = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    connector = model.connector if connector is None else connector
    if mechanism.modules == model.mechanism.modules and connector == model.connector:
        model.set_mechanism(mechanism)
        return model, [Fate(name, numel, "kept") for name, numel in before.items()]

    config = deepcopy(model.config)
    config.mechanism, config.connector = mechanism.to_dict(), connector.to_dict()
    for part in (model.language_model, model.vision):
        for module in part.modules():  # transformers begins anew what it has not loaded itself, such as merged layers
            module._is_hf_initialized = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = EEMLLM(config, model.language_model, model.vision)
    new.generation_config = model.generation_config
    new.projector.to(model.dtype)
    new.blocks.to(model.dtype)

    fates = {name: "kept" if name in before else "fresh" for name in new.state_dict()}
    fates |= _take_projector(model, new) | _take_blocks(model, new)
    ledger = [Fate(name, tensor.numel(), fates[name]) for name, tensor in new.state_dict().items()]
    gone = {name: numel for name, numel in before.items() if name not in fates}
    if any(
        fate == "copied" and name.startswith("projector.") for name, fate in fates.items()
    ):  # it lives on under other names
        gone = {name: numel for name, numel in gone.items() if not name.startswith("projector.")}
    return new.eval(), ledger + [Fate(name, numel, "dropped") for name, numel in gone.items()]


def _take_projector(model: EEMLLM, new: EEMLLM) -> dict[str, str]:
    """Fill what connects to the encoder from the model's, if that is possible; the fate of each of its tensors."""
    old, projector = model.projector, new.projector
    same = model.connector == new.connector
    if same and isinstance(old, ConnectorModule) and isinstance(projector, LayerwiseProjector):
        for one in projector.layers:
            one.load_state_dict(old.state_dict())
        return _named(projector, "projector", "copied")
    if same and isinstance(old, LayerwiseProjector) and isinstance(projector, ConnectorModule):
        projector.load_state_dict(_the_one(old).state_dict())
        return _named(projector, "projector", "copied")
    both = isinstance(old, ConnectorModule) and isinstance(projector, ConnectorModule)
    same &= both or (type(old) is type(projector) and model.mechanism.weights == new.mechanism.weights)
    if same:
        projector.load_state_dict(old.state_dict())
    return _named(projector, "projector", "kept" if same else "fresh")


def _take_blocks(model: EEMLLM, new: EEMLLM) -> dict[str, str]:
    """Likewise the modules before and inside layers, as far as both have them."""
    fates: dict[str, str] = {}
    alike = model.mechanism.weights == new.mechanism.weights
    for layer, block in new.blocks.items():
        kept = model.blocks[layer].state_dict() if alike and layer in model.blocks else {}
        block.load_state_dict(kept, strict=False)
        begins = "copied" if getattr(block, "copies", ()) else "fresh"
        prefix = f"{new.mechanism.blocks_name}.{layer}"
        fates |= {f"{prefix}.{name}": "kept" if name in kept else begins for name in block.state_dict()}
    return fates


def _named(module: nn.Module, prefix: str, fate: str) -> dict[str, str]:
    return {f"{prefix}.{name}": fate for name in module.state_dict()}


def _the_one(projectors: LayerwiseProjector) -> nn.Module:
    """The projector that all layers share. Raises ConfigError if they differ."""
    first, *others = projectors.layers
    values = first.state_dict()
    different = [
        layer
        for layer, projector in enumerate(others, 1)
        if any(not tensor.equal(values[name]) for name, tensor in projector.state_dict().items())
    ]
    if different:
        raise ConfigError(
            f"the model has a projector for each layer, the mechanism one for all; they can become one only if they are "
            f"equal, but layers {', '.join(map(str, different[:5]))}{', ...' if len(different) > 5 else ''} differ from "
            "layer 0. Choose a mechanism with visual_source=layerwise, or convert the run before the layerwise stage."
        )
    return first
