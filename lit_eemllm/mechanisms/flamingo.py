"""Flamingo, as in OpenFlamingo: gated cross-attention, by a perceiver resampler and blocks between the decoder's layers.

Gates begin at zero, so the decoder is at first the base LLM; text with no image before it is never touched, not even by the
feed-forward network, which OpenFlamingo applies to all text. Blocks stand before layers 0, k, 2k, ..., the paper being silent.
Legend of shapes in `lit_eemllm.layout`, and here:
    M media tokens: what text attends to    G groups of text rows that see the same images
    R media tokens that a group or sequence sees, padded; in the resampler, the latents of an image
    L in [G, L]: rows of a group, padded; in the resampler, the features of an image, padded
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ..attention import fused_attention
from ..core.stream import Stream
from ..layout import SequenceLayout, upload
from .base import NO_ALIGNER, Aligner, BlockCost, Features, Layers, Mechanism, register_mechanism
from .connectors import DEFAULT, Added, Connector, CrossAttention, Sizes, lengths_mask, padded


@dataclass(frozen=True)
class Gated:
    """Options of the gated blocks before every k-th layer.

    Args:
        every: a block stands before layers 0, every, 2 every, ...
        latents: tokens per image after a perceiver resampler; 0 = the projected visual tokens as they are.
        heads: heads of the cross-attention and of the resampler.
        head_size: their size.
        depth: layers of the resampler.
        immediate: text sees only the last image before it; False = all images before it.
    """

    every: int = 4
    latents: int = 64
    heads: int = 8
    head_size: int = 64
    depth: int = 6
    immediate: bool = True


@dataclass(frozen=True)
class Flamingo(Mechanism):
    """No layer of the decoder has visual tokens; see the top of this file."""

    cross_layers: Layers = "none"
    aligner: Aligner = NO_ALIGNER
    visual_positions: str = "none"
    gated: Gated = field(default_factory=Gated)

    blocks_name = "gated"  # of weights that older versions saved
    blocks_begin = "gates begin at zero: until they are trained, text is as without an image"
    no_adapters = "gated cross-attention starts from scratch and must be trained as a whole: set full"
    no_later_images = "gated cross-attention takes all images of a conversation in one pass, not after a cache"

    @property
    def weights(self) -> Hashable:
        return type(self), replace(self.gated, every=0, immediate=True)

    def refuses(self, connector: Connector) -> str:
        if connector.deep:
            return f"found {connector.name}, which adds to visual tokens after the first layers, but none go through them: set levels=0"
        if connector == DEFAULT or not self.gated.latents:
            return ""
        return (
            f"found {connector.name}, but flamingo's resampler reads the encoder's features itself: set {DEFAULT.name}, or "
            "model.mechanism.options.gated.latents=0"
        )

    def connector(self, sizes: Sizes) -> nn.Module:
        return Resampler(sizes.vision, self.gated) if self.gated.latents else super().connector(sizes)

    def block(self, layer: int, sizes: Sizes) -> nn.Module | None:
        if layer % self.gated.every:
            return None
        return GatedBlock(layer, sizes.hidden, sizes.vision if self.gated.latents else sizes.hidden, self.gated)

    def enter(self, connector: nn.Module, features: Features, x_Th: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        if stream.cached is not None and stream.cached.past:  # the cache has what text sees
            return x_Th[:0], stream
        lengths = stream.layout.image_lengths
        if self.gated.latents:
            rows_Vd = features.rows
            if features.order is not None:  # the resampler reads encoder features, which have no newline: zeros
                rows_Vd = features.order.of(pad(rows_Vd, (0, 0, 0, 1)))
            tokens_Md, lengths = connector(rows_Vd, lengths), [self.gated.latents] * len(lengths)
        else:
            tokens_Md = connector(*features[:3])
        media = Media.of(stream.layout, tokens_Md, lengths, self.gated.immediate, stream.generating)
        return x_Th[:0], replace(stream, shared=media)

    def block_cost(self, layer: int, sizes: Sizes, text: int, visual: int) -> BlockCost:
        gated, h = self.gated, sizes.hidden
        if layer % gated.every or not visual:
            return BlockCost()
        inner, tokens, width = gated.heads * gated.head_size, gated.latents or visual, h
        if gated.latents:
            width = sizes.vision
        row = 4 * h * inner + 4 * tokens * inner + 16 * h * h  # W_q and W_o, scores, feed-forward network
        return BlockCost(text * row + 4 * width * inner * tokens, row, 2 * tokens * inner)

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        found = super().problems(num_layers) + self.outside_problems("gated", num_layers)
        if min(self.gated.every, self.gated.heads, self.gated.head_size, self.gated.depth) < 1:
            found.append(("gated", f"found {self.gated}: every, heads, head_size and depth are 1 or more"))
        return found


def feed_forward(width: int) -> nn.Sequential:
    """Norm, linear to four times the width, GELU, linear back."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
    )


