"""The typed configuration: a dataclass schema, YAML files and ``key=value`` overrides merged by OmegaConf.

Order: defaults of the schema <- files, left to right <- ``key=value``, left to right; ``${...}`` is resolved last, so
an override also changes whatever refers to it in any file. A file may begin with ``defaults: [other.yaml]``: those
files, named relative to it, are merged before it, each at most once. Every other path is relative to the current
directory.

A configuration is data: it may come from the internet, so it names nothing to import, reads no environment (only plain
references such as ``${out}``, no resolvers such as ``${oc.env:HOME}``) and no YAML tag or alias. All mistakes are
reported at once, in one `ConfigError`.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationToMissingValueError,
    InterpolationValidationError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml.composer import ComposerError

from lit_eemllm.errors import ConfigError

MAX_FILES = 64  # files that one configuration may be built from
MAX_FILE_BYTES = 256 * 1024
MAX_DEPTH = 20  # levels of nesting in a file


# --------------------------------------------------------------------------------------------------------------- schema
@dataclass
class VisionConfig:
    encoder: str = "transformers"
    """Vision encoder: "transformers" (the vision tower of CLIP or SigLIP) or a name that your own file registers."""
    path: str | None = None
    """Folder or hub id of the pretrained encoder; required by "transformers"."""
    select_layer: int = -2
    """Hidden states that the projector reads, without class token: 0 the embeddings, -1 the last layer, -2 as LLaVA."""
    policy: str = "pad"
    """How an image is brought to the encoder's size: "pad" to a square, "resize" (changes the aspect ratio), "crop"."""


@dataclass
class AlignerConfig:
    value: bool | None = None
    """Visual states pass the layer's value projection; null = as the preset says."""
    output: bool | None = None
    """Visual states pass the layer's output projection; null = as the preset says."""
    ffn: bool | None = None
    """Visual states pass the layer's feed-forward network; null = as the preset says."""


@dataclass
class MechanismConfig:
    preset: str = "ee_mllm"
    """How the decoder treats visual tokens: "ee_mllm" (composite attention), "llava" (full self-attention)."""
    dense_layers: Any = None
    """Layers in which visual tokens also query: "all", "none" or a list of layer numbers; null = as the preset says."""
    aligner: AlignerConfig = field(default_factory=AlignerConfig)
    """Which weights of a composite layer update the visual stream (ablation of the EE-MLLM paper, Table 6)."""


