"""Faults of a training: signals, NaN, two at once, workers that die, full disks. Nothing lost, nothing silent."""

import contextlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from lib.processes import Started, network, run_code
from lib.runs import assert_same, at_pack, metrics, steps, validation_losses

from lit_eemllm import cli
from lit_eemllm.config import to_yaml
from lit_eemllm.console import unfinished
from lit_eemllm.errors import CheckpointError, UserError, WriteError
from lit_eemllm.training import step as optimiser_step
from lit_eemllm.training.checkpoint import newest_checkpoint, read_checkpoint
from lit_eemllm.training.fit import fit
from lit_eemllm.training.guard import Stopped
from lit_eemllm.training.module import LitEEMLLM

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("data.workers=2", "trainer.accumulate_grad_batches=2", "optim.max_steps=10", "data.val=null")
TWO = ("trainer.devices=2", "trainer.strategy=ddp", "data.workers=1", "optim.max_steps=2000", "data.val=null")
SECTIONS = ("state_dict", "optimizer_states", "lr_schedulers", "rng", "global_step")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, parts, shapes):
    """Ten steps of two packs, a checkpoint after each."""
    out = tmp_path_factory.mktemp("unbroken")
    fit(tiny.config(parts, shapes, out, *OPTIONS, "optim.save_every=1", "optim.keep=10"))
    return out


def assert_ends_as(unbroken, run):
    a, b = (read_checkpoint(r / "checkpoints" / "step-10.ckpt") for r in (run, unbroken))
    for section in SECTIONS:
        assert_same(a[section], b[section], section)
    rows, true = metrics(run), metrics(unbroken)
    for step in range(1, 11):
        assert all(rows[step][name] == true[step][name] for name in ("loss", "lr", "grad_norm", "keys_crc")), step


# --- signals


@pytest.mark.parametrize(
    ("number", "pack"), [(signal.SIGTERM, 6), (signal.SIGINT, 7)], ids=["first pack of a step", "last pack of a step"]
)
def test_a_signal_ends_the_step_saves_and_the_run_goes_on_bit_equal(
    tmp_path, parts, shapes, unbroken, monkeypatch, capsys, number, pack
):
    def ask(module, batch, loss):
        os.kill(os.getpid(), number)
        return loss

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    config = tiny.config(parts, shapes, tmp_path, *OPTIONS)
    with monkeypatch.context() as patch:
        seen = at_pack(patch, pack, ask)
        with pytest.raises(Stopped) as stopped:
            fit(config)
    assert stopped.value.code == 128 + number and len(seen) == 8, "both packs of step 4, and no other"
    assert steps(tmp_path) == [4], "save_every is 10"
    last = [line for line in capsys.readouterr().out.splitlines() if line][-1]
    assert last == f"stopped by {number.name} after step 4, saved as {tmp_path}/checkpoints/step-4.ckpt. " + (
        "The same command continues it."
    )
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    fit(config)
    assert_ends_as(unbroken, tmp_path)


def start(tmp_path, config, before="", **options):
    """`lit-eemllm fit` in a process of its own, and code that runs in it before."""
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    code = f"{before}\nimport sys; from lit_eemllm.cli import main; sys.exit(main(['fit', {str(file)!r}]))"
    return Started(run_code, code, **options)


@contextlib.contextmanager
def two_ranks(tmp_path, config, before=""):
    """`start`, as both of two ranks. Gloo on loopback."""
    shared = network()
    ranks = [start(tmp_path, config, before, **shared, LOCAL_RANK=rank) for rank in "01"]
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()


def after_step(process, step):
    for line in process.stdout:
        if line.startswith(f"step {step:>6}"):
            return
    raise AssertionError(process.said())


