"""Between the packed stream and transformers' key/value cache, which is left-padded like the ids of `generate`."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from transformers import Cache

from ..layout import Run, SequenceLayout


class PaddedCache:
    """Scatters packed rows into the padded grid of a transformers cache and back, for one forward pass.

    Args:
        cache: the cache to append to.
        ids_BL: the new ids of this pass.
        mask_BL: [B, past + L], 1 where a token is real.
    """

    def __init__(self, cache: Cache, ids_BL: Tensor, mask_BL: Tensor) -> None:
        self.cache = cache
        self.past = mask_BL.shape[1] - ids_BL.shape[1]
        self.shape = ids_BL.shape
        self.slots_S = mask_BL[:, self.past :].flatten().nonzero().flatten()
        columns = torch.arange(mask_BL.shape[1], device=mask_BL.device)
        self.mask_BQL = mask_BL.bool()[:, None] & (columns[None, :] <= columns[self.past :, None])

    def pad(self, x_RNH: Tensor, rows: Tensor | None = None) -> Tensor:
        """Rows of the stream (all, or the given ones) in the grid, [B, N, L, H], zeros elsewhere."""
        slots = self.slots_S if rows is None else self.slots_S[rows]
        grid = x_RNH.new_zeros(self.shape.numel(), *x_RNH.shape[1:]).index_copy(0, slots, x_RNH)
        return grid.unflatten(0, self.shape).transpose(1, 2)

    def unpad(self, x_BNLH: Tensor, rows: Tensor | None = None) -> Tensor:
        """The inverse of `pad`."""
        slots = self.slots_S if rows is None else self.slots_S[rows]
        return x_BNLH.transpose(1, 2).flatten(0, 1)[slots]

    def update(self, k_SKH: Tensor, v_SKH: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append this pass's keys and values; returns all of the layer's, [B, K, past + L, H]."""
        return self.cache.update(self.pad(k_SKH), self.pad(v_SKH), layer)


def layout_of_padded(ids_BL: Tensor, mask_BL: Tensor, image_token_id: int) -> SequenceLayout:
    """The layout of left-padded ids, in which each image is a run of its token repeated.

    Args:
        ids_BL: the new ids.
        mask_BL: [B, past + L]. With a past, positions go on from it and `documents` stays empty: the padded cache
            attends by its mask.
    """
    past = mask_BL.shape[1] - ids_BL.shape[1]
    valid_BL = mask_BL[:, past:].bool()
    visual_BL = ids_BL == image_token_id
    if not past:
        rows = zip(visual_BL.tolist(), valid_BL.tolist(), strict=True)  # lengths are needed on the CPU, once per prompt
        kept = [[visual for visual, valid in zip(*row, strict=True) if valid] for row in rows]
        return SequenceLayout.of([[Run(k, len(list(run))) for k, run in groupby(doc)] for doc in kept]).to(
            ids_BL.device
        )
    visual_S = visual_BL[valid_BL]
    text_index, visual_index = (~visual_S).nonzero().flatten(), visual_S.nonzero().flatten()
    positions = (mask_BL.cumsum(-1) - 1)[:, past:][valid_BL]
    return SequenceLayout((), text_index, visual_index, torch.cat([text_index, visual_index]).argsort(), positions)
