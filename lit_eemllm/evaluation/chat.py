"""`chat`: a conversation with a run's model in the terminal. Pictures by path, answers as they come, and another mechanism at any time,
with what each costs beside the answer."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ..compat.transformers import CACHE
from ..console import quiet_libraries
from ..errors import ConfigError, SampleError, UserError, did_you_mean
from ..inputs.conversation import IMAGE, Conversation, Turn
from ..inputs.images import open_image, read_file
from ..layout import upload
from ..mechanisms import PRESETS, Mechanism
from ..model import EEMLLM, Processor
from ..terminal import say
from ..training.module import compute_dtype
from .run import autocast, load

if TYPE_CHECKING:
    from ..config.keys import Config

HELP = """\
Ask anything; a line that begins with the path of a picture, typed or dropped here, shows it with what follows.
  /image FILE        show a picture with the next question
  /mechanism [NAME]  treat visual tokens in another way from now on; without a name, the ways that these weights allow
  /reset             forget pictures and turns
  /help              this
  /exit              leave (or Ctrl-D)"""
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
"""Endings of names that are no words."""
_WORD = re.compile(r"""\s*((?:'[^']*'|"[^"]*"|\\.|[^\s'"\\])+)(?=\s|$)""")
"""Of a shell."""


@dataclass(frozen=True)
class Cost:
    """Of an answer.

    Attributes:
        prefill: seconds until its first token, encoder included.
        text, visual: tokens of the prompt.
        tokens: of the answer.
        seconds: from its first token to its last.
        cache: bytes of keys and values at its end; of all answers of a batch together.
        known: those of the visual tokens whose keys came from the image cache.
    """

    prefill: float
    text: int
    visual: int
    tokens: int
    seconds: float
    cache: int
    known: int = 0

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first; None of fewer than eight, which the clock hardly tells."""
        return (self.tokens - 1) / self.seconds if self.tokens >= 8 and self.seconds else None

    def __str__(self) -> str:
        rate = f", {self.rate:.1f} tokens/s" if self.rate else ""
        size = f"{self.cache / 2**20:.1f} MiB" if self.cache >= 2**20 else f"{self.cache / 2**10:.0f} KiB"
        return f"prefill {1e3 * self.prefill:,.0f} ms of {self.text} text and {self.visual} visual tokens, cache {size}{rate}"


class Listener:
    """To one answer: hands on its text as its tokens come, and notes when. Half a character waits for its other half.

    Args:
        processor: of the model.
        write: takes the text.
        most: tokens of the answer.
        gone: whether nobody listens any more.

    Attributes:
        ended: why it has: ``stop`` (the model has ended it), ``length`` (it has `most` tokens); empty before that, and if it was interrupted.
    """

    def __init__(
        self,
        processor: Processor,
        write: Callable[[str], None],
        most: int,
        gone: Callable[[], bool] = lambda: False,
    ) -> None:
        self.processor, self.write, self.most, self.gone = processor, write, most, gone
        self.times, self.ids, self.text, self.ended = list[float](), list[int](), "", ""

    def hear(self, token: int) -> None:
        if self.ended:  # padding, while others of the batch go on
            return
        self.times.append(time.perf_counter())
        self.ids.append(token)
        if token in self.processor.template.stop_ids:
            self.ended = "stop"
        elif len(self.ids) == self.most:
            self.ended = "length"
        self._hand_on()

    def _hand_on(self) -> None:
        (text,) = self.processor.answers(torch.tensor([self.ids], dtype=torch.long), 0)
        if not self.ended and self.processor.template.lead.startswith(text):
            return  # perhaps what the model says before its answer proper
        if text.startswith(self.text) and (self.ended or not text.endswith("\ufffd")):
            self.write(text[len(self.text) :])
            self.text = text


class _Batch(StoppingCriteria):
    """The listeners to a batch: a streamer of transformers' `generate`, and what says which answers have ended."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self.listeners, self.prompt = listeners, 0

    def put(self, value: Tensor) -> None:
        if not self.prompt:
            self.prompt = value.shape[1]
            return
        for listener, token in zip(self.listeners, value.tolist(), strict=True):
            listener.hear(token)

    def end(self) -> None:
        """Of `generate`; every answer has told its own."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        length = input_ids.shape[1] - self.prompt
        done = [listener.gone() or length >= listener.most for listener in self.listeners]
        return upload(torch.tensor(done), input_ids.device)


@torch.inference_mode()
def answer_aloud(
    model: EEMLLM,
    processor: Processor,
    config: Config,
    conversations: Sequence[Conversation],
    pictures: Sequence[Sequence[Image.Image]],
    listeners: Sequence[Listener],
    temperature: float = 0.0,
) -> list[Cost]:
    """Answer conversations together, each token by token to its listener; greedily at temperature 0. Interrupted, what was said stands.

    Raises SampleError if one of them cannot be asked.
    """
    start = time.perf_counter()
    inputs = processor.prompts(conversations, pictures, model.device)
    batch, images = _Batch(listeners), model.image_cache
    if images is not None:
        images.known = []
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    cache = 0  # unknown, if interrupted
    with suppress(KeyboardInterrupt), autocast(config, model):
        made = model.generate(
            **inputs,
            **how,
            max_new_tokens=max(listener.most for listener in listeners),
            streamer=batch,
            stopping_criteria=StoppingCriteriaList([batch]),
            return_dict_in_generate=True,
        )
        cache = made[CACHE].num_bytes
    known, costs = iter(images.known if images is not None else ()), list[Cost]()
    visual_B = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    length_B = inputs["attention_mask"].sum(1).tolist()
    for shown, visual, length, listener in zip(pictures, visual_B, length_B, listeners, strict=True):
        times = listener.times or [time.perf_counter()]
        sizes = [processor.transform.size_among(picture.size, len(shown)) for picture in shown]
        reused = sum(processor.transform.num_tokens(*size) for size in sizes if next(known, False))
        costs.append(
            Cost(
                prefill=times[0] - start,
                text=length - visual,
                visual=visual,
                tokens=len(listener.ids),
                seconds=times[-1] - times[0],
                cache=cache,
                known=reused,
            )
        )
    return costs


@dataclass
class Chat:
    """A conversation with a model.

    Attributes:
        way: name of the mechanism; at first of the run's own.
        turns, pictures: so far.
        shown: pictures that go with the next question.
    """

    model: EEMLLM
    processor: Processor
    config: Config
    way: str
    turns: list[Turn] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)
    shown: list[Image.Image] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.own, self.trained = self.way, self.model.mechanism

    def show(self, path: Path) -> None:
        """Raises SampleError or OSError if the picture cannot be read."""
        most = self.config.data.max_image_pixels
        self.shown.append(open_image(read_file(path, path.name), path.name, most))

    def reset(self) -> None:
        self.turns, self.pictures, self.shown = [], [], []

    def ask(self, question: str, max_new_tokens: int, write: Callable[[str], None]) -> Cost:
        """Answer a question with the pictures that are shown, token by token; interrupted, what was said stands.

        Raises:
            SampleError: it cannot be asked; nothing is remembered of it.
        """
        turn = Turn("human", f"{IMAGE}\n" * len(self.shown) + question)
        pictures = [*self.pictures, *self.shown]
        conversation = Conversation("chat", (*self.turns, turn), len(pictures))
        listener = Listener(self.processor, write, max_new_tokens)
        (cost,) = answer_aloud(self.model, self.processor, self.config, [conversation], [pictures], [listener])
        self.turns += [turn, Turn("gpt", listener.text)]
        self.pictures, self.shown = pictures, []
        return cost

    def ways(self) -> dict[str, Mechanism]:
        """Mechanisms that the model's weights allow, by name; first that of the run, with its options."""
        layers, now = len(self.model.table), self.trained.modules
        others = {name: preset.stretched(layers) for name, preset in PRESETS.items() if name != self.own}
        allowed = {n: way for n, way in others.items() if way.modules == now and not self.model.problems(way)}
        return {self.own: self.trained, **allowed}

    def switch(self, name: str) -> None:
        """Raises ConfigError with the names that are possible."""
        if name not in (ways := self.ways()):
            hint = did_you_mean(name, ways)
            raise ConfigError(f"{name}: with these weights one of {', '.join(ways)}" + (f"; {hint}" if hint else ""))
        self.model.set_mechanism(ways[name])
        self.model.set_attention(self.config.model.attention, compute_dtype(self.config), training=False)
        self.way = name


