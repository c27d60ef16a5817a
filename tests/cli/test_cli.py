"""The command line: what each verb hands on, what people read when they err, and that it answers at once."""

from __future__ import annotations

import argparse
import gc
import logging
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from lib.pages import PAGES, REPOSITORY, commands

from lit_eemllm import cli
from lit_eemllm.cli.common import files_and_overrides
from lit_eemllm.config import Config, flat, is_key, load_config, to_yaml
from lit_eemllm.config.keys import VideoConfig
from lit_eemllm.console import COMMAND, quiet_libraries
from lit_eemllm.errors import ConfigError, UserError
from lit_eemllm.names import check_names

GOOD = """
model: {decoder: some/decoder, vision: {path: some/encoder}}
data: {train: recipe.yaml}
optim: {lr: 1e-3, max_steps: 100}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty current directory with a good configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(GOOD, encoding="utf-8")
    return tmp_path


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """Stands in for the functions behind the verbs: (name, arguments, keywords) of each call."""
    made: list[tuple] = []

    def stand_in(name: str, result=None):
        return lambda *args, **keywords: made.append((name, args, keywords)) or result

    report = SimpleNamespace(ok=True)
    modules = {
        "lit_eemllm.training.fit": {"fit": None},
        "lit_eemllm.evaluation.run": {"validate": None, "generate": None},
        "lit_eemllm.report": {"report": None},
        "lit_eemllm.doctor": {"doctor": None},
        "lit_eemllm.data.shards": {"make": report, "prepare": {"train": 1234}},
        "lit_eemllm.data.check": {"check": report},
        "lit_eemllm.data.preview": {"inspect": [Path("a.html")]},
        "lit_eemllm.data.samples": {"SampleEncoder": "encoder"},
        "lit_eemllm.model.build": {
            "build_processor": (SimpleNamespace(template="template", transform="transform"), None)
        },
    }
    for module, functions in modules.items():
        fake = SimpleNamespace(**{name: stand_in(name, result) for name, result in functions.items()})
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr("lit_eemllm.names.check_names", lambda config: [])
    return made


def test_help_imports_nothing_heavy():
    code = """
import sys, time
from lit_eemllm import cli
for arguments in (["--help"], ["fit", "--help"], ["shards", "make", "--help"], ["config", "check", "--help"]):
    try:
        cli.main(arguments)
    except SystemExit as end:
        assert end.code == 0, end.code
