"""A disk that is full, under every verb: one message with the path and the cause, exit status 1, nothing half written."""

import contextlib
import os
import resource
import subprocess
from multiprocessing import forkserver
from pathlib import Path

import pytest
import tiny
from lib.runs import assert_same, at_pack, metrics

from lit_eemllm import cli
from lit_eemllm.console import COMMAND, console
from lit_eemllm.errors import WriteError
from lit_eemllm.training.checkpoint import newest_checkpoint, read_checkpoint
from lit_eemllm.training.fit import fit

OPTIONS = ("data.val=null", "optim.max_steps=6", "optim.save_every=100")
FULL = "File too large"
"""What the system says of a write beyond RLIMIT_FSIZE, which stands for a full disk: it reaches every writer, also those in Rust and
in other processes. (A file can be made, as on a full disk; only what is in it finds no room.)"""
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@contextlib.contextmanager
def no_room(size=64):  # a semaphore is a file too
    forkserver.ensure_running()  # it is started once, and all processes that it makes later would have no room either
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def room_for_temporary_files(monkeypatch):
    """They are on another disk."""

    @contextlib.contextmanager
    def elsewhere(path):
        with no_room(resource.RLIM_INFINITY):
            yield

    monkeypatch.setattr("lit_eemllm.model.folders.writing", elsewhere)


@pytest.fixture(scope="module")
def run(tmp_path_factory, parts, shapes):
    """A run with an adapter, evaluated; not to be changed."""
    out = tmp_path_factory.mktemp("run") / "run"
    fit(tiny.config(parts, shapes, out, "optim.max_steps=1", "optim.tuning.llm=lora", "model.mechanism.preset=llava",
                    "eval.samples=4"))  # fmt: skip
    assert cli.main(["validate", str(out)]) == 0
    return out


VERBS = {
    "validate": ["validate", "RUN", "out=OUT", "--checkpoint", "RUN/checkpoints/step-1.ckpt"],
    "report": ["report", "RUN", "--out", "OUT"],
    "merge": ["merge", "RUN", "--to", "OUT"],
    "merge --adapter": ["merge", "RUN", "--to", "OUT", "--adapter"],
    "convert": ["convert", "RUN", "--out", "OUT", "--mechanism", "saisa"],
    "convert --to-llava": ["convert", "RUN", "--out", "OUT", "--to-llava"],
    "calibrate": ["calibrate", "RUN", "--target", "shortv", "--layers", "1", "--samples", "2", "--out", "OUT"],
    "shards make": ["shards", "make", "--rows", "train=ROWS", "--images", "IMAGES", "--out", "OUT"],
    "shards make, two processes": ["shards", "make", "--rows", "train=ROWS", "--images", "IMAGES", "--out", "OUT", "--workers", "2"],
    "shards prepare": ["shards", "prepare", "SHARDS"],
    "shards inspect": ["shards", "inspect", "RUN", "--out", "OUT"],
    "configs copy": ["configs", "copy", "configs/demo", "--to", "OUT"],
    "shrink": ["shrink", "OUT", "configs/presets/llava_1.5_7b_pretrain.yaml", "--published"],
    "fit": ["fit", "RUN/config.yaml", "out=OUT"],
    "sweep": ["sweep", "SWEEP", "out=OUT"],
}  # fmt: skip


@pytest.mark.usefixtures("room_for_temporary_files")
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_it_could_not_write(tmp_path, run, shapes, capsys, verb):
    raw = shapes.parent / f"{shapes.name}-raw"
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"base: [{run}/config.yaml]\ncells: {{a: {{}}}}\nseeds: [0]\n")
    copy = tmp_path / "shards"
    if verb == "shards prepare":
        copy.mkdir()
        (copy / "a.tar").symlink_to(next(shapes.glob("train*.tar")))
    places = {
        "RUN": run,
        "OUT": tmp_path / "out",
        "ROWS": raw / "train.json",
        "IMAGES": raw / "images",
        "SHARDS": copy,
        "SWEEP": sweep,
    }
    words = []
    for word in VERBS[verb]:
        for name, place in places.items():
            word = word.replace(name, str(place))
        words.append(word)
    capsys.readouterr()
    with no_room():
        status = cli.main(words)
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status == 1 and "Traceback" not in said, said
    assert not (Path(__file__).parents[1] / ".git" / "index.lock").exists(), "of a git that asked for the commit"
    assert len(lines) == 1 and lines[0].startswith(f"error: {tmp_path}"), said
    assert ("disk I/O error" if verb == "shards prepare" else FULL) in lines[0], (
        "sqlite, in which Energon writes, has its own words"
    )


def test_a_full_folder_of_temporary_files_is_no_broken_model(tmp_path, run, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with no_room():
        assert cli.main(["merge", str(run), "--to", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert f"error: {tmp_path}/lit_eemllm-" in said and FULL in said and "model.decoder" not in said


@needs_dev_full
def test_a_log_that_cannot_be_written_ends_the_run_after_the_step_saved(tmp_path, parts, shapes, monkeypatch, capsys):
    def fill(module, batch, loss):
        (file,) = (tmp_path / "run").glob("logs/*/metrics.csv")
        file.unlink()
        file.symlink_to("/dev/full")
        return loss

    whole, config = (tiny.config(parts, shapes, tmp_path / name, *OPTIONS) for name in ("whole", "run"))
    fit(whole)
    with monkeypatch.context() as patch:
        at_pack(patch, 2, fill)
        with pytest.raises(WriteError) as error:
            fit(config)
    told = f"logs/version_0 could not be written: No space left on device. The run stopped after step 3, saved as {config.out}/"
    assert told in str(error.value) and "repeat the command to continue" in str(error.value)
    fit(config)
    ends = [read_checkpoint(newest_checkpoint(Path(one.out))) for one in (config, whole)]
    for section in ("state_dict", "optimizer_states", "rng"):
        assert_same(ends[0][section], ends[1][section], section)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("last", [False, True], ids=["under way", "in the last step"])
def test_a_full_disk_of_logs_and_checkpoints_is_told_once(tmp_path, parts, shapes, monkeypatch, capsys, last):
    config = tiny.config(parts, shapes, tmp_path, *OPTIONS)
    with no_room(2**40), monkeypatch.context() as patch:
        at_pack(patch, 5 if last else 3, lambda module, batch, loss: resource.setrlimit(
            resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1])) or loss)  # fmt: skip
        with pytest.raises(WriteError, match=rf"step-{6 if last else 4}\.ckpt could not be written: .*{FULL}"):
            fit(config)
    assert "Traceback" not in capsys.readouterr().err
    assert set(metrics(tmp_path)) == set(range(1, 6 if last else 4))
    fit(config)
    assert newest_checkpoint(tmp_path).name == "step-6.ckpt"


@needs_dev_full
def test_output_that_goes_to_a_full_disk(tmp_path, parts, shapes, monkeypatch, capsys):
    """`fit > train.log` on the disk of the run, and a verb that only prints."""
    config = tiny.config(parts, shapes, tmp_path, *OPTIONS)

    def fill(module, batch, loss):
        console.file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
        return loss

    monkeypatch.setattr(console, "_file", None)
    at_pack(monkeypatch, 2, fill)
    with pytest.raises(WriteError, match=r"^what is printed could not be written: No space .* after step 3, saved as"):
        fit(config)
    command = [*COMMAND, "configs", "list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env={**os.environ})
    assert (done.returncode, done.stderr) == (1, "error: what is printed, or a file: No space left on device\n")
