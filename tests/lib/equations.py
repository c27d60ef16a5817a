"""Mechanisms, and a plain implementation of any, written from the equations: one document and one dense matrix at a time."""

import copy
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch

from lib.connectors import plain_tokens
from lit_eemllm.mechanisms import NO_ALIGNER, PRESETS, Aligner, Mechanism
from lit_eemllm.mechanisms.flamingo import Gated

FAMILIES = [
    "llama-gqa",
    "olmo2",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("smollm3", "gemma3_text", "llama4_text")),
]  # of each way in which layers differ
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
    "casa, every second": replace(PRESETS["casa"], every=2),
    "deepstack, other layers": replace(PRESETS["deepstack"], layers=(0, 2), depths=(1.0, 0.0)),
    "deepstack of aligned states": replace(PRESETS["deepstack"].stretched(3), dense_layers="none"),
    "blind at the end": Mechanism(rows=(("1-2", (("seen", "none"),)),)),
    "p_mod, all routed": replace(PRESETS["p_mod"], average=0.3),
    "p_mod, aligned": replace(PRESETS["p_mod"], average=0.3, dense_layers="none"),
    "p_mod, both ways": replace(PRESETS["p_mod"], rows=(("1", (("attend", "image"),)),)),
    "experts of all parts": replace(PRESETS["visual_experts"], parts="norms qkv output ffn"),
    "experts, aligned, from 1 on": replace(PRESETS["visual_experts"], dense_layers="none", parts="norms qkv output ffn", first=1),
    "experts, here and there": replace(
        PRESETS["visual_experts"], dense_layers=(1,), parts="output norms", rows=(("0", (("update", "ffn"), ("ffn", "every 2"))),)
    ),
}  # fmt: skip

DEEP = 8
DROPPING = {
    **{name: PRESETS[name].stretched(DEEP) for name in ("fastv", "pyramid_drop", "hidrop", "visipruner", "visionzip")},
    "of aligned states": Mechanism(visual_drop=((0, 0.25), (3, 0.5))),
    "of windows": Mechanism(visual_window=3, visual_drop=((2, 0.5),)),
    "of constant states, here and there": Mechanism(
        cross_layers=(1, 4, 6), aligner=NO_ALIGNER, visual_drop=((4, 0.5),)
    ),
    "thrice": Mechanism(aligner=NO_ALIGNER, visual_drop=((0, 0.25), (1, 0.25), (2, 0.3))),
    "both ways": replace(PRESETS["bidirectional"], visual_drop=((2, 0.5),)),
    "of experts": replace(PRESETS["visual_experts"], parts="qkv norms", visual_drop=((2, 0.5), (4, 0.25))),
    "of a layer's own": replace(PRESETS["saisa"], visual_drop=((3, 0.7),)),
    "by the encoder": replace(PRESETS["visionzip"], drop=0.5),
    "by the encoder, of aligned states": replace(PRESETS["visionzip"], drop=0.5, dense_layers="none"),
    "by the encoder, of a layer's own": replace(
        PRESETS["visionzip"], drop=0.3, dense_layers="none", visual_source="layerwise", aligner=NO_ALIGNER
    ),
}
"""Mechanisms of `DEEP` layers in which visual tokens are ranked."""
RANKED = {name for name in PRESETS if name in DROPPING and name != "visionzip"}
"""Presets in which text ranks them, so that what is asked matters."""


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


def plain_casa(block, x_Lh, document, decoder, number):
    """`T + XA(T, W)` over T's window W: the last image before it and all that follows, at positions from 0; else T."""
    none = torch.nn.Identity()
    norm1, post1 = getattr(block, "input_layernorm", none), getattr(block, "post_attention_layernorm", none)
    out, starts = [], itertools.accumulate([0, *(run.length for run in document)])
    starts = [start for start, run in zip(starts, document, strict=False) if run.visual]
    visual = [run.visual for run in document for _ in range(run.length)]
    for row, x in enumerate(x_Lh):
        first = max((start for start in starts if start <= row), default=None)
        if not visual[row] and first is not None:
            u = norm1(x_Lh[first : row + 1])
            places = torch.arange(len(u))
            _, _, q, k, v = tiny.projections(block, u, *tiny.angles(decoder, places, number))
            scores = (q[:, -1:] @ k.mT) * block.self_attn.scaling
            weights = torch.softmax(scores.masked_fill(~tiny.near(decoder, places, number)[-1], -torch.inf), -1)
            x = x + post1(block.self_attn.o_proj((weights @ v).flatten()))
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


