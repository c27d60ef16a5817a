"""Parquet files with images inside: the samples of the same rows of JSON beside a folder of images, in every shape, split and damage."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from shards_util import encoder, picture

from lit_eemllm import cli, limits
from lit_eemllm.data.parquet import _reader, stored
from lit_eemllm.data.shards import make, read_shard
from lit_eemllm.errors import UserError
from lit_eemllm.inputs.conversation import IMAGE
from lit_eemllm.inputs.rows import DESCRIBE

FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROWS = 7
# As `datasets` writes it.
FEATURES = {
    b"huggingface": b'{"info": {"features": {"image": {"_type": "Image"}, "id": {"dtype": "string", "_type": "Value"}}}}'
}


def asked(number: int) -> str:
    return f"what is {number}?"


def turns(number: int, images: int = 1) -> list[dict[str, str]]:
    return [
        {"from": "human", "value": f"{IMAGE}\n" * images + asked(number)},
        {"from": "gpt", "value": f"it is {number * number}"},
    ]


def answer(number: int) -> str:
    return turns(number)[1]["value"]


def inside(number: int, path: str | None = None) -> dict[str, Any]:
    return {"bytes": picture(number, "PNG" if number % 2 else "JPEG"), "path": path}


def messages(number: int, content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer(number)}]


def parts(number: int) -> list[dict[str, Any]]:
    said = [{"index": 0, "text": None, "type": "image"}, {"index": None, "text": asked(number), "type": "text"}]
    return said


# By shape: the columns of row n, and the same as rows of JSON (default: LLaVA's) where its image is called n.png.
SHAPES: dict[str, Any] = {
    "LLaVA": lambda n: {"id": str(n), "image": inside(n, "a/../../b.jpg"), "conversations": turns(n)},
    "OpenAI": lambda n: {"images": [inside(n)], "messages": messages(n, f"{IMAGE}\n{asked(n)}")},
    "OpenAI, no placeholder": lambda n: {"images": [inside(n)], "messages": messages(n, asked(n))},
    "TRL": lambda n: {"images": [inside(n)], "messages": [
        {"role": "user", "content": parts(n)}, {"role": "assistant", "content": [{"index": None, "text": answer(n), "type": "text"}]}]},
    "The Cauldron": lambda n: {"images": [inside(n)], "texts": [{"user": asked(n), "assistant": answer(n), "source": "x"}]},
    "question and answer": lambda n: {"image": inside(n)["bytes"], "question": asked(n), "answer": answer(n), "when": datetime(2024, 1, 1)},
    "question and answers": lambda n: {"image": inside(n), "question": asked(n), "answers": [answer(n), "or so"]},
    "caption": lambda n: {"image": inside(n), "caption": answer(n)},
    "text": lambda n: {"image": inside(n), "text": [answer(n), "another"]},
}  # fmt: skip


def as_json(shape: str, number: int) -> dict[str, Any]:
    said = turns(number)
    if shape in ("caption", "text"):
        said[0]["value"] = f"{IMAGE}\n{DESCRIBE}"
    return {"image": f"{number}.png", "conversations": said}


def samples(folder: Path) -> Iterator[tuple[list[int], list[torch.Tensor], list[bytes], dict[str, Any]]]:
    """Token ids, pixels, image files and row of each."""
    for shard in sorted(folder.glob("*.tar")):
        for key, members in read_shard(shard):
            found = encoder(400).tokenize(key, members)
            yield found.ids, encoder(400).load_pixels(found).pixels, found.images, json.loads(members["json"])


def same(folder: Path, other: Path, count: int = ROWS) -> None:
    pairs = list(zip(samples(folder), samples(other), strict=True))
    assert len(pairs) == count
    for one, two in pairs:
        assert one[0] == two[0] and one[2] == two[2]
        assert all(map(torch.equal, one[1], two[1])) and len(one[1]) == len(two[1])


def write(
    path: Path, rows: list[dict[str, Any]], group: int = 3, schema: pa.Schema | None = None, **options: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table.replace_schema_metadata(FEATURES), path, row_group_size=group, **options)
    return path


def plain(folder: Path, shape: str = "LLaVA", numbers: range = range(ROWS)) -> Path:
    """Shards of the same rows of JSON."""
    (folder / "images").mkdir()
    for number in numbers:
        (folder / "images" / f"{number}.png").write_bytes(inside(number)["bytes"])
    (folder / "rows.json").write_text(json.dumps([as_json(shape, number) for number in numbers]))
    make({"train": folder / "rows.json"}, folder / "images", folder / "plain", shard_size=4)
    return folder / "plain"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_samples_of_rows_of_json(shape: str, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", [SHAPES[shape](number) for number in range(ROWS)])
    report = make({"train": file}, None, tmp_path / "made", shard_size=4)
    assert report.ok and report.images == ROWS
    same(tmp_path / "made", plain(tmp_path, shape))
    *_, row = list(samples(tmp_path / "made"))[-1]
    if shape == "question and answers":
        assert row["answers"] == [answer(6), "or so"] and "question" not in row
    assert ("mended" in row) == (shape == "OpenAI, no placeholder") and row["image"]


def test_no_and_several_images_and_a_schema_of_large_and_list_types(tmp_path: Path) -> None:
    rows = [
        {"images": [inside(1), None, inside(2)], "texts": [{"user": asked(1), "assistant": answer(1)}, {"user": "sure?", "assistant": "yes"}]},
        {"images": None, "texts": [{"user": asked(2), "assistant": answer(2)}]},
        {"images": [], "texts": [{"user": asked(3), "assistant": answer(3)}]},
    ]  # fmt: skip
    said = pa.struct([("user", pa.large_string()), ("assistant", pa.string())])
    images = pa.large_list(pa.struct([("bytes", pa.large_binary())]))
    file = write(tmp_path / "rows.parquet", rows, schema=pa.schema([("images", images), ("texts", pa.list_(said))]))
    report = make({"val": file}, None, tmp_path / "made")
    assert report.mended == {"null_image": 2} and "null_image" in str(report), "in the first row, and all of the second"
    found = list(samples(tmp_path / "made"))
    assert [image for *_, images, _ in found for image in images] == [inside(1)["bytes"], inside(2)["bytes"]]
    assert [len(row["conversations"]) for *_, row in found] == [4, 2, 2]
    assert found[0][3]["conversations"][0]["value"] == f"{IMAGE}\n{IMAGE}\n{asked(1)}"
    assert [row.get("images") or row.get("image") for *_, row in found][1:] == [None, None]


def test_rows_are_read_forward_from_any_place_as_pyarrow_reads_the_table(tmp_path: Path) -> None:
    rows = [SHAPES["LLaVA"](number) for number in range(40)]
    for group in (1, 7, 40):
        refs = list(stored([write(tmp_path / f"{group}.parquet", rows, group)], ()))
        table = pq.read_table(tmp_path / f"{group}.parquet").to_pylist()
        for number in (0, 1, 2, 9, 10, 38, 39, 5, 5, 6, 14, 13):
            row, images = refs[number].read()
            assert row["id"] == table[number]["id"] and list(images.values()) == [table[number]["image"]["bytes"]]
        _reader.cache_clear()


def test_splits_by_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name, numbers in (("data/train-00000-of-00002", range(3)), ("data/train-00001-of-00002", range(3, ROWS)),
                          ("data/validation-00000-of-00001-0a1b", range(2)), ("default/test/0000", range(1))):  # fmt: skip
        write(Path(f"hub/{name}.parquet"), [SHAPES["LLaVA"](number) for number in numbers])
    assert cli.main(["shards", "make", "--rows", "hub", "--out", "all"]) == 0
    assert f"10 good samples (train {ROWS}, val 2, test 1), 10 images" in capsys.readouterr().out
    assert cli.main(["shards", "make", "--rows", "train=hub", "--out", "one"]) == 0
    assert f"{ROWS} good samples (train {ROWS})" in capsys.readouterr().out
    same(tmp_path / "one", plain(tmp_path))
    write(Path("unsaid/a.parquet"), [SHAPES["LLaVA"](0)])
    assert cli.main(["shards", "make", "--rows", "val=unsaid", "--out", "two"]) == 0
    write(Path("unsaid/train.parquet"), [SHAPES["LLaVA"](0)])
    Path("saved").mkdir()
    Path("saved/data-00000-of-00001.arrow").touch()
    capsys.readouterr()
    for line, told in (
        ("--rows unsaid", "unsaid/a.parquet: its name says no split"),
        ("--rows test=hub/data", "hub/data: no files of 'test'; found train, val."),
        ("--rows hub --rows train=hub", "hub: its split 'train' is given twice"),
        ("--rows saved", "load_from_disk('saved').to_parquet("),
        ("--rows train=rows.json --columns a=b", "rows of JSON have keys"),
    ):
        assert cli.main(["shards", "make", *line.split(), "--out", "no"]) == 2
        err = capsys.readouterr().err
        assert told in err and err.count("\n") == 1
    assert not Path("no").exists()


def test_columns_by_other_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"img": inside(n), "query": asked(n), "label": [answer(n)], "audio": inside(n)} for n in range(ROWS)]
    write(Path("a.parquet"), rows)
    line = ["shards", "make", "--rows", "train=a.parquet", "--out", "made"]
    for columns, told in (
        ("", "a.parquet: its columns are 'img', 'query', 'label', 'audio'; 'img' holds bytes"),
        ("image=img,question=query,answer=label,audio", "'audio' holds bytes, and images are read of image, images, image_path alone"),
        ("image=img,query,label", "expected one of conversations, messages, texts, question and answer, question and answers, caption, text"),
        ("image=pic", "there is no 'pic', which --columns names"),
        ("text=query", "the last two with image or images. Name what is read: --columns image=COLUMN,question=COLUMN"),
    ):  # fmt: skip
        assert cli.main([*line, *(["--columns", columns] if columns else [])]) == 2
        assert told in (err := capsys.readouterr().err) and err.count("\n") == 1, err
    assert cli.main([*line, "--columns", "image=img,question=query,answer=label"]) == 0
    same(Path("made"), plain(tmp_path))


def test_bad_rows_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "in.png").write_bytes(picture(3))
    (tmp_path / "out.png").write_bytes(picture(4))
    values = [inside(0), None, {"bytes": b"", "path": "in.png"}, {"bytes": b"notes"}, {"path": "in.png"}, {"path": "../out.png"},
              {"path": str(tmp_path / "out.png")}, {"path": "gone.png"}, {"bytes": picture(1, size=(2000, 2000))}, inside(1)]  # fmt: skip
    rows = [{"image": value, "question": "what?", "answer": "it"} for value in values]
    rows += [{**rows[0], "question": None}, {**rows[0], "answer": ""}, {**rows[0], "choices": ["a", "b"]}]
    schema = pa.schema(
        [("image", FILE), ("question", pa.string()), ("answer", pa.binary()), ("choices", pa.list_(pa.string()))]
    )
    table = pa.Table.from_pylist(rows, schema.set(2, pa.field("answer", pa.string())))
    broken = pa.array([b"it"] * 12 + [b"\xff\xfe"]).view(pa.string())  # a text that is no UTF-8
    both = pa.concat_tables([table, table.set_column(2, "answer", broken).slice(12)])
    pq.write_table(both, tmp_path / "rows.parquet")
    report = make(
        {"train": tmp_path / "rows.parquet"}, tmp_path / "images", tmp_path / "made", max_image_pixels=100_000
    )
    assert report.good == {"train": 4} and report.images == 3  # the first, one without an image, in.png, the last
    assert report.mended == {"null_image": 1}
    assert report.bad == {
        "bad_image": 2, "path_escape": 2, "missing_image": 1, "image_too_large": 1, "no_target": 1, "bad_record": 2, "unread_key": 1,
    }  # fmt: skip
    text = str(report)
    assert "rows.parquet row 10: question and answer hold 'None', expected texts" in text and "'utf-8' codec" in text
    assert "image 'train row 2, rows.parquet row 2 image 0' (0 bytes) cannot" in text or "begins with b''" in text
    report = make({"train": tmp_path / "rows.parquet"}, None, tmp_path / "alone")  # no folder is guessed
    assert report.bad["missing_image"] == 4 and report.images == 3
    write(
        tmp_path / "many.parquet", [{"images": [inside(1)] * 1001, "text": "a"}, {"images": [inside(1)], "text": "b"}]
    )
    report = make({"train": tmp_path / "many.parquet"}, None, tmp_path / "many")
    assert report.bad == {"too_many_images": 1} and report.good == {"train": 1}
    monkeypatch.setattr(limits, "SAMPLE_BYTES", 5000)
    write(
        tmp_path / "big.parquet",
        [{"image": {"bytes": bytes(6000)}, "caption": "a"}, {"image": inside(1), "caption": "b"}],
    )
    report = make({"train": tmp_path / "big.parquet"}, None, tmp_path / "big")
    assert report.bad == {"oversize": 1} and report.good == {"train": 1}


def test_a_date_that_python_has_not_is_a_bad_row_and_a_name_twice_an_error(tmp_path: Path) -> None:
    columns = [pa.array([inside(0), inside(1)], FILE), pa.array(["a", "b"]), pa.array([10**15, 0], pa.timestamp("s"))]
    pq.write_table(pa.table(columns, names=["image", "caption", "when"]), tmp_path / "dated.parquet")
    report = make({"train": tmp_path / "dated.parquet"}, None, tmp_path / "dated")
    assert report.bad == {"bad_record": 1} and report.good == {"train": 1}
    pq.write_table(pa.table(columns, names=["image", "caption", "caption"]), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"caption.*some of them twice\. Write it with a name for each"):
        make({"train": tmp_path / "twice.parquet"}, None, tmp_path / "twice")


def test_what_is_no_parquet_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [SHAPES["LLaVA"](number) for number in range(ROWS)]
    whole = write(tmp_path / "whole.parquet", rows, compression="none").read_bytes()
    begin = len(whole) - 8 - struct.unpack("<I", whole[-8:-4])[0]  # of the footer
    middle = whole.index(picture(5))
    damaged = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "pages": whole[:4] + bytes(begin - 4) + whole[begin:],
        "length": whole[: middle - 4] + b"\xff" * 4 + whole[middle:],
        "moved": whole[:4] + whole[begin - 60 :],  # less than the footer claims
        "footer": whole[:begin] + b"\xff" * (len(whole) - begin - 8) + whole[-8:],
    }
    for name, data in damaged.items():
        (tmp_path / f"{name}.parquet").write_bytes(data)
        with pytest.raises(
            UserError, match=rf"{name}\.parquet: truncated, damaged, or no parquet: .* Copy or make it again"
        ) as caught:
            make({"train": tmp_path / f"{name}.parquet"}, None, tmp_path / "made")
        assert "\n" not in str(caught.value) and not (tmp_path / "made").exists()
    # a column whose only value is written once, and claimed 300 times by one row
    indices = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array([bytes(4_000_000)]))
    bomb = pa.table({"image": pa.ListArray.from_arrays(pa.array([0, 300], pa.int32()), indices), "caption": ["a"]})
    many = {
        "dictionary_pagesize_limit": 2**30,
        "write_batch_size": 10**6,
        "data_page_size": 2**30,
        "store_schema": False,
    }
    pq.write_table(bomb, tmp_path / "bomb.parquet", compression="zstd", **many)
    assert (tmp_path / "bomb.parquet").stat().st_size < 1000
    if sys.platform.startswith("linux"):
        monkeypatch.setattr(limits, "PARQUET_MEMORY", 2**28)
        with pytest.raises(UserError, match=r"bomb\.parquet: truncated, damaged, or no parquet: .*alloc of size"):
            make({"train": tmp_path / "bomb.parquet"}, None, tmp_path / "made")
        monkeypatch.undo()
    monkeypatch.setattr(limits, "PARQUET_ROWS", ROWS - 1)
    with pytest.raises(UserError, match="claims 7 rows; at most 6 of a file are read"):
        make({"train": tmp_path / "whole.parquet"}, None, tmp_path / "made")


def test_processes_and_a_second_start_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "rows.parquet", [SHAPES["LLaVA"](number) for number in range(40)], 7)

    def digests(folder: Path) -> list[str]:
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))]

    for workers in (1, 2):
        make({"train": file}, None, tmp_path / str(workers), shard_size=6, workers=workers)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") and len(digests(tmp_path / "1")) == 7
    with monkeypatch.context() as patch:
        patch.setattr("lit_eemllm.data.shards.prepare", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make({"train": file}, None, tmp_path / "again", shard_size=6)
    with monkeypatch.context() as patch:
        patch.setattr("lit_eemllm.data.writing._write_shard", lambda *_: 1 / 0)  # they are all there
        make({"train": file}, None, tmp_path / "again", shard_size=6)
    assert digests(tmp_path / "again") == digests(tmp_path / "1")
    whole = file.read_bytes()
    write(file, [SHAPES["LLaVA"](number + 1) for number in range(40)], 7)
    with monkeypatch.context() as patch:
        patch.setattr("lit_eemllm.data.shards.prepare", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make({"train": file}, None, tmp_path / "changed", shard_size=6)
    file.write_bytes(whole)
    make({"train": file}, None, tmp_path / "changed", shard_size=6)
    assert digests(tmp_path / "changed") == digests(tmp_path / "1"), "a file that is another now is read anew"


def test_pyarrow_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "rows.parquet", [SHAPES["LLaVA"](0)])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"is not installed; pip install 'lit_eemllm\[parquet\]'"):
        make({"train": file}, None, tmp_path / "made")
