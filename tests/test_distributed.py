"""Two processes train as one does: gradients, weights, shards, resume, FSDP2. Gloo on loopback, CPU.

Run as a script this file is one of the two ranks, so that nothing but files is shared with the tests.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import shards_util
import test_vision
import tiny
import torch
import torch.distributed as dist
from lightning import Trainer
from megatron.energon import WorkerConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lit_eemllm.config import load_config, to_yaml
from lit_eemllm.config.keys import Config
from lit_eemllm.console import metrics_files
from lit_eemllm.data import module as data_module
from lit_eemllm.errors import CheckpointError, ConfigError
from lit_eemllm.evaluation.run import load
from lit_eemllm.layout import PackedBatch
from lit_eemllm.model import EEMLLM
from lit_eemllm.training import fit as fit_module
from lit_eemllm.training.checkpoint import read_checkpoint, refuse_changes
from lit_eemllm.training.fit import fit, make_trainer
from lit_eemllm.training.fsdp2 import FSDP2, shard, shared_out
from lit_eemllm.training.module import LitEEMLLM, rng_state
from lit_eemllm.training.runlog import RunLog
from lit_eemllm.training.tuning import parameter_groups

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # several processes, one after the other, on few cores

LORA = ("optim.tuning.llm=lora", "optim.lora.r=4", "optim.lora.alpha=4", "optim.lora.dropout=0")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {  # name -> mechanism, configuration
    "ee_mllm": ("ee_mllm", ()),
    "llava": ("llava", ()),
    "naavit": ("naavit", ()),
    "saisa": ("saisa", ()),
    "vica": ("vica", ()),
    "flamingo": ("flamingo", ()),
    "vision": ("ee_mllm", ("optim.tuning.vision=full",)),
    "lora": ("ee_mllm", (*LORA, "optim.tuning.vision=lora")),
    "recomputed lora": ("llava", (*LORA, "optim.activation_checkpointing=true")),
    "projector": ("llava", ("optim.tuning.llm=frozen",)),
    "many sizes": ("ee_mllm", ("optim.tuning.vision=full", "optim.vision_layer_decay=0.5")),
    "tiles": ("saisa", ("optim.tuning.vision=lora", *LORA[1:])),
}
ENCODERS = {"many sizes": "siglip2", "tiles": "anyres"}
SIZES = [(40, 20), (9, 30), (5, 5), (64, 17)]
# Each has a part or a batch that is shared out as no other is; naavit, vica and llava have what ee_mllm has.
SHARED = ("ee_mllm", "saisa", "flamingo", "vision", "recomputed lora", "many sizes", "tiles")
MIXED = ("ee_mllm", "saisa", "flamingo", "vision", "recomputed lora", "lora")
# Packs of every step, [micro-batch][rank], as documents of run lengths (0 an image). They are uneven, ranks lack images in
# turn, and once all do.
STEPS: list[list[list[list[list[int]]]]] = [
    [[[[3, 0, 4], [5]], [[9]]], [[[2, 0, 1, 0, 3]], [[0, 6], [1, 0, 2]]]],
    [[[[7]], [[4, 0, 8], [2, 0, 2], [12]]], [[[3]], [[0, 2]]]],
    [[[[5], [4]], [[3]]], [[[30]], [[2]]]],
    [[[[1, 0, 5]], [[0, 9]]], [[[6]], [[2, 0, 20]]]],
    [[[[2, 0, 3]], [[0, 0, 5]]], [[[4, 0, 4]], [[8]]]],
]


class Probe(LitEEMLLM):
    """Keeps the gradients of the first step, all losses, and the bytes of 16-bit copies of the decoder layers' matrices that
    the first pass has left for its backward; with `sgd` it is trained by plain SGD, unclipped."""

    def __init__(self, *args: Any, sgd: bool) -> None:
        super().__init__(*args)
        self.sgd, self.losses, self.gradients, self.copies = sgd, [], {}, 0
        layers = self.model.language_model.model.layers
        self.narrow = [p.detach().bfloat16() for p in layers.parameters() if p.ndim == 2 and p.any()]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
            loss = super().training_step(batch, batch_idx)
        for x in saved if not batch_idx else ():
            if x.dtype == torch.bfloat16 and x.untyped_storage().nbytes() and x.ndim == 2:  # none where FSDP2 freed it
                self.copies += x.nbytes * any(x.equal(w) or x.t().equal(w) for w in self.narrow)
        return loss

    def configure_optimizers(self) -> Any:
        if not self.sgd:
            return super().configure_optimizers()
        return torch.optim.SGD([{**g, "lr": 0.02} for g in parameter_groups(self.model, self.config.optim)])

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self.losses.append(self.step.mean_loss.item())
        if not self.gradients:
            some = {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}
            assert all(gradient is not None for gradient in some.values())
            self.gradients = {name: whole(gradient).clone() for name, gradient in some.items()}
        super().configure_gradient_clipping(*args, **kwargs)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def packed(model: EEMLLM, documents: list[list[int]], seed: int) -> PackedBatch:
    if model.vision.transform.fixed:
        return tiny.pack(documents, seed)
    sizes = iter(SIZES[seed % 4 :] + SIZES)
    return test_vision.pack(model, [[run or next(sizes) for run in document] for document in documents], seed)


def train(
    folder: Path, case: str, rank: int | None = None, strategy: Any = "auto", sgd: bool = True, mixed: bool = False,
    accelerator: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Five steps on STEPS: as one of two ranks, or alone on the packs of both. `mixed` with bfloat16: frozen parts are in it,
    and what FSDP2 would gather in it begins with values that it holds."""
    preset, more = CASES[case]
    if mixed:
        more = (*more, "trainer.precision=bf16-mixed", "model.dtype=bfloat16")
    model = tiny.model(mechanism=preset, encoder=ENCODERS.get(case, "clip"))
    steps = [[[packed(model, docs, 7 * s + 3 * m + r) for r, docs in enumerate(ranks)] for m, ranks in enumerate(micros)]
             for s, micros in enumerate(STEPS)]  # fmt: skip
    packs = [pack for step in steps for ranks in step for r, pack in enumerate(ranks) if rank in (None, r)]
    config = tiny.config(folder, "unused", folder, "optim.max_steps=5", "optim.clip_grad_norm=null", *more)
    module = Probe(model, config, sgd=sgd)
    for parameter in [p for part in shared_out(module.model) for p in part.parameters() if mixed]:
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    trainer = Trainer(
        max_steps=5, accumulate_grad_batches=len(packs) // 5, accelerator=accelerator, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        devices=1 if rank is None else 2, strategy=strategy, precision="bf16-mixed" if mixed else None,
    )  # fmt: skip
    trainer.fit(module, DataLoader(packs, batch_size=None))
    weights = {name: whole(p.detach()).clone() for name, p in module.model.named_parameters() if p.requires_grad}
    found = {"gradients": module.gradients, "weights": weights, "losses": module.losses, "copies": module.copies}
    return {**found, "narrow": sum(x.nbytes for x in module.narrow)}


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


