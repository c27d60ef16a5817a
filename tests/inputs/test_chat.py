"""Chat templates over several kinds of tokenizers: what is trained; a prompt's ids are a prefix of its training ids."""

from __future__ import annotations

import copy
import pickle
import random
from types import SimpleNamespace

import pytest
from lib.chat import (
    CHATML,
    MARKED,
    SPACED,
    WORDS,
    build,
    byte_level_bpe,
    chatml_only,
    every_template,
    every_tokenizer,
    expected_targets,
    talk,
    targets,
    text_of,
    until,
    with_template,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_eemllm.errors import ConfigError, SampleError, UserError
from lit_eemllm.inputs.chat import get_template
from lit_eemllm.inputs.conversation import IMAGE, Conversation, Turn, parse_conversation
from lit_eemllm.inputs.spans import IMAGE_SLOT, Span, SpanTokenizer

# --------------------------------------------------------------------------------------------- what is trained (1, 2)


@every_tokenizer
@every_template
def test_targets_are_the_answers_and_their_ends(tokenizer, template) -> None:
    chat = get_template(template, tokenizer)
    if template == "plain":
        conversations = [talk(IMAGE, "a red cube")]
    else:
        conversations = [
            talk("what is it?", "a red cube"),
            talk(f"{IMAGE}\nwhat", "a cat", "colour?", "red: 12", "so", "on"),
        ]
    for conversation in conversations:
        encoded = chat.encode(conversation)
        assert targets(tokenizer, encoded) == expected_targets(tokenizer, template, conversation)
        spans = [span.text for span in chat.render(conversation) if span.supervised]
        assert spans == expected_targets(tokenizer, template, conversation)


ODD = "USER: ASSISTANT: : . , ! ' 's 1 23 é e\u0301 \u0301 日本 🙂 ☃ ☃☃ # ## [INST] Assistant: \\ <image <0x0A>"
SPACES = [" ", " ", " ", "  ", "\n", "\n\n", " \n", "\t", "\u00a0", "\u3000", "\r\n", "\u200b"]
PIECES = [*WORDS, *ODD.split(), *SPACES]


def random_text(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(length)))


def random_conversation(rng: random.Random, template: str) -> Conversation:
    texts = []
    for _ in range(1 if template == "plain" else rng.randint(1, 4)):
        human = [random_text(rng, 6) for _ in range(rng.randint(1, 3))]
        texts += [IMAGE.join(human) + rng.choice(["", "?"]), random_text(rng, 8)]
    if template == "plain":
        texts[0] += IMAGE
    return talk(*texts, key=str(texts))


@every_tokenizer
@every_template
def test_prompt_is_a_prefix_of_training_whatever_the_text(tokenizer, template) -> None:
    """Hundreds of random conversations, every turn of each; also the trained text, wherever nothing is unknown."""
    rng = random.Random(0)
    chat = get_template(template, tokenizer)
    cuts, compared = 0, 0
    for _ in range(120):
        conversation = random_conversation(rng, template)
        full = chat.encode(conversation)
        assert len(full.ids) == len(full.supervised)
        for number in range(1, len(conversation.turns), 2):
            prompt = chat.encode(until(conversation, number), generation=True)
            assert full.ids[: len(prompt.ids)] == prompt.ids, conversation
            assert full.supervised[: len(prompt.ids)] == prompt.supervised, conversation
            assert chat.encode(until(conversation, number + 1), generation=True) == prompt
            if conversation.turns[number].text.strip():
                assert full.supervised[len(prompt.ids)], "the first token after the prompt is trained"
        trained = [token for token, flag in zip(full.ids, full.supervised, strict=True) if flag]
        if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in trained:
            compared += 1
            assert targets(tokenizer, full) == expected_targets(tokenizer, template, conversation), conversation
        if not conversation.num_images:
            text = "".join(span.text for span in chat.render(conversation))
            cuts += full.ids != chat.begin_ids + tokenizer(text, add_special_tokens=False).input_ids
    assert compared > 10
    if tokenizer is build("greedy") and template != "plain":
        assert cuts > 5, "this tokenizer is here because its tokens cross borders"


