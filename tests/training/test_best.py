"""The best checkpoint is kept, a run ends when validations get no better, and both go on as they were."""

import pytest
import tiny
from lib.runs import Killed, assert_same, fit_until, metrics, validation_losses

from lit_eemllm.training import guard
from lit_eemllm.training.best import Best
from lit_eemllm.training.checkpoint import read_checkpoint
from lit_eemllm.training.fit import fit
from lit_eemllm.training.module import LitEEMLLM

FOUND = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.0, 10: 2.25, 12: 1.0, 14: 1.5, 16: 1.75}
OPTIONS = ("optim.max_steps=16", "optim.val_every=2", "optim.val_batches=1", "optim.save_every=3", "optim.keep=1")
SECTIONS = ("state_dict", "optimizer_states", "rng", "lr_schedulers", "ShardDataModule", "callbacks")


@pytest.fixture
def config(monkeypatch, parts, shapes, tmp_path):
    """A run by its name and its patience, whose validations find `FOUND`."""

    def found(module):
        module.val_loss.reset()
        module.log("val_loss", FOUND[module.global_step], logger=False)

    monkeypatch.setattr(LitEEMLLM, "on_validation_epoch_end", found)
    monkeypatch.setattr(
        "lit_eemllm.data.loader.SNAPSHOT_SECONDS", 1e9
    )  # else a slow machine writes the same place otherwise
    return lambda name, patience, *more: tiny.config(
        parts, shapes, tmp_path / name, *OPTIONS, f"optim.patience={patience}", *more
    )


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_same_end(run, other, step):
    ends = [read_checkpoint(one / "checkpoints" / f"step-{step}.ckpt") for one in (run, other)]
    for section in SECTIONS:
        assert_same(ends[0][section], ends[1][section], section)


def test_a_run_ends_early_and_a_larger_patience_goes_on(config, tmp_path, capsys):
    """An equal loss is no better. Repeated, the command does nothing; the best stays where newer ones are deleted."""
    run = tmp_path / "run"
    fit(config("run", 2))
    assert validation_losses(run) == {step: FOUND[step] for step in (2, 4, 6, 8)} and max(metrics(run)) == 8
    assert names(run) == ["best.ckpt", "step-4.ckpt", "step-8.ckpt"]
    assert read_checkpoint(run / "checkpoints" / "best.ckpt")["global_step"] == 4
    text = "stopped early: 2 validations since step 4 were no better, and optim.patience is 2; a larger one continues the run"
    assert text in capsys.readouterr().out
    fit(config("run", 2))
    assert text in capsys.readouterr().out and max(metrics(run)) == 8 and len(validation_losses(run)) == 4
    fit(config("run", 4))
    assert validation_losses(run) == FOUND and names(run) == ["best.ckpt", "step-12.ckpt", "step-16.ckpt"]
    assert read_checkpoint(run / "checkpoints" / "best.ckpt")["global_step"] == 12
    fit(config("whole", 4))
    assert_same_end(run, tmp_path / "whole", 16)


def test_the_best_before_is_there_until_the_new_one_is(config, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(guard, "settle", lambda trainer: seen.append(names(tmp_path / "run")))
    fit(config("run", 9, "optim.max_steps=4", "optim.save_every=9"))
    assert "step-2.ckpt" in seen[1] and names(tmp_path / "run") == ["best.ckpt", "step-4.ckpt"]


def test_where_there_are_no_links_a_run_goes_on(config, tmp_path, monkeypatch, capsys):
    link = tiny.Path.symlink_to

    def refuse(self, target):
        if "best.ckpt" in self.name:
            raise PermissionError(1, "Operation not permitted")
        link(self, target)

    monkeypatch.setattr(tiny.Path, "symlink_to", refuse)
    fit(config("run", 9, "optim.max_steps=2"))
    assert names(tmp_path / "run") == ["step-2.ckpt"]
    assert "best.ckpt could not be made: Operation not permitted; the best checkpoint is " in capsys.readouterr().out


def test_scores_of_other_questions_are_not_compared(parts, shapes, tmp_path):
    few, many = (Best(tiny.config(parts, shapes, tmp_path, f"eval.during_training={number}")) for number in (16, 500))
    few.note(0.9, 10)
    many.restore(few.state())
    assert many.note(0.5, 20) and many.step == 20
    few.restore(few.state())
    assert not few.note(0.5, 20) and few.waited == 1


@pytest.mark.parametrize("step", [7, 9])
def test_a_killed_run_remembers_what_was_best(config, tmp_path, step):
    """From step 6, which was saved before its validation; and from step 9, after it has waited twice."""
    run = tmp_path / "run"
    with pytest.raises(Killed):
        fit_until(step, config("run", 3))
    fit(config("run", 3))
    fit(config("whole", 3))
    assert max(metrics(run)) == 10
    assert_same_end(run, tmp_path / "whole", 10)
    assert names(run) == names(tmp_path / "whole")


def test_the_best_can_be_gone_on_from(config, tmp_path):
    """It was saved within the validation."""
    fit(config("whole", 9, "optim.max_steps=6", "optim.keep=9"))
    best = tmp_path / "whole" / "checkpoints" / "best.ckpt"
    fit(config("again", 9, "optim.max_steps=6", f"resume={best}"))
    assert sorted(metrics(tmp_path / "again")) == [5, 6] and validation_losses(tmp_path / "again") == {6: FOUND[6]}
    assert_same_end(tmp_path / "again", tmp_path / "whole", 6)
    assert best.resolve().name == "step-4.ckpt"
