"""docs/models.md and configs/checkpoints: what they say, and their commands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from lib.pages import commands
from lib.vlms import KINDS, tokenizer_of, write

from lit_eemllm import cli
from lit_eemllm.config import load_config
from lit_eemllm.cost.shapes import PUBLISHED
from lit_eemllm.cost.weightless import parts_of_shape
from lit_eemllm.formats.vlm import FORMATS

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tools"))

import estimate_models  # noqa: E402

FOLDER, PAGE = REPOSITORY / "configs" / "checkpoints", (REPOSITORY / "docs" / "models.md").read_text(encoding="utf-8")
HARDWARE = list(estimate_models.HARDWARE)


def rows(first: str) -> list[list[str]]:
    """Cells of the lines of the page's tables that begin so."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if re.match(first, line)]


@pytest.mark.parametrize("hardware", HARDWARE)
def test_a_file_goes_behind_what_convert_writes_and_is_what_the_page_says(hardware, tmp_path):
    """Its template, parts and mechanism stay."""
    model = {"decoder": "m", "vision": {"encoder": "qwen_vl", "path": "m", "policy": "native"}, "template": "jinja"}
    written = {"model": {**model, "mechanism": {"preset": "vica"}, "quantization": None}, "init_from": "m", "out": "m"}
    file, files = tmp_path / "config.yaml", [FOLDER / "qwen_vl.yaml", FOLDER / f"{hardware}.yaml"]
    file.write_text(yaml.safe_dump(written))
    config = load_config([file, *files], ["data.train=x", "out=runs/x"])
    assert (config.model.template, config.model.decoder, config.init_from) == ("jinja", "m", "m")
    assert (config.model.vision.max_tokens, config.model.mechanism.preset) == (4096, "vica")
    assert (config.model.quantization == "nf4") == ("24gb" in hardware)
    gpus, gigabytes = estimate_models.HARDWARE[hardware]
    assert config.trainer["devices"] == gpus and f"{gigabytes}gb" in hardware
    ((_, trained, where, step),) = rows(rf"\| `{hardware}` \| [^0-9]*")
    packs = gpus * config.trainer["accumulate_grad_batches"]
    assert step == f"{packs} packs of {config.data.pack_tokens:,} tokens" and f"{gigabytes} GB" in where
    if config.optim.tuning.llm == "lora":
        assert f"rank {config.optim.lora.r}" in trained
    assert config.optim.lora.alpha == 2 * config.optim.lora.r and config.optim.activation_checkpointing


def test_the_largest_pictures_fit():
    longest = load_config([FOLDER / "lora_24gb.yaml"], ["model.decoder=x", "model.vision.path=x", "data.train=x"])
    for name in PUBLISHED:
        transform = parts_of_shape(name, max_tokens=4096).transform
        assert transform.num_tokens(*transform.largest) <= longest.data.max_length - 512, name


def test_the_page_has_every_family_shape_and_hardware():
    assert {kind.strip("`") for _, kind, *_ in rows(r"\|[^|]*\| `\w+` \|[^|]*\| `")} == set(FORMATS)
    cells = [(model.strip("`"), mechanism.strip("`")) for model, mechanism, *_ in rows(r"\| `[\w.-]+` \| `\w+` \| \d")]
    assert cells == [(model, mechanism) for model in estimate_models.MODELS for mechanism in estimate_models.MECHANISMS]
    for _, _, *found in rows(r"\| `[\w.-]+` \| `\w+` \| \d"):
        memory = zip(found, estimate_models.HARDWARE.values(), strict=True)
        assert all(float(cell) * 2**30 < 0.9 * gigabytes * 10**9 for cell, (_, gigabytes) in memory), found


CHECKED = [(model, estimate_models.MECHANISMS[i % 4]) for i, model in enumerate(estimate_models.MODELS)]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "mechanism"), CHECKED)
def test_the_memory_of_the_table(model, mechanism):
    assert estimate_models.line(model, mechanism) in PAGE.splitlines()


@pytest.mark.slow
def test_the_commands_of_the_page(shapes, tmp_path, monkeypatch, capsys):
    """With random models for the published ones, on a CPU; transformers' processor without its part for videos, which needs torchvision."""
    monkeypatch.chdir(tmp_path)
    made = KINDS["qwen3_vl"]
    own = made.processor(tokenizer_of(made), made.preprocessor)
    monkeypatch.setattr("lit_eemllm.formats.vlm.AutoProcessor.from_pretrained", lambda folder: own)
    write("internvl", Path("InternVL3-8B-hf"), num_hidden_layers=4)
    write("qwen3_vl", Path("Qwen3-VL-8B-Instruct"), num_hidden_layers=4)
    small = [
        f"data.train={shapes}",
        "data.workers=0",
        "data.shuffle_buffer=16",
        "data.packing_buffer=8",
        "optim.max_steps=1",
    ]
    small += ["trainer.accelerator=cpu", "optim.log_every=1"]
    for words in commands(PAGE):
        if words[0] == "lit-eemllm":
            assert cli.main([*words[1:], *{"fit": small, "estimate": ["--only"]}.get(words[1], [])]) == 0, words
    for folder in ("runs/internvl", "runs/qwen"):
        assert Path(folder, "checkpoints", "step-1.ckpt").is_file()
    assert made.model.from_pretrained("models/qwen_hf").config.model_type == "qwen3_vl"
    assert "internvl3-8b, configured mechanism ee_mllm" in capsys.readouterr().out
