"""The shard tools: make, prepare, check, inspect."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from shards_util import (
    IMAGE_TOKENS,
    TRANSFORM,
    CharTemplate,
    encoder,
    module,
    picture,
    row,
    sample,
    write_shards,
    write_tar,
)
from test_data_packing import BAD, bomb

from lit_eemllm.data.check import check
from lit_eemllm.data.packing import collate
from lit_eemllm.data.preview import inspect, read_pack, token_texts
from lit_eemllm.data.recipe import read_recipe
from lit_eemllm.data.shards import make, prepare
from lit_eemllm.errors import UserError
from lit_eemllm.images import open_image
from lit_eemllm.schema import DataConfig


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
        {**row(7), "image": str(images / "1.jpg")},
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
    assert [p.name for p in sorted((source / "out").glob("*.tar"))] == [
        *(f"train-00000{i}.tar" for i in range(3)), "val-000000.tar"]  # fmt: skip
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
        ({"images": None, "rows": {"train": source / "only.json"}}, UserError, r"no usable row(?s:.*)missing_image: 1"),
        ({"shard_size": 0}, UserError, "shard_size"),
    ):
        (source / "only.json").write_text(json.dumps([row(1)]))
        with pytest.raises(error, match=match):
            make(**{**dict(rows=rows, images=images, out=source / "new"), **broken})
        (source / "only.json").unlink()
    monkeypatch.setattr("lit_eemllm.data.shards.prepare", lambda folder: 1 / 0)  # dies when all shards are written
    with pytest.raises(ZeroDivisionError):
        make(rows, images, source / "new")
    assert set(source.iterdir()) == before, "nothing half made is left behind"
    monkeypatch.undo()
    assert make(rows, images, source / "linked", follow_links=True).bad["path_escape"] == 2
    (source / "broken.json").write_text("[{]")
    with pytest.raises(UserError, match="not valid JSON"):
        make({"train": source / "broken.json"}, images, source / "new")


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
        assert {**expected, "bad_shard": 1} == report.bad and 2 < report.good.total() < 6
    assert report.tokens > 0 and report.longest == 1 + 5 + IMAGE_TOKENS + 10 + 1 + 7 + 1
    text = str(report)
    for name in ("a.tar/broken", "b.tar: truncated", "400000000 pixels", "pickle: 2", "a.tar/bad8"):
        assert name in text, text
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"splits": {"train": {"path": "."}, "val": {"path": ".", "__module__": "os"}}}))
    report = check(recipe)
    assert report.bad == {**expected, "bad_recipe": 1} and "__module__" in str(report)


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
    seen = TRANSFORM.unnormalize(TRANSFORM(open_image(picture(1), "", 1000)))
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