def leading_pictures(line: str) -> tuple[list[Path], str]:
    """Paths of files with which a line begins, as terminals write what is dropped on them (quoted, with backslashes, or as
    ``file://``), and what follows them."""
    found: list[Path] = []
    while word := _WORD.match(line):
        text = shlex.split(word[1])[0]
        text = unquote(text.removeprefix("file://")) if text.startswith("file://") else text
        path = Path(text).expanduser()
        with suppress(OSError, ValueError):  # a name that is too long, or no name
            if path.is_file():
                found.append(path)
                line = line[word.end() :]
                continue
        break
    return found, line.strip()


def chat(config: Config, checkpoint: str | None, max_new_tokens: int) -> None:
    """Read lines until the end of input. Raises UserError for an option or a run that cannot be used."""
    quiet_libraries()
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: expected 1 or more")
    with suppress(ImportError):
        import readline  # noqa: F401  line editing and history for `input`
    model, processor, source = load(config, checkpoint)
    talk = Chat(model, processor, config, config.model.mechanism.preset)
    say(f"{source}, mechanism {talk.way}. /help tells more.")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        if line == "/exit":
            return
        try:
            _obey(talk, line, max_new_tokens)
        except (SampleError, UserError, OSError) as error:
            say(f"  {getattr(error, 'message', None) or error}")


def _obey(talk: Chat, line: str, max_new_tokens: int) -> None:
    """One line of the user's."""
    command, _, argument = line.partition(" ")
    paths, question = leading_pictures(line)
    if command == "/image":
        paths, rest = leading_pictures(argument)
        if not paths or rest:
            raise UserError(f"/image: no such file: {rest or argument}")
        question = ""
    elif command == "/mechanism":
        if argument:
            talk.switch(argument.strip())
        say(f"  now {talk.way}; these weights allow {', '.join(talk.ways())}")
        return
    elif command == "/reset":
        return talk.reset()
    elif command == "/help":
        return say(HELP)
    elif command.startswith("/") and not paths:
        hint = did_you_mean(command, ["/image", "/mechanism", "/reset", "/help", "/exit"])
        raise UserError(f"{command}: no such command; {hint or '/help tells those that there are'}")
    if (word := _WORD.match(question)) and Path(name := shlex.split(word[1])[0]).suffix.lower() in PICTURES:
        raise UserError(f"{name}: no such file")
    for path in paths:
        talk.show(path)
        size: Any = talk.shown[-1].size
        say(f"  {path.name}: {size[0]} x {size[1]}")
    if question:
        cost = talk.ask(question, max_new_tokens, lambda text: say(text, end="", flush=True))
        say(f"\n  [{talk.way}: {cost}]")
