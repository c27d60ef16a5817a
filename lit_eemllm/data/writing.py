"""Rows into shards, in parallel and resumable: the machinery below `shards.make` and `sources.convert`.

::

    rows of a split ──blocks of `shard_size`──► worker process: check, read and decode images ──► train-000000.tar
                                                                                  and its record  .done/train-000000.json

A block's shard and record depend on nothing but the block and the images: workers, their number and a kill do not change a
byte. The record is written last and holds a hash of the block, so a conversion that is started again keeps the shards that
are finished, and writes those anew whose rows or options have changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lit_eemllm import limits
from lit_eemllm.config.keys import VideoConfig
from lit_eemllm.console import progress, progress_bar, write_atomically, writing
from lit_eemllm.data.parquet import Stored
from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.inputs.conversation import leading_answer, parse_conversation
from lit_eemllm.inputs.images import read_file, read_picture
from lit_eemllm.inputs.rows import as_llava, encoded, paths_of
from lit_eemllm.inputs.video import Clip, read_clip, with_frames

Found = TypeVar("Found")
EXAMPLES = 5
"""Samples named per reason in a report."""
FEW = 2000
"""Rows for which starting processes costs more than it saves."""
DONE = ".done"
DROPPED = "dropped.jsonl"
"""Of a folder of shards: every row that is not in them, a line each, in order."""

_MAGIC = (
    ("jpg", re.compile(rb"\xff\xd8\xff")),
    ("png", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("gif", re.compile(rb"GIF8[79]a")),
    ("webp", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    ("bmp", re.compile(rb"BM")),
    ("tif", re.compile(rb"II[*+]\0|MM\0[*+]")),
    ("ppm", re.compile(rb"P[1-6]\s")),
)


@dataclass
class Report:
    """What became of a set of samples.

    Attributes:
        good: usable samples by split or folder.
        bad: the others by reason.
        mended: changes that a source made to rows of its release, and answers to nothing, which training does not read, by
            kind; the rows are kept.
        examples: the first few messages of each reason.
        dropped: of a block that is written, every row that is not, with its reason.
        ids: how often each ``id`` stands on a row of a split, where that was counted.
        images, tokens, longest: images and tokens of the good ones, and the tokens of the longest, where they were counted.
    """

    good: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    mended: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    ids: Counter[tuple[str, str]] = field(default_factory=Counter)
    images: int = 0
    tokens: int = 0
    longest: int = 0

    @property
    def ok(self) -> bool:
        """Something is usable, and nothing is not."""
        return not self.bad and self.good.total() > 0

    def drop(self, reason: str, message: str) -> None:
        self.bad[reason] += 1
        named = self.examples.setdefault(reason, [])
        if len(named) < EXAMPLES:
            named.append(message)

    def __str__(self) -> str:
        lines = [f"{self.good.total():,} good samples ({', '.join(f'{k} {v:,}' for k, v in self.good.items())}), "
                 f"{self.images:,} images"]  # fmt: skip
        if self.tokens:
            mean = self.tokens / self.good.total()
            lines.append(
                f"{self.tokens:,} tokens with the visual ones, {mean:.0f} per sample, the longest has {self.longest:,}"
            )
        if repeated := sorted({id for (_, id), count in self.ids.items() if count > 1}):
            found = f"ids that several rows of a split have: {len(repeated):,}, such as {repeated[0]!r}"
            lines.append(f"{found}; all rows are kept")
        width = max(map(len, [*self.bad, *self.mended]), default=0)
        if self.mended:
            lines.append("mended, and kept:")
            lines += [f"  {kind:{width}} {count:>11,}" for kind, count in self.mended.most_common()]
        lines.append(f"{self.bad.total():,} bad" + (":" if self.bad else ""))
        for reason, count in self.bad.most_common():
            lines.append(f"  {reason:{width}} {count:>11,}")
            lines += [f"    {message}" for message in self.examples[reason]]
            lines += ["    …"] if count > len(self.examples[reason]) else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Options:
    """What a worker must know beside its rows.

    Attributes:
        images: folder that the rows' paths of images and videos are relative to; None: no row may have any.
        follow_links: accept images that symbolic links inside `images` put elsewhere.
        max_pixels: larger images are refused by their header.
        video: how videos become images.
    """

    images: Path | None
    follow_links: bool
    max_pixels: int
    video: VideoConfig = field(default_factory=VideoConfig)


@dataclass(frozen=True)
class Block:
    """Rows that become one shard, each with its number in the split. A `SampleError` is a row that its source refused, a `Stored` one
    that is read where the shard is written."""

    split: str
    index: int
    rows: list[tuple[int, Any]]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.index:06d}"


def write(
    splits: Mapping[str, Callable[[], Iterable[Any]]],
    folder: Path,
    options: Options,
    shard_size: int,
    workers: int | None = None,
) -> tuple[Report, dict[str, Any]]:
    """Write the shards of all splits into a folder, which may hold the beginning of the same conversion.

    Args:
        splits: by split, a function that gives its rows from the beginning: it is called twice, first to count.
        folder: to write to.
        options: see there.
        shard_size: rows per shard; the dropped ones among them make it shorter.
        workers: processes; default: one per core, at most 32, or none for few rows.

    Returns:
        What was kept and dropped and why, and by split the counts, sizes and hashes of the shards.
    """
    report, total = Report(), 0
    with progress_bar() as bar:
        task = bar.add_task("counting rows", total=None)
        for split, rows in splits.items():
            for row in rows():
                total += 1
                if isinstance(row, dict) and "id" in row:
                    report.ids[split, str(row["id"])] += 1
                if total % 1000 == 0:
                    bar.update(task, completed=total)
    (folder / DONE).mkdir(parents=True, exist_ok=True)
    if workers is None:
        workers = 1 if total < FEW else min(os.cpu_count() or 1, 32)  # more would wait for the disk
    lines = folder / DROPPED
    blocks = (block for split, rows in splits.items() for block in _blocks(split, rows(), shard_size))
    manifest: dict[str, Any] = {}
    with progress("writing shards", total) as advance, lines.open("w", encoding="utf-8") as dropped:
        for record in _in_order(partial(write_block, folder=folder, options=options), blocks, workers):
            _add(record, report, manifest)
            dropped.writelines(json.dumps(row) + "\n" for row in record["dropped"])
            advance(record["rows"])
    kept = {DROPPED, *(shard["name"] for part in manifest.values() for shard in part["shards"])}
    for path in folder.iterdir():  # of kills, or of an earlier start with other options
        if path.is_file() and path.name not in kept:
            path.unlink()
    return report, manifest


def _blocks(split: str, rows: Iterable[Any], size: int) -> Iterator[Block]:
    numbered = enumerate(rows)
    for index in itertools.count():
        block = list(itertools.islice(numbered, size))
        if not block:
            return
        yield Block(split, index, block)


def _in_order(work: Callable[[Block], Any], blocks: Iterator[Block], workers: int) -> Iterator[dict[str, Any]]:
    """The results in the order of the blocks, with only a few blocks per worker in memory."""
    if workers == 1:
        yield from map(work, blocks)
        return
    context = multiprocessing.get_context("forkserver")  # fork would copy locks that threads of torch or the bar hold
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker)
    waiting: deque[Any] = deque()
    try:
        for block in blocks:
            waiting.append(pool.submit(work, block))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for want of memory. Finished shards are kept: start the same command again, "
            "with fewer --workers."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Ctrl-C is the parent's to answer, and a worker whose parent was killed has nothing to wait for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()


def _add(record: dict[str, Any], report: Report, manifest: dict[str, Any]) -> None:
    split = record["split"]
    report.bad.update(record["bad"])
    report.mended.update(record["mended"])
    for reason, messages in record["examples"].items():
        named = report.examples.setdefault(reason, [])
        named += messages[: EXAMPLES - len(named)]
    if shard := record["shard"]:
        report.good[split] += shard["samples"]
        report.images += shard["images"]
        part = manifest.setdefault(split, {"samples": 0, "images": 0, "shards": []})
        part["shards"].append(shard)
        for key in ("samples", "images"):
            part[key] += shard[key]


def write_block(block: Block, folder: Path, options: Options) -> dict[str, Any]:
    """Write the shard of a block and its record, or return the record that an earlier start left of the same block."""
    rows = [(n, [row.reason, row.message]) if isinstance(row, SampleError) else (n, row) for n, row in block.rows]
    told = json.dumps([asdict(options), rows], sort_keys=True, default=str)
    digest = hashlib.sha256(told.encode()).hexdigest()
    path = folder / DONE / f"{block.name}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # whatever is there instead is written anew
        known = json.loads(path.read_text(encoding="utf-8"))
        shard = known["shard"]
        if (
            known["digest"] == digest
            and "dropped" in known
            and (shard is None or (folder / shard["name"]).stat().st_size == shard["bytes"])
        ):
            return known
    report = Report()
    shard = _write_shard(block, folder, options, report)
    record = {"split": block.split, "rows": len(block.rows), "digest": digest, "shard": shard}
    record |= {"bad": report.bad, "mended": report.mended, "examples": report.examples, "dropped": report.dropped}
    write_atomically(path, json.dumps(record))
    return record


def _write_shard(block: Block, folder: Path, options: Options, report: Report) -> dict[str, Any] | None:
    from webdataset import TarWriter

    unfinished = folder / f".{block.name}.{os.getpid()}"
    count = images = 0
    with (
        writing(folder / f"{block.name}.tar"),
        unfinished.open("wb") as file,
        TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as tar,
    ):
        for number, row in block.rows:
            inside = dict[str, bytes]()
            try:
                if isinstance(row, Stored):
                    row, inside = row.read()
                row, members = _members(row, _name(block.split, number, row), options, inside)
            except SampleError as error:
                message = f"{block.split}: {error.message}" if error is row else error.message
                report.drop(error.reason, message)
                id = row.get("id") if isinstance(row, dict) else None
                told = {"split": block.split, "row": number, "id": id if id is None else str(id)[:200]}
                report.dropped.append({**told, "reason": error.reason, "message": message})
                continue
            slug = re.sub(r"[^A-Za-z0-9]+", "-", str(row.get("id", "")))[-40:].strip("-")
            tar.write({"__key__": f"{block.split}-{number:08d}" + (f"-{slug}" if slug else ""), **members})
            count += 1
            images += len(members) - 1
            if isinstance(mended := row.get("mended"), list):
                report.mended.update(map(str, mended))
            report.mended.update(["leading_answer"] * leading_answer(row["conversations"]))
    if not count:
        unfinished.unlink()
        return None
    name = f"{block.name}.tar"
    told = {"name": name, "samples": count, "images": images, "bytes": unfinished.stat().st_size}
    told["sha256"] = _sha256(unfinished)
    os.replace(unfinished, folder / name)
    return told


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _name(split: str, number: int, row: Any) -> str:
    if not isinstance(row, dict) or "id" not in row:
        return f"{split} row {number}"
    id = str(row["id"])[:80].encode(errors="backslashreplace").decode()  # half characters, which no terminal takes
    return f"{split} row {number} ({id})"


def _members(
    row: Any, name: str, options: Options, inside: Mapping[str, bytes]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The row in LLaVA's form, and what is written of it; images that came with the row are `inside`."""
    if isinstance(row, SampleError):
        raise row
    if not isinstance(row, dict):
        raise SampleError("bad_json", f"{name}: {str(row)[:200]!r} is not a JSON object")
    row = as_llava(row, name)
    row, pictures = with_frames(
        row, name, paths_of(row), partial(clip, name=name, options=options), options.video.markers
    )
    parse_conversation(row, len(pictures), name)
    members = {"json": encoded(row, name)}
    for number, picture in enumerate(pictures):
        path, data = (picture, inside.get(picture)) if isinstance(picture, str) else ("a frame", picture)
        data = image_bytes(path, name, options) if data is None else data
        extension = next((extension for extension, magic in _MAGIC if magic.match(data)), None)
        if extension is None:
            raise SampleError("bad_image", f"{name}: {path} begins with {data[:8]!r}, which is no known image format")
        read_picture(data, f"{name}, {path}", options.max_pixels)
        members[f"{number}.{extension}"] = data
        if (length := sum(len(member) + 2048 for member in members.values())) > limits.SAMPLE_BYTES:  # with headers
            raise SampleError(
                "oversize", f"{name}: {length:,} bytes and more, at most {limits.SAMPLE_BYTES:,} are read"
            )
    return row, members


