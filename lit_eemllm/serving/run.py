"""`serve` and `demo-web`: load a run, take the port, and answer until Ctrl-C."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import uvicorn

from .. import limits
from ..console import quiet_libraries
from ..errors import UserError
from ..evaluation.run import load
from ..terminal import say
from .api import Server, is_loopback
from .engine import Engine

if TYPE_CHECKING:
    from ..config.keys import Config


def serve(
    config: Config, checkpoint: str | None, host: str, port: int, max_new_tokens: int, batch: int, page: bool
) -> None:
    """Raises UserError for an option or a run that cannot be used.

    Args:
        config, checkpoint: of the run.
        host, port: to be bound to; port 0 = any that is free, which is told.
        max_new_tokens: most tokens of an answer.
        batch: most answers made together.
        page: with the page of `demo-web`.
    """
    for name, number in (("--max-new-tokens", max_new_tokens), ("--batch", batch)):
        if number < 1:
            raise UserError(f"{name} {number}: expected 1 or more")
    quiet_libraries()
    taken = listening(host, port)
    with taken:
        model, processor, source = load(config, checkpoint)
        engine = Engine(model, processor, config, batch)
        server = server_of(engine, max_new_tokens, host, page)
        address = f"http://{f'[{host}]' if ':' in host else host}:{taken.getsockname()[1]}"
        say(f"{source}, as {', '.join(engine.ways)}")
        say(f"{address if page else f'{address}/v1'}; Ctrl-C ends it", flush=True)
        if not is_loopback(host):
            say("whoever reaches this address may ask: it knows no passwords and is not encrypted", flush=True)
        with suppress(KeyboardInterrupt):
            server.run(sockets=[taken])


def server_of(engine: Engine, max_new_tokens: int, host: str, page: bool) -> uvicorn.Server:
    """For a socket that is `listening`."""
    return uvicorn.Server(
        uvicorn.Config(
            Server(engine, max_new_tokens, host, page).app,
            log_config=None,  # the program's own, which writes out what would steer a terminal
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            limit_concurrency=limits.CONNECTIONS,
            timeout_graceful_shutdown=2,
        )
    )


def listening(host: str, port: int) -> socket.socket:
    """A socket of that address. Raises UserError if there is none to be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        text = os.strerror(number) if number and number > 0 else error
        raise UserError(f"--host {host} --port {port}: {text}; --port 0 takes one that is free") from None
