"""Layouts, the dense mask as the law, and every backend against the reference, gradients included.

Kernels that exist on GPUs only are replaced on the CPU by an emulation of their documented contract: segments, causal
from the bottom right, zero where no key is seen. A wrong offset, length or order of ours then fails here.
"""

import inspect
import itertools
import re
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lib.backends import FLASH, TRAINABLE, memory_efficient_attention
from lib.fake_cuda import kernels

from lit_eemllm.attention import AttentionBackend, flex, register_backend, registered_backends, resolve_backend
from lit_eemllm.attention.base import _BACKENDS, probe
from lit_eemllm.attention.flash import PROVIDERS
from lit_eemllm.attention.flex import Flex
from lit_eemllm.attention.reference import Reference
from lit_eemllm.attention.sdpa import PADDING, Sdpa
from lit_eemllm.attention.varlen import VarlenBackend
from lit_eemllm.errors import ConfigError
from lit_eemllm.layout import Chunk, Run, SequenceLayout, Visibility

T, V = (lambda n: Run(False, n)), (lambda n: Run(True, n))
LAYOUTS = {
    "text only": [[T(5)]],
    "the last is the shorter": [[V(2), T(6)], [V(2), T(5)]],
    "text-image-text": [[T(3), V(4), T(5)]],
    "image first": [[V(4), T(3)]],
    "image last": [[T(3), V(2)]],
    "two images": [[T(2), V(3), T(1), V(2), T(4)]],
    "adjacent images": [[T(1), V(3), V(2), T(2)]],
    "alike, with an image and without": [[T(5)], [V(1), T(5)], [V(5), T(1)], [V(5)]],
    "pack": [[T(3), V(4), T(5)], [T(7)], [V(2), T(1)], [T(1), V(9), T(2), V(1), T(1)], [T(3), V(4), T(4)], [V(2)]],
}  # fmt: skip
DENSE, COMPOSITE, WINDOW = Visibility(True), Visibility(False), Visibility(True, window=2)
IMAGES = Visibility(True, text_queries=False)  # of a layer in which text sees less of them
BOTH = Visibility(True, text_queries=False, both_ways=True)
TEXT_WINDOW = Visibility(False, window=2)
BOTH_WINDOW = Visibility(True, window=2, text_queries=False, both_ways=True)
VISIBILITIES = {
    "dense": DENSE, "composite": COMPOSITE, "window": WINDOW, "images query": IMAGES, "both ways": BOTH,
    "composite window": TEXT_WINDOW, "both ways, window": BOTH_WINDOW, "chunk": Visibility(True, Chunk(3)),
    "composite chunk": Visibility(False, Chunk(4)), "both ways, chunk": Visibility(True, Chunk(3), text_queries=False, both_ways=True),
}  # fmt: skip


# --- the kernels' contracts


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
    assert layout.mask(IMAGES).equal(expected[[2, 3, 5]])
    both = expected[[2, 3, 5]]
    both[0, 3] = True  # the first token of the image of two sees the second
    assert layout.mask(BOTH).equal(both)
    assert SequenceLayout.of([[T(2)]]).mask(IMAGES).shape == SequenceLayout.of([[V(2)]]).mask(COMPOSITE).shape == (0, 2)


def test_layout_indices_and_positions():
    layout = SequenceLayout.of([[T(2), V(3), T(1)], [V(1), T(2)]])
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert layout.text_index.tolist() == [0, 1, 5, 7, 8] and layout.visual_index.tolist() == [2, 3, 4, 6]
    assert layout.image_lengths == [3, 1]
    stream = torch.arange(9)
    assert layout.merge(stream[layout.text_index], stream[layout.visual_index]).equal(stream)
    layout = SequenceLayout.of([[T(2), V(3), T(1), V(1), T(2)], [V(1), T(1)]])
    assert layout.with_image_positions(1).positions.tolist() == [0, 1, 2, 2, 2, 3, 4, 5, 6, 0, 1]
    assert layout.with_image_positions(0).positions.tolist() == [0, 1, 2, 2, 2, 2, 3, 3, 4, 0, 0]
    layout = SequenceLayout.of([[T(2), V(3), T(1)], [V(2)], [V(1), T(1)]])
    some = layout.with_visual(torch.tensor([0, 2, 5]), [2, 0, 1])  # nothing is left of the second document
    assert some.documents == (((False, 2), (True, 2), (False, 1)), ((True, 1), (False, 1)))
    assert some.positions.tolist() == [0, 1, 2, 4, 5, 0, 1]
    for broken in ([], [[]], [[T(0)]]):
        with pytest.raises(ValueError, match="non-empty"):
            SequenceLayout.of(broken)


