"""Training: exact resume after SIGKILL, token-weighted steps, slim and safe checkpoints, what is trained, honest logs."""

import json
import math
import pickle
import random
import re
import shutil
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from lib.processes import Started, run_command
from lib.runs import assert_same, metrics
from lightning import Trainer
from torch.utils.data import DataLoader

from lit_eemllm.config import to_yaml
from lit_eemllm.errors import CheckpointError, WriteError
from lit_eemllm.evaluation.run import load
from lit_eemllm.model.build import build
from lit_eemllm.training import runlog
from lit_eemllm.training.checkpoint import newest_checkpoint, read_checkpoint, refuse_changes
from lit_eemllm.training.fit import fit
from lit_eemllm.training.module import LitEEMLLM, rng_state, set_rng_state
from lit_eemllm.training.runlog import RunLog
from lit_eemllm.training.step import Step
from lit_eemllm.training.tuning import schedule


@pytest.fixture(scope="module")
def blend(tmp_path_factory):
    """A recipe that blends two shard folders."""
    folder = tmp_path_factory.mktemp("data")
    tiny.write_shards(folder / "a")
    tiny.write_shards(folder / "b", train=90)
    recipe = folder / "blend.yaml"
    recipe.write_text(
        "splits:\n  train:\n    blend:\n      - {path: a, weight: 2}\n      - {path: b, weight: 1}\n"
        "  val:\n    path: a\n"
    )
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_run_equals_an_unbroken_one(tmp_path, parts, blend, workers):
    """20 steps = about 10 + SIGKILL + resume, with shuffling, blending, packing and accumulation: bit-equal."""
    options = (f"data.workers={workers}", "trainer.accumulate_grad_batches=2")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(tiny.config(parts, blend, whole, *options))

    config = tiny.config(parts, blend, cut, *options)
    file = tmp_path / "cut.yaml"
    file.write_text(to_yaml(config))
    process = Started(run_command, "fit", file)
    deadline = time.monotonic() + 120
    while not (cut / "checkpoints" / "step-10.ckpt").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.said()
        time.sleep(0.005)
    process.kill()
    process.wait(60)
    assert newest_checkpoint(cut).name == "step-10.ckpt"
    killed_at = max(metrics(cut))
    fit(config)

    rows, true = metrics(cut), metrics(whole)
    assert sorted(rows) == sorted(true) == list(range(1, 21)) and 10 <= killed_at < 20
    for step in true:
        for name in ("loss", "lr", "grad_norm", "keys_crc"):
            assert rows[step][name] == true[step][name], (step, name)
    assert len({row["keys_crc"] for row in true.values()}) == 20
    a, b = (read_checkpoint(run / "checkpoints" / "step-20.ckpt") for run in (cut, whole))
    for section in ("state_dict", "optimizer_states", "lr_schedulers", "rng"):
        assert_same(a[section], b[section], section)
    for run in (whole, cut):  # the loader's saved positions may be written differently; what follows from them may not
        fit(tiny.config(parts, blend, run, *options, "optim.max_steps=22"))
    rows, true = metrics(cut), metrics(whole)
    assert all(rows[step][name] == true[step][name] for step in (21, 22) for name in ("loss", "keys_crc"))


def test_same_seed_same_run_and_another_seed_another(tmp_path, parts, blend):
    runs = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(tiny.config(parts, blend, tmp_path / out, f"seed={seed}", "optim.max_steps=3"))
        runs.append(read_checkpoint(newest_checkpoint(tmp_path / out))["state_dict"])
    assert_same(runs[0], runs[1])
    assert any(not runs[0][name].equal(runs[2][name]) for name in runs[0])


