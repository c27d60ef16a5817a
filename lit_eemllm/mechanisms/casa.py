"""CASA (2512.19535, first version): text attends to the last image before it and to the text since, with weights of its own.

The decoder's own attention is over text alone, so that its cache holds no image. Before a layer, text T after an image attends to its
window, which is that image and all text after it up to T::

    T <- T + attention(u_T W_q, u W_k, u W_v) W_o        u = norm(window), u_T = norm(T)
    T <- layer(T), with attention over text alone

Printed: windows that begin where images stand, the text in them, and images that no layer updates. The authors' page tells 6.4 GiB with
weights of their own and 5.7 with the layers', so they stand in every layer. Our reading: blocks come before attention (the paper has
other forms, in its place too), begin as copies of the layer's attention and its norms, and count positions from the start of a window;
the layers count text alone; images side by side are a window each; text with no image before it stays as it was. The second version
drops the text from the windows, which leaves cross-attention to the last image.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.stream import Stream
from ..layout import Run, SequenceLayout, upload, visual_flags
from .base import NO_ALIGNER, Aligner, BlockCost, Layers, Mechanism, register_mechanism
from .connectors import Beside, Sizes


@dataclass(frozen=True)
class Casa(Mechanism):
    """Options: a block stands before layers 0, every, 2 every, ..."""

    cross_layers: Layers = "none"
    aligner: Aligner = NO_ALIGNER
    visual_positions: str = "none"
    every: int = 1

    blocks_name = "casa"
    blocks_begin = "its attention begins as a copy of the layers' own, and must be trained"

    @property
    def weights(self) -> Hashable:
        return type(self).__name__

    def block(self, layer: int, sizes: Sizes) -> nn.Module | None:
        return None if layer % self.every else WindowAttention()

    def block_cost(self, layer: int, sizes: Sizes, text: int, visual: int) -> BlockCost:
        if layer % self.every or not visual:
            return BlockCost()
        h, (w, w_kv) = sizes.hidden, sizes.widths
        query, key = 4 * h * w, 4 * h * w_kv  # a row through W_q and W_o, and through W_k and W_v
        prefill = text * query + (text + visual) * (key + 4 * text * w)
        return BlockCost(prefill, query + key + 4 * (text + 1 + visual) * w, 2 * (text + visual) * w_kv)

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        if self.every < 1:
            return [("options.every", f"found {self.every}, expected 1 or more")]
        return super().problems(num_layers) + self.outside_problems("options", num_layers)


@dataclass(frozen=True)
class Windows:
    """The windows of a pass.

    Attributes:
        stream: of the windows, each a document; None if there are none.
        rows_n: which text rows are in them; None = all.
        seen_n1: which of these have an image before them; None = all.
    """

    stream: Stream | None = None
    rows_n: Tensor | None = None
    seen_n1: Tensor | None = None

    @classmethod
    def of(cls, stream: Stream) -> Windows:
        """Text before the first image is in no window, unless it may go on after an image in the cache."""
        layout, device, cache = stream.layout, stream.layout.positions.device, stream.cache
        held = cache is not None and bool(cache.media)
        if held and layout.num_text == len(layout.documents) == layout.num_tokens:
            # A new token each: nothing to upload.
            row_B = torch.arange(layout.num_tokens, device=device)
            windows = replace(layout, positions=torch.zeros_like(row_B))
            return cls._cached(stream, windows, None, torch.zeros_like(row_B), row_B, torch.zeros_like(row_B), None)
        documents, images, longest = list[list[Run]](), list[int](), 0
        runs = list[tuple[bool, int, int]]()  # is it in a window, images before it or it is one, its document
        for number, document in enumerate(layout.documents):
            images.append(0)
            for place, run in enumerate(document):
                images[-1] += run.visual
                runs.append((held or images[-1] > 0, images[-1], number))
                if run.visual or (held and not place):
                    documents.append([])
                if runs[-1][0]:
                    documents[-1].append(run)
            longest = max(longest, sum(run.length for run in documents[-1]) if images[-1] else 0)
        lengths = torch.tensor([run.length for document in layout.documents for run in document])
        inside_S, image_S, document_S = torch.repeat_interleave(torch.tensor(runs), lengths, dim=0).unbind(1)
        visual_S = visual_flags([run for document in layout.documents for run in document])
        text_R, rows_R = inside_S[~visual_S].nonzero().flatten(), inside_S.nonzero().flatten()
        if not len(rows_R) or (cache is None and not len(text_R)):
            return cls()
        windows = SequenceLayout.of(documents).to(device)
        rows_n = None if len(text_R) == layout.num_text else upload(text_R, device)
        if cache is None:
            return cls(_stream(stream, windows), rows_n)
        row_R = None if len(rows_R) == layout.num_tokens else upload(rows_R, device)
        image_R, document_R = (upload(x[rows_R], device) for x in (image_S, document_S))
        last_B = upload(torch.tensor(images), device)
        found = cls._cached(
            stream, windows, row_R, image_R, document_R, last_B, None if held and not all(images) else longest
        )
        return replace(found, rows_n=rows_n)

    @classmethod
    def _cached(
        cls,
        stream: Stream,
        windows: SequenceLayout,
        row_R: Tensor | None,
        image_R: Tensor,
        document_R: Tensor,
        last_B: Tensor,
        longest: int | None,
    ) -> Windows:
        """When generating; arguments as in `WindowPass`, and the document of each row."""
        assert stream.cached is not None
        cached = stream.cached.windows(row_R, image_R, last_B, longest)
        if not cached.past:
            return cls(_stream(stream, windows, cached))
        goes_on_R = image_R == 0
        positions = windows.positions + goes_on_R * cached.lengths_B[document_R]
        seen_R = ~goes_on_R | (cached.lengths_B > 0)[document_R]
        return cls(
            _stream(stream, replace(windows, positions=positions), cached), None, seen_R[windows.text_index, None]
        )


def _stream(stream: Stream, layout: SequenceLayout, cached: Any = None) -> Stream:
    return replace(stream, layout=layout, cached=cached, _computed={})


class WindowAttention(Beside):
    """Attention over windows, with weights of its own."""

    def forward(self, x_Th: Tensor, x_Vh: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """Update text that has an image before it."""
        windows = stream._once("windows", lambda: Windows.of(stream))
        if windows.stream is None:
            return self._untouched(x_Th, x_Vh), x_Vh
        x_nh = x_Th if windows.rows_n is None else x_Th.index_select(0, windows.rows_n)
        new_nh = self.attention(self.own(x_nh), self.own(x_Vh), windows.stream)[0].to(x_Th.dtype)
        if windows.seen_n1 is not None:
            new_nh = torch.where(windows.seen_n1, new_nh, x_nh)
        return new_nh if windows.rows_n is None else x_Th.index_copy(0, windows.rows_n, new_nh), x_Vh

    def _untouched(self, x_Th: Tensor, x_Vh: Tensor) -> Tensor:
        """The text as it is; but every weight, the connector's too, gets a gradient, of products without rows."""
        if not torch.is_grad_enabled():
            return x_Th
        return torch.cat([x_Th, self.attention.of_no_rows(self.own(x_Vh[:0])).to(x_Th.dtype)])


register_mechanism("casa", Casa())
