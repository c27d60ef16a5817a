"""The decoder: a pretrained causal LM whose layers run any mechanism on a packed stream.

`adopt_layers` replaces each Hugging Face layer by a `DecoderLayer` that holds the same submodules under the same
names: checkpoints of the base model load unchanged, and because the submodules are *called*, adapters, quantised
linears and hooks keep working. Legend of shapes in `lit_eemllm.layout`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..attention import AttentionBackend
from ..errors import ConfigError
from ..layout import SequenceLayout, Visibility
from ..mechanisms import NO_ALIGNER, Mechanism
from .cache import CachedPass
from .dropping import kept_layout, least_attended_dropped

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


def mechanism_problems(config: PretrainedConfig, mechanism: Mechanism) -> list[tuple[str, str]]:
    """Why a decoder cannot execute a mechanism: (field of the mechanism, what is wrong)."""
    problems = mechanism.problems(config.num_hidden_layers)
    hidden = config.hidden_size
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    value, output = mechanism.aligner.value, mechanism.aligner.output
    aligned = any(not mechanism.is_dense(layer) for layer in range(config.num_hidden_layers - 1))
    if aligned and value != output and width != hidden:
        text = f"value={value} with output={output} needs heads x head size = hidden size, this decoder has {width} and {hidden}"
        problems.append(("aligner", f"{text}; switch both on or both off"))
    return problems


@dataclass(frozen=True)
class View:
    """The rows of the stream that some layers use: ``all``, ``text`` alone, or the ``images`` alone.

    Attributes:
        layout: theirs.
        rows: which rows of the stream they are; None = all.
        angles: cos and sin of their rotary positions, [rows, 1, H].
    """

    name: str
    layout: SequenceLayout
    rows: Tensor | None
    angles: tuple[Tensor, Tensor]

    def of(self, x_SKH: Tensor) -> Tensor:
        """These rows of a tensor in stream order."""
        return x_SKH if self.rows is None else x_SKH.index_select(0, self.rows)


VisualStates = Callable[[int], Tensor]
"""Layer -> the visual states that enter it, [V, h]."""

VisualKeys = list[tuple[Tensor, Tensor] | None]
"""Per layer, keys before rotation and values of all visual tokens, [V, K, H] each; None where text does not see them."""


@dataclass
class StreamContext:
    """What every layer of one forward pass shares.

    Attributes:
        layout: of the whole stream.
        rotary: cos and sin of all its rows, [S, 1, H].
        backend: computes attention.
        text_only: the stream that runs through the layers is text only, since no layer updates visual states.
        cached: the pass over a padded cache, when generating.
        states: with a text-only stream, what its text sees of the images, if anything.
        keys: likewise, already as keys and values; makes any stream text only.
        recorded: where `keys` of images are being made, one entry a layer.
        kept_V: the visual tokens that are still seen after dropping, ascending; None = all.
        plans: the backend's, by view and visibility.
    """

    layout: SequenceLayout
    rotary: tuple[Tensor, Tensor]
    backend: AttentionBackend
    text_only: bool = False
    cached: CachedPass | None = None
    states: VisualStates | None = None
    keys: VisualKeys | None = None
    recorded: VisualKeys | None = None
    kept_V: Tensor | None = None
    plans: dict[tuple[str, Visibility], object] = field(default_factory=dict)
    _views: dict[str, View] = field(default_factory=dict)
    _kept_lengths: list[int] = field(default_factory=list)

    @cached_property
    def prefix_T1(self) -> Tensor:
        """True for text before the first image of its document; nothing that comes after a cache is."""
        prefix_T = self.layout.prefix()
        return (torch.zeros_like(prefix_T) if self.cached is not None and self.cached.past else prefix_T)[:, None]

    @cached_property
    def prefix_S1(self) -> Tensor:
        """The same among the rows of the whole stream."""
        none_S1 = torch.zeros(self.layout.num_tokens, 1, dtype=torch.bool, device=self.prefix_T1.device)
        return none_S1.index_copy(0, self.layout.text_index, self.prefix_T1)

    @property
    def text_stream(self) -> bool:
        """Visual rows are not among the rows that run through the layers."""
        return self.text_only or self.keys is not None or not self.layout.num_visual

    def view(self, name: str) -> View:
        if name not in self._views:
            layout, rows = self.layout, None
            if name == "text":
                layout, rows = layout.text_only(), layout.text_index
            elif name == "images":
                layout, rows = layout.images_only(), layout.visual_index
            elif name != "all" and self.kept_V is not None:
                layout, rows = kept_layout(layout, self.kept_V, self._kept_lengths)
            cos, sin = (x if rows is None else x[rows] for x in self.rotary)
            self._views[name] = View(name, layout, rows, (cos, sin))
        return self._views[name]

    def attend(
        self, layer: int, q_QNH: Tensor, k_RKH: Tensor, v_RKH: Tensor, view: View, kind: Visibility, scale: float
    ) -> Tensor:
        """Attention of a view's query rows over its rows and whatever the cache holds of them, [Q, N, H]."""
        q_QNH, k_RKH = q_QNH.to(v_RKH.dtype), k_RKH.to(v_RKH.dtype)  # under autocast, rotary angles are float32
        if self.cached is not None and self.cached.cache is not None and view.name != "images":
            grid = self.cached.grid(view.name, self._lengths(view))
            k_BKLH, v_BKLH = self.cached.cache.update(grid.pad(k_RKH), grid.pad(v_RKH), layer)
            if self.cached.past:
                query_rows = None if kind.visual_queries or len(q_QNH) == len(k_RKH) else view.layout.text_index
                q_BNQH = grid.pad(q_QNH, query_rows)
                return grid.unpad(self.backend.attend_cached(q_BNQH, k_BKLH, v_BKLH, grid.mask_BQL, scale), query_rows)
        if not len(q_QNH):  # images by themselves
            return q_QNH.new_zeros(0, q_QNH.shape[1], v_RKH.shape[-1])
        key = (view.name, kind)
        if key not in self.plans:
            self.plans[key] = self.backend.plan(view.layout, kind)
        return self.backend.attend(q_QNH, k_RKH, v_RKH, self.plans[key], scale)

    def _lengths(self, view: View) -> list[int]:
        """Rows of each sequence in a grid of its own; the columns of the ids serve while nothing is left out of them."""
        if view.rows is None or not self.layout.num_visual:
            return []
        if view.name == "text":  # its layout lacks documents without text
            return self.layout.text_lengths
        return [sum(run.length for run in document) for document in view.layout.documents]

    def drop(self, layer: int, view: str, q_TNH: Tensor, k_RKH: Tensor, share: float, scale: float) -> Tensor:
        """Drop visual tokens until `share` of each image's original ones is gone; see `Mechanism.visual_drop`.

        Args:
            layer: whose cache, if there is one of earlier turns, holds keys that the prompt's last token attends to as well.
            view: the rows that this layer's text will see.
            q_TNH: queries of the text before rotation.
            k_RKH: keys before rotation, those of all text and then of the visual tokens that are still seen.
            share: dropped since the beginning.
            scale: of the scores.

        Returns:
            rows of the keys that stay, in that order.
        """
        num_text, visual_index = self.layout.num_text, self.layout.visual_index
        if self.kept_V is None:
            self.kept_V, self._kept_lengths = (
                torch.arange(len(visual_index), device=visual_index.device),
                self.layout.image_lengths,
            )
        rows_R = torch.cat([self.layout.text_index, visual_index[self.kept_V]])
        cos_S1H, sin_S1H = self.rotary
        turned_RKH = rotate(k_RKH, (cos_S1H[rows_R], sin_S1H[rows_R]))
        turned_TNH = rotate(q_TNH, self.view("text").angles)
        lengths = [length - int(share * length + 1e-9) for length in self.layout.image_lengths]
        past = self.cached.earlier_keys(layer, view) if self.cached is not None else []
        stay_V = least_attended_dropped(self.layout, turned_TNH, turned_RKH, self._kept_lengths, lengths, scale, past)
        self.kept_V, self._kept_lengths = self.kept_V[stay_V], lengths
        return torch.cat([torch.arange(num_text, device=stay_V.device), num_text + stay_V])


