"""What calibration writes and prints: a mechanism config, the numbers as JSON, a picture with KL over FLOPs, and a table."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from math import floor, log10
from pathlib import Path
from typing import Any

from rich.table import Table

from ...config import strict_yaml
from ...console import console, write_atomically, writing
from ...cost.explain import ranges
from ...formats.mechanism import SETTINGS
from ...mechanisms import Mechanism
from ...report.plots import place_labels
from .operators import TITLES

Results = dict[str, Any]
CHOSEN, OTHER, PRESET = "tab:blue", "lightgrey", "tab:orange"
KL = "KL from the model as it is (nats a token)"
NO_KL = 1e-6  # as good as none


def show_layers(results: Results, mechanism: Mechanism, keep: bool, folder: Path, checkpoint: str | None) -> None:
    """Of `calibrate_layers`. keep: whether layers are kept, or else converted."""
    criterion = "cosine similarity before and after text-to-image" if results["by"] == "cosine" else "KL"
    how = f"Greedy by the {criterion} of each layer alone, {'most' if keep else 'least'} impact first: {' '.join(map(str, results['ranking']))}."
    said = layers_verdict(results, keep)
    _write(results, mechanism_yaml(mechanism, results["target"], results, said, how, checkpoint), folder, "layers")
    draw_layers(results, keep, folder / "layers.png")
    table = Table(title=f"layers for {results['target']}, each changed alone")
    for heading in ("layer", "KL", "same top token", *(["cosine"] if keep else []), "rank", "chosen"):
        table.add_column(heading, no_wrap=True, justify="right")
    for row in results["layers"]:
        layer = row["layer"]
        cells = [str(layer), f"{row['kl']:.3g}", f"{row['same_top']:.3f}"]
        cells += [f"{row['cosine']:.4f}"] if keep else []
        rank = results["ranking"].index(layer) + 1
        table.add_row(*cells, str(rank), "x" if layer in results["chosen"] else "")
    _print(table, said, folder, "layers")


def show_operators(results: Results, mechanism: Mechanism, preset: str, folder: Path, checkpoint: str | None) -> None:
    """Of `calibrate_operators`. preset: of the run, whose rows the mechanism overrides."""
    how = f"Greedy by the KL of each operator alone for the FLOPs that it saves; might be skipped: {', '.join(results['operators'])}."
    said = operators_verdict(results)
    _write(results, mechanism_yaml(mechanism, preset, results, said, how, checkpoint), folder, "operators")
    draw_operators(results, folder / "operators.png")
    table = Table(title="KL when one operator alone is skipped for visual tokens (x: left out)")
    for heading in ("layer", *results["operators"]):
        table.add_column(heading, no_wrap=True, justify="right")
    cells = {
        (row["layer"], row["operator"]): f"{row['kl']:.3g} {'x' if row['left_out'] else ' '}"
        for row in results["alone"]
    }
    for layer in sorted({layer for layer, _ in cells}):
        table.add_row(str(layer), *(cells.get((layer, name), "") for name in results["operators"]))
    _print(table, said, folder, "operators")


def _write(results: Results, config: str, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.json", json.dumps(results, indent=2))
    write_atomically(folder / "mechanism.yaml", config)


def _print(table: Table, verdict: str, folder: Path, name: str) -> None:
    console.print(table)
    console.print(verdict)
    console.print(f"mechanism: {folder / 'mechanism.yaml'}; numbers and picture: {name}.json, {name}.png beside it")


# --- in words
def layers_verdict(results: Results, keep: bool) -> str:
    """The choice and what it does."""
    chosen, depth = results["chosen"], len(results["layers"])
    do = "keep their text-to-image part" if keep else f"become {results['target']}"
    whole = results["together"][len(chosen)]
    return (
        f"layers {', '.join(map(str, chosen))} ({len(chosen)} of {depth}) {do}; all together: {effect(whole, results)}"
    )


def operators_verdict(results: Results) -> str:
    out = {
        name: {row["layer"] for row in results["alone"] if row["operator"] == name and row["left_out"]}
        for name in results["operators"]
    }
    parts = [
        f"{name} in {'layers' if len(layers) > 1 else 'layer'} {spans(layers)}"
        for name, layers in out.items()
        if layers
    ]
    return f"left out for visual tokens: {'; '.join(parts)}; all together: {effect(results['curve'][results['chosen'] - 1], results)}"


def effect(row: dict[str, Any], results: Results) -> str:
    return (
        f"{share(row, results):.1%} of the model's prefill FLOPs, KL {row['kl']:.3g} a token from it, "
        f"the same most likely token at {row['same_top']:.1%}"
    )


def share(row: dict[str, Any], results: Results) -> float:
    """Of the model's prefill FLOPs."""
    part: float = row["flops"] / results["base_flops"]
    return part


