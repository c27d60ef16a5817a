"""Connectors: what makes visual tokens of the encoder's features. Their contract and registry, those that make a token of each feature
(the others are in `pooling`), and what they share with the modules of mechanisms.

A connector is a frozen dataclass, registered by a decorator: its fields are options, the methods of `Reduction` say how many tokens a grid
of features becomes, known before a pixel is decoded, and `module` makes what computes them.
Legend of shapes in `lit_eemllm.layout`, and here:
    R features of all views, row by row and one view after the other
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..core.decoder import DecoderLayer
from ..core.table import LayerPlan
from ..errors import ConfigError, did_you_mean
from ..inputs.reduction import Grids, Order, Reduction
from ..layout import upload


# --- the contract and the registry
@dataclass(frozen=True)
class Connector(Reduction):
    """What all connectors have; by itself LLaVA-1.5's, a two-layer MLP over each feature z::

        token = W_2 GELU(W_1 z + b_1) + b_2

    A subclass overrides `module` and, if a token is not made of one feature alone, `side` or `grid`.
    """

    name: ClassVar[str] = "mlp"
    """The registered name."""

    def module(self, sizes: Sizes) -> ConnectorModule:
        """What computes the tokens. Raises ConfigError if the options do not fit the sizes."""
        return Projector(sizes)

    def importance(self, importance_R: Tensor, grids: Grids) -> Tensor:
        """Of each token, as many as `count` says, from that of the features: here each is one. A subclass that makes a token of
        several has its own, or is refused where visual tokens are ranked by the encoder."""
        return importance_R

    @property
    def deep(self) -> int:
        """After how many of the first decoder layers it adds to the visual tokens, which `ConnectorModule.tokens` then puts to their right."""
        return 0

    @property
    def says_importance(self) -> bool:
        return not self.by_place or type(self).importance is not Connector.importance

    def problems(self) -> list[tuple[str, str]]:
        """Options out of their bounds: (name, what is wrong)."""
        return []

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in asdict(self).items())])

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``model.connector``; `build_connector` reads them."""
        return {"name": self.name, "options": asdict(self)}


DEFAULT = Connector()


@dataclass(frozen=True)
class Sizes:
    """Sizes of the decoder and the encoder that a mechanism connects, and what stands between them.

    Attributes:
        hidden: the decoder's hidden size.
        layers: number of decoder layers.
        vision: width of the encoder's features.
        newline: whether a learned visual token ends each row of an image cut into tiles (LLaVA-1.6).
        connector: makes visual tokens of features, where the mechanism does not do that itself.
        widths: of all query heads of a decoder layer side by side, and of all key heads.
    """

    hidden: int
    layers: int
    vision: int
    newline: bool = False
    connector: Connector = DEFAULT
    widths: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, decoder: Any, vision: int = 0, newline: bool = False, connector: Connector = DEFAULT) -> Sizes:
        """Of a decoder's transformers config; the rest as above."""
        size = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
        widths = size * decoder.num_attention_heads, size * decoder.num_key_value_heads
        return cls(decoder.hidden_size, decoder.num_hidden_layers, vision, newline, connector, widths)


CONNECTORS: dict[str, Connector] = {DEFAULT.name: DEFAULT}
"""Registered connectors, with the values that their options have by default."""

Registered = TypeVar("Registered", bound=Connector)


def register_connector(name: str) -> Callable[[type[Registered]], type[Registered]]:
    """Class decorator that makes a connector available as ``model.connector.name=NAME``; its fields become
    ``model.connector.options.*``. Raises ValueError if the name is taken."""

    def register(cls: type[Registered]) -> type[Registered]:
        if name in CONNECTORS:
            raise ValueError(f"connector {name!r} is registered already; registered: {', '.join(CONNECTORS)}")
        cls.name = name
        CONNECTORS[name] = cls()
        return cls

    return register


def connector_named(name: str) -> Connector:
    """The registered connector. Raises ConfigError that lists the names."""
    if name not in CONNECTORS:
        hint = did_you_mean(name, CONNECTORS)
        text = (
            f"unknown connector {name!r}; choose one of {', '.join(CONNECTORS)}, or --import FILE with one of your own"
        )
        raise ConfigError(f"model.connector.name: {text}" + (f"; {hint}" if hint else ""))
    return CONNECTORS[name]


# --- modules
class Added(nn.Module):
    """A module that is neither the encoder's nor the decoder's, so that its initial values are ours."""

    def reset_parameters(self) -> None:
        """PyTorch's default initialisation, as in LLaVA; a subclass adds that of its own parameters. With zero biases, a visual
        token of zero features would stay zero in every layer, and its gradients would explode in the norms."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.LayerNorm):
                part.reset_parameters()

    def own(self, x: Tensor) -> Tensor:
        """`x` in the dtype of this module's weights: the decoder may be frozen in 16 bits, or FSDP2 gather these in 16 bits."""
        return x.to(next(self.parameters()).dtype)