heavy = {"torch", "transformers", "lightning", "megatron", "webdataset", "numpy", "omegaconf", "PIL", "rich", "yaml"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import lit_eemllm.config
heavy -= {"omegaconf", "yaml"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "examples:\n  lit-eemllm fit configs/" in done.stdout


def test_verbs_hand_on_what_they_were_given(folder, calls, capsys):
    assert cli.main(["fit", "good.yaml", "seed=3"]) == 0
    assert cli.main(["validate", "good.yaml", "--checkpoint", "a.ckpt", "eval.samples=7"]) == 0
    line = ["generate", "seed=4", "--image", "a.png", "good.yaml", "--image", "b.png", "--prompt", "Hi?", "out=x=y"]
    assert cli.main(line) == 0
    assert (
        cli.main([*line, "--max-new-tokens", "5", "--temperature", "0.5", "--checkpoint", "b.ckpt", "--video", "c.mp4"])
        == 0
    )
    assert cli.main(["report", "runs/a", "runs/b", "--out", "r"]) == 0
    assert cli.main(["doctor"]) == 0
    assert cli.main(["doctor", "--json", "--head-size", "128", "--device", "cuda:1"]) == 0
    configs = [args[0] for _, args, _ in calls[:4]]
    assert [config.seed for config in configs] == [3, 0, 4, 4]
    assert configs[1].eval.samples == 7 and configs[2].out == "x=y"
    images = [Path("a.png"), Path("b.png")]
    assert [(name, args[1:] if args[0] in configs else args) for name, args, _ in calls] == [
        ("fit", (None,)),
        ("validate", ("a.ckpt",)),
        ("generate", (None, images, "Hi?", configs[2].eval.max_new_tokens, 0.0, [])),
        ("generate", ("b.ckpt", images, "Hi?", 5, 0.5, [Path("c.mp4")])),
        ("report", ([Path("runs/a"), Path("runs/b")], Path("r"))),
        ("doctor", (None, 64, False)),
        ("doctor", ("cuda:1", 128, True)),
    ]


def test_a_run_directory_stands_for_its_configuration_where_it_lies_now(folder, calls):
    run = folder / "moved: #1, lr=0.1"
    run.mkdir()
    (run / "config.yaml").write_text(GOOD + "out: runs/where-it-was\nseed: 5\n", encoding="utf-8")
    for name in (str(run), run.name, f"./{run.name}/"):
        assert cli.main(["validate", name]) == 0
        config = calls[-1][1][0]
        assert Path(config.out).resolve() == run and config.seed == 5
    assert cli.main(["validate", str(run), "out=elsewhere"]) == 0
    assert calls[-1][1][0].out == "elsewhere"
    assert cli.main(["fit", str(run / "config.yaml")]) == 0  # the file itself says what it says
    assert calls[-1][1][0].out == "runs/where-it-was"


def test_shards_verbs(folder, calls, capsys):
    rows = ["--rows", "train=t=1.json", "--rows", "val=v.json"]
    video = ["--frames", "3", "--frame-rate", "0.5", "--markers", "internvl"]
    assert cli.main(["shards", "make", *rows, "--images", "i", "--out", "o", "--shard-size", "9", *video]) == 0
    assert cli.main(["shards", "prepare", "o"]) == 0
    assert cli.main(["shards", "check", "o"]) == 0
    assert cli.main(["shards", "check", "o", "good.yaml", "data.max_length=99"]) == 0
    assert cli.main(["shards", "inspect", "good.yaml", "--packs", "3", "out=run", "--split", "val"]) == 0
    assert "train: 1,234 samples" in capsys.readouterr().out
    config = load_config(["good.yaml"])
    assert calls[:3] == [
        (
            "make",
            ({"train": Path("t=1.json"), "val": Path("v.json")}, Path("i"), Path("o")),
            {
                "shard_size": 9,
                "follow_links": False,
                "max_image_pixels": 50_000_000,
                "video": VideoConfig(3, 0.5, "internvl"),
                "columns": None,
            },
        ),
        ("prepare", (Path("o"),), {}),
        ("check", (Path("o"), None), {}),
    ]
    assert calls[4:6] == [
        ("SampleEncoder", ("template", "transform", 99, "drop", config.data.max_image_pixels), {}),
        ("check", (Path("o"), "encoder"), {}),
    ]
    (_, (data, *parts), options) = calls[-1]
    assert (data, parts) == (config.data, ["template", "transform", Path("run/inspect")])
    assert options == {"split": "val", "packs": 3, "seed": 0}
    sys.modules["lit_eemllm.data.check"].check = lambda *_: SimpleNamespace(ok=False)
    assert cli.main(["shards", "check", "o"]) == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "shards inspect shards",
            "shards: a folder of shards, expected a configuration or a run directory; data are named by a key",
        ),
        ("fit config/demo/ee_mllm.yaml", "Did you mean configs/demo/ee_mllm.yaml? "),
        ("generate runs/mi --prompt x", "Did you mean runs/mine? "),
        ("report runs/mi", "Did you mean runs/mine? "),
        ("configs show ee_mllm", "Did you mean configs/demo/ee_mllm.yaml? "),
        ("generat good.yaml", "; did you mean generate?"),
        ("shards chek x", "; did you mean check?"),
        (
            "fit data_recipes/blends/pretrain_558k.yaml",
            "a recipe of data, expected a configuration, in which it is named: data.train=data_",
        ),
        ("config check configs/sweeps/aligner.yaml", "lit-eemllm sweep configs/sweeps/aligner.yaml --dry-run"),
        ("config check suite.yaml", "in which it is named: eval.suite=suite.yaml"),
        ("shards make --rows train.json --out x", "found 'train.json', expected SPLIT=FILE, such as train=train.json"),
        (
            "shards check pictures",
            "Make shards of rows and images: lit-eemllm shards make --rows train=ROWS.json --images pictures",
        ),
        (
            "fit good.yaml data.train=pictures",
            "no shards (.tar) in it. Make them of rows and images: lit-eemllm shards make --rows train=ROWS.json",
        ),
        ("shards prepare pictures", "lit-eemllm shards make --rows train=ROWS.json --images pictures"),
        ("sweep sweep.yaml --dry-run", "missing: nowhere: no such data"),
    ],
)
def test_what_was_meant_is_told(folder, capsys, line, expected):
    for name in ("pictures", "runs/mine", "shards"):
        (folder / name).mkdir(parents=True)
    (folder / "pictures" / "a.jpg").touch()
    (folder / "shards" / "a.tar").touch()
    (folder / "suite.yaml").write_text("sets: {a: {data: a}}\n")
    (folder / "train.json").write_text("[]")
    (folder / "sweep.yaml").write_text(
        "base: [good.yaml]\nout: out\nseeds: [0]\ncells: {a: {data.train: nowhere, data.val: nowhere}}\n"
    )
    try:
        status = cli.main(line.split())
    except SystemExit as end:
        status = end.code
    assert status == 2 or ("--dry-run" in line and status == 0)
    told = capsys.readouterr()
    assert expected in (told.out if status == 0 else told.err)