def spans(layers: Collection[int]) -> str:
    """Layers with neighbours drawn together, such as ``0-3, 5``."""
    found = ranges([layer in layers for layer in range(max(layers) + 1)])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last, there in found if there)


def mechanism_yaml(
    mechanism: Mechanism, preset: str, results: Results, verdict: str, how: str, checkpoint: str | None
) -> str:
    """Every field of the mechanism, so that nothing of the configuration before it shines through."""
    values = {"rows": [], **mechanism.to_dict()}
    options = {name: values.pop(name) for name in [*values] if name not in SETTINGS}
    prompt = results["prompt"]
    lines = [
        f"Found by lit-eemllm calibrate: {verdict}.",
        f"From {results['checkpoint']} with {results['samples']} conversations of {results['data']} "
        f"({results['tokens']} supervised tokens), seed {results['seed']}; FLOPs for {prompt['text']} text and "
        f"{prompt['visual']} visual tokens.",
        how,
        f"Goes after the run's own: lit-eemllm validate RUN/config.yaml THIS --checkpoint {checkpoint or results['checkpoint']} out=ANOTHER",
        "and, to train on from its weights: lit-eemllm fit RUN/config.yaml THIS init_from=RUN out=ANOTHER",
    ]
    header = "".join(f"# {' '.join(line.split())}\n" for line in lines)
    body = {"model": {"mechanism": {"preset": preset, **values, **({"options": options} if options else {})}}}
    return header + strict_yaml.dump(body, default_flow_style=None, width=10**6)


# --- pictures
def draw_layers(results: Results, keep: bool, path: Path) -> None:
    """KL of each layer alone, the cosine if there is one, and the KL of 0, 1, ... layers together over their FLOPs."""
    plt = pyplot()
    layers, chosen, target = results["layers"], set(results["chosen"]), results["target"]
    figure, axes = plt.subplots(1, 3 if keep else 2, figsize=(16 if keep else 12, 5), layout="constrained")
    colours = [CHOSEN if row["layer"] in chosen else OTHER for row in layers]
    numbers = [row["layer"] for row in layers]

    axes[0].bar(numbers, [row["kl"] for row in layers], color=colours)
    axes[0].set(title="one layer alone", xlabel="layer")
    kl_axis(axes[0], layers)
    if keep:
        axes[1].bar(numbers, [1 - row["cosine"] for row in layers], color=colours)
        axes[1].set(title="text before and after its look at the image", xlabel="layer", ylabel="1 - cosine similarity")
    for axis in axes[:-1]:
        axis.xaxis.get_major_locator().set_params(integer=True)
    draw_curve(axes[-1], results["together"], len(chosen), results)
    what = "layers that keep it" if keep else f"layers that become {target}"
    axes[-1].set_title(f"0, 1, 2, ... {what}, {'most' if keep else 'least'} impact first")
    axes[-1].legend(frameon=False)
    done = "keep their text-to-image part" if keep else f"become {target}"
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (CHOSEN, OTHER)]
    axes[0].legend(handles, [f"layers that {done}", "the others"], frameon=False)
    _title(figure, f"How far the output goes from the model's own with visual tokens treated as in {target}", results)
    save(figure, path)


