"""tools/attention_maps.py: the weights on each visual token beside an explicit softmax, and its picture."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from lib.equations import plain
from PIL import Image

from lit_eemllm.mechanisms import build_mechanism

SOURCE = Path(__file__).parents[2] / "tools" / "attention_maps.py"
spec = importlib.util.spec_from_file_location("attention_maps", SOURCE)
maps = importlib.util.module_from_spec(spec)
sys.modules["attention_maps"] = maps
spec.loader.exec_module(maps)


@pytest.mark.parametrize("mechanism", ["llava", "ee_mllm", "vica"])
def test_weights_are_those_of_an_explicit_softmax(mechanism):
    """Of text, image, text, where a head is narrower than the image is long: the answer's row, and the question's behind the image."""
    model = tiny.model("llama-gqa", build_mechanism(mechanism, 3), layers=3).eval()
    pack = tiny.pack([[3, 0, 4]])
    pack = replace(pack, target_rows=torch.tensor([5, 6]), targets=pack.targets[:2])
    head = model.language_model.config.hidden_size // model.language_model.config.num_attention_heads
    assert head < pack.layout.num_visual
    seen = {}
    with torch.no_grad():
        plain(model, pack, watch=lambda layer, is_visual, weights: seen.update({layer: (is_visual, weights)}))
    likely, found = maps.looked_at(model, pack)
    assert likely == model.packed_logits(pack).argmax(-1).tolist()
    answer = int(pack.target_rows[0])
    behind = (~pack.layout.prefix()).nonzero().flatten()
    for layer, (is_visual, weights) in seen.items():
        on_image_TV = weights.mean(0)[~is_visual][:, is_visual]
        question = on_image_TV[behind[behind < answer]].mean(0)
        torch.testing.assert_close(torch.tensor(found["answer"][layer]), on_image_TV[answer], rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.tensor(found["question"][layer]), question, rtol=0, atol=1e-6)
    assert any(sum(one) > 0 for one in found["answer"])


def test_tokens_that_leave_have_no_map():
    model = tiny.model("llama-gqa", build_mechanism("fastv", 4), layers=4).eval()
    with pytest.raises(maps.UserError, match="visual tokens leave"):
        maps.looked_at(model, tiny.pack([[3, 0, 4]]))


def test_picture_has_two_lines_a_run(tmp_path):
    runs = [{"preset": "llava", "said": "red", "answer": [[0.1] * 4] * 2, "question": [[0.2] * 4] * 2}] * 2
    maps.draw(Image.new("RGB", (8, 8)), "What?", runs, tmp_path / "example.png")
    with Image.open(tmp_path / "example.png") as drawn:
        assert drawn.width == pytest.approx(720, abs=5) and drawn.height == pytest.approx(1080, abs=5)


def test_what_cannot_be_done_is_a_message(tmp_path, capsys):
    """No run there, no traceback."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    line = [
        str(tmp_path),
        "--image",
        str(tmp_path / "a.png"),
        "--question",
        "q",
        "--answer",
        "a",
        "--out",
        str(tmp_path),
    ]
    assert maps.main(line) == 2 and "error: " in capsys.readouterr().err
