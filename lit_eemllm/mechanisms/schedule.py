"""A schedule of mechanisms (``optim.mechanisms``): which one an optimiser step trains, and from which other one it learns.

DualSpeed (2602.03815) trains most steps on few visual tokens and some on all, which then learn from the former; EPIC (2510.00515)
lets fewer and fewer tokens learn from more; VISOR (2603.23495) draws a budget for each step. All of that is a list of entries: steps,
a weight by which one of the entries that have a step is drawn, keys of ``model.mechanism`` to override, and perhaps those of a
teacher. Weights of the model are the same in all of them, so they must need the same modules.

What a step draws is a function of the configuration, the seed and the number of the step alone: the same on all ranks and for all
packs of a step, and a run that goes on needs no state of it.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from ..config.bounds import step_range
from ..config.keys import Config, MechanismConfig, Mistake
from ..config.load import flat, load_config
from ..core.families import table_problems
from ..errors import ConfigError
from .base import Mechanism
from .build import configured_mechanism, modules_of

KEY = "optim.mechanisms"
EVER = range(1, sys.maxsize)
Checks = Iterable[Callable[[Config], Iterable[Mistake]]]


@dataclass(frozen=True)
class Entry:
    """How some steps are trained.

    Attributes:
        mechanism: of the loss, and what learns from the teacher.
        teacher: None = the loss has no KL term.
        kl: weight of KL(teacher || mechanism).
        temperature: by which both divide their logits in it.
        steps: that may draw it, from 1.
        weight: by which they do.
        text: what the configuration says of it.
    """

    mechanism: Mechanism
    teacher: Mechanism | None = None
    kl: float = 1.0
    temperature: float = 1.0
    steps: range = EVER
    weight: float = 0.0
    text: str = "model.mechanism"


@dataclass(frozen=True)
class Schedule:
    """Entries, of which each step draws one. Steps are counted from 1, as in the log.

    Attributes:
        entries: in the order of the configuration, then ``model.mechanism`` itself, for steps that no other entry has.
        seed: of what is drawn.
    """

    entries: tuple[Entry, ...]
    seed: int

    @classmethod
    def of(cls, config: Config, own: Mechanism, decoder: Any) -> Schedule:
        """The schedule of a configuration, whose ``model.mechanism`` is `own`, for a decoder (its transformers config).

        Raises:
            ConfigError: naming every entry that is wrong.
        """
        entries, wrong = list[Entry](), list[str]()
        for number, (given, section, teacher) in enumerate(sections(config), 1):
            plain: dict[str, Any] = {"weight": 1.0, "text": json.dumps(given).replace('"', "")}
            plain |= {name: given[name] for name in ("weight", "kl", "temperature") if given.get(name) is not None}
            if given.get("steps") is not None:
                plain["steps"] = step_range(given["steps"])
            with _naming(number, "mechanism", wrong):
                plain["mechanism"] = _built(section, decoder)
            with _naming(number, "teacher", wrong):
                plain["teacher"] = None if teacher is None else _built(teacher, decoder)
            if not wrong:
                entries.append(Entry(**plain))
        _refuse(wrong)
        return cls((*entries, Entry(own)), config.seed)

    @property
    def own(self) -> Mechanism:
        """``model.mechanism``: what is evaluated and saved."""
        return self.entries[-1].mechanism

    @property
    def all(self) -> list[Mechanism]:
        """All that any step uses, and `own`."""
        return [one for entry in self.entries for one in (entry.mechanism, entry.teacher) if one is not None]

    def weights(self, step: int) -> list[float]:
        """Of each entry, in a step; not all zero."""
        weights = [entry.weight * (step in entry.steps) for entry in self.entries]
        return weights if any(weights) else [*weights[:-1], 1.0]

    def at(self, step: int) -> Entry:
        """The entry that a step draws."""
        *_, total = upto = list(accumulate(self.weights(step)))
        drawn = total * random.Random(f"{self.seed} {step}").random()
        return next(entry for entry, most in zip(self.entries, upto, strict=True) if drawn < most)

    def shares(self, steps: int | None) -> list[float]:
        """Of each entry, the share of so many steps that it is expected to get; None: of the steps of a long run."""
        ends = sorted({end for entry in self.entries for end in (entry.steps.start, entry.steps.stop)})
        if steps is None:
            stretches = [(ends[-2], ends[-1])]
        else:
            stretches = list(pairwise([end for end in ends if end <= steps] + [steps + 1]))
        total = sum(end - first for first, end in stretches)
        shares = [0.0] * len(self.entries)
        for first, end in stretches:
            weights = self.weights(first)
            for i, weight in enumerate(weights):
                shares[i] += weight / sum(weights) * (end - first) / total
        return shares

    def lines(self, steps: int | None) -> list[str]:
        """For people: every entry, and its share of so many steps as in `shares`; nothing without a schedule."""
        length = "a long run" if steps is None else f"{steps:,} steps"
        used = [(entry, share) for entry, share in zip(self.entries, self.shares(steps), strict=True) if share]
        return [f"about {share:.1%} of {length}: {entry.text}" for entry, share in used] if self.entries[1:] else []


def _built(section: MechanismConfig, decoder: Any) -> Mechanism:
    mechanism = configured_mechanism(section, decoder.num_hidden_layers)
    for name, text in table_problems(decoder, mechanism.table(decoder.num_hidden_layers)):
        raise ConfigError(f"model.mechanism.{name}: {text}")
    return mechanism


def sections(
    config: Config, checks: Checks = ()
) -> list[tuple[dict[str, Any], MechanismConfig, MechanismConfig | None]]:
    """The entries of ``optim.mechanisms``, each with its own ``model.mechanism`` and that of its teacher, read as from the command line.

    Args:
        config: whose own mechanism is good.
        checks: of `load_config`.

    Raises:
        ConfigError: naming every entry that is wrong, such as one that needs other modules than ``model.mechanism``.
    """
    found, wrong = list[tuple[dict[str, Any], MechanismConfig, MechanismConfig | None]](), list[str]()
    for number, given in enumerate(config.optim.mechanisms or [], 1):
        pair: list[MechanismConfig | None] = [None, None]
        for i, name in enumerate(("mechanism", "teacher")):
            if (overrides := given.get(name)) is None and name == "teacher":
                continue
            with _naming(number, name, wrong):
                pair[i] = section = _varied(config, overrides or {}, checks)
                if modules_of(section) != modules_of(config.model.mechanism):
                    raise ConfigError(
                        f"{section.preset} needs other modules than model.mechanism ({config.model.mechanism.preset}), and a "
                        "model cannot have both"
                    )
        if pair[0] is not None:
            found.append((given, pair[0], pair[1]))
    _refuse(wrong)
    return found


def _refuse(wrong: list[str]) -> None:
    if wrong:
        raise ConfigError("\n".join(f"{KEY}: {line}" for line in wrong))


def _varied(config: Config, overrides: dict[str, Any], checks: Checks) -> MechanismConfig:
    """``model.mechanism`` with other values of some keys. Raises ConfigError."""
    alone = replace(config, optim=replace(config.optim, mechanisms=None))
    values = [*flat(asdict(alone)).items(), *flat(overrides, "model.mechanism.").items()]
    return load_config([], [f"{key}={json.dumps(value)}" for key, value in values], checks=checks).model.mechanism


@contextmanager
def _naming(number: int, name: str, wrong: list[str]) -> Iterator[None]:
    """Note what is wrong with a mechanism of an entry, instead of raising it."""
    try:
        yield
    except ConfigError as error:
        for line in str(error).splitlines():
            if not line.endswith("in the configuration:"):
                text = line.strip().removeprefix("command line: ")
                key = text.removeprefix("model.mechanism.")
                wrong.append(f"entry {number}: {name}{': ' if key == text else '.'}{key}")
