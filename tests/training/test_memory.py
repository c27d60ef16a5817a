"""Memory: recomputed activations change nothing, frozen parts keep nothing for gradients they do not have."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import tiny
import torch
from lib.mechanisms import KINDS

from lit_eemllm.errors import ConfigError
from lit_eemllm.model.packed import summed_loss

PACK = [[3, 0, 4], [2, 0, 1, 0, 3], [7], [0, 2]]


def kept_bytes(model, batch):
    """Loss, gradients, and bytes of distinct tensors kept for the backward pass, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.packed_loss(batch)
    total = sum(kept.values())
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, total


@pytest.mark.parametrize("preset", KINDS)
def test_checkpointing_gives_the_same_gradients_bit_by_bit_with_less_memory(preset):
    model, batch = tiny.model("llama-gqa", preset), tiny.pack(PACK * 4)
    model.set_attention("sdpa")
    loss, gradients, kept = kept_bytes(model, batch)
    model.activation_checkpointing = True
    again, same, less = kept_bytes(model, batch)
    assert again.equal(loss) and same.keys() == gradients.keys()
    assert all(same[name].equal(gradients[name]) for name in gradients)
    model.activation_offload = True
    assert all(gradients[name].equal(x) for name, x in kept_bytes(model, batch)[1].items())
    # flamingo's resampler, the larger part here, is kept; most layers of vica are those of text alone, and those of visionzip have few
    # visual tokens, which keep little
    assert less < {"flamingo": 1, "vica": 0.6, "visionzip": 0.6}.get(preset, 0.55) * kept


@pytest.mark.parametrize("preset", ["ee_mllm", "llava"])
def test_a_frozen_decoder_keeps_no_inputs_for_weight_gradients(preset):
    model, batch = tiny.model("llama-gqa", preset), tiny.pack(PACK * 4)
    model.vision.requires_grad_(False)
    model.set_attention("sdpa")
    full = kept_bytes(model, batch)[2]
    model.language_model.requires_grad_(False)
    _, gradients, frozen = kept_bytes(model, batch)
    assert set(gradients) == {f"projector.linear_{i}.{p}" for i in (1, 2) for p in ("weight", "bias")}
    assert frozen < 0.8 * full


def test_logits_exist_at_supervised_positions_only():
    model, batch = tiny.model(), tiny.pack([[3, 0, 40]])
    batch.target_rows, batch.targets = batch.target_rows[-2:], batch.targets[-2:]
    shapes = []
    model.language_model.lm_head.register_forward_hook(lambda _, args, out: shapes.append(out.shape))
    model.packed_loss(batch)
    assert shapes == [(2, tiny.VOCAB)]


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_a_loss_in_parts_is_the_loss(rows):
    """With a bias and a frozen or trained head, and no part with more logits than asked for, in either pass."""
    torch.manual_seed(0)
    head, x_nh, targets = torch.nn.Linear(8, 30).double(), torch.randn(40, 8).double(), torch.randint(30, (40,))
    parts, seen, found = [None, rows], [], []
    head.register_forward_hook(lambda _, args, out: seen.append(len(out)))
    for trained in (True, False):
        head.requires_grad_(trained)
        for part in parts:
            x_nh, head.weight.grad = x_nh.detach().requires_grad_(), None
            loss = summed_loss(head, x_nh, targets, part)
            loss.backward()
            found.append([loss.detach(), x_nh.grad, *[head.weight.grad] * trained])
    for whole, cut in (found[:2], found[2:]):
        torch.testing.assert_close(whole, cut)
    many = -(-40 // rows)
    assert len(seen) == 2 * (1 + (2 * many if many > 1 else 1)) and max(seen[1 : len(seen) // 2]) == rows


def test_liger_without_a_gpu_says_what_it_needs():
    if torch.cuda.is_available():
        pytest.skip("has one")
    with pytest.raises(ConfigError, match="needs a CUDA device and liger-kernel"):
        tiny.model().use_liger()


@pytest.mark.parametrize(
    ("decoder", "act", "found"),
    [
        ("qwen3", "silu", "has no RMSNorm and SwiGLU for decoders of model_type 'qwen3'"),
        ("qwen2", "silu", "has no RMSNorm and SwiGLU for decoders of model_type 'qwen2'"),
        ("llama", "gelu", "computes SiLU in feed-forward networks, this decoder's hidden_act is 'gelu'"),
    ],
)
def test_liger_refuses_a_decoder_that_it_would_change(decoder, act, found, monkeypatch):
    """With a liger-kernel that knows one family, and another's norms alone."""

    def whole(rope, cross_entropy, fused_linear_cross_entropy, rms_norm, swiglu, model): ...

    def half(rope, cross_entropy, fused_linear_cross_entropy, rms_norm, geglu, model): ...

    package, inner = (ModuleType(name) for name in ("liger_kernel", "liger_kernel.transformers"))
    package.__spec__, package.transformers = ModuleSpec("liger_kernel", None), inner
    inner.apply_liger_kernel_to_llama, inner.apply_liger_kernel_to_qwen2 = whole, half
    for module in (package, inner):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = tiny.model(decoder)
    monkeypatch.setattr(model.config.text_config, "hidden_act", act)
    with pytest.raises(ConfigError, match=rf"^model\.liger: .*{found}; set model\.liger=false"):
        model.use_liger()


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["llama-16", "qwen3", "olmo2", "smollm3"])
def test_liger_computes_the_same(decoder):
    pytest.importorskip("liger_kernel")
    model, batch = tiny.model(decoder).to("cuda"), tiny.pack(PACK).to("cuda")
    true, gradients, _ = kept_bytes(model, batch)
    model.use_liger()
    found, same, _ = kept_bytes(model, batch)
    torch.testing.assert_close(found, true, rtol=1e-4, atol=0)
    for name, gradient in gradients.items():
        assert (same[name] - gradient).abs().max() <= 1e-3 * max(g.abs().max() for g in gradients.values()), name
