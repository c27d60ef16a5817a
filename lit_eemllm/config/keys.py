"""The keys of a configuration: a dataclass each section, with what a key means, and the checks of their values."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from lit_eemllm.errors import ConfigError, did_you_mean, not_one_of


@dataclass
class VisionConfig:
    encoder: str = "transformers"
    """Vision encoder: "transformers" (vision tower of CLIP, SigLIP, SigLIP 2, Idefics2) or a name that your file registers."""
    path: str | None = None
    """Folder or hub id of the pretrained encoder; required by "transformers"."""
    select_layer: int | None = -2
    """Hidden states that the projector reads, without class token: 0 the embeddings, -1 the last layer, -2 as LLaVA; null = what the
    encoder itself gives, after its last norm if it has one, as Idefics2."""
    policy: str = "pad"
    """Image to pixels: "pad" to a square, "resize" (new aspect), "crop", "anyres" (tiles) or, for encoders of any size, "native"."""
    max_tokens: int | None = None
    """With policy native, most visual tokens of an image; null = as the encoder's preprocessor_config.json says."""


@dataclass
class AlignerConfig:
    value: bool | None = None
    """Visual states pass the layer's value projection; null = as the preset says."""
    output: bool | None = None
    """Visual states pass the layer's output projection; null = as the preset says."""
    ffn: bool | None = None
    """Visual states pass the layer's feed-forward network; null = as the preset says."""


@dataclass
class GatedConfig:
    every: int | None = None
    """Blocks of gated cross-attention stand before every so-many-th decoder layer, from the first."""
    latents: int | None = None
    """Tokens per image after the perceiver resampler; 0 = the projected visual tokens as they are."""
    heads: int | None = None
    """Heads of the cross-attention and of the resampler."""
    head_size: int | None = None
    """Size of such a head."""
    depth: int | None = None
    """Layers of the resampler."""
    immediate: bool | None = None
    """Text sees only the last image before it; false = all images before it."""


@dataclass
class MechanismConfig:
    preset: str = "ee_mllm"
    """How visual tokens are treated: llava, ee_mllm, ee_mllm_f, naavit, shortv, saisa, vica, flamingo or one of your own; fills the
    nulls below."""
    dense_layers: Any = None
    """Layers in which visual tokens also query: "all", "none" or a list of layer numbers."""
    cross_layers: Any = None
    """Layers in which text sees the image: "all", "none" or a list of layer numbers."""
    visual_source: str | None = None
    """Visual states of a layer come from the layer before ("stream") or from a projector of its own ("layerwise")."""
    aligner: AlignerConfig = field(default_factory=AlignerConfig)
    """Which weights of a composite layer update the visual stream (ablation of the EE-MLLM paper, Table 6)."""
    visual_window: int | None = None
    """In composite layers, so many earlier visual tokens of its image that a visual token sees; 0 = only itself."""
    visual_positions: str | None = None
    """Rotary positions of an image: "sequence" (one a token), "shared" (one in all), "unrotated" (text ignores them), "none"."""
    freeze_prefix: bool | None = None
    """Text before the first image takes no attention, only the feed-forward network (ViCA's code for 7B)."""
    visual_drop: list[Any] | None = None
    """Pairs [layer, share]: from that layer on, that share of an image's tokens is dropped, when generating."""
    gated: GatedConfig = field(default_factory=GatedConfig)
    """Gated cross-attention; only with preset "flamingo"."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of a mechanism of your own (--import FILE), by name."""
    rows: list[Any] | None = None
    """Columns of the table that the mechanism makes (lit-eemllm explain), over all above, such as [{layers: 8-15, seen: every 2}]."""


