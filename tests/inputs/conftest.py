"""A tokenizer by its name in lib/chat.py."""

from __future__ import annotations

import pytest
from lib.chat import INST, build
from transformers import AutoTokenizer, PreTrainedTokenizerFast


@pytest.fixture
def tokenizer(request) -> PreTrainedTokenizerFast:
    if request.param == "stories15m":
        loaded = AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / "weights" / "stories15m")
        loaded.chat_template = INST
        return loaded
    return build(request.param)
