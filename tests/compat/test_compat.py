"""What the package uses of other libraries beyond their documentation (`lit_eemllm/compat`), each use alone.

A failure names the library, its version and what it used to be, so nothing that may be broken is imported before a contract is
checked. Every contract is also tried on a library that breaks it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

PACKAGE = Path(__file__).parents[2] / "lit_eemllm"
LIBRARIES = {
    "transformers": "transformers", "torch": "torch", "lightning": "lightning", "energon": "megatron-energon",
    "peft": "peft",
}  # fmt: skip
"""The distribution that each module of compat is about."""


@dataclass(frozen=True)
class Contract:
    """Of a library: what it used to be, a check of that, and a change of the library after which it is something else."""

    library: str
    was: str
    check: Callable[..., None]
    broken: Callable[[pytest.MonkeyPatch], None]

    def hold(self, request: pytest.FixtureRequest) -> None:
        __tracebackhide__ = True
        try:
            fixtures = inspect.signature(self.check).parameters
            self.check(*(request.getfixturevalue(name) for name in fixtures))
        except Exception as error:
            name = LIBRARIES[self.library]
            told = f"{name} {version(name)}: {self.was}. Mend lit_eemllm/compat/{self.library}.py: {error!r}"
            raise pytest.fail.Exception(told) from error


CONTRACTS: dict[str, Contract] = {}


def contract(library: str, was: str, broken: Callable[[pytest.MonkeyPatch], None]) -> Callable[..., Any]:
    def register(check: Callable[..., None]) -> Callable[..., None]:
        CONTRACTS[check.__name__] = Contract(library, was, check, broken)
        return check

    return register


def lacks(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A library without this attribute, and modules of compat that are imported anew."""

    def broken(patch: pytest.MonkeyPatch) -> None:
        for module in list(sys.modules):
            package, _, name_there = module.rpartition(".")
            if package == "lit_eemllm.compat":
                patch.setattr(sys.modules[package], name_there, sys.modules[module])  # to be put back
                patch.delitem(sys.modules, module)
        patch.delattr(name)

    return broken


