"""One model that answers questions of many: they wait in a line, and those that wait for the same mechanism are answered together.

The engine computes in a thread of its own, one batch after the other. Each mechanism has its own cache of images, so that to ask
another in between costs nothing: a picture that was asked about before is not computed again where its states do not depend on text.
"""

from __future__ import annotations

import io
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import SampleError, UserError
from ..evaluation.chat import Chat, Cost, Listener, answer_aloud
from ..evaluation.cost import flops_of
from ..inputs.conversation import IMAGE, Conversation, Turn
from ..inputs.images import image_size, open_image
from ..model.image_cache import ImageCache

if TYPE_CHECKING:
    from ..config.keys import Config
    from ..model import EEMLLM, Processor

_log = logging.getLogger(__name__)


class Failed(Exception):
    """To answer a question, which is not to blame."""


@dataclass(frozen=True)
class End:
    """Of an answer.

    Attributes:
        reason: ``stop`` or ``length``.
        cost: of the answer.
        flops: of the decoder's prefill, if the pictures were new.
        batch: answers that were made together; prefill and cache are theirs.
    """

    reason: str
    cost: Cost
    flops: int
    batch: int


@dataclass(eq=False)
class Job:
    """What somebody waits for.

    Attributes:
        way: name of the mechanism.
        conversation: with as many images as `pictures`.
        pictures: files.
        most: tokens of the answer.
        temperature: 0 = greedy.
        tell: takes the answer piece by piece, then its end or what went wrong; called in the engine's thread.
        gone: nobody waits any more.
    """

    way: str
    conversation: Conversation
    pictures: Sequence[bytes]
    most: int
    temperature: float
    tell: Callable[[str | End | Exception], None]
    gone: threading.Event = field(default_factory=threading.Event)


class Engine:
    """Answers questions until the program ends.

    Args:
        model, processor, config: of the run, as `evaluation.run.load` gives them.
        most: answers made together.
    """

    def __init__(self, model: EEMLLM, processor: Processor, config: Config, most: int) -> None:
        self.model, self.processor, self.config, self.most = model, processor, config, most
        self._chat = Chat(model, processor, config, config.model.mechanism.preset)
        self.ways = list(self._chat.ways())
        self._images = {way: ImageCache(int(config.eval.image_cache * 2**30)) for way in self.ways}
        self._line, self._change = deque[Job](), threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()
        self._warm_up()

    def _warm_up(self) -> None:
        """Ask something, since the first answer of a process takes several times as long, which would count against its mechanism."""
        file = io.BytesIO()
        Image.new("RGB", (64, 64), "grey").save(file, "PNG")
        asked = Conversation("warm-up", (Turn("human", f"{IMAGE}\nWhat is it?"),), 1)
        ended = threading.Event()

        def tell(event: str | End | Exception) -> None:
            if not isinstance(event, str):
                ended.set()

        self.ask(Job(self.ways[0], asked, [file.getvalue()], 2, 0.0, tell))
        ended.wait()

    def ask(self, question: Job) -> None:
        """Put a question into the line; its `way` is one of `ways`."""
        with self._change:
            self._line = deque([*self._waiting(), question])
            self._change.notify()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._line)
                batch = self._together()
            try:
                self._answer(batch)
            except BaseException:  # noqa: BLE001  memory may run out, or a tokenizer panic: they hear of it, and the others are answered
                _log.exception("questions of %s", batch[0].way)
                for question in batch:
                    question.tell(Failed("the model could not answer; what is printed where it runs says why"))

    def _waiting(self) -> list[Job]:
        """The line without those that are gone, and their pictures."""
        return [question for question in self._line if not question.gone.is_set()]

    def _together(self) -> list[Job]:
        """Take from the line who is first, and with it those that wait for the same; those that are gone leave."""
        waiting = self._waiting()
        kinds = [(question.way, question.temperature) for question in waiting]
        batch = [one for one, kind in zip(waiting, kinds, strict=True) if kind == kinds[0]][: self.most]
        self._line = deque(question for question in waiting if question not in batch)
        return batch

    def _answer(self, batch: Sequence[Job]) -> None:
        asked, pictures, listeners = list[Job](), list[list[Image.Image]](), list[Listener]()
        for question in batch:
            try:
                shown, most = self._opened(question)
            except UserError as error:
                question.tell(error)
            else:
                asked.append(question)
                pictures.append(shown)
                listeners.append(Listener(self.processor, question.tell, most, question.gone.is_set))
        if not asked:
            return
        self._turn_to(asked[0].way)
        conversations = [question.conversation for question in asked]
        of_model = (self.model, self.processor, self.config)
        costs = answer_aloud(*of_model, conversations, pictures, listeners, asked[0].temperature)
        for question, listener, cost in zip(asked, listeners, costs, strict=True):
            flops = flops_of(self.model, cost.text, cost.visual)
            question.tell(End(listener.ended, cost, flops, len(asked)))

    def _opened(self, question: Job) -> tuple[list[Image.Image], int]:
        """Its pictures, and the tokens that its answer may have. Raises SampleError; before it opens what is too much."""
        transform, allowed, room = self.processor.transform, self.config.data.max_image_pixels, self.context
        names = [f"{number} of the request" for number in range(1, len(question.pictures) + 1)]
        sizes = [image_size(*named, allowed) for named in zip(question.pictures, names, strict=True)]
        if (pixels := sum(width * height for width, height in sizes)) > allowed:
            found = f"the pictures of the request have {pixels:,} pixels"
            raise SampleError("image_too_large", f"{found}, more than data.max_image_pixels={allowed:,} together")
        encoded = self.processor.template.encode(question.conversation, generation=True)
        pieces = [transform.pieces(*transform.size_among(size, len(sizes))) for size in sizes]
        shown = encoded.with_pieces(pieces, self.processor.template.text_ids)
        if (used := len(shown.ids) - len(shown.runs) + sum(shown.runs)) >= room:
            found = f"the conversation has {used:,} tokens, {len(sizes)} pictures among them"
            raise SampleError("too_long", f"{found}; the decoder knows {room:,} positions, the answer's among them")
        opened = [open_image(*named, allowed) for named in zip(question.pictures, names, strict=True)]
        return opened, min(question.most, room - used)

    @property
    def context(self) -> int:
        """Positions that the decoder knows."""
        decoder: Any = self.model.config.text_config
        return int(decoder.max_position_embeddings)

    def _turn_to(self, way: str) -> None:
        if way != self._chat.way:
            self.model.image_cache = None  # the other's is kept
            self._chat.switch(way)
        self.model.image_cache = self._images[way] if self._images[way].max_bytes else None