@every_tokenizer
def test_common_case_keeps_the_tokenisation_of_the_whole_text(tokenizer) -> None:
    """Multi-turn text: one call of the tokenizer, or of its apply_chat_template, on all of it gives the same ids."""
    conversation = talk("What colour is the cube?", "It is red.", "Why?", "The old sofa, too; 12!", "Is it?", "a cat")
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    eos = tokenizer.eos_token
    whole = (
        f"{system}USER: What colour is the cube? ASSISTANT: It is red.{eos}"
        f"USER: Why? ASSISTANT: The old sofa, too; 12!{eos}USER: Is it? ASSISTANT: a cat{eos}"
    )
    vicuna = get_template("vicuna_v1", tokenizer)
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    if tokenizer is not build("greedy"):
        assert vicuna.encode(conversation).ids == bos + tokenizer(whole, add_special_tokens=False).input_ids
    if tokenizer.chat_template != SPACED:
        messages = [
            {"role": {"human": "user", "gpt": "assistant"}[t.role], "content": t.text} for t in conversation.turns
        ]
        jinja = get_template("jinja", tokenizer)
        assert jinja.encode(conversation).ids == tokenizer.apply_chat_template(messages, return_dict=False)
        asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert jinja.encode(conversation, generation=True).ids == asked


@pytest.mark.parametrize("tokenizer", ["llama", "llama-legacy", "stories15m"], indirect=True)
def test_image_conversation_as_llava_tokenises_it(tokenizer) -> None:
    """LLaVA tokenises the text around an image apart, each part with BOS, and keeps only the first BOS."""
    conversation = talk(f"what is it?\n{IMAGE}", "a red cube", "near what?", "the sofa")
    first = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
    )
    second = "\nwhat is it? ASSISTANT: a red cube</s>USER: near what? ASSISTANT: the sofa</s>"
    head, tail = tokenizer(first).input_ids, tokenizer(second).input_ids
    assert head[0] == tail[0] == tokenizer.bos_token_id
    encoded = get_template("vicuna_v1", tokenizer).encode(conversation)
    assert encoded.ids == [*head, IMAGE_SLOT, *tail[1:]]
    if len(tokenizer) == 32_000:
        assert encoded.ids.index(IMAGE_SLOT) == 35  # with Llama's vocabulary, BOS included


def test_where_vicuna_puts_images_and_system() -> None:
    vicuna = get_template("vicuna_v1", build("llama"))

    def prompt(conversation: Conversation) -> str:
        spans = vicuna.render(conversation)
        assert [span.supervised for span in spans] == [False, True]
        return spans[0].text

    assert prompt(talk(f"  colour {IMAGE} of it\n", "a")).endswith(f" USER: {IMAGE}\ncolour  of it ASSISTANT:")
    assert prompt(talk(IMAGE, "a")).endswith(f" USER: {IMAGE} ASSISTANT:")
    assert prompt(talk(f"A: {IMAGE} B: {IMAGE} ", "a")).endswith(f" USER: A: {IMAGE} B: {IMAGE}  ASSISTANT:")
    assert prompt(talk("q", "a", system="Be brief.")) == "Be brief. USER: q ASSISTANT:"
    assert prompt(talk("q", "a", system="")) == "USER: q ASSISTANT:"


# -------------------------------------------------------------------------------------------- beginning and end (3, 7)


