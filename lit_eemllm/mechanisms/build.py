"""Build a mechanism or a connector from the keys of a configuration: a registered one, and the keys that override it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, not_one_of
from .base import PRESETS, Mechanism, hashable, mechanism_named, rows_of
from .connectors import CONNECTORS, DEFAULT, Connector, connector_named

if TYPE_CHECKING:
    from ..config.keys import ConnectorConfig, MechanismConfig

_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((float, int), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "text"),
}


def without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are set; null means: as the preset says."""
    plain = {key: without_nulls(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return {key: value for key, value in plain.items() if value is not None and value != {}}


def option_problems(
    word: str, registered: Mapping[str, Any], name: str, given: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Keys of a section ``options``, nulls removed, that a registered mechanism or connector does not take.

    Args:
        word: the key that names it, ``preset`` or ``connector``.
        registered: the registry.
        name: a name in it.
        given: the options.

    Returns:
        (key from `options` on, what is wrong).
    """
    chosen, wrong = registered[name], list[tuple[str, str]]()
    shared = len(fields(Mechanism)) if isinstance(chosen, Mechanism) else 0

    def check(part: Any, known: list[str], values: Mapping[str, Any], section: str) -> None:
        hints = {option.name: option.type for option in fields(part)}
        for key, value in values.items():
            types, expected = _TYPES.get(getattr(hints.get(key), "__name__", hints.get(key)), ((), ""))
            inner = getattr(part, key, None) if key in known else None
            if key not in known:
                own = {other: [option.name for option in fields(each)[shared:]] for other, each in registered.items()}
                others = [other for other, names in own.items() if part is chosen and key in names]
                hint = not_one_of(key, known) if known else "it has no options of its own"
                hint = f"use {word}={' or '.join(others)}" if others else hint
                wrong.append((f"{section}.{key}", f"the {word} {name} has no such option; {hint}"))
            elif is_dataclass(inner) and isinstance(value, Mapping):
                check(inner, [option.name for option in fields(inner)], value, f"{section}.{key}")
            elif is_dataclass(inner):
                wrong.append((f"{section}.{key}", f"found {value!r}, expected a section"))
            elif isinstance(value, Mapping):
                wrong.append((f"{section}.{key}", f"found {value!r}, expected a value such as {inner!r}"))
            elif types and type(value) not in types:
                wrong.append((f"{section}.{key}", f"found {value!r}, expected {expected}"))

    check(chosen, [option.name for option in fields(chosen)[shared:]], given, "options")
    return wrong


def build_connector(section: Mapping[str, Any]) -> Connector:
    """From the keys of ``model.connector``, or what `Connector.to_dict` gave; without a name it is the default.

    Raises:
        ConfigError: naming every key that is wrong.
    """
    known = section if isinstance(section, Mapping) else {"name": None}  # of a model's folder
    name, given = known.get("name", DEFAULT.name), known.get("options", {})
    if not isinstance(name, str) or not isinstance(given, Mapping):
        raise ConfigError(f"model.connector: found {section!r:.99}, expected a name and options")
    connector, options = connector_named(name), without_nulls(given)
    problems = option_problems("connector", CONNECTORS, name, options)
    if not problems:
        connector = replace(connector, **options)
        problems = [(f"options.{key}", text) for key, text in connector.problems()]
    if problems:
        raise ConfigError("\n".join(f"model.connector.{key}: {text}" for key, text in problems))
    return connector


def configured_connector(section: ConnectorConfig) -> Connector:
    """The connector of a configuration's section ``model.connector``. Raises as `build_connector`."""
    return build_connector(asdict(section))


def build_mechanism(preset: str, num_layers: int, overrides: Mapping[str, Any] | None = None) -> Mechanism:
    """A preset for a decoder of so many layers, with overrides; None keeps what the preset says.

    Args:
        preset: a name of `PRESETS`.
        num_layers: the decoder's.
        overrides: keys of ``model.mechanism``, its own options also without `options` around them; those that have options
            themselves (`aligner`) as mappings.

    Raises:
        ConfigError: naming every key that is wrong.
    """
    mechanism = _overridden(mechanism_named(preset).stretched(num_layers), preset, overrides or {})
    problems = mechanism.problems(num_layers)
    blocks = type(mechanism).block is not Mechanism.block
    if not problems and not blocks and all(row.blind for row in mechanism.table(num_layers)):
        problems.append(("cross_layers", "text sees the image in no layer"))
    if problems:
        raise ConfigError("\n".join(f"model.mechanism.{name}: {text}" for name, text in problems))
    return mechanism


def _overridden(mechanism: Mechanism, preset: str, overrides: Mapping[str, Any]) -> Mechanism:
    """The mechanism of a preset, with overrides as in `build_mechanism`."""
    given = without_nulls(overrides)
    shared = {option.name for option in fields(Mechanism)}
    own = {name: given.pop(name) for name in [*given] if name not in shared and name != "options"} | given.pop(
        "options", {}
    )
    if problems := option_problems("preset", PRESETS, preset, own):
        raise ConfigError("\n".join(f"model.mechanism.{name}: {text}" for name, text in problems))
    given |= {name: hashable(value) for name, value in own.items()}
    for name, value in given.items():
        if isinstance(value, Mapping):
            given[name] = replace(getattr(mechanism, name), **value)
    for name in ("dense_layers", "cross_layers"):
        layers = given.get(name)
        if isinstance(layers, Sequence) and not isinstance(layers, str):
            given[name] = tuple(sorted(int(layer) for layer in layers))
        elif layers not in (None, "all", "none"):
            raise ConfigError(f'model.mechanism.{name}: found {layers!r}, expected "all", "none" or a list')
    if "visual_drop" in given:
        given["visual_drop"] = tuple((int(layer), float(share)) for layer, share in given["visual_drop"])
    if "rows" in given:
        given["rows"] = rows_of(given["rows"])
    return replace(mechanism, **given)


def read_mechanism(values: Mapping[str, Any]) -> Mechanism:
    """`Mechanism.from_dict` of a folder, in which anything may stand. Raises ConfigError."""
    mechanism = Mechanism.from_dict(values)
    shared = {option.name for option in fields(Mechanism)}
    own = {name: value for name, value in values.items() if name not in shared and name != "preset"}
    if problems := option_problems("preset", PRESETS, mechanism.name, own) if mechanism.name else []:
        raise ConfigError("\n".join(f"model.mechanism.{name}: {text}" for name, text in problems))
    return mechanism


def configured_mechanism(section: MechanismConfig, num_layers: int) -> Mechanism:
    """The mechanism of a configuration's section ``model.mechanism``. Raises as `build_mechanism`."""
    overrides = asdict(section)
    return build_mechanism(overrides.pop("preset"), num_layers, overrides)


def modules_of(section: MechanismConfig) -> Hashable:
    """`Mechanism.modules` of such a section, which the number of layers does not change. Raises ConfigError."""
    overrides = asdict(section)
    preset = overrides.pop("preset")
    return _overridden(mechanism_named(preset), preset, overrides).modules
