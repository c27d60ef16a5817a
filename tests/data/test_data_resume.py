"""Exact resume: the batches after a checkpoint are those of an unbroken run, bit for bit, in a new process."""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from megatron.energon import savable_loader
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRng
from megatron.energon.savable_loader import SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState
from shards_util import (
    TRANSFORM,
    CharTemplate,
    Recorder,
    blend,
    fingerprint,
    fit,
    forked,
    module,
    row,
    sample,
    take,
    write_shards,
    write_tar,
)
from torch.utils.data import get_worker_info

from lit_eemllm.data import contents as contents_module
from lit_eemllm.data import loader as loader_module
from lit_eemllm.data import module as module_module
from lit_eemllm.data import state as loader_state
from lit_eemllm.data.contents import contents
from lit_eemllm.data.module import ShardDataModule
from lit_eemllm.data.recipe import read_folder
from lit_eemllm.data.shards import prepare
from lit_eemllm.errors import CheckpointError, UserError

WORKERS = pytest.mark.parametrize("workers", [0, 2])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A blend of a folder with images and one without; some samples are bad, so that they must be skipped again."""
    folder = tmp_path_factory.mktemp("resume")
    write_shards(
        folder / "a", {"train": [row(i, i % 3) for i in range(40)], "val": [row(i) for i in range(3)]}, shard_size=10
    )
    write_tar(folder / "b" / "x.tar", {f"b{i}": sample(i, 0) if i % 4 else {"json": b"{"} for i in range(24)})
    prepare(folder / "b")
    return blend(folder, {"a": 2, "b": 1})


def test_cut_anywhere_and_go_on_in_a_new_process(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        loader_module, "SNAPSHOT_SECONDS", 0.02
    )  # some snapshots lie before a cut, with batches to skip
    cuts = (1, 13)
    expected: list[list[str]] = []
    states = []
    for workers in (0, 2):
        data = module(recipe, workers=workers)
        seen, batches = [], iter(data.train_dataloader())
        skipped = {}
        for number in range(max(cuts) + 6):
            if number in cuts:
                saved = data.state_dict()
                skipped[number] = saved["ranks"][0]["skipped"]
                states.append(tmp_path / f"{workers}-{number}.pt")
                torch.save(saved, states[-1])
            seen.append(fingerprint(next(batches)))
        expected += [seen[cut : cut + 6] for cut in cuts]
        assert len(set(seen)) == len(seen), "the batches differ, so equality says something"
        assert skipped[13]["bad_json"] > skipped[1].get("bad_json", 0) >= 0
    process = forked("restore", recipe, *states)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    for path, found, wanted in zip(states, json.loads(out), expected, strict=True):
        assert found == wanted, path.name


@WORKERS
def test_saved_again_before_every_worker_has_delivered(
    recipe: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resume, train one batch, save, resume: no worker may repeat the batches it had yet to skip. Counts go on too."""
    monkeypatch.setattr(loader_module, "SNAPSHOT_SECONDS", 1e9)  # one snapshot, at the beginning: there is much to skip
    data = module(recipe, workers=workers)
    batches = map(fingerprint, data.train_dataloader())
    seen, saved = list(islice(batches, 9)), data.state_dict()
    whole, skipped = seen + list(islice(batches, 3)), data.skipped
    for number in (1, 0, 2):
        data = module(recipe, workers=workers)
        data.load_state_dict(saved)
        seen += list(take(data, number))
        saved = data.state_dict()
    assert seen == whole and data.skipped == skipped and saved["ranks"][0]["batches"] == 12


@WORKERS
def test_packs_of_even_cost(recipe: Path, workers: int) -> None:
    """The same conversations as by tokens, in other packs; cut and gone on."""

    def by_flops() -> ShardDataModule:
        data = module(recipe, workers=workers, pack_by="flops")
        data.connect(CharTemplate(), TRANSFORM, flops)  # type: ignore[arg-type]
        return data

    whole = list(take(by_flops(), 9))
    assert whole != list(take(module(recipe, workers=workers), 9))
    data = by_flops()
    assert list(take(data, 4)) == whole[:4]
    saved, data = data.state_dict(), by_flops()
    data.load_state_dict(saved)
    assert list(take(data, 5)) == whole[4:]
    with pytest.raises(CheckpointError, match=r"data.pack_by was flops and is tokens"):
        module(recipe, workers=workers).load_state_dict(saved)


def flops(text: int, visual: int) -> float:
    return text + 30.0 * visual


