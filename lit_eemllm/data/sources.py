"""Published data sets, as their authors release them, to rows: the registry of sources and what their converters share.

A shipped source is one file, ``data_recipes/NAME.py``. Its docstring says where the release comes from, its licence, and what is
expected below ``--root``. It has ``SPLITS``, the splits that the release has, and ``rows(root, split)``; one of your own is such a
function with a decorator, `register_source`. The function yields in the release's order

* a row in LLaVA's form, complete; its image paths are relative to `root`;
* a `Question`: one question, which becomes a row, or a turn of one together with others about the same image;
* a `SampleError` for a record that cannot be used.

A converter opens annotations only. Images are found, checked and read by the workers (`writing`), which also refuse any path
that leaves `root`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from os.path import isfile  # which takes any name, even one that no file can have
from pathlib import Path
from string import ascii_uppercase
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from lit_eemllm.data.json_rows import read_json
from lit_eemllm.errors import SampleError, UserError, not_one_of
from lit_eemllm.inputs.conversation import IMAGE, leading_answer
from lit_eemllm.shipped import ROOT

if TYPE_CHECKING:
    from lit_eemllm.data.writing import Report

RECIPES = ROOT / "data_recipes"
Rows = TypeVar("Rows", bound=Callable[[Path, str], Iterable[Any]])
SOURCES = (
    "alpaca", "blip_laion_cc_sbu_558k", "chartqa", "clevr", "docvqa", "dvqa", "easy_vqa", "grocery", "iconqa", "laion_gpt4v",
    "llava_v1_5_mix665k", "localized_narratives", "lvis_instruct4v", "nlvr", "openstax", "plotqa", "scienceqa", "sharegpt",
    "sharegpt4v", "sharegpt4v_mix665k", "sharegpt4v_pt", "textocr_gpt4v",
)  # fmt: skip

PROCEDURAL = {"shapes": "shapes.py:write", "puzzles": "puzzles.py:write", "puzzles_search": "puzzles.py:write_search"}
"""Name -> file and function of a set that is drawn anew. The function (out, split, number of rows) writes out/images/ and returns the
path of the rows' JSON file."""


@dataclass(frozen=True)
class Source:
    """How a release is read: its splits, the rows of one, and what is told of it where files are missing."""

    splits: tuple[str, ...]
    rows: Callable[[Path, str], Iterable[Any]]
    about: str


REGISTERED: dict[str, Source] = {}
"""Those of your own."""


def names() -> list[str]:
    """Of all sources."""
    return sorted([*SOURCES, *PROCEDURAL, *REGISTERED])


def register_source(name: str, splits: Sequence[str] = ("train",)) -> Callable[[Rows], Rows]:
    """Decorator that makes ``rows(root, split)`` available as ``shards make --source NAME``. Raises ValueError if taken.

    Args:
        name: of the source.
        splits: those that the release has.
    """

    def register(rows: Rows) -> Rows:
        if name in names():
            raise ValueError(f"data source {name!r} is registered already; registered: {', '.join(names())}")
        REGISTERED[name] = Source(tuple(splits), rows, cleandoc(rows.__doc__ or ""))
        return rows

    return register


def _source(name: str) -> Source:
    """Raises UserError that lists the names."""
    if name in REGISTERED:
        return REGISTERED[name]
    if name not in SOURCES:
        raise UserError(f"source: {not_one_of(name, sorted([*SOURCES, *REGISTERED]))}")
    module = run_recipe(f"{name}.py")
    return Source(module.SPLITS, module.rows, module.__doc__ or "")


# What LLaVA-1.5 appends to questions whose answers are short (docs/Evaluation.md of haotian-liu/LLaVA).
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """One question and its answer.

    Attributes:
        id: of the release, or made of its numbers.
        text: images that it has no placeholder for are shown before it.
        answer: what is trained.
        images: paths relative to the root.
        format: the prompt for the form of the answer, `SHORT` or `LETTER`, if LLaVA-1.5 would have one.
        answers: all answers that the release accepts, for metrics. Default: `answer`.
        choices: the texts of a multiple choice question's options; its answers are letters, its metric "multiple_choice".
        type: groups questions in tables.
        metric: the benchmark's score, a name of `evaluation.metrics`. Default: that of a row without one.
    """

    id: str
    text: str
    answer: str
    images: tuple[str, ...] = ()
    format: str = ""
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    type: str | None = None
    metric: str | None = None

    def __post_init__(self) -> None:
        texts = {"question": [self.text], "answer": [self.answer, *self.answers], "choices": self.choices}
        for name, values in {**texts, "image": self.images}.items():
            if wrong := [value for value in values if not isinstance(value, str) or not value.strip()]:
                raise SampleError("bad_record", f"{name} is {str(wrong[0])[:80]!r}, expected a text")


