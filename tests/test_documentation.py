"""The commands of README.md and docs/, each page from its first to its last, in miniature and in this process.

The user's own files are those that a page shows, or tiny ones; releases are those of tests/data/test_sources.py, large parts those of
`lit-eemllm shrink`; `sbatch ... tools/slurm.sh` becomes `fit` (tests/training/test_distributed_runs.py tests the script itself).
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lib.pages import PAGES, commands
from lib.releases import RELEASES
from lib.reports import write_run, write_sweep
from shards_util import picture, write_quiz
from tiny import forgotten_imports
from transformers import ArceeConfig, AutoModelForCausalLM

from lit_eemllm import cli, shrink
from lit_eemllm.config import load_config
from lit_eemllm.data.sources import run_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
REPOSITORY = Path(__file__).parents[1]
# Beginnings of commands that are not run here, and what runs them.
ELSEWHERE = {
    "pip install": "tests/test_installed.py",
    "make": ".ci/run",
    "lit-eemllm demo": ".ci/run",
    "lit-eemllm demo-web": "tests/serving/test_browser.py",
    "lit-eemllm serve": "tests/serving/test_browser.py",
    "lit-eemllm chat": "tests/evaluation/test_talking.py",
    "lmms-eval": "tests/evaluation/test_harnesses.py",
    "accelerate": "tests/evaluation/test_harnesses.py",
    "python -m lit_eemllm.evaluation.harnesses.vlmeval": "tests/evaluation/test_harnesses.py",
    "torchrun": "tests/evaluation/test_harnesses.py",
    "LMUData=data": "tests/evaluation/test_harnesses.py",
    "NNODES=2": "tests/training/test_distributed_runs.py",
    "sbatch --nodes=2 --gpus-per-node=8 tools/slurm.sh configs/stages": "tests/training/test_distributed_runs.py",
    "lit-eemllm fit CONFIG...": "tests/training/test_distributed_runs.py",
    "lit-eemllm convert InternVL3-8B-hf": "tests/test_checkpoints.py",
    "lit-eemllm convert Qwen3-VL-8B-Instruct": "tests/test_checkpoints.py",
    "lit-eemllm convert models/": "tests/test_checkpoints.py",
    "lit-eemllm fit models/": "tests/test_checkpoints.py",
    "lit-eemllm estimate configs/checkpoints": "tests/test_checkpoints.py",
    "python tools/check_model.py": "tests/tools/test_check_model.py",
    "python tools/evidence.py": "tests/tools/test_evidence.py",
    # two processes
    "lit-eemllm fit configs/demo/ee_mllm.yaml configs/distributed/cpu.yaml": "tests/training/test_distributed_runs.py",
    # flash-attn needs a GPU
    "lit-eemllm fit configs/stages/finetune.yaml my_model.yaml configs/attention/composite_flash.yaml": "make gpu",
}
FEW_STEPS = ["optim.log_every=1", "optim.val_every=2", "optim.val_batches=1", "eval.samples=2", "eval.max_new_tokens=2"]
OF_THE_DEMO = ["data.workers=0", "data.shuffle_buffer=16", "data.packing_buffer=8", "data.pack_samples=4"]


def shown(text: str, name: str) -> str:
    """The file that a page shows under its name in a comment."""
    (content,) = re.findall(rf"```yaml\n# {re.escape(name)}\n(.*?)```", text, re.DOTALL)
    return content


class Reader:
    """Someone who follows a page, in an empty folder."""

    def __init__(self, page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.text = (REPOSITORY / page).read_text(encoding="utf-8")
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.done: list[str] = []

    def follow(self, weights: bool = False) -> list[str]:
        """Run the commands that need pretrained weights, or the others. Returns them."""
        for words in commands(self.text):
            line = " ".join(words)
            if any(line.startswith(beginning) for beginning in ELSEWHERE) or weights != ("efficientnet_lite" in line):
                continue
            self.capsys.readouterr()
            if words[0] == "sbatch":
                self.submit(words[words.index("tools/slurm.sh") + 1], again=self.done.count(line))
            elif words[0] == "python":
                self.monkeypatch.setattr(sys, "argv", words[1:])
                with forgotten_imports():
                    runpy.run_path(words[1], run_name="__main__")
            else:
                assert words[0] == "lit-eemllm", line
                with forgotten_imports():
                    assert cli.main([*words[1:], *self.smaller(words[1:])]) == 0, line
            self.done.append(line)
        return self.done

    def submit(self, preset: str, again: int) -> None:
        """The blend itself, not drawn pictures; ended after a step if the page says how to go on."""
        config = load_config([preset])
        small = str(shrink.shrink(config, Path("small")))
        more = [f"data.train={config.data.train}", f"optim.max_steps={1 + again}", "data.max_bad_in_a_row=1000"]
        assert cli.main(["fit", preset, small, *more]) == 0, preset
        assert ("continuing from" in self.capsys.readouterr().out) == bool(again)

    def smaller(self, words: list[str]) -> list[str]:
        """What goes behind a command, after what it reads has been made."""
        verb = " ".join(words[:2])
        if verb == "shards make" and "--root" in words:
            root = Path(words[words.index("--root") + 1])
            root.mkdir(parents=True)
            {**RELEASES, "quiz": write_quiz}[words[words.index("--source") + 1]](root)
            return ["--workers", "1"]
        if verb == "shards make" and "--source" in words:
            return ["--train", "12", "--val", "4"]
        if words[0] == "fit":
            given = [word for word in words[1:] if "=" in word or word.endswith(".yaml")]
            config = load_config([word for word in given if "=" not in word], [word for word in given if "=" in word])
            more = [
                *FEW_STEPS,
                "optim.max_steps=2",
                *([] if config.data.val is None else [f"data.val={config.data.val}"]),
            ]
            if config.model.decoder == "SmolLM2-135M-Instruct":
                more.append("model.template=vicuna_v1")  # the stand-in has none of its own
            if config.model.decoder not in shrink.PUBLISHED:
                return [*OF_THE_DEMO, *more]
            return [str(shrink.shrink(config, Path("small"))), *more, f"data.train={config.data.train}"]
        if words[0] == "sweep" and "--dry-run" not in words:  # one of its cells; README.md's is run, others are planned
            one = ["seeds=[0]", "cells={a: {files: [../demo/llava.yaml]}}", "baseline=a"]
            few = [*FEW_STEPS, *OF_THE_DEMO, "optim.max_steps=2"]
            return [*one, *few] if self.text.startswith("# lit_eemllm") else ["--dry-run"]
        if words[:3] == ["report", "runs/finetune", "runs/other"]:
            shutil.copytree("runs/finetune", "runs/other")
        if words[0] == "report" and (sweep := Path(words[1])).parent.name == "sweeps" and not sweep.exists():
            write_sweep(sweep, {"all parts": [write_run(sweep / "all-parts" / "seed0")]})
        if words[0] == "validate":
            return ["eval.samples=2", "eval.max_new_tokens=2", "trainer.devices=1"]
        if words[0] == "estimate":
            return [str(shrink.shrink(load_config([words[1]]), Path("published"), published=True)), "--only"]
        return []


@pytest.fixture
def read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], Reader]:
    """A reader of a page, with shards where the demo's configurations look for them."""
    monkeypatch.chdir(tmp_path)
    small = ["--source", "shapes", "--train", "24", "--val", "8", "--shard-size", "8"]
    assert cli.main(["shards", "make", *small, "--out", "runs/demo/data"]) == 0
    return lambda page: Reader(page, monkeypatch, capsys)


