"""Every mechanism against a plain implementation written from the equations, one document and one dense matrix at a time."""

import itertools
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lib.backends import TRAINABLE
from lib.mechanisms import (
    BOUND,
    PACK,
    check_frozen_in_16_bits,
    check_generation,
    check_gradients,
    check_later_turns,
    check_packing,
    text_logits,
)
from torch.nn.functional import cross_entropy

from lit_eemllm.compat.transformers import CACHE
from lit_eemllm.core.ranking import least_attended_dropped
from lit_eemllm.core.table import IDLE, NOTHING, LayerPlan, executed, parse_select
from lit_eemllm.errors import ConfigError
from lit_eemllm.layout import Run, SequenceLayout
from lit_eemllm.mechanisms import NO_ALIGNER, PRESETS, Aligner, Mechanism, build_mechanism
from lit_eemllm.mechanisms.flamingo import Gated
from lit_eemllm.model.cache import StreamCache, continue_positions
from lit_eemllm.model.image_cache import ImageCache

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
            u = layer.input_layernorm(x)
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
            H = x + attn.o_proj(mixed)
            if m.freeze_prefix and any(visual):
                prefix = torch.arange(L) < visual.index(True)
                H = torch.where(prefix[:, None], x, H)
            new = H + layer.mlp(layer.post_attention_layernorm(H))
            if not dense or "ffn" not in parts:
                if "value" in parts and "output" in parts:
                    aligned = H  # a row that sees itself only, or its window
                elif "value" in parts:
                    aligned = x + v.transpose(0, 1).flatten(1)
                elif "output" in parts:
                    aligned = x + attn.o_proj(u)
                else:
                    aligned = x
                if "ffn" in parts:
                    aligned = aligned + layer.mlp(layer.post_attention_layernorm(aligned))
                new = torch.where(is_visual[:, None], aligned, new)
            new = torch.where((is_visual & ~here)[:, None], x, new)
            x = new
        logits.append(model.language_model.lm_head(decoder.norm(x))[~is_visual])
    return torch.cat(logits)


@pytest.mark.parametrize(("decoder", "backend"), [
    ("llama-gqa", "reference"), ("llama-gqa", "sdpa"), ("llama-gqa", "flash_attn_2"), ("llama-gqa", "xformers"),
    ("qwen3", "sdpa"), ("qwen3", "torch_2_13"),
])  # fmt: skip
@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism_equals_its_equations_with_gradients(name, decoder, backend):
    """Through every backend; kernels of GPUs are emulated (tests/attention/test_attention.py)."""
    model, batch = tiny.model(decoder, MECHANISMS[name]), tiny.pack(PACK)
    model._backend = TRAINABLE[backend]() if backend in TRAINABLE else model.backend
    true, found = plain(model, batch), text_logits(model, batch)
    assert tiny.max_error(found, true) <= BOUND
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    results = []
    for logits in (true, found):
        loss = cross_entropy(logits[batch.target_rows], batch.targets, reduction="sum")
        results.append(torch.autograd.grad(loss, parameters.values(), allow_unused=True))
    largest = max(g.abs().max() for g in results[0] if g is not None)
    compared = 0
    for parameter, a, b in zip(parameters, *results, strict=True):
        if a is None or a.abs().max() < 1e-6 * largest:
            assert b is None or b.abs().max() < 1e-5 * largest, parameter
            continue
        assert tiny.max_error(b, a) <= 5 * BOUND, parameter
        compared += 1
    assert compared > 0.8 * len([p for p in parameters if not p.startswith("vision")])
    without = text_logits(model, replace(batch, pixel_values=-2 * batch.pixel_values))
    assert not torch.allclose(found, without, rtol=1e-3)  # the images matter