def no_attribute(cls: str, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A library whose objects have no attribute of this name, and cannot be given one."""
    return lambda patch: patch.setattr(f"{cls}.{name}", property(), raising=False)


def compat(library: str) -> Any:
    return importlib.import_module(f"lit_eemllm.compat.{library}")


# --- transformers


def other_cache_name(patch: pytest.MonkeyPatch) -> None:
    (other,) = {"cache", "past_key_values"} - {compat("transformers").CACHE}
    patch.setattr("lit_eemllm.compat.transformers.CACHE", other)
    patch.setattr("lit_eemllm.model.modeling.CACHE", other)


@contract("transformers", "models and outputs call the cache by CACHE, and deprecate that nowhere", other_cache_name)
def the_cache_has_a_name():
    import tiny
    from transformers.utils import logging as transformers_logging

    inputs = tiny.prompt(model := tiny.model(), [[3, 0, 4], [5]])
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    root, level = transformers_logging.get_logger("transformers"), transformers_logging.get_verbosity()
    type(root).warning_once.cache_clear()  # what another test was told is told again
    root.addHandler(handler)
    transformers_logging.set_verbosity_warning()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            filled = model(**inputs, use_cache=True)
            options = dict(max_new_tokens=3, pad_token_id=0, return_dict_in_generate=True, do_sample=False)
            outs = [model.generate(**inputs, **options, num_beams=beams) for beams in (1, 2)]
        said += [str(warning.message) for warning in warned]
    finally:
        transformers_logging.set_verbosity(level)
        root.removeHandler(handler)
    assert not [text for text in said if "deprecat" in text.lower()], said
    name = compat("transformers").CACHE
    assert filled[name].get_seq_length() == inputs["input_ids"].shape[1]
    for out in outs:
        assert out[name].columns == out.sequences.shape[1] - 1
        assert not out[name].is_croppable


@contract(
    "transformers",
    "generate repeats inputs for beams by _expand_inputs_for_generation",
    lambda patch: patch.delattr("lit_eemllm.compat.transformers.Generating._expand_inputs_for_generation"),
)
def generate_repeats_images():
    import tiny

    model, calls = tiny.model(), []
    repeated = model.repeated_images
    model.repeated_images = lambda times, *rest: calls.append(times) or repeated(times, *rest)
    model.generate(**tiny.prompt(model, [[3, 0, 4]]), max_new_tokens=2, num_beams=2, pad_token_id=0)
    assert calls == [2]


def renamed_mlp(patch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    made = LlamaDecoderLayer.__init__

    def make(self: Any, *args: Any) -> None:
        made(self, *args)
        self.feed_forward = self.__dict__["_modules"].pop("mlp")

    patch.setattr(LlamaDecoderLayer, "__init__", make)


@contract("transformers", "decoders of every family have the submodules that model/decoder.py calls", renamed_mlp)
def decoder_layers_have_their_parts():
    import tiny
    import transformers

    norms = ("input_layernorm", "post_attention_layernorm")
    for config in tiny.DECODERS.values():
        decoder = transformers.AutoModelForCausalLM.from_config(config)
        assert decoder.lm_head.weight.shape == (config.vocab_size, config.hidden_size)
        cos, sin = decoder.model.rotary_emb(torch.zeros(1, 5, config.hidden_size), torch.arange(5)[None])
        for layer in decoder.model.layers:
            parts = (*(f"self_attn.{x}_proj" for x in "qkvo"), "mlp", *norms)
            assert all(callable(layer.get_submodule(part)) for part in parts)
            assert (
                hasattr(layer.self_attn, "q_norm")
                == hasattr(layer.self_attn, "k_norm")
                == (config.model_type == "qwen3")
            )
            assert cos.shape == sin.shape == (1, 5, layer.self_attn.head_dim)
            assert layer.self_attn.scaling == pytest.approx(layer.self_attn.head_dim**-0.5)
        assert callable(decoder.model.norm) and decoder.model.embed_tokens.weight.shape[0] == config.vocab_size


@contract(
    "transformers",
    "_compile_jinja_template gives a template whose environment has the filters and names of chat templates",
    lacks("transformers.utils.chat_template_utils._compile_jinja_template"),
)
def chat_templates_have_names():
    filters, names = compat("transformers").template_names()
    assert filters["tojson"]({"é": "<"}) == '{"é": "<"}' and {"trim", "length", "selectattr"} <= set(filters)
    assert {"raise_exception", "strftime_now", "namespace", "range"} <= set(names)


@contract(
    "transformers",
    "SigLIP 2 sizes a picture to at most so many patches, height first",
    lambda patch: patch.setattr(
        "transformers.models.siglip2.image_processing_pil_siglip2.get_image_size_for_max_num_patches",
        lambda height, width, patch, most: (width, height),
    ),
)
def naflex_sizes_are_whole_patches():
    height, width = compat("transformers").naflex_size(100, 400, 16, 64)
    assert (height, width) == (64, 256)  # 4 x 16 patches, all 64


@contract(
    "transformers",
    "select_best_resolution takes the grid that keeps most pixels, height first",
    lambda patch: patch.setattr(
        "transformers.image_processing_utils.select_best_resolution", lambda _, sizes: sizes[0]
    ),
)
def a_wide_picture_takes_a_wide_grid():
    assert compat("transformers").best_grid((300, 900), [(672, 336), (336, 672), (336, 1008)]) == (336, 1008)


@contract(
    "transformers",
    "cached_file finds a file of a model, and gives None for one that is not needed and not there",
    lambda patch: patch.setattr("transformers.utils.cached_file", lambda *_, **options: None),
)
def a_file_of_a_model_is_found():
    file_of, here = compat("transformers").file_of, Path(__file__)
    assert file_of(str(here.parent), here.name) == here and file_of(str(here.parent), "no_such_file.json") is None
    with pytest.raises(OSError, match=r"no_such_file\.json"):
        file_of(str(here.parent), "no_such_file.json", needed=True)


@contract(
    "transformers",
    "constants of the hub's client say where it is, and a file is looked for in the cache alone",
    lambda patch: patch.delattr("huggingface_hub.constants.ENDPOINT"),
)
def a_hub_without_an_address_is_not_asked():
    module, asked = compat("transformers"), {}

    def no_address(*_):
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(module, "getaddrinfo", no_address)
        patch.setattr(module, "getproxies", dict)
        patch.setattr("transformers.utils.cached_file", lambda *_, **options: asked.update(options))
        module.unreachable.cache_clear()
        try:
            assert "huggingface.co has no address here (Name or service" in module.unreachable()
            assert module.file_of("me/mine", "chat_template.jinja") is None
            with pytest.raises(OSError, match=r"estimate --shape. and .lit-eemllm shrink --published"):
                module.file_of("me/mine", "config.json", needed=True)
            patch.setattr(module, "getproxies", lambda: {"https": "proxy"})
            module.unreachable.cache_clear()
            assert module.unreachable() == "", "a proxy knows"
        finally:
            module.unreachable.cache_clear()
    assert asked["local_files_only"]


@contract(
    "transformers",
    "Idefics2VisionTransformer is the encoder alone: pixels to states of all patches",
    lacks("transformers.models.idefics2.modeling_idefics2.Idefics2VisionTransformer"),
)
def an_encoder_stands_alone():
    import transformers

    sizes = dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    encoder = compat("transformers").Idefics2VisionTransformer(transformers.Idefics2VisionConfig(**sizes))
    assert encoder(torch.zeros(2, 3, 8, 4)).last_hidden_state.shape == (2, 2, 8)


# --- torch


@contract("torch", "_foreach_mul_ multiplies a list of tensors in place", lacks("torch._foreach_mul_"))
def a_list_is_scaled_in_place():
    tensors = [torch.arange(3.0), torch.ones(2, 2)]
    compat("torch").scale_(tensors, torch.tensor(3.0))
    assert tensors[0].tolist() == [0, 3, 6] and tensors[1].eq(3).all()


@contract(
    "torch",
    "gloo names itself where another rank is gone, NCCL raises a DistError",
    lambda patch: patch.setattr(torch.distributed, "DistError", KeyError),
)
def other_ranks_go():
    store, groups = torch.distributed.HashStore(), {}

    def join(rank: int) -> None:
        groups[rank] = torch.distributed.ProcessGroupGloo(store, rank, 2, timedelta(seconds=10))

    with ThreadPoolExecutor(2) as both:
        list(both.map(join, range(2)))
    del groups[1]
    lost = compat("torch").lost_rank
    with pytest.raises(RuntimeError) as gone:
        groups[0].allreduce([torch.zeros(1)]).wait()
    assert "Connection closed by peer" in (lost(gone.value) or "")
    assert (
        lost(torch.distributed.DistBackendError("NCCL error\nmore")) == "NCCL error" and lost(RuntimeError("x")) is None
    )


@contract(
    "torch",
    "Tensor._version counts changes in place",
    lambda patch: patch.setattr("torch.Tensor._version", property(lambda tensor: 0)),
)
def changes_are_counted():
    before = (changes := compat("torch").changes)(x := torch.zeros(2))
    x.add_(1)
    assert changes(x) > before and changes(x[:1]) == changes(x)


@contract(
    "torch",
    "UntypedStorage._cdata tells storages apart, fake ones too",
    lambda patch: patch.setattr("torch.UntypedStorage._cdata", 0),
)
def storages_without_data_have_numbers():
    module = compat("torch")
    with module.FakeTensorMode():
        a, b = torch.empty(3, device="cpu"), torch.empty(3, device="cpu")
    assert a.device.type == "cpu"
    number = module.storage_id
    assert number(a.untyped_storage()) == number(a[1:].untyped_storage()) != number(b.untyped_storage())


@contract(
    "torch",
    "_new_shared_fd_cpu maps an open file as a shared storage",
    lambda patch: patch.setattr("torch.UntypedStorage._new_shared_fd_cpu", lambda _, n: torch.UntypedStorage(n)),
)
def a_file_is_a_storage():
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(bytes(range(8)))
        storage = compat("torch").shared_storage(file.fileno(), 8)
    assert storage.is_shared() and list(storage) == list(range(8))


@contract(
    "torch",
    "dynamo has limits of recompilations",
    lambda patch: patch.setattr("torch._dynamo.config", SimpleNamespace(recompile_limit=8)),
)
def recompiles_may_be_allowed():
    import torch._dynamo

    limits = torch._dynamo.config
    before = limits.recompile_limit, limits.accumulated_recompile_limit
    try:
        compat("torch").allow_recompiles(5000)
        assert (limits.recompile_limit, limits.accumulated_recompile_limit) == (5000, 5000)
    finally:
        limits.recompile_limit, limits.accumulated_recompile_limit = before


@contract(
    "torch",
    "FlopCounterMode can be taught the CPU's fused attention",
    lambda patch: patch.setattr("lit_eemllm.compat.torch.sdpa_flop_count", lambda q, k, v: 0),
)
def fused_attention_is_counted():
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (torch.randn(1, 2, rows, 4, requires_grad=True) for rows in (5, 7, 7))
    with compat("torch").flop_counter() as counted:
        scaled_dot_product_attention(q, k, v).sum().backward()
    products = 2 * 5 * 7 * 2 * 4  # of queries and keys: two FLOPs for each head, query, key and number of the head
    assert counted.get_total_flops() == (2 + 4) * products  # and of weights and values; twice as many backwards


class Dies:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index if index < 2 else os._exit(1)


@contract(
    "torch",
    "a DataLoader has processes, which can be ended",
    no_attribute("torch.utils.data.dataloader._MultiProcessingDataLoaderIter", "_workers"),
)
def loaders_have_processes():
    from torch.utils.data import DataLoader

    module, loader = compat("torch"), DataLoader(range(8), num_workers=2, persistent_workers=True)
    assert module.worker_processes(loader) == []
    next(iter(loader))
    processes = module.worker_processes(loader)
    assert len(processes) == 2 and all(process.is_alive() for process in processes)
    module.end_workers(loader)
    for process in processes:
        process.join(10)
    assert not any(process.is_alive() for process in processes) and module.worker_processes(loader) == []


@contract(
    "torch",
    "a dead loader process is told by a RuntimeError that begins so",
    lambda patch: patch.setattr("lit_eemllm.compat.torch.DEAD_WORKER", "a worker died"),
)
def a_dead_process_is_told():
    from torch.utils.data import DataLoader

    with pytest.raises(RuntimeError) as death:
        list(DataLoader(Dies(), num_workers=1, collate_fn=list))  # no tensors, whose connections break first
    assert str(death.value).startswith(compat("torch").DEAD_WORKER), death.value


# --- Lightning


def trained_steps(train: bool = True, **more: Any) -> tuple[Any, Any]:
    """A module that has seen four packs in two steps (or none yet), and its trainer."""
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader

    class Steps(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))
            self.seen: list[tuple[int, int]] = []

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            packs = compat("lightning").packs(self.trainer)
            self.seen.append((packs.ready, packs.processed))
            return self.weight * batch.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Steps()
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(
        max_steps=2, accumulate_grad_batches=2, accelerator="cpu", devices=1, num_sanity_val_steps=0, **options, **more
    )
    if train:
        trainer.fit(module, DataLoader(torch.ones(8)))
    return module, trainer


@contract(
    "lightning",
    "loops count packs, also in checkpoints",
    lambda patch: (
        patch.setattr("lightning.pytorch.loops.progress._ProcessedTracker.processed", 0, raising=False)
        or patch.setattr("lit_eemllm.compat.lightning.packs", lambda trainer: SimpleNamespace(ready=0, processed=0))
    ),
)
def packs_are_counted():
    module, trainer = trained_steps()
    assert module.seen == [(1, 0), (2, 1), (3, 2), (4, 3)]
    saved = compat("lightning").saved_packs(trainer._checkpoint_connector.dump_checkpoint())
    assert {name: (count["ready"], count["processed"]) for name in ("total", "current") for count in [saved[name]]} == {
        "total": (4, 4),
        "current": (4, 4),
    }
    compat("lightning").begin_validation_anew(trainer)
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    assert (progress.current.ready, progress.current.started, progress.current.processed) == (1, 1, 0)


@contract(
    "lightning",
    "a validation begins after the pack whose number val_check_batch divides, and one that is pending when a run goes on",
    lambda patch: (
        patch.setattr("lightning.pytorch.loops.evaluation_loop._EvaluationLoop.batch_progress", None, raising=False)
        or patch.setattr("lit_eemllm.compat.lightning.validate_now", lambda trainer: None)
    ),
)
def validations_are_begun():
    from lightning.pytorch import Callback
    from torch.utils.data import DataLoader

    lightning, begun = compat("lightning"), []

    class Last(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index == 3:
                with lightning.validation_ahead(trainer):
                    begun.append(lightning.validation_pending(trainer._checkpoint_connector.dump_checkpoint()))
                lightning.validate_now(trainer)

        def on_validation_start(self, trainer: Any, module: Any) -> None:
            begun.append((trainer.global_step, trainer.max_steps))

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            begun.append(lightning.validation_pending(trainer._checkpoint_connector.dump_checkpoint()))

    module, trainer = trained_steps(
        train=False, callbacks=[Last()], val_check_interval=100, check_val_every_n_epoch=None
    )
    lightning.set_max_steps(trainer, 3)
    lightning.set_max_steps(trainer, 2)
    type(module).validation_step = lambda self, batch, index: None
    loader = DataLoader(torch.ones(8))
    trainer.fit(module, loader, loader)
    assert begun == [True, (2, 2), False]


@contract(
    "lightning",
    "modules are restored in _restore_modules_and_callbacks, optimisers in restore_training_state, and nothing else is done there",
    lambda patch: patch.setattr("lit_eemllm.compat.lightning.around_restoring", lambda trainer, context: None),
)
def restoring_is_in_two_methods(tmp_path):
    from torch.utils.data import DataLoader

    within, seen = [], []

    @contextmanager
    def context():
        within.append(None)
        yield
        within.pop()

    _, first = trained_steps()
    first.save_checkpoint(tmp_path / "two.ckpt")
    module, trainer = trained_steps(train=False)
    for hook in ("on_load_checkpoint", "on_fit_start", "configure_optimizers", "on_train_start"):
        own = getattr(module, hook)
        setattr(module, hook, lambda *given, hook=hook, own=own: (seen.append((hook, len(within))), own(*given))[1])
    own_load = torch.optim.SGD.load_state_dict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.optim.SGD,
            "load_state_dict",
            lambda *given: (seen.append(("optimizer", len(within))), own_load(*given))[1],
        )
        compat("lightning").around_restoring(trainer, context())
        trainer.fit_loop.epoch_loop.max_steps = 3
        trainer.fit(module, DataLoader(torch.ones(8)), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert sorted(seen) == [
        ("configure_optimizers", 0),
        ("on_fit_start", 0),
        ("on_load_checkpoint", 1),
        ("on_train_start", 0),
        ("optimizer", 1),
    ]


@contract(
    "lightning",
    "a module without a trainer has the attribute _trainer",
    no_attribute("lightning.pytorch.LightningModule", "_trainer"),
)
def a_module_has_a_trainer_or_none():
    has_trainer = compat("lightning").has_trainer
    assert not has_trainer(trained_steps(train=False)[0]) and has_trainer(trained_steps()[0])


@contract(
    "lightning",
    "ModelParallelStrategy keeps its sizes in _data_parallel_size and _tensor_parallel_size until the environment is set up",
    no_attribute("lightning.pytorch.strategies.ModelParallelStrategy", "_data_parallel_size"),
)
def all_processes_share_the_data():
    strategy = compat("lightning").DataParallel()
    assert {"_data_parallel_size", "_tensor_parallel_size"} <= vars(strategy).keys()
    strategy.parallel_devices = [torch.device("cpu")] * 3
    asked = []
    parent = type(strategy).__mro__[1]
    original, parent.setup_environment = (
        parent.setup_environment,
        lambda self: asked.append((self._data_parallel_size, self._tensor_parallel_size)),
    )
    try:
        strategy.setup_environment()
    finally:
        parent.setup_environment = original
    assert asked == [(3, 1)]


# --- Energon


def fresh_shards(folder: Path, training: bool = True, workers: int = 0) -> Any:
    """Of the embedded set's train split, with what `wrap` was given."""
    energon = compat("energon")
    from megatron.energon import WorkerConfig

    class Wrapped(energon.Shards):
        wrapped: list[Any] = []

        def wrap(self, reader: Any) -> Any:
            self.wrapped.append(reader)
            return reader

    worker = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    return Wrapped(energon.EPath(folder), split_part="train", training=training, worker_config=worker, decoder=None)


@contract(
    "energon",
    "CrudeWebdataset.build makes readers, which know the shard of a sample",
    lacks("megatron.energon.BaseWebdatasetFactory.build"),
)
def readers_may_be_wrapped(shapes: Path):
    energon, dataset = compat("energon"), fresh_shards(shapes)
    dataset.build()
    (reader,) = dataset.wrapped
    energon.open_as_files(reader)
    names = [energon.shard_of(reader, index) for index in (0, 39, 40, 159)]
    assert names == [shapes / f"train-{number:06d}.tar" for number in (0, 0, 1, 3)]
    assert "json" in reader[40]
    energon.refuse_large(reader, 100, "oversize")
    assert reader[40].keys() & {"json", "oversize"} == {"oversize"} and int(reader[40]["oversize"]) > 512


def dataset_of(folder: Path, training: bool = True, workers: int = 0) -> Any:
    """Keys of samples: shuffled and without end, or each once."""
    energon = compat("energon")
    from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, stateless

    @stateless
    def cook(sample: Any) -> Any:
        return {"__key__": sample["__key__"], "__restore_key__": sample["__restore_key__"]}

    class Task(DefaultTaskEncoder):
        decoder = None
        cookers = [Cooker(cook)]

        def build_batch(self, dataset: Any, **_: Any) -> Any:
            return dataset

    worker = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    task, loaded = Task(), energon.LoadedDataset(dataset=fresh_shards(folder, training, workers), weight=1.0)
    options = dict(datasets=[loaded], worker_config=worker, batch_size=None, packing_buffer_size=None)
    if not training:
        return task.build_val_datasets(**options)
    mode = energon.DatasetBlendMode.DATASET_WEIGHT
    return task.build_train_datasets(**options, shuffle_buffer_size=8, blend_mode=mode)


def loader_of(folder: Path) -> Any:
    return compat("energon").CountingLoader(dataset_of(folder), checkpoint_every_sec=0)


@contract(
    "energon",
    "SavableDataLoader counts batches by worker, and its state is made of the known types",
    lacks("megatron.energon.state.FlexState"),
)
def a_loader_counts_and_saves(shapes: Path):
    energon, loader = compat("energon"), loader_of(shapes)
    batches = iter(loader)
    first = [next(batches)["__key__"] for _ in range(5)]
    assert loader.counters == ([4], 0)
    loader.counters = [4], 0
    state, found = loader.save_state_rank(), set()

    def walk(value: Any) -> None:
        found.add(type(value))
        if is_dataclass(value):
            value = [getattr(value, field.name) for field in fields(value)]
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            walk(item)

    walk(state)
    plain = {bool, int, float, str, bytes, type(None), list, tuple, dict, torch.Tensor}
    assert found - plain <= {*energon.STATES, energon.FlexState}, found
    again = loader_of(shapes)
    again.restore_state_rank(state)
    rest = [next(batches)["__key__"] for _ in range(3)]
    assert [batch["__key__"] for batch, _ in zip(again, range(3), strict=False)] == rest and len({*first, *rest}) == 8
    assert isinstance(state, energon.SavableDataLoaderState)


@contract(
    "energon",
    "a worker takes snapshots by _store_checkpoint, and has no state to tell of before its first",
    lacks("megatron.energon.savable_loader.SavableDatasetWrapper._store_checkpoint"),
)
def a_worker_takes_snapshots_between_batches(shapes: Path):
    energon = compat("energon")
    worker = energon.CountingLoader(dataset_of(shapes, workers=1)).dataset
    assert type(worker) is energon._BetweenBatches
    worker._worker_id, worker._save_state = 0, lambda: "state"
    worker._store_checkpoint(force=True)
    assert worker.get_checkpoint([-1]).state is None
    worker._store_checkpoint()
    assert worker.get_checkpoint([-1]).state == "state"


@contract(
    "energon",
    "BasicDataLoader gives what a dataset holds, once",
    lacks("megatron.energon.savable_loader.BasicDataLoader.__iter__"),
)
def a_basic_loader_ends(shapes: Path):
    loader = compat("energon").BasicDataLoader(dataset_of(shapes, training=False))
    keys = [batch["__key__"] for batch in loader]
    assert len(keys) == len(set(keys)) == 160


@contract(
    "energon",
    "PackingDataset fills _reading_buffer by _fill_reading_buffer and chooses packs by pre_packer",
    lacks("megatron.energon.PackingDataset._fill_reading_buffer"),
)
def samples_may_be_held_back(shapes: Path):
    packing = compat("energon").Packing
    assert "_reading_buffer" in packing._savable_fields
    assert list(inspect.signature(packing.__mro__[1]._fill_reading_buffer).parameters)[1:] == [
        "source_iter",
        "log_progress",
    ]
    held = SimpleNamespace(_reading_buffer=[1])
    packing.hold_back(held, [2, 3])
    assert held._reading_buffer == [1, 2, 3]


@contract(
    "energon",
    "SavableDataLoader asks its workers by _worker_command, cmd_queues and result_queues",
    lacks("megatron.energon.SavableDataLoader._worker_command"),
)
def workers_are_asked_by_queues():
    loader = compat("energon").CountingLoader
    assert loader.__mro__[1]._worker_command
    asked: list[Any] = []
    queue = SimpleNamespace(put=asked.append)
    fake = SimpleNamespace(
        cmd_queues=[queue, queue], result_queues=["b", "a"], answers=lambda qs: [{"ab".index(q): q} for q in qs]
    )
    assert loader._worker_command(fake, "state", 3) == ["a", "b"] and asked == [("state", 3)] * 2
    assert {"cmd_queues", "result_queues"} <= loader.__mro__[1].__annotations__.keys()


@contract(
    "energon",
    "names of members are cut at the first dot",
    lacks("megatron.energon.flavors.webdataset.config.split_name_re"),
)
def members_are_named():
    energon = compat("energon")
    assert energon.MEMBER_NAME.match("a/b-1.0.jpg").groups() == ("a/b-1", "0.jpg")
    assert not energon.SKIPPED_MEMBER.match("a/b.jpg") and energon.SKIPPED_MEMBER.match("__x__/y.jpg")
    assert energon.collapse(["t-0.tar", "t-1.tar", "t-2.tar"], keep_order=True) == ["t-{0..2}.tar"]


@contract("energon", "a Watchdog calls back when nothing comes", lacks("megatron.energon.watchdog.Watchdog.watch_iter"))
def a_watchdog_barks():
    calls: list[int] = []
    watchdog = compat("energon").Watchdog(0.05, callback=lambda: calls.append(1), dump_stacks=False, enabled=False)

    def slow() -> Any:
        yield 1
        for _ in range(200):
            time.sleep(0.05)
            if calls:
                break
        yield 2

    assert list(watchdog.watch_iter(slow())) == [1, 2]
    watchdog.finish()
    assert calls


# --- peft


def adapted(layer: torch.nn.Module) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    return inject_adapter_in_model(config, torch.nn.Sequential(layer))[0]


@contract("peft", "a LoraLayer tells what its adapter adds", lacks("peft.tuners.lora.Linear.get_delta_weight"))
def an_adapter_has_a_delta():
    module, layer = compat("peft"), adapted(torch.nn.Linear(4, 3))
    assert isinstance(layer, module.LoraLayer)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(module.adapter_delta(layer), 3 * up @ down)


@contract(
    "peft",
    "dequantize_module_weight gives the weight of bitsandbytes' layers, whose weights are Params4bit or Int8Params",
    lacks("peft.utils.integrations.dequantize_module_weight"),
)
def a_quantized_layer_has_a_weight():
    bnb = pytest.importorskip("bitsandbytes")
    module, plain = compat("peft"), torch.nn.Linear(64, 64, bias=False)
    small = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    small.load_state_dict(plain.state_dict())
    small.to("cpu")
    assert module.is_quantized(small) and not module.is_quantized(plain)
    found = module.dequantized_weight(small)
    assert found.dtype == torch.float32
    assert (found - plain.weight).abs().max() < 0.2 * plain.weight.abs().max()


def rename_the_switch(patch):
    bnb = pytest.importorskip("bitsandbytes")
    set_ = bnb.nn.Linear4bit.__setattr__
    patch.setattr(
        bnb.nn.Linear4bit,
        "__setattr__",
        lambda self, name, value: set_(self, name.replace("avx512bf16", "fast"), value),
    )


@contract(
    "peft",
    "bitsandbytes' Linear4bit has a switch for the kernel of CPUs that rearranges its weights",
    rename_the_switch,
)
def four_bits_stay_as_they_are():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, bias=False)
    compat("peft").keep_packing(layer)
    rearranges = hasattr(bnb.nn.modules, "_convert_weight_packed_for_cpu")  # earlier versions do not
    assert not rearranges or layer.support_avx512bf16_for_cpu is False