@pytest.mark.slow
def test_exit_status_when_the_whole_group_is_signalled(tmp_path, parts, shapes, unbroken):
    """As a terminal does at Ctrl-C and a scheduler at pre-emption: the loader processes get it too. They must serve on."""
    config = tiny.config(parts, shapes, tmp_path / "run", *OPTIONS, "optim.max_steps=2000")
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(tmp_path, config, session=True)
        after_step(process, 3 if number == signal.SIGINT else 30)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number, err
        assert f"stopped by {number.name} after step" in out and "Traceback" not in err and "worker" not in err
        assert f"{number.name}: the run stops after this optimiser step" in err


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tmp_path, parts, shapes):
    config = tiny.config(parts, shapes, tmp_path / "run", *OPTIONS, "optim.max_steps=2000")
    slow = "import time, signal; from lit_eemllm.training.module import LitEEMLLM as L; right = L._loss\n"
    slow += "L._loss = lambda s, b: (time.sleep(5 if s.global_step == 3 else 0), right(s, b))[1]"
    process = start(tmp_path, config, slow)
    after_step(process, 3)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None, "the first one waits for the step"
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM and time.monotonic() - begin < 3
    assert not list((tmp_path / "run").rglob("*.ckpt"))


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step_though_one_was_asked(tmp_path, parts, shapes):
    """Rank 1 is asked; rank 0 speaks for both, in its exit status and in words."""
    config = tiny.config(parts, shapes, tmp_path / "run", *TWO)
    with two_ranks(tmp_path, config) as ranks:
        after_step(ranks[0], 5)
        ranks[1].send_signal(signal.SIGTERM)
        (out, err), _ = (process.communicate(timeout=100) for process in ranks)
    assert [process.returncode for process in ranks] == [143, 0], err
    (step,) = steps(tmp_path / "run")
    assert step > 5 and f"stopped by SIGTERM after step {step}, saved as" in out
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{step}.ckpt")["global_step"] == step


