"""transformers' doors: Auto classes, pipeline, trainers and the hub open and write the folder of an EEMLLM; against our own names."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from lib.chat import chatml, sentencepiece_bpe
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from lit_eemllm import doors
from lit_eemllm.data.packing import collate
from lit_eemllm.data.samples import EncodedSample, TokenSample
from lit_eemllm.errors import ConfigError, SampleError
from lit_eemllm.inputs.conversation import Conversation, Turn
from lit_eemllm.inputs.spans import IMAGE_SLOT
from lit_eemllm.layout import PackedBatch
from lit_eemllm.model import EEMLLM, EEMLLMConfig, Processor
from lit_eemllm.model.build import build

CHATS = [
    (Turn("human", "<image>\nWhat colour is it?"), Turn("gpt", "Red.")),
    (Turn("human", "Is it big?"), Turn("gpt", "No, it is left of it.")),
    (
        Turn("system", "Be short."),
        Turn("human", "<image>\nWhat is <image>\nin this picture?"),
        Turn("gpt", "A square"),
        Turn("human", "Is it blue?"),
        Turn("gpt", "It is green."),
    ),
]
PICTURES = [
    [Image.new("RGB", (32, 24), "red")],
    [],
    [Image.new("RGB", (20, 40), "blue"), Image.new("RGB", (8, 8), "green")],
]
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def conversations(asked: bool = False) -> list[Conversation]:
    return [Conversation(str(i), turns[: -1 if asked else None], len(PICTURES[i])) for i, turns in enumerate(CHATS)]


def messages(chat: int, asked: bool = False) -> list[dict[str, Any]]:
    """As transformers has them: typed parts where there is an image."""
    left, found = iter(PICTURES[chat]), []
    for turn in CHATS[chat][: -1 if asked else None]:
        first, *rest = turn.text.split("<image>\n")
        content: Any = [{"type": "text", "text": first}] * bool(first)
        for text in rest:
            content += [{"type": "image", "image": next(left)}, {"type": "text", "text": text}]
        found.append({"role": ROLES[turn.role], "content": content if rest else turn.text})
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> tuple[Path, EEMLLM, Processor]:
    """A folder, and what is in it."""
    folder = tmp_path_factory.mktemp("doors")
    torch.manual_seed(0)
    model, processor = build(tiny.config(parts, "x", folder, "model.template=vicuna_v1").model)
    model.eval().save_pretrained(folder / "whole")
    processor.save_pretrained(folder / "whole")
    return folder / "whole", model, processor


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import lit_eemllm", "from transformers import AutoConfig"])
def test_doors_open_in_either_order(made: tuple[Path, EEMLLM, Processor], first: str) -> None:
    code = f"""{first}
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
import lit_eemllm, sys
assert "lit_eemllm.model" not in sys.modules
made = AutoProcessor.from_pretrained({str(made[0])!r})
config = AutoConfig.for_model("eemllm", image_token_id=7)
assert type(AutoModelForImageTextToText.from_pretrained({str(made[0])!r})).__name__ == "EEMLLM"
print(type(made).__module__, type(config).__module__, config.image_token_id)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "lit_eemllm.model.processor lit_eemllm.model.configuration 7\n", done.stderr


def test_the_module_that_is_waited_for_is_that_of_auto_config() -> None:
    assert import_module(doors.AUTO).AutoConfig is AutoConfig


def test_the_watch_leaves_when_it_has_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(doors, "tell", lambda: told.append(1))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    monkeypatch.setattr(doors, "AUTO", "colorsys")
    before = list(sys.meta_path)
    doors.open_doors()
    import_module("wave" if sys.version_info < (3, 13) else "this")
    assert told == [] and len(sys.meta_path) == len(before) + 1
    assert find_spec("colorsys") is not None and told == []  # somebody only looks
    assert import_module("colorsys").rgb_to_hls(0, 0, 0) == (0, 0, 0)
    assert told == [1] and sys.meta_path == before
    doors.open_doors()  # it is there already
    assert told == [1, 1] and sys.meta_path == before


