"""Over a thousand malformed samples, shards, parquet files, recipes and configurations from a seeded fuzzer.

None may crash without a named cause (a `UserError`, or a counted skip by `SampleError`), hang, or execute anything; the good
samples around the bad ones are all trained on, and the counts are right. FUZZ_SEED and FUZZ_TIMES take it further.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pickle
import random
import re
import shutil
import signal
import struct
import tarfile
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from fuzz_util import CANARY, PYTHON, SEED, TIMES, bounded, flip, fuzz, nothing_is_executed, warp  # noqa: F401 a fixture of each test
from PIL import Image
from shards_util import module, picture, row, sample, write_shards, write_tar
from transformers import AutoTokenizer

from lit_eemllm.config import load_config, to_yaml
from lit_eemllm.data.check import check
from lit_eemllm.data.parquet import stored
from lit_eemllm.data.recipe import read_recipe
from lit_eemllm.data.samples import SampleEncoder
from lit_eemllm.data.shards import prepare
from lit_eemllm.errors import ConfigError, SampleError, UserError
from lit_eemllm.inputs.chat import get_template
from lit_eemllm.inputs.conversation import IMAGE

YAML_TAGS = (
    f'!!python/object/apply:os.system ["touch {CANARY}"]',
    f"!!python/object/new:eval [{json.dumps(PYTHON)}]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!timestamp 2001-01-01",
    "!own thing",
)


class Bomb:
    def __reduce__(self) -> tuple:
        return CANARY.touch, ()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SampleEncoder:
    folder = tmp_path_factory.mktemp("parts")
    tiny.write_parts(folder)
    template = get_template("vicuna_v1", AutoTokenizer.from_pretrained(folder / "decoder"))
    return SampleEncoder(template, tiny.TRANSFORM, 1000, "drop", 1_000_000)


# ------------------------------------------------------------------------------------------------------------- mutations


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(draw: random.Random) -> bytes:
    """A PNG whose header lies about its size, or whose compressed text or profile is a bomb."""
    width, height = (draw.choice((0, 1, 9, 500, 20_000, 2**31 - 1, 2**32 - 1)) for _ in range(2))
    depth, colour = draw.choice((1, 2, 8, 16, 99)), draw.choice((0, 2, 3, 4, 6, 77))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, draw.randrange(3)))
    more = draw.choice((b"zTXt", b"iCCP", b"tEXt", b"eXIf", b"acTL", b"PLTE"))
    bomb = chunk(more, b"name\0\0" + zlib.compress(bytes(draw.choice((10, 30_000_000))), 9))
    body = chunk(b"IDAT", zlib.compress(bytes(draw.choice((0, 100, 10_000_000)))))
    return b"\x89PNG\r\n\x1a\n" + header + bomb + body + chunk(b"IEND", b"")


def image(draw: random.Random) -> tuple[str, bytes]:
    """An image file: of odd mode and size, damaged, or no image at all."""
    kind = draw.randrange(4)
    if kind == 0:
        return "0.png", png(draw)
    form, mode = draw.choice((("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "1"), ("PNG", "I;16"), ("TIFF", "F"),
                              ("TIFF", "RGB"), ("GIF", "P"), ("BMP", "RGB"), ("WEBP", "RGBA"), ("PPM", "L")))  # fmt: skip
    file = io.BytesIO()
    size = draw.choice(((1, 1), (1, 3000), (3000, 1), (9, 7), (1200, 900)))
    Image.new(mode, size).save(file, form)
    data = file.getvalue()
    if kind == 1:
        data = flip(draw, data)
    elif kind == 2:
        data = draw.choice(
            (b"", b"\0" * 99, b"<svg/>", b"%!PS (%pipe%touch x) run", gzip.compress(data), data[: len(data) // 2])
        )
    return draw.choice(("0.png", "0.jpg", "jpg", "0.webp", "0.tiff", "0.PNG")), data


def bad_sample(draw: random.Random) -> dict[str, bytes]:
    """Members of a sample that is malformed; by chance it may still be good."""
    members = sample(draw.randrange(99), draw.randrange(3))
    kind = draw.randrange(9)
    if kind < 3:
        text = json.dumps(warp(draw, json.loads(members["json"])))
        members["json"] = text.encode("utf-8", "surrogatepass")
    elif kind == 3:
        members["json"] = flip(draw, members["json"])
    elif kind == 4:
        members["json"] = draw.choice((b"", b"null", b"NaN", b"[" * 50_000, b'{"a":' * 50_000, b"1" * 6000, b"\xff\xfe{\0}\0",
                                       b'{"conversations": ' + b"1" * 6000 + b"}", pickle.dumps(Bomb()), b"{} {}"))  # fmt: skip
    elif kind < 7:
        members = {"json": sample(3, 1)["json"]}
        name, data = image(draw)
        members[name] = data
    elif kind == 7:
        members[draw.choice(("pkl", "0.npy", "pth", "bin", "0.pickle", "py", "so", "sh", "txt", "1.jpg", "9.png", "0.0.png", "JSON", "json.json"))] = (
            draw.choice((pickle.dumps(Bomb()), PYTHON.encode(), picture(1)))
        )  # fmt: skip
    else:
        members.pop(draw.choice(list(members)))
        members = members or {"0.png": picture(1)}
    return members


def bad_tar(draw: random.Random) -> bytes:
    """A shard that is damaged, hostile, or no tar."""
    file = io.BytesIO()
    form = draw.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for number in range(draw.randint(1, 4)):
            for name, data in sample(number, number % 2).items():
                info = tarfile.TarInfo(f"k{number}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            if draw.random() < 0.6:
                name = draw.choice((f"../../../../tmp/escaped-{number}.json", f"/tmp/escaped-{number}.json", "k9.json", "é😀.json", "a/../b.json",
                                    ".json", "k.", "x" * 90 + ".json", "k0.json", "\udc80.json", "no extension", "k7.0.png"))  # fmt: skip
                info = tarfile.TarInfo(name)
                info.type = draw.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
                                         tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, b"Z"))  # fmt: skip
                info.linkname = draw.choice(("/etc/passwd", "k0.json", "../..", ""))
                data = draw.choice((b"", b"{}", sample(1, 0)["json"]))
                info.size = len(data) if info.isreg() else 0
                with contextlib.suppress(ValueError, UnicodeError):  # not every format can write every name
                    tar.addfile(info, io.BytesIO(data))
    data = file.getvalue()
    kind = draw.randrange(8)
    if kind == 0:
        return data
    if kind == 1:
        return gzip.compress(data)
    if kind == 2:
        return draw.choice((b"", b"\0" * 512, b"\0" * 10_240, b"x" * 700, draw.randbytes(5000), pickle.dumps(Bomb())))
    if kind == 3:  # a header with a valid checksum that lies about the size
        header = bytearray(data[:512])
        header[124:136] = draw.choice(
            (b"77777777777\0", b"-0000000001\0", b"\x80" + b"\xff" * 11, b"abcdefghijk\0", b"00000000001\0")
        )
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header) + data[512:]
    if kind == 4:
        return data[: draw.randrange(len(data))]
    return flip(draw, data, 30)


def laughs(levels: int = 40) -> str:
    """YAML aliases that are small as a graph, and 9 ** levels leaves as a tree."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