class Probe(LitEEMLLM):
    """Keeps the gradients that the optimiser would get, unclipped."""

    def configure_gradient_clipping(self, *args, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def one_step(documents_per_pack, parts, tmp_path):
    """Gradients of one optimiser step over eight documents, in packs of so many."""
    documents = [[3, 0, 4], [5], [2, 0, 1, 0, 3], [0, 6], [9], [1, 0, 2], [4, 0, 8], [2, 0, 2]]
    whole = [tiny.pack([doc], seed) for seed, doc in enumerate(documents)]
    packs = [join(whole[i : i + documents_per_pack]) for i in range(0, 8, documents_per_pack)]
    config = tiny.config(parts, "unused", tmp_path, "optim.max_steps=1", "optim.tuning.vision=full")
    module = Probe(tiny.model(), config)
    trainer = Trainer(
        max_steps=1, accumulate_grad_batches=len(packs), accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(packs, batch_size=None))
    return module, packs


def join(batches):
    """One pack of several single-document packs."""
    joined = tiny.pack([[run.length if not run.visual else 0 for run in b.layout.documents[0]] for b in batches])
    offsets = [sum(b.layout.num_text for b in batches[:i]) for i in range(len(batches))]
    joined.input_ids = torch.cat([b.input_ids for b in batches])
    joined.target_rows = torch.cat([b.target_rows + offset for b, offset in zip(batches, offsets, strict=True)])
    joined.targets = torch.cat([b.targets for b in batches])
    pixels = [b.pixel_values for b in batches if b.pixel_values is not None]
    joined.pixel_values = torch.cat(pixels) if pixels else None
    return joined


def test_every_token_of_a_step_weighs_the_same(tmp_path, parts):
    """8 documents in one pack, 1 x 8 accumulated, 4 x 2: the same gradient, which is that of the token mean."""
    (whole, packs), *others = (one_step(n, parts, tmp_path) for n in (8, 1, 2))
    model = tiny.model().train()
    model.requires_grad_(True)
    (model.packed_loss(packs[0]) / packs[0].num_targets).backward()
    true = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    largest = max(g.abs().max() for g in true.values())
    for module in (whole, *(module for module, _ in others)):
        assert module.gradients.keys() == true.keys()
        for name, gradient in true.items():
            assert (module.gradients[name] - gradient).abs().max() <= 3e-5 * max(
                gradient.abs().max(), 1e-3 * largest
            ), name
    losses = [module.step.mean_loss.item() for module in (whole, *(module for module, _ in others))]
    assert losses == pytest.approx([(model.packed_loss(packs[0]) / packs[0].num_targets).item()] * 3, rel=1e-5)


def trainer_of(steps):
    return Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


def test_losses_are_means_over_the_tokens_of_a_step_and_of_a_validation(tmp_path, parts):
    """Each step's own; packs of 2 and 25 supervised tokens do not weigh the same."""
    packs = [tiny.pack([[3]]), tiny.pack([[9, 0, 18]], seed=1), tiny.pack([[2, 0, 5]], seed=2)]
    config = tiny.config(parts, "unused", tmp_path, "optim.max_steps=3", "optim.lr=1e-30")
    module, model, seen = LitEEMLLM(tiny.model(), config), tiny.model(), []
    sums = [model.packed_loss(pack).item() for pack in packs]
    targets = [pack.num_targets for pack in packs]
    module.on_train_batch_end = lambda *_: seen.append(module.step.mean_loss.item())
    trainer_of(3).fit(module, DataLoader(packs, batch_size=None))
    assert seen == pytest.approx([total / count for total, count in zip(sums, targets, strict=True)], rel=1e-5)
    trainer = trainer_of(3)
    trainer.validate(module, DataLoader(packs, batch_size=None), verbose=False)
    assert targets[:2] == [2, 25]
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(sum(sums) / sum(targets), rel=1e-5)


def test_generators_go_on_where_they_were():
    def draw():
        return [
            torch.rand(3).tolist(),
            random.random(),
            np.random.rand(3).tolist(),
            np.random.randn(),
            random.gauss(0, 1),
        ]

    np.random.randn(), random.gauss(0, 1)  # each has a second number in store
    state = json.loads(json.dumps({**rng_state(), "torch": None}))  # as plain as it is in a checkpoint
    state |= {"torch": torch.get_rng_state(), "numpy": tuple(state["numpy"])}
    first, _ = draw(), draw()
    set_rng_state(state)
    assert draw() == first


def test_checkpoint_holds_what_was_trained_and_is_strict(tmp_path, parts, blend):
    config = tiny.config(parts, blend, tmp_path / "a", "optim.tuning.llm=frozen", "optim.max_steps=2")
    fit(config)
    path = newest_checkpoint(tmp_path / "a")
    checkpoint = read_checkpoint(path)
    assert set(checkpoint["state_dict"]) == {
        f"model.projector.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")
    }
    assert checkpoint["lit_eemllm"]["config"]["optim"]["max_steps"] == 2

    other = LitEEMLLM(tiny.model(), tiny.config(parts, blend, tmp_path / "a"))  # trains the decoder too
    with pytest.raises(CheckpointError, match=r"trains \(projector, llm\): missing \d+ .*unexpected none"):
        other.on_load_checkpoint(checkpoint)
    tiny_parts = tmp_path / "parts"
    tiny.write_parts(tiny_parts)
    weights = tiny_parts / "encoder" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-200:] = bytes(200)
    weights.write_bytes(data)
    changed = tiny.config(tiny_parts, blend, tmp_path / "a", "optim.tuning.llm=frozen")
    with pytest.raises(CheckpointError, match="frozen parts differ"):
        LitEEMLLM(build(changed.model)[0], changed).on_load_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match="frozen parts differ"):
        load(changed, str(path))  # so says evaluation

    # finetune from the pretrained projector: weights only, a new schedule
    fit(tiny.config(parts, blend, tmp_path / "b", f"init_from={tmp_path / 'a'}", "optim.max_steps=1", "optim.lr=1e-30"))
    after = read_checkpoint(newest_checkpoint(tmp_path / "b"))["state_dict"]
    assert all(after[name].equal(tensor) for name, tensor in checkpoint["state_dict"].items())


