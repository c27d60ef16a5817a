"""Runs with a connector other than the default, from the command line: trained, resumed, asked, converted, written and read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lit_eemllm import cli
from lit_eemllm.config import load_config, to_yaml
from lit_eemllm.cost.estimate import mechanisms_of
from lit_eemllm.cost.weightless import parts_of_config
from lit_eemllm.data.samples import SampleEncoder
from lit_eemllm.errors import CheckpointError
from lit_eemllm.evaluation.harnesses.answerer import read_config
from lit_eemllm.formats.convert import open_source
from lit_eemllm.inputs.chat import get_template
from lit_eemllm.mechanisms import CONNECTORS
from lit_eemllm.report.runs import read_run
from lit_eemllm.training.fit import fit

ROOT = Path(__file__).parents[2]
CONNECTED = {
    "linear": ["model.connector.name=linear"],
    "pixel_shuffle": ["model.connector.name=pixel_shuffle"],
    "average": ["model.connector={name: average, options: {factor: 3}}"],
    "attention": ["model.connector.name=attention", "model.connector.options={tokens: 3, heads: 2}"],
    "strips": ["model.connector.name=strips"],
}
TOKENS = {"linear": 16, "pixel_shuffle": 4, "average": 4, "attention": 3, "strips": 2}
"""Of an image of 4 x 4 patches."""
OWN = ["--import", str(ROOT / "docs" / "my_connector.py")]
STEPS = ["optim.save_every=2", "optim.val_every=2", "optim.schedule=constant", "optim.warmup_ratio=0", "model.mechanism.preset=ee_mllm"]  # fmt: skip


def run(name: str, *words: str) -> int:
    with tiny.forgotten_imports():
        return cli.main([*words, *(OWN if name == "strips" else [])])


@pytest.mark.parametrize("name", CONNECTED)
def test_a_run_resumes_to_the_bit_is_asked_merged_and_reported(name, parts, shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for out, steps in (("whole", (4,)), ("cut", (2, 4))):
        Path("c.yaml").write_text(to_yaml(tiny.config(parts, shapes, Path(out), *STEPS)))
        for count in steps:
            assert run(name, "fit", "c.yaml", *CONNECTED[name], f"optim.max_steps={count}") == 0
    told = capsys.readouterr().out
    assert f"connector {name}" in told
    states = [torch.load(f"{out}/checkpoints/step-4.ckpt", weights_only=True)["state_dict"] for out in ("whole", "cut")]
    assert states[0].keys() == states[1].keys() and all(states[0][n].equal(x) for n, x in states[1].items())

    assert run(name, "validate", "cut", "eval.samples=4") == 0
    results = json.loads(Path("cut/eval/results.json").read_text())
    assert results["connector"]["name"] == name and results["prompt_visual_tokens"] == TOKENS[name]
    assert read_run(Path("cut")).label.startswith(f"ee_mllm {name}")
    assert run(name, "merge", "cut", "--to", "merged") == 0
    assert json.loads(Path("merged/config.json").read_text())["connector"]["name"] == name
    with tiny.forgotten_imports():
        if name == "strips":
            assert cli.main(["validate", "merged", "--checkpoint", "none", "eval.samples=2"]) == 2
            assert "model.connector.name: found 'strips'" in capsys.readouterr().err
            return
    assert run(name, "validate", "merged", "--checkpoint", "none", "eval.samples=2") == 0
    Path("merged/config.yaml").unlink()
    config = read_config(Path("merged"), ["model.template=vicuna_v1"])
    assert (config.model.connector.name, config.model.connector.options) == (name, results["connector"]["options"])


def test_a_run_does_not_go_on_with_another_connector_and_an_old_one_does(parts, shapes, tmp_path):
    fit(tiny.config(parts, shapes, tmp_path / "average", "model.connector.name=average", "optim.max_steps=1"))
    with pytest.raises(
        CheckpointError, match=r"model.connector.options.factor was None and is 3|model.connector.name was average"
    ):
        fit(tiny.config(parts, shapes, tmp_path / "average", *CONNECTED["average"], "optim.max_steps=2"))
    with pytest.raises(CheckpointError, match=r"model\.connector\.name was average and is mlp"):
        fit(tiny.config(parts, shapes, tmp_path / "average", "optim.max_steps=2"))

    old = tmp_path / "old"
    fit(tiny.config(parts, shapes, old, "optim.max_steps=1"))
    file = next((old / "checkpoints").glob("*.ckpt"))
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["lit_eemllm"]["config"]["model"]["connector"]  # of a version that knew no other
    torch.save(checkpoint, file)
    with pytest.raises(CheckpointError, match=r"model\.connector\.name was mlp and is linear"):
        fit(tiny.config(parts, shapes, old, "optim.max_steps=2", "model.connector.name=linear"))
    fit(tiny.config(parts, shapes, old, "optim.max_steps=2"))
    assert (old / "checkpoints" / "step-2.ckpt").is_file()


def test_what_is_packed_is_known_to_be_other(parts):
    """A loader that goes on, and lengths that are kept beside shards, tell connectors apart where token counts differ."""
    template = get_template("vicuna_v1", AutoTokenizer.from_pretrained(parts / "decoder"))
    found = [
        SampleEncoder(template, tiny.TRANSFORM.with_reduction(connector), 99, "drop", 10**6).identity()
        for connector in (CONNECTORS["mlp"], CONNECTORS["linear"], CONNECTORS["average"], CONNECTORS["pixel_shuffle"])
    ]
    assert found[0] == found[1] and len({json.dumps(one) for one in found}) == 3


@pytest.mark.parametrize("mechanism", ["ee_mllm", "saisa"])
def test_queries_are_trained_beside_adapters_and_kept(mechanism, parts, shapes, tmp_path):
    lora = ["optim.tuning.projector=lora", "optim.tuning.llm=lora", "optim.lora.r=2", "optim.lora.dropout=0",
            f"model.mechanism.preset={mechanism}", *CONNECTED["attention"]]  # fmt: skip
    made = tiny.config(parts, shapes, tmp_path, *lora, "optim.max_steps=2", "optim.save_every=2")
    fit(made)
    state = torch.load(tmp_path / "checkpoints" / "step-2.ckpt", weights_only=True)["state_dict"]
    queries = [name for name in state if name.endswith(".queries")]
    assert len(queries) == (3 if mechanism == "saisa" else 1)
    assert {name.rpartition("lora_")[1] for name in state if name.startswith("model.projector")} == {"lora_", ""}
    source = open_source(tmp_path)
    assert all(source.model.get_parameter(name.removeprefix("model.")).equal(state[name]) for name in queries)


def table(text: str) -> dict[tuple[str, str], int]:
    """(part, fate) -> tensors, of the printed table."""
    rows = [line.strip("│").split("│") for line in text.splitlines() if line.startswith("│")]
    return {(part.strip(), fate.strip()): int(count.replace(",", "")) for part, count, _, fate in rows}


def test_conversions(parts, shapes, tmp_path, capsys):
    """The same connector keeps its weights, or is copied to each layer; another one begins fresh, and LLaVA's format refuses it."""
    made, out = tmp_path / "run", tmp_path / "out"
    fit(tiny.config(parts, shapes, made, "optim.max_steps=1", *CONNECTED["attention"]))
    trained = torch.load(made / "checkpoints" / "step-1.ckpt", weights_only=True)["state_dict"]
    capsys.readouterr()

    def converted(source: Path, name: str, *words: str) -> str:
        assert cli.main(["convert", str(source), "--out", str(out / name), *words]) == 0
        return capsys.readouterr().out

    said = converted(made, "same", "--mechanism", "naavit")
    assert table(said) == {("vision", "kept"): 53, ("language_model", "kept"): 30, ("projector", "kept"): 15}
    assert 'mechanism {"preset": "naavit"}, connector attention tokens=3 heads=2' in " ".join(said.split())
    said = converted(made, "layers", "--mechanism", "saisa")
    assert table(said)["projector", "copied"] == 3 * 15
    layers = load_file(out / "layers" / "model.safetensors")
    assert all(layers[f"projector.layers.{i}.queries"].equal(trained["model.projector.queries"]) for i in range(3))
    said = converted(out / "layers", "back", "--mechanism", "llava")
    back = load_file(out / "back" / "model.safetensors")
    assert table(said)["projector", "copied"] == 15 and back["projector.queries"].equal(
        trained["model.projector.queries"]
    )

    said = converted(made, "other", "model.connector.name=pixel_shuffle")
    assert table(said) == {
        ("vision", "kept"): 53, ("language_model", "kept"): 30, ("projector", "fresh"): 6, ("projector", "dropped"): 9,
    }  # fmt: skip
    assert "fresh is untrained, from seed 0: projector" in said
    assert json.loads((out / "other" / "config.json").read_text())["connector"] == {
        "name": "pixel_shuffle", "options": {"factor": 2},
    }  # fmt: skip
    assert cli.main(["fit", str(out / "other"), f"out={tmp_path / 'further'}", "optim.max_steps=1"]) == 0
    capsys.readouterr()
    said = converted(out / "other", "wider", "model.connector.options.factor=4")  # of its own connector
    assert "connector pixel_shuffle factor=4" in said and table(said)["projector", "fresh"] == 6
    said = converted(out / "other", "both", "model.connector.name=average", "--mechanism", "saisa")
    assert table(said)["projector", "fresh"] == 3 * 4
    said = converted(out / "other", "mlp", "model.connector.name=mlp", "--mechanism", "llava", "--to-llava")
    assert "logits differ by" in said

    for words, told in (
        (["--mechanism", "llava", "--to-llava"], "model.connector.name: found pixel_shuffle, LLaVA's format holds mlp only"),
        (["--mechanism", "flamingo"], "model.connector.name: found pixel_shuffle, but flamingo's resampler reads"),
        (["model.connector.options.side=3"], "options.side: the connector pixel_shuffle has no such option"),
        (["model.connector.name=pixels"], "model.connector.name: found 'pixels'"),
    ):  # fmt: skip
        assert cli.main(["convert", str(out / "other"), "--out", str(out / "no"), *words]) == 2
        assert told in " ".join(capsys.readouterr().err.split())
    assert not (out / "no").exists()


