"""Names, keys and texts of strangers reach a terminal as letters, never as what steers it."""

import ast
import io
import json
import logging
import subprocess
import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text
from shards_util import sample, write_tar

from lit_eemllm import cli
from lit_eemllm.console import console, progress
from lit_eemllm.data.shards import prepare
from lit_eemllm.terminal import VisibleFormatter, visible

EVIL = "a\x1b]0;owned\x07\x1b[31mred\r\x9b2J\u202e"
SHOWN = r"a\x1b]0;owned\x07\x1b[31mred\r\x9b2J\u202e"
PACKAGE = Path(cli.__file__).parents[1]


def test_what_steers_is_written_out():
    assert visible(EVIL) == SHOWN
    plain = "ordinary — Ünïcode 日本 שלום 😀\n\tindented"
    assert visible(plain) == plain and visible("\ud800x") == r"\ud800x" and visible(Path("a")) == "a"


@pytest.mark.parametrize("terminal", [False, True])
def test_whatever_the_console_draws(monkeypatch, terminal):
    """In texts, tables and progress; the program's own colours stay."""
    out = io.StringIO()
    monkeypatch.setattr(console, "_file", out)  # `file` would come back as the stdout of this test, for good
    monkeypatch.setattr(console, "_force_terminal", terminal)
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    for drawn in (EVIL, Text(EVIL, "green"), table):
        console.print(drawn)
    with progress(EVIL, 2) as advance:
        advance(1)
    found = out.getvalue()
    assert found.count(SHOWN.replace(r"\x07", "").replace(r"\r", "")) >= 4  # those two rich leaves out by itself
    for part in ("\x1b]0", "\x1b[31m", "\x9b", "\u202e", "\x07"):
        assert part not in found


def test_log_lines():
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "skipped %s", (EVIL,), None)
    assert VisibleFormatter("%(message)s").format(record) == f"skipped {SHOWN}"


def evil_shards(folder):
    """A good sample, and bad ones with such a key, an id and a member's name."""
    bad = {**sample(1, 1), "json": json.dumps({"id": EVIL, "conversations": [{"from": EVIL, "value": "x"}]}).encode()}
    write_tar(folder / "train-0.tar", {"good": sample(0, 1), EVIL: bad, "k2": {EVIL + ".json": b"{"}})
    prepare(folder)
    return folder


VERBS = {
    "shards check": lambda f: ["shards", "check", str(evil_shards(f / "shards"))],
    "shards make": lambda f: ["shards", "make", "--rows", f"train={f / 'rows.json'}", "--out", str(f / "made")],
    "config check": lambda f: ["config", "check", str(f / f"{EVIL}.yaml")],
    "a value": lambda f: ["config", "show", str(f / "key.yaml")],
    "an override": lambda f: ["config", "show", f"{EVIL}=1"],
    "an option": lambda f: ["shards", "check", "--" + EVIL, "x"],
    "a folder": lambda f: ["report", str(f / EVIL)],
    "a decoder": lambda f: ["estimate", str(f / "decoder.yaml")],
    "a tensor": lambda f: ["convert", str(f / "llava"), "--out", str(f / "x"), "--to-llava"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_and_its_errors(tmp_path, capfd, verb):
    (tmp_path / "rows.json").write_text(
        json.dumps([{"id": EVIL, "image": EVIL, "conversations": [{"from": EVIL, "value": EVIL}]}])
    )
    (tmp_path / "key.yaml").write_text(json.dumps({"model": {"dtype": EVIL}}))
    (tmp_path / "decoder.yaml").write_text(json.dumps({"model": {"decoder": f"/{EVIL}", "vision": {"path": f"/{EVIL}"}}, "data": {"train": "x"},
                                                        "optim": {"lr": 1, "max_steps": 1}}))  # fmt: skip
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "config.json").write_text(json.dumps({"model_type": EVIL}))
    with suppress(SystemExit):
        assert cli.main(VERBS[verb](tmp_path)) != 0
    found = "".join(capfd.readouterr())
    assert r"\x1b" in found, found
    assert not [part for part in ("\x1b", "\x07", "\x9b", "\u202e") if part in found]


def test_the_trace_of_an_error_that_nobody_expected():
    """Python ends with status 1, and says the same but for what steers."""
    code = f"""
from lit_eemllm import cli
def broken(args):
    raise KeyError({EVIL!r}) from ValueError({EVIL!r} + "two\\nlines")
cli.doctor._doctor = broken
cli.main(["doctor"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, encoding="utf-8")
    assert done.returncode == 1 and done.stderr.startswith(f"ValueError: {SHOWN}two\nlines\n\nThe above exception was")
    assert ":\n\nTraceback (most recent call last):\n  File" in done.stderr and done.stderr.endswith(
        f"KeyError: {EVIL!r}\n"
    )
    assert not [part for part in ("\x1b", "\x07", "\x9b", "\u202e", "\r") if part in done.stderr]


def test_nothing_else_prints():
    """A text that is printed goes through `say` or the console: what `print` is left for cannot hold any."""
    left = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print" and file.name != "terminal.py":
                left.append(f"{file.name}: {ast.unparse(node)}")
    assert sorted(left) == [
        "config.py: print(to_yaml(config, comments=True), end='')",
        "doctor.py: print(json.dumps(found, indent=2))",
        "estimate.py: print(json.dumps(found, indent=2))",
        "execute.py: print(os.uname().nodename, process.pid, file=lock, flush=True)",
    ]


def test_pages_run_and_fetch_nothing(tmp_path):
    """Of the gallery and of `inspect`; the report's has a hash for its own script."""
    from lit_eemllm.console import PAGE_POLICY
    from lit_eemllm.data import preview
    from lit_eemllm.evaluation import gallery

    for template in (preview._PAGE, gallery._PAGE):
        page = template.format_map(defaultdict(str, policy=PAGE_POLICY))
        assert "<script" not in page
        assert (
            """content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">"""
            in page.partition("<style>")[0]
        )
