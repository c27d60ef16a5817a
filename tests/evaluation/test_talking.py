"""Talking with a run in the terminal: what is said is what `generate` says, whatever is typed."""

from __future__ import annotations

import io
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import tiny
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipVisionConfig, SiglipVisionModel

from lit_eemllm import cli
from lit_eemllm.compat.transformers import CACHE
from lit_eemllm.errors import ConfigError, SampleError, UserError
from lit_eemllm.evaluation.chat import Chat, Listener, _obey, answer_aloud, leading_pictures
from lit_eemllm.evaluation.run import UNTRAINED, answer, load
from lit_eemllm.inputs.conversation import IMAGE, Conversation, Turn


@pytest.fixture
def talk(dense_run):
    model, processor, _ = load(dense_run, None)
    return Chat(model, processor, dense_run, "llava")


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "my photo's.png"
    Image.new("RGB", (40, 20), "red").save(path)
    return path


def truth(talk, turns, pictures, tokens):
    conversation = Conversation(
        "k", tuple(Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(turns)), len(pictures)
    )
    return answer(talk.model, talk.processor, [conversation], [pictures], tokens)[0]


def test_turns_stream_what_generate_says(talk, photo):
    said: list[str] = []
    talk.show(photo)
    cost = talk.ask("What is it?", 12, said.append)
    first, picture = f"{IMAGE}\nWhat is it?", Image.open(photo)
    assert "".join(said) == truth(talk, [first], [picture], 12) == talk.turns[1].text and len(said) > 2
    assert re.search(r" KiB, [\d.]+ tokens/s$", str(cost)), "of eight tokens and more"
    assert (cost.visual, cost.tokens, talk.shown) == (16, 12, []) and cost.prefill > 0 and cost.seconds > 0
    inputs = talk.processor.prompts([Conversation("k", (Turn("human", first),), 1)], [[picture]])
    assert cost.text == inputs["input_ids"].shape[1] - 16
    with torch.inference_mode():
        kept = talk.model(**inputs, use_cache=True)[CACHE].num_bytes / inputs["input_ids"].shape[1]
    assert cost.cache == kept * (
        cost.text + cost.visual + cost.tokens - 1
    )  # the last token is not run through the layers
    again: list[str] = []
    talk.show(photo)
    talk.ask("And?", 5, again.append)
    second = truth(talk, [first, "".join(said), f"{IMAGE}\nAnd?"], [picture, picture], 5)
    assert "".join(again) == second and len(talk.turns) == 4 and len(talk.pictures) == 2
    talk.reset()
    assert (talk.turns, talk.pictures) == ([], [])


def test_a_mechanism_is_switched_without_a_weight(talk, photo):
    weights = {name: x.clone() for name, x in talk.model.state_dict().items()}
    ways = talk.ways()
    assert {"llava", "ee_mllm", "vica", "pyramid_drop"} <= set(ways) and not {"flamingo", "saisa", "casa"} & set(ways)
    with pytest.raises(ConfigError, match=r"vika: with these weights one of llava, .*; did you mean vica\?"):
        talk.switch("vika")
    found = {}
    for way in ways:
        talk.switch(way)
        talk.show(photo)
        cost = talk.ask("What is it?", 6, lambda _: None)
        found[way] = cost.cache
        assert talk.turns[-1].text == truth(talk, [f"{IMAGE}\nWhat is it?"], [Image.open(photo)], 6)
        talk.reset()
    assert found["withdrawal"] < found["llava"] == found["naavit"]
    assert all(x.equal(weights[name]) for name, x in talk.model.state_dict().items())


@pytest.mark.parametrize(("way", "least", "most"), [("ee_mllm", 0.0, 0.1), ("llava", 1.0, 1.1)])
def test_a_second_question_about_a_picture_computes_its_text_alone(way, least, most, tmp_path):
    """Counted in FLOPs, encoder included: of 1,600 visual tokens nothing is computed again where the cache may keep them."""
    tiny.write_parts(tmp_path, max_position_embeddings=2048)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    vision = SiglipVisionConfig(**sizes, image_size=160, patch_size=4, vision_use_head=False)
    SiglipVisionModel(vision).save_pretrained(tmp_path / "encoder")
    preprocessor = (tmp_path / "encoder" / "preprocessor_config.json").read_text()
    (tmp_path / "encoder" / "preprocessor_config.json").write_text(preprocessor.replace("16", "160"))
    config = tiny.config(tmp_path, "nowhere", tmp_path / "run", f"model.mechanism.preset={way}")
    model, processor, _ = load(config, UNTRAINED)
    pictures, flops, costs = [[Image.new("RGB", (40, 20), "red")]], [], []
    for text in ("What is it?", "And which colour does it have?"):
        asked, listener = Conversation("k", (Turn("human", f"{IMAGE}\n{text}"),), 1), Listener(processor, str, 1)
        with FlopCounterMode(display=False) as count:
            costs += answer_aloud(model, processor, config, [asked], pictures, [listener])
        flops.append(count.get_total_flops())
    assert least <= flops[1] / flops[0] <= most
    assert [cost.visual for cost in costs] == [1600, 1600] and [cost.known for cost in costs] == [
        0,
        1600 * (way == "ee_mllm"),
    ]