class ConnectorModule(Added, ABC):
    """Computes visual tokens of the encoder's features, and learns the newline that LLaVA-1.6 puts after each row of an image cut into
    tiles. A pack without images has no features, and every weight must have a gradient there too: products without rows see to it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.newline = nn.Parameter(torch.empty(sizes.hidden)) if sizes.newline else None
        self._reset_newline()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_newline()

    def _reset_newline(self) -> None:
        if self.newline is not None:
            nn.init.normal_(self.newline, std=len(self.newline) ** -0.5)

    @abstractmethod
    def tokens(self, features_Rd: Tensor, grids: Grids) -> Tensor:
        """[tokens, h x (1 + deep)], as many as `Connector.count` says, of the features of all views, row by row and one view after the other.
        A token depends on the features of its view alone. `grids` is empty where each feature becomes a token."""

    def forward(self, features_Rd: Tensor, order: Order | None = None, grids: Grids = ()) -> Tensor:
        """The visual tokens [V, h], in the order of `Transform.order`."""
        rows = self.tokens(features_Rd, grids)
        if order is None:
            return rows
        if self.newline is not None:
            rows = torch.cat([rows, self.newline[None].to(rows.dtype)])
        return order.of(rows)


class Projector(ConnectorModule):
    """Two linear layers with a GELU between them, over what `pool` makes of the features.

    Args:
        sizes: of encoder and decoder.
        width: of a row that `pool` gives; None = the features'.
    """

    def __init__(self, sizes: Sizes, width: int | None = None) -> None:
        super().__init__(sizes)
        self.linear_1 = nn.Linear(width or sizes.vision, sizes.hidden)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(sizes.hidden, sizes.hidden)

    def pool(self, features_Rd: Tensor, grids: Grids) -> Tensor:
        """A row for each token."""
        return features_Rd

    def tokens(self, features_Rd: Tensor, grids: Grids) -> Tensor:
        return self.linear_2(self.act(self.linear_1(self.pool(features_Rd, grids))))


class Linear(ConnectorModule):
    """One linear layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.linear = nn.Linear(sizes.vision, sizes.hidden)

    def tokens(self, features_Rd: Tensor, grids: Grids) -> Tensor:
        return self.linear(features_Rd)


@register_connector("linear")
@dataclass(frozen=True)
class LinearConnector(Connector):
    """LLaVA-1's (2304.08485): token = W z + b."""

    def module(self, sizes: Sizes) -> ConnectorModule:
        return Linear(sizes)


class LayerwiseProjector(nn.Module):
    """A connector of its own for each decoder layer (SAISA)."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, features_Rd: Tensor, layer: int, order: Order | None = None, grids: Grids = ()) -> Tensor:
        return self.layers[layer](features_Rd, order, grids)


# --- of connectors and mechanisms that attend
class CrossAttention(nn.Module):
    """Multi-head attention without biases or positions from rows of one width over media of another."""

    def __init__(self, width: int, media_width: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, heads * head_size, bias=False)
        self.k_proj = nn.Linear(media_width, heads * head_size, bias=False)
        self.v_proj = nn.Linear(media_width, heads * head_size, bias=False)
        self.o_proj = nn.Linear(heads * head_size, width, bias=False)

    def queries(self, x: Tensor) -> Tensor:
        return self.q_proj(self.norm(x)).unflatten(-1, (self.heads, -1))

    def keys_values(self, media: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (project(media).unflatten(-1, (self.heads, -1)) for project in (self.k_proj, self.v_proj))
        return k, v


class AttentionAlone(DecoderLayer):
    """A decoder layer without a feed-forward network, in which text sees images that nothing updates."""

    def __init__(self, layer: DecoderLayer) -> None:
        norms = layer.family.norms
        names = ["self_attn", *(name for name in (norms.before_attention, norms.after_attention) if name is not None)]
        parts = nn.ModuleDict({name: deepcopy(getattr(layer, name)) for name in names})
        super().__init__(parts, layer.index, layer.family, layer.rotary, layer.window)
        self.row = LayerPlan(update=frozenset())

    def _feed_forward(self, h_Rh: Tensor, text: int, w_R1: Tensor | None = None) -> Tensor:
        return h_Rh

    def of_no_rows(self, x_0h: Tensor) -> Tensor:
        """What all its weights make of no rows, [0, h]: their gradients are zero, and there."""
        u_0h = self._norm("before_attention", x_0h, 0)
        q_0NH, k_0KH, v_0KH = (self._heads(kind, u_0h, 0) for kind in "qkv")
        mixed_0w = q_0NH.flatten(-2) + self._repeated(k_0KH) + self._repeated(v_0KH)
        return self._norm("after_attention", self._run("o_proj", mixed_0w, 0), 0)


class Beside(Added):
    """A block before a decoder layer, with attention of its own, which begins as a copy of the layer's, its norms included."""

    copies = ("norms", "qkv", "output")
    attention: AttentionAlone

    def copy(self, layer: DecoderLayer) -> None:
        """Make the copies."""
        self.__dict__["layer"] = layer  # belongs to the decoder
        self.attention = AttentionAlone(layer)

    def reset_parameters(self) -> None:
        values = self.__dict__["layer"].state_dict()
        self.attention.load_state_dict({name: values[name] for name in self.attention.state_dict()})


def padded(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Rows of several images, one after the other, as [images, the longest, ...]."""
    each = list(torch.split(rows, list(lengths))) or [rows]
    return pad_sequence(each, batch_first=True)[: len(lengths)]


def lengths_mask(lengths: Sequence[int], longest: int, device: torch.device) -> Tensor:
    """[images, longest], True where `padded` has no padding."""
    return torch.arange(longest, device=device) < upload(torch.tensor(lengths, dtype=torch.long), device)[:, None]
