"""A schedule of mechanisms, and learning from another one: against a loop written by hand, to the bit after a cut, the same everywhere."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from lib.equations import plain
from lib.processes import run_ranks
from lib.runs import Killed, assert_same, fit_until, metrics
from lightning import Trainer, seed_everything
from torch.utils.data import DataLoader

from lit_eemllm.config import load_config
from lit_eemllm.core.select import Every
from lit_eemllm.errors import CheckpointError, ConfigError
from lit_eemllm.evaluation.run import load
from lit_eemllm.mechanisms import PRESETS, build_mechanism
from lit_eemllm.mechanisms.schedule import Schedule
from lit_eemllm.model import parts as model_parts
from lit_eemllm.model.packed import divergence
from lit_eemllm.names import check_names, check_options
from lit_eemllm.training.checkpoint import newest_checkpoint, read_checkpoint, refuse_changes
from lit_eemllm.training.fit import fit
from lit_eemllm.training.initial import initial_model
from lit_eemllm.training.module import LitEEMLLM
from lit_eemllm.training.tuning import set_modes

HALF = "rows: [{layers: 0-, tokens: every 2}]"
DUAL = f"optim.mechanisms=[{{weight: 3, mechanism: {{{HALF}}}}}, {{teacher: {{{HALF}}}, kl: 2, temperature: 3}}]"
"""Most steps on half of the visual tokens, some on all, which learn from half."""
LLAVA = "model.mechanism.preset=llava"


def schedule(*overrides, preset="llava", decoder="llama-gqa", checks=(check_names, check_options)):
    """Of three layers."""
    lines = ["model.decoder=x", "model.vision.path=x", "data.train=x", "optim.lr=1e-3", "optim.max_steps=9"]
    config = load_config([], [*lines, f"model.mechanism.preset={preset}", *overrides], checks=checks)
    return Schedule.of(config, build_mechanism(preset, 3), tiny.DECODERS[decoder])


def entries_of(text):
    return f"optim.mechanisms={text}"


# --- what a step draws


def test_ranges_and_steps_that_no_entry_has():
    found = schedule(
        entries_of("[{steps: 2-3, mechanism: {preset: ee_mllm}}, {steps: 5-, mechanism: {preset: naavit}}, {steps: 7}]")
    )
    drawn = [[found.entries.index(found.at(step)) for step in range(first, last)] for first, last in ((1, 7), (8, 12))]
    assert drawn == [[3, 0, 0, 3, 1, 1], [1] * 4] and found.own == PRESETS["llava"]
    assert {
        found.entries.index(found.at(7)),
        *(found.entries.index(replace(found, seed=s).at(7)) for s in range(40)),
    } == {1, 2}
    assert [entry.mechanism for entry in found.entries] == [
        build_mechanism(n, 3) for n in ("ee_mllm", "naavit", "llava", "llava")
    ]
    assert found.shares(8) == pytest.approx([2 / 8, 3.5 / 8, 0.5 / 8, 2 / 8])
    assert found.shares(3) == pytest.approx([2 / 3, 0, 0, 1 / 3]) and found.shares(None) == [0, 1, 0, 0]


def test_what_is_drawn_follows_from_seed_and_step_alone_by_the_weights():
    text = entries_of(
        "[{weight: 9, mechanism: {preset: ee_mllm}}, {weight: 0.5}, {weight: 0.5, mechanism: {preset: naavit}}]"
    )
    found, again, other = schedule(text), schedule(text), schedule(text, "seed=1")
    steps = range(1, 20_001)
    drawn = [found.entries.index(found.at(step)) for step in steps]
    assert drawn[::-1] == [again.entries.index(again.at(step)) for step in reversed(steps)]
    assert drawn != [other.entries.index(other.at(step)) for step in steps]
    for entry, share in ((0, 0.9), (1, 0.05), (2, 0.05), (3, 0)):
        assert abs(drawn.count(entry) / len(steps) - share) <= 4 * (share * (1 - share) / len(steps)) ** 0.5, entry
    pairs = Counter(zip(drawn, drawn[1:], strict=False))
    assert pairs[1, 1] == pytest.approx(0.05**2 * len(steps), rel=0.5), "steps do not depend on each other"
    others = {step: entry for step, entry in zip(steps, drawn[:39], strict=False) if entry}
    assert others == {8: 2, 15: 1, 28: 1, 33: 2, 34: 2}, "runs of before go on as they would have"


def test_entries_override_single_keys_as_files_do():
    """Null is as the preset says; what an entry does not name is as in model.mechanism."""
    base = ["model.mechanism.aligner.ffn=false", "model.mechanism.rows=[{layers: 1, seen: none}]"]
    text = "[{mechanism: {rows: null, dense_layers: [0]}}, {mechanism: {aligner: {ffn: null}}, teacher: {preset: llava, rows: null}}]"
    found = schedule(*base, entries_of(text), preset="ee_mllm")
    first, second = found.entries[0], found.entries[1]
    assert first.mechanism == build_mechanism("ee_mllm", 3, {"aligner": {"ffn": False}, "dense_layers": [0]})
    assert second.mechanism == build_mechanism("ee_mllm", 3, {"rows": [{"layers": 1, "seen": "none"}]})
    assert second.teacher == build_mechanism("llava", 3, {"aligner": {"ffn": False}})


MISTAKES = {
    "[]": "found 0 entries, expected 1 to 100; null for no schedule",
    "[ee_mllm]": "entry 1: found 'ee_mllm', expected a section such as {weight: 9, mechanism: {preset: llava}}",
    "[{}, {step: 3}]": "entry 2: found 'step', expected steps or weight or mechanism or teacher or kl or temperature; did you mean steps?",
    "[{steps: 0-9}]": "entry 1: steps: found '0-9', expected optimiser steps from 1, such as 7, 1-1000 or 1001-",
    "[{steps: 9-3}]": "entry 1: steps: found '9-3', expected optimiser steps from 1, such as 7, 1-1000 or 1001-",
    "[{weight: 0}]": "entry 1: weight: found 0, expected a number, more than 0 and less than 1e9",
    "[{weight: often}]": "entry 1: weight: found 'often', expected a number, more than 0 and less than 1e9",
    "[{teacher: {}, kl: .nan}]": "entry 1: kl: found nan, expected a number, more than 0 and less than 1e9",
    "[{temperature: 2}]": "entry 1: temperature: has no effect without a teacher",
    "[{mechanism: llava}]": "entry 1: mechanism: found 'llava', expected keys of model.mechanism, such as {preset: llava}",
    "[{}, {mechanism: {preset: lava}}]": "entry 2: mechanism.preset: found 'lava', expected .* did you mean llava\\?",
    "[{mechanism: {row: 1}}]": "entry 1: mechanism.row: unknown key; did you mean model.mechanism.rows?",
    "[{teacher: {visual_window: many}}]": "entry 1: teacher.visual_window: found 'many' .text., expected a whole number or null",
    "[{teacher: {visual_window: -1}}]": "entry 1: teacher.visual_window: found -1, expected 0 or more",
    "[{mechanism: {rows: [{layers: 1, sees: all}]}}]": "entry 1: mechanism.rows: a row has no sees; .*",
    "[{mechanism: {options: {k: 1}}}]": "entry 1: mechanism.options.k: the preset llava has no such option; .*",
    "[{teacher: {preset: saisa}}]": r"entry 1: teacher: saisa needs other modules than model.mechanism \(llava\), and a model cannot have both",
    "[{}, {mechanism: {preset: flamingo}}]": r"entry 2: mechanism: flamingo needs other modules than .*",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_name_the_entry_before_any_file_is_opened(text):
    with pytest.raises(ConfigError) as caught:
        schedule(entries_of(text))
    head, line, *others = str(caught.value).splitlines()
    assert head == "a mistake in the configuration:" and not others
    assert re.fullmatch(rf"  command line: optim.mechanisms: ({re.escape(MISTAKES[text])}|{MISTAKES[text]})", line), (
        line
    )


def test_mistakes_of_model_mechanism_are_told_once_and_layers_when_they_are_known():
    with pytest.raises(ConfigError) as caught:
        schedule("model.mechanism.visual_window=-1", entries_of("[{}, {}]"))
    assert str(caught.value).count("found -1") == 1
    with pytest.raises(ConfigError) as caught:
        schedule(entries_of("[{}, {mechanism: {dense_layers: [3]}, teacher: {rows: [{layers: 5-, seen: none}]}}]"))
    assert str(caught.value).splitlines() == [
        "optim.mechanisms: entry 2: mechanism.dense_layers: found [3], this decoder has layers 0 to 2",
        "optim.mechanisms: entry 2: teacher.rows: found '5-', expected layers from 0 to 2, such as 3, 4-7 or 8-",
    ]
    text, told = (
        "[{mechanism: {preset: ee_mllm, aligner: {output: false}}}]",
        "value=True with output=False needs heads",
    )
    with pytest.raises(ConfigError, match=rf"optim\.mechanisms: entry 1: mechanism\.aligner: {told}"):
        schedule(entries_of(text), decoder="qwen3")


def test_mistakes_are_named_where_no_registry_was_asked_before():
    """As by a program that loads a configuration without the checks of the command line."""
    with pytest.raises(ConfigError) as caught:
        schedule(entries_of("[{teacher: {preset: lava}}, {mechanism: {preset: saisa}}]"), checks=[])
    first, second = str(caught.value).splitlines()
    assert first.startswith("optim.mechanisms: entry 1: teacher.preset: unknown preset 'lava'")
    assert second.startswith("optim.mechanisms: entry 2: mechanism: saisa needs other modules")


def test_a_mechanism_that_is_a_table_alone_may_take_any_others_place():
    with tiny.forgotten_imports():
        from examples import skipping

        assert skipping
        found = schedule(entries_of("[{mechanism: {preset: skipping, options: {k: 1}}}]"), preset="ee_mllm")
        model = tiny.model(mechanism="ee_mllm")
        model.set_mechanism(found.entries[0].mechanism)
        assert [row.seen for row in model.table] == [PRESETS["ee_mllm"].plan(0, 3).seen, Every(2), Every(2)]


# --- the KL term


def test_kl_by_hand():
    """Of (3/4, 1/4) and (1/2, 1/2); at temperature 2 the first is (r, 1) / (r + 1), with r the root of 3."""
    teacher, student = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
    assert divergence(teacher, student, 1).item() == pytest.approx(
        0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    )
    p = torch.tensor([3**0.5, 1]) / (1 + 3**0.5)
    assert divergence(teacher, student, 2).item() == pytest.approx(4 * (p * (2 * p).log()).sum().item(), rel=1e-5)
    assert divergence(teacher[:0], student[:0], 1) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_of_the_kl_is_that_of_its_definition(temperature):
    teacher, student = torch.randn(2, 7, 11, dtype=torch.float32).unbind()
    student.requires_grad_(True)
    found = torch.autograd.grad(divergence(teacher, student, temperature), student)[0]
    wide = student.detach().double().requires_grad_(True)
    p, q = ((x / temperature).exp() for x in (teacher.double(), wide))
    p, q = (x / x.sum(-1, keepdim=True) for x in (p, q))
    (true,) = torch.autograd.grad(temperature**2 * (p * (p / q).log()).sum(), wide)
    assert tiny.max_error(found.double(), true) <= 1e-5


def module_of(mechanism, *overrides, folder="x", seed=3, **kinds):
    """As it is when training begins, in a decoder with random weights; without dropout, if `overrides` do not say so."""
    config = tiny.config(
        folder, "unused", folder, "optim.tuning.llm=lora", "optim.lora.r=4", "optim.lora.dropout=0", *overrides
    )
    torch.manual_seed(seed)
    module = LitEEMLLM(tiny.model(mechanism=mechanism, **kinds), config)
    for name, parameter in module.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    set_modes(module.model, module.trained)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    return module


def gradients(module, batch, dtype=None):
    """Of a pack; also the loss that was back-propagated."""
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = module.training_step(batch, 0)
    loss.backward()
    module.on_after_backward()
    found = {name: p.grad for name, p in module.model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return loss, found


PACK = [[3, 0, 4], [2, 0, 1, 0, 3], [7]]


def test_of_itself_nothing_is_learned(tmp_path):
    (_, true), (loss, found) = (
        gradients(module_of("llava", LLAVA, *more, folder=tmp_path), tiny.pack(PACK))
        for more in ((), [entries_of("[{teacher: {}, kl: 100}]")])
    )
    largest = max(gradient.abs().max() for gradient in true.values())
    for name, gradient in true.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * largest, name
    module = module_of("llava", LLAVA, entries_of("[{teacher: {}}]"), folder=tmp_path)
    gradients(module, tiny.pack(PACK))
    assert abs(module.step.packs[0].kl) <= 1e-6 and torch.isfinite(loss)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_loss_and_gradients_of_a_step_with_a_teacher(tmp_path, monkeypatch, dtype, checkpointing, tuning):
    """Against the equations, with the teacher's logits computed apart (in 16 bits against two ordinary passes); recomputed layers do
    what they did; autocast's copies of weights that the teacher has used do not keep gradients from them."""
    text = entries_of(f"[{{mechanism: {{preset: ee_mllm}}, teacher: {{{HALF}}}, kl: 2, temperature: 3}}]")
    checkpoint = f"optim.activation_checkpointing={str(checkpointing).lower()}"
    module = module_of("llava", LLAVA, text, checkpoint, f"optim.tuning.llm={tuning}", folder=tmp_path)
    batch, model = tiny.pack(PACK), module.model
    cleared = []
    with monkeypatch.context() as patch:  # newer versions of PyTorch do not need it
        patch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(model.mechanism.rows))
        loss, found = gradients(module, batch, dtype)
    assert cleared[0] and model.mechanism == PRESETS["llava"]

    def logits(mechanism):
        model.set_mechanism(mechanism)
        if dtype is None:
            return plain(model, batch)[batch.target_rows]
        with torch.autocast("cpu", dtype):
            return model.packed_logits(batch).float()

    model.zero_grad()
    with torch.no_grad():
        t = logits(build_mechanism("llava", 3, {"rows": [{"layers": "0-", "tokens": "every 2"}]}))
    s = logits(PRESETS["ee_mllm"])
    p, q = torch.softmax(t / 3, -1), torch.softmax(s / 3, -1)
    crossed = -torch.softmax(s, -1)[torch.arange(len(s)), batch.targets].log().sum()
    kl = 9 * (p * (p.log() - q.log())).sum()
    (crossed + 2 * kl).backward()
    assert 0.05 < kl / crossed < 20, "both matter"
    bound = 2e-5 if dtype is None else 0.05
    assert loss.item() == pytest.approx((crossed + 2 * kl).item(), rel=bound)
    pack = module.step.packs[0]
    assert (pack.loss.item(), pack.kl.item()) == pytest.approx((crossed.item(), kl.item()), rel=2 * bound)
    true = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    largest = max(gradient.abs().max() for gradient in true.values())
    for name, gradient in true.items():
        assert (found[name] - gradient).abs().max() <= 5 * bound * largest, name
        assert (
            dtype is not None
            or tiny.max_error(found[name], gradient) <= 100 * bound
            or gradient.abs().max() < 1e-5 * largest
        ), name


