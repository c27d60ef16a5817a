"""Dependencies: what pyproject.toml allows, what is locked, and how a library that breaks us is found."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "extra": "test"}


@pytest.fixture
def versions():
    spec = importlib.util.spec_from_file_location("versions", ROOT / "tools" / "versions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def locked(python: str) -> dict[str, str]:
    machine = {**LINUX, "python_version": python, "python_full_version": f"{python}.0"}
    lines = [r for r in LOCK if r.marker is None or r.marker.evaluate(machine)]
    found = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in lines}
    assert len(found) == len(lines), f"two versions of one package for Python {python}"
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_the_locked_versions_are_allowed_by_bounds_on_both_sides(versions, python):
    found = locked(python)
    for requirement in versions.dependencies():
        operators = {spec.operator for spec in requirement.specifier}
        assert operators == {">=", "<"}, f"{requirement} needs a lower and an upper bound"
        version = found[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}: make lock"


def test_the_lock_forces_no_build_of_pytorch():
    """Its CUDA builds pin what they need themselves; a local version (+cpu) or a pin of that would choose for everybody."""
    names = {canonicalize_name(r.name) for r in LOCK}
    assert "torch" in names
    assert not [name for name in names if re.match(r"nvidia-|cuda-|triton", name)]
    assert not [r for r in LOCK if "+" in str(r.specifier) or r.url]


def test_the_readme_says_what_was_tested(versions):
    (line,) = re.findall(r"^Tested with .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    told = dict(re.findall(r"([\w-]+) (\d[\w.]*\w)", line.partition("with ")[2]))
    assert {"torch", "transformers", "lightning", "peft", "megatron-energon"} <= told.keys()
    assert told == {name: locked("3.11")[name] for name in told}


def test_what_is_asked_for(versions, monkeypatch):
    texts = [
        "torch<2.14,>=2.10",
        "peft<0.22,>=0.19",
        "pytest<10,>=8; extra == 'test'",
        "flash-attn>=2; extra == 'flash'",
    ]
    monkeypatch.setattr(versions, "requires", lambda name: texts)
    assert versions.wanted("lowest") == ["torch==2.10", "peft==0.19", "pytest==8"]
    assert versions.wanted("newest") == ["torch<2.14,>=2.10", "peft>=0.19", "pytest>=8"]


CHANGED = {"torch": ("2.13.0", "2.13.1"), "peft": ("0.21.2", "0.22.0"), "rich": ("15.0.0", "16.0.0")}


def test_a_contract_names_the_library(versions, monkeypatch):
    monkeypatch.setattr(versions, "run", lambda *_: pytest.fail("nothing needs to be tried"))
    error = "Failed: peft 0.22.0: a LoraLayer tells what its adapter adds"
    assert versions.culprit(Path(), versions.STEPS[0], error, CHANGED) == "peft 0.22.0 (locked: 0.21.2)"


def test_without_a_contract_the_library_is_found_by_putting_back(versions, monkeypatch):
    back = []
    monkeypatch.setattr(versions, "pip", lambda python, *words: back.append(words[-1]))
    monkeypatch.setattr(versions, "run", lambda *_: "" if "peft==0.21.2" in back else "TypeError: ...")
    step = versions.STEPS[-1]
    assert versions.culprit(Path(), step, "TypeError: ...", CHANGED) == "peft 0.22.0 (locked: 0.21.2)"
    assert back == ["torch==2.13.0", "peft==0.21.2"]
    monkeypatch.setattr(versions, "run", lambda *_: "TypeError: ...")
    assert versions.culprit(Path(), step, "", CHANGED).startswith("one of torch 2.13.1 (locked: 2.13.0), peft")
    assert versions.culprit(Path(), step, "", {}) == "no library: these are the locked versions"


def test_a_step_that_stands_on_others_is_tried_again_from_nothing(versions, monkeypatch):
    """A run that ended after its last checkpoint would be found finished in its folder."""
    tried = []
    monkeypatch.setattr(versions, "pip", lambda *_: None)
    monkeypatch.setattr(versions, "run", lambda python, step, out: tried.append((step[0], out)) or "")
    versions.culprit(Path(), versions.STEPS[4], "", CHANGED)
    assert [name for name, _ in tried] == ["shards", "fit", "resume"] and len({out for _, out in tried}) == 1
    tried.clear()
    versions.culprit(Path(), versions.STEPS[1], "", CHANGED)
    assert [name for name, _ in tried] == ["parity"]


@pytest.mark.parametrize("refused", ["", "peft==0.21.2", "torch"])
def test_the_whole_of_it_ends_in_one_line(versions, monkeypatch, capsys, refused):
    """With a peft that breaks `fit`; with a pip that refuses the locked peft, or everything."""
    here = {"torch": "2.13.0", "peft": "0.22.0", "rich": "15.0.0"}

    def pip(python, *words):
        if refused and any(refused in word for word in words):
            raise versions.subprocess.CalledProcessError(1, "pip", "no such version")
        here.update({words[-1].split("==")[0]: words[-1].split("==")[1]} if "==" in words[-1] else {})

    monkeypatch.setattr(versions, "pip", pip)
    monkeypatch.setattr(versions.venv, "create", lambda *_, **__: None)
    monkeypatch.setattr(
        versions, "installed", lambda python: dict(here) | ({} if "newest" in str(python) else {"peft": "0.21.2"})
    )
    monkeypatch.setattr(versions, "requires", lambda name: ["torch<2.14,>=2.10", "peft<0.22,>=0.19", "rich>=13,<16"])
    monkeypatch.setattr(
        versions, "run", lambda p, step, out: "KeyError: 'x'" if step[0] == "fit" and here["peft"] > "0.21.9" else ""
    )
    assert versions.main("newest") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert (
        last
        == {
            "": "newest: BROKEN by peft 0.22.0 (locked: 0.21.2) in `fit`: KeyError: 'x'",
            "peft==0.21.2": "newest: BROKEN by one of peft 0.22.0 (locked: 0.21.2) in `fit`: KeyError: 'x'",
            "torch": "newest: BROKEN: these versions cannot be installed together, see above",
        }[refused]
    )
    here["peft"] = "0.21.2"
    if refused != "torch":
        assert versions.main("newest") == 0
        assert capsys.readouterr().out.splitlines()[-1] == "newest: good; not as locked: none"


def test_the_first_step_that_fails_is_told(versions, monkeypatch, capsys):
    found = {"fit": "TypeError: forward() got an unexpected keyword argument 'cache'"}
    monkeypatch.setattr(versions, "run", lambda python, step, out: found.get(step[0], ""))
    step, error = versions.job(Path())
    assert step[0] == "fit" and "'cache'" in error
    assert capsys.readouterr().out.split("\n")[:3] == ["  contracts: good", "  parity: good", "  shards: good"]


def test_a_step_says_its_error_in_one_line(versions, tmp_path):
    python, code = Path(sys.executable), "import sys; print('loading'); sys.exit('error: key: found 1, expected 2')"
    assert versions.run(python, ("fit", "-c", code), str(tmp_path)) == "error: key: found 1, expected 2"
    assert versions.run(python, ("fit", "-c", "raise KeyError('cache: none')"), "") == "KeyError: 'cache: none'"
    assert versions.run(python, ("fit", "-c", "print('Error: no')"), "") == ""
    chain = "E   KeyError: 'x'\nthe cause of\nE   Failed: peft 0.22.0: it was so. Mend ...: KeyError('x')"
    said = versions.run(python, ("contracts", "-c", f"import sys; print({chain!r}); sys.exit(1)"), "")
    assert said == "Failed: peft 0.22.0: it was so. Mend ...: KeyError('x')"
