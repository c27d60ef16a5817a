"""What a mechanism costs before anything is trained: FLOPs, parameters, cache and training memory, from shapes alone.

One multiply-add counts 2; attention is counted full, as the papers do. Language-model head, vision encoder, projector or
resampler, and embeddings are left out of the formulas; projectors of single layers (SAISA) are counted, since they
replace what the decoder would do. A training step is no formula but the model itself, see `lit_eemllm.trace`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from .console import console, progress, quiet_libraries
from .core.table import LayerPlan, Top, executed
from .errors import UserError
from .mechanisms import PRESETS, Mechanism, Sizes, build_mechanism

if TYPE_CHECKING:
    from .schema import Config
    from .trace import Document, Step
    from .weightless import Parts

USABLE = 0.9  # of a GPU's memory; the rest is CUDA's own, what kernels need for a moment, and gaps
GIB = 2**30


# --- formulas
def prefill_flops(
    mechanism: Mechanism,
    decoder: Any,
    text: int,
    visual: int,
    last_layer_saving: bool = True,
    vision_width: int = 0,
    prefix: int = 0,
) -> int:
    """FLOPs of the decoder layers for one prompt.

    Args:
        mechanism: how visual tokens are treated.
        decoder: the decoder's transformers config.
        text: text tokens T.
        visual: visual tokens V, of one image.
        last_layer_saving: count only keys and values of visual tokens in the last layer, as this program computes;
            False for comparison with the papers' tables.
        vision_width: of the encoder's features; needed for layerwise projectors and modules that the mechanism adds.
        prefix: text tokens whose scores over the image are not counted, since they stand before it (ViCA's accounts).
    """
    return sum(layer_flops(mechanism, decoder, text, visual, vision_width, prefix, last_layer_saving))


def layer_flops(
    mechanism: Mechanism,
    decoder: Any,
    text: int,
    visual: int,
    vision_width: int = 0,
    prefix: int = 0,
    last_layer_saving: bool = True,
) -> list[int]:
    """Of each layer, with the module before it; arguments as in `prefill_flops`."""
    layers = decoder.num_hidden_layers
    sizes, table = Sizes(decoder.hidden_size, layers, vision_width), mechanism.table(layers)
    table = executed(table) if last_layer_saving else table
    unrotated = mechanism.visual_positions == "unrotated"
    own = 2 * (vision_width * sizes.hidden + sizes.hidden**2) * visual
    return [
        row_flops(row, layer, decoder, text, visual, prefix, unrotated)
        + own * (row.source == "own")
        + mechanism.block_cost(layer, sizes, text, visual).prefill
        for layer, row in enumerate(table)
    ]


def row_flops(
    row: LayerPlan, layer: int, decoder: Any, text: int, visual: int, prefix: int = 0, unrotated: bool = False
) -> int:
    """FLOPs of a decoder layer for one prompt; arguments as in `prefill_flops`."""
    h, m = decoder.hidden_size, decoder.intermediate_size
    w, w_kv, text_row = _widths(decoder)
    here, seen = row.tokens.count(visual), row.seen.count(visual)
    total = text * text_row + 4 * (text * text + (text - prefix) * seen) * w
    if unrotated:
        total += 2 * text * (text + seen) * w  # queries and keys of twice the head size
    if isinstance(row.tokens, Top) and row.tokens.layer == layer:
        here = row.tokens.ranked(visual)
        total += 2 * (text + here) * w  # the last text token ranks what it sees
    total += here * 2 * h * w_kv * (row.keys + row.values)
    if row.queries:
        sees = text + here if row.causal else min(int(row.attend) + 1, here)
        total += here * (2 * h * w + 4 * sees * w)
    return total + here * (2 * h * w * ("output" in row.update) + 6 * h * m * ("ffn" in row.update))


def decode_flops(mechanism: Mechanism, decoder: Any, text: int, visual: int) -> int:
    """FLOPs of the decoder layers for one new token after a prompt."""
    w, _, text_row = _widths(decoder)
    sizes = Sizes(decoder.hidden_size, decoder.num_hidden_layers, 0)
    score = 6 if mechanism.visual_positions == "unrotated" else 4
    return sum(
        text_row
        + score * (text + 1 + row.kept.count(visual)) * w
        + mechanism.block_cost(layer, sizes, text, visual).decode
        for layer, row in enumerate(executed(mechanism.table(sizes.layers)))
    )


def cache_bytes(mechanism: Mechanism, decoder: Any, text: int, visual: int, itemsize: int = 2) -> int:
    """Keys and values kept of one prompt: a layer holds those that its text sees.

    Args:
        mechanism: how visual tokens are treated; text scoring unrotated keys needs both, twice the size.
        decoder: the decoder's transformers config.
        text: text tokens T.
        visual: visual tokens V, of one image.
        itemsize: bytes of a number.
    """
    _, w_kv, _ = _widths(decoder)
    sizes = Sizes(decoder.hidden_size, decoder.num_hidden_layers, 0)
    width = w_kv * (3 if mechanism.visual_positions == "unrotated" else 2)
    return itemsize * sum(
        (text + row.kept.count(visual)) * width + mechanism.block_cost(layer, sizes, text, visual).kept
        for layer, row in enumerate(executed(mechanism.table(sizes.layers)))
    )


def _widths(decoder: Any) -> tuple[int, int, int]:
    """Width of all query heads and of all key heads, and FLOPs of a row in all matrices of a layer."""
    h, heads = decoder.hidden_size, decoder.num_attention_heads
    size = getattr(decoder, "head_dim", None) or h // heads
    w, w_kv = size * heads, size * decoder.num_key_value_heads
    return w, w_kv, 2 * (2 * h * w + 2 * h * w_kv + 3 * h * decoder.intermediate_size)


# --- from a configuration to the figures of every mechanism
def estimate(
    config: Config,
    *,
    shape: str | None = None,
    text: int = 64,
    visual: int | None = None,
    targets: int | None = None,
    documents: int | None = None,
    gpus: int = 8,
    memory: float = 80.0,
    only: bool = False,
    as_json: bool = False,
) -> None:
    """Print what the mechanisms cost with a configuration's parts and training. Needs their config files, no weights.

    Args:
        config: parts, tuning, types and precision.
        shape: a name of `weightless.SHAPES`, instead of the parts of the configuration.
        text: text tokens of a document.
        visual: its visual tokens; None = as many as the encoder makes of an image, at most.
        targets: its supervised tokens; None = all its text.
        documents: in a pack, and sequences in a cache; None = as many as fill ``data.pack_tokens``.
        gpus: how many there are.
        memory: of each, in GiB.
        only: the mechanism of the configuration, without all presets beside it.
        as_json: on stdout, instead of tables.

    Raises:
        UserError: an option or a part cannot be used.
    """
    from .trace import Document, trace
    from .weightless import parts_of_config, parts_of_shape

    quiet_libraries()
    parts = parts_of_config(config.model) if shape is None else parts_of_shape(shape)
    visual = prompt_of(parts, text, visual)
    if documents is None:
        documents = min(
            config.data.pack_tokens // max(1, text + visual), config.data.pack_samples or config.data.pack_tokens
        )
        documents = max(1, documents)
    targets = text if targets is None else targets
    for name, value in (("batch", documents), ("gpus", gpus), ("memory", memory)):
        _one_or_more(name, value)
    if not 1 <= targets <= text:
        raise UserError(f"--targets {targets}: expected 1 to {text}, the text tokens of a document")

    layers = parts.decoder.num_hidden_layers
    mechanisms, configured = mechanisms_of(config, layers, only)
    document, rows = Document(text, visual, targets), {}
    with progress("mechanisms", len(mechanisms)) as advance:
        for name, mechanism in mechanisms.items():
            step = trace(config, parts, mechanism, document)
            rows[name] = _figures(config, parts.decoder, mechanism, document, step, documents, gpus, memory)
            advance(1)
    found = {
        "decoder": shape or config.model.decoder,
        "tuning": asdict(config.optim.tuning),
        "precision": str(config.trainer.get("precision") or "32-true"),
        "frozen_dtype": config.model.quantization or config.model.dtype,
        "activation_checkpointing": config.optim.activation_checkpointing,
        **asdict(document),
        "documents": documents,
        "accumulate": _accumulate(config),
        "gpus": gpus,
        "memory_gib": memory,
        "configured": configured,
        "llava_prefill_published": prefill_flops(
            PRESETS["llava"], parts.decoder, text, visual, last_layer_saving=False
        ),
        "computes_llava": [name for name, m in mechanisms.items() if name != "llava" and m.is_llava(layers)],
        "mechanisms": rows,
    }
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def prompt_of(parts: Parts, text: int, visual: int | None) -> int:
    """Visual tokens of a document: as many as asked for, or as the encoder makes of an image, at most. Raises UserError."""
    if visual is None:
        from .resolutions import transform_from_dict

        transform = transform_from_dict(parts.vision["transform"])
        visual = transform.num_tokens(*transform.largest)
    _one_or_more("text", text)
    _one_or_more("visual", visual)
    return visual


def _one_or_more(name: str, value: float) -> None:
    if not 1 <= value < float("inf"):
        raise UserError(f"--{name} {value:g}: expected 1 or more")


def mechanisms_of(config: Config, layers: int, only: bool) -> tuple[dict[str, Mechanism], str]:
    """By name, and the name of the configured one: its preset's, if nothing of it is changed."""
    overrides = asdict(config.model.mechanism)
    preset = overrides.pop("preset")
    own = build_mechanism(preset, layers, overrides)
    name = preset if own == build_mechanism(preset, layers) else f"{preset}, changed"
    presets = {} if only else {each: build_mechanism(each, layers) for each in PRESETS}
    return {**presets, name: own}, name


def _accumulate(config: Config) -> int:
    return config.trainer.get("accumulate_grad_batches", 1)


def _itemsize(config: Config) -> int:
    """Bytes of a number where the decoder computes."""
    from .training.module import compute_dtype

    narrow = config.optim.tuning.llm != "full" and config.model.dtype == "bfloat16"
    return 2 if narrow or compute_dtype(config) is not None else 4


def _figures(
    config: Config,
    decoder: Any,
    mechanism: Mechanism,
    document: Document,
    step: Step,
    documents: int,
    gpus: int,
    memory: float,
) -> dict[str, Any]:
    """A mechanism's part of what was found."""
    prompt = (mechanism, decoder, document.text, document.visual)
    packs, itemsize = _accumulate(config), _itemsize(config)
    fits: dict[str, Any] = {}
    for way in ("ddp", "fsdp")[: 2 if gpus > 1 else 1]:
        for name, checkpointing in ((way, False), (f"{way}_recomputing", True)):
            options: dict[str, Any] = {
                "gpus": gpus,
                "sharded": way == "fsdp",
                "checkpointing": checkpointing,
                "accumulate": packs,
            }
            fits[name] = {
                "bytes": step.most_bytes(documents, **options),
                "most_documents": step.most_documents(USABLE * memory * GIB, **options),
            }
    return {
        "mechanism": mechanism.to_dict(),
        "parameters": step.parameters,
        "trained": step.trained,
        "flops": {
            "prefill": prefill_flops(*prompt, vision_width=step.vision_width),
            "prefill_published": prefill_flops(*prompt, last_layer_saving=False, vision_width=step.vision_width),
            "decode": decode_flops(*prompt),
            "encoder": step.encoder_flops,
            "connector": step.connector_flops,
            "head": step.head_flops,
            "training_forward": documents * packs * step.forward_flops,
            "training_backward": documents * packs * step.backward_flops,
            "training_recomputed": documents * packs * step.decoder_flops,
        },
        "cache_bytes": documents * cache_bytes(*prompt, itemsize=itemsize),
        "training_bytes": {
            "weights": step.weights,
            "gradients": step.gradients,
            "optimiser": step.optimiser,
            "copies": step.copies,
            "activations": documents * step.activations,
            "activations_recomputed": documents * (step.kept + step.largest),
            "logits": documents * step.logits,
        },
        "fits": fits,
    }


# --- for people
def show(found: dict[str, Any]) -> None:
    """Three tables, each with what its columns mean below it."""
    rows, documents, packs = found["mechanisms"], found["documents"], found["accumulate"]
    trained = [f"{part} ({choice})" for part, choice in found["tuning"].items() if choice != "frozen"]
    console.print(
        f"{found['decoder']}, configured mechanism {found['configured']}\n"
        f"a document: {found['visual']:,} visual and {found['text']:,} text tokens, {found['targets']:,} of them supervised\n"
        f"a pack: {documents:,} documents; a step: {packs:,} packs on each of {found['gpus']:,} GPUs\n"
        f"trained: {', '.join(trained)}; precision {found['precision']}, frozen weights {found['frozen_dtype']}, "
        f"{'' if found['activation_checkpointing'] else 'no '}activation checkpointing\n"
    )

    table = _table("inference", "parameters, prefill FLOPs, published, of llava, decode FLOPs, outside FLOPs, KV cache")
    for name, row in rows.items():
        flops = row["flops"]
        table.add_row(
            name,
            si(row["parameters"]),
            si(flops["prefill"]),
            si(flops["prefill_published"]),
            f"{flops['prefill_published'] / found['llava_prefill_published']:.1%}",
            si(flops["decode"]),
            si(flops["encoder"] + flops["connector"]),
            _bytes(row["cache_bytes"]),
        )
    console.print(table)
    console.print(
        "Prefill and decode: the decoder's layers, for a document and for a new token after it. Published: as papers count, "
        "who update visual tokens in the last layer too, where nothing reads them. Outside: encoder, and projector or "
        f"resampler. KV cache: of {documents:,} such prompts."
    )
    if found["computes_llava"]:
        console.print(
            f"With so few layers they compute what llava does, bit for bit: {', '.join(found['computes_llava'])}."
        )
    console.print()

    headings = "trained, FLOPs, weights, gradients, AdamW, copies, activations, recomputing, logits"
    table = _table("a training step on one GPU", headings)
    for name, row in rows.items():
        flops, has = row["flops"], row["training_bytes"]
        table.add_row(
            name,
            si(row["trained"]),
            si(flops["training_forward"] + flops["training_backward"]),
            *(_bytes(size) for size in has.values()),
        )
    console.print(table)
    console.print(
        "FLOPs: forward, and backward F for each factor of a product of F that needs a gradient. Copies: float32 weights "
        "in 16 bits, made by autocast. Activations: as layers save them; recomputing: if a layer saves only its input, "
        "for the decoder's forward FLOPs once more. Attention that saves its scores (reference) needs more.\n"
    )

    headings = "DDP, documents, recomputing, documents, FSDP, documents, recomputing, documents"
    if found["gpus"] == 1:
        headings = "memory, documents, recomputing, documents"
    table = _table(f"what fits on {found['gpus']:,} x {found['memory_gib']:g} GiB, {USABLE:.0%} of it used", headings)
    for name, row in rows.items():
        cells = [(_bytes(has["bytes"]), f"{has['most_documents']:,}") for has in row["fits"].values()]
        table.add_row(name, *(cell for pair in cells for cell in pair))
    console.print(table)
    console.print(
        f"Most memory on a GPU at any time of a step with {documents:,} documents in a pack, and the most documents that fit."
    )


def _table(title: str, headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for heading in headings.split(", "):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def si(value: float) -> str:
    """With a unit's prefix, four digits."""
    power = sum(value >= 1000**n for n in range(1, 6))
    return f"{value / 1000**power:.4g} {['', 'k', 'M', 'G', 'T', 'P'][power]}".rstrip()


def _bytes(value: float) -> str:
    return f"{value / GIB:.2f} GiB" if value >= 0.1 * GIB else f"{value / 2**20:.2f} MiB"