# --- hooks of theirs that we override

HOOKS = {
    "lightning": {
        "lit_eemllm.training.fsdp2.FSDP2": "model_to_device optimizer_state load_checkpoint setup_environment",
        "lit_eemllm.training.checkpoint.AtomicCheckpointIO": "save_checkpoint load_checkpoint",
        "lit_eemllm.training.guard.Checkpoints": "setup on_train_start on_train_batch_end on_validation_batch_end",
        "lit_eemllm.training.runlog.RunLog": "on_train_start on_train_batch_start on_train_batch_end on_validation_end on_train_end",
        "lit_eemllm.training.module.LitEEMLLM": "configure_model on_fit_start on_train_epoch_start on_train_batch_end training_step "
        "on_before_optimizer_step configure_gradient_clipping configure_optimizers lr_scheduler_step validation_step "
        "on_validation_epoch_end on_save_checkpoint on_load_checkpoint on_train_start",
        "lit_eemllm.data.module.ShardDataModule": "setup train_dataloader val_dataloader on_before_batch_transfer state_dict "
        "load_state_dict teardown on_exception",
    },
    "energon": {
        "lit_eemllm.data.task.PackTask": "decoder preencode_sample select_samples_to_pack postencode_sample pack_selected_samples "
        "build_batch",
    },
    "transformers": {
        "lit_eemllm.model.modeling.EEMLLM": "config_class base_model_prefix main_input_name _no_split_modules _init_weights train "
        "get_input_embeddings get_output_embeddings prepare_inputs_for_generation",
        "lit_eemllm.model.modeling.EEMLLMConfig": "model_type sub_configs get_text_config",
        "lit_eemllm.model.cache.StreamCache": "get_seq_length reorder_cache batch_repeat_interleave batch_select_indices crop update",
    },
}  # fmt: skip


