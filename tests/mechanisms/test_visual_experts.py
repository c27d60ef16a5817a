"""Weights of their own for visual rows: how they begin, what they touch, and what becomes of them in runs and folders."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from lib.mechanisms import PACK, text_logits
from transformers import LlamaConfig

from lit_eemllm import cli
from lit_eemllm.config import load_config, to_yaml
from lit_eemllm.core.decoder import COPIES, Inner
from lit_eemllm.cost.trace import Document, trace
from lit_eemllm.cost.weightless import Parts
from lit_eemllm.errors import ConfigError
from lit_eemllm.formats.mechanism import change_mechanism
from lit_eemllm.mechanisms import PRESETS, build_mechanism
from lit_eemllm.model import EEMLLM
from lit_eemllm.training.checkpoint import read_checkpoint
from lit_eemllm.training.fsdp2 import shared_out
from lit_eemllm.training.tuning import apply_tuning, parameter_groups

ALL = " ".join(COPIES)


def made(parts=ALL, decoder="llama-gqa", **options):
    """A model whose experts are copies, as they begin."""
    model = tiny.model(decoder, replace(PRESETS["visual_experts"], parts=parts, **options))
    for layer, experts in model.experts.items():
        model.language_model.model.layers[int(layer)].adopt(experts)
    return model


def llava_of(model):
    llava = tiny.model({"llama": "llama-gqa"}.get(family := model.config.text_config.model_type, family), "llava")
    llava.load_state_dict({n: x for n, x in model.state_dict().items() if not n.startswith("experts.")})
    return llava


@pytest.mark.parametrize("decoder", ["llama-gqa", "qwen3", "olmo2", "smollm3", "gemma3_text", "llama4_text"])
@pytest.mark.parametrize("parts", ["qkv ffn", "qkv output ffn", ALL, "norms"])
def test_it_begins_as_llava_to_the_bit_and_leaves_text_alone(parts, decoder):
    """CogVLM's recipe: the decoder is frozen, its experts are trained; so text without an image stays as it was."""
    model, batch, text = made(parts, decoder), tiny.pack(PACK), tiny.pack([[5], [9]])
    llava = llava_of(model)
    assert text_logits(model, batch).equal(text_logits(llava, batch))
    model.requires_grad_(False)
    model.experts.requires_grad_(True)
    optimizer = torch.optim.SGD(model.experts.parameters(), lr=0.1)
    model.packed_loss(batch).backward()
    optimizer.step()
    assert tiny.max_error(text_logits(model, batch), text_logits(llava, batch)) > 1e-4
    assert text_logits(model, text).equal(text_logits(llava, text))


def test_what_touches_no_visual_row_that_is_read_is_not_copied():
    held = {layer: set(experts) for layer, experts in made(first=1).experts.items()}
    norms = {"input_layernorm", "post_attention_layernorm"}
    assert held == {
        "1": {"q_proj", "k_proj", "v_proj", "o_proj", "mlp", *norms},
        "2": {"k_proj", "v_proj", "input_layernorm"},
    }
    aligned = {layer: set(experts) for layer, experts in made(dense_layers="none").experts.items()}
    assert aligned["0"] == {"k_proj", "v_proj", "o_proj", "mlp", *norms}
    names = [n for n, _ in made().language_model.named_parameters()]
    assert len(names) == len([n for n, _ in tiny.model("llama-gqa", "llava").language_model.named_parameters()])


def test_new_text_calls_no_copy():
    model = made()
    inputs = tiny.prompt(model, [[3, 0, 4]])
    calls = []
    for experts in model.experts.values():
        for module in experts.values():
            module.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)["past_key_values"]
        assert calls
        calls.clear()
        model(inputs["input_ids"][:, -1:], cache=cache, use_cache=True)
    assert not calls


def test_conversion_copies_keeps_and_drops():
    llava = tiny.model("llama-gqa", "llava")
    batch = tiny.pack(PACK)
    before = text_logits(llava, batch)
    mechanism = PRESETS["visual_experts"]
    model, ledger = change_mechanism(llava, mechanism, seed=0)
    assert {fate.fate for fate in ledger if fate.name.startswith("experts.")} == {"copied"}
    assert {fate.fate for fate in ledger if not fate.name.startswith("experts.")} == {"kept"}
    model.set_attention("reference")
    assert text_logits(model, batch).equal(before)
    with torch.no_grad():
        for parameter in model.experts.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    held = {name: x.clone() for name, x in model.experts.state_dict().items()}
    more, ledger = change_mechanism(model, replace(mechanism, parts="qkv ffn norms"), seed=0)
    fates = {fate.name.removeprefix("experts."): fate.fate for fate in ledger if fate.name.startswith("experts.")}
    assert {name for name, fate in fates.items() if fate == "kept"} == held.keys()
    assert {fate for name, fate in fates.items() if "norm" in name} == {"copied"}
    assert all(more.experts.state_dict()[name].equal(x) for name, x in held.items())
    less, ledger = change_mechanism(more, PRESETS["llava"], seed=0)
    assert {fate.fate for fate in ledger if fate.name.startswith("experts.")} == {"dropped"}
    less.set_attention("reference")
    assert text_logits(less, batch).equal(before)