def test_what_it_costs(parts, capsys):
    """`estimate` leaves out what refuses the connector, and counts fewer tokens; `explain` says what it is."""
    line = [
        f"model.decoder={parts / 'decoder'}",
        f"model.vision.path={parts / 'encoder'}",
        "model.vision.policy=resize",
    ]
    line += ["model.vision.select_layer=-1", "data.train=none", "optim.lr=1", "optim.max_steps=1"]
    file = parts / "costs.yaml"
    file.write_text("{}")
    found, names = [], []
    for words in (["model.connector.name=mlp"], CONNECTED["pixel_shuffle"]):
        config = load_config([], [*line, *words])
        names.append(set(mechanisms_of(config, 3, False, parts_of_config(config.model))[0]))
        assert cli.main(["estimate", str(file), *line, *words, "--only", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    mlp, fewer = found
    assert (mlp["visual"], fewer["visual"]) == (16, 4) and names[0] - names[1] == {"flamingo"}
    assert fewer["connector"] == {"name": "pixel_shuffle", "options": {"factor": 2}}
    less, more = (one["mechanisms"]["ee_mllm"]["flops"]["prefill"] for one in (fewer, mlp))
    assert less < more
    assert cli.main(["estimate", str(file), *line, *CONNECTED["pixel_shuffle"], "--only"]) == 0
    assert "connector pixel_shuffle" in capsys.readouterr().out
    assert (
        cli.main(["estimate", str(file), *line, *CONNECTED["linear"], "--only", "model.mechanism.preset=flamingo"]) == 2
    )
    assert "model.connector.name: found linear, but flamingo's resampler" in " ".join(capsys.readouterr().err.split())
    assert (
        cli.main(["explain", "--shape", "vicuna-7b", "model.connector.name=average", "model.mechanism.preset=saisa"])
        == 0
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "connector average factor=2: a document of 144 visual" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.connector.name=averge"], "model.connector.name: found 'averge', expected attention or average or"),
        (["model.connector.name=average", "model.connector.options.factr=2"], "options.factr: the connector average has no such option"),
        (["model.connector.options.factor=2"], "the connector mlp has no such option; use connector=pixel_shuffle or linear_shuffle or merger or average"),
        (["model.connector.name=average", "model.connector.options.factor=0"], "options.factor: found 0, expected 1 to 16"),
    ],
)  # fmt: skip
def test_mistakes_in_a_configuration(words, told, parts, shapes, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(tiny.config(parts, shapes, tmp_path / "run")))
    assert cli.main(["fit", str(file), *words]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