GONE = {
    "lightning": "lightning.pytorch.Callback.on_train_batch_end",
    "energon": "megatron.energon.TaskEncoder.select_samples_to_pack",
    "transformers": "transformers.PreTrainedModel._init_weights",
}
"""Of each, a hook without which its contract must fail."""


def hooks_are_called(library: str) -> None:
    for name, hooks in HOOKS[library].items():
        module, _, cls = name.rpartition(".")
        bases = getattr(importlib.import_module(module), cls).__mro__[1:]
        theirs = [base for base in bases if not base.__module__.startswith("lit_eemllm")]
        lost = [hook for hook in hooks.split() if not any(hook in vars(base) for base in theirs)]
        assert not lost, f"nothing calls {lost} of {name}"


for library in HOOKS:
    check = partial(hooks_are_called, library)
    check.__name__ = f"hooks_of_{library}_are_called"  # type: ignore[attr-defined]
    contract(library, "these hooks were called", lambda patch, name=GONE[library]: patch.delattr(name))(check)


# --- all of them


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_library_is_as_it_was(name, request):
    CONTRACTS[name].hold(request)


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_library_that_broke_is_named(name, request, monkeypatch):
    for fixture in inspect.signature(CONTRACTS[name].check).parameters:
        request.getfixturevalue(fixture)  # of the sound library
    broken = CONTRACTS[name]
    broken.broken(monkeypatch)
    distribution = LIBRARIES[broken.library]
    with pytest.raises(pytest.fail.Exception) as failure:
        broken.hold(request)
    assert str(failure.value).startswith(f"{distribution} {version(distribution)}: {broken.was}. Mend")