def connected(model, Z, layer=None):
    """Visual tokens of features of whole images, each a grid of 4 x 4."""
    module = model.projector if layer is None else layer
    if isinstance(layer, int):
        module = model.projector.layers[layer]
    images = Z.view(-1, 4, 4, Z.shape[-1])
    return torch.cat([plain_tokens(model.connector, module, image) for image in images] or [module(Z)])


def drops(m):
    """Layer, whether before or after it, share of the original tokens that is gone then, and whose attention ranks."""
    found = [(n, "before", sum(s for k, s in m.visual_drop if k <= n), "question") for n, _ in m.visual_drop]
    if m.name == "fastv":
        found.append((m.after - 1, "after", m.drop, "question"))
    if m.name == "hidrop":
        found += [(n, "before", 1 - share, "text") for n, share in m.pyramid]
    if m.name == "visipruner":
        found.append((m.band, "before", m.drop, "question"))
    if m.name == "visionzip":
        found.append((0, "before", m.drop, "encoder"))
    return found


def columns_of(m, number, layers):
    """Columns of a layer that its equations say and the options that all mechanisms share do not, and those of `Mechanism.rows`."""
    found = {}
    if (m.name == "withdrawal" and number >= m.after) or (m.name == "hidrop" and not m.begin <= number < m.end):
        found["tokens"] = "none"
    if m.name == "visipruner":
        found = {"seen": "none"} if 0 < number < m.band else {"tokens": "none"} if number >= m.end else {}
    if m.name == "sampled" and number >= m.first:
        found["tokens"] = f"random {m.share} {m.seed}" if m.random else f"even {m.share}"
    if m.name == "skip_vision" and number >= m.first:
        found["ffn"] = f"even {m.fed}"
    if m.name == "operator_skipping":
        found["update"] = " ".join(["value output"] * m.is_dense(number) + ["ffn"] * (number in m.ffn_layers))
    if m.name == "p_mod" and (share := m.share(number, layers)) <= m.most:
        found["tokens"] = f"{'even' if number == layers - 1 else 'routed'} {max(share, m.least)}"
    if m.name == "bidirectional":
        found["attend"] = "image"
    for where, columns in m.rows:
        first, _, last = where.partition("-")
        if int(first) <= number <= int(last or (99 if "-" in where else first)):
            found |= dict(columns)
    return found


