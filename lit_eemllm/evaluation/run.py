"""`validate` and `generate`: a run's model asked about images it has not seen, and again with the images shuffled.

The control answers what a score owes to looking: the same model and questions, each with the images of another question
of the same type. Beside it stands the better of the type's two most common truths, as if it were every answer.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..config import to_yaml
from ..console import console, quiet_libraries, write_atomically
from ..data.module import ShardDataModule
from ..doctor import origin
from ..errors import SampleError, UserError
from ..inputs.conversation import IMAGE, Conversation, Turn
from ..inputs.images import open_image, read_file
from ..inputs.rows import VIDEO, show
from ..inputs.video import read_clip, with_frames
from ..model.fp8 import require_fp8, use_fp8
from ..model.image_cache import ImageCache
from ..terminal import say
from ..training.initial import UNTRAINED, run_model
from ..training.module import compute_dtype
from .asking import CUT, Answers, Reply, ask_all, identity, in_batches, start_ranks
from .cost import costs
from .gallery import write_gallery
from .loss import losses, validation_packs
from .pictures import draw_samples
from .questions import Question, shuffle_images
from .scoring import Answered, Round, pick, prediction, print_scores, score
from .sets import QuestionSet, question_sets, read_questions

if TYPE_CHECKING:
    from ..config.keys import Config
    from ..model import EEMLLM, Processor


def validate(config: Config, checkpoint: str | None) -> None:
    """Score a run and write results, predictions, a gallery and a picture below its directory.

    Each of several ranks asks its share; rank 0 does the rest. A validation that was killed goes on where it was.

    Args:
        config: of the run.
        checkpoint: a file; None takes the run's newest; "none" the untrained parts.
    """
    quiet_libraries()
    sets = question_sets(config)  # what is wrong is said before the model is built
    ranks = start_ranks(config)
    read = {
        one: read_questions(one, config.eval.samples, config.data.max_image_pixels, config.eval.video) for one in sets
    }
    for one, (_, report) in read.items():
        if report.bad:
            console.print(f"{one.data}: {report}")
    model, processor, source = load(config, checkpoint)
    # now: the commit is of the code that runs, whatever is committed meanwhile
    made = origin(model.device.type == "cuda")
    folder = Path(config.out) / ("eval" if checkpoint != UNTRAINED else "eval-untrained")
    folder.mkdir(parents=True, exist_ok=True)
    if ranks.global_rank == 0 and not (Path(config.out) / "config.yaml").exists():  # under another mechanism, say
        write_atomically(Path(config.out) / "config.yaml", to_yaml(config, comments=True))
    if (folder / "results.json").is_file():
        console.print(
            f"{folder} holds the results of an earlier evaluation, which this one replaces; to keep them, give this one a "
            "folder of its own: out=FOLDER --checkpoint FILE"
        )
    on = config.eval.suite or config.eval.data or config.data.val
    console.print(f"{source}; attention {model.backend.name}; questions of {on}")
    with autocast(config, model):
        measured: dict[str, Any] = {}
        if ranks.global_rank == 0 and config.data.val is not None:
            measured |= validation_loss(model, processor, config)
        questions = {one.name: (one.max_new_tokens, found) for one, (found, _) in read.items()}
        kept = Answers(folder, identity(model, processor, config, questions), ranks.global_rank, ranks.world_size)
        answered, rounds, broken = list[Answered](), dict[str, list[Round]](), Counter[str]()
        for one, (found, report) in read.items():
            mine, rounds[one.name], unanswered = ask_set(model, processor, one, found, config, kept)
            answered += mine
            broken += report.bad + unanswered
        if ranks.global_rank > 0:
            return
        if answered:
            measured |= score(answered, rounds, suite=config.eval.suite is not None)
            measured["cut"] = Counter(one.set for one in answered if one.cut)
            measured |= costs(model, processor, [one.question for one in answered], config)
    if model.image_cache is not None:
        measured["image_cache"] = {"hits": model.image_cache.hits, "misses": model.image_cache.misses}
    results = {
        "checkpoint": source,
        "machine": made,
        "data": on,
        "seed": config.seed,
        "mechanism": model.config.mechanism,
        "connector": model.connector.to_dict(),
        "preset": config.model.mechanism.preset,
        "parameters": sum(p.numel() for p in model.parameters()),
        "skipped": dict(broken),
        **measured,
    }
    if answered:
        write_atomically(folder / "predictions.jsonl", "".join(map(prediction, answered)))
    write_atomically(folder / "results.json", json.dumps(results, indent=2))  # says that all numbers are there
    if answered:
        print_scores(results, config.eval.control)
        draw_samples(pick(answered), config.data.max_image_pixels, folder / "samples.png")
        write_gallery(answered, f"{config.out}: {on}", config.data.max_image_pixels, folder / "gallery.html")
    else:
        for name in ("predictions.jsonl", "samples.png", "gallery.html"):  # of an earlier validation
            (folder / name).unlink(missing_ok=True)
    kept.remove()
    console.print(f"results: {folder / 'results.json'}")


def generate(
    config: Config,
    checkpoint: str | None,
    images: Sequence[Path],
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    videos: Sequence[Path] = (),
) -> None:
    """Answer one prompt about images and videos: the answer alone goes to stdout. Those without a mark in the prompt come first.

    Raises:
        UserError: an option or an image cannot be used.
    """
    quiet_libraries()
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: expected 1 or more")
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature {temperature:g}: expected 0 (greedy) or more")
    for option, path in [*(("--image", path) for path in images), *(("--video", path) for path in videos)]:
        if not path.is_file():
            raise UserError(f"{option} {path}: no such file")
    video, most = config.eval.video, config.data.max_image_pixels
    text = show(show(prompt, VIDEO, len(videos)), IMAGE, len(images))
    row: dict[str, Any] = {"question": text, "video": [str(path) for path in videos]}
    row, files = with_frames(
        row,
        "prompt",
        [read_file(path, str(path)) for path in images],
        lambda path: read_clip(Path(path), path, video, most),
        video.markers,
    )
    conversation = Conversation("prompt", (Turn("human", row["question"]),), len(files))
    pictures = [open_image(data, f"{number} of the prompt", most) for number, data in enumerate(files, 1)]
    model, processor, _ = load(config, checkpoint)
    with autocast(config, model):
        text = answer(model, processor, [conversation], [pictures], max_new_tokens, temperature)[0]
    say(text)
    if not text.strip():
        say("the answer is empty: the model ended it at once", file=sys.stderr)


def autocast(config: Config, model: EEMLLM) -> torch.autocast:
    """Evaluation computes in the precision of the training."""
    dtype = compute_dtype(config)
    return torch.autocast(model.device.type, dtype, enabled=dtype is not None)


def load(config: Config, checkpoint: str | None) -> tuple[EEMLLM, Processor, str]:
    """`run_model` on the device, and with the attention, of an evaluation.

    Raises:
        CheckpointError: the checkpoint does not fit, or was trained with other frozen parts.
        ConfigError: a package is missing.
    """
    require_fp8(config.model)
    model, processor, source = run_model(config, checkpoint)
    on_gpu = torch.cuda.is_available() and config.trainer.get("accelerator") != "cpu"
    model.to("cuda" if on_gpu else "cpu")
    model.set_attention(config.model.attention, compute_dtype(config), training=False)
    if config.model.fp8:
        use_fp8(model)
    model.record_steps = config.eval.cuda_graphs and model.device.type == "cuda"
    if config.eval.image_cache:
        model.image_cache = ImageCache(int(config.eval.image_cache * 2**30))
    return model, processor, source


def answer(
    model: EEMLLM,
    processor: Processor,
    conversations: Sequence[Conversation],
    images: Sequence[Sequence[Image.Image]],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[str]:
    """Generated answers; greedy when the temperature is 0."""
    return [text for text, _ in generated(model, processor, conversations, images, max_new_tokens, temperature)]


@torch.inference_mode()
def generated(
    model: EEMLLM,
    processor: Processor,
    conversations: Sequence[Conversation],
    images: Sequence[Sequence[Image.Image]],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[tuple[str, bool]]:
    """Answers, as `answer` gives them, and whether each has ended by itself."""
    inputs = processor.prompts(conversations, images, model.device)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    ids = model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens).cpu()
    length, stop_ids = inputs["input_ids"].shape[1], set(processor.template.stop_ids)
    ended = [not stop_ids.isdisjoint(row) for row in ids[:, length:].tolist()]
    return list(zip(processor.answers(ids, length), ended, strict=True))


def ask(
    model: EEMLLM, processor: Processor, max_new_tokens: int, max_pixels: int, questions: Sequence[Question]
) -> list[Reply]:
    """The replies to one batch."""
    replies: list[Reply] = []
    conversations, images = [], []
    for question in questions:
        conversation, name = question.conversation, question.conversation.key
        try:
            processor.template.encode(conversation, generation=True)  # refused here, not in a batch of many
            opened = [open_image(data, name, max_pixels) for data in question.images]
        except SampleError as error:
            replies.append((None, error.reason))
        else:
            replies.append(("", None))
            conversations.append(conversation)
            images.append(opened)
    found = iter(generated(model, processor, conversations, images, max_new_tokens) if conversations else [])
    for i, (text, _) in enumerate(replies):
        if text is not None:
            text, ended = next(found)
            replies[i] = text, None if ended else CUT
    return replies


def ask_set(
    model: EEMLLM,
    processor: Processor,
    source: QuestionSet,
    questions: Sequence[Question],
    config: Config,
    kept: Answers,
) -> tuple[list[Answered], list[Round], Counter[str]]:
    """The answers to a set, those with the images shuffled, and how many questions could not be asked, by reason."""
    one_batch = partial(ask, model, processor, source.max_new_tokens, config.data.max_image_pixels)

    def replies(asked: Sequence[Question], part: str) -> list[Reply]:
        batches = in_batches(asked, processor.transform.num_tokens, config.eval.batch_size)
        return ask_all(one_batch, asked, batches, kept, part)

    found = list(zip(questions, replies(questions, source.name), strict=True))
    answered = [
        Answered(source.name, question, text, cut=reason == CUT)
        for question, (text, reason) in found
        if text is not None
    ]
    if cut := sum(one.cut for one in answered):
        console.print(
            f"{source.name}: {cut:,} of {len(answered):,} answers did not end within max_new_tokens={source.max_new_tokens} "
            "and are scored as they were cut; allow more if answers may be longer"
        )
    rounds = list[Round]()
    for number in range(config.eval.control):
        shuffled = shuffle_images([one.question for one in answered], config.seed + number)
        again = zip(shuffled, replies(shuffled, f"{source.name}, images shuffled {number + 1}"), strict=True)
        rounds.append([(question, text) for question, (text, _) in again if text is not None])
    return answered, rounds, Counter(reason for _, (text, reason) in found if text is None and reason)


def validation_loss(model: EEMLLM, processor: Processor, config: Config) -> dict[str, float | None]:
    data = ShardDataModule(config.data, config.seed)
    data.connect(processor.template, model.vision.transform)
    found = losses(model, validation_packs(data), config.optim.val_batches)
    if found["loss_shuffled_images"] is not None:
        shuffled = found["loss_shuffled_images"]
        console.print(f"{config.data.val}: loss {found['loss']:.4f} a token; images shuffled {shuffled:.4f}")
    return found
