"""The loader on good and bad data: what is delivered, counted, mixed, and what stops a run."""

from __future__ import annotations

import json
import logging
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from lib.samples import BAD
from megatron.energon.wrappers import ShuffleBufferDataset
from shards_util import blend, fingerprint, module, picture, row, sample, take, write_shards, write_tar

from lit_eemllm.data.recipe import read_recipe
from lit_eemllm.data.samples import SampleEncoder
from lit_eemllm.data.shards import prepare
from lit_eemllm.errors import ConfigError, SampleError, UserError

WORKERS = pytest.mark.parametrize("workers", [0, 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard folders a (train 24, val 11), b (train 12, without images) and one (train 1)."""
    folder = tmp_path_factory.mktemp("loader")
    write_shards(folder / "a", {"train": [row(i, i % 3) for i in range(24)], "val": [row(i) for i in range(11)]})
    write_shards(folder / "b", {"train": [row(i, 0) for i in range(12)]})
    write_shards(folder / "one", {"train": [row(1)]})
    return folder


@WORKERS
def test_bad_samples_are_skipped_counted_and_named(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    broken = {"json": sample(1)["json"], "0.jpg": picture(1, "JPEG", (80, 60))[:-40]}
    members = [{f"g{i}": sample(i, i % 3)} for i in range(8)] + [
        {f"bad{i}": dict(m)} for i, m in enumerate(BAD.values())
    ]
    order = [item for pair in zip(members[:8] * 2, members[8:], strict=False) for item in pair]  # good and bad in turn
    write_tar(tmp_path / "train.tar", {key: m for item in order for key, m in item.items()} | {"broken": broken})
    prepare(tmp_path)
    data = module(tmp_path, workers=workers, shuffle_buffer=0)
    seen: Counter[str] = Counter()
    for batch in islice(data.train_dataloader(), 12):
        seen.update(batch.keys)
    assert set(seen) == {f"g{i}" for i in range(8)}, "every good one, and no other"
    assert {case.split(",")[0] for case in BAD} | {"bad_image"} == set(data.skipped), "counted also across processes"
    total = sum(seen.values()) + sum(data.skipped.values())
    assert total >= 2 * (8 + len(BAD) + 1), "several epochs"
    if not workers:  # the message names shard, key and reason, and the first few only
        text = [record.message for record in caplog.records]
        assert any("train.tar: bad0.json" in line and "[bad_json]" in line for line in text)
        assert sum("[pickle]" in line for line in text) == 3 and "only counted" in " ".join(text)


@WORKERS
def test_a_row_of_bad_samples_stops_the_run(tmp_path: Path, workers: int) -> None:
    write_tar(tmp_path / "train.tar", {f"k{i}": sample(i) if i < 8 else {"json": b"{"} for i in range(28)})
    prepare(tmp_path)
    for limit, stops in ((40, False), (5, True))[bool(workers) :]:
        data = module(tmp_path, workers=workers, shuffle_buffer=0, max_bad_in_a_row=limit, pack_samples=1)
        batches = iter(data.train_dataloader())
        if not stops:
            assert len(list(islice(batches, 10))) == 10 and data.skipped["bad_json"] >= 10
        else:
            with pytest.raises(
                UserError, match=rf"^{limit} samples in a row(?s:.*)train.tar: k\d+.json(?s:.*)shards check$"
            ) as error:
                list(islice(batches, 60))
            assert "Traceback" not in str(error.value) and error.value.__cause__ is None
            with pytest.raises(UserError, match="has failed"):
                data.state_dict()


@WORKERS
def test_undecodable_images_stop_the_run_too(tmp_path: Path, workers: int) -> None:
    """Their headers are good, so they are found only when a pack is made: a row of its own."""
    broken = picture(1, "JPEG", (80, 60))[:-40]
    write_tar(tmp_path / "train.tar", {f"k{i}": {"json": sample(i)["json"], "0.jpg": broken} for i in range(8)})
    prepare(tmp_path)
    with pytest.raises(UserError, match="10 samples in a row"):
        next(iter(module(tmp_path, workers=workers, max_bad_in_a_row=10).train_dataloader()))


@pytest.mark.parametrize(
    ("workers", "error", "step"),
    [
        (0, TypeError, "tokenize"),
        (0, NameError, "tokenize"),  # Energon treats these as fatal, others not
        (0, AssertionError, "load_pixels"),
        (2, TypeError, "load_pixels"),
    ],
)
def test_mistakes_in_the_program_are_not_skipped(
    folder: Path, workers: int, error: type[Exception], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = getattr(SampleEncoder, step), []

    def sometimes_wrong(self: SampleEncoder, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == 5:
            raise error("a mistake in the program")
        return right(self, *arguments)

    monkeypatch.setattr(SampleEncoder, step, sometimes_wrong)
    with pytest.raises(Exception, match="a mistake in the program") as caught:
        list(islice(module(folder / "a", workers=workers).train_dataloader(), 20))
    assert not isinstance(caught.value, UserError)


def test_too_long_with_policy_error_stops_at_once(folder: Path) -> None:
    data = module(folder / "a", max_length=30, truncation="error")
    with pytest.raises(UserError, match=r"at most 30 are allowed.*data.truncation") as error:
        list(islice(data.train_dataloader(), 20))
    assert not isinstance(error.value, SampleError)
    data = module(folder / "a", max_length=47, truncation="truncate", pack_samples=1)
    lengths = [batch.layout.num_tokens for batch in islice(data.train_dataloader(), 40)]
    assert max(lengths) <= 47 and data.truncated == 0 and not data.skipped
    data = module(folder / "a", max_length=35, truncation="truncate", pack_samples=1)
    assert max(batch.layout.num_tokens for batch in islice(data.train_dataloader(), 40)) <= 35 and data.truncated > 5


def test_a_budget_below_one_image_is_refused(tmp_path: Path) -> None:
    """Of a blend it would make a run on text alone, of a validation a loss that is no number."""
    room = "an image takes 4 tokens, with the template and a word to say 10, so data.max_length=9 leaves no room"
    text = {
        "json": json.dumps({"conversations": [{**turn, "value": "a"} for turn in row(0, 0)["conversations"]]}).encode()
    }
    write_tar(tmp_path / "pictures" / "train.tar", {f"k{i}": sample(i) for i in range(4)})
    write_tar(tmp_path / "mixed" / "train.tar", {"text": text, **{f"k{i}": sample(i) for i in range(4)}})
    for name in ("pictures", "mixed"):
        prepare(tmp_path / name)
    recipe = blend(tmp_path, {"mixed": 1, "pictures": 1})
    (tmp_path / "val.yaml").write_text("splits: {val: {path: pictures, split_part: train}}")
    for data in (module(recipe, max_length=9), module(tmp_path / "mixed", tmp_path / "val.yaml", max_length=9)):
        with pytest.raises(UserError, match=rf"/pictures: k0: {room}"):
            data.setup("fit")
    mixed = module(tmp_path / "mixed", max_length=9)
    mixed.setup("fit")  # its first sample is text
    with pytest.raises(UserError, match=room):
        next(iter(mixed.train_dataloader()))
    module(recipe, max_length=60).setup("fit")


def test_a_source_that_cannot_be_used_is_refused_however_good_the_others(folder: Path, tmp_path: Path) -> None:
    good = {f"g{i}": sample(i) for i in range(9)}
    write_tar(tmp_path / "good" / "train.tar", good)
    write_tar(tmp_path / "bad" / "train.tar", {f"k{i}": {"json": b"{"} for i in range(9)})
    write_tar(tmp_path / "once" / "train.tar", {"first": sample(1), **{f"l{i}": {"json": b"{"} for i in range(9)}})
    for name in ("good", "bad", "once"):
        prepare(tmp_path / name)
    data = module(blend(tmp_path, {"good": 1, "bad": 1}))
    with pytest.raises(UserError, match=r"/bad: none of the first 9 samples of its split 'train' (?s:.*)bad_json +9"):
        data.setup("fit")
    with pytest.raises(UserError, match="bad: none of the first 4"):
        module(blend(tmp_path, {"good": 1, "bad": 1}), max_bad_in_a_row=4).setup("fit")
    later = module(blend(tmp_path, {"good": 1, "once": 1}), max_bad_in_a_row=8, shuffle_buffer=0)
    later.setup("fit")
    with pytest.raises(UserError, match=r"^8 samples in a row of once could not be used(?s:.*)once/train.tar: l"):
        list(islice(later.train_dataloader(), 40))
    (tmp_path / "val.yaml").write_text("splits: {val: {path: bad, split_part: train}}")
    with pytest.raises(UserError, match=r"/val.yaml: there is no pack to validate on"):
        list(module(folder / "a", tmp_path / "val.yaml").val_dataloader())


@WORKERS
def test_validation_is_finite_complete_and_the_same_every_time(folder: Path, workers: int) -> None:
    loader = module(folder / "a", folder / "a", workers=workers, packing_buffer=4, pack_samples=2).val_dataloader()
    assert not hasattr(loader, "__len__")
    batches = list(loader)
    first, keys = [fingerprint(batch) for batch in batches], [key for batch in batches for key in batch.keys]
    assert sorted(int(key.split("-")[1]) for key in keys) == list(range(11)) and len(first) > 2
    next(iter(loader))  # a pass that is broken off
    assert [fingerprint(batch) for batch in loader] == first
    assert module(folder / "a").val_dataloader() == []


def test_epochs_and_blends(folder: Path) -> None:
    once = module(folder / "a", pack_samples=1, shuffle_buffer=0)
    epochs = [key for batch in islice(once.train_dataloader(), 72) for key in batch.keys]
    # shards are sliced and drawn at random, every sample once before the next epoch, but for what the packing holds back
    assert Counter(epochs).most_common()[-1][1] >= 2 and len(set(epochs)) == 24 and epochs[:24] != sorted(epochs[:24])
    assert list(take(module(folder / "a"), 5)) == list(take(module(folder / "a"), 5))
    assert list(take(module(folder / "a"), 5)) != list(take(module(folder / "a", seed=1), 5))

    keys = Counter()
    for batch in islice(module(blend(folder, {"a": 1, "b": 3}), pack_samples=1).train_dataloader(), 800):
        keys["b" if batch.pixel_values is None and int(batch.keys[0].split("-")[1]) % 3 else "a"] += 1
    # b's rows have no image; of a's, a third have none, and their numbers are multiples of 3
    share_b = keys["b"] / 800  # two thirds of b's draws: 0.75 * 8 / 12
    assert 0.43 < share_b < 0.57

    recipe = blend(folder, {"a": 1, "b": 2}, "repetitions")
    data = module(recipe, pack_samples=1, shuffle_buffer=0, packing_buffer=1)
    epoch = Counter(fingerprint(batch) for batch in islice(data.train_dataloader(), 24 + 2 * 12))
    # a has 24 rows and b has 12, of which 4 are the same as in a
    assert sorted(epoch.values()) == [1] * 20 + [2] * 8 + [1 + 2] * 4


def test_a_blend_gets_the_shares_it_asks_for(folder: Path) -> None:
    """Also of part of a pass: 1.5 over the 12 of b beside 1 over the 24 of a, and half a pass."""
    for repetitions, share in (({"a": 1, "b": 1.5}, 18 / 42), ({"a": 0.5, "b": 2}, 24 / 36)):
        recipe = blend(folder, repetitions, "repetitions")
        data = module(recipe, pack_samples=1, packing_buffer=4)
        assert read_recipe(recipe, "train").shares["b"] == pytest.approx(share)
        assert len(list(islice(data.train_dataloader(), 600))) == 600
        asked, samples, _ = data.drawn()["b"]
        assert asked == pytest.approx(share) and abs(samples - share) < 0.06


def test_a_folder_that_is_listed_twice_is_one_source(folder: Path) -> None:
    (folder / "c").symlink_to(folder / "a")
    recipe, once = folder / "twice.yaml", blend(folder, {"a": 3, "b": 1})
    for key, name in (("blend", "weight"), ("blend_epochized", "repetitions")):
        listed = [{"path": "a", name: 1}, {"path": "b", name: 1}, {"path": "c", name: 2}]
        recipe.write_text(json.dumps({"splits": {"train": {key: listed}}}))
        once = blend(folder, {"a": 3, "b": 1}, name)
        assert read_recipe(recipe, "train").fingerprint() == read_recipe(once, "train").fingerprint()
        assert list(take(module(recipe), 5)) == list(take(module(once), 5))
    (folder / "c").unlink()
    listed = [{"path": "a", "weight": 1}, {"path": "a", "weight": 1, "split_part": "val"}]  # other samples
    recipe.write_text(json.dumps({"splits": {"train": {"blend": listed}}}))
    assert [source.split for source in read_recipe(recipe, "train").sources] == ["train", "val"]


def test_loading_leaves_the_global_generator_alone(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    data = module(folder / "a", folder / "a")
    assert list(islice(data.train_dataloader(), 3)) and list(data.val_dataloader()) and data.state_dict()
    assert torch.equal(torch.get_rng_state(), before)


def test_messages_about_size(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"1 samples cannot feed 1 ranks x 2 workers = 2 loader processes"):
        module(folder / "one", workers=2).train_dataloader()
    with pytest.raises(UserError, match=r"1 samples cannot feed .* = 2 loader processes: those of .*/one, whose share"):
        module(blend(folder, {"a": 1, "one": 1}), workers=2).train_dataloader()
    with caplog.at_level(logging.WARNING):
        module(folder / "a", workers=4).train_dataloader()
    assert "3 shards for 4 loader processes" in caplog.text
    loader = module(folder / "one", shuffle_buffer=1000, packing_buffer=1000).train_dataloader()
    assert len(next(iter(loader)).keys) == 1, "a buffer larger than the data would only hold copies"
    assert loader.loader.dataset._find_wrapped_dataset(ShuffleBufferDataset) is None  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"data.val is not set"):
        module(folder / "a").recipe("val")
    assert json.loads((folder / "a" / ".nv-meta" / ".info.json").read_text())["shard_counts"]["val-000001.tar"] == 3
