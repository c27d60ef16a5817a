"""Every mechanism against a plain implementation written from the equations, and how a table of layers is said and read."""

import itertools
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lib.backends import TRAINABLE
from lib.equations import FAMILIES, MECHANISMS, plain
from lib.mechanisms import (
    BOUND,
    PACK,
    check_frozen_in_16_bits,
    check_gradients,
    check_later_turns,
    check_packing,
    compared_gradients,
    text_logits,
)

from lit_eemllm.attention.reference import Reference
from lit_eemllm.core.select import NOTHING, parse_select
from lit_eemllm.core.table import IDLE, LayerPlan, executed
from lit_eemllm.errors import ConfigError
from lit_eemllm.mechanisms import NO_ALIGNER, PRESETS, Mechanism, build_mechanism
from lit_eemllm.model.image_cache import ImageCache


@pytest.mark.parametrize(("decoder", "backends"), [
    ("llama-gqa", ["reference", "sdpa", "flash_attn_2", "xformers"]), ("qwen3", ["sdpa", "torch_2_13"]), ("olmo2", ["sdpa"]),
    pytest.param("smollm3", ["sdpa"], marks=pytest.mark.slow), ("gemma3_text", ["sdpa"]),
    ("llama4_text", ["sdpa", "torch_2_13"]), pytest.param("olmo3", ["torch_2_13"], marks=pytest.mark.slow),
    pytest.param("mistral-window", ["xformers"], marks=pytest.mark.slow),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism_equals_its_equations_with_gradients(name, decoder, backends):
    """Through every backend; kernels of GPUs are emulated (tests/attention/test_attention.py). In float64, or what is
    ranked is rounded within the bound by one CPU and not by the next."""
    model, batch = tiny.model(decoder, MECHANISMS[name]).double(), tiny.pack(PACK, dtype=torch.float64)
    true, found = plain(model, batch), []
    for backend in backends:
        model._backend = TRAINABLE.get(backend, Reference)()
        found.append(text_logits(model, batch))
        assert tiny.max_error(found[-1], true) <= BOUND, backend
    compared = compared_gradients(model, batch, true, *found)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("vision")]
    assert len(compared) > 0.8 * len(trained)
    without = text_logits(model, replace(batch, pixel_values=-2 * batch.pixel_values))
    assert not torch.allclose(true, without, rtol=1e-3)  # the images matter


@given(
    tiny.tables(),
    st.sampled_from(["llama-gqa", "llama", "olmo2", "smollm3", "gemma3_text", "llama4_text"]),
    st.sampled_from(["reference", "sdpa"]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
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


def test_images_whose_queries_grow_with_the_position_are_not_kept_for_other_positions():
    """In windows of their own, in Llama 4's layers without rotary positions."""
    model, batch = tiny.model("llama4_text", Mechanism(visual_window=3)), tiny.pack(PACK)
    model.image_cache = ImageCache(10**9)
    with torch.no_grad():
        assert tiny.max_error(text_logits(model, batch), plain(model, batch)) <= BOUND


@pytest.mark.parametrize("name", MECHANISMS)
def test_without_image_every_mechanism_is_the_base_model(name):
    model, batch = tiny.model("llama-gqa", MECHANISMS[name]), tiny.pack([[5], [9]])
    base = tiny.model("llama-gqa", "llava", layers=tiny.layers_of(MECHANISMS[name]))
    base.language_model.load_state_dict(model.language_model.state_dict())
    assert tiny.max_error(text_logits(model, batch), text_logits(base, batch)) <= BOUND


@pytest.mark.parametrize("decoder", FAMILIES)
@pytest.mark.parametrize("pack", [PACK, [[5], [9]]], ids=["images", "text only"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_every_trainable_tensor_has_a_gradient(name, pack, decoder):
    model = tiny.model(decoder, MECHANISMS[name])
    if name.startswith("p_mod"):
        # of what is routed, text would see nothing: the tokens in the last layer lie outside of its window or chunk
        model.language_model.model.layers[-1].window = None
    check_gradients(model, pack)


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


@pytest.mark.parametrize("decoder", FAMILIES)
@pytest.mark.parametrize("name", MECHANISMS)
def test_packing_leaks_nothing(name, decoder):
    check_packing(tiny.model(decoder, MECHANISMS[name]))


@pytest.mark.parametrize("decoder", FAMILIES)
@pytest.mark.parametrize("name", PRESETS)
def test_a_decoder_frozen_in_bfloat16_trains_and_generates_without_autocast(name, decoder):
    check_frozen_in_16_bits(tiny.model(decoder, MECHANISMS[name]))


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
        ("vica", {"cross_layers": [0], "visual_drop": [[1, 0.5]]}, "expected layers in which text sees the image"),
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
