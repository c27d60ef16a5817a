"""Shards are made of rows and images: what is kept and dropped, by several processes, and after a kill."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lib.samples import bomb
from PIL import Image
from shards_util import encoder, module, picture, row

from lit_eemllm.data.check import check
from lit_eemllm.data.recipe import read_recipe
from lit_eemllm.data.shards import make
from lit_eemllm.data.writing import Report
from lit_eemllm.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A LLaVA-style source with every kind of row that is dropped, and awkward names that are not."""
    images = tmp_path / "images"
    (images / "a b [c].d").mkdir(parents=True)
    names = ["a b [c].d/x.y.png", "1.jpg", "2.PNG"]
    for number, name in enumerate(names):
        (images / name).write_bytes(picture(number, "JPEG" if number == 1 else "PNG"))
    (images / "notes.png").write_bytes(b"not an image")
    noise = io.BytesIO()
    Image.effect_noise((80, 60), 50).convert("RGB").save(noise, "JPEG")
    (images / "cut.jpg").write_bytes(noise.getvalue()[: noise.tell() // 2])
    (images / "huge.png").write_bytes(bomb())
    (tmp_path / "secret.png").write_bytes(picture(9))
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    rows = [
        {**row(0), "id": "a/b [c].d/x.y", "image": names[0]},
        {**row(1, 3), "id": 7, "image": names},  # many, and an id that is a number
        {**row(2, 0), "id": "../../etc.passwd"},
        {**row(3, 0), "image": None, "type": "counting", "id": "öü"},
        {k: v for k, v in row(4, 0).items() if k != "id"},
        {**row(5, 0), "id": "a/b [c].d/x.y"},  # the same id again
        {**row(6), "image": "gone.png"},
        {**row(7), "image": str(tmp_path / "secret.png")},
        {**row(8), "image": "../secret.png"},
        {**row(9), "image": "link.png"},
        {**row(10), "image": "notes.png"},
        {**row(11), "image": names[:2]},
        row(12, 0, answer=" "),
        {"id": "no turns"},
        "no row",
        {**row(15), "image": "cut.jpg"},  # a good header, half of the pixels
        {**row(16), "image": "huge.png"},
    ]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "val.jsonl").write_text("\n".join([json.dumps({**rows[0], "id": "v"}), "{broken", json.dumps(rows[2])]))
    return tmp_path


DROPPED = {
    "missing_image": 1, "path_escape": 3, "bad_image": 2, "image_too_large": 1, "placeholder_mismatch": 1, "no_target": 1,
    "bad_conversation": 1, "bad_json": 2,
}  # fmt: skip


def test_make(source: Path) -> None:
    rows = {"train": source / "train.json", "val": source / "val.jsonl"}
    report = make(rows, source / "images", source / "out", shard_size=2)
    assert report.good == {"train": 6, "val": 2} and report.bad == DROPPED and not report.ok and report.images == 5
    text = str(report)
    for name in (
        "gone.png",
        "../secret.png",
        "link.png",
        "notes.png",
        "row 13",
        "{broken",
        "follow_links",
        "cut.jpg' (",
    ):
        assert name in text, name
    assert "ids that several rows of a split have: 1, such as 'a/b [c].d/x.y'; all rows are kept" in text
    # a shard has two rows; what is dropped makes it shorter, and a block without a good row has no shard
    names = [*(f"train-00000{i}.tar" for i in range(3)), "val-000000.tar", "val-000001.tar"]
    assert [p.name for p in sorted((source / "out").glob("*.tar"))] == names
    manifest = json.loads((source / "out" / "manifest.json").read_text())["splits"]
    shards = [shard for split in ("train", "val") for shard in manifest[split]["shards"]]
    assert [shard["name"] for shard in shards] == names and [shard["samples"] for shard in shards] == [2, 2, 2, 1, 1]
    for shard in shards:
        content = (source / "out" / shard["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    told = json.loads((source / "out" / "report.json").read_text())
    assert told["kept"] == {"train": 6, "val": 2} and told["dropped"] == DROPPED and told["images"] == 5
    dropped = [json.loads(line) for line in (source / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(item["split"], item["row"]) for item in dropped] == [("train", n) for n in range(6, 17)] + [("val", 1)]
    assert Counter(item["reason"] for item in dropped) == DROPPED
    assert dropped[2]["id"] == "row/8" and "../secret.png" in dropped[2]["message"] and dropped[7]["id"] == "no turns"
    assert len(told["examples"]["path_escape"]) == 3 and "../secret.png" in told["examples"]["path_escape"][1]
    # read with nothing but tarfile: keys without dots, images byte for byte, the row as it was
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted((source / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                assert re.fullmatch(r"(train|val)-\d{8}(-[A-Za-z0-9-]+)?", key) and member.mtime == 0
                found.setdefault(key, {})[name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    assert list(found) == [
        "train-00000000-a-b-c-d-x-y", "train-00000001-7", "train-00000002-etc-passwd", "train-00000003", "train-00000004",
        "train-00000005-a-b-c-d-x-y", "val-00000000-v", "val-00000002-etc-passwd"]  # fmt: skip
    several = found["train-00000001-7"]
    assert {name: several[name] for name in ("0.png", "1.jpg", "2.png")} == {
        "0.png": picture(0), "1.jpg": picture(1, "JPEG"), "2.png": picture(2)}  # fmt: skip
    assert json.loads(several["json"]) == json.loads((source / "train.json").read_text())[1]
    # what was made can be trained on, and is checked good
    assert check(source / "out", encoder(400)).ok
    keys = [key for batch in module(source / "out", source / "out").val_dataloader() for key in batch.keys]
    assert keys == list(found)[6:]


def test_absolute_paths_inside_of_the_images_are_read(source: Path) -> None:
    images = source / "images"
    (source / "link").symlink_to(images)
    paths = [
        images / "1.jpg",
        source / "link" / "1.jpg",
        source / "secret.png",
        images / ".." / "secret.png",
        images / "link.png",
    ]
    (source / "rows.json").write_text(json.dumps([{**row(1), "image": str(path)} for path in paths]))
    for folder, good in ((images, 1), (source / "link", 2), (source, 4)):
        report = make({"train": source / "rows.json"}, folder, source / f"made{good}")
        assert report.good == {"train": good} and report.bad == {"path_escape": len(paths) - good}


def test_make_is_deterministic_and_all_or_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, images = {"train": source / "train.json"}, source / "images"
    digests = []
    for name in ("one", "two"):
        make(rows, images, source / name)
        digests.append([hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((source / name).glob("*.tar*"))])
    assert digests[0] == digests[1] and len(digests[0]) == 2
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        make(rows, images, source / "one")
    before = set(source.iterdir())
    for broken, error, match in (
        ({"rows": {"train": source / "gone.json"}}, UserError, "no such file of rows"),
        ({"rows": {"dev": source / "train.json"}}, UserError, "'dev' is not known"),
        ({"images": source / "nowhere"}, UserError, "no such folder"),
        ({"images": None, "rows": {"train": source / "only.json"}}, UserError, r"no usable row(?s:.*)missing_image +1"),
        ({"shard_size": 0}, UserError, "shard_size"),
        ({"workers": 0}, UserError, "workers"),
    ):
        (source / "only.json").write_text(json.dumps([row(1)]))
        with pytest.raises(error, match=match):
            make(**{**dict(rows=rows, images=images, out=source / "new"), **broken})
        (source / "only.json").unlink()
    assert set(source.iterdir()) == before, "nothing half made is left behind"
    with monkeypatch.context() as patch:
        patch.setattr("lit_eemllm.data.shards.prepare", lambda folder: 1 / 0)  # dies when all shards are written
        with pytest.raises(ZeroDivisionError):
            make(rows, images, source / "new")
        patch.undo()
        patch.setattr("lit_eemllm.data.writing._write_shard", lambda *_: 1 / 0)  # they are all there
        make(rows, images, source / "new")
    assert set(source.iterdir()) == before | {source / "new"}
    assert files(source / "new") == files(source / "one")
    assert make(rows, images, source / "linked", follow_links=True).bad["path_escape"] == 2
    (source / "broken.json").write_text("[{]")
    with pytest.raises(UserError, match="not valid JSON"):
        make({"train": source / "broken.json"}, images, source / "another")


def files(folder: Path) -> dict[str, bytes]:
    """Everything below it but what Energon makes up."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    own = {name: path.read_bytes() for name, path in found.items() if path.suffix not in (".sqlite", ".uuid")}
    assert {"manifest.json", "report.json", "train-000000.tar", ".nv-meta/split.yaml"} <= set(own)
    return own


def several(tmp_path: Path, count: int = 60) -> tuple[dict[str, Path], Path]:
    """Rows over a dozen images; every seventh row is bad, and all from 20 to 29."""
    (tmp_path / "images").mkdir(exist_ok=True)
    for number in range(12):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture(number))
    bad = [i for i in range(count) if i % 7 == 6 or 20 <= i < 30]
    rows = [{**row(i), "id": f"r{i}", "image": "gone.png" if i in bad else f"{i % 12}.png"} for i in range(count)]
    (tmp_path / "several.json").write_text(json.dumps(rows))
    return {"train": tmp_path / "several.json", "val": tmp_path / "several.json"}, tmp_path / "images"


def test_processes_write_the_same_bytes(tmp_path: Path) -> None:
    rows, images = several(tmp_path)
    reports = [make(rows, images, tmp_path / str(n), shard_size=10, workers=n) for n in (1, 3)]
    assert reports[0] == reports[1] and str(reports[0]) == str(reports[1])
    assert reports[0].good == {"train": 44, "val": 44} and reports[0].bad == {"missing_image": 32}
    assert files(tmp_path / "1") == files(tmp_path / "3")
    # rows 20 to 29 are all bad: a number is left out, and the folder can be read all the same
    assert [shard for shard, _ in read_recipe(tmp_path / "3", "train").sources[0].shards] == [
        f"train-00000{i}.tar" for i in (0, 1, 3, 4, 5)]  # fmt: skip
    assert [key for batch in module(tmp_path / "3", tmp_path / "3").val_dataloader() for key in batch.keys] == [
        f"val-{i:08d}-r{i}" for i in range(60) if i % 7 != 6 and not 20 <= i < 30]  # fmt: skip


def goes_on(tmp_path: Path, rows: dict[str, Path], images: Path) -> None:
    """A conversion to ``cut`` that was ended somewhere: started again it writes what is missing, and nothing else."""
    unfinished = tmp_path / ".cut.unfinished"
    kept = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.tar")}
    assert not (tmp_path / "cut").exists() and 5 <= len(kept) < 20
    (unfinished / ".train-000001.12345").write_bytes(b"half a shard")
    last = max(kept)
    (unfinished / last).write_bytes((unfinished / last).read_bytes()[:-1])  # cut by a full disk, say
    report = make(rows, images, tmp_path / "cut", shard_size=5)
    assert report.good == {"train": 44, "val": 44} and report.bad == {"missing_image": 32}
    make(rows, images, tmp_path / "whole", shard_size=5)
    assert files(tmp_path / "cut") == files(tmp_path / "whole") and not unfinished.exists()
    times = {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in kept if name != last}
    assert times == {name: kept[name] for name in times}, "finished shards are kept"


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, images = several(tmp_path)

    def interrupts(record: dict[str, Any], report: Report, manifest: dict[str, Any]) -> None:
        if len(list((tmp_path / ".cut.unfinished").glob("*.tar"))) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lit_eemllm.data.writing._add", interrupts)
        with pytest.raises(KeyboardInterrupt):
            make(rows, images, tmp_path / "cut", shard_size=5)
    goes_on(tmp_path, rows, images)


@pytest.mark.slow
def test_a_killed_conversion_goes_on(tmp_path: Path) -> None:
    """SIGKILL of the parent at some shard: its workers end too."""
    rows, images = several(tmp_path)
    code = f"""
import multiprocessing, os, signal
from pathlib import Path
from lit_eemllm.data import shards, writing

def dies(record, report, manifest, add=writing._add):
    add(record, report, manifest)
    if report.good.total() > 20:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    writing._add = dies
    rows = {{split: Path({str(tmp_path)!r}) / "several.json" for split in ("train", "val")}}
    shards.make(rows, Path({str(images)!r}), Path({str(tmp_path / "cut")!r}), shard_size=5, workers=2)
"""
    (tmp_path / "dies.py").write_text(code)
    done = subprocess.run([sys.executable, tmp_path / "dies.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in workers):
            break
        time.sleep(0.1)
    else:
        pytest.fail("workers outlive their parent")
    goes_on(tmp_path, rows, images)


def test_a_worker_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, images = several(tmp_path)
    others = multiprocessing.active_children()  # what an earlier test has left, if only by name: see test_faults.py

    def kill(*_: object) -> None:
        set(multiprocessing.active_children()).difference(others).pop().kill()

    with monkeypatch.context() as patch:
        patch.setattr("lit_eemllm.data.writing._add", kill)
        with pytest.raises(UserError, match="a worker process was killed"):
            make(rows, images, tmp_path / "out", shard_size=5, workers=2)
    assert make(rows, images, tmp_path / "out", shard_size=5).good == {"train": 44, "val": 44}


def test_what_changed_since_the_kill_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, images = several(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("lit_eemllm.data.shards.prepare", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(rows, images, tmp_path / "out", shard_size=3)
    changed = json.loads((tmp_path / "several.json").read_text())
    changed[12]["conversations"][1]["value"] = "another answer"
    (tmp_path / "several.json").write_text(json.dumps(changed))
    make(rows, images, tmp_path / "whole", shard_size=5)
    make(rows, images, tmp_path / "out", shard_size=5)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_hostile_rows(tmp_path: Path) -> None:
    """Names that no file can have and text that no file can hold: a reason each, never a traceback."""
    rows, images = several(tmp_path, 1)
    hostile: list[object] = [
        *({**row(1), "image": name} for name in ("x" * 5000, "a\0b", "\ud800.png", "/etc/passwd", "..", ".")),
        {**row(1), "image": "0.png", "id": "\ud800" * 200}, {**row(1), "image": "0.png", "mended": 7}, 3, None, [],
    ]  # fmt: skip
    (tmp_path / "several.json").write_text(json.dumps(hostile))
    report = make({"train": rows["train"]}, images, tmp_path / "out")
    assert report.good == {"train": 1} and not report.mended
    assert report.bad == {"missing_image": 2, "path_escape": 3, "bad_json": 5}
    str(report).encode()
