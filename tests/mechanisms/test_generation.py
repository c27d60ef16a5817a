"""Generation under every mechanism: caches, later turns, cached images, and tokens that are dropped by rank."""

import pytest
import tiny
import torch
from lib.equations import DEEP, DROPPING, FAMILIES, MECHANISMS, RANKED, plain
from lib.mechanisms import BOUND, PACK, check_generation, check_later_turns

from lit_eemllm.compat.transformers import CACHE
from lit_eemllm.errors import ConfigError
from lit_eemllm.layout import Chunk, Run, SequenceLayout
from lit_eemllm.mechanisms import NO_ALIGNER, PRESETS, Mechanism
from lit_eemllm.model.cache import StreamCache, continue_positions
from lit_eemllm.model.image_cache import ImageCache


@pytest.mark.parametrize("decoder", FAMILIES)
@pytest.mark.parametrize(
    "name", [name for name in MECHANISMS if "flamingo" not in name and "prefix" not in name and name not in RANKED]
)
def test_an_image_in_a_later_turn_is_as_in_one_prompt(name, decoder):
    """Not so a frozen prefix, which looks ahead to the first image, and ranks by what a turn asks."""
    check_later_turns(tiny.model(decoder, MECHANISMS[name]))


@pytest.mark.parametrize("name", [name for name in MECHANISMS if name not in RANKED])
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


def test_layers_cache_only_what_text_sees():
    inputs = tiny.prompt(tiny.model(), [[3, 0, 4], [2, 0, 1, 0, 3]])
    columns = inputs["input_ids"].shape[1]
    model = tiny.model("llama-gqa", Mechanism(cross_layers=(1,), aligner=NO_ALIGNER))
    cache = model(**inputs, use_cache=True)[CACHE]
    assert [layer.keys.shape[2] for layer in cache.layers] == [7, columns, 7]
    assert cache.get_seq_length() == columns
    cache = tiny.model("llama-gqa", "flamingo")(**inputs, use_cache=True)[CACHE]
    assert [layer.keys.shape[2] for layer in cache.layers] == [7, 7, 7]


INDEPENDENT = [
    n for n, m in MECHANISMS.items() if getattr(m, "name", "?") in ("", "visual_experts") and m.dense_layers == "none"
]
INDEPENDENT.append("deepstack of aligned states")


@pytest.mark.parametrize("decoder", FAMILIES)
@pytest.mark.parametrize("name", INDEPENDENT)
def test_cached_images_equal_recomputed_ones_anywhere(name, monkeypatch, decoder):
    """Other prompts, other positions, other images beside, a later turn: each image passes the encoder once. Not so where its own queries
    grow with the position."""
    once = decoder != "llama4_text" or "window" not in name
    model = tiny.model(decoder, MECHANISMS[name])
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
        assert (encoded == [3]) == once and model.image_cache.misses == 3 * once
        late = tiny.prompt(model, [[4, 0, 3, 0, 2]])  # the second image comes in a later turn
        late["pixel_values"] = pixels[:2]
        whole = model(**late).logits
        out = model(late["input_ids"][:, :22], late["attention_mask"][:, :22], pixels[:1], use_cache=True)
        rest = model(late["input_ids"][:, 22:], late["attention_mask"], pixels[1:2], cache=out[CACHE])
        assert tiny.max_error(rest.logits[..., : tiny.VOCAB], whole[:, 22:, : tiny.VOCAB]) <= BOUND
        assert (encoded == [3]) == once


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


