"""`calibrate`: what a trained model can do without for its visual tokens, measured by its output.

The output distributions P of the model as it is and Q of the same weights under another table are compared at the supervised positions
of a few conversations with images: KL(P || Q), in nats a token. Two ways to a table, each with a curve of KL over prefill FLOPs:

    layers      a target, such as EE-MLLM-F, ShortV or ViCA: whole layers of a self-attention model are ranked and become what the
                target makes of them
    operators   a budget of FLOPs: single operators of single layers are skipped, wherever that changes the output least a FLOP

And beside: what each operator alone is worth in the layers of several runs, and what attention text pays to visual tokens there.

`bench` has the model and the conversations, `measure` and `attention` measure, `show` and `beside` write and draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...console import progress, quiet_libraries
from ...errors import UserError, not_one_of
from ..run import autocast
from .attention import attention_to_images
from .bench import prepare, refuse_base
from .beside import show_beside
from .layers import converted, how_many, kept, one_by_one, ranked, together
from .measure import compared
from .operators import OPERATORS, Choice, Operator, presets
from .show import show_layers, show_operators

if TYPE_CHECKING:
    from ...config.keys import Config


def calibrate_layers(
    config: Config,
    checkpoint: str | None,
    target: str,
    layers: float | None,
    by: str,
    samples: int,
    out: Path | None,
) -> None:
    """Rank the layers of a run's model and write a mechanism config, the numbers and a picture.

    Args:
        config, checkpoint, samples: see `prepare`.
        target: a preset that treats some layers in another way than the rest.
        layers: how many to convert, or to keep, or below 1 a share of all; None = the preset's share.
        by: the criterion: "kl", or where layers are kept "cosine".
        out: folder; None = ``calibrate-TARGET`` in the run directory.
    """
    quiet_libraries()
    keep = kept(target)
    if not keep and by == "cosine":
        raise UserError(
            f"--by cosine is ViCA's criterion, of layers in which text sees the image; for --target {target} use --by kl"
        )
    bench = prepare(config, checkpoint, samples, refuse_base)
    count = how_many(target, bench.depth, layers)
    with autocast(config, bench.model), progress("forward passes", len(bench.packs) * (2 * bench.depth + 1)) as advance:
        rows = one_by_one(bench, target, advance)
        ranking = ranked(rows, target, by)
        curve = together(bench, target, ranking, advance)
    mechanism = converted(bench.base, target, ranking[:count], bench.depth)
    results = {
        "target": target,
        "by": by,
        **bench.about,
        "mechanism": mechanism.to_dict(),
        "ranking": ranking,
        "chosen": sorted(ranking[:count]),
        "layers": rows,
        "together": curve,
    }
    show_layers(results, mechanism, keep, out or Path(config.out) / f"calibrate-{target}", checkpoint)


def calibrate_operators(
    config: Config,
    checkpoint: str | None,
    budget: float,
    operators: str | None,
    samples: int,
    out: Path | None,
) -> None:
    """Choose operators to skip and write a mechanism config, the numbers and a picture.

    Args:
        config, checkpoint, samples: see `prepare`.
        budget: most FLOPs of a prompt in the decoder's layers, as a share of what the model takes.
        operators: those that may be skipped, of `OPERATORS`, with commas between them; None = all.
        out: folder; None = ``calibrate-operators`` in the run directory.
    """
    quiet_libraries()
    names = [*OPERATORS] if operators is None else [*dict.fromkeys(operators.split(","))]
    if unknown := [name for name in names if name not in OPERATORS]:
        raise UserError(f"--operators: {not_one_of(unknown[0], OPERATORS)}, or several with commas between them")
    if not 0 < budget < 1:
        raise UserError(f"--budget {budget:g}: expected a share of the model's FLOPs, between 0 and 1, such as 0.66")
    bench = prepare(config, checkpoint, samples)
    choice = Choice(bench, names, budget * bench.flops(bench.base))
    choice.refuse_budget()
    beside = presets(bench)
    passes = len(bench.packs) * (2 * len(choice.computed()) + len(beside))
    with autocast(config, bench.model), progress("forward passes", passes) as advance:
        alone = choice.alone(advance)
        order = choice.order({Operator(row["layer"], row["operator"]): row["kl"] for row in alone})
        curve = compared(bench, [choice.without(order[:count]) for count in range(1, len(order) + 1)], advance)
        points = compared(bench, list(beside.values()), advance)
    count = next(n for n, row in enumerate(curve, 1) if row["flops"] <= choice.budget)
    mechanism, left = choice.without(order[:count]), choice.computed(order[:count])
    results = {
        "operators": names,
        "budget": budget,
        **bench.about,
        "mechanism": mechanism.to_dict(),
        "chosen": count,
        "alone": [{**row, "left_out": (row["layer"], row["operator"]) not in left} for row in alone],
        "curve": [{"layer": one.layer, "operator": one.name, **row} for one, row in zip(order, curve, strict=True)],
        "presets": dict(zip(beside, points, strict=True)),
    }
    folder = out or Path(config.out) / "calibrate-operators"
    show_operators(results, mechanism, config.model.mechanism.preset, folder, checkpoint)


def calibrate_beside(configs: Sequence[Config], checkpoint: str | None, samples: int, out: Path | None) -> None:
    """Measure runs on the same conversations, and write the numbers and a picture.

    Args:
        configs: of the runs; the first one's ``data.val`` and seed say which conversations.
        checkpoint: of the first run, see `prepare`; the newest of the others.
        samples: see `prepare`.
        out: folder; None = ``calibrate-beside`` in the first run's directory.
    """
    quiet_libraries()
    first, runs = configs[0], []
    for number, own in enumerate(configs):
        config = replace(own, seed=first.seed, data=replace(own.data, val=first.data.val))
        bench = prepare(config, None if number else checkpoint, samples)
        choice = Choice(bench, OPERATORS, 0.0)
        passes = len(bench.packs) * (1 + len(choice.computed()))
        with autocast(config, bench.model), progress("forward passes", passes) as advance:
            attention, alone = attention_to_images(bench, advance), choice.alone(advance)
        named = {"run": config.out, "preset": config.model.mechanism.preset}
        runs.append({**named, **bench.about, "alone": alone, "attention": attention})
    show_beside(runs, out or Path(first.out) / "calibrate-beside")
