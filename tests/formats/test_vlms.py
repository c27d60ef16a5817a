"""Models of images and text that people use: read from transformers' own format, equal to transformers' own model and processor."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy

import pytest
import tiny
import torch
from lib.vlms import KINDS, TALKS, conversation, messages, write

from lit_eemllm.attention.sdpa import Sdpa
from lit_eemllm.data.packing import collate
from lit_eemllm.data.samples import EncodedSample, TokenSample
from lit_eemllm.errors import ConfigError, SampleError
from lit_eemllm.formats.mechanism import change_mechanism
from lit_eemllm.formats.vlm import check_vlm, format_of, load_vlm, save_vlm
from lit_eemllm.inputs.spans import IMAGE_SLOT
from lit_eemllm.mechanisms import PRESETS, Connector
from lit_eemllm.mechanisms.pooling import AttentionPool, Average, PixelShuffle
from lit_eemllm.model import EEMLLM, Processor, QwenVision
from lit_eemllm.model.image_cache import ImageCache

BOUND = 1e-5


@pytest.fixture(scope="module")
def both(name, folder):
    """Our model and processor, and transformers'."""
    model, tokenizer = load_vlm(folder)
    model.set_attention("reference")
    twin = KINDS[name].model.from_pretrained(folder, dtype=torch.float32).eval()
    processor = Processor(tokenizer, "jinja", model.vision.transform, model.config.image_token_id)
    return model, processor, twin, KINDS[name].processor(tokenizer, KINDS[name].preprocessor)


def inputs(both, talk):
    """Of a conversation: ours, and theirs."""
    _, processor, _, own = both
    asked, pictures = conversation(talk)
    text = own.apply_chat_template(messages(talk), add_generation_prompt=True)
    theirs = own(text=text, images=[pictures] if pictures else None, return_tensors="pt")
    return processor.prompts([asked], [pictures]), theirs


def their_pixels(model: EEMLLM, ours, theirs):
    """Our pixels in the shape of theirs."""
    views, found = model.vision.transform.views(list(ours["pixel_values"])), theirs["pixel_values"]
    if isinstance(model.vision, QwenVision):
        return torch.cat([model.vision.patches(view) for view in views])
    if found.ndim == 5 and len(found) > 1:  # images of many tiles, filled up
        parts = views.split([len(image) for image in ours["pixel_values"]])
        filled = torch.zeros_like(found)
        for row, part in zip(filled, parts, strict=True):
            row[: len(part)] = part
        return filled
    return views.view(found.shape)


@pytest.mark.parametrize("talk", TALKS)
def test_ids_pixels_and_logits_are_transformers_own(both, talk):
    model, *_, twin, _ = both
    ours, theirs = inputs(both, TALKS[talk])
    assert ours["input_ids"].equal(theirs["input_ids"])
    if "pixel_values" in ours:
        pixels = their_pixels(model, ours, theirs)
        tiny.assert_same_picture(pixels, theirs["pixel_values"], model.vision.transform.std)
        theirs["pixel_values"] = pixels  # Pillow's are a level apart here and there
    text = ours["input_ids"][0] != model.config.image_token_id
    known = torch.arange(twin.config.text_config.vocab_size) != model.config.image_token_id
    with torch.no_grad():
        found, true = model(**ours).logits[0, text], twin(**theirs).logits[0, text]
    assert tiny.max_error(found[:, known], true[:, known]) < BOUND


def sample(both, talk) -> EncodedSample:
    """A conversation with its answers, as in training."""
    _, processor, _, _ = both
    asked, pictures = conversation(talk)
    transform = processor.transform
    sizes = [transform.size_among(picture.size, len(pictures)) for picture in pictures]
    pieces = [transform.pieces(*size) for size in sizes]
    shown = processor.template.encode(asked).with_pieces(pieces, processor.template.text_ids)
    tokens = TokenSample("k", shown.ids, shown.supervised, shown.runs, [], shown.images)
    return EncodedSample(tokens, list(map(transform, pictures, sizes)), sizes)


ANSWERED = [*TALKS["turns"], ["a red cube"]]