def tensors(layout, visibility, heads, kv_heads, head_size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = layout.num_text * visibility.text_queries + layout.num_visual * visibility.visual_queries
    shapes = [(queries, heads, head_size), *[(layout.num_tokens, kv_heads, head_size)] * 2]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def attend(backend, layout, visibility, qkv):
    out = backend.attend(*qkv, backend.plan(layout, visibility), 0.3)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return out, torch.autograd.grad((out * weights).sum(), qkv)


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("heads", [(4, 4, 64), (4, 2, 80), (6, 1, 128)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", TRAINABLE)
def test_backend_equals_reference_forward_and_backward(backend, layout, heads, visibility):
    if layout == "text only" and not VISIBILITIES[visibility].text_queries:
        pytest.skip("no row queries")
    layout, visibility, backend = SequenceLayout.of(LAYOUTS[layout]), VISIBILITIES[visibility], TRAINABLE[backend]()
    qkv = tensors(layout, visibility, *heads)
    out, gradients = attend(backend, layout, visibility, qkv)
    true_out, true_gradients = attend(_BACKENDS["reference"](), layout, visibility, qkv)
    for found, true in zip((out, *gradients), (true_out, *true_gradients), strict=True):
        assert (found - true).abs().max() <= 1e-5 * true.abs().max()


documents = st.lists(
    st.lists(st.tuples(st.booleans(), st.integers(1, 6)), min_size=1, max_size=6), min_size=1, max_size=4
)


def laid_out(documents, steps):
    """A layout, whose positions rise by these steps, over and over, if there are any."""
    layout = SequenceLayout.of([[Run(*run) for run in document] for document in documents])
    if not steps:
        return layout
    length, starts = layout.num_tokens, layout.positions == 0
    rising = torch.tensor((steps * length)[:length]).cumsum(0)
    rising -= rising[starts][starts.cumsum(0) - 1]  # from 0 in each document
    return replace(layout, positions=rising, stepwise=False)


steps = st.lists(st.integers(0, 3), max_size=5)
"""As where tokens have left, and where those of an image share a position."""
visibilities = st.sampled_from([*VISIBILITIES.values(), Visibility(True, window=0)])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(documents=documents, steps=steps, visibility=visibilities)
def test_a_mask_is_what_its_words_say(documents, steps, visibility):
    layout, rows = laid_out(documents, steps), []
    for d, document in enumerate(layout.documents):
        rows += [(d, i, run.visual) for i, run in enumerate(document) for _ in range(run.length)]
    places, expected = layout.positions.tolist(), []
    for q, (document, run, visual) in enumerate(rows):
        if visibility.queries(visual):
            expected.append([
                document == other and (k <= q or (visibility.both_ways and visual and run == its))
                and (not isinstance(visibility.window, int) or places[q] - places[k] <= visibility.window)
                and (not isinstance(visibility.window, Chunk) or places[k] // visibility.window.size >= places[q] // visibility.window.size)
                for k, (other, its, _) in enumerate(rows)
            ])  # fmt: skip
    assert layout.mask(visibility).tolist() == expected


@pytest.mark.parametrize("backend", ["sdpa", "flash_attn_2", "torch_2_10", "xformers", "flex"])
@settings(max_examples=75, deadline=None, derandomize=True)
@given(documents=documents, steps=steps, visibility=visibilities)
def test_random_layouts_are_computed_as_the_mask_says(backend, documents, steps, visibility):
    layout = laid_out(documents, steps)
    q, k, v = (x.detach() for x in tensors(layout, visibility, 2, 1))
    if not len(q):  # never asked for
        return
    backend = Flex() if backend == "flex" else TRAINABLE[backend]()
    out = backend.attend(q, k, v, backend.plan(layout, visibility), 0.3)
    reference = _BACKENDS["reference"]()
    true = reference.attend(q, k, v, reference.plan(layout, visibility), 0.3)
    assert out.shape == true.shape and (out - true).abs().max() <= 1e-5 * true.abs().max()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    window=st.sampled_from([None, 0, 100, 200, Chunk(130)]),
)
def test_flex_blocks_are_those_of_the_dense_mask(lengths, window):
    """Which blocks of 128 x 128 are skipped, partial and full, against a count over the dense mask."""
    layout = SequenceLayout.of([[T(n), V(n // 2 + 1), T(1)] for n in lengths])
    for visibility in [COMPOSITE, IMAGES, BOTH, Visibility(True, window), Visibility(False, window)]:
        mask = Flex().plan(layout, visibility).mask
        queries, keys = mask.seq_lengths
        dense = torch.zeros(queries, keys, dtype=torch.bool)
        true = layout.mask(visibility)
        dense[: true.shape[0], : true.shape[1]] = true
        seen = dense.view(queries // 128, 128, keys // 128, 128).sum((1, 3))
        some, every = torch.zeros_like(seen, dtype=torch.bool), torch.zeros_like(seen, dtype=torch.bool)
        for kind, counts, which in (
            (some, mask.kv_num_blocks, mask.kv_indices),
            (every, mask.full_kv_num_blocks, mask.full_kv_indices),
        ):
            for row, (count, columns) in enumerate(zip(counts[0, 0], which[0, 0], strict=True)):
                kind[row, columns[:count].long()] = True
        assert not (some & every).any()
        assert every.equal(seen == 128 * 128)
        for found, needed in zip(some | every, seen > 0, strict=True):
            columns = needed.nonzero().flatten().tolist()
            bridged = range(columns[0], columns[-1] + 1) if columns else []  # of two documents, perhaps
            assert found.nonzero().flatten().tolist() == list(bridged)


@pytest.mark.slow
def test_flex_compiles_once_for_layouts_of_like_size(monkeypatch):
    """On the CPU, where its forward can be compiled; another layout of the same bucket must not compile again."""
    monkeypatch.setattr(flex, "flex_attention", flex._compiled())
    backend, reference = Flex(), _BACKENDS["reference"]()
    for attempt, docs in enumerate(
        [[[T(3), V(140), T(50)], [T(9)]], [[T(1), V(90), T(40), V(30), T(2)], [V(3), T(7)]]]
    ):
        layout = SequenceLayout.of(docs)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=attempt > 0):
            q, k, v = tensors(layout, COMPOSITE, 4, 2, 16)
            found = backend.attend(q, k, v, backend.plan(layout, COMPOSITE), 0.3)
            true = reference.attend(q, k, v, reference.plan(layout, COMPOSITE), 0.3)
        assert (found - true).abs().max() <= 1e-5 * true.abs().max()


class Recorder(VarlenBackend):
    """Counts calls, their query rows and the rows of keys that were copied, and what a kernel would compute."""

    name = "recorder"

    def __init__(self, grouped=True):
        self.calls = self.query_rows = self.copied = self.tiles = 0
        self.grouped, self.given = grouped, set()

    def windows(self, call):
        return False

    def prepare(self, call, window, device):
        self.tiles += sum(-(-q // 64) * -(-k // 64) for q, k in zip(call.query_lengths, call.key_lengths, strict=True))
        return call

    def kernel(self, q, k, v, prepared, scale):
        self.calls += 1
        self.query_rows += len(q)
        if k.data_ptr() not in self.given:
            self.copied += len(k)
        return torch.zeros_like(q)


@pytest.mark.parametrize(
    ("documents", "calls", "dropped", "copied"),
    [
        ([[V(576), T(64)]] * 3, 1, 0, 0),
        ([[T(9)], [V(5), T(2)], [T(40)]], 1, 0, 0),
        ([[T(35), V(576), T(20)]] * 4, 2, 0, 140),
        ([[T(35), V(576), V(576), T(20)], [T(7)]], 2, 0, 35),
        ([[T(500), V(9), T(4)]], 2, 1, 0),
        ([[T(2), V(9), T(3), V(9), T(4)], [T(2), V(9), T(3)], [T(8)]], 3, 2, 2),
        ([[V(9), T(3), V(4)], [T(8)]], 1, 1, 0),
        ([[T(1), *[V(100), T(5)] * 8]], 9, 6, 1 + 106),
    ],
)
def test_varlen_copies_few_keys_and_needs_few_calls(documents, calls, dropped, copied):
    """As many calls as the longest document has text runs; no call copies more than a quarter of the keys."""
    layout, backend = SequenceLayout.of(documents), Recorder()
    q, k, v = tensors(layout, COMPOSITE, 2, 1)
    backend.given = {k.data_ptr()}
    plan = backend.plan(layout, COMPOSITE)
    assert backend.attend(q, k, v, plan, 0.3).shape == q.shape
    assert (backend.calls, backend.query_rows - len(q), backend.copied) == (calls, dropped, copied)
    assert all(keys is None or len(keys) <= len(k) / 4 for _, keys, _ in plan.calls)
    dense = Recorder()
    dense.given = {k.data_ptr()}
    dense.attend(k, k, v, dense.plan(layout, DENSE), 0.3)
    assert (dense.calls, dense.query_rows, dense.copied) == (1, len(k), 0)


def test_the_second_call_for_the_first_words_of_a_prompt_is_cheap():
    """In tiles of 64 x 64, as kernels work: text-image-text costs little more than image-text."""
    backends = Recorder(), Recorder()
    for backend, first in zip(backends, ([], [T(35)]), strict=True):
        backend.plan(SequenceLayout.of([[*first, V(2880), T(29)]] * 4), COMPOSITE)
    assert backends[1].tiles <= backends[0].tiles + 8


def test_heads_are_repeated_once_a_layer_where_the_kernel_cannot_group():
    layout = SequenceLayout.of([[T(3), V(40), T(5)]] * 2)
    q, k, v = tensors(layout, COMPOSITE, 4, 2)
    backend, given = Recorder(grouped=False), []
    backend.kernel = lambda q, k, v, prepared, scale: given.append((k.data_ptr(), k.shape[1])) or torch.zeros_like(q)
    layout = SequenceLayout.of([[T(300), V(40), T(5)]])  # two calls in place
    q, k, v = tensors(layout, COMPOSITE, 4, 2)
    backend.attend(q, k, v, backend.plan(layout, COMPOSITE), 0.3)
    assert len(given) == 2 and len(set(given)) == 1 and given[0][1] == 4


def arguments(function):
    """Names, defaults, and whether they may stand by place: annotations aside, a signature."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


STAND_INS = [
    *((*PROVIDERS[provider], functions) for provider, functions in FLASH.items()),
    (*PROVIDERS["flash-attn 2"], [kernels.flash_attn_2()]),
    ("torch.nn.attention.flex_attention", "flex_attention", [kernels.flex()]),
    ("xformers.ops", "memory_efficient_attention", [kernels.xformers()]),
    ("xformers.ops", "memory_efficient_attention", [memory_efficient_attention]),
]
"""Module and name of a kernel, and what stands for its versions where it is not there or cannot run."""


@pytest.mark.parametrize(("module", "name", "stand_ins"), STAND_INS)
def test_an_installed_kernel_has_a_signature_that_was_tested(module, name, stand_ins):
    found = arguments(getattr(pytest.importorskip(module), name))
    assert found in [arguments(f) for f in stand_ins], f"add this signature to the tests: {found}"


@settings(max_examples=50, deadline=None, derandomize=True)
@given(documents=documents)
def test_sdpa_costs_the_sum_of_the_documents(documents):
    """Rows x columns of its products, padding included, against those of each document by itself."""
    layout = SequenceLayout.of([[Run(*run) for run in document] for document in documents])
    for visibility, count in ((DENSE, lambda runs: sum(n for _, n in runs)),
                              (COMPOSITE, lambda runs: sum(n for visual, n in runs if not visual)),
                              (IMAGES, lambda runs: sum(n for visual, n in runs if visual))):  # fmt: skip
        alone = sum(count(runs) * sum(n for _, n in runs) for runs in documents)
        together = 0

        class Counting(Sdpa):
            def kernel(self, q_BNQH, k_BKLH, *rest):
                nonlocal together
                together += q_BNQH.shape[0] * q_BNQH.shape[2] * k_BKLH.shape[2]
                return q_BNQH

        x_SNH = torch.zeros(layout.num_tokens, 1, 1)
        if alone:
            backend, rows = Counting(), layout.query_rows(visibility)
            q_QNH = x_SNH if rows is None else x_SNH[rows]
            backend.attend(q_QNH, x_SNH, x_SNH, backend.plan(layout, visibility), 1.0)
        assert alone <= together <= PADDING**2 * alone


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("heads", [(4, 4, 64), (4, 2, 80), (4, 1, 128)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", [name for name in registered_backends() if name != "reference"])
def test_gpu_kernels_are_as_exact_as_their_type(backend, layout, heads, visibility, dtype):
    """Error against the float32 reference at most twice that of a dense softmax computed in the same type."""
    if layout == "text only" and not VISIBILITIES[visibility].text_queries:
        pytest.skip("no row queries")
    if (reason := _BACKENDS[backend].refusal(torch.device("cuda"), dtype, True)) is not None:
        pytest.skip(reason)
    layout, visibility = SequenceLayout.of(LAYOUTS[layout]).to("cuda"), VISIBILITIES[visibility]
    qkv = [x.detach().to("cuda", dtype).requires_grad_() for x in tensors(layout, visibility, *heads)]

    class Dense(_BACKENDS["reference"]):
        def attend_cached(self, q, k, v, mask, scale):
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            scores = torch.einsum("bnqh,bnlh->bnql", q, k) * scale
            weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
            return torch.einsum("bnql,bnlh->bnqh", weights, v)

    exact = [x.detach().float().requires_grad_() for x in qkv]
    true, true_gradients = attend(_BACKENDS["reference"](), layout, visibility, exact)
    rough, rough_gradients = attend(Dense(), layout, visibility, qkv)
    floor = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    missing = []
    for provider, make in _BACKENDS[backend].candidates():
        try:
            candidate = make()
            candidate.plan(layout, visibility)
        except ImportError as error:
            missing.append(f"{provider}: {error}")
            continue
        out, gradients = attend(candidate, layout, visibility, qkv)
        for a, b, c in zip((true, *true_gradients), (rough, *rough_gradients), (out, *gradients), strict=True):
            assert (c - a).abs().max() <= max(2 * (b - a).abs().max(), floor * a.abs().max()), provider
    if len(missing) == len(list(_BACKENDS[backend].candidates())):
        pytest.skip("; ".join(missing))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [name for name in registered_backends() if name != "reference"])
def test_a_training_step_never_waits_for_the_device(backend):
    tried = probe(backend, "cuda", torch.bfloat16, head_size=16)
    if tried.backend is None:
        pytest.skip(str(tried))
    model = tiny.model("llama-16").to("cuda")
    model._backend = tried.backend
    batch = tiny.pack([[3, 0, 4], [0, 0, 5], [6]]).pin_memory().to("cuda")
    for mode in ("default", "error"):  # the first step may compile and set up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                model.packed_loss(batch).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("preset", ["ee_mllm", "llava"])
@pytest.mark.parametrize(
    "backend",
    [
        "sdpa",
        "flash_attn_2",
        "torch_2_13",
        "xformers",
        *(pytest.param(n, marks=pytest.mark.gpu) for n in ("flash", "flex")),
    ],
)
def test_a_model_learns_alike_under_every_backend(backend, preset):
    """Twenty steps of AdamW: the loss curve under the reference and under the backend."""

    def curve(chosen, device, dtype):
        model = tiny.model("llama-16", preset).to(device)
        model._backend = chosen
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for step in range(20):
            batch = tiny.pack([[3, 0, 4], [0, 0, 5], [6], [2, 0, 3, 0, 2]], seed=step % 4).to(device)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = model.packed_loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    if backend in TRAINABLE:
        device, dtype, chosen = "cpu", torch.float32, TRAINABLE[backend]()
    else:
        device, dtype = "cuda", torch.bfloat16
        tried = probe(backend.removeprefix("gpu "), device, dtype, head_size=16)
        if (chosen := tried.backend) is None:
            pytest.skip(str(tried))
    true, found = (curve(which, device, dtype) for which in (_BACKENDS["reference"](), chosen))
    assert true[-4:].mean() < 0.8 * true[:4].mean()
    torch.testing.assert_close(found, true, rtol=1e-3 if device == "cpu" else 5e-2, atol=0)


@pytest.mark.parametrize("backend", ["reference", *TRAINABLE])
def test_documents_do_not_leak(backend):
    """Rows and gradients of one document do not move with another: exactly, not nearly."""
    backend = _BACKENDS["reference"]() if backend == "reference" else TRAINABLE[backend]()
    layout = SequenceLayout.of(LAYOUTS["pack"])
    first = sum(run.length for run in layout.documents[0])
    for visibility in (DENSE, COMPOSITE, IMAGES):
        q, k, v = tensors(layout, visibility, 4, 2)
        rows = [row for run in layout.documents[0] if visibility.queries(run.visual) for row in range(run.length)]
        plan = backend.plan(layout, visibility)
        out = backend.attend(q, k, v, plan, 0.3)
        changed = [x.detach().clone() for x in (q, k, v)]
        changed[0][len(rows) :] += 1.0
        changed[1][first:] += 1.0
        changed[2][first:] *= -3.0
        assert backend.attend(*changed, plan, 0.3)[: len(rows)].equal(out[: len(rows)])
        gradients = torch.autograd.grad(out[: len(rows)].square().sum(), (q, k, v))
        assert all(g[n:].count_nonzero() == 0 for g, n in zip(gradients, (len(rows), first, first), strict=True))
        assert all(g.count_nonzero() for g in gradients)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
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
    assert resolve_backend("auto").backend.name == "sdpa"
    with pytest.raises(
        ConfigError, match=r"unknown backend 'flsh'.*'flash', 'xformers', 'sdpa', 'flex', 'cudnn', 'reference'"
    ):
        resolve_backend("flsh")
    with pytest.raises(ValueError, match="registered already"):
        register_backend("sdpa")(AttentionBackend)

    @register_backend("broken")
    class Broken(_BACKENDS["reference"]):
        priority = 100

        def attend(self, *args, **kwargs):
            raise RuntimeError("no such kernel")

    try:
        assert str(probe("broken", "cpu", torch.float32)) == "PyTorch: RuntimeError: no such kernel"
        assert resolve_backend("auto").backend.name == "sdpa"
        with pytest.raises(ConfigError, match="no such kernel"):
            resolve_backend("broken")
    finally:
        del _BACKENDS["broken"]


class NotANumber(Reference):
    def attend(self, q_QNH, k_SKH, v_SKH, plan, scale):
        return super().attend(q_QNH, k_SKH, v_SKH, plan, scale) * float("nan")


class FromBefore(Reference):
    """Written when visual rows queried with the text or not at all."""

    def plan(self, layout, visibility):
        mask_SS = layout.mask(DENSE)
        return mask_SS if visibility.visual_queries else mask_SS[layout.text_index]

    def attend(self, q_QNH, k_SKH, v_SKH, plan, scale):
        return super().attend(q_QNH, k_SKH, v_SKH, plan[: len(q_QNH)], scale)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("wrong", "off"), [(NotANumber, "nan%"), (FromBefore, r"\d+%")])
def test_a_trial_tells_what_is_computed_wrongly(monkeypatch, wrong, off, training):
    monkeypatch.setitem(_BACKENDS, "wrong", wrong)
    tried = probe("wrong", "cpu", torch.float32, training)
    assert tried.backend is None
    assert re.fullmatch(f"PyTorch: it runs, but its output is off the reference by {off}", str(tried))