def chosen(text, document):
    """Which rows of a document a selection holds, of the visual ones; in text form."""
    flags = []
    for run in document:
        word, *numbers = text.split()
        n = run.length
        left = n - int((1 - float(numbers[0])) * n + 1e-9) if word in ("even", "random") else 0
        if word == "random":
            of_run = torch.randperm(n, generator=torch.Generator().manual_seed(int(numbers[-1])))[:left].tolist()
        elif word == "even":
            of_run = [i * n // left for i in range(left)]
        else:
            of_run = range(0, n, {"all": 1, "none": n + 1}.get(word) or int(numbers[0])) if word != "none" else []
        flags += [run.visual and i in of_run for i in range(n)]
    return torch.tensor(flags)


def let_through(score_L, document, share):
    """Which rows of a document a router lets through, of the visual ones: the highest scores of each image."""
    flags, start = torch.zeros(len(score_L), dtype=torch.bool), 0
    for run in document:
        if run.visual:
            scores = score_L[start : start + run.length].tolist()
            best = sorted(range(run.length), key=lambda i, scores=scores: -scores[i])[: max(1, int(share * run.length))]
            flags[[start + i for i in best]] = True
        start += run.length
    return flags


def ranking_rows(is_visual, by, prompt, answers):
    """Rows of a document that rank, by what is known of it: the length of a prompt, or the text rows that are answers."""
    text = [row for row, visual in enumerate(is_visual.tolist()) if not visual and row < (prompt or len(is_visual))]
    if by == "text":
        answered = {row for first, end in answers for row in range(first, end)}
        return [row for i, row in enumerate(text) if i not in answered]
    return [text[first - 1] for first, _ in answers if first] if answers else text[-1:]


def gone_by_rank(scores_NLL, gone, rows, document, share):
    """Rows of a document that are gone when a share of each image has left, those that `rows` attend to least."""
    hidden = gone[None] | (torch.arange(len(gone)) > torch.tensor(rows)[:, None])
    attention = torch.softmax(scores_NLL[:, rows].masked_fill(hidden, -torch.inf), -1).sum((0, 1))
    return least_gone(attention, gone, document, share)


def least_gone(attention, gone, document, share):
    found, start = gone.clone(), 0
    for run in document:
        mine = torch.arange(len(gone)).ge(start) & torch.arange(len(gone)).lt(start + run.length) & run.visual
        ranked = (
            len(gone) - 1 - attention.masked_fill(~mine | gone, torch.inf).flip(0).argsort(stable=True)
        )  # the last first
        found[ranked[: int(share * mine.sum() + 1e-9) - int((gone & mine).sum())]] = True
        start += run.length
    return found


class ByRow:
    """A module for text rows, its copy for visual rows."""

    def __init__(self, shared, own, is_visual):
        self.shared, self.own, self.is_visual, self.weight = shared, own, is_visual, getattr(shared, "weight", None)

    def __call__(self, x_L):
        visual = self.is_visual.view(-1, *[1] * (x_L.ndim - 1))
        return torch.where(visual, tiny.rows(self.own(x_L)), tiny.rows(self.shared(x_L)))


def with_experts(layer, experts, is_visual):
    """A layer in whose modules visual rows take their own weights."""

    def seen(owner, *more):
        names = [name for name, _ in owner.named_children()]
        own = {name: ByRow(getattr(owner, name), experts[name], is_visual) for name in names if name in experts}
        return {name: getattr(owner, name) for name in [*names, *more] if hasattr(owner, name)} | own

    told = "head_dim", "scaling", "use_rope", "attn_temperature_tuning", "floor_scale", "attn_scale"
    attn = SimpleNamespace(**seen(layer.self_attn, *told))
    return SimpleNamespace(**{**seen(layer), "self_attn": attn})


def encoder_attention(encoder, *pixels):
    """What each patch of images of one size gets in the layer that is read, [images, patches], as transformers itself gives weights.
    `pixels`: what its model takes."""
    twin = copy.deepcopy(encoder.model).eval()
    twin.set_attn_implementation("eager")
    depth = twin.config.num_hidden_layers
    read = depth if encoder.select_layer is None else encoder.select_layer % (depth + 1)
    weights = twin(*pixels, output_attentions=True).attentions[read - 1].sum(1)
    return weights[:, 0, 1:] if twin.config.model_type == "clip_vision_model" else weights.sum(1)


def plain(model, batch, prompt=None, watch=None):
    """Text logits of the pack from the equations: a document at a time, explicit masks, no shared products.

    With `prompt`, the length of a prompt of one document, its rows alone rank visual tokens that are to be dropped. `watch` is called
    with each layer's number, which rows of a document are visual, and the weights of all heads, [N, L, L].
    """
    m, decoder = model.mechanism, model.language_model.model
    gated = getattr(m, "gated", None)
    features_Vd = (
        decoder.embed_tokens.weight.new_zeros(0, 16)
        if batch.pixel_values is None
        else model.image_features(batch.pixel_values)[:, :16]
    )
    logits, row, used = [], 0, 0
    answers_of = batch.layout.answers or [()] * len(batch.layout.documents)
    for document, answers in zip(batch.layout.documents, answers_of, strict=True):
        visual = [run.visual for run in document for _ in range(run.length)]
        image = [i for i, run in enumerate(document) for _ in range(run.length)]
        is_visual, L = torch.tensor(visual), len(visual)
        of_images = sum(run.visual for run in document) * tiny.TOKENS
        Z = features_Vd[used : used + of_images]
        if of_images and any(by == "encoder" for *_, by in drops(m)):
            first, last = used // tiny.TOKENS, (used + of_images) // tiny.TOKENS
            patches = encoder_attention(model.vision, batch.pixel_values[first:last]).flatten()
            from_encoder = patches.new_zeros(L).masked_scatter(is_visual, patches)
        x = decoder.embed_tokens(batch.input_ids[row : row + L])
        row, used = row + L, used + of_images
        layerwise = m.visual_source == "layerwise"
        if gated is None:
            E = connected(model, Z, 0 if layerwise else None)
            x = x.masked_scatter(is_visual[:, None], E)
        position, positions = 0, []
        for run in document:
            one = run.visual and m.visual_positions in ("shared", "none")
            positions += [position] * run.length if one else range(position, position + run.length)
            position += (m.visual_positions == "shared") if one else run.length
        media = []
        if gated is not None:
            for run in document:
                if run.visual:
                    part, Z = Z[: tiny.TOKENS], Z[tiny.TOKENS :]
                    media.append(plain_resampler(model.projector, part) if gated.latents else connected(model, part))

        i, j = torch.arange(L)[:, None], torch.arange(L)[None]
        gone = torch.zeros(L, dtype=torch.bool)
        rows_of = {by: ranking_rows(is_visual, by, prompt, answers) for by in ("question", "text")}
        for number, layer in enumerate(decoder.layers):
            columns = columns_of(m, number, len(decoder.layers))
            layer = with_experts(layer, dict(getattr(model, "experts", {})).get(str(number), {}), is_visual)
            norm1, post1, norm2, post2 = tiny.norms(layer)
            attend = columns.get("attend", "causal" if m.is_dense(number) else "none")
            attn, dense = layer.self_attn, attend in ("causal", "image")
            window = columns["attend"] if isinstance(columns.get("attend"), int) else m.visual_window
            weight = torch.ones(L, 1)
            if columns.get("tokens", "all").startswith("routed"):
                score = model.routers[str(number)]["router"].score(x)
                weight = torch.where(is_visual[:, None], 1 + 0.2 * torch.tanh(score), weight)
                here = let_through(score[:, 0], document, float(columns["tokens"].split()[1]))
            else:
                here = chosen(columns.get("tokens", "all"), document)
            seen = chosen(columns.get("seen", "all" if m.sees_images(number) else "none"), document) & here
            parts = columns.get(
                "update",
                "value output ffn" if dense else [p for p in ("value", "output", "ffn") if getattr(m.aligner, p)],
            )
            fed = chosen(columns.get("ffn", "all"), document) | ~is_visual
            if gated is not None and number % gated.every == 0:
                x = plain_gated(model.gated[str(number)], x, document, media, gated.immediate)
            if m.name == "casa" and number % m.every == 0:
                x = plain_casa(model.casa[str(number)].attention, x, document, decoder, number)
            if m.name == "deepstack" and number in m.layers and of_images:
                read = round(
                    m.depths[m.layers.index(number)] * 2
                )  # of the three layers of tiny encoders the second is read
                images = batch.pixel_values[(used - of_images) // tiny.TOKENS : used // tiny.TOKENS]
                states = model.vision.model(
                    model.vision.transform.views(images), output_hidden_states=True
                ).hidden_states[read][:, 1:]
                added = connected(model, states.flatten(0, 1), model.blocks[str(number)].connector)
                x = x.masked_scatter(is_visual[:, None], x[is_visual] + added)
            if layerwise:
                x = x.masked_scatter(is_visual[:, None], connected(model, Z, number))
            u = norm1(x)
            window_LL = tiny.near(decoder, torch.tensor(positions), number)
            q, k, qr, kr, v = tiny.projections(layer, u, *tiny.angles(decoder, torch.tensor(positions), number))
            scores = qr @ kr.mT
            if m.visual_positions == "unrotated":
                scores = torch.where(~is_visual[:, None] & is_visual[None], q @ k.mT, scores)
            paid = (scores * attn.scaling).masked_fill(~window_LL, -torch.inf)
            same_image = (torch.tensor(image)[:, None] == torch.tensor(image)[None]) & is_visual[:, None]

            for layer_number, when, share, by in drops(m):
                if (layer_number, when, by) == (number, "before", "encoder"):
                    gone = least_gone(from_encoder, gone, document, share) if any(visual) else gone
                elif (layer_number, when) == (number, "before"):
                    gone = gone_by_rank(paid, gone, rows_of[by], document, share)
            here, seen = here & ~gone, seen & ~gone
            sees = (i >= j) & ~(is_visual & ~here)[None] | torch.eye(L, dtype=torch.bool)
            sees = sees & ~((is_visual & ~seen)[None] & ~is_visual[:, None])
            if attend == "image":
                sees = sees | same_image & (here[:, None] & here[None])
            sees = sees & window_LL
            if not dense:
                place = (is_visual & here).cumsum(0)  # among the tokens that are here
                near = (i >= j) & (place[:, None] - place[None] <= window) & same_image & here[None] | torch.eye(
                    L, dtype=torch.bool
                )
                sees = torch.where(is_visual[:, None], near, sees)
            weights = torch.softmax((scores * attn.scaling).masked_fill(~sees, -torch.inf), -1)
            if watch is not None:
                watch(number, is_visual, weights)
            mixed = (weights @ v).transpose(0, 1).flatten(1)
            H = x + post1(attn.o_proj(mixed))
            if m.freeze_prefix and any(visual):
                prefix = torch.arange(L) < visual.index(True)
                H = torch.where(prefix[:, None], x, H)
            new = torch.where(fed[:, None], H + weight * post2(tiny.feed_forward(layer)(norm2(H))), H)
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
                    aligned = torch.where(
                        fed[:, None], aligned + weight * post2(tiny.feed_forward(layer)(norm2(aligned))), aligned
                    )
                new = torch.where(is_visual[:, None], aligned, new)
            new = torch.where((is_visual & ~here)[:, None], weight * x, new)
            x = new
            for layer_number, when, share, by in drops(m):
                if (layer_number, when) == (number, "after"):
                    gone = gone_by_rank(paid, gone, rows_of[by], document, share)
        logits.append(model.language_model.lm_head(decoder.norm(x))[~is_visual])
    return torch.cat(logits)
