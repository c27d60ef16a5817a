"""What a mechanism is: options that make a table, and the modules that it adds; and the registry of mechanisms.

`Mechanism` itself knows the options that all papers share. A paper whose table is more than that, or which adds modules, is a
subclass in a file of its own. Nothing outside such a file knows its name.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..core.select import ALL, NOTHING, Top
from ..core.stream import Stream
from ..core.table import PARTS, LayerPlan, Table, executed, ranking_problems
from ..errors import ConfigError, did_you_mean, not_one_of
from ..inputs.reduction import Grids, Order
from ..limits import MECHANISM_ROWS
from .connectors import Connector, LayerwiseProjector, Sizes

if TYPE_CHECKING:
    from typing_extensions import Self

Layers = str | tuple[int, ...]
"""``"all"``, ``"none"`` or layer numbers from 0."""

Rows = tuple[tuple[str, tuple[tuple[str, str | int], ...]], ...]
"""Pairs of layers, such as ``3``, ``4-7`` or ``8-``, and the columns to set in their rows, in text form."""

COLUMNS = tuple(LayerPlan().to_dict())


def rows_of(given: Any) -> Rows:
    """Parse ``model.mechanism.rows``, such as ``[{layers: 4-7, seen: none}]``. Raises ConfigError."""
    rows, many = [], given if isinstance(given, list | tuple) else [given]
    if len(many) > MECHANISM_ROWS:
        raise ConfigError(f"model.mechanism.rows: found {len(many):,} rows, expected {MECHANISM_ROWS} at most")
    for row in many:
        if not isinstance(row, Mapping) or "layers" not in row or len(row) < 2:
            raise ConfigError(f"model.mechanism.rows: found {row!r}, expected rows such as {{layers: 4-7, seen: none}}")
        for column in row:
            if column != "layers" and column not in COLUMNS:
                raise ConfigError(f"model.mechanism.rows: a row has no {column}; {not_one_of(column, COLUMNS)}")
        rows.append((str(row["layers"]), tuple((name, row[name]) for name in COLUMNS if name in row)))
    return tuple(rows)


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


class BlockCost(NamedTuple):
    """Cost of the module before a layer, for one document. Only matrix products count; m x n by n x k is 2 m n k FLOPs.

    Attributes:
        prefill: FLOPs of a prompt.
        decode: FLOPs of a new token of text after it.
        kept: elements that the cache holds for it, such as keys and values.
    """

    prefill: int = 0
    decode: int = 0
    kept: int = 0


class Features(NamedTuple):
    """What a connector takes: the encoder's features of all images, concatenated, [rows, d]; which row that it makes of them each visual
    token is, None = every row is one; the grids of the features' views, if it makes fewer rows. And, for layers that rank by it, the
    importance of each visual token to the encoder, [V]."""

    rows: Tensor
    order: Order | None
    grids: Grids = ()
    importance_V: Tensor | None = None


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
        visual_drop: ``(layer, share)``: before that layer that share of each image's original tokens leaves, those that the question's
            last token attends to least there (`Top`), in training as when generating. The rest keep their positions.
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
    """The registered name, of a subclass."""
    blocks_name: ClassVar[str] = "added"
    """Attribute of the model that holds the modules before its layers."""
    blocks_begin: ClassVar[str] = ""
    """What those modules do until they are trained, as `convert` tells the user; empty = nothing to tell."""
    component: ClassVar[str] = "projector"
    """The key of ``optim.tuning`` with which those modules are trained."""
    no_adapters: ClassVar[str] = ""
    """Why that part cannot be trained by adapters (LoRA); empty = it can."""
    no_later_images: ClassVar[str] = ""
    """Why all images must come with the prompt, such as that text sees them in blocks, not as cached keys; empty = they need not."""

    # --- the table
    def is_dense(self, layer: int) -> bool:
        return contains(self.dense_layers, layer)

    def sees_images(self, layer: int) -> bool:
        return contains(self.cross_layers, layer)

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
        """The rows of all layers, with the overrides of `rows`. Raises ConfigError for an invalid override."""
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
        """Whether this computes what LLaVA computes, bit for bit, in a decoder of so many layers. Visual tokens must query in all
        layers but the last, of which only text is read."""
        own, llava = (
            (each.modules, each.visual_positions, each.freeze_prefix, executed(each.table(layers)))
            for each in (self, PRESETS["llava"])
        )
        return own == llava

    # --- modules that it adds
    @property
    def modules(self) -> Hashable:
        """Equal for mechanisms that add the same modules: one can replace the other without touching a weight."""
        kind = type(self)
        if kind.block is Mechanism.block and kind.connector is Mechanism.connector:  # its options make a table alone
            return kind.blocks_name, self.visual_source
        own = {f.name: getattr(self, f.name) for f in fields(self)[len(fields(Mechanism)) :]}
        return kind.__name__, self.visual_source, tuple(own.items())

    @property
    def weights(self) -> Hashable:
        """Equal for mechanisms whose modules can take over each other's weights, as far as both have the module."""
        return self.modules

    def connector(self, sizes: Sizes) -> nn.Module:
        """The module that makes visual tokens of the encoder's features."""
        if self.visual_source == "layerwise":
            return LayerwiseProjector(sizes.connector.module(sizes) for _ in range(sizes.layers))
        return sizes.connector.module(sizes)

    @property
    def encoder_depths(self) -> tuple[float, ...]:
        """Shares of the encoder's layers that are read, from its input: the states after each are further features, to the right of
        those that it gives (`Features.rows` is then so many times wider). Needs an encoder that `reads_depths`."""
        return ()

    def refuses(self, connector: Connector) -> str:
        """Why a connector cannot make the visual tokens of this mechanism; empty = it can."""
        if connector.deep and self.visual_source == "layerwise":
            return f"found {connector.name}, which adds to visual tokens after the first layers, but every layer has its own: set levels=0"
        return ""

    def block(self, layer: int, sizes: Sizes) -> nn.Module | None:
        """The module before a layer, or None. It takes text rows, visual rows and the `Stream`, and returns both kinds of rows. Or
        an `Inner`: modules that the layer calls itself, such as copies of its own for visual rows.

        A visual row it returns may depend only on visual rows of the same image. `reset_parameters`, if present, initialises it."""
        return None

    def enter(self, connector: nn.Module, features: Features, x_Th: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        """The visual rows that enter the first layer, and the stream with whatever else the layers and blocks read."""
        if self.visual_source == "layerwise":
            states = lambda layer: connector(features.rows, layer, *features[1:3]).to(x_Th.dtype)  # noqa: E731
            return x_Th[:0], replace(stream, states=states)
        x_Vh, *added = connector(*features[:3]).to(x_Th.dtype).split(x_Th.shape[1], dim=1)
        return x_Vh, replace(stream, added=added)

    def block_cost(self, layer: int, sizes: Sizes, text: int, visual: int) -> BlockCost:
        """Cost of the module before a layer, for a document of so many text and visual tokens; zero without a module."""
        return BlockCost()

    # --- what is wrong, and other forms
    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        """Options that contradict each other or a decoder of so many layers: (field, what is wrong)."""
        wrong: list[tuple[str, str]] = []
        choices = {
            "visual_source": ("stream", "layerwise"),
            "visual_positions": ("sequence", "shared", "unrotated", "none"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                wrong.append((name, f"found {getattr(self, name)!r}, expected {' or '.join(known)}"))
        if self.visual_window < 0:
            wrong.append(("visual_window", f"found {self.visual_window}, expected 0 or more"))
        for name in ("dense_layers", "cross_layers"):
            layers = getattr(self, name)
            if isinstance(layers, tuple) and not set(layers) <= set(range(num_layers)):
                wrong.append((name, f"found {list(layers)}, this decoder has layers 0 to {num_layers - 1}"))
        blind = [n for n in range(num_layers - 1) if self.is_dense(n) and not self.sees_images(n)]
        if blind:
            wrong.append(
                (
                    "cross_layers",
                    f"layers {blind} are dense, where text sees the image too: add them, or leave them out of dense_layers",
                )
            )
        table = self.table(num_layers)
        constant = not any(row.update for row in table)
        if self.visual_source == "layerwise" and not (constant and not any(row.blind for row in table)):
            text = "layerwise projectors make the visual states of every layer: needs dense_layers none, the aligner off and cross_layers all"
            wrong.append(("visual_source", text))
        if self.visual_window and not (self.aligner.value and self.aligner.output):
            wrong.append(("visual_window", "replaces the aligner's value path: needs aligner value and output"))
        if self.visual_positions == "unrotated" and any(row.queries for row in table):
            wrong.append(
                (
                    "visual_positions",
                    "unrotated needs dense_layers none and no window: visual tokens that query have positions",
                )
            )
        if self.visual_drop:
            layers, shares = zip(*self.visual_drop, strict=True)
            if not all(0 <= n < num_layers and self.sees_images(n) for n in layers):
                wrong.append(
                    ("visual_drop", f"found layers {list(layers)}, expected layers in which text sees the image")
                )
            if list(layers) != sorted(set(layers)) or min(shares) <= 0 or sum(shares) >= 1:
                wrong.append(
                    ("visual_drop", f"found {self.visual_drop}: layers must ascend, shares must sum to less than 1")
                )
        ranked = {row.tokens.layer for row in table if isinstance(row.tokens, Top)}
        if not wrong and (unheard := [n for n, _ in self.visual_drop if n not in ranked]):
            text = f"found layers {unheard}, but what this mechanism does with tokens goes before it: set []"
            wrong.append(("visual_drop", text))
        by_keys = any(isinstance(row.tokens, Top) and not row.tokens.by_encoder for row in table)
        if self.visual_positions == "unrotated" and by_keys:
            name = "visual_drop" if self.visual_drop else "visual_positions"
            text = "dropping ranks visual tokens by their rotated keys, which text does not score if visual_positions is unrotated"
            wrong.append((name, text))
        for layer, row in enumerate(table):
            if not wrong:
                wrong += [(f"rows.{layer}.{column}", text) for column, text in row.problems()]
        return wrong or [(f"rows.{layer}.tokens", text) for layer, text in ranking_problems(table)]

    def outside_problems(self, name: str, num_layers: int) -> list[tuple[str, str]]:
        """Likewise for a mechanism whose images are no part of the sequence; `name` of its field."""
        if self.visual_positions == "none" and not any(row.update or not row.blind for row in self.table(num_layers)):
            return []
        return [(name, "needs cross_layers none, dense_layers none, the aligner off and visual_positions none")]

    def stretched(self, num_layers: int, of: int = 32) -> Self:
        """The mechanism with its layer numbers, given for a decoder of `of` layers, scaled to `num_layers`."""
        drops: dict[int, float] = {}  # those that meet in a layer add up
        for layer, share in self.visual_drop:
            drops[layer * num_layers // of] = drops.get(layer * num_layers // of, 0.0) + share
        layers: dict[str, Any] = {
            name: stretch(getattr(self, name), num_layers, of) for name in ("dense_layers", "cross_layers")
        }
        return replace(self, **layers, visual_drop=tuple(drops.items()))

    def to_dict(self) -> dict[str, Any]:
        """The options as plain types, for the model's config.json; with the name, if it is a subclass."""

        def plain(value: Any) -> Any:
            return [plain(item) for item in value] if isinstance(value, tuple) else value

        values = {name: plain(value) for name, value in asdict(self).items()}
        del values["rows"]
        if self.rows:
            values["rows"] = [{"layers": where, **dict(columns)} for where, columns in self.rows]
        return {**({"preset": self.name} if self.name else {}), **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Mechanism:
        """The inverse of `to_dict`. Reads what versions before 0.3 wrote too, in which every mechanism had a `gated`.

        Raises:
            ConfigError: a mechanism that is not registered.
        """
        options = {name: hashable(value) for name, value in values.items()}
        long = [name for name, value in options.items() if isinstance(value, tuple) and len(value) > MECHANISM_ROWS]
        if long:
            raise ConfigError(f"model.mechanism.{long[0]}: a longer list than any decoder has layers")
        if "rows" in options:
            options["rows"] = rows_of(values["rows"])
        if "gated" in options and not options["gated"]:
            del options["gated"]
        name = options.pop("preset", "flamingo" if "gated" in options else "")
        kind: type[Mechanism] = type(mechanism_named(name)) if name else Mechanism
        if unknown := sorted(options.keys() - {option.name for option in fields(kind)}):
            raise ConfigError(f"model.mechanism.{unknown[0]}: {name or 'a mechanism'} has no such option")
        for option in fields(kind):
            if isinstance(options.get(option.name), Mapping):
                options[option.name] = _part(kind, option.name)(**options[option.name])
        return kind(**options)


def share_problems(name: str, value: float) -> list[tuple[str, str]]:
    """Whether an option is no share between 0 and 1, as `Mechanism.problems` tells it."""
    return [] if 0 < value < 1 else [(f"options.{name}", f"found {value:g}, expected a share between 0 and 1")]


def number_problems(name: str, value: int, least: int, most: int) -> list[tuple[str, str]]:
    """Likewise a number, such as a layer's."""
    return [] if least <= value <= most else [(f"options.{name}", f"found {value}, expected {least} to {most}")]


def hashable(value: Any) -> Any:
    """Lists, at any depth, as tuples."""
    return tuple(hashable(item) for item in value) if isinstance(value, list | tuple) else value


def contains(layers: Layers, layer: int) -> bool:
    """Whether a layer is one of them."""
    return layers == "all" or (layers != "none" and layer in layers)


def stretch(layers: Layers, num_layers: int, of: int) -> Layers:
    """Layer numbers of a decoder of `of` layers scaled to `num_layers`."""
    return layers if isinstance(layers, str) else tuple(sorted({n * num_layers // of for n in layers}))


def _layers_of(where: str, layers: int) -> range:
    """The layers that ``3``, ``4-7`` or ``8-`` names, in a decoder of so many. Raises ConfigError."""
    first, dash, last = where.strip().partition("-")
    if len(where) < 20 and first.isdecimal() and (not last or last.isdecimal()):
        numbers = range(int(first), int(last) + 1 if last else layers if dash else int(first) + 1)
        if numbers and numbers[-1] < layers:
            return numbers
    raise ConfigError(
        f"model.mechanism.rows: found {where!r}, expected layers from 0 to {layers - 1}, such as 3, 4-7 or 8-"
    )


# --- the registry
PRESETS: dict[str, Mechanism] = {}
"""Registered mechanisms. Layer numbers are for a decoder of 32 layers; `build_mechanism` scales them to others (our reading)."""


def register_mechanism(name: str, mechanism: Mechanism) -> None:
    """Make a mechanism available as ``model.mechanism.preset=NAME``; its dataclass fields become keys. Raises ValueError if taken.

    Args:
        name: of the preset.
        mechanism: with the values that its options have by default.
    """
    if name in PRESETS:
        raise ValueError(f"mechanism {name!r} is registered already; registered: {', '.join(PRESETS)}")
    own = [option.name for option in fields(mechanism)[len(fields(Mechanism)) :]]
    if taken := [option for option in own if hasattr(Mechanism, option)]:
        raise ValueError(
            f"mechanism {name!r}: {taken[0]} cannot be an option, every mechanism has a method of that name"
        )
    if type(mechanism) is not Mechanism:
        type(mechanism).name = name
    PRESETS[name] = mechanism


def mechanism_named(name: str) -> Mechanism:
    """The registered mechanism. Raises ConfigError that lists the names."""
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS)
        text = f"unknown preset {name!r}; choose one of {', '.join(sorted(PRESETS))}, or --import FILE with one of your own"
        raise ConfigError(f"model.mechanism.preset: {text}" + (f"; {hint}" if hint else ""))
    return PRESETS[name]


def _part(kind: type[Mechanism], name: str) -> type[Any]:
    """The dataclass of an option that is a section of options."""
    return type(getattr(next(preset for preset in PRESETS.values() if type(preset) is kind), name))