def rotate(x_QNH: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of queries or keys, as in transformers' Llama."""
    cos_Q1H, sin_Q1H = angles
    first, second = x_QNH.chunk(2, dim=-1)
    return x_QNH * cos_Q1H + torch.cat([-second, first], dim=-1) * sin_Q1H


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
        """Switch the treatment of visual rows; no weight changes."""
        self.dense = mechanism.is_dense(self.index) and not self.last
        drops = [layer for layer, _ in mechanism.visual_drop if layer <= self.index]
        self.view = f"kept since {drops[-1]}" if drops else "all"
        if not mechanism.sees_images(self.index):
            self.view = "text"
        dropped = sum(share for layer, share in mechanism.visual_drop if layer <= self.index)
        self.drops = dropped if self.index in drops else None
        self.aligner = NO_ALIGNER if self.last else mechanism.aligner
        self.window = 0 if self.last else mechanism.visual_window
        self.unrotated = mechanism.visual_positions == "unrotated"
        self.freeze_prefix = mechanism.freeze_prefix

    def forward(self, x_Rh: Tensor, context: StreamContext) -> Tensor:
        """The updated rows: text rows where those are the stream, [T, h], else all, [S, h]; of the last layer text rows."""
        if context.text_stream:
            return self._forward_text(x_Rh, context)
        return self._forward_dense(x_Rh, context) if self.dense else self._forward_composite(x_Rh, context)

    def _project(self, query_Qh: Tensor, normed_Rh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, not rotated yet."""
        attn = self.self_attn
        width = attn.config.num_attention_heads * attn.head_dim
        query_Qw = attn.q_proj(query_Qh) if len(query_Qh) else query_Qh.new_zeros(0, width)  # 4-bit layers want rows
        q_QNH = query_Qw.unflatten(-1, (-1, attn.head_dim))
        k_RKH = attn.k_proj(normed_Rh).unflatten(-1, (-1, attn.head_dim))
        v_RKH = attn.v_proj(normed_Rh).unflatten(-1, (-1, attn.head_dim))
        if hasattr(attn, "q_norm"):  # Qwen3 normalises each head before rotating it
            q_QNH, k_RKH = attn.q_norm(q_QNH), attn.k_norm(k_RKH)
        return q_QNH, k_RKH, v_RKH

    def _attend_text(self, q_TNH: Tensor, k_RKH: Tensor, v_RKH: Tensor, view: View, context: StreamContext) -> Tensor:
        """Text queries over a view, before rotation, to what W_o takes, [T, N x H]."""
        turned_TNH, turned_RKH = rotate(q_TNH, context.view("text").angles), rotate(k_RKH, view.angles)
        if self.unrotated:  # text scores visual keys without rotation on either: twice the head size holds both
            visual_R11 = torch.zeros_like(k_RKH[:, :1, :1], dtype=torch.bool)
            visual_R11[view.layout.visual_index] = True
            none = torch.zeros_like(k_RKH)
            turned_TNH = torch.cat([turned_TNH, q_TNH], dim=-1)
            turned_RKH = torch.where(visual_R11, torch.cat([none, k_RKH], -1), torch.cat([turned_RKH, none], -1))
        mixed_TNH = context.attend(
            self.index, turned_TNH, turned_RKH, v_RKH, view, Visibility(False), self.self_attn.scaling
        )
        mixed_Tw = mixed_TNH.flatten(-2)
        return mixed_Tw.masked_fill(context.prefix_T1, 0.0) if self.freeze_prefix else mixed_Tw

    def _forward_text(self, x_Th: Tensor, context: StreamContext) -> Tensor:
        """Text is the stream; what it sees of the images, if anything, comes from the context."""
        visual = context.layout.num_visual and self.view != "text"
        rows_Rh = x_Th
        if visual and context.states is not None:
            visual_Vh = context.states(self.index).to(x_Th.dtype)
            rows_Rh = torch.cat([x_Th, visual_Vh if context.kept_V is None else visual_Vh[context.kept_V]])
        normed_Rh = self.input_layernorm(rows_Rh)
        q_TNH, k_RKH, v_RKH = self._project(normed_Rh[: len(x_Th)], normed_Rh)
        if visual and context.keys is not None:
            supplied = context.keys[self.index]
            assert supplied is not None
            kept = slice(None) if context.kept_V is None else context.kept_V
            k_RKH, v_RKH = (torch.cat([x, image[kept]]) for x, image in zip((k_RKH, v_RKH), supplied, strict=True))
        if visual and self.drops is not None and context.cached is not None and context.cached.cache is not None:
            stay_R = context.drop(self.index, self.view, q_TNH, k_RKH, self.drops, self.self_attn.scaling)
            k_RKH, v_RKH = k_RKH[stay_R], v_RKH[stay_R]
        if context.recorded is not None:
            context.recorded.append((k_RKH, v_RKH) if visual else None)
        view = context.view(self.view)
        if visual:
            k_RKH, v_RKH = (x.index_select(0, view.layout.merge_index) for x in (k_RKH, v_RKH))
        mixed_Tw = self._attend_text(q_TNH, k_RKH, v_RKH, view, context)
        if not len(x_Th):  # images by themselves
            return x_Th
        x_Th = x_Th + self.self_attn.o_proj(mixed_Tw)
        return x_Th + self.mlp(self.post_attention_layernorm(x_Th))

    def _forward_dense(self, x_Sh: Tensor, context: StreamContext) -> Tensor:
        """All rows alike, as in the pretrained model."""
        attn, view = self.self_attn, context.view("all")
        normed_Sh = self.input_layernorm(x_Sh)
        q_SNH, k_SKH, v_SKH = self._project(normed_Sh, normed_Sh)
        q_SNH, k_SKH = rotate(q_SNH, view.angles), rotate(k_SKH, view.angles)
        mixed_SNH = context.attend(self.index, q_SNH, k_SKH, v_SKH, view, Visibility(True), attn.scaling)
        mixed_Sw = mixed_SNH.flatten(-2)
        if self.freeze_prefix:
            mixed_Sw = mixed_Sw.masked_fill(context.prefix_S1, 0.0)
        x_Sh = x_Sh + attn.o_proj(mixed_Sw)
        return x_Sh + self.mlp(self.post_attention_layernorm(x_Sh))

    def _forward_composite(self, x_Sh: Tensor, context: StreamContext) -> Tensor:
        """Text rows take their attention, visual rows the aligner's path; one matrix product where weights are shared."""
        attn, aligner, layout = self.self_attn, self.aligner, context.layout
        view = context.view(self.view)
        normed_Sh = self.input_layernorm(x_Sh)
        queries_Qh = normed_Sh if self.window else normed_Sh[layout.text_index]
        q_QNH, k_SKH, v_SKH = self._project(queries_Qh, normed_Sh)
        q_TNH = q_QNH[layout.text_index] if self.window else q_QNH
        if context.recorded is not None:
            context.recorded.append((k_SKH, v_SKH) if self.view == "all" else None)
        mixed_Tw = self._attend_text(q_TNH, view.of(k_SKH), view.of(v_SKH), view, context)
        text_Th = x_Sh[layout.text_index]
        if self.last and not len(text_Th):  # images by themselves
            return text_Th
        if self.last:
            text_Th = text_Th + attn.o_proj(mixed_Tw)
            return text_Th + self.mlp(self.post_attention_layernorm(text_Th))

        visual_Vh = x_Sh[layout.visual_index]
        if self.window:
            path_Vw = self._attend_locally(q_QNH, k_SKH, v_SKH, context)
        elif aligner.value:  # under grouped queries a value head serves several heads of W_o
            groups = mixed_Tw.shape[-1] // v_SKH[0].numel()
            path_Vw = v_SKH[layout.visual_index].repeat_interleave(groups, dim=1).flatten(-2)
        else:
            path_Vw = normed_Sh[layout.visual_index]

        if aligner.output:
            update_Sh = attn.o_proj(torch.cat([mixed_Tw, path_Vw.to(mixed_Tw.dtype)]))
            text_Th, visual_Vh = text_Th + update_Sh[: len(text_Th)], visual_Vh + update_Sh[len(text_Th) :]
        else:
            text_Th = text_Th + attn.o_proj(mixed_Tw)
            visual_Vh = visual_Vh + path_Vw if aligner.value else visual_Vh

        if aligner.ffn:
            x_Sh = layout.merge(text_Th, visual_Vh)
            return x_Sh + self.mlp(self.post_attention_layernorm(x_Sh))
        text_Th = text_Th + self.mlp(self.post_attention_layernorm(text_Th))
        return layout.merge(text_Th, visual_Vh)

    def _attend_locally(self, q_SNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, context: StreamContext) -> Tensor:
        """Visual tokens over a window of their own image, [V, N x H]: with a window of 0 the values themselves."""
        view = context.view("images")
        q_VNH, k_VKH = rotate(view.of(q_SNH), view.angles), rotate(view.of(k_SKH), view.angles)
        kind, scale = Visibility(True, window=self.window), self.self_attn.scaling
        return context.attend(self.index, q_VNH, k_VKH, view.of(v_SKH), view, kind, scale).flatten(-2)


def adopt_layers(decoder: PreTrainedModel, mechanism: Mechanism) -> None:
    """Replace the layers of a causal LM by `DecoderLayer`s, in place. Raises ConfigError for an unsupported decoder."""
    check_decoder(decoder.config)
    layers = decoder.model.layers
    decoder.model.layers = nn.ModuleList(
        DecoderLayer(layer, index, index == len(layers) - 1, mechanism) for index, layer in enumerate(layers)
    )
