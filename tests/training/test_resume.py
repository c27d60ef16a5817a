"""A run that goes on is the run that it was: in its modules, its state and its branch; what is not whole is refused by name."""

import math
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from lib.runs import Killed, assert_same, fit_until, killed, metrics, validation_losses
from torch import nn

from lit_eemllm.data.module import ShardDataModule
from lit_eemllm.errors import CheckpointError
from lit_eemllm.evaluation.run import load
from lit_eemllm.model import vision
from lit_eemllm.training.checkpoint import newest_checkpoint, read_checkpoint
from lit_eemllm.training.fit import fit
from lit_eemllm.training.module import LitEEMLLM


@pytest.fixture(scope="module")
def run(tmp_path_factory, parts, shapes):
    """Four steps, a checkpoint after each; not to be changed."""
    out = tmp_path_factory.mktemp("run")
    fit(tiny.config(parts, shapes, out, "optim.max_steps=4", "optim.save_every=1", "optim.keep=9", "data.val=null"))
    return out


def copy_of(run, out, *numbers):
    """A run directory with some of another's checkpoints."""
    (out / "checkpoints").mkdir(parents=True)
    for number in numbers:
        shutil.copy(run / "checkpoints" / f"step-{number}.ckpt", out / "checkpoints")
    return out


def names(run):
    return sorted(path.relative_to(run / "checkpoints").as_posix() for path in (run / "checkpoints").rglob("*.ckpt"))


# --- modules


class Normed(tiny.Patches):
    """An encoder with state of its own, a batch norm's statistics, which draws for its dropout, and begins in some mode."""

    begins = False  # as from_pretrained leaves a model

    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.dropout = nn.BatchNorm2d(16), nn.Linear(16, 16), nn.Dropout(0.5)

    @classmethod
    def from_path(cls, path, **options):
        return cls().train(cls.begins)

    def forward(self, pixels):
        return self.dropout(self.linear(self.norm(self.conv(pixels)).flatten(2).transpose(1, 2)))


@pytest.mark.parametrize("tuning", ["frozen", "full", "lora"])
def test_modules_are_in_the_modes_that_they_were_in(tmp_path, parts, shapes, monkeypatch, tuning):
    """Batch norms of a frozen encoder stay still, of a trained one they go on from where they were; dropout stays on."""
    monkeypatch.setitem(vision._ENCODERS, "normed", Normed)
    monkeypatch.setattr(Normed, "begins", tuning == "frozen")
    options = ["model.vision.encoder=normed", f"optim.tuning.vision={tuning}", "optim.lora.r=2", "data.val=null"]
    options += ["optim.max_steps=4", "optim.save_every=2"]
    fit(tiny.config(parts, shapes, tmp_path / "whole", *options))
    again = copy_of(tmp_path / "whole", tmp_path / "again", 2)
    config = tiny.config(parts, shapes, again, *options)
    fit(config)
    two, four, true = (
        read_checkpoint(run / "checkpoints" / f"step-{step}.ckpt")
        for run, step in ((again, 2), (again, 4), (tmp_path / "whole", 4))
    )
    for section in ("state_dict", "optimizer_states", "rng"):
        assert_same(four[section], true[section], section)
    mean = "model.vision.norm.running_mean"
    assert (mean in two["state_dict"]) == (tuning != "frozen")
    if tuning != "frozen":
        assert not two["state_dict"][mean].equal(four["state_dict"][mean])
        assert load(config, None)[0].vision.norm.running_mean.equal(four["state_dict"][mean])


@pytest.mark.parametrize("option", ["data.pack_by=flops", "optim.states=8bit"])
def test_an_option_goes_on(tmp_path, parts, shapes, run, option):
    """Bit for bit; and it does something."""
    options = ["data.val=null", "optim.max_steps=4", "optim.save_every=2", option]
    fit(tiny.config(parts, shapes, tmp_path / "whole", *options))
    again = copy_of(tmp_path / "whole", tmp_path / "again", 2)
    fit(tiny.config(parts, shapes, again, *options))
    four, true, without = (
        read_checkpoint(out / "checkpoints" / "step-4.ckpt") for out in (again, tmp_path / "whole", run)
    )
    for section in ("state_dict", "optimizer_states", "rng", "ShardDataModule"):
        assert_same(four[section], true[section], section)
    assert any(not x.equal(without["state_dict"][name]) for name, x in true["state_dict"].items())


# --- branches


