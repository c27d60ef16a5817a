"""One new token for each sequence: room in the cache, and steps that are recorded once and replayed."""

from __future__ import annotations

import pytest
import tiny
import torch
from lib.equations import MECHANISMS
from lib.graphs import pretend
from lib.mechanisms import BOUND

from lit_eemllm.compat.transformers import CACHE
from lit_eemllm.model import modeling

SOME = [
    "llava",
    "ee_mllm",
    "vica",
    "flamingo",
    "casa",
    "vica frozen prefix",
    "pyramid_drop",
    "dense, text sees every third",
    "shared positions, dense",
    "visual_experts",
]
DOCUMENTS = [[3, 0, 4], [2, 0, 1, 0, 9], [12]]


def generated(model, new=9, **options):
    inputs = tiny.prompt(model, DOCUMENTS)
    given = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None)
    return model.generate(**inputs, **given, output_logits=True, return_dict_in_generate=True, **options)


def same(found, true) -> bool:
    assert found.sequences.equal(true.sequences)
    return (
        tiny.max_error(torch.stack(found.logits)[..., : tiny.VOCAB], torch.stack(true.logits)[..., : tiny.VOCAB])
        <= BOUND
    )


def without_cache(model, out):
    """Logits of the new tokens, each computed from all before it."""
    inputs = tiny.prompt(model, DOCUMENTS)
    new = out.sequences.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(DOCUMENTS), new, dtype=torch.long)], 1)
    logits = model(out.sequences, mask, inputs["pixel_values"]).logits[:, -new - 1 : -1]
    return logits[..., : tiny.VOCAB].transpose(0, 1)


@pytest.mark.parametrize("name", [name for name in SOME if name != "pyramid_drop"])  # whose ranks are a prompt's
@pytest.mark.parametrize("decoder", ["llama-gqa", "gemma3_text", "llama4_text"])
def test_room_ends_and_is_made_again(name, decoder, monkeypatch):
    """Gemma 3's layers see windows of positions, Llama 4's chunks, and queries grow with the position."""
    monkeypatch.setattr(modeling, "ROOM", 4)
    model = tiny.model(decoder, MECHANISMS[name])
    with torch.no_grad():
        out = generated(model)
        true = without_cache(model, out)
    assert tiny.max_error(torch.stack(out.logits)[..., : tiny.VOCAB], true) <= BOUND
    assert out[CACHE].room == 4 * 2 - 8, "of 9 tokens the prompt gave one"


def test_nothing_moves_while_there_is_room_and_none_of_it_is_counted():
    model = tiny.model("llama-gqa", MECHANISMS["vica"])
    inputs = tiny.prompt(model, DOCUMENTS)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
        prompt, places = cache.num_bytes, set()
        for _ in range(3):
            model(inputs["input_ids"][:, -1:], cache=cache)
            held = [x for layer in cache.layers for x in (layer.keys, layer.values)] + [*cache.masks.values()]
            places.add(tuple(x.data_ptr() for x in (*held, cache.next_position_B, cache.room_1)))
    assert len(places) == 1
    of_a_token = sum(x.nbytes // x.shape[2] for layer in cache.layers for x in (layer.keys, layer.values))
    assert cache.num_bytes == prompt + 3 * of_a_token
    cache.settle()
    assert cache.num_bytes == sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("decoder", ["llama-gqa", "gemma3_text", "llama4_text"])
def test_recorded_steps_say_what_eager_ones_do(name, decoder, monkeypatch):
    graphs = pretend(monkeypatch)
    monkeypatch.setattr(modeling, "ROOM", 4)
    model = tiny.model(decoder, MECHANISMS[name])
    true = generated(model)
    assert not graphs
    model.record_steps = True
    assert same(generated(model), true)
    if name == "casa":  # what it holds of a window grows
        assert not graphs
    else:
        assert [graph.replays for graph in graphs] == [3, 3], "the first step after room was made warms up"


def test_beams_record_anew_where_the_cache_was_moved(monkeypatch):
    graphs = pretend(monkeypatch)
    model = tiny.model("llama-gqa", MECHANISMS["ee_mllm"])
    true = generated(model, num_beams=2)
    model.record_steps = True
    assert generated(model, num_beams=2).sequences.equal(true.sequences)
    assert len(graphs) > 1


def test_a_turn_after_recorded_steps_may_show_an_image(monkeypatch):
    graphs = pretend(monkeypatch)
    model = tiny.model("llama-gqa", MECHANISMS["ee_mllm"])
    inputs, more = tiny.prompt(model, [[3, 0, 8]]), tiny.prompt(model, [[2, 0, 3]], seed=5)
    ids = inputs["input_ids"]
    whole = torch.cat([ids, more["input_ids"]], 1)
    pixels = torch.cat([inputs["pixel_values"], more["pixel_values"]])
    model.record_steps = True
    with torch.no_grad():
        true = model(whole, pixel_values=pixels).logits[..., : tiny.VOCAB]
        cache = model(ids[:, :-4], pixel_values=inputs["pixel_values"], use_cache=True)[CACHE]
        steps = [model(ids[:, i : i + 1], cache=cache).logits for i in range(ids.shape[1] - 4, ids.shape[1])]
        last = model(more["input_ids"], pixel_values=more["pixel_values"], cache=cache).logits
    assert graphs[0].replays == 3
    assert tiny.max_error(torch.cat([*steps, last], 1)[..., : tiny.VOCAB], true[:, ids.shape[1] - 4 :]) <= BOUND