def test_what_earlier_versions_saved_was_packed_by_tokens(recipe: Path) -> None:
    data = module(recipe)
    first = list(take(data, 3))
    saved = data.state_dict()
    del saved["shape"]["data.pack_by"]
    again = module(recipe)
    again.load_state_dict(saved)
    assert first + list(take(again, 3)) == list(take(module(recipe), 6))
    with pytest.raises(CheckpointError, match=r"data.pack_by was tokens and is flops"):
        module(recipe, pack_by="flops").load_state_dict(saved)


@pytest.mark.parametrize("done", [0, 4])
def test_saved_before_every_worker_has_begun(recipe: Path, done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker delivers while the other still starts, in a new run and in a resumed one: that has no state yet to be asked for."""
    fresh = module(recipe, workers=2)
    whole = list(take(fresh, done + 7))
    data, seen = module(recipe, workers=2), whole[:done]
    if done:
        first = module(recipe, workers=2)
        assert list(take(first, done)) == seen
        data.load_state_dict(first.state_dict())

    class Late(type(threading.RLock())):  # type: ignore[misc]
        """The lock between a worker and its thread that answers: the second worker takes it when that has answered."""

        def __init__(self) -> None:
            self.answered = threading.Event()

        def __enter__(self) -> bool:
            if threading.current_thread() is threading.main_thread() and get_worker_info().id == 1:
                assert self.answered.wait(60)
            return super().__enter__()

        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)
            if threading.current_thread() is not threading.main_thread():
                self.answered.set()

    with monkeypatch.context() as late:
        late.setattr(savable_loader, "threading", SimpleNamespace(Thread=threading.Thread, RLock=Late))
        seen += list(take(data, 1))
        saved = data.state_dict()
    continued = module(recipe, workers=2)
    continued.load_state_dict(saved)
    assert seen + list(take(continued, 6)) == whole
    place = loader_state.loads(saved["ranks"][0]["loader"])
    place.worker_states[1] = replace(place.worker_states[1], state=None, offset=1)  # what earlier versions wrote then
    saved["ranks"][0]["loader"] = loader_state.dumps(place)
    continued = module(recipe, workers=2)
    continued.load_state_dict(saved)
    with pytest.raises(CheckpointError, match="a loader process has no state"):
        continued.train_dataloader()


def test_a_worker_that_does_not_begin_is_not_waited_for_without_end(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has failed to restore its state, which training hears of when it comes to its batch."""
    first = module(recipe, workers=2)
    assert len(list(take(first, 4))) == 4
    restore = savable_loader.SavableDatasetWrapper._restore_state

    def fails(worker: Any, state: Any) -> None:
        if get_worker_info().id == 1:
            raise ValueError("lost")
        restore(worker, state)

    monkeypatch.setattr(savable_loader.SavableDatasetWrapper, "_restore_state", fails)
    data = module(recipe, workers=2, timeout=2.0)
    data.load_state_dict(first.state_dict())
    assert len(list(take(data, 1))) == 1
    with pytest.raises(UserError, match="a loader process has not begun for 2 s"):
        data.state_dict()


def test_saved_after_a_worker_has_failed(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails some batches before the trainer gets there, which may save meanwhile; the file is restored, the run goes on."""
    whole = list(take(module(recipe, workers=2), 14))
    read, failed, reads = loader_module._NamingReader.__getitem__, tmp_path / "failed", count(1)

    def fails(reader: Any, index: int) -> Any:
        if get_worker_info().id == 1 and next(reads) == 50:
            failed.touch()
            raise UserError("lost")
        return read(reader, index)

    with monkeypatch.context() as broken:
        broken.setattr(loader_module._NamingReader, "__getitem__", fails)
        data = module(recipe, workers=2)
        batches = map(fingerprint, data.train_dataloader())
        assert list(islice(batches, 10)) == whole[:10]
        for _ in range(600):
            if failed.exists():
                break
            time.sleep(0.1)
        saved = data.state_dict()
        assert next(batches) == whole[10]
        with pytest.raises(UserError, match="lost"):
            next(batches)
    continued = module(recipe, workers=2)
    continued.load_state_dict(saved)
    assert list(take(continued, 4)) == whole[10:]


class Crash(Exception):
    pass


class CrashAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise Crash


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_trainer_stopped_and_continued(recipe: Path, tmp_path: Path, workers: int, accumulate: int) -> None:
    """In a real `Trainer.fit`, against an unbroken run: by a signal that kills another process, and by an exception here."""
    killed = forked("kill", recipe, tmp_path / "stopped", workers, accumulate, 9) if workers else None
    val = None if workers else recipe  # validation in between must not disturb; once is enough
    options: dict[str, Any] = dict(accumulate_grad_batches=accumulate, val_check_interval=3, num_sanity_val_steps=1)
    whole = Recorder()
    fit(whole, module(recipe, val, workers=workers), tmp_path / "whole", steps=8, save_every=99, **options)
    assert len(whole.seen) == 8 * accumulate
    if killed:
        _, error = killed.communicate(timeout=200)
        assert killed.returncode == -9, error
    else:
        crash = {"callbacks": [CrashAt(5)], **options}
        with pytest.raises(Crash):
            fit(Recorder(), module(recipe, val), tmp_path / "stopped", steps=99, save_every=2, **crash)
    last = max((tmp_path / "stopped").glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert last.name == "step=4.ckpt", "the last save before it stopped"
    continued, data = Recorder(), module(recipe, val, workers=workers)
    fit(continued, data, tmp_path / "more", steps=6, save_every=99, ckpt=last, **options)
    assert continued.seen == whole.seen[4 * accumulate : 6 * accumulate]
    # a checkpoint written after fit, and another fit of the same module, go on where it ended
    assert data.state_dict()["ranks"][0]["batches"] == 6 * accumulate
    more = Recorder()
    fit(more, data, tmp_path / "more", steps=2, save_every=99, **options)
    assert more.seen == whole.seen[6 * accumulate :]


class Touching(Recorder):
    """Builds the loader early, as a schedule that asks the trainer for its number of steps would."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


def test_epochs_of_the_trainer_lose_no_batch(recipe: Path, tmp_path: Path) -> None:
    """With a limit Lightning iterates anew every epoch; the stream goes on. And a loader built early is harmless."""
    model = Recorder()
    fit(model, module(recipe), tmp_path, steps=9, save_every=3, limit_train_batches=3, max_epochs=-1)
    assert model.seen == list(take(module(recipe), 9))
    again = Recorder()
    fit(
        again,
        module(recipe),
        tmp_path / "x",
        steps=9,
        save_every=99,
        limit_train_batches=3,
        ckpt=tmp_path / "step=6.ckpt",
    )
    assert again.seen == model.seen[6:]


def test_exception_in_the_middle_of_a_step_does_not_lose_its_batch(recipe: Path, tmp_path: Path) -> None:
    from lightning.pytorch import Trainer

    data, model = module(recipe), Recorder()
    trainer = Trainer(
        max_steps=9, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[CrashAt(3)],
    )  # fmt: skip
    with pytest.raises(Crash):
        trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "emergency.ckpt")
    again = Recorder()
    fit(again, module(recipe), tmp_path, steps=5, save_every=99, ckpt=tmp_path / "emergency.ckpt")
    assert len(model.seen) == 3 and model.seen + again.seen == list(take(module(recipe), 5))


@pytest.mark.slow
def test_two_ranks_share_the_data_and_resume_each_from_its_own_place(recipe: Path, tmp_path: Path) -> None:
    processes = [forked("rank", rank, recipe, tmp_path) for rank in (0, 1)]
    found = []
    for process in processes:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        found.append(json.loads(out.splitlines()[-1]))
    zero, one = found
    assert zero["state"] == one["state"] and len(zero["state"]["ranks"]) == 2
    assert zero["resumed"] == zero["after"] and one["resumed"] == one["after"] and zero["after"] != one["after"]
    assert not set(zero["first"] + zero["after"]) & set(one["first"] + one["after"]), "ranks see different samples"
    assert len(zero["val"]) == len(one["val"]) == 1 and zero["val"] != one["val"], "as many batches on each rank"
    with pytest.raises(CheckpointError, match=r"2 ranks x 0 workers, this is 1 ranks x 0 workers"):
        module(recipe, shuffle_buffer=0, packing_buffer=4, pack_samples=1).load_state_dict(zero["state"])


def test_continuing_something_else_is_refused(recipe: Path) -> None:
    data = module(recipe)
    list(take(data, 2))
    saved = json.loads(json.dumps(data.state_dict()))  # plain data through and through
    other = blend(recipe.parent, {"a": 2, "b": 2}).rename(recipe.parent / "other.yaml")
    blend(recipe.parent, {"a": 2, "b": 1})
    for change, message in (
        ({"workers": 2}, r"data.workers was 0 and is 2.*1 ranks x 0 workers, this is 1 ranks x 2 workers"),
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"pack_tokens": 300}, "data.pack_tokens was 200 and is 300"),
        ({"shuffle_buffer": 9}, "data.shuffle_buffer was 10 and is 9"),
        ({"max_image_pixels": 99}, "data.max_image_pixels was 50000000 and is 99"),
        ({"truncation": "truncate"}, "data.truncation was drop and is truncate"),
        (
            {"train": other},
            r"data.train was \['train, weight 2, 40 samples in 4 shards .*weight 1, 24 .*weight 2, 24 samples in 1 shards",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            module(**{"train": recipe, **change}).load_state_dict(saved)
    moved = module(recipe, max_bad_in_a_row=7, timeout=7.0)  # these shape no batch
    moved.load_state_dict(saved)
    for broken in ("[]", '{"os.system": ["true"]}', '{"FlexState": 3}', "[" * 10**5, '{"SliceState": {"index": 1}}'):
        saved["ranks"][0]["loader"] = broken
        with pytest.raises(CheckpointError, match="checkpoint"):
            moved.train_dataloader()
    for broken in ({}, {"shape": saved["shape"]}, {"shape": saved["shape"], "ranks": [3]}, {"shape": 3, "ranks": []}):
        with pytest.raises(CheckpointError, match="no loader position"):
            moved.load_state_dict(broken)
    # the trap: something built the loader before it was restored
    data = module(recipe)
    data.train_dataloader()
    with pytest.raises(RuntimeError, match="estimated_stepping_batches"):
        data.load_state_dict(saved)


def test_the_same_keys_with_other_data_another_template_or_other_pixels_are_refused(tmp_path: Path) -> None:
    """Nothing of the configuration has changed: what the shards hold has, or how a sample becomes a batch."""
    rows = [row(i) for i in range(24)]
    folder = write_shards(tmp_path / "a", {"train": rows}, shard_size=10)
    data = module(folder)
    list(take(data, 2))
    saved = data.state_dict()
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)  # later files of the same contents
    module(copy).load_state_dict(saved)
    for name, changed in {
        "answers": [row(i, answer=f"it is {i * i + 1}".ljust(len(f"it is {i * i}"))) for i in range(24)],
        "one answer": [*rows[:23], row(23, answer="it is 530")],  # not 529
        "order": rows[1:] + rows[:1],
    }.items():
        with pytest.raises(
            CheckpointError, match=r"cannot continue .*: contents of data\.train was \['[0-9a-f]{12}'\] and is"
        ):
            module(write_shards(tmp_path / name, {"train": changed}, shard_size=10)).load_state_dict(saved)
    template, darker = CharTemplate(), replace(TRANSFORM, mean=(0.4, 0.5, 0.5))
    template.name = "edited"
    for connected, message in (
        ((template, TRANSFORM), "template with its tokenizer was characters and is edited"),
        ((CharTemplate(), darker), r"images\.mean was \[0.5, 0.5, 0.5\] and is \[0.4, 0.5, 0.5\]"),
    ):
        data = module(folder)
        data.connect(*connected)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=message):
            data.load_state_dict(saved)


