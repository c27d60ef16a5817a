"""LLaVA checkpoints read and written: against transformers' own LLaVA, bit by bit."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from lib.llava import BOUND, CLIP, SIGLIP, random_llava, to_write, write_llava
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lit_eemllm import cli
from lit_eemllm.errors import CheckpointError, ConfigError
from lit_eemllm.formats.vlm import check_vlm, load_vlm, save_vlm
from lit_eemllm.inputs.conversation import Conversation, Turn
from lit_eemllm.inputs.images import ImageTransform
from lit_eemllm.mechanisms import PRESETS, Mechanism
from lit_eemllm.model import EEMLLM, Processor


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


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [("clip", "llama"), ("siglip", "llama"), ("clip", "qwen2-tied"), ("clip", "llama, tied by LLaVA alone")],
    ids=str,
)
def test_a_llava_is_read_as_it_is(tmp_path, tokenizer, encoder, decoder):
    llava = random_llava(tokenizer, encoder, decoder)
    llava.generation_config.eos_token_id = [2, 7]
    model, found = load_vlm(write_llava(llava, tokenizer, tmp_path))
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
    save_vlm(model, found, tmp_path)
    assert check_vlm(model, tmp_path)


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
    assert_same_logits(load_vlm(tmp_path)[0], llava)


def test_half_precision_stays_half_precision(tmp_path, tokenizer):
    llava = random_llava(tokenizer).half()
    llava.generation_config.eos_token_id = [2, 7]
    write_llava(llava, tokenizer, tmp_path / "a")
    model, _ = load_vlm(tmp_path / "a")
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
        assert load_vlm(folder)[0].vision.transform.policy == policy
    (folder / "preprocessor_config.json").unlink()  # transformers 5 writes one file for all
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": CLIP, "patch_size": 4}))
    assert load_vlm(folder)[0].vision.transform == replace(
        tiny.TRANSFORM, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), policy="crop", shortest=16
    )
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": {**padded, "size": {"shortest_edge": 20}}})
    )
    with pytest.raises(ConfigError, match=r"processor_config\.json: do_pad with size"):
        load_vlm(folder)


def alter(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava_next_video"}, r"'llava_next_video' has tokens for videos"),
        ({"model_type": "vipllava"}, r"several layers of the encoder"),
        ({"mm_vision_tower": "openai/clip"}, r"format of the authors' own code"),
        ({"model_type": "llama"}, r"model_type is 'llama', expected one of llava, llava_next"),
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
        load_vlm(folder)


def test_all_reasons_are_told_at_once(tmp_path, tokenizer):
    folder = write_llava(random_llava(tokenizer, "siglip"), tokenizer, tmp_path)
    alter(
        folder, vision_feature_select_strategy="default", projector_hidden_act="relu", multimodal_projector_bias=False
    )
    with pytest.raises(
        ConfigError, match=r"first patch would not be[^\n]*\n +projector_hidden_act[^\n]*\n +multimodal"
    ):
        load_vlm(folder)


def test_broken_weights_are_refused(tmp_path, llava_folder):
    folder = shutil.copytree(llava_folder, tmp_path / "llava")
    file = folder / "model.safetensors"
    good = load_file(file)

    def refused(state, message):
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            load_vlm(folder)

    refused({k: v for k, v in good.items() if "linear_2.bias" not in k}, r"1 missing, such as .*linear_2\.bias")
    refused({**good, "image_newline": torch.zeros(32)}, r"1 left over, such as .*image_newline")
    name = "language_model.model.norm.weight"
    refused({**good, name: torch.zeros(31)}, r"1 misshapen, such as .*norm\.weight")
    refused({**good, name: good[name].to(torch.float8_e4m3fn)}, r"quantised weights \(F8_E4M3\)")
    file.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not readable"):
        load_vlm(folder)
    file.unlink()
    torch.save(good, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model\*\.safetensors"):
        load_vlm(folder)
    alter(folder, model_type=None)
    (folder / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        load_vlm(folder)


@pytest.mark.parametrize("room", [0, 7], ids=["image past vocabulary", "image within"])
@pytest.mark.parametrize(
    ("decoder", "encoder"),
    [
        ("llama-gqa", "clip"),
        ("qwen3", "siglip"),
        ("olmo2", "clip"),
        ("smollm3", "siglip"),
        ("olmo3", "clip"),
        ("llama4-no-norms", "clip"),
    ],
)
def test_transformers_reads_what_is_written(tmp_path, tokenizer, decoder, encoder, room):
    image = tokenizer.convert_tokens_to_ids("<image>")
    model = to_write(decoder, encoder, vocabulary=image + room)
    model.config.image_token_id = image
    model.generation_config.eos_token_id = 2
    save_vlm(model, tokenizer, tmp_path)
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
    again, _ = load_vlm(tmp_path)
    assert_same_logits(again, LlavaForConditionalGeneration.from_pretrained(tmp_path).eval())
    assert again.vision.transform == replace(model.vision.transform, shortest=again.vision.transform.shortest)
    assert check_vlm(model, tmp_path).startswith(f"{len(llava.state_dict())} tensors equal")


@pytest.mark.parametrize("policy", ["crop", "pad", "resize"])
def test_pixels_and_ids_are_those_of_transformers_processor(tmp_path, tokenizer, policy):
    image = tokenizer.convert_tokens_to_ids("<image>")
    model = to_write(vocabulary=image, policy=policy, **({"shortest": 20} if policy == "crop" else {}))
    model.config.image_token_id = image
    save_vlm(model, tokenizer, tmp_path)
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
    save_vlm(model, tokenizer, tmp_path)
    alter(tmp_path, vision_feature_layer=-1)
    with pytest.raises(CheckpointError, match=r"logits differ from ours by \d"):
        check_vlm(model, tmp_path)
    monkeypatch.setattr("lit_eemllm.formats.vlm.FORWARD_UP_TO", 100)
    assert "too large to compare logits" in check_vlm(model, tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    state["multi_modal_projector.linear_1.bias"][3] += 1e-6
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1 tensors differ .* such as model\.multi_modal_projector\.linear_1\.bias"
    ):
        check_vlm(model, tmp_path)


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
        "operator_skipping": [2, 3],
    }
    batch = tiny.pack([[3, 0, 4], [2, 0, 1, 0, 3]])
    for name, depths in (("shortv", (3, 4, 5)), ("ee_mllm_f", (3, 4))):
        for layers in depths:
            found, true = (tiny.model("llama-gqa", m, layers=layers).packed_logits(batch) for m in (name, "llava"))
            assert found.equal(true) == (layers in same[name])


def test_an_encoder_that_llava_has_no_word_for_is_refused(tmp_path, tokenizer):
    model = tiny.model("llama", "llava")
    with pytest.raises(ConfigError, match=r"the tokenizer has <image> as \d+, the model as 40"):
        save_vlm(model, tokenizer, tmp_path)
    model.vision = torch.nn.Identity()
    with pytest.raises(
        ConfigError, match=r"the vision encoder is a Identity; transformers' formats hold clip_vision_model, "
    ):
        save_vlm(model, tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_transform_is_read_back_as_it_was_written():
    from lit_eemllm.formats.llava import preprocessor_config

    for policy in ("resize", "crop"):
        transform = ImageTransform(
            16, 16, 4, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), policy, "lanczos", 18 if policy == "crop" else None
        )
        assert ImageTransform.from_preprocessor_config(preprocessor_config(transform), 4) == transform
