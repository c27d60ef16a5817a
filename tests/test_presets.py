"""Every preset trains: two optimiser steps on a CPU through the command line, shrunk by tools/shrink.py and nothing else."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lit_eemllm import cli
from lit_eemllm.config import load_config

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tools"))
import shrink  # noqa: E402

PRESETS = [
    path for path in sorted((REPOSITORY / "configs" / "presets").glob("*.yaml")) if not path.stem.startswith("base_")
]
ASKED = {path: load_config([path]) for path in PRESETS}
OF_RUN = {config.out: path for path, config in ASKED.items()}
# One of each mechanism takes steps of two packs, the others of one.
TWO_PACKS = set({config.model.mechanism.preset: path for path, config in reversed(ASKED.items())}.values())
each_preset = pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Path]]:
    """Trains a preset, and before it what it starts from, each once. Returns the run directory."""
    folder = tmp_path_factory.mktemp("presets")

    def run(preset: Path) -> Path:
        config = ASKED[preset]
        if Path(config.out).exists():
            return Path(config.out)
        if config.init_from in OF_RUN:
            run(OF_RUN[config.init_from])
        elif config.init_from is not None:  # what a command makes of the stage before, which tells it
            before = OF_RUN[str(Path(config.init_from).parent / "pretrain")]
            run(before)
            (command,) = re.findall(r"lit-eemllm (convert .*?)(?:  |$)", before.read_text(), re.MULTILINE)
            assert cli.main(shlex.split(command)) == 0
        overrides = shrink.shrink(config, Path("tiny"))
        packs = f"trainer.accumulate_grad_batches={1 + (preset in TWO_PACKS)}"
        assert cli.main(["fit", str(preset), str(overrides), packs]) == 0
        return Path(config.out)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield run


@each_preset
def test_two_steps(preset: Path, train: Callable[[Path], Path]) -> None:
    out, asked = train(preset), asdict(ASKED[preset])
    rows = [row for row in csv.DictReader((out / "logs" / "version_0" / "metrics.csv").open()) if row["loss"]]
    assert [row["step"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(row["loss"])) and float(row["grad_norm"]) > 0 for row in rows)
    assert (out / "checkpoints" / "step-2.ckpt").is_file()
    did = yaml.safe_load((out / "config.yaml").read_text())
    decoder, encoder = did["model"]["decoder"], did["model"]["vision"]["path"]
    depth = json.loads((Path(decoder) / "config.json").read_text())["num_hidden_layers"]
    assert depth == shrink.PUBLISHED[asked["model"]["decoder"]].num_hidden_layers
    asked["model"]["decoder"], asked["model"]["vision"]["path"] = decoder, encoder
    asked["optim"] |= {"max_steps": 2, "log_every": 1}
    assert did["model"] == asked["model"] and did["optim"] == asked["optim"], "nothing else is shrunk"


def test_the_row_with_pdrop_has_results_of_its_own(train: Callable[[Path], Path]) -> None:
    """The command that a ViCA preset states evaluates its last checkpoint, and leaves the results of ViCA alone."""
    commands = {}
    for preset in [preset for preset in PRESETS if preset.match("vica_*_finetune.yaml")]:
        text = preset.read_text().replace(" \\\n#", "")
        (command,) = re.findall(r"lit-eemllm (validate .*visual_drop.*)", text)
        commands[preset.stem] = command
        last = f"{ASKED[preset].out}/checkpoints/step-{ASKED[preset].optim.max_steps}.ckpt"
        assert shlex.split(command)[1] == ASKED[preset].out and shlex.split(command)[4:6] == ["--checkpoint", last]
    assert len(commands) == 3
    run = train(REPOSITORY / "configs" / "presets" / "vica_3b_finetune.yaml")
    before = sorted(run.rglob("*"))
    words = shlex.split(commands["vica_3b_finetune"].replace("step-5197", "step-2"))
    suite = {"sets": {"shapes": {"data": "tiny/raw/train.json", "images": "tiny/raw/images"}}}
    Path("SUITE.yaml").write_text(yaml.safe_dump(suite))
    assert cli.main([*words, "eval.samples=2", "eval.max_new_tokens=2"]) == 0 and sorted(run.rglob("*")) == before
    results = json.loads(Path("runs/vica_3b/pdrop/eval/results.json").read_text())
    assert results["mechanism"]["visual_drop"] == [[1, 0.25], [14, 0.25], [18, 0.25]]


def test_published_numbers() -> None:
    """Of A3, D2, E1 in the papers: rates, global batches in samples, published layers; and rows / batch = steps."""
    batch = {"pretrain": 256, "finetune": 128, "lora": 128}
    rate = {"pretrain": 1e-3, "finetune": 2e-5, "lora": 2e-4}
    layers = {
        "3b": [0, 1, 14, 15, 18, 19, 21, 22, 23],
        "7b": [0, 1, 7, 8, 9, 10, 11, 14],
        "13b": [0, 6, 8, 9, 10, 13, 14, 16],
    }
    for preset, config in ASKED.items():
        stage = preset.stem.rpartition("_")[2]
        stage = stage if stage in batch else "finetune"
        rows = {"pretrain_558k": 558_128, "llava_v1_5": 665_298, "ee_mllm_sft": 3_000_000}[Path(config.data.train).stem]
        assert abs(config.optim.max_steps - rows / batch[stage]) < 1, preset.stem
        assert (config.optim.lr, config.optim.warmup_ratio) == (rate[stage], 0.03)
        assert (REPOSITORY / "data_recipes" / "blends" / Path(config.data.train).name).is_file()
        if "_672_" in preset.stem:
            assert config.model.vision.max_tokens == (672 // 14) ** 2
        if preset.stem.startswith("vica"):
            assert config.model.mechanism.cross_layers == layers[preset.stem.split("_")[1]]
        else:
            assert config.model.mechanism.cross_layers is None


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("lmsys/vicuna-7b-v1.5", 13.48),
        ("mtgv/MobileLLaMA-2.7B-Base", 5.40),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.269),
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.988),
    ],
)
def test_published_sizes_are_those_of_the_published_files(name: str, gigabytes: float) -> None:
    """As the model hub lists them; 2 bytes a weight."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shrink.PUBLISHED[name])
    assert 2e-9 * sum(weight.numel() for weight in model.parameters()) == pytest.approx(gigabytes, rel=2e-3)


