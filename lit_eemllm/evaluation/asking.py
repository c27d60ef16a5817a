"""Asking a model many questions: in batches shared out over ranks, each kept in a file as soon as it is answered.

What is in a batch depends on the questions and the batch size alone, not on ranks or on what is answered already. So any number
of ranks, and an evaluation that was killed and started again, ask the very same batches as one process that is left alone.
(Keys of images that are seen again come from the image cache, where they may have been computed beside other images: the same
up to rounding. With eval.image_cache=0 nothing at all depends on another batch.)
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning import Fabric
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

from .. import __version__
from ..console import console, progress, writing
from ..errors import ConfigError
from ..model.build import fingerprint
from .questions import Question

if TYPE_CHECKING:
    from ..config.keys import Config
    from ..model import EEMLLM, Processor

Reply = tuple[str | None, str | None]
"""An answer, or None; and the reason why the question could not be asked, or `CUT`."""
CUT = "cut"  # an answer that did not end within the new tokens it was allowed
PATIENCE = timedelta(hours=6)  # that a rank may be behind another; if one dies, all end at once


def start_ranks(config: Config) -> Fabric:
    """As many processes as `config.trainer` says, or as torchrun or Slurm have started, each with its device.

    Raises ConfigError if there are not as many devices.
    """
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # "Initializing distributed", twice
    options = config.trainer
    on_gpu = torch.cuda.is_available() and options.get("accelerator") != "cpu"
    devices, nodes = options.get("devices", "auto"), options.get("num_nodes", 1)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has decided
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    elif nodes > 1 and not {"MASTER_ADDR", "SLURM_JOB_ID"} & set(os.environ):
        console.print(f"one machine, not trainer.num_nodes={nodes} as in training: nothing says where others are")
        nodes = 1
    try:
        strategy = DDPStrategy(timeout=PATIENCE)
        fabric = Fabric(accelerator="cuda" if on_gpu else "cpu", devices=devices, num_nodes=nodes, strategy=strategy)
        if fabric.world_size > 1:
            fabric.launch()
            atexit.register(_leave)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(f"trainer.devices, trainer.num_nodes: {error}") from error
    if on_gpu:
        torch.cuda.set_device(fabric.device)
    console.quiet = fabric.global_rank > 0
    return fabric


def _leave() -> None:
    """End the process group before Python takes itself down, which its threads may answer by an abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


def identity(
    model: EEMLLM, processor: Processor, config: Config, questions: Mapping[str, tuple[int, Sequence[Question]]]
) -> dict[str, Any]:
    """What decides the answers, by the words in which a difference is told.

    Args:
        questions: by set, the most new tokens of an answer and the questions.
    """
    return {
        "version": __version__,
        "checkpoint": fingerprint(model.state_dict()),
        "mechanism": model.config.mechanism,
        "tokenizer": processor.fingerprint(),
        "model.template": processor.template.fingerprint(),
        "images": processor.transform.identity(),
        "attention": [model.backend.name, config.trainer.get("precision")],
        "eval.batch_size": config.eval.batch_size,
        "eval.max_new_tokens": {name: tokens for name, (tokens, _) in questions.items()},
        "seed": config.seed,  # shuffles images
        "questions": {name: questions_hash(asked) for name, (_, asked) in questions.items()},
    }


def questions_hash(questions: Sequence[Question]) -> str:
    """16 hexadecimal digits of all that is shown to the model, and of the types, within which images are shuffled."""
    digest = hashlib.sha256()
    for question in questions:
        turns = [(turn.role, turn.text) for turn in question.conversation.turns[:-1]]
        images = [picture.digest for picture in question.pictures]
        digest.update(json.dumps([question.number, question.type, turns, images]).encode())
    return digest.hexdigest()[:16]


def replies_of(row: dict[str, Any]) -> list[Reply]:
    """What a line of kept answers holds. Raises ValueError, TypeError or KeyError if it is not as `Answers.add` writes it."""
    replies = [(answer, reason) for answer, reason in row["replies"]]
    texts = [text for reply in replies for text in reply if text is not None]
    if not isinstance(row["part"], str) or type(row["batch"]) is not int or not all(isinstance(t, str) for t in texts):
        raise TypeError("not the replies to a batch")
    return replies