def test_folders_hold_the_experts(tmp_path):
    model, batch = tiny.model("qwen3", PRESETS["visual_experts"]), tiny.pack(PACK)
    model.save_pretrained(tmp_path)
    again = EEMLLM.from_pretrained(tmp_path)
    again.set_attention("reference")
    assert text_logits(again, batch).equal(text_logits(model, batch))
    assert not text_logits(again, batch).equal(text_logits(llava_of(again), batch))


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_they_are_trained_with_the_projector_and_shared_out(tuning):
    """Adapters beside the copies are what the layer calls."""
    model, batch = made(), tiny.pack(PACK)
    words = [
        "model.decoder=d",
        "model.vision.path=v",
        "data.train=t",
        "optim.lr=1",
        "optim.max_steps=1",
        "optim.lora.r=2",
    ]
    config = load_config([], [*words, "optim.tuning.llm=frozen", f"optim.tuning.projector={tuning}"]).optim
    if tuning == "lora":
        config.lora.targets = None
    apply_tuning(model, config, "bfloat16")
    trained = {id(p) for group in parameter_groups(model, config) for p in group["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in trained}
    assert names and all(n.startswith(("projector.", "experts.")) for n in names)
    assert all(("lora_" in n) == (tuning == "lora") for n in names)
    model.packed_loss(batch).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    apart = [id(p) for part in shared_out(model) for p in part.parameters()]
    assert len(apart) == len(set(apart)) and {id(p) for p in model.experts.parameters()} <= set(apart)
    assert not any(isinstance(part, Inner) for part in shared_out(model)), (
        "it is gathered when it is called, and layers call what it holds"
    )


def test_what_makes_no_sense_is_refused(monkeypatch):
    for options, told in (
        ({"parts": "qkv mlp"}, "options.parts: found 'qkv mlp', expected some of norms qkv output ffn"),
        ({"parts": ""}, "options.parts: found ''"),
        ({"first": 3}, "options.first: found 3, expected 0 to 2"),
    ):
        with pytest.raises(ConfigError, match=told):
            build_mechanism("visual_experts", 3, {"options": options})
    with pytest.raises(ConfigError, match="text sees the image in no layer"):
        build_mechanism("visual_experts", 3, {"cross_layers": "none", "dense_layers": "none"})
    model = made()
    with pytest.raises(ConfigError, match="needs other modules"):
        model.set_mechanism(replace(model.mechanism, first=1))
    model.language_model.is_quantized = True
    with pytest.raises(ConfigError, match=r"model\.quantization: this mechanism has copies"):
        EEMLLM(model.config, model.language_model, model.vision)


def test_estimate_counts_the_copies():
    """Parameters of the copies, and no FLOP more than llava's."""
    words = ["model.decoder=d", "model.vision.path=v", "data.train=t", "optim.lr=1e-3", "optim.max_steps=1"]
    config = load_config([], [*words, "optim.tuning.llm=frozen"])
    decoder = LlamaConfig(**tiny.COMMON, num_attention_heads=4, num_key_value_heads=2)
    parts, document = Parts(decoder, "transformers", tiny.vision().to_config()), Document(9, 16, 8)
    steps = SimpleNamespace(
        **{name: trace(config, parts, PRESETS[name].stretched(3), document) for name in ("llava", "visual_experts")}
    )
    model = made("qkv ffn")
    copies = sum(p.numel() for p in model.experts.parameters())
    assert steps.visual_experts.parameters - steps.llava.parameters == copies > 0
    assert steps.visual_experts.trained - steps.llava.trained == copies
    assert steps.visual_experts.forward_flops == steps.llava.forward_flops


def test_a_stage_begins_with_copies_of_the_decoder_before_it_and_resumes_to_the_bit(
    parts, shapes, tmp_path, monkeypatch
):
    """Also merged; and an `init_from` with experts gives them."""
    monkeypatch.chdir(tmp_path)
    common = [
        "optim.save_every=2",
        "optim.val_every=2",
        "optim.schedule=constant",
        "optim.warmup_ratio=0",
        "data.val=null",
    ]

    def fit(out, *words):
        (tmp_path / f"{out}.yaml").write_text(to_yaml(tiny.config(parts, shapes, tmp_path / out, *common, *words)))
        assert cli.main(["fit", f"{out}.yaml"]) == 0
        return read_checkpoint(tmp_path / out / "checkpoints" / f"step-{words[-1].split('=')[1]}.ckpt")["state_dict"]

    llava = fit("llava", "model.mechanism.preset=llava", "optim.max_steps=2")
    own = ("model.mechanism.preset=visual_experts", "optim.tuning.llm=frozen", "init_from=llava")
    begun = fit("begun", *own, "optim.lr=1e-30", "optim.projector_lr=1e-30", "optim.max_steps=2")
    for layer in (0, 1, 2):
        name = "experts.{}.k_proj.weight", "language_model.model.layers.{}.self_attn.k_proj.weight"
        expert, decoder = begun["model." + name[0].format(layer)], llava["model." + name[1].format(layer)]
        assert expert.equal(decoder)
    whole = fit("whole", *own, "optim.max_steps=4")
    fit("cut", *own, "optim.max_steps=2")
    cut = fit("cut", *own, "optim.max_steps=4")
    assert whole.keys() == cut.keys() and all(cut[name].equal(x) for name, x in whole.items())
    assert any(name.startswith("model.experts.") for name in whole)
    assert cli.main(["merge", "whole", "--to", "merged"]) == 0
    merged = EEMLLM.from_pretrained(tmp_path / "merged").experts.state_dict()
    assert all(whole[f"model.experts.{name}"].equal(x) for name, x in merged.items())
    later = fit("later", *own[:1], "init_from=whole", "optim.lr=1e-30", "optim.projector_lr=1e-30", "optim.max_steps=2")
    name = "model.experts.0.mlp.up_proj.weight"
    assert later[name].equal(whole[name])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["mechanism"]["preset"] == "visual_experts"