def test_broken_foreign_and_hostile_checkpoints_are_refused(tmp_path, parts, blend):
    good = tmp_path / "good.ckpt"
    torch.save({"lit_eemllm": {}, "state_dict": {}, "x": torch.zeros(100)}, good)
    assert read_checkpoint(good)["x"].shape == (100,)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(good.read_bytes()[:-300])
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    sentinel = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return (open, (str(sentinel), "w"))

    hostile, plain = tmp_path / "hostile.ckpt", tmp_path / "plain.ckpt"
    torch.save({"lit_eemllm": Bomb()}, hostile)
    plain.write_bytes(pickle.dumps({"lit_eemllm": Bomb()}))
    for path, reason in [(cut, "not readable"), (foreign, "no section"), (hostile, "not readable"), (plain, "not readable"),
                         (tmp_path / "none.ckpt", "no such")]:  # fmt: skip
        with pytest.raises(CheckpointError, match=f"{path.name}.*{reason}"):
            read_checkpoint(path)
        with pytest.raises(CheckpointError):
            fit(tiny.config(parts, blend, tmp_path / "run", f"resume={path}"))
    assert not sentinel.exists()


def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path, parts, blend, monkeypatch):
    config = tiny.config(parts, blend, tmp_path, "optim.max_steps=4", "optim.save_every=2", "optim.val_every=50")
    save, calls = torch.save, []

    def full_disk(value, file):
        calls.append(file)
        if len(calls) == 2:
            file.write(b"half of it")
            raise OSError("No space left on device")
        save(value, file)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(WriteError, match=r"step-4\.ckpt could not be written: No space left"):
        fit(config)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2.ckpt"]
    assert read_checkpoint(tmp_path / "checkpoints" / "step-2.ckpt")["global_step"] == 2


