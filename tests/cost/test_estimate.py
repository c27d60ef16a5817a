"""Costs against the papers' figures (mechanisms table, 7B shapes) and by hand, and `lit-eemllm estimate`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from transformers import LlamaConfig

from lit_eemllm import cli
from lit_eemllm.config import load_config
from lit_eemllm.core.select import Routed
from lit_eemllm.cost.estimate import mechanisms_of
from lit_eemllm.cost.formulas import cache_bytes, decode_flops, prefill_flops
from lit_eemllm.cost.trace import Document, Step, trace
from lit_eemllm.cost.weightless import parts_of_config, parts_of_shape
from lit_eemllm.mechanisms import NO_ALIGNER, PRESETS, Mechanism, build_mechanism
from lit_eemllm.model.vision import register_vision_encoder

VICUNA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32
)
ROWS = {name: build_mechanism(name, 32) for name in ("llava", "ee_mllm", "naavit", "saisa", "vica")}
ROWS["no aligner (ShortV in all layers, FreezeVis)"] = Mechanism(aligner=NO_ALIGNER)
TERA = {
    "llava": (8.504, 42.675, 80.718),
    "ee_mllm": (7.692, 35.137, 62.211),
    "naavit": (7.074, 32.045, 56.950),
    "saisa": (2.860, 10.978, 21.107),
    "no aligner (ShortV in all layers, FreezeVis)": (2.087, 7.112, 14.530),
    "vica": (1.143, 2.388, 6.123),
}


# --- the papers' figures
@pytest.mark.parametrize("name", ROWS)
def test_published_prefill_flops(name):
    options = {"last_layer_saving": False, "vision_width": 1024, "prefix": 35 * (name == "vica")}
    shapes = [(64, 576), (64, 2880), (256, 4900)]
    found = [prefill_flops(ROWS[name], VICUNA_7B, text, visual, **options) / 1e12 for text, visual in shapes]
    assert [round(value, 3) for value in found] == list(TERA[name])


def test_text_only_last_layer_and_grouped_queries():
    for mechanism in (*ROWS.values(), build_mechanism("flamingo", 32)):
        assert round(prefill_flops(mechanism, VICUNA_7B, 64, 0) / 1e12, 3) == 0.831
    h, m, text, visual = 4096, 11008, 64, 576
    full = prefill_flops(build_mechanism("ee_mllm", 32), VICUNA_7B, text, visual, last_layer_saving=False)
    assert full - prefill_flops(build_mechanism("ee_mllm", 32), VICUNA_7B, text, visual) == visual * (
        2 * h * h + 6 * h * m
    )
    tiny = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    rows = 3 * 2 * (8 * 8 + 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16) + 4 * 3 * (3 + 5) * 8
    assert prefill_flops(build_mechanism("llava", 1), tiny, 3, 5) == rows + 5 * 4 * 8 * 4


def test_the_formula_of_the_ee_mllm_paper_forgets_a_product_of_every_token():
    """With 16 h² for the feed-forward network of a token, as it has: 6 of 8 h² for Q, K, V, O of text, and 4 of 6 for
    K, V, O of visual tokens."""
    h, layers = 3072, 32  # so that 3 h m = 8 h²
    config = LlamaConfig(hidden_size=h, intermediate_size=8 * h // 3, num_hidden_layers=layers, num_attention_heads=24)
    for text, visual, printed in ((256, 4900, 0.7009), (64, 576, 0.823), (256, 2880, 0.754)):
        d, both = layers, text + visual
        # Printed with h = 4096: the share does depend on the width.
        paper = 2 * (11 * text + 10 * visual) * d * 4096**2 + 4 * text * both * d * 4096
        dense = 24 * both * d * 4096**2 + 4 * both**2 * d * 4096
        assert paper / dense == pytest.approx(printed, abs=5e-4)
        ours = prefill_flops(build_mechanism("ee_mllm", layers), config, text, visual, last_layer_saving=False)
        paper = 2 * (11 * text + 10 * visual) * d * h**2 + 4 * text * both * d * h
        assert ours - paper == 2 * both * d * h**2
        assert prefill_flops(build_mechanism("llava", layers), config, text, visual, False) == (
            24 * both * d * h**2 + 4 * both**2 * d * h
        )
    vicuna = LlamaConfig(hidden_size=4096, intermediate_size=10923, num_hidden_layers=32, num_attention_heads=32)
    ours, dense = (
        prefill_flops(build_mechanism(name, 32), vicuna, 256, 4900, last_layer_saving=False)
        for name in ("ee_mllm", "llava")
    )
    assert ours / dense == pytest.approx(0.770, abs=5e-4)


def test_vica_with_and_without_dropping():
    """Its visual compute: 0.31 T printed; half the tokens leave half of it, and ranking them takes their keys."""
    text_only = prefill_flops(ROWS["vica"], VICUNA_7B, 55, 0)
    found = prefill_flops(ROWS["vica"], VICUNA_7B, 55, 576, prefix=35) - text_only
    assert round(found / 1e12, 2) == 0.31
    drop = replace(ROWS["vica"], visual_drop=((1, 0.25), (7, 0.25), (10, 0.25)))
    keys = 576 + 576 + 432 + 3 * 288 + 2 * 144  # of layers 0, 1, 7, 8 to 10, 11 and 14
    values = scores = 576 + 432 + 3 * 288 + 3 * 144  # of those that stay
    ranking = 3 * 55 + 576 + 432 + 288  # scores of three queries
    expected = (keys + values + 3) * 2 * 4096**2 + (4 * 20 * scores + 2 * ranking) * 4096
    assert prefill_flops(drop, VICUNA_7B, 55, 576, prefix=35) - text_only == expected


def test_pyramid_drop_as_printed():
    """Of visual tokens alone, a multiply-add counted one, three matrices in the feed-forward network: 3.82 and 1.78 TFLOPs."""
    dense, found = (prefill_flops(PRESETS[name], VICUNA_7B, 0, 576, False) / 2e12 for name in ("llava", "pyramid_drop"))
    ranked, left = 576 + 288 + 144, 288 + 144 + 72  # in the three layers that rank, and what they leave
    ranking = 3 * 4096**2 + ranked * 4096 + (ranked - left) * 4096**2  # queries, their scores, keys of those that leave
    assert round(dense, 2) == 3.82
    assert round(found - ranking / 1e12, 2) == 1.78
    assert ranking / 1e12 / found < 0.005


def test_p_mod_as_printed():
    """53.7 % of the cache is that of visual tokens alone. 55.6 % of the FLOPs are printed without the number of text tokens: it is
    that of 29 beside the picture, and lies between those of none and of 64. Routers are a thousandth of a per cent."""
    llava, found = PRESETS["llava"], PRESETS["p_mod"]
    assert round(100 * cache_bytes(found, VICUNA_7B, 0, 576) / cache_bytes(llava, VICUNA_7B, 0, 576), 1) == 53.7
    shares = {
        text: 100
        * prefill_flops(found, VICUNA_7B, text, 576, False)
        / prefill_flops(llava, VICUNA_7B, text, 576, False)
        for text in (0, 29, 64)
    }
    assert shares[0] < round(shares[29], 1) == 55.6 < shares[64]
    routers = 2 * 4096 * 576 * sum(isinstance(row.tokens, Routed) for row in found.table(32))
    assert 0 < routers < 3e-5 * prefill_flops(found, VICUNA_7B, 0, 576)


def test_fastv_as_printed():
    """K = 3 and R = 50 % of 7B: 57 % printed, without the number of text tokens; it lies between that of none and of 64."""
    fastv = build_mechanism("fastv", 32, {"options": {"after": 3}})
    none, some = (
        prefill_flops(fastv, VICUNA_7B, text, 576, False) / prefill_flops(PRESETS["llava"], VICUNA_7B, text, 576, False)
        for text in (0, 64)
    )
    assert none == pytest.approx(0.54, abs=0.005) and some == pytest.approx(0.587, abs=0.001)


def test_ranks_of_the_encoder_cost_the_decoder_nothing():
    """64 of 576 tokens, by which text reads in the last layer too: all FLOPs are those of LLaVA with an image of 64 tokens."""
    left = [
        build_mechanism("visionzip", 32, {"options": {"drop": drop}}).table(32)[0].tokens.count(576)
        for drop in (0.6667, 0.7778)
    ]
    assert left == [192, 128]
    for saving in (True, False):
        found = prefill_flops(PRESETS["visionzip"], VICUNA_7B, 64, 576, saving)
        assert found == prefill_flops(PRESETS["llava"], VICUNA_7B, 64, 64, saving)
    assert cache_bytes(PRESETS["visionzip"], VICUNA_7B, 64, 576) == cache_bytes(PRESETS["llava"], VICUNA_7B, 64, 64)


def test_hidrop_leaves_a_tenth_of_the_tokens():
    left = [row.tokens.count(1000) / 1000 for row in PRESETS["hidrop"].table(32)]
    assert sum(left) / 32 == pytest.approx(0.1, abs=0.01)


# --- the verb
@pytest.fixture
def parts(tmp_path):
    """Config files of decoder and encoder, without weights."""
    tiny.write_parts(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    for other in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "decoder" / other).unlink()
    (tmp_path / "encoder" / "preprocessor_config.json").unlink()
    return tmp_path


@pytest.fixture
def written(parts):
    """A configuration file of these parts."""
    lines = ["data: {train: none}", "optim: {lr: 1e-3, max_steps: 1}", "model:", f"  decoder: {parts / 'decoder'}"]
    file = parts / "config.yaml"
    file.write_text("\n".join([*lines, f"  vision: {{path: {parts / 'encoder'}, select_layer: -1}}"]) + "\n")
    return str(file)


def test_the_verb_needs_no_weights(written, capsys, monkeypatch):
    traced: dict[Mechanism, Step] = {}  # the second time it is asked for the same

    def once(config, parts, mechanism, *rest):
        if mechanism not in traced:
            traced[mechanism] = trace(config, parts, mechanism, *rest)
        return traced[mechanism]

    monkeypatch.setattr("lit_eemllm.cost.trace.trace", once)
    line = ["estimate", written, "--text", "10", "--batch", "3", "--gpus", "2", "trainer.accumulate_grad_batches=4"]
    assert cli.main([*line, "--json", "model.mechanism.gated.every=null"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["mechanisms"]) == list(PRESETS) and found["configured"] == "ee_mllm"
    assert (found["visual"], found["targets"], found["documents"], found["accumulate"]) == (16, 10, 3, 4)
    assert found["computes_llava"] == ["ee_mllm_f", "shortv", "operator_skipping"]
    config = load_config([written])
    parts = parts_of_config(config.model)
    for name, row in found["mechanisms"].items():
        mechanism = build_mechanism(name, 3)
        assert row["mechanism"] == mechanism.to_dict()
        prompt = (mechanism, parts.decoder, 10, 16)
        flops = row["flops"]
        assert flops["prefill"] == prefill_flops(*prompt, vision_width=16)
        assert flops["prefill_published"] == prefill_flops(*prompt, last_layer_saving=False, vision_width=16)
        assert flops["decode"] == decode_flops(*prompt)
        assert row["cache_bytes"] == 3 * cache_bytes(*prompt, itemsize=4)
        if name == "saisa":
            step = trace(config, parts, mechanism, Document(10, 16, 10))
            assert flops["training_forward"] == 4 * 3 * step.forward_flops
            assert flops["training_backward"] == 4 * 3 * step.backward_flops
            assert row["training_bytes"]["activations"] == 3 * step.activations
            assert row["training_bytes"]["logits"] == 3 * step.logits == 3 * 10 * 12 * parts.decoder.vocab_size
            fits, most = row["fits"], 0.9 * 80 * 2**30
            for way, options in (("ddp", {}), ("fsdp", {"sharded": True})):
                for more, checkpointing in (("", False), ("_recomputing", True)):
                    given = {**options, "checkpointing": checkpointing, "gpus": 2, "accumulate": 4}
                    assert fits[way + more]["bytes"] == step.most_bytes(3, **given)
                    assert fits[way + more]["most_documents"] == step.most_documents(most, **given)
    assert cli.main(line) == 0
    shown = capsys.readouterr().out
    assert shown.count("saisa") == 3 and "a pack: 3 documents; a step: 4 packs on each of 2 GPUs" in shown


def test_a_pack_is_filled_as_the_data_section_says(written, capsys):
    def documents(*more: str) -> int:
        assert cli.main(["estimate", written, "--only", "--json", "--text", "84", "data.max_length=50", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert list(found["mechanisms"]) == [found["configured"]]
        return found["documents"]

    assert documents("data.pack_tokens=999") == 9
    assert documents("data.pack_tokens=999", "data.pack_samples=4") == 4
    assert documents("data.pack_tokens=50", "--gpus", "1") == 1
    assert documents("data.pack_tokens=999", "--batch", "40") == 40


def test_a_changed_mechanism_stands_beside_the_presets(written, capsys):
    changed, parts = "model.mechanism.aligner.ffn=false", parts_of_shape("vicuna-7b")
    for overrides, own in ([], "ee_mllm"), ([changed], "ee_mllm, changed"):
        mechanisms, name = mechanisms_of(load_config([written], overrides), 3, False, parts)
        assert name == own and list(mechanisms) == list(dict.fromkeys([*PRESETS, own]))
    assert cli.main(["estimate", written, "--json", changed, "--gpus", "1", "--only"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["mechanisms"]) == [found["configured"]] == ["ee_mllm, changed"]
    row = found["mechanisms"]["ee_mllm, changed"]
    assert row["mechanism"]["aligner"] == {"value": True, "output": True, "ffn": False}
    assert set(row["fits"]) == {"ddp", "ddp_recomputing"}


def test_a_schedule_is_what_its_steps_cost(written, capsys):
    """Four fifths of the steps by one mechanism, a fifth by another, with a teacher; after the tenth step half of each."""
    text = "[{weight: 4, steps: 1-10, mechanism: {preset: vica}}, {weight: 1, teacher: {preset: naavit}}, {steps: 11-, mechanism: {preset: vica}}]"
    line = ["estimate", written, "--text", "10", "--batch", "3", "--gpus", "2", "--only", "optim.max_steps=10"]

    def estimated(*more):
        assert cli.main([*line, "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    one, other, teacher = (
        estimated(f"model.mechanism.preset={name}")["mechanisms"][name] for name in ("vica", "llava", "naavit")
    )
    both = estimated("model.mechanism.preset=llava", f"optim.mechanisms={text}")
    row = both["mechanisms"]["llava, scheduled"]
    assert row["flops"]["prefill"] == other["flops"]["prefill"] and row["mechanism"] == other["mechanism"]
    found = {name: row["flops"][f"training_{name}"] for name in ("forward", "backward", "recomputed")}
    a, b, t = ({name: each["flops"][f"training_{name}"] for name in found} for each in (one, other, teacher))
    assert found["forward"] == pytest.approx(0.8 * a["forward"] + 0.2 * (b["forward"] + t["forward"]))
    assert found["backward"] == pytest.approx(0.8 * a["backward"] + 0.2 * b["backward"])
    bytes_of = row["training_bytes"]
    assert bytes_of["activations"] == other["training_bytes"]["activations"] > one["training_bytes"]["activations"]
    assert bytes_of["logits"] == pytest.approx(28 / 12 * other["training_bytes"]["logits"])
    assert row["fits"]["ddp"]["bytes"] > other["fits"]["ddp"]["bytes"] and both["schedule"][0].startswith(
        "about 80.0% of 10 steps: {weight: 4"
    )
    assert (
        cli.main(
            [
                *line,
                "model.mechanism.preset=llava",
                f"optim.mechanisms={text}",
                "optim.max_steps=null",
                "optim.epochs=1",
            ]
        )
        == 0
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert "trained by a schedule: about 50.0% of a long run: {weight: 1, teacher: {preset: naavit}}" in shown
    assert (
        "FLOPs of a training step are what is expected of one, and memory is that of the step that takes most" in shown
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--text 0", "--text 0: expected 1 or more"),
        ("--visual -1", "--visual -1: expected 1 or more"),
        ("--batch 0", "--batch 0: expected 1 or more"),
        ("--gpus 0", "--gpus 0: expected 1 or more"),
        ("--memory nan", "--memory nan: expected 1 or more"),
        ("--targets 65", "--targets 65: expected 1 to 64, the text tokens of a document"),
        ("--shape vicuna-70b", "--shape: 'vicuna-70b' is neither a folder with a model's config files nor a shape"),
        ("model.decoder=gone", "model.decoder: AutoConfig cannot load 'gone'"),
        (
            "model.vision.path=PARTS/decoder",
            "is a 'llama', expected one of ['clip_vision_model', ",
        ),
    ],
)
def test_mistakes(written, parts, capsys, options, expected):
    assert cli.main(["estimate", written, *options.replace("PARTS", str(parts)).split()]) == 2
    assert expected in capsys.readouterr().err


def test_an_encoder_of_ones_own(written, capsys):
    own = "model.vision.encoder=patches"
    with tiny.forgotten_imports():
        register_vision_encoder("patches")(tiny.Patches)
        assert cli.main(["estimate", written, own, "--only", "--json", "--visual", "40"]) == 0
        config = load_config([written], [own])
        beside, _ = mechanisms_of(config, 3, False, parts_of_config(config.model))
    assert beside.keys() == PRESETS.keys() - {"visionzip", "deepstack"}, (
        "it does not say what is important, nor what is below"
    )
    flops = json.loads(capsys.readouterr().out)["mechanisms"]["ee_mllm"]["flops"]
    assert flops["encoder"] == 2 * 40 * 48 * 16  # 2.5 images
    assert flops["connector"] == 2 * 40 * (16 * 32 + 32 * 32)


def test_estimate_and_fit_read_one_configuration(tmp_path, monkeypatch):
    """Of the README's stages, whose files say in which types they train, and of a file that does not."""
    read = []
    monkeypatch.setattr("lit_eemllm.cost.estimate.estimate", lambda config, **_: read.append(config))
    model, parts = tmp_path / "my_model.yaml", {"decoder": "x", "vision": {"path": "x"}}
    model.write_text(json.dumps({"model": parts}))
    bare = tmp_path / "bare.yaml"
    bare.write_text(json.dumps({"data": {"train": "x"}, "optim": {"lr": 1, "max_steps": 1}}))
    stages = Path(__file__).parents[2] / "configs" / "stages"
    for file, precision, dtype in [
        (stages / "pretrain.yaml", "bf16-mixed", "bfloat16"),
        (stages / "finetune.yaml", "bf16-mixed", "bfloat16"),
        (bare, None, "float32"),
    ]:
        assert cli.main(["estimate", str(file), str(model), "--shape", "vicuna-7b"]) == 0
        for config in (load_config([file, model], ["data.train=x"]), read.pop()):
            assert (config.trainer.get("precision"), config.model.dtype) == (precision, dtype)
    assert cli.main(["estimate", "--shape", "vicuna-7b"]) == 0
    assert read[0].trainer["precision"] == "bf16-mixed", "where no file says it"