def test_auto_classes_give_the_same(made: tuple[Path, EEMLLM, Processor]) -> None:
    folder, model, processor = made
    assert type(AutoConfig.from_pretrained(folder)) is EEMLLMConfig
    theirs, found = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    assert type(theirs) is EEMLLM and type(found) is Processor and theirs.name_or_path == str(folder)
    assert found.fingerprint() == processor.fingerprint() and found.transform == processor.transform
    assert found.template.fingerprint() == processor.template.fingerprint()
    options = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    given = found.apply_chat_template([messages(i, True) for i in range(3)], **options)
    ours = processor.prompts(conversations(asked=True), PICTURES)
    assert given.keys() == ours.keys() and all(given[name].equal(ours[name]) for name in ours)
    with torch.no_grad():
        assert theirs(**given).logits.equal(model(**ours).logits)
    settings = dict(do_sample=False, max_new_tokens=6)
    assert theirs.generate(**given, **settings).equal(model.generate(**ours, **settings))
    asked = pipeline("image-text-to-text", model=str(folder), device="cpu")(
        text=[messages(i, True) for i in range(3)], **settings, return_full_text=False
    )
    said = [processor.prompts([one], [shown]) for one, shown in zip(conversations(asked=True), PICTURES, strict=True)]
    answers = [processor.answers(model.generate(**one, **settings), one["input_ids"].shape[1])[0] for one in said]
    assert [reply[0]["generated_text"].strip() for reply in asked] == answers


def test_types_and_settings_of_the_folder_are_kept(made: tuple[Path, EEMLLM, Processor], tmp_path: Path) -> None:
    model = copy.deepcopy(made[1]).bfloat16()
    model.save_pretrained(tmp_path)
    found, ours = AutoModelForImageTextToText.from_pretrained(tmp_path), EEMLLM.from_pretrained(tmp_path)
    assert found.dtype == ours.dtype == torch.bfloat16
    assert found.generation_config.eos_token_id == model.generation_config.eos_token_id == made[2].template.stop_ids
    assert AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


