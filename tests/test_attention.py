"""Layouts, the dense mask as the law, and every backend against the reference, gradients included."""

import itertools

import pytest
import torch

from lit_eemllm.attention import AttentionBackend, register_backend, registered_backends, resolve_backend
from lit_eemllm.attention.base import _BACKENDS, probe
from lit_eemllm.errors import ConfigError
from lit_eemllm.layout import Run, SequenceLayout, Visibility

T, V = (lambda n: Run(False, n)), (lambda n: Run(True, n))
LAYOUTS = {
    "text only": [[T(5)]],
    "text-image-text": [[T(3), V(4), T(5)]],
    "image first": [[V(4), T(3)]],
    "image last": [[T(3), V(2)]],
    "two images": [[T(2), V(3), T(1), V(2), T(4)]],
    "adjacent images": [[T(1), V(3), V(2), T(2)]],
    "pack": [[T(3), V(4), T(5)], [T(7)], [V(2), T(1)], [T(1), V(9), T(2), V(1), T(1)], [T(3), V(4), T(4)], [V(2)]],
}  # fmt: skip
BACKENDS = [name for name in registered_backends() if name != "reference"]
DENSE, COMPOSITE = Visibility(visual_queries=True), Visibility(visual_queries=False)


def test_mask_is_drawn_as_documented():
    layout = SequenceLayout.of([[T(2), V(2), T(1)], [V(1), T(1)]])
    dense = """1 0 0 0 0 0 0
               1 1 0 0 0 0 0
               1 1 1 0 0 0 0
               1 1 1 1 0 0 0
               1 1 1 1 1 0 0
               0 0 0 0 0 1 0
               0 0 0 0 0 1 1"""
    expected = torch.tensor([[int(x) for x in row.split()] for row in dense.splitlines()]).bool()
    assert layout.mask(DENSE).equal(expected)
    assert layout.mask(COMPOSITE).equal(expected[[0, 1, 4, 6]])


def test_layout_indices_and_positions():
    layout = SequenceLayout.of([[T(2), V(3), T(1)], [V(1), T(2)]])
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert layout.text_index.tolist() == [0, 1, 5, 7, 8] and layout.visual_index.tolist() == [2, 3, 4, 6]
    assert layout.image_lengths == [3, 1]
    stream = torch.arange(9)
    assert layout.merge(stream[layout.text_index], stream[layout.visual_index]).equal(stream)
    for broken in ([], [[]], [[T(0)]]):
        with pytest.raises(ValueError, match="non-empty"):
            SequenceLayout.of(broken)


def tensors(layout, visibility, heads, kv_heads, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = layout.num_tokens if visibility.visual_queries else layout.num_text
    shapes = [(queries, heads, 8), (layout.num_tokens, kv_heads, 8), (layout.num_tokens, kv_heads, 8)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def attend(name, layout, visibility, qkv):
    backend = _BACKENDS[name]()
    out = backend.attend(*qkv, backend.plan(layout, visibility), 0.3)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return out, torch.autograd.grad((out * weights).sum(), qkv)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_reference_forward_and_backward(backend, layout, heads, device):
    layout = SequenceLayout.of(LAYOUTS[layout]).to(device)
    for visibility in (DENSE, COMPOSITE):
        qkv = [x.detach().to(device).requires_grad_() for x in tensors(layout, visibility, *heads)]
        if not len(qkv[0]):
            continue
        out, gradients = attend(backend, layout, visibility, qkv)
        true_out, true_gradients = attend("reference", layout, visibility, qkv)
        for found, true in zip((out, *gradients), (true_out, *true_gradients), strict=True):
            assert (found - true).abs().max() <= 1e-5 * true.abs().max()


@pytest.mark.parametrize("backend", registered_backends())
def test_documents_do_not_leak(backend):
    """Rows and gradients of one document do not move with another: exactly, not nearly."""
    layout = SequenceLayout.of(LAYOUTS["pack"])
    first = sum(run.length for run in layout.documents[0])
    for visibility in (DENSE, COMPOSITE):
        q, k, v = tensors(layout, visibility, 4, 2)
        rows = layout.positions.new_tensor([r for r in range(first) if r in layout.text_index])
        rows = rows if not visibility.visual_queries else torch.arange(first)
        backend_, plan = _BACKENDS[backend](), _BACKENDS[backend]().plan(layout, visibility)
        out = backend_.attend(q, k, v, plan, 0.3)
        changed = [x.detach().clone() for x in (q, k, v)]
        changed[0][len(rows) :] += 1.0
        changed[1][first:] += 1.0
        changed[2][first:] *= -3.0
        assert backend_.attend(*changed, plan, 0.3)[: len(rows)].equal(out[: len(rows)])
        gradients = torch.autograd.grad(out[: len(rows)].square().sum(), (q, k, v))
        assert all(g[n:].count_nonzero() == 0 for g, n in zip(gradients, (len(rows), first, first), strict=True))
        assert all(g.count_nonzero() for g in gradients)


@pytest.mark.parametrize("backend", registered_backends())
def test_cached_attention_sees_what_the_mask_says(backend):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(shape, generator=generator) for shape in ((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8)))
    mask = torch.ones(2, 3, 5).tril(2).bool()
    mask[1, :, :1] = False
    out = _BACKENDS[backend]().attend_cached(q, k, v, mask, 0.3)
    for b, n, i in itertools.product(range(2), range(4), range(3)):
        keys = k[b, n // 2, mask[b, i]]
        expected = (keys @ q[b, n, i] * 0.3).softmax(0) @ v[b, n // 2, mask[b, i]]
        torch.testing.assert_close(out[b, n, i], expected, rtol=0, atol=1e-6)


def test_registry_names_what_is_wrong_and_auto_takes_what_runs():
    assert resolve_backend("auto").name == "sdpa"
    with pytest.raises(ConfigError, match=r"unknown backend 'flsh'.*'sdpa', 'reference'"):
        resolve_backend("flsh")
    with pytest.raises(ValueError, match="registered already"):
        register_backend("sdpa")(AttentionBackend)

    @register_backend("broken")
    class Broken(_BACKENDS["reference"]):
        priority = 100

        def attend(self, *args, **kwargs):
            raise RuntimeError("no such kernel")

    try:
        assert probe("broken", "cpu", torch.float32) == "RuntimeError: no such kernel"
        assert resolve_backend("auto").name == "sdpa"
        with pytest.raises(ConfigError, match="no such kernel"):
            resolve_backend("broken")
    finally:
        del _BACKENDS["broken"]
