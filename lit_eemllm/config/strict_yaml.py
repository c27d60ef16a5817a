"""YAML as configurations, sweeps, recipes and suites are written in: data and nothing else, read in one way.

No tags, no aliases, at most `limits.YAML_LEVELS` levels, no key twice. Plain scalars are null, booleans, decimal integers and floats
such as 1e-3, or text: YAML 1.1 would read 1e-3 as text, 1:30 as the number 90, 0123 as 83 and 2020-01-01 as a date.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from lit_eemllm import limits

_FLOAT = r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
_FLOAT += r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
_BOOL = "yes|no|true|false|on|off"
_SCALARS = {
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (f"{_BOOL}|{_BOOL.title()}|{_BOOL.upper()}", list("yYnNtTfFoO")),
    "int": ("[-+]?(?:0|[1-9][0-9_]{0,30})", list("-+0123456789")),
    "float": (_FLOAT, list("-+.0123456789")),
}
"""Type -> the pattern of its scalars, and the characters that they can begin with."""
_TAG = "tag:yaml.org,2002:"
_values = SafeConstructor()
_VALUES = {f"{_TAG}{name}": getattr(_values, f"construct_yaml_{name}") for name in (*_SCALARS, "str")}
_Fast = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, ten times as fast, where PyYAML has it


class BadYAML(ValueError):
    """YAML that is refused: why, and in which line."""

    def __init__(self, problem: str, mark: yaml.Mark | None = None) -> None:
        super().__init__(problem)
        self._line = "" if mark is None else f":{mark.line + 1}"

    def at(self, source: str | Path) -> str:
        """The file, and its line if that is known."""
        return f"{source}{self._line}"


class _Composer(Composer, Resolver):
    """Makes nodes from a parser's events, and refuses aliases, tags and deep nesting."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}
    depth = 0

    def __init__(self, parser: Any) -> None:
        Composer.__init__(self)
        Resolver.__init__(self)
        self.check_event, self.peek_event, self.get_event = parser.check_event, parser.peek_event, parser.get_event

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise BadYAML(
                "aliases (*name) are not allowed; write the value, in a configuration perhaps ${section.key}",
                event.start_mark,
            )
        if getattr(event, "tag", None) is not None:
            raise BadYAML(f"the tag {event.tag} is not allowed; write a plain value", event.start_mark)
        if self.depth >= limits.YAML_LEVELS:
            raise BadYAML(f"more than {limits.YAML_LEVELS} levels of nesting", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _name, (_pattern, _first) in _SCALARS.items():
    _Composer.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), _first)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either standard YAML or this module would read as something else."""


_Dumper.add_implicit_resolver(f"{_TAG}float", re.compile(f"^(?:{_FLOAT})$"), list("-+.0123456789"))


def read_bytes(file: Path, most: int) -> bytes | None:
    """The bytes of a file; None if there are more than `most`."""
    with file.open("rb") as stream:
        content = stream.read(most + 1)
    return content if len(content) <= most else None


def parse(text: str | bytes) -> Any:
    """The value of a YAML text; None if it is empty. Raises BadYAML."""
    node = compose(text)
    return None if node is None else value(node)


def compose(text: str | bytes) -> yaml.Node | None:
    """The nodes of a YAML text, which know their lines, for messages. Raises BadYAML."""
    try:
        return _compose(text, _Fast)
    except BadYAML:
        if len(text) > limits.CONFIG_BYTES:
            raise
        return _compose(text, yaml.SafeLoader)  # slower, with better messages


def _compose(text: str | bytes, parser: Any) -> yaml.Node | None:
    try:
        return _Composer(parser(text)).get_single_node()
    except yaml.MarkedYAMLError as error:
        raise BadYAML(error.problem, error.problem_mark) from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise BadYAML(str(error).splitlines()[0]) from None


def value(node: yaml.Node) -> Any:
    """The value of a node, and of all below it. Raises BadYAML."""
    if isinstance(node, yaml.ScalarNode):
        return _VALUES[node.tag](node)
    if isinstance(node, yaml.SequenceNode):
        return [value(part) for part in node.value]
    mapping: dict[Any, Any] = {}
    for name, part in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise BadYAML("expected a word before the colon", name.start_mark)
        if (key := value(name)) in mapping:
            raise BadYAML(f"{name.value!r} is set twice; remove one", name.start_mark)
        mapping[key] = value(part)
    return mapping


def dump(values: Any, **style: Any) -> str:
    """YAML that `parse` and standard YAML read back to equal values. style: of `yaml.dump`."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)
    return text