@given(tiny.tables(), st.sampled_from(["llama-gqa", "llama"]), st.sampled_from(["reference", "sdpa"]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_table_equals_its_equations(mechanism, decoder, backend):
    """In a pack, with gradients; from a cache, with an image in a later turn; what is equal to a plain dense computation. By images
    whose keys are already made, where those depend on no text."""
    model, batch = tiny.model(decoder, mechanism), tiny.pack([[3, 0, 4], [2, 0, 1, 0, 3], [2]])
    model.set_attention(backend)
    true, found = plain(model, batch), text_logits(model, batch)
    assert tiny.max_error(found, true) <= 2 * BOUND
    weights = torch.linspace(-1, 1, true.numel()).view_as(true)
    parameters = [p for n, p in model.named_parameters() if n.startswith(("projector", "language_model.model.layers"))]
    for p, a, b in zip(
        parameters,
        *(torch.autograd.grad((x * weights).sum(), parameters, allow_unused=True) for x in (true, found)),
        strict=True,
    ):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * max(1, a.abs().max().item()))
    check_later_turns(model)
    model.image_cache = ImageCache(10**9)
    with torch.no_grad():
        assert tiny.max_error(text_logits(model, batch), true) <= 2 * BOUND


@pytest.mark.parametrize("name", [name for name in MECHANISMS if "flamingo" not in name and "prefix" not in name])
def test_an_image_in_a_later_turn_is_as_in_one_prompt(name):
    """Not so a frozen prefix, which looks ahead to the first image."""
    check_later_turns(tiny.model("llama-gqa", MECHANISMS[name]))


@pytest.mark.parametrize("name", MECHANISMS)
def test_without_image_every_mechanism_is_the_base_model(name):
    model, batch = tiny.model("llama-gqa", MECHANISMS[name]), tiny.pack([[5], [9]])
    base = tiny.model("llama-gqa", "llava", layers=tiny.layers_of(MECHANISMS[name]))
    base.language_model.load_state_dict(model.language_model.state_dict())
    assert tiny.max_error(text_logits(model, batch), text_logits(base, batch)) <= BOUND


@pytest.mark.parametrize("pack", [PACK, [[5], [9]]], ids=["images", "text only"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_every_trainable_tensor_has_a_gradient(name, pack):
    check_gradients(tiny.model("llama-gqa", MECHANISMS[name]), pack)


def test_in_one_layer_the_text_output_of_related_mechanisms_is_the_same():
    """EE-MLLM, NAAViT, ShortV and ViCA differ in what becomes of the visual states, not in what text makes of them."""
    batch, results, changed = tiny.pack(PACK), {}, []
    for name in ("ee_mllm", "naavit", "shortv", "vica"):
        changes = {"cross_layers": (0, 2)} if name == "vica" else {"dense_layers": "none"}
        model = tiny.model("llama-gqa", replace(PRESETS[name], **changes))
        outputs = []
        model.language_model.model.layers[0].register_forward_hook(
            lambda _, __, out, outputs=outputs: outputs.append(out)
        )
        text_logits(model, batch)
        results[name] = outputs[0][0]
        changed.append(not outputs[0][1].equal(model.projector(model.image_features(batch.pixel_values))))
    assert changed == [True, True, False, False]
    for a, b in itertools.combinations(results.values(), 2):
        assert tiny.max_error(a, b) <= 1e-6


def test_gated_cross_attention_begins_as_the_base_model_and_spares_text_without_image():
    batch = tiny.pack(PACK)
    model = tiny.model("llama-gqa", MECHANISMS["flamingo"])
    changed = text_logits(model, batch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.zero_()
    start = text_logits(model, batch)
    ids = batch.input_ids[batch.layout.text_index]
    texts = tiny.pack([[sum(n for n in doc)] for doc in PACK])
    base = tiny.model("llama-gqa", "llava")
    base.language_model.load_state_dict(model.language_model.state_dict())
    assert tiny.max_error(start, text_logits(base, replace(texts, input_ids=ids))) <= BOUND
    early = []
    for document in batch.layout.documents:
        seen = False
        for run in document:
            seen |= run.visual
            early += [not seen] * run.length if not run.visual else []
    early = torch.tensor(early)
    assert changed[early].equal(start[early]) and not torch.isclose(changed[~early], start[~early]).all(-1).any()


def test_vica_keeps_the_position_gap():
    """Outside its layers text sees text only, but at the positions it has behind the image; closing the gap differs."""
    batch = tiny.pack([[3, 0, 6]])
    results = []
    for positions in ("sequence", "none"):
        model = tiny.model("llama-gqa", Mechanism(cross_layers=(0,), aligner=NO_ALIGNER, visual_positions=positions))
        model.language_model.model.layers[0].row = IDLE  # as in the other layers
        results.append(text_logits(model, batch))
    gap, closed = results
    text = tiny.pack([[9]])
    text.input_ids = batch.input_ids[batch.layout.text_index]
    assert tiny.max_error(closed, text_logits(model, text)) <= BOUND
    assert tiny.max_error(gap, closed) > 1e-3


@pytest.mark.parametrize("name", MECHANISMS)
def test_packing_leaks_nothing(name):
    check_packing(tiny.model("llama-gqa", MECHANISMS[name]))


@pytest.mark.parametrize("name", MECHANISMS)
def test_cached_generation_equals_recomputation_alone_and_in_a_batch(name):
    check_generation(tiny.model("llama-gqa", MECHANISMS[name]))


@pytest.mark.parametrize("name", [name for name in MECHANISMS if name.startswith("flamingo")])
def test_gated_cross_attention_goes_on_after_a_cache_with_several_tokens_each(name):
    model = tiny.model("llama-gqa", MECHANISMS[name])
    inputs = tiny.prompt(model, [[3, 0, 8], [2, 0, 1, 0, 9], [12]])
    whole, cut = model(**inputs).logits, inputs["input_ids"].shape[1] - 6
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = model(ids[:, :cut], mask[:, :cut], inputs["pixel_values"], use_cache=True)[CACHE]
    more = [model(ids[:, a:b], mask[:, :b], cache=cache).logits for a, b in ((cut, cut + 4), (cut + 4, cut + 6))]
    assert tiny.max_error(torch.cat(more, 1)[..., : tiny.VOCAB], whole[:, cut:, : tiny.VOCAB]) <= BOUND
    with pytest.raises(ValueError, match="takes all images of a conversation in one pass"):
        model(ids, None, inputs["pixel_values"], cache=cache)


@pytest.mark.parametrize("name", PRESETS)
def test_a_decoder_frozen_in_bfloat16_trains_and_generates_without_autocast(name):
    check_frozen_in_16_bits(tiny.model("llama-gqa", MECHANISMS[name]))


def test_layers_cache_only_what_text_sees():
    inputs = tiny.prompt(tiny.model(), [[3, 0, 4], [2, 0, 1, 0, 3]])
    columns = inputs["input_ids"].shape[1]
    model = tiny.model("llama-gqa", Mechanism(cross_layers=(1,), aligner=NO_ALIGNER))
    cache = model(**inputs, use_cache=True)[CACHE]
    assert [layer.keys.shape[2] for layer in cache.layers] == [7, columns, 7]
    assert cache.get_seq_length() == columns
    cache = tiny.model("llama-gqa", "flamingo")(**inputs, use_cache=True)[CACHE]
    assert [layer.keys.shape[2] for layer in cache.layers] == [7, 7, 7]


def test_contradictions_are_named_together():
    with pytest.raises(ConfigError) as error:
        build_mechanism("llava", 4, {"dense_layers": [0, 9], "cross_layers": [1], "visual_source": "layerwise"})
    for text in ("dense_layers: found [0, 9]", "cross_layers: layers [0] are dense", "visual_source: layerwise"):
        assert text in str(error.value)
    for preset, overrides, text in (
        (
            "ee_mllm",
            {"visual_window": 2, "aligner": {"value": False, "output": None, "ffn": None}},
            "needs aligner value",
        ),
        ("llava", {"visual_positions": "unrotated"}, "unrotated needs"),
        ("ee_mllm", {"visual_drop": [[1, 0.5]]}, "needs constant"),
        ("vica", {"cross_layers": "all", "visual_drop": [[2, 0.5], [1, 0.7]]}, "must ascend"),
        ("vica", {"cross_layers": "all", "visual_drop": [[1, 0.5], [2, 0.5]]}, "shares must sum to less than 1"),
        (
            "vica",
            {"visual_positions": "unrotated", "visual_drop": [[1, 0.5]]},
            "visual_drop: .*visual_positions is unrotated",
        ),
        ("ee_mllm", {"rows": [{"layers": 4, "seen": "none"}]}, "rows: found '4', expected layers from 0 to 3"),
        ("ee_mllm", {"rows": [{"layers": "2-4", "seen": "none"}]}, "rows: found '2-4', expected layers from 0 to 3"),
        ("ee_mllm", {"rows": [{"layers": "4-", "seen": "none"}]}, "rows: found '4-', expected layers from 0 to 3"),
        ("flamingo", {"cross_layers": "all"}, "gated: needs cross_layers none"),
        ("flamingo", {"gated": {"every": 0}}, "are 1 or more"),
        ("saisa", {"cross_layers": [0, 1]}, "cross_layers all"),
        ("vica", {"cross_layers": "none"}, "in no layer"),
        ("ee_mllm", {"visual_positions": "banana"}, "expected sequence or shared"),
        ("ee_mllm", {"visual_window": -1}, "expected 0 or more"),
        ("ee_mllm", {"gated": {"every": 2}}, "use preset=flamingo"),
    ):
        with pytest.raises(ConfigError, match=text):
            build_mechanism(preset, 4, overrides)
    for name in PRESETS:
        for depth in (1, 3, 24, 32, 40):
            mechanism = build_mechanism(name, depth)
            assert Mechanism.from_dict(mechanism.to_dict()) == mechanism
    assert build_mechanism("vica", 32).cross_layers == (0, 1, 7, 8, 9, 10, 11, 14)
    assert build_mechanism("shortv", 32).dense_layers == (1, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16)


def test_layer_numbers_are_carried_over_in_proportion():
    """By hand: the layer at whose depth in 32 layers one begins, in 24 and in 40."""
    assert build_mechanism("vica", 24).cross_layers == (0, 5, 6, 7, 8, 10)  # 0 0.75 5.25 6 6.75 7.5 8.25 10.5
    assert build_mechanism("vica", 40).cross_layers == (0, 1, 8, 10, 11, 12, 13, 17)
    assert build_mechanism("ee_mllm_f", 25).dense_layers == tuple(range(12))


def test_of_a_hundred_tokens_a_share_drops_its_percent():
    """0.29 x 100 is 28.999999999999996 in binary."""
    assert [parse_select(f"all but {n / 100} ranked in 1").count(100) for n in range(1, 100)] == list(range(99, 0, -1))
    twice = Mechanism(aligner=NO_ALIGNER, visual_drop=((0, 0.1), (1, 0.2))).table(2)[1].tokens
    assert twice == parse_select("all but 0.3 ranked in 1 after 0.1")


def test_it_is_known_which_mechanisms_compute_what_llava_does():
    batch, same = tiny.pack(PACK), []
    for name, mechanism in {**MECHANISMS, "all but the last": Mechanism(dense_layers=(0, 1))}.items():
        layers = tiny.layers_of(mechanism)
        model, base = tiny.model("llama-gqa", mechanism), tiny.model("llama-gqa", "llava", layers=layers)
        equal = text_logits(model, batch).equal(text_logits(base, batch))
        assert model.mechanism.is_llava(layers) == equal, name
        same += [name] * equal
    assert same == ["llava", "all but the last"]


def test_what_no_later_layer_reads_is_not_executed():
    dense, keys = LayerPlan(attend="causal"), LayerPlan(update=frozenset())  # all, or keys and values of images alone
    own, blind = LayerPlan(source="own"), LayerPlan(seen=NOTHING)
    for table, expected in (
        ((dense, dense), (dense, keys)),
        ((dense, blind), (keys, IDLE)),
        ((blind, dense), (blind, keys)),
        ((blind, own), (IDLE, replace(keys, source="own"))),  # a layer with visual states of its own reads none
        ((dense, own, dense), (keys, own, keys)),
        ((dense, replace(own, seen=NOTHING)), (keys, IDLE)),  # for which none are made
        ((replace(IDLE, source="own"), dense), (replace(IDLE, source="own"), keys)),
        ((dense, replace(dense, tokens=NOTHING), dense), (dense, IDLE, keys)),
    ):
        assert executed(table) == expected


INDEPENDENT = [n for n, m in MECHANISMS.items() if type(m) is Mechanism and m.dense_layers == "none"]


@pytest.mark.parametrize("name", INDEPENDENT)
def test_cached_images_equal_recomputed_ones_anywhere(name, monkeypatch):
    """Other prompts, other positions, other images beside, a later turn: each image passes the encoder once."""
    model = tiny.model("llama-gqa", MECHANISMS[name])
    prompts = [[[3, 0, 4], [2, 0, 1, 0, 3]], [[9, 0, 2]], [[1, 0, 0, 5], [6]]]
    inputs = [tiny.prompt(model, documents, seed) for seed, documents in enumerate(prompts)]
    pixels = inputs[0]["pixel_values"]
    inputs[1]["pixel_values"], inputs[2]["pixel_values"] = pixels[2:], pixels[[1, 0]]
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        true = [(model(**each).logits, model.generate(**each, **options)) for each in inputs]
        encoded = []
        encode = model.image_features
        monkeypatch.setattr(model, "image_features", lambda x: encoded.append(len(x)) or encode(x))
        model.image_cache = ImageCache(10**9)
        for each, (logits, ids) in zip(inputs, true, strict=True):
            found = model(**each).logits
            kept = found.isfinite()
            assert tiny.max_error(found[kept], logits[kept]) <= BOUND
            assert model.generate(**each, **options).equal(ids)
        assert encoded == [3] and model.image_cache.misses == 3
        late = tiny.prompt(model, [[4, 0, 3, 0, 2]])  # the second image comes in a later turn
        late["pixel_values"] = pixels[:2]
        whole = model(**late).logits
        out = model(late["input_ids"][:, :22], late["attention_mask"][:, :22], pixels[:1], use_cache=True)
        rest = model(late["input_ids"][:, 22:], late["attention_mask"], pixels[1:2], cache=out[CACHE])
        assert tiny.max_error(rest.logits[..., : tiny.VOCAB], whole[:, 22:, : tiny.VOCAB]) <= BOUND
        assert encoded == [3]


def test_the_image_cache_keeps_to_its_budget_and_forgets_when_weights_may_change():
    model = tiny.model("llama-gqa", "ee_mllm")
    pixels = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        one = ImageCache(10**9)
        one.keys(pixels[:1], model.image_keys, 0)
        each = one.num_bytes
        assert each == 3 * 2 * tiny.TOKENS * 2 * 8 * 4  # layers x (keys, values) x tokens x heads x size x bytes
        cache = model.image_cache = ImageCache(3 * each)
        for i in (0, 1, 2, 0, 3):  # 1 is the least recently used
            cache.keys(pixels[i : i + 1], model.image_keys, 0)
        assert cache.num_bytes == 3 * each and (cache.hits, cache.misses) == (1, 4)
        cache.keys(pixels[[0, 2, 3]], model.image_keys, 0)
        assert (cache.hits, cache.misses) == (4, 4)
        cache.keys(pixels[1:2], model.image_keys, 0)
        assert cache.misses == 5
        keys = cache.keys(pixels[[4, 4]], model.image_keys, 0)  # twice the same in one call
        assert cache.misses == 6 and len(keys[0][0]) == 32 and keys[0][0][:16].equal(keys[0][0][16:])
        many = ImageCache(each)
        many.keys(pixels, model.image_keys, 0)
        many.keys(pixels[:1], model.image_keys, 0)
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for k in many._images.values()
            for p in k
            for x in p
        }
        assert many.num_bytes == sum(storages.values()) == each  # none is kept alive by another's
    model.train()
    assert cache.num_bytes == 0
    model.eval()
    with torch.no_grad():
        cache.keys(pixels, model.image_keys, 0)
    model.set_mechanism(PRESETS["naavit"])
    assert cache.num_bytes == 0
    calls = cache.misses
    model.packed_loss(tiny.pack(PACK)).backward()  # gradients need the computation
    dense = tiny.model("llama-gqa", "llava")
    dense.image_cache = cache
    with torch.no_grad():
        dense(**tiny.prompt(dense, [[3, 0, 4]]))
    assert cache.misses == calls


def test_the_image_cache_notices_other_weights_types_and_precision():
    model, inputs = tiny.model("llama-gqa", "ee_mllm"), tiny.prompt(tiny.model(), [[3, 0, 4]])
    model.image_cache = ImageCache(10**9)

    def same():
        with torch.no_grad():
            found = model(**inputs).logits
            cache, model.image_cache = model.image_cache, None
            true = model(**inputs).logits
            model.image_cache = cache
        return tiny.max_error(found[found.isfinite()].float(), true[true.isfinite()].float()) <= BOUND

    assert same()
    model.load_state_dict(tiny.model(seed=1).state_dict())
    assert same()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.packed_loss(tiny.pack(PACK)).backward()
    optimizer.step()
    assert same()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        computed = model.image_cache.misses
        model(**inputs)
        assert model.image_cache.misses == computed + 1
    assert same()
    model.to(torch.bfloat16)
    model(**inputs)
    assert model.image_cache.hits >= 0


@pytest.mark.parametrize("name", ["vica", "ee_mllm"])
def test_one_new_column_may_be_an_image_for_some_and_text_for_others(name):
    model = tiny.model("llama-gqa", MECHANISMS[name])
    inputs = tiny.prompt(model, [[3, 0, 1], [2, 0, 19]])
    ids, mask, pixels = inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]
    whole = model(**inputs).logits
    cache = model(ids[:, :-1], mask[:, :-1], pixels, use_cache=True)[CACHE]
    assert (
        tiny.max_error(model(ids[:, -1:], mask, cache=cache).logits[..., : tiny.VOCAB], whole[:, -1:, : tiny.VOCAB])
        <= BOUND
    )


@pytest.mark.parametrize("name", ["llava", "vica", "dense, text sees every third", "flamingo"])
def test_sequences_of_a_cache_can_change_places_and_be_repeated(name):
    model = tiny.model("llama-gqa", MECHANISMS[name])
    inputs = tiny.prompt(model, [[3, 0, 4], [2, 0, 1, 0, 9]])
    ids, mask, order = inputs["input_ids"], inputs["attention_mask"], torch.tensor([1, 0, 1])
    with torch.no_grad():
        whole = model(**inputs).logits[order, -2:]
        cache = model(ids[:, :-2], mask[:, :-2], inputs["pixel_values"], use_cache=True)[CACHE]
        cache.batch_select_indices(order)
        found = model(ids[order, -2:], mask[order], cache=cache).logits
    assert tiny.max_error(found[..., : tiny.VOCAB], whole[..., : tiny.VOCAB]) <= BOUND


def test_what_cannot_be_generated_is_refused():
    model = tiny.model("llama-gqa", "ee_mllm")
    with pytest.raises(ValueError, match="a prompt ends with an image"):
        model.generate(**tiny.prompt(model, [[3, 0]]), max_new_tokens=2)
    dropping = tiny.model("llama-gqa", Mechanism(aligner=NO_ALIGNER, visual_drop=((1, 0.5),)))
    with pytest.raises(ValueError, match="use_cache=True"):
        dropping.generate(**tiny.prompt(dropping, [[3, 0, 2]]), max_new_tokens=2, use_cache=False)
    before = model.mechanism
    with pytest.raises(ConfigError, match="unrotated needs"):
        model.set_mechanism(Mechanism(dense_layers="all", visual_positions="unrotated"))
    assert model.mechanism is before and model.config.mechanism == before.to_dict()


DROPPING = {
    "vica": Mechanism(cross_layers=(0, 2), aligner=NO_ALIGNER, visual_drop=((2, 0.5),)),
    "all layers": Mechanism(aligner=NO_ALIGNER, visual_drop=((0, 0.25), (1, 0.25), (2, 0.3))),
    "saisa": Mechanism(visual_source="layerwise", aligner=NO_ALIGNER, visual_drop=((1, 0.25),)),
}


@pytest.mark.parametrize("images_cached", [False, True], ids=["", "image cache"])
@pytest.mark.parametrize("name", DROPPING)
def test_dropped_tokens_are_those_the_prompt_attends_to_least(name, images_cached):
    """Prefill and later steps against the plain implementation, in which dropped columns are masked."""
    model = tiny.model("llama-gqa", DROPPING[name])
    documents = [[3, 0, 4], [5], [2, 0, 1, 0, 3]]
    inputs = tiny.prompt(model, documents)
    with torch.no_grad():
        model.image_cache = ImageCache(10**9) if images_cached else None
        options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True)
        out = model.generate(**inputs, **options, return_dict_in_generate=True)
        for i, document in enumerate(documents):
            whole = tiny.pack([[*document[:-1], document[-1] + 4]], seed=3 + i)
            length = sum(n or tiny.TOKENS for n in document)
            whole.input_ids[:length] = tiny.pack([document], seed=3 + i).input_ids
            whole.pixel_values = tiny.pack([document], seed=3 + i).pixel_values
            whole.input_ids[length:] = out.sequences[i, -4:]
            true = plain(model, whole, prompt=length)[-5:-1]
            found = torch.stack([step[i, : tiny.VOCAB] for step in out.logits])
            assert tiny.max_error(found, true) <= BOUND
        if name == "all layers":
            counts = [layer.keys.shape[2] for layer in out[CACHE].layers]
            kept = [32 - 2 * int(16 * share) for share in (0.25, 0.5, 0.8)]
            assert counts == [6 + n + 3 for n in kept]  # the longest row: 6 of text, its images, 3 generated


def test_an_image_of_a_later_turn_is_ranked_among_all_that_the_prompt_sees():
    """In the first layer, by hand: the last token's attention over what earlier turns have left and all that is new."""
    model = tiny.model("llama-gqa", Mechanism(aligner=NO_ALIGNER, visual_drop=((0, 0.5),)))
    decoder, differs = model.language_model.model, 0
    for seed in range(8):
        inputs = tiny.prompt(model, [[6, 0, 9, 0, 2]], seed=seed)
        ids, pixels, cut = inputs["input_ids"], inputs["pixel_values"], 6 + tiny.TOKENS + 5
        with torch.no_grad():
            cache = model(ids[:, :cut], pixel_values=pixels[:1], use_cache=True)[CACHE]
            cache = model(ids[:, cut:], torch.ones_like(ids), pixels[1:], cache=cache)[CACHE]
            visual = (ids[0] == tiny.VOCAB).nonzero().flatten()
            x = decoder.embed_tokens(ids.clamp(max=tiny.VOCAB - 1))[0]
            x[visual] = model.projector(model.image_features(pixels))
            cos, sin = decoder.rotary_emb(x[None], torch.arange(len(x))[None])
            layer = decoder.layers[0]
            _, _, q, k, _ = tiny.projections(layer, layer.input_layernorm(x), cos, sin)

            def stays(columns, last, image, k=k, q=q, layer=layer):
                """Columns without the half of the image's that the token at `last` attends to least."""
                scores = (q[:, last] * k[:, columns].transpose(0, 1)).sum(-1).T * layer.self_attn.scaling
                weight = dict(zip(columns, scores.softmax(-1).mean(0).tolist(), strict=True))
                gone = sorted(image, key=weight.get)[: len(image) // 2]
                return [column for column in columns if column not in gone]

            kept = stays(list(range(cut)), cut - 1, visual[: tiny.TOKENS].tolist())
            second = visual[tiny.TOKENS :].tolist()
            found = stays([*kept, *range(cut, len(x))], len(x) - 1, second)
            alone = stays(list(range(cut, len(x))), len(x) - 1, second)
        assert tiny.max_error(cache.layers[0].keys[0], k[::2][:, found]) <= BOUND  # two heads share a key
        differs += found[-len(alone) :] != alone
    assert differs, "or what was there before the new columns did not matter"


def test_images_of_many_lengths_are_ranked_each_by_itself():
    """In a pack, with several images in a document, against one score after the other."""
    layout = SequenceLayout.of(
        [[Run(True, 3), Run(False, 1), Run(True, 5), Run(False, 2)], [Run(False, 1)], [Run(True, 4), Run(False, 1)], [Run(True, 2)]]
    )  # fmt: skip
    q, k = torch.randn(5, 4, 8), torch.randn(5 + 14, 2, 8)
    found = least_attended_dropped(layout, q, k, [3, 5, 4, 2], [1, 3, 2, 2], 0.7)
    expected = []
    for last, text, images in ((2, [0, 1, 2], [(0, 3, 1), (3, 8, 3)]), (4, [4], [(8, 12, 2)])):
        rows = text + [5 + i for first, end, _ in images for i in range(first, end)]
        heads = [torch.stack([q[last, n] @ k[row, n // 2] for row in rows]).mul(0.7).softmax(0) for n in range(4)]
        weight = dict(zip(rows, torch.stack(heads).mean(0).tolist(), strict=True))
        for first, end, most in images:
            ranked = sorted(range(first, end), key=lambda i, weight=weight: -weight[5 + i])
            expected += sorted(ranked[:most])
    assert found.tolist() == [*expected, 12, 13]


def test_positions_go_on_where_a_column_is_an_image_for_some():
    """An image of one token that takes no position."""
    cache = StreamCache()
    cache.next_position_B = torch.tensor([5, 7])
    layout = SequenceLayout.of([[Run(True, 1)], [Run(False, 1)]]).with_image_positions(0)
    assert continue_positions(layout, cache, 0).positions.tolist() == [5, 7]
    assert cache.next_position_B.tolist() == [5, 8]
