"""LoRA: LLaVA's targets, slim checkpoints, exact resume, merging to equal logits, plain peft."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from lib.mechanisms import KINDS
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from lit_eemllm import cli
from lit_eemllm.compat.peft import is_quantized
from lit_eemllm.config import load_config
from lit_eemllm.config.keys import LoraConfig
from lit_eemllm.errors import ConfigError
from lit_eemllm.evaluation.run import load
from lit_eemllm.formats.merge import _has_own_base, merge
from lit_eemllm.model import EEMLLM
from lit_eemllm.model.build import build
from lit_eemllm.training.adapters import add_adapters, merge_adapters
from lit_eemllm.training.checkpoint import newest_checkpoint, read_checkpoint
from lit_eemllm.training.fit import fit
from lit_eemllm.training.initial import initial_model
from lit_eemllm.training.module import LitEEMLLM

LORA = ["optim.tuning.llm=lora", "optim.lora.r=4", "optim.lora.alpha=8", "optim.projector_lr=1e-3", "data.val=null",
        "optim.max_steps=4", "optim.save_every=2"]  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        ("llama", []),
        ("llama", ["optim.lora.rslora=true"]),
        ("llama", ["optim.lora.dora=true"]),
        ("olmo2", []),
        ("smollm3", []),
        pytest.param(("gemma3_text", []), marks=pytest.mark.slow),
        pytest.param(("llama4_text", []), marks=pytest.mark.slow),
    ],
    ids=["lora", "rslora", "dora", "olmo2", "smollm3", "gemma3_text", "llama4_text"],
)
def run(request, tmp_path_factory, parts, shapes):
    """A run of four steps."""
    family, options = request.param
    if family != "llama":
        parts = tmp_path_factory.mktemp("parts")
        sizes = {
            "smollm3": {"no_rope_layers": [1, 0, 1]},
            "gemma3_text": {
                "head_dim": 8,
                "sliding_window": 6,
                "layer_types": tiny.SLIDING,
                "tie_word_embeddings": True,
            },
            "llama4_text": {
                "head_dim": 8,
                "attention_chunk_size": 6,
                "intermediate_size_mlp": 40,
                "num_local_experts": 2,
                "moe_layers": [1],
                "no_rope_layers": [1, 0, 1],
            },
        }
        tiny.write_parts(parts, family, **sizes.get(family, {}))
    config = tiny.config(parts, shapes, tmp_path_factory.mktemp("run") / "a", *LORA, *options)
    fit(config)
    return config


def packed_logits(model):
    model.set_attention("reference")  # with gradients, since bitsandbytes' other path on the CPU wants larger layers
    return model.eval().packed_logits(tiny.pack([[3, 0, 4], [5], [2, 0, 1, 0, 3]])).detach()


def test_defaults_are_llavas():
    lora = LoraConfig()
    assert (lora.r, lora.alpha, lora.dropout, lora.targets) == (128, 256, 0.05, None)
    model = tiny.model()
    add_adapters(model.language_model, lora, "llm")
    adapted = {n.split(".lora_")[0].rpartition(".")[2] for n, _ in model.named_parameters() if "lora_" in n}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # and not lm_head
    with pytest.raises(ConfigError, match=r"llm has no linear layer \['c_attn'\]; it has \['down_proj'"):
        add_adapters(tiny.model().language_model, LoraConfig(targets=["c_attn", "q_proj"]), "llm")


@pytest.mark.parametrize(
    "decoder",
    [
        "llama-gqa",
        "olmo2",
        "smollm3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3_text", "llama4_text")),
    ],
)
@pytest.mark.parametrize("preset", KINDS)
def test_adapters_begin_as_nothing_act_in_every_mechanism_and_merge(preset, decoder):
    model = tiny.model(decoder, preset)
    before = packed_logits(model)
    for name in ("language_model", "projector", "vision"):
        add_adapters(getattr(model, name), LoraConfig(r=4, alpha=8), name)
    assert tiny.max_error(packed_logits(model), before) <= 1e-6
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    acting = packed_logits(model)
    assert tiny.max_error(acting, before) > 1e-2
    assert merge_adapters(model) > 0 and not [n for n, _ in model.named_parameters() if "lora_" in n]
    assert tiny.max_error(packed_logits(model), acting) <= 1e-5


def test_a_checkpoint_holds_adapters_and_projector_and_resumes_exactly(tmp_path, run, shapes):
    whole = read_checkpoint(newest_checkpoint(tmp_path.parent / run.out))
    names = set(whole["state_dict"])
    assert names and all("lora_" in n or n.startswith("model.projector.") for n in names)
    assert {n for n in names if n.startswith("model.projector.")} == {
        f"model.projector.linear_{i}.{p}" for i in (1, 2) for p in ("weight", "bias")
    }
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    shutil.copy(f"{run.out}/checkpoints/step-2.ckpt", again / "checkpoints")
    options = [*LORA, f"optim.lora.rslora={run.optim.lora.rslora}", f"optim.lora.dora={run.optim.lora.dora}"]
    fit(tiny.config(Path(run.model.decoder).parent, shapes, again, *options))
    resumed = read_checkpoint(newest_checkpoint(again))
    assert (
        all(resumed["state_dict"][n].equal(whole["state_dict"][n]) for n in names)
        and set(resumed["state_dict"]) == names
    )
    first = read_checkpoint(again / "checkpoints" / "step-2.ckpt")["state_dict"]
    assert not [n for n in names if first[n].equal(whole["state_dict"][n])]  # everything was trained


def test_merge_gives_a_whole_model_with_equal_logits_and_init_from_takes_a_run(tmp_path, run, shapes, capsys):
    true = packed_logits(load(run, None)[0])
    before = os.umask(0o027)
    try:
        assert cli.main(["merge", str(run.out), "--to", str(tmp_path / "merged")]) == 0
    finally:
        os.umask(before)
    assert "adapters folded in" in capsys.readouterr().out
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()}
    assert modes["model.safetensors"] == 0o640 and set(modes.values()) == {0o640}, "as the umask says"
    assert (tmp_path / "merged").stat().st_mode & 0o777 == 0o750
    assert tiny.max_error(packed_logits(EEMLLM.from_pretrained(tmp_path / "merged")), true) <= 1e-5
    whole, found = EEMLLM.from_pretrained(tmp_path / "merged"), tmp_path / "merged"
    theirs = AutoModelForImageTextToText.from_pretrained(found).state_dict()
    assert all(tensor.equal(theirs[name]) for name, tensor in whole.state_dict().items())
    assert AutoProcessor.from_pretrained(found).template.name == run.model.template
    assert f"Not evaluated yet (`lit-eemllm validate {run.out}`)" in (found / "README.md").read_text()
    merged = load_config([tmp_path / "merged" / "config.yaml"])
    assert tiny.max_error(packed_logits(load(merged, None)[0]), true) <= 1e-5  # as the command line opens it
    parts = Path(run.model.decoder).parent
    model = initial_model(tiny.config(parts, shapes, tmp_path / "new", f"init_from={run.out}"))[0]
    assert tiny.max_error(packed_logits(model), true) <= 1e-5
    assert cli.main(["merge", str(run.out), "--to", str(tmp_path / "merged")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_plain_peft_loads_the_decoders_adapter(tmp_path, run):
    assert cli.main(["merge", str(run.out), "--to", str(tmp_path / "adapter"), "--adapter"]) == 0
    assert {f.name for f in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    base = AutoModelForCausalLM.from_pretrained(run.model.decoder, dtype=torch.float32)
    ids = torch.randint(3, 40, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
        model = load(run, None)[0]
        ours = model(ids).logits[..., : adapted.shape[-1]]
    kept = ours.isfinite()
    assert tiny.max_error(adapted[kept], ours[kept]) <= 1e-5 and tiny.max_error(adapted, plain) > 1e-4


def test_frozen_base_in_bfloat16_keeps_float32_adapters(parts, shapes, tmp_path):
    config = tiny.config(parts, shapes, tmp_path / "b", *LORA, "optim.tuning.vision=lora", "optim.tuning.projector=lora",
                         "model.dtype=bfloat16", "optim.projector_lr=null")  # fmt: skip
    fit(config)
    model = load(config, None)[0]
    types = {("lora_" in n, p.dtype) for n, p in model.named_parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    module = LitEEMLLM(model := build(config.model)[0], config)
    unused = {id(p) for part in model.vision.unused() for p in part.parameters()}
    grouped = {id(p) for g in module.configure_optimizers()["optimizer"].param_groups for p in g["params"]}
    assert unused and not unused & grouped


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_quantised_decoder_trains_adapters_and_merges(parts, shapes, tmp_path, how):
    """QLoRA, on the CPU too: frozen layers in 4 or 8 bits, adapters in float32, merging to equal logits."""
    pytest.importorskip("bitsandbytes")
    config = tiny.config(parts, shapes, tmp_path / "q", *LORA, f"model.quantization={how}", "optim.lr=1e-2")
    fit(config)
    held = read_checkpoint(newest_checkpoint(tmp_path / "q"))["state_dict"]
    assert all("lora_" in name or ".projector." in name for name in held)
    model = load(config, None)[0]
    base = model.language_model.model.layers[0].self_attn.q_proj.get_base_layer()
    assert base.weight.dtype == (torch.uint8 if how == "nf4" else torch.int8)
    true, untrained = packed_logits(model), packed_logits(load(config, "none")[0])
    assert tiny.max_error(true, untrained) > 1e-3
    assert cli.main(["merge", str(config.out), "--to", str(tmp_path / "merged")]) == 0
    merged = EEMLLM.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    if how == "nf4":
        assert tiny.max_error(packed_logits(merged), true) <= 1e-5
    for name, layer in model.named_modules():  # 8-bit layers round their inputs too: their logits are only near
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2  # alpha / r
            expected = dequantize_module_weight(base).float() + delta
            assert tiny.max_error(merged.get_submodule(name).weight, expected) <= 1e-6
    with pytest.raises(ConfigError, match="quantised layers cannot be trained"):
        tiny.config(parts, shapes, tmp_path / "r", "model.quantization=nf4", "optim.tuning.llm=full")


def updates(model):
    """What each adapter adds, and the weight that it is added to, both in float32."""
    return {
        name: (layer.get_base_layer().weight.detach().float(), layer.get_delta_weight("default").detach().float())
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def test_merging_into_bfloat16_does_not_round_the_update_away(parts, shapes, tmp_path):
    config = tiny.config(parts, shapes, tmp_path / "run", *LORA, "model.dtype=bfloat16", "optim.lr=1e-4")
    fit(config)
    assert cli.main(["merge", str(config.out), "--to", str(tmp_path / "merged")]) == 0
    merged, found = load_file(tmp_path / "merged" / "model.safetensors"), updates(load(config, None)[0])
    for name, (base, delta) in found.items():
        assert tiny.max_error(merged[f"{name}.weight"] - base, delta) < 1e-2
        assert tiny.max_error((base + delta).bfloat16() - base, delta) > 0.1, (
            "the update is smaller than the type's steps"
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, parts, shapes):
    """A run that has trained the decoder in full."""
    config = tiny.config(parts, shapes, tmp_path_factory.mktemp("full") / "run", "data.val=null", "optim.max_steps=2")
    fit(config)
    return config


def test_merging_takes_no_memory_of_a_gpu(trained, tmp_path, monkeypatch):
    """Folding is in float32: twice the size of weights that fitted. The folder's configuration is as the run's."""
    config, moved = replace(trained, trainer={"devices": 1}), []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("lit_eemllm.report.card.provenance", lambda: "")  # which asks for the GPU's name
    monkeypatch.setattr(EEMLLM, "to", lambda self, device: moved.append(device) or self)
    merge(config, None, tmp_path / "merged", adapter=False)
    assert not moved
    merged = load_config([tmp_path / "merged" / "config.yaml"])
    assert (merged.trainer, merged.model) == (config.trainer, config.model)


def test_an_adapter_names_the_decoder_that_it_was_trained_on(parts, shapes, tmp_path, trained, capsys):
    config = tiny.config(
        parts, shapes, tmp_path / "run", *LORA, f"init_from={trained.out}", "optim.max_steps=2", "optim.lr=1e-2"
    )
    fit(config)
    out = tmp_path / "adapter"
    assert cli.main(["merge", str(config.out), "--to", str(out), "--adapter"]) == 0
    assert f"adapter of {out / 'base'}: " in capsys.readouterr().out
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(out / "base")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        true = load(trained, None)[0](ids).logits
        assert tiny.max_error(plain(ids).logits, true[..., : plain.config.vocab_size]) <= 1e-5
        adapted = PeftModel.from_pretrained(plain, out).eval()(ids).logits
        ours = load(config, None)[0](ids).logits[..., : adapted.shape[-1]]
    assert tiny.max_error(adapted, ours) <= 1e-5 and tiny.max_error(true[..., : adapted.shape[-1]], ours) > 1e-4


def test_whether_an_adapter_has_its_own_base_is_seen_by_names(run, trained, tmp_path, monkeypatch):
    """Of a run with adapters, of one without, and of one that left the decoder alone: no model is made for it."""
    monkeypatch.setattr("lit_eemllm.training.initial.build", None)
    frozen = tmp_path / "frozen.ckpt"
    state = read_checkpoint(newest_checkpoint(Path(run.out)))
    kept = {name: x for name, x in state["state_dict"].items() if "language_model" not in name}
    torch.save({**state, "state_dict": kept}, frozen)
    for start, own in ((None, False), (run.out, True), (trained.out, True), (frozen, False)):
        assert _has_own_base(replace(run, init_from=start and str(start))) is own


QLORA = [*LORA, "model.quantization=nf4", "optim.max_steps=2", "optim.lr=2e-2"]


@pytest.fixture(scope="module")
def qlora(tmp_path_factory, parts, shapes):
    """A run that has trained adapters of a quantised decoder; it was validated before its first checkpoint was written."""
    pytest.importorskip("bitsandbytes")
    config = tiny.config(
        parts, shapes, tmp_path_factory.mktemp("q") / "run", *QLORA, f"data.val={shapes}", "optim.val_every=1"
    )
    fit(config)
    return config


def quantised_weights(model):
    return {name: dequantize_module_weight(m) for name, m in model.language_model.named_modules() if is_quantized(m)}


def test_a_run_begins_from_adapters_of_quantised_weights(parts, shapes, tmp_path, qlora):
    """Without quantisation it is what was trained, with it the decoder is quantised again."""
    true, whole = packed_logits(load(qlora, None)[0]), load(qlora, None)[0]
    merge_adapters(whole)
    plain = initial_model(tiny.config(parts, shapes, tmp_path / "p", f"init_from={qlora.out}"))[0]
    assert tiny.max_error(packed_logits(plain), true) <= 1e-5
    again = initial_model(tiny.config(parts, shapes, tmp_path / "q", *QLORA, f"init_from={qlora.out}"))[0]
    found = quantised_weights(again)
    assert len(found) == 3 * 7 and again.projector.state_dict().keys() == whole.projector.state_dict().keys()
    for name, weight in found.items():
        expected = whole.language_model.get_submodule(name).weight
        assert tiny.max_error(weight, expected) < 0.2 and not weight.equal(expected)


def test_quantised_weights_can_be_those_of_any_model_of_ours(parts, shapes, tmp_path, trained):
    """A run that has trained all of the decoder, and the folder that `merge` makes of it; and it trains, and is opened again."""
    pytest.importorskip("bitsandbytes")
    assert cli.main(["merge", str(trained.out), "--to", str(tmp_path / "merged")]) == 0
    true = load(trained, None)[0].language_model
    fresh = build(tiny.config(parts, shapes, tmp_path / "x", *QLORA).model)[0]
    for number, settings in enumerate(([f"init_from={trained.out}"], [])):
        files = [tmp_path / "merged" / "config.yaml"] if number else []
        if files:
            settings = [*QLORA, f"out={tmp_path / 'run1'}"]
            config = load_config(files, [*settings, "trainer.accelerator=cpu"])
        else:
            config = tiny.config(parts, shapes, tmp_path / "run0", *QLORA, *settings)
        model = initial_model(config)[0]
        for name, weight in quantised_weights(model).items():
            small = nf4(true.get_submodule(name).weight)
            assert weight.equal(small) and not weight.equal(quantised_weights(fresh)[name])
        fit(config)
        assert load(config, None)[0].language_model.is_loaded_in_4bit


def nf4(weight):
    """What quantisation makes of a weight, by bitsandbytes' own functions."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight.detach(), quant_type="nf4", compress_statistics=True))


def test_evaluation_leaves_quantised_weights_as_they_are(qlora, monkeypatch):
    """Some CPUs would rearrange and round them, so that no later command knew the decoder again."""
    from bitsandbytes.nn import modules

    def packed(weight, state):
        raise AssertionError("rearranged")

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", packed)
    for model in (load(qlora, None)[0], initial_model(replace(qlora, init_from=qlora.out))[0]):
        with torch.inference_mode():
            assert model.eval().packed_logits(tiny.pack([[3, 0, 4]])).isfinite().all()
