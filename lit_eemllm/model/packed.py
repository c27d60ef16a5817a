"""Packs on their way through the model: images to features to visual rows, rows through the layers, logits, loss.

Legend of shapes in `lit_eemllm.layout`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.checkpoint import checkpoint

from ..attention import without_cudnn
from ..compat.torch import changes
from ..core.families import TEMPERED
from ..core.select import Routed, Top
from ..core.stream import Stream, Tokens, VisualKeys
from ..core.table import by_encoder
from ..inputs.reduction import EACH, Grids
from ..layout import PackedBatch, Pixels, Run, SequenceLayout, map_images, upload
from ..mechanisms import Features
from .cache import CachedPass, continue_positions
from .parts import ModelParts
from .pretrained import rotary

LOGITS = 1 << 25
"""Most logits that the loss holds at a time on a GPU: with what is computed of them 12 bytes each, 0.4 GB."""


class Packed(ModelParts):
    """Reads packs, which have no padding."""

    def image_features(self, pixels: Pixels) -> Tensor:
        """The encoder's features of all images, concatenated, [features, d]; of an image cut into tiles, those of all its tiles."""
        return self._encoded(pixels).to(next(self.projector.parameters()).dtype).flatten(0, -2)

    def ranked_features(self, pixels: Pixels) -> tuple[Tensor, Tensor | None]:
        """As `image_features`, and if a layer ranks by it the importance of each feature to the encoder."""
        if not by_encoder(self.table):
            return self.image_features(pixels), None
        features, importance = self._encoded(pixels, importance=True)
        return features.to(next(self.projector.parameters()).dtype).flatten(0, -2), importance.float().flatten()

    def _encoded(self, pixels: Pixels, **options: Any) -> Any:
        if self.mechanism.encoder_depths:
            options["depths"] = self.mechanism.encoder_depths
        dtype = next(self.vision.parameters()).dtype
        grad = torch.is_grad_enabled() and any(p.requires_grad for p in self.vision.parameters())
        with torch.set_grad_enabled(grad), without_cudnn():
            return self.vision(map_images(self.vision.transform.views(pixels), lambda x: x.to(dtype)), **options)

    def _text_states(
        self,
        input_ids: Tensor,
        pixels: Pixels | None,
        layout: SequenceLayout,
        cached: CachedPass | None = None,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> Tensor:
        """From ids [S], not read in visual rows, to the last hidden states of the text after the final norm, [T, h]."""
        decoder = self.language_model.model
        layout, images_take = self._placed(layout, pixels, sizes)
        if cached is not None and cached.cache is not None:
            layout = continue_positions(layout, cached.cache, images_take)

        x_Th = decoder.embed_tokens(input_ids[layout.text_index])
        stream = self._stream(x_Th, layout, cached)
        if pixels is not None and self.image_cache is not None and self._images_are_independent:
            keys = self.image_cache.keys(pixels, self.image_keys, self._stamp(), sizes)
            return self._run_layers(x_Th, x_Th[:0], replace(stream, keys=keys))
        if pixels is None and cached is not None and cached.past:  # the cache has what text sees of images
            return self._run_layers(x_Th, x_Th[:0], stream)
        features = self._features(pixels, sizes, layout)
        stream = replace(stream, importance_V=features.importance_V)
        return self._run_layers(x_Th, *self.mechanism.enter(self.projector, features, x_Th, stream))

    def _placed(
        self, layout: SequenceLayout, pixels: Pixels | None, sizes: Sequence[tuple[int, int]]
    ) -> tuple[SequenceLayout, list[int] | None]:
        """The layout with the positions that images have here, and how many each takes; None = one for each token."""
        image_takes = {"shared": 1, "none": 0}.get(self.mechanism.visual_positions)
        if image_takes is not None:
            return layout.with_image_positions(image_takes), [image_takes] * len(layout.image_lengths)
        if self.image_rotary is None or pixels is None:
            return layout, None
        transform = self.vision.transform
        found = transform.view_grids([(1, 1)] * len(pixels) if transform.fixed else sizes)
        grids = [transform.reduction.grid(*grid) for grid in found]
        return layout.with_grid_positions(grids), [max(grid) for grid in grids]

    def _stream(self, x_Th: Tensor, layout: SequenceLayout, cached: CachedPass | None = None) -> Stream:
        angles = rotary(self.language_model, x_Th, self.image_rotary)
        return Stream(layout, angles, self.backend, cached=cached, rotate=self._rotate)

    def _run_layers(self, x_Th: Tensor, x_Vh: Tensor, stream: Stream) -> Tensor:
        decoder = self.language_model.model
        again, kept = self.activation_checkpointing and torch.is_grad_enabled(), None
        none_0h = x_Th.new_zeros(0, x_Th.shape[1])
        # seen by `checkpoint`, which saves inputs alone; what a layer saves when it is computed again stays on the device
        place = (
            torch.autograd.graph.save_on_cpu(pin_memory=x_Th.is_cuda)
            if again and self.activation_offload
            else nullcontext()
        )
        with place:
            for layer in decoder.layers:
                if layer.row.source == "own":  # else it would be kept with the layer's input
                    x_Vh = none_0h
                if again:
                    x_Th, x_Vh, kept = checkpoint(self.run_layer, layer, x_Th, x_Vh, stream, kept, use_reentrant=False)
                else:
                    x_Th, x_Vh, kept = self.run_layer(layer, x_Th, x_Vh, stream, kept)
        return decoder.norm(x_Th)

    def run_layer(
        self, layer: nn.Module, x_Th: Tensor, x_Vh: Tensor, stream: Stream, kept: Tokens | None = None
    ) -> tuple[Tensor, Tensor, Tokens | None]:
        """A layer after the block that the mechanism adds before it, if there is one: what checkpointing computes again."""
        if str(layer.index) in self.blocks:
            x_Th, x_Vh = self.blocks[str(layer.index)](x_Th, x_Vh, stream)
        x_Th, x_Vh, kept = layer(x_Th, x_Vh, stream, kept)
        return x_Th, stream.with_added(layer.index, x_Vh, kept), kept

    @property
    def _images_are_independent(self) -> bool:
        """Whether visual states do not depend on text, so that keys of images can be reused."""
        if self.mechanism.no_later_images or torch.is_grad_enabled() or by_encoder(self.table):
            return False  # the keys of an image do not say how important its tokens are
        if all(row.blind for row in self.table):
            return False  # only blocks see images
        layers = zip(self.table, self.language_model.model.layers, strict=True)
        return not any(
            row.dense
            or isinstance(row.tokens, Routed)
            or (row.queries and (isinstance(row.tokens, Top) or layer.rotary[0] == TEMPERED))
            for row, layer in layers
        )

    def _stamp(self) -> Hashable:
        """A value that changes with the weights, their dtype or device, and with autocast."""
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return autocast, tuple((p.data_ptr(), changes(p), p.dtype, str(p.device)) for p in self.parameters())

    def _image_runs(self, pixels: Pixels, sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Visual tokens of each run of each image."""
        transform = self.vision.transform
        if transform.fixed:
            return [transform.runs(pixels[0].shape[-1], pixels[0].shape[-2])] * len(pixels)
        if len(sizes) != len(pixels):
            raise ValueError(
                f"image_sizes: found {len(sizes)} for {len(pixels)} images, expected (width, height) of each"
            )
        return [transform.runs(*size) for size in sizes]

    def image_keys(self, pixels: Pixels, sizes: Sequence[tuple[int, int]] = ()) -> list[VisualKeys]:
        """Keys, before rotation, and values of each image by itself in every layer in which text sees it.

        Only for mechanisms in which visual states do not depend on the text.
        """
        runs = self._image_runs(pixels, sizes)
        layout = SequenceLayout.of([[Run(True, tokens) for tokens in image] for image in runs]).to(self.device)
        layout, _ = self._placed(layout, pixels, sizes)
        none_0h = self.get_input_embeddings()(layout.text_index)
        stream = self._stream(none_0h, layout)
        x_Vh, stream = self.mechanism.enter(self.projector, self._features(pixels, sizes, layout), none_0h, stream)
        images: list[VisualKeys] = [[] for _ in runs]
        for layer in self.language_model.model.layers:
            if str(layer.index) in self.blocks:
                _, x_Vh = self.blocks[str(layer.index)](none_0h, x_Vh, stream)
            x_Vh, pair = layer.images_alone(x_Vh, stream)
            x_Vh = stream.with_added(layer.index, x_Vh)
            left = iter(stream.tokens(layer.row.tokens).lengths)
            of_each = [sum(islice(left, len(image))) for image in runs]
            parts = None if pair is None else zip(*(x.split(of_each) for x in pair), strict=True)
            for image in images:  # copies: a view would keep the others' alive
                image.append(None if parts is None else tuple(x.clone() for x in next(parts)))
        return images

    def _features(self, pixels: Pixels | None, sizes: Sequence[tuple[int, int]], layout: SequenceLayout) -> Features:
        """The input of the connector: features of the images, in which grids they lie, and which tokens that it makes of them go on.

        A pack without images gives no rows, but they go through the connector: every weight must get a gradient.
        """
        transform, images = self.vision.transform, 0 if pixels is None else len(pixels)
        order = transform.order(sizes)
        grids: Grids = ()
        importance: Tensor | None = None
        if pixels is None:
            features = next(self.projector.parameters()).new_zeros(
                0, self.vision.hidden_size * (1 + len(self.mechanism.encoder_depths))
            )
        else:
            pixels = map_images(pixels, lambda x: upload(x, layout.positions.device))
            features, importance = self.ranked_features(pixels)
        read = made = len(features)
        if transform.reduction.by_place:
            grids = transform.view_grids([(1, 1)] * images if transform.fixed else sizes)
            read, made = EACH.count(grids), transform.reduction.count(grids)
        tokens, rows = (made, made) if order is None else (len(order.index_V), order.rows)
        fit = (read, rows) == (len(features), made)
        if tokens != layout.num_visual or not fit:
            text = f"{images} images give {tokens} visual tokens, but the layout holds {layout.num_visual}"
            raise ValueError(text if fit else f"{text}; image_sizes are of images of other shapes")
        order = None if order is None else order.to(features.device)
        if importance is not None:
            importance = self.connector.importance(importance, grids)
            if order is not None:  # a newline, which is no feature, leaves first
                importance = order.of(torch.cat([importance, importance.new_full((1,), -1.0)]))
        return Features(features, order, grids, importance)

    # FSDP2 wraps `packed_logits`, `packed_loss` and `packed_loss_and_kl` (`fsdp2.shard`), so none calls another.
    def _supervised_states(self, batch: PackedBatch) -> Tensor:
        """The last hidden states at the supervised positions, [n, h]."""
        text_Th = self._text_states(batch.input_ids, batch.pixel_values, batch.layout, sizes=batch.image_sizes)
        return text_Th[batch.target_rows]

    def packed_logits(self, batch: PackedBatch) -> Tensor:
        """Logits at the supervised positions only, [n, vocabulary]."""
        return self.language_model.lm_head(self._supervised_states(batch))

    def packed_loss(self, batch: PackedBatch) -> Tensor:
        """Cross-entropy summed over the supervised tokens of the pack, a float32 scalar."""
        return self.loss_of(self._supervised_states(batch), batch.targets)

    def loss_of(self, x_nh: Tensor, targets_n: Tensor) -> Tensor:
        """The same from last hidden states."""
        head = self.language_model.lm_head
        if self._fused_loss is not None and len(targets_n):  # it divides by their number
            return self._fused_loss(head.weight, x_nh, targets_n, head.bias)
        return summed_loss(head, x_nh, targets_n, self.loss_rows if x_nh.is_cuda else None)

    @property
    def loss_rows(self) -> int:
        """Supervised tokens whose logits `packed_loss` holds at a time on a GPU; on a CPU it is all."""
        return max(1, LOGITS // self.config.text_config.vocab_size)

    def packed_loss_and_kl(self, batch: PackedBatch, teacher_nv: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """As `packed_loss`, but never fused, and `divergence` from the logits of a teacher."""
        logits_nv = self.language_model.lm_head(self._supervised_states(batch)).float()
        kl = divergence(teacher_nv, logits_nv, temperature)  # first: it takes most, while the other is not there yet
        return cross_entropy(logits_nv, batch.targets, reduction="sum"), kl


def summed_loss(head: nn.Module, x_nh: Tensor, targets_n: Tensor, rows: int | None) -> Tensor:
    """Cross-entropy summed over all n, in float32, from last hidden states; the logits of so many rows at a time are computed, and for
    the backward pass again, for the head's FLOPs once more. rows: None = all, and not again."""

    def of(x_mh: Tensor, targets_m: Tensor) -> Tensor:
        return cross_entropy(head(x_mh).float(), targets_m, reduction="sum")

    if rows is None or len(x_nh) <= rows:
        return of(x_nh, targets_n)
    parts = zip(x_nh.split(rows), targets_n.split(rows), strict=True)
    return torch.stack([checkpoint(of, *part, use_reentrant=False) for part in parts]).sum()


def divergence(teacher_nv: Tensor, student_nv: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student), summed over n positions, in nats: with p = softmax(logits / t) the sum of p_teacher (log p_teacher -
    log p_student), times t squared, so that its gradient is not the smaller for a larger t (Hinton et al., 1503.02531)."""
    log_p_nv, log_q_nv = ((x.float() / temperature).log_softmax(-1) for x in (teacher_nv, student_nv))
    return temperature**2 * kl_div(log_q_nv, log_p_nv, reduction="sum", log_target=True)
