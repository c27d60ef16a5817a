"""A model asked while it trains: a score with each validation, and what becomes of its answers to a few questions.

Nothing of it reaches the training: answers are greedy, modules and random generators are afterwards as they were, and questions are
read from their files once, not by the loader.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from PIL import Image

from ..console import console, write_atomically
from ..errors import UserError
from ..inputs.conversation import IMAGE
from ..training.fsdp2 import FSDP2
from ..training.module import rng_state, set_rng_state
from .asking import in_batches
from .gallery import Past, write_history
from .pictures import draw_samples
from .questions import Question
from .run import ask, autocast
from .scoring import Answered, score
from .sets import QuestionSet, question_sets, read_questions

if TYPE_CHECKING:
    from ..config.keys import Config
    from ..training.module import LitEEMLLM

SHOWN = 8
"""Questions whose answers are shown."""


class Asking(Callback):
    """Asks as `eval.during_training` and `optim.samples_every` say.

    Args:
        config: of the run. Its questions are read here; raises UserError if that cannot be.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        sets = question_sets(config)
        scored, shown = config.eval.during_training, config.optim.samples_every
        self.scored = [(one, self._read(one, scored)) for one in sets] if scored is not None else []
        self.shown = [(one, self._read(one, SHOWN)) for one in sets[:1]] if shown is not None else []
        self._step = 0

    def _read(self, one: QuestionSet, most: int) -> list[Question]:
        return read_questions(one, most, self.config.data.max_image_pixels, self.config.eval.video)[0]

    # --- when
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.scored and not trainer.sanity_checking:
            answered = self._answers(trainer, pl_module, self.scored)
            found = score(answered, {one.name: [] for one, _ in self.scored}, suite=len(self.scored) > 1)
            pl_module.log("val_score", found["average"], logger=False)  # `RunLog` logs it, as val_loss

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        step, every = trainer.global_step, self.config.optim.samples_every
        if every is None or step == self._step:  # the optimiser step goes on
            return
        self._step = step
        if step % every == 0 or step == pl_module.config.optim.steps:
            answered = self._answers(trainer, pl_module, self.shown)
            if trainer.is_global_zero:
                score(answered, {one.name: [] for one, _ in self.shown}, suite=False)
                trainer.logger.attempt(lambda: self._show(answered, step, trainer.logger))  # type: ignore[union-attr]

    # --- what
    @contextmanager
    def _as_it_was(self, module: LitEEMLLM) -> Iterator[None]:
        """Evaluation mode and the precision of the training; afterwards modes and random generators are what they were."""
        modes, rng = [(each, each.training) for each in module.modules()], rng_state()
        module.eval()
        try:
            with autocast(self.config, module.model):
                yield
        finally:
            for each, training in modes:
                each.training = training
            set_rng_state(rng)

    def _answers(
        self, trainer: Trainer, module: LitEEMLLM, asked: Sequence[tuple[QuestionSet, list[Question]]]
    ) -> list[Answered]:
        """The same on all ranks, whatever their number: each asks its share of the batches. Where FSDP2 shards weights, which takes all
        ranks to compute anything, each asks them all."""
        processor, config = module.processor, self.config
        assert processor is not None
        work = [
            (one, [questions[i] for i in batch])
            for one, questions in asked
            for batch in in_batches(questions, processor.transform.num_tokens, config.eval.batch_size)
        ]
        alone = trainer.world_size == 1 or isinstance(trainer.strategy, FSDP2)
        mine = range(len(work)) if alone else range(trainer.global_rank, len(work), trainer.world_size)
        with self._as_it_was(module):
            replies = {
                i: ask(module.model, processor, work[i][0].max_new_tokens, config.data.max_image_pixels, work[i][1])
                for i in mine
            }
        if not alone:
            everyone: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(everyone, replies)
            replies = {i: found for each in everyone for i, found in each.items()}
        answered = [
            Answered(one.name, question, text)
            for i, (one, batch) in enumerate(work)
            for question, (text, _) in zip(batch, replies[i], strict=True)
            if text is not None
        ]
        if not answered:
            why = Counter(str(reason) for each in replies.values() for _, reason in each)
            raise UserError(
                f"none of the questions of {', '.join(one.name for one, _ in asked)} can be asked: {', '.join(why)}; set eval.during_training=null "
                "optim.samples_every=null, or ask others (eval.data)"
            )
        return sorted(answered, key=lambda one: one.question.number)

    def _show(self, answered: Sequence[Answered], step: int, logs: Any) -> None:
        """In the log of the terminal, in the loggers, and in ``samples.html``, behind what was answered in earlier steps."""
        out, most = Path(self.config.out), self.config.data.max_image_pixels
        for one in answered:
            asked, said, truth = (
                shorten(text.replace(IMAGE, " "), 60)
                for text in (one.question.prompt, one.answer, one.question.truth.answers[0])
            )
            console.print(
                f"step {step:>6}  {asked} → {said or '(nothing)'}" + ("" if one.score >= 1 else f"  (truth: {truth})")
            )
        draw_samples(answered, most, out / "samples.png")
        with Image.open(out / "samples.png") as picture:
            logs.log_picture("samples", np.asarray(picture.convert("RGB")), step)
        file = out / "samples.jsonl"
        past = [one for one in read_past(file) if one.step < step]  # a run may have gone back
        past += [Past(step, one.question.conversation.key, one.answer, one.score) for one in answered]
        write_atomically(file, "".join(json.dumps(asdict(one)) + "\n" for one in past))
        write_history(answered, past, f"{out}: step {step:,}", most, out / "samples.html")


def read_past(file: Path) -> list[Past]:
    """The answers to samples that a run has written so far; a line that is none is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
            found.append(Past(int(row["step"]), str(row["key"]), str(row["answer"]), float(row["score"])))
        except (ValueError, TypeError, LookupError, RecursionError):
            continue
    return [one for one in found if math.isfinite(one.score)]
