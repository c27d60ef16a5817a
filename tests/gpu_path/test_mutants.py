"""The fake device itself: it is there where a compiler is, and sees what would be refused, wait or be slow on a real one."""

import re
import subprocess
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
from lib.fake_cuda import building, on_fake_cuda

SETTINGS = ("sdpa", "flash")


def test_the_library_is_compiled_once(tmp_path, monkeypatch):
    """Where there is a compiler; what it says of a mistake is an error, not a reason to skip."""
    building.library()
    made = building.compile_library(tmp_path)
    with patch.object(subprocess, "run", side_effect=AssertionError("again")):
        assert building.compile_library(tmp_path) == made
    broken = tmp_path / "broken.cpp"
    broken.write_text("mistake")
    monkeypatch.setattr(building, "SOURCE", broken)
    with pytest.raises(subprocess.CalledProcessError):
        building.library()


def test_without_a_compiler_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(building, "COMPILER", "no-such-compiler")
    with pytest.raises(pytest.skip.Exception, match="compiler, no-such-compiler"):
        building.library()


# Faults: each takes the place of something in the program.
def _on_layers(spoil: Callable) -> Callable:
    from lit_eemllm.core.decoder import DecoderLayer

    forward = DecoderLayer.forward

    def spoilt(self, x_Th, x_Vh, stream, kept=None):
        return forward(self, spoil(x_Th), x_Vh, stream, kept)

    return patch.object(DecoderLayer, "forward", spoilt)


def item():
    def spoil(x):
        assert x.sum().item() == x.sum().item()
        return x

    return _on_layers(spoil)


def branch():
    return _on_layers(lambda x: x if x.isfinite().all() else x * 0)


def shape():
    return _on_layers(lambda x: x + 0 * x[:, 0].nonzero().sum())


def cpu_operand():
    import torch

    return _on_layers(lambda x: x * torch.ones(len(x), 1))


def cpu_index():
    import torch

    return _on_layers(lambda x: x[torch.arange(len(x))])


def mask_index():
    return _on_layers(lambda x: x[x[:, 0] == x[:, 0]])


def numbers_to_device():
    import torch

    return _on_layers(lambda x: x * torch.tensor([1.0], device=x.device))


def unpinned():
    return _uploading(lambda tensor, device: tensor.to(device))


def plan_on_cpu():
    return _uploading(lambda tensor, device: tensor)


@contextmanager
def _uploading(upload):
    from lit_eemllm.attention import sdpa, varlen

    with patch.object(sdpa, "upload", upload), patch.object(varlen, "upload", upload):
        yield


def repeats():
    import torch

    return _on_layers(lambda x: x.repeat_interleave(torch.ones(len(x), dtype=torch.long, device="cuda"), 0))


def float32_queries():
    from lit_eemllm.core.stream import Stream

    packed = Stream._packed
    return patch.object(Stream, "_packed", lambda self, q, *rest: packed(self, q.float(), *rest))


def skewed_rows():
    """Heads that begin where no kernel can load them at once."""
    from torch.nn.functional import pad

    from lit_eemllm.core.stream import Stream

    packed = Stream._packed
    return patch.object(Stream, "_packed", lambda self, q, k, *rest: packed(self, q, pad(k, (0, 1))[..., :-1], *rest))


def cudnn():
    from lit_eemllm.attention import base, sdpa

    return patch.object(sdpa, "fused_attention", base.scaled_attention)


MUTANTS = {
    item: "wait", branch: "wait", shape: "wait", mask_index: "wait", repeats: "wait",
    cpu_index: "unpinned copy", numbers_to_device: "unpinned copy", unpinned: "unpinned copy",
    cpu_operand: "same device", plan_on_cpu: "same device|unpinned copy",
    float32_queries: "several types", skewed_rows: "not at addresses", cudnn: "cudnn",
}  # fmt: skip
"""What is planted, and what is noted or raised."""
ONLY = {float32_queries: ("flash",), skewed_rows: ("flash",), cudnn: ("sdpa",)}


def seen(mutant, name):
    """What a forward and a backward show under it: notes and kernels, or the refusal."""
    import tiny
    import torch
    from lib.fake_cuda import steps
    from lib.fake_cuda.world import World

    with World() as world:
        model = steps.model("ee_mllm").to("cuda")
        model._backend = steps.backend(name)
        batch = tiny.pack(steps.PACK).pin_memory().to("cuda")
        world.forget()
        try:
            with mutant() if mutant else nullcontext():
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model.packed_loss(batch)
                loss.backward()
        except (RuntimeError, AssertionError) as error:
            return str(error)
    return " ".join([*(note.kind for note in world.notes), *(x for x in world.launches if "cudnn" in x)])


@pytest.mark.parametrize("name", SETTINGS)
@on_fake_cuda
def test_it_sees_faults(name):
    assert seen(None, name) == ""
    missed = [
        f"{mutant.__name__}: {found}"
        for mutant, sign in MUTANTS.items()
        if name in ONLY.get(mutant, SETTINGS) and not re.search(sign, found := seen(mutant, name))
    ]
    assert not missed, missed


@on_fake_cuda
def test_it_sees_a_token_that_waits():
    """A length that is read from the device."""
    import tiny
    import torch
    from lib.fake_cuda import steps
    from lib.fake_cuda.world import World

    from lit_eemllm.compat.transformers import CACHE
    from lit_eemllm.model.cache import Grid

    unpad = Grid.unpad

    def waiting(self, x_BNWH, rows=None):
        return unpad(self, x_BNWH, rows)[: int(self.mask_BQL.sum())]

    with World() as world, torch.inference_mode():
        model = steps.model("llava").to("cuda")
        model._backend = steps.backend("sdpa", "exact")
        inputs = {name: x.pin_memory().to("cuda") for name, x in tiny.prompt(model, [[3, 0, 4]]).items()}
        filled = model(**inputs, use_cache=True)[CACHE]
        token = torch.ones(1, 1, dtype=torch.long, device="cuda")
        world.forget()
        model(token, **{CACHE: filled})
        assert not world.notes
        with patch.object(Grid, "unpad", waiting):
            model(token, **{CACHE: filled})
        assert {note.kind for note in world.notes} == {"wait"}
