"""Rows of parquet files, with the images inside, as the data sets of a hub have them.

::

    image, images                images: {bytes, path}, bytes alone, or a list of either; paths alone as in rows of JSON
    conversations, messages      as in rows of JSON (`inputs.rows`)
    texts                        [{user, assistant}, …], as in The Cauldron
    question, answer or answers  a text or a list of texts; the first is trained, all are kept for metrics
    caption or text              likewise, asked for by `DESCRIBE`

Rows are counted by the files' footers, and sent to the workers as references, `Stored`. A worker reads forward, one row at a time, so that
memory holds a page of each column, however large a row group or a shard is. A file is read by pyarrow (the extra ``parquet``) alone;
what else stands in it, such as the features of `datasets`, is not read. A path inside is a row's path as any other: relative to the
folder of images, if one is given.
"""

from __future__ import annotations

import json
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from lit_eemllm import limits
from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.inputs.conversation import IMAGE
from lit_eemllm.inputs.rows import DESCRIBE, PICTURES, mend, show

SHAPES = (
    ("conversations",), ("messages",), ("texts",), ("question", "answer"), ("question", "answers"), ("caption",), ("text",),
)  # fmt: skip
"""Columns that say what is trained. A file's are the first of these that it has."""
_SPLIT = re.compile(r"(train|val|valid|validation|dev|test)(?=[-.]|$)", re.IGNORECASE)
_SAVED = "It is of save_to_disk. Write it as parquet: datasets.load_from_disk({!r}).to_parquet('train.parquet'), or ['train'].to_parquet if it has splits."


@dataclass(frozen=True)
class Table:
    """A file.

    Attributes:
        path: of it.
        columns: (name by which it is read, its column) of each that is read; none: all, by their own.
        stamp: its size and time of change, by which a conversion that goes on notices another file.
    """

    path: Path
    columns: tuple[tuple[str, str], ...]
    stamp: tuple[int, int]


