"""Two processes train as one does: gradients, weights, FSDP2. Gloo on loopback, CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from lib import connectors, vision, vlms
from lib.processes import run_ranks
from lightning import Trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lit_eemllm.errors import ConfigError
from lit_eemllm.layout import PackedBatch
from lit_eemllm.mechanisms.connectors import DEFAULT
from lit_eemllm.model import EEMLLM
from lit_eemllm.training.fit import make_trainer
from lit_eemllm.training.fsdp2 import FSDP2, shard, shared_out
from lit_eemllm.training.module import LitEEMLLM
from lit_eemllm.training.runlog import RunLog
from lit_eemllm.training.tuning import parameter_groups

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # several processes, one after the other, on few cores

LORA = ("optim.tuning.llm=lora", "optim.lora.r=4", "optim.lora.alpha=4", "optim.lora.dropout=0")
SCHEDULE = (
    "optim.mechanisms=[{steps: 1-2, mechanism: {rows: [{layers: 0-, tokens: every 2}]}, teacher: {}, kl: 2}, "
    "{steps: 3, mechanism: {preset: naavit}}, {steps: 4-, teacher: {preset: ee_mllm}, temperature: 2}]"
)
CASES: dict[str, tuple[str, tuple[str, ...]]] = {  # name -> mechanism, configuration
    "ee_mllm": ("ee_mllm", ()),
    "llava": ("llava", ()),
    "naavit": ("naavit", ()),
    "saisa": ("saisa", ()),
    "vica": ("vica", ()),
    "flamingo": ("flamingo", ()),
    "casa": ("casa", ("optim.activation_checkpointing=true",)),
    "visual_experts": ("visual_experts", ()),
    "p_mod": ("p_mod", ("optim.activation_checkpointing=true",)),
    "vision": ("ee_mllm", ("optim.tuning.vision=full",)),
    "lora": ("ee_mllm", (*LORA, "optim.tuning.vision=lora")),
    "recomputed lora": ("llava", (*LORA, "optim.activation_checkpointing=true")),
    "taught": ("llava", ("model.mechanism.preset=llava", *LORA, "optim.activation_checkpointing=true", SCHEDULE)),
    "compiled": ("llava", (*LORA, "model.compile=true", "optim.activation_checkpointing=true")),
    "projector": ("llava", ("optim.tuning.llm=frozen",)),
    "many sizes": ("ee_mllm", ("optim.tuning.vision=full", "optim.vision_layer_decay=0.5")),
    "tiles": ("saisa", ("optim.tuning.vision=lora", *LORA[1:])),
    "pixel_shuffle": ("ee_mllm", ()),
    "attention": ("saisa", ("optim.tuning.llm=frozen",)),
    "olmo2": ("ee_mllm", ()),
    "smollm3": ("ee_mllm", ()),
    "gemma3_text": ("ee_mllm", ()),
    "llama4_text": ("ee_mllm", ()),
    "internvl": ("ee_mllm", ("optim.tuning.vision=lora", "optim.tuning.projector=lora", *LORA)),
    "qwen3_vl": ("llava", ("optim.tuning.vision=full",)),
    "qwen2_5_vl": ("ee_mllm", ("optim.tuning.projector=lora", *LORA)),
    "idefics3": ("vica", ("optim.tuning.vision=full",)),
    "llava_onevision": ("ee_mllm", ("optim.activation_checkpointing=true",)),
}
ENCODERS = {"many sizes": "siglip2", "tiles": "anyres", "pixel_shuffle": "siglip2", "attention": "anyres"}
FAMILIES = ("internvl", "qwen3_vl", "qwen2_5_vl", "idefics3", "llava_onevision")
SIZES = [(40, 20), (9, 30), (5, 5), (64, 17)]
# Each has a part or a batch that is shared out as no other is; naavit, vica and llava have what ee_mllm has.
SHARED = (
    "ee_mllm",
    "saisa",
    "flamingo",
    "casa",
    "visual_experts",
    "p_mod",
    "vision",
    "recomputed lora",
    "taught",
    "compiled",
    "many sizes",
    "tiles",
    "pixel_shuffle",
    "attention",
    "olmo2",
    "smollm3",
    "gemma3_text",
    "llama4_text",
    *FAMILIES,
)
MIXED = (
    "ee_mllm", "saisa", "flamingo", "visual_experts", "vision", "recomputed lora", "taught", "lora", "pixel_shuffle", "smollm3",
    "qwen3_vl",
)  # fmt: skip
ROUNDED = {"flamingo": 0.05, "pixel_shuffle": 0.1, "qwen3_vl": 0.05}  # how far autocast may be from float32
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
        if batch_idx == 1:  # of two that are accumulated
            self.summed = {p.grad is not None for p in self.model.parameters() if p.requires_grad}
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
    return vision.pack(model, [[run or next(sizes) for run in document] for document in documents], seed)


def train(
    folder: Path, case: str, rank: int | None = None, strategy: Any = "auto", sgd: bool = True, mixed: bool = False,
    accelerator: str = "cpu", nodes: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Five steps on STEPS: as one of two ranks, or alone on the packs of both. `mixed` with bfloat16: frozen parts are in it,
    and what FSDP2 would gather in it begins with values that it holds."""
    preset, more = CASES[case]
    if mixed:
        more = (*more, "trainer.precision=bf16-mixed", "model.dtype=bfloat16")
    decoder = case if case in tiny.DECODERS else "llama-gqa"
    connector = connectors.case(case) if case in connectors.CASES else DEFAULT
    if case in FAMILIES:
        model = vlms.model_of(folder / case, preset)
    else:
        model = tiny.model(decoder, preset, encoder=ENCODERS.get(case, "clip"), connector=connector)
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
        devices=1 if rank is None else 2 // nodes, num_nodes=nodes, strategy=strategy, precision="bf16-mixed" if mixed else None,
    )  # fmt: skip
    trainer.fit(module, DataLoader(packs, batch_size=None))
    weights = {name: whole(p.detach()).clone() for name, p in module.model.named_parameters() if p.requires_grad}
    found = {
        "gradients": module.gradients,
        "weights": weights,
        "losses": module.losses,
        "copies": module.copies,
        "summed": module.summed,
    }
    return {**found, "narrow": sum(x.nbytes for x in module.narrow)}