class Answers:
    """Replies by batch, kept in a folder as they come: a file each rank, one line a batch.

    Files of another evaluation are not read, and it is said in what it differs. A line that a kill has cut off is dropped.

    Args:
        folder: that all ranks see.
        identity: what decides the answers, see `identity`; the first line of each file.
        rank, ranks: of this process, and how many there are.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], rank: int = 0, ranks: int = 1) -> None:
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self.replies: dict[tuple[str, int], list[Reply]] = {}
        self.obsolete: list[Path] = []
        head = json.dumps(identity)
        own, kept = folder / f"answers-{rank}.jsonl", 0  # bytes of it that stay
        for path in self.files():
            length = self.read(path, head)
            kept = length if path == own else kept
        if self.replies:
            count = sum(map(len, self.replies.values()))
            console.print(f"{count:,} answers were there before and are kept: {folder / 'answers-*.jsonl'}")
        self.unshared = dict(self.replies)
        self.share()
        for path in self.obsolete:  # not before all ranks have read it
            path.unlink(missing_ok=True)
        self.own = own
        with writing(own):
            with own.open("ab") as file:
                file.truncate(kept)
            self.file = own.open("a", encoding="utf-8")
        if not kept:
            self.write(head)

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("answers-*.jsonl"))

    def read(self, path: Path, head: str) -> int:
        """Take over what a file holds; returns its bytes up to the first line that is not whole."""
        length = 0
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1]):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    break
                if number:
                    self.replies[row["part"], row["batch"]] = replies_of(row)
                elif json.dumps(row) != head:
                    self.discard(path, row, json.loads(head))
                    return 0
            except (ValueError, TypeError, KeyError, RecursionError):
                break
            length += len(line) + 1
        return length

    def discard(self, path: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
        """Say what differs; a file that no process of now will overwrite is to be removed."""
        other = ", ".join(key for key in {**was, **now} if was.get(key) != now.get(key))
        console.print(f"{path} holds answers of another evaluation ({other}): all questions are asked anew")
        if self.rank == 0 and int(path.stem.partition("-")[2]) >= self.ranks:
            self.obsolete.append(path)

    def write(self, line: str) -> None:
        with writing(self.own):
            self.file.write(line + "\n")
            self.file.flush()  # what the system has survives the process

    def add(self, part: str, batch: int, replies: list[Reply]) -> None:
        self.replies[part, batch] = self.unshared[part, batch] = replies
        self.write(json.dumps({"part": part, "batch": batch, "replies": replies}))

    def share(self) -> None:
        """Every rank gets the replies of all. A collective call."""
        if self.ranks > 1:
            everyone: list[Any] = [None] * self.ranks
            dist.all_gather_object(everyone, self.unshared)
            for replies in everyone:
                self.replies |= replies
            self.unshared = {}

    def remove(self) -> None:
        """When the results are written."""
        self.file.close()
        for path in self.files():
            path.unlink(missing_ok=True)


def ask_all(
    ask: Callable[[Sequence[Question]], list[Reply]],
    questions: Sequence[Question],
    batches: Sequence[Sequence[int]],
    answers: Answers,
    part: str,
) -> list[Reply]:
    """The replies to all questions, in order; this rank asks its share of the batches that have none. A collective call.

    Args:
        ask: replies to one batch.
        questions: in the same order on all ranks.
        batches: places in `questions`.
        answers: those there are, and where they are kept.
        part: names this use of the set among others.
    """
    left = [i for i, batch in enumerate(batches) if len(answers.replies.get((part, i), ())) != len(batch)]
    mine = left[answers.rank :: answers.ranks]
    with progress(part, sum(len(batches[i]) for i in mine)) as advance:
        for i in mine:
            answers.add(part, i, ask([questions[j] for j in batches[i]]))
            advance(len(batches[i]))
    answers.share()
    pairs = (pair for i, batch in enumerate(batches) for pair in zip(batch, answers.replies[part, i], strict=True))
    return [reply for _, reply in sorted(pairs)]


def in_batches(questions: Sequence[Question], tokens: Callable[[int, int], int], size: int) -> list[list[int]]:
    """Places of the questions, similarly long ones together: by visual tokens, then turns, then as they come.

    Args:
        questions: to be asked.
        tokens: visual tokens of an image of some width and height.
        size: of a batch.
    """

    def length(i: int) -> tuple[int, int]:
        return sum(tokens(*each.size) for each in questions[i].pictures), len(questions[i].conversation.turns)

    order = sorted(range(len(questions)), key=length)
    return [order[start : start + size] for start in range(0, len(order), size)]