@pytest.mark.parametrize("decoder", FAMILIES)
@pytest.mark.parametrize("images_cached", [False, True], ids=["", "image cache"])
@pytest.mark.parametrize("name", DROPPING)
def test_dropped_tokens_are_those_the_prompt_attends_to_least(name, images_cached, decoder):
    """Prefill and later steps against the plain implementation, in which dropped columns are masked. In float64, for the same reason as
    test_dropping.test_logits_and_gradients_in_training."""
    model = tiny.model(decoder, DROPPING[name], layers=DEEP).double()
    documents = [[3, 0, 4], [5], [2, 0, 1, 0, 3]]
    inputs = tiny.prompt(model, documents, dtype=torch.float64)
    with torch.no_grad():
        model.image_cache = ImageCache(10**9) if images_cached else None
        options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True)
        out = model.generate(**inputs, **options, return_dict_in_generate=True)
        for i, document in enumerate(documents):
            whole = tiny.pack([[*document[:-1], document[-1] + 4]], seed=3 + i)
            asked = tiny.pack([document], 3 + i, torch.float64)
            length = len(asked.input_ids)
            whole.input_ids[:length] = asked.input_ids
            whole.pixel_values = asked.pixel_values
            whole.input_ids[length:] = out.sequences[i, -4:]
            true = plain(model, whole, prompt=length)[-5:-1]
            found = torch.stack([step[i, : tiny.VOCAB] for step in out.logits])
            assert tiny.max_error(found, true) <= BOUND
        if name in ("thrice", "pyramid_drop"):
            out[CACHE].settle()
            counts = [layer.keys.shape[2] for layer in out[CACHE].layers]
            shares = {
                "thrice": [0.25, 0.5] + 6 * [0.8],
                "pyramid_drop": [s for s in (0, 0.5, 0.75, 0.875) for _ in (0, 1)],
            }[name]
            kept = [32 - 2 * int(16 * share) for share in shares]
            assert counts == [6 + n + 3 for n in kept]  # the longest row: 6 of text, its images, 3 generated


@pytest.mark.parametrize("window", [None, 35, Chunk(30)])
def test_an_image_of_a_later_turn_is_ranked_among_all_that_the_prompt_sees(window):
    """In the first layer, by hand: the last token's attention over what earlier turns have left and all that is new, in its window or chunk."""
    model = tiny.model("mistral", Mechanism(aligner=NO_ALIGNER, visual_drop=((0, 0.5),)))
    decoder, differs = model.language_model.model, 0
    for layer in decoder.layers:
        layer.window = window
    for seed in range(8):
        inputs = tiny.prompt(model, [[6, 0, 9, 0, 2]], seed=seed)
        ids, pixels, cut = inputs["input_ids"], inputs["pixel_values"], 6 + tiny.TOKENS + 5
        with torch.no_grad():
            cache = model(ids[:, :cut], pixel_values=pixels[:1], use_cache=True)[CACHE]
            cache = model(ids[:, cut:], torch.ones_like(ids), pixels[1:], cache=cache)[CACHE]
            visual = (ids[0] == tiny.VOCAB).nonzero().flatten()
            x = decoder.embed_tokens(ids.clamp(max=tiny.VOCAB - 1))[0]
            x[visual] = model.projector(model.image_features(pixels))
            layer, places = decoder.layers[0], torch.arange(len(x))
            turn = tiny.angles(decoder, places, 0)
            _, _, q, k, _ = tiny.projections(layer, layer.input_layernorm(x), *turn)

            def stays(columns, last, image, window=window, k=k, q=q, layer=layer):
                """Columns without the half of the image's that the token at `last` attends to least."""
                scores = (q[:, last] * k[:, columns].transpose(0, 1)).sum(-1).T * layer.self_attn.scaling
                first = {None: 0, 35: last - 35, Chunk(30): last // 30 * 30}[window]
                scores = scores.masked_fill(torch.tensor(columns) < first, -torch.inf)
                weight = dict(zip(columns, scores.softmax(-1).mean(0).tolist(), strict=True))
                gone = sorted(image, key=weight.get)[: len(image) // 2]
                return [column for column in columns if column not in gone]

            kept = stays(list(range(cut)), cut - 1, visual[: tiny.TOKENS].tolist())
            second = visual[tiny.TOKENS :].tolist()
            found = stays([*kept, *range(cut, len(x))], len(x) - 1, second)
            alone = stays(list(range(cut, len(x))), len(x) - 1, second)
            wide = stays([*kept, *range(cut, len(x))], len(x) - 1, second, window=None)
        assert tiny.max_error(cache.layers[0].keys[0], k[::2][:, found]) <= BOUND  # two heads share a key
        differs += found[-len(alone) :] != alone if window is None else found != wide
    assert differs, "or what was there before the new columns did not matter, or the window"


def test_positions_go_on_where_a_column_is_an_image_for_some():
    """An image of one token that takes no position."""
    cache = StreamCache()
    cache.next_position_B = torch.tensor([5, 7])
    layout = SequenceLayout.of([[Run(True, 1)], [Run(False, 1)]]).with_image_positions(0)
    assert continue_positions(layout, cache, [0]).positions.tolist() == [5, 7]
    assert cache.next_position_B.tolist() == [5, 8]
