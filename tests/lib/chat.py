"""Tokenizers of many kinds, trained here, and what is to be trained of a conversation."""

from __future__ import annotations

import copy
import functools
import itertools
import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lit_eemllm.inputs.conversation import IMAGE, Conversation, Turn

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


every_tokenizer = pytest.mark.parametrize("tokenizer", NAMES, indirect=True)
every_template = pytest.mark.parametrize("template", ["plain", "vicuna_v1", "jinja"])
chatml_only = pytest.mark.parametrize("tokenizer", ["chatml"], indirect=True)


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


def with_template(source: str | None, name: str = "chatml") -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(build(name))
    tokenizer.chat_template = source
    return tokenizer
