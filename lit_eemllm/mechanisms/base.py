"""What a mechanism is: options that make a table, and the modules that it adds; and the registry of mechanisms.

`Mechanism` itself knows the options that all papers share. A paper whose table is more than that, or which adds modules, is a
subclass in a file of its own. Nothing outside such a file knows its name.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..core.stream import Stream
from ..core.table import ALL, NOTHING, PARTS, LayerPlan, Table, Top, executed
from ..errors import ConfigError, did_you_mean, not_one_of
from .connectors import LayerwiseProjector, Projector

Layers = str | tuple[int, ...]
"""``"all"``, ``"none"`` or layer numbers from 0."""

Rows = tuple[tuple[str, tuple[tuple[str, str | int], ...]], ...]
"""Layers, such as ``3``, ``4-7`` or ``8-``, and columns of their rows in text form."""

COLUMNS = tuple(LayerPlan().to_dict())


def rows_of(given: Any) -> Rows:
    """From their form in a configuration, ``[{layers: 4-7, seen: none}]``. Raises ConfigError."""
    found = []
    for row in given if isinstance(given, list | tuple) else [given]:
        if not isinstance(row, Mapping) or "layers" not in row or len(row) < 2:
            raise ConfigError(f"model.mechanism.rows: found {row!r}, expected rows such as {{layers: 4-7, seen: none}}")
        for column in row:
            if column != "layers" and column not in COLUMNS:
                raise ConfigError(f"model.mechanism.rows: a row has no {column}; {not_one_of(column, COLUMNS)}")
        found.append((str(row["layers"]), tuple((name, row[name]) for name in COLUMNS if name in row)))
    return tuple(found)


@dataclass(frozen=True)
class Aligner:
    """Which weights of the decoder layer update a visual state that does not query (EE-MLLM Eq. 2-3, Table 6).

    Norm placement is not printed in the paper; our reading is pre-norm, which makes the full aligner equal to the
    pretrained layer under a visual mask reduced to its diagonal. The equations are those of `LayerPlan`.
    """

    value: bool = True
    output: bool = True
    ffn: bool = True

    @property
    def parts(self) -> frozenset[str]:
        return frozenset(part for part in PARTS if getattr(self, part))

    @property
    def off(self) -> bool:
        return not self.parts

    def __and__(self, other: Aligner) -> Aligner:
        """What both have on."""
        return Aligner(*(part in self.parts & other.parts for part in PARTS))


NO_ALIGNER = Aligner(False, False, False)


@dataclass(frozen=True)
class Sizes:
    """Of what a mechanism connects.

    Attributes:
        hidden: the decoder's width.
        layers: how many it has.
        vision: width of the encoder's features.
        newline: a learned row ends each row of an image cut into tiles.
    """

    hidden: int
    layers: int
    vision: int
    newline: bool = False


class BlockCost(NamedTuple):
    """Of the module before a layer, for one document. Of products of matrices alone; m x n by n x k costs 2 m n k.

    Attributes:
        prefill: FLOPs of a prompt.
        decode: FLOPs of a new token of text after it.
        kept: numbers that a cache keeps of it for new tokens, such as keys and values.
    """

    prefill: int = 0
    decode: int = 0
    kept: int = 0


class Features(NamedTuple):
    """The encoder's features of all images in a row, [rows, width], and which of them are visual tokens, where not each is one."""

    rows: Tensor
    order_V: Tensor | None


