"""The shard tools: make, prepare, check, inspect."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import logging
import multiprocessing
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lib.samples import BAD, bomb
from PIL import Image
from shards_util import (
    IMAGE_TOKENS,
    TRANSFORM,
    CharTemplate,
    blend,
    encoder,
    module,
    picture,
    row,
    sample,
    write_shards,
    write_tar,
)

from lit_eemllm.config.keys import DataConfig
from lit_eemllm.data.check import check
from lit_eemllm.data.packing import collate
from lit_eemllm.data.preview import inspect, read_pack, token_texts
from lit_eemllm.data.recipe import read_recipe
from lit_eemllm.data.shards import make, prepare
from lit_eemllm.data.writing import Report
from lit_eemllm.errors import UserError
from lit_eemllm.inputs.images import open_image


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


def test_prepare_foreign_shards(tmp_path: Path) -> None:
    for name, numbers in {"x/part-0.tar": range(3), "x/val_0.tar": range(3, 5), "more-1.tar": range(5, 9)}.items():
        write_tar(tmp_path / name, {f"k{i}": sample(i) for i in numbers})
    assert prepare(tmp_path) == {"train": 7, "val": 2}
    assert prepare(tmp_path, {"train": "x/part", "val": "more"}) == {"train": 3, "val": 4}
    assert read_recipe(tmp_path, "val").sources[0].shards == (("more-1.tar", 4),)
    write_tar(tmp_path / "twice.tar", {"k0": sample(0)})
    with pytest.raises(UserError, match=r"x/part-0.tar: sample 'k0' is also in twice.tar"):
        prepare(tmp_path)
    (tmp_path / "twice.tar").unlink()
    write_tar(tmp_path / "empty.tar", {})
    with pytest.raises(UserError, match="no sample in it"):
        prepare(tmp_path)
    content = (tmp_path / "more-1.tar").read_bytes()
    for cut in (len(content) // 2 + 600, 512 * 4, 512 * 4 + 10):  # within a member, between samples, within a header
        (tmp_path / "empty.tar").write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"empty.tar: truncated or damaged"):
            prepare(tmp_path)
    (tmp_path / "empty.tar").rename(tmp_path / "{a,b}.tar")
    with pytest.raises(UserError, match="rename shard"):
        prepare(tmp_path)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"no .tar in it"):
        prepare(tmp_path / "bare")


def test_check_finds_every_planted_fault(tmp_path: Path) -> None:
    noise = io.BytesIO()
    Image.effect_noise((80, 60), 50).convert("RGB").save(noise, "JPEG")
    broken = {"json": sample(1)["json"], "0.jpg": noise.getvalue()[: noise.tell() // 2]}
    planted = {f"bad{i}": dict(members) for i, members in enumerate(BAD.values())} | {"broken": broken}
    expected: dict[str, int] = {"bad_image": 1}
    for case in BAD:
        expected[case.split(",")[0]] = expected.get(case.split(",")[0], 0) + 1
    write_tar(tmp_path / "a.tar", {"g0": sample(0), **planted, "g1": sample(1)})
    report = check(tmp_path)
    assert report.bad == {**expected, "not_prepared": 1} and report.good == {tmp_path.name: 2} and not report.ok
    prepare(tmp_path)
    write_tar(tmp_path / "b.tar", {f"h{i}": sample(i) for i in range(4)})  # new, so not in the index
    content = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(content[: len(content) * 2 // 3])
    for made in (None, encoder()):
        report = check(tmp_path, made)
        assert {**expected, "not_indexed": 1} == report.bad and report.good.total() == 2
    (tmp_path / "b.tar").write_bytes(content)
    prepare(tmp_path)
    (tmp_path / "b.tar").write_bytes(content[: len(content) * 2 // 3])
    for made in (None, encoder()):
        report = check(tmp_path, made)
        assert {**expected, "not_prepared": 1, "bad_shard": 1} == report.bad and 2 < report.good.total() < 6
    assert report.tokens > 0 and report.longest == 1 + 5 + IMAGE_TOKENS + 10 + 1 + 7 + 1
    text = str(report)
    for name in ("a.tar/broken", "b.tar: truncated", "400000000 pixels", "a.tar/bad8"):
        assert name in text, text
    (tmp_path / "b.tar").write_bytes(content)
    assert re.search(r"^  pickle +2$", text, re.MULTILINE)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"splits": {"train": {"path": "."}, "val": {"path": ".", "__module__": "os"}}}))
    report = check(recipe)
    assert report.bad == {**expected, "bad_recipe": 1} and "__module__" in str(report)


def appended(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "a") as tar:
        info = tarfile.TarInfo("k8.json")
        info.size = len(sample(8, 0)["json"])
        tar.addfile(info, io.BytesIO(sample(8, 0)["json"]))


def longer(folder: Path) -> None:
    first = sample(0)
    write_tar(
        folder / "a.tar",
        {"k0": {**first, "json": first["json"] + b" " * 900}, **{f"k{i}": sample(i) for i in range(1, 8)}},
    )


def moved(folder: Path) -> None:
    """As long as before, but the first two samples have exchanged a block."""
    one, two = sample(0), sample(1)
    found = {"k0": {**one, "json": one["json"] + b" " * 600}, "k1": two, **{f"k{i}": sample(i) for i in range(2, 8)}}
    write_tar(folder / "a.tar", found)
    prepare(folder)
    found["k0"], found["k1"] = one, {**two, "json": two["json"] + b" " * 600}
    write_tar(folder / "a.tar", found)


def joined(folder: Path) -> None:
    write_tar(folder / "b.tar", {"k9": sample(9)})
    with (folder / "a.tar").open("ab") as file:
        file.write((folder / "b.tar").read_bytes())
    (folder / "b.tar").unlink()


@pytest.mark.parametrize(
    ("change", "told", "refused"),
    [(appended, "is not in the index|the index has nothing", "added to"), (longer, "'k1' begins at byte", "written anew"),
     (moved, "'k1' begins at byte", None), (joined, "joined", "joined")],
)  # fmt: skip
def test_check_vouches_for_what_training_reads(
    tmp_path: Path, change: Callable[[Path], None], told: str, refused: str | None
) -> None:
    """Shards that have changed since they were indexed; where a glance tells it, training does not begin."""
    write_tar(tmp_path / "a.tar", {f"k{i}": sample(i) for i in range(8)})
    prepare(tmp_path)
    assert check(tmp_path).ok
    change(tmp_path)
    report = check(tmp_path)
    assert not report.ok and re.search(told, str(report))
    if refused:
        with pytest.raises(UserError, match=rf"a.tar: .*{refused}.*shards prepare"):
            read_recipe(tmp_path, "train")
    if change is joined:
        with pytest.raises(UserError, match=r"a.tar: .*joined \(cat\)"):
            prepare(tmp_path)


def test_shards_that_came_after_the_index_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`check` searches the folder; training looks where its shards are, as there may be a million pictures beside."""
    write_tar(tmp_path / "x" / "a.tar", {f"k{i}": sample(i) for i in range(4)})
    prepare(tmp_path)
    for name in ("x/b.tar", "c.tar", "x/y/d.tar"):
        write_tar(tmp_path / name, {f"{name[-5]}{i}": sample(i) for i in range(4)})
    (tmp_path / "r.yaml").write_text("splits: {train: {path: .}}")
    for data in (tmp_path, tmp_path / "r.yaml"):
        report = check(data)
        assert report.bad == {"not_indexed": 3} and report.good.total() == 4
        assert all(f"{name}: it is not in the index" in str(report) for name in ("x/b.tar", "c.tar", "x/y/d.tar"))
    with caplog.at_level(logging.WARNING):
        module(tmp_path).setup("fit")
    assert "2 shards, such as c.tar, are not in its index and are not read" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        data = module(tmp_path)
        data.trainer = SimpleNamespace(local_rank=1)  # type: ignore[assignment]
        data.setup("fit")
    assert "not in its index" not in caplog.text, "told once per node"
    prepare(tmp_path)
    assert check(tmp_path).ok and check(tmp_path).good.total() == 16


