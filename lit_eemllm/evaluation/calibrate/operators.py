"""The free choice: single operators of a model's layers are skipped for visual tokens until a prompt's FLOPs keep to a budget.

With a, f, s in {0, 1} for each layer, visual tokens I and text T, a layer is::

    H_I = I + a path(I)      I' = H_I + f FFN(norm2(H_I))      and text sees I only if s = 1

    attention   a: they do not query and go past W_v and W_o too, so H_I = I. The path is attention in a layer of LLaVA, the
                aligner's V and O in one of EE-MLLM
    ffn         f: they pass by the feed-forward network
    seen        s: text sees none of them in this layer, as in most layers of ViCA

Printed of operator skipping (2606.31903, its abstract): attention, the FFN or both are skipped, layer by layer, without training,
and all visual tokens stay; 33.7 % fewer TFLOPs for Qwen3-VL at 99.5 % of its score. Which operators go is decided by what is seen of
them in the answer's tokens. How that is measured was not found: criterion, order and budget below are ours, and so is ``seen``.

Each operator is skipped alone, and KL(P || P_-o) is what it is worth. Then the one of least KL for the FLOPs that it would save now
is skipped, again and again. FLOPs are those of the whole table as the program executes it: what no later layer reads is not
computed, so hiding the image from the last layers saves their updates too, and an operator that is not computed is not offered (in
the last layer attention and ffn never are), nor is one that the mechanism needs, such as text's sight of tokens in a layer that ranks
them. Text always sees the image in some layer.

Operators are measured once, not again after each choice: in 8 layers that takes 11 times the passes, and where it was tried it changed
little. What they do together is measured after they are chosen, set by set.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, inf
from typing import NamedTuple

from ...core.select import NOTHING
from ...core.table import LayerPlan, executed
from ...cost.explain import ranges
from ...errors import UserError
from ...mechanisms import PRESETS, Mechanism, build_mechanism
from .bench import Bench
from .measure import Row, compared

OPERATORS: dict[str, Callable[[LayerPlan], LayerPlan]] = {
    "attention": lambda row: replace(row, attend="none", update=row.update - {"value", "output"}),
    "ffn": lambda row: replace(row, update=row.update - {"ffn"}),
    "seen": lambda row: replace(row, seen=NOTHING),
}
"""What skipping an operator makes of a layer's row."""
TITLES = {
    "attention": "attention or an aligner updates visual tokens",
    "ffn": "the feed-forward network updates visual tokens",
    "seen": "text sees visual tokens",
}
"""What an operator is, for people."""


class Operator(NamedTuple):
    layer: int
    name: str


@dataclass(frozen=True)
class Choice:
    """A greedy choice among a model's operators.

    Attributes:
        bench: has the model, and counts FLOPs.
        names: of the operators that may be skipped.
        budget: FLOPs of a prompt that stay within reach.
    """

    bench: Bench
    names: Collection[str]
    budget: float

    def without(self, skipped: Collection[Operator]) -> Mechanism:
        """The model's mechanism with operators skipped, as overrides of its rows."""
        base, columns = self.bench.base, []
        for layer, row in enumerate(base.table(self.bench.depth)):
            full, less = row.to_dict(), row
            for name, skip in OPERATORS.items():
                less = skip(less) if (layer, name) in skipped else less
            columns.append(tuple((column, value) for column, value in less.to_dict().items() if value != full[column]))
        rows = [(f"{first}-{last}" if last > first else str(first), new) for first, last, new in ranges(columns) if new]
        return replace(base, rows=(*base.rows, *rows))

    @cached_property
    def needed(self) -> set[Operator]:
        """Those without which the mechanism contradicts itself."""
        every = (Operator(layer, name) for layer in range(self.bench.depth) for name in self.names)
        return {operator for operator in every if self.bench.model.problems(self.without({operator}))}

    def computed(self, skipped: Collection[Operator] = ()) -> list[Operator]:
        """The operators that may still be skipped for visual tokens: not skipped or needed, and with a result that is read."""
        table = enumerate(executed(self.without(skipped).table(self.bench.depth)))
        left = [Operator(layer, name) for layer, row in table for name in self.names if OPERATORS[name](row) != row]
        return [operator for operator in left if operator not in self.needed]

    def alone(self, advance: Callable[[int], None]) -> list[Row]:
        """What skipping each operator alone does; see `compared`."""
        offered = self.computed()
        found = compared(self.bench, [self.without({operator}) for operator in offered], advance)
        return [{"layer": one.layer, "operator": one.name, **row} for one, row in zip(offered, found, strict=True)]

    def flops(self, skipped: Collection[Operator]) -> int:
        return self.bench.flops(self.without(skipped))

    def least(self, skipped: Collection[Operator] = ()) -> float:
        """FLOPs of the cheapest table that has these operators skipped; infinite if text would see the image nowhere."""
        offered = {*self.computed()}
        if not all(row.blind for row in self.without(offered).table(self.bench.depth)):
            return self.flops(offered)
        looks = (operator for operator in offered if operator.name == "seen" and operator not in skipped)
        return min((self.flops(offered - {look}) for look in looks), default=inf)

    def order(self, kl: Mapping[Operator, float]) -> list[Operator]:
        """Operators as they are skipped, until none is left that saves FLOPs and leaves the budget in reach.

        Args:
            kl: of each operator skipped alone. Of equal ones the one that saves more goes first, then that of the later layer.
        """
        order: list[Operator] = []
        while True:
            now = self.flops(order)
            prices = {}
            for operator in self.computed(order):
                saved = now - self.flops([*order, operator])
                if saved > 0:  # an aligner's values are computed for text to see anyway
                    prices[operator] = max(0.0, kl[operator]) / saved, -saved, -operator.layer
            for operator in sorted(prices, key=prices.__getitem__):
                if operator.name != "seen" or self.least([*order, operator]) <= self.budget:
                    order.append(operator)
                    break
            else:
                return order

    def refuse_budget(self) -> None:
        """Raises UserError for a budget that cannot be kept."""
        bench = self.bench
        if not self.computed():
            raise UserError(
                f"--operators: of {', '.join(self.names)} this model has none for visual tokens that it could be without. "
                "`lit-eemllm explain RUN` prints what it has; name a run of another mechanism, or other operators."
            )
        least, own, text = self.least(), bench.flops(bench.base), bench.flops(bench.base, visual=0)
        if self.budget < least:
            raise UserError(
                f"--budget {self.budget / own:g}: expected {ceil(1000 * least / own) / 1000:g} or more, of the model's prefill "
                f"FLOPs. Of a prompt of {bench.text:,} text and {bench.visual:,} visual tokens the text alone takes {text / own:.1%} of them, and "
                f"{least / own:.1%} are left without all that may be skipped ({', '.join(self.names)}), while text sees the image somewhere."
            )


def presets(bench: Bench) -> dict[str, Mechanism]:
    """Those that run on the model's weights as they are, with positions of its kind, and are something else."""
    found = {name: build_mechanism(name, bench.depth) for name in PRESETS}
    modules, positions, table = bench.base.modules, bench.base.visual_positions, executed(bench.base.table(bench.depth))
    return {
        name: mechanism
        for name, mechanism in found.items()
        if (mechanism.modules, mechanism.visual_positions) == (modules, positions)
        and executed(mechanism.table(bench.depth)) != table
        and not bench.model.problems(mechanism)
    }
