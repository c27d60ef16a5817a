"""Compiled layers: few graphs for any layouts, none broken; numbers as without; a run cut and resumed is the unbroken one."""

from functools import partial

import pytest
import tiny
import torch
from lib.mechanisms import KINDS
from lib.runs import Killed, assert_same, fit_until
from torch._dynamo.utils import counters

from lit_eemllm.errors import ConfigError
from lit_eemllm.model import parts as model_parts
from lit_eemllm.training.adapters import add_adapters
from lit_eemllm.training.checkpoint import newest_checkpoint, read_checkpoint
from lit_eemllm.training.fit import fit

LAYOUTS = [
    [[3, 0, 4], [5]], [[7], [12]], [[2, 0, 1, 0, 3], [0, 6], [9]], [[30]], [[0, 9], [4, 0, 20], [6], [2, 0, 0, 3]],
    [[25, 0, 25]], [[3], [4], [11, 0, 2]],
]  # fmt: skip
"""Of other numbers of text tokens, images and documents each; two have no image."""


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing that another test has compiled."""
    torch._dynamo.reset()
    counters.clear()
    model_parts._compiled.cache_clear()
    yield
    model_parts._compiled.cache_clear()


def passes(model, seed=0):
    """Loss, and gradients by name, of each layout."""
    for number, documents in enumerate(LAYOUTS):
        model.zero_grad()
        torch.manual_seed(seed)
        loss = model.packed_loss(tiny.pack(documents, seed=number))
        loss.backward()
        yield loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_same(found, true, bound):
    for (loss, gradients), (true_loss, true_gradients) in zip(found, true, strict=True):
        assert abs(loss - true_loss) <= bound * abs(true_loss)
        assert gradients.keys() == true_gradients.keys()
        largest = max(g.abs().max() for g in true_gradients.values())
        for name, gradient in gradients.items():
            assert (gradient - true_gradients[name]).abs().max() <= bound * largest, name


def check_compiled(model, bound=1e-5, most=12):
    """Equal to the same model before, in at most so many graphs, none of them for a new layout."""
    true = list(passes(model))
    model.compile_layers()
    check_same(list(passes(model)), true, bound)
    graphs = counters["stats"]["unique_graphs"]
    assert 5 <= graphs <= most, "queries, keys, values, feed-forward network and rotation, a few of them twice"
    assert not counters["graph_break"]
    list(passes(model))
    assert counters["stats"]["unique_graphs"] == graphs


def test_few_graphs_serve_all_layouts(monkeypatch):
    """As dynamo and autograd take them apart; what inductor makes of them takes longer, see below."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = tiny.model("llama-gqa", "ee_mllm").train()
    check_compiled(model)
    graphs = counters["stats"]["unique_graphs"]
    model.eval().generate(**tiny.prompt(model, LAYOUTS[0]), max_new_tokens=3)
    with torch.no_grad():
        model.packed_loss(tiny.pack([[2, 0, 50]]))
    assert counters["stats"]["unique_graphs"] == graphs, "without gradients nothing is compiled"


@pytest.mark.slow
@pytest.mark.parametrize("preset", KINDS)
def test_compiled_layers_compute_the_same(preset):
    model = tiny.model("llama-gqa", preset).train()
    model.set_attention("sdpa")
    check_compiled(model)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["qwen2", "qwen3", "olmo2", "smollm3", "gemma3_text", "llama4_text"])
def test_so_do_those_of_other_families(decoder):
    check_compiled(tiny.model(decoder, "llava").train())


@pytest.mark.slow
def test_so_do_recomputed_layers():
    model = tiny.model("llama-gqa", "ee_mllm").train()
    model.activation_checkpointing = True
    check_compiled(model)


@pytest.mark.slow
def test_so_do_adapters(parts, shapes, tmp_path):
    options = ["optim.lora.r=4", "optim.lora.alpha=4", "optim.lora.dropout=0"]
    model = tiny.model("llama-gqa", "ee_mllm")
    model.language_model.requires_grad_(False)
    add_adapters(model.language_model, tiny.config(parts, shapes, tmp_path, *options).optim.lora, "llm")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    check_compiled(model.train())


@pytest.mark.slow
def test_so_do_layers_under_autocast():
    """Closer to the layers in float32 than three times what autocast is off without being compiled."""
    model = tiny.model("llama-gqa", "ee_mllm").train()
    true = list(passes(model))

    def off(found):
        return [
            (abs(loss - true_loss), max((g[n] - t[n]).abs().max() for n in t))
            for (loss, g), (true_loss, t) in zip(found, true, strict=True)
        ]

    with torch.autocast("cpu", torch.bfloat16):
        plain = off(passes(model))
        model.compile_layers()
        compiled = off(passes(model))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 12
    for column in (0, 1):
        assert 0 < max(x[column] for x in compiled) <= 3 * max(x[column] for x in plain)


@pytest.mark.slow
@pytest.mark.timeout(900)  # all is compiled anew, twice
@pytest.mark.parametrize("options", [[], ["optim.tuning.llm=lora", "optim.lora.r=4"]], ids=["full", "lora, dropout"])
def test_a_compiled_run_resumes_bit_by_bit(tmp_path, parts, shapes, options):
    """What is compiled anew begins with another pack than it did in the unbroken run."""
    options = ["model.compile=true", "optim.max_steps=6", "optim.save_every=3", "data.val=null", *options]
    whole, cut = (tiny.config(parts, shapes, tmp_path / name, *options) for name in ("whole", "cut"))
    with torch._inductor.config.patch(
        force_disable_caches=True
    ):  # else what was compiled for the first pack is found again
        fit(whole)
        assert counters["stats"]["unique_graphs"] >= 5
        with pytest.raises(Killed):
            fit_until(3, cut)
        torch._dynamo.reset()
        fit(cut)
    ends = [read_checkpoint(newest_checkpoint(tmp_path / name)) for name in ("whole", "cut")]
    for section in ("state_dict", "optimizer_states", "rng"):
        assert_same(ends[0][section], ends[1][section], section)


def test_without_a_compiler_the_error_says_what_to_do():
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(ConfigError, match=r"install one .* CXX"):
        tiny.model().compile_layers()
