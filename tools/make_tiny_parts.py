"""Make tiny pretrained parts for a procedural set: a tokenizer, a vision encoder and a decoder, in transformers folders.

    python tools/make_tiny_parts.py [--set shapes] [--only tokenizer encoder decoder]

They stand for the pretrained SigLIP and Vicuna of a real run and know more of the set than those would:

* The encoder is trained on *labels of each patch*. It sees no question and no answer. For shapes, a patch is labelled with
  the whole object (colour, shape and quadrant; height of a bar; letters of a word): this nearly solves the vision
  beforehand. For puzzles, it is labelled with what it shows by itself (colour, part of an object, letter, its place), and
  attention is off in the encoder: no visual token knows another patch. A penalty on the features keeps them lean: with a
  large constant part in them, the decoder learns to look things up many times later.
* The decoder is trained on *text only*: questions of the set about scenes written in a shorthand, one word for each
  patch ("redcirclenorthwest empty ..."). It never sees a picture, but has learnt to look up, count and compare, as a
  language model has: with full self-attention.

No part sees a validation scene: all comes from `rows_and_scenes("train", ...)` of the set. Takes about eight minutes on
one core for shapes; the same versions and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data_recipes"))
import puzzles  # noqa: E402
import shapes  # noqa: E402

SEED = 20  # also of the scenes: the demo draws its own with seed 0
BOS, END, PAD, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{% elif message['role'] == 'assistant' %}<|assistant|>{% endif %}"
    "{{ message['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# ---------------------------------------------------------------- sets

Patch = dict[str, Any]
"""What a patch shows: name -> value."""


@dataclass(frozen=True)
class Subject:
    """A procedural set and how its parts are made.

    Args:
        source: its module.
        size: pixels of a picture, both ways.
        patch: pixels of a patch, both ways.
        labels: the classes of a patch; the first of each means nothing.
        patches: what each patch of a scene shows, in reading order.
        word: a patch in the shorthand.
        drilled: types of a third of the encoder's pictures: what is hardest to read.
        told: types of the decoder's questions, in turns.
        told_as: of `rows_and_scenes`, for scenes that are told.
        asked: questions about each of its scenes, at most.
        pictures: of a step of the encoder's training.
        alone: the encoder sees each patch alone.
        layers: of the encoder and of the decoder.
        steps: of the encoder and of the decoder.
        decoder_lr: the decoder's highest learning rate.
        folder: where the parts go.
    """

    source: ModuleType
    size: int
    patch: int
    labels: dict[str, tuple[Any, ...]]
    patches: Callable[[shapes.Scene], list[Patch]]
    word: Callable[[Patch], str]
    drilled: tuple[str, ...]
    told: tuple[str, ...]
    told_as: dict[str, int]
    asked: int
    pictures: int
    alone: bool
    layers: tuple[int, int]
    steps: tuple[int, int]
    decoder_lr: float
    folder: str


def shapes_patches(scene: shapes.Scene) -> list[Patch]:
    shown: list[Patch] = [{} for _ in range(shapes.GRID * shapes.GRID)]

    def put(rows: range, columns: range, patch: Patch) -> None:
        for row in rows:
            for column in columns:
                shown[shapes.GRID * row + column].update(patch)

    for place, item in enumerate(scene["items"]):
        if scene["kind"] == "objects":
            shown[item[0]] = {"colour": item[1], "shape": item[2], "place": shapes.quadrant(item[0])}
        elif scene["kind"] == "bars":
            top = shapes.SIZE - 2 - shapes.BAR_UNIT * item[1]
            rows = range(top // shapes.CELL, shapes.GRID)
            put(rows, range(place, place + 1), {"colour": item[0], "height": item[1]})
        else:
            left, top, right, bottom = shapes.word_box(item)
            rows = range(top // shapes.CELL, (bottom - 1) // shapes.CELL + 1)
            columns = range(left // shapes.CELL, (right - 1) // shapes.CELL + 1)
            put(rows, columns, {"colour": item[1], **{f"letter {n}": letter for n, letter in enumerate(item[0])}})
    return shown


def shapes_word(patch: Patch) -> str:
    if "letter 0" in patch:
        return "sign" + "".join(patch[f"letter {n}"] for n in range(3))
    if "height" in patch:
        return f"{patch['colour']}bar{'abcdefgh'[patch['height'] - 1]}"  # a word of letters is one token
    return patch["colour"] + patch["shape"] + patch["place"] if patch else "empty"


def puzzles_patches(scene: shapes.Scene) -> list[Patch]:
    rows = enumerate(puzzles.patches(scene))
    return [{**patch, "row": row, "column": column} for row, line in rows for column, patch in enumerate(line)]


def puzzles_word(patch: Patch) -> str:
    return patch.get("colour", "") + patch.get("part", patch.get("letter", "")) or "empty"


SUBJECTS = {
    "shapes": Subject(
        source=shapes,
        size=shapes.SIZE,
        patch=shapes.CELL,
        labels={
            "colour": ("", *shapes.COLOURS),
            "shape": ("", *shapes.SHAPES),
            "height": ("", *shapes.BAR_HEIGHTS),
            "place": ("", *shapes.QUADRANTS),  # of an object
            **{f"letter {n}": ("", *sorted({word[n] for word in shapes.WORDS})) for n in range(3)},
        },
        patches=shapes_patches,
        word=shapes_word,
        drilled=("word",),
        told=("colour", "shape", "position", "count", "colour", "shape", "position", "chart", "word", "compare"),
        told_as={},
        asked=1,
        pictures=128,
        alone=False,
        layers=(3, 3),
        steps=(1500, 3000),
        decoder_lr=1e-3,
        folder="parts",
    ),
    "puzzles": Subject(
        source=puzzles,
        size=shapes.CELL * puzzles.GRID,
        patch=puzzles.PATCH,
        labels={
            "colour": ("", *puzzles.COLOURS),
            "part": (
                *("", "full", "bar", "top"),
                *(half + corner for half in puzzles.HALVES[1:] for corner in puzzles.QUADRANTS),
            ),
            "letter": ("", *sorted({*puzzles.LETTERS, *"".join(puzzles.WORDS)})),
            "row": ("", *range(2 * puzzles.GRID)),
            "column": ("", *range(2 * puzzles.GRID)),
        },
        patches=puzzles_patches,
        word=puzzles_word,
        drilled=("word", "tallest", "outermost"),
        told=puzzles.TYPES,
        told_as={"grid": 4, "pictures": 2},  # a quarter of the patches
        asked=2 + puzzles.FURTHER_TURNS,
        pictures=32,
        alone=True,
        layers=(1, 3),
        steps=(1200, 2000),
        decoder_lr=1.5e-3,
        folder="parts_hard",
    ),
}


def patch_labels(subject: Subject, scene: shapes.Scene) -> np.ndarray:
    """[patches, labels] classes of what each patch shows; patches are in reading order."""
    shown = subject.patches(scene)
    return np.array([[known.index(patch.get(name, "")) for name, known in subject.labels.items()] for patch in shown])


# ---------------------------------------------------------------- tokenizer


def make_tokenizer(out: Path, subject: Subject) -> None:
    """Byte-level BPE trained on told rows: every word of the questions and of the shorthand becomes one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[PAD, BOS, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    usual = replace(subject, told_as={})  # pictures as the encoder sees them have words that told ones lack
    tokenizer.train_from_iterator(
        (t for _, *texts in told_rows(usual, "train", 8000, tuple(dict.fromkeys(subject.told))) for t in texts),
        trainer,
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)


# ---------------------------------------------------------------- vision encoder


def labelled_batches(
    subject: Subject, size: int, seed: int = SEED, split: str = "train"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (pixels [size, 3, height, width] in -1..1, classes [size, patches, labels]) of the scenes of a split."""
    source = subject.source
    every, drilled = (
        (scene for _, items in source.rows_and_scenes(split, sys.maxsize, seed, types) for scene in items)
        for types in (source.TYPES, subject.drilled)
    )
    while True:
        batch = [*islice(every, size - size // 3), *islice(drilled, size // 3)]
        pixels = np.stack([np.asarray(source.render(scene).convert("RGB")) for scene in batch])
        labels = np.stack([patch_labels(subject, scene) for scene in batch])
        yield torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(labels)


def make_encoder(out: Path, subject: Subject, lr: float = 1.5e-3) -> None:
    """A SigLIP vision tower trained to tell, from its last hidden state of a patch, what the patch shows."""
    torch.manual_seed(SEED)
    steps, labelled = subject.steps[0], subject.labels
    config = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=subject.layers[0],
        num_attention_heads=4,
        image_size=subject.size,
        patch_size=subject.patch,
        vision_use_head=False,
    )
    model = SiglipVisionModel(config)
    for name, parameter in model.named_parameters():
        if subject.alone and "self_attn.out_proj" in name:  # what attention adds is nothing, and stays so
            nn.init.zeros_(parameter).requires_grad_(False)
    heads = nn.ModuleList(nn.Linear(config.hidden_size, len(classes)) for classes in labelled.values())
    optimiser, schedule = adamw([p for m in (model, heads) for p in m.parameters() if p.requires_grad], lr, steps)
    start = time.monotonic()
    for step, (pixels, labels) in enumerate(islice(labelled_batches(subject, subject.pictures), steps), start=1):
        states = model(pixels, output_hidden_states=True).hidden_states[-1]
        loss = sum(cross_entropy(head(states).flatten(0, 1), labels[..., n].flatten()) for n, head in enumerate(heads))
        loss = loss + 0.05 * states.square().mean()  # lean features
        update(loss, optimiser, schedule)
        if step % 250 == 0:
            print(f"encoder step {step} loss {loss.item():.4f} ({time.monotonic() - start:.0f} s)", flush=True)
    with torch.no_grad():  # reported only: nothing is chosen by it
        pixels, labels = next(labelled_batches(subject, 400, split="val"))
        states = model(pixels, output_hidden_states=True).hidden_states[-1]
        for n, (name, head) in enumerate(zip(labelled, heads, strict=True)):
            something = labels[..., n] > 0
            right = (head(states).argmax(-1) == labels[..., n])[something].float().mean().item()
            print(f"encoder, validation scenes: {name} right in {right:.4f} of the patches that have one")
    model.save_pretrained(out)
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": subject.size, "width": subject.size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


# ---------------------------------------------------------------- decoder


def told_rows(
    subject: Subject, split: str, count: int, types: Sequence[str], seed: int = SEED
) -> Iterator[tuple[str, ...]]:
    """(type, question, answer, ...) of rows, each picture replaced by the words of its patches (" empty redbar ...")."""
    for row, shown in subject.source.rows_and_scenes(split, count, seed, types, **subject.told_as):
        question, *texts = (turn["value"] for turn in row["conversations"][: 2 * subject.asked])
        for scene in shown:
            told = "".join(f" {subject.word(patch)}" for patch in subject.patches(scene))
            question = question.replace("<image>", told, 1)
        yield row["type"], question, *texts


def answer_losses(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, told: Sequence[tuple[str, ...]]
) -> tuple[Tensor, dict[str, list[bool]]]:
    """Mean loss of the tokens of the answers, and for each type whether the answers of each row are all right."""
    loss, count, right = torch.zeros(()), 0, defaultdict(list)
    user, assistant = map(tokenizer.convert_tokens_to_ids, (USER, ASSISTANT))
    told = sorted(told, key=lambda row: sum(text.count(" ") for text in row))
    for rows in (told[n : n + 8] for n in range(0, len(told), 8)):  # of about the same length: little padding
        roles = [USER, ASSISTANT] * max(map(len, rows))
        texts = [
            BOS + "".join(f"{role}{text}{END}" for role, text in zip(roles, row[1:], strict=False)) for row in rows
        ]
        encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        ids, targets = encoded.input_ids[:, :-1], encoded.input_ids[:, 1:]
        asked, answered = ((ids == role).cumsum(1) for role in (user, assistant))
        supervised = (asked == answered) & (answered > 0) & (targets != user) & (encoded.attention_mask[:, 1:] > 0)
        states = model.model(input_ids=ids, attention_mask=encoded.attention_mask[:, :-1]).last_hidden_state
        logits = model.lm_head(states[supervised])
        loss = loss + cross_entropy(logits, targets[supervised], reduction="sum")
        count += len(logits)
        wrong = torch.zeros_like(supervised).masked_scatter(supervised, logits.argmax(-1) != targets[supervised])
        for row, bad in zip(rows, wrong.any(1).tolist(), strict=True):
            right[row[0]].append(not bad)
    return loss / count, right


def make_decoder(out: Path, subject: Subject, batch: int = 32) -> None:
    """A small Llama trained to answer told rows; only the answers are supervised."""
    torch.manual_seed(SEED)
    tokenizer, steps = PreTrainedTokenizerFast.from_pretrained(out), subject.steps[1]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=subject.layers[1],
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,  # the usual 0.02 does not learn in minutes at this width
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.05)
    optimiser, schedule = adamw(model.parameters(), subject.decoder_lr, steps)
    told, start = told_rows(subject, "train", steps * batch, subject.told), time.monotonic()
    for step in range(1, steps + 1):
        loss, _ = answer_losses(model, tokenizer, list(islice(told, batch)))
        update(loss, optimiser, schedule)
        if step % 250 == 0:
            print(f"decoder step {step} loss {loss.item():.4f} ({time.monotonic() - start:.0f} s)", flush=True)
    with torch.no_grad():
        rows = list(told_rows(subject, "val", 1600, subject.told))
        for kind, right in sorted(answer_losses(model, tokenizer, rows)[1].items()):
            score = sum(right) / len(right)
            print(f"decoder, validation scenes told in words: {kind} right in {score:.4f}")
    model.save_pretrained(out)


# ---------------------------------------------------------------- training


def adamw(
    parameters: Iterable[nn.Parameter], lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with 5 % warm-up and a cosine to zero."""
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    return optimiser, torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lr, steps, pct_start=0.05, cycle_momentum=False, div_factor=20
    )


def update(loss: Tensor, optimiser: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
    optimiser.step()
    schedule.step()
    optimiser.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--set", choices=list(SUBJECTS), default="shapes")
    parser.add_argument("--out", type=Path, help="default: data_recipes/parts, or parts_hard for puzzles")
    parser.add_argument(
        "--only", nargs="*", choices=["tokenizer", "encoder", "decoder"], default=["tokenizer", "encoder", "decoder"]
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    subject = SUBJECTS[arguments.set]
    out = arguments.out or ROOT / "data_recipes" / subject.folder
    if "tokenizer" in arguments.only:
        make_tokenizer(out / "decoder", subject)
    if "encoder" in arguments.only:
        make_encoder(out / "encoder", subject)
    if "decoder" in arguments.only:
        make_decoder(out / "decoder", subject)


if __name__ == "__main__":
    main()
