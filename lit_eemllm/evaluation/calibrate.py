"""`calibrate`: which layers of a trained self-attention model may treat visual tokens more cheaply, by the papers' criteria.

One layer at a time is changed in an otherwise dense model, and the output distributions P (dense) and P_-l are compared at
the supervised positions of a few conversations with images: KL(P || P_-l), as ShortV (its Layer Contribution) and V-Skip
(its Visual Information Gain) rank layers. A target is a preset that treats some layers in another way than the rest:

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

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div
from torch.utils.hooks import RemovableHandle

from ..config import strict_yaml
from ..console import console, progress, quiet_libraries, write_atomically, writing
from ..core.decoder import DecoderLayer
from ..data.module import ShardDataModule
from ..data.packing import collate, plan_packs
from ..data.recipe import Recipe
from ..data.samples import EncodedSample, SampleEncoder
from ..data.shards import read_shard
from ..errors import ConfigError, SampleError, UserError
from ..layout import PackedBatch
from ..mechanisms import PRESETS, Mechanism
from ..report import provenance
from .run import autocast, load

if TYPE_CHECKING:
    from ..config.keys import Config
    from ..model import EEMLLM

Row = dict[str, Any]
"""A row of ``layers.json``: a layer, or how many; ``kl``, ``same_top`` (see `Divergence`) and perhaps ``cosine``."""


class Divergence:
    """How far one output distribution Q is from another P: means over the supervised positions of all packs."""

    def __init__(self) -> None:
        self.kl_sum, self.same, self.count = 0.0, 0, 0

    def update(self, p_nv: Tensor, q_nv: Tensor) -> None:
        """Logits of both. In float64, or the rounding of equal ones would look like a difference."""
        for p, q in zip(p_nv.split(256), q_nv.split(256), strict=True):
            log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
            self.kl_sum += kl_div(log_q, log_p, reduction="sum", log_target=True).item()
            self.same += int((p.argmax(-1) == q.argmax(-1)).sum())
        self.count += len(p_nv)

    def row(self) -> Row:
        """KL(P || Q) in nats, and the share of positions at which both find the same token most likely."""
        return {"kl": self.kl_sum / self.count, "same_top": self.same / self.count}


def calibrate(
    config: Config,
    checkpoint: str | None,
    target: str,
    layers: int | None,
    budget: float | None,
    by: str,
    samples: int,
    out: Path | None,
) -> None:
    """Rank the layers of a run's model and write a mechanism config, the numbers and a picture.

    Args:
        config: of a run whose mechanism is dense.
        checkpoint: a file; None takes the run's newest; "none" the untrained parts.
        target: a preset that treats some layers in another way than the rest.
        layers: how many to convert, or to keep; None = by `budget`.
        budget: likewise, as a share of all layers; None = the preset's share.
        by: the criterion: "kl", or where layers are kept "cosine".
        samples: conversations with images, drawn from ``data.val`` with the seed.
        out: folder; None = ``calibrate-TARGET`` in the run directory.
    """
    quiet_libraries()
    if not kept(target) and by == "cosine":
        raise UserError(
            f"--by cosine is ViCA's criterion, of layers in which text sees the image; for --target {target} use --by kl"
        )
    if samples < 1:
        raise UserError(f"--samples {samples}: expected 1 or more")
    if budget is not None and not 0 < budget <= 1:
        raise UserError(f"--budget {budget:g}: expected a share of the layers, more than 0 and at most 1")
    c = config.data
    recipe = ShardDataModule(c, config.seed).recipe("val")  # what is wrong with it is said before the model is built
    model, processor, source = load(config, checkpoint)
    base, depth = model.mechanism, len(model.language_model.model.layers)
    refuse_base(base, depth)
    count = how_many(target, depth, layers, budget)
    encoder = SampleEncoder(processor.template, model.vision.transform, c.max_length, c.truncation, c.max_image_pixels)
    packs, skipped = draw_packs(recipe, encoder, samples, config.seed, c.pack_tokens, c.pack_samples)
    packs = [pack.to(model.device) for pack in packs]
    used, tokens = sum(len(pack.keys) for pack in packs), sum(pack.num_targets for pack in packs)
    console.print(
        f"{source}; attention {model.backend.name}; {used} conversations with images of {c.val}, {tokens} tokens"
    )

    with autocast(config, model), progress("forward passes", len(packs) * (2 * depth + 2)) as advance:
        rows = one_by_one(model, packs, target, advance)
        ranking = ranked(rows, target, by)
        curve = together(model, packs, target, ranking, advance)
    chosen = sorted(ranking[:count])
    mechanism = converted(base, target, chosen, depth)

    folder = out or Path(config.out) / f"calibrate-{target}"
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "target": target,
        "by": by,
        "checkpoint": source,
        "data": c.val,
        "samples": used,
        "tokens": tokens,
        "seed": config.seed,
        "skipped": dict(skipped),
        "base": base.to_dict(),
        "mechanism": mechanism.to_dict(),
        "ranking": ranking,
        "chosen": chosen,
        "layers": rows,
        "together": curve,
        "made": provenance(),
    }
    write_atomically(folder / "layers.json", json.dumps(results, indent=2))
    write_atomically(folder / "mechanism.yaml", mechanism_yaml(mechanism, results, checkpoint or source))
    draw(results, folder / "layers.png")
    print_impacts(results)
    console.print(f"mechanism: {folder / 'mechanism.yaml'}; numbers and picture: layers.json, layers.png beside it")


# --- what is compared
def kept(target: str) -> bool:
    """Whether layers are kept, in which text sees the image, or else converted. Raises UserError for a preset that is no target."""
    targets = {
        name: type(m.cross_layers) is tuple
        for name, m in PRESETS.items()
        if tuple in map(type, (m.cross_layers, m.dense_layers))
    }
    if target not in targets:
        expected = f"a preset that treats some layers in another way than the rest: {', '.join(targets)}"
        raise UserError(f"--target {target}: expected {expected}, or --import FILE with one of your own")
    return targets[target]


def refuse_base(base: Mechanism, depth: int) -> None:
    """Raises ConfigError unless visual tokens query in every layer. (In the last one it makes no difference.)"""
    sparse = [layer for layer in range(depth - 1) if not base.is_dense(layer)]
    if sparse or not base.sees_images(depth - 1):
        found = f"layers {sparse} of {depth} are not dense" if sparse else f"in layer {depth - 1} text sees no image"
        raise ConfigError(
            f"model.mechanism: {found}, but calibrate compares with a model in which visual tokens query in every layer. "
            "Name a run of model.mechanism.preset=llava, or one whose weights were trained like that."
        )


def how_many(target: str, depth: int, layers: int | None, budget: float | None) -> int:
    """Layers to convert, or to keep. Raises UserError."""
    if layers is not None and not 1 <= layers <= depth:
        raise UserError(f"--layers {layers}: expected 1 to {depth}, the layers of this decoder")
    if layers is not None:
        return layers
    if budget is None:  # presets are written for 32 layers
        preset = PRESETS[target]
        budget = len(preset.cross_layers) / 32 if kept(target) else 1 - len(preset.dense_layers) / 32
    return max(1, round(budget * depth))


def converted(base: Mechanism, target: str, layers: Sequence[int], depth: int) -> Mechanism:
    """The base with these layers treated as the target does; or with text seeing the image only in these, if layers are kept."""

    def named(chosen: set[int]) -> str | tuple[int, ...]:
        return {0: "none", depth: "all"}.get(len(chosen), tuple(sorted(chosen)))

    aligner = PRESETS[target].aligner
    if kept(target):
        return replace(base, dense_layers="none", cross_layers=named(set(layers)), aligner=aligner)
    others = named(set(range(depth)) - set(layers))
    return replace(base, dense_layers=others, aligner=aligner & base.aligner)


@contextmanager
def switched(model: EEMLLM, mechanism: Mechanism) -> Iterator[None]:
    """The model under another mechanism, and then as it was."""
    base = model.mechanism
    model.set_mechanism(mechanism)
    try:
        yield
    finally:
        model.set_mechanism(base)


def changed(base: Mechanism, target: str, layer: int, depth: int) -> Mechanism:
    """The base with one layer treated as the target does; if layers are kept, its text does not see the image, which still queries."""
    if kept(target):
        return replace(base, rows=((str(layer), (("seen", "none"),)),))
    return converted(base, target, [layer], depth)


def text_to_image_cosine(layer: DecoderLayer, args: tuple[Any, ...]) -> Tensor:
    """Similarity of each text state that comes after an image before and after the layer's text-to-image part.

    Softmax weights do not depend on the values. So with the values of all text set to zero, attention gives what the visual
    tokens contribute to the joint softmax, on any backend.
    """
    x_Th, _, stream, _ = args
    attn: Any = layer.self_attn
    # a layer in which all rows query is in stream order from the norm to W_o
    text_T = stream.layout.text_index if layer.row.whole else torch.arange(len(x_Th), device=x_Th.device)

    def mixed(*hooks: RemovableHandle) -> Tensor:
        """What W_o takes of text under these hooks, [T, w]."""
        taken: list[Tensor] = []
        watch = attn.o_proj.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
        try:
            layer.forward(*args)
        finally:
            for hook in (*hooks, watch):
                hook.remove()
        return taken[0][text_T]

    mixed_Tw = mixed(attn.v_proj.register_forward_hook(lambda module, inputs, v_Rw: v_Rw.index_fill(0, text_T, 0)))
    part_Th = attn.o_proj(mixed_Tw) - attn.o_proj(torch.zeros_like(mixed_Tw[:1]))  # without a bias
    if name := layer.family.norms.after_attention:
        share_T1 = part_Th.norm(dim=-1, keepdim=True) / attn.o_proj(mixed()).norm(dim=-1, keepdim=True)
        part_Th = getattr(layer, name)(part_Th) * share_T1
    before_Th = x_Th.double()  # most are all but 1
    return cosine_similarity(before_Th, before_Th + part_Th, dim=-1)[~stream.layout.prefix()]


# --- measuring
@torch.inference_mode()
def one_by_one(model: EEMLLM, packs: Sequence[PackedBatch], target: str, advance: Callable[[int], None]) -> list[Row]:
    """What changing each layer alone does; with the cosine, if layers are kept. The model is left as it was."""
    decoder = model.language_model.model.layers
    found = [Divergence() for _ in decoder]
    cosines: list[list[Tensor]] = [[] for _ in decoder]

    def record(layer: DecoderLayer, args: tuple[Any, ...]) -> None:
        cosines[layer.index].append(text_to_image_cosine(layer, args))

    for pack in packs:
        hooks = [layer.register_forward_pre_hook(record) for layer in decoder if kept(target)]
        try:
            dense_nv = model.packed_logits(pack)
        finally:
            for hook in hooks:
                hook.remove()
        advance(1)
        for index, divergence in enumerate(found):
            with switched(model, changed(model.mechanism, target, index, len(decoder))):
                divergence.update(dense_nv, model.packed_logits(pack))
            advance(1)
    rows = [{"layer": index, **divergence.row()} for index, divergence in enumerate(found)]
    for row, parts in zip(rows, cosines, strict=True):
        if parts:
            row["cosine"] = torch.cat(parts).mean().item()
    return rows


def ranked(rows: Sequence[Row], target: str, by: str) -> list[int]:
    """Layers in the order of conversion, least impact first; or in that in which they are kept, most first.

    Of equal ones the later layer is the less important.
    """
    values = {row["layer"]: 1 - row["cosine"] if by == "cosine" else row["kl"] for row in rows}
    least_first = sorted(values, key=lambda layer: (values[layer], -layer))
    return least_first[::-1] if kept(target) else least_first


@torch.inference_mode()
def together(
    model: EEMLLM, packs: Sequence[PackedBatch], target: str, ranking: Sequence[int], advance: Callable[[int], None]
) -> list[Row]:
    """What the target mechanism does with the first 0, 1, ... layers of the ranking. The model is left as it was."""
    base, depth = model.mechanism, len(ranking)
    found = [Divergence() for _ in range(depth + 1)]
    for pack in packs:
        dense_nv = model.packed_logits(pack)
        for count, divergence in enumerate(found):
            with switched(model, converted(base, target, ranking[:count], depth)):
                divergence.update(dense_nv, model.packed_logits(pack))
            advance(1)
    return [{"layers": count, **divergence.row()} for count, divergence in enumerate(found)]


def draw_packs(
    recipe: Recipe, encoder: SampleEncoder, samples: int, seed: int, pack_tokens: int, pack_samples: int | None
) -> tuple[list[PackedBatch], Counter[str]]:
    """Conversations with images drawn evenly from all of the data, in packs as in training; and the unusable, by reason.

    Raises:
        UserError: none is usable.
    """
    generator, seen = random.Random(seed), 0
    drawn: list[tuple[str, dict[str, bytes]]] = []
    shards = (source.folder / name for source in recipe.sources for name, _ in source.shards)
    with progress("reading", recipe.num_samples) as advance:
        for key, members in (sample for shard in shards for sample in read_shard(shard)):
            advance(1)
            if set(members) == {"json"}:
                continue
            seen += 1
            if len(drawn) < samples:
                drawn.append((key, members))
            elif (slot := generator.randrange(seen)) < samples:  # reservoir sampling: all are equally likely to stay
                drawn[slot] = key, members
    encoded: list[EncodedSample] = []
    skipped = Counter[str]()
    for key, members in drawn:
        try:
            encoded.append(encoder.load_pixels(encoder.tokenize(key, members)))
        except SampleError as error:
            skipped[error.reason] += 1
    encoded = [sample for sample in encoded if sample.pixels]  # truncation may leave none
    if not encoded:
        reasons = ", ".join(f"{reason} {n}" for reason, n in skipped.items()) or "it has no conversation with an image"
        raise UserError(f"{recipe.path}: nothing to calibrate with: {reasons}")
    plan = plan_packs([sample.tokens.length for sample in encoded], pack_tokens, pack_samples)
    return [collate([encoded[i] for i in pack]) for pack in plan], skipped


# --- what is written
def verdict(results: dict[str, Any]) -> str:
    """The choice and what it does, in words."""
    chosen, depth = results["chosen"], len(results["layers"])
    do = "keep their text-to-image part" if kept(results["target"]) else f"become {results['target']}"
    whole = results["together"][len(chosen)]
    effect = f"KL {whole['kl']:.3g} a token from the dense model, the same most likely token at {whole['same_top']:.1%}"
    return f"layers {', '.join(map(str, chosen))} ({len(chosen)} of {depth}) {do}; all together: {effect}"


def mechanism_yaml(mechanism: Mechanism, results: dict[str, Any], checkpoint: str) -> str:
    """Every field of the mechanism, so that nothing of the configuration before it shines through."""
    fields = mechanism.to_dict()
    criterion = "cosine similarity before and after text-to-image" if results["by"] == "cosine" else "KL"
    order = "most" if kept(results["target"]) else "least"
    lines = [
        f"Found by lit-eemllm calibrate: {verdict(results)}.",
        f"From {results['checkpoint']} with {results['samples']} conversations of {results['data']} "
        f"({results['tokens']} supervised tokens), seed {results['seed']}.",
        f"Greedy by the {criterion} of each layer alone, {order} impact first: {' '.join(map(str, results['ranking']))}.",
        f"Goes after the run's own: lit-eemllm validate RUN/config.yaml THIS --checkpoint {checkpoint} out=ANOTHER",
        "and, to train on from its weights: lit-eemllm fit RUN/config.yaml THIS init_from=RUN out=ANOTHER",
    ]
    header = "".join(f"# {' '.join(line.split())}\n" for line in lines)
    body = {"model": {"mechanism": {"preset": results["target"], **fields}}}
    return header + strict_yaml.dump(body, default_flow_style=None, width=10**6)


def print_impacts(results: dict[str, Any]) -> None:
    cosine = kept(results["target"])
    table = Table(title=f"layers for {results['target']}, each changed alone")
    for heading in ("layer", "KL", "same top token", *(["cosine"] if cosine else []), "rank", "chosen"):
        table.add_column(heading, no_wrap=True, justify="right")
    for row in results["layers"]:
        layer = row["layer"]
        cells = [str(layer), f"{row['kl']:.3g}", f"{row['same_top']:.3f}"]
        cells += [f"{row['cosine']:.4f}"] if cosine else []
        rank = results["ranking"].index(layer) + 1
        table.add_row(*cells, str(rank), "x" if layer in results["chosen"] else "")
    console.print(table)
    console.print(verdict(results))


def draw(results: dict[str, Any], path: Path) -> None:
    """KL of each layer alone, the cosine if there is one, and the KL of the layers together."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    layers, chosen, target = results["layers"], set(results["chosen"]), results["target"]
    keep = kept(target)
    figure, axes = plt.subplots(1, 3 if keep else 2, figsize=(15 if keep else 11, 4.2))
    colours = ["tab:blue" if row["layer"] in chosen else "lightgrey" for row in layers]
    numbers = [row["layer"] for row in layers]

    axes[0].bar(numbers, [row["kl"] for row in layers], color=colours)
    axes[0].set(title="one layer alone", xlabel="layer", ylabel="KL from the dense model (nats a token)")
    if keep:
        axes[1].bar(numbers, [1 - row["cosine"] for row in layers], color=colours)
        axes[1].set(title="text before and after its look at the image", xlabel="layer", ylabel="1 - cosine similarity")
    curve, values = axes[-1], [row["kl"] for row in results["together"]]
    curve.plot(values, color="black", marker="o", markersize=3)
    curve.plot(len(chosen), values[len(chosen)], color="tab:blue", marker="o", markersize=9)
    what = "layers that keep it, most impact first" if keep else f"layers that become {target}, least impact first"
    curve.set(title="so many layers together", xlabel=what, ylabel="KL from the dense model (nats a token)")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    done = "keep their text-to-image part" if keep else f"become {target}"
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in ("tab:blue", "lightgrey")]
    figure.legend(handles, [f"layers that {done}", "the others"], loc="upper center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    with writing(path):
        figure.savefig(path, dpi=110)
    plt.close(figure)
