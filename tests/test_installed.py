"""The package without the clone: wheel and sdist are built, installed beside the dependencies of this environment, and used from
an empty folder. A process that reads the clone fails; nothing is downloaded.
"""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from lib.releases import RELEASES
from shards_util import picture
from tiny import forgotten_imports

from lit_eemllm import __version__, cli
from lit_eemllm.shipped import SHIPPED, names

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[1]
# Before anything else runs: this process and those that it starts cannot open a file of the clone, but for its environment.
GUARD = """
import os, sys
def guard(event, args):
    if event in ("open", "os.listdir", "os.scandir") and args and isinstance(args[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(args[0])) + "/"
        if path.startswith({clone!r}) and not path.startswith({allowed!r}):
            raise PermissionError(f"this reads the clone: {{path}}")
sys.addaudithook(guard)
"""
SMALL = [
    "optim.max_steps=2", "optim.val_every=2", "optim.val_batches=1", "data.shuffle_buffer=16", "data.packing_buffer=8",
    "eval.samples=4",
]  # fmt: skip


def files_below(*folders: str) -> set[str]:
    """Files of the repository below these folders, or these files, by their names in it."""
    found = {file for name in folders for file in [REPOSITORY / name, *(REPOSITORY / name).rglob("*")]}
    return {str(file.relative_to(REPOSITORY)) for file in found if file.is_file() and "__pycache__" not in file.parts}