def test_prepare_says_what_is_wrong_with_a_foreign_shard(tmp_path: Path) -> None:
    for name in ("valley-0", "testimony", "val/0", "x/Validation_1", "valset", "test2", "tests-1", "retest"):
        write_tar(tmp_path / "names" / f"{name}.tar", {name.replace("/", "-"): sample(1)})
    prepare(tmp_path / "names")
    found = {
        split: [name for name, _ in read_recipe(tmp_path / "names", split).sources[0].shards]
        for split in ("train", "val", "test")
    }
    assert found == {
        "train": ["retest.tar", "testimony.tar", "valley-0.tar"],
        "val": ["val/0.tar", "valset.tar", "x/Validation_1.tar"],
        "test": ["test2.tar", "tests-1.tar"],
    }
    write_tar(tmp_path / "a" / "a.tar", {"k": sample(1)})
    packed = gzip.compress((tmp_path / "a" / "a.tar").read_bytes())
    (tmp_path / "a" / "a.tar").write_bytes(packed)
    with pytest.raises(UserError, match=r"a.tar: compressed.*gunzip < a.tar"):
        prepare(tmp_path / "a")
    (tmp_path / "a" / "a.tar").rename(tmp_path / "a" / "a.tar.gz")
    with pytest.raises(UserError, match=r"no .tar in it. a.tar.gz is compressed"):
        prepare(tmp_path / "a")
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):  # tar writes the second name of a file as a link
        write_tar(tmp_path / "links" / "a.tar", {"k0": sample(0), "k1": {"json": sample(1)["json"]}})
        with tarfile.open(tmp_path / "links" / "a.tar", "a") as tar:
            info = tarfile.TarInfo("k1.0.png")
            info.type, info.linkname = kind, "k0.0.png"
            tar.addfile(info)
        with pytest.raises(UserError, match=r"'k1.0.png' is a link, which is not read.*--hard-dereference"):
            prepare(tmp_path / "links")


