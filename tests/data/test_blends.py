"""Blends: what a recipe asks for, what training drew, and the recipes of the repository."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import tiny
from shards_util import blend, module, row, write_shards

from lit_eemllm.config import to_yaml
from lit_eemllm.console import metrics_files
from lit_eemllm.data.recipe import read_recipe, read_yaml
from lit_eemllm.data.sources import SOURCES
from lit_eemllm.training.checkpoint import read_checkpoint
from lit_eemllm.training.fit import fit

BLENDS = sorted((Path(__file__).parents[2] / "data_recipes" / "blends").glob("*.yaml"))
TOLERANCE = 0.05  # of a share, after 800 samples: three standard deviations of a draw at one half


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources whose samples differ in length: a, with an image each, and x/a, text alone."""
    folder = tmp_path_factory.mktemp("blends")
    for name, images in (("a", 1), ("x/a", 0)):
        (folder / name).parent.mkdir(exist_ok=True)
        write_shards(
            folder / name, {"train": [row(i, images) for i in range(20)], "val": [row(0, images)]}, shard_size=10
        )
    return folder


def test_what_a_recipe_asks_for(folder: Path) -> None:
    weights = read_recipe(blend(folder, {"a": 1, "x/a": 3}), "train")
    assert weights.shares == {"a": 0.25, "a (2)": 0.75}
    passes = read_recipe(blend(folder, {"a": 2, "x/a": 0.5}, "repetitions"), "train")
    assert passes.shares == {"a": 0.8, "a (2)": 0.2}, "2 x 20 and 0.5 x 20 samples"
    assert read_recipe(folder / "a", "train").shares == {"a": 1.0}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_drawn_is_what_was_asked_for_also_after_a_resume(folder: Path, workers: int) -> None:
    """Counted here from the keys and layouts of the batches; weights count samples, so tokens have other shares."""
    recipe = blend(folder, {"a": 1, "x/a": 3})
    data = module(recipe, workers=workers)
    samples, tokens = [0, 0], [0, 0]
    for number, batch in enumerate(islice(data.train_dataloader(), 200)):
        if number == 99:
            saved = data.state_dict()
        for runs in batch.layout.documents:
            source = 0 if any(run.visual for run in runs) else 1
            samples[source] += 1
            tokens[source] += sum(run.length for run in runs)
    drawn = data.drawn()
    assert sum(samples) > 800
    for source, name in enumerate(("a", "a (2)")):
        asked, of_samples, of_tokens = drawn[name]
        assert of_samples == samples[source] / sum(samples) and of_tokens == tokens[source] / sum(tokens)
        assert abs(of_samples - asked) < TOLERANCE
    assert drawn["a"][2] > drawn["a"][1] + 0.03
    again = module(recipe, workers=workers)
    again.load_state_dict(json.loads(json.dumps(saved)))
    list(islice(again.train_dataloader(), 100))
    assert again.drawn() == drawn


OWN = ("optim.max_steps=6", "optim.save_every=3", "data.val=null", "data.max_length=250", "data.pack_tokens=600")


def shares(out: Path) -> dict[str, str]:
    """The last row of metrics.csv."""
    rows = [list(csv.DictReader(path.open())) for path in metrics_files(out)]
    return {name: value for name, value in rows[-1][-1].items() if name.startswith("share_of")}


def test_training_logs_the_realised_shares(folder: Path, parts: Path, tmp_path: Path, capsys) -> None:
    """In the log as text and in metrics.csv; a run that goes on counts on."""
    recipe = blend(folder, {"a": 1, "x/a": 3})
    fit(tiny.config(parts, recipe, tmp_path / "whole", *OWN))
    shown = capsys.readouterr().out
    assert "realised blend" in shown and "75.0%" in shown
    whole = shares(tmp_path / "whole")
    of_samples = [float(whole[f"share_of_samples/{name}"]) for name in ("a", "a (2)")]
    assert sum(of_samples) == pytest.approx(1) and 0 < of_samples[0] < 0.5 and len(whole) == 4
    cut = tmp_path / "cut" / "checkpoints"
    cut.mkdir(parents=True)
    (tmp_path / "whole" / "checkpoints" / "step-3.ckpt").rename(cut / "step-3.ckpt")
    fit(tiny.config(parts, recipe, tmp_path / "cut", *OWN))
    assert shares(tmp_path / "cut") == whole


