"""Bounds on work: what is over a limit is a bad sample with its name, the same in make, check, training and validate; or a refused file."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from shards_util import encoder, module, picture, row, sample, write_shards, write_tar
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_eemllm import limits
from lit_eemllm.data.check import check
from lit_eemllm.data.json_rows import read_json
from lit_eemllm.data.recipe import read_recipe, read_yaml
from lit_eemllm.data.shards import make, prepare
from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.evaluation.sets import QuestionSet, read_questions
from lit_eemllm.inputs.chat import get_template
from lit_eemllm.inputs.conversation import IMAGE, Conversation, Turn
from lit_eemllm.inputs.images import image_size, read_file, read_picture
from lit_eemllm.inputs.spans import SpanTokenizer

PIXELS = 10_000  # as the encoder of the tests has it


def jpeg(**options: Any) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(file, "JPEG", **options)
    return file.getvalue()


def scanned(times: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = jpeg(progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * times + b"\xff\xd9"


def padded(data: bytes) -> bytes:
    return data + bytes(30_000)


def with_image(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    return row(1), {"1_0.png": data}


def many_images() -> tuple[dict[str, Any], dict[str, bytes]]:
    turns = [{"from": "human", "value": IMAGE * 5 + "?"}, {"from": "gpt", "value": "a"}]
    return {"image": ["1_0.png"] * 5, "conversations": turns}, {"1_0.png": picture(1)}


CASES: dict[str, tuple[Callable[[], tuple[dict[str, Any], dict[str, bytes]]], str, dict[str, int]]] = {
    "scans": (lambda: with_image(scanned(100)), "image_too_large", {}),
    "a tail": (lambda: with_image(padded(picture(1))), "image_too_large", {"IMAGE_BYTES": 2000}),
    "a large row": (lambda: ({**row(1), "base64": "A" * 3000}, {"1_0.png": picture(1)}), "bad_json", {"ROW_BYTES": 2000}),
    "images": (many_images, "too_many_images", {"ROW_IMAGES": 4}),
    "a sample": (lambda: with_image(padded(picture(1))), "oversize", {"SAMPLE_BYTES": 10_000}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_over_a_limit_every_verb_has_the_same_bad_sample(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, reason, changed = CASES[case]
    bad, images = made()
    (tmp_path / "images").mkdir()
    for name, data in {"2_0.png": picture(2), **images}.items():
        (tmp_path / "images" / name).write_bytes(data)
    (tmp_path / "rows.json").write_text(json.dumps([row(2), bad]))
    listed = [images[name] for name in bad["image"]]
    members = {
        "json": json.dumps(bad).encode(),
        **{f"{i}.{'jpg' if case == 'scans' else 'png'}": data for i, data in enumerate(listed)},
    }
    write_tar(tmp_path / "shards" / "val.tar", {"good": sample(2), "bad": members})
    write_tar(tmp_path / "shards" / "a.tar", {"good1": sample(2), "bad1": members})
    prepare(tmp_path / "shards")
    for name, value in changed.items():
        monkeypatch.setattr(limits, name, value)

    report = make({"train": tmp_path / "rows.json"}, tmp_path / "images", tmp_path / "made", max_image_pixels=PIXELS)
    assert report.good == {"train": 1} and report.bad == {reason: 1}
    for encode in (None, encoder(400)):
        report = check(tmp_path / "shards", encode, max_image_pixels=PIXELS)
        assert report.bad == {reason: 2} and report.good.total() == 2
        assert any("bad1" in text for text in report.examples[reason]), "by its name"
    data = module(tmp_path / "shards", max_length=400, pack_tokens=400, max_image_pixels=PIXELS)
    seen = {key for batch in islice(data.train_dataloader(), 3) for key in batch.keys}
    assert seen == {"good1"} and data.skipped[reason] >= 1
    if case != "a sample":  # rows have no samples
        rows = QuestionSet("q", tmp_path / "rows.json", tmp_path / "images", None, 8)
        assert read_questions(rows, None, PIXELS)[1].bad == {reason: 1}
    shards = QuestionSet("q", tmp_path / "shards", None, None, 8)
    assert read_questions(shards, None, PIXELS)[1].bad == {reason: 1}


def test_the_work_of_a_jpeg(tmp_path: Path) -> None:
    bomb, start = scanned(3000), time.process_time()
    for read in (read_picture, image_size):
        with pytest.raises(SampleError, match=r"3,\d\d\d times over 64 x 64 pixels"):
            read(bomb, "b", 10**6 // 2)
    assert time.process_time() - start < 1
    honest = [jpeg(), jpeg(progressive=True), jpeg(progressive=True, quality=100, subsampling=0)]
    for compression in ("jpeg", "tiff_lzw"):
        file = io.BytesIO()  # strips of a few lines, each a JPEG of its own
        Image.effect_noise((64, 640), 50).convert("RGB").save(file, "TIFF", compression=compression, tiffinfo={278: 8})
        honest.append(file.getvalue())
    for data in honest:
        with Image.open(io.BytesIO(data)) as image:
            assert read_picture(data, "h", image.width * image.height).shape[1:] == image.size[::-1]


def test_scans_are_those_of_the_picture_alone() -> None:
    """A phone puts a thumbnail before its picture and a film behind it. Neither hides scans that are decoded."""
    chance = b"\xff\xda\x00\x02" * 3000
    thumbnail = b"\xff\xe1" + (2 + 12_000).to_bytes(2, "big") + chance
    end = b"\xff\xec\x00\x06\xff\xd9\xff\xd9"
    plain, restarts = jpeg(), jpeg(restart_marker_blocks=1)
    for data in (plain, restarts):
        phone = data[:2] + thumbnail + data[2:] + chance
        assert torch.equal(read_picture(phone, "p", PIXELS), read_picture(data, "p", PIXELS))
        assert image_size(phone, "p", PIXELS) == (64, 64)
    bomb = scanned(100)
    last = bomb.rindex(b"\xff\xda")
    for hidden in (
        bomb[:2] + end + bomb[2:],
        bomb[:last] + end + bomb[last:],
        bomb + chance,
        bomb[:last] + b"\xff" + bomb[last:],
    ):
        with pytest.raises(SampleError, match=r"goes 109 times over"):
            read_picture(hidden, "b", PIXELS)


def test_a_file_with_a_huge_tail_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.write(picture(1))
        file.truncate(3 * 2**30)  # a hole
    with pytest.raises(SampleError, match="has 3,221,225,472 bytes"):
        read_file(tmp_path / "a.png", "a")


def test_lists_of_shards_and_recipes_are_bounded(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", {"train": [row(1)]})
    split, recipe = tmp_path / "a" / ".nv-meta" / "split.yaml", tmp_path / "r.yaml"
    content, start = split.read_text(), time.process_time()
    for names in (["x-{0..900000}.tar"] * 200, [f"x-{{{'0' * 10**5}..99999}}.tar"]):
        split.write_text(json.dumps({"split_parts": {"train": names}, "exclude": []}))
        with pytest.raises(UserError, match=r"split_parts.train' lists more than 1,000,000 shards"):
            read_recipe(tmp_path / "a", "train")
    split.write_text(content)
    recipe.write_text("splits:\n  train:\n    blend:\n" + "      - {path: a}\n" * 2000)
    with pytest.raises(UserError, match="lists 2,000 sources, at most 1,000 are read"):
        read_recipe(recipe, "train")
    recipe.write_text("# " + "x" * limits.YAML_BYTES)
    with pytest.raises(UserError, match="at most 1,048,576 are read"):
        read_recipe(recipe, "train")
    assert time.process_time() - start < 10


def test_a_recipe_has_no_aliases_and_few_levels(tmp_path: Path) -> None:
    """An alias stands for any number of values; a value in many lists cannot be shown."""
    file = tmp_path / "r.yaml"
    for text, message in {
        "a: 1\nb: &b {c: d}\ne: [*b]": r"r.yaml:3: not plain YAML.* aliases \(\*name\) are not allowed",
        "&a [*a]": "aliases",
        "a: &b c\n*b: d": "aliases",
        "[" * 21 + "]" * 21: "more than 20 levels of nesting",
        "a:\n" + "".join(" " * i + "- \n" for i in range(1, 40)): "more than 20 levels",
        "[" * 10**5: "not plain YAML",
    }.items():
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_yaml(file)
    deep = "[" * 17 + "{a: [1, x, 2.5, null, true]}, ''" + "]" * 17
    for text in (deep, "", "# nothing", "--- a", "a: é😀\n", "? a\n: b"):
        file.write_text(text, encoding="utf-8")
        assert read_yaml(file) == yaml.safe_load(text)


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML without libyaml")
def test_a_recipe_is_read_by_the_fast_reader(tmp_path: Path) -> None:
    """In seconds at its limit, which Python takes half a minute for."""
    file, took = tmp_path / "r.yaml", []
    file.write_text("[" + "a," * 30_000 + "]")
    for read in (read_yaml, lambda path: yaml.safe_load(path.read_bytes())):
        start = time.process_time()
        assert read(file) == ["a"] * 30_000
        took.append(time.process_time() - start)
    assert took[0] * 2 < took[1], took


def test_a_line_without_an_end_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_eemllm.data.json_rows._LONGEST", 1000)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"b": "' + "x" * 5000)
    with pytest.raises(UserError, match="a line of more than 1,000 characters"):
        list(read_json(tmp_path / "a.jsonl"))


def test_a_panic_of_the_tokenizer_is_a_bad_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pattern gives up on some texts, which is no Exception."""
    raw = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="[UNK]")
    chat = get_template("vicuna_v1", tokenizer)
    with pytest.raises(SampleError, match=r"the tokenizer broke on a text: .*retry-limit") as caught:
        chat.encode(Conversation("k", (Turn("human", "x" * 60), Turn("gpt", "a")), 0))
    assert caught.value.reason == "tokenizer"
    monkeypatch.setattr(SpanTokenizer, "_encodings", lambda self, texts: chat.tokenizer("x" * 60))
    with pytest.raises(UserError, match="template 'vicuna_v1': the tokenizer broke"):
        get_template("vicuna_v1", tokenizer)
