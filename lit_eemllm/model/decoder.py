"""The decoder: a pretrained causal LM whose layers run any mechanism on a packed stream.

`adopt_layers` replaces each Hugging Face layer by a `DecoderLayer` that holds the same submodules under the same
names: checkpoints of the base model load unchanged, and because the submodules are *called*, adapters, quantised
linears and hooks keep working. Legend of shapes in `lit_eemllm.layout`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from ..attention import AttentionBackend
from ..errors import ConfigError
from ..layout import SequenceLayout, Visibility
from ..mechanisms import Mechanism
from .cache import PaddedCache

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Decoder families (`model_type`) proved equal to transformers' own model in tests/test_model.py."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the others change with the length of the batch


def check_decoder(config: PretrainedConfig) -> None:
    """Refuse a decoder whose layers would be computed wrongly. Raises ConfigError that says what to do."""
    found: list[str] = []
    if config.model_type not in FAMILIES:
        found.append(f"model_type {config.model_type!r} is not one of {FAMILIES}")
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if windowed or set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        found.append("it uses a sliding window")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        found.append(f"rope type {rope['rope_type']!r} is not one of {ROPE_TYPES}")
    if getattr(config, "attention_dropout", 0.0):
        found.append(f"attention_dropout is {config.attention_dropout}, expected 0")
    if found:
        raise ConfigError(
            f"model.decoder: this decoder is not supported: {'; '.join(found)}. To add a family: put its model_type into "
            "FAMILIES in lit_eemllm/model/decoder.py and make its parity test in tests/test_model.py pass; a layer that "
            "differs from Llama's in more than biases and q/k norms needs its own code in DecoderLayer."
        )


@dataclass
class StreamContext:
    """What every layer of one forward pass shares: positions, the backend with its plans, and the cache if any."""

    layout: SequenceLayout
    rotary: tuple[Tensor, Tensor]  # cos, sin: [S, 1, H]
    backend: AttentionBackend
    cache: PaddedCache | None = None
    plans: dict[Visibility, object] = field(default_factory=dict)

    def attend(self, layer: int, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, kind: Visibility, scale: float) -> Tensor:
        """Attention of the query rows over this pass's rows and whatever the cache holds, [Q, N, H]."""
        q_QNH, k_SKH = q_QNH.to(v_SKH.dtype), k_SKH.to(v_SKH.dtype)  # under autocast, rotary angles are float32
        if self.cache is not None:
            k_BKLH, v_BKLH = self.cache.update(k_SKH, v_SKH, layer)
            if self.cache.past:
                query_rows = None if kind.visual_queries else self.layout.text_index
                q_BNQH = self.cache.pad(q_QNH, query_rows)
                out_BNQH = self.backend.attend_cached(q_BNQH, k_BKLH, v_BKLH, self.cache.mask_BQL, scale)
                return self.cache.unpad(out_BNQH, query_rows)
        if kind not in self.plans:
            self.plans[kind] = self.backend.plan(self.layout, kind)
        return self.backend.attend(q_QNH, k_SKH, v_SKH, self.plans[kind], scale)


def rotate(x_QNH: Tensor, cos_Q1H: Tensor, sin_Q1H: Tensor) -> Tensor:
    """Rotary position embedding of queries or keys, as in transformers' Llama."""
    return x_QNH * cos_Q1H + rotate_half(x_QNH) * sin_Q1H


