"""Which file a name means: the user's own, else the one that comes with the package; and `lit-eemllm configs`."""

from __future__ import annotations

import filecmp
import json
import shutil
from pathlib import Path

import pytest
import tiny

from lit_eemllm import cli, shipped
from lit_eemllm.config import load_config
from lit_eemllm.data.recipe import read_recipe
from lit_eemllm.errors import ConfigError, UserError
from lit_eemllm.model.build import build_processor
from lit_eemllm.plugins import run_file
from lit_eemllm.shipped import ROOT, SHIPPED, copy, find, names, nowhere, show
from lit_eemllm.sweep.plan import make_plan
from lit_eemllm.sweep.spec import read_sweep

REPOSITORY = Path(__file__).resolve().parents[1]
EE_MLLM = "configs/demo/ee_mllm.yaml"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def test_own_file_then_the_shipped_one() -> None:
    for name in (EE_MLLM, "./configs//demo/ee_mllm.yaml", "configs/sweeps/../demo/ee_mllm.yaml"):
        assert find(name) == REPOSITORY / EE_MLLM, name
    assert find("configs") == REPOSITORY / "configs"
    put(EE_MLLM, "")
    assert find(EE_MLLM) == Path(EE_MLLM)
    assert find("configs/sweeps/../demo/ee_mllm.yaml") == Path(EE_MLLM), "also through a folder that is not there"
    assert find("configs/demo/llava.yaml") == REPOSITORY / "configs/demo/llava.yaml"
    assert find("configs") == Path("configs")
    Path("elsewhere/deep").mkdir(parents=True)
    Path("link").symlink_to("elsewhere/deep")
    put("elsewhere/x.yaml", "")
    put("x.yaml", "")
    assert find("link/../x.yaml").resolve() == Path("elsewhere/x.yaml").resolve(), "own paths are the system's"


@pytest.mark.parametrize(
    "name",
    [
        "configs/../README.md", "configs/../../x", "../configs/demo/base.yaml", "README.md", "lit_eemllm/demo.py", "tools",
        "tools/stress.py", "tests/tiny.py", "configs/demo/../../pyproject.toml", "configsx/demo", "configs/nothing.yaml",
        "/configs/demo/base.yaml", "", "configs/\0", "configs/" + "n" * 5000,
    ],
)  # fmt: skip
def test_no_other_name_leads_out_of_the_current_folder(name: str) -> None:
    assert find(name) == Path(name)


def test_what_is_nowhere_is_said_with_where_it_was_looked_for(folder: Path) -> None:
    for call in (
        lambda: load_config(["configs/demo/ee_mlm.yaml"]),
        lambda: read_sweep(Path("configs/sweeps/alinger.yaml")),
        lambda: read_recipe("data_recipes/blends/llava.yaml", "train"),
        lambda: run_file(Path("tools/efficient.py")),
        lambda: show("configs/demo/none.yaml"),
        lambda: copy(["configs/demo/none.yaml"]),
        lambda: copy(["README.md"]),
        lambda: copy([str(REPOSITORY / "README.md")]),
    ):
        with pytest.raises(UserError) as error:
            call()
        if "README" not in str(error.value):
            assert f"looked for in {folder} and among the files that come with lit_eemllm" in str(error.value)
            assert "See: lit-eemllm configs list" in str(error.value)
    assert "Did you mean configs/demo/ee_mllm.yaml? See" in nowhere("configs/demo/ee_mlm.yaml")
    assert nowhere("/configs/demo/ee_mlm.yaml") == "", "an absolute name is looked for in one place"


def test_a_configuration_and_what_it_builds_on_are_found_one_by_one() -> None:
    asked = load_config([EE_MLLM])
    assert asked == load_config([REPOSITORY / EE_MLLM])
    assert asked.model.decoder == "data_recipes/parts/decoder", "as it was named: it means the same on any machine"
    put("mine.yaml", "defaults: [configs/demo/base.yaml]\nseed: 7")
    assert load_config(["mine.yaml"]).seed == 7
    put("configs/demo/base.yaml", (REPOSITORY / "configs/demo/base.yaml").read_text().replace("5e-4", "5e-5"))
    assert load_config([EE_MLLM]).optim.lr == 5e-5, "one's own base of a shipped configuration"
    put("configs/demo/base.yaml", "defaults: [../../mine.yaml]")
    with pytest.raises(ConfigError, match=r"circle: mine.yaml -> configs/demo/base.yaml -> "):
        load_config(["mine.yaml"])


def test_a_sweep_finds_its_files_and_leaves_the_names_in_its_runs() -> None:
    plan = make_plan(read_sweep(Path("configs/sweeps/table4_7b.yaml"), ["seeds=[0]"]))
    assert len(plan.tasks) == 8
    assert all(task.frozen and str(REPOSITORY) not in task.frozen for task in plan.tasks.values())


