"""`estimate`: what every mechanism costs with a configuration's parts, before anything is trained; tables of it, or JSON.

FLOPs of a prompt and the cache are formulas (`formulas`); a training step is the model itself, without data (`trace`).
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from ..console import console, progress, quiet_libraries
from ..core.table import by_encoder
from ..errors import UserError
from ..mechanisms import PRESETS, Mechanism, build_mechanism, configured_mechanism
from ..mechanisms.schedule import Entry, Schedule
from .formulas import cache_bytes, decode_flops, prefill_flops

if TYPE_CHECKING:
    from ..config.keys import Config
    from .trace import Document, Step
    from .weightless import Parts

USABLE = 0.9  # of a GPU's memory; the rest is CUDA's own, what kernels need for a moment, and gaps
GIB = 2**30


# --- from a configuration to the figures of every mechanism
def estimate(
    config: Config,
    *,
    shape: str | None = None,
    text: int = 64,
    visual: int | None = None,
    image: tuple[int, int] | None = None,
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
        shape: what `weightless.parts_of_shape` takes, instead of the parts of the configuration.
        text: text tokens of a document.
        visual: its visual tokens; None = as many as the encoder makes of an image, at most.
        image: width and height of its image, in place of `visual`.
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
    from .weightless import parts_of

    quiet_libraries()
    parts = parts_of(config, shape)
    visual = prompt_of(parts, text, visual, image)
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
    llava = build_mechanism("llava", layers)
    mechanisms, configured = mechanisms_of(config, layers, only, parts)
    schedule = Schedule.of(config, mechanisms[configured], parts.decoder)
    document, rows = Document(text, visual, targets, image), {}

    def figures(entry: Entry) -> dict[str, Any]:
        step = trace(config, parts, entry.mechanism, document, entry.teacher)
        return _figures(config, parts, entry.mechanism, document, step, documents, gpus, memory)

    with progress("mechanisms", len(mechanisms)) as advance:
        for name, mechanism in mechanisms.items():
            rows[name] = figures(Entry(mechanism))
            if name == configured and config.optim.mechanisms is not None:
                shares = zip(schedule.entries, schedule.shares(config.optim.max_steps), strict=True)
                rows[name] = _scheduled(rows[name], [(share, figures(entry)) for entry, share in shares if share])
            advance(1)
    found = {
        "decoder": shape or config.model.decoder,
        "connector": parts.connector.to_dict(),
        "tuning": asdict(config.optim.tuning),
        "precision": str(config.trainer.get("precision") or "32-true"),
        "frozen_dtype": config.model.quantization or config.model.dtype,
        "activation_checkpointing": config.optim.activation_checkpointing,
        "activation_offload": config.optim.activation_offload,
        **asdict(document),
        "documents": documents,
        "accumulate": _accumulate(config),
        "gpus": gpus,
        "memory_gib": memory,
        "configured": configured,
        "schedule": schedule.lines(config.optim.max_steps),
        "llava_prefill_published": prefill_flops(
            PRESETS["llava"], parts.decoder, text, visual, last_layer_saving=False
        ),
        "computes_llava": [name for name, m in mechanisms.items() if m != llava and m.is_llava(layers)],
        "mechanisms": rows,
    }
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def prompt_of(parts: Parts, text: int, visual: int | None, image: tuple[int, int] | None) -> int:
    """Visual tokens of a document: as many as asked for, or as the encoder makes of this image, or of one at most. Raises UserError."""
    if image is not None and visual is not None:
        raise UserError(f"--image and --visual {visual}: give one of them, the image's size or its tokens")
    if image is not None:
        visual = parts.transform.num_tokens(*image)
    elif visual is None:
        visual = parts.transform.num_tokens(*parts.transform.largest)
    _one_or_more("text", text)
    _one_or_more("visual", visual)
    return visual


def _one_or_more(name: str, value: float) -> None:
    if not 1 <= value < float("inf"):
        raise UserError(f"--{name} {value:g}: expected 1 or more")


def mechanisms_of(config: Config, layers: int, only: bool, parts: Parts) -> tuple[dict[str, Mechanism], str]:
    """By name, and the name of the configured one: its preset's, if nothing of it is changed. Without presets that refuse the connector
    or the encoder."""
    preset = config.model.mechanism.preset
    own = configured_mechanism(config.model.mechanism, layers)
    name = preset if own == build_mechanism(preset, layers) else f"{preset}, changed"
    name += "" if config.optim.mechanisms is None else ", scheduled"
    presets = {} if only else {each: build_mechanism(each, layers) for each in PRESETS}
    fits = {
        each: made
        for each, made in presets.items()
        if not made.refuses(parts.connector)
        and not (by_encoder(made.table(layers)) and parts.ranking_problem)
        and (not made.encoder_depths or parts.reads_depths)
    }
    return {**fits, name: own}, name


def _accumulate(config: Config) -> int:
    return config.trainer.get("accumulate_grad_batches", 1)


def _itemsize(config: Config) -> int:
    """Bytes of a number where the decoder computes."""
    from ..training.module import compute_dtype

    narrow = config.optim.tuning.llm != "full" and config.model.dtype == "bfloat16"
    return 2 if narrow or compute_dtype(config) is not None else 4


def _figures(
    config: Config,
    parts: Parts,
    mechanism: Mechanism,
    document: Document,
    step: Step,
    documents: int,
    gpus: int,
    memory: float,
) -> dict[str, Any]:
    """A mechanism's part of what was found."""
    prompt = (mechanism, parts.decoder, document.text, document.visual)
    connected: dict[str, Any] = {"vision_width": step.vision_width, "connector": parts.connector, "view": parts.view}
    packs, itemsize = _accumulate(config), _itemsize(config)
    fits: dict[str, Any] = {}
    for way in ("ddp", "fsdp")[: 2 if gpus > 1 and config.optim.states == "float32" else 1]:
        for name, checkpointing in ((way, False), (f"{way}_recomputing", True)):
            options: dict[str, Any] = {
                "gpus": gpus,
                "sharded": way == "fsdp",
                "checkpointing": checkpointing,
                "offload": checkpointing and config.optim.activation_offload,
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
            "prefill": prefill_flops(*prompt, **connected),
            "prefill_published": prefill_flops(*prompt, last_layer_saving=False, **connected),
            "decode": decode_flops(*prompt),
            "encoder": step.encoder_flops,
            "connector": step.connector_flops,
            "head": step.head_flops,
            "training_forward": documents * packs * (step.forward_flops + step.teacher_flops),
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
            "activations_recomputed": documents
            * (step.kept + step.largest - config.optim.activation_offload * step.inputs),
            "logits": step.at_loss(documents),
        },
        "fits": fits,
    }


