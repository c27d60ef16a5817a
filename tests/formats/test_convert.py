"""LLaVA checkpoints read and written, and models under other mechanisms: against transformers' own LLaVA, bit by bit."""

import json
import re
import shutil
import signal
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from lit_eemllm import cli
from lit_eemllm.config import load_config, to_yaml
from lit_eemllm.errors import CheckpointError, ConfigError
from lit_eemllm.evaluation.run import load
from lit_eemllm.formats.convert import open_source
from lit_eemllm.formats.llava import check_llava, load_llava, save_llava
from lit_eemllm.formats.mechanism import change_mechanism, choose_mechanism, mechanism_settings
from lit_eemllm.inputs.chat import Conversation, Turn
from lit_eemllm.inputs.images import ImageTransform
from lit_eemllm.mechanisms import PRESETS, Aligner, Mechanism, build_mechanism
from lit_eemllm.mechanisms.flamingo import Gated
from lit_eemllm.model import EEMLLM, Processor

BOUND = 1e-5  # of the largest value, float32
TOWER = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
)
TEXT = {key: value for key, value in tiny.COMMON.items() if key not in ("vocab_size", "attention_bias")}
CLIP = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4],
}  # fmt: skip
SIGLIP = {**CLIP, "image_processor_type": "SiglipImageProcessor", "size": {"height": 16, "width": 16}, "do_center_crop": False}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(parts):
    made = AutoTokenizer.from_pretrained(parts / "decoder")
    made.add_tokens([AddedToken("<image>", special=True)])
    return made


def shake(model):
    """No weight may hide behind a one, a zero or another."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def random_llava(tokenizer, encoder="clip", decoder="llama", sizes=(), **changes):
    """transformers' own, with the image token inside a vocabulary that has room to spare, as LLaVA-1.5's; `sizes` are the decoder's."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(**TOWER) if encoder == "siglip" else CLIPVisionConfig(**TOWER)
    text = (Qwen2Config if "qwen2" in decoder else LlamaConfig)(
        **{**TEXT, "tie_word_embeddings": decoder == "qwen2-tied", **dict(sizes)},
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer) + 7,
    )
    values = {
        "vision_feature_layer": -2 if encoder == "clip" else -1,
        "vision_feature_select_strategy": "default" if encoder == "clip" else "full",
        "image_seq_length": tiny.TOKENS,
        "tie_word_embeddings": "tied" in decoder,
        **changes,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **values,
    )
    llava = LlavaForConditionalGeneration(config).eval()
    shake(llava)
    return llava


def write_llava(llava, tokenizer, folder, preprocessor=None, **options):
    llava.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    default = CLIP if llava.config.vision_config.model_type == "clip_vision_model" else SIGLIP
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor or default))
    return folder


@pytest.fixture(scope="module")
def llava_folder(tokenizer, tmp_path_factory):
    return write_llava(random_llava(tokenizer), tokenizer, tmp_path_factory.mktemp("llava"))


def inputs(vocabulary, image):
    """Three left-padded prompts, with one, two and no images, of text ids below the vocabulary."""
    made = tiny.prompt(tiny.model("llama"), [[3, 0, 4], [2, 0, 1, 0, 3], [6]])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary - 1, made["input_ids"].shape, generator=generator)
    ids += ids >= image
    return {**made, "input_ids": torch.where(made["input_ids"] == tiny.VOCAB, image, ids)}


def assert_same_logits(model, llava):
    """Ours against transformers' at the text tokens, for every token that can be said."""
    image, known = model.config.image_token_id, model.config.text_config.vocab_size
    given = inputs(min(known, llava.config.text_config.vocab_size), image)
    text = given["attention_mask"].bool() & (given["input_ids"] != image)
    said = [token for token in range(known) if token != image]
    with torch.no_grad():
        ours, theirs = (m(**given).logits[text][:, said] for m in (model, llava))
    assert tiny.max_error(ours, theirs) <= BOUND


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(model, expected, but=("-",)):
    found = model.state_dict()
    for name, tensor in expected.items():
        assert name.startswith(but) or tensor.equal(found[name]), name


