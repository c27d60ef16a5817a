"""An attention backend in a user's own file: docs/my_backend.py, as docs/backends.md tells it."""

import doctest
import hashlib
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import config, forgotten_imports, model, pack

from lit_eemllm import cli
from lit_eemllm.attention import AttentionBackend, registered_backends, resolve_backend
from lit_eemllm.config import load_config, to_yaml
from lit_eemllm.errors import ConfigError
from lit_eemllm.layout import Run, SequenceLayout, Visibility
from lit_eemllm.names import check_names
from lit_eemllm.plugins import import_user_code

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = DOCS / "my_backend.py"


@pytest.fixture(autouse=True)
def forget():
    """Whatever a test registers and imports is gone after it."""
    with forgotten_imports():
        yield


@pytest.fixture
def module():
    import_user_code([EXAMPLE])
    return sys.modules["lit_eemllm_user_my_backend"]


def random_layout(seed: int) -> SequenceLayout:
    draw = random.Random(seed)
    documents = [
        [Run(draw.random() < 0.5, draw.randint(1, 9)) for _ in range(draw.randint(1, 5))]
        for _ in range(draw.randint(1, 4))
    ]
    # where no row queries nothing is asked
    return SequenceLayout.of([*documents, [Run(False, 2)], [Run(True, 1)]])


def results(
    backend: AttentionBackend, layout: SequenceLayout, visibility: Visibility, kv_heads: int
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(layout.num_tokens)
    queries = sum(run.length for document in layout.documents for run in document if visibility.queries(run.visual))
    shapes = [(queries, 4, 8), (layout.num_tokens, kv_heads, 8), (layout.num_tokens, kv_heads, 8)]
    qkv = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    out = backend.attend(*qkv, backend.plan(layout, visibility), 0.3)
    weights = torch.randn(out.shape, generator=generator)
    return [out, *torch.autograd.grad((out * weights).sum(), qkv)]


@pytest.mark.parametrize("chunk", [1, 4, 256])
def test_the_example_equals_the_reference_forward_and_backward(module, monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    backends = [resolve_backend(name).backend for name in ("chunked", "reference")]
    for seed in range(10):
        layout = random_layout(seed)
        for visibility in (
            Visibility(True),
            Visibility(False),
            Visibility(True, text_queries=False),
            Visibility(True, text_queries=False, both_ways=True),
            Visibility(True, window=0),
            Visibility(True, window=3),
            Visibility(False, window=3),
        ):
            for kv_heads in (4, 2, 1):
                found, true = (results(backend, layout, visibility, kv_heads) for backend in backends)
                assert found[0].shape == true[0].shape
                for f, t in zip(found, true, strict=True):
                    assert (f - t).abs().max() <= 1e-5 * t.abs().max() + 1e-6, (seed, visibility)


def test_a_chunk_looks_at_its_documents_only(module, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    layout = SequenceLayout.of([[Run(False, 4)], [Run(True, 3), Run(False, 2)], [Run(False, 1)]])
    plan = module.Chunked().plan(layout, Visibility(visual_queries=False))
    assert plan.keys == [slice(0, 2), slice(0, 4), slice(4, 9), slice(9, 10)]
    plan = module.Chunked().plan(layout, Visibility(True, text_queries=False))
    assert plan.keys == [slice(4, 6), slice(4, 7)]


@pytest.mark.parametrize("mechanism", ["ee_mllm", "llava"])
def test_a_model_gives_the_same_loss_and_gradients(module, mechanism):
    batch = pack([[3, 0, 5], [4], [0, 2, 0, 3]])
    made = []
    for name in ("chunked", "reference"):
        tiny = model(mechanism=mechanism)
        assert tiny.set_attention(name).backend.name == name
        loss = tiny.packed_loss(batch)
        loss.backward()
        made.append([loss.detach(), *(p.grad for _, p in sorted(tiny.named_parameters()) if p.grad is not None)])
    assert len(made[0]) > 10
    for found, true in zip(*made, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5 * max(1.0, true.abs().max().item()))


def test_it_is_chosen_by_its_name_and_only_once_imported(tmp_path, capsys):
    line = ["config", "show", "--import", str(EXAMPLE), "model.attention=chunked"]
    (tmp_path / "c.yaml").write_text(
        "model: {decoder: d, vision: {path: e}}\ndata: {train: t}\noptim: {lr: 1, max_steps: 1}\n"
    )
    with pytest.raises(ConfigError, match="found 'chunked', expected auto or"):
        load_config([tmp_path / "c.yaml"], ["model.attention=chunked"], checks=[check_names])
    with pytest.raises(ConfigError, match=r"unknown backend 'chunked'; choose auto or one of \['flash'"):
        resolve_backend("chunked")
    assert "chunked" not in registered_backends()

    assert cli.main([*line, str(tmp_path / "c.yaml")]) == 0
    assert "attention: chunked" in capsys.readouterr().out
    assert registered_backends()[-2:] == ["chunked", "reference"]
    assert resolve_backend("chunked").backend.name == "chunked"
    assert resolve_backend("auto").backend.name == "sdpa"  # the example stands behind it
    with pytest.raises(ValueError, match="'chunked' is registered already"):
        import_user_code([EXAMPLE])


def test_a_run_says_with_which_file_it_was_made(parts, shapes, tmp_path, monkeypatch, capsys, caplog):
    """Never running it: the name and digest of a file are told where the name that it registers is unknown, or it has changed."""
    monkeypatch.chdir(tmp_path)
    Path("given.yaml").write_text(
        to_yaml(config(parts, shapes, "run", "optim.max_steps=1", "data.val=null", "data.workers=0"))
    )
    shutil.copy(EXAMPLE, "mine.py")
    digest = hashlib.sha256(EXAMPLE.read_bytes()).hexdigest()
    words = ["model.attention=chunked", "--import", "mine.py"]
    with forgotten_imports():
        assert cli.main(["fit", "given.yaml", *words]) == 0
    assert json.loads(Path("run/imports.json").read_text()) == {"mine.py": digest}
    capsys.readouterr()
    told = f"run was made with --import mine.py (sha256 {digest[:12]}): give it again"
    for line in (["generate", "run", "--prompt", "What?"], ["fit", "run"], ["convert", "run", "--out", "there"],
                 ["fit", "given.yaml", "model.attention=chunked"]):  # fmt: skip
        assert cli.main(line) == 2
        assert told in capsys.readouterr().err, line
    assert "chunked" not in registered_backends()
    caplog.clear()
    with forgotten_imports():
        assert cli.main(["config", "show", "run", "--import", str(EXAMPLE)]) == 0, "the same file elsewhere"
    assert not caplog.text
    Path("mine.py").write_text(EXAMPLE.read_text() + "# changed\n")
    now = hashlib.sha256(Path("mine.py").read_bytes()).hexdigest()
    with forgotten_imports():
        assert cli.main(["fit", "run", "optim.max_steps=2", "--import", "mine.py"]) == 0
    expected = f"run was made with --import mine.py (sha256 {digest[:12]}); given now is mine.py (sha256 {now[:12]})"
    assert expected in caplog.text
    assert json.loads(Path("run/imports.json").read_text()) == {"mine.py": now}, "with which it goes on"
    Path("run/imports.json").write_text("[")
    capsys.readouterr()
    assert cli.main(["fit", "run"]) == 2
    assert "imports.json: not valid JSON" in capsys.readouterr().err


def test_the_page_is_true(module):
    assert doctest.testfile(str(DOCS / "backends.md"), module_relative=False).failed == 0
