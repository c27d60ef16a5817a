"""Checkpoints in shares: what is saved is read, by any number of ranks; whole or not at all; damaged, foreign and hostile ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lib.processes import run_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lit_eemllm.errors import CheckpointError, WriteError
from lit_eemllm.training import sharded
from lit_eemllm.training.checkpoint import AtomicCheckpointIO, all_checkpoints, read_checkpoint, set_aside
from lit_eemllm.training.fsdp2 import _as_write_errors

SHAPES = {"uneven": (5, 3), "one row": (1, 4), "vector": (7,), "large": (64, 16)}
"""Of two or three ranks some have more rows of them, some none."""


def tensor(name: str, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed)).to(dtype)


def checkpoint(mesh: DeviceMesh | None, placements: Any = None) -> dict[str, Any]:
    """With tensors in shares, or, without a mesh, whole; two are in no shares."""

    def share(x: torch.Tensor) -> torch.Tensor:
        return x if mesh is None else distribute_tensor(x, mesh, placements or [Shard(0)])

    state = {n: {"step": torch.tensor(3.0), "exp_avg": share(tensor(name, 9 + n))} for n, name in enumerate(SHAPES)}
    return {
        "lit_eemllm": {"kept": 1},
        "state_dict": {
            **{f"model.{name}": share(tensor(name, 1)) for name in SHAPES},
            "model.narrow": share(tensor("uneven", 2, torch.bfloat16)),
            "buffer": torch.arange(3),
        },
        "optimizer_states": [{"state": state, "param_groups": [{"params": [0, 1, 2, 3], "lr": 0.5}]}],
    }


def assert_same(found: Any, true: Any) -> None:
    assert type(found) is type(true)
    if isinstance(true, dict):
        assert found.keys() == true.keys()
    if isinstance(true, dict | list):
        for key in true if isinstance(true, dict) else range(len(true)):
            assert_same(found[key], true[key])
    else:
        assert found.equal(true) and found.dtype == true.dtype if isinstance(true, torch.Tensor) else found == true


def save(path: Path, group: dist.ProcessGroup, mesh: DeviceMesh, placements: Any = None) -> None:
    """And change every tensor at once, as a training step does."""
    made = checkpoint(mesh, placements)
    saving = sharded.begin_saving(made, path, AtomicCheckpointIO().save_checkpoint, group)
    for *_, x in sharded._each(made["state_dict"], ""):
        (x.to_local() if isinstance(x, DTensor) else x).zero_()
    with _as_write_errors():
        saving.result()


@pytest.fixture
def alone() -> Iterator[tuple[dist.ProcessGroup, DeviceMesh]]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.new_group(backend="gloo"), init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_what_is_saved_is_read_whatever_happens_meanwhile(alone: Any, tmp_path: Path) -> None:
    path = tmp_path / "step-4.ckpt"
    save(path, *alone)
    true = checkpoint(None)
    assert_same(read_checkpoint(path), true)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["step-4.ckpt", "step-4.shards-1"]
    part = read_checkpoint(path, shares=["state_dict"])
    assert_same(part["state_dict"], true["state_dict"])
    moments = part["optimizer_states"][0]["state"]
    assert all(m["exp_avg"].is_meta and m["step"] == 3 for m in moments.values()), "not read, but known"
    assert [tuple(m["exp_avg"].shape) for m in moments.values()] == list(SHAPES.values())
    assert path.stat().st_size < 8_000 < sum(x.stat().st_size for x in (tmp_path / "step-4.shards-1").iterdir())


def test_saved_again_it_replaces_the_first_and_what_a_killed_process_left_goes(alone: Any, tmp_path: Path) -> None:
    (tmp_path / "step-4.shards-1").mkdir()
    (tmp_path / "step-4.shards-1" / "half").write_text("")
    for name in ("step-4.shards-2", "step-4.shards-1"):  # by turns
        save(tmp_path / "step-4.ckpt", *alone)
        assert sorted(x.name for x in tmp_path.iterdir()) == ["step-4.ckpt", name]
    (tmp_path / "step-5.shards-1").mkdir()
    (tmp_path / "step-3.ckpt").write_text("damaged")
    sharded.forget_unfinished(tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["step-3.ckpt", "step-4.ckpt", "step-4.shards-1"]
    assert_same(read_checkpoint(tmp_path / "step-4.ckpt"), checkpoint(None))


def test_shares_go_with_their_checkpoint(alone: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (2, 4):
        save(folder / f"step-{step}.ckpt", *alone)
    aside = set_aside(tmp_path, folder / "step-2.ckpt", 2)
    assert aside is not None and sorted(x.name for x in aside.iterdir()) == ["step-4.ckpt", "step-4.shards-1"]
    assert_same(read_checkpoint(aside / "step-4.ckpt"), checkpoint(None))
    AtomicCheckpointIO().remove_checkpoint(folder / "step-2.ckpt")
    assert [x.name for x in folder.iterdir()] == [aside.name]


def test_a_save_that_fails_leaves_the_one_before(alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step-4.ckpt"
    save(path, *alone)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for place in ("torch.distributed.checkpoint.filesystem._write_files_from_queue", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(WriteError, match=r"could not be written: .*No space left on device"):
                save(path, *alone)
        assert_same(read_checkpoint(path), checkpoint(None))
        assert [x.name for x in all_checkpoints(tmp_path.parent)] == []


def test_damaged_and_lost_shares_are_named(alone: Any, tmp_path: Path) -> None:
    path = tmp_path / "step-4.ckpt"
    save(path, *alone)
    (shares,) = (tmp_path / "step-4.shards-1").iterdir()
    whole = shares.read_bytes()
    shares.write_bytes(whole[:-40] + bytes(40))
    read_checkpoint(path, shares=())  # not read
    with pytest.raises(CheckpointError, match=rf"{shares}: its bytes have changed"):
        read_checkpoint(path)
    for damaged in (whole[:-1], whole + b"x"):
        shares.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{shares.name} is missing or not as long"):
            read_checkpoint(path, shares=())
    shares.unlink()
    with pytest.raises(CheckpointError, match=f"{shares.name} is missing or not as long"):
        read_checkpoint(path)
    shares.parent.rmdir()
    with pytest.raises(CheckpointError, match=r"copy the folder step-4.shards-1 beside it"):
        read_checkpoint(path)


def test_strangers_shares(alone: Any, tmp_path: Path) -> None:
    """No path escapes, no more is made than the files hold, and what is none is said to be none."""
    path = tmp_path / "run" / "step-4.ckpt"
    save(path, *alone)
    true = torch.load(path, weights_only=True)
    (name,) = true["shards"]["files"]
    about = true["shards"]["files"][name]
    large = torch.empty(1 << 40, device="meta")
    for change, told in (
        ({"shards": {"folder": "../run/step-4.shards-1", "files": {}}}, "no plain names"),
        ({"shards": {"folder": "step-4.shards-1", "files": {"../x": about}}}, "no plain names"),
        ({"shards": {"folder": "..", "files": {}}}, "no plain names"),
        ({"shards": {"folder": "step-4.shards-1", "files": {name: "size"}}}, "not readable"),
        ({"shards": {"files": {}}}, "not readable"),
        ({"shards": 3}, "not readable"),
        ({"state_dict": {"x": large}}, "its tensors have"),
        ({"state_dict": {"model.vector": torch.empty(9, device="meta")}}, "not readable as shares"),
        ({"state_dict": {"other": torch.empty(2, device="meta")}}, "not readable as shares"),
        ({"state_dict": {"model.vector": torch.empty(7, device="meta").long()}}, "not readable as shares"),
    ):
        torch.save({**true, **change}, path)
        with pytest.raises(CheckpointError, match=told):
            read_checkpoint(path)


# --- several processes


def save_as_rank(folder: Path) -> None:
    count = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=count)
    group = dist.new_group(backend="gloo")
    save(folder / "shares.ckpt", group, init_device_mesh("cpu", (count,)))
    save(folder / "hybrid.ckpt", group, init_device_mesh("cpu", (count, 1)), [Replicate(), Shard(0)])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    try:  # on rank 0, which writes the checkpoint
        with _as_write_errors():
            sharded.begin_saving(
                checkpoint(init_device_mesh("cpu", (count,))), folder / "shares.ckpt", full, group
            ).result()
    except WriteError as error:
        (folder / f"{dist.get_rank()}.error").write_text(str(error))
    dist.destroy_process_group()


def load_as_rank(folder: Path) -> None:
    count = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=count)
    mesh = init_device_mesh("cpu", (count,))
    own = checkpoint(mesh)
    like = {name: x for section in sharded.SECTIONS for name, *_, x in sharded._each(own[section], section)}
    for kind in ("shares", "hybrid"):
        path = folder / f"{kind}.ckpt"
        found = read_checkpoint(path, shares=())
        sharded.fill_shares(found, folder / found["shards"]["folder"], like.__getitem__)
        for section in sharded.SECTIONS:
            places = {name: x for name, *_, x in sharded._each(found[section], section)}
            assert places.keys() <= like.keys()
            for name, x in places.items():
                local = like[name].to_local() if isinstance(like[name], DTensor) else like[name]
                assert (x.to_local() if isinstance(x, DTensor) else x).equal(local), name
    dist.destroy_process_group()


@pytest.mark.slow
def test_any_number_of_ranks_reads_what_others_saved(tmp_path: Path) -> None:
    run_ranks(save_as_rank, tmp_path, count=2)
    assert len(list((tmp_path / "shares.shards-1").iterdir())) == 2
    for kind in ("shares", "hybrid"):
        assert_same(read_checkpoint(tmp_path / f"{kind}.ckpt"), checkpoint(None))
    for rank in (0, 1):
        assert "No space left on device" in (tmp_path / f"{rank}.error").read_text()
    for count in (1, 2, 3):
        run_ranks(load_as_rank, tmp_path, count=count)
