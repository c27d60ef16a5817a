"""The modules of an EEMLLM, and its switches: mechanism, attention backend, fused kernels, compiled layers. No switch touches a weight."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from ..attention import AttentionBackend, Choice, resolve_backend
from ..compat.torch import allow_recompiles, cpp_compiler
from ..core.decoder import DecoderLayer, Inner
from ..core.families import check_decoder, table_problems
from ..core.stream import rotate
from ..core.table import Table, by_encoder, executed, ranked_in
from ..errors import ConfigError
from ..inputs.tiles import Tiled
from ..mechanisms import Added, Mechanism, Sizes, build_connector
from ..mechanisms.build import read_mechanism
from ..mechanisms.connectors import Beside
from .configuration import EEMLLMConfig
from .image_cache import ImageCache
from .pretrained import ImageRotary, adopt
from .vision import VisionEncoder, get_vision_encoder, ranking_problem


class ModelParts(PreTrainedModel):
    """Vision encoder, decoder and the modules that the mechanism adds, under the names that checkpoints have.

    Args:
        config: the architecture.
        decoder: a causal LM to use, with its weights; None = one built from the config.
        vision: likewise, the vision encoder.
    """

    config_class = EEMLLMConfig
    config: EEMLLMConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    _no_split_modules = ["DecoderLayer"]

    def __init__(
        self, config: EEMLLMConfig, decoder: PreTrainedModel | None = None, vision: VisionEncoder | None = None
    ) -> None:
        super().__init__(config)
        check_decoder(config.text_config)
        encoder = get_vision_encoder(config.vision["encoder"])
        self.vision = vision or encoder.from_config(config.vision["config"])
        self.language_model = decoder or AutoModelForCausalLM.from_config(config.text_config)
        self.mechanism, self.connector = read_mechanism(config.mechanism), build_connector(config.connector)
        self.refuse(self.problems(self.mechanism))
        if reason := self.mechanism.refuses(self.connector):
            raise ConfigError(f"model.connector.name: {reason}")
        self.vision.transform = self.vision.transform.with_reduction(self.connector)
        self.image_rotary = ImageRotary.of(config.text_config)
        if self.image_rotary and (isinstance(self.vision.transform, Tiled) or not self.connector.spatial):
            found = f"policy {self.vision.transform.policy} and connector {self.connector.name}"
            raise ConfigError(
                f"model.vision.policy: found {found}, but this decoder gives an image's tokens positions by row and column (image_rotary): "
                "set pad, resize, crop or native, and a connector whose tokens stand for places"
            )
        adopt(self.language_model)
        self._take(self.mechanism)
        self._connect()
        self._backend: AttentionBackend | None = None
        self.image_cache: ImageCache | None = None
        self.activation_checkpointing = self.activation_offload = False
        self.record_steps = False
        self._fused_loss: nn.Module | None = None
        self._rotate = rotate
        self.post_init()

    def _connect(self) -> None:
        """Build the modules that the mechanism adds: projector and blocks."""
        sizes = self.sizes
        self.projector = self.mechanism.connector(sizes)
        blocks = nn.ModuleDict()
        for layer in self.language_model.model.layers:
            block = self.mechanism.block(layer.index, sizes)
            if block is not None:
                blocks[str(layer.index)] = block
            if getattr(block, "copies", ()) and getattr(self.language_model, "is_quantized", False):
                text = "this mechanism has copies of the decoder's weights, which are trained: set null"
                raise ConfigError(f"model.quantization: {text}")
            if isinstance(block, Inner):
                layer.adopt(block)
            elif isinstance(block, Beside):
                block.copy(layer)
        self.add_module(self.mechanism.blocks_name, blocks)

    @property
    def sizes(self) -> Sizes:
        newline = self.vision.transform.order([]) is not None
        return Sizes.of(self.config.text_config, self.vision.hidden_size, newline, self.connector)

    @property
    def blocks(self) -> nn.ModuleDict:
        """The mechanism's modules before layers, by the layer's number."""
        blocks: nn.ModuleDict = getattr(self, self.mechanism.blocks_name)
        return blocks

    @property
    def table(self) -> Table:
        """The rows that the layers execute."""
        return tuple(layer.row for layer in self.language_model.model.layers)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise added modules and copies only. Parts from transformers initialise themselves; other encoders come with weights."""
        if isinstance(module, Added):
            module.reset_parameters()
        for layer in self.language_model.model.layers if isinstance(module, Inner) else ():
            if layer.inner is module:
                layer.fill_copies()

    # --- switches
    def problems(self, mechanism: Mechanism) -> list[tuple[str, str]]:
        """What is wrong with a mechanism in this decoder: (field, what is wrong)."""
        decoder = self.config.text_config
        problems, table = mechanism.problems(decoder.num_hidden_layers), mechanism.table(decoder.num_hidden_layers)
        if by_encoder(table) and (problem := ranking_problem(self.vision, self.connector)):
            problems.append(("preset", problem))
        if mechanism.encoder_depths and not self.vision.reads_depths:
            text = (
                f"reads layers inside the encoder, and {type(self.vision).__name__} lacks reads_depths (docs/vision.md)"
            )
            problems.append(("preset", text))
        return problems + table_problems(decoder, table)

    @staticmethod
    def refuse(problems: list[tuple[str, str]]) -> None:
        if problems:
            raise ConfigError("\n".join(f"model.mechanism.{name}: {text}" for name, text in problems))

    def set_mechanism(self, mechanism: Mechanism) -> None:
        """Switch to another mechanism. Raises ConfigError if its options are wrong or it needs modules that this model lacks."""
        problems = self.problems(mechanism)
        if mechanism.modules != self.mechanism.modules:
            problems.append(("preset", "needs other modules than the model has; make them with `lit-eemllm convert`"))
        self.refuse(problems)
        self._forget_images()
        self._take(mechanism)

    def _take(self, mechanism: Mechanism) -> None:
        """Set the row of the mechanism's table that each layer executes."""
        self.mechanism, self.config.mechanism = mechanism, mechanism.to_dict()
        layers = self.language_model.model.layers
        table = executed(mechanism.table(len(layers)))
        for layer, row in zip(layers, table, strict=True):
            layer.row, layer.ranks, layer.freeze_prefix = row, ranked_in(table, layer.index), mechanism.freeze_prefix
            layer.unrotated = mechanism.visual_positions == "unrotated"

    def train(self, mode: bool = True) -> ModelParts:
        if mode:
            self._forget_images()  # training will change the weights that their cached keys depend on
        return super().train(mode)

    def _forget_images(self) -> None:
        if getattr(self, "image_cache", None) is not None:
            self.image_cache.clear()

    def set_attention(self, name: str, dtype: torch.dtype | None = None, training: bool = True) -> Choice:
        """Choose the attention backend for this model's device; see `resolve_backend`.

        Args:
            name: a registered name or ``auto``.
            dtype: of queries, keys and values; None = that of autocast if it is on, else the decoder's.
            training: whether gradients are needed.
        """
        head_size = self.language_model.model.layers[0].self_attn.head_dim
        head_size *= 2 if self.mechanism.visual_positions == "unrotated" else 1
        if dtype is None and torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        choice = resolve_backend(name, self.device, dtype or self.language_model.dtype, training, head_size)
        self._backend = choice.backend
        return choice

    @property
    def backend(self) -> AttentionBackend:
        if self._backend is None:
            self.set_attention("auto")
        assert self._backend is not None
        return self._backend

    def use_liger(self) -> None:
        """Replace norms, feed-forward networks and the loss by liger-kernel's fused ones.

        Raises ConfigError without it, or if it has none that compute what this decoder's do.
        """
        if find_spec("liger_kernel") is None or not torch.cuda.is_available():
            raise ConfigError("model.liger: needs a CUDA device and liger-kernel; pip install 'lit_eemllm[liger]'")
        import liger_kernel.transformers as liger

        decoder, model = self.config.text_config, self.language_model
        parts = dict(rope=False, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=True, swiglu=True)
        apply = getattr(liger, f"apply_liger_kernel_to_{decoder.model_type}", None)
        if apply is None or not parts.keys() <= signature(apply).parameters.keys():
            what = f"has no RMSNorm and SwiGLU for decoders of model_type {decoder.model_type!r}"
            raise ConfigError(f"model.liger: the installed liger-kernel {what}; set model.liger=false")
        if (act := getattr(decoder, "hidden_act", None)) not in ("silu", "swish"):
            what = f"computes SiLU in feed-forward networks, this decoder's hidden_act is {act!r}"
            raise ConfigError(f"model.liger: liger-kernel {what}; set model.liger=false")
        # It replaces transformers' classes too, for whatever model is built next: not so here.
        classes = vars(sys.modules[type(model).__module__])
        before = dict(classes)
        apply(model=model, **parts)
        classes.update(before)
        self._fused_loss = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def compile_layers(self) -> None:
        """Let torch.compile fuse what decoder layers compute before and after attention, where gradients are needed. Without
        gradients, as when generating, they run as before; so do layers in which visual rows have weights of their own. Raises
        ConfigError without a C++ compiler."""
        if cpp_compiler() is None:
            raise ConfigError(
                "model.compile: torch.compile calls a C++ compiler, and found none; install one (apt-get install g++), name yours "
                "in the variable CXX, or set model.compile=false"
            )
        allow_recompiles(64)  # past its limit dynamo raises an error
        for layer in self.language_model.model.layers:
            if layer.inner.copies:  # FSDP2 shares these out, and gathers them when they are called
                continue
            for method in (DecoderLayer._norm, DecoderLayer._heads, DecoderLayer._feed_forward):
                setattr(layer, method.__name__, MethodType(_compiled(method), layer))
        self._rotate = _compiled(rotate)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled whole and for all lengths where gradients are on. All layers of all models share it: what is compiled
    for one serves the next of its kind."""
    compiled = torch.compile(function, dynamic=True, fullgraph=True)

    @wraps(function)
    def run(*arguments: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else function)(*arguments)

    return run