KINDS = {
    "begins with a token": (lambda: sentencepiece_bpe(legacy=False), "vicuna_v1"),
    "begins with a token, legacy": (lambda: sentencepiece_bpe(legacy=True), "vicuna_v1"),
    "plain": (lambda: sentencepiece_bpe(legacy=True), "plain"),
    "its own template": (chatml, "jinja"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoder", ["clip", "siglip2", "anyres"])
def test_processors_of_all_kinds(kind: str, encoder: str, tmp_path: Path) -> None:
    """A folder gives the same processor, whose texts and messages give the ids of training, and say what is trained."""
    make, template = KINDS[kind]
    tokenizer, model = make(), tiny.model(encoder=encoder)
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model.config.save_pretrained(tmp_path)
    processor = Processor(tokenizer, template, model.vision.transform, model.config.image_token_id)
    processor.save_pretrained(tmp_path)
    found = AutoProcessor.from_pretrained(tmp_path)
    assert found.transform == processor.transform and found.to_dict() == {"template": template}
    assert found.template.fingerprint() == processor.template.fingerprint()
    options = dict(tokenize=True, return_dict=True)
    for i, (one, shown) in enumerate(zip(conversations(), PICTURES, strict=True)):
        if template == "plain" and i:
            continue
        prompt, ours = Conversation(one.key, one.turns[:-1], one.num_images), processor.prompts([one], [shown])
        given = found.apply_chat_template(messages(i, True), **options)
        text = found.apply_chat_template(messages(i, True), tokenize=False)
        assert text == found.begin + "".join(span.text for span in processor.template.render(prompt))
        again = found(text=text, images=shown or None, return_tensors="pt", add_special_tokens=False)
        for inputs in (given, again):
            assert inputs.keys() == ours.keys() and inputs["input_ids"].equal(ours["input_ids"])
            assert inputs.get("image_sizes") == ours.get("image_sizes")
        # all of it, by our own encoder
        sizes = [found.transform.size_among(picture.size, len(shown)) for picture in shown]
        whole = processor.template.encode(one)
        whole = whole.with_pieces([found.transform.pieces(*size) for size in sizes], processor.template.text_ids)
        trained = found.apply_chat_template(messages(i), **options, return_assistant_tokens_mask=True)
        ids, mask = trained["input_ids"][0], trained["assistant_masks"][0].bool()
        assert [x for x in ids.tolist() if x != found.image_token_id] == [x for x in whole.ids if x != IMAGE_SLOT]
        assert (ids == found.image_token_id).sum() == sum(whole.runs)
        assert ids[mask].tolist() == [x for x, flag in zip(whole.ids, whole.supervised, strict=True) if flag]
        # what a program reads that knows the tokenizer alone
        plain = [{"role": m["role"], "content": turn.text} for m, turn in zip(messages(i), one.turns, strict=True)]
        assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
            plain, tokenize=False
        ) == found.apply_chat_template(messages(i), tokenize=False)


def test_padding_and_cutting(made: tuple[Path, EEMLLM, Processor]) -> None:
    processor = made[2]
    alone = [processor(text=text)["input_ids"][0] for text in ("Is it big?", "It is red, green or blue.")]
    right = processor(text=["Is it big?", "It is red, green or blue."], padding_side="right", pad_to_multiple_of=8)
    assert right["input_ids"].shape[1] == -(-max(map(len, alone)) // 8) * 8
    for ids, row, mask in zip(alone, right["input_ids"], right["attention_mask"], strict=True):
        assert row[: len(ids)].equal(ids) and not row[len(ids) :].any()
        assert mask.tolist() == [1] * len(ids) + [0] * (len(row) - len(ids))
    assert processor(text="It is red", truncation=True, max_length=2)["input_ids"].shape == (1, 2)


def test_what_cannot_be_done_is_said(made: tuple[Path, EEMLLM, Processor], tmp_path: Path) -> None:
    processor = made[2]
    with pytest.raises(ValueError, match="found 0 images, expected one for each <image> in the text: 1"):
        processor(text="<image>\nWhat?")
    with pytest.raises(ValueError, match=r"found 'https://x/a\.png', expected a path or a picture; nothing is fetched"):
        processor(text="<image>\nWhat?", images="https://x/a.png")
    with pytest.raises(ValueError, match="found tools, continue_final_message, expected"):
        processor.apply_chat_template(messages(0), tools=[1], continue_final_message=True)
    with pytest.raises(ValueError, match="add_generation_prompt: found a conversation that ends with an answer"):
        processor.apply_chat_template(messages(0), add_generation_prompt=True)
    with pytest.raises(SampleError, match="which would act as a control token"):
        processor.apply_chat_template([{"role": "user", "content": "a</s>b"}])
    with pytest.raises(SampleError, match="a part of a message has the type 'audio'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}])
    with pytest.raises(SampleError, match=r"turns must alternate human, gpt, .* not \[\]"):
        processor.apply_chat_template([])
    with pytest.raises(ConfigError, match=r"^Processor\.from_pretrained: .*no such folder"):
        Processor.from_pretrained(tmp_path / "gone")
    Image.new("RGB", (32, 24), "red").save(tmp_path / "a.png")
    found = processor(text="<image>\nWhat?", images=str(tmp_path / "a.png"))
    assert found["pixel_values"].equal(processor(text="<image>\nWhat?", images=PICTURES[0])["pixel_values"])


def test_folders_of_older_versions_open(made: tuple[Path, EEMLLM, Processor], tmp_path: Path) -> None:
    """They have no processor_config.json, and no template but the tokenizer's own."""
    made[1].config.save_pretrained(tmp_path)
    made[2].tokenizer.save_pretrained(tmp_path)
    assert Processor.from_pretrained(tmp_path).template.name == "vicuna_v1"


# --- trainers
def packed(processor: Processor, chats: list[int]) -> PackedBatch:
    """The conversations on our own way to the model."""
    samples = []
    for i in chats:
        transform, shown = processor.transform, PICTURES[i]
        text = processor.template.encode(conversations()[i])
        sizes = [picture.size for picture in shown]
        text = text.with_pieces([transform.pieces(*size) for size in sizes], processor.template.text_ids)
        tokens = TokenSample(str(i), text.ids, text.supervised, text.runs, [], text.images, len(shown))
        samples.append(EncodedSample(tokens, [transform(picture) for picture in shown], sizes))
    return collate(samples)


def stepped(model: EEMLLM, batch: PackedBatch, rate: float) -> tuple[float, dict[str, Tensor]]:
    """The mean loss, and the weights after a step of plain gradient descent."""
    model.train().zero_grad()
    loss = model.packed_loss(batch) / batch.num_targets
    loss.backward()
    return loss.item(), {
        name: p - rate * p.grad if p.grad is not None else p.clone() for name, p in model.named_parameters()
    }


def assert_stepped(model: EEMLLM, true: dict[str, Tensor], start: EEMLLM) -> None:
    before, moved = dict(start.named_parameters()), 0
    for name, parameter in model.named_parameters():
        moved += not true[name].equal(before[name])
        assert (parameter - true[name]).abs().max() <= 1e-5 * (1e-2 + (true[name] - before[name]).abs().max()), name
    assert moved > 30


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainers_first_step_is_ours(made: tuple[Path, EEMLLM, Processor], tmp_path: Path, accumulate: int) -> None:
    folder, original, _ = made
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)

    def padded(rows: list[dict[str, Any]]) -> Any:
        options = dict(tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        found = processor.apply_chat_template(
            [messages(row["chat"]) for row in rows], **options, processor_kwargs={"padding_side": "right"}
        )
        found["labels"] = found["input_ids"].masked_fill(found.pop("assistant_masks") == 0, -100)
        return found

    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4 // accumulate, gradient_accumulation_steps=accumulate, max_steps=1,
        learning_rate=0.1, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, remove_unused_columns=False, use_cpu=True,
        logging_steps=1, report_to="none", save_strategy="steps", save_steps=1, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"chat": chat} for chat in (0, 1, 2, 1)]
    trainer = Trainer(model, arguments, padded, rows, processing_class=processor)
    loss, true = stepped(copy.deepcopy(original), packed(made[2], [0, 1, 2, 1]), 0.1)
    trainer.train()
    (logged,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(loss, rel=1e-5)
    assert_stepped(trainer.model, true, original)
    saved = tmp_path / "checkpoint-1"
    again = AutoModelForImageTextToText.from_pretrained(saved).state_dict()
    assert all(x.equal(again[name]) for name, x in trainer.model.state_dict().items())
    assert AutoProcessor.from_pretrained(saved).to_dict() == {"template": "vicuna_v1"}
    assert trainer.evaluate(rows)["eval_loss"] < loss


@pytest.mark.slow
@pytest.mark.extras
def test_a_step_of_trl_is_ours(made: tuple[Path, EEMLLM, Processor], tmp_path: Path) -> None:
    """Prompts and completions: what is trained are the completions."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    folder, original, _ = made
    processor = AutoProcessor.from_pretrained(folder)
    rows = [
        {"prompt": [{"role": ROLES[turns[0].role], "content": turns[0].text.removeprefix("<image>\n")}],
         "completion": [{"role": "assistant", "content": turns[1].text}], "images": PICTURES[i]}
        for i, turns in enumerate(CHATS[:2])
    ]  # fmt: skip
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=1, learning_rate=0.1, lr_scheduler_type="constant",
        optim="sgd", max_grad_norm=0.0, use_cpu=True, bf16=False, logging_steps=1, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(folder)
    trainer = trl.SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=processor)
    loss, true = stepped(copy.deepcopy(original), packed(made[2], [0, 1]), 0.1)
    trainer.train()
    (logged,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert model.activation_checkpointing and logged == pytest.approx(loss, rel=1e-4)
    assert_stepped(trainer.model, true, original)


# --- the hub
def test_what_is_pushed_is_all_that_is_needed(
    made: tuple[Path, EEMLLM, Processor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Model and processor, one after the other, as `push_to_hub` has them; the files are caught on their way."""
    from huggingface_hub import HfApi, ModelCard

    def commit(self: HfApi, repo_id: str, operations: list[Any], **options: Any) -> Any:
        for operation in operations:
            place = tmp_path / operation.path_in_repo
            place.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                place.write_bytes(file.read())

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(
        ModelCard, "load", lambda *arguments, **options: ModelCard("---\nlicense: mit\n---\n# a card\n")
    )
    made[1].push_to_hub("me/mine")
    made[2].push_to_hub("me/mine")
    files = {path.name for path in made[0].iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == files | {"README.md"}
    assert files == {
        "config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    found = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    assert all(x.equal(found[name]) for name, x in made[1].state_dict().items())
    assert AutoProcessor.from_pretrained(tmp_path).fingerprint() == made[2].fingerprint()
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