def test_shards_of_the_procedural_set(folder):
    line = ["shards", "make", "--source", "shapes", "--train", "12", "--val", "5", "--out", "shards"]
    assert cli.main(line) == 0
    from lit_eemllm.data.shards import read_shard

    keys = [key for key, members in read_shard(Path("shards/train-000000.tar")) if b"conversations" in members["json"]]
    assert len(keys) == 12
    assert len(list(read_shard(Path("shards/val-000000.tar")))) == 5
    assert not [path for path in folder.iterdir() if path.name not in ("good.yaml", "shards")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "fit good.yaml sead=1",
            "error: a mistake in the configuration:\n  command line: sead: unknown key; did you mean seed?",
        ),
        ("fit seed=1", "error: name a configuration file or a run directory; key=value overrides follow it"),
        (
            "fit gone.yaml",
            "error: a mistake in the configuration:\n  gone.yaml: no such run directory or file; looked for in ",
        ),
        ("fit .", "error: .: no run directory: there is no config.yaml in it. Configurations in it: good.yaml"),
        ("fit good.yaml --import gone.py", "error: gone.py: no such Python file (.py)"),
        ("fit good.yaml --import good.yaml", "error: good.yaml: no such Python file (.py)"),
        ("shards make --rows val=a --rows val=b --out x", "a split is given twice"),
        ("shards make --source shapes --columns image --out x", "--columns are those of parquet files in --rows"),
        ("config show good.yaml seed=x optim.lr=y", "error: 2 mistakes in the configuration:"),
    ],
)
def test_mistakes_are_told_without_a_traceback(folder, calls, capsys, line, expected):
    assert cli.main(line.split()) == 2
    assert expected in capsys.readouterr().err
    assert not [call for call in calls if call[0] in ("fit", "make")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "the following arguments are required: VERB"),
        ("fitt good.yaml", "invalid choice: 'fitt'"),
        ("fit good.yaml --seed=1", "lit-eemllm fit: error: unknown arguments: --seed=1; overrides are written without"),
        ("validate good.yaml --check a.ckpt", "unknown arguments: --check"),
        ("report runs/a --out b c=d", "lit-eemllm report: error: unknown arguments: c=d"),
        ("generate good.yaml", "the following arguments are required: --prompt"),
        ("shards make --source cubes --out x", "argument --source: found 'cubes', expected alpaca or "),
        ("shards make --source chartq --out x", "or textocr_gpt4v; did you mean chartqa?"),
        ("shards make --out x", "one of the arguments --rows --source is required"),
        ("shards make --source shapes --rows train=x --out x", "not allowed with argument --source"),
    ],
)
def test_wrong_usage(folder, calls, capsys, line, expected):
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    assert end.value.code == 2
    assert expected in capsys.readouterr().err
    assert not calls


