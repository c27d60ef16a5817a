"""`lit-eemllm doctor`: it tells what ran and why the rest did not, and nothing that is broken breaks it."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from lit_eemllm import cli, doctor
from lit_eemllm.attention import AttentionBackend, register_backend, registered_backends, resolve_backend
from lit_eemllm.attention.base import _BACKENDS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def few_packages(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", {"torch": "torch", "no-such-package": "no_such_package"})


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package of one module: package(name, code)."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, code: str, version: str = "1.2") -> None:
        (tmp_path / f"{name}.py").write_text(code)
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    yield install
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def backend():
    """Registers a backend like the reference but for what is given: backend(name, attend=...)."""
    before = dict(_BACKENDS)

    def register(name: str, **attributes) -> None:
        register_backend(name)(type(name, (_BACKENDS["reference"],), {"priority": 100, **attributes}))

    yield register
    _BACKENDS.clear()
    _BACKENDS.update(before)


def findings(capsys, *arguments: str) -> dict:
    assert cli.main(["doctor", "--device", "cpu", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def shown(capsys, monkeypatch, width: int = 120) -> str:
    out = io.StringIO()
    plain = Console(file=out, width=width, highlight=False, soft_wrap=True, markup=False)
    monkeypatch.setattr(doctor, "console", plain)
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == ""
    return out.getvalue()


def test_findings_on_the_cpu(capsys):
    found = findings(capsys, "--head-size", "80")
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["versions"]["no-such-package"] == "not installed"
    assert found["machine"]["cpu_cores"] >= 1 and found["machine"]["system"]
    assert (found["device"], found["head_size"]) == ("cpu", 80)
    assert list(found["backends"]) == registered_backends()
    for kind, dtype in DTYPES.items():
        runs = {name: row[kind]["runs"] for name, row in found["backends"].items()}
        assert runs == {
            "flash": "no",
            "xformers": "no",
            "sdpa": "yes",
            "flex": "forward only",
            "cudnn": "no",
            "reference": "yes",
        }
        assert found["backends"]["sdpa"][kind]["provider"] == "PyTorch"
        assert found["backends"]["flash"][kind]["refused"] == {"": "needs a CUDA device, found cpu"}
        assert "no backward on the CPU" in found["backends"]["flex"][kind]["refused"][""]
        for what in ("training", "evaluation"):
            choice = resolve_backend("auto", "cpu", dtype, training=what == "training", head_size=80)
            assert found["auto"][kind][what] == choice.backend.name


@pytest.mark.gpu
def test_findings_on_a_gpu(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cuda" and found["machine"]["cuda_devices"][0]["memory_gib"] > 0
    assert found["machine"]["no_cuda_because"] is None and found["machine"]["nvidia_driver"]
    assert {row["float32"]["runs"] for name, row in found["backends"].items() if name in ("sdpa", "flex")} == {"yes"}
    assert "float32" in found["backends"]["flash"]["float32"]["refused"][""]
    for kind, dtype in DTYPES.items():
        assert found["auto"][kind]["training"] == resolve_backend("auto", "cuda", dtype).backend.name


@pytest.mark.parametrize("width", [40, 120])
def test_it_is_readable_in_a_narrow_terminal(backend, capsys, monkeypatch, width):
    def attend(self, *args):
        raise RuntimeError("no such kernel\n  on this device: " + "x" * 900)

    backend("broken", attend=attend)
    text = shown(capsys, monkeypatch, width)
    tables, sentences = text.split("A name of a provider")
    assert max(map(len, tables.splitlines())) <= width
    assert all(name in tables for name in registered_backends())
    assert "- flash: needs a CUDA device, found cpu\n" in sentences
    line = next(line for line in sentences.splitlines() if line.startswith("- broken: "))
    assert "not PyTorch: RuntimeError: no such kernel on this device:" in line and len(line) < 400
    assert "model.attention=auto in float16: sdpa\n" in sentences


def test_what_differs_between_dtypes_is_told_for_each(backend, capsys, monkeypatch):
    def refusal(cls, device, dtype, training):
        if dtype == torch.float32:
            return "has only 16 bits"
        return "has no backward" if training and dtype == torch.float16 else None

    def candidates(cls):
        def fails():
            raise ImportError("undefined symbol: _ZN3c10")

        yield "better", fails
        yield "good enough", cls

    backend("mine", refusal=classmethod(refusal), candidates=classmethod(candidates), provider="good enough")
    row = findings(capsys)["backends"]["mine"]
    assert row == {
        "float32": {"runs": "no", "provider": None, "refused": {"": "has only 16 bits"}},
        "bfloat16": {
            "runs": "yes",
            "provider": "good enough",
            "refused": {"better": "ImportError: undefined symbol: _ZN3c10"},
        },
        "float16": {"runs": "forward only", "provider": "good enough", "refused": {"": "has no backward"}},
    }
    text = shown(capsys, monkeypatch)
    assert "- mine in float32: has only 16 bits\n" in text
    assert "- mine in bfloat16: not better: ImportError: undefined symbol: _ZN3c10\n" in text
    assert "- mine in float16: has no backward\n" in text
    assert "auto in float32: sdpa\n" in text and "auto in bfloat16: mine\n" in text
    assert "auto in float16: sdpa, mine to evaluate\n" in text


def test_a_backend_may_fail_before_it_is_tried(backend, capsys):
    def fails(cls, *args):
        raise KeyError("oops")

    backend("one", refusal=classmethod(fails))
    backend("two", candidates=classmethod(fails))
    found = findings(capsys)
    for name in ("one", "two"):
        assert found["backends"][name]["float32"] == {
            "runs": "no",
            "provider": None,
            "refused": {"": "KeyError: 'oops'"},
        }
    assert found["auto"]["float32"]["training"] == "sdpa"


def test_nothing_runs(monkeypatch, capsys):
    for name in set(_BACKENDS) - {"reference"}:
        monkeypatch.delitem(_BACKENDS, name)
    monkeypatch.setattr(AttentionBackend, "refusal", classmethod(lambda cls, *args: "not here"))
    assert "model.attention=auto in float32: nothing\n" in shown(capsys, monkeypatch)


def test_packages_that_are_broken_or_talkative(package, monkeypatch, capsys):
    package("works_well", "print('hello from works_well')")
    package("lacks_a_part", "import no_such_part")
    package("fails_badly", "raise OSError('libcudart.so.12: cannot open shared object file')")
    names = ("works_well", "lacks_a_part", "fails_badly")
    monkeypatch.setattr(doctor, "PACKAGES", {name.replace("_", "-"): name for name in names})
    versions = findings(capsys)["versions"]
    assert versions["works-well"] == "1.2"
    assert versions["lacks-a-part"] == (
        "1.2, but importing it fails: ModuleNotFoundError: No module named 'no_such_part'"
    )
    assert versions["fails-badly"].endswith("OSError: libcudart.so.12: cannot open shared object file")
    assert "1.2, but importing it fails" in shown(capsys, monkeypatch)


def test_driver_and_build(monkeypatch):
    answer = SimpleNamespace(stdout="580.65.06\n580.65.06\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: answer)
    monkeypatch.setattr(doctor.torch.version, "cuda", None)
    found = doctor.machine()
    assert found["nvidia_driver"] == "580.65.06" and found["pytorch_built_for"] == "CPU only"
    assert found["no_cuda_because"] == "this PyTorch is built for the CPU; install one that is built for CUDA"

    def fails(*args, **options):
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    def no_driver():
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr(doctor.subprocess, "run", fails)
    monkeypatch.setattr(doctor.torch.version, "cuda", "12.8")
    monkeypatch.setattr(doctor.torch.cuda, "init", no_driver)
    found = doctor.machine()
    assert found["nvidia_driver"] is None and found["pytorch_built_for"] == "CUDA 12.8"
    assert found["no_cuda_because"] == "RuntimeError: Found no NVIDIA driver on your system"


def test_devices_are_named_with_memory_and_capability(monkeypatch):
    device = SimpleNamespace(name="NVIDIA H200", total_memory=150_110_011_392, major=9, minor=0)
    monkeypatch.setattr(doctor.torch.version, "cuda", "12.8")
    monkeypatch.setattr(doctor.torch.cuda, "init", lambda: None)
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(doctor.torch.cuda, "get_device_properties", lambda index: device)
    found = doctor.machine()
    assert found["cuda_devices"] == [{"name": "NVIDIA H200", "memory_gib": 139.8, "capability": "9.0"}] * 2
    assert found["no_cuda_because"] is None


def test_the_commit_is_ours_or_unknown(monkeypatch, tmp_path):
    """Git looks for a repository upwards; that of a user who has us installed below it is not ours."""
    said = {"describe": "1a2b3c4\n", "status": ""}
    run = lambda command, **options: SimpleNamespace(stdout=next(said[word] for word in command if word in said))  # noqa: E731
    monkeypatch.setattr(doctor.subprocess, "run", run)
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "site-packages" / "lit_eemllm" / "doctor.py"))
    (tmp_path / ".git").mkdir()
    assert doctor.environment()["commit"] == "unknown (not a git checkout)"
    (tmp_path / "site-packages" / ".git").mkdir(parents=True)
    assert doctor.environment()["commit"] == "1a2b3c4"
    said["status"] = " M README.md\n"
    assert doctor.environment()["commit"] == "1a2b3c4-dirty"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device", "gpu"], "--device: found 'gpu', expected such as cpu, cuda or cuda:1"),
        (["--head-size", "0"], "--head-size: found 0, expected 1 or more"),
        (["--import", "gone.py"], "gone.py: no such Python file"),
    ],
)
def test_mistakes(capsys, arguments, expected):
    assert cli.main(["doctor", *arguments]) == 2
    assert expected in capsys.readouterr().err