def defined(tree: ast.AST) -> set[str]:
    """Names that a file gives to functions, classes, variables and attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return names


def private_uses(files: dict[str, str]) -> list[str]:
    """Where files use a private name that none of them defines, or import from a private module: those of others."""
    trees = {name: ast.parse(text) for name, text in files.items()}
    ours = {"_exit", *(name for tree in trees.values() for name in defined(tree))}
    found = []
    for file, tree in trees.items():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                names = [node.attr] if node.attr not in ours else []
            elif (
                isinstance(node, ast.ImportFrom)
                and node.level == 0
                and not (node.module or "").startswith("lit_eemllm")
            ):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "getattr",
                "hasattr",
                "setattr",
                "delattr",
            ):
                names = [
                    word.value for word in node.args[1:2] if isinstance(word, ast.Constant) and word.value not in ours
                ]
            found += [f"{file}:{node.lineno}: {name}" for name in names if re.match(r"_[^_]", name)]
    return found


def package_files() -> dict[str, str]:
    files = [path for path in PACKAGE.rglob("*.py") if "compat" not in path.relative_to(PACKAGE).parts]
    tools = [*(PACKAGE.parent / "tools").glob("*.py"), *(PACKAGE.parent / "data_recipes").glob("*.py")]
    return {str(path.relative_to(PACKAGE.parent)): path.read_text(encoding="utf-8") for path in (*files, *tools)}


def test_private_names_of_others_are_used_in_compat_alone():
    assert private_uses(package_files()) == []
    bad = "import torch._dynamo\nfrom peft.x import _y\nloader._iterator\nself._mine = 1\nself._mine\nhasattr(p, '_z')"
    assert private_uses({"a.py": bad}) == [
        f"a.py:{n}: {name}" for n, name in ((1, "_dynamo"), (2, "_y"), (3, "_iterator"), (6, "_z"))
    ]


DOCUMENTED = {
    "torch": r"torch(\.(nn|utils|distributed|optim)(\..*)?)?",
    "transformers": r"transformers(\.(modeling_outputs|utils))?",
    "lightning": r"lightning(\.pytorch|\.fabric)?(\.(callbacks|loggers|profilers|strategies|utilities\..*|plugins\.io|core\.optimizer))?",
    "megatron": r"megatron\.energon",
    "peft": r"peft",
}
"""Modules whose names their documentation uses."""


def test_modules_that_may_move_are_imported_in_compat_alone():
    found = []
    for file, text in package_files().items():
        for node in ast.walk(ast.parse(text)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for module in modules:
                pattern = DOCUMENTED.get(module.partition(".")[0])
                if pattern and not re.fullmatch(pattern, module):
                    found.append(f"{file}:{node.lineno}: {module}")
    assert found == []


def test_the_list_names_every_use():
    listed = set(re.findall(r"`(\w+)`", (PACKAGE / "compat" / "README.md").read_text(encoding="utf-8")))
    for library in LIBRARIES:
        module = compat(library)
        ours = {n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__}
        uses = ours | set(getattr(module, "__all__", ()))
        assert uses <= listed, f"compat/README.md does not say why {sorted(uses - listed)} of {library}"
        tested = set(re.findall(r"\.(\w+)", Path(__file__).read_text(encoding="utf-8")))
        assert uses <= tested, f"no contract uses {sorted(uses - tested)} of {library}"


@pytest.mark.slow
def test_a_name_that_is_gone_from_the_start_is_named_too(tmp_path):
    """Most breaks are imports that fail, before any test has begun."""
    (tmp_path / "newer.py").write_text("import megatron.energon.state\ndel megatron.energon.state.FlexState\n")
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "newer",
        "-k",
        "as_it_was and (loader_counts or in_place or naflex)",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*line, __file__], env=environment, capture_output=True, text=True, timeout=200)
    was = CONTRACTS["a_loader_counts_and_saves"].was
    assert f"Failed: megatron-energon {version('megatron-energon')}: {was}. Mend" in done.stdout
    assert "cannot import name 'FlexState'" in done.stdout and "1 failed, 2 passed" in done.stdout, done.stdout
