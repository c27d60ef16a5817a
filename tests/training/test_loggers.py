"""What is logged arrives in every logger, and none that fails stops a run. W&B and MLflow are the real ones."""

import csv
from importlib.util import find_spec

import numpy as np
import pytest
import tiny
from lib.runs import assert_same, metrics
from lightning.pytorch.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_eemllm import cli
from lit_eemllm.config import to_yaml
from lit_eemllm.doctor import origin
from lit_eemllm.errors import ConfigError
from lit_eemllm.training import logs
from lit_eemllm.training.checkpoint import newest_checkpoint, read_checkpoint
from lit_eemllm.training.fit import fit
from lit_eemllm.training.logs import Logs

OPTIONS = ("data.val=null", "optim.max_steps=4")
PICTURE = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
COLUMNS, ROWS = ["layers", "seen"], [["0-2", "all"], ["3", "every 2"]]


def test_the_table_of_the_mechanism_and_the_machine_are_logged(tmp_path, parts, shapes):
    fit(tiny.config(parts, shapes, tmp_path, *OPTIONS, "model.mechanism.rows=[{layers: 1-2, seen: every 2}]"))
    with (tmp_path / "logs" / "version_0" / "mechanism.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["layers"], row["seen"]) for row in rows] == [("0", "all"), ("1-2", "every 2")]
    assert (tmp_path / "logs" / "version_0" / "machine.csv").read_text().splitlines() == [
        "machine",
        f'"{origin(cuda=False)}"',
    ]
    (log,) = tmp_path.glob("logs/version_0/events.*")
    (text,) = EventAccumulator(str(log), {"tensors": 0}).Reload().Tensors("mechanism/text_summary")
    assert text.tensor_proto.string_val[0].decode().splitlines()[:2] == [
        f"| {' | '.join(rows[0])} |",
        f"|{' --- |' * 7}",
    ]


class Failing(Logger):
    """A server that is gone after two steps."""

    name, version, seen = "failing", 0, []

    def log_hyperparams(self, *_):
        self.seen.append("config")

    def log_metrics(self, metrics, step=None):
        if step == 3:
            raise RuntimeError("\x1bno answer\nof the server")
        self.seen.append(step)


def test_a_run_goes_on_without_a_server(tmp_path, parts, shapes, monkeypatch, capsys):
    fit(tiny.config(parts, shapes, tmp_path / "plain", *OPTIONS))
    monkeypatch.setitem(logs.SERVERS, "wandb", lambda *_: Failing())
    monkeypatch.setattr(Failing, "log_table", lambda *_: None, raising=False)
    fit(tiny.config(parts, shapes, tmp_path / "run", *OPTIONS, "logger=[csv, wandb]"))
    assert (
        capsys.readouterr().out.count("warning: wandb has failed, and gets nothing from here on: \\x1bno answer\n") == 1
    )
    assert Failing.seen == ["config", 1, 2] and sorted(metrics(tmp_path / "run")) == [1, 2, 3, 4]
    assert not list((tmp_path / "run" / "logs").rglob("events.*")), "TensorBoard was not asked for"
    ends = [read_checkpoint(newest_checkpoint(tmp_path / name)) for name in ("run", "plain")]
    for section in ("state_dict", "optimizer_states", "rng"):
        assert_same(ends[0][section], ends[1][section], section)


@pytest.mark.parametrize("name", [name for name in logs.SERVERS if find_spec(name) is None])
def test_what_is_not_installed_is_named(tmp_path, name):
    with pytest.raises(
        ConfigError, match=rf"logger: found {name}, which is not installed: pip install 'lit_eemllm\[{name}\]'"
    ):
        Logs(tmp_path, ["csv", name])


def log_all(out, name, look=lambda logger: None):
    """Something of every kind; `look` at the logger before its end."""
    made = Logs(out, ["csv", name])
    made.log_hyperparams({"optim": {"lr": 0.5}, "out": "x" * 999})
    made.log_table("mechanism", COLUMNS, ROWS)
    for step in (10, 20):
        made.log_metrics({"loss": 1 / step, "share_of_tokens/a b": 0.25}, step)
    made.log_picture("samples", PICTURE, 20)
    assert name in made.loggers, "it has not failed"
    look(made.loggers[name])
    made.finalize("success")


@pytest.mark.extras
def test_weights_and_biases(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def look(logger):
        assert (logger.experiment.config["optim"], logger.experiment.project) == ({"lr": 0.5}, logs.PROJECT)
        found = dict(logger.experiment.summary)
        assert (found["loss"], found["trainer/global_step"]) == (0.05, 20)
        assert found["samples"]["count"] == 1 and (found["mechanism"]["nrows"], found["mechanism"]["ncols"]) == (2, 2)

    for run in ("a", "b"):  # one after the other, in one process
        log_all(tmp_path / run, "wandb", look)
        (folder,) = (tmp_path / run / "logs" / "wandb").glob("offline-run-*")
        assert len(list(folder.glob("files/media/images/samples_*.png"))) == 1


@pytest.mark.extras
def test_mlflow(tmp_path):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    for run in ("a", "b"):  # each has its own database
        log_all(tmp_path / run, "mlflow")
        client = MlflowClient(f"sqlite:///{tmp_path / run}/logs/mlflow.db")
        (found,) = client.search_runs([client.get_experiment_by_name(logs.PROJECT).experiment_id])
        assert found.data.params["optim/lr"] == "0.5" and found.info.status == "FINISHED"
        assert [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, "loss")] == [
            (10, 0.1),
            (20, 0.05),
        ]
        kept = tmp_path / run / "logs" / "mlflow"
        assert len(list(kept.rglob("mechanism.json"))) == 1 and len(list(kept.rglob("samples*.png"))) == 1


@pytest.mark.slow
@pytest.mark.extras
def test_a_whole_run_with_all_of_them(tmp_path, parts, shapes, monkeypatch, capsys):
    """By the command; the weights are what they are without."""
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name, more in (("plain", []), ("run", ["logger=[csv, tensorboard, wandb, mlflow]", "optim.samples_every=2"])):
        file = tmp_path / f"{name}.yaml"
        file.write_text(to_yaml(tiny.config(parts, shapes, tmp_path / name, "optim.max_steps=4", *more)))
        assert cli.main(["fit", str(file)]) == 0
    assert "has failed" not in capsys.readouterr().out
    ends = [read_checkpoint(newest_checkpoint(tmp_path / name)) for name in ("run", "plain")]
    for section in ("state_dict", "optimizer_states", "rng"):
        assert_same(ends[0][section], ends[1][section], section)