def test_ctrl_c_before_anybody_listens_is_an_interruption(tmp_path, parts, shapes, monkeypatch, capsys):
    """Lightning would exit with status 1, without a word."""

    def interrupt(module):
        raise KeyboardInterrupt

    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(tiny.config(parts, shapes, tmp_path, *OPTIONS)))
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(LitEEMLLM, "configure_model", interrupt)
    assert cli.main(["fit", str(file)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted" and signal.getsignal(signal.SIGINT) == handler


@pytest.mark.slow
def test_a_rank_that_is_killed_is_told_by_the_others(tmp_path, parts, shapes):
    with two_ranks(tmp_path, tiny.config(parts, shapes, tmp_path / "run", *TWO)) as ranks:
        after_step(ranks[0], 5)
        ranks[0].kill()
        _, error = ranks[1].communicate(timeout=100)
    assert ranks[1].returncode == 2 and "Traceback" not in error, error
    assert "error: another rank has ended or cannot be reached, for which rank 1 waited: " in error


@pytest.mark.parametrize("saved", [10, 4], ids=["not saved yet", "saved before it"])
def test_a_validation_is_broken_off_and_begins_anew(tmp_path, parts, shapes, unbroken, monkeypatch, capsys, saved):
    options = ("optim.val_every=4", "optim.val_batches=5", f"optim.save_every={saved}", f"data.val={shapes}")
    fit(tiny.config(parts, shapes, tmp_path / "whole", *OPTIONS, *options))
    run, seen, right = tmp_path / "run", [], LitEEMLLM.validation_step

    def ask(self, batch, batch_idx):
        seen.append(batch_idx)
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        right(self, batch, batch_idx)

    config = tiny.config(parts, shapes, run, *OPTIONS, *options)
    with monkeypatch.context() as patch:
        patch.setattr(LitEEMLLM, "validation_step", ask)
        with pytest.raises(Stopped):
            fit(config)
    assert seen == [0, 1] and steps(run) == [4] and not validation_losses(run)
    assert "\nstopped by SIGTERM in the validation after step 4, saved as" in capsys.readouterr().out
    fit(config)
    assert_ends_as(unbroken, run)
    assert validation_losses(run) == validation_losses(tmp_path / "whole") and list(validation_losses(run)) == [
        4,
        8,
        10,
    ]


# --- NaN


def test_a_loss_that_is_nan_never_reaches_the_weights(tmp_path, parts, shapes, unbroken, monkeypatch):
    seen = at_pack(monkeypatch, 7, lambda module, batch, loss: loss * math.nan)
    with pytest.raises(
        UserError, match=r"^step 4: the loss is nan in 1 of 2 packs; gradients .*projector \(4 tensors"
    ) as error:
        fit(tiny.config(parts, shapes, tmp_path, *OPTIONS, "optim.save_every=3"))
    assert all(key in str(error.value) for key in seen[7][:20])
    assert not set(seen[6]) & {key for key in seen[6] if key in str(error.value)}, "only those of the bad pack"
    told = json.loads((tmp_path / "nan" / "step-4.json").read_text())
    assert [pack["keys"] for pack in told["packs"]] == seen[6:] and told["step"] == 4 and math.isnan(told["loss"])
    assert math.isfinite(told["packs"][0]["loss"]) and math.isnan(told["packs"][1]["loss"])
    assert steps(tmp_path) == [3], "nothing that `resume` would find is newer"
    good, true = (
        read_checkpoint(tmp_path / "nan" / "before-step-4.ckpt"),
        read_checkpoint(unbroken / "checkpoints" / "step-3.ckpt"),
    )
    assert_same(good["state_dict"], true["state_dict"])
    assert_same(good["optimizer_states"], true["optimizer_states"])
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"in the middle of a step.*Begin a new run from them \(init_from\)"):
        fit(tiny.config(parts, shapes, tmp_path, *OPTIONS, f"resume={tmp_path}/nan/before-step-4.ckpt"))
    fit(
        tiny.config(
            parts, shapes, tmp_path / "b", *OPTIONS, f"init_from={tmp_path}/nan/before-step-4.ckpt", "optim.max_steps=1"
        )
    )


@pytest.mark.parametrize("clip", ["1.0", "null"])
def test_a_gradient_that_is_infinite_is_found_too(tmp_path, parts, shapes, monkeypatch, clip):
    def poison(module, batch, loss):
        weight = module.model.projector.linear_2.bias
        weight.register_hook(lambda gradient: gradient * math.inf)
        return loss

    seen = at_pack(monkeypatch, 2, poison)
    with pytest.raises(
        UserError,
        match=r"^step 2: the losses are finite, a gradient is not; .*finite: projector \(1 tensors, such as projector.linear_2.bias",
    ) as error:
        fit(tiny.config(parts, shapes, tmp_path, *OPTIONS, f"optim.clip_grad_norm={clip}"))
    assert all(key in str(error.value) for key in seen[2] + seen[3]), "which pack did it is not known"


@pytest.mark.parametrize(("scale", "right"), [(2.0**16, True), (2.0**-15, True), (2.0**-16, False), (None, False)])
def test_in_float16_an_infinite_gradient_is_a_fault_only_where_no_smaller_scale_helps(monkeypatch, scale, right):
    """Lightning has it on a GPU only. Its scaler halves the scale and skips the step. None: without a scaler."""
    monkeypatch.setattr(optimiser_step, "_not_finite", lambda *known: UserError(f"{known[-2]} {known[-1]}"))
    plugin = SimpleNamespace(scaler=scale and torch.amp.GradScaler("cpu", init_scale=scale))
    zero, one, inf = map(torch.tensor, (0.0, 1.0, math.inf))
    trainer, found = (
        SimpleNamespace(precision_plugin=plugin),
        optimiser_step.Step(mean_loss=one, grad_norm=inf, votes=zero),
    )
    if right:
        assert optimiser_step.check_step(found, None, trainer, "run") is False
        found.mean_loss = inf  # of the loss there is one scale only
    with pytest.raises(UserError, match="inf"):
        optimiser_step.check_step(found, None, trainer, "run")


STRATEGIES = ["ddp", "fsdp2"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bad_gradient_of_one_rank_stops_both_before_the_step(tmp_path, parts, shapes, strategy):
    """The losses are good. Both say whose gradients are not, and the last good weights are kept."""
    run = tmp_path / "run"
    bad = (
        "import os; from lit_eemllm.training.module import LitEEMLLM as Module; right = Module.training_step\n"
        "def step(module, batch, number):\n"
        "    bad = os.environ['LOCAL_RANK'] == '1' and module.global_step == 2\n"
        "    return right(module, batch, number) * (float('nan') if bad else 1)\n"
        "Module.training_step = step"
    )
    config = tiny.config(parts, shapes, run, *TWO, f"trainer.strategy={strategy}", "optim.save_every=2")
    with two_ranks(tmp_path, config, bad) as ranks:
        said = [process.communicate(timeout=100)[1] for process in ranks]
    for process, error in zip(ranks, said, strict=True):
        assert process.returncode == 2 and "Traceback" not in error, error
        assert "step 3: the losses are finite, a gradient is not; gradients that are not finite: projector (4" in error
    keep, good = (read_checkpoint(run / name) for name in ("checkpoints/step-2.ckpt", "nan/before-step-3.ckpt"))
    assert all(tensor.equal(good["state_dict"][name]) for name, tensor in keep["state_dict"].items())
    assert len(json.loads((run / "nan" / "step-3.json").read_text())["packs"]) == 2, "of both"


# --- two at once


def test_a_second_training_in_the_same_folder_is_refused(tmp_path, parts, shapes):
    """While another process trains there; what it has left behind when it was killed is no obstacle."""
    other = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
    other += "print('process 7 on a machine', file=file, flush=True); print('locked', flush=True); time.sleep(60)"
    config = tiny.config(parts, shapes, tmp_path, *OPTIONS, "optim.max_steps=1")
    command = [sys.executable, "-c", other, tmp_path / ".fit.lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(
            UserError, match=rf"^{tmp_path}: another training is running here \(process 7 on a machine\)"
        ):
            fit(config)
        assert {path.name for path in tmp_path.iterdir()} == {".fit.lock"}
        process.kill()
    (tmp_path / "checkpoints").mkdir()
    half = tmp_path / "checkpoints" / ".step-1.ckpt.elsewhere-7.unfinished"
    half.write_bytes(b"half")
    fit(config)
    assert steps(tmp_path) == [1] and not half.exists()


def test_a_start_that_is_refused_leaves_no_folder(tmp_path, parts):
    """One that was there stays, as it was."""
    with pytest.raises(UserError, match="nowhere"):
        fit(tiny.config(parts, tmp_path / "nowhere", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="nowhere"):
        fit(tiny.config(parts, tmp_path / "nowhere", tmp_path / "mine"))
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_is_told_and_bounded(tmp_path, parts, shapes, monkeypatch, capfd, how):
    """A stopped process stands for one whose read never returns."""

    # One that another test has killed may seem active for ever: PyTorch raises its error in the middle of Python's own gathering.
    others, harmed = multiprocessing.active_children(), []

    def harm(module, batch, loss):
        for child in set(multiprocessing.active_children()).difference(others):
            os.kill(child.pid, how)
            harmed.append(child.pid)
        return loss

    at_pack(monkeypatch, 2, harm)
    begin = time.monotonic()
    words, seconds = "a loader process died", 40  # not to be taken for the hang of a busy machine
    if how == signal.SIGSTOP:
        words, seconds = r"no batch came within 3 s \(data\.timeout\)", 3
    with pytest.raises(UserError, match=f"^{words}.*Repeat the command"):
        fit(tiny.config(parts, shapes, tmp_path, *OPTIONS, f"data.timeout={seconds}"))
    assert time.monotonic() - begin < 60
    multiprocessing.active_children()  # gathers those that have ended
    assert len(harmed) == 2
    for process in harmed:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


# --- disks


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file_and_keeps_the_previous_checkpoint(tmp_path, parts, shapes, unbroken, monkeypatch):
    """/dev/full: every write fails as on a full disk, through the real writer."""

    def fill(module, batch, loss):
        unfinished(tmp_path / "checkpoints" / "step-4.ckpt").symlink_to("/dev/full")
        return loss

    config = tiny.config(parts, shapes, tmp_path, *OPTIONS, "optim.save_every=2")
    with monkeypatch.context() as patch:
        at_pack(patch, 7, fill)
        with pytest.raises(WriteError, match=r"step-4\.ckpt could not be written: .*No space left on device.*repeat"):
            fit(config)
    assert steps(tmp_path) == [2]
    fit(config)
    assert_ends_as(unbroken, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_stop_and_say_why_where_rank_0_cannot_write(tmp_path, parts, shapes, strategy):
    config = tiny.config(parts, shapes, tmp_path / "run", *TWO, f"trainer.strategy={strategy}", "optim.save_every=2")
    full = (
        "import errno, torch; right = torch.save\n"
        "def save(value, file, **options):\n"
        "    if isinstance(value, dict) and value['global_step'] == 4:\n"
        "        raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "    right(value, file, **options)\n"
        "torch.save = save"
    )
    with two_ranks(tmp_path, config, full) as ranks:
        said = [process.communicate(timeout=100)[1] for process in ranks]
    for process, error in zip(ranks, said, strict=True):
        assert process.returncode == 1 and "Traceback" not in error, error
        assert "step-4.ckpt could not be written: [Errno 28] No space left on device. Earlier checkpoints" in error
    assert steps(tmp_path / "run") == [2]


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save(tmp_path, parts, shapes, unbroken):
    """Half of the file is on the disk. The run goes on from the previous one, and the half is removed."""
    run = tmp_path / "run"
    config = tiny.config(parts, shapes, run, *OPTIONS, "optim.save_every=2")
    killed = (
        "import os, signal, torch; right = torch.save\n"
        "def save(value, file):\n"
        "    right(value, file)\n"
        "    if value['global_step'] == 6:\n"
        "        file.truncate(file.tell() // 2); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = save"
    )
    process = start(tmp_path, config, killed)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert (
        left == [f".step-6.ckpt.{os.uname().nodename}-{process.pid}.unfinished", "step-2.ckpt", "step-4.ckpt"]
        and newest_checkpoint(run).name == "step-4.ckpt"
    )
    fit(config)
    assert steps(run) == [8, 10]
    assert_ends_as(unbroken, run)


def test_as_many_checkpoints_as_asked_for(tmp_path, parts, shapes):
    fit(tiny.config(parts, shapes, tmp_path, *OPTIONS, "optim.save_every=1", "optim.keep=3"))
    assert steps(tmp_path) == [8, 9, 10]
    fit(tiny.config(parts, shapes, tmp_path, *OPTIONS, "optim.save_every=2", "optim.keep=2", "optim.max_steps=12"))
    assert steps(tmp_path) == [10, 12]


@pytest.mark.slow
def test_stress(tmp_path):
    """Two kills by `make stress`'s own program."""
    command = [sys.executable, ROOT / "tools" / "stress.py", "--kills", "2", "--steps", "20", "--out", tmp_path / "s"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the same, bit for bit" in result.stdout and "\n2 kills (" in result.stdout
    # and it would see a difference
    run = next((tmp_path / "s").glob("cut-1"))
    path = newest_checkpoint(run)
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] += 1e-7
    torch.save(checkpoint, path)
    sys.path.insert(0, str(ROOT / "tools"))
    import stress

    assert stress.compare(run, tmp_path / "s" / "whole") != []
    shutil.rmtree(run / "logs")
    assert len(stress.compare(run, tmp_path / "s" / "whole")) == 21


@pytest.mark.slow
def test_stress_of_ranks_that_save_in_shares(tmp_path):
    command = [
        sys.executable,
        ROOT / "tools" / "stress.py",
        "--ranks",
        "2",
        "--kills",
        "2",
        "--steps",
        "20",
        "--out",
        tmp_path / "s",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the same, bit for bit" in result.stdout and "\n2 kills (" in result.stdout