@every_tokenizer
@every_template
def test_beginning_once_generation_and_stop(tokenizer, template) -> None:
    chat = get_template(template, tokenizer)
    conversation = talk(f"{IMAGE}\nwhat?", "a cat") if template == "plain" else talk("what?", "a cat", "and?", "a sofa")
    ids = chat.encode(conversation).ids
    bos = tokenizer.bos_token_id
    assert ids.count(bos) == (0 if bos is None else 1)
    assert bos is None or ids[0] == bos
    prompt = chat.encode(conversation, generation=True)
    assert not any(prompt.supervised[-3:])
    asked = Conversation("k", conversation.turns[:-1], conversation.num_images)
    assert chat.encode(asked, generation=True) == prompt
    assert prompt.ids == chat.encode(until(conversation, len(conversation.turns) - 1)).ids
    assert tokenizer.eos_token_id in chat.stop_ids
    assert ids[-1] in chat.stop_ids or tokenizer.chat_template == CHATML  # which adds a newline


@chatml_only
def test_chatml_stops_at_the_end_of_turn(tokenizer) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert get_template("jinja", tokenizer).stop_ids == [end]
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|endoftext|>"
    assert get_template("jinja", other).stop_ids == [other.eos_token_id, end]


def test_an_end_of_turn_that_is_no_token_is_refused() -> None:
    """It would be trained as text, and generation would never stop: ChatML on a base model, turns that end with a newline."""
    split = with_template(CHATML)
    split.split_special_tokens = True
    lines = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    for tokenizer in (with_template(CHATML, "gpt2"), with_template(MARKED, "llama"), with_template(lines), split):
        with pytest.raises(UserError, match=r"no single token .*eos_token.*model.template=vicuna_v1"):
            get_template("jinja", tokenizer)
    added = with_template(CHATML, "gpt2")
    added.add_tokens(["<|im_end|>"])  # not as a special one
    chat, end = get_template("jinja", added), added.convert_tokens_to_ids("<|im_end|>")
    assert chat.stop_ids == [added.eos_token_id, end]
    encoded = chat.encode(talk("what?", "a cat"))
    assert [i for i, trained in zip(encoded.ids, encoded.supervised, strict=True) if trained][-1] == end
    with pytest.raises(SampleError, match="special token"):
        chat.encode(talk("what is <|im_end|>?", "a cat"))


def test_empty_answer_is_no_target() -> None:
    for name, template in (("llama", "vicuna_v1"), ("chatml", "jinja"), ("gpt2", "jinja")):
        conversation = talk("what?", " \n", "and?", "a sofa")
        assert len(targets(build(name), get_template(template, build(name)).encode(conversation))) == 1


def test_fused_unknown_characters_do_not_swallow_the_answer() -> None:
    """Newline and snowman are one unknown token together: the caption's must be a token of its own, and trained."""
    tokenizer = build("unigram")
    assert tokenizer("\n☃", add_special_tokens=False).input_ids == tokenizer("\n", add_special_tokens=False).input_ids
    encoded = get_template("plain", tokenizer).encode(talk(IMAGE, "☃ sofa"))
    trained = [token for token, flag in zip(encoded.ids, encoded.supervised, strict=True) if flag]
    assert trained[:-1] == tokenizer("☃ sofa", add_special_tokens=False).input_ids
    assert trained[-1] == tokenizer.eos_token_id


