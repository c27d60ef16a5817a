"""The typed configuration: YAML files and ``key=value`` overrides merged by OmegaConf into the dataclasses of `keys`.

Order: defaults of the schema <- files, left to right <- ``key=value``, left to right; ``${...}`` is resolved last, so
an override also changes whatever refers to it in any file. A file may begin with ``defaults: [other.yaml]``: those
files, named relative to it, are merged before it, each at most once. Every other path is relative to the current
directory. Where there is no such file, the one that comes with the package is meant (`shipped`).

A configuration is data: it may come from the internet, so it names nothing to import, reads no environment (only plain
references such as ``${out}``, no resolvers such as ``${oc.env:HOME}``) and no YAML tag or alias. All mistakes are
reported at once, in one `ConfigError`.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import inspect
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationToMissingValueError,
    InterpolationValidationError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from lit_eemllm import limits
from lit_eemllm.config import keys, strict_yaml
from lit_eemllm.config.keys import Config, Mistake, check
from lit_eemllm.errors import MOST_HINTS, ConfigError, did_you_mean
from lit_eemllm.shipped import find, nowhere

MAX_FILES = 64  # files that one configuration may be built from


def _kinds(section: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every section and key below `section`."""
    kinds: dict[str, Any] = {}
    for name, kind in get_type_hints(section).items():
        kinds[prefix + name] = kind
        if is_dataclass(kind):
            kinds |= _kinds(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
    return kinds


_KINDS = _kinds(Config)
_KEYS = [key for key, kind in _KINDS.items() if not is_dataclass(kind)]
_OPEN = [key for key in _KEYS if _KINDS[key] == dict[str, Any]]  # sections whose keys the schema does not list


# ---------------------------------------------------------------------------------------------------------------- files
_REFERENCE = re.compile(r"(?<!\\)\$\{([A-Za-z_][\w.]*)\}")
_NAME = re.compile(r"[A-Za-z_]\w*")
_NOTHING = yaml.ScalarNode("tag:yaml.org,2002:null", "", yaml.Mark("", 0, 0, 0, None, 0))
_COMMAND_LINE = "command line"
_EITHER = {"optim.max_steps": "optim.epochs", "optim.epochs": "optim.max_steps"}
"""Pairs of keys that exclude each other. The later source (file or command line) wins; both in one source are a mistake."""
_RENAMED = {"model.mechanism.gated": "model.mechanism.options.gated"}
"""Keys or sections of older versions -> their names now."""
_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def _found(value: Any) -> str:
    kind = {**_KIND_NAMES, list: "a list", dict: "a section"}[type(value)]
    text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return "null" if value is None else f"{text} ({kind})"


def _expected(kind: Any) -> str:
    if get_origin(kind) is list:
        return "a list of numbers"
    return " or ".join(
        "a list" if get_origin(part) is list else _KIND_NAMES[part] for part in (get_args(kind) or (kind,))
    )


def _other_kind(keys: set[str]) -> str:
    """What a file with these keys is, if not a configuration, and where it belongs; empty if it may be a configuration."""
    if "splits" in keys:
        return "a recipe of data, expected a configuration, in which it is named: data.train={}"
    if keys & {"cells", "grid"}:
        return "a sweep, expected a configuration. To check it and all its runs: lit-eemllm sweep {} --dry-run"
    if "sets" in keys:
        return "a suite of questions, expected a configuration, in which it is named: eval.suite={}"
    return ""


def current_key(key: str) -> str:
    """The name now of a key of an older version; other keys as they are."""
    for old, new in _RENAMED.items():
        if f"{key}.".startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key


def is_key(key: str) -> bool:
    """Whether a configuration can have this key. Below ``trainer`` and a mechanism's ``options`` every key passes here."""
    key = current_key(key)
    return key in _KINDS or key.startswith(tuple(f"{section}." for section in _OPEN))


def nearest_key(key: str, others: Iterable[str] = (), without: Collection[str] = ()) -> str:
    """Names the key most like `key`, else the keys of the section it stands in.

    Args:
        others: more keys that can be meant.
        without: keys of a configuration that cannot.
    """
    known = [*(name for name in _KINDS if name not in without), *others]
    if hint := did_you_mean(key, known):
        return hint
    section = key.rpartition(".")[0]
    while section and section not in _KINDS:
        section = section.rpartition(".")[0]
    names = [valid.rpartition(".")[2] for valid in known if valid.rpartition(".")[0] == section]
    return f"{section or 'the top level'} has: {', '.join(names)}"


@cache
def _defaults() -> DictConfig:
    """The schema as OmegaConf's tree. Do not change it: it is cached, since building it is the slowest part of loading."""
    tree: DictConfig = OmegaConf.structured(Config)
    return tree


@cache
def _required() -> set[str]:
    return OmegaConf.missing_keys(_defaults())


class _Unusable(ValueError):
    """A YAML node that cannot be a value. Arguments: the node, and why."""


class _Merge:
    """A configuration being put together, with every mistake met on the way."""

    def __init__(self) -> None:
        self.tree = copy.deepcopy(_defaults())
        self.mistakes: list[str] = []
        self.wrong: set[str] = set()  # keys that have a message, or are wrong because of a key that has one
        self.origin: dict[str, str] = {}  # key -> the file and line, or _COMMAND_LINE, that set it last
        self.merged: set[Path] = set()
        self.unread = False  # a file is missing or not YAML, so what it would have set is unknown

    def fail(self, where: str, key: str, text: str) -> None:
        self.wrong.add(key)
        self.mistakes.append(": ".join(part for part in (where, key, text) if part))

    def hint(self, key: str) -> str:
        """Text to append to the message of an unknown key: what was probably meant."""
        return f"; {nearest_key(key)}" if len(self.mistakes) < MOST_HINTS else ""

    # --- reading
    def file(self, path: Path, named_by: tuple[Path, ...] = ()) -> None:
        """Merge a file, before it the files of its ``defaults``. named_by: the chain of files that led here."""
        real = path.resolve()
        if real in [other.resolve() for other in named_by]:
            circle = " -> ".join(map(str, (*named_by, path)))
            self.fail(str(named_by[-1]), "defaults", f"the files build on each other in a circle: {circle}")
            return
        if named_by and real in self.merged:
            return
        self.merged.add(real)
        content = self.content(path, named_by)
        node = self.compose(content, str(path)) if content is not None else None
        if node is None:
            self.unread = True
            return
        if isinstance(node, yaml.MappingNode) and (kind := _other_kind({str(item[0].value) for item in node.value})):
            self.fail(str(path), "", kind.format(path))
            self.unread = True
            return
        if isinstance(node, yaml.MappingNode):
            for item in [item for item in node.value if item[0].value == "defaults"]:
                node.value.remove(item)
                for name in self.file_names(item[1], path):
                    self.file(path.parent / name, (*named_by, path))
        self.node("", node, str(path))

    def content(self, path: Path, named_by: tuple[Path, ...]) -> bytes | None:
        named = f" (named under defaults of {named_by[-1]})" if named_by else ""
        problem, file = None, find(path)
        if len(self.merged) > MAX_FILES:
            problem = f"the configuration is built from more than {MAX_FILES} files"
        elif not os.path.exists(file):
            problem = ("no such file" if named_by else "no such run directory or file") + named + nowhere(path)
            named = ""
        elif path.suffix not in (".yaml", ".yml"):
            problem = "a configuration file ends in .yaml or .yml"
        else:
            try:
                content = strict_yaml.read_bytes(file, limits.CONFIG_BYTES)
                if content is not None:
                    return content
                problem = f"more than {limits.CONFIG_BYTES} bytes: not a configuration"
            except OSError as error:
                problem = f"cannot be read: {error.strerror}"
        self.fail(str(path), "", problem + named)
        return None

    def file_names(self, node: yaml.Node, path: Path) -> list[str]:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if all(isinstance(item, yaml.ScalarNode) for item in items):
            return [item.value for item in items]
        self.fail(_where(str(path), node), "defaults", "expected a list of files, such as [base.yaml]")
        return []

    def compose(self, text: str | bytes, source: str, key: str = "") -> yaml.Node | None:
        """The root node (null if there is nothing), or None after noting that the text is not valid."""
        try:
            return strict_yaml.compose(text) or _NOTHING
        except strict_yaml.BadYAML as error:
            quote = "; inside [] or {} write a reference in quotes" if "${" in str(text) else ""
            self.fail(source if key else error.at(source), key, f"not valid YAML: {error}{quote}")
        return None

    def override(self, text: str) -> None:
        key, equals, value = text.partition("=")
        if not equals or not all(map(_NAME.fullmatch, key.split("."))):
            self.fail(_COMMAND_LINE, text, "expected key=value")
        elif (node := self.compose(value, _COMMAND_LINE, key)) is not None:
            self.node(key, node, _COMMAND_LINE)

    # --- merging
    def node(self, key: str, node: yaml.Node, source: str) -> None:
        """Merge a YAML node into `key`, which is a section (the whole configuration: "") or a single key."""
        where, key = _where(source, node), current_key(key)
        free = is_key(key) and key not in _KINDS
        kind = Config if key == "" else Any if free else _KINDS.get(key)
        section = is_dataclass(kind) or key in _OPEN
        if kind is None:
            self.fail(where, key, f"unknown key{self.hint(key)}")
        elif isinstance(node, yaml.MappingNode) and (section or (free and node.value)):
            for name, value in self.items(key, node, source):
                self.node(f"{key}.{name}" if key else name, value, source)
        else:
            try:
                value = self.plain(key, node, source, as_text=kind in (str, str | None))
            except _Unusable as error:
                self.fail(_where(source, error.args[0]), key, error.args[1])
                return
            if not section:
                self.leaf(key, value, kind, where)
            elif value is not None:  # an empty section, or one with every line commented out, changes nothing
                self.fail(where, key, f"found {_found(value)}, expected a section")

    def leaf(self, key: str, value: Any, kind: Any, where: str) -> None:
        self.origin[key] = where
        other = _EITHER.get(key)
        if other in self.origin and value is not None and _file(self.origin[other]) != _file(where):
            OmegaConf.update(self.tree, other, None)
        try:
            if bool in get_args(kind) and type(value) is int:  # OmegaConf would take 3 for true
                raise OmegaConfBaseException
            OmegaConf.update(self.tree, key, value, merge=False)
        except OmegaConfBaseException:
            self.fail(where, key, f"found {_found(value)}, expected {_expected(kind)}")

    def items(self, key: str, node: yaml.MappingNode, source: str) -> Iterator[tuple[str, yaml.Node]]:
        lines: dict[str, int] = {}
        for name_node, value in node.value:
            name, where = name_node.value, _where(source, name_node)
            if not isinstance(name_node, yaml.ScalarNode) or not _NAME.fullmatch(name):
                self.fail(where, key, "expected a word before the colon; write a key `a.b` as `a:` with `b:` below it")
            elif name in lines:
                self.fail(where, f"{key}.{name}".lstrip("."), f"set twice, first in line {lines[name]}; remove one")
            else:
                lines[name] = name_node.start_mark.line + 1
                yield name, value

    def plain(self, key: str, node: yaml.Node, source: str, as_text: bool = False) -> Any:
        """The Python value of a node. as_text: the schema says text, so a scalar stays as it is written (1.50, no)."""
        if isinstance(node, yaml.MappingNode):
            return {name: self.plain("", value, source) for name, value in self.items(key, node, source)}
        if isinstance(node, yaml.SequenceNode):
            return [self.plain("", value, source, as_text) for value in node.value]
        if node.value.count("${") != len(_REFERENCE.findall(node.value)):
            text = f"found {node.value!r}; only a plain reference such as ${{optim.lr}} is allowed: a configuration "
            raise _Unusable(node, text + "reads no environment and computes nothing")
        if node.value == MISSING and key not in _KEYS:
            raise _Unusable(node, f"{MISSING} marks a required key of the schema; write a value")
        if as_text and not node.tag.endswith(":null"):
            return node.value
        return strict_yaml.value(node)

    # --- resolving
    def resolve(self) -> Config:
        """Replace references by values. A key that is missing or unresolvable is noted and gets a harmless value."""
        defaults = _defaults()
        required = _required()
        harmless = {int: 1, float: 1.0, str: "?"}
        inside = [f"{section}.{name}" for section in _OPEN for name in OmegaConf.select(self.tree, section)]
        for key in [*(key for key in _KEYS if key not in _OPEN), *inside]:
            section, _, name = key.rpartition(".")
            parent = OmegaConf.select(self.tree, section) if section else self.tree
            try:
                value = parent[name]
                if OmegaConf.is_config(value):
                    value = OmegaConf.to_container(value, resolve=True)
                elif not OmegaConf.is_interpolation(parent, name):
                    continue  # as most: it is a value already
            except OmegaConfBaseException as error:
                if key not in self.wrong:
                    raw: Any = OmegaConf.to_container(parent)
                    self.unresolved(key, raw[name], error)
                value = harmless[_KINDS[key]] if key in required else OmegaConf.select(defaults, key)
            OmegaConf.update(self.tree, key, value, merge=False)
        return OmegaConf.to_object(self.tree)  # type: ignore[return-value]

    def unresolved(self, key: str, raw: Any, error: OmegaConfBaseException) -> None:
        where = self.origin.get(key, "")
        if isinstance(error, MissingMandatoryValue):
            self.fail("", key, f"required, but not set; add it to a file or write {key}=VALUE")
        elif isinstance(error, InterpolationToMissingValueError):
            self.wrong.add(key)  # the key referred to has the message
        elif isinstance(error, InterpolationKeyError):
            known = [*_KINDS, *self.origin]
            names = [n for n in _REFERENCE.findall(str(raw)) if not any(f"{k}.".startswith(f"{n}.") for k in known)]
            if names:
                self.fail(where, key, f"{raw} refers to {names[0]}, which is not a key{self.hint(names[0])}")
            else:
                self.wrong.add(key)  # the key referred to cannot be resolved and has the message
        elif isinstance(error, InterpolationValidationError):
            self.fail(where, key, f"{raw} does not give {_expected(_KINDS[key])}")
        else:
            self.fail(where, key, f"{raw} cannot be resolved: {str(error).splitlines()[0]}")


def _file(where: str) -> str:
    """The file in a text of `_where`; empty for the command line."""
    return where.rpartition(":")[0]


def _where(source: str, node: yaml.Node) -> str:
    return source if source == _COMMAND_LINE else f"{source}:{node.start_mark.line + 1}"


def load_config(
    files: Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    checks: Iterable[Callable[[Config], Iterable[Mistake]]] = (),
) -> Config:
    """Merge files and overrides into a checked configuration.

    Args:
        files: YAML files, later ones win.
        overrides: ``key=value`` texts, later ones win over earlier ones and over every file.
        checks: further checks beside `check`, such as of names that only a registry knows.

    Raises:
        ConfigError: lists every mistake with its key and, where known, the file and line.
    """
    merge = _Merge()
    for path in files:
        merge.file(Path(path))
    for text in overrides:
        merge.override(text)
    if not merge.unread:
        config = merge.resolve()
        for one in (check, *checks):
            for keys, text in one(config):
                if not merge.wrong.intersection(keys):  # a consequence of a mistake that is already listed
                    merge.fail(merge.origin.get(keys[0], ""), keys[0], text)
    if merge.mistakes:
        count = len(merge.mistakes)
        head = "a mistake in the configuration" if count == 1 else f"{count} mistakes in the configuration"
        raise ConfigError("\n  ".join([f"{head}:", *merge.mistakes]))
    return config


# --------------------------------------------------------------------------------------------------------------- output
def _comments() -> dict[tuple[str, str], str]:
    """(dataclass, field) -> the docstring under the field."""
    comments = {}
    for node in ast.parse(inspect.getsource(keys)).body:
        if isinstance(node, ast.ClassDef):
            for item, after in zip(node.body, node.body[1:], strict=False):
                text = after.value if isinstance(after, ast.Expr) else None
                if isinstance(item, ast.AnnAssign) and isinstance(text, ast.Constant):
                    one_line = " ".join(str(text.value).split())
                    comments[node.name, ast.unparse(item.target)] = one_line
    return comments


def to_yaml(config: Config, comments: bool = False) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one; with comments, each key explained."""
    explained = _comments() if comments else {}

    def lines(section: Any, indent: str) -> Iterator[str]:
        for item in fields(section):
            value = getattr(section, item.name)
            text = explained.get((type(section).__name__, item.name))
            if text:
                yield f"{indent}# {text}"
            if is_dataclass(value):
                yield f"{indent}{item.name}:"
                yield from lines(value, indent + "  ")
            else:
                dumped = strict_yaml.dump(value, default_flow_style=True, width=math.inf)
                yield f"{indent}{item.name}: {dumped.removesuffix('...' + chr(10)).rstrip()}"

    return "\n".join(lines(config, "")) + "\n"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dictionary of dotted keys."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def config_hash(config: Config) -> str:
    """16 hexadecimal digits that are the same for equal configurations, on every machine."""
    text = json.dumps(asdict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
