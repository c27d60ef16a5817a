"""Mechanisms, and a plain implementation of any, written from the equations: one document and one dense matrix at a time."""

import itertools
from dataclasses import replace

import pytest
import tiny
import torch

from lit_eemllm.mechanisms import NO_ALIGNER, PRESETS, Aligner, Mechanism
from lit_eemllm.mechanisms.flamingo import Gated

FAMILIES = ["llama-gqa", "olmo2", pytest.param("smollm3", marks=pytest.mark.slow)]  # of each way in which layers differ
SMALL = Gated(every=2, latents=3, heads=2, head_size=8, depth=2)
MECHANISMS = {
    **{name: name if name in tiny.DEEPER else preset.stretched(3) for name, preset in PRESETS.items() if name != "flamingo"},
    "flamingo": replace(PRESETS["flamingo"], gated=SMALL),
    "flamingo raw, all images": replace(PRESETS["flamingo"], gated=replace(SMALL, latents=0, immediate=False, every=1)),
    "ee_mllm_f window": Mechanism(dense_layers=(0,), visual_window=3),
    "window everywhere": Mechanism(visual_window=5),
    "shared positions": Mechanism(visual_positions="shared"),
    "shared positions, dense": Mechanism(dense_layers="all", visual_positions="shared"),
    "unrotated": Mechanism(visual_positions="unrotated"),
    "unrotated, constant": Mechanism(visual_positions="unrotated", aligner=NO_ALIGNER, cross_layers=(0, 2)),
    "vica frozen prefix": Mechanism(cross_layers=(0, 2), aligner=NO_ALIGNER, freeze_prefix=True),
    "frozen prefix, aligned": Mechanism(freeze_prefix=True),
    "frozen prefix, dense": Mechanism(dense_layers=(0, 1), freeze_prefix=True),
    "some cross, aligned": Mechanism(cross_layers=(1, 2), aligner=Aligner()),
    "some dense, some cross": Mechanism(dense_layers=(1,), cross_layers=(1, 2), aligner=Aligner(ffn=False)),
    "text sees every second token": Mechanism(rows=(("1-", (("seen", "every 2"),)),)),
    "dense, text sees every third": Mechanism(dense_layers="all", rows=(("0-1", (("seen", "every 3"),)),)),
    "dense, text blind": Mechanism(dense_layers="all", rows=(("1", (("seen", "none"),)),)),
    "dense without feed-forward": Mechanism(dense_layers="all", rows=(("0", (("update", "value output"),)),)),
    "enter and leave": Mechanism(dense_layers="all", rows=(("0", (("tokens", "none"),)), ("2", (("tokens", "none"),)))),
    "every second token is there": Mechanism(dense_layers=(1,), rows=(("1-", (("tokens", "every 2"),)),)),
    "blind, but updated": Mechanism(rows=(("0", (("seen", "none"),)), ("1", (("tokens", "every 2"), ("seen", "every 3"))))),
    "a window in some": Mechanism(rows=(("1", (("attend", 4), ("tokens", "every 2"))), ("0", (("update", "ffn"),)))),
    "blind at the end": Mechanism(rows=(("1-2", (("seen", "none"),)),)),
}  # fmt: skip


def heads(x, n):
    return x.unflatten(-1, (n, -1)).transpose(-2, -3)


def before(document, row):
    """The runs that begin at or before a row."""
    starts = itertools.accumulate([0, *(run.length for run in document)])
    return [run for start, run in zip(starts, document, strict=False) if start <= row]


def plain_gated(block, x_Lh, document, media, immediate):
    """`T + tanh(a) XA(LN T, M)`, `T + tanh(f) FF(T)`, a text token at a time; untouched before the first image."""
    out, seen = [], None
    for visual, x in zip([run.visual for run in document for _ in range(run.length)], x_Lh, strict=True):
        images = sum(run.visual for run in before(document, len(out)))
        if visual:
            seen = media[images - 1] if immediate else torch.cat(media[:images])
        elif seen is not None:
            a = block.attention
            q = a.q_proj(a.norm(x)).view(a.heads, 1, -1)
            k, v = heads(a.k_proj(seen), a.heads), heads(a.v_proj(seen), a.heads)
            mixed = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
            x = x + torch.tanh(block.attention_gate) * a.o_proj(mixed.flatten())
            x = x + torch.tanh(block.ffn_gate) * block.ffn(x)
        out.append(x)
    return torch.stack(out)


def plain_resampler(resampler, features_Ld):
    x = resampler.latents
    for layer in resampler.layers:
        a = layer.attention
        normed = a.norm(x)
        media = torch.cat([layer.media_norm(features_Ld), normed])
        q, k, v = (heads(p(y), a.heads) for p, y in ((a.q_proj, normed), (a.k_proj, media), (a.v_proj, media)))
        x = x + a.o_proj((torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v).transpose(0, 1).flatten(1))
        x = x + layer.ffn(x)
    return resampler.norm(x)


def overridden(mechanism, number):
    """Columns of a layer by `Mechanism.rows`."""
    found = {}
    for where, columns in mechanism.rows:
        first, _, last = where.partition("-")
        if int(first) <= number <= int(last or (99 if "-" in where else first)):
            found |= dict(columns)
    return found


def chosen(text, document):
    """Which rows of a document a selection holds, of the visual ones; in text form."""
    each = {"all": 1, "none": 10**9}.get(text) or int(text.removeprefix("every "))
    flags = [run.visual and i % each == 0 for run in document for i in range(run.length)]
    return torch.tensor(flags) & (text != "none")