def test_what_a_run_has_gone_back_from_is_set_aside(tmp_path, parts, shapes, run, capsys):
    """The first continuation is given up; `auto` goes on with the second, and so does whoever asks for the newest."""
    out = copy_of(run, tmp_path / "run", 1, 2, 4)
    back = f"resume={out}/checkpoints/step-2.ckpt"
    options = ["data.val=null", "optim.save_every=1", "optim.keep=9"]
    fit(tiny.config(parts, shapes, out, *options, back, "optim.max_steps=3"))
    assert names(out) == ["abandoned-1/step-4.ckpt", "step-1.ckpt", "step-2.ckpt", "step-3.ckpt"]
    assert (
        f"went back to step 2: its later checkpoints were moved to {out}/checkpoints/abandoned-1"
        in capsys.readouterr().out
    )
    fit(tiny.config(parts, shapes, out, *options, "optim.max_steps=4"))
    assert f"continuing from {out}/checkpoints/step-3.ckpt" in capsys.readouterr().out
    # after a checkpoint of another run, all of its own are of another branch
    fit(tiny.config(parts, shapes, out, *options, f"resume={run}/checkpoints/step-3.ckpt", "optim.max_steps=4"))
    assert names(out)[-1] == "step-4.ckpt" and names(out)[1:5] == [f"abandoned-2/step-{i}.ckpt" for i in (1, 2, 3, 4)]


def test_a_checkpoint_is_let_go_when_all_is_restored(tmp_path, parts, shapes, run):
    """While it is mapped, deleting it frees nothing."""
    out, mapped = copy_of(run, tmp_path, 2), []
    right = LitEEMLLM.training_step

    def looked(module, *arguments):
        mapped.extend(line for line in Path("/proc/self/maps").read_text().splitlines() if str(out) in line)
        return right(module, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LitEEMLLM, "training_step", looked)
        fit(tiny.config(parts, shapes, out, "optim.max_steps=3", "data.val=null"))
    assert not mapped
    held = read_checkpoint(out / "checkpoints" / "step-3.ckpt")
    assert held and str(out) in Path("/proc/self/maps").read_text(), "which would have been seen"


# --- how long


def test_an_extended_run_goes_on_with_the_longer_schedule_and_no_second_warm_up(tmp_path, parts, shapes, run, capsys):
    """Its four steps had a warm-up of one; of forty steps eight would be one."""
    out = copy_of(run, tmp_path, 4)
    options = ["data.val=null", "optim.max_steps=40", "optim.save_every=1"]
    for last in (5, 6):  # killed after a step, and gone on again: the warm-up is still that of the beginning
        with pytest.raises(Killed):
            fit_until(last, tiny.config(parts, shapes, out, *options))
    assert "optim.max_steps was 4 and is 40: from here on the learning rate follows" in capsys.readouterr().out
    rates = {step: float(row["lr"]) for step, row in metrics(out).items()}
    cosine = {step: 3e-3 * 0.5 * (1 + math.cos(math.pi * (step - 1 - 1) / (40 - 1))) for step in (5, 6)}
    assert rates == pytest.approx(cosine), "a step takes the rate of those before it; here after a warm-up of one step"


def test_fewer_steps_than_are_done_are_refused(tmp_path, parts, shapes, run):
    config = tiny.config(parts, shapes, copy_of(run, tmp_path, 2, 4), "optim.max_steps=3", "data.val=null")
    with pytest.raises(CheckpointError, match=r"optim.max_steps=3, but the run has 4 steps already"):
        fit(config)


def test_recomputed_activations_change_nothing_under_way(tmp_path, parts, shapes, run):
    out = copy_of(run, tmp_path, 2)
    again = ["optim.activation_checkpointing=true", "optim.activation_offload=true"]
    fit(tiny.config(parts, shapes, out, "optim.max_steps=4", "data.val=null", *again))
    ends = [read_checkpoint(newest_checkpoint(one)) for one in (out, run)]
    for section in ("state_dict", "optimizer_states", "rng"):
        assert_same(ends[0][section], ends[1][section], section)


# --- validations


@pytest.mark.parametrize("at", [2, 5], ids=["under way", "after the last step"])
def test_a_validation_that_a_kill_has_prevented_is_made_up_for(tmp_path, parts, shapes, monkeypatch, at):
    """Killed between the save and the validation of the same step. Each step has the validation loss of an unbroken run."""
    options = ["optim.max_steps=5", "optim.save_every=1", "optim.keep=9", "optim.val_every=2"]
    whole, cut = (tiny.config(parts, shapes, tmp_path / name, *options) for name in ("whole", "cut"))
    fit(whole)
    right = LitEEMLLM.validation_step

    def killed(module, *arguments):
        if module.global_step == at:
            raise Killed
        return right(module, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LitEEMLLM, "validation_step", killed)
        with pytest.raises(Killed):
            fit(cut)
    assert newest_checkpoint(tmp_path / "cut").name == f"step-{at}.ckpt" and at not in validation_losses(
        tmp_path / "cut"
    )
    fit(cut)
    true = validation_losses(tmp_path / "whole")
    assert list(true) == [2, 4, 5], "after the last step too"
    assert validation_losses(tmp_path / "cut") == true
    ends = [read_checkpoint(newest_checkpoint(tmp_path / name)) for name in ("whole", "cut")]
    assert_same(ends[0]["state_dict"], ends[1]["state_dict"])
    fit(cut)  # nothing is left to do, and nothing is done twice
    assert validation_losses(tmp_path / "cut") == true


