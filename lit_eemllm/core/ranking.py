"""Progressive dropping of visual tokens (PyramidDrop's ranking, on constant visual states as in ViCA)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import SequenceLayout


def most_attended(
    layout: SequenceLayout,
    q_TNH: Tensor,
    k_RKH: Tensor,
    lengths: list[int],
    kept: list[int],
    scale: float,
    past: Sequence[Tensor] = (),
) -> Tensor:
    """Which visual tokens stay: those that the last text token of their document attends to most, mean over heads.

    Args:
        layout: of the whole stream.
        q_TNH: rotated queries of all text.
        k_RKH: rotated keys of all text, then of the visual tokens that are still seen.
        lengths: visual tokens still seen, of each image.
        kept: how many of them stay, of each image.
        scale: of the scores.
        past: for each document the cached rotated keys of its earlier turns, [L, K, H]; empty without earlier turns.

    Returns:
        indices among the visual keys, ascending.
    """
    groups = q_TNH.shape[1] // k_RKH.shape[1]
    stay, text, image, visual = [], 0, 0, 0
    for number, document in enumerate(layout.documents):
        tokens = sum(run.length for run in document if not run.visual)
        images = range(image, image + sum(run.visual for run in document))
        seen = sum(lengths[i] for i in images)
        if tokens and images:
            start = layout.num_text + visual
            parts = [*past[number : number + 1], k_RKH[text : text + tokens], k_RKH[start : start + seen]]
            keys_LNH = torch.cat([part.float() for part in parts]).repeat_interleave(groups, 1)
            scores_NL = torch.einsum("nh,lnh->nl", q_TNH[text + tokens - 1].float(), keys_LNH) * scale
            importance_V = scores_NL.softmax(-1).mean(0)[len(keys_LNH) - seen :]
        else:
            importance_V = k_RKH.new_zeros(seen, dtype=torch.float32)
        for i, part in zip(images, torch.split(importance_V, [lengths[i] for i in images]), strict=True):
            stay.append(visual + part.topk(kept[i]).indices.sort().values)
            visual += lengths[i]
        text, image = text + tokens, image + len(images)
    return torch.cat(stay)
