"""The keys of a configuration: a dataclass for each section, with the meaning and bounds of each key; and checks across keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import reduce
from typing import Annotated, Any, get_type_hints

from omegaconf import MISSING

from lit_eemllm.config.bounds import (
    BELOW_1,
    DROP,
    LAYERS,
    LOGGERS,
    NON_NEGATIVE,
    SCHEDULE,
    SHARE,
    TEXT,
    TWO_BELOW_1,
    Bound,
    at_least,
    each,
    more_than,
    one_of,
    within,
)


@dataclass
class VisionConfig:
    encoder: str = "transformers"
    """Vision encoder: "transformers" (vision tower of CLIP, SigLIP, SigLIP 2, Idefics2) or a name that your file registers."""
    path: str | None = None
    """Folder or hub id of the pretrained encoder; required by "transformers"."""
    select_layer: int | None = -2
    """Hidden states that the projector reads, without class token: 0 = the embeddings, -1 = the last layer, -2 = the one before, as
    LLaVA; null = the encoder's output, after its last norm if it has one, as Idefics2."""
    policy: Annotated[str, one_of("pad", "resize", "crop", "anyres", "tiles", "split", "native")] = "pad"
    """Image to pixels: "pad" to a square, "resize" (new aspect), "crop"; cut into tiles as LLaVA-1.6 ("anyres"), InternVL ("tiles") or SmolVLM
    ("split") do; or, for encoders of any size, "native"."""
    max_tokens: Annotated[int | None, at_least(1)] = None
    """With policy native, the most features of an image, which the connector may make fewer; null = as the encoder's
    preprocessor_config.json says."""


@dataclass
class ConnectorConfig:
    name: str = "mlp"
    """What makes visual tokens of the encoder's features: "mlp" or "linear", a token of each; "pixel_shuffle", "linear_shuffle", "merger" or
    "average", one of each square of them; "attention", a number of learned queries; or one of your own."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options that only this connector has, by name: factor, the side of a square (2), of those that take squares; rms (false) and levels
    (0) of merger; tokens (64) of an image or tile and heads (8), of attention."""


@dataclass
class AlignerConfig:
    value: bool | None = None
    """Visual states pass the layer's value projection; null = as the preset says."""
    output: bool | None = None
    """Visual states pass the layer's output projection; null = as the preset says."""
    ffn: bool | None = None
    """Visual states pass the layer's feed-forward network; null = as the preset says."""


@dataclass
class MechanismConfig:
    preset: str = "ee_mllm"
    """How visual tokens are treated: llava, ee_mllm, ee_mllm_f, naavit, shortv, saisa, vica, flamingo, casa, fastv, pyramid_drop,
    hidrop, visionzip, withdrawal, visipruner, skip_vision, operator_skipping, bidirectional, visual_experts, p_mod, deepstack, sampled
    or one of your own; fills the nulls below."""
    dense_layers: Annotated[Any, LAYERS] = None
    """Layers in which visual tokens also query: "all", "none" or a list of layer numbers."""
    cross_layers: Annotated[Any, LAYERS] = None
    """Layers in which text sees the image: "all", "none" or a list of layer numbers."""
    visual_source: Annotated[str | None, one_of("stream", "layerwise")] = None
    """Visual states of a layer come from the layer before ("stream") or from a projector of its own ("layerwise")."""
    aligner: AlignerConfig = field(default_factory=AlignerConfig)
    """Which weights of a composite layer (one in which only text queries) update visual tokens (EE-MLLM, Table 6)."""
    visual_window: Annotated[int | None, at_least(0)] = None
    """In composite layers, how many earlier visual tokens of its image a visual token sees; 0 = only itself."""
    visual_positions: Annotated[str | None, one_of("sequence", "shared", "unrotated", "none")] = None
    """Rotary positions of an image: "sequence" (one a token), "shared" (one in all), "unrotated" (text ignores them), "none"."""
    freeze_prefix: bool | None = None
    """Text before the first image takes no attention, only the feed-forward network (ViCA's code for 7B)."""
    visual_drop: Annotated[list[Any] | None, each(DROP)] = None
    """Pairs [layer, share]: before that layer, that share of an image's tokens leaves, those that the question attends to least there."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options that only this preset has, by name, such as those of flamingo or of a mechanism of your own (--import FILE)."""
    rows: list[Any] | None = None
    """Columns of the mechanism's table (lit-eemllm explain) to override after all of the above, as [{layers: 8-15, seen: every 2}]."""


