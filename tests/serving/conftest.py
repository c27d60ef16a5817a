"""A model behind OpenAI's interface, in a thread of this process."""

from __future__ import annotations

import threading
import time

import pytest
import tiny

from lit_eemllm.evaluation.chat import Chat
from lit_eemllm.evaluation.run import UNTRAINED, load
from lit_eemllm.serving.engine import Engine
from lit_eemllm.serving.run import listening, server_of


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """Of an untrained model that treats visual tokens as `ee_mllm` without its feed-forward network."""
    folder = tmp_path_factory.mktemp("serving")
    tiny.write_parts(folder / "parts", max_position_embeddings=512)
    options = ("model.mechanism.preset=ee_mllm", "model.mechanism.aligner.ffn=false", "data.max_image_pixels=100000")
    return tiny.config(folder / "parts", "nowhere", folder / "run", *options)


@pytest.fixture(scope="session")
def alone(config):
    """Somebody who talks with the same model, where nobody else asks."""
    return Chat(*load(config, UNTRAINED)[:2], config, "ee_mllm")


@pytest.fixture(scope="module")
def engine(config):
    return Engine(*load(config, UNTRAINED)[:2], config, 4)


@pytest.fixture(scope="module")
def address(engine):
    """Where it answers, at most 40 tokens, with the page."""
    taken = listening("127.0.0.1", 0)
    server = server_of(engine, 40, "127.0.0.1", page=True)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield taken.getsockname()
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