def rename(folder, change):
    """Rewrite the one weight file of a folder under other names."""
    file = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def before_452(name):
    """As transformers 4.36 to 4.51 wrote them: CLIP below ``vision_model``."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def since_452(name):
    """The names of the modules since 4.52."""
    for old, new in (("language_model.lm_head", "lm_head"), ("language_model.model", "model.language_model")):
        if name.startswith(old):
            return name.replace(old, new)
    return "model." + before_452(name)


# --- reading


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [("clip", "llama"), ("siglip", "llama"), ("clip", "qwen2-tied"), ("clip", "llama, tied by LLaVA alone")],
    ids=str,
)
def test_a_llava_is_read_as_it_is(tmp_path, tokenizer, encoder, decoder):
    llava = random_llava(tokenizer, encoder, decoder)
    llava.generation_config.eos_token_id = [2, 7]
    model, found = load_llava(write_llava(llava, tokenizer, tmp_path))
    assert model.mechanism.is_llava(3) and model.generation_config.eos_token_id == [2, 7]
    assert found.get_vocab() == tokenizer.get_vocab()
    assert model.projector.linear_1.weight.equal(llava.model.multi_modal_projector.linear_1.weight)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in llava.parameters())
    assert_same_logits(model, llava)
    given = inputs(model.config.text_config.vocab_size, model.config.image_token_id)
    llava.generation_config.suppress_tokens = [model.config.image_token_id]
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": 999}
    assert model.generate(**given, **options).equal(llava.generate(**given, **options))
    model.save_pretrained(tmp_path / "ours")
    assert_same_logits(EEMLLM.from_pretrained(tmp_path / "ours").eval(), llava)
    save_llava(model, found, tmp_path)
    assert check_llava(model, tmp_path)


@pytest.mark.parametrize("layout", [before_452, since_452, "sharded"])
def test_every_layout_of_transformers_is_read(tmp_path, tokenizer, layout):
    llava = random_llava(tokenizer)
    write_llava(llava, tokenizer, tmp_path, **({"max_shard_size": "60KB"} if layout == "sharded" else {}))
    if layout == "sharded":
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    else:
        rename(tmp_path, layout)
        names = set(load_file(tmp_path / "model.safetensors"))
        assert {layout("vision_tower.pre_layrnorm.weight"), layout("language_model.lm_head.weight")} <= names
    assert_same_logits(load_llava(tmp_path)[0], llava)


def test_half_precision_stays_half_precision(tmp_path, tokenizer):
    llava = random_llava(tokenizer).half()
    llava.generation_config.eos_token_id = [2, 7]
    write_llava(llava, tokenizer, tmp_path / "a")
    model, _ = load_llava(tmp_path / "a")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert cli.main(["convert", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--mechanism", "saisa"]) == 0
    assert EEMLLM.from_pretrained(tmp_path / "b").generation_config.eos_token_id == [2, 7]
    assert cli.main(["convert", str(tmp_path / "a"), "--out", str(tmp_path / "c"), "--mechanism", "flamingo"]) == 0
    assert cli.main(["convert", str(tmp_path / "a"), "--out", str(tmp_path / "d"), "--to-llava"]) == 0
    a, found, c, d = (load_file(tmp_path / name / "model.safetensors") for name in "abcd")
    assert {t.dtype for state in (found, c, d) for t in state.values()} == {torch.float16}
    assert d.keys() == a.keys() and all(tensor.equal(a[name]) for name, tensor in d.items())
    assert found["projector.layers.2.linear_2.bias"].equal(llava.model.multi_modal_projector.linear_2.bias)


def test_preprocessors_of_llava(tmp_path, tokenizer):
    llava = random_llava(tokenizer)
    padded = {**CLIP, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
    for number, (values, policy) in enumerate([(CLIP, "crop"), (padded, "pad"), (SIGLIP, "resize")]):
        folder = write_llava(llava, tokenizer, tmp_path / str(number), values)
        assert load_llava(folder)[0].vision.transform.policy == policy
    (folder / "preprocessor_config.json").unlink()  # transformers 5 writes one file for all
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": CLIP, "patch_size": 4}))
    assert load_llava(folder)[0].vision.transform == replace(
        tiny.TRANSFORM, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), policy="crop", shortest=16
    )
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": {**padded, "size": {"shortest_edge": 20}}})
    )
    with pytest.raises(ConfigError, match=r"processor_config\.json: do_pad with size"):
        load_llava(folder)


def alter(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava_next_video"}, r"'llava_next_video' has tokens for videos"),
        ({"model_type": "llava_onevision"}, r"anyres"),
        ({"model_type": "vipllava"}, r"several layers of the encoder"),
        ({"mm_vision_tower": "openai/clip"}, r"format of the authors' own code"),
        ({"model_type": "llama"}, r"model_type is 'llama', expected 'llava'"),
        ({"vision_feature_select_strategy": "full"}, r"'full': the class token would be a visual token; expected 'default'"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer: a list, \[-2, -5\]; expected one layer"),
        ({"projector_hidden_act": "gelu_new"}, r"projector_hidden_act: 'gelu_new', expected 'gelu'"),
        ({"multimodal_projector_bias": False}, r"multimodal_projector_bias: false"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised"),
        ({"vision_config": {"model_type": "pixtral"}}, r"vision_config\.model_type: 'pixtral', expected clip_vision_model"),
        ({"text_config": {"model_type": "gemma"}}, r"model_type 'gemma' is not one of"),
        ({"image_token_index": 5}, r"image_token_index is 5, but the tokenizer has <image> as \d+"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_represented_is_refused(tmp_path, llava_folder, changes, message):
    folder = shutil.copytree(llava_folder, tmp_path / "llava")
    alter(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        load_llava(folder)


def test_all_reasons_are_told_at_once(tmp_path, tokenizer):
    folder = write_llava(random_llava(tokenizer, "siglip"), tokenizer, tmp_path)
    alter(
        folder, vision_feature_select_strategy="default", projector_hidden_act="relu", multimodal_projector_bias=False
    )
    with pytest.raises(
        ConfigError, match=r"first patch would not be[^\n]*\n +projector_hidden_act[^\n]*\n +multimodal"
    ):
        load_llava(folder)


def test_broken_weights_are_refused(tmp_path, llava_folder):
    folder = shutil.copytree(llava_folder, tmp_path / "llava")
    file = folder / "model.safetensors"
    good = load_file(file)

    def refused(state, message):
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            load_llava(folder)

    refused({k: v for k, v in good.items() if "linear_2.bias" not in k}, r"1 missing, such as .*linear_2\.bias")
    refused({**good, "image_newline": torch.zeros(32)}, r"1 left over, such as .*image_newline")
    name = "language_model.model.norm.weight"
    refused({**good, name: torch.zeros(31)}, r"1 misshapen, such as .*norm\.weight")
    refused({**good, name: good[name].to(torch.float8_e4m3fn)}, r"quantised weights \(F8_E4M3\)")
    file.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not readable"):
        load_llava(folder)
    file.unlink()
    torch.save(good, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model\*\.safetensors"):
        load_llava(folder)
    alter(folder, model_type=None)
    (folder / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        load_llava(folder)


# --- writing


def to_write(decoder="llama-gqa", encoder="clip", vocabulary=None, **transform):
    model = deepcopy(tiny.model(decoder, "llava", encoder))  # whose config others share
    if vocabulary is not None:
        model.language_model.resize_token_embeddings(vocabulary)
        model.config.text_config.vocab_size = vocabulary
    model.vision.transform = replace(model.vision.transform, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), **transform)
    shake(model)
    return model


@pytest.mark.parametrize("room", [0, 7], ids=["image past vocabulary", "image within"])
@pytest.mark.parametrize(("decoder", "encoder"), [("llama-gqa", "clip"), ("qwen3", "siglip")])
def test_transformers_reads_what_is_written(tmp_path, tokenizer, decoder, encoder, room):
    image = tokenizer.convert_tokens_to_ids("<image>")
    model = to_write(decoder, encoder, vocabulary=image + room)
    model.config.image_token_id = image
    model.generation_config.eos_token_id = 2
    save_llava(model, tokenizer, tmp_path)
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert llava.config.image_seq_length == tiny.TOKENS and llava.config.text_config.vocab_size == max(
        image + 1, image + room
    )
    assert_same_logits(model, llava)
    given = inputs(image, image)
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": 999}
    assert llava.generate(**given, **options).equal(model.generate(**given, **options))
    with torch.no_grad():  # a head whose only wish is to say "image" is not heard
        state = llava(**given, output_hidden_states=True).hidden_states[-1][0, -1]
        llava.lm_head.weight.zero_()[image] = state
        assert llava(**given).logits[0, -1].argmax() == image
    assert (llava.generate(**given, **options)[:, given["input_ids"].shape[1] :] != image).all()
    again, _ = load_llava(tmp_path)
    assert_same_logits(again, LlavaForConditionalGeneration.from_pretrained(tmp_path).eval())
    assert again.vision.transform == replace(model.vision.transform, shortest=again.vision.transform.shortest)
    assert check_llava(model, tmp_path).startswith(f"{len(llava.state_dict())} tensors equal")


@pytest.mark.parametrize("policy", ["crop", "pad", "resize"])
def test_pixels_and_ids_are_those_of_transformers_processor(tmp_path, tokenizer, policy):
    image = tokenizer.convert_tokens_to_ids("<image>")
    model = to_write(vocabulary=image, policy=policy, **({"shortest": 20} if policy == "crop" else {}))
    model.config.image_token_id = image
    save_llava(model, tokenizer, tmp_path)
    theirs = AutoProcessor.from_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 42, 3), dtype=np.uint8))
    ours = Processor(tokenizer, "vicuna_v1", model.vision.transform, image)
    prompts = ours.prompts([Conversation("a", (Turn("human", "<image>\nWhat?"),), 1)], [[picture]])
    text = "".join(span.text for span in ours.template.render(Conversation("a", (Turn("human", "<image>\nWhat?"),), 1)))
    found = theirs(images=picture, text=text, return_tensors="pt", add_special_tokens=False)
    assert found["input_ids"].equal(prompts["input_ids"])
    transform = ours.transform
    tiny.assert_same_picture(transform.views(prompts["pixel_values"]), found["pixel_values"], transform.std)


def test_the_check_sees_what_was_written_wrongly(tmp_path, tokenizer, monkeypatch):
    image = tokenizer.convert_tokens_to_ids("<image>")
    model = to_write(vocabulary=image)
    model.config.image_token_id = image
    save_llava(model, tokenizer, tmp_path)
    alter(tmp_path, vision_feature_layer=-1)
    with pytest.raises(CheckpointError, match=r"logits differ from ours by \d"):
        check_llava(model, tmp_path)
    monkeypatch.setattr("lit_eemllm.formats.llava.FORWARD_UP_TO", 100)
    assert "too large to compare logits" in check_llava(model, tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    state["multi_modal_projector.linear_1.bias"][3] += 1e-6
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1 tensors differ .* such as model\.multi_modal_projector\.linear_1\.bias"
    ):
        check_llava(model, tmp_path)


def test_what_llava_is():
    full = Mechanism(dense_layers="all")
    for same in (full, replace(full, dense_layers=(0, 1, 2)), replace(full, cross_layers=(0, 1, 2), visual_window=3)):
        assert same.is_llava(3)
    for other in (
        replace(full, dense_layers=(0, 2)), replace(full, cross_layers=(0, 1)), replace(full, freeze_prefix=True),
        replace(full, visual_positions="shared"), replace(full, dense_layers=(0,)),
    ):  # fmt: skip
        assert not other.is_llava(3)
    same = {name: [n for n in range(2, 33) if preset.stretched(n).is_llava(n)] for name, preset in PRESETS.items()}
    assert same == {
        **{name: [] for name in PRESETS},
        "llava": [*range(2, 33)],
        "shortv": [2, 3, 4],
        "ee_mllm_f": [2, 3],
    }
    batch = tiny.pack([[3, 0, 4], [2, 0, 1, 0, 3]])
    for name, depths in (("shortv", (3, 4, 5)), ("ee_mllm_f", (3, 4))):
        for layers in depths:
            found, true = (tiny.model("llama-gqa", m, layers=layers).packed_logits(batch) for m in (name, "llava"))
            assert found.equal(true) == (layers in same[name])


# --- other mechanisms


def logits(model, batch):
    with torch.no_grad():
        return model.packed_logits(batch)


def fates(ledger):
    return {(fate.name.partition(".")[0], fate.fate) for fate in ledger}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_llava_becomes_any_mechanism_with_its_weights_untouched(llava_folder, preset):
    model, _ = load_llava(llava_folder)
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


# --- the command


@pytest.fixture(scope="module")
def first_stage(parts, shapes, tmp_path_factory):
    """A run of SAISA's first stage: one projector, frozen parts in bfloat16."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny.config(
        parts, shapes, folder / "one", "model.mechanism.preset=saisa", "model.mechanism.visual_source=stream",
        "optim.tuning.llm=frozen", "optim.max_steps=2", "model.dtype=bfloat16", "data.max_length=400", "resume=never",
    )  # fmt: skip
    (folder / "one.yaml").write_text(to_yaml(config))
    assert cli.main(["fit", str(folder / "one.yaml")]) == 0
    return folder / "one"


