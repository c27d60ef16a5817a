"""Attention beside the decoder's own, over the last image and the text since: how it begins, and what its cache holds."""

from dataclasses import replace

import pytest
import tiny
import torch
from lib.mechanisms import BOUND, PACK, text_logits

from lit_eemllm.compat.transformers import CACHE
from lit_eemllm.errors import ConfigError
from lit_eemllm.formats.mechanism import change_mechanism
from lit_eemllm.mechanisms import PRESETS, build_mechanism
from lit_eemllm.model import EEMLLM
from lit_eemllm.model.image_cache import ImageCache


def same_as_layers(model):
    """Whether blocks hold what their layers do for attention."""
    found = []
    for layer, block in model.casa.items():
        own, held = model.language_model.model.layers[int(layer)].state_dict(), block.attention.state_dict()
        assert {name for name in own if "self_attn" in name} < held.keys() < own.keys()
        found += [held[name].equal(own[name]) for name in held]
    return all(found)


@pytest.mark.parametrize("decoder", ["qwen3", "olmo2"])
def test_it_begins_as_a_copy_of_the_layers_attention_and_folders_hold_it(decoder, tmp_path):
    llava, batch = tiny.model(decoder, "llava"), tiny.pack(PACK)
    model, _ = change_mechanism(llava, replace(PRESETS["casa"], every=2), seed=0)
    assert list(model.casa) == ["0", "2"]
    assert all(same_as_layers(each) for each in (model, EEMLLM(model.config)))
    with torch.no_grad():
        for parameter in model.casa.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    again = EEMLLM.from_pretrained(tmp_path)
    for each in (model, again):
        each.set_attention("reference")
    assert text_logits(again, batch).equal(text_logits(model, batch))
    _, ledger = change_mechanism(model, PRESETS["casa"], seed=0)
    assert {fate.name.split(".")[1]: fate.fate for fate in ledger if fate.name.startswith("casa.")} == {
        "0": "kept", "1": "copied", "2": "kept",
    }  # fmt: skip
    assert not same_as_layers(model)
    for block in model.casa.values():
        block.reset_parameters()
    assert same_as_layers(model)


def in_passes(model, documents, cuts, of_pass):
    """Logits of prompts in passes that end at some columns, with these of their images; what layer 0 holds of windows after each."""
    given = tiny.prompt(model, documents)
    ids, mask, pixels = given["input_ids"], given["attention_mask"], given["pixel_values"]
    cache, found, held = None, [], []
    with torch.no_grad():
        whole = model(**given).logits[..., : tiny.VOCAB]
        for first, last, images in zip([0, *cuts], cuts, of_pass, strict=False):
            out = model(
                ids[:, first:last], mask[:, :last], pixels[images] if images else None, cache=cache, use_cache=True
            )
            cache = out[CACHE]
            found.append(out.logits[..., : tiny.VOCAB])
            held.append((cache.media[0][0].shape[2], cache.media[0][2].sum(1).tolist()) if cache.media else None)
    assert tiny.max_error(torch.cat(found, 1), whole) <= 2 * BOUND
    return held, cache


@pytest.mark.parametrize("decoder", ["llama-gqa", "mistral-window"])
def test_the_cache_holds_the_last_window_alone(decoder):
    """Of a batch whose sequences get an image at different times, twice or never: as in one pass."""
    model = tiny.model(decoder, "casa")
    documents = [[4, 0, 3, 0, 5], [24, 0, 4], [2, 0, 26], [38]]
    held, cache = in_passes(model, documents, [20, 22, 42, 43, 44], [[0, 3], [], [1, 2], [], []])
    assert held == [
        (18, [16, 0, 18, 0]), (20, [18, 0, 20, 0]), (40, [19, 18, 40, 0]), (41, [20, 19, 41, 0]), (42, [21, 20, 42, 0]),
    ]  # fmt: skip
    assert cache.masks["text"].sum(1).tolist() == [12, 28, 28, 38]
    held, cache = in_passes(model, documents[:1], [22, 42, 44], [[0], [1], []])
    assert held == [(18, [18]), (19, [19]), (21, [21])]  # what the second image replaces is gone
    assert cache.media[0][0].untyped_storage().nbytes() == cache.media[0][0].nbytes  # for good
    held, _ = in_passes(model, documents[1:2], [10, 11, 42, 44], [[], [], [0], []])
    assert held == [None, None, (18, [18]), (20, [20])]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("mechanism", ["casa", "ee_mllm", "vica"])
def test_a_pass_may_end_with_an_image_or_be_one(mechanism, backend):
    """Then no text of it sees the image."""
    model = tiny.model("llama-gqa", mechanism)
    model.set_attention(backend)
    in_passes(model, [[3, 0, 4]], [3 + tiny.TOKENS, 7 + tiny.TOKENS], [[0], []])
    in_passes(model, [[0, 4]], [tiny.TOKENS, 4 + tiny.TOKENS], [[0], []])


def test_keys_of_images_are_not_cached_for_other_prompts():
    """Blocks make them anew, layers have none."""
    model, given = tiny.model("llama-gqa", "casa"), tiny.prompt(tiny.model(), [[3, 0, 4]])
    with torch.no_grad():
        without = model(**given).logits
        model.image_cache = ImageCache(10**9)
        assert model(**given).logits.equal(without) and not model.image_cache.misses


def test_what_makes_no_sense_is_refused():
    for options, told in (
        ({"every": 0}, "options.every: found 0, expected 1 or more"),
        ({"cross_layers": "all"}, "options: needs cross_layers none"),
        ({"visual_positions": "sequence"}, "options: needs cross_layers none"),
    ):
        with pytest.raises(ConfigError, match=told):
            build_mechanism("casa", 3, options)