def build_wheel(source: Path, to: Path) -> Path:
    offline = ["--no-build-isolation", "--no-index", "--no-deps", "--no-cache-dir"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", to, source], check=True)
    (wheel,) = to.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(REPOSITORY, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("sdist")
    code = f"from hatchling.build import build_sdist; build_sdist({str(to)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
    (file,) = to.glob("*.tar.gz")
    return file


def contents(wheel: Path) -> dict[str, int]:
    """File -> checksum, without the folder of metadata, which names every file again."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist() if ".dist-info/" not in info.filename}


def test_what_the_wheel_holds(wheel: Path) -> None:
    expected = files_below("lit_eemllm") | {f"lit_eemllm/shipped/{name}" for name in files_below(*SHIPPED)}
    assert set(contents(wheel)) == expected, "the package and what it ships; no test, page or benchmark"
    assert "lit_eemllm/py.typed" in expected and wheel.stat().st_size < 8e6
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        about = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        commands = archive.read(f"{folder}/entry_points.txt").decode()
    assert (about["Name"], about["Version"], about["Metadata-Version"]) == ("lit_eemllm", __version__, "2.4")
    assert about["Author"] == "lit_eemllm maintainers" and about["License-Expression"] == "Apache-2.0"
    assert "LLaVA" in about["Keywords"] and "Typing :: Typed" in about.get_all("Classifier", [])
    assert "Mechanism as data" in str(about.get_payload()), "the README"
    assert "test" in about.get_all("Provides-Extra", []) and not about.get_all("Project-URL")
    assert "lit-eemllm = lit_eemllm.cli:main" in commands


def test_the_sdist_holds_sources_and_tests_and_gives_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    found = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()}
    folders = ("lit_eemllm", "configs", "data_recipes", "tools", "tests", "docs", ".ci")
    alone = {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "pyproject.toml", "constraints.txt", "PKG-INFO"}
    alone |= {".gitignore", "Dockerfile", ".dockerignore"}
    assert found == files_below(*folders) | alone, "no benchmarks, whose results are large"
    assert contents(build_wheel(source, tmp_path / "wheel")) == contents(wheel)


@dataclass
class Installed:
    """An environment with the wheel, and an empty folder that its commands run in."""

    python: Path
    folder: Path

    def __call__(self, *words: object, code: bool = False) -> str:
        """Run a command, or Python code. Returns standard output; an exit status that is not 0 fails the test."""
        command: Sequence[object] = (
            [self.python.parent / "lit-eemllm", *words] if not code else [self.python, "-c", *words]
        )
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [*map(str, command)],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def together(self, *commands: Sequence[object]) -> list[str]:
        """Likewise several commands, in one process, which imports once. Returns what each wrote to standard output."""
        all_words, mark = [[*map(str, words)] for words in commands], "--- end of a command"
        code = f"""
from lit_eemllm.cli import main
for words in {all_words!r}:
    assert main(words) == 0, words
    print({mark!r}, flush=True)
"""
        return self(code, code=True).split(f"{mark}\n")[:-1]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    home = tmp_path_factory.mktemp("installed")
    venv.create(home / "env", with_pip=False)
    python = home / "env" / "bin" / "python"
    offline = ["--no-index", "--no-deps", "--no-cache-dir", "--no-compile"]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", *offline, wheel], check=True)
    (site,) = (home / "env" / "lib").glob("python*/site-packages")
    # A folder that a .pth file names has no .pth files of its own: the editable installation of the clone is not seen.
    (site / "dependencies.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    guard = GUARD.format(clone=f"{REPOSITORY}/", allowed=f"{Path(sys.prefix).resolve()}/")
    (site / "sitecustomize.py").write_text(guard)
    (home / "empty").mkdir()
    return Installed(python, home / "empty")


@pytest.fixture(scope="module")
def trained(installed: Installed) -> str:
    """A run on the demo's data, a few of them."""
    installed.together(
        ["shards", "make", "--source", "shapes", "--train", 200, "--val", 40, "--out", "runs/demo/data"],
        ["fit", "configs/demo/ee_mllm.yaml", *SMALL, "out=runs/mine"],
    )
    return "runs/mine"


def test_the_clone_is_out_of_reach(installed: Installed) -> None:
    code = f"""
import importlib.util, pathlib, sys, lit_eemllm
from lit_eemllm.shipped import ROOT
here = pathlib.Path(sys.prefix).resolve()
assert here in pathlib.Path(lit_eemllm.__file__).resolve().parents and here in ROOT.resolve().parents, ROOT
assert importlib.util.find_spec("tests") is None and {str(REPOSITORY)!r} not in sys.path
try:
    open({str(REPOSITORY / "README.md")!r})
except PermissionError as error:
    print(error)
"""
    assert "this reads the clone" in installed(code, code=True)


def test_names_and_version(installed: Installed) -> None:
    assert installed("--version").strip() == __version__
    file = "configs/sweeps/aligner.yaml"
    listed, shown, _ = installed.together(
        ["configs", "list"],
        ["configs", "show", file],
        ["configs", "copy", "tools/slurm.sh", file, "--to", "copied"],
    )
    assert [line.split()[0] for line in listed.splitlines()] == names(), "the same as in the clone"
    assert shown == (REPOSITORY / file).read_text()
    for name in ("tools/slurm.sh", file):
        copied = installed.folder / "copied" / Path(name).name
        assert copied.read_bytes() == (REPOSITORY / name).read_bytes()
        assert copied.stat().st_mode & 0o111 == (REPOSITORY / name).stat().st_mode & 0o111


def test_every_configuration_is_as_good_as_in_the_clone(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(installed.folder)
    files = [name for name in names() if name.startswith("configs/") and not name.startswith("configs/sweeps/")]
    good = [name for name in files if cli.main(["config", "check", name]) == 0]
    capsys.readouterr()
    assert len(good) > 30
    keys = ["model.decoder=x", "model.vision.path=y", "data.train=z", "optim.lr=1", "optim.max_steps=1"]
    # An overlay; one whose encoder a shipped file registers.
    others = [["configs/stages/lora.yaml"], ["configs/real/base.yaml", "--import", "tools/efficientnet_lite.py"]]
    shown = []
    for name, *words in others:
        assert name not in good
        with forgotten_imports():
            assert cli.main(["config", "show", name, *keys, *words]) == 0
        shown.append(capsys.readouterr().out)
    checked, *theirs = installed.together(
        ["config", "check", *good], *(["config", "show", name, *keys, *words] for name, *words in others)
    )
    assert checked.splitlines() == [f"{name}: good" for name in good] and theirs == shown


def test_train_validate_generate(installed: Installed, trained: str) -> None:
    (installed.folder / "picture.png").write_bytes(picture(0, "PNG"))
    ask = ["generate", trained, "--image", "picture.png", "--prompt", "What is it?"]
    installed.together(["validate", trained], ask)
    assert json.loads((installed.folder / trained / "eval" / "results.json").read_text())["loss"] > 0
    assert "decoder: data_recipes/parts/decoder\n" in (installed.folder / trained / "config.yaml").read_text()


def test_runs_go_between_clone_and_package(
    installed: Installed,
    trained: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = tmp_path / "picture.png"
    image.write_bytes(picture(1, "PNG"))
    words = ["--image", str(image), "--prompt", "What is it?"]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(installed.folder / trained, tmp_path / "theirs")
    assert cli.main(["generate", "theirs", *words]) == 0
    of_theirs = capsys.readouterr().out

    data = f"data.train={installed.folder / 'runs/demo/data'}"
    assert (
        cli.main(["fit", "configs/demo/llava.yaml", *SMALL, "data.val=null", "data.workers=0", data, "out=ours"]) == 0
    )
    capsys.readouterr()
    assert cli.main(["generate", "ours", *words]) == 0
    of_ours = capsys.readouterr().out
    answers = installed.together(["generate", trained, *words], ["generate", tmp_path / "ours", *words])
    assert answers == [of_theirs, of_ours], "the clone reads a run of the package, and the other way round"


def test_sweeps(installed: Installed, trained: str) -> None:
    few = ["seeds=[0]", "cells={a: {files: [../demo/llava.yaml]}}", "baseline=a", "out=runs/sweep", *SMALL]
    planned, published, done = installed.together(
        ["sweep", "configs/sweeps/aligner.yaml", "--dry-run"],
        ["sweep", "configs/sweeps/table4_7b.yaml", "seeds=[0]", "--dry-run"],
        ["sweep", "configs/sweeps/aligner.yaml", *few],
    )
    assert "0 of 15 done, 15 to run" in planned and "8 to run" in published
    assert "1 of 1 done" in done, "its processes find the files too"


def test_converters_and_blends(installed: Installed) -> None:
    makes = []
    for source, out in (
        ("chartqa", "shards/chartqa"),
        ("llava_v1_5_mix665k", "data_recipes/blends/llava_v1_5_mix665k"),
    ):
        (installed.folder / source).mkdir()
        RELEASES[source](installed.folder / source)
        makes.append(["shards", "make", "--source", source, "--root", source, "--workers", 1, "--out", out])
    *made, _, _ = installed.together(
        *makes,
        ["shards", "check", "data_recipes/blends/llava_v1_5.yaml"],
        ["configs", "copy", "data_recipes/blends", "--to", "shards"],
    )
    assert all("good samples" in told for told in made)
    shutil.move(installed.folder / "data_recipes/blends/llava_v1_5_mix665k", installed.folder / "shards")
    installed.together(
        ["shards", "check", "shards/llava_v1_5.yaml"],
        ["shards", "make", "--source", "puzzles", "--train", 4, "--val", 2, "--out", "shards/puzzles"],
    )


def test_a_shrunk_preset_trains(installed: Installed) -> None:
    preset = "configs/presets/ee_mllm_7b_pretrain.yaml"
    told, _ = installed.together(["shrink", "tiny", preset], ["fit", preset, "tiny/shrink.yaml", "out=runs/tiny"])
    assert (
        told.splitlines()[-1] == f"tiny/shrink.yaml: goes behind the others: lit-eemllm fit {preset} tiny/shrink.yaml"
    )
    assert (installed.folder / "runs" / "tiny" / "checkpoints" / "step-2.ckpt").is_file()


def test_the_demo_would_work(installed: Installed) -> None:
    assert "report: good" in installed("demo", "--check")
