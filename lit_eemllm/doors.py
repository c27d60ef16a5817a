"""transformers' doors: after ``import lit_eemllm`` its Auto classes and pipelines open the folder of an EEMLLM.

To import transformers takes seconds, and the command line must answer at once. So nothing is imported here: transformers is told one
name as soon as its Auto classes are there, whichever of the two is imported first, and what stands behind the name is
imported when a folder asks for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"
"""The module of `AutoConfig`, which all other Auto classes ask first."""


class _Watch(MetaPathFinder):
    """Waits for `AUTO` to be imported, and then tells it."""

    asking = False  # where it is, of the others

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AUTO or self.asking:
            return None
        self.asking = True
        try:
            spec = find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                tell()

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


def tell() -> None:
    """Register the model type with `AutoConfig`."""
    from transformers import AutoConfig, PretrainedConfig

    class Door(PretrainedConfig):
        """Stands for `EEMLLMConfig`, and makes one; importing that registers it in this one's place, with model and processor."""

        model_type = "eemllm"

        def __new__(cls, *args: Any, **options: Any) -> Any:
            from lit_eemllm.model import EEMLLMConfig

            return EEMLLMConfig(*args, **options)

        @classmethod
        def from_dict(cls, *args: Any, **options: Any) -> Any:
            from lit_eemllm.model import EEMLLMConfig

            return EEMLLMConfig.from_dict(*args, **options)

    AutoConfig.register(Door.model_type, Door)


def open_doors() -> None:
    """Tell transformers now if its Auto classes are there, else as soon as they are."""
    if AUTO in sys.modules:
        tell()
    else:
        sys.meta_path.insert(0, _Watch())
