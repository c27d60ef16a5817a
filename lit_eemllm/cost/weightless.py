"""Models without weights: decoder and encoder from their config files alone, or from the shapes of well-known ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers import CLIPVisionConfig, LlamaConfig

from ..attention import AttentionBackend
from ..compat.torch import FakeTensorMode
from ..core.norms import is_rms_norm
from ..errors import ConfigError
from ..inputs.images import ImageTransform, Transform
from ..inputs.resolutions import NativeTransform, transform_from_dict, with_policy
from ..layout import SequenceLayout, Visibility, span
from ..mechanisms import Connector, Mechanism, configured_connector
from ..mechanisms.connectors import DEFAULT
from ..model import EEMLLM, EEMLLMConfig
from ..model.configuration import load_decoder_config, refuse_experts
from ..model.qwen_vision import QwenVision
from ..model.vision import NATIVE, TransformersVision, VisionEncoder, get_vision_encoder, ranking_problem, sides
from ..training.tuning import apply_tuning, set_modes

if TYPE_CHECKING:
    from ..config.keys import Config, ModelConfig

CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
SHAPES: dict[str, dict[str, int]] = {
    "vicuna-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000),
    "vicuna-13b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000),
}  # fmt: skip
"""Decoders of LLaVA-1.5, Llamas; its encoder is CLIP-L/14-336."""
SHAPE_CONFIG = """
model: {decoder: given by --shape, vision: {path: given by --shape}}
data: {train: none}
optim: {lr: 1e-3, max_steps: 1}
"""
"""What a configuration is merged onto when a shape stands in for its parts: nothing that `fit` would take from elsewhere."""
SHAPE_ALONE = """
model: {dtype: bfloat16}
trainer: {precision: bf16-mixed}
"""
"""And if no file says how it is trained."""


@dataclass(frozen=True)
class Parts:
    """The decoder's transformers config; the encoder's registered name and what its `to_config` gives; the connector."""

    decoder: Any
    encoder: str
    vision: dict[str, Any]
    connector: Connector = DEFAULT

    @property
    def transform(self) -> Transform:
        return transform_from_dict(self.vision["transform"]).with_reduction(self.connector)

    @property
    def view(self) -> tuple[int, int]:
        """`Transform.largest_view`, for an encoder of one's own too, whose transform need not be known."""
        return self.transform.largest_view if self.connector.by_place else (1, 1)

    @property
    def vision_width(self) -> int:
        """Of the encoder's features."""
        return self._made.hidden_size

    @property
    def ranking_problem(self) -> str:
        """See `lit_eemllm.model.vision.ranking_problem`."""
        return ranking_problem(self._made, self.connector)

    @property
    def reads_depths(self) -> bool:
        """Of the encoder."""
        return self._made.reads_depths

    @property
    def _made(self) -> VisionEncoder:
        with torch.device("meta"):
            return get_vision_encoder(self.encoder).from_config(self.vision)


def parts_of_shape(name: str, connector: Connector = DEFAULT, max_tokens: int | None = None) -> Parts:
    """Of LLaVA-1.5, or of a model of images and text (`shapes`), whose own connector stands for the default.

    Raises:
        ConfigError: no such shape; names them.
    """
    if name in SHAPES:
        decoder = LlamaConfig(**SHAPES[name])
        return Parts(decoder, "transformers", _vision(CLIPVisionConfig(**CLIP_L), select_layer=-2), connector)
    from .shapes import PUBLISHED, read_shape

    if name not in PUBLISHED and not Path(name).is_dir():
        known = ", ".join(sorted([*SHAPES, *PUBLISHED]))
        raise ConfigError(
            f"--shape: {name!r} is neither a folder with a model's config files nor a shape that is known here: {known}"
        )
    decoder, encoder, vision, own = read_shape(name)
    vision["transform"] = _within(transform_from_dict(vision["transform"]), max_tokens).to_dict()
    return Parts(decoder, encoder, vision, own if connector == DEFAULT else connector)


def parts_of_config(config: ModelConfig) -> Parts:
    """The parts that a configuration names. An encoder of one's own is loaded, with its weights, as only it knows how.

    Raises:
        ConfigError: a part is not there or not supported.
    """
    decoder, _ = load_decoder_config(config.decoder)
    refuse_experts(config, decoder)
    connector = configured_connector(config.connector)
    given, encoder = config.vision, get_vision_encoder(config.vision.encoder)
    if encoder is QwenVision:
        return Parts(decoder, given.encoder, QwenVision.read_config(given.path or "", given.max_tokens), connector)
    if encoder is not TransformersVision:
        made = encoder.from_path(given.path or "", select_layer=given.select_layer, policy=given.policy)
        return Parts(decoder, given.encoder, made.to_config(), connector)
    vision, saved = TransformersVision.read_config(given.path or "")
    transform = transform_from_dict(saved["transform"]) if saved else None
    vision = _vision(vision, given.select_layer, given.policy, given.max_tokens, transform)
    return Parts(decoder, given.encoder, vision, connector)


def parts_of(config: Config, shape: str | None) -> Parts:
    """Of a shape with the configuration's connector or, without one, of the configuration."""
    if shape is None:
        return parts_of_config(config.model)
    return parts_of_shape(shape, configured_connector(config.model.connector), config.model.vision.max_tokens)


def _within(transform: Transform, max_tokens: int | None) -> Transform:
    """With at most so many features, of pictures in their own aspect ratio."""
    return transform.within(max_tokens) if max_tokens and isinstance(transform, NativeTransform) else transform