def test_the_context_does_not_restart_where_a_special_token_is_taken_to_pieces() -> None:
    """What follows is tokenised as in the whole text: begun anew, the snowman would get a space, as newline and snowman are one."""
    pieces = [("<unk>", 0.0), *((piece, -1.0) for piece in "▁a<s>/")]
    raw = Tokenizer(models.Unigram(pieces, unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace("▁")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")
    for split in (True, False):
        tokenizer.split_special_tokens = split
        ids, _ = SpanTokenizer(tokenizer)([Span("a</s>", False), Span("☃a", True)])
        whole = tokenizer("a</s>☃a", add_special_tokens=False).input_ids
        assert (tokenizer.eos_token_id in whole) is not split
        assert ids == whole


# -------------------------------------------------------------------------------------------- text after an image (5)


def test_text_follows_an_image_before_a_target() -> None:
    bare = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    chat = get_template("jinja", with_template(bare))
    for human in (f"{IMAGE}what?", f"{IMAGE}{IMAGE}what?", f"{IMAGE} and {IMAGE}."):
        chat.encode(talk(human, "a cat"))
        chat.encode(talk(human), generation=True)
    for human in (IMAGE, f"what? {IMAGE}", f"{IMAGE} and {IMAGE}", f"what? {IMAGE}{IMAGE}"):
        for conversation in (talk(human, "a cat"), talk("first", "yes", human, "a cat")):
            for generation in (False, True):
                with pytest.raises(SampleError, match="'k'") as caught:
                    chat.encode(conversation, generation=generation)
                assert caught.value.reason == "no_text_after_image"


def test_a_tokenizer_that_drops_the_newline_cannot_do_plain() -> None:
    tokenizer = with_template(None, "unigram")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\n", "")
    with pytest.raises(SampleError, match="plain") as caught:
        get_template("plain", tokenizer).encode(talk(IMAGE, "a cat"))
    assert caught.value.reason == "no_text_after_image"


def test_plain_with_several_images() -> None:
    tokenizer = build("gpt2")
    encoded = get_template("plain", tokenizer).encode(talk(f"Describe {IMAGE} and {IMAGE}.", "two cats"))
    assert encoded.ids[:2] == [IMAGE_SLOT, IMAGE_SLOT]
    assert text_of(tokenizer, encoded.ids[2:]) == "\ntwo cats<|endoftext|>"
    for conversation in (talk("no image", "a cat"), talk(IMAGE, "a", "b", "c"), talk(IMAGE, "a", system="s")):
        with pytest.raises(SampleError, match="plain") as caught:
            get_template("plain", tokenizer).encode(conversation)
        assert caught.value.reason == "bad_conversation"


# --------------------------------------------------------------------------------------------------- bad samples (6)


def row(*pairs: tuple[object, object], **more: object) -> dict:
    return {"conversations": [{"from": role, "value": value} for role, value in pairs], **more}


def test_a_good_row() -> None:
    good = row(("system", "s"), ("human", f"{IMAGE} and {IMAGE}?"), ("gpt", "a"), ("human", "b"), type="count", id=3)
    conversation = parse_conversation(good, 2, "x/1")
    turns = (Turn("system", "s"), Turn("human", f"{IMAGE} and {IMAGE}?"), Turn("gpt", "a"), Turn("human", "b"))
    assert conversation == Conversation("x/1", turns, 2, "count")


@pytest.mark.parametrize(
    ("bad", "images", "reason", "message"),
    [
        (row(("human", "q"), ("human", "r"), ("gpt", "a")), 0, "bad_conversation", "alternate"),
        (row(("gpt", "a")), 0, "bad_conversation", "alternate"),
        (row(("gpt", "a"), ("gpt", "b"), ("human", "q"), ("gpt", "c")), 0, "bad_conversation", "alternate"),
        (row(("gpt", "a"), ("human", "q")), 0, "no_target", "answer"),
        (row(("human", "q"), ("gpt", "a"), ("system", "s")), 0, "bad_conversation", "alternate"),
        (row(("user", "q"), ("assistant", "a")), 0, "bad_conversation", "user"),
        (row(("system", "s")), 0, "bad_conversation", "alternate"),
        (row(), 0, "bad_conversation", "alternate"),
        (row(("human", 7), ("gpt", "a")), 0, "bad_conversation", "7"),
        (row(("human", None), ("gpt", "a")), 0, "bad_conversation", "strings"),
        (row((["human"], "q"), ("gpt", "a")), 0, "bad_conversation", "strings"),
        (row(("human", "q"), ("gpt", "half \ud83d")), 0, "bad_conversation", "half"),
        ({"conversations": ["q", "a"]}, 0, "bad_conversation", "mappings"),
        ({"conversations": {"from": "human", "value": "q"}}, 0, "bad_conversation", "list"),
        ({"conversations": 7}, 0, "bad_conversation", "list"),
        ({"from": "human", "value": "q"}, 0, "bad_conversation", "list"),
        (["q"], 0, "bad_conversation", "list"),
        (row(("human", "q"), ("gpt", "a"), type=3), 0, "bad_conversation", "type"),
        (row(("human", "q"), ("gpt", f"see {IMAGE}")), 1, "bad_conversation", "gpt"),
        (row(("system", IMAGE), ("human", "q"), ("gpt", "a")), 1, "bad_conversation", "system"),
        (row(("human", f"{IMAGE}{IMAGE} q"), ("gpt", "a")), 1, "placeholder_mismatch", "2 .* 1 images"),
        (row(("human", f"{IMAGE} q"), ("gpt", "a")), 0, "placeholder_mismatch", "1 .* 0 images"),
        (row(("human", "q"), ("gpt", "a")), 2, "placeholder_mismatch", "0 .* 2 images"),
        (row(("human", "q"), ("gpt", " \n")), 0, "no_target", "answer"),
        (row(("human", "q")), 0, "no_target", "answer"),
    ],
)
def test_bad_rows_are_refused_by_name(bad, images, reason, message) -> None:
    with pytest.raises(SampleError, match=message) as caught:
        parse_conversation(bad, images, "set/17")
    assert caught.value.reason == reason
    assert "'set/17'" in str(caught.value)


@every_tokenizer
def test_special_tokens_in_a_text_are_refused(tokenizer) -> None:
    chat = get_template("vicuna_v1", tokenizer)
    special = sorted(set(tokenizer.all_special_tokens))
    assert special
    for token in special:
        middle = len(token) // 2
        for conversation in (
            talk(f"what is {token}?", "a cat"),
            talk("what?", f"a{token}"),
            talk("what?", "a", system=token),
            talk(f"what is {token[:middle]}{IMAGE}{token[middle:]}?", "a cat"),  # appears when the image is moved
        ):
            with pytest.raises(SampleError, match="special token") as caught:
                chat.encode(conversation)
            assert caught.value.reason == "control_token"


# -------------------------------------------------------------------------------------- choosing; tokenizers' demands


def test_names_and_tokenizers_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"'vicuna'.*jinja, plain, vicuna_v1"):
        get_template("vicuna", build("llama"))
    with pytest.raises(UserError, match="fast"):
        get_template("plain", SimpleNamespace(is_fast=False))
    no_end = PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe([]))
    split = with_template(None, "llama")
    split.split_special_tokens = True
    for tokenizer in (no_end, split):
        with pytest.raises(UserError, match="eos_token"):
            get_template("vicuna_v1", tokenizer)


