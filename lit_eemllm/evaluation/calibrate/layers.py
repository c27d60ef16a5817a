"""Whole layers for a target: which of a dense model's layers may treat visual tokens as the target does, by the papers' criteria.

One layer at a time is changed in an otherwise dense model, and layers are ranked by KL(P || P_-l), as ShortV (its Layer Contribution)
and V-Skip (its Visual Information Gain) rank them. A target is a preset that treats some layers in another way than the rest:

    dense_layers lists the rest, as in EE-MLLM-F, V-Skip or ShortV: layers are converted. In these visual tokens do not query; their
                 states pass what both aligners, the target's and the run's own, have on, or the run's own window.
    cross_layers lists some, as in ViCA: layers are kept. In the others text does not see the image; in the comparison of one
                 layer visual tokens still query, so nothing else is changed.

Where layers are kept there is ViCA's first criterion beside it, the cosine similarity of text states before and after what the
layer's attention takes from the visual tokens: the lowest similarities are the key layers. Its exact place in the layer is
our reading: x and x + W_o sum_j a_j v_j, j over the visual tokens only, a the weights of the joint softmax. Where the attention's
norm stands after W_o, it divides both parts by the size of their sum.

The choice is greedy, as in the papers: the layers of the least single impact are converted (or those of the most are kept),
whatever they do together. So the KL of 1, 2, ... layers together is measured too.

Our choices: ShortV compares one position, the first of the answer; here it is every supervised one, under the true answer.
The last layer never passes visual states on, so converting it changes nothing (KL 0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ...errors import UserError
from ...mechanisms import PRESETS, Mechanism
from .bench import Bench
from .measure import Row, compared, cosines


def kept(target: str) -> bool:
    """Whether layers are kept, in which text sees the image, or else converted. Raises UserError for a preset that is no target."""
    targets = {
        name: type(m.cross_layers) is tuple
        for name, m in PRESETS.items()
        if tuple in map(type, (m.cross_layers, m.dense_layers)) and type(m).plan is Mechanism.plan
    }
    if target not in targets:
        expected = f"a preset that treats some layers in another way than the rest: {', '.join(targets)}"
        raise UserError(
            f"--target {target}: expected {expected}, or --import FILE with one of your own; --budget chooses operators"
        )
    return targets[target]


def how_many(target: str, depth: int, layers: float | None) -> int:
    """Layers to convert, or to keep: so many, or below 1 that share of all; None = the preset's share. Raises UserError."""
    if layers is None:  # presets are written for 32 layers
        preset = PRESETS[target]
        share = len(preset.cross_layers) / 32 if kept(target) else 1 - len(preset.dense_layers) / 32
        return max(1, round(share * depth))
    if not (0 < layers < 1 or layers in range(1, depth + 1)):
        raise UserError(
            f"--layers {layers:g}: expected 1 to {depth}, the layers of this decoder, or a share of them below 1, such as 0.6"
        )
    return max(1, round(layers * depth)) if layers < 1 else int(layers)


def converted(base: Mechanism, target: str, layers: Sequence[int], depth: int) -> Mechanism:
    """The base with these layers treated as the target does; or with text seeing the image only in these, if layers are kept."""

    def named(chosen: set[int]) -> str | tuple[int, ...]:
        return {0: "none", depth: "all"}.get(len(chosen), tuple(sorted(chosen)))

    aligner = PRESETS[target].aligner
    if kept(target):
        return replace(base, dense_layers="none", cross_layers=named(set(layers)), aligner=aligner, rows=())
    others = named(set(range(depth)) - set(layers))
    return replace(base, dense_layers=others, aligner=aligner & base.aligner, rows=())


def changed(base: Mechanism, target: str, layer: int, depth: int) -> Mechanism:
    """The base with one layer treated as the target does; if layers are kept, its text does not see the image, which still queries."""
    if kept(target):
        return replace(base, rows=(*base.rows, (str(layer), (("seen", "none"),))))
    return converted(base, target, [layer], depth)


def one_by_one(bench: Bench, target: str, advance: Callable[[int], None]) -> list[Row]:
    """What changing each layer alone does; with the cosine, if layers are kept."""
    found = compared(bench, [changed(bench.base, target, layer, bench.depth) for layer in range(bench.depth)], advance)
    rows = [{"layer": layer, **row} for layer, row in enumerate(found)]
    return [{**row, "cosine": c} for row, c in zip(rows, cosines(bench), strict=True)] if kept(target) else rows


def ranked(rows: Sequence[Row], target: str, by: str) -> list[int]:
    """Layers in the order of conversion, least impact first; or in that in which they are kept, most first.

    Of equal ones the later layer is the less important.
    """
    values = {row["layer"]: 1 - row["cosine"] if by == "cosine" else row["kl"] for row in rows}
    least_first = sorted(values, key=lambda layer: (values[layer], -layer))
    return least_first[::-1] if kept(target) else least_first


def together(bench: Bench, target: str, ranking: Sequence[int], advance: Callable[[int], None]) -> list[Row]:
    """What the target mechanism does with the first 0, 1, ... layers of the ranking."""
    counts = range(len(ranking) + 1)
    mechanisms = [converted(bench.base, target, ranking[:count], bench.depth) for count in counts]
    return [{"layers": count, **row} for count, row in zip(counts, compared(bench, mechanisms, advance), strict=True)]
