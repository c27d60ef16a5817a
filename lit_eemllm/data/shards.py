"""Writing shards: LLaVA-style JSON and a folder of images into WebDataset tars, and the index that Energon needs beside them.

A sample is ``key.json`` (the row as it was) and its images as they were, ``key.0.jpg``, ``key.1.png`` … WebDataset and Energon
split a member's name at its *first* dot, so a key has none: it is the split, the row number, and what is harmless of the id.
The same rows and images give the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lit_eemllm.chat import SURROGATE, parse_conversation
from lit_eemllm.console import progress
from lit_eemllm.data.recipe import CRUDE, META, read_folder
from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.images import open_image

SPLITS = ("train", "val", "test")
EXAMPLES = 5
"""Samples named per reason in a report."""
AT_ONCE = 64
"""Rows whose images are in memory together while they are decoded."""

_MAGIC = (
    ("jpg", re.compile(rb"\xff\xd8\xff")),
    ("png", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("gif", re.compile(rb"GIF8[79]a")),
    ("webp", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    ("bmp", re.compile(rb"BM")),
    ("tif", re.compile(rb"II\*\0|MM\0\*")),
)


@dataclass
class Report:
    """What became of a set of samples.

    Attributes:
        good: usable samples by split or folder.
        bad: the others by reason.
        examples: the first few messages of each reason.
        ids: how often each ``id`` stands on a good row of a split, where that was counted.
        images, tokens, longest: images and tokens of the good ones, and the tokens of the longest, where they were counted.
    """

    good: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
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
        lines.append(f"{self.bad.total():,} bad" + (":" if self.bad else ""))
        for reason, count in self.bad.most_common():
            lines.append(f"  {reason}: {count:,}")
            lines += [f"    {message}" for message in self.examples[reason]]
            lines += ["    …"] if count > len(self.examples[reason]) else []
        return "\n".join(lines)


def make(
    rows: Mapping[str, Path],
    images: Path | None,
    out: Path,
    *,
    shard_size: int = 1000,
    follow_links: bool = False,
    max_image_pixels: int = 50_000_000,
) -> Report:
    """Write a folder of prepared shards. Every image is decoded once, so that a damaged one is found here.

    Args:
        rows: by split ("train", "val", "test"), a JSON list or JSON lines file of LLaVA rows.
        images: the folder that the rows' ``image`` paths are relative to; None if no row has images.
        out: folder to create; appears only when it is complete.
        shard_size: samples per shard.
        follow_links: accept images that symbolic links inside `images` put elsewhere.
        max_image_pixels: larger images are refused by their header.

    Returns:
        What was written, and what was dropped and why: ``bad_json``, ``bad_conversation``, ``placeholder_mismatch``,
        ``no_target``, ``path_escape`` (absolute or leaving `images`), ``missing_image``, ``bad_image`` (not an image
        format, damaged or truncated), ``image_too_large``.

    Raises:
        UserError: wrong arguments, unreadable JSON, `out` exists, or no row is usable.
    """
    if unknown := set(rows) - set(SPLITS):
        raise UserError(f"split {min(unknown)!r} is not known; expected {', '.join(SPLITS)}.")
    if shard_size < 1:
        raise UserError(f"shard_size is {shard_size}, expected 1 or more.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder. Remove it, or name another.")
    if images is not None and not images.is_dir():
        raise UserError(f"{images}: no such folder of images.")
    report = Report()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir(mode=0o755)
        for split, path in rows.items():
            made = partial(_members, images=images, follow_links=follow_links, max_pixels=max_image_pixels)
            _write_split(split, read_rows(path), made, folder, shard_size, report)
        if not report.good:
            raise UserError(f"no usable row, {out} was not written.\n{report}")
        prepare(folder)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    return report


def _write_split(
    split: str,
    rows: list[Any],
    make_members: Callable[[Any, str], dict[str, bytes]],
    folder: Path,
    shard_size: int,
    report: Report,
) -> None:
    from webdataset import TarWriter

    def members_or_error(number: int) -> dict[str, bytes] | SampleError:
        row = rows[number]
        name = f"{split} row {number}" + (f" ({row['id']})" if isinstance(row, dict) and "id" in row else "")
        try:
            return make_members(row, name)
        except SampleError as error:
            return error

    def all_members() -> Iterator[dict[str, bytes] | SampleError]:
        with ThreadPoolExecutor(
            min(os.cpu_count() or 1, 8)
        ) as pool:  # Pillow decodes without holding the interpreter's lock
            for start in range(0, len(rows), AT_ONCE):
                yield from pool.map(members_or_error, range(start, min(start + AT_ONCE, len(rows))))

    with contextlib.ExitStack() as stack, progress(f"{split}: writing shards", len(rows)) as advance:
        writer: Any = None
        for number, (row, members) in enumerate(zip(rows, all_members(), strict=True)):
            advance(1)
            if isinstance(members, SampleError):
                report.drop(members.reason, members.message)
                continue
            if writer is None or report.good[split] % shard_size == 0:
                stack.close()
                shard = folder / f"{split}-{report.good[split] // shard_size:06d}.tar"
                file = stack.enter_context(shard.open("wb"))
                writer = stack.enter_context(TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644))
            slug = re.sub(r"[^A-Za-z0-9]+", "-", str(row.get("id", "")))[-40:].strip("-")
            writer.write({"__key__": f"{split}-{number:08d}" + (f"-{slug}" if slug else ""), **members})
            report.good[split] += 1
            if "id" in row:
                report.ids[split, str(row["id"])] += 1
            report.images += len(members) - 1


def _members(row: Any, name: str, images: Path | None, follow_links: bool, max_pixels: int) -> dict[str, bytes]:
    if not isinstance(row, dict):
        raise SampleError("bad_json", f"{name}: {str(row)[:200]!r} is not a JSON object")
    listed = row.get("image") or []
    paths = listed if isinstance(listed, list) else [listed]
    if not all(isinstance(path, str) for path in paths):
        raise SampleError("bad_conversation", f"{name}: 'image' is {listed!r}, expected a path or a list of paths")
    parse_conversation(row, len(paths), name)
    members = {"json": json.dumps(row, ensure_ascii=False, sort_keys=True).encode()}
    for number, path in enumerate(paths):
        data = _image_bytes(path, images, name, follow_links)
        extension = next((extension for extension, magic in _MAGIC if magic.match(data)), None)
        if extension is None:
            raise SampleError("bad_image", f"{name}: {path} begins with {data[:8]!r}, which is no known image format")
        open_image(data, f"{name}, {path}", max_pixels)
        members[f"{number}.{extension}"] = data
    return members


def _image_bytes(path: str, images: Path | None, name: str, follow_links: bool) -> bytes:
    if images is None:
        raise SampleError("missing_image", f"{name}: it names the image {path!r}, but no folder of images was given")
    if Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path:
        raise SampleError("path_escape", f"{name}: {path!r} leaves the folder of images")
    file = images / path
    if not file.is_file():
        raise SampleError("missing_image", f"{name}: {file} is not there")
    if not follow_links and not file.resolve().is_relative_to(images.resolve()):
        raise SampleError("path_escape", f"{name}: {path!r} is a link out of the folder of images (see follow_links)")
    return file.read_bytes()


def read_rows(path: Path) -> list[Any]:
    """Rows of a JSON list, or of JSON lines; a line that is not JSON stays text. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of rows.")
    text = path.read_text(encoding="utf-8")
    if not text.lstrip().startswith("["):
        return [_json_or_text(line) for line in text.splitlines() if line.strip()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def _json_or_text(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def prepare(folder: Path, splits: Mapping[str, str] | None = None) -> dict[str, int]:
    """Index the shards of a folder for Energon, as a crude dataset: what ``energon prepare`` does, without questions.

    Args:
        folder: holds ``*.tar``, also in sub-folders.
        splits: by split, a regular expression for the beginning of its shards' paths. Default: ``val…`` and ``test…`` are
            these splits, all others are train.

    Returns:
        Number of samples of each split.

    Raises:
        UserError: naming the shard that is truncated, empty or repeats a key.
    """
    from megatron.energon import CrudeWebdataset
    from megatron.energon.bracecollapse import collapse

    names = shard_names(folder)
    patterns = splits or {"val": r"(.*/)?val", "test": r"(.*/)?test", "train": r"(?!(.*/)?(val|test))"}
    parts = {split: [name for name in names if re.match(pattern, name)] for split, pattern in patterns.items()}
    seen: dict[str, str] = {}
    counts: Counter[str] = Counter()
    with progress("indexing", len(names)) as advance:
        for name in names:
            advance(1)
            for key, _ in read_shard(folder / name, names_only=True):
                if key in seen:
                    raise UserError(f"{folder / name}: sample {key!r} is also in {seen[key]}; keys must differ. "
                                    "(A sample's members must lie side by side, and names are cut at the first dot.)")  # fmt: skip
                seen[key] = name
                counts[name] += 1
            if not counts[name]:
                raise UserError(f"{folder / name}: no sample in it (members must be named key.json, key.0.jpg …).")
    with contextlib.redirect_stdout(io.StringIO()):
        CrudeWebdataset.prepare_dataset(
            folder, names, split_parts_patterns=[("train", ".*")], workers=min(len(names), os.cpu_count() or 1, 8)
        )
    meta = folder / META
    (meta / "dataset.yaml").write_text(yaml.safe_dump(CRUDE))
    written = {split: collapse(found, keep_order=True) for split, found in parts.items() if found}
    (meta / "split.yaml").write_text(yaml.safe_dump({"split_parts": written, "exclude": []}, sort_keys=False))
    return {split: read_folder(folder, split, 1.0).num_samples for split in written}


def shard_names(folder: Path) -> list[str]:
    """Paths of the shards relative to the folder, sorted. Raises UserError if there is none or a name is unusable."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of shards.")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tar"))
    if not names:
        raise UserError(f"{folder}: no .tar in it. Make shards from JSON and images with: lit-eemllm shards make")
    if bad := next((name for name in names if not re.fullmatch(r"[\w./ -]+", name)), None):
        raise UserError(f"{folder}: rename shard {bad!r}: Energon gives braces and the like a meaning of their own.")
    return names


def read_shard(path: Path, names_only: bool = False) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of a tar, without an index: key and members by extension. Nothing is extracted to disk.

    Raises UserError, after the samples before it, where the tar is truncated, damaged, compressed or sparse.
    """
    from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re

    key: str | None = None
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                match = split_name_re.match(member.name)
                if not member.isreg() or match is None or skip_meta_re.match(member.name):
                    continue
                if member.issparse():  # a few bytes on disk may claim to be terabytes
                    raise UserError(f"{path}: {member.name} is a sparse file, which is not read.")
                if SURROGATE.search(member.name):
                    raise UserError(f"{path}: the name {member.name!a} is not UTF-8; rename the member.")
                if match[1] != key:
                    if key is not None:
                        yield key, members
                    key, members = match[1], {}
                file = None if names_only else tar.extractfile(member)
                members[match[2]] = file.read() if file else b""
            end = tar.offset
        # tarfile takes a damaged or cut header for the end, so look whether it is one
        with path.open("rb") as file:
            file.seek(end)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("no end-of-archive mark after the last member")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # numbers in headers may be anything
        raise UserError(f"{path}: truncated or damaged after sample {key!r}: {error}. Copy or make it again.") from None
    if key is not None:
        yield key, members