@dataclass(frozen=True)
class Mechanism:
    """How a decoder treats visual tokens.

    Args:
        dense_layers: layers in which visual tokens query, as in LLaVA.
        cross_layers: layers in which text sees the image (ViCA: 8 of 32). Positions keep the gap in the others.
        visual_source: ``stream``: a layer's visual states come from the layer before; ``layerwise``: from a projector of
            its own, over the encoder's features (SAISA).
        aligner: how visual states are updated in layers that are not dense.
        visual_window: in layers that are not dense, a visual token sees itself and so many visual tokens of its image
            before it (EE-MLLM-F); 0 = itself only, which is the aligner's value path.
        visual_positions: ``sequence``: LLaVA's; ``shared``: an image takes one position, as all its tokens do
            (mPLUG-Owl3); ``unrotated``: text scores visual keys without rotary positions on either (D-Attn); ``none``: an
            image takes no position (gated cross-attention, whose images are no part of the sequence).
        freeze_prefix: text before a document's first image takes no attention, only the feed-forward network (a fact of
            ViCA's code for 7B). It looks ahead: text cached before an image came in a later turn was not frozen.
        visual_drop: ``(layer, share)``: from that layer on, that share of each image's original tokens is no longer seen,
            those that the prompt's last token attends to least there (ViCA with progressive dropping), by keys at their
            positions. Only when generating with a cache: training and validation losses are those of the model without dropping.
        rows: columns of the table, layer by layer, over what the options above say.
    """

    dense_layers: Layers = "none"
    cross_layers: Layers = "all"
    visual_source: str = "stream"
    aligner: Aligner = field(default_factory=Aligner)
    visual_window: int = 0
    visual_positions: str = "sequence"
    freeze_prefix: bool = False
    visual_drop: tuple[tuple[int, float], ...] = ()
    rows: Rows = ()

    name: ClassVar[str] = ""
    """Of a subclass, as it is registered."""
    blocks_name: ClassVar[str] = "added"
    """Under which the model holds the modules before its layers."""
    blocks_begin: ClassVar[str] = ""
    """What those do before they are trained, if that is to be known."""
    component: ClassVar[str] = "projector"
    """With which part of the model those are trained, a key of ``optim.tuning``."""
    no_adapters: ClassVar[str] = ""
    """Why that part cannot be trained by adapters, if so."""
    no_later_images: ClassVar[str] = ""
    """Why all images must come with the prompt, if so: text learns of them by blocks, not by keys of the layers."""

    # --- the table
    def is_dense(self, layer: int) -> bool:
        return _contains(self.dense_layers, layer)

    def sees_images(self, layer: int) -> bool:
        return _contains(self.cross_layers, layer)

    def plan(self, layer: int, layers: int) -> LayerPlan:
        """The row of a layer, from 0, in a decoder of so many layers."""
        dense = self.is_dense(layer)
        dropped = [drop for drop in self.visual_drop if drop[0] <= layer]
        shares = [round(sum(share for _, share in drops), 12) for drops in (dropped, dropped[:-1])]
        return LayerPlan(
            tokens=Top(shares[0], dropped[-1][0], shares[1]) if dropped else ALL,
            attend="causal" if dense else self.visual_window or "none",
            update=frozenset(PARTS) if dense else self.aligner.parts,
            seen=ALL if self.sees_images(layer) else NOTHING,
            source="own" if self.visual_source == "layerwise" else "stream",
        )

    def table(self, layers: int) -> Table:
        """All rows, those that are overridden too. Raises ConfigError for an override that is none."""
        table = [self.plan(layer, layers) for layer in range(layers)]
        for where, columns in self.rows:
            for layer in _layers_of(where, layers):
                try:
                    table[layer] = table[layer].with_columns(dict(columns))
                    table[layer].tokens & table[layer].seen
                except ValueError as error:
                    raise ConfigError(f"model.mechanism.rows.{where}: {error}") from None
        return tuple(replace(row, seen=row.tokens & row.seen) for row in table)

    def is_llava(self, layers: int) -> bool:
        """Whether this is what LLaVA computes, bit for bit, in a decoder of so many layers: of the last layer only text is read, so
        visual tokens that query in all others are enough."""
        both = [
            (each.modules, each.visual_positions, each.freeze_prefix, executed(each.table(layers)))
            for each in (self, PRESETS["llava"])
        ]
        return both[0] == both[1]

    # --- modules that it adds
    @property
    def modules(self) -> Hashable:
        """Equal for mechanisms that add the same modules, and can be switched without touching a weight."""
        own = {f.name: getattr(self, f.name) for f in fields(self)[len(fields(Mechanism)) :]}
        return type(self).__name__, self.visual_source, tuple(own.items())

    @property
    def weights(self) -> Hashable:
        """Equal for mechanisms whose modules, where both have them, can take over each other's weights."""
        return self.modules

    def connector(self, sizes: Sizes) -> nn.Module:
        """From the encoder's features to visual tokens."""
        if self.visual_source == "layerwise":
            return LayerwiseProjector(sizes.vision, sizes.hidden, sizes.layers, sizes.newline)
        return Projector(sizes.vision, sizes.hidden, sizes.newline)

    def block(self, layer: int, sizes: Sizes) -> nn.Module | None:
        """A module before a layer: takes text rows, visual rows and the `Stream`, and gives both kinds of rows.

        Visual rows may depend on visual rows of their image alone. `reset_parameters`, if it has it, gives it its initial values."""
        return None

    def enter(self, connector: nn.Module, features: Features, x_Th: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        """The visual rows that enter the first layer, and the stream with what layers and blocks take beside them."""
        if self.visual_source == "layerwise":
            states = lambda layer: connector(features.rows, layer, features.order_V).to(x_Th.dtype)  # noqa: E731
            return x_Th[:0], replace(stream, states=states)
        return connector(*features).to(x_Th.dtype), stream

    def block_cost(self, layer: int, sizes: Sizes, text: int, visual: int) -> BlockCost:
        """Of the module before a layer, for a document of so many text and visual tokens; nothing where there is none."""
        return BlockCost()

    # --- what is wrong, and other forms
    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        """What contradicts itself or a decoder of so many layers: (field, what is wrong)."""
        found: list[tuple[str, str]] = []
        words = {
            "visual_source": ("stream", "layerwise"),
            "visual_positions": ("sequence", "shared", "unrotated", "none"),
        }
        for name, known in words.items():
            if getattr(self, name) not in known:
                found.append((name, f"found {getattr(self, name)!r}, expected {' or '.join(known)}"))
        if self.visual_window < 0:
            found.append(("visual_window", f"found {self.visual_window}, expected 0 or more"))
        for name in ("dense_layers", "cross_layers"):
            layers = getattr(self, name)
            if isinstance(layers, tuple) and not set(layers) <= set(range(num_layers)):
                found.append((name, f"found {list(layers)}, this decoder has layers 0 to {num_layers - 1}"))
        blind = [n for n in range(num_layers - 1) if self.is_dense(n) and not self.sees_images(n)]
        if blind:
            found.append(
                (
                    "cross_layers",
                    f"layers {blind} are dense: there, text sees the image; leave them out of dense_layers",
                )
            )
        table = self.table(num_layers)
        constant = not any(row.update for row in table)
        if self.visual_source == "layerwise" and not (constant and not any(row.blind for row in table)):
            text = "layerwise projectors make the visual states of every layer: needs dense_layers none, the aligner off and cross_layers all"
            found.append(("visual_source", text))
        if self.visual_window and not (self.aligner.value and self.aligner.output):
            found.append(("visual_window", "replaces the aligner's value path: needs aligner value and output"))
        if self.visual_positions == "unrotated" and any(row.queries for row in table):
            found.append(
                (
                    "visual_positions",
                    "unrotated needs dense_layers none and no window: visual tokens that query have positions",
                )
            )
        if self.visual_drop:
            layers, shares = zip(*self.visual_drop, strict=True)
            sees = all(0 <= n < num_layers and self.sees_images(n) for n in layers)
            if not sees or self.dense_layers not in ("none", ()) or not self.aligner.off:
                text = (
                    "dropping needs constant visual states (dense_layers none, aligner off) and layers in cross_layers"
                )
                found.append(("visual_drop", text))
            if self.visual_positions == "unrotated":
                text = "dropping ranks visual tokens by their rotated keys, which text does not score if visual_positions is unrotated"
                found.append(("visual_drop", text))
            if list(layers) != sorted(set(layers)) or min(shares) <= 0 or sum(shares) >= 1:
                found.append(
                    ("visual_drop", f"found {self.visual_drop}: layers must ascend, shares must sum to less than 1")
                )
        for layer, row in enumerate(table):
            if not found:
                found += [(f"rows.{layer}.{column}", text) for column, text in row.problems()]
        return found

    def stretched(self, num_layers: int, of: int = 32) -> Mechanism:
        """Layer numbers given for a decoder of `of` layers, carried over to another depth in proportion."""

        def stretch(layers: Layers) -> Layers:
            return layers if isinstance(layers, str) else tuple(sorted({n * num_layers // of for n in layers}))

        return replace(self, dense_layers=stretch(self.dense_layers), cross_layers=stretch(self.cross_layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for the model's config.json; of a subclass with its name."""

        def plain(value: Any) -> Any:
            return [plain(item) for item in value] if isinstance(value, tuple) else value

        values = {name: plain(value) for name, value in asdict(self).items()}
        del values["rows"]
        if self.rows:
            values["rows"] = [{"layers": where, **dict(columns)} for where, columns in self.rows]
        return {**({"preset": self.name} if self.name else {}), **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Mechanism:
        """The inverse, also of what versions before 0.3 wrote, in which `gated` stood in every mechanism.

        Raises:
            ConfigError: a mechanism that is not registered.
        """

        def fixed(value: Any) -> Any:
            return tuple(fixed(item) for item in value) if isinstance(value, list | tuple) else value

        made = {name: fixed(value) for name, value in values.items()}
        if "rows" in made:
            made["rows"] = rows_of(values["rows"])
        if "gated" in made and not made["gated"]:
            del made["gated"]
        name = made.pop("preset", "flamingo" if "gated" in made else "")
        kind: type[Mechanism] = type(mechanism_named(name)) if name else Mechanism
        for option in fields(kind):
            if isinstance(made.get(option.name), Mapping):
                made[option.name] = _part(kind, option.name)(**made[option.name])
        return kind(**made)


def _contains(layers: Layers, layer: int) -> bool:
    return layers == "all" or (layers != "none" and layer in layers)


def _layers_of(where: str, layers: int) -> range:
    """``3``, ``4-7`` or ``8-``, of so many layers. Raises ConfigError."""
    first, dash, last = where.strip().partition("-")
    if first.isdecimal() and (not last or last.isdecimal()):
        found = range(int(first), int(last) + 1 if last else layers if dash else int(first) + 1)
        if found and found[-1] < layers:
            return found
    raise ConfigError(
        f"model.mechanism.rows: found {where!r}, expected layers from 0 to {layers - 1}, such as 3, 4-7 or 8-"
    )


# --- the registry
PRESETS: dict[str, Mechanism] = {}
"""Registered mechanisms. Layer numbers are those of a decoder of 32 layers; `build_mechanism` carries them over to others (our
reading)."""


def register_mechanism(name: str, mechanism: Mechanism) -> None:
    """Make a mechanism available as ``model.mechanism.preset=NAME``; its dataclass fields become keys. Raises ValueError if taken.

    Args:
        name: of the preset.
        mechanism: with the values that its options have by default.
    """
    if name in PRESETS:
        raise ValueError(f"mechanism {name!r} is registered already; registered: {', '.join(PRESETS)}")
    if type(mechanism) is not Mechanism:
        type(mechanism).name = name
    PRESETS[name] = mechanism


def mechanism_named(name: str) -> Mechanism:
    """Raises ConfigError that lists the names."""
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS)
        text = f"unknown preset {name!r}; choose one of {', '.join(sorted(PRESETS))}, or --import FILE with one of your own"
        raise ConfigError(f"model.mechanism.preset: {text}" + (f"; {hint}" if hint else ""))
    return PRESETS[name]


def _part(kind: type[Mechanism], name: str) -> type[Any]:
    """The dataclass of an option that has options itself."""
    return type(getattr(next(preset for preset in PRESETS.values() if type(preset) is kind), name))
