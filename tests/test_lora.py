"""LoRA: LLaVA's targets, slim checkpoints, exact resume, merging to equal logits, plain peft."""

import os
import shutil

import pytest
import tiny
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM

from lit_eemllm import cli
from lit_eemllm.config import load_config
from lit_eemllm.errors import ConfigError
from lit_eemllm.evaluation.run import load
from lit_eemllm.mechanisms import PRESETS
from lit_eemllm.model import EEMLLM
from lit_eemllm.model.build import build
from lit_eemllm.schema import LoraConfig
from lit_eemllm.training.adapters import add_adapters, merge_adapters
from lit_eemllm.training.checkpoint import load_weights, newest_checkpoint, read_checkpoint
from lit_eemllm.training.fit import fit
from lit_eemllm.training.module import LitEEMLLM

LORA = ["optim.tuning.llm=lora", "optim.lora.r=4", "optim.lora.alpha=8", "optim.projector_lr=1e-3", "data.val=null",
        "optim.max_steps=4", "optim.save_every=2"]  # fmt: skip


@pytest.fixture(
    scope="module", params=[[], ["optim.lora.rslora=true"], ["optim.lora.dora=true"]], ids=["lora", "rslora", "dora"]
)
def run(request, tmp_path_factory, parts, shapes):
    """A run of four steps."""
    config = tiny.config(parts, shapes, tmp_path_factory.mktemp("run") / "a", *LORA, *request.param)
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


@pytest.mark.parametrize("preset", PRESETS)
def test_adapters_begin_as_nothing_act_in_every_mechanism_and_merge(preset):
    model = tiny.model("llama-gqa", preset)
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


def test_a_checkpoint_holds_adapters_and_projector_and_resumes_exactly(tmp_path, run, parts, shapes):
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
    fit(tiny.config(parts, shapes, again, *options))
    resumed = read_checkpoint(newest_checkpoint(again))
    assert (
        all(resumed["state_dict"][n].equal(whole["state_dict"][n]) for n in names)
        and set(resumed["state_dict"]) == names
    )
    first = read_checkpoint(again / "checkpoints" / "step-2.ckpt")["state_dict"]
    assert not [n for n in names if first[n].equal(whole["state_dict"][n])]  # everything was trained


def test_merge_gives_a_whole_model_with_equal_logits_and_init_from_takes_a_run(tmp_path, run, parts, shapes, capsys):
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
    merged = load_config([tmp_path / "merged" / "config.yaml"])
    assert tiny.max_error(packed_logits(load(merged, None)[0]), true) <= 1e-5  # as the command line opens it
    model = load(tiny.config(parts, shapes, tmp_path / "new", "optim.tuning.llm=full"), "none")[0]
    load_weights(model, type(tmp_path)(run.out))
    assert tiny.max_error(packed_logits(model), true) <= 1e-5
    assert cli.main(["merge", str(run.out), "--to", str(tmp_path / "merged")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_plain_peft_loads_the_decoders_adapter(tmp_path, run, parts):
    assert cli.main(["merge", str(run.out), "--to", str(tmp_path / "adapter"), "--adapter"]) == 0
    assert {f.name for f in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    base = AutoModelForCausalLM.from_pretrained(parts / "decoder", dtype=torch.float32)
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
