"""A mechanism as data: one row for each decoder layer, which says what the layer does with the visual tokens.

Text always runs through every layer. All that differs between the papers is, layer by layer, which visual tokens are there,
whether they query, which weights update them and what text sees of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .select import ALL, NOTHING, Scored, Select, Top, parse_select

PARTS = ("value", "output", "ffn")
"""Weights of a layer that can update visual rows, in the order in which they are used."""


@dataclass(frozen=True)
class LayerPlan:
    """A row of the table.

    Args:
        tokens: visual tokens that are there. The others pass by: they are neither seen nor changed.
        attend: do they query, and what do they see: ``none``; ``causal``, everything before them, as in LLaVA; ``image``, that and
            all of their own image (Gemma 3, Molmo 2); or a number, themselves and so many tokens of their image before them.
        update: weights that update them, of `PARTS`. A row that does not query takes the path of EE-MLLM's aligner: with
            u = norm1(I) and R repeating the value heads for grouped queries (norms after a block: `DecoderLayer`)::

                value & output  H = I + R(u W_v) W_o        value only  H = I + R(u W_v)
                output only     H = I + u W_o               neither     H = I
                ffn             I' = H + FFN(norm2(H))      no ffn      I' = H
        ffn: which of them the feed-forward network updates, if it does (Skip-Vision).
        seen: which of them text sees.
        source: where they come from: ``stream``, the layer before; ``own``, made for this layer alone.
    """

    tokens: Select = ALL
    attend: str | int = "none"
    update: frozenset[str] = frozenset(PARTS)
    ffn: Select = ALL
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
    def dense(self) -> bool:
        """They see text."""
        return self.attend in ("causal", "image")

    @property
    def whole(self) -> bool:
        """All rows query, and all see the same: everything before them."""
        return self.attend == "causal" and self.seen == self.tokens

    @property
    def keys(self) -> bool:
        """Keys of visual tokens are computed."""
        return not self.tokens.empty and (self.queries or not self.seen.empty)

    @property
    def kept(self) -> Select:
        """Visual tokens whose keys are cached: those that text sees, or that images of later turns see."""
        return self.tokens if self.dense else self.seen

    @property
    def values(self) -> bool:
        return self.keys or "value" in self.update

    @property
    def moves(self) -> bool:
        """Attention or the aligner's path adds something to visual rows."""
        return not self.update.isdisjoint(("value", "output"))

    @property
    def repeats(self) -> bool:
        """They take the aligner's path through W_v and W_o."""
        return not self.queries and {"value", "output"} <= self.update

    @property
    def idle(self) -> bool:
        """Nothing is computed for visual rows here."""
        return not self.values and not self.update

    def fed(self, visual: int) -> int:
        """How many tokens of an image the feed-forward network updates."""
        if "ffn" not in self.update:
            return 0
        if ALL in (self.ffn, self.tokens):
            return (self.tokens if self.ffn == ALL else self.ffn).count(visual)
        return int((self.tokens.of_image(visual) & self.ffn.of_image(visual)).sum())

    def problems(self) -> list[tuple[str, str]]:
        """Invalid or contradictory columns: (column, what is wrong)."""
        wrong = []
        words = ("none", "causal", "image")
        if self.attend not in words and not (type(self.attend) is int and self.attend >= 0):
            text = f"found {self.attend!r}, expected {', '.join(words)} or a number of tokens, 0 or more"
            wrong.append(("attend", text))
        if not self.update <= set(PARTS):
            wrong.append(("update", f"found {sorted(self.update)}, expected some of {', '.join(PARTS)}"))
        if self.queries and not {"value", "output"} <= self.update:
            wrong.append(("update", "visual tokens that query are updated by value and output"))
        if self.source not in ("stream", "own"):
            wrong.append(("source", f"found {self.source!r}, expected stream or own"))
        if isinstance(self.seen, Scored) and self.seen != self.tokens:
            wrong.append(("seen", "found a rank, expected tokens chosen by their place; ranks belong to tokens"))
        if isinstance(self.ffn, Scored) or (isinstance(self.tokens, Scored) and self.ffn != ALL):
            wrong.append(("ffn", "some tokens only can be updated where ffn and tokens are chosen by their place"))
        return wrong

    def to_dict(self) -> dict[str, str | int]:
        """The text form of every column, as in a configuration."""
        parts = " ".join(part for part in PARTS if part in self.update) or "none"
        selects = {"ffn": str(self.ffn), "seen": str(self.seen)}
        return {"tokens": str(self.tokens), "attend": self.attend, "update": parts, **selects, "source": self.source}

    def with_columns(self, columns: dict[str, str | int]) -> LayerPlan:
        """This row with some columns given in their text form. Raises ValueError for an invalid selection."""
        values: dict[str, object] = {name: value for name, value in columns.items() if name in ("attend", "source")}
        values |= {name: parse_select(str(columns[name])) for name in ("tokens", "ffn", "seen") if name in columns}
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
            left = row.tokens if isinstance(row.tokens, Top) else ALL  # those that have left stay away
            row = replace(IDLE, tokens=left, source=row.source if read or not row.blind else "stream")
        rows.append(row)
        read = row.source != "own" and (read or not row.blind)
    return tuple(reversed(rows))


def ranked_in(table: Table, layer: int) -> Top | None:
    """The selection that an executed layer ranks, if a layer reads what it leaves."""
    for row in table[layer : layer + 2]:
        top = row.tokens
        if isinstance(top, Top) and top.layer == layer:
            reads = any(isinstance(later.tokens, Top) and not later.idle for later in table[layer:])
            return top if reads else None
    return None


def by_encoder(table: Table) -> bool:
    """Whether the encoder ranks visual tokens, and so must say how important each is."""
    return any(isinstance(row.tokens, Top) and row.tokens.by_encoder for row in table)


def ranking_problems(table: Table) -> list[tuple[int, str]]:
    """Selections by rank that contradict each other: (layer, what is wrong). What has left does not come back, so that it need not be
    carried on."""
    wrong, left = list[tuple[int, str]](), None
    for layer, row in enumerate(table):
        top = row.tokens
        if left is not None and not isinstance(top, Top) and not top.empty:
            wrong.append((layer, f"found {top}, expected none or a rank: tokens have left after layer {left.layer}"))
        if not isinstance(top, Top) or top == left:
            continue
        before = 0.0 if left is None else left.dropped
        if not 0 <= layer - top.layer <= 1:
            wrong.append((layer, f"ranked in {top.layer}, expected this layer or the one before"))
        elif table[top.layer].blind or (left is not None and top.layer <= left.layer):
            wrong.append(
                (layer, f"ranked in {top.layer}, expected a layer in which text sees them, and a later one each time")
            )
        if top.before != before or not top.dropped > before:
            wrong.append(
                (layer, f"dropped {top.dropped:g} after {top.before:g}, expected more than {before:g} after {before:g}")
            )
        left = top
    return wrong