def test_check_counts_the_samples_of_each_split(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "a", {"train": [row(i) for i in range(5)], "val": [row(9)]})
    assert check(folder).good == {"a/train": 5, "a/val": 1}
    write_shards(tmp_path / "b", {"train": [row(i) for i in range(3)]})
    found = check(blend(tmp_path, {"a": 1, "b": 1})).good
    assert found == {"a/train": 5, "b/train": 3, "a/val": 1}, "of a recipe what its splits name"


def test_check_finds_an_answer_that_truncation_would_lose(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"long": sample(1, 3), "short": sample(2, 0)})
    prepare(tmp_path)
    report = check(tmp_path, encoder(39, "truncate"))
    assert report.bad == {"too_long": 1} and report.examples["too_long"][0].startswith("a.tar/long: ")


class _Page(HTMLParser):
    """What a reader sees: text by class, and image sources."""

    def __init__(self) -> None:
        super().__init__()
        self.target, self.rest, self.images, self.tags = "", "", [], set()  # type: ignore[var-annotated]
        self.open: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"])
        elif tag not in ("br", "meta"):
            self.open.append(values.get("class"))

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["target"]:
            self.target += data
        else:
            self.rest += data


def test_inspect_shows_what_is_trained(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    rows = [{**row(i, i % 3), "id": f"r{i}"} for i in range(5)] + [row(9, 0, answer=hostile)]
    write_shards(tmp_path / "a", {"train": rows[:1], "val": rows})
    config = DataConfig(
        train=str(tmp_path / "a"), val=str(tmp_path / "a"), pack_tokens=90, max_length=90, packing_buffer=4
    )
    template = CharTemplate()
    paths = inspect(config, template, TRANSFORM, tmp_path / "out", split="val", packs=99)  # type: ignore[arg-type]
    assert [path.name for path in paths] == ["val.html", "val.png"]
    page = _Page()
    page.feed(paths[0].read_text(encoding="utf-8"))
    assert (
        page.target == "".join(f"it is {i * i}</s>" for i in range(5)) + hostile + "</s>" and "script" not in page.tags
    )
    assert "what is 3?" in page.rest and "val-00000004-r4" in page.rest and f"{IMAGE_TOKENS} visual tokens" in page.rest
    assert "it is" not in page.rest and len(page.images) == 0 + 1 + 2 + 0 + 1
    # the picture on the page is what the model sees
    shown = Image.open(io.BytesIO(base64.b64decode(page.images[0].partition(",")[2])))
    seen = TRANSFORM.picture(TRANSFORM(open_image(picture(1), "", 1000)))
    assert shown.size == (8, 8) and shown.tobytes() == seen.tobytes()
    png = Image.open(paths[1])
    assert png.width == 1200 and png.height > 400 and png.getcolors(2**20) is not None
    colours = {colour for _, colour in png.convert("RGB").getcolors(2**20)}  # type: ignore[union-attr]
    assert {(0xF6, 0xB2, 0x6B), (0x8F, 0xB8, 0xDE)} <= colours, "supervised text and the visual strip are coloured"
    inspect(config, template, TRANSFORM, tmp_path / "out", packs=1)  # type: ignore[arg-type]
    assert (tmp_path / "out" / "train.html").exists()


def test_token_texts_of_a_tokenizer_that_splits_characters() -> None:
    """Joined they are the text, also where one character takes several tokens (bytes of UTF-8 here)."""

    class Bytes:
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode("utf-8", errors="ignore")

    text = "a é 漢字 😀 end"
    texts = token_texts(Bytes(), list(text.encode()))
    assert "".join(texts) == text and len(texts) == len(text.encode())


def test_read_pack_counts() -> None:
    made = encoder()
    batch = collate([made.load_pixels(made.tokenize(f"k{i}", sample(i, i))) for i in (0, 2)])
    documents = read_pack(batch, CharTemplate(), TRANSFORM)
    assert [[piece.length for piece in d.pieces] for d in documents] == [
        [len("B") + len("what is 0?\nit is 0E")], [6, 4, 5, 4, len("what is 2?\nit is 4E")]]  # fmt: skip
