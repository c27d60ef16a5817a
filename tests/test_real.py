"""Real images, real weights, and an encoder that enters from a file outside the package, through the command line."""

import csv
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import forgotten_imports

from lit_eemllm import cli
from lit_eemllm.model.vision import _ENCODERS

TOOLS = Path(__file__).parents[1] / "tools"
CONFIG = Path(__file__).parents[1] / "configs" / "real" / "base.yaml"
SETS = {"openstax": 60, "nlvr": 40, "nlvr_boxes": 30, "grocery": 40, "grocery_text": 20}


@pytest.mark.slow
def test_real_sets_blend_and_train_the_projector(shared, tmp_path, capsys):
    """All five sets (one image, several, several turns, text only) into shards, one blend, some steps, its scores."""
    for name, rows in SETS.items():
        arguments = ["shards", "make", "--out", str(tmp_path / name)]
        for split in ("train", "val"):
            source = shared / "data" / name / f"{split}.json"
            if source.is_file():
                part = tmp_path / f"{name}-{split}.json"
                part.write_text(json.dumps(json.loads(source.read_text())[:rows]))
                arguments += ["--rows", f"{split}={part}"]
        images = shared / "data" / name / "images"
        assert cli.main([*arguments, *(["--images", str(images)] if images.is_dir() else [])]) == 0
    recipe = tmp_path / "blend.yaml"
    blend = "".join(f"      - {{path: {name}, weight: {1 + (name == 'openstax')}}}\n" for name in SETS)
    recipe.write_text(f"splits:\n  train:\n    blend:\n{blend}  val:\n    path: openstax\n")

    weights = shared / "weights"
    common = [str(CONFIG), "--import", str(TOOLS / "efficientnet_lite.py"), f"out={tmp_path / 'run'}",
              f"model.decoder={weights / 'stories15m'}", "model.template=vicuna_v1", f"data.train={recipe}",
              f"model.vision.path={weights / 'efficientnet_lite0.safetensors'}", f"data.val={recipe}",
              "data.pack_tokens=640", "optim.max_steps=6", "optim.log_every=1", "optim.val_every=6", "eval.samples=2",
              "eval.max_new_tokens=4", "optim.val_batches=3"]  # fmt: skip
    with forgotten_imports():
        assert cli.main(["fit", *common]) == 0
        rows = list(csv.DictReader((tmp_path / "run" / "logs" / "version_0" / "metrics.csv").open()))
        losses = [float(row["loss"]) for row in rows if row["loss"]]
        assert len(losses) == 6 and losses[-1] < losses[0]
        assert all(float(row["skipped"]) == 0 for row in rows if row["loss"])
    with forgotten_imports():  # another process
        assert cli.main(["validate", *common]) == 0
        results = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())
        assert results["loss_tokens"] > 50 and results["loss"] > 0 and results["skipped"] == {}
        encoder = _ENCODERS["efficientnet_lite0"].from_path(
            str(weights / "efficientnet_lite0.safetensors"), select_layer=-2, policy="pad"
        )
        original = load_file(weights / "efficientnet_lite0.safetensors")
        assert all(tensor.equal(original[name]) for name, tensor in encoder.state_dict().items())
    assert encoder.transform.num_tokens(500, 300) == 49
    capsys.readouterr()