def test_errors_of_verbs(folder, calls, capsys, monkeypatch):
    def fails(error):
        def fit(config, asking):
            raise error

        sys.modules["lit_eemllm.training.fit"].fit = fit
        return cli.main(["fit", "good.yaml"])

    assert fails(UserError("no such checkpoint; make one")) == 2
    assert capsys.readouterr().err == "error: no such checkpoint; make one\n"
    assert fails(KeyboardInterrupt()) == 130
    with pytest.raises(ZeroDivisionError):  # a mistake in the program keeps its traceback
        fails(ZeroDivisionError())


def test_python_m_and_exit_status(folder):
    for line, status in ((["--version"], 0), (["config", "check", "gone.yaml"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "lit_eemllm", *line], capture_output=True, text=True, cwd=REPOSITORY, timeout=120
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr


def test_fit_keeps_what_is_imported_from_the_garbage_collector(folder, monkeypatch):
    """Measured with half a million objects: 20 steps with four validations and two loader processes, 2.6 s instead of 7.1."""
    counts: list[int] = []
    monkeypatch.setattr("lit_eemllm.training.fit.fit", lambda config, asking: counts.append(gc.get_freeze_count()))
    gc.unfreeze()
    try:
        assert cli.main(["fit", "good.yaml"]) == 0
    finally:
        gc.freeze()  # as in tests/conftest.py
    assert counts[0] > 100_000


def test_config_show_and_check(folder, calls, capsys):
    assert cli.main(["config", "show", "good.yaml", "seed=9"]) == 0
    shown = capsys.readouterr().out
    assert "# Peak learning rate of AdamW." in shown
    (folder / "shown.yaml").write_text(shown, encoding="utf-8")
    assert load_config(["shown.yaml"]) == load_config(["good.yaml"], ["seed=9"])

    (folder / "bad.yaml").write_text("seed: x\n", encoding="utf-8")
    (folder / "worse.yaml").write_text("[\n", encoding="utf-8")
    assert cli.main(["config", "check", "good.yaml", "bad.yaml", "worse.yaml", "optim.max_steps=0"]) == 2
    out, err = capsys.readouterr()
    assert "good" not in out and "good.yaml: a mistake" in err  # the override is for each file
    assert "bad.yaml: 6 mistakes" in err and "bad.yaml:1: seed: found 'x' (text)" in err
    assert "worse.yaml:2: not valid YAML" in err
    assert cli.main(["config", "check", "good.yaml", "bad.yaml"]) == 2
    assert capsys.readouterr().out == "good.yaml: good\n"
    assert cli.main(["config", "check", "good.yaml"]) == 0
    (folder / "overlay.yaml").write_text("seed: 3\n", encoding="utf-8")
    capsys.readouterr()
    assert cli.main(["config", "check", "overlay.yaml", "bad.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.count("if it is an overlay") == 2, "also where it has a mistake of its own"
    assert err.partition("check them together: ")[2].startswith(
        "lit-eemllm config show OTHER.yaml overlay.yaml\nbad.yaml"
    )


def test_user_code_enters_by_import_and_by_entry_point_only(folder, calls, capsys, monkeypatch):
    (folder / "mine.py").write_text(
        "import dataclasses, pathlib\n@dataclasses.dataclass\nclass Thing:\n    a: 'int' = 1\n"
        "with open('log', 'a') as log:\n    log.write('mine ')\n",
        encoding="utf-8",
    )
    (folder / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    log = folder / "log"
    assert cli.main(["fit", "good.yaml", "out=mine.py"]) == 0
    assert not log.exists()
    for line in (["fit"], ["validate"], ["generate", "--prompt", "x"], ["shards", "check", "data"], ["config", "show"]):
        assert cli.main([*line, "--import", "mine.py", "good.yaml"]) == 0
    assert cli.main(["fit", "--import", "mine.py", "--import", "mine.py", "good.yaml"]) == 0
    assert cli.main(["doctor", "--import", "mine.py"]) == 0
    assert log.read_text() == "mine " * 8
    with pytest.raises(ZeroDivisionError):
        cli.main(["fit", "good.yaml", "--import", "broken.py"])

    def entry_points(*, group):
        assert group == "lit_eemllm.plugins"
        return [SimpleNamespace(load=lambda: log.write_text("plugin"))]

    monkeypatch.setattr("lit_eemllm.plugins.entry_points", entry_points)
    assert cli.main(["fit", "good.yaml"]) == 0
    assert log.read_text() == "plugin"


def test_a_continued_run_does_not_warn_of_its_own_checkpoints():
    from lit_eemllm.console import quiet_libraries

    with warnings.catch_warnings(record=True) as heard:
        quiet_libraries()
        for text in ("Checkpoint directory runs/a b/checkpoints exists and is not empty.", "something else"):
            warnings.warn(text, stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["something else"]


KEYS = flat(asdict(Config()))


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_in_the_documentation_exist(page):
    targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    extras = re.findall(r"^([\w-]+) = \[", (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert set(re.findall(r"pip install '[\w.]*\[([\w-]+)\]'", text)) <= set(extras)
    found, checked = commands(text), 0
    for words in found:
        while "=" in words[0]:  # environment variables
            words = words[1:]
        if words[0] == "make":
            assert set(words[1:]) <= {*targets, *(word for word in words if "=" in word)}, words
        elif words[0].endswith("lit-eemllm"):
            args = cli.parse(words[1:])
            for given in getattr(args, "inputs", []):
                if given.startswith("configs/") and "*" not in given:
                    assert (REPOSITORY / given).is_file(), words
                key, is_override, _ = given.partition("=")
                known = key in KEYS or is_key(key) or (words[1] == "sweep" and "." not in key)
                assert known or not is_override, words
            assert all((REPOSITORY / file).is_file() for file in args.imports or ()), words
        elif words[0].endswith("python") and len(words) > 1 and words[1].endswith(".py"):
            assert (REPOSITORY / words[1]).is_file(), words
        elif "-m" in words and (module := words[words.index("-m") + 1]).startswith("lit_eemllm"):
            assert find_spec(module), words
        else:
            continue
        checked += 1
    assert checked or not found


def verbs(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Every verb's parser."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [verb for group in groups for made in group.choices.values() for verb in verbs(made)] if groups else [parser]


def test_the_examples_in_the_help_name_what_exists():
    """Configurations of the repository, and the runs that `lit-eemllm demo` leaves."""
    for verb in verbs(cli.build_parser()):
        lines = (verb.epilog or "").partition("examples:\n")[2].splitlines()
        assert len(lines) >= 2, verb.prog
        for line in lines:
            assert f"{line} ".startswith(f"  {verb.prog} "), line
            words = shlex.split(line.partition(">")[0])[1:]
            cli.parse(words)
            for word in words:
                if word.startswith("configs/"):
                    assert (REPOSITORY / word).exists(), line
                if name := re.fullmatch(r"runs/demo/(\w+)-0", word):
                    assert (REPOSITORY / "configs" / "demo" / f"{name[1]}.yaml").is_file(), line


def test_every_configuration_in_the_repository_is_good(folder):
    files = [file for file in sorted((REPOSITORY / "configs").rglob("*.yaml")) if file.parent.name != "sweeps"]
    assert len(files) > 20
    for file in files:
        # Some leave required keys to the command line: good.yaml stands in. Some use an encoder that --import brings.
        load_config(["good.yaml", file], ["model.vision.encoder=transformers"], checks=[check_names])


def test_attention_files_set_a_mechanism_and_a_backend_and_nothing_else(folder):
    presets = {"full": "llava", "composite": "ee_mllm"}
    files = sorted((REPOSITORY / "configs" / "attention").glob("*.yaml"))
    assert {"full", "composite_flash", "composite_xformers"} <= {file.stem for file in files}
    for file in files:
        for before in ([], ["model.mechanism.preset=llava", "model.attention=sdpa", "seed=3"]):
            Path("before.yaml").write_text(to_yaml(load_config(["good.yaml"], before)), encoding="utf-8")
            expected = load_config(["before.yaml"])
            kind, _, backend = file.stem.partition("_")
            if file.stem == "reference":
                expected.model.attention = "reference"
            else:
                expected.model.mechanism.preset, expected.model.attention = presets[kind], backend or "auto"
            assert load_config(["before.yaml", file]) == expected, file


def test_makefile_and_ci_name_what_exists():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    ci = REPOSITORY / ".ci" / "run"
    assert ci.stat().st_mode & 0o111 == 0o111
    assert set(re.findall(r"^make (\w+)", ci.read_text(encoding="utf-8"), re.MULTILINE)) <= targets
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], capture_output=True, text=True, cwd=REPOSITORY, timeout=60
    ).stdout
    assert {line.split()[1] for line in shown.splitlines()} == targets


@pytest.mark.parametrize("start", ["COMMAND", "lit-eemllm"])
def test_nothing_in_the_current_folder_is_taken_for_a_library(tmp_path, start):
    """A data set that is unpacked there may bring a yaml.py."""
    for name in ("yaml", "omegaconf", "rich", "json", "lit_eemllm"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('executed')")
    command = COMMAND if start == "COMMAND" else [str(Path(sys.executable).with_name("lit-eemllm"))]
    line = [*command, "config", "show", "configs/demo/ee_mllm.yaml"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and "preset: ee_mllm" in done.stdout


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    line = f"{shlex.quote(str(Path(sys.executable).with_name('lit-eemllm')))} configs list; echo ended with $? >&2"
    done = subprocess.run(["bash", "-c", f"({line}) | head -1"], capture_output=True, text=True, cwd=REPOSITORY)
    assert len(done.stdout.splitlines()) == 1 and done.stderr.strip() in ("ended with 141", "ended with 0")


def test_a_pipe_that_breaks_elsewhere_is_not_hidden(monkeypatch):
    def broken(_):
        raise BrokenPipeError("a loader process")

    monkeypatch.setattr(cli, "parse", lambda _: SimpleNamespace(imports=None, run=broken))
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    with pytest.raises(BrokenPipeError, match="loader"):
        cli.main([])


def test_rows_given_for_a_recipe_are_not_printed(tmp_path, capsys):
    rows = tmp_path / "train.json"
    row = '{"id": "1", "conversations": []}'
    for content in ("[" + ", ".join([row] * 50_000) + "]", f"{row}\n" * 50_000):  # a list, and lines
        rows.write_text(content)
        options = [f"data.train={rows}", "data.val=null", f"out={tmp_path / 'run'}"]
        assert cli.main(["fit", str(REPOSITORY / "configs/demo/ee_mllm.yaml"), *options]) == 2
        said = capsys.readouterr().err
        assert f"lit-eemllm shards make --rows train={rows} --images DIR" in said and len(said) < 600


def test_libraries_keep_to_themselves_what_concerns_nobody(capfd) -> None:
    """DeepSpeed, imported by transformers where it is installed, tells on stdout that there is no GPU; Lightning who it is, twice."""
    quiet_libraries()
    for name in ("DeepSpeed", "lightning.fabric.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logger = logging.getLogger(name)
        logger.addHandler(handler := logging.StreamHandler(sys.stdout))
        if name == "DeepSpeed":
            logger.setLevel(logging.WARNING)  # as it does itself
        logger.log(logging.WARNING if name == "DeepSpeed" else logging.INFO, "chatter of %s", name)
        logger.error("an error of %s", name)
        logger.removeHandler(handler)
    assert "chatter" not in (said := capfd.readouterr().out) and said.count("an error of") == 3


def test_a_folder_of_runs_is_no_folder_of_shards(folder):
    """Wherever below it shards lie."""
    Path("runs/demo/data").mkdir(parents=True)
    Path("runs/demo/data/train-0.tar").touch()
    for name, text in (("runs", "no run directory"), ("runs/demo/data", "a folder of shards, expected")):
        with pytest.raises(ConfigError, match=f"^{name}: {text}"):
            files_and_overrides([name])
