"""Shards on disk: made from rows and images, indexed for Energon, read without it.

A sample is ``key.json`` (the row as it was) and its images as they were, ``key.0.jpg``, ``key.1.png`` … (of a video its frames, `inputs.video`) WebDataset and Energon
split a member's name at its *first* dot, so a key has none: it is the split, the row number, and what is harmless of the id.
The same rows and images give the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import struct
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lit_eemllm import limits
from lit_eemllm.config.keys import VideoConfig, bounds_of
from lit_eemllm.console import progress, write_atomically, writing
from lit_eemllm.data.json_rows import read_json
from lit_eemllm.data.parquet import files_of, stored
from lit_eemllm.data.recipe import CRUDE, META, beyond_the_end, read_folder
from lit_eemllm.data.samples import OVERSIZE
from lit_eemllm.data.writing import DONE, Options, Report, write
from lit_eemllm.errors import UserError
from lit_eemllm.inputs.conversation import SURROGATE

SPLITS = ("train", "val", "test")


def make(
    rows: Mapping[str, Path],
    images: Path | None,
    out: Path,
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> Report:
    """Write a folder of prepared shards. Every image is decoded once, so that a damaged one is found here.

    Args:
        rows: by split ("train", "val", "test"), a JSON list or JSON lines file of LLaVA rows, a parquet file, or a folder of such;
            by "" a folder of parquet files whose names say their splits.
        columns: of parquet files, those that are read, by the names that `data.parquet` has for them; default: all, by their own.
        images, out, options: as for `make_from`.

    Returns:
        What was written, and what was dropped and why.

    Raises:
        UserError: wrong arguments, unreadable JSON or parquet, `out` exists, or no row is usable.
    """
    readers: dict[str, Callable[[], Iterable[Any]]] = {}
    for split, path in rows.items():
        if not path.exists():
            raise UserError(f"{path}: no such file of rows.")
        if not path.is_dir() and path.suffix != ".parquet":
            if columns:
                raise UserError(f"{path}: --columns names columns of parquet; rows of JSON have keys.")
            readers[split] = partial(read_json, path)
            continue
        for part, files in (files_of(path, split) if path.is_dir() else {split: [path]}).items():
            if part in readers:
                raise UserError(f"{path}: its split {part!r} is given twice.")
            readers[part] = partial(stored, files, tuple((columns or {}).items()))
    return make_from(readers, images, out, {"source": "rows"}, **options)


def make_from(
    splits: Mapping[str, Callable[[], Iterable[Any]]],
    images: Path | None,
    out: Path,
    about: Mapping[str, Any],
    *,
    shard_size: int = 1000,
    follow_links: bool = False,
    max_image_pixels: int = 50_000_000,
    video: VideoConfig | None = None,
    workers: int | None = None,
) -> Report:
    """Write a folder of prepared shards with ``manifest.json``, ``report.json`` and ``dropped.jsonl``.

    Until it is complete it is called ``.NAME.unfinished``; called again after a kill, this goes on there.

    Args:
        splits: by split ("train", "val", "test"), a function that gives its rows (see `writing.Block`) from the beginning.
        images: the folder that the rows' paths of images and videos are relative to; None if no row has any.
        out: folder to create.
        about: where the rows come from, for the manifest.
        shard_size: rows per shard; those of them that are dropped make it shorter.
        follow_links: accept images that symbolic links inside `images` put elsewhere.
        max_image_pixels: larger images, and frames of videos, are refused by their header.
        video: how videos become images; default: as `VideoConfig` has it.
        workers: processes; default: one per core, or none for few rows.

    Returns:
        What was written, and what was dropped and why: ``bad_json``, ``bad_conversation``, ``placeholder_mismatch``,
        ``no_target``, ``path_escape`` (leaving `images`), ``missing_image``, ``bad_image`` (not an image
        format, damaged or truncated), ``image_too_large``, the same three of videos, and the reasons of a source.

    Raises:
        UserError: wrong arguments, unreadable rows, `out` exists, or no row is usable.
    """
    if unknown := set(splits) - set(SPLITS):
        raise UserError(f"split {min(unknown)!r} is not known; expected {', '.join(SPLITS)}.")
    for name, number in (("shard_size", shard_size), ("workers", workers)):
        if number is not None and number < 1:
            raise UserError(f"{name} is {number}, expected 1 or more.")
    video = video or VideoConfig()
    for name, bound in bounds_of(VideoConfig):
        if (value := getattr(video, name)) is not None and (wrong := bound(value)):
            raise UserError(f"video.{name}: {wrong}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder. Remove it, or name another.")
    if images is not None and not images.is_dir():
        raise UserError(f"{images}: no such folder of images.")
    folder = out.parent / f".{out.name}.unfinished"
    try:
        report, written = write(
            splits, folder, Options(images, follow_links, max_image_pixels, video), shard_size, workers
        )
    except RecursionError:
        raise UserError(f"a row is nested too deeply to be written; finished shards are kept in {folder}.") from None
    if not report.good:
        shutil.rmtree(folder)
        raise UserError(f"no usable row, {out} was not written.\n{report}")
    write_atomically(folder / "manifest.json", json.dumps({**about, "splits": written}, indent=1))
    told = {"kept": report.good, "images": report.images, "mended": report.mended, "dropped": report.bad}
    told["examples"] = report.examples
    write_atomically(folder / "report.json", json.dumps(told, indent=1))
    shutil.rmtree(folder / META, ignore_errors=True)  # of a kill while indexing
    prepare(folder)
    shutil.rmtree(folder / DONE)
    if out.exists():
        out.rmdir()
    folder.rename(out)
    return report


def prepare(folder: Path, splits: Mapping[str, str] | None = None) -> dict[str, int]:
    """Index the shards of a folder for Energon, as a crude dataset: what ``energon prepare`` does, without questions.

    Args:
        folder: holds ``*.tar``, also in sub-folders.
        splits: by split, a regular expression for the beginning of its shards' paths. Default: those whose name, or that of a
            folder above, begins with the word val, valid, validation, valset, or test, tests, testset, are these splits; all
            others are train.

    Returns:
        Number of samples of each split.

    Raises:
        UserError: naming the shard that is truncated, empty or repeats a key.
    """
    from megatron.energon import CrudeWebdataset

    from lit_eemllm.compat.energon import collapse

    names = shard_names(folder)
    val, test = (rf"(?i:(.*/)?({words})(?![a-z]))" for words in ("val(id(ation)?|set)?", "test(s|set)?"))
    patterns = splits or {"val": val, "test": test, "train": f"(?!{val}|{test})"}
    parts = {split: [name for name in names if re.match(pattern, name)] for split, pattern in patterns.items()}
    seen: dict[str, str] = {}
    counts: Counter[str] = Counter()
    with progress("indexing", len(names)) as advance:
        for name in names:
            advance(1)
            for _, key, _ in walk_shard(folder / name, names_only=True):
                if not key:
                    continue
                if key in seen:
                    raise UserError(f"{folder / name}: sample {key!r} is also in {seen[key]}; keys must differ. "
                                    "(A sample's members must lie side by side, and names are cut at the first dot.)")  # fmt: skip
                seen[key] = name
                counts[name] += 1
            if not counts[name]:
                raise UserError(f"{folder / name}: no sample in it (members must be named key.json, key.0.jpg …).")
    meta = folder / META
    with writing(meta), contextlib.redirect_stdout(io.StringIO()):
        CrudeWebdataset.prepare_dataset(
            folder, names, split_parts_patterns=[("train", ".*")], workers=min(len(names), os.cpu_count() or 1, 8)
        )
    write_atomically(meta / "dataset.yaml", yaml.safe_dump(CRUDE))
    written = {split: collapse(found, keep_order=True) for split, found in parts.items() if found}
    write_atomically(meta / "split.yaml", yaml.safe_dump({"split_parts": written, "exclude": []}, sort_keys=False))
    return {split: read_folder(folder, split, 1.0).num_samples for split in written}


def shard_names(folder: Path) -> list[str]:
    """Paths of the shards relative to the folder, sorted. Raises UserError if there is none or a name is unusable."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of shards.")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tar"))
    if not names:
        packed = next(
            (path.name for path in sorted(folder.rglob("*")) if re.search(r"\.(tar\.\w+|tgz)$", path.name)), None
        )
        how = (
            f"{packed} is compressed: unpack it to a .tar first"
            if packed
            else f"Make shards of rows and images: lit-eemllm shards make --rows train=ROWS.json --images {folder} --out shards/NAME"
        )
        raise UserError(f"{folder}: no .tar in it. {how}")
    if bad := next((name for name in names if not re.fullmatch(r"[\w./ -]+", name)), None):
        raise UserError(f"{folder}: rename shard {bad!r}: Energon gives braces and the like a meaning of their own.")
    return names


