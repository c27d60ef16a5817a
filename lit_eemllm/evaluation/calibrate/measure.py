"""How far the output of a model goes from its own under other mechanisms; and ViCA's cosine similarity in each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div
from torch.utils.hooks import RemovableHandle

from ...core.decoder import DecoderLayer
from ...mechanisms import Mechanism
from .bench import Bench

Row = dict[str, Any]
"""A row of a file of numbers: `Divergence.row` with the prefill FLOPs, and what was changed."""


class Divergence:
    """How far one output distribution Q is from another P: means over the supervised positions of all packs."""

    def __init__(self) -> None:
        self.kl_sum, self.same, self.count = 0.0, 0, 0

    def update(self, p_nv: Tensor, q_nv: Tensor) -> None:
        """Logits of both. In float64, or the rounding of equal ones would look like a difference."""
        for p, q in zip(p_nv.split(256), q_nv.split(256), strict=True):
            log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
            self.kl_sum += kl_div(log_q, log_p, reduction="sum", log_target=True).item()
            self.same += int((p.argmax(-1) == q.argmax(-1)).sum())
        self.count += len(p_nv)

    def row(self) -> Row:
        """KL(P || Q) in nats, and the share of positions at which both find the same token most likely."""
        return {"kl": self.kl_sum / self.count, "same_top": self.same / self.count}


@torch.inference_mode()
def compared(bench: Bench, mechanisms: Sequence[Mechanism], advance: Callable[[int], None]) -> list[Row]:
    """The model under each mechanism beside itself as it is: FLOPs, and `Divergence.row`. The model is left as it was.

    Args:
        advance: called with 1 after each pass of a pack under one of the mechanisms.
    """
    found = [Divergence() for _ in mechanisms]
    for pack in bench.packs:
        own_nv = bench.model.packed_logits(pack)
        for mechanism, divergence in zip(mechanisms, found, strict=True):
            with bench.under(mechanism):
                divergence.update(own_nv, bench.model.packed_logits(pack))
            advance(1)
    return [
        {"flops": bench.flops(mechanism), **divergence.row()}
        for mechanism, divergence in zip(mechanisms, found, strict=True)
    ]


@torch.inference_mode()
def cosines(bench: Bench) -> list[float]:
    """Mean `text_to_image_cosine` of each layer in the dense model."""
    decoder = bench.model.language_model.model.layers
    found: list[list[Tensor]] = [[] for _ in decoder]

    def record(layer: DecoderLayer, args: tuple[Any, ...]) -> None:
        found[layer.index].append(text_to_image_cosine(layer, args))

    hooks = [layer.register_forward_pre_hook(record) for layer in decoder]
    try:
        for pack in bench.packs:
            bench.model.packed_logits(pack)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(parts).mean().item() for parts in found]


def text_to_image_cosine(layer: DecoderLayer, args: tuple[Any, ...]) -> Tensor:
    """Similarity of each text state that comes after an image before and after the layer's text-to-image part.

    Softmax weights do not depend on the values. So with the values of all text set to zero, attention gives what the visual
    tokens contribute to the joint softmax, on any backend.
    """
    x_Th, _, stream, _ = args
    attn: Any = layer.self_attn
    # a layer in which all rows query is in stream order from the norm to W_o
    text_T = stream.layout.text_index if layer.row.whole else torch.arange(len(x_Th), device=x_Th.device)

    def mixed(*hooks: RemovableHandle) -> Tensor:
        """What W_o takes of text under these hooks, [T, w]."""
        taken: list[Tensor] = []
        watch = attn.o_proj.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
        try:
            layer.forward(*args)
        finally:
            for hook in (*hooks, watch):
                hook.remove()
        return taken[0][text_T]

    mixed_Tw = mixed(attn.v_proj.register_forward_hook(lambda module, inputs, v_Rw: v_Rw.index_fill(0, text_T, 0)))
    part_Th = attn.o_proj(mixed_Tw) - attn.o_proj(torch.zeros_like(mixed_Tw[:1]))  # without a bias
    if name := layer.family.norms.after_attention:
        share_T1 = part_Th.norm(dim=-1, keepdim=True) / attn.o_proj(mixed()).norm(dim=-1, keepdim=True)
        part_Th = getattr(layer, name)(part_Th) * share_T1
    before_Th = x_Th.double()  # most are all but 1
    return cosine_similarity(before_Th, before_Th + part_Th, dim=-1)[~stream.layout.prefix()]
