"""Chat templates over several kinds of tokenizers: what is trained; a prompt's ids are a prefix of its training ids."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import pickle
import random
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_eemllm.errors import ConfigError, SampleError, UserError
from lit_eemllm.inputs import rendering
from lit_eemllm.inputs.chat import (
    IMAGE,
    IMAGE_SLOT,
    Conversation,
    Span,
    SpanTokenizer,
    Turn,
    get_template,
    parse_conversation,
)
from lit_eemllm.inputs.processor import Processor

# ----------------------------------------------------------------------------------------- tokenizers, trained here

SENTENCE = "a red cube stands left of two green balls while the cat sleeps on an old sofa near what colour is it"
WORDS = SENTENCE.split()
LINES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    *(f"USER: {one} {two}? ASSISTANT: {two}: {one}!\n{two}, 12345." for one, two in itertools.permutations(WORDS, 2)),
    "The quick brown fox jumps over the lazy dog. THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG;",
    "[INST] (x) {y} <z> #_-+*/=",
]
NO_BREAKS = [line.replace("\n", " ") for line in LINES]  # SentencePiece vocabularies know no newline
SENTENCEPIECE = ["<unk>", "<s>", "</s>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
SPACED = (  # the prompt ends with a space, which tokenizers like to merge with the next word; a turn ends with more than a token
    "{% for m in messages %}{% if m.role == 'assistant' %}Assistant: {{ m.content }}##{{ eos_token }}{% else %}"
    "Human: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)


def sentencepiece_bpe(legacy: bool) -> PreTrainedTokenizerFast:
    """Like Llama's: no splitting of words, byte fallback, BOS. Legacy ones add a space after special tokens, too."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace("▁", split=True)
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SENTENCEPIECE, show_progress=False)
    trained.train_from_iterator(NO_BREAKS, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = dict(model["vocab"])
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = [tuple(pair) for pair in model["merges"]]
    raw = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=INST
    )


def byte_level_bpe(specials: list[str], use_regex: bool = True, trim_offsets: bool = True) -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lines = LINES if use_regex else [line * 2 for line in LINES] + ["user\n\n", ":\n", "\n \n", "  ", ": a", ": b"] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(lines, trainer)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return raw


def gpt2() -> PreTrainedTokenizerFast:
    raw = byte_level_bpe(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>", chat_template=SPACED)


def greedy() -> PreTrainedTokenizerFast:
    """A byte-level BPE that merges across words and lines, so that borders really fall inside of tokens."""
    raw = byte_level_bpe(["<|endoftext|>"], use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>", chat_template=SPACED)


def chatml() -> PreTrainedTokenizerFast:
    raw = byte_level_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    specials = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=CHATML, **specials)


def phi() -> PreTrainedTokenizerFast:
    """ChatML whose end-of-turn token swallows the white space after it, as Phi-3's does."""
    raw = byte_level_bpe(["<|endoftext|>", "<|im_start|>"], trim_offsets=False)
    raw.add_special_tokens([AddedToken("<|im_end|>", rstrip=True)])
    specials = dict(eos_token="<|endoftext|>", extra_special_tokens=["<|im_start|>"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=CHATML, **specials)


def unigram() -> PreTrainedTokenizerFast:
    """Like T5's: Metaspace, unknown characters (the newline among them), end-of-sequence added by default."""
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace("▁")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SENTENCEPIECE, unk_token="<unk>", show_progress=False
    )
    raw.train_from_iterator(NO_BREAKS, trainer)
    raw.decoder = decoders.Metaspace("▁")
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>", chat_template=SPACED)


BUILDERS = {
    "llama": functools.partial(sentencepiece_bpe, legacy=False),
    "llama-legacy": functools.partial(sentencepiece_bpe, legacy=True),
    "gpt2": gpt2,
    "greedy": greedy,
    "unigram": unigram,
    "chatml": chatml,
    "phi": phi,
}
NAMES = [*BUILDERS, "stories15m"]


@functools.cache
def build(name: str) -> PreTrainedTokenizerFast:
    return BUILDERS[name]()


@pytest.fixture
def tokenizer(request) -> PreTrainedTokenizerFast:
    if request.param == "stories15m":
        loaded = AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / "weights" / "stories15m")
        loaded.chat_template = INST
        return loaded
    return build(request.param)


every_tokenizer = pytest.mark.parametrize("tokenizer", NAMES, indirect=True)
every_template = pytest.mark.parametrize("template", ["plain", "vicuna_v1", "jinja"])
chatml_only = pytest.mark.parametrize("tokenizer", ["chatml"], indirect=True)

# ---------------------------------------------------------------------------------------------------------- helpers


def talk(*texts: str, key: str = "k", system: str | None = None) -> Conversation:
    """Human and gpt texts in turn; the images are counted."""
    turns = [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]
    if system is not None:
        turns.insert(0, Turn("system", system))
    return Conversation(key, tuple(turns), sum(text.count(IMAGE) for text in texts))


