"""Visual rows in 8-bit floats, as a GPU would round them: by torchao's emulation, which rounds and then multiplies in float32."""

from __future__ import annotations

import pytest
import tiny
import torch
from lib.equations import MECHANISMS

from lit_eemllm.config import load_config
from lit_eemllm.errors import ConfigError
from lit_eemllm.model.fp8 import LINEAR, use_fp8

pytest.importorskip("torchao")
pytestmark = pytest.mark.extras
LARGEST = 448.0
"""That E4M3 holds."""


def rounded(x, dim):
    """To 8 bits and back, each row or column scaled to the largest number, by a power of two."""
    scale = (LARGEST / x.abs().amax(dim, keepdim=True).double()).log2().floor().exp2()
    return ((x * scale.float()).to(torch.float8_e4m3fn).float().double() / scale).float()


def narrowed(name="ee_mllm", decoder="llama"):
    model = tiny.model(decoder, MECHANISMS[name])
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    use_fp8(model, emulate=True)
    return model


def test_products_are_of_rounded_rows_and_weights():
    layer = narrowed().language_model.model.layers[0]
    x = torch.randn(5, layer.self_attn.q_proj.in_features)
    for name in LINEAR[:4]:
        weight = layer._own(name).weight
        assert layer.narrow[name].weight is weight, "no copy"
        true, exact = rounded(x, 1) @ rounded(weight, 1).T, x @ weight.T
        found = layer.narrow[name](x)
        assert (found - true).norm() <= 0.01 * exact.norm() < (found - exact).norm() <= 0.06 * exact.norm()
        rows = layer._run(name, x, 2)
        assert (
            tiny.max_error(rows[:2], exact[:2]) <= 1e-6 and tiny.max_error(rows[2:], layer.narrow[name](x[2:])) <= 1e-6
        )
    x = torch.randn(5, layer.mlp.gate_proj.in_features)
    gate, up = (rounded(x, 1) @ rounded(one.weight, 1).T for one in (layer.mlp.gate_proj, layer.mlp.up_proj))
    true = rounded(layer.mlp.act_fn(gate) * up, 1) @ rounded(layer.mlp.down_proj.weight, 1).T
    assert (layer.narrow["mlp"](x) - true).norm() <= 0.02 * true.norm()
    assert type(layer.mlp.gate_proj) is torch.nn.Linear, "text runs through the layer's own"


@pytest.mark.parametrize("name", ["llava", "ee_mllm", "vica", "experts of all parts", "pyramid_drop"])
def test_text_that_sees_no_image_is_as_it_was(name):
    """Text after an image, and gradients of the projector, are near, as far as a random model, which enlarges what is rounded, says so. Copies of weights, which are trained, stay as they are."""
    batch, models = tiny.pack([[3, 0, 4], [6]]), (tiny.model("llama", MECHANISMS[name]), narrowed(name))
    whole, narrow = (model.packed_logits(batch)[..., : tiny.VOCAB] for model in models)
    text = (batch.target_rows < 3) | (batch.target_rows >= 3 + 4)
    assert tiny.max_error(narrow[text], whole[text]) <= 1e-6
    seen = [x[~text].flatten() for x in (narrow, whole)]
    assert torch.cosine_similarity(*seen, dim=0) > 0.95 and (name == "experts of all parts") == torch.equal(*seen)
    for model in models:
        model.packed_loss(batch).backward()
    for one, other in zip(*(model.projector.parameters() for model in models), strict=True):
        assert torch.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0) > 0.8


def test_state_and_mechanism_are_as_before():
    model, plain = narrowed("llava"), tiny.model("llama", MECHANISMS["llava"])
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.set_mechanism(MECHANISMS["vica"])
    plain.set_mechanism(MECHANISMS["vica"])
    with torch.no_grad():
        found, true = (one.packed_logits(tiny.pack([[3, 0, 4]]))[..., : tiny.VOCAB] for one in (model, plain))
    assert not found.equal(true) and torch.cosine_similarity(found.flatten(), true.flatten(), dim=0) > 0.95


def test_what_has_no_8_bits_is_told():
    with pytest.raises(ConfigError, match="needs a CUDA device of compute capability"):
        use_fp8(tiny.model())
    model = tiny.model()
    model.language_model.model.layers[0].mlp.down_proj = torch.nn.Linear(40, 64)
    with pytest.raises(ConfigError, match="found a weight of 64 x 40, expected multiples of 16"):
        use_fp8(model, emulate=True)
    words = ["model.decoder=a", "model.vision.path=b", "data.train=c", "optim.max_steps=1", "optim.lr=1e-3"]
    for other in ("optim.tuning.llm=lora", "trainer.strategy=fsdp2", "model.quantization=nf4", "model.liger=true"):
        with pytest.raises(ConfigError, match=f"model.fp8: found true together with {other}, and is for linear layers"):
            load_config([], [*words, "model.fp8=true", "optim.tuning.llm=frozen", other])
    assert load_config([], [*words, "model.fp8=true", "optim.tuning.llm=frozen"]).model.fp8
