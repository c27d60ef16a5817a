"""Every preset trains: two optimiser steps on a CPU through the command line, shrunk by `lit-eemllm shrink` and nothing else."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lit_eemllm import cli, shrink
from lit_eemllm.config import load_config
from lit_eemllm.data import shards
from lit_eemllm.inputs.images import ImageTransform
from lit_eemllm.inputs.resolutions import NativeTransform, with_policy

REPOSITORY = Path(__file__).parents[1]
PRESETS = [
    path for path in sorted((REPOSITORY / "configs" / "presets").glob("*.yaml")) if not path.stem.startswith("base_")
]
ASKED = {path: load_config([path]) for path in PRESETS}
OF_RUN = {config.out: path for path, config in ASKED.items()}
# One of each mechanism takes steps of two packs, the others of one.
TWO_PACKS = set({config.model.mechanism.preset: path for path, config in reversed(ASKED.items())}.values())
each_preset = pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)


def commands(preset: Path) -> list[str]:
    """What stands behind `lit-eemllm` in its comment."""
    return re.findall(r"lit-eemllm (.*)", preset.read_text().replace(" \\\n#", ""))


class Miniature:
    """The repository's folder, in which everything is trained and called once."""

    def __init__(self) -> None:
        self.called: set[Path] = set()

    def train(self, preset: Path) -> Path:
        """A preset, and before it what it starts from. Returns the run directory."""
        config = ASKED[preset]
        if Path(config.out, "checkpoints").exists():  # a command alone leaves other files there
            return Path(config.out)
        if config.init_from in OF_RUN:
            self.train(OF_RUN[config.init_from])
        elif config.init_from is not None:  # what a command makes of the stage before, which tells it
            self.call(OF_RUN[str(Path(config.init_from).parent / "pretrain")])
        overrides = shrink.shrink(config, Path("tiny"))
        packs = f"trainer.accumulate_grad_batches={1 + (preset in TWO_PACKS)}"
        assert cli.main(["fit", str(preset), str(overrides), packs]) == 0
        return Path(config.out)

    def call(self, preset: Path) -> None:
        """The commands of a preset's comment, after the runs that they name have been trained; small, if they ask questions."""
        if preset in self.called:
            return
        self.called.add(preset)
        for command in commands(preset):
            words = shlex.split(command.replace("step-5197", "step-2"), comments=True)
            for out, named in OF_RUN.items():
                if any(f"{word}/".startswith(f"{out}/") for word in words):
                    self.train(named)
            if words[1].endswith(".yaml"):
                words.insert(2, str(shrink.shrink(load_config([words[1]]), Path("tiny"))))
            small = {"validate": ["eval.samples=2", "eval.max_new_tokens=2"], "calibrate": ["--samples", "2"]}
            assert cli.main([*words, *small.get(words[0], [])]) == 0, command


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Miniature]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("presets"))
        Path("configs").symlink_to(REPOSITORY / "configs")
        shrink.shrink(next(iter(ASKED.values())), Path("tiny"))
        rows, images = Path("tiny/raw/train.json"), Path("tiny/raw/images")
        Path("SUITE.yaml").write_text(yaml.safe_dump({"sets": {"shapes": {"data": str(rows), "images": str(images)}}}))
        shards.make({"val": rows}, images, Path("SHARDS"))
        yield Miniature()


@each_preset
def test_two_steps(preset: Path, miniature: Miniature) -> None:
    out, asked = miniature.train(preset), asdict(ASKED[preset])
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


WITH_COMMANDS = [preset for preset in PRESETS if commands(preset)]
DROPS = {"vica_3b": [1, 14, 18], "vica_7b": [1, 7, 10], "vica_13b": [6, 9, 13]}  # ViCA's "+ PDrop"


@pytest.mark.parametrize("preset", WITH_COMMANDS, ids=lambda path: path.stem)
def test_the_commands_of_a_comment(preset: Path, miniature: Miniature) -> None:
    miniature.call(preset)