@pytest.mark.parametrize("trained", [("projector",), ("projector", "llm"), ("vision", "projector", "llm")], ids=str)
def test_only_what_is_tuned_changes_and_all_of_it(tmp_path, parts, blend, trained):
    words = {part: "full" if part in trained else "frozen" for part in ("vision", "projector", "llm")}
    options = [f"optim.tuning.{part}={word}" for part, word in words.items()]
    config = tiny.config(
        parts, blend, tmp_path, *options, "optim.projector_lr=1e-2", "optim.max_steps=2", "model.dtype=bfloat16"
    )
    module = LitEEMLLM(tiny.model("llama-gqa"), config)
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert {g["lr"] for g in groups if g["name"].startswith("projector")} == {1e-2}
    names = {id(p): name for name, p in module.model.named_parameters()}
    grouped = [names[id(p)] for g in groups for p in g["params"]]
    component = {"vision": "vision.", "projector": "projector.", "llm": "language_model."}
    never = {
        id(p) for part in module.model.vision.unused() for p in part.parameters()
    }  # nothing reads what they compute
    expected = [
        n for i, n in names.items() if n.startswith(tuple(component[part] for part in trained)) and i not in never
    ]
    assert len(never) > 16
    assert sorted(grouped) == sorted(expected)
    assert all(g["weight_decay"] == 0 for g in groups)
    for part, prefix in component.items():
        dtype = torch.float32 if part in trained else torch.bfloat16
        assert {p.dtype for n, p in module.model.named_parameters() if n.startswith(prefix)} == {dtype}
    before = {n: p.clone() for n, p in module.model.named_parameters()}
    trainer = Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DataLoader([tiny.pack([[3, 0, 4], [5]]), tiny.pack([[2, 0, 1, 0, 3]])], batch_size=None))
    rates = {part: 1e-2 if part == "projector" else config.optim.lr for part in trained}
    assert module.step.rates == pytest.approx({part: rate * schedule(config.optim)(1) for part, rate in rates.items()})
    assert module.step.lr == module.step.rates[trained[-1]], "the rate of what is nearest to the output"
    changed = {n for n, p in module.model.named_parameters() if not p.equal(before[n])}
    ids_seen = {n for n in expected if n.endswith("lm_head.weight")}
    assert changed <= set(expected) and set(expected) - ids_seen <= changed