@dataclass
class ModelConfig:
    decoder: str = MISSING
    """Folder or hub id of the pretrained causal LM, in the format of transformers; its weights are loaded unchanged."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; null = the decoder's own."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    mechanism: MechanismConfig = field(default_factory=MechanismConfig)
    attention: str = "auto"
    """Attention backend, or "auto": the fastest one that a trial on the device proves to work."""
    template: str = "vicuna_v1"
    """How a conversation becomes text: "plain" (captions), "vicuna_v1" or "jinja" (the tokenizer's own template)."""
    dtype: str = "float32"
    """Type of the parameters that are not trained: "float32" or "bfloat16". Trained ones are always float32."""


@dataclass
class DataConfig:
    train: str = MISSING
    """Training data: a recipe (YAML) or a folder of prepared shards."""
    val: str | None = None
    """Validation data, same forms; null = no validation."""
    pack_tokens: int = 4096
    """Token budget of one pack, visual tokens counted."""
    pack_samples: int | None = None
    """Most conversations in one pack; null = as many as fit."""
    max_length: int = 2048
    """Most tokens of one conversation, visual tokens counted."""
    truncation: str = "drop"
    """A longer conversation: "drop", "truncate" (never an image, never the whole answer) or stop with an "error"."""
    workers: int = 2
    """Loader processes per device; 0 = load in the training process."""
    shuffle_buffer: int = 1000
    """Samples held per worker to shuffle from; 0 = no shuffling between neighbours."""
    packing_buffer: int = 256
    """Conversations held per worker to choose packs from: more = fuller packs, more memory."""
    max_image_pixels: int = 50_000_000
    """Images of more pixels are refused before they are decoded."""
    max_bad_in_a_row: int = 100
    """Consecutive unusable samples that stop the run."""


@dataclass
class TuningConfig:
    vision: str = "frozen"
    """Vision encoder: "frozen" or "full"."""
    projector: str = "full"
    """Projector: "frozen" or "full"."""
    llm: str = "frozen"
    """Decoder: "frozen" or "full"."""


@dataclass
class OptimConfig:
    tuning: TuningConfig = field(default_factory=TuningConfig)
    lr: float = MISSING
    """Peak learning rate of AdamW."""
    projector_lr: float | None = None
    """Peak learning rate of the projector; null = lr."""
    vision_lr: float | None = None
    """Peak learning rate of the vision encoder; null = lr."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's term added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases and norms are never decayed."""
    warmup_ratio: float = 0.03
    """Share of max_steps in which the learning rate rises linearly to its peak."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: "cosine" or "linear" to 0, or "constant"."""
    max_steps: int = MISSING
    """Optimiser steps of the whole run; the schedule's length."""
    clip_grad_norm: float | None = 1.0
    """Largest norm of all gradients together; null = no clipping."""
    save_every: int = 500
    """Optimiser steps between checkpoints."""
    val_every: int = 500
    """Optimiser steps between validations."""
    val_batches: int = 20
    """Packs per validation and device."""
    log_every: int = 10
    """Optimiser steps between log lines."""
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted."""


@dataclass
class EvalConfig:
    batch_size: int = 32
    """Questions generated together."""
    max_new_tokens: int = 32
    """Most tokens generated per answer."""
    samples: int | None = None
    """Questions to evaluate; null = all of data.val."""
    control: int = 1
    """Passes with the images shuffled among the questions: what a model scores that does not look. 0 = none."""


@dataclass
class Config:
    seed: int = 0
    """Seeds every random generator before any module is built."""
    out: str = "runs/default"
    """Run directory: checkpoints, logs and the resolved configuration."""
    resume: str = "auto"
    """"auto" continues a run found in `out`, "never" starts anew, anything else is the path of a checkpoint."""
    init_from: str | None = None
    """Weights to start from (no optimiser state): a folder written by save_pretrained, such as an earlier stage's."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    """Arguments of lightning.Trainer, passed as they are, such as accelerator, devices, precision."""
    eval: EvalConfig = field(default_factory=EvalConfig)


def _kinds(section: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every section and key below `section`."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(section).items():
        found[prefix + name] = kind
        if is_dataclass(kind):
            found |= _kinds(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found


_KINDS = _kinds(Config)
_KEYS = [key for key, kind in _KINDS.items() if not is_dataclass(kind)]

# --------------------------------------------------------------------------------------------------------------- checks
Mistake = tuple[tuple[str, ...], str]
"""The dotted keys that are at odds, the one to change first, and what is wrong with them."""

_WORDS = {
    "model.vision.policy": ("pad", "resize", "crop"),
    "model.dtype": ("float32", "bfloat16"),
    "data.truncation": ("drop", "truncate", "error"),
    "optim.tuning.vision": ("frozen", "full"),
    "optim.tuning.projector": ("frozen", "full"),
    "optim.tuning.llm": ("frozen", "full"),
    "optim.schedule": ("cosine", "linear", "constant"),
}
# Comparisons are written so that NaN fails them. A null value is not compared.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("0 to 4294967295", lambda v: 0 <= v < 2**32, "seed"),
    ("0 or more", lambda v: v >= 0, "data.workers data.shuffle_buffer eval.control"),
    ("0 or more", lambda v: 0 <= v < math.inf, "optim.weight_decay"),
    ("0 to 1", lambda v: 0 <= v <= 1, "optim.warmup_ratio"),
    (
        "more than 0",
        lambda v: 0 < v < math.inf,
        "optim.lr optim.projector_lr optim.vision_lr optim.eps optim.clip_grad_norm",
    ),
    ("two numbers from 0 to below 1", lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v), "optim.betas"),
    (
        "1 or more",
        lambda v: v >= 1,
        "data.pack_tokens data.pack_samples data.max_length data.packing_buffer data.max_image_pixels "
        "data.max_bad_in_a_row optim.max_steps optim.save_every optim.val_every optim.val_batches optim.log_every "
        "optim.keep eval.batch_size eval.max_new_tokens eval.samples",
    ),
    ("text that is not empty", lambda v: bool(v.strip()), "out resume model.decoder data.train"),
)
_NOT_FOR_TRAINER = {  # argument of lightning.Trainer -> why it cannot be set here
    "max_steps": "set optim.max_steps",
    "max_epochs": "set optim.max_steps",
    "gradient_clip_val": "set optim.clip_grad_norm",
    "gradient_clip_algorithm": "gradients are clipped by norm, see optim.clip_grad_norm",
    "val_check_interval": "set optim.val_every",
    "check_val_every_n_epoch": "set optim.val_every",
    "limit_val_batches": "set optim.val_batches",
    "log_every_n_steps": "set optim.log_every",
    "enable_checkpointing": "set optim.save_every",
    "default_root_dir": "set out",
    "callbacks": "a configuration cannot name objects",
    "plugins": "a configuration cannot name objects",
}


def check(config: Config) -> list[Mistake]:
    """Values that have the right type but are out of range or contradict each other. Imports nothing, opens no file."""
    mistakes: list[Mistake] = []

    def value(key: str) -> Any:
        return reduce(getattr, key.split("."), config)

    for key, words in _WORDS.items():
        if value(key) not in words:
            mistakes.append(((key,), f"found {value(key)!r}, expected {' or '.join(words)}"))
    for expected, holds, keys in _RANGES:
        for key in keys.split():
            if value(key) is not None and not holds(value(key)):
                mistakes.append(((key,), f"found {value(key)!r}, expected {expected}"))

    layers = config.model.mechanism.dense_layers
    numbers = isinstance(layers, list) and all(type(n) is int and n >= 0 for n in layers)
    if layers not in (None, "all", "none") and not (numbers and len(set(layers)) == len(layers)):
        expected = "all, none, null or a list of distinct layer numbers such as [0, 1]"
        mistakes.append((("model.mechanism.dense_layers",), f"found {layers!r}, expected {expected}"))
    if config.model.vision.encoder == "transformers" and not config.model.vision.path:
        mistakes.append(
            (("model.vision.path", "model.vision.encoder"), "required by model.vision.encoder=transformers")
        )
    if config.data.max_length > config.data.pack_tokens:
        text = f"{config.data.max_length} tokens do not fit in a pack of data.pack_tokens={config.data.pack_tokens}"
        mistakes.append((("data.max_length", "data.pack_tokens"), text))
    tuning = asdict(config.optim.tuning)
    if all(word == "frozen" for word in tuning.values()):
        text = "vision, projector and llm are all frozen: nothing is left to train"
        mistakes.append((("optim.tuning", *(f"optim.tuning.{part}" for part in tuning)), text))
    for part in ("projector", "vision"):
        key = f"optim.{part}_lr"
        if tuning[part] == "frozen" and value(key) is not None:
            text = f"has no effect: optim.tuning.{part} is frozen; set {key}=null or optim.tuning.{part}=full"
            mistakes.append(((key, f"optim.tuning.{part}"), text))
    for name in config.trainer:
        if name in _NOT_FOR_TRAINER:
            mistakes.append(((f"trainer.{name}",), f"cannot be set here: {_NOT_FOR_TRAINER[name]}"))
    return mistakes


def check_names(config: Config) -> Iterator[Mistake]:
    """Names that only a registry or a library knows. A hook for `load_config`; imports the registries, and so torch."""
    from lightning import Trainer

    from lit_eemllm.attention import registered_backends
    from lit_eemllm.chat import TEMPLATES
    from lit_eemllm.mechanisms import PRESETS
    from lit_eemllm.model.vision import get_vision_encoder

    for key, found, known in (
        ("model.mechanism.preset", config.model.mechanism.preset, PRESETS),
        ("model.attention", config.model.attention, ["auto", *registered_backends()]),
        ("model.template", config.model.template, TEMPLATES),
    ):
        if found not in known:
            yield (key,), f"found {found!r}, expected {' or '.join(sorted(known))}"
    try:
        get_vision_encoder(config.model.vision.encoder)
    except ConfigError as error:
        yield ("model.vision.encoder",), str(error).removeprefix("model.vision.encoder: ")
    arguments = list(inspect.signature(Trainer.__init__).parameters)[1:]
    for name in config.trainer:
        if name not in arguments:
            nearest = difflib.get_close_matches(name, arguments, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            yield (f"trainer.{name}",), f"lightning.Trainer has no such argument{hint}"


# ---------------------------------------------------------------------------------------------------------------- files
class _Loader(yaml.SafeLoader):
    """YAML without tags and aliases; the plain scalars are null, booleans, decimal integers and floats such as 1e-3.

    YAML 1.1 reads 1e-3 as text, 1:30 as the number 90 and 0123 as 83: none of that here.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list]] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = "aliases (*name) are not allowed; write ${section.key}"
        elif getattr(event, "tag", None) is not None:
            problem = f"the tag {event.tag} is not allowed; write a plain value"
        elif self.depth >= MAX_DEPTH:
            problem = f"more than {MAX_DEPTH} levels of nesting"
        if problem:
            raise ComposerError(None, None, problem, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_FLOAT = r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
_FLOAT += r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
_BOOL = "yes|no|true|false|on|off"
_SCALARS = {
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (f"{_BOOL}|{_BOOL.title()}|{_BOOL.upper()}", list("yYnNtTfFoO")),
    "int": ("[-+]?(?:0|[1-9][0-9_]{0,30})", list("-+0123456789")),
    "float": (_FLOAT, list("-+.0123456789")),
}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)

_REFERENCE = re.compile(r"(?<!\\)\$\{([A-Za-z_][\w.]*)\}")
_NAME = re.compile(r"[A-Za-z_]\w*")
_NOTHING = yaml.ScalarNode("tag:yaml.org,2002:null", "", yaml.Mark("", 0, 0, 0, None, 0))
_COMMAND_LINE = "command line"
_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def _found(value: Any) -> str:
    kind = {**_KIND_NAMES, list: "a list", dict: "a section"}[type(value)]
    text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return "null" if value is None else f"{text} ({kind})"


def _expected(kind: Any) -> str:
    if get_origin(kind) is list:
        return "a list of numbers"
    return " or ".join(_KIND_NAMES[part] for part in (get_args(kind) or (kind,)))


def _nearest(key: str) -> str:
    """Names the valid key most like `key`, else the keys of the section it stands in."""

    def likeness(valid: str) -> float:
        whole = difflib.SequenceMatcher(None, key, valid).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], valid.rpartition(".")[2]).ratio()
        return max(whole, last - 0.01)

    best = max(_KINDS, key=likeness)
    if likeness(best) > 0.7:
        return f"did you mean {best}?"
    section = key.rpartition(".")[0]
    while section and section not in _KINDS:
        section = section.rpartition(".")[0]
    names = [valid.rpartition(".")[2] for valid in _KINDS if valid.rpartition(".")[0] == section]
    return f"{section or 'the top level'} has: {', '.join(names)}"


class _Unusable(ValueError):
    """A YAML node that cannot be a value: (node, why)."""


class _Merge:
    """A configuration being put together, with every mistake met on the way."""

    def __init__(self) -> None:
        self.tree: DictConfig = OmegaConf.structured(Config)
        self.mistakes: list[str] = []
        self.wrong: set[str] = set()  # keys that have a message, or follow from a key that has one
        self.origin: dict[str, str] = {}  # key -> the file and line, or _COMMAND_LINE, that set it last
        self.merged: set[Path] = set()

    def fail(self, where: str, key: str, text: str) -> None:
        self.wrong.add(key)
        self.mistakes.append(": ".join(part for part in (where, key, text) if part))

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
            return
        if isinstance(node, yaml.MappingNode):
            for item in [item for item in node.value if item[0].value == "defaults"]:
                node.value.remove(item)
                for name in self.file_names(item[1], path):
                    self.file(path.parent / name, (*named_by, path))
        self.node("", node, str(path))

    def content(self, path: Path, named_by: tuple[Path, ...]) -> bytes | None:
        named = f" (named under defaults of {named_by[-1]})" if named_by else ""
        problem = None
        if len(self.merged) > MAX_FILES:
            problem = f"the configuration is built from more than {MAX_FILES} files"
        elif path.suffix not in (".yaml", ".yml"):
            problem = "a configuration file ends in .yaml or .yml"
        else:
            try:
                with path.open("rb") as stream:
                    content = stream.read(MAX_FILE_BYTES + 1)
                if len(content) <= MAX_FILE_BYTES:
                    return content
                problem = f"more than {MAX_FILE_BYTES} bytes: not a configuration"
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
            return _Loader(text).get_single_node() or _NOTHING
        except yaml.MarkedYAMLError as error:
            where = source if key or error.problem_mark is None else f"{source}:{error.problem_mark.line + 1}"
            quote = "; inside [] or {} write a reference in quotes" if "${" in str(text) else ""
            self.fail(where, key, f"not valid YAML: {error.problem}{quote}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.fail(source, key, f"not valid YAML: {str(error).splitlines()[0]}")
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
        where = _where(source, node)
        free = key.startswith("trainer.")
        kind = Config if key == "" else Any if free else _KINDS.get(key)
        section = is_dataclass(kind) or key == "trainer"
        if kind is None:
            self.fail(where, key, f"unknown key; {_nearest(key)}")
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
        return yaml.constructor.SafeConstructor().construct_object(node)

    # --- resolving
    def resolve(self) -> Config:
        """Replace references by values. A key that is missing or unresolvable is noted and gets a harmless value."""
        defaults = OmegaConf.structured(Config)
        required = OmegaConf.missing_keys(defaults)
        harmless = {int: 1, float: 1.0, str: "?"}
        for key in [*(key for key in _KEYS if key != "trainer"), *(f"trainer.{name}" for name in self.tree.trainer)]:
            section, _, name = key.rpartition(".")
            parent = OmegaConf.select(self.tree, section) if section else self.tree
            try:
                value = parent[name]
                value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
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
                self.fail(where, key, f"{raw} refers to {names[0]}, which is not a key; {_nearest(names[0])}")
            else:
                self.wrong.add(key)  # the key referred to cannot be resolved and has the message
        elif isinstance(error, InterpolationValidationError):
            self.fail(where, key, f"{raw} does not give {_expected(_KINDS[key])}")
        else:
            self.fail(where, key, f"{raw} cannot be resolved: {str(error).splitlines()[0]}")


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
class _Dumper(yaml.SafeDumper):
    """Quotes text that either standard YAML or `_Loader` would read as something else."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT})$"), list("-+.0123456789"))


def _comments() -> dict[tuple[str, str], str]:
    """(dataclass, field) -> the docstring under the field."""
    found = {}
    for node in ast.parse(inspect.getsource(sys.modules[__name__])).body:
        if isinstance(node, ast.ClassDef):
            for item, after in zip(node.body, node.body[1:], strict=False):
                text = after.value if isinstance(after, ast.Expr) else None
                if isinstance(item, ast.AnnAssign) and isinstance(text, ast.Constant):
                    found[node.name, ast.unparse(item.target)] = str(text.value)
    return found


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
                dumped = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True)
                yield f"{indent}{item.name}: {dumped.removesuffix('...' + chr(10)).rstrip()}"

    return "\n".join(lines(config, "")) + "\n"


def config_hash(config: Config) -> str:
    """16 hexadecimal digits that are the same for equal configurations, on every machine."""
    text = json.dumps(asdict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
