"""Dockerfile and .dockerignore against pyproject.toml. There is no image here: `hadolint Dockerfile` lints it."""

from __future__ import annotations

import re
from importlib.metadata import metadata
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
PYPROJECT = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")


def argument(name: str) -> str:
    (value,) = re.findall(rf"^ARG {name}=(.*)$", DOCKERFILE, re.MULTILINE)
    return value


def test_python_and_extras_are_those_of_the_package() -> None:
    about = metadata("lit_eemllm")
    (python,) = re.findall(r"python:(3\.\d+)-slim", argument("BASE"))
    assert f"Programming Language :: Python :: {python}" in (about.get_all("Classifier") or [])
    asked = {extra for group in re.findall(r"EXTRAS=(\S+)", DOCKERFILE) for extra in group.split(",")}
    assert len(asked) > 2 and asked <= set(about.get_all("Provides-Extra") or [])


def test_all_that_a_wheel_is_made_of_is_sent() -> None:
    sent = re.findall(r"^!(.*)$", (REPOSITORY / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert all((REPOSITORY / path).exists() for path in sent)
    wheel = PYPROJECT.partition("[tool.hatch.build.targets.wheel]")[2]
    (made_of,) = re.findall(r"^only-include = \[(.*)\]$", wheel, re.MULTILINE)
    needed = {path.partition("/")[0] for path in re.findall(r'"(.*?)"', made_of)} | {"pyproject.toml"}
    needed |= set(re.findall(r'^(?:readme|license-files) = \[?"(.*?)"', PYPROJECT, re.MULTILINE))
    needed |= set(re.findall(r"/src/(\S+)", DOCKERFILE))
    assert needed == set(sent)


def test_it_runs_the_command_as_an_ordinary_user() -> None:
    (entry,) = re.findall(r'^ENTRYPOINT \["(.*)"\]$', DOCKERFILE, re.MULTILINE)
    assert f'{entry} = "lit_eemllm.cli:main"' in PYPROJECT
    (user,) = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)
    assert int(user) > 0 and f"--uid {user} " in DOCKERFILE