@dataclass
class ModelConfig:
    decoder: str = MISSING
    """Folder or hub id of the pretrained causal LM, in the format of transformers; its weights are loaded unchanged."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; null = the decoder's own."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    mechanism: MechanismConfig = field(default_factory=MechanismConfig)
    attention: str = "auto"
    """Attention backend, or "auto": the fastest one that a trial on the device proves to work."""
    template: str = "vicuna_v1"
    """How a conversation becomes text: "plain" (captions), "vicuna_v1" or "jinja" (the tokenizer's own template)."""
    dtype: str = "float32"
    """Type of the parameters that are not trained: "float32" or "bfloat16". Trained ones are always float32."""
    quantization: str | None = None
    """Keep the decoder's frozen linear layers in 4 bits, "nf4", or 8, "int8" (QLoRA; needs bitsandbytes); null = no."""
    liger: bool = False
    """Fused norms, feed-forward networks and loss of liger-kernel in the decoder; needs a CUDA device."""


@dataclass
class DataConfig:
    train: str = MISSING
    """Training data: a recipe (YAML) or a folder of prepared shards."""
    val: str | None = None
    """Validation data, same forms; null = no validation."""
    pack_tokens: int = 4096
    """Token budget of one pack, visual tokens counted."""
    pack_samples: int | None = None
    """Most conversations in one pack; null = as many as fit."""
    max_length: int = 2048
    """Most tokens of one conversation, visual tokens counted."""
    truncation: str = "drop"
    """A longer conversation: "drop", "truncate" (never an image, never the whole answer) or stop with an "error"."""
    workers: int = 2
    """Loader processes per device; 0 = load in the training process."""
    shuffle_buffer: int = 1000
    """Samples held per worker to shuffle from; 0 = no shuffling between neighbours."""
    packing_buffer: int = 256
    """Conversations held per worker to choose packs from: more = fuller packs, more memory."""
    max_image_pixels: int = 50_000_000
    """Images of more pixels are refused before they are decoded."""
    max_bad_in_a_row: int = 100
    """Consecutive unusable samples that stop the run."""
    timeout: float = 300.0
    """Seconds to wait for a batch before the run stops instead of hanging; the first takes longest, as buffers fill."""


@dataclass
class TuningConfig:
    vision: str = "frozen"
    """Vision encoder: "frozen", "full" or "lora"."""
    projector: str = "full"
    """Projector, and modules that a mechanism adds: "frozen", "full" or "lora"."""
    llm: str = "frozen"
    """Decoder: "frozen", "full" or "lora"."""


@dataclass
class LoraConfig:
    r: int = 128
    """Rank of the adapters of components with tuning "lora"; this and the next two are LLaVA's."""
    alpha: float = 256
    """Their updates are scaled by alpha / r."""
    dropout: float = 0.05
    """Share of an adapter's inputs dropped in training."""
    targets: list[str] | None = None
    """Last names of the linear layers that are adapted, such as [q_proj, v_proj]; null = all in repeated blocks."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead."""
    dora: bool = False
    """Learn the magnitude of the weights apart from their direction (DoRA)."""


@dataclass
class OptimConfig:
    tuning: TuningConfig = field(default_factory=TuningConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    lr: float = MISSING
    """Peak learning rate of AdamW."""
    projector_lr: float | None = None
    """Peak learning rate of the projector; null = lr."""
    vision_lr: float | None = None
    """Peak learning rate of the vision encoder; null = lr."""
    vision_layer_decay: float | None = None
    """Each layer of the vision encoder learns at this share of the rate of the layer above it; null = all at one rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's term added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases and norms are never decayed."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping its activations: less memory, more time."""
    warmup_ratio: float = 0.03
    """Share of all steps in which the learning rate rises linearly to its peak."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: "cosine" or "linear" to 0, or "constant"."""
    max_steps: int | None = None
    """Optimiser steps of the whole run; the schedule's length. Either this or epochs: of the two, what is given later, as by a later
    file or on the command line, replaces the other."""
    epochs: float | None = None
    """Passes over data.train instead, such as 2 or 0.5: the steps that take so many times all its usable samples, packed, counted
    when the run begins. In a blend by whole repetitions a pass has each source so often; by weights, as many samples as all have."""
    clip_grad_norm: float | None = 1.0
    """Largest norm of all gradients together; null = no clipping."""
    save_every: int = 500
    """Optimiser steps between checkpoints."""
    val_every: int = 500
    """Optimiser steps between validations; there is one after the last step too."""
    val_batches: int = 20
    """Packs per validation and device."""
    log_every: int = 10
    """Optimiser steps between log lines; less in a short run, so that it has ten."""
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted."""

    @property
    def steps(self) -> int:
        """Of the whole run. Epochs have become steps before anything asks (`training.fit`)."""
        assert self.max_steps is not None
        return self.max_steps


@dataclass
class EvalConfig:
    data: str | None = None
    """Questions: a recipe or a folder of shards (split val), or LLaVA-style rows (.json, .jsonl); null = data.val."""
    images: str | None = None
    """Folder of the images of such rows; null = the rows' own folder."""
    suite: str | None = None
    """Several sets of questions in one file (YAML), in place of eval.data."""
    metric: str | None = None
    """Score, such as multiple_choice, vqa or anls; null = what a row asks for, else exact_match. A suite may say another."""
    batch_size: int = 32
    """Questions generated together."""
    max_new_tokens: int = 32
    """Most tokens generated per answer."""
    samples: int | None = None
    """Questions of each set, spread over it; null = all, 0 = none, only the loss."""
    image_cache: float = 1.0
    """GiB for keys and values of images that come again, where the mechanism lets them be reused; 0 = none."""
    control: int = 1
    """Passes with the images shuffled among the questions: what a model scores that does not look. 0 = none."""


@dataclass
class Config:
    seed: int = 0
    """Seeds every random generator before any module is built."""
    out: str = "runs/default"
    """Run directory: checkpoints, logs and the resolved configuration."""
    resume: str = "auto"
    """"auto" continues a run found in `out`, "never" starts anew, anything else is the path of a checkpoint."""
    init_from: str | None = None
    """Weights to start from (no optimiser state): a folder written by save_pretrained, such as an earlier stage's."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    """Arguments of lightning.Trainer, such as accelerator, devices, precision; strategy is auto, ddp, fsdp2 or fsdp2_offload."""
    eval: EvalConfig = field(default_factory=EvalConfig)


Mistake = tuple[tuple[str, ...], str]
"""The dotted keys that are at odds, the one to change first, and what is wrong with them."""

_NULLABLE = ("model.mechanism.visual_source", "model.mechanism.visual_positions", "model.quantization")
_WORDS = {
    "model.mechanism.visual_source": ("stream", "layerwise"),
    "model.mechanism.visual_positions": ("sequence", "shared", "unrotated", "none"),
    "model.vision.policy": ("pad", "resize", "crop", "anyres", "native"),
    "model.dtype": ("float32", "bfloat16"),
    "model.quantization": ("nf4", "int8"),
    "data.truncation": ("drop", "truncate", "error"),
    "optim.tuning.vision": ("frozen", "full", "lora"),
    "optim.tuning.projector": ("frozen", "full", "lora"),
    "optim.tuning.llm": ("frozen", "full", "lora"),
    "optim.schedule": ("cosine", "linear", "constant"),
}
# Comparisons are written so that NaN fails them. A null value is not compared.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("0 to 4294967295", lambda v: 0 <= v < 2**32, "seed"),
    (
        "0 or more",
        lambda v: v >= 0,
        "data.workers data.shuffle_buffer eval.control eval.samples eval.image_cache model.mechanism.visual_window "
        "model.mechanism.gated.latents",
    ),
    ("0 or more", lambda v: 0 <= v < math.inf, "optim.weight_decay"),
    ("0 to 1", lambda v: 0 <= v <= 1, "optim.warmup_ratio"),
    ("more than 0, to 1", lambda v: 0 < v <= 1, "optim.vision_layer_decay"),
    ("0 to below 1", lambda v: 0 <= v < 1, "optim.lora.dropout"),
    (
        "more than 0",
        lambda v: 0 < v < math.inf,
        "optim.epochs optim.lr optim.projector_lr optim.vision_lr optim.eps optim.clip_grad_norm optim.lora.alpha data.timeout",
    ),
    ("two numbers from 0 to below 1", lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v), "optim.betas"),
    (
        "1 or more",
        lambda v: v >= 1,
        "data.pack_tokens data.pack_samples data.max_length data.packing_buffer data.max_image_pixels "
        "data.max_bad_in_a_row optim.max_steps optim.save_every optim.val_every optim.val_batches optim.log_every "
        "optim.keep optim.lora.r eval.batch_size eval.max_new_tokens model.mechanism.gated.every model.mechanism.gated.heads "
        "model.mechanism.gated.head_size model.mechanism.gated.depth model.vision.max_tokens",
    ),
    ("text that is not empty", lambda v: bool(v.strip()), "out resume model.decoder data.train"),
)
_PRECISIONS = (None, 32, "32", "32-true", "bf16-mixed", "16-mixed")
FOR_TRAINER = (
    "accelerator", "strategy", "devices", "num_nodes", "precision", "accumulate_grad_batches", "num_sanity_val_steps",
    "deterministic", "benchmark", "inference_mode", "detect_anomaly", "profiler",
)  # fmt: skip
"""Arguments of lightning.Trainer that a configuration may set. Every other has its reason below."""
_STEPS = "set optim.max_steps"
_EPOCHS = "set optim.epochs"
_EVALUATION = "`fit` neither tests nor predicts; lit-eemllm validate has eval.samples"
_OWN = "lit_eemllm has its own"
NOT_FOR_TRAINER = {
    "max_steps": _STEPS,
    "max_epochs": _EPOCHS,
    "min_epochs": _EPOCHS,
    "min_steps": _STEPS,
    "limit_train_batches": f"{_STEPS}, which counts optimiser steps",
    "fast_dev_run": f"{_STEPS}=2; lit-eemllm shrink makes a whole configuration small",
    "max_time": "it would cut a step; `timeout -s TERM 8h lit-eemllm fit ...` ends the run after a step, saved",
    "overfit_batches": "make shards of a few rows, and set data.shuffle_buffer=0",
    "gradient_clip_val": "set optim.clip_grad_norm",
    "gradient_clip_algorithm": "gradients are clipped by norm, see optim.clip_grad_norm",
    "val_check_interval": "set optim.val_every",
    "check_val_every_n_epoch": "set optim.val_every",
    "limit_val_batches": "set optim.val_batches, or data.val=null for no validation",
    "limit_test_batches": _EVALUATION,
    "limit_predict_batches": _EVALUATION,
    "log_every_n_steps": "set optim.log_every",
    "logger": f"{_OWN}: CSV and TensorBoard files in `out`/logs",
    "enable_checkpointing": "set optim.save_every",
    "enable_progress_bar": f"{_OWN}, on a terminal only",
    "enable_model_summary": f"{_OWN}, at the start",
    "enable_autolog_hparams": "config.yaml and hparams.yaml hold the whole configuration",
    "barebones": "it would leave out logs and checkpoints",
    "use_distributed_sampler": "Megatron-Energon shares the data out over ranks",
    "reload_dataloaders_every_n_epochs": "there is one endless stream of batches, without epochs",
    "sync_batchnorm": "batch norms of a trained encoder take each device's own statistics; set optim.tuning.vision=frozen",
    "default_root_dir": "set out",
    "callbacks": "a configuration cannot name objects",
    "plugins": "a configuration cannot name objects",
    "model_registry": "set optim.save_every",
}
"""Argument of lightning.Trainer -> why it cannot be set here, and what can be set instead."""


def check(config: Config) -> list[Mistake]:
    """Values that have the right type but are out of range or contradict each other. Imports nothing, opens no file."""
    mistakes: list[Mistake] = []

    def value(key: str) -> Any:
        return reduce(getattr, key.split("."), config)

    for key, words in _WORDS.items():
        if value(key) not in words and not (value(key) is None and key in _NULLABLE):
            mistakes.append(((key,), not_one_of(value(key), words)))
    for expected, holds, keys in _RANGES:
        for key in keys.split():
            if value(key) is not None and not holds(value(key)):
                mistakes.append(((key,), f"found {value(key)!r}, expected {expected}"))

    for key in ("model.mechanism.dense_layers", "model.mechanism.cross_layers"):
        layers = value(key)
        numbers = isinstance(layers, list) and all(type(n) is int and n >= 0 for n in layers)
        if layers not in (None, "all", "none") and not (numbers and len(set(layers)) == len(layers)):
            expected = "all, none, null or a list of distinct layer numbers such as [0, 1]"
            mistakes.append(((key,), f"found {layers!r}, expected {expected}"))
    for pair in config.model.mechanism.visual_drop or []:
        numbers = (
            isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and isinstance(pair[1], int | float)
        )
        if not (numbers and pair[0] >= 0 and 0 < pair[1] < 1):
            expected = "pairs of a layer number and a share between 0 and 1, such as [[7, 0.25]]"
            mistakes.append((("model.mechanism.visual_drop",), f"found {pair!r}, expected {expected}"))
    if config.model.vision.encoder == "transformers" and not config.model.vision.path:
        mistakes.append(
            (("model.vision.path", "model.vision.encoder"), "required by model.vision.encoder=transformers")
        )
    if config.data.max_length > config.data.pack_tokens:
        text = f"{config.data.max_length} tokens do not fit in a pack of data.pack_tokens={config.data.pack_tokens}"
        mistakes.append((("data.max_length", "data.pack_tokens"), text))
    if config.optim.max_steps is None and config.optim.epochs is None:
        text = "required, but not set; add it to a file or write optim.max_steps=VALUE or optim.epochs=VALUE"
        mistakes.append((("optim.max_steps", "optim.epochs"), text))
    elif config.optim.max_steps is not None and config.optim.epochs is not None:
        text = (
            f"given beside optim.max_steps={config.optim.max_steps}, which says how long as well: remove one of the two"
        )
        mistakes.append((("optim.epochs", "optim.max_steps"), text))
    tuning = asdict(config.optim.tuning)
    if all(word == "frozen" for word in tuning.values()):
        text = "vision, projector and llm are all frozen: nothing is left to train"
        mistakes.append((("optim.tuning", *(f"optim.tuning.{part}" for part in tuning)), text))
    if config.model.quantization is not None and (tuning["llm"] == "full" or config.optim.lora.dora):
        text = "quantised layers cannot be trained: set optim.tuning.llm to lora or frozen, without optim.lora.dora"
        mistakes.append((("model.quantization", "optim.tuning.llm", "optim.lora.dora"), text))
    if config.model.vision.max_tokens is not None and config.model.vision.policy != "native":
        text = (
            f"has no effect with policy {config.model.vision.policy}: set model.vision.policy=native or max_tokens=null"
        )
        mistakes.append((("model.vision.max_tokens", "model.vision.policy"), text))
    for key in ("optim.projector_lr", "optim.vision_lr", "optim.vision_layer_decay"):
        part = "projector" if "projector" in key else "vision"
        if tuning[part] == "frozen" and value(key) is not None:
            text = f"has no effect: optim.tuning.{part} is frozen; set {key}=null or optim.tuning.{part}=full"
            mistakes.append(((key, f"optim.tuning.{part}"), text))
    if config.eval.suite is not None and (config.eval.data, config.eval.images) != (None, None):
        text = "a suite names its own data and images: set eval.data=null eval.images=null"
        mistakes.append((("eval.suite", "eval.data", "eval.images"), text))
    elif config.eval.images is not None and config.eval.data is None:
        mistakes.append((("eval.images", "eval.data"), "belongs to the rows of eval.data, which is not set"))
    precision = config.trainer.get("precision")
    if precision not in _PRECISIONS:
        text = f"found {precision!r}, expected {', '.join(map(str, _PRECISIONS[1:]))}: trained weights are float32"
        mistakes.append((("trainer.precision",), text))
    for name in config.trainer:
        if name in NOT_FOR_TRAINER:
            mistakes.append(((f"trainer.{name}",), f"cannot be set here: {NOT_FOR_TRAINER[name]}"))
    return mistakes


def check_names(config: Config) -> Iterator[Mistake]:
    """Names that only a registry or a library knows. A hook for `load_config`; imports the registries, and so torch."""
    from lightning import Trainer

    from lit_eemllm.attention import registered_backends
    from lit_eemllm.evaluation.metrics import METRICS
    from lit_eemllm.inputs.chat import TEMPLATES
    from lit_eemllm.mechanisms import PRESETS
    from lit_eemllm.mechanisms.base import rows_of
    from lit_eemllm.model.vision import get_vision_encoder
    from lit_eemllm.plugins import made_with

    try:
        rows_of(config.model.mechanism.rows or [])
    except ConfigError as error:
        yield ("model.mechanism.rows",), str(error).removeprefix("model.mechanism.rows: ")
    for key, found, known in (
        ("model.mechanism.preset", config.model.mechanism.preset, PRESETS),
        ("model.attention", config.model.attention, ["auto", *registered_backends()]),
        ("model.template", config.model.template, TEMPLATES),
        ("eval.metric", config.eval.metric, [None, *METRICS]),
    ):
        if found not in known:
            wrong, made = not_one_of(found, sorted(filter(None, known))), made_with(Path(config.out))
            own = key in ("model.attention", "eval.metric")
            own |= key == "model.mechanism.preset" and ("did you mean" not in wrong or bool(made))
            yield (key,), wrong + (f"; one of your own needs --import FILE{made}" if own else "")
    preset = PRESETS.get(config.model.mechanism.preset)
    key = f"optim.tuning.{preset.component}" if preset is not None else ""
    if preset is not None and preset.no_adapters and getattr(config.optim.tuning, preset.component) == "lora":
        yield (key, "model.mechanism.preset"), preset.no_adapters
    try:
        get_vision_encoder(config.model.vision.encoder)
    except ConfigError as error:
        text = str(error).removeprefix("model.vision.encoder: ").removesuffix(".")
        yield ("model.vision.encoder",), text + made_with(Path(config.out))
    arguments = list(inspect.signature(Trainer.__init__).parameters)[1:]
    for name in config.trainer:
        if name not in arguments:
            hint = did_you_mean(name, arguments)
            yield (f"trainer.{name}",), "lightning.Trainer has no such argument" + (f"; {hint}" if hint else "")
        elif name not in (*FOR_TRAINER, *NOT_FOR_TRAINER):
            yield (
                (f"trainer.{name}",),
                f"is not known here; of lightning.Trainer's can be set: {', '.join(FOR_TRAINER)}",
            )