def table(text):
    """(part, fate) -> tensors, of the printed table."""
    rows = [line.strip("│").split("│") for line in text.splitlines() if line.startswith("│")]
    return {(part.strip(), fate.strip()): int(count.replace(",", "")) for part, count, _, fate in rows}


def test_from_a_run_to_saisas_second_stage(first_stage, tmp_path, capsys):
    two, run, elsewhere = tmp_path / "two", tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(first_stage, elsewhere)
    text = (first_stage / "config.yaml").read_text()
    (elsewhere / "config.yaml").write_text(text.replace("attention: auto", "attention: flash"))  # as if from a GPU
    assert cli.main(["convert", str(elsewhere), "--out", str(two), "--mechanism", "saisa"]) == 0
    printed = capsys.readouterr().out
    assert table(printed) == {("vision", "kept"): 53, ("language_model", "kept"): 30, ("projector", "copied"): 12}
    assert f"lit-eemllm fit {two} out=" in printed
    state = load_file(two / "model.safetensors")
    trained = torch.load(first_stage / "checkpoints" / "step-2.ckpt", weights_only=True)["state_dict"]
    for name, tensor in trained.items():
        for layer in range(3):
            assert state[name.replace("model.projector", f"projector.layers.{layer}")].equal(tensor)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}  # exact for bfloat16 too

    settings = [
        f"out={run}",
        "optim.tuning.llm=full",
        "optim.max_steps=3",
        "model.dtype=float32",
        "model.attention=auto",
    ]
    assert cli.main(["fit", str(two), *settings]) == 0
    second = torch.load(run / "checkpoints" / "step-3.ckpt", weights_only=True)["state_dict"]
    assert {name.removeprefix("model.") for name in second} == {n for n in state if not n.startswith("vision")}
    moved = max((tensor - state[name.removeprefix("model.")]).abs().max().item() for name, tensor in second.items())
    assert 0 < moved < 0.02  # three steps of AdamW at 3e-3 from these weights
    assert not second["model.projector.layers.0.linear_1.bias"].equal(second["model.projector.layers.1.linear_1.bias"])
    assert cli.main(["validate", str(two), "--checkpoint", "none", "eval.samples=0", *settings[-2:]]) == 0

    assert cli.main(["convert", str(run), "--out", str(tmp_path / "no"), "--mechanism", "llava"]) == 2
    assert "layers 1, 2 differ from layer 0" in capsys.readouterr().err
    assert cli.main(["convert", str(two), "--out", str(tmp_path / "back"), "--mechanism", "shortv"]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back["projector.linear_1.weight"].equal(trained["model.projector.linear_1.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "elsewhere", "run", "two"]


@pytest.mark.parametrize("quantization", ["null", "nf4"])
def test_adapters_of_a_run_are_folded_in(first_stage, parts, tmp_path, capsys, quantization):
    if quantization != "null":
        pytest.importorskip("bitsandbytes")
    run, out = tmp_path / "run", tmp_path / "out"
    settings = ["optim.tuning.llm=lora", "optim.max_steps=2", f"out={run}", f"init_from={first_stage}"]
    settings += [f"model.quantization={quantization}", "model.dtype=float32"]
    assert cli.main(["fit", str(first_stage / "config.yaml"), *settings]) == 0
    adapted = load(load_config([run / "config.yaml"]), None)[0].float()
    capsys.readouterr()
    assert cli.main(["convert", str(run), "--out", str(out), "--mechanism", "saisa"]) == 0
    assert "adapters folded in" in capsys.readouterr().out
    whole, base = EEMLLM.from_pretrained(out).eval(), load_file(parts / "decoder" / "model.safetensors")
    batch = tiny.pack([[3, 0, 4]])
    assert not tensors(whole)["language_model.model.layers.0.self_attn.q_proj.weight"].equal(
        base["model.layers.0.self_attn.q_proj.weight"]
    )
    # with gradients: without, bitsandbytes takes another path on CPUs, which wants multiples of 32
    assert tiny.max_error(whole.packed_logits(batch), adapted.packed_logits(batch)) <= BOUND


def test_llava_to_another_mechanism_and_back(llava_folder, tmp_path, capsys):
    there, back = tmp_path / "there", tmp_path / "back"
    line = ["convert", "model.mechanism.dense_layers=[1]", str(llava_folder), "--out", str(there)]
    assert cli.main([*line, "--mechanism", "naavit"]) == 0
    naavit = EEMLLM.from_pretrained(there)
    expected = replace(PRESETS["naavit"], dense_layers=(1,))
    assert naavit.mechanism == expected
    config = yaml.safe_load((there / "config.yaml").read_text())
    assert config["model"]["mechanism"] == {"preset": "naavit", "dense_layers": [1]}
    assert config["model"]["vision"] == {
        "encoder": "transformers", "path": str(there), "select_layer": -2, "policy": "crop",
    }  # fmt: skip
    assert config["init_from"] == config["model"]["decoder"] == str(there)

    assert cli.main(["convert", str(there), "--out", str(back), "--to-llava"]) == 2
    assert "dense_layers" in capsys.readouterr().err and not back.exists()
    assert cli.main(["convert", str(there), "--out", str(back), "--to-llava", "--mechanism", "llava"]) == 0
    assert "tensors equal as transformers reads them, logits differ by" in capsys.readouterr().out
    ours, theirs = load_file(back / "model.safetensors"), load_file(llava_folder / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    for file in ("config.json", "tokenizer.json"):
        ours, theirs = (json.loads((folder / file).read_text()) for folder in (back, llava_folder))
        for part in ("text_config", "vision_config"):  # which transformers writes for a model that was loaded
            ours.get(part, {}).pop("dtype", None)
        assert ours == theirs


def test_a_converted_llava_answers_and_is_trained_further(llava_folder, shapes, tmp_path, capsys):
    """The folder stands for itself: decoder, encoder, tokenizer and projector come from it."""
    out, run = tmp_path / "out", tmp_path / "run"
    assert cli.main(["convert", str(llava_folder), "--out", str(out), "--mechanism", "ee_mllm"]) == 0
    settings = [f"data.train={shapes}", f"data.val={shapes}", "data.workers=0", "data.max_length=400", "optim.lr=1e-4"]
    settings += ["optim.max_steps=2", "optim.tuning.llm=full", "trainer.accelerator=cpu", "eval.max_new_tokens=3"]
    model, processor, source = load(load_config([out / "config.yaml"], settings), None)
    assert source == str(out) and processor.image_token_id == model.config.image_token_id
    assert_same_tensors(model, EEMLLM.from_pretrained(out).state_dict())
    assert cli.main(["fit", str(out), f"out={run}", *settings]) == 0
    before, after = load_file(out / "model.safetensors"), load(load_config([run / "config.yaml"]), None)[0].state_dict()
    assert 0 < max((tensor - before[name]).abs().max() for name, tensor in after.items()) < 1e-3
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    capsys.readouterr()
    assert cli.main(["generate", str(run), "--image", str(tmp_path / "a.png"), "--prompt", "What?"]) == 0
    assert cli.main(["convert", str(run), "--out", str(tmp_path / "hf"), "--mechanism", "llava", "--to-llava"]) == 0


def test_qlora_of_a_converted_llava(tokenizer, shapes, tmp_path, capsys):
    """Trained, validated before its first checkpoint and after, asked, continued to the bit, merged."""
    quantize_4bit = pytest.importorskip("bitsandbytes.functional").quantize_4bit
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
    }  # without gradients, bitsandbytes on CPUs wants multiples of 64
    llava = random_llava(tokenizer, sizes=sizes)
    source = write_llava(llava, tokenizer, tmp_path / "llava")
    out, run, again = tmp_path / "out", tmp_path / "run", tmp_path / "again"
    assert cli.main(["convert", str(source), "--out", str(out), "--mechanism", "llava"]) == 0
    settings = [f"data.train={shapes}", f"data.val={shapes}", "data.workers=0", "data.max_length=400", "optim.lr=1e-2",
                "optim.max_steps=4", "optim.val_every=1", "optim.val_batches=1", "optim.save_every=2", "optim.tuning.llm=lora",
                "optim.lora.r=4", "model.quantization=nf4", "model.dtype=float32", "trainer.accelerator=cpu",
                "eval.max_new_tokens=3"]  # fmt: skip
    assert cli.main(["fit", str(out), f"out={run}", *settings]) == 0
    model = load(load_config([run / "config.yaml"]), None)[0]
    theirs = dict(llava.model.language_model.named_modules())
    layers = {n: m for n, m in model.language_model.model.named_modules() if n.endswith("base_layer")}
    assert len(layers) == 3 * 7
    for name, layer in layers.items():
        small = quantize_4bit(
            theirs[name.removesuffix(".base_layer")].weight.detach(), quant_type="nf4", compress_statistics=True
        )
        assert layer.weight.data.equal(small[0])

    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    assert cli.main(["validate", str(run), "eval.samples=0"]) == 0
    assert cli.main(["generate", str(run), "--image", str(tmp_path / "a.png"), "--prompt", "What?"]) == 0
    (again / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "checkpoints" / "step-2.ckpt", again / "checkpoints")
    capsys.readouterr()
    assert cli.main(["fit", str(run), f"out={again}"]) == 0
    assert f"continuing from {again / 'checkpoints' / 'step-2.ckpt'}" in capsys.readouterr().out.replace("\n", "")
    first, last, resumed = (
        torch.load(folder / "checkpoints" / name, weights_only=True)["state_dict"]
        for folder, name in ((run, "step-2.ckpt"), (run, "step-4.ckpt"), (again, "step-4.ckpt"))
    )
    assert resumed.keys() == last.keys() and all(x.equal(last[name]) for name, x in resumed.items())
    assert not any(x.equal(first[name]) for name, x in resumed.items())

    assert cli.main(["merge", str(run), "--to", str(tmp_path / "merged")]) == 0
    batch = tiny.pack([[3, 0, 4]])
    whole = EEMLLM.from_pretrained(tmp_path / "merged").eval()
    assert tiny.max_error(whole.packed_logits(batch), model.packed_logits(batch)) <= BOUND


def test_moved_and_converted_again_a_folder_names_itself(llava_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", str(llava_folder), "--out", "a", "--mechanism", "flamingo", "seed=5"]) == 0
    assert cli.main(["convert", str(tmp_path / "a"), "--out", "b", "model.mechanism.gated.immediate=false"]) == 0
    config = yaml.safe_load(Path("b/config.yaml").read_text())
    assert [config["model"]["decoder"], config["model"]["vision"]["path"], config["init_from"]] == ["b"] * 3
    assert config["model"]["mechanism"]["options"]["gated"]["immediate"] is False
    a, b = load_file("a/model.safetensors"), load_file("b/model.safetensors")
    assert a.keys() == b.keys() and all(tensor.equal(b[name]) for name, tensor in a.items())


def test_an_export_keeps_a_chat_template_that_nothing_contradicts(tmp_path, tokenizer):
    """Of a folder of save_pretrained, of its conversion, and of one whose config.yaml says little."""
    own, source = deepcopy(tokenizer), tmp_path / "source"
    own.chat_template = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    model = to_write(vocabulary=(image := tokenizer.convert_tokens_to_ids("<image>")))
    model.config.image_token_id = image
    model.save_pretrained(source)
    own.save_pretrained(source)
    for out, *to_llava in (tmp_path / "llava", "--to-llava"), (tmp_path / "ours",):
        assert cli.main(["convert", str(source), "--out", str(out), *to_llava]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "llava").chat_template == own.chat_template
    assert open_source(tmp_path / "ours").template is None
    file = source / "config.yaml"
    for text, template in (
        ("", None), ("seed: 1", None), ("model: {dtype: float32}", None), ("model: {vision: null}", None),
        ("model: {template: vicuna_v1}", "vicuna_v1"),
    ):  # fmt: skip
        file.write_text(text)
        found = open_source(source)
        assert found.template == template and found.config["model"]["vision"]["path"] == str(source)
    for text in ("model: 3", "- 1", "x: ["):
        file.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(str(file))):
            open_source(source)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("convert --out x", "expected one source, found none"),
        ("convert a b --out x", "expected one source, found a b"),
        ("convert gone --out x", "gone: no such folder"),
        ("convert empty --out x", "neither config.json nor a checkpoint of a run"),
        ("convert empty --out empty", "empty exists already"),
        ("convert empty --out x optim.lr=1", "convert takes model.mechanism.* and seed, found optim.lr=1"),
        ("convert empty --out x --mechanism sasia", "model.mechanism.preset: found 'sasia'"),
        ("convert empty --out x model.mechanism.dense_layer=all", "did you mean model.mechanism.dense_layers?"),
        ("convert LLAVA --out x --mechanism saisa model.mechanism.aligner.ffn=true", "layerwise projectors make"),
        ("convert LLAVA --out x --mechanism ee_mllm --to-llava", 'the mechanism is {"preset": "ee_mllm"}, which LLaVA'),
        ("convert BARE --out x --to-llava", "BARE holds no tokenizer"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(llava_folder, tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    if "BARE" in line:
        tiny.model("llama", "llava").save_pretrained("BARE")
    before = sorted(Path().iterdir())
    assert cli.main([str(llava_folder) if word == "LLAVA" else word for word in line.split()]) == 2
    assert message in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before


def test_a_killed_conversion_leaves_no_half_folder(llava_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    line = ["convert", str(llava_folder), "--out", str(out), "--mechanism", "saisa"]
    code = f"""
import os, signal
from lit_eemllm import cli
from lit_eemllm.model import EEMLLM
whole = EEMLLM.save_pretrained
def save(self, folder):
    whole(self, folder)
    os.kill(os.getpid(), signal.SIGKILL)
EEMLLM.save_pretrained = save
cli.main({line!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists() and list(tmp_path.glob(".out.*/out/model.safetensors"))  # as far as it came

    def interrupted(self, folder):
        raise KeyboardInterrupt

    left = set(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(EEMLLM, "save_pretrained", interrupted)
        assert cli.main(line) == 130
    assert set(tmp_path.iterdir()) == left
    assert cli.main(line) == 0
    assert EEMLLM.from_pretrained(out).mechanism == PRESETS["saisa"]


def test_an_encoder_that_llava_has_no_word_for_is_refused(tmp_path, tokenizer):
    model = tiny.model("llama", "llava")
    with pytest.raises(ConfigError, match=r"the tokenizer has <image> as \d+, the model as 40"):
        save_llava(model, tokenizer, tmp_path)
    model.vision = torch.nn.Identity()
    with pytest.raises(ConfigError, match=r"the vision encoder is a Identity; LLaVA's format holds CLIP and SigLIP"):
        save_llava(model, tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_transform_is_read_back_as_it_was_written():
    from lit_eemllm.formats.llava import preprocessor_config

    for policy in ("resize", "crop"):
        transform = ImageTransform(
            16, 16, 4, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), policy, "lanczos", 18 if policy == "crop" else None
        )
        assert ImageTransform.from_preprocessor_config(preprocessor_config(transform), 4) == transform