def described(preset: Path) -> tuple[float, list[str]]:
    """GiB a GPU that a preset's comment states, and the options of `estimate` that it names."""
    comment = preset.read_text().partition("defaults:")[0].replace("\n# ", " ")
    assert "Hardware: " in comment, preset
    options, memory = re.search(r"Memory of a GPU by estimate \((.*?)\): ([\d.]+) GiB", comment).groups()
    return float(memory), options.split()


@each_preset
def test_a_preset_states_its_memory(preset: Path) -> None:
    assert described(preset)[0] < 0.9 * (24 if "24 GB" in preset.read_text() else 80)


@pytest.mark.slow
@each_preset
def test_the_memory_that_a_preset_states(preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory, options = described(preset)
    assert estimated(preset, options, tmp_path, capsys) == pytest.approx(memory, abs=0.06)


def estimated(preset: Path, options: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> float:
    """GiB a GPU of `lit-eemllm estimate` with the published sizes."""
    config = ASKED[preset]
    sizes = str(shrink.shrink(config, folder, published=True))
    gpus = config.trainer["devices"] * config.trainer.get("num_nodes", 1)
    capsys.readouterr()
    assert cli.main(["estimate", str(preset), sizes, *options, "--gpus", str(gpus), "--only", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["mechanisms"].values()
    way = "fsdp" if config.trainer.get("strategy") == "fsdp2" else "ddp"
    kind = f"{way}_recomputing" if config.optim.activation_checkpointing else way
    return row["fits"][kind]["bytes"] / 2**30