def plain(model, batch, prompt=None):
    """Text logits of the pack from the equations: a document at a time, explicit masks, no shared products.

    With `prompt`, the length of a prompt of one document, visual tokens are dropped by its last token's attention.
    """
    m, decoder = model.mechanism, model.language_model.model
    gated = getattr(m, "gated", None)
    features_Vd = torch.zeros(0, 16) if batch.pixel_values is None else model.image_features(batch.pixel_values)
    logits, row, used = [], 0, 0
    for document in batch.layout.documents:
        visual = [run.visual for run in document for _ in range(run.length)]
        image = [i for i, run in enumerate(document) for _ in range(run.length)]
        is_visual, L = torch.tensor(visual), len(visual)
        Z = features_Vd[used : used + sum(visual)]
        x = decoder.embed_tokens(batch.input_ids[row : row + L])
        row, used = row + L, used + sum(visual)
        if gated is None:
            E = model.projector(Z, 0) if m.visual_source == "layerwise" else model.projector(Z)
            x = x.masked_scatter(is_visual[:, None], E)
        position, positions = 0, []
        for run in document:
            one = run.visual and m.visual_positions in ("shared", "none")
            positions += [position] * run.length if one else range(position, position + run.length)
            position += (m.visual_positions == "shared") if one else run.length
        cos, sin = decoder.rotary_emb(x[None], torch.tensor([positions]))
        media = []
        if gated is not None:
            for run in document:
                if run.visual:
                    part, Z = Z[: run.length], Z[run.length :]
                    media.append(plain_resampler(model.projector, part) if gated.latents else model.projector(part))

        i, j = torch.arange(L)[:, None], torch.arange(L)[None]
        gone = torch.zeros(L, dtype=torch.bool)
        for number, layer in enumerate(decoder.layers):
            columns = overridden(m, number)
            norm1, post1, norm2, post2 = tiny.norms(layer)
            attn, dense = layer.self_attn, columns.get("attend", "causal" if m.is_dense(number) else "none") == "causal"
            window = columns["attend"] if isinstance(columns.get("attend"), int) else m.visual_window
            here = chosen(columns.get("tokens", "all"), document)
            seen = chosen(columns.get("seen", "all" if m.sees_images(number) else "none"), document) & here
            parts = columns.get(
                "update",
                "value output ffn" if dense else [p for p in ("value", "output", "ffn") if getattr(m.aligner, p)],
            )
            if gated is not None and number % gated.every == 0:
                x = plain_gated(model.gated[str(number)], x, document, media, gated.immediate)
            if m.visual_source == "layerwise":
                x = x.masked_scatter(is_visual[:, None], model.projector(Z, number))
            u = norm1(x)
            q, k, qr, kr, v = tiny.projections(layer, u, cos, sin)
            scores = qr @ kr.mT
            if m.visual_positions == "unrotated":
                scores = torch.where(~is_visual[:, None] & is_visual[None], q @ k.mT, scores)
            sees = (i >= j) & ~(is_visual & ~here)[None] | torch.eye(L, dtype=torch.bool)
            sees = sees & ~((is_visual & ~seen)[None] & ~is_visual[:, None])
            if not dense:
                same_image = torch.tensor(image)[:, None] == torch.tensor(image)[None]
                place = (is_visual & here).cumsum(0)  # among the tokens that are here
                near = (i >= j) & (place[:, None] - place[None] <= window) & same_image & here[None] | torch.eye(
                    L, dtype=torch.bool
                )
                sees = torch.where(is_visual[:, None], near, sees)
            if prompt and number in dict(m.visual_drop):
                attention = torch.softmax(
                    (scores[:, prompt - 1] * attn.scaling).masked_fill(gone | (j[0] >= prompt), -torch.inf), -1
                )
                for run in range(len(document)):
                    mine = is_visual & (torch.tensor(image) == run)
                    total = sum(s for n, s in m.visual_drop if n <= number)
                    ranked = attention.mean(0).masked_fill(~mine | gone, torch.inf).argsort()
                    gone[ranked[: int(total * mine.sum() + 1e-9) - int((gone & mine).sum())]] = True
            sees = sees & ~(gone[None] & ~is_visual[:, None])
            weights = torch.softmax((scores * attn.scaling).masked_fill(~sees, -torch.inf), -1)
            mixed = (weights @ v).transpose(0, 1).flatten(1)
            H = x + post1(attn.o_proj(mixed))
            if m.freeze_prefix and any(visual):
                prefix = torch.arange(L) < visual.index(True)
                H = torch.where(prefix[:, None], x, H)
            new = H + post2(layer.mlp(norm2(H)))
            if not dense or "ffn" not in parts:
                if "value" in parts and "output" in parts:
                    aligned = H  # a row that sees itself only, or its window
                elif "value" in parts:
                    aligned = x + post1(v.transpose(0, 1).flatten(1))
                elif "output" in parts:
                    aligned = x + post1(attn.o_proj(u))
                else:
                    aligned = x
                if "ffn" in parts:
                    aligned = aligned + post2(layer.mlp(norm2(aligned)))
                new = torch.where(is_visual[:, None], aligned, new)
            new = torch.where((is_visual & ~here)[:, None], x, new)
            x = new
        logits.append(model.language_model.lm_head(decoder.norm(x))[~is_visual])
    return torch.cat(logits)
