"""Runs of two processes go on as they were, or as one does: data, generators, checkpoints, FSDP2. Gloo on loopback, CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import shards_util
import tiny
import torch
from lib.processes import run_ranks
from megatron.energon import WorkerConfig

from lit_eemllm.config import load_config, to_yaml
from lit_eemllm.config.keys import Config
from lit_eemllm.console import metrics_files
from lit_eemllm.data import module as data_module
from lit_eemllm.errors import CheckpointError
from lit_eemllm.evaluation.run import load
from lit_eemllm.training import fit as fit_module
from lit_eemllm.training.checkpoint import read_checkpoint, refuse_changes
from lit_eemllm.training.fit import fit
from lit_eemllm.training.module import LitEEMLLM, rng_state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # several processes, one after the other, on few cores


class Logged(LitEEMLLM):
    """Writes down the samples of each pack."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with (Path(self.config.out) / f"keys-{self.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([self.global_step + 1, batch.keys]) + "\n")
        return super().training_step(batch, batch_idx)


def logged_fit(config: Config) -> None:
    """`fit`, which also notes the samples of each step."""
    Path(config.out).mkdir(parents=True, exist_ok=True)
    fit_module.LitEEMLLM = Logged  # type: ignore[misc]
    try:
        fit(config)
    finally:
        fit_module.LitEEMLLM = LitEEMLLM  # type: ignore[misc]


def fit_as_rank(*files: Path) -> None:
    for file in files:
        logged_fit(load_config([file], []))


# --- data: ranks x workers ---


