"""Build a mechanism from the keys of a configuration: a preset, and the keys that override it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, not_one_of
from .base import PRESETS, Mechanism, hashable, mechanism_named, rows_of

if TYPE_CHECKING:
    from ..config.keys import MechanismConfig

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


def option_problems(preset: str, given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys of ``model.mechanism.options``, nulls removed, that a preset does not take: (key below model.mechanism, what is wrong)."""
    mechanism, wrong = mechanism_named(preset), list[tuple[str, str]]()

    def check(part: Any, known: list[str], values: Mapping[str, Any], section: str) -> None:
        hints = {option.name: option.type for option in fields(part)}
        for name, value in values.items():
            types, expected = _TYPES.get(getattr(hints.get(name), "__name__", hints.get(name)), ((), ""))
            inner = getattr(part, name, None) if name in known else None
            if name not in known:
                others = [other for other, each in PRESETS.items() if part is mechanism and hasattr(each, name)]
                hint = not_one_of(name, known) if known else "it has no options of its own"
                hint = f"use preset={' or '.join(others)}" if others else hint
                wrong.append((f"{section}.{name}", f"the preset {preset} has no such option; {hint}"))
            elif is_dataclass(inner) and isinstance(value, Mapping):
                check(inner, [option.name for option in fields(inner)], value, f"{section}.{name}")
            elif is_dataclass(inner):
                wrong.append((f"{section}.{name}", f"found {value!r}, expected a section"))
            elif types and type(value) not in types:
                wrong.append((f"{section}.{name}", f"found {value!r}, expected {expected}"))

    check(mechanism, [option.name for option in fields(mechanism)[len(fields(Mechanism)) :]], given, "options")
    return wrong


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
    if problems := option_problems(preset, own):
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


def configured_mechanism(section: MechanismConfig, num_layers: int) -> Mechanism:
    """The mechanism of a configuration's section ``model.mechanism``. Raises as `build_mechanism`."""
    overrides = asdict(section)
    return build_mechanism(overrides.pop("preset"), num_layers, overrides)


def modules_of(section: MechanismConfig) -> Hashable:
    """`Mechanism.modules` of such a section, which the number of layers does not change. Raises ConfigError."""
    overrides = asdict(section)
    preset = overrides.pop("preset")
    return _overridden(mechanism_named(preset), preset, overrides).modules