def convert(
    name: str,
    root: Path,
    out: Path,
    *,
    splits: Sequence[str] | None = None,
    turns: int = 10,
    format_prompts: bool = True,
    holdout: float = 0.0,
    **options: Any,
) -> Report:
    """Write the shards of a source.

    Args:
        name: one of `SOURCES`, or of your own.
        root: the folder of the release, laid out as the source's file says.
        out: folder to create.
        splits: those to convert; default: all that the release has.
        turns: most questions about an image in one conversation of the train split. Other splits ask one each.
        format_prompts: append `Question.format` to the first question of a conversation, as in LLaVA-1.5's mixture.
        holdout: share of the train split, 0 to 1, that becomes the val split of a release without one, by a hash of the
            image (rows without: of the id), so that the splits share none. Several images of a row are hashed together:
            one of them may be in both.
        options: of `shards.make_from`.

    Returns:
        What was kept and dropped and why.

    Raises:
        UserError: wrong arguments, or the release is not there as expected.
    """
    from lit_eemllm.data.shards import make_from

    source = _source(name)
    wanted = tuple(splits or source.splits)
    if unknown := [split for split in wanted if split not in source.splits]:
        raise UserError(f"{name}: no split {unknown[0]!r}; the release has {', '.join(source.splits)}.")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder.")
    if turns < 1:
        raise UserError(f"turns is {turns}, expected 1 or more.")
    if not 0 <= holdout < 1 or (holdout and wanted != ("train",)):
        raise UserError(
            f"{name}: holdout is {holdout:g}; expected 0 to 1, and only for a release with no split but train."
        )

    def rows(split: str) -> Iterator[Any]:
        part = "train" if holdout else split
        try:
            found = conversations(source.rows(root, part), turns if split == "train" else 1, format_prompts)
            yield from (row for row in found if not holdout or held_out(row, holdout) == (split == "val"))
        except FileNotFoundError as error:
            raise UserError(f"{name}: {error.filename} is not there.\n\n{source.about}") from None
        except (KeyError, TypeError) as error:  # of a file; a record's are `each`'s
            raise UserError(
                f"{name}: the files below {root} are not as expected: {error!r}\n\n{source.about}"
            ) from None

    about = {"source": name, "turns": turns, "format_prompts": format_prompts, "holdout": holdout}
    readers = {split: (lambda split=split: rows(split)) for split in (("train", "val") if holdout else wanted)}
    return make_from(readers, root, out, about, **options)


def run_recipe(file: str) -> ModuleType:
    """A shipped file of ``data_recipes/``, never one of the current folder, which may have come with the data."""
    from lit_eemllm.plugins import run_file

    return run_file(RECIPES / file)


def held_out(row: Any, share: float) -> bool:
    """Whether a row of a train split belongs to the share that is held out for validation."""
    row = row if isinstance(row, Mapping) else {}
    told = json.dumps(row.get("image") or row.get("video") or row.get("id"))
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big") < share * 2**64


def conversations(items: Iterable[Any], turns: int, format_prompts: bool) -> Iterator[Any]:
    """Rows; up to `turns` short questions that follow each other and are about the same images share one."""
    waiting: list[Question] = []
    for item in items:
        if not isinstance(item, Question):
            yield item
            continue
        short = item.images and item.format  # captions of one image are not a conversation
        same = waiting and short and (item.images, item.format) == (waiting[0].images, waiting[0].format)
        if waiting and (not same or len(waiting) == turns):
            yield _row(waiting, format_prompts)
            waiting = []
        waiting.append(item)
    if waiting:
        yield _row(waiting, format_prompts)


