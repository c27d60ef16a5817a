"""Which norms PyTorch's kernel stands for, and what it computes; rows that lie in memory as a layer wants them."""

import copy

import pytest
import tiny
import torch
from lib.equations import MECHANISMS
from lib.fake_cuda import on_fake_cuda
from lib.mechanisms import BOUND

from lit_eemllm.core.norms import is_rms_norm
from lit_eemllm.core.stream import joined

PLAIN = [name for name in tiny.DECODERS if "gemma" not in name]


@pytest.mark.parametrize("decoder", tiny.DECODERS)
def test_norms_of_every_family_are_told_apart(decoder):
    """By trying: Gemma's weights are 1 less, and it calls eps what Llama 4 does."""
    norms = [m for m in tiny.model(decoder).language_model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert norms
    assert {is_rms_norm(norm) for norm in norms} == {decoder in PLAIN}


@pytest.mark.parametrize("spoil", [lambda y: 1.01 * y, lambda y: y + 1e-3])
def test_a_norm_that_only_looks_like_one_is_none(spoil):
    norm = tiny.model().language_model.model.norm

    class Other(type(norm).__base__):
        def forward(self, x):
            return spoil(super().forward(x))

    other, matrix = copy.deepcopy(norm), copy.deepcopy(norm)
    other.__class__ = Other
    matrix.weight = torch.nn.Parameter(torch.ones(2, 3))
    assert is_rms_norm(norm) and not is_rms_norm(other) and not is_rms_norm(matrix)


@on_fake_cuda
def test_one_kernel_computes_transformers_norm_with_gradients():
    """In float32 the same; in bfloat16 no farther from it than transformers' own, which rounds twice. Under autocast likewise."""
    from lib.fake_cuda.world import World

    for decoder in ("llama-gqa", "olmo2", "llama4_text"):
        for dtype in (torch.float32, torch.bfloat16):
            norm = tiny.model(decoder).language_model.model.norm
            with torch.no_grad():
                norm.weight.uniform_(-1, 2)
            x = torch.randn(7, len(norm.weight)).to(dtype)
            found = []
            for run, kind, device in (
                (type(norm).__base__.forward, torch.float64, "cpu"),
                (type(norm).__base__.forward, dtype, "cpu"),
                (None, dtype, "cuda"),
            ):
                with World() as world:
                    module = copy.deepcopy(norm).to(kind).to(device)
                    x_Rh = (
                        (x.to(kind).pin_memory().to(device) if device == "cuda" else x.to(kind))
                        .detach()
                        .requires_grad_()
                    )
                    world.forget()
                    with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
                        y_Rh = module(x_Rh) if run is None else run(module, x_Rh)
                    if run is None:
                        assert dict(world.launches) == {"_fused_rms_norm.default": 1}
                        assert y_Rh.dtype == dtype
                    (y_Rh * torch.arange(7.0).to(kind).pin_memory().to(device)[:, None]).sum().backward()
                    found.append([z.detach().cpu().double() for z in (y_Rh, x_Rh.grad, module.weight.grad)])
            true, own, fused = found
            for a, b, c in zip(true, own, fused, strict=True):
                bound = 1e-6 if dtype == torch.float32 else 1.1 * ((b - a).abs().max() / a.abs().max()).item()
                assert ((c - a).abs().max() / a.abs().max()).item() <= bound, (decoder, dtype)


@on_fake_cuda
def test_one_kernel_keeps_its_input_and_a_number_a_row():
    """As `estimate` counts it, by PyTorch's LayerNorm; transformers' norm keeps it in float32 twice."""
    from lib.fake_cuda.world import World

    with World():
        norm = tiny.model().language_model.model.norm.bfloat16().to("cuda")
        x_Rh = torch.ones(7, len(norm.weight)).bfloat16().pin_memory().to("cuda").requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append((*x.shape, x.dtype)) or x, lambda x: x):
            norm(x_Rh)
    assert len(kept) == 3
    assert set(kept) == {(7, 32, torch.bfloat16), (32, torch.bfloat16), (7, 1, torch.float32)}


@on_fake_cuda
def test_what_pytorch_has_no_kernel_for_runs_as_before():
    from lib.fake_cuda.world import World

    with World() as world, torch.no_grad():
        norm = tiny.model().language_model.model.norm.bfloat16().to("cuda")
        for x in (torch.ones(3, len(norm.weight)), torch.ones(0, len(norm.weight)).bfloat16()):
            norm(x.pin_memory().to("cuda"))
        assert "_fused_rms_norm.default" not in world.launches


def test_rows_are_joined_where_they_are_or_else_copied():
    x_Rh = torch.arange(12.0).view(6, 2)
    with torch.no_grad():
        for text in (0, 2, 6):
            rows = joined(x_Rh[:text], x_Rh[text:])
            assert rows.equal(x_Rh) and rows.data_ptr() == x_Rh.data_ptr()
        for pair in (
            (x_Rh[:2], x_Rh[3:]),
            (x_Rh[2:4], x_Rh[:2]),
            (x_Rh[:2], x_Rh[2:].clone()),
            (x_Rh[:2, :1], x_Rh[2:, 1:]),
        ):
            assert joined(*pair).equal(torch.cat(pair))
    leaf = x_Rh.clone().requires_grad_()
    joined(leaf[:2], leaf[2:]).sum().backward()
    assert leaf.grad.equal(torch.ones(6, 2))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_pass_without_gradients_says_what_one_with_them_says(mechanism):
    """Nothing that is written into memory in use, of several documents, and of decoders with and without grouped queries, and with queries that do
    not rotate but grow."""
    for decoder, context in (
        ("llama-gqa", torch.no_grad),
        ("llama", torch.inference_mode),
        ("llama4_text", torch.no_grad),
    ):
        model = tiny.model(decoder, MECHANISMS[mechanism]).eval()
        batch = tiny.pack([[3, 0, 4], [2, 0, 1, 0, 3], [7], [0, 2]])
        with_gradients = model.packed_logits(batch)
        assert with_gradients.requires_grad
        with context():
            assert (
                tiny.max_error(model.packed_logits(batch), with_gradients.detach()) <= BOUND
            )  # rotation rounds once less
