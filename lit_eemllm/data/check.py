"""Every sample of a shard folder or recipe, read as training would read it, before training does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from lit_eemllm.console import progress
from lit_eemllm.data.recipe import META, Recipe, not_indexed, read_folder, read_recipe, read_yaml
from lit_eemllm.data.samples import SampleEncoder, read_members
from lit_eemllm.data.shards import Report, read_shard, shard_names, stale
from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.inputs.images import read_picture
from lit_eemllm.shipped import find

_T = TypeVar("_T")
_log = logging.getLogger("lit_eemllm.data")


def check(path: Path, encoder: SampleEncoder | None = None, *, max_image_pixels: int = 50_000_000) -> Report:
    """Read every sample: members, JSON, conversation, images; with an encoder also tokens, length and targets.

    Args:
        path: a recipe, or a shard folder, prepared or not.
        encoder: the one that training will use; None = only what does not depend on a model.
        max_image_pixels: for use without an encoder.

    Returns:
        Good samples by folder and split, and the bad ones by reason: those of `SampleEncoder`, and ``not_prepared``, ``bad_recipe``,
        ``not_indexed``, ``stale_index`` and ``bad_shard``, which stand for a whole folder, recipe, shard or rest of a shard.

    Raises:
        UserError: there are no shards, or the recipe file cannot be read at all.
    """
    report = Report()
    shards = _listed(path, report)
    with progress("checking shards", len(shards)) as advance:
        for shard, name in shards.items():
            _check_shard(shard, name, encoder, max_image_pixels, report)
            advance(1)
    return report


def look(recipe: Recipe, encoder: SampleEncoder, most: int) -> None:
    """Read each source of a recipe as training will, up to the first sample that can be used.

    Raises:
        UserError: there is none among the first so many samples of a source, whose share others would silently take.
    """
    for source in recipe.sources:
        report = Report()
        samples = (sample for name, _ in source.shards for sample in read_shard(source.folder / name))
        for key, members in islice(samples, most):
            try:
                encoder.tokenize(key, members)
                break
            except SampleError as error:
                report.drop(error.reason, error.message)
            except UserError as error:
                raise UserError(f"{source.folder}: {error}") from None
        else:
            raise UserError(
                f"{source.folder}: none of the first {report.bad.total()} samples of its split {source.split!r} can be used "
                f"(data.max_bad_in_a_row={most}).\n{report}\nCheck all with: lit-eemllm shards check {recipe.path} CONFIG"
            )


def warn_of_unread(recipe: Recipe) -> None:
    """Of shards beside those that are read."""
    for source in recipe.sources:
        if unread := not_indexed(source.folder, [name for name, _ in source.shards]):
            _log.warning(
                f"{source.folder}: {len(unread)} shards, such as {unread[0]}, are not in its index and are not read. To read them, "
                f"run: lit-eemllm shards prepare {source.folder}"
            )


def _listed(path: Path, report: Report) -> dict[Path, str]:
    """The shards to read, and under which name their samples are counted; what is wrong with recipe, index or files goes to the report."""
    if path.is_dir():
        split_sources = [
            _try(report, "not_prepared", partial(read_folder, path, split, 1.0)) for split in _splits(path, report)
        ]
        sources = [source for source in split_sources if source is not None]
        if len(sources) < len(split_sources):
            return dict.fromkeys((path / name for name in shard_names(path)), path.name)
    else:
        document = read_yaml(find(path)) if find(path).is_file() else None
        splits = document.get("splits") if isinstance(document, dict) else None
        sources = []
        for split in splits if isinstance(splits, dict) and splits else ["train"]:
            recipe = _try(report, "bad_recipe", partial(read_recipe, path, str(split)))
            sources += recipe.sources if recipe else ()
    for folder in dict.fromkeys(source.folder for source in sources):
        for name in not_indexed(folder):
            report.drop(
                "not_indexed",
                f"{folder / name}: it is not in the index, so it is not read. Run: lit-eemllm shards prepare {folder}",
            )
    return {s.folder / name: f"{s.folder.name}/{s.split}" for s in sources for name, _ in s.shards}


def _splits(folder: Path, report: Report) -> list[str]:
    file = folder / META / "split.yaml"
    content = _try(report, "not_prepared", partial(read_yaml, file)) if file.is_file() else None
    parts = content.get("split_parts") if isinstance(content, dict) else None
    # an index that cannot be read at all says so under the name of the usual split
    return [str(split) for split in parts] if isinstance(parts, dict) and parts else ["train"]


def _try(report: Report, reason: str, function: Callable[[], _T]) -> _T | None:
    try:
        return function()
    except UserError as error:
        report.drop(reason, str(error))
        return None


def _check_shard(shard: Path, name: str, encoder: SampleEncoder | None, max_image_pixels: int, report: Report) -> None:
    try:
        for key, members in read_shard(shard):
            try:
                _check_sample(f"{shard.name}/{key}", members, encoder, max_image_pixels, report)
                report.good[name] += 1
            except SampleError as error:
                report.drop(error.reason, error.message)
            except UserError as error:  # training would stop here
                report.drop("too_long", str(error))
        if problem := stale(shard):
            found = (
                f"{problem}: training would not read what was checked. Run: lit-eemllm shards prepare {shard.parent}"
            )
            report.drop("stale_index", f"{shard}: {found}")
    except UserError as error:
        report.drop("bad_shard", str(error))


def _check_sample(
    name: str, members: dict[str, bytes], encoder: SampleEncoder | None, max_image_pixels: int, report: Report
) -> None:
    if encoder is None:
        _, images = read_members(name, members)
        for number, data in enumerate(images):
            read_picture(data, f"{name}, image {number}", max_image_pixels)
    else:
        sample = encoder.tokenize(name, members)
        images = encoder.load_pixels(sample).tokens.images
        report.tokens += sample.length
        report.longest = max(report.longest, sample.length)
    report.images += len(images)
