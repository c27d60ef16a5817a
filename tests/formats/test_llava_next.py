"""LLaVA-1.6 in transformers' format, read and written again, through transformers' own model and processor."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from lib.vision import PICTURES, picture
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from lit_eemllm import cli
from lit_eemllm.errors import ConfigError
from lit_eemllm.formats.vlm import check_vlm, load_vlm, save_vlm
from lit_eemllm.inputs.tiles import AnyresTransform

GRIDS = [[16, 32], [32, 16], [32, 32], [48, 16]]
TOWER = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
)
PREPROCESSOR = {
    "image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 16}, "do_center_crop": True, "do_pad": True,
    "crop_size": {"height": 16, "width": 16}, "resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4],
    "image_grid_pinpoints": GRIDS, "aspect_ratio_setting": "anyres",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("next")
    tiny.write_parts(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "decoder")
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    torch.manual_seed(0)
    text = {**tiny.COMMON, "vocab_size": len(tokenizer) + 5, "num_attention_heads": 4, "num_key_value_heads": 2}
    image = tokenizer.convert_tokens_to_ids("<image>")
    llava = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**TOWER),
            text_config=LlamaConfig(**text),
            image_token_index=image,
            image_grid_pinpoints=GRIDS,
        )
    )
    with torch.no_grad():
        for parameter in llava.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    llava.save_pretrained(folder / "llava")
    tokenizer.save_pretrained(folder / "llava")
    (folder / "llava" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder / "llava"


@pytest.mark.filterwarnings("ignore")
def test_as_transformers_reads_prepares_and_computes_it(folder, tmp_path):
    model, tokenizer = load_vlm(folder)
    model.set_attention("reference")
    twin = LlavaNextForConditionalGeneration.from_pretrained(folder).eval()
    assert model.projector.newline.equal(twin.model.image_newline)
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(**PREPROCESSOR), tokenizer, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    for i, size in enumerate([*PICTURES, (900, 3), (3, 900)]):
        image = picture(size, i)
        theirs = processor(images=image, text="What <image> is it?", return_tensors="pt")
        ids = theirs["input_ids"]
        text = ids[0] != model.config.image_token_id
        assert (~text).sum() == model.vision.transform.num_tokens(*size), size
        pixels = [model.vision.transform(image)]
        ours = model(ids, pixel_values=pixels, image_sizes=[size]).logits[0, text]
        views = model.vision.transform.views(pixels)
        tiny.assert_same_picture(views, theirs["pixel_values"][0], model.vision.transform.std)
        theirs["pixel_values"] = views[None]  # Pillow's are a level apart here and there
        known = [token for token in range(twin.config.text_config.vocab_size) if token != model.config.image_token_id]
        assert tiny.max_error(ours[:, known], twin(**theirs).logits[0, text][:, known]) < 1e-4, size

    save_vlm(model, tokenizer, tmp_path)
    assert "logits differ" in check_vlm(model, tmp_path)
    again = LlavaNextForConditionalGeneration.from_pretrained(tmp_path)
    assert all(tensor.equal(twin.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert load_vlm(tmp_path)[0].vision.transform == model.vision.transform
    assert isinstance(model.vision.transform, AnyresTransform) and model.vision.transform.grids[-1] == (3, 1)


def test_it_becomes_another_mechanism_and_answers(folder, tmp_path, capsys):
    assert cli.main(["convert", str(folder), "--out", str(tmp_path / "ours"), "--mechanism", "saisa"]) == 0
    picture((50, 11)).save(tmp_path / "x.png")
    given = ["--image", str(tmp_path / "x.png"), "--prompt", "What?", "data.train=x", "optim.lr=1", "optim.max_steps=1"]
    assert cli.main(["generate", str(tmp_path / "ours"), *given]) == 0
    assert cli.main(["convert", str(folder), "--out", str(tmp_path / "again"), "--to-llava"]) == 0
    assert (tmp_path / "again" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"image_grid_pinpoints": [[16, 32]]}, "but config.json has"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 20}}, "expected the encoder's 16 x 16"),
        ("preprocessor_config.json", {"do_center_crop": False, "size": {"height": 8, "width": 8}}, "8 x 8 pixels"),
    ],
)
def test_what_does_not_fit_is_refused(folder, tmp_path, file, changes, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **changes}))
    with pytest.raises(ConfigError, match=message):
        load_vlm(copy)