def bad_yaml(draw: random.Random, good: Any, paths: tuple[str, ...]) -> bytes:
    """YAML like `good`, but not good; `paths` are texts in which to plant tags and bombs."""
    kind = draw.randrange(7)
    text = yaml.safe_dump(good)
    if kind < 3:
        value = good
        for _ in range(draw.randint(1, 2)):
            value = warp(draw, value)
        return (
            json.dumps(value).encode("utf-8", "surrogatepass")
            if draw.random() < 0.5
            else yaml.dump(value).encode("utf-8", "surrogatepass")
        )
    if kind == 3:
        return flip(draw, text.encode())
    if kind == 4:
        return text.replace(draw.choice(paths), draw.choice(YAML_TAGS)).encode()
    if kind == 5:
        return (laughs() + "\n" + text.replace(draw.choice(paths), "*a39")).encode()
    return draw.choice((b"", b"\0", b"---\n---\n", b"[" * 3000, b"a: b: c", b"\xff\xfe", b"? [1]\n: 2", b"- " * 3000, b"&a [*a]", text.encode("utf-16"),
                        b"%TAG ! tag:x,2000:\n--- !y\n", ("{" * 500 + "}" * 500).encode(), b"1" * 5000, b"<<: [1]", f"!!python/object:{__name__}.Bomb {{}}".encode()))  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- tests


