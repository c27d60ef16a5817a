"""What `serve` and `demo-web` understand and say over HTTP: OpenAI's chat completions, in which the model is the name of a mechanism.

Requests come from strangers: all that they may say is in `Request`, what is not is refused by name, and their size is bounded. Pictures come
in the request itself; nothing is fetched, no file is read, and none is written.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import json
import re
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as Received
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .. import limits
from ..errors import UserError, did_you_mean
from ..inputs.conversation import IMAGE, Conversation, Turn
from .engine import End, Engine, Failed, Job

PAGE = Path(__file__).with_name("page.html")
SECURE = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""Of the page: the browser itself lets it reach this server alone."""
MOST_ERRORS = 100  # of a request that are looked at
PATIENCE = 1.0  # seconds between two looks whether somebody who waits is still there
_DATA = re.compile(r"data:image/[\w.+-]+;base64")
_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImageURL(Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: (
        str
        | Annotated[
            list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(max_length=2 * limits.ROW_IMAGES)
        ]
    )


class StreamOptions(Strict):
    include_usage: bool = False


NEUTRAL: dict[str, Any] = {
    "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "stop": [], "tools": [], "logit_bias": {},
    "response_format": {"type": "text"}, "store": False, "metadata": {},
}  # fmt: skip
"""Values that ask for nothing, of what is not read."""


class Request(Strict):
    """A request for an answer, as OpenAI's clients write it; `user` and `detail` change nothing, nor do null and `NEUTRAL` values."""

    @model_validator(mode="before")
    @classmethod
    def _what_asks(cls, told: Any) -> Any:
        if not isinstance(told, dict):
            return told
        return {
            key: value
            for key, value in told.items()
            if value is not None and not (key in NEUTRAL and value == NEUTRAL[key])
        }

    model: str
    messages: list[Message] = Field(min_length=1, max_length=limits.REQUEST_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Literal[1] = 1
    user: str = ""


async def body_of(request: Received) -> bytes:
    """Raises HTTPException if it is longer than is read, or no JSON by its type, which pages of other origins cannot send unasked."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "content-type: expected application/json")
    found = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            found.extend(chunk)
            if len(found) > limits.REQUEST_BYTES:
                raise HTTPException(
                    413, f"the request has more than {limits.REQUEST_BYTES:,} bytes: send smaller or fewer pictures"
                )

    try:
        await asyncio.wait_for(read(), limits.REQUEST_SECONDS)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the request was not there after {limits.REQUEST_SECONDS} s") from None
    return bytes(found)


def parsed(body: bytes) -> Request:
    """Raises HTTPException that names each key which is wrong."""
    try:
        return Request.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > MOST_ERRORS:  # to tell them would take gigabytes
            raise HTTPException(400, f"{error.error_count():,} values are not as OpenAI's interface has them") from None
        wrong = [
            (
                ".".join(map(str, one["loc"]))[:80],
                "not read here; leave it out" if one["type"] == "extra_forbidden" else one["msg"],
            )
            for one in error.errors(include_input=False)[:5]
        ]
        raise HTTPException(400, "; ".join(f"{key}: {text}" if key else text for key, text in wrong)) from None


def conversation_of(messages: list[Message]) -> tuple[Conversation, list[bytes]]:
    """With the files of its pictures. Raises HTTPException or SampleError."""
    turns, pictures, characters = list[Turn](), list[bytes](), 0
    for number, message in enumerate(messages):
        parts = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        texts = list[str]()
        for place, part in enumerate(parts):
            if isinstance(part, ImagePart):
                pictures.append(_picture(part.image_url.url, f"messages.{number}.content.{place}.image_url.url"))
            texts.append(IMAGE if isinstance(part, ImagePart) else part.text)
        turns.append(Turn(_ROLES[message.role], "\n".join(texts)))
        characters += len(turns[-1].text)
    if characters > limits.REQUEST_CHARACTERS or len(pictures) > limits.ROW_IMAGES:
        most = f"at most {limits.REQUEST_CHARACTERS:,} characters and {limits.ROW_IMAGES:,} pictures are read"
        raise HTTPException(400, f"messages: {characters:,} characters and {len(pictures):,} pictures; {most}")
    if turns[-1].role != "human":
        raise HTTPException(
            400, f"messages.{len(messages) - 1}.role: found {messages[-1].role!r}, expected 'user' last"
        )
    return Conversation("of the request", tuple(turns), len(pictures)), pictures


def _picture(url: str, key: str) -> bytes:
    head, _, data = url.partition(",")
    if not _DATA.fullmatch(head):
        why = "nothing is fetched for a client, and no file is read"
        raise HTTPException(
            400, f"{key}: found {url[:40]!r}, expected a picture itself, data:image/...;base64,...: {why}"
        )
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise HTTPException(400, f"{key}: not base64: {error}") from None


def failure(error: Exception) -> tuple[dict[str, Any], int]:
    """What the asker hears of an error, and its status."""
    status = error.status_code if isinstance(error, HTTPException) else 400 if isinstance(error, UserError) else 500
    message = error.detail if isinstance(error, HTTPException) else str(error)
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}, status


def costs(end: End) -> dict[str, Any]:
    """Of an answer: `usage`, in which tokens whose keys were kept count as cached, and `cost`, which OpenAI's interface has not."""
    cost = end.cost
    return {
        "usage": {
            "prompt_tokens": cost.text + cost.visual,
            "completion_tokens": cost.tokens,
            "total_tokens": cost.text + cost.visual + cost.tokens,
            "prompt_tokens_details": {"cached_tokens": cost.known},
        },
        "cost": {
            "visual_tokens": cost.visual,
            "prefill_seconds": cost.prefill,
            "prefill_flops": end.flops,
            "cache_bytes": cost.cache,
            "tokens_per_second": cost.rate,
            "batch": end.batch,
        },
    }


class Server:
    """The application (`app`) around an engine.

    Args:
        engine: answers.
        most: tokens of an answer.
        host: that it is bound to. On loopback only requests that name it are answered, so that no page from elsewhere reaches it by a name
            of its own (DNS rebinding).
        page: whether ``/`` is the page of `demo-web`.
    """

    def __init__(self, engine: Engine, most: int, host: str, page: bool) -> None:
        self.engine, self.most, self.begun = engine, most, int(time.time())
        routes = [Route("/v1/models", self.models), Route("/v1/chat/completions", self.complete, methods=["POST"])]
        hosts = ["localhost", "127.0.0.1", "[::1]", host] if is_loopback(host) else ["*"]
        self.app = Starlette(
            routes=[*routes, Route("/", self.page)] if page else routes,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
            exception_handlers=dict.fromkeys((HTTPException, UserError, Failed), self.refuse),
        )

    async def page(self, received: Received) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=SECURE)

    async def models(self, received: Received) -> Response:
        about = {"object": "model", "created": self.begun, "owned_by": "lit_eemllm"}
        return JSONResponse({"object": "list", "data": [{"id": way, **about} for way in self.engine.ways]})

    async def refuse(self, received: Received, error: Exception) -> Response:
        return JSONResponse(*failure(error))

    async def complete(self, received: Received) -> Response:
        """An answer, whole or as it comes."""
        request = parsed(await body_of(received))
        events = self.answer(request, received)
        first = await anext(events, None)  # an error before it has a status of its own
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}
        if request.stream:
            told = stream(first, events, about, request.stream_options.include_usage)
            return StreamingResponse(told, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        heard = [first, *[event async for event in events]]
        if not isinstance(end := heard.pop(), End):
            return Response(status_code=400)  # to nobody
        message = {"role": "assistant", "content": "".join(map(str, heard))}
        choice = {"index": 0, "message": message, "finish_reason": end.reason}
        return JSONResponse({**about, "object": "chat.completion", "choices": [choice], **costs(end)})

    async def answer(self, request: Request, received: Received) -> AsyncGenerator[str | End, None]:
        """Its pieces, then its end, which is missing if the asker goes away. Raises HTTPException, UserError or Failed."""
        if request.model not in self.engine.ways:
            hint = did_you_mean(request.model, self.engine.ways)
            known = f"model: found {request.model[:80]!r}, expected one of {', '.join(self.engine.ways)}"
            raise HTTPException(404, known + (f"; {hint}" if hint else ""))
        most = request.max_completion_tokens or request.max_tokens or self.most
        if most > self.most:
            raise HTTPException(400, f"max_tokens: found {most:,}, expected at most {self.most:,} (--max-new-tokens)")
        conversation, pictures = conversation_of(request.messages)
        events, loop = asyncio.Queue[str | End | Exception](), asyncio.get_running_loop()

        def tell(event: str | End | Exception) -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        question = Job(request.model, conversation, pictures, most, round(request.temperature, 2), tell)
        self.engine.ask(question)
        try:
            event: str | End | Exception = ""
            while not isinstance(event, End):
                try:
                    event = await asyncio.wait_for(events.get(), PATIENCE)
                except asyncio.TimeoutError:
                    if await received.is_disconnected():
                        return
                    continue
                if isinstance(event, Exception):
                    raise event
                if event:
                    yield event
        finally:
            question.gone.set()


async def stream(
    first: str | End | None, rest: AsyncGenerator[str | End, None], about: dict[str, Any], usage: bool
) -> AsyncGenerator[str, None]:
    """An answer as server-sent events. usage: with a last one that has the costs."""

    def chunk(choices: list[Any], **more: Any) -> str:
        return f"data: {json.dumps({**about, 'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"

    def choice(reason: str | None, **delta: str) -> list[Any]:
        return [{"index": 0, "delta": delta, "finish_reason": reason}]

    yield chunk(choice(None, role="assistant", content=""))
    try:
        event = first
        while isinstance(event, str):
            yield chunk(choice(None, content=event))
            event = await anext(rest, None)
        if event is not None:
            yield chunk(choice(event.reason))
            if usage:
                yield chunk([], **costs(event))
            yield "data: [DONE]\n\n"
    except Failed as error:
        yield f"data: {json.dumps(failure(error)[0])}\n\n"
    finally:
        await rest.aclose()


def is_loopback(host: str) -> bool:
    """Of a name or an address."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
