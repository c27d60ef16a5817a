"""What both suites need: a trained model that is given questions of text and images, and answers or weighs answers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps

from ...config import Config, load_config
from ...console import quiet_libraries
from ...data.packing import collate
from ...data.samples import EncodedSample, TokenSample
from ...errors import SampleError, UserError
from ...formats.mechanism import mechanism_settings
from ...inputs.conversation import IMAGE, Conversation, Turn
from ...inputs.images import open_image, read_file
from ...mechanisms.build import read_mechanism
from ...names import check_names
from ...plugins import import_user_code
from ..run import answer, autocast, load

ROLES = {"system": "system", "user": "human", "assistant": "gpt"}  # both suites' names -> ours

logger = logging.getLogger(__name__)

Part = str | Image.Image | Path
"""Text, an image, or where an image lies."""


@dataclass
class Question:
    """What a suite asks.

    Attributes:
        key: names it in messages.
        turns: role, as the suites name it, and what is said and shown, in order.
    """

    key: str
    turns: Sequence[tuple[str, Sequence[Part]]]


class Likelihood(NamedTuple):
    """Of an answer with its end-of-turn: log-probability, tokens, and whether each token is the most probable one."""

    log_probability: float
    tokens: int
    greedy: bool


class Answerer:
    """A trained model and how to ask it.

    Args:
        run: a run directory, or a folder that holds a whole model (`lit-eemllm merge`, `convert`, `save_pretrained`).
        checkpoint: a file of the run; None takes the newest.
        overrides: ``key=value`` for the run's configuration.
        imports: Python files of your own that register encoders or attention backends.
    """

    def __init__(self, run: Path, checkpoint: str | None, overrides: Sequence[str], imports: Iterable[Path]) -> None:
        quiet_libraries()
        import_user_code(imports)
        self.config = read_config(run, overrides)
        if torch.cuda.is_available():  # processes on one machine each take a device
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        self.model, self.processor, _ = load(self.config, checkpoint)

    def answers(
        self, questions: Sequence[Question], max_new_tokens: int, temperature: float = 0.0, until: Sequence[str] = ()
    ) -> list[str]:
        """Answers to one batch, cut where one of `until` begins; "", with a warning, to what cannot be asked."""
        asked: dict[int, tuple[Conversation, list[Image.Image]]] = {}
        for i, question in enumerate(questions):
            try:
                conversation, images = self._converse(question)
                self.processor.template.encode(conversation, generation=True)  # refused here, not in a batch of many
                asked[i] = conversation, images
            except SampleError as error:
                logger.warning('%s; it is answered ""', error)
        texts = [""] * len(questions)
        if asked:
            conversations, pictures = zip(*asked.values(), strict=True)
            with autocast(self.config, self.model):
                found = answer(self.model, self.processor, conversations, pictures, max_new_tokens, temperature)
            for i, text in zip(asked, found, strict=True):
                ends = [text.find(end) for end in until if end and end in text]
                texts[i] = text[: min(ends, default=len(text))].rstrip()
        return texts

    @torch.inference_mode()
    def likelihoods(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Likelihood]:
        """How probable an answer to each question of one batch is; each question is one turn.

        Raises:
            SampleError: a question cannot be asked, or its answer is empty.
        """
        samples = [self._encode(question, text) for question, text in zip(questions, answers, strict=True)]
        batch = collate(samples).to(self.model.device)
        with autocast(self.config, self.model):
            logits_nv = self.model.packed_logits(batch)
        log_nv = logits_nv.float().log_softmax(-1)
        log_n = log_nv.gather(1, batch.targets[:, None])[:, 0]
        greedy_n = log_nv.argmax(-1) == batch.targets
        counts = [len(sample.tokens.targets()) for sample in samples]
        return [
            Likelihood(values.sum().item(), len(values), bool(flags.all()))
            for values, flags in zip(log_n.split(counts), greedy_n.split(counts), strict=True)
        ]

    def _encode(self, question: Question, text: str) -> EncodedSample:
        """Question and answer as in training."""
        asked, images = self._converse(question)
        conversation = replace(asked, turns=(*asked.turns, Turn("gpt", text)))
        template, transform = self.processor.template, self.processor.transform
        sizes = [transform.size_among(image.size, len(images)) for image in images]
        pieces = [transform.pieces(*size) for size in sizes]
        shown = template.encode(conversation).with_pieces(pieces, template.text_ids)
        tokens = TokenSample(question.key, shown.ids, shown.supervised, shown.runs, [], shown.images)
        if not tokens.targets():
            raise conversation.refusal("no_target", f"{text!r} is no answer that could be weighed")
        return EncodedSample(tokens, [transform(image, size) for image, size in zip(images, sizes, strict=True)], sizes)

    def _converse(self, question: Question) -> tuple[Conversation, list[Image.Image]]:
        """The conversation and its images. Raises SampleError if an image cannot be read or the turns are none."""
        pictures = [part for _, parts in question.turns for part in parts if not isinstance(part, str)]
        most = self.config.data.max_image_pixels
        images = [open_picture(picture, f"{question.key}, image {i}", most) for i, picture in enumerate(pictures)]
        turns = tuple(Turn(ROLES[role], write(parts)) for role, parts in question.turns)
        return Conversation(question.key, turns, len(images)), images


def refusal(name: str, found: str) -> UserError:
    return UserError(f"{name}: it shows {found}; lit_eemllm takes text and images. Leave it out.")


def open_picture(picture: Image.Image | Path, name: str, max_pixels: int) -> Image.Image:
    """Upright, in RGB, transparent pixels on white: as `open_image` makes it of a file. Raises SampleError."""
    if isinstance(picture, Path):
        if not picture.is_file():
            raise SampleError("missing_image", f"image {name!r}: no such file: {picture}")
        return open_image(read_file(picture, name), name, max_pixels)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "RGB" and not picture.has_transparency_data:
        return picture
    file = BytesIO()
    (picture.convert("RGBA") if picture.has_transparency_data else picture).save(file, "TIFF")
    return open_image(file.getvalue(), name, max_pixels)


def write(parts: Sequence[Part]) -> str:
    """The text of a turn, with `IMAGE` for each image.

    Images before all text stand on lines of their own, as in LLaVA's data, and later ones where they are. Where the text
    itself marks places, they stand there.
    """
    texts = [part for part in parts if isinstance(part, str)]
    if any(IMAGE in text for text in texts):
        return "\n".join(texts)
    written, before = "", None
    for part in parts:
        if isinstance(part, str):
            written += f"\n{part}" if isinstance(before, str) else part
        else:
            written += IMAGE if written.replace(f"{IMAGE}\n", "") else f"{IMAGE}\n"
        before = part
    return written


def read_config(run: Path, overrides: Sequence[str]) -> Config:
    """Configuration of a run directory, or of a folder that holds a whole model.

    Raises:
        UserError: the folder is neither, or an override is wrong.
    """
    where = f"out={json.dumps(str(run))}"
    if (run / "config.yaml").is_file():
        return load_config([run / "config.yaml"], [where, *overrides], checks=[check_names])
    file = run / "config.json"
    saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if saved.get("model_type") != "eemllm":
        expected = "a run directory, with a config.yaml, or a folder that holds a whole model (lit-eemllm merge)"
        raise UserError(f"{run}: {'neither is in it' if run.is_dir() else 'no such folder'}; expected {expected}")
    if not any(text.startswith("model.template=") for text in overrides):
        raise UserError(
            f"{run} does not say with which chat template it was trained; add model.template=vicuna_v1 or jinja"
        )
    encoder = saved["vision"]["config"]
    mechanism = read_mechanism(saved["mechanism"])
    values = {
        "model.decoder": str(run),
        "model.vision.encoder": saved["vision"]["encoder"],
        "model.vision.path": str(run),
        "model.vision.select_layer": encoder.get("select_layer", -2),
        "model.vision.policy": encoder.get("transform", {}).get("policy"),
        "model.connector": saved.get("connector") or {},
        "model.mechanism": mechanism_settings(mechanism, saved["text_config"]["num_hidden_layers"]),
        "init_from": str(run),
        "data.train": "none",  # this and what follows is required, and not read here
        "optim.lr": 1.0,
        "optim.max_steps": 1,
    }
    if values["model.vision.policy"] is None:  # an encoder of one's own
        del values["model.vision.policy"]
    known = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return load_config([], [where, *known, *overrides], checks=[check_names])