def test_a_teacher_draws_no_random_numbers_and_leaves_modes_as_they_were(tmp_path):
    """So the student's dropout is what it would be without a teacher."""
    dropout = ["optim.lora.dropout=0.5", "optim.tuning.vision=lora"]
    text = entries_of(f"[{{teacher: {{{HALF}}}}}]")
    alone, taught = (module_of("llava", LLAVA, *dropout, *more, folder=tmp_path) for more in ((), (text,)))
    modes = [part.training for part in taught.modules()]
    assert any(modes)
    batch, states = tiny.pack(PACK), []
    for module in (alone, taught):
        torch.manual_seed(7)
        gradients(module, batch)
        states.append(torch.get_rng_state())
    assert states[0].equal(states[1])
    assert modes == [part.training for part in taught.modules()]
    assert alone.step.packs[0].loss.equal(taught.step.packs[0].loss)
    module = taught
    first, second = (module._logits_of_teacher(batch, module.entry.teacher) for _ in range(2))
    assert first.equal(second) and not first.requires_grad


def test_the_backend_is_tried_with_the_widest_heads_of_the_schedule(tmp_path, monkeypatch):
    """Where text scores unrotated keys, heads are twice as wide."""
    tried = []
    right = model_parts.resolve_backend
    monkeypatch.setattr(model_parts, "resolve_backend", lambda *given: tried.append(given[-1]) or right(*given))
    for text, width in (("[{}]", 8), ("[{}, {teacher: {visual_positions: unrotated}}]", 16)):
        module = module_of("ee_mllm", entries_of(text), folder=tmp_path)
        module.on_fit_start()
        assert tried.pop() == width and module.model.mechanism == PRESETS["ee_mllm"]