class ResamplerLayer(nn.Module):
    """Latents read the media and themselves, then pass a feed-forward network."""

    def __init__(self, width: int, config: Gated) -> None:
        super().__init__()
        self.media_norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, width, config.heads, config.head_size)
        self.ffn = feed_forward(width)

    def forward(self, x_IRd: Tensor, media_ILd: Tensor, sees_I1L: Tensor) -> Tensor:
        attention = self.attention
        media = torch.cat([self.media_norm(media_ILd), attention.norm(x_IRd)], dim=1)
        q, k, v = (x.transpose(1, 2) for x in (attention.queries(x_IRd), *attention.keys_values(media)))
        mixed = fused_attention(q, k, v, sees_I1L).transpose(1, 2).flatten(-2)
        x_IRd = x_IRd + attention.o_proj(mixed)
        return x_IRd + self.ffn(x_IRd)


class Resampler(Added):
    """Perceiver resampler: a fixed number of learned latents reads the features of each image.

    Args:
        width: of the features and of the latents.
        config: how many latents, heads and layers.
    """

    def __init__(self, width: int, config: Gated) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.latents, width))
        self.layers = nn.ModuleList(ResamplerLayer(width, config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.latents)

    def forward(self, features_Vd: Tensor, lengths: Sequence[int]) -> Tensor:
        """Features of all images, concatenated, with the length of each, to latents, [images x latents, d]."""
        images, latents = len(lengths), len(self.latents)
        features_ILd = padded(features_Vd.to(self.latents.dtype), lengths)
        x_IRd = self.latents.expand(images, -1, -1)
        real_IL = lengths_mask(lengths, features_ILd.shape[1], features_Vd.device)
        sees_IL = torch.cat([real_IL, real_IL.new_ones(images, latents)], dim=1)
        for layer in self.layers:
            x_IRd = layer(x_IRd, features_ILd, sees_IL[:, None])
        return self.norm(x_IRd).flatten(0, 1)


@dataclass(frozen=True)
class Media:
    """What text sees of the images, for one forward pass.

    Attributes:
        tokens_Md: media tokens of all images, concatenated.
        rows_n: indices of the text rows that have an image before them.
        slots_n: the place of each in the flattened grid [G, L].
        shape: G, L.
        index_GR: indices of the media tokens that a group sees.
        mask_GR: True where these are no padding.
        last_BR: index and mask of the media tokens that text after each document will see; None when not generating.
    """

    tokens_Md: Tensor
    rows_n: Tensor
    slots_n: Tensor
    shape: tuple[int, int]
    index_GR: Tensor
    mask_GR: Tensor
    last_BR: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls, layout: SequenceLayout, tokens_Md: Tensor, lengths: Sequence[int], immediate: bool, generating: bool
    ) -> Media:
        """Group the text rows of each document by the images they see.

        Args:
            layout: documents of text and images.
            tokens_Md: media tokens of all images, concatenated.
            lengths: how many each image has.
            immediate: text sees only the last image before it; else all before it.
            generating: new text will follow.
        """
        device = tokens_Md.device
        starts = [0, *torch.tensor(list(lengths), dtype=torch.long).cumsum(0).tolist()]
        groups: list[tuple[list[int], list[int]]] = []  # text rows, the images they see
        last: list[list[int]] = []
        row = image = 0
        for document in layout.documents:
            seen: list[int] = []
            for run in document:
                if run.visual:
                    seen = [image] if immediate else [*seen, image]
                    image += 1
                else:
                    if seen and groups and groups[-1][1] == seen:
                        groups[-1][0].extend(range(row, row + run.length))
                    elif seen:
                        groups.append((list(range(row, row + run.length)), seen))
                    row += run.length
            last.append(seen)

        def tokens(images: list[list[int]]) -> tuple[Tensor, Tensor]:
            rows = [
                torch.cat([torch.arange(starts[i], starts[i + 1]) for i in each] or [torch.arange(0)])
                for each in images
            ]
            index = pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 1, dtype=torch.long)
            return upload(index, device), lengths_mask([len(r) for r in rows], index.shape[1], device)

        longest = max((len(rows) for rows, _ in groups), default=1)
        slots = [g * longest + i for g, (rows, _) in enumerate(groups) for i in range(len(rows))]
        flat = [r for rows, _ in groups for r in rows]
        rows_n, slots_n = (upload(torch.tensor(x, dtype=torch.long), device) for x in (flat, slots))
        index_GR, mask_GR = tokens([images for _, images in groups])
        last_BR = tokens(last) if generating else None
        shape = (len(groups), longest)
        return cls(tokens_Md, rows_n, slots_n, shape, index_GR, mask_GR, last_BR)


