"""Chat templates over several kinds of tokenizers: what is trained, and that a prompt is a prefix of its training text."""

from __future__ import annotations

import functools
import itertools
import json
import pickle
import random
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_eemllm.chat import IMAGE, IMAGE_SLOT, Conversation, SpanTokenizer, Turn, get_template, parse_conversation
from lit_eemllm.errors import ConfigError, SampleError, UserError

# ----------------------------------------------------------------------------------------- tokenizers, trained here

WORDS = "a red cube stands left of two green balls while the cat sleeps on an old sofa near what colour is it".split()
LINES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    *(f"USER: {one} {two}? ASSISTANT: {two}: {one}!\n{two}, 12345." for one, two in itertools.permutations(WORDS, 2)),
    "The quick brown fox jumps over the lazy dog. THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG; [INST] (x) {y} <z> #_-+*/=",
]
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
SPACED = (  # the prompt ends with a space, which tokenizers like to merge with the next word; no special end-of-turn
    "{% for m in messages %}{% if m.role == 'assistant' %}Assistant: {{ m.content }}##{% else %}"
    "Human: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)


def sentencepiece_bpe(legacy: bool) -> PreTrainedTokenizerFast:
    """Like Llama's: no splitting of words, byte fallback, BOS. Legacy ones add a space after special tokens, too."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace("▁", split=True)
    trained.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=420, special_tokens=SENTENCEPIECE))
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


def byte_level_bpe(specials: list[str], use_regex: bool = True) -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lines = LINES if use_regex else [line * 2 for line in LINES] + ["user\n\n", ":\n", "\n \n", "  ", ": a", ": b"] * 50
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, initial_alphabet=alphabet)
    raw.train_from_iterator(lines, trainer)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
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


def unigram() -> PreTrainedTokenizerFast:
    """Like T5's: Metaspace, unknown characters (the newline among them), end-of-sequence added by default."""
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace("▁")
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SENTENCEPIECE, unk_token="<unk>")
    raw.train_from_iterator(LINES, trainer)
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
            SPACED: ("", "##"),
        }.get(tokenizer.chat_template),
    }[template]
    return [before + answer + end for answer in answers]


ANSWERS = ["red", " two spaces before", "\na line below", "\n\n", "."]


# --------------------------------------------------------------------------------------------- what is trained (1, 2)


@every_tokenizer
@every_template
def test_targets_are_the_answers_and_their_ends(tokenizer, template) -> None:
    chat = get_template(template, tokenizer)
    if template == "plain":
        conversations = [talk(IMAGE, "a red cube")]
    else:
        conversations = [talk("what is it?", "a red cube"), talk(f"{IMAGE}\nwhat", "a cat", "colour?", "red: 12", "so", "on")]
    for conversation in conversations:
        encoded = chat.encode(conversation)
        assert targets(tokenizer, encoded) == expected_targets(tokenizer, template, conversation)
        spans = [span.text for span in chat.render(conversation) if span.supervised]
        assert spans == expected_targets(tokenizer, template, conversation)


PIECES = [
    *WORDS, *"USER: ASSISTANT: : . , ! ' 's 1 23 é e\u0301 \u0301 日本 🙂 ☃ ☃☃ # ## [INST] Assistant: \\ <image <0x0A>".split(),
    " ", " ", " ", "  ", "\n", "\n\n", " \n", "\t", "\u00a0", "\u3000", "\r\n", "\u200b",
]  # fmt: skip


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
        try:
            full = chat.encode(conversation)
        except SampleError as error:
            assert error.reason == "no_text_after_image", error  # nothing between image and answer but what is dropped
            continue
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
    print(cuts, compared)
    assert compared > 10
    if tokenizer is build("greedy") and template != "plain":
        assert cuts > 5, "this tokenizer is here because its tokens cross borders"
