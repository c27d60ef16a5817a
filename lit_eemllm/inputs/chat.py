"""Templates: a conversation as text, and which of it is trained.

    Conversation --render--> spans of text --encode--> ids, supervised

A template says which *text* is trained: the answers and their end-of-turn. A text with a special token of the tokenizer in it ("</s>",
"<|im_end|>", ...) is refused: it would act as that token.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date
from hashlib import sha256
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

from lit_eemllm.errors import ConfigError, SampleError, UserError

from .conversation import IMAGE, Conversation, Turn
from .spans import IMAGE_SLOT, EncodedText, Span, SpanTokenizer, panics_are_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DAY = date(2024, 7, 26)
"""Today, for templates that ask for it: a run must not change at midnight. (Llama 3's own, without a clock.)"""

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PARTS = """\
{%- set ns = namespace(messages=[], text='', prompt='') -%}
{%- for m in messages -%}
  {%- set ns.text = m['content'] if m['content'] is string else '' -%}
  {%- for part in m['content'] if m['content'] is not string -%}
    {%- set added = '<image>' if part['type'] == 'image' else part['text'] -%}
    {%- set ns.text = ns.text + ('\\n' if ns.text.endswith('<image>') and not added.startswith('\\n') else '') + added -%}
  {%- endfor -%}
  {%- set ns.messages = ns.messages + [{'role': m['role'], 'content': ns.text}] -%}
{%- endfor -%}
{%- set messages = ns.messages -%}
"""
"""What an exported template begins with: messages of transformers may hold a list of typed parts, put together as `inputs.rows` does."""
WRAPPED = PARTS + "{# what follows takes texts alone #}"
"""With which a tokenizer's own template begins that is exported so."""


class ChatTemplate(ABC):
    """One style of conversation with one tokenizer; `begin_ids` come before all, `stop_ids` end a generated turn."""

    name: str
    end_of_turn: str
    lead: str = ""  # what the model says before its answer proper, without white space around it
    slot: str = IMAGE  # what stands for an image in rendered text

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not getattr(tokenizer, "is_fast", False):
            found = f"{type(tokenizer).__name__} is not a fast tokenizer and gives no character offsets"
            raise UserError(f"{found}; load one with AutoTokenizer from a folder that holds a tokenizer.json")
        self.tokenizer = tokenizer
        self.spans = SpanTokenizer(tokenizer)
        self._known = dict[str, list[int]]()
        self.begin_ids: list[int] = []
        self.stop_ids: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def fingerprint(self) -> str:
        """16 hexadecimal digits of what decides the ids of a conversation: this template's text, and all of the tokenizer."""
        special = cast(Any, self.tokenizer.special_tokens_map)
        told = [self.name, getattr(self, "source", ""), special, self.begin_ids, self.stop_ids]
        tokenizer = self.tokenizer.backend_tokenizer.to_str()
        return sha256(json.dumps([*told, tokenizer], sort_keys=True, default=str).encode()).hexdigest()[:16]

    @abstractmethod
    def _render(self, conversation: Conversation) -> Iterable[Span]:
        """What `render` returns, before its checks."""

    def render(self, conversation: Conversation) -> list[Span]:
        """The text of a conversation in spans, for inspection and for `encode`.

        A conversation that ends with a human turn ends where the model speaks. A supervised span holds an answer and
        its end-of-turn; an answer of white space alone is no target and is not supervised.

        Raises:
            SampleError: ``control_token``, or ``bad_conversation`` if the template cannot render it.
        """
        for turn in conversation.turns:
            # without placeholders: taking one out, as vicuna_v1 does, may complete a special token
            if found := self.spans.control.search(turn.text.replace(IMAGE, "")):
                held = f"a {turn.role} turn holds {found.group()!r}, a special token of the tokenizer"
                raise conversation.refusal("control_token", f"{held}, which would act as a control token; rewrite it")
        spans = (span for span in self._render(conversation) if span.text)
        return [Span(s.text, s.supervised and bool(s.text.removesuffix(self.end_of_turn).strip())) for s in spans]

    def encode(self, conversation: Conversation, *, generation: bool = False) -> EncodedText:
        """Token ids of a conversation, image i as one `IMAGE_SLOT`, with the targets marked.

        With `generation` it is only the prompt, up to where the model speaks (a trailing gpt turn is dropped); its ids
        are a prefix of those of the whole conversation.

        Raises:
            SampleError: what `render` raises; ``placeholder_mismatch`` if the template lost or invented an image;
                ``no_text_after_image`` if no unsupervised text token lies between an image and a target or the
                model's turn: the image rows of composite layers cannot predict anything.
        """
        if generation and conversation.turns[-1].role == "gpt":
            conversation = replace(conversation, turns=conversation.turns[:-1])
        slot = re.compile(f"({re.escape(self.slot)})")
        rendered = ((text, s.supervised) for s in self.render(conversation) for text in slot.split(s.text))
        ids, supervised = self.spans(
            [Span(IMAGE if text == self.slot else text, flag) for text, flag in rendered if text]
        )
        slots = [position for position, token in enumerate(ids) if token == IMAGE_SLOT]
        if len(slots) != conversation.num_images:
            found = f"template {self.name!r} rendered {len(slots)} {self.slot} for {conversation.num_images} images"
            raise conversation.refusal("placeholder_mismatch", found)
        follows = [*supervised[1:], generation]  # whether a target, or the model's turn, comes next
        if any(follows[slot] for slot in slots):
            found = f"template {self.name!r} leaves no text token between an image and the answer, so nothing could"
            raise conversation.refusal("no_text_after_image", f"{found} predict it; put text after the placeholder")
        return EncodedText(self.begin_ids + ids, [False] * len(self.begin_ids) + supervised)

    def text_ids(self, text: str) -> list[int]:
        """Of a text among the pieces of an image. There are few: those of a family of models."""
        if text not in self._known:
            self._known[text] = self.spans([Span(text, False)])[0]
        return self._known[text]


class StringTemplate(ChatTemplate):
    """A template written here: what the tokenizer puts first (BOS) once, and its end-of-sequence as end-of-turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer)
        self.end_of_turn = tokenizer.eos_token or ""
        if not self.stop_ids or tokenizer(self.end_of_turn, add_special_tokens=False).input_ids != self.stop_ids:
            found = f"eos_token {tokenizer.eos_token!r} is not one token; set it and leave split_special_tokens off"
            raise UserError(f"template {self.name!r} ends answers with the end-of-sequence token, but {found}")
        bare, full = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
        self.begin_ids = full[: full.index(bare[0])]


class PlainTemplate(StringTemplate):
    """Caption pre-training: the image(s), a newline, then the caption and its end-of-turn, which are trained.

    As in LLaVA's `plain` the human text is dropped. Two departures: LLaVA puts the caption right after the image and a
    trained newline at its end. Here the newline stands between them, untrained, because an image row need not be able
    to predict (see `ChatTemplate.encode`); and the caption ends with end-of-sequence, at which generation stops.
    """

    name = "plain"

    def _render(self, conversation: Conversation) -> Iterator[Span]:
        if not conversation.num_images or conversation.roles not in (["human", "gpt"], ["human"]):
            found = f"found {conversation.num_images} images and turns {conversation.roles}"
            raise conversation.refusal("bad_conversation", f"'plain' takes images, a human and a gpt turn; {found}")
        yield Span(IMAGE * conversation.num_images + "\n", False)
        for caption in conversation.turns[1:]:
            yield Span(caption.text + self.end_of_turn, True)


class VicunaTemplate(StringTemplate):
    r"""LLaVA-1.5's style: ``SYSTEM USER: <image>\nquestion ASSISTANT: answer</s>USER: ...``.

    A turn with one image shows it first and its text is stripped, as in LLaVA; several images stay where they are. A
    system turn replaces the default system text.
    """

    name = "vicuna_v1"

    def _render(self, conversation: Conversation) -> Iterator[Span]:
        prompt = f"{VICUNA_SYSTEM} "
        for turn in conversation.turns:
            text = turn.text
            if turn.role == "system":
                prompt = f"{text} " if text else ""
            elif turn.role == "human":
                if text.count(IMAGE) == 1:
                    text = f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()
                prompt += f"USER: {text} ASSISTANT:"
            else:
                yield Span(prompt, False)
                yield Span(f" {text}{self.end_of_turn}", True)
                prompt = ""
        yield Span(prompt, False)


class JinjaTemplate(ChatTemplate):
    """The tokenizer's own chat template, rendered by `lit_eemllm.inputs.rendering`; it writes BOS and everything else itself. If it asks for
    today's date, that is always `DAY`.

    Where it has ``{% generation %}`` marks, they say what is trained. Otherwise it is the text an answer adds to its
    generation prompt, through the end-of-turn token (not the newline after it). That may be more than the answer: Qwen3 writes
    an empty thinking block before the last answer of a conversation, which is trained with it, and taken off what is generated.
    A template that shows an answer, or what stands before its turn, differently when turns follow is refused, and one that ends
    a turn with what is no single token, at which generation could not stop.

    A model of images and text has a template that takes a turn as a list of parts, ``{"type": "image"}`` among them, and writes the
    tokenizer's ``image_token`` for an image. It gets them; a newline beside a placeholder, which LLaVA's rows have, is none of the text.
    """

    name = "jinja"

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer)
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template of its own; choose template 'vicuna_v1' or 'plain'")
        try:
            self.source: str = tokenizer.get_chat_template().removeprefix(WRAPPED)  # as it was before it was exported
        except ValueError:
            raise UserError(
                f"the tokenizer has several chat templates, {', '.join(map(repr, tokenizer.chat_template))}, and none is called "
                "'default'; keep the one that is meant, as chat_template.jinja in a copy of its folder that model.tokenizer names"
            ) from None
        self.marked = re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None
        self.slot, self.in_parts = getattr(tokenizer, "image_token", None) or IMAGE, True
        asked, shown = Conversation("probe", (Turn("human", f"{IMAGE}alpha"),), 1), ""
        with suppress(SampleError):
            shown = self._jinja(asked, asked.turns)[0]
        self.in_parts = shown.count(self.slot) == shown.count("alpha") == 1
        # refuse an unsuitable template before any data is read, and learn what stands before an answer, and which token ends it
        turns = (Turn("human", "alpha"), Turn("gpt", "beta"), Turn("human", "gamma"), Turn("gpt", "delta"))
        probe = Conversation("probe", turns, 0)
        try:
            prompt, (full, _) = self._jinja(probe, turns[:3], generation=True)[0], self._jinja(probe, turns)
            self.header, after = prompt.rpartition("gamma")[2], full.rpartition("delta")[2]
            self.end_of_turn = self._through_token(after)
            spans = list(self._render(probe))
        except SampleError as error:
            raise UserError(f"the tokenizer's chat template cannot be used: {error}") from error
        first, last = ([span.text for span in spans if span.supervised] + ["", ""])[:2]
        lead, _, end = last.partition("delta")
        self.lead = self.spans.control.sub("", lead).strip()
        if after and not self.end_of_turn:
            raise self._endless(after)
        prompted = full.startswith(prompt + last) and (self.marked or not first.partition("beta")[0].strip())
        if not (prompted and end):
            raise UserError(
                "the tokenizer's chat template cannot be used: right after the generation prompt an answer and its "
                f"end-of-turn must be trained; but the prompt ends with {prompt[-40:]!r} and for the answer 'delta' "
                f"{last!r} is trained; mend the template or its {{% generation %}} marks"
            )
        encoded, stop = self.encode(probe), self.spans.special.get(self.spans.ending(last))
        if [token for token, trained in zip(encoded.ids, encoded.supervised, strict=True) if trained][-1] != stop:
            raise self._endless(end)
        self.stop_ids = list(dict.fromkeys([*self.stop_ids, stop]))

    def _endless(self, end: str) -> UserError:
        return UserError(
            f"the tokenizer's chat template ends an answer with {end!r}, in which there is no single token of the tokenizer that "
            "marks the end, so generation would never stop. Let the template write {{ eos_token }} after an answer, in a copy of "
            "the tokenizer's folder that model.tokenizer names; or take a decoder whose tokenizer has such a token (with "
            "split_special_tokens off), or set model.template=vicuna_v1"
        )

    def _through_token(self, after: str) -> str:
        """Of the text after an answer, what ends its turn: through the first token that the tokenizer never splits."""
        added = {
            token.content: number for number, token in self.tokenizer.added_tokens_decoder.items()
        } | self.spans.special
        known = "|".join(re.escape(text) for text in sorted(added, key=len, reverse=True) if text != IMAGE)
        if not (known and (found := re.search(known, after))):
            return ""
        self.spans = SpanTokenizer(self.tokenizer, {found.group(): added[found.group()]})
        return after[: found.end()]

    def _render(self, conversation: Conversation) -> Iterator[Span]:
        if self.in_parts:
            turns = [replace(turn, text=re.sub(f"\n?{IMAGE}\n?", IMAGE, turn.text)) for turn in conversation.turns]
            conversation = replace(conversation, turns=tuple(turns))
        full, marked = self._jinja(conversation, conversation.turns, generation=conversation.turns[-1].role == "human")
        position = 0
        for start, end in marked if self.marked else self._answers(conversation, full):
            answer = full[start:end]
            if self.spans.ending(answer.rstrip()):
                answer = answer.rstrip()
            yield Span(full[position:start], False)
            yield Span(answer, True)
            position = start + len(answer)
        yield Span(full[position:], False)

    def _answers(self, conversation: Conversation, full: str) -> list[tuple[int, int]]:
        """Start and end of each answer in the full text: from the end of its generation prompt through its end-of-turn.

        To find them costs one more rendering, with a sign at the end of every turn's text, however many turns there are; the
        prompts are compared with those of the conversation's first turns for the last answer, the one in the middle before it,
        and so on, which costs two renderings in all.
        """
        turns = conversation.turns
        pairs = [i for i in range(len(turns) - 1) if turns[i].role == "human" and turns[i + 1].text.strip()]
        if not pairs:
            return []
        signed = {number for i in pairs for number in (i, i + 1)}
        sign = next((chr(code) for code in range(0xE000, 0xF900) if chr(code) not in full), "\ue000")  # of private use
        texts = [(turn.text.rstrip(), turn.text[len(turn.text.rstrip()) :]) for turn in turns]
        shown = [Turn(t.role, sign.join(texts[i]) if i in signed else t.text) for i, t in enumerate(turns)]
        pieces = self._jinja(conversation, shown, generation=turns[-1].role == "human")[0].split(sign)
        if "".join(pieces) != full or len(pieces) != len(signed) + 1:
            raise self._unstable(conversation)
        borders = dict(zip(sorted(signed), accumulate(map(len, pieces)), strict=False))

        def after(number: int, text: str) -> int:
            """Where this text ends behind that of a turn, whose white space the template may keep or strip."""
            for space in ("", texts[number][1]):
                if full.startswith(space + text, borders[number]):
                    return borders[number] + len(space + text)
            raise self._unstable(conversation)

        found = []
        for i in pairs:
            start, end = after(i, self.header), after(i + 1, self.end_of_turn)
            if texts[i + 1][0].lstrip() not in full[start:end]:
                raise self._unstable(conversation)
            found.append((start, end))
        compared = len(pairs)
        while compared:
            prompt, _ = self._jinja(conversation, turns[: pairs[compared - 1] + 1], generation=True)
            if full[: found[compared - 1][0]] != prompt:
                raise self._unstable(conversation)
            compared //= 2
        return found

    def _unstable(self, conversation: Conversation) -> SampleError:
        why = (
            "the chat template has no {% generation %} marks and changes earlier text or an answer when turns are added"
        )
        how = "so training would show other text than generation; add marks or choose another template"
        return conversation.refusal("unstable_template", f"{why}, {how}")

    def _jinja(
        self, conversation: Conversation, turns: Sequence[Turn], *, generation: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Rendered text of turns of the conversation and, if the template has them, the marked (start, end) in it."""
        from jinja2.exceptions import TemplateError

        from lit_eemllm.inputs.rendering import render

        roles = {"system": "system", "human": "user", "gpt": "assistant"}
        write: Callable[[str], Any] = parts_of if self.in_parts else str
        messages = [{"role": roles[turn.role], "content": write(turn.text)} for turn in turns]
        try:
            special = cast(Any, self.tokenizer.special_tokens_map)
            return render(messages, self.source, generation, special, DAY)
        except (TemplateError, TypeError, ValueError) as error:  # the template may refuse a role or an order of turns
            raise conversation.refusal("bad_conversation", f"the chat template refuses it: {error}") from error


def parts_of(text: str) -> list[dict[str, str]]:
    """A turn's text as the parts that templates of models of images and text take."""
    pieces = re.split(f"({IMAGE})", text)
    return [{"type": "image"} if piece == IMAGE else {"type": "text", "text": piece} for piece in pieces if piece]


TEMPLATES: dict[str, type[ChatTemplate]] = {t.name: t for t in (PlainTemplate, VicunaTemplate, JinjaTemplate)}


def get_template(name: str, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    """The template of that name in `TEMPLATES`.

    Raises:
        ConfigError: the name is unknown.
        UserError: the tokenizer does not fit: not a fast one, no end-of-sequence token, unusable Jinja template.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"unknown chat template {name!r}; known: {', '.join(sorted(TEMPLATES))}")
    try:
        with panics_are_errors():
            return TEMPLATES[name](tokenizer)
    except SampleError as error:
        raise UserError(f"template {name!r}: {error}") from None