def draw_operators(results: Results, path: Path) -> None:
    """KL of each operator alone, layer by layer; the KL of those that are skipped together over their FLOPs, and of presets."""
    plt = pyplot()
    figure = plt.figure(figsize=(14, 6.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.25))
    names = results["operators"]
    axes = left.subplots(len(names), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, name in zip(axes, names, strict=True):
        rows = [row for row in results["alone"] if row["operator"] == name]
        colours = [OTHER if row["left_out"] else CHOSEN for row in rows]
        axis.bar([row["layer"] for row in rows], [row["kl"] for row in rows], color=colours)
        axis.set_title(TITLES[name], loc="left", fontsize="medium")
        axis.xaxis.get_major_locator().set_params(integer=True)
        kl_axis(axis, results["alone"])
        axis.set_ylabel("")
    axes[-1].set_xlabel("layer")
    left.supylabel(KL, fontsize="medium")
    left.suptitle("one operator of one layer skipped")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (CHOSEN, OTHER)]
    left.legend(handles, ["stays", "left out"], loc="outside lower center", ncols=2, frameon=False)

    axis = right.subplots()
    curve = [{"flops": results["base_flops"], "kl": 0.0}, *results["curve"]]
    draw_curve(axis, curve, results["chosen"], results, *results["presets"].values())
    points = [(100 * share(row, results), row["kl"], 0.0, name, PRESET) for name, row in results["presets"].items()]
    for number, (x, y, *_) in enumerate(points):
        axis.plot(x, y, "D", color=PRESET, label="a preset, on the same weights" if number == 0 else None)
    axis.axvline(100 * results["budget"], color=CHOSEN, linestyle=":", label=f"--budget {results['budget']:g}")
    axis.set_title("operators skipped together, one more at each point")
    right.legend(loc="outside lower center", ncols=2, frameon=False)
    _title(figure, "How far the output goes from the model's own without some operators for visual tokens", results)
    whole = (100.0, 0.0, 0.0, "the model as it is", "black")
    place_labels(axis, [*points, whole], [(100 * share(row, results), row["kl"]) for row in curve])
    save(figure, path)


def draw_curve(
    axis: Any, rows: Sequence[dict[str, Any]], chosen: int, results: Results, *others: dict[str, Any]
) -> None:
    """KL over FLOPs. chosen: which of the rows; others: rows that are to fit in too."""
    x, y = [100 * share(row, results) for row in rows], [row["kl"] for row in rows]
    axis.plot(x, y, color="black", marker="o", markersize=3, clip_on=False)
    axis.plot(x[chosen], y[chosen], "o", color=CHOSEN, markersize=10, clip_on=False, label="chosen: mechanism.yaml")
    least = 100 * results["text_flops"] / results["base_flops"]
    axis.axvspan(0, least, color="0.9", label="less than text alone takes")
    axis.set(xlabel="prefill FLOPs, % of the model's", xlim=(min(least, *x) - 5, 103))
    kl_axis(axis, [*rows, *others])


def kl_axis(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    """A logarithmic scale that has a place for 0."""
    some = [row["kl"] for row in rows if row["kl"] > NO_KL] or [NO_KL]
    axis.set_yscale("symlog", linthresh=10 ** floor(log10(min(some))))
    axis.set(ylabel=KL, ylim=(0, 2 * max(some)))


def _title(figure: Any, text: str, results: Results) -> None:
    prompt = results["prompt"]
    figure.suptitle(
        f"{text}\n{results['samples']:,} conversations with images; FLOPs of their mean prompt: {prompt['text']:,} text and "
        f"{prompt['visual']:,} visual tokens",
        fontsize="large",
    )


def pyplot() -> Any:
    """Matplotlib's, which draws into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write a picture, and close it."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    with writing(path):
        figure.savefig(path, dpi=110)
    pyplot().close(figure)
