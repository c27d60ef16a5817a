"""The check of a real checkpoint, on models with random weights: it finds them equal, and sees what is different."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lib.llava import random_llava, write_llava
from lib.vlms import KINDS, tokenizer_of, write
from tokenizers import AddedToken
from transformers import AutoTokenizer

from lit_eemllm.formats.vlm import load_vlm, save_vlm

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import check_model

PICTURES = [check_model.drawn(size) for size in ((40, 20), (9, 30))]


@pytest.mark.parametrize("kind", KINDS)
def test_each_family_is_equal(kind: str, tmp_path: Path) -> None:
    folder, made = write(kind, tmp_path, num_hidden_layers=3), KINDS[kind]
    processor = made.processor(tokenizer_of(made), made.preprocessor)
    rows = check_model.compare(folder, PICTURES, processor)
    assert [row.name for row in rows] == ["no picture", "40 x 20", "9 x 30", "three turns"]
    assert all(row.equal for row in rows), rows
    if kind != "smolvlm":
        return
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.tokenizer.chat_template = processor.chat_template = made.template.replace("Assistant:", "Bot:")
    bare, shown, *_ = check_model.compare(folder, PICTURES, processor)
    assert bare.ids[0] and not bare.equal and bare.logits is None
    assert shown.levels[1] > 10 and not shown.equal


def test_the_command(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(parts / "decoder")
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    folder = tmp_path / "written"
    folder.mkdir()
    save_vlm(*load_vlm(write_llava(random_llava(tokenizer), tokenizer, tmp_path / "llava")), folder, "vicuna_v1")
    assert check_model.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("equal") == 6 and "1600 x 400" in printed
    assert check_model.main([str(parts / "decoder")]) == 2


def test_other_weights_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, made = write("qwen3_vl", tmp_path, num_hidden_layers=3), KINDS["qwen3_vl"]
    read = made.model.from_pretrained

    def shaken(*arguments: Any, **options: Any) -> Any:
        model = read(*arguments, **options)
        if not isinstance(model, tuple):  # as we read it
            with torch.no_grad():
                model.model.visual.merger.linear_fc2.bias += 0.1
        return model

    monkeypatch.setattr(made.model, "from_pretrained", shaken)
    rows = check_model.compare(folder, PICTURES[:1], made.processor(tokenizer_of(made), made.preprocessor))
    assert [row.equal for row in rows] == [True, False, False]
