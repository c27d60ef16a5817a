"""Make the tiny pretrained parts of the shapes demo: a tokenizer, a vision encoder and a decoder, in transformers folders.

    python tools/make_tiny_parts.py [--out data_recipes/parts] [--only tokenizer encoder decoder]

They stand for the pretrained SigLIP and Vicuna of a real run and know more of the shapes set than those would:

* The encoder is trained on *labels of each 16 x 16 patch* (colour, shape and quadrant of an object, height of a bar,
  letters of a word). It sees no question and no answer, but this nearly solves the vision beforehand. A penalty on the
  features keeps them lean: with a large constant part in them, the decoder learns to look things up many times later.
* The decoder is trained on *text only*: questions of the set about scenes written in a shorthand, one word for each
  patch ("redcirclenorthwest empty ..."). It never sees a picture, but has learnt to look up, count and compare, as a
  language model has.

No part sees a validation scene: all comes from `shapes.rows_and_scenes("train", ...)`, whose scenes are those with
``is_val(scene) == False``. Takes about eight minutes on one core; the same versions and number of threads give the same
weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data_recipes"))
import shapes  # noqa: E402

SEED = 20  # also of the scenes: the demo draws its own with seed 0
BOS, END, PAD, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{% elif message['role'] == 'assistant' %}<|assistant|>{% endif %}"
    "{{ message['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# ---------------------------------------------------------------- tokenizer


def make_tokenizer(out: Path) -> None:
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
    tokenizer.train_from_iterator(
        (t for _, *texts in told_rows("train", 8000, SEED, shapes.TYPES) for t in texts), trainer
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

LABELS = {  # the classes of a patch; class 0 of each means nothing
    "colour": ("", *shapes.COLOURS),
    "shape": ("", *shapes.SHAPES),
    "height": ("", *shapes.BAR_HEIGHTS),
    "place": ("", *shapes.QUADRANTS),  # of an object
    **{f"letter {n}": ("", *sorted({word[n] for word in shapes.WORDS})) for n in range(3)},
}


def patch_labels(scene: shapes.Scene) -> np.ndarray:
    """[16 patches, len(LABELS)] classes of what each patch shows; patches are in reading order."""
    classes = np.zeros((shapes.GRID, shapes.GRID, len(LABELS)), dtype=np.int64)
    names = list(LABELS)

    def put(rows: slice, columns: slice, **values: str | int) -> None:
        for name, value in values.items():
            name = name.replace("_", " ")
            classes[rows, columns, names.index(name)] = LABELS[name].index(value)

    for place, item in enumerate(scene["items"]):
        if scene["kind"] == "objects":
            row, column = divmod(item[0], shapes.GRID)
            where = slice(row, row + 1), slice(column, column + 1)
            put(*where, colour=item[1], shape=item[2], place=shapes.quadrant(item[0]))
        elif scene["kind"] == "bars":
            top = shapes.SIZE - 2 - shapes.BAR_UNIT * item[1]
            put(slice(top // shapes.CELL, None), slice(place, place + 1), colour=item[0], height=item[1])
        else:
            word, colour = item[:2]
            left, top, right, bottom = shapes.word_box(item)
            rows = slice(top // shapes.CELL, (bottom - 1) // shapes.CELL + 1)
            columns = slice(left // shapes.CELL, (right - 1) // shapes.CELL + 1)
            put(rows, columns, colour=colour, letter_0=word[0], letter_1=word[1], letter_2=word[2])
    return classes.reshape(-1, len(LABELS))


def labelled_batches(size: int, seed: int, split: str = "train") -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (pixels [size, 3, 64, 64] in -1..1, classes [size, 16, len(LABELS)]) of the scenes of a split.

    A third are additional words, which are the hardest to read.
    """
    every, words = (
        (scene for _, items in shapes.rows_and_scenes(split, sys.maxsize, seed, types) for scene in items)
        for types in (shapes.TYPES, ("word",))
    )
    while True:
        batch = [*islice(every, size - size // 3), *islice(words, size // 3)]
        pixels = np.stack([np.asarray(shapes.render(scene).convert("RGB")) for scene in batch])
        labels = np.stack([patch_labels(scene) for scene in batch])
        yield torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(labels)


def make_encoder(out: Path, steps: int = 1500, batch: int = 128, lr: float = 1.5e-3) -> None:
    """A SigLIP vision tower trained to tell, from its last hidden state of a patch, what the patch shows."""
    torch.manual_seed(SEED)
    config = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=shapes.SIZE,
        patch_size=shapes.CELL,
        vision_use_head=False,
    )
    model = SiglipVisionModel(config)
    heads = nn.ModuleList(nn.Linear(config.hidden_size, len(classes)) for classes in LABELS.values())
    optimiser, schedule = adamw([*model.parameters(), *heads.parameters()], lr, steps)
    start = time.monotonic()
    for step, (pixels, labels) in enumerate(islice(labelled_batches(batch, SEED), steps), start=1):
        states = model(pixels, output_hidden_states=True).hidden_states[-1]
        loss = sum(cross_entropy(head(states).flatten(0, 1), labels[..., n].flatten()) for n, head in enumerate(heads))
        loss = loss + 0.05 * states.square().mean()  # lean features
        update(loss, optimiser, schedule)
        if step % 250 == 0:
            print(f"encoder step {step} loss {loss.item():.4f} ({time.monotonic() - start:.0f} s)", flush=True)
    with torch.no_grad():  # reported only: nothing is chosen by it
        pixels, labels = next(labelled_batches(2000, SEED, "val"))
        states = model(pixels, output_hidden_states=True).hidden_states[-1]
        for n, (name, head) in enumerate(zip(LABELS, heads, strict=True)):
            something = labels[..., n] > 0
            right = (head(states).argmax(-1) == labels[..., n])[something].float().mean().item()
            print(f"encoder, validation scenes: {name} right in {right:.4f} of the patches that have one")
    model.save_pretrained(out)
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": shapes.SIZE, "width": shapes.SIZE},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


# ---------------------------------------------------------------- decoder


TOLD_TYPES = ("colour", "shape", "position", "count", "colour", "shape", "position", "chart", "word", "compare")


def shorthand(scene: shapes.Scene) -> str:
    """One word for each patch in reading order, each with a space before it: " empty redcirclenortheast empty"."""
    words = []
    for patch in patch_labels(scene):
        told = {name: str(LABELS[name][n]) for name, n in zip(LABELS, patch, strict=True)}
        letters = "".join(told[f"letter {n}"] for n in range(3))
        if letters:
            words.append(f"sign{letters}")
        elif told["height"]:
            words.append(f"{told['colour']}bar{'abcdefgh'[int(told['height']) - 1]}")  # a word of letters is one token
        else:
            words.append(told["colour"] + told["shape"] + told["place"] or "empty")
    return " " + " ".join(words)


def told_rows(split: str, count: int, seed: int, types: Sequence[str] = TOLD_TYPES) -> Iterator[tuple[str, str, str]]:
    """(type, question, answer) of rows with each picture replaced by its shorthand."""
    for row, shown in shapes.rows_and_scenes(split, count, seed, types):
        question, answer = (turn["value"] for turn in row["conversations"][:2])
        for scene in shown:
            question = question.replace("<image>", shorthand(scene), 1)
        yield row["type"], question, answer


def answer_losses(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, told: list[tuple[str, str, str]]
) -> tuple[Tensor, Tensor]:
    """Mean loss of the tokens of the answers, and [len(told)] whether each is right throughout."""
    texts = [f"{BOS}{USER}{question}{END}{ASSISTANT}{answer}{END}" for _, question, answer in told]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids = encoded.input_ids
    logits, targets = model(input_ids=ids, attention_mask=encoded.attention_mask).logits[:, :-1], ids[:, 1:]
    answered = (ids == tokenizer.convert_tokens_to_ids(ASSISTANT)).cumsum(1)[:, :-1] > 0
    answered &= encoded.attention_mask[:, 1:] > 0
    right = ((logits.argmax(-1) == targets) | ~answered).all(1)
    return cross_entropy(logits[answered], targets[answered]), right


def make_decoder(
    out: Path, tokenizer: PreTrainedTokenizerFast, steps: int = 3000, batch: int = 32, lr: float = 1e-3
) -> None:
    """A small Llama trained to answer told rows; only the answers are supervised."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
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
    optimiser, schedule = adamw(model.parameters(), lr, steps)
    told, start = told_rows("train", steps * batch, SEED), time.monotonic()
    for step in range(1, steps + 1):
        loss, _ = answer_losses(model, tokenizer, list(islice(told, batch)))
        update(loss, optimiser, schedule)
        if step % 250 == 0:
            print(f"decoder step {step} loss {loss.item():.4f} ({time.monotonic() - start:.0f} s)", flush=True)
    with torch.no_grad():
        rows = list(told_rows("val", 1600, SEED))
        _, right = answer_losses(model, tokenizer, rows)
        for kind in dict.fromkeys(TOLD_TYPES):
            score = right[torch.tensor([row[0] == kind for row in rows])].float().mean().item()
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
    parser.add_argument("--out", type=Path, default=ROOT / "data_recipes" / "parts")
    parser.add_argument(
        "--only", nargs="*", choices=["tokenizer", "encoder", "decoder"], default=["tokenizer", "encoder", "decoder"]
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if "tokenizer" in arguments.only:
        make_tokenizer(arguments.out / "decoder")
    if "encoder" in arguments.only:
        make_encoder(arguments.out / "encoder")
    if "decoder" in arguments.only:
        make_decoder(arguments.out / "decoder", PreTrainedTokenizerFast.from_pretrained(arguments.out / "decoder"))


if __name__ == "__main__":
    main()