def verdict(encoder: SampleEncoder, members: dict[str, bytes]) -> str | None:
    """Reason for which a sample is refused, None if it is good."""
    try:
        encoder.load_pixels(encoder.tokenize("k", members))
    except SampleError as error:
        return error.reason if error.message else ""
    return None


def test_samples(tmp_path: Path, encoder: SampleEncoder) -> None:
    """500: each alone; then in shards between good ones, by the checker and by the loader."""
    draw = random.Random(SEED)
    folder = tmp_path / "a"
    shards: dict[str, dict[str, dict[str, bytes]]] = {}
    reasons: Counter[str] = Counter()
    good: set[str] = set()
    for number in range(500 * TIMES):
        members = bad_sample(draw)
        with bounded(members):
            reason = verdict(encoder, members)
        shard = shards.setdefault(f"train-{number // 100:04d}.tar", {})
        shard[f"bad{number}"], shard[f"good{number}"] = members, sample(number, number % 2)
        good |= {f"good{number}"} | ({f"bad{number}"} if reason is None else set())
        reasons[reason or "good"] += 1
    assert len(reasons) >= 9 and reasons.total() - reasons["good"] > 350 * TIMES, reasons
    for name, samples in shards.items():
        write_tar(folder / name, samples)
    del reasons["good"]

    signal.alarm(0)
    prepare(folder)
    report = check(folder, encoder)
    assert report.bad == reasons and report.good.total() == len(good)

    data = module(folder, workers=0, max_bad_in_a_row=60, pack_tokens=1000, max_length=1000, max_image_pixels=1_000_000)
    data.connect(encoder.template, encoder.transform)
    seen: Counter[str] = Counter()
    for batch in data.train_dataloader():
        seen.update(batch.keys)
        if good <= set(seen):
            break
        assert seen.total() < 20 * len(good), f"never trained on: {sorted(good - set(seen))[:5]}"
    assert set(seen) == good
    assert set(data.skipped) <= set(reasons) and sum(data.skipped.values()) > 0.9 * reasons.total()

    val = module(
        folder, folder, workers=0, pack_tokens=1000, max_length=1000, max_image_pixels=1_000_000, max_bad_in_a_row=60
    )
    val.connect(encoder.template, encoder.transform)
    (folder / ".nv-meta" / "split.yaml").write_text(
        (folder / ".nv-meta" / "split.yaml").read_text().replace("train:", "val:")
    )
    keys = [key for batch in val.val_dataloader() for key in batch.keys]
    assert sorted(keys) == sorted(good), "each once"


def read_some(folder: Path) -> None:
    """What training and checking do with a prepared folder."""
    for batch in islice(
        module(folder, workers=0, shuffle_buffer=0, packing_buffer=2, max_bad_in_a_row=5).train_dataloader(), 6
    ):
        assert batch.keys


def test_shards(tmp_path: Path) -> None:
    """160 beside a good one: prepared, checked and read; and damaged after they were prepared."""
    draw = random.Random(SEED + 1)
    outcomes: Counter[str] = Counter()
    for number in range(160 * TIMES):
        folder = tmp_path / "a"
        write_tar(folder / "train-0.tar", {f"good{i}": sample(i, i % 2) for i in range(4)})
        later = number % 3 == 0
        if later:
            write_tar(folder / "train-1.tar", {f"k{i}": sample(i, i % 2) for i in range(4)})
            prepare(folder)
        data = bad_tar(draw)
        (folder / "train-1.tar").write_bytes(data)
        with bounded(data):
            report = check(folder)
            assert report.good.total() >= 4, "those of the good shard"
            try:
                if not later:
                    prepare(folder)
                outcome = "prepared"
                read_some(folder)
                outcome = "read"
            except UserError as error:
                outcome = "damaged later" if later else "refused"
                named = any(word in str(error) for word in ("train-1", "samples in a row", ".nv-meta"))
                outcome = outcome if named else str(error)
            outcomes[outcome] += 1
            if later:
                break_index(draw, folder)
                with contextlib.suppress(UserError):
                    read_some(folder)
        shutil.rmtree(folder)
    assert outcomes.keys() == {"refused", "read", "damaged later"} and min(outcomes.values()) > 5, outcomes


