"""The weights that a run begins with: folded as peft folds, in the memory of one model, also quantised, of any model of ours."""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
)

from lit_eemllm import cli
from lit_eemllm.errors import CheckpointError, ConfigError
from lit_eemllm.evaluation.run import load
from lit_eemllm.model import EEMLLM
from lit_eemllm.model.build import build
from lit_eemllm.training.adapters import merge_adapters
from lit_eemllm.training.fit import fit
from lit_eemllm.training.initial import initial_model
from lit_eemllm.training.module import LitEEMLLM

LORA = ["optim.tuning.llm=lora", "optim.lora.r=2", "optim.projector_lr=1e-3", "data.val=null", "optim.max_steps=1"]


def most_held(call, trace: Path):
    """What the call returns, and the most bytes of tensors that there were at once while it ran. A file of weights is mapped, and counts as
    long as one of its tensors is used as it is."""
    gc.collect()  # what was there before would go meanwhile, and count as less
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return result, most


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Parts of which the decoder is nearly all."""
    folder = tmp_path_factory.mktemp("large")
    tiny.write_parts(folder, hidden_size=512, intermediate_size=1024, num_hidden_layers=6)
    return folder


@pytest.mark.parametrize(
    "settings",
    [["model.dtype=bfloat16"], ["optim.tuning.llm=frozen", "optim.tuning.projector=lora"], ["model.quantization=nf4", "model.dtype=bfloat16"]],
    ids=["adapters", "adapters elsewhere", "qlora"],
)  # fmt: skip
def test_beginning_from_adapters_takes_the_memory_of_one_decoder(large, shapes, tmp_path, settings):
    if "nf4" in settings[0]:
        pytest.importorskip("bitsandbytes")
    # folded in float32, while what they are folded into, rounded or in 4 bits, goes
    config = tiny.config(large, shapes, tmp_path / "a", *LORA, *settings)
    fit(config)
    _, most = most_held(lambda: initial_model(replace(config, init_from=config.out)), tmp_path / "trace.json")
    decoder = (large / "decoder" / "model.safetensors").stat().st_size
    assert decoder < most < 1.8 * decoder, most / decoder


# --- adapters are folded in as peft does, in float32


@pytest.fixture(scope="module", params=["lora", "rslora", "dora", "tied"])
def folded(request, tmp_path_factory, shapes):
    """A run with adapters of a kind on a bfloat16 decoder, and the decoder that peft makes of base and adapter in float32."""
    folder = tmp_path_factory.mktemp("folded")
    tiny.write_parts(folder, tie_word_embeddings=request.param == "tied")
    kind = [f"optim.lora.{request.param}=true"] if request.param in ("rslora", "dora") else []
    config = tiny.config(folder, shapes, folder / "run", *LORA, *kind, "model.dtype=bfloat16", "optim.lr=1e-2")
    fit(config)
    assert cli.main(["merge", config.out, "--to", str(folder / "adapter"), "--adapter"]) == 0
    base = AutoModelForCausalLM.from_pretrained(folder / "decoder", dtype=torch.bfloat16).float()
    unchanged = {name: x.clone() for name, x in base.state_dict().items()}
    whole = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().state_dict()
    assert sum(not x.equal(unchanged[name]) for name, x in whole.items()) == 3 * 7
    return config, whole


def decoder_of(model):
    return {n.removeprefix("language_model."): x for n, x in model.state_dict().items() if "language_model." in n}


def test_every_way_to_fold_adapters_gives_what_peft_gives(folded, tmp_path):
    """`merge` and `convert`, and `init_from` of the run and of what these two write; no tied matrix comes apart."""
    config, expected = folded
    assert cli.main(["merge", config.out, "--to", str(tmp_path / "merged")]) == 0
    assert cli.main(["convert", config.out, "--out", str(tmp_path / "converted"), "--mechanism", "llava"]) == 0
    begun = replace(config, init_from=config.out, out=str(tmp_path / "new"))
    made = {name: EEMLLM.from_pretrained(tmp_path / name) for name in ("merged", "converted")}
    made["run"] = initial_model(begun)[0]
    made["from merged"] = initial_model(replace(begun, init_from=str(tmp_path / "merged")))[0]
    for name, model in made.items():
        found = decoder_of(model)
        assert found.keys() == expected.keys()
        assert all(tiny.max_error(x, expected[key]) <= 1e-6 for key, x in found.items()), name
        decoder = model.language_model
        assert (decoder.lm_head.weight is decoder.model.embed_tokens.weight) is decoder.config.tie_word_embeddings
    LitEEMLLM(made["run"], begun)  # rounds what is frozen, once
    found = {n.replace(".base_layer", ""): x for n, x in decoder_of(made["run"]).items() if "lora_" not in n}
    steps = {key: (x - found[key].float()).abs() > 2**-8 * x.abs() + 1e-6 for key, x in expected.items()}
    assert {x.dtype for x in found.values()} == {torch.bfloat16} and not any(x.any() for x in steps.values())


def test_a_missing_torchao_is_told_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_eemllm.model.fp8.find_spec", lambda name: None)
    config = tiny.config(tmp_path / "no parts", "no data", tmp_path, "model.fp8=true", "optim.tuning.llm=frozen")
    for use in (fit, lambda config: load(config, None)):
        with pytest.raises(ConfigError, match=r"model.fp8: torchao is not installed; pip install 'lit_eemllm\[fp8\]'"):
            use(config)


def test_half_a_decoder_and_one_of_another_shape_are_refused(folded, parts, shapes, tmp_path):
    config, _ = folded
    assert cli.main(["merge", config.out, "--to", str(tmp_path / "half")]) == 0
    file = tmp_path / "half" / "model.safetensors"
    save_file({name: x for name, x in load_file(file).items() if "layers.2.mlp" not in name}, file)
    begun = replace(config, out=str(tmp_path / "new"))
    with pytest.raises(CheckpointError, match=r"it lacks 3, such as model.layers.2.mlp.*expected all or none"):
        initial_model(replace(begun, init_from=str(tmp_path / "half")))
    tiny.write_parts(tmp_path / "wide", hidden_size=64)
    wide = replace(begun.model, decoder=str(tmp_path / "wide" / "decoder"))
    with pytest.raises(CheckpointError, match=r"language_model\.\S+: found \[\d+, 32\], expected \[\d+, 64\]"):
        initial_model(replace(begun, init_from=config.out, model=wide))


def test_an_adapter_alone_is_no_model_to_begin_from(folded, tmp_path, capsys):
    """Neither what we write nor a whole model with peft's files beside it, whatever its kind."""
    config, _ = folded
    both = tmp_path / "both"
    adapter = Path(config.out).parent / "adapter"
    assert cli.main(["merge", config.out, "--to", str(both)]) == 0
    shutil.copy(adapter / "adapter_config.json", both)
    for folder in (adapter, both):
        with pytest.raises(ConfigError, match=r"^init_from: \S+ holds an adapter .*expected a whole model"):
            initial_model(replace(config, init_from=str(folder), out=str(tmp_path / "new")))
        assert cli.main(["convert", str(folder), "--out", str(tmp_path / "no"), "--mechanism", "llava"]) == 2
        assert "holds an adapter (adapter_config.json), expected a whole model" in capsys.readouterr().err


