"""The loader benchmark: its numbers fit together, and what it cannot measure is refused in words."""

from __future__ import annotations

import io
import json
import math
import random
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image

from lit_eemllm.config.keys import DataConfig
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


def by_hand(text, visual):
    """FLOPs of a sample in LLaVA-1.5's first stage: only the connector is trained, through a frozen decoder of Vicuna-7B's widths."""
    h, m, layers, vocabulary, all_tokens = 4096, 11008, 32, 32000, text + visual
    row = 8 * h * h + 6 * h * m
    products = (
        (layers - 1) * all_tokens * row + text * row + visual * 4 * h * h
    )  # the last layer has keys and values of images alone
    scores = 4 * h * ((layers - 1) * all_tokens**2 + text * all_tokens)
    head = 2 * text * h * vocabulary
    d, patches = 1024, visual + 1  # CLIP-L, to its last layer but one
    encoder = 23 * (patches * (8 * d * d + 4 * d * 4 * d) + 4 * patches**2 * d) + visual * 2 * 3 * 14 * 14 * d
    first, second = visual * 2 * d * h, visual * 2 * h * h
    forward = products + scores + head + encoder + first + second
    return forward + products + 2 * scores + head + first + 2 * second


def test_workers_of_a_preset_by_hand(tmp_path):
    rows = [{"workers": 1, "samples_per_second": 6.0}, {"workers": 2, "samples_per_second": 8.0}]
    measured, presets = tmp_path / "measured.json", tmp_path / "presets"
    measured.write_text(json.dumps({"enlarge": 640, "rows": rows, "provenance": "a machine; Python"}))
    presets.mkdir()
    text = (ROOT / "configs" / "presets" / "llava_1.5_7b_pretrain.yaml").read_text()
    (presets / "one.yaml").write_text(
        text.replace("../models", f"{ROOT}/configs/models").replace("base_pre", f"{ROOT}/configs/presets/base_pre")
    )
    shutil.copy(ROOT / "configs" / "presets" / "base_pretrain.yaml", presets)  # no preset
    words = shlex.split(
        f"--workers-for {measured} --presets {presets} --out {tmp_path / 'out'} --peak 800 --utilisation 0.5"
    )
    assert bench_loader.main(words) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    (row,) = found["rows"]
    assert (row["preset"], row["text"], row["visual"], row["samples"]) == ("one", 40, 576, 10240 // 616)
    assert row["flops"] == pytest.approx(16 * by_hand(40, 576), rel=0.005)
    step = 16 * by_hand(40, 576) / 400e12
    assert row["step_seconds"] == pytest.approx(step, rel=0.005)
    assert found["samples_per_second"] == 4 and row["worker_seconds"] == 16 / 4
    assert row["workers"] == math.ceil(1.25 * 4 / step) > 5
    report = (tmp_path / "out" / "report.md").read_text().replace("\n", " ")
    cells = f"{row['flops'] / 1e12:.1f} | {1000 * row['step_seconds']:.1f} | 4000.0 | {row['workers']}"
    assert f"| one | 576 | 40 | 16 | {cells} |" in report and "at 50% of 800 TFLOP/s" in report


def test_the_workers_that_the_docs_name():
    """docs/performance.md, of the committed result."""
    found = json.loads((ROOT / "benchmarks" / "2026-11-30-workers" / "result.json").read_text())
    of = {row["preset"]: row["workers"] for row in found["rows"]}
    assert set(of) == {path.stem for path in bench_loader.PRESETS.glob("*.yaml") if not path.stem.startswith("base_")}
    sizes = {
        size: [n for name, n in of.items() if f"_{size}" in name.replace("qwen2.5", "qwen")]
        for size in ("7b", "13b", "0.5b", "3b", "135m")
    }
    assert sum(map(len, sizes.values())) == len(of), "every preset has one of these sizes"
    assert (
        {*sizes["7b"], *sizes["13b"]} == {1}
        and {*sizes["0.5b"], *sizes["3b"]} == {1, 2, 3}
        and sizes["135m"] == [7, 15]
    )
    assert sum(n > DataConfig.workers for n in of.values()) == 3 and DataConfig.workers == 2
    said = " ".join((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").split())
    assert "1 for the presets of 7B and 13B, 1 to 3 for those of 0.5B and 3B, 7 and 15 for the two of 135M" in said
    rates = [found["samples_per_second"], *(rate_of(name) for name in ("loader-640", "loader-3200"))]
    assert (
        f"{rates[0]:.0f} samples a second of a worker" in said
        and rates[0] == rates[1]
        and round(rates[1] / rates[2]) == 7
    )


def rate_of(name):
    rows = json.loads((ROOT / "benchmarks" / f"2026-11-21-{name}" / "result.json").read_text())["rows"]
    return min(row["samples_per_second"] / row["workers"] for row in rows)


def waited(workers, headroom, deviation=0.3, ahead=2, packs=20_000):
    """Share of a run in which steps of 1 second wait for packs. Workers are asked in turn, each makes its next pack when it has fewer than
    two ready, in a time that is drawn around the mean."""
    draw, sigma = random.Random(0), math.sqrt(math.log(1 + deviation**2))
    free, taken, now, waits = [0.0] * workers, [[0.0] * ahead for _ in range(workers)], 0.0, 0.0
    for pack in range(packs):
        worker = pack % workers
        begins = max(free[worker], taken[worker].pop(0))
        free[worker] = begins + workers / headroom * draw.lognormvariate(-(sigma**2) / 2, sigma)
        waits += max(0.0, free[worker] - now)
        now = max(now, free[worker])
        taken[worker].append(now)
        now += 1
    return waits / now


@pytest.mark.parametrize("workers", [1, 2, 4, 16])
def test_the_headroom_keeps_the_wait_below_a_hundredth(workers):
    assert waited(workers, bench_loader.HEADROOM) < 0.01 < waited(workers, 1.0)


def test_nothing_is_measured_of_nothing(capsys):
    with pytest.raises(SystemExit):
        bench_loader.main([])
    assert "give --data and --tokenizer, to measure, or --workers-for RESULT" in capsys.readouterr().err