@pytest.mark.slow
def test_the_shares_are_those_of_all_ranks(folder: Path, parts: Path, tmp_path: Path) -> None:
    """The checkpoint holds what each of two ranks has counted for itself."""
    recipe = blend(folder, {"a": 1, "x/a": 3})
    file, out = tmp_path / "two.yaml", tmp_path / "two"
    two = ("trainer.devices=2", "trainer.strategy=ddp")
    file.write_text(to_yaml(tiny.config(parts, recipe, out, *OWN, *two)))
    command = [sys.executable, "-m", "lit_eemllm", "fit", str(file)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=250, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("realised blend") == 1, "one rank speaks"
    ranks = read_checkpoint(out / "checkpoints" / "step-6.ckpt")["ShardDataModule"]["ranks"]
    for what in ("samples", "tokens"):
        counted = [{name: rank[what].get(name, 0) for name in ("a", "a (2)")} for rank in ranks]
        assert len(counted) == 2 and counted[0] != counted[1], "or one rank's shares could not be told from both's"
        total = sum(sum(mine.values()) for mine in counted)
        for name in counted[0]:
            share = sum(mine[name] for mine in counted) / total
            assert float(shares(out)[f"share_of_{what}/{name}"]) == pytest.approx(share)


# --- the recipes of the repository


@pytest.mark.parametrize("path", BLENDS, ids=lambda path: path.stem)
def test_a_blend_of_the_repository_is_drawn_in_its_shares(path: Path, folder: Path, tmp_path: Path) -> None:
    """From stand-ins in folders called as the sources: what was drawn is within four standard deviations of what is asked."""
    copy = tmp_path / path.name
    copy.write_text(path.read_text())
    body = read_yaml(path)["splits"]["train"]
    names = [entry["path"] for entry in body.get("blend", [body])]
    assert set(names) <= set(SOURCES), "folders are named as the sources whose shards they hold"
    for name in names:
        shutil.copytree(folder / "a", tmp_path / name)
    assert list(read_recipe(copy, "train").shares) == names
    data = module(copy, workers=0)
    total = 0
    for batch in data.train_dataloader():
        total += len(batch.layout.documents)
        if total > 1500:
            break
    for name, (asked, of_samples, _) in data.drawn().items():
        assert abs(of_samples - asked) <= 4 * (asked * (1 - asked) / total) ** 0.5, name


def test_the_blend_of_the_paper_has_its_shares() -> None:
    """Table 1: 35, 8.5, 47 and 9.5 %; without the last, which is not public, 38.7, 9.4 and 51.9 %."""
    (path,) = (path for path in BLENDS if path.stem == "ee_mllm_sft")
    weights = {entry["path"]: entry["weight"] for entry in read_yaml(path)["splits"]["train"]["blend"]}
    general = ["sharegpt4v", "lvis_instruct4v", "laion_gpt4v", "textocr_gpt4v", "localized_narratives", "iconqa"]
    of_text = ["dvqa", "plotqa", "clevr", "docvqa", "chartqa", "scienceqa"]
    alone = ["alpaca", "sharegpt"]
    assert set(weights) == {*general, *of_text, *alone}
    total = sum(weights.values())
    for names, share in ((general, 35), (of_text, 8.5), (alone, 47)):
        assert sum(weights[name] for name in names) == pytest.approx(share, abs=1e-6)
        assert sum(weights[name] for name in names) / total == pytest.approx(share / 90.5)