@pytest.fixture
def as_ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Data modules that believe to be one of several ranks."""

    def make(rank: int, ranks: int, *args: Any, **config: Any) -> data_module.ShardDataModule:
        real = WorkerConfig
        data = shards_util.module(*args, **config)

        def worker_config(workers: int, seed: int) -> WorkerConfig:
            made = true_config(workers, seed)
            return real(rank=rank, world_size=ranks, num_workers=workers, seed_offset=seed,
                        global_error_handler=made.global_error_handler, restore_error_handler=made.restore_error_handler)  # fmt: skip

        def as_rank(function: Any) -> Any:
            def call(*arguments: Any) -> Any:
                monkeypatch.setattr(data_module, "worker_config", worker_config)
                return function(*arguments)

            return call

        for name in ("train_dataloader", "load_state_dict", "state_dict"):
            setattr(data, name, as_rank(getattr(data, name)))
        return data

    true_config = data_module.worker_config
    return make


def rounds(modules: list[Any], number: int) -> list[set[str]]:
    """The batches of so many rounds, in which every worker of every rank delivers once."""
    workers = modules[0].config.workers
    streams = [map(shards_util.fingerprint, module.train_dataloader()) for module in modules]
    found = [[list(islice(stream, workers)) for stream in streams] for _ in range(number)]
    return [{batch for rank in each for batch in rank} for each in found]


def saved(modules: list[Any]) -> dict[str, Any]:
    """What two ranks would gather."""
    states = [module.state_dict() for module in modules]
    return {"shape": states[0]["shape"], "ranks": [state["ranks"][0] for state in states]}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A blend of a folder with images and one without."""
    folder = tmp_path_factory.mktemp("shards")
    for name, count, images in (("a", 50, 1), ("b", 30, 0)):
        rows = [shards_util.row(i + 100 * images, images) for i in range(count)]
        shards_util.write_shards(folder / name, {"train": rows, "val": rows[:4]}, shard_size=7)
    return shards_util.blend(folder, {"a": 2, "b": 1})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 1), (1, 2)),
        ((1, 2), (2, 1)),
        ((2, 2), (1, 4)),
        ((1, 4), (4, 1)),
    ],
    ids=str,
)
def test_the_same_workers_on_another_number_of_ranks_go_on(
    shards: Path, as_ranks: Any, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """Same global batches from the start, and after a checkpoint that the other layout has saved; tensors and all."""
    layouts = {}
    for ranks, workers in (before, after):
        layouts[ranks] = [as_ranks(rank, ranks, shards, workers=workers) for rank in range(ranks)]
    unbroken = rounds(layouts[after[0]], 6)
    assert rounds(layouts[before[0]], 3) == unbroken[:3] and len(set.union(*unbroken)) == 6 * before[0] * before[1]
    state = json.loads(json.dumps(saved(layouts[before[0]])))
    again = [as_ranks(rank, after[0], shards, workers=after[1]) for rank in range(after[0])]
    for module in again:
        module.load_state_dict(state)
    assert rounds(again, 3) == unbroken[3:]
    assert saved(again)["ranks"][0]["batches"] == 6 * after[1]


def test_another_number_of_workers_in_all_is_refused(shards: Path, as_ranks: Any) -> None:
    two = [as_ranks(rank, 2, shards, workers=1) for rank in range(2)]
    rounds(two, 1)
    state = saved(two)
    for ranks, workers in ((1, 1), (1, 3), (4, 1), (1, 0)):
        match = f"ranks was 2 and is {ranks}.*2 ranks x 1 workers, this is {ranks} ranks x {workers} workers; ranks x workers"
        with pytest.raises(CheckpointError, match=match):
            as_ranks(0, ranks, shards, workers=workers).load_state_dict(state)
    with pytest.raises(CheckpointError, match="seed was 0 and is 3"):  # and nothing else may change
        as_ranks(0, 1, shards, workers=2, seed=3).load_state_dict(state)
    one = as_ranks(0, 1, shards, workers=2)
    one.trainer = SimpleNamespace(accumulate_grad_batches=3)
    with pytest.raises(CheckpointError, match=r"multiple of data\.workers, found 3 and 2"):
        one.load_state_dict(state)
    odd = as_ranks(0, 1, shards, workers=2)
    list(islice(odd.train_dataloader(), 3))
    with pytest.raises(CheckpointError, match="as many packs of each worker"):
        as_ranks(0, 2, shards, workers=1).load_state_dict(odd.state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_disjoint_and_complete_over_ranks_and_workers(shards: Path, as_ranks: Any, workers: int) -> None:
    """Unshuffled, unpacked, one folder: a pass over the data is every sample once. 50 samples over 3 ranks are uneven."""
    options: dict[str, Any] = dict(workers=workers, shuffle_buffer=0, packing_buffer=1, pack_samples=1)
    passes = []
    for rank in range(3):
        loader = as_ranks(rank, 3, shards.parent / "a", **options).train_dataloader()
        seen: list[str] = []
        for batch in loader:
            if batch.keys[0] in seen:
                break
            seen += batch.keys
        passes.append(seen)
    every = sorted(key for seen in passes for key in seen)
    assert len(every) == len(set(every)), "disjoint"
    if workers == 0:
        assert len(every) == 50 and {len(seen) for seen in passes} == {16, 17}
    else:  # the first worker to end its share begins anew while the other has one left
        assert 50 - 3 <= len(every) <= 50


# --- many machines ---


def test_the_script_starts_as_many_processes_as_there_are_devices(tmp_path: Path) -> None:
    """tools/slurm.sh with a `srun` and a python that only say how they were called."""
    script = Path(__file__).resolve().parents[2] / "tools" / "slurm.sh"
    for name in ("srun", "python"):
        file = tmp_path / name
        file.write_text(f'#!/bin/bash\necho {name} "$@"\n')
        file.chmod(0o755)

    def said(*arguments: str, **variables: str) -> str:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "NNODES", "MASTER", "NODE_RANK"))}
        environment = {
            **clean,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "python"),
            **variables,
        }
        return subprocess.run([script, *arguments], env=environment, capture_output=True, text=True).stdout.strip()

    python, fit_verb = tmp_path / "python", "-m lit_eemllm fit a.yaml out=x trainer.devices=8 trainer.num_nodes="
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    assert said("a.yaml", "out=x", **slurm) == (
        f"srun --nodes=2 --ntasks-per-node=8 --kill-on-bad-exit=1 {python} {fit_verb}2"
    )
    run = "python -m torch.distributed.run --nproc-per-node=8"
    assert said("a.yaml", "out=x", PER_NODE="8") == f"{run} --standalone {fit_verb}1"
    machines = {"NNODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "host0", "PER_NODE": "8"}
    where = "--nnodes=3 --node-rank=1 --master-addr=host0 --master-port=29500"
    assert said("a.yaml", "out=x", **machines) == f"{run} {where} {fit_verb}3"
    assert said("a.yaml", NNODES="2", PER_NODE="8") == said() == ""  # which machine? what to train?


# --- runs ---


def settings(parts: Path, data: Path, out: Path, ranks: int, *more: str) -> Config:
    """Two loader workers in all and four packs a step, on one rank or two."""
    layout = (f"data.workers={2 // ranks}", f"trainer.accumulate_grad_batches={4 // ranks}", f"trainer.devices={ranks}")
    options = ("optim.val_every=10", *(("trainer.strategy=ddp",) * (ranks == 2)))
    return tiny.config(parts, data, out, *layout, *options, *more)


def steps_of(run: Path) -> dict[int, list[str]]:
    """step -> keys of all its packs, sorted; of the last attempt."""
    found: dict[int, list[str]] = {}
    for file in run.glob("keys-*.jsonl"):
        mine: dict[int, list[str]] = {}
        previous = 0
        for step, keys in map(json.loads, file.read_text().splitlines()):
            if step < previous:
                mine = {s: k for s, k in mine.items() if s < step}
            mine.setdefault(step, []).append(",".join(keys))
            previous = step
        for step, packs in mine.items():
            found[step] = sorted(found.get(step, []) + packs)
    return found


def losses(run: Path) -> dict[int, float]:
    import csv

    rows = {}
    for file in metrics_files(run):
        with file.open() as lines:
            rows |= {int(row["step"]): float(row["loss"]) for row in csv.DictReader(lines) if row["loss"]}
    return rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, parts: Path, shapes: Path) -> SimpleNamespace:
    """Runs of 20 steps by name: `one` process, `two` ranks, two ranks `cut` by SIGKILL and resumed, and others that begin
    at a checkpoint of one of these after ten steps."""
    folder = tmp_path_factory.mktemp("runs")

    def write(name: str, ranks: int, *more: str) -> Path:
        file = folder / f"{name}.yaml"
        file.write_text(to_yaml(settings(parts, shapes, folder / name, ranks, *more)))
        return file

    logged_fit(settings(parts, shapes, folder / "one", 1))
    with (folder / "output").open("w") as output:  # as a user starts it: Lightning makes the second process
        command = [sys.executable, "-m", "lit_eemllm", "fit", write("cut", 2)]
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        deadline = time.monotonic() + 120
        while not (folder / "cut" / "checkpoints" / "step-10.ckpt").is_file():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "output").read_text()
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)  # both ranks and their loaders
        process.wait()
    killed_at = max(losses(folder / "cut"))
    shared = "trainer.strategy=fsdp2"

    def after(source: str) -> str:
        return f"resume={folder / source / 'checkpoints' / 'step-10.ckpt'}"

    run_ranks(
        fit_as_rank,
        *(write("two", 2), write("cut", 2), write("one_two", 2, after("one"))),
        *(write("sharded", 2, shared), write("two_sharded", 2, shared, after("two"))),
        *(write("sharded_two", 2, after("sharded")), write("sharded_sharded", 2, shared, after("sharded"))),
    )
    for source in ("two", "sharded"):
        logged_fit(settings(parts, shapes, folder / f"{source}_one", 1, after(source)))
    return SimpleNamespace(
        folder=folder, parts=parts, data=shapes, killed_at=killed_at, output=(folder / "output").read_text()
    )