def test_a_run_that_went_on_without_validating_takes_no_step_too_many(tmp_path, parts, shapes):
    """Killed in the validation after its last step: where it is continued without one, all is done."""
    options = ["optim.max_steps=2", "optim.save_every=1", "optim.val_every=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LitEEMLLM, "validation_step", killed)
        with pytest.raises(Killed):
            fit(tiny.config(parts, shapes, tmp_path, *options))
    fit(tiny.config(parts, shapes, tmp_path, *options, "data.val=null"))
    assert newest_checkpoint(tmp_path).name == "step-2.ckpt" and list(metrics(tmp_path)) == [1, 2]
    fit(tiny.config(parts, shapes, tmp_path, *options))
    assert list(validation_losses(tmp_path)) == [2], "still to be made up for"


def test_a_run_shorter_than_its_intervals_is_validated_once_and_logged_ten_times(tmp_path, parts, shapes):
    fit(tiny.config(parts, shapes, tmp_path, "optim.val_every=500", "optim.log_every=100", "optim.max_steps=20"))
    assert list(validation_losses(tmp_path)) == [20] and sorted(metrics(tmp_path)) == list(range(2, 21, 2))


# --- checkpoints that are not whole


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "zeros":  # a page that never reached the disk, in the middle of the largest tensor
        weights = read_checkpoint(path)["state_dict"]
        largest = max(weights.values(), key=torch.Tensor.numel).contiguous().numpy().tobytes()
        begin = content.index(largest) + len(largest) // 2
        content[begin : begin + 512] = bytes(512)
    path.write_bytes(b"" if how == "empty" else content[: len(content) // 2] if how == "cut" else content)


@pytest.mark.parametrize("how", ["zeros", "cut", "empty"])
def test_a_damaged_newest_checkpoint_names_the_one_before_it(tmp_path, parts, shapes, run, how):
    out = copy_of(run, tmp_path, 2, 3, 4)
    damaged(out / "checkpoints" / "step-4.ckpt", how)
    (out / "checkpoints" / "step-3.ckpt").write_bytes(b"nor this")
    config = tiny.config(parts, shapes, out, "optim.max_steps=4", "data.val=null")
    for use in (lambda: fit(config), lambda: load(config, None)):
        with pytest.raises(CheckpointError) as error:
            use()
        assert f"{out}/checkpoints/step-4.ckpt: not readable as a checkpoint: " in str(error.value)
        assert f"before it that is whole is {out}/checkpoints/step-2.ckpt: to go on from it" in str(error.value)
    assert ("have changed since they were written" in str(error.value)) == (how == "zeros")
    fit(tiny.config(parts, shapes, out, "optim.max_steps=4", "data.val=null", f"resume={out}/checkpoints/step-2.ckpt"))
    ends = [read_checkpoint(newest_checkpoint(one)) for one in (out, run)]
    assert_same(ends[0]["state_dict"], ends[1]["state_dict"])
    assert names(out) == ["abandoned-1/step-3.ckpt", "abandoned-1/step-4.ckpt", "step-2.ckpt", "step-4.ckpt"]


def test_a_later_checkpoint_is_not_named_as_one_before(tmp_path, run):
    out = copy_of(run, tmp_path, 2, 3)
    damaged(out / "checkpoints" / "step-2.ckpt", "cut")
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(out / "checkpoints" / "step-2.ckpt")
    assert "step-3" not in str(error.value)


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "train_dataloader"])
def test_what_fails_beside_restoring_is_not_blamed_on_the_checkpoint(tmp_path, parts, shapes, run, hook):
    """An encoder of one's own, the trial of attention backends, a loader: their errors are told as they are."""

    def broken(*_, **__):
        raise TypeError("it is mine")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardDataModule if hook == "train_dataloader" else LitEEMLLM, hook, broken)
        with pytest.raises(TypeError, match=r"^it is mine$"):
            fit(tiny.config(parts, shapes, copy_of(run, tmp_path, 2), "optim.max_steps=3", "data.val=null"))