class GatedBlock(Added):
    """Cross-attention and feed-forward network, each behind a tanh gate that begins at zero."""

    def __init__(self, layer: int, width: int, media_width: int, config: Gated) -> None:
        super().__init__()
        self.layer = layer
        self.attention = CrossAttention(width, media_width, config.heads, config.head_size)
        self.ffn = feed_forward(width)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.ffn_gate = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.attention_gate)
        nn.init.zeros_(self.ffn_gate)

    def forward(self, x_Th: Tensor, x_Vh: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """Update the text rows that have an image before them. Visual rows, of which there are none, are returned as they are."""
        cache = stream.cache
        if cache is not None and self.layer in cache.media:
            k, v, mask = cache.media[self.layer]
            if len(x_Th) > len(k):  # several new tokens in each sequence
                lengths = upload(torch.tensor(stream.layout.text_lengths), x_Th.device)
                k, v, mask = (x.repeat_interleave(lengths, dim=0, output_size=len(x_Th)) for x in (k, v, mask))
            return self._decode(x_Th, k, v, mask), x_Vh
        media: Media = stream.shared
        k_MNH, v_MNH = self.attention.keys_values(media.tokens_Md)
        if cache is not None and media.last_BR is not None:
            index_BR, mask_BR = media.last_BR
            cache.media[self.layer] = k_MNH[index_BR].transpose(1, 2), v_MNH[index_BR].transpose(1, 2), mask_BR
        x_nh = x_Th.index_select(0, media.rows_n)
        q_nNH = self.attention.queries(self.own(x_nh))
        groups, longest = media.shape
        q_GLNH = q_nNH.new_zeros(groups * longest, *q_nNH.shape[1:]).index_copy(0, media.slots_n, q_nNH)
        q_GNLH = torch.unflatten(q_GLNH, 0, media.shape).transpose(1, 2)
        k_GNRH, v_GNRH = (x[media.index_GR].transpose(1, 2) for x in (k_MNH, v_MNH))
        mixed = fused_attention(q_GNLH, k_GNRH, v_GNRH, media.mask_GR[:, None])
        mixed_nw = mixed.transpose(1, 2).flatten(0, 1).index_select(0, media.slots_n).flatten(-2)
        return x_Th.index_copy(0, media.rows_n, self._update(x_nh, mixed_nw).to(x_Th.dtype)), x_Vh

    def _decode(self, x_Bh: Tensor, k_BNRH: Tensor, v_BNRH: Tensor, mask_BR: Tensor) -> Tensor:
        """New text rows, each over the media that its sequence sees; rows of sequences without any are untouched."""
        if not mask_BR.shape[1]:
            return x_Bh
        some_B1 = mask_BR.any(1, keepdim=True)
        sees_B1R = (mask_BR | ~some_B1)[:, None]  # a row that sees nothing would be NaN
        q_BN1H = self.attention.queries(self.own(x_Bh))[:, :, None]
        mixed_Bw = fused_attention(q_BN1H, k_BNRH, v_BNRH, sees_B1R).flatten(1)
        return torch.where(some_B1, self._update(x_Bh, mixed_Bw).to(x_Bh.dtype), x_Bh)

    def _update(self, x_nh: Tensor, mixed_nw: Tensor) -> Tensor:
        x_nh = x_nh + self.attention_gate.tanh() * self.attention.o_proj(mixed_nw)
        return x_nh + self.ffn_gate.tanh() * self.ffn(self.own(x_nh))


register_mechanism("flamingo", Flamingo())