def _vision(
    vision: Any,
    select_layer: int | None,
    policy: str = "pad",
    max_tokens: int | None = None,
    transform: Transform | None = None,
) -> dict[str, Any]:
    """As `TransformersVision.to_config`; of a transform that is not known only the sizes are used here, and they are the encoder's."""
    if transform is None:
        half, (side, patch) = (0.5, 0.5, 0.5), sides(vision)
        if side is None:
            transform = NativeTransform(patch, half, half, most=max_tokens or vision.num_patches)
        elif vision.model_type in NATIVE:
            transform = NativeTransform(patch, half, half, edges=(patch, side))
        else:
            transform = ImageTransform(side, side, patch, half, half)
    transform = with_policy(_within(transform, max_tokens), policy)
    model = {**vision.to_diff_dict(), "model_type": vision.model_type}
    return {"model": model, "transform": transform.to_dict(), "select_layer": select_layer}


def build_weightless(config: Config, parts: Parts, mechanism: Mechanism) -> tuple[EEMLLM, FakeTensorMode]:
    """The model as it would be trained, frozen and cast; its tensors have shapes and types, but no data.

    They are PyTorch's fake tensors, which lie on the meta device and say that they are on the CPU, so that autocast
    works. The mode makes more of them.
    """
    with torch.device("meta"):
        model = EEMLLM(
            EEMLLMConfig(
                text_config=parts.decoder,
                vision={"encoder": parts.encoder, "config": parts.vision},
                mechanism=mechanism.to_dict(),
                image_token_id=parts.decoder.vocab_size,
                connector=parts.connector.to_dict(),
            )
        )
        set_modes(model, apply_tuning(model, config.optim, config.model.dtype))
    as_on_a_gpu(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model.to_empty(device="cpu")
    model.tie_weights()
    model._backend = Counted()
    return model, mode


def as_on_a_gpu(model: nn.Module) -> None:
    """Let it keep for the backward pass what it keeps on a GPU, where a CPU keeps more. It then computes something else."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.__class__ = FusedDropout
        elif is_rms_norm(module):
            module.forward = partial(fused_norm, module)


class FusedDropout(nn.Dropout):
    """As on a GPU, where the backward pass needs a byte for each number; on the CPU it is a number for each."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.native_dropout(input, self.p, self.training)[0]


def fused_norm(norm: Any, x: Tensor) -> Tensor:
    """As on a GPU (`lit_eemllm.core.norms`), where its input is kept: as of PyTorch's LayerNorm, which has a kernel without data."""
    if x.dtype != norm.weight.dtype:
        own: Tensor = type(norm).forward(norm, x)
        return own
    with torch.autocast("cpu", enabled=False):
        return layer_norm(x, norm.weight.shape, norm.weight)


class Fused(AttentionBackend):
    """Attention without data: there is what a fused kernel takes, saves and gives."""

    name = "fused"
    products = False
    """Every product is an operator, to be counted, which makes of scores what a kernel does not keep."""

    def plan(self, layout: SequenceLayout, visibility: Visibility) -> Visibility:
        return visibility

    def attend(self, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, plan: Visibility, scale: float) -> Tensor:
        keys = slice(None if plan.window is None else span(plan.window))
        return _Attention.apply(q_QNH, k_SKH[keys], v_SKH[keys], self.products)


class Counted(Fused):
    """The same, all products beside it."""

    name = "counted"
    products = True


class _Attention(torch.autograd.Function):
    """The products alone: each is one operator, of which a trace of many layers has enough."""

    @staticmethod
    def forward(ctx: Any, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, products: bool) -> Tensor:
        ctx.products = products
        if products:
            q_NQH, k_NSH, v_NSH = _by_head(q_QNH, k_SKH, v_SKH)
            out_QNH = torch.bmm(torch.bmm(q_NQH, k_NSH.mT), v_NSH).transpose(0, 1)
        else:
            out_QNH = q_QNH.new_empty(*q_QNH.shape[:2], v_SKH.shape[2])
        row_QN = q_QNH.new_empty(q_QNH.shape[:2], dtype=torch.float32)  # logarithm of the sum of exponentials
        ctx.save_for_backward(q_QNH, k_SKH, v_SKH, out_QNH, row_QN)
        return out_QNH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """The four products."""
        (gradient_QNH,), (q_QNH, k_SKH, v_SKH, *_) = gradients, ctx.saved_tensors
        if ctx.products:
            q_NQH, k_NSH, v_NSH = _by_head(q_QNH, k_SKH, v_SKH)
            gradient_NQH = gradient_QNH.transpose(0, 1)
            scores_NQS = torch.bmm(gradient_NQH, v_NSH.mT)
            torch.bmm(scores_NQS.mT, gradient_NQH)  # of the values
            torch.bmm(scores_NQS, k_NSH)  # of the queries
            torch.bmm(scores_NQS.mT, q_NQH)  # of the keys
        return torch.empty_like(q_QNH), torch.empty_like(k_SKH), torch.empty_like(v_SKH), None


def _by_head(q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and keys and values, which may be of another size, for each of their heads."""
    heads = q_QNH.shape[1]
    k_NSH, v_NSH = (x.new_empty(heads, len(x), x.shape[2]) for x in (k_SKH, v_SKH))
    return q_QNH.transpose(0, 1), k_NSH, v_NSH