def _row(questions: Sequence[Question], format_prompts: bool) -> dict[str, Any]:
    first = questions[0]
    texts = [question.text for question in questions]
    texts[0] = f"{IMAGE}\n" * (len(first.images) - first.text.count(IMAGE)) + first.text
    if format_prompts and first.format:
        texts[0] += f"\n{first.format}"
    row: dict[str, Any] = {"id": first.id, "conversations": []}
    if first.images:
        row["image"] = first.images[0] if len(first.images) == 1 else list(first.images)
    for text, question in zip(texts, questions, strict=True):
        row["conversations"] += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    if len({question.type for question in questions}) == 1 and first.type is not None:
        row["type"] = first.type
    if len(questions) == 1 and first.format:
        row["answers"] = list(first.answers or (first.answer,))
        if first.choices:
            row["choices"] = list(first.choices)
        if metric := "multiple_choice" if first.choices else first.metric:
            row["metric"] = metric
    return row


def each(records: Iterable[Any], convert: Callable[[int, Any], Any]) -> Iterator[Any]:
    """``convert(number, record)`` of every record; one that lacks a field or has a wrong one is refused, not the release."""
    for number, record in enumerate(records):
        reason = "bad_record"
        try:
            yield convert(number, record)
            continue
        except SampleError as error:
            reason, found = error.reason, error.message
        except KeyError as error:
            found = f"no {error}"
        except (UserError, TypeError, ValueError, LookupError, AttributeError) as error:
            found = str(error)
        yield SampleError(reason, f"record {number}: {found}: {str(record)[:200]!a}")


def letter(number: int, choices: Sequence[str]) -> str:
    """Of the choice with this number. Raises ValueError."""
    if not 0 <= number < min(len(choices), len(ascii_uppercase)):
        raise ValueError(f"the answer is choice {number} of {len(choices)}")
    return ascii_uppercase[number]


def lettered(choices: Sequence[str]) -> str:
    """The choices of a question, a line each, as LLaVA-1.5 writes them."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))


def llava(path: Path, images: str = "") -> Iterator[Any]:
    """Rows of a release in LLaVA's form, mended as LLaVA's own loader does; `images` is the folder of their images."""
    return each(read_json(path), lambda number, record: mended(record, images))


def mended(record: dict[str, Any], images: str = "") -> dict[str, Any]:
    """A row in LLaVA's form as LLaVA-1.5's training code reads it; what it changes is named in the row's ``mended``.

    A last turn that nobody answers is dropped; a first one that answers nothing is left to `parse_conversation`, for rows of all
    kinds. The placeholder of a single image is put before its turn's text.
    """
    turns = [dict(turn) for turn in record["conversations"]]
    changes = list[str]()
    if turns and turns[-1]["from"] == "human":
        turns = turns[:-1]
        changes.append("trailing_question")
    row = {**record, "conversations": turns}
    row.pop("mended", None)
    if image := record.get("image"):
        row["image"] = [f"{images}/{path}" for path in image] if isinstance(image, list) else f"{images}/{image}"
        row["image"] = row["image"] if images else image
    kept = turns[leading_answer(turns) :]
    if sum(turn["value"].count(IMAGE) for turn in kept) == 1:
        turn = next(turn for turn in kept if IMAGE in turn["value"])
        before, _, after = turn["value"].partition(IMAGE)
        if "\\n" in (before[-2:], after[:2]):  # an escape that was escaped: no question ends or begins with it
            changes.append("escaped_newline")
        text = f"{before.removesuffix(chr(92) + 'n')}{after.removeprefix(chr(92) + 'n')}".strip()
        turn["value"] = f"{IMAGE}\n{text}".strip()
    return {**row, "mended": changes} if changes else row


def with_suffix_on_disk(rows: Iterable[Any], root: Path, folder: str) -> Iterator[Any]:
    """Images below `folder` that have another suffix on disk than in the row: OCR-VQA's are all called .jpg in LLaVA's file."""
    for row in rows:
        image = row.get("image") if isinstance(row, dict) else None
        if isinstance(image, str) and image.startswith(folder) and ".." not in image and not isfile(root / image):
            others = (image.rpartition(".")[0] + suffix for suffix in (".png", ".gif", ".jpeg"))
            if found := next((other for other in others if isfile(root / other)), None):
                row = {**row, "image": found, "mended": [*row.get("mended", []), "other_suffix"]}
        yield row
