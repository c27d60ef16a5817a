"""Model cards: what they say of a model, of its run, and that nothing in a run's texts can act in them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import yaml
from lib.reports import RESULTS, write_run

from lit_eemllm.report.card import CARD, write_card


def card(folder: Path, **options: object) -> str:
    told = {"name": "mine", "model": tiny.model(mechanism="shortv"), "values": {}, "scored": None, **options}
    write_card(folder, **told)  # type: ignore[arg-type]
    return (folder / CARD).read_text(encoding="utf-8")


def test_a_plain_one_says_what_the_model_is(tmp_path: Path) -> None:
    text = card(tmp_path)
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["lit_eemllm", "eemllm"],
    }  # fmt: skip
    size = tiny.model(mechanism="shortv").num_parameters()
    assert body.startswith(
        f"\n# mine\n\nA Llama decoder (5 layers, 32 wide) that sees through a CLIPVisionModel; {size:,} parameters.\n\n"
        "It needs the package lit_eemllm beside transformers.\n\n```python\nimport lit_eemllm"
    )
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert rows == [
        "| layers | visual tokens here | they see | updated by | text sees | come from |",
        "| 0–2 | all | all before | value output ffn | all | the layer before |",
        "| 3–4 | all | – | – | all | the layer before |",
    ]
    assert "\n## Licence\n" in body and "license: ..." in body
    assert "## Training" not in body and "## Scores" not in body and "commit " in body and "torch 2" in body


def test_one_of_a_run_has_its_data_scores_controls_and_costs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", results={**RESULTS, "checkpoint": "run/checkpoints/step-4.ckpt"})
    values = {
        "model": {"decoder": "me/decoder", "mechanism": {"preset": "shortv", "rows": {}, "aligner": {"ffn": None}}},
        "data": {"train": "blend.yaml", "val": None}, "optim": {"lr": 1e-3, "max_steps": 4}, "seed": 3,
    }  # fmt: skip
    text = card(tmp_path, values=values, scored=(run, "other/place/step-4.ckpt"))
    for line in (
        "model.decoder: `me/decoder`",
        "model.mechanism: `preset shortv`",
        "data.train: `blend.yaml`",
        "seed: `3`",
    ):
        assert f"\n- {line}\n" in text
    assert "data.val" not in text
    assert "| colour | 0.500 [0.200] | 0.300 |" in text and "images shuffled among the questions" in text
    assert "| prefill MFLOPs a question | 4.6 |" in text
    assert "of another checkpoint" in card(tmp_path, values=values, scored=(run, "step-8.ckpt"))
    (run / "eval" / "results.json").write_text("[")
    assert "results.json: not valid JSON" in card(tmp_path, values=values, scored=(run, "step-4.ckpt"))
    (run / "eval" / "results.json").unlink()
    assert "Not evaluated yet (`lit-eemllm validate " in card(tmp_path, values=values, scored=(run, "step-4.ckpt"))


def test_texts_stay_texts(tmp_path: Path) -> None:
    hostile = "a\n# b <img src=x> [c](http://d) | e"
    text = card(tmp_path, name=hostile, values={"data": {"train": hostile}})
    assert "\n# b" not in text and "<img" not in text and "](http" not in text


def test_one_of_transformers_own_needs_no_package(tmp_path: Path) -> None:
    text = card(tmp_path, model=copy.deepcopy(tiny.model(mechanism="llava")), foreign=True)
    assert "import lit_eemllm" not in text and "tags:\n- lit_eemllm\n---" in text


@pytest.fixture(autouse=True)
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lit-eemllm", "merge", "run"])
