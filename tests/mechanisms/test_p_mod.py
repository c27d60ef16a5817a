"""Routers of visual tokens: how many they let through, how they begin and learn, what is refused, and what becomes of them."""

from dataclasses import replace
from math import cos, pi

import pytest
import tiny
import torch
from lib.equations import plain
from lib.mechanisms import BOUND, PACK, check_flops_and_cache, text_logits

from lit_eemllm.core.ranking import Highest
from lit_eemllm.core.select import Routed, Share
from lit_eemllm.errors import ConfigError
from lit_eemllm.formats.mechanism import change_mechanism
from lit_eemllm.mechanisms import PRESETS, build_mechanism
from lit_eemllm.model.image_cache import ImageCache

ALL_ROUTED = replace(PRESETS["p_mod"], average=0.3)


def test_shares_of_its_script():
    """Of 32 layers, by hand: the first whose share is at most 0.85 is the eighth, 0.15 is reached in the 24th; in the last a router learns nothing."""
    table = PRESETS["p_mod"].table(32)
    for layer, row in enumerate(table):
        share = cos(pi * layer / 31) / 2 + 0.5
        tokens = 576 if layer < 8 else int(576 * max(share, 0.15))
        assert row.tokens.count(576) == tokens + (layer == 31), "evenly spaced ones are rounded up"
        assert isinstance(row.tokens, Share if layer == 31 else Routed) == (layer >= 8)
    assert Routed(0.1, 0).count(4) == 1 and Routed(0.1, 0).count(0) == 0 and Routed(0.7, 0).count(10) == 7


def test_routers_begin_at_zero_and_learn_through_what_they_weigh():
    """Then every weight is one, and of equal scores the first tokens of each image are taken."""
    model, batch = tiny.model("llama-gqa", ALL_ROUTED), tiny.pack(PACK)
    for inner in model.routers.values():
        inner["router"].reset_parameters()
    begun = text_logits(model, batch)
    assert tiny.max_error(begun, plain(model, batch)) <= BOUND
    model.packed_loss(batch).backward()
    assert all(p.grad.count_nonzero() for p in model.routers.parameters())
    torch.optim.SGD(model.routers.parameters(), lr=1.0).step()
    assert tiny.max_error(text_logits(model, batch), begun) > 1e-4


def test_of_equal_scores_the_first_and_each_image_its_own():
    highest = Highest.of(list(torch.arange(7).split([4, 3])), 7, [2, 1])
    assert highest(torch.tensor([1.0, 3.0, 3.0, 3.0, -5.0, -5.0, -4.0])).tolist() == [1, 2, 6]
    assert highest(torch.zeros(7)).tolist() == [0, 1, 4]


@pytest.mark.parametrize("decoder", ["llama-gqa", "qwen3", "olmo2", "smollm3", "gemma3_text", "llama4_text"])
def test_costs_are_counted_to_the_last_flop(decoder):
    check_flops_and_cache(tiny.model(decoder, ALL_ROUTED))


def test_recomputing_activations_changes_nothing():
    model, batch, gradients = tiny.model("llama-gqa", ALL_ROUTED, layers=8).train(), tiny.pack(PACK), []
    for again in (False, True):
        model.activation_checkpointing = again
        model.zero_grad()
        model.packed_loss(batch).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(model.routers) == 7
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_keys_of_an_image_are_not_cached_for_other_prompts():
    """Though they depend on no text: which tokens they are of, scores alone tell."""
    model, inputs = (
        tiny.model("llama-gqa", replace(ALL_ROUTED, dense_layers="none")),
        tiny.prompt(tiny.model(), [[3, 0, 4]]),
    )
    with torch.no_grad():
        true = model(**inputs).logits
        model.image_cache = ImageCache(10**9)
        assert model(**inputs).logits.equal(true) and model.image_cache.misses == 0


def test_conversion_keeps_routers_where_layers_have_one():
    model, _ = change_mechanism(tiny.model("llama-gqa", "llava"), ALL_ROUTED, seed=0)
    assert all(not p.any() for p in model.routers.parameters()) and set(model.routers) == {"0", "1"}
    with torch.no_grad():
        for parameter in model.routers.parameters():
            parameter.add_(torch.randn_like(parameter))
    held = model.routers["1"]["router"].score.weight.clone()
    fewer, ledger = change_mechanism(model, replace(ALL_ROUTED, average=0.5), seed=0)
    assert set(fewer.routers) == {"1"} and fewer.routers["1"]["router"].score.weight.equal(held)
    assert {(fate.name[:9], fate.fate) for fate in ledger if fate.name.startswith("routers")} == {
        ("routers.0", "dropped"),
        ("routers.1", "kept"),
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"options": {"least": 0.9}}, "options.least: found 0.9 to 0.85, expected shares between 0 and 1"),
        ({"options": {"most": 1.0}}, "options.least: found 0.15 to 1"),
        ({"visual_drop": [[2, 0.5]]}, "visual_drop: routers choose among all tokens"),
        ({"cross_layers": [0, 1, 2], "dense_layers": [0, 1, 2]}, r"cross_layers: layers \[2, 3, 4, 5, 6\] have a router that"),
        ({"rows": [{"layers": "5", "ffn": "every 2"}]}, "rows.5.ffn: some tokens only"),
        ({"rows": [{"layers": "5", "seen": "every 2"}]}, "rows.5: 0.1883 by the router of 5 cannot be combined with every 2"),
        ({"rows": [{"layers": "6", "tokens": "all but 0.5 ranked in 6"}]}, "rows.7.tokens: found even 0.15, expected none"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        build_mechanism("p_mod", 8, changes)
