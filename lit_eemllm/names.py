"""Names in a configuration that only a registry or a library knows: hooks for `load_config`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

from .config.keys import FOR_TRAINER, NOT_FOR_TRAINER, Config, Mistake, check
from .errors import ConfigError, did_you_mean, not_one_of


def check_names(config: Config) -> Iterator[Mistake]:
    """Names that only a registry or a library knows. Imports these, and so torch, when it is called."""
    from lightning import Trainer

    from .attention import registered_backends
    from .evaluation.metrics import METRICS
    from .inputs.chat import TEMPLATES
    from .mechanisms import CONNECTORS, PRESETS
    from .mechanisms.base import rows_of
    from .model.vision import get_vision_encoder
    from .plugins import made_with

    try:
        rows_of(config.model.mechanism.rows or [])
    except ConfigError as error:
        yield ("model.mechanism.rows",), str(error).removeprefix("model.mechanism.rows: ")
    for key, found, known in (
        ("model.mechanism.preset", config.model.mechanism.preset, PRESETS),
        ("model.connector.name", config.model.connector.name, CONNECTORS),
        ("model.attention", config.model.attention, ["auto", *registered_backends()]),
        ("model.template", config.model.template, TEMPLATES),
        ("eval.metric", config.eval.metric, [None, *METRICS]),
    ):
        if found not in known:
            wrong, hint = not_one_of(found, sorted(filter(None, known))), made_with(Path(config.out))
            own = key in ("model.attention", "eval.metric")
            own |= key in ("model.mechanism.preset", "model.connector.name") and (
                "did you mean" not in wrong or bool(hint)
            )
            yield (key,), wrong + (f"; one of your own needs --import FILE{hint}" if own else "")
    preset = PRESETS.get(config.model.mechanism.preset)
    key = f"optim.tuning.{preset.component}" if preset is not None else ""
    if preset is not None and preset.no_adapters and getattr(config.optim.tuning, preset.component) == "lora":
        yield (key, "model.mechanism.preset"), preset.no_adapters
    try:
        get_vision_encoder(config.model.vision.encoder)
    except ConfigError as error:
        text = str(error).removeprefix("model.vision.encoder: ").removesuffix(".")
        yield ("model.vision.encoder",), text + made_with(Path(config.out))
    arguments = list(inspect.signature(Trainer.__init__).parameters)[1:]
    for name in config.trainer:
        if name not in arguments:
            hint = did_you_mean(name, arguments)
            yield (f"trainer.{name}",), "lightning.Trainer has no such argument" + (f"; {hint}" if hint else "")
        elif name not in (*FOR_TRAINER, *NOT_FOR_TRAINER):
            yield (
                (f"trainer.{name}",),
                f"cannot be set here; arguments of lightning.Trainer that can be: {', '.join(FOR_TRAINER)}",
            )


def check_options(config: Config) -> Iterator[Mistake]:
    """Options of mechanism and connector, and the schedule of mechanisms; where their names are not left to another place."""
    from .mechanisms import CONNECTORS, PRESETS
    from .mechanisms.build import option_problems, without_nulls
    from .mechanisms.schedule import KEY, sections

    mechanism, connector, wrong = config.model.mechanism, config.model.connector, list[Mistake]()
    if mechanism.preset in PRESETS:
        for key, text in option_problems("preset", PRESETS, mechanism.preset, without_nulls(mechanism.options)):
            wrong.append(((f"model.mechanism.{key}", "model.mechanism.preset"), text))
    if connector.name in CONNECTORS:
        for key, text in option_problems("connector", CONNECTORS, connector.name, without_nulls(connector.options)):
            wrong.append(((f"model.connector.{key}", "model.connector.name"), text))
    yield from wrong
    wrong_already = wrong or check(config) or any(check_names(config))  # which each entry would repeat
    if config.optim.mechanisms and not wrong_already:
        try:
            sections(config, [check_names, check_options])
        except ConfigError as error:
            yield from (((KEY,), line.removeprefix(f"{KEY}: ")) for line in str(error).splitlines())