def _scheduled(own: dict[str, Any], entries: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """The figures of a mechanism that is trained by a schedule, of which `entries` are shares and figures: FLOPs of a step as expected,
    memory of the step that takes most."""
    found = copy.deepcopy(own)
    for name in (name for name in own["flops"] if name.startswith("training_")):
        found["flops"][name] = sum(share * each["flops"][name] for share, each in entries)
    for name in own["training_bytes"]:
        found["training_bytes"][name] = max(each["training_bytes"][name] for _, each in entries)
    for way in own["fits"]:
        fits = [each["fits"][way] for _, each in entries]
        found["fits"][way] = {
            "bytes": max(each["bytes"] for each in fits),
            "most_documents": min(each["most_documents"] for each in fits),
        }
    return found


# --- for people
def show(found: dict[str, Any]) -> None:
    """Three tables, each with what its columns mean below it."""
    rows, documents, packs = found["mechanisms"], found["documents"], found["accumulate"]
    trained = [f"{part} ({choice})" for part, choice in found["tuning"].items() if choice != "frozen"]
    console.print(
        f"{found['decoder']}, configured mechanism {found['configured']}, connector {found['connector']['name']}\n"
        f"a document: {found['visual']:,} visual and {found['text']:,} text tokens, {found['targets']:,} of them supervised\n"
        f"a pack: {documents:,} documents; a step: {packs:,} packs on each of {found['gpus']:,} GPUs\n"
        f"trained: {', '.join(trained)}; precision {found['precision']}, frozen weights {found['frozen_dtype']}, "
        f"{'' if found['activation_checkpointing'] else 'no '}activation checkpointing"
        f"{', inputs of layers in main memory' * found['activation_offload']}\n"
    )
    if found["schedule"]:
        text = "\n  ".join(["trained by a schedule:", *found["schedule"]])
        text += "\nso FLOPs of a training step are what is expected of one, and memory is that of the step that takes most\n"
        console.print(text, markup=False, highlight=False)

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
        "who update visual tokens in the last layer too, where nothing reads them; of llava: of its published. Outside: encoder, and connector or "
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

    ways = ("memory",) if found["gpus"] == 1 else ("DDP", "FSDP")
    many = len(next(iter(rows.values()))["fits"]) // 2  # FSDP cannot have moments in 8 bits
    headings = ", ".join(f"{way}, documents, recomputing, documents" for way in ways[:many])
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