def test_adapters_that_are_no_numbers_are_named(folded, tmp_path):
    model = load(folded[0], None)[0]
    with torch.no_grad():
        next(x for name, x in model.named_parameters() if "layers.1" in name and "lora_B" in name).fill_(torch.inf)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.self_attn\.q_proj: with its adapter the weights are NaN or infinite"
    ):
        merge_adapters(model)


# --- quantised


def test_the_folders_decoder_is_quantised_where_only_a_projector_was_trained(parts, shapes, tmp_path):
    pytest.importorskip("bitsandbytes")
    first = tiny.config(parts, shapes, tmp_path / "a", *LORA, "optim.tuning.llm=frozen", "optim.tuning.projector=full")
    fit(first)
    second = tiny.config(parts, shapes, tmp_path / "b", *LORA, "model.quantization=nf4", f"init_from={first.out}")
    model, _, table = initial_model(second)
    expected = build(second.model)[0].language_model.state_dict()
    found = model.language_model.state_dict()
    assert found.keys() == expected.keys() and all(x.equal(expected[name]) for name, x in found.items())
    assert sum("absmax" in name for name in found) >= 3 * 7
    trained = load(first, None)[0].projector.state_dict()
    assert all(x.equal(trained[name]) for name, x in model.projector.state_dict().items())
    rows = dict(
        zip(table.columns[0].cells, zip(table.columns[1].cells, table.columns[2].cells, strict=True), strict=True)
    )
    assert rows["projector"] == ("4", "none")
    assert rows["language_model"] == ("0", f"{3 * 9 + 3}, such as model.embed_tokens.weight")


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_the_base_is_known_as_it_was_loaded(parts, shapes, tmp_path, monkeypatch, how):
    """Whatever a kernel does to quantised weights in a validation before the first checkpoint."""
    bnb = pytest.importorskip("bitsandbytes")
    kind = bnb.nn.Linear4bit if how == "nf4" else bnb.nn.Linear8bitLt
    forward, packed = kind.forward, []

    def pack(self, x):
        if not torch.is_grad_enabled() and self not in packed:
            packed.append(self)
            self.weight.data.view(torch.uint8).bitwise_xor_(1)
        return forward(self, x)

    monkeypatch.setattr(kind, "forward", pack)
    settings = [*LORA, f"model.quantization={how}", f"data.val={shapes}", "optim.val_every=1", "optim.max_steps=2"]
    config = tiny.config(parts, shapes, tmp_path / "run", *settings)
    fit(config)
    assert len(packed) == 3 * 7
    monkeypatch.undo()
    load(config, None)
