"""The decoder: a pretrained causal LM whose layers execute the rows of a mechanism's table on a packed stream.

`adopt_layers` replaces each Hugging Face layer by a `DecoderLayer` that holds the same submodules under the same
names: checkpoints of the base model load unchanged, and because the submodules are *called*, adapters, quantised
linears and hooks keep working. Where a family differs from Llama, `Family` says. Legend of shapes in `lit_eemllm.layout`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layout import Visibility, Window
from .families import FAMILIES, Family, Turns, check_decoder
from .norms import fuse_norms
from .select import ALL, Routed, Top
from .stream import Stream, Tokens, View, joined
from .table import LayerPlan

COPIES = ("norms", "qkv", "output", "ffn")
"""Parts of a layer of which visual rows can have copies of their own. Norms of queries and keys belong to `qkv`."""


class Inner(nn.ModuleDict):
    """Modules that a decoder layer calls itself, by name; as the block before the layer, which they are to the model, they do nothing.

    Args:
        copies: parts of the layer, of `COPIES`, which it calls for text rows, and copies of them for visual rows (`DecoderLayer.adopt`).
        modules: a ``router`` where the layer's tokens are `Routed`: from visual rows [V, h] to scores [V] and weights [V, 1].
    """

    def __init__(self, copies: Collection[str] = (), **modules: nn.Module) -> None:
        super().__init__(modules)
        self.copies = copies

    def forward(self, x_Th: Tensor, x_Vh: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        return x_Th, x_Vh


class DecoderLayer(nn.Module):
    """One layer of a Llama-like decoder on a packed stream, with visual rows treated as its row of the table says.

    Args:
        layer: the transformers layer whose submodules are taken over.
        index: its number, from 0.
        family: how its layers differ from Llama's.
        rotary: how it rotates queries, and keys (RoPE), see `Family.rotary`; None = it does not.
        window: how many tokens before itself a token sees, or of what chunk; None = all. Not of images that see a window of their own (`LayerPlan.attend`).
    """

    self_attn: Any
    row: LayerPlan
    inner: Inner
    """Belongs to the model, not to the decoder."""
    narrow: Mapping[str, nn.Module]
    """What visual rows run through in place of the layer's modules of these names: the same weights in fewer bits."""
    ranks: Top | None
    """The selection that is ranked here, for this layer and later ones or for later ones only; see `Top`."""

    def __init__(self, layer: nn.Module, index: int, family: Family, rotary: Turns, window: Window | None) -> None:
        super().__init__()
        for name, part in layer.named_children():
            self.add_module(name, part)
        self.index, self.family, self.rotary, self.window = index, family, rotary, window
        self.row, self.ranks = LayerPlan(), None
        self.unrotated, self.freeze_prefix, self.narrow = False, False, {}
        self.adopt(Inner())

    def adopt(self, inner: Inner) -> None:
        """Call the modules of `inner`, and make the copies in it that visual rows need here."""
        self.__dict__["inner"] = inner  # no part of the layer's state_dict
        row, norms, fed = self.row, self.family.norms, "ffn" in self.row.update
        q_norm, k_norm = self.family.head_norms
        needed: dict[str, Mapping[Any, bool]] = {
            "norms": {norms.before_attention: row.keys or row.moves, norms.after_attention: row.moves}
            | {norms.before_ffn: fed, norms.after_ffn: fed},
            "qkv": {"q_proj": row.queries, "k_proj": row.keys, "v_proj": row.values}
            | {q_norm: row.queries, k_norm: row.keys},
            "output": {"o_proj": "output" in row.update},
            "ffn": {self.family.ffn: fed},
        }
        for part in inner.copies:
            for name, wanted in needed[part].items():
                module = self._own(name, None) if wanted and name is not None else None
                if module is not None and [*module.parameters()]:
                    inner[name] = deepcopy(module)

    def fill_copies(self) -> None:
        """Give the copies the values of the layer's weights."""
        for name, copy in self.inner.items():
            if (module := self._own(name, None)) is not None:
                copy.load_state_dict(module.state_dict())

    def _own(self, name: str, *default: None) -> Any:
        """A module of the layer or of its attention."""
        family = self.family
        return getattr(self if name == family.ffn or name in family.norms else self.self_attn, name, *default)

    def forward(
        self, x_Th: Tensor, x_Vh: Tensor, stream: Stream, kept: Tokens | None = None
    ) -> tuple[Tensor, Tensor, Tokens | None]:
        """Run text rows and visual rows through the layer.

        With u = norm1(x), text T, the visual tokens I that are here and those of them J that text sees::

            H_T = T + post1(attention(u_T W_q, [u_T; u_J] W_k, [u_T; u_J] W_v) W_o)  T' = H_T + post2(FFN(norm2(H_T)))
            H_I = I + post1(path W_o)                                                I' = H_I + post2(FFN(norm2(H_I)))

        The path of I is its own attention, over [u_T; u_I], perhaps both ways in an image, or a window of u_I, or else u_I W_v. Of W_v, W_o and FFN, I takes
        those that `LayerPlan.update` names, FFN for `LayerPlan.ffn` of them. `Norms` that a family lacks are the identity: in Llama post1 and post2, after the
        blocks; in OLMo 2 norm1 and norm2, before them. With a router's weights w (p-MoD), I' = H_I + w post2(..), and visual
        tokens that are not here become w times themselves. Our reading: post1 normalises whatever is added to I, even if the path
        leaves out W_v or W_o. Where text and images use the same weight, it is one product over the rows of both.

        Args:
            x_Th: the text.
            x_Vh: all visual tokens that have not left; none where their keys are precomputed (`Stream.keys`).
            stream: what all layers share.
            kept: those that have not left; None = all.

        Returns:
            x_Th, x_Vh and kept for the next layer.
        """
        row, attn, text = self.row, self.self_attn, len(x_Th)
        here, stay_v, w_v1 = self._here(stream, kept), None, None
        if row.source == "own" and stream.states is not None:
            x_Vh = stream.states(self.index)
            x_Vh = here.among(x_Vh) if here.alone else x_Vh
        runs = not row.idle and stream.keys is None
        if isinstance(row.tokens, Routed) and (len(x_Vh) or torch.is_grad_enabled()):  # every weight gets a gradient
            here, x_Rh, x_Vh, w_v1 = self._route(row.tokens, x_Th, x_Vh, stream)
        else:
            x_Rh = joined(x_Th, here.of(x_Vh)) if runs else x_Th
        u_Rh, k_RKH = self._norm("before_attention", x_Rh, text), None
        if self.ranks is not None and stream.layout.num_visual:
            if self.ranks.by_encoder:
                stay_v, kept = stream.rank_by_encoder(self.ranks, here)
            else:
                k_RKH = self._project("k", u_Rh, row.keys, stream, here)
                stay_v, kept = self._rank(self.ranks, u_Rh, k_RKH, stream, here)
            if row.tokens == self.ranks:  # they leave now, else after this layer
                here = kept
                if k_RKH is not None:
                    k_RKH = torch.cat([k_RKH[:text], k_RKH[text:].index_select(0, stay_v)])
                if runs:
                    x_Rh, u_Rh = (torch.cat([x[:text], x[text:].index_select(0, stay_v)]) for x in (x_Rh, u_Rh))
                    x_Vh = x_Rh[text:]
                stay_v = None
        whole = stream.view(here, row.tokens) if row.whole and not (self.inner.copies or self.narrow) else None
        if whole is not None:  # every row queries, and all see the same: stream order up to W_o
            u_Rh, k_RKH = whole.of(u_Rh), None if k_RKH is None else whole.of(k_RKH)
        q_RNH = self._heads("q", u_Rh if row.queries else u_Rh[:text], text)
        if k_RKH is None:
            k_RKH = self._project("k", u_Rh, row.keys, stream, here)
        v_RKH = self._project("v", u_Rh, row.values, stream, here)
        q_RNH, k_RKH = self._rotate(q_RNH, k_RKH, stream, here, whole)

        if whole is None:
            out_Rh = self._attend(q_RNH, k_RKH, v_RKH, u_Rh if runs else None, stream, here)
        else:
            mixed_SNH = stream.attend(
                self.index, q_RNH, k_RKH, v_RKH, whole, Visibility(True, self.window), attn.scaling
            )
            out_Sh = attn.o_proj(mixed_SNH.flatten(-2))
            out_Rh = out_Sh if whole.order is None else out_Sh.index_select(0, whole.text_first)
        out_Rh = self._norm("after_attention", out_Rh, text)
        if self.freeze_prefix:
            out_Rh = torch.cat([out_Rh[:text].masked_fill(stream.prefix_T1, 0.0), out_Rh[text:]])
        if not runs or not row.update:
            x_Th = self._feed_forward(x_Th + out_Rh, text)
        else:
            h_Rh = x_Rh + out_Rh if row.moves else torch.cat([x_Th + out_Rh, x_Rh[text:]])
            x_Th, x_vh = self._fed(h_Rh, text, stream, here, w_v1)
            x_Vh = here.put(x_Vh, x_vh)
        return x_Th, x_Vh if stay_v is None or not runs else x_Vh.index_select(0, stay_v), kept

    def images_alone(self, x_Vh: Tensor, stream: Stream) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Run visual rows without text, where they do not depend on it. Returns the rows for the next layer and, if text sees
        any, keys (before rotation) and values of the visual tokens in this layer."""
        row, here = self.row, stream.tokens(self.row.tokens)
        if row.source == "own" and stream.states is not None:
            x_Vh = stream.states(self.index)
        if row.idle:
            return x_Vh, None
        x_vh = here.of(x_Vh)
        u_vh = self._norm("before_attention", x_vh, 0)
        q_vNH, k_vKH, v_vKH = (
            self._heads(kind, u_vh, 0) if wanted else u_vh.new_zeros(0, 1, 1)
            for kind, wanted in (("q", row.queries), ("k", row.keys), ("v", row.values))
        )
        if row.moves:
            of_queries, of_keys = self.rotary if row.queries else (None, None)
            rotated_q, rotated_k = stream.rotated(q_vNH, here, of_queries), stream.rotated(k_vKH, here, of_keys)
            path_vw = self._path(rotated_q, rotated_k, v_vKH, u_vh, stream, here)
            out_vh = self._run("o_proj", path_vw, 0) if "output" in row.update else path_vw
            x_vh = x_vh + self._norm("after_attention", out_vh, 0)
        if row.update:
            x_Vh = here.put(x_Vh, self._fed(x_vh, 0, stream, here)[1] if "ffn" in row.update else x_vh)
        return x_Vh, (k_vKH, v_vKH) if row.keys else None

    def _here(self, stream: Stream, kept: Tokens | None) -> Tokens:
        """The visual tokens that enter the layer."""
        tokens = self.row.tokens
        if not isinstance(tokens, Top) or not stream.layout.num_visual:
            return stream.tokens(tokens)
        return stream.tokens(ALL) if kept is None else kept

    def _route(
        self, routed: Routed, x_Th: Tensor, x_Vh: Tensor, stream: Stream
    ) -> tuple[Tokens, Tensor, Tensor, Tensor]:
        """The visual tokens that the router chooses, the layer's rows, all visual rows times their weights, and the weights of those chosen."""
        scores_V, w_V1 = self.inner["router"](x_Vh)
        here, w_V1 = stream.routed(routed, scores_V.detach()), w_V1.to(x_Vh.dtype)
        return here, torch.cat([x_Th, here.of(x_Vh)]), x_Vh * w_V1, here.among(w_V1)

    def _rank(self, top: Top, u_Rh: Tensor, k_RKH: Tensor, stream: Stream, here: Tokens) -> tuple[Tensor, Tokens]:
        """Rank the visual tokens that are here; see `Stream.rank`. k_RKH: before rotation."""
        rows_n = stream.ranking(top, here).rows_n
        # With gradients, or autocast would keep a copy of the weight that has none, for what comes after.
        q_nNH, k_RKH = self._heads("q", u_Rh.index_select(0, rows_n), len(rows_n)).detach(), k_RKH.detach()
        of_queries, of_keys = self.rotary
        if of_queries is not None:
            cos_R1H, sin_R1H = stream.angles(here, of_queries)
            q_nNH = stream.rotate(q_nNH, (cos_R1H.index_select(0, rows_n), sin_R1H.index_select(0, rows_n)))
        k_RKH = stream.rotated(k_RKH, here, of_keys)
        view = str(self.row.tokens if self.row.dense else self.row.seen)
        return stream.rank(self.index, top, here, q_nNH, k_RKH, self.self_attn.scaling, view, self.window)

    def _run(self, name: str, x_Rw: Tensor, text: int) -> Tensor:
        """A module of the layer over rows of which the first `text` are text; over visual ones its copy, if they have one. Without
        visual rows a copy runs too where gradients are needed: every weight must get one."""
        module, inner = self._own(name), self.inner
        copy = inner[name] if name in inner else self.narrow.get(name)
        if copy is None or (len(x_Rw) == text and not (name in inner and torch.is_grad_enabled())):
            return _rows(module(x_Rw))
        y_Tw = _rows(module(x_Rw[:text]))
        y_vw = _rows(copy(x_Rw[text:].to(next(copy.parameters()).dtype)))  # the decoder may be frozen in 16 bits
        return torch.cat([y_Tw, y_vw.to(y_Tw.dtype)])

    def _norm(self, place: str, x_Rh: Tensor, text: int) -> Tensor:
        """Apply the family's norm at a place, a field of `Norms`; the identity if it has none."""
        name = getattr(self.family.norms, place)
        return x_Rh if name is None else self._run(name, x_Rh, text)

    def _heads(self, kind: str, u_Rh: Tensor, text: int) -> Tensor:
        """Queries, keys or values (q, k, v) by head, before rotation; q and k are normalised as `Family.qk_norm` says."""
        family, attn = self.family, self.self_attn
        norm = "" if kind == "v" else family.head_norms[kind == "k"]
        over = family.qk_norm if norm and hasattr(attn, norm) else None
        x_Rw = self._run(f"{kind}_proj", u_Rh, text)
        x_RNH = torch.unflatten(self._run(norm, x_Rw, text) if over == "width" else x_Rw, -1, (-1, attn.head_dim))
        if over == "head":
            x_RNH = self._run(norm, x_RNH, text)
        if norm and family.interleaved:  # scores do not depend on the order within a head
            x_RNH = torch.unflatten(x_RNH, -1, (-1, 2)).mT.flatten(-2)
        return x_RNH

    def _project(self, kind: str, u_Rh: Tensor, visual: bool, stream: Stream, here: Tokens) -> Tensor:
        """Keys or values (k, v), before rotation: of all rows if visual ones are wanted, else of the text. Those of visual tokens may be
        precomputed."""
        text = stream.layout.num_text
        x_RKH = self._heads(kind, u_Rh if visual else u_Rh[:text], text)
        if stream.keys is None or not self.row.keys:
            return x_RKH
        pair = stream.keys[self.index]
        assert pair is not None
        x_vKH = pair[kind == "v"]
        return torch.cat([x_RKH, here.among(x_vKH) if here.alone else x_vKH])

    def _rotate(
        self, q_RNH: Tensor, k_RKH: Tensor, stream: Stream, here: Tokens, whole: View | None
    ) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys. If text scores visual keys unrotated, both forms are put side by side, in twice the head size:
        a text key is [rotated; 0], a visual key [0; unrotated], a query [rotated; unrotated]."""
        of_queries, of_keys = self.rotary
        rotated_q = stream.rotated(q_RNH, here, of_queries, whole)
        rotated_k = stream.rotated(k_RKH, here, of_keys, whole)
        if not self.unrotated:
            return rotated_q, rotated_k
        images_R = torch.arange(len(k_RKH), device=k_RKH.device) >= stream.layout.num_text
        none = torch.zeros_like(k_RKH)
        both = torch.cat([none, k_RKH], -1), torch.cat([rotated_k, none], -1)
        q_RNH = rotated_q if of_keys is None else q_RNH  # it may grow with its position
        return torch.cat([rotated_q, q_RNH], -1), torch.where(images_R[:, None, None], *both)

    def _feed_forward(self, h_Rh: Tensor, text: int, w_R1: Tensor | None = None) -> Tensor:
        out_Rh = self._run(self.family.ffn, self._norm("before_ffn", h_Rh, text), text)
        out_Rh = self._norm("after_ffn", out_Rh, text)
        return h_Rh + (out_Rh if w_R1 is None else w_R1 * out_Rh)

    def _fed(
        self, h_Rh: Tensor, text: int, stream: Stream, here: Tokens, w_v1: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Text after the feed-forward network, and visual rows, of which it updates those that the row of the table says."""
        row = self.row
        if "ffn" not in row.update:
            return self._feed_forward(h_Rh[:text], text), h_Rh[text:]
        if row.ffn == ALL or len(h_Rh) == text:
            w_R1 = None if w_v1 is None else torch.cat([w_v1.new_ones(text, 1), w_v1])
            x_Rh = self._feed_forward(h_Rh, text, w_R1)
        else:
            rows_R = stream.rows(here, row.ffn)
            x_Rh = h_Rh.index_copy(0, rows_R, self._feed_forward(h_Rh.index_select(0, rows_R), text))
        return x_Rh[:text], x_Rh[text:]

    def _attend(
        self, q_RNH: Tensor, k_RKH: Tensor, v_RKH: Tensor, u_Rh: Tensor | None, stream: Stream, here: Tokens
    ) -> Tensor:
        """Attention and W_o: [T, h] for the text alone, or [R, h] for all rows where `LayerPlan.moves`."""
        row, scale, text = self.row, self.self_attn.scaling, stream.layout.num_text
        if row.whole:  # as in `forward`, but of queries, keys and values that are in the order of the rows
            view = stream.view(here, row.tokens)
            q_SNH, k_SKH, v_SKH = view.of(q_RNH), view.of(k_RKH), view.of(v_RKH)
            mixed_RNH = stream.attend(self.index, q_SNH, k_SKH, v_SKH, view, Visibility(True, self.window), scale)
            mixed_RNH = mixed_RNH if view.order is None else mixed_RNH.index_select(0, view.text_first)
        elif row.dense:
            alone = Visibility(True, self.window, text_queries=False, both_ways=row.attend == "image")
            mixed_RNH = stream.attend_apart(self.index, q_RNH, k_RKH, v_RKH, here, row.seen, alone, scale)
        if row.dense:
            return self._run("o_proj", mixed_RNH.flatten(-2), text)
        view = stream.view(here, row.seen)
        k_SKH, v_SKH = view.of(k_RKH), view.of(v_RKH)
        mixed_TNH = stream.attend(self.index, q_RNH[:text], k_SKH, v_SKH, view, Visibility(False, self.window), scale)
        mixed_Tw = mixed_TNH.flatten(-2)
        if u_Rh is None or not row.moves:
            return self._run("o_proj", mixed_Tw, text)
        if row.repeats and view.order is not None and not torch.is_grad_enabled():
            # `view.of` has copied the values, so those of the text give room to what attention made of them: no row is moved
            mixed_Rw = self._repeated(v_RKH)
            mixed_Rw[:text] = mixed_Tw
            return self._run("o_proj", mixed_Rw, text)
        path_vw = self._path(q_RNH[text:], k_RKH[text:], v_RKH[text:], u_Rh[text:], stream, here).to(mixed_Tw.dtype)
        if "output" in row.update:
            return self._run("o_proj", torch.cat([mixed_Tw, path_vw]), text)
        return torch.cat([self._run("o_proj", mixed_Tw, text), path_vw])

    def _path(self, q_vNH: Tensor, k_vKH: Tensor, v_vKH: Tensor, u_vh: Tensor, stream: Stream, here: Tokens) -> Tensor:
        """What W_o takes of visual tokens that see no text, [v, w]: attention in a window of their image, or the aligner's u W_v or u."""
        row = self.row
        if row.queries and stream.layout.num_visual:
            view, kind = stream.images(here), Visibility(True, window=int(row.attend))
            return stream.attend(self.index, q_vNH, k_vKH, v_vKH, view, kind, self.self_attn.scaling).flatten(-2)
        return self._repeated(v_vKH) if "value" in row.update else u_vh

    def _repeated(self, v_vKH: Tensor) -> Tensor:
        """Values repeated for every query head, [v, w]: with grouped queries several heads share one; else they are not copied."""
        heads = self.self_attn.config.num_attention_heads // v_vKH.shape[1]
        return (v_vKH if heads == 1 else v_vKH.repeat_interleave(heads, dim=1)).flatten(-2)


def _rows(made: Any) -> Tensor:
    """What a module makes of rows. Experts say how they were chosen, too."""
    rows: Tensor = made[0] if isinstance(made, tuple) else made
    return rows


def adopt_layers(decoder: PreTrainedModel) -> None:
    """Replace the layers of a causal LM by `DecoderLayer`s, in place. Raises ConfigError for an unsupported decoder."""
    check_decoder(decoder.config)
    family, config = FAMILIES[decoder.config.model_type], decoder.config
    rotary, windows = family.rotary(config), family.windows(config)
    parts = enumerate(zip(decoder.model.layers, rotary, windows, strict=True))
    layers = (DecoderLayer(part, i, family, kind, window) for i, (part, kind, window) in parts)
    decoder.model.layers = nn.ModuleList(layers)
    fuse_norms(decoder)
