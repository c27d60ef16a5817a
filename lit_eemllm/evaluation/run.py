"""`validate` and `generate`: a run's model asked about images it has not seen, and again with the images shuffled.

The control answers what a score owes to looking: the same model and questions, each with the images of another question
of the same type. Beside it stands the best constant answer of the type.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import seed_everything
from PIL import Image
from rich.table import Table

from ..chat import IMAGE, Conversation, Turn
from ..config import to_yaml
from ..console import console, progress, quiet_libraries, write_atomically
from ..data.module import ShardDataModule
from ..errors import CheckpointError, SampleError, UserError
from ..images import open_image
from ..layout import PackedBatch
from ..model.build import build
from ..model.image_cache import ImageCache
from ..training.checkpoint import load_weights, newest_checkpoint, read_checkpoint
from ..training.module import LitEEMLLM, compute_dtype
from .cost import costs
from .metrics import ExactMatch, normalise
from .pictures import draw_samples
from .questions import Question, pick, read_questions, shuffle_images

if TYPE_CHECKING:
    from ..model import EEMLLM, Processor
    from ..schema import Config

UNTRAINED = "none"  # value of --checkpoint: the parts as they are, before any training


def validate(config: Config, checkpoint: str | None) -> None:
    """Score a run on ``data.val`` and write results, predictions and a picture below its directory.

    Args:
        config: of the run.
        checkpoint: a file; None takes the run's newest; "none" the untrained parts.
    """
    quiet_libraries()
    data = ShardDataModule(config.data, config.seed)
    recipe = data.recipe("val")  # what is wrong with it is said before the model is built
    model, processor, source = load(config, checkpoint)
    folder = Path(config.out) / ("eval" if checkpoint != UNTRAINED else "eval-untrained")
    folder.mkdir(parents=True, exist_ok=True)
    if not (Path(config.out) / "config.yaml").exists():  # a run's checkpoint under another mechanism, say
        write_atomically(Path(config.out) / "config.yaml", to_yaml(config, comments=True))
    data.connect(processor.template, model.vision.transform)
    console.print(f"{source}; attention {model.backend.name}; validation data {config.data.val}")
    with autocast(config, model):
        measured: dict[str, Any] = losses(model, data, config.optim.val_batches)
        if measured["loss_shuffled_images"] is not None:
            console.print(
                f"loss {measured['loss']:.4f} a token; images shuffled {measured['loss_shuffled_images']:.4f}"
            )
        questions, skipped = read_questions(recipe, config.eval.samples)
        answered, broken = answer_all(model, processor, questions, config, "answering")
        if answered:
            measured |= score(model, processor, answered, config)
    if model.image_cache is not None:
        measured["image_cache"] = {"hits": model.image_cache.hits, "misses": model.image_cache.misses}
    results = {
        "checkpoint": source,
        "data": config.data.val,
        "seed": config.seed,
        "mechanism": model.config.mechanism,
        "preset": config.model.mechanism.preset,
        "parameters": sum(p.numel() for p in model.parameters()),
        "skipped": dict(skipped + broken),
        **measured,
    }
    write_atomically(folder / "results.json", json.dumps(results, indent=2))
    if answered:
        write_atomically(folder / "predictions.jsonl", "".join(map(prediction, answered)))
        print_scores(results)
        draw_samples(pick(answered), config.data.max_image_pixels, folder / "samples.png")
    console.print(f"results: {folder / 'results.json'}")


def generate(
    config: Config, checkpoint: str | None, images: Sequence[Path], prompt: str, max_new_tokens: int, temperature: float
) -> None:
    """Answer one prompt about images: the answer alone goes to stdout. Images without a mark in the prompt come first.

    Raises:
        UserError: an option or an image cannot be used.
    """
    quiet_libraries()
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: expected 1 or more")
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature {temperature:g}: expected 0 (greedy) or more")
    missing = len(images) - prompt.count(IMAGE)
    text = f"{IMAGE}\n" * max(0, missing) + prompt
    conversation = Conversation("prompt", (Turn("human", text),), len(images))
    pictures = []
    for path in images:
        if not path.is_file():
            raise UserError(f"--image {path}: no such file")
        pictures.append(open_image(path.read_bytes(), str(path), config.data.max_image_pixels))
    model, processor, _ = load(config, checkpoint)
    with autocast(config, model):
        print(answer(model, processor, [conversation], [pictures], max_new_tokens, temperature)[0])


def autocast(config: Config, model: EEMLLM) -> torch.autocast:
    """Evaluation computes in the precision of the training."""
    dtype = compute_dtype(config)
    return torch.autocast(model.device.type, dtype, enabled=dtype is not None)


def load(config: Config, checkpoint: str | None) -> tuple[EEMLLM, Processor, str]:
    """Build a run's model with its trained weights, in evaluation mode. Returns also where they came from.

    Raises:
        CheckpointError: the checkpoint does not fit, or was trained with other frozen parts.
    """
    seed_everything(config.seed, verbose=False)
    model, processor = build(config.model)
    if config.init_from is not None and Path(config.init_from).exists():  # else the checkpoint may hold all of it
        load_weights(model, Path(config.init_from))
    module = LitEEMLLM(model, config, processor.fingerprint())
    if checkpoint == UNTRAINED:
        source = "before training"
    else:
        path = Path(checkpoint) if checkpoint is not None else newest_checkpoint(Path(config.out))
        converted = config.init_from is not None and Path(config.init_from).resolve() == Path(config.out).resolve()
        if path is None and not converted:
            raise CheckpointError(f"{config.out}: no checkpoint in it; train first, or use --checkpoint {UNTRAINED}")
        if path is not None:
            trained = read_checkpoint(path)
            module.on_load_checkpoint(trained)
            module.load_state_dict(trained["state_dict"], strict=False)
        source = str(path or config.init_from)
    on_gpu = torch.cuda.is_available() and config.trainer.get("accelerator") != "cpu"
    model.to("cuda" if on_gpu else "cpu").eval()
    model.set_attention(config.model.attention, compute_dtype(config), training=False)
    if config.eval.image_cache:
        model.image_cache = ImageCache(int(config.eval.image_cache * 2**30))
    return model, processor, source


@torch.inference_mode()
def answer(
    model: EEMLLM,
    processor: Processor,
    conversations: Sequence[Conversation],
    images: Sequence[Sequence[Image.Image]],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[str]:
    """Generated answers; greedy when the temperature is 0."""
    inputs = processor.prompts(conversations, images, model.device)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    ids = model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens)
    return processor.answers(ids, inputs["input_ids"].shape[1])


def answer_all(
    model: EEMLLM, processor: Processor, questions: Sequence[Question], config: Config, title: str
) -> tuple[list[tuple[Question, str]], Counter[str]]:
    """Questions with their answers, in order, and how many could not be asked, by reason. Similar ones share a batch."""
    order = sorted(
        range(len(questions)), key=lambda i: (len(questions[i].images), len(questions[i].conversation.turns))
    )
    answers: dict[int, str] = {}
    skipped = Counter[str]()
    with progress(title, len(questions)) as advance:
        for start in range(0, len(order), config.eval.batch_size):
            chunk = order[start : start + config.eval.batch_size]
            opened: dict[int, list[Image.Image]] = {}
            for i in chunk:
                conversation = questions[i].conversation
                name, most = conversation.key, config.data.max_image_pixels
                try:
                    processor.template.encode(conversation, generation=True)  # refused here, not in a batch of many
                    opened[i] = [open_image(data, name, most) for data in questions[i].images]
                except SampleError as error:
                    skipped[error.reason] += 1
            if opened:
                conversations = [questions[i].conversation for i in opened]
                texts = answer(model, processor, conversations, list(opened.values()), config.eval.max_new_tokens)
                answers |= zip(opened, texts, strict=True)
            advance(len(chunk))
    return [(questions[i], answers[i]) for i in sorted(answers)], skipped


def score(
    model: EEMLLM, processor: Processor, answered: Sequence[tuple[Question, str]], config: Config
) -> dict[str, Any]:
    """Exact match per type beside the shuffled-image control and the best constant answer; what the prompts cost."""
    questions = [question for question, _ in answered]
    matches: dict[str, ExactMatch] = defaultdict(ExactMatch)
    controls: dict[str, ExactMatch] = defaultdict(ExactMatch)
    for question, text in answered:
        matches[question.type].update([text], [question.truth])
    for round_ in range(config.eval.control):
        shuffled = shuffle_images(questions, config.seed + round_)
        for question, text in answer_all(model, processor, shuffled, config, "images shuffled")[0]:
            controls[question.type].update([text], [question.truth])

    types = {}
    for type_ in sorted(matches):
        truths = Counter(normalise(question.truth) for question in questions if question.type == type_)
        constant, count = truths.most_common(1)[0]
        types[type_] = {
            "questions": truths.total(),
            "exact_match": matches[type_].compute().item(),
            "control": controls[type_].compute().item() if type_ in controls else None,
            "constant": count / truths.total(),
            "constant_answer": constant,
        }

    average = sum(match.compute().item() for match in matches.values()) / len(matches)
    return {"types": types, "average": average, **costs(model, processor, questions, config)}


def prediction(answered: tuple[Question, str]) -> str:
    """A line of ``predictions.jsonl``."""
    question, text = answered
    row = {"key": question.conversation.key, "type": question.type, "prompt": question.prompt, "answer": text}
    return json.dumps({**row, "truth": question.truth}) + "\n"


@torch.inference_mode()
def losses(model: EEMLLM, data: ShardDataModule, batches: int) -> dict[str, float | None]:
    """Mean loss per supervised token over the first packs of ``data.val``, and with each image given to another document.

    Both numbers are of the same packs: those in which every image can move, see `with_moved_images`.
    """
    sums, tokens = [0.0, 0.0], 0
    for pair in islice(with_moved_images(data.val_dataloader()), batches):
        found = [model.packed_loss(batch.to(model.device)).item() for batch in pair]
        sums = [total + loss for total, loss in zip(sums, found, strict=True)]
        tokens += pair[0].num_targets
    right, wrong = (total / tokens if tokens else None for total in sums)
    return {"loss": right, "loss_shuffled_images": wrong, "loss_tokens": tokens}


def with_moved_images(batches: Iterable[PackedBatch]) -> Iterator[tuple[PackedBatch, PackedBatch]]:
    """Packs, each beside itself with all images moved on until every one stands in another document for another picture.

    Packs in which no such move exists are left out.
    """
    for batch in batches:
        if batch.pixel_values is None:
            continue
        pixels, images = batch.pixel_values, range(len(batch.pixel_values))
        most = max(sum(run.visual for run in document) for document in batch.layout.documents)
        for turn in range(most, len(images) - most + 1):  # a shorter or longer one leaves an image in its document
            origin = [(i - turn) % len(images) for i in images]
            if not any(pixels[i].equal(pixels[origin[i]]) for i in images):
                yield batch, batch.with_images_moved(origin)
                break


def print_scores(results: dict[str, Any]) -> None:
    table = Table(title="held-out questions")
    for heading in ("type", "questions", "exact match", "images shuffled", "best constant"):
        table.add_column(heading, no_wrap=True)
    for name, row in results["types"].items():
        control = "" if row["control"] is None else f"{row['control']:.3f}"
        constant = f"{row['constant']:.3f} ({row['constant_answer'][:20]!r})"
        table.add_row(name, str(row["questions"]), f"{row['exact_match']:.3f}", control, constant)
    table.add_row("average over types", "", f"{results['average']:.3f}")
    console.print(table)
