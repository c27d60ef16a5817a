"""Training, resuming and looking at runs whose images have many sizes, and learning rates by the encoder's depth."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
from lib.mechanisms import KINDS
from lib.vision import make_model, pack, picture

from lit_eemllm import cli
from lit_eemllm.config import load_config
from lit_eemllm.config.keys import LoraConfig, OptimConfig, TuningConfig
from lit_eemllm.cost.estimate import estimate
from lit_eemllm.data import shards
from lit_eemllm.errors import ConfigError
from lit_eemllm.evaluation.run import load
from lit_eemllm.training.checkpoint import all_checkpoints, read_checkpoint
from lit_eemllm.training.fit import fit
from lit_eemllm.training.initial import initial_model
from lit_eemllm.training.module import LitEEMLLM
from lit_eemllm.training.tuning import apply_tuning, parameter_groups

SIZES = [(40, 20), (9, 30), (5, 5), (64, 17), (17, 64), (30, 30)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A decoder, and encoders of every kind, as folders."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.write_parts(folder)
    norm = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    for family, preprocessor in {
        "siglip2": {"max_num_patches": 20},
        "idefics2": {"size": {"shortest_edge": 8, "longest_edge": 20}},
        "clip": {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True},
    }.items():
        tiny.vision(family).model.save_pretrained(folder / family)
        (folder / family / "preprocessor_config.json").write_text(json.dumps(preprocessor | norm))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards of conversations about pictures of many sizes; the colour is to be said."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    rows: dict[str, list] = {"train": [], "val": []}
    for i in range(90):
        size = SIZES[i % len(SIZES)]
        picture(size, i).save(folder / "images" / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "It is red."}]
        if i % 7 == 0:
            turns[0]["value"] = "What colour?"
        image = {} if i % 7 == 0 else {"image": f"{i}.png"}
        rows["train" if i < 60 else "val"].append({"id": str(i), **image, "conversations": turns})
    files = {split: folder / f"{split}.json" for split in rows}
    for split, file in files.items():
        file.write_text(json.dumps(rows[split]))
    shards.make(files, folder / "images", folder / "shards", shard_size=40)
    return folder / "shards"


def config(parts, data, out, encoder, *overrides):
    folder, policy = {"anyres": ("clip", "anyres")}.get(encoder, (encoder, "native"))
    return load_config([], [
        f"model.decoder={parts / 'decoder'}", f"model.vision.path={parts / folder}", f"model.vision.policy={policy}",
        f"data.train={data}", f"data.val={data}", "data.pack_tokens=800", "data.max_length=300", "data.workers=0",
        "data.shuffle_buffer=10", "data.packing_buffer=12", "optim.max_steps=2", "optim.lr=1e-3", "optim.tuning.llm=full",
        "optim.tuning.vision=full", "optim.save_every=2", "optim.val_every=2", "optim.val_batches=1", "optim.log_every=1",
        "trainer.accelerator=cpu", "model.attention=reference", f"out={out}", *overrides,
    ])  # fmt: skip


@pytest.mark.parametrize("preset", KINDS)
@pytest.mark.parametrize("encoder", ["siglip2", "idefics2", "anyres"])
def test_every_mechanism_trains_with_images_of_many_sizes(parts, data, tmp_path, encoder, preset):
    fit(config(parts, data, tmp_path, encoder, f"model.mechanism.preset={preset}"))
    checkpoint = read_checkpoint(all_checkpoints(tmp_path)[-1])
    assert checkpoint["global_step"] == 2
    newlines = [name for name in checkpoint["state_dict"] if name.endswith("newline")]
    assert len(newlines) == (encoder == "anyres") * {"saisa": 3, "deepstack": 3, "flamingo": 0}.get(preset, 1)


@pytest.mark.parametrize("encoder", ["siglip2", "anyres"])
def test_a_run_continues_bit_for_bit(parts, data, tmp_path, encoder):
    options = ["data.workers=1", "optim.schedule=constant", "optim.warmup_ratio=0"]
    for name, steps in (("cut", 2), ("cut", 4), ("whole", 4)):
        fit(config(parts, data, tmp_path / name, encoder, f"optim.max_steps={steps}", *options))
    states = [read_checkpoint(all_checkpoints(tmp_path / name)[-1])["state_dict"] for name in ("cut", "whole")]
    assert states[0].keys() == states[1].keys()
    assert all(tensor.equal(states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("encoder", ["siglip2", "anyres"])
def test_the_command_line_with_images_of_many_sizes(parts, data, tmp_path, capsys, encoder):
    """validate with shuffled images, inspect, generate and convert: all of them meet several sizes."""
    out = str(tmp_path / "run")
    made = config(parts, data, out, encoder, "eval.samples=8", "eval.max_new_tokens=2", "eval.batch_size=3",
                  "optim.max_steps=1")  # fmt: skip
    fit(made)
    assert cli.main(["validate", out]) == 0
    results = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())
    assert results["loss_shuffled_images"] > 0 and results["types"] and not results["skipped"]
    assert results["prompt_visual_tokens"] % 1 and results["prefill_flops"] > 0
    assert cli.main(["shards", "inspect", out]) == 0
    assert "visual tokens" in (tmp_path / "run" / "inspect" / "train.html").read_text()
    picture((50, 11)).save(tmp_path / "x.png")
    assert cli.main(["generate", out, "--image", str(tmp_path / "x.png"), "--prompt", "What colour?"]) == 0
    assert cli.main(["convert", out, "--out", str(tmp_path / "saisa"), "--mechanism", "saisa"]) == 0
    assert cli.main(["generate", str(tmp_path / "saisa"), "--image", str(tmp_path / "x.png"), "--prompt", "Who?"]) == 0


@pytest.mark.parametrize(("encoder", "tokens"), [("siglip2", 12), ("idefics2", 9), ("anyres", 16 + 8 * 9)])
def test_estimates_count_the_largest_image(parts, data, tmp_path, capsys, encoder, tokens):
    options = [] if encoder == "anyres" else [f"model.vision.max_tokens={tokens}"]
    made = config(
        parts, data, tmp_path, encoder, *options, f"model.mechanism.preset={'flamingo' if options else 'saisa'}"
    )
    estimate(made, only=True, as_json=True)
    assert json.loads(capsys.readouterr().out)["visual"] == tokens


# --- what is trained


def tuned(model, **options):
    optim = OptimConfig(lr=1e-3, max_steps=1, **options)
    apply_tuning(model, optim, "float32")
    return optim


@pytest.mark.parametrize("encoder", ["clip", "siglip2", "idefics2", "anyres"])
@pytest.mark.parametrize("choice", ["frozen", "full", "lora"])
def test_tuning_of_every_encoder(encoder, choice):
    model = make_model(encoder)
    tuning = TuningConfig(vision=choice, projector="full", llm="frozen")
    groups = parameter_groups(model, tuned(model, tuning=tuning, lora=LoraConfig(r=2, dropout=0)))
    model.packed_loss(pack(model, [[3, (40, 20), 4, (9, 30), 2]])).backward()
    trained = [p for group in groups for p in group["params"]]
    vision = [p for p in model.vision.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained) and bool(vision) == (choice != "frozen")
    assert len(trained) == len({id(p) for p in trained}) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("encoder", "layers"), [("clip", 2), ("siglip2", 2), ("siglip2", 3), ("idefics2", 2), ("idefics2", 3)]
)
@pytest.mark.parametrize("choice", ["full", "lora"])
def test_learning_rates_fall_with_depth(encoder, layers, choice):
    model = make_model(encoder)
    model.vision.select_layer = None if layers == 3 else -2
    tuning = TuningConfig(vision=choice, projector="full", llm="frozen")
    options = {"tuning": tuning, "vision_lr": 0.8, "vision_layer_decay": 0.5, "lora": LoraConfig(r=2)}
    groups = parameter_groups(model, tuned(model, **options))
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert groups[0]["lr"] == 0.8
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.startswith("vision."):
            above = next((layers - 1 - i for i in range(layers) if f"layers.{i}." in name), layers)
            above = 0 if "post_layernorm" in name else above
            assert rate[id(parameter)] == 0.8 * 0.5**above, name
    assert {rate[id(p)] for p in model.projector.parameters()} == {1e-3}
    assert len(rate) == sum(p.requires_grad for p in model.parameters())
    plain = parameter_groups(model, replace(OptimConfig(lr=1e-3, max_steps=1, **options), vision_layer_decay=None))
    assert {group["lr"] for group in plain} == {0.8, 1e-3}


def test_an_encoder_without_layers_has_no_rates_by_depth(monkeypatch):
    model = make_model("clip")
    monkeypatch.setattr(type(model.vision), "blocks", lambda self: [])
    with pytest.raises(ConfigError, match="order of its layers"):
        parameter_groups(model, tuned(model, tuning=TuningConfig(vision="full"), vision_layer_decay=0.5))


def test_keys_that_have_no_effect_are_told(parts, data, tmp_path):
    for key, text in (
        ("model.vision.policy=pad model.vision.max_tokens=9", "model.vision.max_tokens: has no effect with policy pad"),
        ("optim.tuning.vision=frozen optim.vision_layer_decay=0.5", "optim.vision_layer_decay: has no effect"),
        ("optim.vision_layer_decay=1.5", "more than 0, to 1"),
        ("model.vision.max_tokens=0", "1 or more"),
    ):
        with pytest.raises(ConfigError, match=text):
            config(parts, data, tmp_path, "siglip2", *key.split())


@pytest.mark.parametrize("preset", ["ee_mllm", "saisa"])
def test_newlines_are_trained_beside_adapters_and_kept(parts, data, tmp_path, preset):
    """No adapter reaches a newline; a run with LoRA trains it, saves it, continues with it and hands it on."""
    lora = ["optim.tuning.projector=lora", "optim.tuning.llm=lora", "optim.tuning.vision=frozen", "optim.lora.r=2",
            f"model.mechanism.preset={preset}"]  # fmt: skip
    made = config(parts, data, tmp_path, "anyres", *lora)
    fit(made)
    state = read_checkpoint(all_checkpoints(tmp_path)[-1])["state_dict"]
    newlines = {name.removeprefix("model."): x for name, x in state.items() if name.endswith("newline")}
    assert len(newlines) == (3 if preset == "saisa" else 1)
    assert not any(name.endswith("linear_1.base_layer.weight") for name in state)
    model, _, _ = load(made, None)
    assert all(model.get_parameter(name).equal(x) for name, x in newlines.items())
    fresh, _, _ = load(made, "none")
    assert all(not fresh.get_parameter(name).equal(x) for name, x in newlines.items())
    torch.manual_seed(5)
    plain = initial_model(replace(made, init_from=str(tmp_path)))[0]
    assert all(plain.get_parameter(name).equal(x) for name, x in newlines.items())
    frozen = LitEEMLLM(plain, config(parts, data, tmp_path, "anyres", "optim.tuning.projector=frozen"))
    assert not any(name.endswith("newline") for name in frozen._kept(frozen.state_dict()))