def test_the_commands_leave_results_of_their_own(miniature: Miniature) -> None:
    """EE-MLLM-F is the trained LLaVA with other layers; ViCA with PDrop is ViCA with fewer tokens, and ViCA keeps its results."""
    of_name = {preset.stem: preset for preset in WITH_COMMANDS}
    free = ("ee_mllm_f", "fastv", "visionzip", "withdrawal", "visipruner", "operator_skipping")
    assert set(of_name) == {
        "saisa_7b_pretrain",
        *(f"{name}_7b" for name in free),
        *(f"{name}_finetune" for name in DROPS),
    }
    for name, layers in DROPS.items():
        miniature.call(of_name[f"{name}_finetune"])
        results = json.loads(Path(f"runs/{name}/pdrop/eval/results.json").read_text())
        assert results["mechanism"]["visual_drop"] == [[layer, 0.25] for layer in layers]
        assert results["checkpoint"] == f"runs/{name}/finetune/checkpoints/step-2.ckpt"
        assert not Path(f"runs/{name}/finetune/eval").exists()
    for name in free:
        miniature.call(of_name[f"{name}_7b"])
        results = json.loads(Path(f"runs/{name}_7b/eval/results.json").read_text())
        assert results["preset"] == name
        assert results["checkpoint"] == "runs/llava_1.5_7b/finetune/checkpoints/step-2.ckpt"
        if name == "ee_mllm_f":
            assert results["mechanism"]["dense_layers"] == list(range(16))
    assert all(ASKED[preset].optim.max_steps == 5197 for preset in WITH_COMMANDS if "step-5197" in preset.read_text())


ROWS = {"pretrain_558k": 558_128, "llava_v1_5": 665_298, "ee_mllm_sft": 3_000_000}


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
        rows = ROWS[Path(config.data.train).stem]
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


def comment(preset: Path) -> str:
    return preset.read_text().partition("defaults:")[0].replace("\n# ", " ")


def described(preset: Path) -> tuple[float, list[str]]:
    """GiB a GPU that a preset's comment states, and the options of `estimate` that it names."""
    options, memory = re.search(r"Memory of a GPU by estimate \((.*?)\): ([\d.]+) GiB", comment(preset)).groups()
    return float(memory), options.split()


@each_preset
def test_a_preset_states_its_hardware_batch_memory_and_source(preset: Path) -> None:
    """The batch is what the configuration gives: packs of tokens that so many samples fill, one epoch of which are its steps."""
    assert described(preset)[0] < 0.9 * (24 if "24 GB" in preset.read_text() else 80)
    text, config = comment(preset), ASKED[preset]
    assert re.search(r"Hardware: .*\d+ GB", text)
    assert re.search(r"[Ss]ource: (arXiv \d{4}\.\d{5}|[\w.-]+/[\w.-]+|our choice)", text), (
        "a paper, a repository, or ours"
    )
    stated = re.search(
        r"Batch: ([\d,]+) samples of about ([\d,]+) tokens[^,]*?, as (\d+) GPUs? x (\d+) packs? x ([\d,]+) tokens\.",
        text,
    )
    assert stated is not None
    samples, tokens, *batch = (int(number.replace(",", "")) for number in stated.groups())
    gpus = config.trainer["devices"] * config.trainer.get("num_nodes", 1)
    assert batch == [gpus, config.trainer["accumulate_grad_batches"], config.data.pack_tokens]
    assert samples * tokens == pytest.approx(math.prod(batch), rel=0.04), "packs are not quite full"
    assert abs(config.optim.max_steps - ROWS[Path(config.data.train).stem] / samples) < 1


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


def test_the_table_of_encoders() -> None:
    """docs/vision.md: the layers of the model configs, policies that the encoder takes, and the tokens of four pictures."""
    page = (REPOSITORY / "docs" / "vision.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if line.startswith("| ") and line.count("|") == 6
    ][1:]
    configs = {
        path.stem: load_config([PRESETS[0], path]) for path in (REPOSITORY / "configs" / "models").glob("*.yaml")
    }
    told, name = set(), ""
    for path, where, layer, policies, tokens in rows:
        name = re.findall(r"`(.*?)`", path)[0] if path != "the same" else name
        for model in set(re.findall(r"`(.*?)`", where)) & set(configs):
            told.add(model)
            vision = configs[model].model.vision
            assert (vision.path, yaml.safe_load(layer)) == (name, vision.select_layer) and vision.policy in policies, (
                model
            )
        config = shrink.PUBLISHED[name]
        kind = NativeTransform if config.model_type in shrink.NATIVE else ImageTransform
        transform = kind.from_preprocessor_config(shrink.preprocessor(config), patch=config.patch_size)
        for policy in re.findall(r"`(.*?)`", policies):
            own = with_policy(transform, policy)
            if most := re.search(r"max_tokens: (\d+)", where):
                own = own.within(int(most[1]))
            pictures = (640, 480), (1600, 1200), (200, 100), own.largest
            assert [own.num_tokens(*size) for size in pictures] == [int(n) for n in tokens.split(",")], (name, policy)
    assert told == set(configs), "every model config is in the table"