def test_parts_are_found_and_an_own_folder_wins() -> None:
    config = load_config([EE_MLLM]).model
    processor, vision = build_processor(config)
    assert len(processor.tokenizer) == 822 and vision.hidden_size == 96
    shutil.copytree(REPOSITORY / "data_recipes/parts", "data_recipes/parts")
    file = Path("data_recipes/parts/encoder/preprocessor_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    assert build_processor(config)[1].transform.mean == (0.1, 0.2, 0.3)
    shutil.rmtree("data_recipes/parts/encoder")
    Path("data_recipes/parts/encoder").mkdir()
    with pytest.raises(ConfigError, match=r"model\.vision\.path"):  # an own folder, though it is empty
        build_processor(config)


def test_paths_of_a_shipped_recipe_are_those_of_its_name(folder: Path) -> None:
    with pytest.raises(UserError) as error:
        read_recipe("data_recipes/blends/llava_v1_5.yaml", "train")
    assert f"{folder / 'data_recipes/blends/llava_v1_5_mix665k'} is not there" in str(error.value)
    assert "lit-eemllm configs copy data_recipes/blends/llava_v1_5.yaml --to SHARDS" in str(error.value)


def test_own_code_is_found_by_import_alone(capsys: pytest.CaptureFixture[str]) -> None:
    tool = "tools/efficientnet_lite.py"
    for own in (False, True):
        if own:
            put(tool, "print('mine')")
        with tiny.forgotten_imports():
            assert cli.main(["config", "check", "configs/demo/llava.yaml", "--import", tool]) == 0
    assert "mine" in capsys.readouterr().out


def test_list_show_and_copy(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    assert cli.main(["configs", "list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    files = {str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / "configs").rglob("*.yaml")}
    files |= {str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / "data_recipes").rglob("*.py")}
    assert files < set(listed) and listed == names()
    assert {"tools/slurm.sh", "data_recipes/parts/decoder", "data_recipes/blends/llava_v1_5.yaml"} < set(listed)
    assert cli.main(["configs", "show", EE_MLLM]) == 0
    assert capsys.readouterr().out == (REPOSITORY / EE_MLLM).read_text()

    assert cli.main(["configs", "copy", "configs/demo", EE_MLLM, "tools/slurm.sh"]) == 0
    assert not filecmp.dircmp("configs/demo", REPOSITORY / "configs/demo").diff_files
    assert len(list(Path("configs/demo").iterdir())) == len(list((REPOSITORY / "configs/demo").iterdir()))
    assert Path("tools/slurm.sh").stat().st_mode & 0o100
    assert cli.main(["configs", "copy", "data_recipes/blends", EE_MLLM, "--to", "shards"]) == 0
    blends = {file.name for file in (REPOSITORY / "data_recipes/blends").iterdir()}
    assert {file.name for file in Path("shards").iterdir()} == {*blends, "ee_mllm.yaml"}
    capsys.readouterr()
    assert cli.main(["configs", "list", EE_MLLM]) == 0 and "(yours wins)" in capsys.readouterr().out

    put(EE_MLLM, "mine: 1")
    Path("configs/demo/vica.yaml").unlink()
    shipped._tell.cache_clear()
    caplog.clear()
    with caplog.at_level("INFO", "lit_eemllm"):
        assert shipped.find(EE_MLLM) == shipped.find(EE_MLLM) == Path(EE_MLLM)
        shipped.find("configs/demo/saisa.yaml")
    told = [record.getMessage().partition(" in place")[0] for record in caplog.records]
    assert told == [f"uses your own {EE_MLLM}", "uses your own configs/demo/saisa.yaml"]
    for wrong, message in (
        (["copy", "configs/demo"], "is there already, nothing was copied"),
        (["copy", "configs/../README.md"], "README.md: does not come with lit_eemllm"),
        (["copy", "configs/demo", "configs/hard", "--to", "both"], "both/base.yaml: two files would get this name"),
        (["copy", "../x"], "../x: does not come with lit_eemllm"),
        (["show", "configs/stages"], "configs/stages: a folder, expected a file"),
        (["show", "data_recipes/parts/decoder/model.safetensors"], "not a text"),
        (["list", "config/"], "no name begins so"),
    ):
        assert cli.main(["configs", *wrong]) == 2
        assert message in capsys.readouterr().err
    assert Path(EE_MLLM).read_text() == "mine: 1" and not Path("configs/demo/vica.yaml").exists()
    assert not Path("both").exists()


def test_what_is_shipped_is_in_the_repository() -> None:
    assert ROOT == REPOSITORY and all((ROOT / name).exists() for name in SHIPPED)