def own_rows(*names: str) -> None:
    """Rows of one's own in LLaVA's form, of one question each, in these files; pictures in `images`."""
    rows = json.loads(run_recipe("shapes.py").write(Path("drawn"), "train", 12).read_text())
    shutil.move("drawn/images", "images")
    for name in names:
        Path(name).write_text(json.dumps([row | {"conversations": row["conversations"][:2]} for row in rows]))


def own_parquet(folder: Path, image: str, *texts: str) -> None:
    """A data set of the hub's with these columns."""
    folder.mkdir(parents=True)
    rows = [
        {image: {"bytes": picture(number), "path": None}, **dict.fromkeys(texts, str(number))} for number in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")


def write_arcee(folder: Path) -> None:
    """A decoder of the family of docs/my_decoder.py, with the tokenizer of the demo's."""
    config = ArceeConfig(vocab_size=832, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for text in shrink.TEXTS:
        shutil.copy(shrink.TOKENIZER / text, folder)


def test_readme(read: Callable[[str], Reader]) -> None:
    reader = read("README.md")
    own_rows("train.json", "val.json")
    assert (
        cli.main(["shards", "make", "--rows", "train=train.json", "--images", "images", "--out", "shards/captions"])
        == 0
    )
    Path("my_model.yaml").write_text(shown(reader.text, "my_model.yaml"))
    (blend,) = re.findall(r"```yaml\n(splits:.*?)```", reader.text, re.DOTALL)
    Path("blend.yaml").write_text(blend)
    Path("cat.jpg").write_bytes(picture(0, "JPEG"))
    assert len(reader.follow()) == 13
    assert Path("runs/mine/inspect/train.html").is_file() and Path("report/report.md").is_file()
    assert Path("runs/sweeps/aligner/report/report.md").is_file()


def test_readme_with_weights(read: Callable[[str], Reader], shared: Path) -> None:
    reader = read("README.md")
    Path("SmolLM2-135M-Instruct").symlink_to(shared / "weights" / "stories15m")
    shutil.copy(shared / "weights" / "efficientnet_lite0.safetensors", ".")
    own_rows("train.json")
    Path("blend.yaml").write_text("splits: {train: {path: runs/demo/data}, val: {path: runs/demo/data}}")
    assert len(reader.follow(weights=True)) == 3


def test_cluster(read: Callable[[str], Reader]) -> None:
    reader = read("docs/cluster.md")
    Path("suite.yaml").write_text(shown(reader.text, "suite.yaml"))
    done = reader.follow()
    results = json.loads(Path("runs/ee_mllm_7b/finetune/eval/results.json").read_text())
    assert {"chartqa", "docvqa", "scienceqa"} <= set(json.dumps(results).replace('"', " ").split())
    assert Path("runs/report/report.md").is_file() and Path("ee_mllm_7b/model.safetensors").is_file()
    assert len([line for line in done if "shards make" in line]) == 16
    assert Path("runs/llava_1.5_7b/finetune/checkpoints/step-1.ckpt").is_file(), "on the 665k of the page"


def test_evaluation(read: Callable[[str], Reader]) -> None:
    """Also its lines of Python, on its rows and its suite."""
    reader = read("docs/evaluation.md")
    fit = ["fit", "configs/demo/ee_mllm.yaml", "out=runs/mine"]
    assert cli.main([*fit, *reader.smaller(fit)]) == 0
    own_rows()
    (image, *_) = sorted(Path("images").iterdir())
    for folder in (".", "val2014", "scienceqa"):
        Path(folder).mkdir(exist_ok=True)
    shutil.copy(image, "val2014")
    Path("kitchen.jpg").write_bytes(picture(0, "JPEG"))
    Path("cat.jpg").write_bytes(picture(0, "JPEG"))
    row = {"id": 1, "image": image.name, "question": "Is there a cup? Please answer yes or no.", "answer": "Yes"}
    Path("pope.json").write_text(json.dumps([row]))
    (vizwiz,) = re.findall(r"```json\n(\{.*?)```", reader.text, re.DOTALL)
    Path("vizwiz.jsonl").write_text(vizwiz)
    RELEASES["scienceqa"](Path("scienceqa"))
    make = ["shards", "make", "--source", "scienceqa", "--root", "scienceqa", "--workers", "1", "--out"]
    assert cli.main([*make, "scienceqa/shards"]) == 0
    Path("benchmarks.yaml").write_text(shown(reader.text, "benchmarks.yaml"))
    Path("docs").symlink_to(REPOSITORY / "docs")
    assert len(reader.follow()) == 5
    for python in re.findall(r"```python\n(.*?)```", reader.text, re.DOTALL):
        Path("ask.py").write_text(python)
        runpy.run_path("ask.py")


@pytest.mark.parametrize(
    ("page", "number"),
    [
        ("docs/backends.md", 8),
        ("docs/data.md", 7),
        ("docs/sweeps.md", 4),
        ("docs/vision.md", 5),
        ("docs/mechanisms.md", 8),
        ("docs/decoders.md", 2),
        ("docs/watching.md", 2),
    ],
)
def test_other_pages(read: Callable[[str], Reader], page: str, number: int) -> None:
    reader = read(page)
    own_rows("train.json")
    own_parquet(Path("ai2d"), "image", "caption")
    own_parquet(Path("ChartQA/data"), "image", "query", "label", "human_or_machine")
    Path("my_config.yaml").write_text("defaults: [configs/demo/ee_mllm.yaml]\nout: runs/vision\n")
    write_arcee(Path("AFM-4.5B"))
    Path("docs").symlink_to(REPOSITORY / "docs")
    assert len(reader.follow()) == number


def test_no_page_is_left_out() -> None:
    """Other pages have commands only of those that are tested elsewhere; and where they are is a file."""
    tested = {
        "README.md",
        *(
            f"docs/{name}.md"
            for name in (
                "cluster",
                "evaluation",
                "backends",
                "data",
                "sweeps",
                "vision",
                "mechanisms",
                "decoders",
                "watching",
            )
        ),
    }
    for page in set(PAGES) - tested:
        for words in commands((REPOSITORY / page).read_text(encoding="utf-8")):
            assert any(" ".join(words).startswith(beginning) for beginning in ELSEWHERE), words
    assert all((REPOSITORY / place).is_file() for place in ELSEWHERE.values() if "/" in place)
