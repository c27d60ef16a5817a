"""A mechanism as data: one row for each decoder layer, which says what the layer does with the visual tokens.

Text always runs through every layer. All that differs between the papers is, layer by layer, which visual tokens are there,
whether they query, which weights update them and what text sees of them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm

import torch
from torch import Tensor

PARTS = ("value", "output", "ffn")
"""Weights of a layer that can update visual rows, in the order in which they are used."""


# --- some of the visual tokens
class Select(ABC):
    """Some of the visual tokens of each image; its text form (`str`, `parse_select`) is that of a configuration."""

    @abstractmethod
    def count(self, visual: int) -> int:
        """How many of an image's tokens these are."""

    @abstractmethod
    def flags(self, lengths: Sequence[int]) -> Tensor:
        """[V] bool, True where a token is one of them; `lengths` are the visual tokens of each image."""

    @abstractmethod
    def __and__(self, other: Select) -> Select:
        """Those that are in both."""

    @property
    def empty(self) -> bool:
        return False


@dataclass(frozen=True)
class Every(Select):
    """The first token of an image and each n-th after it; 1 = all."""

    n: int

    def __str__(self) -> str:
        return "all" if self.n == 1 else f"every {self.n}"

    def __and__(self, other: Select) -> Select:
        return Every(lcm(self.n, other.n)) if isinstance(other, Every) else other & self

    def count(self, visual: int) -> int:
        return -(-visual // self.n)

    def flags(self, lengths: Sequence[int]) -> Tensor:
        return torch.cat([torch.zeros(0, dtype=torch.bool), *(torch.arange(n) % self.n == 0 for n in lengths)])


@dataclass(frozen=True)
class Nothing(Select):
    """No visual token: before they enter, after they have left, or where text sees none."""

    def __str__(self) -> str:
        return "none"

    def __and__(self, other: Select) -> Select:
        return self

    def count(self, visual: int) -> int:
        return 0

    def flags(self, lengths: Sequence[int]) -> Tensor:
        return torch.zeros(sum(lengths), dtype=torch.bool)

    @property
    def empty(self) -> bool:
        return True


@dataclass(frozen=True)
class Top(Select):
    """All but a share of an image's original tokens: those that the prompt's last token attends to least in a layer.

    Has an effect only when generating with a KV cache; otherwise it is all tokens.

    Args:
        dropped: the share, of the original tokens.
        layer: in which they are ranked, among those that were left there before.
        before: the share that was dropped until then.
    """

    dropped: float
    layer: int
    before: float = 0.0

    def __str__(self) -> str:
        return f"all but {self.dropped:g} ranked in {self.layer}" + (f" after {self.before:g}" if self.before else "")

    def __and__(self, other: Select) -> Select:
        if other.empty or other in (ALL, self):
            return other if other.empty else self
        raise ValueError(f"{self} cannot be combined with {other}, only with all or none")

    def count(self, visual: int) -> int:
        return _left(visual, self.dropped)

    def ranked(self, visual: int) -> int:
        """How many of an image's tokens are ranked."""
        return _left(visual, self.before)

    def flags(self, lengths: Sequence[int]) -> Tensor:
        return ALL.flags(lengths)


def _left(visual: int, dropped: float) -> int:
    return visual - int(dropped * visual + 1e-9)  # 0.7 of 10 is 7, whatever 0.7 is in binary


ALL, NOTHING = Every(1), Nothing()


_TOP = re.compile(r"all but (0?\.\d+) ranked in (\d+)(?: after (0?\.\d+))?")


def parse_select(text: str) -> Select:
    """``all``, ``none``, ``every 2``, or ``all but 0.5 ranked in 7``, perhaps ``after 0.25``. Raises ValueError saying so."""
    if text in ("all", "none"):
        return ALL if text == "all" else NOTHING
    if match := re.fullmatch(r"every ([1-9]\d*)", text):
        return Every(int(match[1]))
    if match := _TOP.fullmatch(text):
        return Top(float(match[1]), int(match[2]), float(match[3] or 0))
    raise ValueError(f"found {text!r}, expected all, none, every N, or all but SHARE ranked in LAYER")


# --- the table
@dataclass(frozen=True)
class LayerPlan:
    """A row of the table.

    Args:
        tokens: visual tokens that are there. The others pass by: they are neither seen nor changed.
        attend: do they query, and what do they see: ``none``; ``causal``, everything before them, as in LLaVA; or a number,
            themselves and so many tokens of their image before them.
        update: weights that update them, of `PARTS`. A row that does not query takes the path of EE-MLLM's aligner: with
            u = norm1(I) and R repeating the value heads for grouped queries (norms after a block: `DecoderLayer`)::

                value & output  H = I + R(u W_v) W_o        value only  H = I + R(u W_v)
                output only     H = I + u W_o               neither     H = I
                ffn             I' = H + FFN(norm2(H))      no ffn      I' = H
        seen: which of them text sees.
        source: where they come from: ``stream``, the layer before; ``own``, made for this layer alone.
    """

    tokens: Select = ALL
    attend: str | int = "none"
    update: frozenset[str] = frozenset(PARTS)
    seen: Select = ALL
    source: str = "stream"

    @property
    def blind(self) -> bool:
        """Text sees no visual token here."""
        return self.tokens.empty or self.seen.empty

    @property
    def queries(self) -> bool:
        return self.attend != "none"

    @property
    def causal(self) -> bool:
        return self.attend == "causal"

    @property
    def keys(self) -> bool:
        """Keys of visual tokens are computed."""
        return not self.tokens.empty and (self.queries or not self.seen.empty)

    @property
    def kept(self) -> Select:
        """Visual tokens whose keys are cached: those that text sees, or that images of later turns see."""
        return self.tokens if self.causal else self.seen

    @property
    def values(self) -> bool:
        return self.keys or "value" in self.update

    @property
    def moves(self) -> bool:
        """Attention or the aligner's path adds something to visual rows."""
        return not self.update.isdisjoint(("value", "output"))

    @property
    def idle(self) -> bool:
        """Nothing is computed for visual rows here."""
        return not self.values and not self.update

    def problems(self) -> list[tuple[str, str]]:
        """Invalid or contradictory columns: (column, what is wrong)."""
        wrong = []
        if self.attend not in ("none", "causal") and not (type(self.attend) is int and self.attend >= 0):
            wrong.append(("attend", f"found {self.attend!r}, expected none, causal or a number of tokens, 0 or more"))
        if not self.update <= set(PARTS):
            wrong.append(("update", f"found {sorted(self.update)}, expected some of {', '.join(PARTS)}"))
        if self.queries and not {"value", "output"} <= self.update:
            wrong.append(("update", "visual tokens that query are updated by value and output"))
        if self.source not in ("stream", "own"):
            wrong.append(("source", f"found {self.source!r}, expected stream or own"))
        if isinstance(self.tokens, Top) and self.update:
            wrong.append(("tokens", "dropping by rank needs update none"))
        if isinstance(self.seen, Top) and self.seen != self.tokens:
            wrong.append(("seen", "found a rank, expected all, none or every N; ranks belong to tokens"))
        return wrong

    def to_dict(self) -> dict[str, str | int]:
        """The text form of every column, as in a configuration."""
        parts = " ".join(part for part in PARTS if part in self.update) or "none"
        columns = {"tokens": str(self.tokens), "attend": self.attend, "update": parts, "seen": str(self.seen)}
        return {**columns, "source": self.source}

    def with_columns(self, columns: dict[str, str | int]) -> LayerPlan:
        """This row with some columns given in their text form. Raises ValueError for an invalid selection."""
        values: dict[str, object] = {name: value for name, value in columns.items() if name in ("attend", "source")}
        values |= {name: parse_select(str(columns[name])) for name in ("tokens", "seen") if name in columns}
        if "update" in columns:
            words = str(columns["update"]).split()
            values["update"] = frozenset() if words == ["none"] else frozenset(words)
        return replace(self, **values)  # type: ignore[arg-type]


IDLE = LayerPlan(update=frozenset(), seen=NOTHING)
"""A row in which the visual tokens only pass by."""

Table = tuple[LayerPlan, ...]


def executed(table: Sequence[LayerPlan]) -> Table:
    """The table without work that nothing later reads: once no later layer reads visual rows, they are not updated, and where
    text does not see them either, nothing of them is computed. The text output is the same, number by number."""
    rows, read = [], False
    for row in reversed(table):
        if not read:
            row = replace(row, attend="none", update=frozenset())
        if row.tokens.empty or row.idle:
            row = replace(IDLE, source=row.source if read or not row.blind else "stream")
        rows.append(row)
        read = row.source != "own" and (read or not row.blind)
    return tuple(reversed(rows))