def test_contents_of_large_shards_are_read_at_some_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small source whole; of a large one the indices, and 512 bytes of every 2,048."""
    folder = write_shards(tmp_path / "a", {"train": [row(i) for i in range(16)]}, shard_size=8)
    source = read_folder(folder, "train", 1.0)
    sizes = [(folder / name).stat().st_size for name, _ in source.shards]
    assert len(sizes) == 2 and min(sizes) > 3 * 2048

    def seen(shard: int, place: int) -> bool:
        """Whether a flipped bit at that place is."""
        path, before = folder / source.shards[shard][0], contents(source)
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        after = contents(source)
        content[place] ^= 1
        path.write_bytes(content)
        assert contents(source) == before
        return after != before

    last = [size - 1 for size in sizes]
    assert all(seen(shard, place) for shard in (0, 1) for place in (0, 700, 5000, last[shard]))
    monkeypatch.setattr(contents_module, "BYTES", 512)
    monkeypatch.setattr(contents_module, "PLACES", sum(sizes) // 2048)
    assert sum(sizes) // (sum(sizes) // 2048) < 2048 + 512
    assert [seen(shard, place) for shard in (0, 1) for place in (0, 511, 1500)] == [True, True, False] * 2
    index = (folder / source.shards[1][0]).with_suffix(".tar.idx")
    before = contents(source)
    index.write_bytes(index.read_bytes()[:8] + b"\1" + index.read_bytes()[9:])
    assert contents(source) != before


def test_sources_share_the_places_and_rank_0_reads_them(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_shards(tmp_path / "a", {"train": [row(i) for i in range(8)]})
    source = read_folder(folder, "train", 1.0)
    shard = folder / source.shards[0][0]
    monkeypatch.setattr(contents_module, "BYTES", 512)
    monkeypatch.setattr(contents_module, "PLACES", shard.stat().st_size // 512)
    before = {of: contents(source, of) for of in (1, 4)}
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    assert {of: contents(source, of) != digest for of, digest in before.items()} == {1: True, 4: False}

    told: list[Any] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        if rank == 0:
            monkeypatch.setattr(dist, "broadcast_object_list", told.extend)
        else:
            monkeypatch.setattr(dist, "broadcast_object_list", lambda found: found.__setitem__(0, told[0]))
            monkeypatch.setattr(module_module, "contents", lambda *_: pytest.fail("rank 1 reads the shards"))
        assert module(recipe)._sources["contents of data.train"] == told[0]
    assert len(told[0]) == 2
    told[0] = UserError("a shard is lost")
    with pytest.raises(UserError, match="a shard is lost"):
        _ = module(recipe)._sources


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """This process as one of several, which agree with it; `agree` is what the others say."""
    told = SimpleNamespace(rank=0, of=1, agree=lambda tensor, how: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: told.rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: told.of)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "all_reduce", lambda *asked: told.agree(*asked))
    return told


def test_more_ranks_than_validation_samples_are_refused_at_the_start(recipe: Path, ranks: SimpleNamespace) -> None:
    data = module(recipe, recipe.parent / "a")
    ranks.of = 3
    data.setup("fit")
    ranks.of = 4
    for stage in ("fit", "validate"):
        with pytest.raises(UserError, match=r"3 validation samples cannot feed 4 ranks"):
            data.setup(stage)


@WORKERS
def test_a_rank_without_a_validation_sample_that_it_can_use_is_told_at_the_start(
    recipe: Path, tmp_path: Path, ranks: SimpleNamespace, workers: int
) -> None:
    """By all ranks, since none may wait for it in the first validation, hours later."""
    bad = {"json": b"{"}
    write_tar(tmp_path / "val.tar", {f"k{i}": sample(i) if i < 4 else bad for i in range(8)})
    prepare(tmp_path)
    data = module(recipe, tmp_path, workers=workers)
    ranks.of = 2
    data.setup("fit")
    ranks.agree = lambda tensor, how: tensor.zero_()
    with pytest.raises(UserError, match="no sample of a rank can be used"):
        data.setup("fit")
    ranks.rank, ranks.agree = 1, lambda tensor, how: None
    with pytest.raises(UserError, match="no sample of a rank can be used"):
        data.setup("fit")


def test_state_survives_json() -> None:
    state = FlexState(
        a=(1, "x", (None, True, 2.5)), b=[{"k": (1,)}, FlexState(z=[])], c=b"\0\xff", d=2**70, e={"tuple": [1]},
        rng=SystemRng.save_state(), slices=[SliceState(index=1, current=2), None], t=torch.arange(3.0),
        check=SavableDatasetCheckpoint(
            state=SavableDatasetState(rng=SystemRng.save_state(), dataset_state=FlexState(), sample_index=3), offset=1
        ),
    )  # fmt: skip
    text = loader_state.dumps(state)
    back = loader_state.loads(text)
    assert type(back) is FlexState and type(back["b"][1]) is FlexState and type(back["b"][0]) is dict
    assert {k: back[k] for k in "abcde"} == {k: state[k] for k in "abcde"} and back["slices"] == state["slices"]
    assert torch.equal(back["t"], state["t"]) and torch.equal(back["rng"].torch, state["rng"].torch)
    assert back["rng"].random == state["rng"].random and back["rng"].numpy[0] == state["rng"].numpy[0]
    assert np.array_equal(back["rng"].numpy[1], state["rng"].numpy[1]) and back["check"].state.sample_index == 3
    assert loader_state.dumps(back) == text
    assert back["rng"].numpy[1].flags.writeable  # whoever goes on from it may draw in place
    SystemRng.restore_state(back["rng"])
    for unknown in ({1, 2}, np.float32(1), FlexState(x=range(3)), {1: 2}, np.array([None])):
        with pytest.raises(TypeError, match="loader state"):
            loader_state.dumps(unknown)