def image_bytes(path: str, name: str, options: Options) -> bytes:
    """Of an image that a row names. Raises SampleError."""
    return _below("image", path, name, options, read_file)


def clip(path: str, name: str, options: Options) -> Clip:
    """Of a video that a row names. Raises SampleError."""
    read = partial(read_clip, video=options.video, max_pixels=options.max_pixels)
    return _below("video", path, name, options, read)


def _below(kind: str, path: str, name: str, options: Options, read: Callable[[Path, str], Found]) -> Found:
    """What is read of a file that a row names, if it is in the folder of images."""
    images = options.images
    if images is None:
        raise SampleError(f"missing_{kind}", f"{name}: it names the {kind} {path!r}, but no folder of images was given")
    file = images / path  # an absolute path as it is
    inside = not Path(path).is_absolute() or any(
        file.is_relative_to(folder) for folder in (images.absolute(), images.resolve())
    )
    if not inside or ".." in Path(path).parts or "\0" in path:
        raise SampleError("path_escape", f"{name}: {path!r} leaves the folder of images, {images}")
    try:
        if not file.is_file():
            raise SampleError(f"missing_{kind}", f"{name}: {file} is not there")
        if not options.follow_links and not file.resolve().is_relative_to(images.resolve()):
            found = f"{path!r} is a link out of the folder of images (see follow_links)"
            raise SampleError("path_escape", f"{name}: {found}")
        return read(file, f"{name}, {path}")
    except (OSError, ValueError) as error:  # a name that no file can have, a file that may not be read
        raise SampleError(f"missing_{kind}", f"{name}: {path[:200]!a} cannot be read: {error}") from None
