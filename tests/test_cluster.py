"""docs/cluster.md from its first to its last command, in miniature.

The releases are those of tests/test_sources.py, the parts those of `lit-eemllm shrink`; `sbatch ... tools/slurm.sh` becomes `fit` in
this process (tests/test_distributed.py tests the script itself).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_cli import commands
from test_sources import RELEASES

from lit_eemllm import cli, shrink
from lit_eemllm.config import load_config

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_command_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (suite,) = re.findall(r"```yaml\n# suite.yaml\n(.*?)```", PAGE, re.DOTALL)
    Path("suite.yaml").write_text(suite)
    done: list[str] = []
    for words in commands(PAGE):
        capsys.readouterr()
        if words[0] == "sbatch":
            (preset,) = words[words.index("tools/slurm.sh") + 1 :]
            again = done.count(" ".join(words))
            config = load_config([preset])
            small = str(shrink.shrink(config, Path("small")))
            # the blend itself, not drawn pictures; killed after a step if the page says how to go on
            more = [f"data.train={config.data.train}", f"optim.max_steps={1 + again}", "data.max_bad_in_a_row=1000"]
            assert cli.main(["fit", preset, small, *more]) == 0, words
            assert ("continuing from" in capsys.readouterr().out) == bool(again)
        else:
            assert words[0] == "lit-eemllm"
            more = []
            if words[1:3] == ["shards", "make"]:
                Path(root := words[words.index("--root") + 1]).mkdir(parents=True)
                RELEASES[words[words.index("--source") + 1]](Path(root))
                more = ["--workers", "1"]
            elif words[1] == "estimate":
                more = [str(shrink.shrink(load_config([words[2]]), Path("published"), published=True)), "--only"]
            elif words[1] == "validate":
                more = ["eval.samples=1"]
            assert cli.main([*words[1:], *more]) == 0, words
        done.append(" ".join(words))
    results = json.loads(Path("runs/ee_mllm_7b/finetune/eval/results.json").read_text())
    assert {"chartqa", "docvqa", "scienceqa"} <= set(json.dumps(results).replace('"', " ").split())
    assert Path("runs/report/report.md").is_file() and Path("ee_mllm_7b/model.safetensors").is_file()
    assert len([line for line in done if "shards make" in line]) == 16
    assert Path("runs/llava_1.5_7b/finetune/checkpoints/step-1.ckpt").is_file(), "on the 665k of the page"
