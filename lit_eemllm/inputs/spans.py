"""Spans of text -> token ids, and which of them are trained.

`SpanTokenizer` turns spans into tokens such that (1) a border of spans is a border of tokens: nothing is re-tokenised and subtracted;
(2) the tokens before a border do not depend on the text after it: the ids of a generation prompt are a prefix of the training ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lit_eemllm.errors import SampleError, is_panic

from .conversation import IMAGE

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

IMAGE_SLOT = -1  # the one entry that stands for a run of visual tokens in `EncodedText.ids`
Pieces = tuple[str | int, ...]
"""What stands for an image: how many visual tokens, or the runs of them that it has, with the text that the model's family writes around
and between."""


@dataclass(frozen=True)
class Span:
    """A stretch of rendered text; images stand in it as `IMAGE`."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class EncodedText:
    """Token ids with `IMAGE_SLOT` for each image, or once it has its pieces for each run of visual tokens, and for each entry whether it is
    a target of the loss.

    Attributes:
        images: of each image that has its pieces, its first entry and the one after its last.
        runs: visual tokens of each of their slots.
    """

    ids: list[int]
    supervised: list[bool]
    images: list[tuple[int, int]] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)

    def with_pieces(self, images: Sequence[Pieces], text_ids: Callable[[str], list[int]]) -> EncodedText:
        """The same with each image's slot replaced by its pieces: a slot for each run of visual tokens, and the ids of the text around and
        between them, which is never a target."""
        ids, supervised, shown, left = list[int](), list[bool](), list[tuple[int, int]](), iter(images)
        runs = [piece for pieces in images for piece in pieces if isinstance(piece, int)]
        for entry, flag in zip(self.ids, self.supervised, strict=True):
            first = len(ids)
            if entry != IMAGE_SLOT:
                ids.append(entry)
            else:
                for piece in next(left):
                    ids += text_ids(piece) if isinstance(piece, str) else [IMAGE_SLOT]
                shown.append((first, len(ids)))
            supervised += [flag] * (len(ids) - first)
        return EncodedText(ids, supervised, shown, runs)


class SpanTokenizer:
    """Tokenises spans one after the other; what is emitted for a span never changes when more spans follow.

    A span is tokenised together with the text before it, its context: the common case is the tokenizer's own
    tokenisation of the whole text. Only if the context's tokens are not a prefix of the result (the prompt's last
    character merged with the answer's first) is the text cut there, and the span tokenised after a neutral newline,
    which keeps SentencePiece from inventing a leading space, or alone where even that merges. Tokenizers split text at
    special tokens themselves, so after one the context starts anew from it, and the cost stays linear.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special: Mapping[str, int] | None = None) -> None:
        """`special`: tokens that are to count as special, though the tokenizer only has them as added."""
        self.tokenizer = tokenizer
        self.special: dict[str, int] = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.special |= special or {}
        self.special |= {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._endings = tuple(sorted(self.special, key=len, reverse=True))
        self._special_ids = frozenset(self.special.values()) - {tokenizer.unk_token_id}
        # matches any special token in a text
        self.control = re.compile("|".join(re.escape(text) for text in self._endings if text != IMAGE) or "(?!)")
        self._newline = self._encodings(["\n"])[0].ids

    def __call__(self, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """Token ids and supervised flags; a span that is `IMAGE` gives one `IMAGE_SLOT`, text after it starts anew."""
        uncut, context = [], ""  # what is to be tokenised if no border needs a cut: nearly always all, in one call
        for span in spans:
            uncut += [context + span.text] * (span.text != IMAGE)
            context = "" if span.text == IMAGE else self.ending(span.text) or context + span.text
        known = dict(zip(uncut, self._encodings(uncut) if uncut else [], strict=True))
        ids, supervised = list[int](), list[bool]()
        before: tuple[str, list[int]] = ("", [])
        for span in spans:
            if span.text == IMAGE:
                ids.append(IMAGE_SLOT)
                supervised.append(False)
                before = ("", [])
                continue
            for context, head in (before, ("\n", self._newline), ("", [])):
                text = context + span.text
                encoding = known[text] if text in known else self._encodings([text])[0]
                whole = encoding.ids
                if self._continues(encoding, whole, head, len(context)):
                    break
            ids += whole[len(head) :]
            supervised += [span.supervised] * (len(whole) - len(head))
            ending = self.ending(text)
            restart = ending and whole[-1:] == [self.special[ending]]
            before = (ending, whole[-1:]) if restart else (text, whole)
        return ids, supervised

    def ending(self, text: str) -> str:
        """The special token with which the text ends, or ""."""
        return next((e for e in self._endings if text.endswith(e)), "") if text.endswith(self._endings) else ""

    def _continues(self, encoding: Encoding, whole: list[int], head: list[int], border: int) -> bool:
        """Whether `head`, the tokens of the first `border` characters, are the first tokens of the whole text."""
        if whole[: len(head)] != head:
            return False
        if not head or head[-1] in self._special_ids:  # a special token may swallow white space that follows it
            return True
        # the same ids may cover more text: unknown characters in a row are fused into one token
        return encoding.offsets[len(head) - 1][1] <= border

    def _encodings(self, texts: list[str]) -> list[Encoding]:
        # not verbose: texts over the tokenizer's model_max_length are the concern of data.max_length
        with panics_are_errors():
            return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).encodings


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """A panic of a tokenizer, whose pattern gives up on a text, is no Exception. Raises SampleError in its place."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise SampleError("tokenizer", f"the tokenizer broke on a text: {str(error)[:300]}") from None
