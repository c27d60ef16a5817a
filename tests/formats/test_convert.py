"""`lit-eemllm convert`: a LLaVA, a run or a folder under another mechanism, as a LLaVA, and back."""

import json
import re
import shutil
import signal
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from lib.llava import BOUND, assert_same_tensors, random_llava, tensors, to_write, write_llava
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lit_eemllm import cli
from lit_eemllm.config import load_config, to_yaml
from lit_eemllm.errors import ConfigError
from lit_eemllm.evaluation.run import load
from lit_eemllm.formats.convert import open_source
from lit_eemllm.mechanisms import PRESETS
from lit_eemllm.model import EEMLLM


@pytest.fixture(scope="module")
def first_stage(parts, shapes, tmp_path_factory):
    """A run of SAISA's first stage: one projector, frozen parts in bfloat16."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny.config(
        parts, shapes, folder / "one", "model.mechanism.preset=saisa", "model.mechanism.visual_source=stream",
        "optim.tuning.llm=frozen", "optim.max_steps=2", "model.dtype=bfloat16", "data.max_length=400", "resume=never",
    )  # fmt: skip
    (folder / "one.yaml").write_text(to_yaml(config))
    assert cli.main(["fit", str(folder / "one.yaml")]) == 0
    return folder / "one"


def table(text):
    """(part, fate) -> tensors, of the printed table."""
    rows = [line.strip("│").split("│") for line in text.splitlines() if line.startswith("│")]
    return {(part.strip(), fate.strip()): int(count.replace(",", "")) for part, count, _, fate in rows}


def test_from_a_run_to_saisas_second_stage(first_stage, tmp_path, capsys):
    two, run, elsewhere = tmp_path / "two", tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(first_stage, elsewhere)
    text = (first_stage / "config.yaml").read_text()
    (elsewhere / "config.yaml").write_text(text.replace("attention: auto", "attention: flash"))  # as if from a GPU
    assert cli.main(["convert", str(elsewhere), "--out", str(two), "--mechanism", "saisa"]) == 0
    printed = capsys.readouterr().out
    assert table(printed) == {("vision", "kept"): 53, ("language_model", "kept"): 30, ("projector", "copied"): 12}
    assert f"lit-eemllm fit {two} out=" in printed
    for name, *more in (("dense", "model.mechanism.dense_layers=all"), ("same",)):
        assert cli.main(["convert", str(elsewhere), "--out", str(tmp_path / name), *more]) == 0
        scored = "Not evaluated yet" in (tmp_path / name / "README.md").read_text()
        assert scored == (name == "same"), "scores of another mechanism are not its own"
        shutil.rmtree(tmp_path / name)
    assert (two / "processor_config.json").read_text() == '{"template": "vicuna_v1"}'
    state = load_file(two / "model.safetensors")
    trained = torch.load(first_stage / "checkpoints" / "step-2.ckpt", weights_only=True)["state_dict"]
    for name, tensor in trained.items():
        for layer in range(3):
            assert state[name.replace("model.projector", f"projector.layers.{layer}")].equal(tensor)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}  # exact for bfloat16 too

    settings = [
        f"out={run}",
        "optim.tuning.llm=full",
        "optim.max_steps=3",
        "model.dtype=float32",
        "model.attention=auto",
    ]
    assert cli.main(["fit", str(two), *settings]) == 0
    second = torch.load(run / "checkpoints" / "step-3.ckpt", weights_only=True)["state_dict"]
    assert {name.removeprefix("model.") for name in second} == {n for n in state if not n.startswith("vision")}
    moved = max((tensor - state[name.removeprefix("model.")]).abs().max().item() for name, tensor in second.items())
    assert 0 < moved < 0.02  # three steps of AdamW at 3e-3 from these weights
    assert not second["model.projector.layers.0.linear_1.bias"].equal(second["model.projector.layers.1.linear_1.bias"])
    assert cli.main(["validate", str(two), "--checkpoint", "none", "eval.samples=0", *settings[-2:]]) == 0

    assert cli.main(["convert", str(run), "--out", str(tmp_path / "no"), "--mechanism", "llava"]) == 2
    assert "layers 1, 2 differ from layer 0" in capsys.readouterr().err
    assert cli.main(["convert", str(two), "--out", str(tmp_path / "back"), "--mechanism", "shortv"]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back["projector.linear_1.weight"].equal(trained["model.projector.linear_1.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "elsewhere", "run", "two"]


@pytest.mark.parametrize("quantization", ["null", "nf4"])
def test_adapters_of_a_run_are_folded_in(first_stage, parts, tmp_path, capsys, quantization):
    if quantization != "null":
        pytest.importorskip("bitsandbytes")
    run, out = tmp_path / "run", tmp_path / "out"
    settings = ["optim.tuning.llm=lora", "optim.max_steps=2", f"out={run}", f"init_from={first_stage}"]
    settings += [f"model.quantization={quantization}", "model.dtype=float32"]
    assert cli.main(["fit", str(first_stage / "config.yaml"), *settings]) == 0
    adapted = load(load_config([run / "config.yaml"]), None)[0].float()
    capsys.readouterr()
    assert cli.main(["convert", str(run), "--out", str(out), "--mechanism", "saisa"]) == 0
    assert "adapters folded in" in capsys.readouterr().out
    whole, base = EEMLLM.from_pretrained(out).eval(), load_file(parts / "decoder" / "model.safetensors")
    batch = tiny.pack([[3, 0, 4]])
    assert not tensors(whole)["language_model.model.layers.0.self_attn.q_proj.weight"].equal(
        base["model.layers.0.self_attn.q_proj.weight"]
    )
    # with gradients: without, bitsandbytes takes another path on CPUs, which wants multiples of 32
    assert tiny.max_error(whole.packed_logits(batch), adapted.packed_logits(batch)) <= BOUND


def test_llava_to_another_mechanism_and_back(llava_folder, tmp_path, capsys):
    there, back = tmp_path / "there", tmp_path / "back"
    line = ["convert", "model.mechanism.dense_layers=[1]", str(llava_folder), "--out", str(there)]
    assert cli.main([*line, "--mechanism", "naavit"]) == 0
    naavit = EEMLLM.from_pretrained(there)
    expected = replace(PRESETS["naavit"], dense_layers=(1,))
    assert naavit.mechanism == expected
    config = yaml.safe_load((there / "config.yaml").read_text())
    assert config["model"]["mechanism"] == {"preset": "naavit", "dense_layers": [1]}
    assert config["model"]["vision"] == {
        "encoder": "transformers", "path": str(there), "select_layer": -2, "policy": "crop",
    }  # fmt: skip
    assert config["init_from"] == config["model"]["decoder"] == str(there)

    assert cli.main(["convert", str(there), "--out", str(back), "--to-llava"]) == 2
    assert "dense_layers" in capsys.readouterr().err and not back.exists()
    assert cli.main(["convert", str(there), "--out", str(back), "--to-llava", "--mechanism", "llava"]) == 0
    assert "tensors equal as transformers reads them, logits differ by" in capsys.readouterr().out
    ours, theirs = load_file(back / "model.safetensors"), load_file(llava_folder / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    for file in ("config.json", "tokenizer.json"):
        ours, theirs = (json.loads((folder / file).read_text()) for folder in (back, llava_folder))
        for part in ("text_config", "vision_config"):  # which transformers writes for a model that was loaded
            ours.get(part, {}).pop("dtype", None)
        assert ours == theirs


def test_a_converted_llava_answers_and_is_trained_further(llava_folder, shapes, tmp_path, capsys):
    """The folder stands for itself: decoder, encoder, tokenizer and projector come from it."""
    out, run = tmp_path / "out", tmp_path / "run"
    assert cli.main(["convert", str(llava_folder), "--out", str(out), "--mechanism", "ee_mllm"]) == 0
    settings = [f"data.train={shapes}", f"data.val={shapes}", "data.workers=0", "data.max_length=400", "optim.lr=1e-4"]
    settings += ["optim.max_steps=2", "optim.tuning.llm=full", "trainer.accelerator=cpu", "eval.max_new_tokens=3"]
    model, processor, source = load(load_config([out / "config.yaml"], settings), None)
    assert source == str(out) and processor.image_token_id == model.config.image_token_id
    assert_same_tensors(model, EEMLLM.from_pretrained(out).state_dict())
    assert cli.main(["fit", str(out), f"out={run}", *settings]) == 0
    before, after = load_file(out / "model.safetensors"), load(load_config([run / "config.yaml"]), None)[0].state_dict()
    assert 0 < max((tensor - before[name]).abs().max() for name, tensor in after.items()) < 1e-3
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    capsys.readouterr()
    assert cli.main(["generate", str(run), "--image", str(tmp_path / "a.png"), "--prompt", "What?"]) == 0
    assert (
        cli.main(["convert", str(run), "--out", str(tmp_path / "hf"), "--mechanism", "llava", "--self-contained"]) == 0
    )


def test_qlora_of_a_converted_llava(tokenizer, shapes, tmp_path, capsys):
    """Trained, validated before its first checkpoint and after, asked, continued to the bit, merged."""
    quantize_4bit = pytest.importorskip("bitsandbytes.functional").quantize_4bit
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
    }  # without gradients, bitsandbytes on CPUs wants multiples of 64
    llava = random_llava(tokenizer, sizes=sizes)
    source = write_llava(llava, tokenizer, tmp_path / "llava")
    out, run, again = tmp_path / "out", tmp_path / "run", tmp_path / "again"
    assert cli.main(["convert", str(source), "--out", str(out), "--mechanism", "llava"]) == 0
    settings = [f"data.train={shapes}", f"data.val={shapes}", "data.workers=0", "data.max_length=400", "optim.lr=1e-2",
                "optim.max_steps=4", "optim.val_every=1", "optim.val_batches=1", "optim.save_every=2", "optim.tuning.llm=lora",
                "optim.lora.r=4", "model.quantization=nf4", "model.dtype=float32", "trainer.accelerator=cpu",
                "eval.max_new_tokens=3"]  # fmt: skip
    assert cli.main(["fit", str(out), f"out={run}", *settings]) == 0
    model = load(load_config([run / "config.yaml"]), None)[0]
    theirs = dict(llava.model.language_model.named_modules())
    layers = {n: m for n, m in model.language_model.model.named_modules() if n.endswith("base_layer")}
    assert len(layers) == 3 * 7
    for name, layer in layers.items():
        small = quantize_4bit(
            theirs[name.removesuffix(".base_layer")].weight.detach(), quant_type="nf4", compress_statistics=True
        )
        assert layer.weight.data.equal(small[0])

    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    assert cli.main(["validate", str(run), "eval.samples=0"]) == 0
    assert cli.main(["generate", str(run), "--image", str(tmp_path / "a.png"), "--prompt", "What?"]) == 0
    (again / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "checkpoints" / "step-2.ckpt", again / "checkpoints")
    capsys.readouterr()
    assert cli.main(["fit", str(run), f"out={again}"]) == 0
    assert f"continuing from {again / 'checkpoints' / 'step-2.ckpt'}" in capsys.readouterr().out.replace("\n", "")
    first, last, resumed = (
        torch.load(folder / "checkpoints" / name, weights_only=True)["state_dict"]
        for folder, name in ((run, "step-2.ckpt"), (run, "step-4.ckpt"), (again, "step-4.ckpt"))
    )
    assert resumed.keys() == last.keys() and all(x.equal(last[name]) for name, x in resumed.items())
    assert not any(x.equal(first[name]) for name, x in resumed.items())

    assert cli.main(["merge", str(run), "--to", str(tmp_path / "merged")]) == 0
    batch = tiny.pack([[3, 0, 4]])
    whole = EEMLLM.from_pretrained(tmp_path / "merged").eval()
    assert tiny.max_error(whole.packed_logits(batch), model.packed_logits(batch)) <= BOUND


def test_moved_and_converted_again_a_folder_names_itself(llava_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", str(llava_folder), "--out", "a", "--mechanism", "flamingo", "seed=5"]) == 0
    assert cli.main(["convert", str(tmp_path / "a"), "--out", "b", "model.mechanism.gated.immediate=false"]) == 0
    config = yaml.safe_load(Path("b/config.yaml").read_text())
    assert [config["model"]["decoder"], config["model"]["vision"]["path"], config["init_from"]] == ["b"] * 3
    assert config["model"]["mechanism"]["options"]["gated"]["immediate"] is False
    a, b = load_file("a/model.safetensors"), load_file("b/model.safetensors")
    assert a.keys() == b.keys() and all(tensor.equal(b[name]) for name, tensor in a.items())


def test_an_export_keeps_a_chat_template_that_nothing_contradicts(tmp_path, tokenizer):
    """Of a folder of save_pretrained, of its conversion, and of one whose config.yaml says little."""
    own, source = deepcopy(tokenizer), tmp_path / "source"
    own.chat_template = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    model = to_write(vocabulary=(image := tokenizer.convert_tokens_to_ids("<image>")))
    model.config.image_token_id = image
    model.save_pretrained(source)
    own.save_pretrained(source)
    assert open_source(source).template is None
    for out, *to_llava in (tmp_path / "llava", "--to-llava"), (tmp_path / "ours",):
        assert cli.main(["convert", str(source), "--out", str(out), *to_llava]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "llava").chat_template == own.chat_template
    assert open_source(tmp_path / "ours").template is None
    file = source / "config.yaml"
    for text, template in (
        ("", None), ("seed: 1", None), ("model: {dtype: float32}", None), ("model: {vision: null}", None),
        ("model: {template: vicuna_v1}", "vicuna_v1"),
    ):  # fmt: skip
        file.write_text(text)
        found = open_source(source)
        assert found.template == template and found.config["model"]["vision"]["path"] == str(source)
    for text in ("model: 3", "- 1", "x: ["):
        file.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(str(file))):
            open_source(source)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("convert --out x", "expected one source, found none"),
        ("convert a b --out x", "expected one source, found a b"),
        ("convert gone --out x", "gone: no such folder"),
        ("convert empty --out x", "neither config.json nor a checkpoint of a run"),
        ("convert empty --out empty", "empty exists already"),
        (
            "convert empty --out x optim.lr=1",
            "convert takes model.mechanism.*, model.connector.* and seed, found optim.lr=1",
        ),
        ("convert empty --out x --mechanism sasia", "model.mechanism.preset: found 'sasia'"),
        ("convert empty --out x model.mechanism.dense_layer=all", "did you mean model.mechanism.dense_layers?"),
        ("convert LLAVA --out x --mechanism saisa model.mechanism.aligner.ffn=true", "layerwise projectors make"),
        (
            "convert LLAVA --out x --mechanism ee_mllm --to-llava",
            'the mechanism is {"preset": "ee_mllm"}, which transformers',
        ),
        ("convert BARE --out x --to-llava", "BARE holds no tokenizer"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(llava_folder, tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    if "BARE" in line:
        tiny.model("llama", "llava").save_pretrained("BARE")
    before = sorted(Path().iterdir())
    assert cli.main([str(llava_folder) if word == "LLAVA" else word for word in line.split()]) == 2
    assert message in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before


def test_a_killed_conversion_leaves_no_half_folder(llava_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    line = ["convert", str(llava_folder), "--out", str(out), "--mechanism", "saisa"]
    code = f"""
import os, signal
from lit_eemllm import cli
from lit_eemllm.model import EEMLLM
whole = EEMLLM.save_pretrained
def save(self, folder):
    whole(self, folder)
    os.kill(os.getpid(), signal.SIGKILL)
EEMLLM.save_pretrained = save
cli.main({line!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists() and list(tmp_path.glob(".out.*/out/model.safetensors"))  # as far as it came

    def interrupted(self, folder):
        raise KeyboardInterrupt

    left = set(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(EEMLLM, "save_pretrained", interrupted)
        assert cli.main(line) == 130
    assert set(tmp_path.iterdir()) == left
    assert cli.main(line) == 0
    assert EEMLLM.from_pretrained(out).mechanism == PRESETS["saisa"]
