"""Models under other mechanisms: what is kept, copied, fresh and dropped."""

from dataclasses import replace

import pytest
import tiny
import torch
import yaml
from lib.llava import BOUND, assert_same_tensors, shake, tensors

from lit_eemllm.errors import ConfigError
from lit_eemllm.formats.mechanism import change_mechanism, choose_mechanism, mechanism_settings
from lit_eemllm.formats.vlm import load_vlm
from lit_eemllm.mechanisms import PRESETS, Aligner, Mechanism, build_mechanism
from lit_eemllm.mechanisms.flamingo import Gated
from lit_eemllm.model import EEMLLM


def logits(model, batch):
    with torch.no_grad():
        return model.packed_logits(batch)


def fates(ledger):
    return {(fate.name.partition(".")[0], fate.fate) for fate in ledger}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_llava_becomes_any_mechanism_with_its_weights_untouched(llava_folder, preset):
    model, _ = load_vlm(llava_folder)
    before, batch = tensors(model), tiny.pack([[3, 0, 4], [6]])
    mechanism = build_mechanism(preset, 3)
    new, ledger = change_mechanism(model, mechanism, seed=0)
    after = tensors(new)
    assert new.mechanism == mechanism and Mechanism.from_dict(new.config.mechanism) == mechanism
    assert_same_tensors(new, before, but=("projector.",))
    assert {fate.name for fate in ledger if fate.fate != "dropped"} == set(after)
    assert sum(fate.numel for fate in ledger if fate.fate != "dropped") == sum(t.numel() for t in after.values())
    stays = {("vision", "kept"), ("language_model", "kept")}
    if preset == "saisa":
        assert fates(ledger) == stays | {("projector", "copied")}
        for layer in range(3):
            for part in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"):
                assert after[f"projector.layers.{layer}.{part}"].equal(before[f"projector.{part}"])
    elif preset == "flamingo":
        assert fates(ledger) == stays | {("projector", "fresh"), ("projector", "dropped"), ("gated", "fresh")}
    elif new.blocks:
        begins = "copied" if preset in ("visual_experts", "casa") else "fresh"
        assert fates(ledger) == stays | {("projector", "kept"), (mechanism.blocks_name, begins)}
    else:
        assert fates(ledger) == stays | {("projector", "kept")} and new is model
    fresh = EEMLLM(new.config)  # what a model of this mechanism holds
    fresh.load_state_dict(after)
    assert logits(new, batch).equal(logits(fresh.eval(), batch))


def test_saisas_second_stage_begins_where_the_first_ended():
    """One projector for all layers is a constant visual stream: the same function as layerwise copies of it."""
    first = replace(PRESETS["saisa"], visual_source="stream")
    model, batch = tiny.model("qwen3", first), tiny.pack([[3, 0, 4], [0, 2, 0, 3]])
    shake(model)
    expected = logits(model, batch)
    new, _ = change_mechanism(model, PRESETS["saisa"], seed=0)
    assert tiny.max_error(logits(new, batch), expected) <= BOUND
    back, ledger = change_mechanism(new, first, seed=0)
    assert fates(ledger) == {("vision", "kept"), ("language_model", "kept"), ("projector", "copied")}
    assert tiny.max_error(logits(back, batch), expected) <= BOUND
    new, _ = change_mechanism(back, PRESETS["saisa"], seed=0)
    with torch.no_grad():
        new.projector.layers[2].linear_1.bias[0] += 1
    with pytest.raises(ConfigError, match=r"only if they are equal, but layers 2 differ from layer 0"):
        change_mechanism(new, first, seed=0)


def test_gated_modules_begin_as_in_a_fresh_model_and_stay_when_they_can():
    batch = tiny.pack([[3, 0, 4], [6]])
    gated = Gated(every=2, latents=4, heads=2, head_size=4, depth=1)
    flamingo = replace(PRESETS["flamingo"], gated=gated)

    def converted(seed):
        return change_mechanism(tiny.model("llama", "ee_mllm"), flamingo, seed)[0]

    model, state = converted(3), torch.get_rng_state()
    assert_same_tensors(converted(3), tensors(model))
    assert not converted(4).projector.latents.equal(model.projector.latents)
    assert torch.get_rng_state().equal(state)
    assert {name for name, p in model.gated.named_parameters() if not p.any()} == {
        f"{layer}.{part}_gate" for layer in (0, 2) for part in ("attention", "ffn")
    } | {f"{layer}.{norm}.bias" for layer in (0, 2) for norm in ("attention.norm", "ffn.0")}
    changed = replace(batch, pixel_values=-batch.pixel_values)
    assert logits(model, batch).equal(logits(model, changed))  # no image is seen yet

    shake(model)
    kept = tensors(model)
    more = replace(flamingo, gated=replace(gated, every=1, immediate=False))
    model, ledger = change_mechanism(model, more, seed=0)
    assert_same_tensors(model, kept)
    assert {fate.name.split(".")[1] for fate in ledger if fate.fate == "fresh"} == {"1"}
    other = replace(flamingo, gated=replace(gated, heads=4, head_size=2))  # the same shapes, another function
    model, ledger = change_mechanism(model, other, seed=0)
    assert fates(ledger) == {
        ("vision", "kept"), ("language_model", "kept"), ("projector", "fresh"), ("gated", "fresh"), ("gated", "dropped"),
    }  # fmt: skip
    model, ledger = change_mechanism(model, PRESETS["llava"], seed=0)
    assert {("gated", "dropped"), ("projector", "dropped"), ("projector", "fresh")} < fates(ledger)
    assert_same_tensors(model, kept, but=("projector.", "gated."))

    direct = replace(flamingo, gated=replace(gated, latents=0))  # media tokens are the projected visual tokens
    before = tensors(model)
    model, ledger = change_mechanism(model, direct, seed=0)
    assert ("projector", "kept") in fates(ledger)
    assert_same_tensors(model, before)


@pytest.mark.parametrize(
    "mechanism",
    [
        *(preset.stretched(3) for preset in PRESETS.values()),
        Mechanism(dense_layers=(1,), aligner=Aligner(ffn=False)),
        replace(PRESETS["vica"].stretched(3), cross_layers=(0, 1, 2), visual_drop=((1, 0.25), (2, 0.5))),
        replace(PRESETS["flamingo"], gated=Gated(every=2, latents=0)),
        replace(PRESETS["saisa"], visual_source="stream", visual_positions="unrotated"),
    ],
    ids=str,
)
def test_settings_give_back_the_mechanism(mechanism):
    settings = yaml.safe_load(yaml.safe_dump(mechanism_settings(mechanism, 3)))
    assert choose_mechanism(Mechanism(), 3, settings) == mechanism
    if mechanism in [preset.stretched(3) for preset in PRESETS.values()]:
        assert settings.keys() == {"preset"}


def test_overrides_change_the_sources_mechanism_or_a_preset():
    source = Mechanism(dense_layers=(0,), aligner=Aligner(ffn=False), visual_positions="sequence")
    assert choose_mechanism(source, 3, {}) == source
    changed = choose_mechanism(source, 3, {"dense_layers": [1], "aligner": {"value": False, "output": False}})
    assert changed == replace(source, dense_layers=(1,), aligner=Aligner(False, False, False))
    assert choose_mechanism(source, 3, {"preset": "llava"}) == PRESETS["llava"]
    with pytest.raises(ConfigError, match=r"dense_layers: found \[9\]"):
        choose_mechanism(source, 3, {"dense_layers": [9]})