class DecoderLayer(nn.Module):
    """One layer of a Llama-like decoder on a packed stream, with visual rows treated as the mechanism says.

    Args:
        layer: the transformers layer whose submodules are taken over.
        index: its number, from 0.
        last: in the last layer visual states reach no text, so only their keys and values are computed.
        mechanism: how visual rows are treated here; see `set_mechanism`.
    """

    def __init__(self, layer: nn.Module, index: int, last: bool, mechanism: Mechanism) -> None:
        super().__init__()
        self.self_attn = layer.self_attn
        self.mlp = layer.mlp
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.index, self.last = index, last
        self.set_mechanism(mechanism)

    def set_mechanism(self, mechanism: Mechanism) -> None:
        """Switch the treatment of visual rows; no weight changes. Raises ConfigError if this decoder does not allow it."""
        self.visibility = Visibility(False) if self.last else mechanism.visibility(self.index)
        self.aligner = mechanism.aligner
        config = self.self_attn.config
        width, hidden = config.num_attention_heads * self.self_attn.head_dim, config.hidden_size
        if self._aligns and self.aligner.value != self.aligner.output and width != hidden:
            raise ConfigError(
                f"model.mechanism.aligner: value={self.aligner.value} with output={self.aligner.output} needs heads x head "
                f"size = hidden size, this decoder has {width} and {hidden}; switch both on or both off"
            )

    @property
    def _aligns(self) -> bool:
        return not self.last and not self.visibility.visual_queries

    def forward(self, x_Sh: Tensor, context: StreamContext) -> Tensor:
        """The updated stream [S, h]; of the last layer its text rows only, [T, h]."""
        layout, attn = context.layout, self.self_attn
        all_query = self.visibility.visual_queries or not layout.num_visual
        rows_Q = slice(None) if all_query else layout.text_index

        normed_Sh = self.input_layernorm(x_Sh)
        q_QNH = attn.q_proj(normed_Sh[rows_Q]).unflatten(-1, (-1, attn.head_dim))
        k_SKH = attn.k_proj(normed_Sh).unflatten(-1, (-1, attn.head_dim))
        v_SKH = attn.v_proj(normed_Sh).unflatten(-1, (-1, attn.head_dim))
        if hasattr(attn, "q_norm"):  # Qwen3 normalises each head before rotating it
            q_QNH, k_SKH = attn.q_norm(q_QNH), attn.k_norm(k_SKH)
        cos_S1H, sin_S1H = context.rotary
        q_QNH = rotate(q_QNH, cos_S1H[rows_Q], sin_S1H[rows_Q])
        k_SKH = rotate(k_SKH, cos_S1H, sin_S1H)
        mixed_Qw = context.attend(self.index, q_QNH, k_SKH, v_SKH, self.visibility, attn.scaling).flatten(-2)

        if self._aligns and layout.num_visual:
            return self._forward_aligned(x_Sh, normed_Sh, v_SKH, mixed_Qw, layout)
        x_Qh = x_Sh[rows_Q] + attn.o_proj(mixed_Qw)
        return x_Qh + self.mlp(self.post_attention_layernorm(x_Qh))

    def _forward_aligned(
        self, x_Sh: Tensor, normed_Sh: Tensor, v_SKH: Tensor, mixed_Tw: Tensor, layout: SequenceLayout
    ) -> Tensor:
        """Text rows take their attention, visual rows the aligner's path; one matrix product where weights are shared."""
        attn, aligner = self.self_attn, self.aligner
        text_Th, visual_Vh = x_Sh[layout.text_index], x_Sh[layout.visual_index]
        if aligner.value:  # under grouped queries a value head serves several heads of W_o
            groups = mixed_Tw.shape[-1] // v_SKH[0].numel()
            path_Vw = v_SKH[layout.visual_index].repeat_interleave(groups, dim=1).flatten(-2)
        else:
            path_Vw = normed_Sh[layout.visual_index]

        if aligner.output:
            update_Sh = attn.o_proj(torch.cat([mixed_Tw, path_Vw]))
            text_Th, visual_Vh = text_Th + update_Sh[: len(text_Th)], visual_Vh + update_Sh[len(text_Th) :]
        else:
            text_Th = text_Th + attn.o_proj(mixed_Tw)
            visual_Vh = visual_Vh + path_Vw if aligner.value else visual_Vh

        if aligner.ffn:
            x_Sh = layout.merge(text_Th, visual_Vh)
            return x_Sh + self.mlp(self.post_attention_layernorm(x_Sh))
        text_Th = text_Th + self.mlp(self.post_attention_layernorm(text_Th))
        return layout.merge(text_Th, visual_Vh)


def adopt_layers(decoder: PreTrainedModel, mechanism: Mechanism) -> None:
    """Replace the layers of a causal LM by `DecoderLayer`s, in place. Raises ConfigError for an unsupported decoder."""
    check_decoder(decoder.config)
    layers = decoder.model.layers
    if isinstance(mechanism.dense_layers, tuple) and not set(mechanism.dense_layers) <= set(range(len(layers))):
        raise ConfigError(
            f"model.mechanism.dense_layers: found {list(mechanism.dense_layers)}, this decoder has layers 0 to {len(layers) - 1}"
        )
    decoder.model.layers = nn.ModuleList(
        DecoderLayer(layer, index, index == len(layers) - 1, mechanism) for index, layer in enumerate(layers)
    )