def until(conversation: Conversation, turns: int) -> Conversation:
    kept = conversation.turns[:turns]
    return Conversation(conversation.key, kept, sum(turn.text.count(IMAGE) for turn in kept))


def text_of(tokenizer, ids: list[int]) -> str:
    """Text of ids from the middle of a text: after an x, so that no leading space is stripped."""
    before = tokenizer("x", add_special_tokens=False).input_ids
    plain = dict(skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return tokenizer.decode(before + ids, **plain)[len(tokenizer.decode(before, **plain)) :]


def targets(tokenizer, encoded) -> list[str]:
    """The text of each run of supervised tokens."""
    pairs = zip(encoded.ids, encoded.supervised, strict=True)
    runs = [list(run) for trained, run in itertools.groupby(pairs, key=lambda pair: pair[1]) if trained]
    return [text_of(tokenizer, [token for token, _ in run]) for run in runs]


def expected_targets(tokenizer, template: str, conversation: Conversation) -> list[str]:
    answers = [turn.text for turn in conversation.turns if turn.role == "gpt" and turn.text.strip()]
    before, end = {
        "plain": ("", tokenizer.eos_token),
        "vicuna_v1": (" ", tokenizer.eos_token),
        "jinja": {
            CHATML: ("", "<|im_end|>"),
            INST: (" ", tokenizer.eos_token),
            SPACED: ("", f"##{tokenizer.eos_token}"),
        }.get(tokenizer.chat_template),
    }[template]
    return [before + answer + end for answer in answers]


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


# ------------------------------------------------------------------------------------------------------------ Jinja (4)


def with_template(source: str | None, name: str = "chatml") -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(build(name))
    tokenizer.chat_template = source
    return tokenizer


def test_generation_marks_say_what_is_trained() -> None:
    conversation = talk(f"{IMAGE}\nwhat?", "a cat", "and?", "a sofa")
    plain, marked = (get_template("jinja", with_template(source)) for source in (CHATML, MARKED))
    assert marked.encode(conversation) == plain.encode(conversation)
    assert marked.encode(conversation, generation=True) == plain.encode(conversation, generation=True)
    thinking = MARKED.replace("{% generation %}", "{% generation %}{% if loop.last %}(well) {% endif %}")
    marked = get_template("jinja", with_template(thinking))  # earlier text changes, but the marks know
    assert targets(marked.tokenizer, marked.encode(conversation)) == ["a cat<|im_end|>", "(well) a sofa<|im_end|>"]


QWEN3 = (  # its logic: no reasoning in earlier answers, a thinking block, even an empty one, in the last
    "{%- set ns = namespace(last=messages|length - 1, seek=true) %}{%- for m in messages[::-1] %}"
    "{%- if ns.seek and m.role == 'user' %}{%- set ns.seek = false %}{%- set ns.last = messages|length - loop.index %}{%- endif %}"
    "{%- endfor %}{%- for m in messages %}{%- if m.role != 'assistant' %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- else %}"
    "{%- set content = m.content %}{%- set reasoning = '' %}{%- if '</think>' in m.content %}"
    "{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- set reasoning = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last %}{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + "
    "content.lstrip('\n') }}{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)


def test_a_template_that_writes_more_before_the_last_answer() -> None:
    """Qwen3's: text and prompts are the template's own, and what the last answer adds to its prompt is trained."""
    tokenizer = with_template(QWEN3)
    chat = get_template("jinja", tokenizer)
    for texts in (["what?", "a cat"], [f"{IMAGE}\nwhat? ", "a cat ", "and?", " \n", "so?", "a sofa", "why?", "it is"]):
        conversation = talk(*texts, system="s")
        messages = [{"role": {"human": "user", "gpt": "assistant"}.get(t.role, t.role), "content": t.text} for t in conversation.turns]  # fmt: skip
        full = tokenizer.apply_chat_template(messages, tokenize=False)
        assert "".join(span.text for span in chat.render(conversation)) == full
        answers = [turn.text + "<|im_end|>" for turn in conversation.turns if turn.role == "gpt" and turn.text.strip()]
        answers[-1] = f"<think>\n\n</think>\n\n{answers[-1]}"
        encoded = chat.encode(conversation)
        assert targets(tokenizer, encoded) == answers
        for number in range(2, len(conversation.turns), 2):
            prompt = chat.encode(until(conversation, number), generation=True)
            text = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            assert "".join(span.text for span in chat.render(until(conversation, number))) == text
            assert encoded.ids[: len(prompt.ids)] == prompt.ids
    reasoned = "<think>\nis it?\n</think>\n\na cat"
    assert targets(tokenizer, chat.encode(talk("what?", reasoned))) == [f"{reasoned}<|im_end|>"]
    with pytest.raises(SampleError, match="changes earlier text or an answer"):  # training would drop what the row says
        chat.encode(talk("what?", reasoned, "and?", "a sofa"))
    processor = Processor(tokenizer, "jinja", None, 0)
    said = tokenizer(
        "<think>\n\n</think>\n\na cat<|im_end|>\nx", add_special_tokens=False, return_tensors="pt"
    ).input_ids
    plain = tokenizer("a cat", add_special_tokens=False, return_tensors="pt").input_ids
    assert processor.answers(said, 0) + processor.answers(plain, 0) == ["a cat", "a cat"]


@pytest.mark.parametrize("source", [CHATML, MARKED, QWEN3])
def test_the_cost_of_rendering_is_linear(source, monkeypatch) -> None:
    chat, render, count = get_template("jinja", with_template(source)), rendering.render, []
    monkeypatch.setattr(
        rendering, "render", lambda messages, *rest: count.append(len(messages)) or render(messages, *rest)
    )
    conversation = talk(*(f"text {i}" for i in range(400)))
    assert len(targets(chat.tokenizer, chat.encode(conversation))) == 200
    assert sum(count) <= 4 * 400


@pytest.mark.parametrize("turns", range(4, 12, 2))
def test_a_template_that_shows_long_conversations_differently_is_refused(turns) -> None:
    chat = get_template(
        "jinja", with_template("{% if messages|length > " + str(turns) + " %}<|im_start|>long{% endif %}" + CHATML)
    )
    chat.encode(talk(*["a", "b"] * (turns // 2)))
    with pytest.raises(SampleError, match="changes earlier text"):
        chat.encode(talk(*["a", "b"] * (turns // 2 + 1)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param(None, "no chat template", id="none"),
        pytest.param(
            CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content | upper }}"),
            "changes earlier text",
            id="unstable",
        ),
        pytest.param(
            CHATML.replace("assistant\n{% endif", "assistant\n(think){% endif"),
            "changes earlier text",
            id="other-prompt",
        ),
        pytest.param(
            MARKED.replace("assistant\n{% endif", "assistant\n(think){% endif"), r"\(think\)", id="marked-prompt"
        ),
        pytest.param(CHATML.partition("{% if add_gen")[0], "right after the generation prompt", id="prompt-ignored"),
        pytest.param("{% for m in messages %}{{ m.content }}{% endfor %}", "end-of-turn", id="no-end"),
        pytest.param(
            MARKED.replace("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n"),
            "marks",
            id="end-unmarked",
        ),
        pytest.param(MARKED.replace("'assistant'", "'model'"), "marks", id="nothing-marked"),
        pytest.param("{{ raise_exception('only tools') }}", "only tools", id="raises"),
        pytest.param("{{ messages.__class__.__mro__ }}" + CHATML, "unsafe", id="sandboxed"),
        pytest.param("{% for", "refuses it", id="syntax"),
    ],
)
def test_unsuitable_jinja_templates_are_refused_at_once(source, message) -> None:
    with pytest.raises(UserError, match=message):
        get_template("jinja", with_template(source))


def test_a_template_that_asks_for_today_gets_one_day_for_ever() -> None:
    """Else a run that goes on tomorrow would train on other prompts."""
    dated = CHATML.replace("{%", "{{ strftime_now('%d %b %Y') }}{%", 1)
    rendered = get_template("jinja", with_template(dated)).render(talk("a", "b"))
    assert rendered[0].text.startswith("26 Jul 2024<|im_start|>user\na")


def test_a_fingerprint_is_of_all_that_decides_ids() -> None:
    """The template's text, and the tokenizer beyond its vocabulary."""

    def fingerprint(template: str = CHATML, lower: bool = False) -> str:
        tokenizer = with_template(template)
        if lower:
            tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        return get_template("jinja", tokenizer).fingerprint()

    assert fingerprint() == fingerprint()
    other = fingerprint("{# edited #}" + CHATML), fingerprint(lower=True)
    assert len({fingerprint(), *other, get_template("vicuna_v1", with_template(CHATML)).fingerprint()}) == 4


def test_several_templates_none_of_which_is_the_default() -> None:
    with pytest.raises(UserError, match=r"'tool_use', 'rag'.*none is called 'default'.*model.tokenizer"):
        get_template("jinja", with_template({"tool_use": CHATML, "rag": CHATML}))
    assert get_template("jinja", with_template({"rag": INST, "default": CHATML})).source == CHATML


def test_jinja_refusals_of_single_samples() -> None:
    forgets = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('=>')[-1] }}")
    chat = get_template("jinja", with_template(forgets))
    chat.encode(talk("a", "b", "c", "so => d"))
    with pytest.raises(SampleError, match="'k'") as caught:
        chat.encode(talk("a", "so => b", "c", "d"))
    assert caught.value.reason == "unstable_template"
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    with pytest.raises(SampleError, match="no system turn") as caught:
        get_template("jinja", with_template(no_system)).encode(talk("a", "b", system="c"))
    assert caught.value.reason == "bad_conversation"
    loses = CHATML.replace("{{ m.content }}", "{{ m.content.replace('<image>', '') }}")
    with pytest.raises(SampleError, match="rendered 0") as caught:
        get_template("jinja", with_template(loses)).encode(talk(f"{IMAGE} a", "b"))
    assert caught.value.reason == "placeholder_mismatch"


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
