"""Models of images and text without weights: their numbers against transformers' own models and what is published of them."""

import json
from pathlib import Path

import pytest
import torch
from lib.vision import picture
from lib.vlms import KINDS, messages, tokenizer_of, write

from lit_eemllm import cli
from lit_eemllm.compat.torch import flop_counter
from lit_eemllm.config import load_config
from lit_eemllm.cost.shapes import PUBLISHED
from lit_eemllm.cost.trace import Document, trace
from lit_eemllm.cost.weightless import build_weightless, parts_of_config, parts_of_shape
from lit_eemllm.formats.vlm import FORMATS
from lit_eemllm.mechanisms import build_mechanism

GIVEN = ["model.decoder=none", "model.vision.path=none", "data.train=none", "optim.lr=1e-3", "optim.max_steps=1"]
FACTS = {  # billions of parameters, and tokens of the smallest and the largest picture, or of a picture and its tiles
    "smolvlm2-500m": ("0.507", {(512, 512): (1 + 16) * 64, (2048, 2048): (1 + 16) * 64, (2048, 512): (1 + 4) * 64}),
    "smolvlm2-2.2b": ("2.25", {(384, 384): (1 + 16) * 81, (1536, 768): (1 + 8) * 81}),
    "idefics3-8b": ("8.46", {(364, 364): (1 + 16) * 169, (1456, 728): (1 + 8) * 169}),
    "internvl3-8b": ("7.94", {(448, 448): 256, (896, 448): (1 + 2) * 256, (448 * 4, 448 * 3): (1 + 12) * 256}),
    "llava-onevision-7b": ("8.03", {(384, 384): 729 + 27 * 28, (768, 768): 729 + 54 * 55}),
    "qwen2.5-vl-3b": ("3.75", {(1, 1): 4, (8000, 8000): 16384, (280, 560): 10 * 20}),
    "qwen2.5-vl-7b": ("8.29", {(1, 1): 4, (8000, 8000): 16384, (280, 560): 10 * 20}),
    "qwen3-vl-4b": ("4.44", {(1, 1): 64, (8000, 8000): 16384, (320, 640): 10 * 20}),
    "qwen3-vl-8b": ("8.77", {(1, 1): 64, (8000, 8000): 16384, (320, 640): 10 * 20}),
}


QUICK = {"smolvlm2-500m", "qwen3-vl-4b"}
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]


@pytest.mark.parametrize("name", EACH)
def test_a_published_shape_has_the_parameters_and_tokens_that_are_known_of_it(name):
    kind, values, _ = PUBLISHED[name]
    with torch.device("meta"):
        theirs = FORMATS[kind].model_class(FORMATS[kind].config_class(**values))
    parts = parts_of_shape(name)
    layers = parts.decoder.num_hidden_layers
    ours, _ = build_weightless(load_config([], GIVEN), parts, build_mechanism("llava", layers))
    found = sum(weight.numel() for weight in ours.parameters())
    assert found == sum(weight.numel() for weight in theirs.parameters())
    billions, tokens = FACTS[name]
    assert f"{found / 1e9:.{len(billions) - 2}f}" == billions, "as the model hub lists it"
    assert {size: parts.transform.num_tokens(*size) for size in tokens} == tokens


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_and_the_connector_cost_what_transformers_own_do(kind, tmp_path, capsys):
    """Of a folder without weights, and one picture of a size at which it becomes several tiles."""
    folder, size = write(kind, tmp_path / "model", num_hidden_layers=3), (40, 20)
    theirs = KINDS[kind].model.from_pretrained(folder, attn_implementation="eager").eval()
    (folder / "model.safetensors").unlink()
    own = KINDS[kind].processor(tokenizer_of(KINDS[kind]), KINDS[kind].preprocessor)
    text = own.apply_chat_template(messages([[size, "What?"]]), add_generation_prompt=True)
    given = own(text=text, images=[picture(size, 0)], return_tensors="pt")
    names = {"pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask"} & given.keys()
    with torch.no_grad(), flop_counter() as counted:
        theirs.get_image_features(**{name: given[name] for name in names})

    parts = parts_of_shape(str(folder))
    visual = int((given["input_ids"] == theirs.config.image_token_id).sum())
    if kind == "qwen3_vl":  # of one by the commands
        assert cli.main(["explain", "--shape", str(folder), "--image", "40x20"]) == 0
        assert f"{visual} visual" in capsys.readouterr().out
        assert cli.main(["estimate", "--shape", str(folder), "--image", "40x20", "--only", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["visual"], found["size"]) == (visual, list(size))
        flops = found["mechanisms"]["ee_mllm"]["flops"]
        assert flops["encoder"] + flops["connector"] == counted.get_total_flops()
        return
    step = trace(load_config([], GIVEN), parts, build_mechanism("ee_mllm", 3), Document(5, visual, 5, size))
    assert step.encoder_flops + step.connector_flops == counted.get_total_flops()


@pytest.mark.parametrize("kind", ["internvl", "qwen2_5_vl"])
def test_what_convert_writes_costs_what_the_folder_does_that_it_was_made_of(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", str(write(kind, Path("theirs"), num_hidden_layers=3)), "--out", "ours"]) == 0
    (Path("ours") / "model.safetensors").unlink()
    config = load_config(["ours/config.yaml"], ["data.train=none", "optim.lr=1e-3", "optim.max_steps=1"])
    found, true = parts_of_config(config.model), parts_of_shape("theirs")
    assert (found.connector, found.transform, found.encoder) == (true.connector, true.transform, true.encoder)
    size = (40, 20)
    mechanism, document = build_mechanism("llava", 3), Document(5, true.transform.num_tokens(*size), 5, size)
    assert trace(config, found, mechanism, document) == trace(config, true, mechanism, document)


def test_mistakes_of_an_image(capsys):
    line = ["estimate", "--shape", "vicuna-7b", "--image"]
    with pytest.raises(SystemExit, match="2"):
        cli.main([*line, "40"])
    assert "found '40', expected width and height in pixels, such as 640x480" in capsys.readouterr().err
    assert cli.main([*line, "4x4", "--visual", "9"]) == 2
    assert "--image and --visual 9: give one of them" in capsys.readouterr().err


def test_most_tokens_of_a_picture_bound_a_shape():
    assert parts_of_shape("qwen3-vl-4b", max_tokens=4096).transform.num_tokens(8000, 8000) == 4096 // 4