def test_what_cannot_be_asked_leaves_the_conversation(talk, photo):
    talk.show(photo)
    with pytest.raises(SampleError, match="control token"):
        talk.ask("</s>", 4, lambda _: None)
    assert (talk.turns, talk.pictures, len(talk.shown)) == ([], [], 1)  # the picture waits for a better question


def test_half_a_character_waits_for_its_other_half():
    texts = iter(["a", "a\ufffd", "a\u00e9", "a\u00e9\ufffd", "a\u00e9\ufffd"])
    said: list[str] = []
    template = SimpleNamespace(stop_ids=[9], lead="")
    listener = Listener(SimpleNamespace(answers=lambda ids, start: [next(texts)], template=template), said.append, 5)
    for token in range(6):
        listener.hear(token)
    assert said == ["a", "\u00e9", "\ufffd"] and (listener.ids, listener.ended) == ([0, 1, 2, 3, 4], "length")


def test_a_picture_that_is_not_there_is_no_word(talk, capsys):
    with pytest.raises(UserError, match=r"^gone\.png: no such file$"):
        _obey(talk, "gone.png What is it?", 2)
    _obey(talk, "What is gone.png?", 2)
    assert talk.turns[0].text == "What is gone.png?"


def test_what_comes_before_an_answer_proper_is_not_said():
    """Qwen3's empty block of thoughts, which `answers` takes off; what only begins like it is."""
    for texts, heard in (
        (["<think>", "<think>\n", "<think>\n\n</think>", "", "Yes", "Yes."], ["Yes", "."]),
        (["<thi", "<this", "<this>"], ["<this", ">"]),
        (["<thi", "<thi"], ["<thi"]),
    ):
        left, said = iter(texts), list[str]()
        template = SimpleNamespace(stop_ids=[9], lead="<think>\n\n</think>")
        processor = SimpleNamespace(answers=lambda ids, start, left=left: [next(left)], template=template)
        listener = Listener(processor, said.append, len(texts))
        for token in range(len(texts)):
            listener.hear(token)
        assert said == heard


def test_an_answer_that_is_interrupted_stands(talk):
    said: list[str] = []

    def write(text):
        said.append(text)
        if len(said) == 3:
            raise KeyboardInterrupt

    cost = talk.ask("What?", 50, write)
    assert talk.turns[-1] == Turn("gpt", "".join(said[:2])) and cost.tokens < 50


def test_a_batch_ends_with_the_last_that_somebody_waits_for(talk):
    """Not with the longest that was allowed, and each answer is as long as it may be."""
    passes = []
    talk.model.register_forward_hook(lambda *_: passes.append(1))
    short = Listener(talk.processor, str, 2)
    left = Listener(talk.processor, str, 50, lambda: len(left.ids) >= 5)
    asked = [Conversation("k", (Turn("human", text),), 0) for text in ("What?", "Is it a circle?")]
    costs = answer_aloud(talk.model, talk.processor, talk.config, asked, [[], []], [short, left])
    assert (short.ended, costs[0].tokens, left.ended) == ("length", 2, "") and len(passes) in (5, 6)


def test_paths_as_terminals_write_them(photo, monkeypatch):
    plain = photo.with_name("a.png")
    Image.new("RGB", (4, 4)).save(plain)
    escaped = re.sub(r"([ '])", r"\\\1", str(photo))
    for text in (f'"{photo}"', shlex.quote(str(photo)), escaped, f"file://{quote(str(photo))}"):
        assert leading_pictures(f" {text}  what is {plain}? ") == ([photo], f"what is {plain}?")
    assert leading_pictures(f"{plain} {escaped}") == ([plain, photo], "")
    monkeypatch.setenv("HOME", str(plain.parent))
    assert leading_pictures("~/a.png what?") == ([Path("~/a.png").expanduser()], "what?")
    for text in ("what?", "what's this?", "", "/no/such.png", "'" * 3, "x" * 5000, "\0 nul"):
        assert leading_pictures(text) == ([], text.strip())


def test_a_session(dense_run, photo, monkeypatch, capsys):
    lines = [
        "/help", f"{shlex.quote(str(photo))} What is it?", "/mechanism", "/mechanism vica", "And now?", "/mechanisn", "/image nothing.png",
        "</s>", "/reset", f'/image "{photo}"', "one\x1b[31m", "/exit", "never asked",
    ]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert cli.main(["chat", dense_run.out, "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert said.count("  [llava: prefill ") == 1 and said.count("  [vica: prefill ") == 2
    assert re.search(r"\[llava: prefill [\d,]+ ms of \d+ text and 16 visual tokens, cache [\d.]+ KiB\]", said)
    assert (
        "my photo's.png: 40 x 20" in said and "did you mean /mechanism?" in said and "no such file: nothing.png" in said
    )
    assert "control token" in said and "never asked" not in said and "\x1b" not in said
    assert said.count("/image FILE") == 1
    assert cli.main(["chat", dense_run.out, "--max-new-tokens", "0"]) == 2
    assert "expected 1 or more" in capsys.readouterr().err


def test_graphs_are_recorded_where_a_device_can(dense_run):
    asked = replace(dense_run, eval=replace(dense_run.eval, cuda_graphs=True))
    model = load(asked, None)[0]
    assert model.record_steps == (model.device.type == "cuda")