@dataclass
class ModelConfig:
    decoder: Annotated[str, TEXT] = MISSING
    """Folder or hub id of the pretrained causal LM, in the format of transformers; its weights are loaded unchanged."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; null = the decoder's own."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    mechanism: MechanismConfig = field(default_factory=MechanismConfig)
    attention: str = "auto"
    """Attention backend, or "auto": the fastest one that a trial on the device proves to work."""
    template: str = "vicuna_v1"
    """How a conversation becomes text: "plain" (captions), "vicuna_v1" or "jinja" (the tokenizer's own template)."""
    dtype: Annotated[str, one_of("float32", "bfloat16")] = "float32"
    """Dtype of the frozen parameters: "float32" or "bfloat16". Trained ones are always float32."""
    quantization: Annotated[str | None, one_of("nf4", "int8")] = None
    """Keep the decoder's frozen linear layers in 4 bits, "nf4", or 8, "int8" (QLoRA; needs bitsandbytes); null = no."""
    liger: bool = False
    """Fused norms, feed-forward networks and loss of liger-kernel in the decoder; needs a CUDA device."""
    compile: bool = False
    """Fuse norms, projections, feed-forward networks and rotation in the decoder by torch.compile, when training; needs a C++ compiler."""
    fp8: bool = False
    """Multiply visual rows with the frozen decoder's weights in 8-bit floats; needs torchao and a CUDA device of compute capability 8.9."""


@dataclass
class DataConfig:
    train: Annotated[str, TEXT] = MISSING
    """Training data: a recipe (YAML) or a folder of prepared shards."""
    val: str | None = None
    """Validation data, same forms; null = no validation."""
    pack_tokens: Annotated[int, at_least(1)] = 4096
    """Token budget of one pack, visual tokens counted."""
    pack_by: Annotated[str, one_of("tokens", "flops")] = "tokens"
    """Which conversations share a training pack: those that fill it ("tokens"), or those with which all packs cost about the same
    ("flops", of the mechanism and the encoder), so that devices wait less for each other; no pack exceeds pack_tokens."""
    pack_samples: Annotated[int | None, at_least(1)] = None
    """Most conversations in one pack; null = as many as fit."""
    max_length: Annotated[int, at_least(1)] = 2048
    """Most tokens of one conversation, visual tokens counted."""
    truncation: Annotated[str, one_of("drop", "truncate", "error")] = "drop"
    """A longer conversation: "drop", "truncate" (never an image, never the whole answer) or stop with an "error"."""
    workers: Annotated[int, at_least(0)] = 2
    """Loader processes per device; 0 = load in the training process."""
    shuffle_buffer: Annotated[int, at_least(0)] = 1000
    """Samples held per worker to shuffle from; 0 = no shuffling between neighbours."""
    packing_buffer: Annotated[int, at_least(1)] = 256
    """Conversations held per worker to choose packs from: more = fuller packs, more memory."""
    max_image_pixels: Annotated[int, at_least(1)] = 50_000_000
    """Images of more pixels are refused before they are decoded."""
    max_bad_in_a_row: Annotated[int, at_least(1)] = 100
    """Consecutive unusable samples that stop the run."""
    timeout: Annotated[float, more_than(0)] = 300.0
    """Seconds to wait for a batch before the run stops instead of hanging; the first takes longest, as buffers fill."""


@dataclass
class TuningConfig:
    vision: Annotated[str, one_of("frozen", "full", "lora")] = "frozen"
    """Vision encoder: "frozen", "full" or "lora"."""
    projector: Annotated[str, one_of("frozen", "full", "lora")] = "full"
    """Projector (the connector), and modules that a mechanism adds: "frozen", "full" or "lora"."""
    llm: Annotated[str, one_of("frozen", "full", "lora")] = "frozen"
    """Decoder: "frozen", "full" or "lora"."""


@dataclass
class LoraConfig:
    r: Annotated[int, at_least(1)] = 128
    """Rank of the adapters of components with tuning "lora"; this and the next two are LLaVA's."""
    alpha: Annotated[float, more_than(0)] = 256
    """Their updates are scaled by alpha / r."""
    dropout: Annotated[float, BELOW_1] = 0.05
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
    lr: Annotated[float, more_than(0)] = MISSING
    """Peak learning rate of AdamW."""
    projector_lr: Annotated[float | None, more_than(0)] = None
    """Peak learning rate of the projector; null = lr."""
    vision_lr: Annotated[float | None, more_than(0)] = None
    """Peak learning rate of the vision encoder; null = lr."""
    vision_layer_decay: Annotated[float | None, SHARE] = None
    """Each layer of the vision encoder learns at this share of the rate of the layer above it; null = all at one rate."""
    betas: Annotated[list[float], TWO_BELOW_1] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's decay rates of the first and second moment."""
    eps: Annotated[float, more_than(0)] = 1e-8
    """AdamW's term added to the denominator."""
    states: Annotated[str, one_of("float32", "8bit")] = "float32"
    """AdamW's two moments of each trained weight: "float32", or "8bit" in a quarter of the memory (bitsandbytes' AdamW8bit, with a
    scale for each 256 numbers; not where FSDP2 shards weights)."""
    weight_decay: Annotated[float, NON_NEGATIVE] = 0.0
    """Decoupled weight decay of matrices; biases and norms are never decayed."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping its activations: less memory, more time."""
    activation_offload: bool = False
    """With activation_checkpointing, keep the inputs of decoder layers in main memory until the backward pass needs them: no memory of
    the device grows with the number of layers times tokens, but each step copies them there and back."""
    warmup_ratio: Annotated[float, within(0, 1)] = 0.03
    """Share of all steps in which the learning rate rises linearly to its peak."""
    schedule: Annotated[str, one_of("cosine", "linear", "constant")] = "cosine"
    """Learning rate after the warm-up: "cosine" or "linear" to 0, or "constant"."""
    mechanisms: Annotated[list[Any] | None, SCHEDULE] = None
    """A schedule of mechanisms, which training uses in place of model.mechanism: entries {steps, weight, mechanism, teacher, kl,
    temperature}, of which each optimiser step draws one (docs/mechanisms.md); null = model.mechanism in all steps."""
    max_steps: Annotated[int | None, at_least(1)] = None
    """Optimiser steps of the whole run; the schedule's length. Set this or epochs: the one set later (in a later file or on the
    command line) replaces the other."""
    epochs: Annotated[float | None, more_than(0)] = None
    """Length as passes over data.train, such as 2 or 0.5; its packs are counted when the run begins to turn this into max_steps. A
    pass over a blend of repetitions has each source that often; over a blend of weights, as many samples as all sources have."""
    clip_grad_norm: Annotated[float | None, more_than(0)] = 1.0
    """Largest norm of all gradients together; null = no clipping."""
    save_every: Annotated[int, at_least(1)] = 500
    """Optimiser steps between checkpoints."""
    val_every: Annotated[int, at_least(1)] = 500
    """Optimiser steps between validations; there is one after the last step too."""
    val_batches: Annotated[int, at_least(1)] = 20
    """Packs per validation and device."""
    log_every: Annotated[int, at_least(1)] = 10
    """Optimiser steps between log lines; fewer in a short run, so that it has ten lines."""
    samples_every: Annotated[int | None, at_least(1)] = None
    """Optimiser steps between answers to eight questions, always the same, of eval.data, eval.suite or data.val: in the log, in
    `out`/samples.html and as pictures; null = none."""
    keep: Annotated[int, at_least(1)] = 2
    """Newest checkpoints kept; older ones are deleted, but not the best one (eval.during_training, optim.patience)."""
    patience: Annotated[int | None, at_least(1)] = None
    """Validations in a row without a better score (eval.during_training; else without a lower loss) after which the run ends; null = it
    goes on to its last step."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run. `training.fit` turns epochs into steps before this is read."""
        assert self.max_steps is not None
        return self.max_steps


@dataclass
class VideoConfig:
    frames: Annotated[int, within(1, 1000)] = 8
    """Most frames of a video, each of which is an image."""
    rate: Annotated[float | None, more_than(0)] = None
    """Frames for each second of a video, up to video.frames; null = video.frames of any video."""
    markers: Annotated[str, one_of("plain", "internvl", "smolvlm", "qwen3_vl")] = "plain"
    """Text that tells the time of each frame: as "internvl", "smolvlm" or "qwen3_vl" write it, or "plain", none."""


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
    batch_size: Annotated[int, at_least(1)] = 32
    """Questions generated together."""
    max_new_tokens: Annotated[int, at_least(1)] = 32
    """Most tokens generated per answer."""
    samples: Annotated[int | None, at_least(0)] = None
    """Questions asked of each set, evenly spread over it; null = all, 0 = none, only the loss."""
    during_training: Annotated[int | None, at_least(1)] = None
    """Questions asked of each set with each validation of `fit`, evenly spread over it: their score is logged, and the checkpoint with the
    best is kept as checkpoints/best.ckpt; null = none, only the loss."""
    image_cache: Annotated[float, at_least(0)] = 1.0
    """GiB for cached keys and values of images that recur, where the mechanism allows reuse; 0 = no cache."""
    cuda_graphs: bool = False
    """Record the kernels of a new token once and launch them together, as a CUDA graph; without a CUDA device as before."""
    control: Annotated[int, at_least(0)] = 1
    """Passes with the images shuffled among the questions, as a control: the score of a model that does not look. 0 = none."""
    video: VideoConfig = field(default_factory=VideoConfig)
    """How videos become images, in rows of questions and `generate --video`; shards hold frames already."""


@dataclass
class Config:
    seed: Annotated[int, within(0, 2**32 - 1)] = 0
    """Seeds every random generator before any module is built."""
    out: Annotated[str, TEXT] = "runs/default"
    """Run directory: checkpoints, logs and the resolved configuration."""
    resume: Annotated[str, TEXT] = "auto"
    """"auto" continues a run found in `out`, "never" starts anew, anything else is the path of a checkpoint."""
    init_from: str | None = None
    """Weights to start from (no optimiser state): a folder written by save_pretrained, such as an earlier stage's."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    logger: Annotated[list[str], LOGGERS] = field(default_factory=lambda: ["csv", "tensorboard"])
    """Where a run is logged: csv, in any case, tensorboard, wandb, mlflow (docs/watching.md)."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Arguments of lightning.Trainer, such as accelerator, devices, precision; strategy is auto, ddp, fsdp2, hsdp or fsdp2_offload."""
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def asks(self) -> bool:
        """Whether the model is asked questions while it trains."""
        return self.eval.during_training is not None or self.optim.samples_every is not None


Mistake = tuple[tuple[str, ...], str]
"""The dotted keys that are wrong, first the one to change; and what is wrong with them."""


def bounds_of(section: type, prefix: str = "") -> Iterator[tuple[str, Bound]]:
    """Dotted name and bound of every key below `section` that has one."""
    for name, kind in get_type_hints(section, include_extras=True).items():
        if is_dataclass(kind):
            yield from bounds_of(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        for bound in getattr(kind, "__metadata__", ()):
            yield prefix + name, bound


_BOUNDS = dict(bounds_of(Config))
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
    "logger": "set logger",
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

    for key, bound in _BOUNDS.items():
        if value(key) is not None and (wrong := bound(value(key))):
            mistakes.append(((key,), wrong))

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
        text = f"set together with optim.max_steps={config.optim.max_steps}, and both set the length of the run: remove one of the two"
        mistakes.append((("optim.epochs", "optim.max_steps"), text))
    tuning = asdict(config.optim.tuning)
    if all(word == "frozen" for word in tuning.values()):
        text = "vision, projector and llm are all frozen: nothing is left to train"
        mistakes.append((("optim.tuning", *(f"optim.tuning.{part}" for part in tuning)), text))
    if config.model.quantization is not None and (tuning["llm"] == "full" or config.optim.lora.dora):
        text = "quantised layers cannot be trained: set optim.tuning.llm to lora or frozen, without optim.lora.dora"
        mistakes.append((("model.quantization", "optim.tuning.llm", "optim.lora.dora"), text))
    for key in ("model.quantization", "model.liger", *["optim.lora.dora"] * (tuning["llm"] == "lora")):
        if config.model.compile and value(key):
            text = (
                f"found true together with {key}, which torch.compile cannot take into a graph: remove one of the two"
            )
            mistakes.append((("model.compile", key), text))
    strategy = config.trainer.get("strategy", "auto")
    for key, changed in (
        ("optim.tuning.llm", tuning["llm"] != "frozen"),
        ("model.quantization", config.model.quantization is not None),
        ("model.liger", config.model.liger),
        ("model.compile", config.model.compile),
        ("trainer.strategy", strategy not in ("auto", "ddp")),
    ):
        if config.model.fp8 and changed:
            found = strategy if key == "trainer.strategy" else str(value(key)).lower()
            text = f"found true together with {key}={found}, and is for linear layers as they were loaded: change one of the two"
            mistakes.append((("model.fp8", key), text))
    if config.optim.states == "8bit" and strategy not in ("auto", "ddp"):
        text = (
            f"found 8bit together with trainer.strategy={strategy}, and is proved with auto and ddp alone: bitsandbytes' "
            "AdamW knows no shares of weights. Set optim.states=float32, of which each device has a share, or trainer.strategy=ddp"
        )
        mistakes.append((("optim.states", "trainer.strategy"), text))
    if config.optim.activation_offload and not config.optim.activation_checkpointing:
        text = "has no effect without optim.activation_checkpointing, of which it moves what is kept: set that to true, or this to false"
        mistakes.append((("optim.activation_offload", "optim.activation_checkpointing"), text))
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
    for key in ("eval.during_training", "optim.patience"):
        if value(key) is not None and config.data.val is None:
            mistakes.append(
                ((key, "data.val"), f"belongs to validations, of which there are none: set data.val, or {key}=null")
            )
    if config.optim.samples_every is not None and not (config.eval.suite or config.eval.data or config.data.val):
        text = "there are no questions to ask: set data.val, eval.data or eval.suite"
        mistakes.append((("optim.samples_every", "data.val"), text))
    precision = config.trainer.get("precision")
    if precision not in _PRECISIONS:
        text = f"found {precision!r}, expected {', '.join(map(str, _PRECISIONS[1:]))}: trained weights are float32"
        mistakes.append((("trainer.precision",), text))
    for name in config.trainer:
        if name in NOT_FOR_TRAINER:
            mistakes.append(((f"trainer.{name}",), f"cannot be set here: {NOT_FOR_TRAINER[name]}"))
    return mistakes
