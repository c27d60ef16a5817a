"""Run directories and sweeps as a report finds them, without a training."""

import csv
import json

from lit_eemllm.config import load_config, to_yaml
from lit_eemllm.report.runs import compare
from lit_eemllm.report.tables import tables

TYPES = {"colour": {"questions": 10, "metric": "exact_match", "score": 0.5, "control": 0.2, "constant": 0.3}}
RESULTS = {"parameters": 2_345_678, "loss": 1.25, "loss_shuffled_images": 2.5, "types": TYPES, "average": 0.5, "prefill_flops": 4.56e6}  # fmt: skip

ONE, OTHER = {"colour": [1, 1, 0, 1], "shape": [1, 0]}, {"colour": [0, 1, 0, 0], "shape": [0, 1]}
"""Answers of two runs to the same questions."""


def write_run(path, *overrides, results=RESULTS, metrics=(), answers=None):
    """A run directory.

    Args:
        metrics: one list of rows (step, loss, seconds a step, GiB) per version.
        answers: question type -> scores of its answers; results then follow from them.
    """
    config = load_config([], [
        "model.decoder=d", "model.vision.path=e", "data.train=t", "optim.lr=1e-3", "optim.max_steps=4", f"out={path}", *overrides
    ])  # fmt: skip
    (path / "eval").mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    if answers is not None:
        types = {
            kind: {"questions": len(scores), "metric": "exact_match", "score": sum(scores) / len(scores)}
            for kind, scores in answers.items()
        }
        results = {**results, "types": types, "average": sum(t["score"] for t in types.values()) / len(types)}
        lines = [
            {"set": "val", "key": str(i), "type": kind, "prompt": "?", "answer": "x", "truth": "y", "score": score}
            for kind, scores in answers.items()
            for i, score in enumerate(scores)
        ]
        (path / "eval" / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "eval" / "results.json").write_text(json.dumps(results))
    for version, rows in enumerate(metrics):
        folder = path / "logs" / f"version_{version}"
        folder.mkdir(parents=True)
        with (folder / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("step", "loss", "step_seconds", "memory_gib", "val_loss"), *rows])
    return path


def write_sweep(folder, rows, **more):
    """``sweep.json`` over runs below the folder."""
    plan = {"title": "A sweep", "command": "lit-eemllm sweep s.yaml", "baseline": None, "shape": None, "failed": []}
    named = [{"name": name, "runs": [str(run.relative_to(folder)) for run in runs]} for name, runs in rows.items()]
    (folder / "sweep.json").write_text(json.dumps({**plan, "rows": named, **more}))
    return folder


def of_score(value, **more):
    """Results of one question type."""
    return {**RESULTS, "types": {"colour": {**TYPES["colour"], "score": value}}, "average": value, **more}


def cells(paths, baseline=None):
    """Name of a quantity -> its cells."""
    (lines,) = tables(compare(paths, baseline))
    return {line[0]: list(line[1:]) for line in lines}


def labels(*paths):
    return [row.label for row in compare(paths).rows]


def replace_in(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
