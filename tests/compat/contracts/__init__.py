"""What libraries were, each as a check with a change of the library that it must notice; a module a library, and one for our hooks.

Nothing that may be broken is imported before a contract is checked.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pytest

LIBRARIES = {
    "transformers": "transformers", "torch": "torch", "lightning": "lightning", "energon": "megatron-energon",
    "peft": "peft", "bitsandbytes": "bitsandbytes",
}  # fmt: skip
"""The distribution that each module of compat is about."""


@dataclass(frozen=True)
class Contract:
    """Of a library: what it used to be, a check of that, and a change of the library after which it is something else."""

    library: str
    was: str
    check: Callable[..., None]
    broken: Callable[[pytest.MonkeyPatch], None]

    def hold(self, request: pytest.FixtureRequest) -> None:
        __tracebackhide__ = True
        try:
            fixtures = inspect.signature(self.check).parameters
            self.check(*(request.getfixturevalue(name) for name in fixtures))
        except Exception as error:
            name = LIBRARIES[self.library]
            told = f"{name} {version(name)}: {self.was}. Mend lit_eemllm/compat/{self.library}.py: {error!r}"
            raise pytest.fail.Exception(told) from error


CONTRACTS: dict[str, Contract] = {}


def contract(library: str, was: str, broken: Callable[[pytest.MonkeyPatch], None]) -> Callable[..., Any]:
    def register(check: Callable[..., None]) -> Callable[..., None]:
        CONTRACTS[check.__name__] = Contract(library, was, check, broken)
        return check

    return register


def lacks(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A library without this attribute, and modules of compat that are imported anew."""

    def broken(patch: pytest.MonkeyPatch) -> None:
        for module in list(sys.modules):
            package, _, name_there = module.rpartition(".")
            if package == "lit_eemllm.compat":
                patch.setattr(sys.modules[package], name_there, sys.modules[module])  # to be put back
                patch.delitem(sys.modules, module)
        patch.delattr(name)

    return broken


def no_attribute(cls: str, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A library whose objects have no attribute of this name, and cannot be given one."""
    return lambda patch: patch.setattr(f"{cls}.{name}", property(), raising=False)


def compat(library: str) -> Any:
    return importlib.import_module(f"lit_eemllm.compat.{library}")
