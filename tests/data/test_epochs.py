"""`optim.epochs`: how long a pass over the data is, counted against what the loader really gives, and a run that is that long."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import tiny
from lib.runs import Killed, assert_same, fit_until
from shards_util import blend, module, row, write_shards

from lit_eemllm.config import load_config, to_yaml
from lit_eemllm.data import epoch
from lit_eemllm.data.epoch import count_packs
from lit_eemllm.errors import CheckpointError, ConfigError
from lit_eemllm.evaluation.run import load
from lit_eemllm.sweep import sweep
from lit_eemllm.training.checkpoint import newest_checkpoint, read_checkpoint
from lit_eemllm.training.fit import fit

REQUIRED = ["model.decoder=d", "model.vision.path=e", "data.train=t", "optim.lr=1"]


# --- one key or the other


def steps_and_epochs(files: list[Path], *overrides: str) -> tuple[int | None, float | None]:
    optim = load_config(files, [*REQUIRED, *overrides]).optim
    return optim.max_steps, optim.epochs


def test_what_is_given_later_replaces_the_other(tmp_path: Path) -> None:
    preset, own, both = (tmp_path / f"{name}.yaml" for name in ("preset", "own", "both"))
    preset.write_text("optim: {max_steps: 5197}\n")
    own.write_text("defaults: [preset.yaml]\noptim: {epochs: 0.5}\n")
    both.write_text("optim:\n  epochs: 2\n  max_steps: 3\n")
    assert steps_and_epochs([preset]) == (5197, None)
    assert steps_and_epochs([preset], "optim.epochs=2") == (None, 2)
    assert steps_and_epochs([own]) == (None, 0.5)
    assert steps_and_epochs([own], "optim.max_steps=7") == (7, None)
    assert steps_and_epochs([own, preset]) == (5197, None)
    assert steps_and_epochs([preset], "optim.epochs=2", "optim.epochs=null", "optim.max_steps=9") == (9, None)
    written = tmp_path / "written.yaml"
    written.write_text(to_yaml(load_config([preset], [*REQUIRED, "optim.epochs=2"]), comments=True))
    assert steps_and_epochs([written]) == (None, 2)
    for files, overrides in (([both], []), ([preset], ["optim.epochs=2", "optim.max_steps=3"])):
        with pytest.raises(
            ConfigError, match=r"optim.epochs: set together with optim.max_steps=3.*remove one of the two"
        ):
            steps_and_epochs(files, *overrides)
    with pytest.raises(ConfigError, match=r"optim.max_steps: required.* optim.max_steps=VALUE or optim.epochs=VALUE"):
        steps_and_epochs([])
    with pytest.raises(ConfigError, match=r"optim.epochs: found 0.0, expected more than 0"):
        steps_and_epochs([preset], "optim.epochs=0")


# --- how many packs


def test_packs_are_counted_as_the_loader_makes_them(tmp_path: Path) -> None:
    """Of samples of many lengths the loader's endless stream needs as many packs a pass; of one length it is an exact number."""
    draw = random.Random(0)
    rows = [row(i, answer="x" * draw.randint(1, 120)) for i in range(120)]
    data = module(write_shards(tmp_path / "a", {"train": rows}), packing_buffer=24)
    passes, seen, packs = 8, 0, 0
    batches = iter(data.train_dataloader())
    while seen < passes * len(rows):
        seen, packs = seen + len(next(batches).keys), packs + 1
    assert data.packs(count=True) == pytest.approx(packs / passes, rel=0.03)
    alike = write_shards(tmp_path / "b", {"train": [row(i % 10 + 10, answer="yes") for i in range(40)]})
    length = 1 + len("see 0") + 4 + len("what is 10?\n") + len("yes") + 1
    assert module(alike, pack_tokens=3 * length + 1, packing_buffer=300).packs(count=True) == math.ceil(40 / 3)
    assert module(alike, pack_samples=2).packs(count=True) == 20


def test_counting_holds_back_as_the_loader_does() -> None:
    """Rounds of four: the emptiest pack but the first waits and comes first in the next round; at the end none waits."""
    # [6], [5, 3], [4] of 8: 4 waits. [4, 2], [7] and [1] into it: 7 + 1; nothing is left
    assert count_packs([6, 5, 3, 4, 2, 7, 1], 8, None, 4) == 4
    assert count_packs([8, 8, 8], 8, None, 4) == 3
    assert count_packs([1] * 10, 8, 2, 4) == 5