def test_schedule_by_hand():
    optim = SimpleNamespace(steps=100, warmup_ratio=0.03, schedule="cosine")
    factor = schedule(optim)
    assert [factor(step) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert factor(3 + 97 // 2) == pytest.approx(0.5 * (1 + math.cos(math.pi * 48 / 97)))
    assert factor(100) == factor(500) == pytest.approx(0)  # it never climbs back
    optim.schedule = "linear"
    assert schedule(optim)(51) == pytest.approx(49 / 97)
    optim.schedule, optim.warmup_ratio = "constant", 0.0
    assert {schedule(optim)(step) for step in (0, 50, 500)} == {1.0}


def test_the_log_line_is_right_by_hand(monkeypatch, tmp_path, parts, capsys):
    """Two steps of two packs: waits of 1 s, work of 3 s; validation (100 s) and a checkpoint (50 s) do not count. The second step has a
    teacher."""
    now = [0.0]
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: now[0])
    config = tiny.config(parts, "unused", tmp_path, "optim.log_every=2", "optim.max_steps=20")
    log, logged = RunLog(config), []
    monkeypatch.setattr(log.logs, "log_metrics", lambda values, step: logged.append((step, values)))
    trainer = SimpleNamespace(
        global_step=0, world_size=1, is_global_zero=True, callback_metrics={}, sanity_checking=False,
        datamodule=SimpleNamespace(skipped={"bad_image": 2}, drawn=dict),
    )  # fmt: skip
    step = Step(mean_loss=torch.tensor(0.0), grad_norm=torch.tensor(2.0))
    step.rates = {"llm": 0.5, "projector": 0.25, "vision": 0.5}
    module = SimpleNamespace(step=step, config=config, entry=None, model=tiny.model(), device=torch.device("cpu"))
    batch = tiny.pack([[3, 0, 4], [5]])  # 28 tokens, 2 + 3 + 4 = 9 targets
    log.on_train_start(trainer, module)
    for micro in range(4):
        now[0] += 1
        log.on_train_batch_start(trainer, module, batch, micro)
        now[0] += 3
        if micro % 2:
            trainer.global_step += 1
            module.step.mean_loss = torch.tensor(float(trainer.global_step))
            module.step.mean_kl = torch.tensor(0.25) if trainer.global_step == 2 else None
        log.on_train_batch_end(trainer, module, None, batch, micro)
        now[0] += 50 if micro == 2 else 0  # writes a checkpoint
        module.step.ended = now[0]
        if micro == 1:
            now[0] += 100
            log.on_validation_end(trainer, module)
    ((step, values),) = logged
    assert step == 2 and values["loss"] == 1.5 and values["lr"] == 0.5 and values["grad_norm"] == 2.0
    assert values["tokens_per_second"] == 4 * 28 / 16 and values["samples_per_second"] == 8 / 16
    assert values["step_seconds"] == 8 and values["data_wait_percent"] == 25 and values["targets_per_step"] == 18
    assert values["skipped"] == 2 and values["kl"] == 0.25
    first, line = capsys.readouterr().out.splitlines()
    assert first == "step      1  loss 1.0000  after 8.0 s; then a line every 2 steps"
    assert "  loss 1.5000  KL 0.2500  lr 5.00e-01 (projector 2.50e-01)  grad 2.00  7 tokens/s  " in line
    assert line.endswith("  skipped 2  0:02:24 left"), "18 steps of 8 s, for whoever reads it in a file"


def test_a_run_goes_on_as_what_it_was(tmp_path, parts, blend, capsys):
    """A finished or broken run is not relabelled: every changed key is named, and nothing of the run is touched."""
    fit(tiny.config(parts, blend, tmp_path, "optim.max_steps=2"))
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as error:
        fit(tiny.config(parts, blend, tmp_path, "optim.max_steps=4", "optim.lr=1e-5", "model.mechanism.preset=llava",
                        "model.vision.policy=pad", "trainer.accumulate_grad_batches=2", "seed=7"))  # fmt: skip
    for key in (
        "optim.lr was 0.003 and is 1e-05",
        "model.mechanism.preset was ee_mllm and is llava",
        "model.vision.policy was resize and is pad",
        "accumulate_grad_batches",
        "seed was 0 and is 7",
    ):
        assert key in str(error.value)
    assert "max_steps" not in str(error.value)
    assert "{" not in str(error.value), "of what has not changed nothing is said"
    printed = capsys.readouterr().out
    assert "done: 2 steps" in printed and "nothing to do" not in printed
    assert "\nattention: " in printed and "needs a CUDA device" not in printed, "which is no news on a CPU"
    fit(tiny.config(parts, blend, tmp_path, "optim.max_steps=2"))
    printed = capsys.readouterr().out
    assert (
        f"nothing to do: {tmp_path} is finished, at step 2 of as many. To train it further: lit-eemllm fit {tmp_path} o"
        in printed
    )
    mechanism = "dense_layers none, cross_layers all, visual_source stream, aligner.value true, aligner.output true, aligner.ffn true, "
    assert f"mechanism ee_mllm: {mechanism}visual_window 0, visual_positions sequence, freeze_prefix false\n" in printed
    assert {path: path.read_bytes() for path in files if path.suffix in (".ckpt", ".yaml")} == {
        path: content for path, content in files.items() if path.suffix in (".ckpt", ".yaml")
    }
    fit(tiny.config(parts, blend, tmp_path, "optim.max_steps=4", "model.attention=reference", "optim.save_every=1"))
    assert newest_checkpoint(tmp_path).name == "step-4.ckpt"


def test_a_run_keeps_the_options_of_its_mechanism(tmp_path, parts, blend):
    flamingo = ["model.mechanism.preset=flamingo", "optim.max_steps=1"]
    fit(tiny.config(parts, blend, tmp_path, *flamingo, "model.mechanism.options.gated.every=2"))
    with pytest.raises(CheckpointError, match=r"model.mechanism.options.gated.every was 2 and is None"):
        fit(tiny.config(parts, blend, tmp_path, *flamingo))


@pytest.mark.parametrize(
    ("workers", "ranks", "expected"),
    [
        (1, 2, "With 2 ranks it goes on with trainer.accumulate_grad_batches=4 data.workers=2. "),
        (1, 1, "With 1 rank it goes on with trainer.accumulate_grad_batches=8 data.workers=4. "),
        (1, 3, "It goes on with 1 or 2 or 4 ranks. "),
        (1, 8, "It goes on with 1 or 2 or 4 ranks. "),  # less than one worker each
        (2, 8, "With 8 ranks it goes on with trainer.accumulate_grad_batches=1 data.workers=1. "),
        (3, 2, "It goes on with 4 ranks. "),  # the steps do not take as many packs of each worker
        (0, 2, "It goes on with 4 ranks. "),
    ],
)
def test_a_refused_number_of_ranks_comes_with_what_would_work(tmp_path, workers, ranks, expected):
    """Saved by 4 ranks that accumulate 2 packs: 8 packs a step."""
    saved = tiny.config(tmp_path, "unused", tmp_path, "trainer.accumulate_grad_batches=2", f"data.workers={workers}")
    progress = {"epoch_loop.batch_progress": {"current": {"processed": 8, "ready": 8}}}
    checkpoint = {"loops": {"fit_loop": progress}, "lit_eemllm": {"config": asdict(saved), "ranks": 4}}
    now = replace(saved, trainer={**saved.trainer, "accumulate_grad_batches": 3})
    with pytest.raises(CheckpointError) as error:
        refuse_changes(checkpoint, now, ranks)
    assert f"x ranks was 2 x 4 and is 3 x {ranks}. {expected}" in str(error.value)
    if found := re.search(r"accumulate_grad_batches=(\d+)", expected):
        refuse_changes(
            checkpoint, replace(saved, trainer={**saved.trainer, "accumulate_grad_batches": int(found[1])}), ranks
        )


def test_a_stage_on_top_of_another_resumes(tmp_path, parts, blend):
    """Its frozen decoder came from `init_from`, so its own checkpoints do not hold it."""
    fit(tiny.config(parts, blend, tmp_path / "a", "optim.max_steps=2"))
    options = (f"init_from={tmp_path / 'a'}", "optim.tuning.llm=frozen", "optim.save_every=1")
    fit(tiny.config(parts, blend, tmp_path / "b", *options, "optim.max_steps=1"))
    fit(tiny.config(parts, blend, tmp_path / "b", *options, "optim.max_steps=2"))
    assert newest_checkpoint(tmp_path / "b").name == "step-2.ckpt"


def test_packs_without_images_train_a_projector(tmp_path, parts):
    """No image in a pack: the step goes through, and the projector has a gradient of zero instead of none."""
    config = tiny.config(parts, "unused", tmp_path, "optim.tuning.llm=frozen", "optim.max_steps=2")
    module = Probe(tiny.model(), config)
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DataLoader([tiny.pack([[5], [9]])], batch_size=None))
    assert len(module.gradients) == 4 and all(g.count_nonzero() == 0 for g in module.gradients.values())


