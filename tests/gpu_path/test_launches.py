"""How many kernels a decoder layer starts on a GPU, beside transformers' own layer on the same shapes."""

from __future__ import annotations

from lib.fake_cuda import on_fake_cuda

MORE = {
    ("llava", "flash"): 3,  # text rows and visual rows are joined, and brought to stream order and back
    ("llava", "sdpa"): 3,
    ("ee_mllm", "flash"): 12,  # two calls, of the text before an image and after it, with the keys that each sees
    ("ee_mllm", "sdpa"): 13,  # a mask, which PyTorch converts
    ("vica", "flash"): 0,  # in a layer whose text sees no image
}
"""Mechanism, backend -> kernels more than transformers' layer, which has 38. Of a prompt of text, image, text."""


def launches_of_a_layer(mechanism: str | None, backend: str = "flash") -> int:
    """Of a prompt without gradients, in bfloat16: those of four layers less those of three. None: transformers' Llama."""
    import copy
    from collections import Counter

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
def test_a_layer_starts_few_kernels_more_than_transformers_own():
    base = launches_of_a_layer(None)
    assert base == 38
    assert {case: launches_of_a_layer(*case) - base for case in MORE} == MORE