def last(run: Path) -> dict[str, Any]:
    return read_checkpoint(run / "checkpoints" / "step-20.ckpt")


def plain(value: Any) -> Any:
    """Tensors as lists of numbers, so that == compares every bit but the sign of zero."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def test_two_ranks_killed_and_resumed_equal_an_unbroken_run(runs: SimpleNamespace) -> None:
    """Weights, optimiser, schedule, generators and loaders of both ranks: bit-equal after SIGKILL."""
    assert 10 <= runs.killed_at < 20
    two, cut = (last(runs.folder / name) for name in ("two", "cut"))
    assert len(two["rng"]) == len(two["ShardDataModule"]["ranks"]) == 2
    for section in ("state_dict", "optimizer_states", "lr_schedulers", "rng"):
        assert plain(cut[section]) == plain(two[section]), section
    a, b = (losses(runs.folder / name) for name in ("cut", "two"))
    assert a == b and sorted(a) == list(range(1, 21))
    assert steps_of(runs.folder / "cut") == {s: k for s, k in steps_of(runs.folder / "two").items() if s > 10}
    assert runs.output.count("tokens per step") == 1, "one rank speaks"
    keys = [set((runs.folder / "two" / f"keys-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert len(keys[0]) == len(keys[1]) == 40 and not keys[0] & keys[1]


@pytest.mark.parametrize("name", ["two", "one_two", "two_one", "sharded", "two_sharded", "sharded_two", "sharded_one"])
def test_a_run_goes_on_with_other_ranks_and_strategies(runs: SimpleNamespace, name: str) -> None:
    """2 ranks x 1 worker against 1 rank x 2 workers, DDP, FSDP2: the same samples in each step, the same losses."""
    one, other = runs.folder / "one", runs.folder / name
    begins = 11 if "_" in name else 1
    samples, true = steps_of(other), steps_of(one)
    assert samples == {step: keys for step, keys in true.items() if step >= begins} and max(samples) == 20
    found, expected = losses(other), losses(one)
    assert sorted(found) == list(range(begins, 21))
    assert list(found.values()) == pytest.approx([expected[step] for step in found], rel=1e-4)
    a, b = last(other), last(one)
    assert a.keys() == b.keys() and a["state_dict"].keys() == b["state_dict"].keys()
    assert a["optimizer_states"][0]["state"].keys() == b["optimizer_states"][0]["state"].keys()
    for group, true_group in zip(
        a["optimizer_states"][0]["param_groups"], b["optimizer_states"][0]["param_groups"], strict=True
    ):
        assert group["params"] == true_group["params"] and group["name"] == true_group["name"]
        assert group["lr"] == pytest.approx(true_group["lr"])
    first, second = (x["optimizer_states"][0]["state"] for x in (a, b))
    assert all(first[n]["exp_avg"].shape == second[n]["exp_avg"].shape for n in first)
    progress = [x["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] for x in (a, b)]
    assert progress == [80 // len(a["rng"]), 80]


def test_shares_resumed_equal_an_unbroken_run(runs: SimpleNamespace) -> None:
    whole, resumed = (last(runs.folder / run) for run in ("sharded", "sharded_sharded"))
    for section in ("state_dict", "optimizer_states", "lr_schedulers", "rng"):
        assert plain(resumed[section]) == plain(whole[section]), section


def test_a_sharded_checkpoint_is_an_ordinary_one(runs: SimpleNamespace) -> None:
    config = settings(runs.parts, runs.data, runs.folder / "sharded", 1)
    model, _, _ = load(config, None)
    state = last(runs.folder / "sharded")["state_dict"]
    own = model.state_dict()
    assert state and all(own[name.removeprefix("model.")].equal(tensor) for name, tensor in state.items())
    assert not any(name.startswith("model.vision") for name in state), "nothing frozen"


def test_other_packs_per_step_are_refused_with_both_numbers(runs: SimpleNamespace) -> None:
    checkpoint = last(runs.folder / "two")
    config = settings(runs.parts, runs.data, runs.folder / "x", 1, "trainer.accumulate_grad_batches=2")
    with pytest.raises(CheckpointError, match="accumulate_grad_batches x ranks was 2 x 2 and is 2 x 1"):
        refuse_changes(checkpoint, config, 1)


def test_generators_of_every_rank_come_back(tmp_path: Path) -> None:
    """Each rank its own; a rank that the checkpoint lacks gets one of its own."""
    module = LitEEMLLM(tiny.model(), tiny.config(tmp_path, "unused", tmp_path))
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(rng_state())
    drawn = []
    about = {"frozen": module._frozen_fingerprint, "config": {"optim": {"max_steps": 9}}}
    for rank in range(4):
        checkpoint = {"state_dict": module._kept(module.state_dict()), "rng": states, "lit_eemllm": about}
        module.on_load_checkpoint(checkpoint)
        module._trainer = SimpleNamespace(  # type: ignore[assignment]
            world_size=1,
            global_rank=rank,
            global_step=7,
            strategy=SimpleNamespace(),
            lr_scheduler_configs=[],
            ckpt_path=None,
        )
        module.on_train_start()
        module._trainer = None
        drawn.append(torch.rand(()).item())
    for seed, found in zip((1, 2), drawn, strict=False):
        torch.manual_seed(seed)
        assert found == torch.rand(()).item()
    assert len(set(drawn)) == 4
