"""How many kernels a decoder layer starts on a GPU, and the bytes that they read and write, beside transformers' own layer on the same
shapes."""

from __future__ import annotations

from collections import Counter

import pytest
from lib.fake_cuda import on_fake_cuda

MORE = {
    ("llava", "flash"): -12,  # 12 of norms and 2 of rotation; rows are brought to stream order and back
    ("llava", "sdpa"): -12,
    ("ee_mllm", "flash"): -3,  # two calls, of the text before an image and after it, with the keys that each sees
    ("ee_mllm", "sdpa"): -2,  # a mask, which PyTorch converts
    ("vica", "flash"): -14,  # in a layer whose text sees no image
}
"""Mechanism, backend -> kernels more than transformers' layer, which has 38. Of a prompt of text, image, text."""


def launches_of_a_layer(mechanism: str | None, backend: str = "flash") -> int:
    """Of a prompt without gradients, in bfloat16: those of four layers less those of three. None: transformers' Llama."""
    import copy

    import tiny
    import torch
    from lib.fake_cuda import steps
    from lib.fake_cuda.world import World
    from transformers import AutoModelForCausalLM

    from lit_eemllm.mechanisms import build_mechanism

    counted = []
    for layers in (3, 4):
        with World() as world, torch.no_grad():
            config = copy.deepcopy(tiny.DECODERS["llama-gqa"])
            config.num_hidden_layers = layers
            if mechanism is None:
                model = (
                    AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(torch.bfloat16).to("cuda")
                )
                states = torch.zeros(1, 20, config.hidden_size, dtype=torch.bfloat16).pin_memory().to("cuda")
                world.forget()
                model.model(inputs_embeds=states, use_cache=False)
            else:
                made = (
                    tiny.model("llama-gqa", build_mechanism(mechanism, layers), layers=layers)
                    .to(torch.bfloat16)
                    .to("cuda")
                )
                made._backend = steps.backend(backend)
                batch = tiny.pack([[3, 0, 4]]).pin_memory().to(made.device)
                world.forget()
                made.packed_logits(batch)
            counted.append(Counter(world.launches))
    found = counted[1] - counted[0]
    del found["_unsafe_view.default"]  # starts none
    return found.total()


@on_fake_cuda
def test_a_layer_starts_fewer_kernels_than_transformers_own():
    base = launches_of_a_layer(None)
    assert base == 38
    assert {case: launches_of_a_layer(*case) - base for case in MORE} == MORE


TEXT, VISUAL = 256, 576
MOVED = {
    ("llava", "flash"): 0.782,
    ("llava", "sdpa"): 0.782,
    ("ee_mllm", "flash"): 0.755,
    ("ee_mllm", "sdpa"): 0.751,
    ("vica", "flash"): 0.869,  # beside a layer of text alone
}
"""Mechanism, backend -> bytes beside those of transformers' layer at 7B, 1,080.6 MB, of which 404.8 are weights."""