@pytest.mark.parametrize(
    "section", ["ShardDataModule", "loops", "optimizer_states", "lr_schedulers", "rng", "global_step"]
)
def test_a_checkpoint_that_lacks_a_section_is_refused(tmp_path, parts, shapes, run, section):
    """Lightning would begin that part anew without a word."""
    checkpoint = torch.load(run / "checkpoints" / "step-2.ckpt", weights_only=True)
    del checkpoint[section]
    file = tmp_path / "part.ckpt"
    torch.save(checkpoint, file)
    with pytest.raises(CheckpointError, match=f"holds no {section}"):
        fit(tiny.config(parts, shapes, tmp_path / "run", "optim.max_steps=4", "data.val=null", f"resume={file}"))
    assert not (tmp_path / "run" / "config.yaml").exists()


MOMENTS = {
    "another shape": lambda state: state.update(exp_avg=state["exp_avg"][:1]),
    "another type": lambda state: state.update(exp_avg_sq=state["exp_avg_sq"].to(torch.int8)),
    "no tensor": lambda state: state.update(exp_avg=7),
    "one is missing": lambda state: state.pop("exp_avg_sq"),
    "no count": lambda state: state.pop("step"),
    "a count that is no number": lambda state: state.update(step=torch.tensor(torch.nan)),
    "more of them": lambda state: state.update(odd=state["exp_avg"]),
}


@pytest.mark.parametrize("how", MOMENTS)
def test_moments_that_are_not_those_of_a_weight_are_refused_by_its_name(tmp_path, parts, shapes, run, how):
    """Else the first step would fail, or take what AdamW makes of them."""
    checkpoint = torch.load(run / "checkpoints" / "step-2.ckpt", weights_only=True)
    (saved,) = checkpoint["optimizer_states"]
    name = next(
        name for name in checkpoint["state_dict"] if name.startswith("model.projector.")
    )  # the first that is trained
    MOMENTS[how](saved["state"][0])
    file = tmp_path / "other.ckpt"
    torch.save(checkpoint, file)
    with pytest.raises(CheckpointError, match=rf"other\.ckpt: the optimiser's moments of {name} do not fit it: found"):
        fit(tiny.config(parts, shapes, tmp_path / "run", "optim.max_steps=4", "data.val=null", f"resume={file}"))


def test_moments_in_8_bits_that_are_not_those_of_a_weight_are_refused(tmp_path, parts, shapes, run):
    """Likewise. And moments in float32 do not become them."""
    pytest.importorskip("bitsandbytes")
    options = [
        "optim.max_steps=2",
        "optim.save_every=1",
        "data.val=null",
        "optim.tuning.llm=frozen",
        "optim.states=8bit",
    ]
    fit(tiny.config(parts, shapes, tmp_path / "right", *options))
    checkpoint = torch.load(tmp_path / "right" / "checkpoints" / "step-1.ckpt", weights_only=True)
    (saved,) = checkpoint["optimizer_states"]
    (section,) = (x for x in saved["state"][0].values() if isinstance(x, dict))
    section["state1"] = section["state1"][:1]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(
        CheckpointError, match=r"other\.ckpt: the optimiser's moments of model\.projector\.\S+ do not fit it"
    ):
        fit(tiny.config(parts, shapes, tmp_path / "run", *options, f"resume={tmp_path}/other.ckpt"))
    config = tiny.config(parts, shapes, copy_of(run, tmp_path / "again", 2), "optim.max_steps=4", "optim.states=8bit")
    with pytest.raises(CheckpointError, match=r"optim\.states was float32 and is 8bit"):
        fit(config)


def test_moments_of_other_weights_are_refused(tmp_path, parts, shapes, run):
    checkpoint = torch.load(run / "checkpoints" / "step-2.ckpt", weights_only=True)
    (saved,) = checkpoint["optimizer_states"]
    file = tmp_path / "other.ckpt"
    count = len(saved["state"])
    for change in (lambda: saved["state"].update({count: saved["state"][0]}), lambda: saved["param_groups"].pop()):
        change()
        torch.save(checkpoint, file)
        with pytest.raises(CheckpointError, match=rf"other\.ckpt: its optimiser .* this configuration trains {count}"):
            fit(tiny.config(parts, shapes, tmp_path / "run", "optim.max_steps=4", "data.val=null", f"resume={file}"))


def test_steps_that_are_no_number_are_refused(tmp_path, parts, shapes, run):
    """Those that the run was to have when it began, by which the first step sets its rate."""
    checkpoint = torch.load(run / "checkpoints" / "step-2.ckpt", weights_only=True)
    checkpoint["lit_eemllm"]["begun_with"] = {"a": 1}
    file = tmp_path / "other.ckpt"
    torch.save(checkpoint, file)
    with pytest.raises(CheckpointError, match=r"other\.ckpt: .*begun_with: found .*, expected a number of steps"):
        fit(tiny.config(parts, shapes, tmp_path / "run", "optim.max_steps=4", "data.val=null", f"resume={file}"))
