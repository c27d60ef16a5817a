"""The contracts with other libraries of `lit_eemllm.compat`, and their deprecations."""

import logging

import pytest
import tiny
import transformers
from transformers.utils import logging as transformers_logging

from lit_eemllm.compat.transformers import CACHE


@pytest.mark.parametrize("beams", [1, 2])
def test_generating_with_a_cache_of_ours_warns_of_nothing(beams, caplog, monkeypatch):
    """A deprecated name of the cache, in arguments or outputs, is what breaks next."""
    monkeypatch.setattr(transformers_logging.get_logger(), "propagate", True)
    transformers_logging.set_verbosity_warning()
    inputs = tiny.prompt(model := tiny.model(), [[3, 0, 4], [5]])
    with caplog.at_level(logging.WARNING):
        filled = model(**inputs, use_cache=True)
        out = model.generate(
            **inputs, max_new_tokens=3, num_beams=beams, pad_token_id=0, return_dict_in_generate=True, do_sample=False
        )
    said = [record.getMessage() for record in caplog.records if "deprecat" in record.getMessage().lower()]
    assert not said, f"transformers {transformers.__version__}: {said}"
    assert filled[CACHE].get_seq_length() == inputs["input_ids"].shape[1]
    assert out[CACHE].columns == out.sequences.shape[1] - 1
    assert not out[CACHE].is_croppable