def test_gradients_are_clipped_to_the_configured_norm(tmp_path, parts):
    class Keeps(LitEEMLLM):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.clipped = torch.stack([g.square().sum() for g in grads]).sum().sqrt().item()

        def optimizer_zero_grad(self, *args):
            pass

    config = tiny.config(parts, "unused", tmp_path, "optim.clip_grad_norm=0.5", "optim.max_steps=1")
    module = Keeps(tiny.model(), config)
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DataLoader([tiny.pack([[3, 0, 4], [5]])], batch_size=None))
    assert module.step.grad_norm.item() > 1 and module.clipped == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    "preset", ["ee_mllm_f", "saisa", "shortv", "vica", "flamingo", "casa", "visual_experts", "p_mod"]
)
def test_every_mechanism_trains_all_its_weights_and_resumes_exactly(tmp_path, parts, blend, preset):
    """Four steps, and two continued from their checkpoint: all tensors, also those that only this mechanism has."""
    small = ["model.mechanism.gated.every=2", "model.mechanism.gated.latents=3", "model.mechanism.gated.heads=2"]
    options = [f"model.mechanism.preset={preset}", "optim.max_steps=4", "optim.save_every=2", "data.val=null"]
    options += small * (preset == "flamingo")
    whole, again = tmp_path / "whole", tmp_path / "again"
    fit(tiny.config(parts, blend, whole, *options))
    (again / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "step-2.ckpt", again / "checkpoints")
    start = read_checkpoint(again / "checkpoints" / "step-2.ckpt")["state_dict"]
    config = tiny.config(parts, blend, again, *options)
    fit(config)
    a, b = (read_checkpoint(newest_checkpoint(run)) for run in (whole, again))
    assert_same(a["state_dict"], b["state_dict"])
    assert_same(a["optimizer_states"], b["optimizer_states"])
    model = build(config.model)[0]
    own = {f"model.{name}" for name, _ in model.named_parameters() if not name.startswith("vision.")}
    assert set(a["state_dict"]) == own
    still = [name for name in own if a["state_dict"][name].equal(start[name])]
    assert not [name for name in still if not name.endswith("embed_tokens.weight")]


