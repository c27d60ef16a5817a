"""FLOPs against the figures of the papers, recomputed (7B shapes; mechanisms table, TFLOPs)."""

import pytest
from transformers import LlamaConfig

from lit_eemllm.estimate import prefill_flops
from lit_eemllm.mechanisms import NO_ALIGNER, Mechanism, build_mechanism

VICUNA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32
)
ROWS = {name: build_mechanism(name, 32) for name in ("llava", "ee_mllm", "naavit", "saisa", "vica")}
ROWS["no aligner (ShortV in all layers, FreezeVis)"] = Mechanism(aligner=NO_ALIGNER)
TERA = {
    "llava": (8.504, 42.675, 80.718),
    "ee_mllm": (7.692, 35.137, 62.211),
    "naavit": (7.074, 32.045, 56.950),
    "saisa": (2.860, 10.978, 21.107),
    "no aligner (ShortV in all layers, FreezeVis)": (2.087, 7.112, 14.530),
    "vica": (1.143, 2.388, 6.123),
}


@pytest.mark.parametrize("name", ROWS)
def test_published_prefill_flops(name):
    options = {"last_layer_saving": False, "vision_width": 1024, "prefix": 35 * (name == "vica")}
    shapes = [(64, 576), (64, 2880), (256, 4900)]
    found = [prefill_flops(ROWS[name], VICUNA_7B, text, visual, **options) / 1e12 for text, visual in shapes]
    assert [round(value, 3) for value in found] == list(TERA[name])


def test_text_only_last_layer_and_grouped_queries():
    for mechanism in ROWS.values():
        assert round(prefill_flops(mechanism, VICUNA_7B, 64, 0) / 1e12, 3) == 0.831
    h, m, text, visual = 4096, 11008, 64, 576
    full = prefill_flops(build_mechanism("ee_mllm", 32), VICUNA_7B, text, visual, last_layer_saving=False)
    assert full - prefill_flops(build_mechanism("ee_mllm", 32), VICUNA_7B, text, visual) == visual * (
        2 * h * h + 6 * h * m
    )
    tiny = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    rows = 3 * 2 * (8 * 8 + 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16) + 4 * 3 * (3 + 5) * 8
    assert prefill_flops(build_mechanism("llava", 1), tiny, 3, 5) == rows + 5 * 4 * 8 * 4