def test_parquet(tmp_path: Path) -> None:
    """A damaged footer may not end the process, which pyarrow's own reading of it does."""
    said = [{"from": "human", "value": f"{IMAGE}\nWhat?"}, {"from": "gpt", "value": "It."}]
    rows = [{"image": {"bytes": picture(number), "path": None}, "conversations": said} for number in range(5)]
    path, files = tmp_path / "a.parquet", list[bytes]()
    for compression in ("none", "snappy", "zstd"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2, compression=compression)
        files.append(path.read_bytes())

    def damaged(draw: random.Random) -> bytes:
        data = bytearray(draw.choice(files))
        if draw.random() < 0.3:  # a field of the schema that may be null may no longer
            data[draw.choice([match.start() + 1 for match in re.finditer(b"\x25\x02", data)])] = 0
            return bytes(data)
        for _ in range(draw.choice((1, 1, 5))):
            data[draw.randrange(draw.choice((0, len(data) - 2000)), len(data))] = draw.choice(
                (0, 255, draw.randrange(256))
            )
        return bytes(data)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        bad: SampleError | None = None
        for reference in stored([path], ()):
            try:
                reference.read()
            except SampleError as error:
                bad = error
        if bad:
            raise bad

    outcomes = fuzz(300, damaged, read, 90)
    assert (
        set(outcomes) <= {"good", "SampleError", "UserError"} and min(outcomes["good"], outcomes["UserError"]) > 50
    ), outcomes


def break_index(draw: random.Random, folder: Path) -> None:
    path = draw.choice(sorted(folder.glob("**/*.idx")))
    path.write_bytes(flip(draw, path.read_bytes(), 3))


def test_recipes_and_indices(tmp_path: Path) -> None:
    """300: recipes, and the three files of a prepared folder."""
    write_shards(tmp_path / "a", {"train": [row(i) for i in range(6)], "val": [row(1)]})
    recipe = tmp_path / "r.yaml"
    good = {
        "__module__": "megatron.energon", "__class__": "MetadatasetV2",
        "splits": {"train": {"blend": [{"path": "a", "weight": 3}, {"path": "a", "weight": 1, "split_part": "val"}]}, "val": {"path": "a"}},
    }  # fmt: skip

    def read(data: bytes) -> None:
        recipe.write_bytes(data)
        read_recipe(recipe, "train")

    read(yaml.safe_dump(good).encode())
    outcomes = fuzz(150, lambda draw: bad_yaml(draw, good, ("MetadatasetV2", "path: a", "weight: 3")), read, 2)
    assert outcomes["UserError"] > 90 and outcomes.keys() == {"UserError", "good"}, outcomes
    for number, name in enumerate(("dataset.yaml", "split.yaml", ".info.json")):
        path = tmp_path / "a" / ".nv-meta" / name
        content = path.read_bytes()
        plain = yaml.safe_load(content)
        words = {
            "dataset.yaml": ("CrudeWebdataset",),
            "split.yaml": ("train-000000.tar",),
            ".info.json": ("train-000000.tar",),
        }[name]

        def use(data: bytes, path: Path = path) -> None:
            path.write_bytes(data)
            if read_recipe(tmp_path / "a", "train").num_samples == 6:
                read_some(tmp_path / "a")

        use(content)
        outcomes = fuzz(50, lambda draw, p=plain, w=words: bad_yaml(draw, p, w), use, 3 + number)  # type: ignore[misc]
        path.write_bytes(content)
        assert outcomes["UserError"] > 25 and outcomes.keys() <= {"UserError", "good"}, (name, outcomes)


def test_configurations(tmp_path: Path) -> None:
    """250 files and overrides. A configuration that is accepted is one that is written and read back as itself."""
    good = yaml.safe_load(to_yaml(tiny.config(tmp_path, "data", tmp_path)))
    file = tmp_path / "c.yaml"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        text = data.decode("utf-8", "replace")
        config = load_config([file], [text[:40]] if len(text) % 3 == 0 and "=" in text[:40] else [])
        file.write_text(to_yaml(config))
        assert to_yaml(load_config([file])) == to_yaml(config)

    read(yaml.safe_dump(good).encode())
    outcomes = fuzz(250, lambda draw: bad_yaml(draw, good, ("resize", "max_steps: 20", "trainer:")), read, 9)
    assert outcomes["ConfigError"] > 150 and outcomes["good"] > 0 and set(outcomes) == {"ConfigError", "good"}, outcomes
    file.write_bytes(yaml.safe_dump(good).encode())
    for override in ("model.mechanism.visual_drop={a: 1}", "optim.lora.targets=3"):  # what it has found
        with pytest.raises(ConfigError, match="expected a list or null"):
            load_config([file], [override])
