"""Blend recipes: which shard folders, in what share. Read strictly, so that a recipe or a shard folder executes nothing.

A recipe is Energon's Metadataset (version 2)::

    __module__: megatron.energon
    __class__: MetadatasetV2
    splits:
      train:
        blend:                        # samples are drawn with these weights, for ever
          - {path: captions, weight: 3}
          - {path: questions, weight: 1}
      val:
        path: captions

``blend_epochized`` with ``repetitions`` instead of ``blend`` with ``weight`` walks through every folder that many times per
epoch; a plain ``path`` is one folder. ``split_part`` takes another split of a folder than the one of the same name.

Energon would import whatever ``__module__`` names, here and in a folder's ``dataset.yaml``. So Energon never reads these
files: they are read here with a safe loader against an allow-list, and it is handed the result.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os.path import normpath
from pathlib import Path, PurePosixPath
from typing import Any

from lit_eemllm import limits
from lit_eemllm.config.strict_yaml import BadYAML, parse, read_bytes
from lit_eemllm.errors import UserError
from lit_eemllm.shipped import find, nowhere

META = ".nv-meta"
HEADER = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
CRUDE = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}

_URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_LOCAL = (
    "Copy the shards to a local folder (aws s3 sync, rclone copy), or mount them (rclone mount), and name that folder."
)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_SHARES = {"blend": "weight", "blend_epochized": "repetitions"}


@dataclass(frozen=True)
class Source:
    """One split of one prepared shard folder.

    Attributes:
        folder: absolute path.
        split: the folder's split to read.
        share: weight, or repetitions per epoch, within the recipe.
        shards: (file name relative to the folder, number of samples), in order.
    """

    folder: Path
    split: str
    share: float
    shards: tuple[tuple[str, int], ...]

    @property
    def num_samples(self) -> int:
        return sum(count for _, count in self.shards)


@dataclass(frozen=True)
class Recipe:
    """The sources of one split and how they are mixed.

    Attributes:
        path: the recipe file, or the shard folder itself.
        blend: "weight" (draw for ever with these weights) or "repetitions" (so many passes over each source per epoch, whole ones).
        sources: at least one, each folder and split once.
    """

    path: Path
    blend: str
    sources: tuple[Source, ...]

    @property
    def num_samples(self) -> int:
        return sum(source.num_samples for source in self.sources)

    @property
    def names(self) -> dict[str, str]:
        """Folder -> name for people: that of the folder, numbered where another has the same."""
        names: dict[str, str] = {}
        for folder in dict.fromkeys(normpath(source.folder) for source in self.sources):
            name = Path(folder).name
            alike = sum(Path(other).name == name for other in names)
            names[folder] = f"{name} ({alike + 1})" if alike else name
        return names

    @property
    def shares(self) -> dict[str, float]:
        """Name -> share of all samples that the recipe asks for, endlessly many drawn."""
        names = self.names
        asked: dict[str, float] = dict.fromkeys(names.values(), 0.0)
        for source in self.sources:
            many = source.share if self.blend == "weight" else source.share * source.num_samples
            asked[names[normpath(source.folder)]] += many
        return {name: many / sum(asked.values()) for name, many in asked.items()}

    def fingerprint(self) -> list[str]:
        """What must not change between a run and its continuation: shares and shards of each source, not where they lie."""
        lines = []
        for s in self.sources:
            digest = hashlib.sha256(json.dumps(s.shards).encode()).hexdigest()[:12]
            lines.append(
                f"{s.split}, {self.blend} {s.share:g}, {s.num_samples} samples in {len(s.shards)} shards {digest}"
            )
        return lines


def read_recipe(path: str | Path, split: str) -> Recipe:
    """Read one split of a recipe file, or a prepared shard folder as if it were a recipe with one path.

    Every file that Energon will touch is checked: metadata, shards, their indices.

    Raises:
        UserError: naming file and key, what was found and what was expected.
    """
    path = Path(path)
    if _URL.match(str(path)) or _URL.match(str(path).replace(":/", "://", 1)):
        raise UserError(f"{path}: remote data is not supported. {_LOCAL}")
    file = find(path)
    if file.is_dir():
        return Recipe(path, "weight", (read_folder(file.absolute(), split, 1.0),))
    if not file.exists():
        raise UserError(
            f"{path}: no such recipe file or shard folder{nowhere(path)}. `lit-eemllm shards make` makes shards, "
            "with `--source shapes --out runs/demo/data` those of the demo."
        )
    with file.open("rb") as opened:
        begin = opened.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    rows = begin.startswith((b"[", b"PAR1")) or (
        begin.startswith(b"{") and re.search(rb'"(conversations|messages|image)"', begin)
    )
    if rows or path.suffix == ".jsonl":
        raise UserError(
            f"{path}: rows, expected a recipe or a folder of shards. Make shards of them first: "
            f"lit-eemllm shards make --rows {split}={path} --images DIR --out shards/NAME"
        )
    found = read_yaml(file)
    document = _mapping(found, path, "the recipe", required=("splits",), optional=tuple(HEADER))
    for key, expected in HEADER.items():
        if document.get(key, expected) != expected:
            raise UserError(
                f"{path}: key '{key}' is {document[key]!r:.200}, but a recipe may name nothing to import; "
                f"the only accepted value is {expected!r}. Nothing was imported or executed."
            )
    splits = document["splits"]
    if not isinstance(splits, dict) or split not in splits:
        there = ", ".join(map(str, splits)) if isinstance(splits, dict) else type(splits).__name__
        raise UserError(f"{path}: no split {split!r} under 'splits' (found: {there:.200}).")
    where, body = f"splits.{split}", splits[split]
    if not isinstance(body, dict):
        raise UserError(
            f"{path}: '{where}' is {body!r:.200}, expected a mapping with 'path', 'blend' or 'blend_epochized'."
        )
    for blend, share in _SHARES.items():
        if blend in body:
            entries = _mapping(body, path, where, required=(blend,))[blend]
            if isinstance(entries, list) and len(entries) > limits.SOURCES:
                raise UserError(
                    f"{path}: '{where}.{blend}' lists {len(entries):,} sources, at most {limits.SOURCES:,} are read."
                )
            if not isinstance(entries, list) or not entries:
                raise UserError(f"{path}: '{where}.{blend}' is {entries!r:.200}, expected a list of {{path, {share}}}.")
            listed = [_source(entry, path, f"{where}.{blend}[{i}]", split, share) for i, entry in enumerate(entries)]
            return _blended(Recipe(path, share, tuple(listed)))
    return Recipe(path, "weight", (_source(body, path, where, split, None),))


def _blended(recipe: Recipe) -> Recipe:
    """With each folder once, since Energon draws the same samples in the same order from one that is listed twice; and part of a
    pass as a weight, since Energon gives less of it the longer a run is."""
    merged: dict[tuple[Path, str], Source] = {}
    for source in recipe.sources:
        same = source.folder.resolve(), source.split
        before = merged.get(same, replace(source, share=0.0))
        merged[same] = replace(before, share=before.share + source.share)
    sources = tuple(merged.values())
    if recipe.blend == "weight" or all(source.share.is_integer() for source in sources):
        return replace(recipe, sources=sources)
    weighted = (replace(source, share=source.share * source.num_samples) for source in sources)
    return Recipe(recipe.path, "weight", tuple(weighted))


def _source(entry: Any, recipe: Path, where: str, split: str, share: str | None) -> Source:
    entry = _mapping(entry, recipe, where, ("path",), ("split_part", *([share] if share else [])))
    text, part = entry["path"], entry.get("split_part", split)
    if not isinstance(text, str) or not isinstance(part, str):
        raise UserError(
            f"{recipe}: 'path' and 'split_part' of '{where}' must be text, found {text!r:.200} and {part!r}."
        )
    value = entry.get(share, 1) if share else 1
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{recipe}: '{where}.{share}' is {value!r:.200}, expected a number above 0.")
    if _URL.match(text):
        raise UserError(f"{recipe}: '{where}.path' is {text!r:.200}; remote data is not supported. {_LOCAL}")
    folder = Path(text)
    if not folder.is_absolute():
        base = recipe.absolute().parent
        folder = base / folder
        if not folder.resolve().is_relative_to(base.resolve()):
            raise UserError(
                f"{recipe}: '{where}.path' is {text!r:.200}, which leaves the recipe's own folder {base}. "
                "If that is meant, write the absolute path."
            )
    if not folder.is_dir():
        kind = "a file; recipes cannot be nested, list shard folders" if folder.is_file() else "not there"
        if not recipe.exists():  # a shipped one
            kind += f"; to have it beside your shards: lit-eemllm configs copy {recipe} --to SHARDS"
        raise UserError(f"{recipe}: '{where}.path' is {text!r:.200}: {folder} is {kind}.")
    return read_folder(folder, part, float(value))


def read_folder(folder: Path, split: str, share: float) -> Source:
    """Check a prepared shard folder and list the shards of one split. Raises UserError."""
    info_path, split_path, dataset_path = (
        folder / META / name for name in (".info.json", "split.yaml", "dataset.yaml")
    )
    for path in (info_path, split_path, dataset_path):
        if not path.is_file():
            if next(folder.rglob("*.tar"), None) is None:
                raise UserError(
                    f"{folder}: no shards (.tar) in it. Make them of rows and images: lit-eemllm shards make --rows {split}=ROWS.json "
                    f"--images {folder} --out shards/NAME"
                )
            raise UserError(f"{folder}: not a prepared shard folder ({META}/{path.name} is missing). "
                            f"Run: lit-eemllm shards prepare {folder}")  # fmt: skip
    check_dataset_yaml(dataset_path)
    counts = _counts(info_path)
    splits = _mapping(read_yaml(split_path), split_path, "the split file", ("split_parts",), ("exclude",))
    parts = splits["split_parts"]
    if not isinstance(parts, dict) or not parts.get(split):
        found = {part: len(names) for part, names in parts.items() if names} if isinstance(parts, dict) else parts
        raise UserError(
            f"{folder}: it has no split {split!r} (number of shard patterns by split: {found}). "
            "To read another split, write a recipe with 'split_part', or name it as `split` in a suite."
        )
    excluded = set(_expand(splits.get("exclude") or [], split_path, "exclude"))
    names = [n for n in _expand(parts[split], split_path, f"split_parts.{split}") if n not in excluded]
    if not names:
        raise UserError(f"{split_path}: split {split!r} is empty: 'exclude' removes all its shards.")
    if unknown := [name for name in names if name not in counts]:
        raise UserError(f"{split_path}: shard {unknown[0]!r} is not in {info_path.name}. "
                        f"Run: lit-eemllm shards prepare {folder}")  # fmt: skip
    for name in names:
        _check_shard(folder, name, counts[name])
    return Source(folder, split, share, tuple((name, counts[name]) for name in names))


def _counts(info_path: Path) -> dict[str, int]:
    """Samples of each shard, by the index."""
    index = _mapping(_read_json(info_path), info_path, "the index", ("shard_counts",), ("energon_version",))
    counts = index["shard_counts"]
    if not isinstance(counts, dict) or not all(type(count) is int and count > 0 for count in counts.values()):
        raise UserError(f"{info_path}: 'shard_counts' must map shard names to sample counts above 0.")
    return counts


def not_indexed(folder: Path, shards: Iterable[str] | None = None) -> list[str]:
    """Shards of a prepared folder that are not in its index: added later, and read by nobody.

    Args:
        folder: all of it is searched, however deep and large it is, unless `shards` are given:
        shards: then itself and where these of its shards lie are.
    """
    counts = _counts(folder / META / ".info.json")
    if shards is None:
        found = folder.rglob("*.tar")
    else:
        places = {folder, *((folder / name).parent for name in shards)}
        found = (path for place in places for path in place.glob("*.tar"))
    return sorted({path.relative_to(folder).as_posix() for path in found} - counts.keys())


def check_dataset_yaml(path: Path) -> None:
    """Accept only the declaration of a crude dataset. Raises UserError naming the offending key."""
    content = read_yaml(path)
    if content == CRUDE:
        return
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {content!r}, expected {CRUDE}.")
    wrong = {key: content.get(key) for key in {**content, **CRUDE} if content.get(key) != CRUDE.get(key)}
    raise UserError(
        f"{path}: found {wrong}. Only crude shard folders are read ({CRUDE}); anything else could "
        f"import code. Nothing was imported or executed. Run: lit-eemllm shards prepare {path.parent.parent}"
    )


def _check_shard(folder: Path, name: str, count: int) -> None:
    """The shard is there, and as long as its index says (8 bytes per sample, then the end of the last one)."""
    pure, shard = PurePosixPath(name), folder / name
    if pure.is_absolute() or ".." in pure.parts or _URL.match(name):
        raise UserError(f"{folder / META}: shard {name!r} lies outside of the folder.")
    if not shard.is_file():
        raise UserError(f"{shard}: shard is missing. Restore it, or run: lit-eemllm shards prepare {folder}")
    index = shard.with_suffix(".tar.idx")
    if not index.is_file() or index.stat().st_size != 8 * (count + 1):
        raise UserError(f"{index}: index is missing or does not fit {count} samples. "
                        f"Run: lit-eemllm shards prepare {folder}")  # fmt: skip
    with index.open("rb") as file:
        file.seek(-8, 2)
        (end,) = struct.unpack("Q", file.read(8))
    if shard.stat().st_size < end:
        raise UserError(
            f"{shard}: truncated: {shard.stat().st_size:,} bytes, its index expects {end:,}. "
            f"Copy it again, or run: lit-eemllm shards prepare {folder}"
        )
    if problem := beyond_the_end(shard, end):
        raise UserError(
            f"{shard}: where it ends by its index there is {problem}: it was written anew, or added to, since it was indexed. "
            f"Run: lit-eemllm shards prepare {folder}"
        )


def beyond_the_end(shard: Path, end: int) -> str:
    """What a tar has behind its last member that is no end of an archive, which is zeros alone; empty if nothing."""
    with shard.open("rb") as file:
        file.seek(end)
        tail = file.read(limits.TAR_TAIL)
        if tail[:512] != bytes(512):
            return "no end-of-archive mark after the last member"
        if tail.count(0) < len(tail) or file.read(1):
            return (
                "something after the end-of-archive mark; unpack archives that were joined (cat), and pack them as one"
            )
    return ""


def _expand(patterns: Any, path: Path, where: str) -> list[str]:
    """``a-{000..002}.tar`` -> three names. One numeric range per name, which is what `prepare` writes, and no more."""
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"{path}: '{where}' is {patterns!r:.200}, expected a list of shard names.")
    names: list[str] = []
    for pattern in patterns:
        match = _RANGE.search(pattern)
        if match is None and not set("{}") & set(pattern):
            names.append(pattern)
            continue
        first, last = match.groups() if match else ("1", "0")
        rest = pattern[: match.start()] + pattern[match.end() :] if match else pattern
        if len(first + last) > 40 or len(names) + int(last) - int(first) >= limits.SHARDS:
            raise UserError(
                f"{path}: '{where}' lists more than {limits.SHARDS:,} shards, the last by {pattern[:80]!r}."
            )
        if set("{}") & set(rest) or int(last) < int(first):
            raise UserError(f"{path}: '{where}' has {pattern!r}; expected one range such as a-{{000..012}}.tar.")
        names += [_RANGE.sub(str(number).zfill(len(first)), pattern) for number in range(int(first), int(last) + 1)]
    return names


def read_yaml(path: Path) -> Any:
    """Plain data from a YAML file of bounded size. Raises UserError."""
    try:
        return parse(_read_bytes(path, limits.YAML_BYTES))
    except BadYAML as error:
        raise UserError(f"{error.at(path)}: not plain YAML, nothing was executed: {error}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_bytes(path, limits.META_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def _read_bytes(path: Path, most: int) -> bytes:
    content = read_bytes(path, most)
    if content is None:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes; at most {most:,} are read.")
    return content


def _mapping(
    value: Any, path: Path, where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Mapping[str, Any]:
    """`value` is a mapping with these keys and no others."""
    if not isinstance(value, dict):
        raise UserError(f"{path}: {where} is {value!r:.200}, expected a mapping with {', '.join(required)}.")
    allowed = (*required, *optional)
    if unknown := [key for key in value if key not in allowed]:
        names = ", ".join(f"'{key}'" for key in unknown)
        note = " Nothing was imported or executed." if "__" in names else ""
        raise UserError(f"{path}: unknown key {names} in {where}; allowed: {', '.join(allowed)}.{note}")
    if missing := [key for key in required if key not in value]:
        raise UserError(f"{path}: key '{missing[0]}' is missing in {where}.")
    return value