# --- a run


@pytest.fixture(scope="module")
def options():
    return [
        LLAVA, DUAL, "optim.max_steps=8", "trainer.accumulate_grad_batches=2", "optim.schedule=constant", "optim.warmup_ratio=0",
        "optim.lr=1e-3", "optim.save_every=3", "optim.val_every=3", "optim.keep=9", "seed=11",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, parts, shapes, options):
    """Its folder and, of every step, the packs."""
    out, packs = tmp_path_factory.mktemp("scheduled"), []
    right, mechanisms = LitEEMLLM.training_step, []

    def seen(module, batch, number):
        packs.append((module.global_step, batch))
        return right(module, batch, number)

    def validated(module, batch, number):
        mechanisms.append(module.model.mechanism)
        return right_validation(module, batch, number)

    right_validation = LitEEMLLM.validation_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LitEEMLLM, "training_step", seen)
        patch.setattr(LitEEMLLM, "validation_step", validated)
        fit(tiny.config(parts, shapes, out, *options))
    assert set(mechanisms) == {PRESETS["llava"]}
    return out, packs


def test_a_run_is_the_loop_that_is_written_by_hand(tmp_path, parts, shapes, run, options):
    """Mechanisms set by hand, the KL from its definition, plain AdamW, on the same packs: losses, KL and weights."""
    out, packs = run
    config = tiny.config(parts, shapes, tmp_path, *options)
    seed_everything(config.seed, verbose=False)
    model, _, _ = initial_model(config)
    model.train().requires_grad_(True)
    model.vision.eval().requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    whole, half = PRESETS["llava"], build_mechanism("llava", 3, {"rows": [{"layers": "0-", "tokens": "every 2"}]})
    draws = schedule(*(text for text in options if not text.startswith("trainer")))
    rows, kinds = metrics(out), []
    for step in range(8):
        slow = draws.at(step + 1).teacher is not None
        kinds.append(slow)
        loss, kl, tokens = torch.zeros(()), torch.zeros(()), 0
        for batch in [batch for number, batch in packs if number == step]:
            tokens += len(batch.targets)
            if slow:
                model.set_mechanism(half)
                with torch.no_grad():
                    p = torch.softmax(plain(model, batch)[batch.target_rows] / 3, -1)
            model.set_mechanism(whole if slow else half)
            logits = plain(model, batch)[batch.target_rows]
            loss = loss - torch.log_softmax(logits, -1)[torch.arange(len(logits)), batch.targets].sum()
            if slow:
                kl = kl + 9 * (p * (p.log() - torch.log_softmax(logits / 3, -1))).sum()
        optimizer.zero_grad()
        ((loss + 2 * kl) / tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        row = rows[step + 1]
        assert float(row["loss"]) == pytest.approx((loss / tokens).item(), rel=1e-4)
        assert float(row["grad_norm"]) == pytest.approx(norm.item(), rel=1e-3)
        assert (float(row["kl"]) == pytest.approx((kl / tokens).item(), rel=2e-3)) if slow else row["kl"] == ""
    assert set(kinds) == {True, False}, "both kinds of steps"
    found = read_checkpoint(newest_checkpoint(out))["state_dict"]
    true = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == true.keys()
    begun = {f"model.{name}": x for name, x in _initial(config).items()}
    moved = max((true[name] - begun[name]).abs().max() for name in true)
    error = max((found[name] - true[name]).abs().max() for name in true)
    assert error <= 0.02 * moved, (error, moved)


def _initial(config):
    seed_everything(config.seed, verbose=False)
    return initial_model(config)[0].state_dict()


def test_a_cut_in_the_middle_of_a_schedule_changes_no_bit(tmp_path, parts, shapes, run, options):
    """With dropout in adapters; a run that is killed before step 6 goes on from step 3."""
    more = ["optim.tuning.llm=lora", "optim.lora.r=4", "optim.lora.dropout=0.3", "data.val=null"]
    fit(tiny.config(parts, shapes, tmp_path / "whole", *options, *more))
    with pytest.raises(Killed):
        fit_until(5, tiny.config(parts, shapes, tmp_path / "cut", *options, *more))
    fit(tiny.config(parts, shapes, tmp_path / "cut", *options, *more))
    a, b = (read_checkpoint(newest_checkpoint(tmp_path / name)) for name in ("whole", "cut"))
    for section in ("state_dict", "optimizer_states", "rng"):
        assert_same(a[section], b[section], section)
    whole, cut = metrics(tmp_path / "whole"), metrics(tmp_path / "cut")
    assert all(
        whole[step][name] == cut[step][name] for step in whole for name in ("loss", "kl", "grad_norm", "keys_crc")
    )


def test_what_is_saved_and_evaluated_is_model_mechanism(parts, shapes, run, options, capsys):
    """Whatever the last step used; another schedule is another run."""
    out, _ = run
    assert Schedule.at(_schedule_of(out), 3).mechanism != PRESETS["llava"], (
        "so the checkpoint of step 3 could have another"
    )
    for path in sorted((out / "checkpoints").glob("*.ckpt")):
        assert read_checkpoint(path)["lit_eemllm"]["mechanism"] == PRESETS["llava"].to_dict(), path
    config = tiny.config(parts, shapes, out, *options)
    assert load(config, None)[0].mechanism == PRESETS["llava"]
    changed = tiny.config(parts, shapes, out, *options, DUAL.replace("weight: 3", "weight: 4"))
    with pytest.raises(CheckpointError, match=r"optim.mechanisms was \[.*'weight': 3.*\] and is \[.*'weight': 4"):
        refuse_changes(read_checkpoint(newest_checkpoint(out)), changed, 1)


def _schedule_of(out):
    config = load_config([out / "config.yaml"])
    return Schedule.of(config, PRESETS["llava"], tiny.model().config.text_config)


def test_the_start_says_the_schedule(tmp_path, parts, shapes, options, capsys):
    fit(tiny.config(parts, shapes, tmp_path, *options, "optim.max_steps=1", "data.val=null"))
    said = " ".join(capsys.readouterr().out.split())
    half = "rows: [{layers: 0-, tokens: every 2}]"
    assert f"trained by a schedule, about 75.0% of 1 steps: {{weight: 3, mechanism: {{{half}}}}}" in said
    assert f"trained by a schedule, about 25.0% of 1 steps: {{teacher: {{{half}}}, kl: 2, temperature: 3}}" in said


# --- several ranks


def train_as_rank(folder):
    """Eight steps of two packs, of which a rank has one; every second pack has no image."""
    import os

    rank = int(os.environ["LOCAL_RANK"])
    found = []
    module = _distributed(folder, found)
    packs = [tiny.pack([[3, 0, 4]] if (step + rank) % 2 else [[9], [4]], seed=2 * step + rank) for step in range(8)]
    _trainer(devices=2, strategy="ddp").fit(module, DataLoader(packs, batch_size=None))
    torch.save({"drawn": found, "weights": _weights(module)}, folder / f"{rank}.pt")


def _trainer(**options):
    return Trainer(
        max_steps=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, **options,
    )  # fmt: skip


def _distributed(folder, found):
    class Probe(LitEEMLLM):
        def on_after_backward(self):
            found.append((self.mechanisms.entries.index(self.entry), self.model.mechanism.to_dict()))
            super().on_after_backward()

    config = tiny.config(folder, "unused", folder, LLAVA, DUAL, "optim.max_steps=8", "seed=11")
    return Probe(tiny.model(mechanism="llava"), config)


def _weights(module):
    return {name: p.detach().clone() for name, p in module.model.named_parameters() if p.requires_grad}


@pytest.mark.timeout(300)
def test_two_ranks_choose_the_same_and_train_as_one(tmp_path):
    run_ranks(train_as_rank, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["drawn"] == second["drawn"] and {entry for entry, _ in first["drawn"]} == {0, 1}
    assert_same(first["weights"], second["weights"])
    found = []
    module = _distributed(tmp_path, found)
    order = [(step, rank) for step in range(8) for rank in (0, 1)]
    packs = [tiny.pack([[3, 0, 4]] if (step + rank) % 2 else [[9], [4]], seed=2 * step + rank) for step, rank in order]
    _trainer(devices=1, accumulate_grad_batches=2).fit(module, DataLoader(packs, batch_size=None))
    assert found[::2] == found[1::2] == first["drawn"]
    alone, begun = _weights(module), _weights(_distributed(tmp_path, []))
    moved = max((alone[name] - begun[name]).abs().max() for name in alone)
    assert max((alone[name] - first["weights"][name]).abs().max() for name in alone) <= 0.02 * moved


def test_a_mechanism_that_this_model_cannot_have_is_refused_before_the_first_step(tmp_path, monkeypatch):
    """As one for which the encoder must say what is important: names alone do not tell."""
    right = model_parts.ModelParts.problems
    told = lambda model, m: [("preset", "not with this encoder")] if m.name == "visionzip" else right(model, m)  # noqa: E731
    monkeypatch.setattr(model_parts.ModelParts, "problems", told)
    later = "optim.mechanisms=[{steps: 1-1000}, {steps: 1001-, mechanism: {preset: visionzip}}]"
    with pytest.raises(ConfigError, match=r"model\.mechanism\.preset: not with this encoder"):
        module_of(PRESETS["llava"], "model.mechanism.preset=llava", later, folder=tmp_path)
