"""Models of transformers' own with random weights: a LLaVA, and the small ones of `KINDS`, a folder each."""

import pytest
from lib.llava import random_llava, write_llava
from lib.vlms import KINDS, write
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


@pytest.fixture(scope="module", params=KINDS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return write(name, tmp_path_factory.mktemp(name), num_hidden_layers=4)
