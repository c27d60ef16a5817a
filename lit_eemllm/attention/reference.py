"""The law: dense attention in float32 under the layout's boolean mask. Slow, quadratic in the pack, and obvious."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import SequenceLayout, Visibility
from .base import AttentionBackend, register_backend


@register_backend("reference")
class Reference(AttentionBackend):
    """Softmax over an explicit [Q, S] mask, in float32, or in float64 of such an input."""

    priority = -100

    def plan(self, layout: SequenceLayout, visibility: Visibility) -> Tensor:
        return layout.mask(visibility)

    def attend(self, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, plan: Tensor, scale: float) -> Tensor:
        q_1NQH, k_1KSH, v_1KSH = (x.transpose(0, 1)[None] for x in (q_QNH, k_SKH, v_SKH))
        return self.attend_cached(q_1NQH, k_1KSH, v_1KSH, plan[None], scale)[0].transpose(0, 1)

    def attend_cached(self, q_BNQH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, mask_BQL: Tensor, scale: float) -> Tensor:
        with torch.autocast(q_BNQH.device.type, enabled=False):  # float32 means float32
            wide = torch.promote_types(q_BNQH.dtype, torch.float32)
            groups = q_BNQH.shape[1] // k_BKLH.shape[1]
            k_BNLH, v_BNLH = (x.to(wide).repeat_interleave(groups, dim=1) for x in (k_BKLH, v_BKLH))
            scores_BNQL = torch.einsum("bnqh,bnlh->bnql", q_BNQH.to(wide), k_BNLH) * scale
            weights_BNQL = scores_BNQL.masked_fill(~mask_BQL[:, None], float("-inf")).softmax(dim=-1)
            return torch.einsum("bnql,bnlh->bnqh", weights_BNQL, v_BNLH).to(q_BNQH.dtype)
