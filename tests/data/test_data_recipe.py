"""Recipes and shard folders: what is read, what is refused, and that refusing executes nothing."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from shards_util import module, row, write_shards

from lit_eemllm.data.recipe import read_recipe
from lit_eemllm.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shard folders a (train 20, val 5) and b (train 6)."""
    folder = tmp_path_factory.mktemp("recipes")
    write_shards(folder / "a", {"train": [row(i) for i in range(20)], "val": [row(i) for i in range(5)]})
    write_shards(folder / "b", {"train": [row(i, 0) for i in range(6)]})
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    for name in "ab":
        shutil.copytree(prepared / name, tmp_path / name)
    return tmp_path


def write(folder: Path, content: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_good_recipes(folder: Path) -> None:
    header = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
    body = {"blend": [{"path": "a", "weight": 3}, {"path": str(folder / "b")}]}
    recipe = read_recipe(write(folder, header | {"splits": {"train": body, "val": {"path": "a"}}}), "train")
    assert [(s.folder.name, s.split, s.share, s.num_samples) for s in recipe.sources] == [
        ("a", "train", 3.0, 20),
        ("b", "train", 1.0, 6),
    ]
    assert recipe.sources[0].shards == (("train-000000.tar", 8), ("train-000001.tar", 8), ("train-000002.tar", 4))
    assert recipe.blend == "weight" and recipe.num_samples == 26
    body = {"blend_epochized": [{"path": "a", "repetitions": 0.5, "split_part": "val"}]}
    recipe = read_recipe(write(folder, {"splits": {"train": body}}), "train")
    assert (recipe.blend, recipe.sources[0].share, recipe.num_samples) == ("weight", 2.5, 5)  # half a pass
    assert (
        read_recipe(folder / "a", "val").sources
        == read_recipe(write(folder, {"splits": {"val": {"path": "a"}}}), "val").sources
    )
    split = folder / "a" / ".nv-meta" / "split.yaml"
    split.write_text(yaml.safe_dump(yaml.safe_load(split.read_text()) | {"exclude": ["train-000001.tar"]}))
    assert [n for n, _ in read_recipe(folder / "a", "train").sources[0].shards] == [
        "train-000000.tar",
        "train-000002.tar",
    ]
    data = module(folder / "a")  # and Energon agrees: it would be refused otherwise
    assert data.train_dataloader() is not None


def test_nothing_named_in_a_file_is_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the data module, as a run would meet it: recipe, dataset.yaml, split.yaml, python tags."""
    sentinel = folder / "executed"
    (folder / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')\ndef f(**_): open({str(sentinel)!r}, 'w')\nC = f\n")
    loader = folder / "a" / ".nv-meta" / "sample_loader.py"
    loader.write_text(
        f"open({str(sentinel)!r}, 'w')\ndef sample_loader(s): return s\ndef part_filter(p): return True\n"
    )
    evil = {"__module__": "evil", "__class__": "C"}
    ok = {"path": "a"}
    tag = f"!!python/object/apply:os.system [touch {sentinel}]\n"
    crude = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    joined = {"join": [ok], "joiner": {"__module__": "evil", "__function__": "f"}}
    attacks: list[tuple[str, str, Any]] = [
        ("recipe.yaml", "__module__", {**evil, "splits": {"train": ok}}),
        ("recipe.yaml", "__class__", {**crude, "splits": {"train": ok}}),
        (
            "recipe.yaml",
            "__function__",
            {"__module__": "megatron.energon", "__function__": "f", "splits": {"train": ok}},
        ),
        ("recipe.yaml", "__module__", {"splits": {"train": {**evil, **ok}}}),
        ("recipe.yaml", "__module__", {"splits": {"train": {"blend": [{**evil, **ok}]}}}),
        ("recipe.yaml", "join", {"splits": {"train": joined}}),
        ("recipe.yaml", "aux", {"splits": {"train": {**ok, "aux": {"x": "b"}}}}),
        ("recipe.yaml", "subflavors", {"splits": {"train": {**ok, "subflavors": {"x": evil}}}}),
        ("recipe.yaml", "dataset_config", {"splits": {"train": {**ok, "dataset_config": "other.yaml"}}}),
        ("recipe.yaml", "python/object", tag),
        ("a/.nv-meta/dataset.yaml", "__module__", evil),
        ("a/.nv-meta/dataset.yaml", "sample_loader", {**crude, "sample_loader": "sample_loader.py:sample_loader"}),
        ("a/.nv-meta/dataset.yaml", "part_filter", {**crude, "part_filter": "sample_loader.py"}),
        ("a/.nv-meta/dataset.yaml", "__class__", {"sample_type": evil}),
        ("a/.nv-meta/dataset.yaml", "__class__", {**crude, "__class__": "VQAWebdataset"}),
        ("a/.nv-meta/dataset.yaml", "python/object", tag),
        ("a/.nv-meta/split.yaml", "__module__", {**evil, "split_parts": {"train": ["train-000000.tar"]}}),
        ("a/.nv-meta/split.yaml", "python/object", tag),
    ]
    for file, key, content in attacks:
        recipe = write(folder, {"splits": {"train": ok}})
        path = folder / file
        before = path.read_text()
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        data = module(recipe)
        monkeypatch.syspath_prepend(folder)
        for use in (partial(data.setup, "fit"), data.train_dataloader):
            with pytest.raises(UserError) as error:
                use()
            assert file in str(error.value) and key in str(error.value), content
        assert not sentinel.exists(), content
        path.write_text(before)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"path": "../elsewhere"}, "write the absolute path"),
        ({"path": "s3://bucket/a"}, "remote"),
        ({"path": "c"}, "not there"),
        ({"path": "recipe.yaml"}, "nested"),
        ({"path": 3}, "must be text"),
        ({"path": "a", "split_part": "dev"}, "no split 'dev'"),
        ({"path": "b", "split_part": "val"}, "no split 'val'"),
        ({"path": "a", "weight": 1}, "unknown key 'weight'"),
        ({"blend": [{"path": "a", "weight": 0}]}, "number above 0"),
        ({"blend": [{"path": "a", "weight": True}]}, "number above 0"),
        ({"blend": [{"path": "a", "weight": float("inf")}]}, "number above 0"),
        ({"blend": [{"path": "a", "repetitions": 1}]}, "unknown key 'repetitions'"),
        ({"blend": [{"weight": 1}]}, "'path' is missing"),
        ({"blend": []}, "expected a list"),
        ({"blend": [{"path": "a"}], "path": "a"}, "unknown key 'path'"),
        ("a", "expected a mapping"),
    ],
)  # fmt: skip
def test_mistakes_in_recipes(folder: Path, train: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_recipe(write(folder, {"splits": {"train": train}}), "train")
    assert "recipe.yaml" in str(error.value) or str(folder) in str(error.value)


def test_mistakes_in_files(folder: Path) -> None:
    meta = folder / "a" / ".nv-meta"
    shard = folder / "a" / "train-000001.tar"

    def refused(message: str, path: Path = folder / "a", split: str = "train") -> None:
        with pytest.raises(UserError, match=message):
            read_recipe(path, split)

    refused("no such recipe", folder / "nothing")
    refused("remote", Path("s3://bucket/x.yaml"))
    refused("no split 'test'", split="test")
    refused("not plain YAML", write(folder, "splits: [")), refused("'splits' is missing", write(folder, {}))
    refused("the recipe is", write(folder, "just text")), refused("no split 'train'", write(folder, {"splits": {}}))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    refused(r"train-000001.tar: truncated: \d[\d,]* bytes")
    shard.unlink()
    refused("train-000001.tar: shard is missing")
    shard.write_bytes(content)
    index = shard.with_suffix(".tar.idx")
    saved = index.read_bytes()
    index.unlink()
    refused("shards prepare")
    index.write_bytes(saved[:-8])
    refused("does not fit 8 samples")
    index.write_bytes(saved)
    for parts, message in (
        (["../b/train-000000.tar"], "not in .info.json"),
        (["train-{0..99999999}.tar"], "more than 1,000,000 shards"),
        (["train-{9..0}.tar"], "expected one range"),
        (["{a,b}{c,d}.tar"], "expected one range"),
        (["{0..9}{0..9}.tar"], "expected one range"),
        ("train-000000.tar", "expected a list"),
    ):
        (meta / "split.yaml").write_text(yaml.safe_dump({"split_parts": {"train": parts}}))
        refused(message)
    (meta / "split.yaml").write_text(yaml.safe_dump({"split_parts": {"train": ["../b/train-000000.tar"]}}))
    (meta / ".info.json").write_text(json.dumps({"shard_counts": {"../b/train-000000.tar": 6}}))
    refused("outside of the folder")
    (meta / ".info.json").write_text("{")
    refused("not valid JSON")
    (meta / ".info.json").unlink()
    refused("not a prepared shard folder.*shards prepare")