def train_as_rank(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    result: dict[str, Any] = {case: train(folder, case, rank, "ddp") for case in CASES}
    for case in SHARED:
        result[f"{case}, fsdp2"] = train(folder, case, rank, FSDP2(), sgd=False)
    os.environ |= {"NODE_RANK": str(rank), "LOCAL_RANK": "0"}  # two nodes, as far as Lightning knows
    result["lora, hybrid"] = train(folder, "lora", rank, FSDP2(hybrid=True), sgd=False, nodes=2)
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    result["ee_mllm, offloaded"] = train(folder, "ee_mllm", rank, FSDP2(offload=True), sgd=False)
    for case in MIXED:
        result[f"{case}, mixed"] = train(folder, case, rank, FSDP2(), sgd=False, mixed=True)
    torch.save(result, folder / f"{rank}.pt")


def train_on_gpu(folder: Path, kind: str) -> None:
    done = train(folder, "ee_mllm", None, FSDP2(offload=kind == "offloaded"), sgd=False, accelerator="gpu")
    devices = {x.device.type for x in done["weights"].values()}
    torch.save({"losses": done["losses"], "devices": devices}, folder / f"{kind}.pt")


# --- one step of two ranks is one step ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks got."""
    folder = tmp_path_factory.mktemp("trained")
    for name in FAMILIES:
        vlms.write(name, folder / name)
    run_ranks(train_as_rank, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def assert_close(found: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> None:
    largest = max(tensor.abs().max() for tensor in true.values())
    for name, tensor in true.items():
        assert (found[name] - tensor).abs().max() <= 1e-5 * max(1.0, largest), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What one process gets with the packs of both; trained once each."""
    folder = tmp_path_factory.mktemp("alone")
    for name in FAMILIES:
        vlms.write(name, folder / name)
    return functools.cache(functools.partial(train, folder))


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


def test_every_node_may_have_all_weights(trained: list[dict[str, Any]], alone: Any) -> None:
    true = alone("lora", sgd=False)
    for found in (results["lora, hybrid"] for results in trained):
        assert found["losses"] == pytest.approx(true["losses"], rel=1e-4)
        assert_close(found["gradients"], true["gradients"])


def test_gradients_are_summed_over_ranks_once_a_step_unless_they_are_large(trained: list[dict[str, Any]]) -> None:
    """Before, a rank has no share of them."""
    for results in trained:
        assert results["recomputed lora, fsdp2"]["summed"] == {False} and results["ee_mllm, fsdp2"]["summed"] == {True}


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
        run_ranks(train_on_gpu, tmp_path, kind, count=1)
        found[kind] = torch.load(tmp_path / f"{kind}.pt")
        assert found[kind]["devices"] == {"cpu" if kind == "offloaded" else "cuda"}
        assert found[kind]["losses"] == pytest.approx(found["shared"]["losses"], rel=1e-4)


@pytest.mark.parametrize("case", MIXED)
def test_fsdp2_in_16_bits_computes_as_autocast(trained: list[dict[str, Any]], alone: Any, case: str) -> None:
    """Layers' weights come in bfloat16, so nothing copies them, and at first, when they hold all of it, matrices have the very
    gradients that autocast gives one process; a norm's is rounded in each pass, by one part in 2^9 at most. Flamingo's own
    parts and a connector's round the inputs of their norms too: they must not be further from autocast than autocast is from float32.
    Later, AdamW blows all this up."""
    auto = alone(case, sgd=False, mixed=True)
    assert case in ("recomputed lora", "taught") or auto["copies"] >= auto["narrow"], "the count sees autocast's"

    def apart(a: dict[str, Any], b: dict[str, Any]) -> torch.Tensor:
        x, y = (torch.cat([found["gradients"][name].flatten() for name in auto["gradients"]]) for found in (a, b))
        return (x - y).norm() / y.norm()

    for found in (results[f"{case}, mixed"] for results in trained):
        assert found["copies"] == 0 and {x.dtype for x in found["weights"].values()} == {torch.float32}
        assert found["losses"] == pytest.approx(auto["losses"], rel=3e-2)
        if case in ROUNDED:
            assert apart(found, auto) < apart(auto, alone(case, sgd=False)) < ROUNDED[case]
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
