"""Where questions come from: the validation data, other shards, a file of rows, or a suite that names several such sets.

A suite is YAML, read as plain data; its paths are relative to it::

    sets:
      scienceqa:
        data: scienceqa/test.json        # rows, or a recipe or a folder of shards
        images: scienceqa/images         # default: the folder of the rows
        split: test                      # of shards; default: val
        metric: multiple_choice          # default: eval.metric, else what each row asks for, else exact_match
        max_new_tokens: 8                # default: eval.max_new_tokens
        prompt: "{question}\\nAnswer with the option's letter from the given choices directly."      # default: the question
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.keys import VideoConfig
from ..console import progress
from ..data.json_rows import read_json
from ..data.recipe import read_recipe, read_yaml
from ..data.samples import read_row
from ..data.shards import read_shard
from ..data.writing import Options, Report, clip, image_bytes
from ..errors import ConfigError, SampleError, UserError, did_you_mean, not_one_of
from ..inputs.conversation import IMAGE
from ..inputs.images import image_size
from ..inputs.rows import as_llava, encoded, paths_of
from ..inputs.video import with_frames
from .metrics import METRICS
from .questions import QUESTION, Picture, Question, first, make_question

if TYPE_CHECKING:
    from ..config.keys import Config

KEYS = ("data", "images", "split", "metric", "max_new_tokens", "prompt")
ROWS = (".json", ".jsonl")


@dataclass(frozen=True)
class QuestionSet:
    """Questions that are read, asked and scored alike; see the keys of a suite above."""

    name: str
    data: Path
    images: Path | None
    metric: str | None
    max_new_tokens: int
    prompt: str | None = None
    split: str | None = None

    @property
    def of_rows(self) -> bool:
        return self.data.suffix in ROWS and not self.data.is_dir()

    def problems(self) -> Iterator[str]:
        """What is wrong with it, as far as can be told without its questions."""
        if self.of_rows:
            if not self.data.is_file():
                yield f"data: {self.data} is not there"
            if self.images is not None and not self.images.is_dir():
                yield f"images: {self.images} is no folder"
            if self.split is not None:
                yield f"split: {self.data} has none; a split belongs to shards"
        else:
            if self.images is not None:
                yield f"images: {self.data} has its own; a folder belongs to rows ({', '.join(ROWS)})"
            try:
                read_recipe(self.data, self.split or "val")
            except UserError as error:
                yield f"data: {error}"
        if self.metric is not None:
            try:
                make_metric(self.metric)
            except ConfigError as error:
                yield f"metric: {error}"
        if self.prompt is not None and (QUESTION not in self.prompt or IMAGE in self.prompt):
            yield f"prompt: {self.prompt!r}: expected a text with {QUESTION} in it and no {IMAGE}"


def make_metric(name: str) -> Any:
    """A metric that one process computes. Raises ConfigError if there is none of this name, or it lacks a package."""
    if name not in METRICS:
        raise ConfigError(f"{not_one_of(name, METRICS)}; one of your own needs --import FILE")
    return METRICS[name](sync_on_compute=False)


def question_sets(config: Config) -> list[QuestionSet]:
    """What the configuration evaluates on. Raises ConfigError with all that is wrong."""
    own = config.eval
    data = own.data or config.data.val
    if own.suite is not None:
        sets, problems = read_suite(Path(own.suite), own.metric, own.max_new_tokens)
    elif data is not None:
        images = None if own.images is None else Path(own.images)
        sets, problems = [QuestionSet(Path(data).stem, Path(data), images, own.metric, own.max_new_tokens)], []
    else:
        raise ConfigError("there is nothing to evaluate on: set eval.data, eval.suite or data.val")
    problems += [f"sets.{one.name}.{text}" if own.suite else f"eval.{text}" for one in sets for text in one.problems()]
    if problems:
        raise ConfigError(
            "\n  ".join(
                [f"{own.suite or 'the questions'}: {len(problems)} mistake{'s' * (len(problems) > 1)}:", *problems]
            )
        )
    return sets


def read_suite(path: Path, metric: str | None, max_new_tokens: int) -> tuple[list[QuestionSet], list[str]]:
    """The sets of a suite, and what is wrong with its form.

    Args:
        path: of the file.
        metric, max_new_tokens: of sets that name none.
    """
    if not path.is_file():
        raise ConfigError(f"eval.suite: {path} is not there")
    content = read_yaml(path)
    bodies = content.get("sets") if isinstance(content, dict) else None
    if not isinstance(bodies, dict) or not bodies or len(content) > 1:
        raise ConfigError(
            f"{path}: expected one key, sets, and below it a mapping for each set; found {content!r:.200}"
        )
    sets, problems = list[QuestionSet](), list[str]()
    for name, body in bodies.items():
        where = f"sets.{name}"
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,50}", name):
            problems.append(f"{where!r:.100}: expected a name of letters, digits and . _ -")
        elif not isinstance(body, dict) or not isinstance(body.get("data"), str):
            problems.append(f"{where}: found {body!r:.200}, expected a mapping with at least `data`, a path")
        elif wrong := list(wrong_values(body)):
            problems += [f"{where}.{text}" for text in wrong]
        else:
            paths = {key: beside(path, body[key]) for key in ("data", "images") if body.get(key) is not None}
            problems += [f"{where}.{key}: {body[key]!r} leaves the suite's folder; if that is meant, write the absolute path"
                         for key, found in paths.items() if found is None]  # fmt: skip
            if None not in paths.values():
                tokens = body.get("max_new_tokens") or max_new_tokens
                own = {"metric": body.get("metric") or metric, "max_new_tokens": tokens, "prompt": body.get("prompt"),
                       "split": body.get("split")}  # fmt: skip
                sets.append(QuestionSet(name, **{"images": None, **paths}, **own))  # type: ignore[arg-type]
    return sets, problems


def wrong_values(body: Mapping[str, Any]) -> Iterator[str]:
    for key, value in body.items():
        if key not in KEYS:
            hint = did_you_mean(str(key), KEYS) or f"a set has {', '.join(KEYS)}"
            yield f"{key}: unknown key; {hint}"
        elif key == "max_new_tokens" and value is not None and (type(value) is not int or value < 1):
            yield f"{key}: found {value!r:.100}, expected 1 or more"
        elif key != "max_new_tokens" and value is not None and not isinstance(value, str):
            yield f"{key}: found {value!r:.100}, expected a text"


def beside(file: Path, text: str) -> Path | None:
    """A path as a file names it, relative to its folder; None if it leaves this folder and is not absolute."""
    folder = file.absolute().parent
    path = folder / text
    inside = Path(text).is_absolute() or path.resolve().is_relative_to(folder.resolve())
    return path if inside else None


def read_questions(
    source: QuestionSet, most: int | None, max_pixels: int, video: VideoConfig | None = None
) -> tuple[list[Question], Report]:
    """The questions of a set in its order, each with its metric's name, and what could not be used and why.

    Args:
        source: the set.
        most: rows to take, spread evenly over the set; None takes all. Only these are checked and kept in memory.
        max_pixels: larger images are refused by their header.
        video: how videos of rows become images; default: as `VideoConfig` has it.

    Raises:
        UserError: no row is usable, or questions of one type ask for several metrics.
    """
    rows = partial(row_samples, video=video or VideoConfig()) if source.of_rows else shard_samples
    total, samples = rows(source, max_pixels)
    wanted = range(total) if most is None or most >= total else {i * total // most for i in range(most)}
    questions, report, metrics = list[Question](), Report(), dict[str, Any]()
    if most == 0:
        return questions, report
    with progress(f"{source.name}: reading", total) as advance:
        for number, (key, load) in enumerate(samples):
            advance(1)
            if number not in wanted:
                continue
            try:
                row, pictures = load()
                question = make_question(row, pictures, key, number, source.prompt)
                questions.append(with_metric(question, source.metric, metrics))
            except SampleError as error:
                report.drop(error.reason, error.message)
            else:
                report.good[source.name] += 1
                report.images += len(pictures)
    if not questions:
        raise UserError(f"{source.data}: none of its questions can be asked.\n{report}")
    for kind in {question.type for question in questions}:
        asked = sorted({question.metric or "" for question in questions if question.type == kind})
        if len(asked) > 1:
            raise UserError(f"{source.data}: questions of type {kind!r} ask for several metrics: {', '.join(asked)}; "
                            "set eval.metric, or give them other types")  # fmt: skip
    return questions, report


def with_metric(question: Question, name: str | None, metrics: dict[str, Any]) -> Question:
    """The question with the name of its metric: the set's, or the row's own. Raises SampleError if it cannot be scored."""
    name = name or question.metric or "exact_match"
    key = question.conversation.key
    try:
        metric = metrics[name] = metrics.get(name) or make_metric(name)
    except ConfigError as error:
        raise SampleError("unknown_metric", f"sample {key!r}: metric: {error}") from None
    if problem := metric.problem(question.truth):
        raise SampleError("bad_truth", f"sample {key!r}: {problem}")
    return replace(question, metric=name)


Load = Callable[[], tuple[Mapping[str, Any], Sequence[Picture]]]


def shard_samples(source: QuestionSet, max_pixels: int) -> tuple[int, Iterator[tuple[str, Load]]]:
    """How many samples the split has, and of each the key and what reads its row and images; equal images are kept once."""
    recipe = read_recipe(source.data, source.split or "val")
    kept: dict[str, bytes] = {}

    def load(key: str, members: Mapping[str, bytes]) -> tuple[Mapping[str, Any], list[Picture]]:
        row, images = read_row(key, members)
        found = [picture(data, f"{key}.{name}", max_pixels, data) for name, data in images.items()]
        return row, [replace(each, source=kept.setdefault(each.digest, each.source)) for each in found]  # type: ignore[arg-type]

    shards = (one.folder / name for one in recipe.sources for name, _ in one.shards)
    samples = (sample for shard in shards for sample in read_shard(shard))
    return recipe.num_samples, ((key, partial(load, key, members)) for key, members in samples)


def row_samples(source: QuestionSet, max_pixels: int, video: VideoConfig) -> tuple[int, Iterator[tuple[str, Load]]]:
    """The same of a file of rows. Images are read once for their digests, and again when they are shown; frames of videos are kept."""
    options = Options(source.images or source.data.parent, follow_links=False, max_pixels=max_pixels, video=video)
    known, kept = dict[str, Picture](), dict[str, Picture]()

    def load(key: str, row: Any) -> tuple[Mapping[str, Any], list[Picture]]:
        if not isinstance(row, Mapping):
            raise SampleError("bad_json", f"{key}: {str(row)[:200]!a} is not a JSON object")
        row = as_llava(row, key)
        encoded(row, key, "surrogatepass")  # no longer than one may be
        paths = paths_of(row)
        for path in paths:
            if path not in known:
                read = partial(image_bytes, path, key, options)
                known[path] = picture(read(), path, max_pixels, read)
        images = [known[path] for path in paths]
        row, found = with_frames(row, key, images, partial(clip, name=key, options=options), video.markers)
        return row, [frame(one) if isinstance(one, bytes) else one for one in found]

    def frame(data: bytes) -> Picture:
        found = picture(data, "frame", max_pixels, data)
        return kept.setdefault(found.digest, found)

    rows = list(read_json(source.data))
    return len(rows), (
        (row_key(row, number), partial(load, row_key(row, number), row)) for number, row in enumerate(rows)
    )


def row_key(row: Any, number: int) -> str:
    found = first(row, "id", "question_id") if isinstance(row, Mapping) else None
    text = str(found)[:80]
    return text if found is not None and text.isprintable() else f"row {number}"


def picture(data: bytes, name: str, max_pixels: int, source: bytes | Callable[[], bytes]) -> Picture:
    """Raises SampleError if the header is not that of an image of an accepted size."""
    return Picture(sha256(data).hexdigest()[:32], name, image_size(data, name, max_pixels), source)
