"""Faults of shards and loader processes: what rots, dies or hangs is named, and nothing waits for ever."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import shards_util
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from lit_eemllm.errors import UserError
from lit_eemllm.training import guard

ROOT = Path(__file__).resolve().parents[2]


def vanish(path):
    path.unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size // 3)


def rot(path):
    path.write_bytes(os.urandom(path.stat().st_size))


def lose_index(path):
    os.truncate(path.with_suffix(".tar.idx"), 8)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", [vanish, truncate, rot, lose_index])
def test_a_shard_that_goes_bad_under_way_is_named(tmp_path, fault, workers):
    shards_util.write_shards(
        tmp_path / "a", {"train": [shards_util.row(i) for i in range(200)]}, shard_size=4
    )  # more than are kept open
    batches = iter(shards_util.module(tmp_path / "a", workers=workers, packing_buffer=4).train_dataloader())
    next(batches)
    for path in (tmp_path / "a").glob("*.tar"):
        fault(path)
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/a/train-\d+.tar: .* cannot be read now: .*repeat the command"
    ) as error:
        list(islice(batches, 1000))
    assert "Traceback" not in str(error.value)


def test_flipped_bits_inside_members_are_skipped_and_counted(tmp_path):
    """Only the contents rot: JSON and images of single samples, found and counted; the others are trained on."""
    shards_util.write_shards(tmp_path / "a", {"train": [shards_util.row(i) for i in range(40)]}, shard_size=20)
    for path in (tmp_path / "a").glob("*.tar"):
        content = path.read_bytes()
        half = len(content) // 2
        head, tail = content[:half].replace(b'"value"', b'"v\xffluX"', 8), content[half:].replace(b"IHDR", b"IHXR", 3)
        path.write_bytes(head + tail)  # four conversations of two turns, three images
    data = shards_util.module(tmp_path / "a", workers=0, shuffle_buffer=0)
    keys = {key for batch in islice(data.train_dataloader(), 60) for key in batch.keys}
    assert len(keys) == 40 - 2 * 4 - 2 * 3 and set(data.skipped) == {"bad_json", "bad_image"}


def test_a_worker_that_dies_while_its_batch_is_fetched(tmp_path, shapes, monkeypatch):
    """The block of its tensors comes over a connection of its own, which then breaks."""
    loader = iter(shards_util.module(shapes, workers=1).train_dataloader())
    next(loader)
    workers = multiprocessing.active_children()

    def broken(iterator):
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_get_data", broken)
    with pytest.raises(
        UserError, match=r"^a loader process died: (ConnectionReset|DataLoader worker).*Repeat the command"
    ):
        next(loader)  # the error, or the signal of the death, whichever is first


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_script_that_takes_one_batch_ends(shapes, workers):
    process = shards_util.script("one", shapes, workers)
    try:
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()  # its processes end with it
    assert process.returncode == 0 and "Traceback" not in error


def lives(pid):
    """Also of a process that nobody waits for when it has ended."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.slow
def test_loader_processes_end_with_a_trainer_that_is_killed_while_they_start(shapes):
    """Before they have looked for the first time whether it is there."""
    process = shards_util.script("orphans", shapes)
    pids = [int(process.stdout.readline()) for _ in range(2)]
    assert process.wait(timeout=60) == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while left := [pid for pid in pids if lives(pid)]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"{len(left)} of {len(pids)} are still there")
        time.sleep(0.1)


def raised(first: Exception, then: Exception) -> None:
    """Under the guard of a training: an error, and another while it passes."""
    with guard.guarded():
        try:
            raise first
        finally:
            raise then


def test_what_is_known_is_told_rather_than_the_death_that_followed():
    """Workers that are ended for it die too, and PyTorch may say so at any place, also while the error passes."""
    death = "DataLoader worker (pid 7) is killed by signal: Killed. "
    with pytest.raises(UserError, match=r"^no batch came") as told:
        raised(UserError("no batch came within 3 s"), RuntimeError(death))
    assert told.value.__suppress_context__
    with pytest.raises(UserError, match=r"^a loader process died: DataLoader worker"):
        raised(RuntimeError(death), KeyError("made of it"))
    with pytest.raises(KeyError, match="another"):
        raised(ValueError("one"), KeyError("another"))


def test_a_circle_of_causes_ends():
    """As Lightning leaves it where closing the log fails for the same reason: each error is the context of the other."""
    first, second = OSError("full"), KeyError("another")
    first.__cause__, second.__cause__ = second, first
    with pytest.raises(OSError, match="full"):
        raised(KeyError("before"), first)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "limit"), [(0, 4), (1, 16)])  # a worker prints where it stands in the last quarter
def test_a_read_that_hangs_is_bounded(tmp_path, workers, limit):
    """A named pipe without a writer: opening it never returns. Without workers a signal ends that, and the shard is known."""
    shards_util.write_shards(tmp_path / "a", {"train": [shards_util.row(i) for i in range(40)]}, shard_size=20)
    code = (
        "import sys, os, time; from pathlib import Path; import shards_util\n"
        "folder = Path(sys.argv[1])\n"
        f"data = shards_util.module(folder, workers={workers}, timeout={limit})\n"
        "loader = data.train_dataloader()\n"
        "for path in folder.glob('*.tar'):\n    path.unlink(); os.mkfifo(path)\n"
        "next(iter(loader))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])}
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True, timeout=90, env=environment
    )
    assert result.returncode == 1
    assert "train-00000" in result.stdout and "Watchdog triggered" in result.stdout, "where it stood"
    named = (
        f"no batch came within {limit} s"
        if workers
        else rf"{tmp_path}/a/train-\d+.tar: the shard or its index was good"
    )
    assert re.search(rf"UserError: {named}.*\(data\.timeout\)", result.stderr), result.stderr
