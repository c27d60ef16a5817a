"""The loader benchmark: its numbers fit together, and what it cannot measure is refused in words."""

from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image

from lit_eemllm.data.shards import read_shard

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import bench_loader  # noqa: E402

TOKENIZER = str(ROOT / "data_recipes" / "parts" / "decoder")


@pytest.mark.slow
def test_tiny_shards_are_measured_and_reported(tmp_path):
    words = shlex.split("--seconds 0.2 --rounds 1 --workers 1 --enlarge 80 --image-size 56 --pack-tokens 512")
    data, out = tiny.write_shards(tmp_path / "data", 80, 8), tmp_path / "out"
    assert bench_loader.main(["--data", str(data), "--tokenizer", TOKENIZER, "--out", str(out), *words]) == 0
    result = json.loads((out / "result.json").read_text())
    (row,) = result["rows"]
    assert row["workers"] == 1 and result["enlarge"] == 80
    assert min(row["decode"], row["pixels"], row["samples_per_second"]) > 0
    for name in ("decode", "pixels", "own"):
        assert row[f"of_{name}"] == pytest.approx(row["samples_per_second"] / row[name])
    assert 0.5 < row["packing"] <= 1 and row["mib_per_worker"] > 10
    # every sample shows a picture of (56 / 14)^2 tokens, and a pack has no more tokens than it holds
    assert 16 < row["tokens_per_second"] / row["samples_per_second"] < 512
    report = (out / "report.md").read_text()
    assert "pictures enlarged to 80 pixels" in report and f"| {row['of_decode']:.2f} |" in report
    assert max(map(len, report.partition("\n- ")[0].splitlines())) <= 120, "but what is measured on"


def test_other_files_take_the_place_of_the_pictures(tmp_path):
    """In turn and byte for byte, with the conversations as they were."""
    one, two = (bench_loader.enlarged(Image.new("RGB", (20, 10), colour), 60) for colour in ("red", "blue"))
    assert Image.open(io.BytesIO(one)).size == (60, 30)
    data, files = tiny.write_shards(tmp_path / "data", 4, 4), iter([one, two, one, two])
    (tmp_path / "new").mkdir()
    shards = bench_loader.rewritten(data, tmp_path / "new", lambda picture: next(files))
    before, after = ([members for _, members in bench_loader.drawn(folder)] for folder in (data, shards))
    assert [sample["0.jpg"] for sample in after] == [one, two, one, two]
    told = [[json.loads(sample["json"])["conversations"] for sample in samples] for samples in (before, after)]
    assert told[0] == told[1]


def drawn(monkeypatch, *samples: dict[str, bytes]) -> None:
    monkeypatch.setattr(bench_loader, "drawn", lambda path: ((str(i), one) for i, one in enumerate(samples)))


def sample(image: bytes, text: str = "<image>\nWhat?") -> dict[str, bytes]:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "A"}]
    return {"json": json.dumps({"conversations": turns}).encode(), "0.png": image}


def png(*size: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("samples", "workers", "expected"),
    [
        ([], "1", "no good samples; it has none"),
        ([{"json": b"{"}], "1", "no good samples; the last one is bad: 0.json: "),
        ([sample(b"no picture")], "1", "no good samples; the last one is bad: "),
        ([], "0", "--workers 0: expected 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(samples, workers, expected, monkeypatch, tmp_path, capsys):
    drawn(monkeypatch, *samples)
    words = ["--data", "data", "--tokenizer", TOKENIZER, "--out", str(tmp_path / "out"), "--workers", workers]
    assert bench_loader.main(words) == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_bad_rows_are_not_enlarged(monkeypatch, tmp_path):
    bad = [{"json": b"{"}, {"json": b"{}"}, sample(b"no picture"), sample(png(4, 4), "no placeholder")]
    drawn(monkeypatch, *bad, sample(png(400, 1)), sample(png(30, 40)))
    folder = bench_loader.rewritten(Path("data"), tmp_path, lambda picture: bench_loader.enlarged(picture, 80))
    (shard,) = folder.rglob("*.tar")
    pictures = [Image.open(io.BytesIO(members["0.jpg"])).size for _, members in read_shard(shard)]
    assert pictures == [(80, 1), (60, 80)]