def bytes_of_a_layer(mechanism: str | None, backend: str, visual: int) -> Counter[str]:
    """Likewise, of one prompt at the widths of a 7B decoder: those that operators read and write, by name."""

    import torch
    from lib.fake_cuda.world import World
    from transformers import AutoModelForCausalLM

    from lit_eemllm.attention.flash import Flash
    from lit_eemllm.attention.sdpa import Sdpa
    from lit_eemllm.cost.weightless import parts_of_shape
    from lit_eemllm.layout import PackedBatch, Run, SequenceLayout
    from lit_eemllm.mechanisms import build_mechanism
    from lit_eemllm.model import EEMLLM, EEMLLMConfig

    counted = []
    for layers in (3, 4):
        parts = parts_of_shape("vicuna-7b")
        parts.decoder.num_hidden_layers = layers
        with World(numbers=False) as world, torch.no_grad():
            with torch.device("meta"):
                if mechanism is None:
                    model = AutoModelForCausalLM.from_config(parts.decoder, attn_implementation="sdpa")
                else:
                    made, vision = (
                        build_mechanism(mechanism, layers),
                        {"encoder": parts.encoder, "config": parts.vision},
                    )
                    model = EEMLLM(EEMLLMConfig(parts.decoder, vision, made.to_dict(), parts.decoder.vocab_size))
            model.to(torch.bfloat16).to_empty(device="cuda").to("cuda")
            if mechanism is None:
                states = torch.zeros(1, TEXT + visual, 4096, dtype=torch.bfloat16, device="cuda")
                world.forget()
                model.model(inputs_embeds=states, use_cache=False)
            else:
                model._backend = Sdpa() if backend == "sdpa" else Flash("PyTorch")
                half, images = Run(False, TEXT // 2), visual // VISUAL
                layout = SequenceLayout.of([[half, *[Run(True, VISUAL)] * images, half]])
                rows, ids = torch.arange(TEXT), torch.zeros(layout.num_tokens, dtype=torch.long)
                batch = PackedBatch(ids, rows, torch.zeros_like(rows), torch.zeros(images, 3, 336, 336), layout, [])
                batch = batch.pin_memory().to(model.device)
                world.forget()
                model.packed_logits(batch)
            counted.append(Counter(world.traffic))
    found = counted[1] - counted[0]
    del found["_unsafe_view.default"]  # moves none
    return found


@pytest.mark.slow
@on_fake_cuda
def test_a_layer_moves_fewer_bytes_than_transformers_own():
    base = {visual: bytes_of_a_layer(None, "sdpa", visual) for visual in (0, VISUAL)}
    rows, h, ffn = TEXT + VISUAL, 4096, 11008
    weights, activations = 4 * h * h + 3 * h * ffn, rows * (4 * (h + h) + 3 * (h + ffn))
    assert base[VISUAL]["mm.default"] == 2 * (weights + activations), "the seven products, by hand"
    assert base[VISUAL].total() == pytest.approx(1080.6e6, abs=5e4)
    found = {
        case: bytes_of_a_layer(*case, VISUAL).total() / base[0 if case[0] == "vica" else VISUAL].total()
        for case in MOVED
    }
    assert found == pytest.approx(MOVED, abs=6e-4)


@pytest.mark.slow
def moved_beside(mechanism):
    """Bytes of a layer's kernels but products and attention, of 4,608 visual and 256 text tokens."""
    found = bytes_of_a_layer(mechanism, "flash", 8 * VISUAL)
    return sum(moved for name, moved in found.items() if "mm" not in name and "attn" not in name)


@on_fake_cuda
def test_what_a_layer_moves_beside_products_and_attention_at_4_608_visual_tokens():
    """In gigabytes; docs/performance.md makes milliseconds of it."""
    for mechanism, expected in (("llava", 1.656), ("ee_mllm", 1.411)):
        assert moved_beside(mechanism) == pytest.approx(1e9 * expected, rel=1e-3)


@on_fake_cuda
def test_the_prediction_of_a_7b_prefill():
    """Of 4,900 visual and 256 text tokens, as docs/performance.md states it: products at 790 TFLOP/s, bytes at 4.8 TB/s, 3 ms of attention.

    Products by hand: text passes through all matrices, visual rows not through those of queries, and in the last layer, where nothing
    reads them, through those of keys and values alone.
    """
    from transformers import LlamaConfig

    from lit_eemllm.cost.formulas import prefill_flops
    from lit_eemllm.mechanisms import build_mechanism

    h, m, layers, text, visual = 4096, 11008, 32, 256, 4900
    products = 2 * layers * (text * (4 * h * h + 3 * h * m) + visual * (3 * h * h + 3 * h * m))
    products -= 2 * visual * (h * h + 3 * h * m)
    attention = 4 * layers * text * (text + visual) * h
    config = LlamaConfig(hidden_size=h, intermediate_size=m, num_hidden_layers=layers, num_attention_heads=32)
    assert prefill_flops(build_mechanism("ee_mllm", layers), config, text, visual) == products + attention
    rest = layers * moved_beside("ee_mllm") * (text + visual) / (text + 8 * VISUAL)
    assert 1e3 * products / 790e12 == pytest.approx(76.0, abs=0.05)
    assert 1e3 * rest / 4.8e12 == pytest.approx(10.0, abs=0.05)
    assert 1e3 * (products / 790e12 + rest / 4.8e12) + 3 < 90
