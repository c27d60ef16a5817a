"""The shard tools: prepare, check, inspect."""

from __future__ import annotations

import base64
import gzip
import io
import json
import logging
import re
import tarfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from lib.samples import BAD
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
from lit_eemllm.data.shards import prepare
from lit_eemllm.errors import UserError
from lit_eemllm.inputs.images import open_image


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
