"""A LLaVA of transformers' own with random weights."""

import pytest
from lib.llava import random_llava, write_llava
from tokenizers import AddedToken
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def tokenizer(parts):
    made = AutoTokenizer.from_pretrained(parts / "decoder")
    made.add_tokens([AddedToken("<image>", special=True)])
    return made


@pytest.fixture(scope="session")
def llava_folder(tokenizer, tmp_path_factory):
    return write_llava(random_llava(tokenizer), tokenizer, tmp_path_factory.mktemp("llava"))