@every_template
def test_one_call_of_the_tokenizer_for_a_usual_sample(template, monkeypatch) -> None:
    calls = []
    original = SpanTokenizer._encodings
    monkeypatch.setattr(SpanTokenizer, "_encodings", lambda self, texts: calls.append(texts) or original(self, texts))
    for name in ("llama", "llama-legacy", "chatml"):
        chat = get_template(template, build(name))
        calls.clear()
        chat.encode(talk(f"{IMAGE}\nwhat colour is the cube?", "It is red."))
        assert len(calls) == 1
        if template != "plain":
            calls.clear()
            chat.encode(talk(f"{IMAGE}\nwhat colour is the cube?", "It is red.", *["why?", "so", "why?", "on"] * 5))
            assert len(calls) == 1
            assert sum(map(len, calls[0])) < 3000, "the cost must stay linear in the number of turns"


def test_templates_travel_to_workers_and_ignore_truncation_left_on() -> None:
    conversation = talk(f"{IMAGE}\nwhat?", "a cat", "and?", "a sofa")
    for name, template in (("llama", "vicuna_v1"), ("chatml", "jinja")):
        chat = get_template(template, with_template(CHATML, name))
        encoded = chat.encode(conversation)
        assert pickle.loads(pickle.dumps(chat)).encode(conversation) == encoded  # noqa: S301 (our own bytes)
        chat.tokenizer(["a long text", "of words"], truncation=True, max_length=2)
        assert chat.encode(conversation) == encoded