def read_shard(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of a tar, without an index: key and members by extension. Nothing is extracted to disk.

    Raises UserError, after the samples before it, where the tar is truncated, damaged, compressed, joined or sparse.
    """
    return ((key, members) for _, key, members in walk_shard(path) if key)


def walk_shard(path: Path, names_only: bool = False) -> Iterator[tuple[int, str, dict[str, bytes]]]:
    """What `read_shard` yields, each sample with the byte at which it begins, and at last where the archive ends, without a key."""
    from lit_eemllm.compat.energon import MEMBER_NAME, SKIPPED_MEMBER

    begin, key, length, members = 0, "", 0, dict[str, bytes]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                match = MEMBER_NAME.match(member.name)
                if match is None or SKIPPED_MEMBER.match(member.name):
                    continue
                if member.islnk() or member.issym():  # Energon passes over it, so the sample would lose its picture
                    raise UserError(
                        f"{path}: {member.name[:200]!a} is a link, which is not read. Make it with tar --hard-dereference -h."
                    )
                if not member.isreg():
                    continue
                if member.issparse():  # a few bytes on disk may claim to be terabytes
                    raise UserError(f"{path}: {member.name} is a sparse file, which is not read.")
                if SURROGATE.search(member.name):
                    raise UserError(f"{path}: the name {member.name!a} is not UTF-8; rename the member.")
                if match[1] != key:
                    if key:
                        yield begin, key, members
                    begin, key, members, length = member.offset, match[1], {}, 0
                length += member.size
                if length > limits.SAMPLE_BYTES:
                    members = {OVERSIZE: str(length).encode()}
                    continue
                file = None if names_only else tar.extractfile(member)
                members[match[2]] = file.read() if file else b""
            end = tar.offset
        # tarfile takes a damaged or cut header for the end, so look whether it is one
        if problem := beyond_the_end(path, end):
            raise tarfile.ReadError(problem)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # numbers in headers may be anything
        if packer := _compressed(path):
            raise UserError(f"{path}: compressed. Shards are read at any place, so unpack it first: {packer}") from None
        raise UserError(f"{path}: truncated or damaged after sample {key!r}: {error}. Copy or make it again.") from None
    if key:
        yield begin, key, members
    yield end, "", {}


def _compressed(path: Path) -> str:
    """How to unpack a compressed file; empty if it is none."""
    begin = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        begin = file.read(6)
    packers = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
    return next(
        (f"{packer} < {path.name} > FILE.tar" for magic, packer in packers.items() if begin.startswith(magic)), ""
    )


def stale(path: Path) -> str:
    """How a shard's index differs from the shard; empty if it does not, or there is none. Raises UserError as `read_shard`."""
    index = path.with_suffix(".tar.idx")
    if not index.is_file():
        return ""
    if index.stat().st_size > path.stat().st_size:
        return f"the index has {index.stat().st_size:,} bytes, more than the shard"
    data = index.read_bytes()
    told = struct.unpack(f"<{len(data) // 8}Q", data[: len(data) // 8 * 8])
    for number, (begin, key, _) in enumerate(walk_shard(path, names_only=True)):
        if number >= len(told) or told[number] != begin:
            what = f"sample {key!r} begins" if key else "the last sample ends"
            found = told[number] if number < len(told) else "nothing"
            return f"{what} at byte {begin:,} and the index has {found}"
    return "" if len(data) == 8 * (number + 1) else f"the index has {len(data) / 8 - 1:g} samples, the shard {number}"