def main(verb: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # see tests/conftest.py
    rank = int(os.environ["LOCAL_RANK"])
    if verb == "train":
        folder = Path(arguments[0])
        result: dict[str, Any] = {case: train(folder, case, rank, "ddp") for case in CASES}
        for case in SHARED:
            result[f"{case}, fsdp2"] = train(folder, case, rank, FSDP2(), sgd=False)
        result["ee_mllm, offloaded"] = train(folder, "ee_mllm", rank, FSDP2(offload=True), sgd=False)
        for case in MIXED:
            result[f"{case}, mixed"] = train(folder, case, rank, FSDP2(), sgd=False, mixed=True)
        torch.save(result, folder / f"{rank}.pt")
    elif verb == "gpu":
        folder, kind = Path(arguments[0]), arguments[1]
        done = train(folder, "ee_mllm", None, FSDP2(offload=kind == "offloaded"), sgd=False, accelerator="gpu")
        devices = {x.device.type for x in done["weights"].values()}
        torch.save({"losses": done["losses"], "devices": devices}, folder / f"{kind}.pt")
    elif verb == "fit":
        for file in arguments:
            logged_fit(load_config([Path(file)], []))
    else:
        raise ValueError(verb)


def start_ranks(*arguments: object, timeout: float = 600, count: int = 2) -> None:
    """This file as ranks 0 and 1, or as so many, until all have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "WORLD_SIZE": str(count), "NODE_RANK": "0", "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}  # fmt: skip
    command = [sys.executable, __file__, *map(str, arguments)]
    processes = [
        subprocess.Popen(command, env={**environment, "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
        for rank in range(count)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=timeout)[0][-3000:] for process in processes]
        assert [process.returncode for process in processes] == [0] * count, "\n\n".join(said)
    finally:
        for process in processes:
            process.kill()


# --- one step of two ranks is one step ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks got."""
    folder = tmp_path_factory.mktemp("trained")
    start_ranks("train", folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def assert_close(found: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> None:
    largest = max(tensor.abs().max() for tensor in true.values())
    for name, tensor in true.items():
        assert (found[name] - tensor).abs().max() <= 1e-5 * max(1.0, largest), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What one process gets with the packs of both; trained once each."""
    return functools.cache(functools.partial(train, tmp_path_factory.mktemp("alone")))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process_with_both_their_packs(trained: list[dict[str, Any]], alone: Any, case: str) -> None:
    """DDP, accumulating, no unused parameters: gradients and, after five SGD steps, weights; equal on both ranks."""
    true = alone(case)
    for found in (results[case] for results in trained):
        for kind in ("gradients", "weights"):
            assert found[kind].keys() == true[kind].keys() and found[kind]
            assert_close(found[kind], true[kind])
        assert found["losses"] == pytest.approx(true["losses"], rel=1e-5)
    for kind in ("gradients", "weights"):
        assert all(trained[0][case][kind][name].equal(x) for name, x in trained[1][case][kind].items())


@pytest.mark.parametrize("case", SHARED)
def test_fsdp2_trains_as_one_process(trained: list[dict[str, Any]], alone: Any, case: str) -> None:
    true = alone(case, sgd=False)
    for found in (results[f"{case}, fsdp2"] for results in trained):
        assert found["losses"] == pytest.approx(true["losses"], rel=1e-4)
        assert_close(found["gradients"], true["gradients"])


def same_bits(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["losses"] == b["losses"] and all(x.equal(b["weights"][name]) for name, x in a["weights"].items())


def test_offloading_takes_the_same_steps(trained: list[dict[str, Any]]) -> None:
    """On a CPU, where there is nothing to move."""
    for results in trained:
        assert same_bits(results["ee_mllm, offloaded"], results["ee_mllm, fsdp2"])


def test_offloaded_shares_stay_when_the_rest_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the device "meta", as a GPU's stand-in."""
    monkeypatch.setattr(FSDP2, "root_device", torch.device("meta"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for offload in (True, False):
            module = LitEEMLLM(tiny.model(), tiny.config(tmp_path, "unused", tmp_path))
            shard(module.model, init_device_mesh("cpu", (1,)), None, offload)
            states = [part._get_fsdp_state() for part in (*shared_out(module.model), module.model)]
            shares = [share for state in states for group in state._fsdp_param_groups for share in group.fsdp_params]
            assert len(shares) > 20 and {share.offload_to_cpu for share in shares} == {offload}
            strategy = FSDP2(offload)
            strategy.model = module
            strategy.model_to_device()
            assert {x.device.type for x in module.parameters()} == {"cpu" if offload else "meta"}
            moved = [*module.buffers(), module.val_loss.mean_value]
            assert len(moved) > 1 and {x.device.type for x in (*moved, module)} == {"meta"}
        strategy.offload = True
        module.model.register_buffer("mean", torch.ones(2))
        with pytest.raises(ConfigError, match="1 saved buffers, such as mean"):
            strategy.model_to_device()
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
def test_shares_on_a_gpu(tmp_path: Path) -> None:
    """One process each: the same losses; offloaded weights are in main memory after the steps."""
    found = {}
    for kind in ("shared", "offloaded"):
        start_ranks("gpu", tmp_path, kind, count=1)
        found[kind] = torch.load(tmp_path / f"{kind}.pt")
        assert found[kind]["devices"] == {"cpu" if kind == "offloaded" else "cuda"}
        assert found[kind]["losses"] == pytest.approx(found["shared"]["losses"], rel=1e-4)


@pytest.mark.parametrize("case", MIXED)
def test_fsdp2_in_16_bits_computes_as_autocast(trained: list[dict[str, Any]], alone: Any, case: str) -> None:
    """Layers' weights come in bfloat16, so nothing copies them, and at first, when they hold all of it, matrices have the very
    gradients that autocast gives one process; a norm's is rounded in each pass, by one part in 2^9 at most. Flamingo's own
    parts round the inputs of their norms too: they must not be further from autocast than autocast is from float32. Later,
    AdamW blows all this up."""
    auto = alone(case, sgd=False, mixed=True)
    assert case == "recomputed lora" or auto["copies"] >= auto["narrow"], "the count sees autocast's"

    def apart(a: dict[str, Any], b: dict[str, Any]) -> torch.Tensor:
        x, y = (torch.cat([found["gradients"][name].flatten() for name in auto["gradients"]]) for found in (a, b))
        return (x - y).norm() / y.norm()

    for found in (results[f"{case}, mixed"] for results in trained):
        assert found["copies"] == 0 and {x.dtype for x in found["weights"].values()} == {torch.float32}
        assert found["losses"] == pytest.approx(auto["losses"], rel=3e-2)
        if case == "flamingo":
            assert apart(found, auto) < apart(auto, alone(case, sgd=False)) < 0.05
            continue
        assert found["losses"][0] == pytest.approx(auto["losses"][0], rel=1e-6)
        for name, gradient in auto["gradients"].items():
            limit = 1e-6 if gradient.ndim > 1 else 2**-8
            assert (found["gradients"][name] - gradient).abs().max() <= limit * gradient.abs().max(), name


def test_other_strategies_are_refused(tmp_path: Path) -> None:
    for name in ("deepspeed", "deepspeed_stage_2", "fsdp", "fsdp_cpu_offload", "zero2", "ddp_spawn"):
        config = tiny.config(tmp_path, "unused", tmp_path, f"trainer.strategy={name}")
        with pytest.raises(
            ConfigError, match=rf"'{name}', expected auto or ddp or fsdp2 or .*ZeRO and FSDP1: trainer\.strategy=fsdp2 "
        ):
            make_trainer(config, RunLog(config))
    config = tiny.config(tmp_path, "unused", tmp_path, "trainer.strategy=fsdp2", "trainer.devices=2")
    trainer = make_trainer(config, RunLog(config))
    assert isinstance(trainer.strategy, FSDP2) and trainer.world_size == 2 and not trainer.strategy.offload
    config = tiny.config(tmp_path, "unused", tmp_path, "trainer.strategy=fsdp2_offload", "trainer.devices=2")
    strategy = make_trainer(config, RunLog(config)).strategy
    assert isinstance(strategy, FSDP2) and strategy.offload


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
    script = Path(__file__).resolve().parents[1] / "tools" / "slurm.sh"
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

    start_ranks(
        "fit",
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


if __name__ == "__main__":
    main(*sys.argv[1:])