@dataclass(frozen=True)
class Stored:
    """A reference to a row of a file."""

    table: Table
    number: int

    def read(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The row in a form that `inputs.rows` reads, and its images by the names that it has for them.

        Raises:
            SampleError: ``bad_record``, ``unread_key`` or ``oversize``.
            UserError: the file is damaged.
        """
        return _reader(self.table).row(self.number)


def stored(files: Sequence[Path], columns: tuple[tuple[str, str], ...]) -> Iterator[Stored]:
    """All rows of the files. Raises UserError: no parquet, or no known shape."""
    for path in files:
        stat = path.stat()
        table = Table(path, columns, (stat.st_size, stat.st_mtime_ns))
        for number in range(_Reader(table).starts[-1]):
            yield Stored(table, number)


def files_of(folder: Path, split: str) -> dict[str, list[Path]]:
    """Parquet files below a folder by split, as a hub names them: ``data/train-00000-of-00002.parquet``, ``train/0000.parquet``.

    Args:
        folder: to look in.
        split: the only one that is wanted, which is all files if no name says a split; empty: each that is found.

    Raises:
        UserError: there is none, or a name leaves open which split it is.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        names = path.relative_to(folder).parts[::-1]
        said = next((match[1].lower() for match in map(_SPLIT.match, names) if match), "")
        found.setdefault({"valid": "val", "validation": "val", "dev": "val"}.get(said, said), []).append(path)
    if not found:
        how = f" {_SAVED.format(str(folder))}" if next(folder.rglob("*.arrow"), None) else ""
        raise UserError(f"{folder}: no .parquet in it, of which a folder of rows is made.{how}")
    if split and found.keys() == {""}:
        return {split: found[""]}
    if "" in found:
        raise UserError(
            f"{found[''][0]}: its name says no split (train, validation, test). Name it: --rows train={found[''][0]}"
        )
    if split and split not in found:
        raise UserError(f"{folder}: no files of {split!r}; found {', '.join(found)}.")
    return {split: found[split]} if split else found


class _Reader:
    """Reads a file's rows one by one. What lies between two rows is passed over by row groups, and within one read and forgotten.

    Attributes:
        starts: number of the first row of each row group, and of all rows.
    """

    def __init__(self, table: Table) -> None:
        try:
            import pyarrow.parquet
        except ImportError:
            raise UserError(
                f"{table.path}: pyarrow, which reads parquet, is not installed; pip install 'lit_eemllm[parquet]'"
            ) from None
        self.path = table.path
        with self._intact(), _bounded_memory():
            self.file = pyarrow.parquet.ParquetFile(table.path, buffer_size=2**20, pre_buffer=False)
            fields = {field.name: field.type for field in self.file.schema_arrow}
            # and no more of the footer: pyarrow ends the process if what it says of a column is damaged
            counts = [self.file.metadata.row_group(group).num_rows for group in range(self.file.num_row_groups)]
        self.starts = [0, *accumulate(counts)]
        if min(counts, default=0) < 0 or self.starts[-1] > limits.PARQUET_ROWS:
            found = f"claims {self.starts[-1]:,} rows; at most {limits.PARQUET_ROWS:,} of a file are read"
            raise UserError(f"{self.path}: {found}. Write it as several.")
        self.names = dict(table.columns) or {name: name for name in fields}
        has = f"{self.path}: its columns are {', '.join(map(ascii, fields))[:400]}"
        if len(fields) < len(self.file.schema_arrow.names):
            raise UserError(f"{has}, some of them twice. Write it with a name for each.")
        if missing := next((column for column in self.names.values() if column not in fields), None):
            raise UserError(f"{has}; there is no {missing!a}, which --columns names.")
        how = "Name what is read: --columns image=COLUMN,question=COLUMN,answer=COLUMN"
        self.inside = [name for name, column in self.names.items() if _has_bytes(fields[column])]
        if other := next((name for name in self.inside if name not in PICTURES), None):
            raise UserError(f"{has}; {other!a} holds bytes, and images are read of {', '.join(PICTURES)} alone. {how}")
        shape = next((shape for shape in SHAPES if self.names.keys() >= set(shape)), None)
        if shape is None or (shape in SHAPES[-2:] and not self.names.keys() & set(PICTURES)):
            known = ", ".join(" and ".join(shape) for shape in SHAPES)
            raise UserError(f"{has}; expected one of {known}; the last two with image or images. {how}")
        self.shape = shape
        self.at = -1

    @contextmanager
    def _intact(self) -> Iterator[None]:
        from pyarrow import ArrowException

        try:
            yield
        except (ArrowException, OSError, ValueError, OverflowError) as error:
            found = " ".join(str(error).split())[:300].rstrip(".")
            raise UserError(
                f"{self.path}: truncated, damaged, or no parquet: {found}. Copy or make it again."
            ) from None

    def row(self, number: int) -> tuple[dict[str, Any], dict[str, bytes]]:
        group = bisect_right(self.starts, number) - 1
        if not self.starts[group] <= self.at <= number:
            groups, columns = range(group, len(self.starts) - 1), list(self.names.values())
            self.at = self.starts[group]
            self.batches = self.file.iter_batches(1, row_groups=groups, columns=columns, use_threads=False)
        batch: Any = None
        while self.at <= number:
            with self._intact(), _bounded_memory():
                batch = next(self.batches, None)
            if batch is None:
                raise UserError(
                    f"{self.path}: ends at row {self.at:,}, and claims {self.starts[-1]:,}. Copy or make it again."
                )
            self.at += batch.num_rows
        where = f"{self.path.name} row {number}"
        self._check_size(batch, where)
        try:
            (record,) = batch.to_pylist()
            return self._as_row({name: record[column] for name, column in self.names.items()}, where)
        # a text that is not UTF-8, a date that Python has not
        except (ValueError, OverflowError, RecursionError) as error:
            raise SampleError("bad_record", f"{where}: {error}") from None

    def _check_size(self, batch: Any, where: str) -> None:
        """Of what becomes Python's objects, which take many times the memory of Arrow's."""
        sizes = {name: batch.column(column).nbytes for name, column in self.names.items()}
        images = sum(sizes.pop(name) for name in self.inside)
        for what, size, most in (
            ("images", images, limits.SAMPLE_BYTES),
            ("texts", sum(sizes.values()), 4 * limits.ROW_BYTES),
        ):
            if size > most:
                raise SampleError("oversize", f"{where}: its {what} have {size:,} bytes; at most {most:,} are read")
        listed = max((len(getattr(batch.column(self.names[name]), "values", ())) for name in self.inside), default=0)
        if listed > limits.ROW_IMAGES:
            raise SampleError("too_many_images", f"{where}: {listed:,} images; at most {limits.ROW_IMAGES:,} are read")

    def _as_row(self, row: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, bytes]]:
        images = dict[str, bytes]()
        lacking = any(row.get(name, "") is None for name in PICTURES)
        for name in self.inside:
            value = row.pop(name)
            listed = list[str]()
            for item in value if isinstance(value, list) else [value]:
                said = item if isinstance(item, Mapping) else {"bytes": item}
                if isinstance(data := said.get("bytes"), bytes):
                    listed.append(f"{where} {name} {len(listed)}")
                    images[listed[-1]] = data
                elif data is not None:
                    raise SampleError("bad_record", f"{where}: {name!r} is {str(item)[:80]!a}, expected bytes and path")
                elif path := said.get("path"):
                    listed.append(path)
                else:
                    lacking = True
            if listed:
                row[name] = listed if isinstance(value, list) else listed[0]
        row = json.loads(json.dumps(row, default=str))  # with times and decimal numbers as texts
        if lacking:  # a mixture has rows of text alone; of others it is a loss that nothing else would tell
            mend(row, "null_image")
        if self.shape[0] not in ("conversations", "messages"):
            shown: Any = next((row[name] for name in PICTURES if row.get(name)), [])
            row["conversations"] = self._turns(row, len(shown) if isinstance(shown, list) else 1, where)
        return row, images

    def _turns(self, row: dict[str, Any], images: int, where: str) -> list[dict[str, Any]]:
        """Of questions and answers, which leave the row. The first question shows the images."""
        if self.shape == ("texts",):
            said = row.pop("texts")
            listed = said if isinstance(said, list) else [said]
            pairs = [
                (item.get("user"), item.get("assistant")) if isinstance(item, Mapping) else (item, None)
                for item in listed
            ]
        else:
            if row.get("choices"):
                raise SampleError(
                    "unread_key", f"{where}: it has 'choices', which are not read; put them into the question"
                )
            question = row.pop("question") if self.shape[0] == "question" else DESCRIBE
            said = row.pop(self.shape[-1])
            answers = said if isinstance(said, list) and said else [said]
            pairs = [(question, answer) for answer in answers]
            if question is not DESCRIBE:
                row["answers"] = row.get("answers") or answers
            elif not images:
                raise SampleError("missing_image", f"{where}: a {self.shape[0]} without an image")
        if wrong := [text for pair in pairs for text in pair if not isinstance(text, str)]:
            found = f"{' and '.join(self.shape)} hold {str(wrong[0])[:80]!a}, expected texts"
            raise SampleError("bad_record", f"{where}: {found}")
        turns = list[dict[str, Any]]()
        for question, answer in pairs if self.shape == ("texts",) else pairs[:1]:
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        if turns:
            turns[0]["value"] = show(turns[0]["value"], IMAGE, images)
        return turns


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Allocations fail beyond `limits.PARQUET_MEMORY`, which pyarrow answers with an error. On Linux alone."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = [now + limits.PARQUET_MEMORY, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(most), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


_reader = lru_cache(maxsize=1)(_Reader)


def _has_bytes(kind: Any) -> bool:
    """Whether a type of Arrow's is bytes, or has some in it."""
    from pyarrow import types

    tests = types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary
    inner = [kind.value_type] if types.is_dictionary(kind) else [kind.field(i).type for i in range(kind.num_fields)]
    return any(test(kind) for test in tests) or any(map(_has_bytes, inner))