def test_another_vocabulary_is_refused(tmp_path, parts, blend):
    config = tiny.config(parts, blend, tmp_path / "a", "optim.max_steps=1", "data.val=null")
    fit(config)
    model, processor = build(config.model)
    held = read_checkpoint(newest_checkpoint(tmp_path / "a"))
    assert held["lit_eemllm"]["tokenizer"] == processor.fingerprint()
    assert held["lit_eemllm"]["mechanism"] == model.config.mechanism
    processor.tokenizer.add_tokens(["more"])
    module = LitEEMLLM(model, config, processor)
    with pytest.raises(CheckpointError, match="trained with another vocabulary"):
        module.on_load_checkpoint(held)


def test_weights_to_start_from_are_listed_by_component(tmp_path, parts, blend, capsys):
    config = tiny.config(parts, blend, tmp_path / "a", "optim.max_steps=1", "data.val=null", "optim.tuning.llm=frozen")
    fit(config)
    assert "max_position_embeddings" not in capsys.readouterr().out
    more = ["data.max_length=300", f"init_from={tmp_path / 'a'}", "model.mechanism.preset=shortv"]
    fit(tiny.config(parts, blend, tmp_path / "b", "optim.max_steps=1", "data.val=null", *more))
    out = capsys.readouterr().out
    assert "warning: data.max_length=300, but the decoder knows 256 positions (max_position_embeddings)" in out
    assert "warning: in a decoder of 3 layers this computes what llava does, bit for bit" in out
    lines = [line.split("│") for line in out.splitlines() if "│" in line]
    rows = {cells[1].strip(): (cells[2].strip(), cells[3].strip()) for cells in lines if len(cells) == 5}
    assert rows["projector"] == ("4", "none") and rows["language_model"][0] == "0"
    assert rows["language_model"][1].endswith("such as model.embed_tokens.weight")