def test_a_pass_over_a_blend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By repetitions every source so many times; by weights as many samples as all have; what cannot be used is none."""
    for name, images, count in (("a", 1, 30), ("b", 0, 10)):
        write_shards(tmp_path / name, {"train": [row(i, images) for i in range(count)]})
    counted: list[list[int]] = []
    monkeypatch.setattr(epoch, "count_packs", lambda lengths, *_: counted.append(sorted(lengths)) or len(lengths))
    short = {"train": [*(row(i, 0) for i in range(10)), row(10, 0, answer="x" * 300)]}
    write_shards(tmp_path / "c", short)
    assert module(blend(tmp_path, {"a": 2, "b": 3}, "repetitions")).packs(count=True) == 90
    assert module(blend(tmp_path, {"a": 1, "b": 3})).packs(count=True) == 40
    with_images = sum(length > 25 for length in counted[-1])
    assert with_images == 10, "a quarter of 40, though it has 30"
    assert module(tmp_path / "c").packs(count=True) == 10, "the eleventh is too long"


def test_lengths_are_kept_and_only_for_what_they_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path / "a", {"train": [row(i) for i in range(20)]})
    assert module(folder).packs(count=False) is None
    found = module(folder).packs(count=True)
    (kept,) = (folder / ".nv-meta").glob("tokens-*")
    assert module(folder).packs(count=False) == found
    assert module(folder, max_length=60).packs(count=False) is None, "another limit"
    kept.write_bytes(kept.read_bytes()[:-1])
    assert module(folder).packs(count=False) is None, "torn"
    kept.write_bytes(b"\xff" * 4 * 20)
    assert module(folder).packs(count=False) is None, "no lengths"
    monkeypatch.setattr(
        epoch, "write_atomically", lambda path, content: (_ for _ in ()).throw(epoch.WriteError("full"))
    )
    assert module(folder).packs(count=True) == found, "a folder of somebody else's"


# --- a run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, parts: Path, shapes: Path) -> Path:
    out = tmp_path_factory.mktemp("epochs")
    fit(config(parts, shapes, out, "optim.epochs=0.5"))
    return out


def config(parts: Path, shapes: Path, out: Path, *overrides: str):
    """Of `tiny`, with epochs in place of its steps, which stand on its command line."""
    given = tiny.config(
        parts, shapes, out, "data.val=null", "optim.save_every=2", "optim.keep=99", "data.max_length=400"
    )
    file = out.parent / f"{out.name}.yaml"
    file.write_text(to_yaml(given))
    return load_config([file], overrides)


def test_a_run_has_the_samples_of_its_epochs(whole: Path, parts: Path, shapes: Path) -> None:
    data = module(shapes)
    assert data.recipe("train").num_samples == 160
    checkpoint = read_checkpoint(newest_checkpoint(whole))
    (rank,) = checkpoint["ShardDataModule"]["ranks"]
    seen, steps = sum(rank["samples"].values()), checkpoint["global_step"]
    assert 80 - 2 * 80 / steps < seen < 80 + 2 * 80 / steps, "half of all, to a step or two"
    assert (
        "epochs: 0.5" in (whole / "config.yaml").read_text()
        and "max_steps: null" in (whole / "config.yaml").read_text()
    )
    rates = checkpoint["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in rates] == pytest.approx([0.0] * len(rates)), "the schedule has come to its end"
    load(load_config([whole / "config.yaml"]), None)


def test_it_goes_on_bit_for_bit_and_longer_but_not_shorter(
    whole: Path,
    parts: Path,
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(epoch, "_measured", None)  # the lengths are known
    half = config(parts, shapes, tmp_path / "run", "optim.epochs=0.5")
    with pytest.raises(Killed):
        fit_until(3, half)
    fit(half)
    ends = [read_checkpoint(newest_checkpoint(run)) for run in (whole, tmp_path / "run")]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "global_step"):
        assert_same(ends[0][key], ends[1][key], key)
    steps = ends[0]["global_step"]
    with pytest.raises(CheckpointError, match=rf"optim.max_steps=\d, but the run has {steps} steps already"):
        fit(config(parts, shapes, tmp_path / "run", "optim.epochs=0.1"))
    capsys.readouterr()
    with pytest.raises(Killed):
        fit_until(steps + 1, config(parts, shapes, tmp_path / "run", "optim.epochs=1"))
    printed = capsys.readouterr().out
    assert f"optim.max_steps was {steps} and is " in printed and "optim.epochs=1 is optim.max_steps=" in printed


def test_steps_per_epoch_stand_in_the_summary_once_they_are_known(
    whole: Path, parts: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(config(parts, shapes, tmp_path / "run", "optim.max_steps=2", "trainer.accumulate_grad_batches=2"))
    steps = read_checkpoint(newest_checkpoint(whole))["global_step"]  # of half an epoch, a pack each
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("steps per epoch: ")]
    packs = int(line.partition("(")[2].partition(" packs")[0])
    assert steps == math.ceil(packs / 2)
    assert line == f"steps per epoch: {packs / 2:.1f} ({packs} packs); {2 / (packs / 2):.2f} epochs"


def test_a_sweep_has_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(
        "optim: {epochs: 1, lr: 1}\nmodel: {decoder: d, vision: {path: e}}\ndata: {train: t, val: v}\n"
    )
    Path("sweep.yaml").write_text("base: [base.yaml]\nout: out\nseeds: [0]\ncells: {a: {}}\n")
    with pytest.raises(ConfigError, match=r"optim.epochs: a sweep sets optim.max_steps"):
        sweep(Path("sweep.yaml"), dry_run=True)