@pytest.mark.parametrize(
    "talk", [name if name == "turns" else pytest.param(name, marks=pytest.mark.slow) for name in TALKS]
)
def test_gradients_are_transformers_own(both, folder, talk):
    """Of every weight, for a conversation that is answered; in float64, or rounding would be as large as the bound."""
    model, twin, one = (
        load_vlm(folder)[0].double(),
        deepcopy(both[2]).double(),
        sample(both, [*TALKS[talk], ["a red cube"]]),
    )
    model._backend = Sdpa()
    model.train()
    model.packed_loss(collate([one])).backward()

    runs = iter(one.tokens.image_tokens)
    rows = [
        (model.config.image_token_id if entry == IMAGE_SLOT else entry, said)
        for entry, said in zip(one.tokens.ids, one.tokens.supervised, strict=True)
        for _ in range(next(runs) if entry == IMAGE_SLOT else 1)
    ]
    ids, said = torch.tensor([[token for token, _ in rows]]), torch.tensor([flag for _, flag in rows])
    _, theirs = inputs(both, TALKS[talk])
    given = {
        key: value for key, value in theirs.items() if key in ("image_sizes", "batch_num_images", "image_grid_thw")
    }
    if one.pixels:
        given["pixel_values"] = their_pixels(model, {"pixel_values": one.pixels}, theirs).double()
    if "image_grid_thw" in given:
        given["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    logits = twin(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits
    torch.nn.functional.cross_entropy(logits[0, :-1][said[1:]], ids[0, 1:][said[1:]], reduction="sum").backward()
    form, true = format_of(model), dict(twin.named_parameters())
    largest = max(weight.grad.abs().max() for weight in true.values() if weight.grad is not None)
    for name, weight in model.named_parameters():
        found, other = weight.grad, true[form.theirs(name)].grad
        if other is None:  # without an image; layers of the encoder above those that are read
            assert found is None or not found.any(), name
        else:
            assert (found - other).abs().max() <= BOUND * max(other.abs().max(), 1e-6 * largest), name


def test_prompts_of_a_batch_are_answered_token_for_token(both):
    model, processor, twin, _ = both
    talks = [talk for name, talk in TALKS.items() if name in ("one", "narrow", "image last", "text between")]
    asked = [conversation(talk) for talk in talks]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    together = processor.prompts([one for one, _ in asked], [pictures for _, pictures in asked])
    found = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
    for row, talk in zip(found, talks, strict=True):
        ours, theirs = inputs(both, talk)
        theirs["pixel_values"] = their_pixels(model, ours, theirs)
        banned = [model.config.image_token_id]
        true = twin.generate(**theirs, **options, suppress_tokens=banned)[0, theirs["input_ids"].shape[1] :]
        assert row.equal(true), talk


def test_what_is_written_is_what_was_read(both, name, folder, tmp_path):
    model, tokenizer = load_vlm(folder)
    save_vlm(model, tokenizer, tmp_path)
    assert "logits differ" in check_vlm(model, tmp_path)
    again, true = KINDS[name].model.from_pretrained(tmp_path), both[2].state_dict()
    assert all(tensor.equal(true[key]) for key, tensor in again.state_dict().items())
    twice, same = load_vlm(tmp_path)
    assert twice.vision.transform == both[0].vision.transform and twice.config.connector == both[0].config.connector
    assert same.image_token == tokenizer.image_token and same.chat_template == tokenizer.chat_template


PRUNED = ["ee_mllm", "vica", "ee_mllm_f", "pyramid_drop", "visionzip", "bidirectional"]


@pytest.mark.parametrize("preset", PRUNED)
def test_every_mechanism_works_on_the_same_weights(both, folder, preset):
    """Packed, with images cached and token by token: as each conversation is by itself, in one pass."""
    model = load_vlm(folder)[0]
    if preset == "visionzip" and isinstance(model.vision, QwenVision):
        with pytest.raises(ConfigError, match="QwenVision says none"):
            model.set_mechanism(PRESETS[preset])
        return
    model.set_mechanism(PRESETS[preset].stretched(4))
    model.set_attention("reference")
    samples = [sample(both, ANSWERED), sample(both, [[(40, 20), "What?"], ["red"]]), sample(both, [["no?"], ["yes"]])]
    with torch.no_grad():
        together = model.packed_logits(collate(samples))
        assert tiny.max_error(together, torch.cat([model.packed_logits(collate([one])) for one in samples])) < BOUND
        model.set_attention("sdpa")
        assert tiny.max_error(model.packed_logits(collate(samples)), together) < BOUND
    processor, (asked, pictures) = both[1], conversation(TALKS["text between"])
    ours = processor.prompts([asked], [pictures])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    first = model.generate(**ours, **options)
    model.image_cache = ImageCache(2**20)
    assert model.generate(**ours, **options).equal(first) and model.generate(**ours, **options).equal(first)
    if preset == "pyramid_drop":  # which ranks by the last token of a prompt
        return
    once = model(**{**ours, "input_ids": first, "attention_mask": torch.ones_like(first)}, use_cache=True).logits
    assert once[0, ours["input_ids"].shape[1] - 1 : -1].argmax(-1).equal(first[0, ours["input_ids"].shape[1] :])


def test_a_picture_that_a_family_refuses_is_refused_by_name(both):
    _, processor, _, own = both
    asked, pictures = conversation([[(900, 3), "near"]])
    if not isinstance(both[0].vision, QwenVision):
        assert processor.prompts([asked], [pictures])
        return
    with pytest.raises(ValueError, match="200"):
        own(text=own.apply_chat_template(messages([[(900, 3), "near"]])), images=[pictures])
    with pytest.raises(SampleError, match="900 x 3 pixels"):
        processor.prompts([asked], [pictures])


def test_configurations_as_they_were_published(tmp_path):
    """Qwen2.5-VL's has the decoder's keys beside the others, and names of rotary positions of before transformers 5."""
    folder = write("qwen2_5_vl", tmp_path)
    true = load_vlm(folder)[0]
    values = json.loads((folder / "config.json").read_text())
    text = values.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    old = {**{key: value for key, value in text.items() if key not in ("model_type", "layer_types")}, **values}
    old |= {
        "rope_theta": rope["rope_theta"],
        "sliding_window": 32768,
        "use_sliding_window": False,
        "max_window_layers": 70,
    }
    (folder / "config.json").write_text(json.dumps(old))
    found = load_vlm(folder)[0]
    assert found.image_rotary == true.image_rotary and found.image_rotary.sections == (1, 1, 2)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert found(ids).logits.equal(true(ids).logits)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_encoders_by_their_names_of_before(name, tmp_path):
    """transformers wrote the whole model's type for the encoder's before version 5."""
    folder = change(write(name, tmp_path), lambda config: config["vision_config"].update(model_type=name))
    model, tokenizer = load_vlm(folder)
    (tmp_path / "out").mkdir()
    save_vlm(model, tokenizer, tmp_path / "out")
    assert "logits differ" in check_vlm(model, tmp_path / "out")


def change(folder, how, file="config.json"):
    values = json.loads((folder / file).read_text())
    how(values)
    (folder / file).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("internvl", lambda c: c.update(downsample_ratio=0.0), "downsample_ratio: 0.0, expected one over"),
        ("internvl", lambda c: c.update(downsample_ratio=0.3), "downsample_ratio: 0.3, expected one over"),
        ("idefics3", lambda c: c.update(scale_factor=3), "scale_factor: 3, expected a divisor of 4"),
        ("llava_onevision", lambda c: c.update(vision_aspect_ratio="anyres"), "expected anyres_max_ and a number"),
        ("qwen2_5_vl", lambda c: c["vision_config"].update(out_hidden_size=64), "out_hidden_size: 64, expected 32"),
        ("qwen2_5_vl", lambda c: c["text_config"].update(use_sliding_window=True), "use_sliding_window: true"),
        ("qwen2_5_vl", lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[1, 1, 1]), "add up to 4"),
        (
            "qwen3_vl",
            lambda c: c["vision_config"].update(deepstack_visual_indexes=[0, 99]),
            "expected layers from 0 to 3",
        ),
        (
            "qwen3_vl",
            lambda c: c["vision_config"].update(deepstack_visual_indexes=[2, 0]),
            r"\[2, 0\], expected layers",
        ),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(name, how, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_vlm(change(write(name, tmp_path), how))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda c: c.update(merge_size=4), "which is not the encoder's"),
        (lambda c: c.update(do_rescale=False), "do_rescale=False"),
        (lambda c: c.update(resample=None), "resample is missing"),
        (lambda c: c.pop("image_mean"), "image_mean is missing"),
    ],
)
def test_a_preprocessor_that_does_something_else_is_refused(how, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_vlm(change(write("qwen2_5_vl", tmp_path), how, "preprocessor_config.json"))


def test_what_a_merger_of_lower_layers_cannot_be_joined_with(tmp_path):
    model = load_vlm(write("qwen3_vl", tmp_path))[0]
    for preset in ("saisa", "flamingo", "deepstack"):
        with pytest.raises(ConfigError, match=r"found merger, .*levels=0|QwenVision lacks reads_depths"):
            change_mechanism(model, PRESETS[preset].stretched(3), 0, model.connector)


def test_a_qwen_encoder_behind_another_connector(tmp_path):
    """Its pictures stay whole squares of its own."""
    model, tokenizer = load_vlm(write("qwen2_5_vl", tmp_path))
    for connector in (Connector(), PixelShuffle(3), Average(2)):
        other, _ = change_mechanism(load_vlm(tmp_path)[0], model.mechanism, 0, connector)
        processor = Processor(tokenizer, "jinja", other.vision.transform, other.config.image_token_id)
        asked, pictures = conversation([[(40, 20), (33, 50), "What?"]])
        assert other(**processor.prompts([asked], [pictures])).logits.isfinite().any()
        with pytest.raises(ConfigError, match=r"model.connector: found .*Qwen25VL's format holds merger"):
            format_of(other)
    with pytest.raises(ConfigError, match="positions by row and column"):
        change_mechanism(load_vlm(tmp_path)[0], model.mechanism, 0, AttentionPool(2, 1))
    model.config.text_config.image_rotary["interleaved"] = True
    with pytest.raises(ConfigError, match="with interleaved=False"):
        format_of(model)


def test_what_a_familys_encoder_or_decoder_cannot_do_is_named(name, both, folder, tmp_path):
    if not isinstance(both[0].vision, QwenVision):
        return
    for sections, told in (
        (8, "mrope_section: found 8"),
        ([1, 2], r"found .*\[1, 2\].* three numbers"),
        ([10**9, 0, 0], "add up to"),
    ):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        values = json.loads((tmp_path / "config.json").read_text())
        values["text_config"]["rope_parameters"]["mrope_section"] = sections
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ConfigError, match=told):
            load_vlm(tmp_path)
