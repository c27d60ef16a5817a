"""How much of its attention text pays to visual tokens, layer by layer.

Attention is linear in the values, and a row of its weights sums to 1. So with values that are 1 for visual keys and 0 for text, attention
itself gives the share that visual keys get, by the model's own queries and keys. Windows, tokens that have left and keys that text does not
see are as they are when the model answers, under any backend. What modules between the layers attend to (Flamingo, CASA) is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...attention import AttentionBackend
from ...layout import SequenceLayout, Visibility
from .bench import Bench
from .measure import Row

if TYPE_CHECKING:
    from ...model import EEMLLM


class Watched(AttentionBackend):
    """A backend that also keeps the share of attention that text pays to visual keys.

    Attributes:
        layer: the one that runs; None = attention is not a layer's.
        shares: of each layer, [T, N].
    """

    name = "watched"

    def __init__(self, inner: AttentionBackend) -> None:
        self.inner = inner
        self.layer: int | None = None
        self.shares: dict[int, Tensor] = {}

    def plan(self, layout: SequenceLayout, visibility: Visibility) -> tuple[Any, Tensor, Tensor | slice | None]:
        """The backend's own, the visual keys, and which of the rows that query are text; None = none."""
        text = layout.text_index if visibility.visual_queries else slice(None)
        asks = visibility.text_queries and layout.num_text
        return self.inner.plan(layout, visibility), layout.visual_index, text if asks else None

    def attend(self, q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, plan: Any, scale: float) -> Tensor:
        own, visual_V, text = plan
        if self.layer is not None and text is not None:
            is_visual_SKH = torch.zeros_like(v_SKH).index_fill(0, visual_V, 1)
            self.shares[self.layer] = self.inner.attend(q_QNH, k_SKH, is_visual_SKH, own, scale)[text, :, 0]
        return self.inner.attend(q_QNH, k_SKH, v_SKH, own, scale)

    @contextmanager
    def on(self, model: EEMLLM) -> Iterator[None]:
        """The model's layers watched, and then the model as it was."""
        layers = model.language_model.model.layers
        hooks = [layer.register_forward_pre_hook(self.enters) for layer in layers]
        hooks += [layer.register_forward_hook(self.leaves) for layer in layers]
        model._backend = self
        try:
            yield
        finally:
            model._backend = self.inner
            for hook in hooks:
                hook.remove()

    def enters(self, layer: Any, inputs: Any) -> None:
        self.layer = layer.index

    def leaves(self, layer: Any, inputs: Any, outputs: Any) -> None:
        self.layer = None


@torch.inference_mode()
def attention_to_images(bench: Bench, advance: Callable[[int], None]) -> list[Row]:
    """Of each layer the mean share, and that of each head: of the rows that predict the answers, and of all text after an image.

    Args:
        advance: called with 1 after each pass of a pack.
    """
    model, layers = bench.model, bench.model.language_model.model.layers
    found: dict[str, list[list[Tensor]]] = {rows: [[] for _ in layers] for rows in ("answers", "text")}
    watched = Watched(model.backend)
    with watched.on(model):
        for pack in bench.packs:
            model.packed_logits(pack)
            behind_T = ~pack.layout.prefix()
            for layer, share_TN in watched.shares.items():
                found["answers"][layer].append(share_TN[pack.target_rows].double())
                found["text"][layer].append(share_TN[behind_T].double())
            advance(1)
    rows = []
    for layer in range(bench.depth):
        heads = {name: torch.cat(parts[layer]).mean(0) for name, parts in found.items()}
        means = {name: share_N.mean().item() for name, share_N in heads.items()}
        rows.append({"layer": layer, **means, "heads": {name: share_N.tolist() for name, share_N in heads.items()}})
    return rows
