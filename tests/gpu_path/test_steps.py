"""An optimiser step on a GPU, of every mechanism through every backend: no mix of devices, no waiting, no copy that waits, and the
loss and gradients that the reference has on a CPU."""

import copy
from collections.abc import Iterator
from itertools import product

import pytest
from lib.connectors import CASES as CONNECTORS
from lib.fake_cuda import on_fake_cuda
from lib.fake_cuda.cases import BACKENDS, EXACT, KINDS, MECHANISMS, TUNINGS

Case = tuple[str, str, bool, str]
"""Backend, tuning of the decoder, checkpointing, kind; see `configuration`."""


def everything() -> list[Case]:
    cases = product(BACKENDS, TUNINGS, (False, True), KINDS)
    return [case for case in cases if case[3] != "exact" or case[0] in EXACT]


def covering(mechanism: str) -> Iterator[Case]:
    """One case of each backend; the next mechanism has others."""
    turn = MECHANISMS.index(mechanism)
    for i, name in enumerate(BACKENDS):
        cases = [case for case in everything() if case[0] == name]
        yield cases[(5 * turn + i) % len(cases)]


def check(mechanism: str, cases: list[Case], *overrides: str) -> None:
    import tiny
    from lib.fake_cuda import steps
    from lib.fake_cuda.world import World

    steps.stand_in()
    true: dict[tuple[str, str], tuple[float, float]] = {}
    for name, tuning, checkpointing, kind in cases:
        config = steps.configuration(tuning, checkpointing, kind, *overrides)
        if (tuning, kind) not in true:
            module = steps.training_module(steps.model(mechanism), config, "cpu")
            true[tuning, kind] = steps.optimiser_step(module, tiny.pack(steps.PACK))
        with World() as world:
            module = steps.training_module(steps.model(mechanism), config, "cuda")
            module.model._backend = steps.backend(name, kind, 16 if mechanism == "unrotated" else 8)
            world.forget()
            found = steps.optimiser_step(module, tiny.pack(steps.PACK))
        case = f"{mechanism}, {name}, {tuning}, {checkpointing=}, {kind}"
        assert steps.unexpected(world, steps.ALLOWED) == [], case
        assert any("fused_adamw" in name for name in world.launches), case
        bounds = (1e-5, 1e-4) if kind == "exact" else (0.01, 0.08)  # of loss, and of gradients: in bfloat16 roundings
        for value, expected, bound in zip(found, true[tuning, kind], bounds, strict=True):
            assert abs(value - expected) <= bound * expected, (case, found, true[tuning, kind])


def step_with_images(model, documents, case):
    """(World, batch): a step on the device, whose loss and gradients are held to the same step on a CPU."""
    from lib import vision
    from lib.fake_cuda import steps
    from lib.fake_cuda.world import World

    config, batch = steps.configuration("frozen", kind="float32"), vision.pack(model, documents)
    true = steps.optimiser_step(steps.training_module(copy.deepcopy(model), config, "cpu"), batch)
    with World() as world:
        module = steps.training_module(copy.deepcopy(model), config, "cuda")
        module.model._backend = steps.backend("sdpa", "float32")
        world.forget()
        found = steps.optimiser_step(module, batch)
    for value, expected, bound in zip(found, true, (0.01, 0.08), strict=True):
        assert abs(value - expected) <= bound * expected, (case, found, true)
    return world, batch


@pytest.mark.parametrize("name", CONNECTORS)
@on_fake_cuda
def test_a_step_behind_any_connector_neither_waits_nor_mixes_devices(name):
    """Images of one size, of many and in tiles, and a pack without any."""
    import tiny
    from lib import connectors
    from lib.fake_cuda import steps

    steps.stand_in()
    for encoder, mechanism in (("clip", "ee_mllm"), ("siglip2", "llava"), ("anyres", "saisa")):
        model = tiny.model("llama-gqa", mechanism, encoder, connector=connectors.case(name))
        for documents in ([[3, (40, 20), 4, (9, 30), 2], [5], [(64, 17), 3]], [[5], [4]]):
            world, _ = step_with_images(model, documents, encoder)
            of_encoder = {"lit_eemllm/model/vision.py": "SigLIP 2's positions and masks, whatever is behind it"}
            assert steps.unexpected(world, {**steps.ALLOWED, **of_encoder}) == [], encoder


ENCODERS = {"internvl": 0, "llava_onevision": 0, "idefics3": 1, "qwen2_5_vl": 0, "qwen3_vl": 0}
"""How often the encoders of transformers wait in a step: Idefics3's looks at a mask, and see `QwenVision`, of four layers here."""


@pytest.mark.parametrize(
    "name", [name if name == "internvl" else pytest.param(name, marks=pytest.mark.slow) for name in ENCODERS]
)
@on_fake_cuda
def test_a_step_of_a_model_in_tiles_waits_no_more_than_its_encoder(name):
    import tempfile
    from pathlib import Path

    from lib import vlms
    from lib.fake_cuda import steps

    steps.stand_in()
    with tempfile.TemporaryDirectory() as folder:
        model = vlms.model_of(vlms.write(name, Path(folder)), "ee_mllm")
    for documents in ([[3, (40, 20), 4, (9, 30), 2], [5], [(64, 17), 3]], [[5], [4]]):
        world, batch = step_with_images(model, documents, name)
        waits = [note for note in steps.unexpected(world, steps.ALLOWED) if note.kind == "wait"]
        assert sum(world.notes[note] for note in waits) == ENCODERS[name] * (batch.pixel_values is not None), (
            world.notes
        )
        assert all("self.model(" in note.where for note in waits), waits


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mechanism", MECHANISMS)
@on_fake_cuda
def test_a_step_neither_waits_nor_mixes_devices(mechanism, half):
    """Through every other backend, and through the rest; the next mechanism the other way round."""
    check(mechanism, list(covering(mechanism))[(MECHANISMS.index(mechanism) + half) % 2 :: 2])


@on_fake_cuda
def test_a_step_with_a_teacher_does_not_either():
    """The loss is the sum of the cross-entropy and the KL."""
    schedule = (
        "[{mechanism: {rows: [{layers: 1-, tokens: every 2}]}, teacher: {preset: ee_mllm}, kl: 2, temperature: 2}]"
    )
    check("llava", list(covering("llava")), "model.mechanism.preset=llava", f"optim.mechanisms={schedule}")


@on_fake_cuda
def test_a_step_whose_loss_is_computed_in_parts_does_not_either():
    """Of two supervised tokens at a time, where a CPU takes all."""
    import tiny

    from lit_eemllm.model import packed

    packed.LOGITS = 2 * tiny.VOCAB + 5  # in this process
    check("ee_mllm", [("flash", "lora", False, "float32"), ("sdpa", "full", True, "exact")])


@pytest.mark.parametrize("mechanism", ["p_mod", "saisa"])
@on_fake_cuda
def test_a_step_with_inputs_of_layers_in_main_memory_does_not_either(mechanism):
    """What is copied there is page-locked, every layer's text and visual rows; nothing changes by it, bit for bit."""
    import tiny
    from lib.fake_cuda import steps
    from lib.fake_cuda.world import World

    check(
        mechanism,
        [("flash", "lora", True, "float32"), ("sdpa", "frozen", True, "exact")],
        "optim.activation_offload=true",
    )
    found, copies = [], []
    for offload in ("false", "true"):
        config = steps.configuration("frozen", True, "exact", f"optim.activation_offload={offload}")
        with World() as world:
            module = steps.training_module(steps.model(mechanism), config, "cuda")
            module.model._backend = steps.backend("sdpa", "exact")
            world.forget()
            found.append([float(x) for x in steps.optimiser_step(module, tiny.pack(steps.PACK))])
            found[-1] += [x.tolist() for x in module.model.projector.parameters()]
        copies.append(world.launches["copy to host"])
    assert found[0] == found[1]
    layers = len(module.model.language_model.model.layers)
    assert copies[1] - copies[0] == {"p_mod": 2, "saisa": 1}[mechanism] * layers


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["llava", "ee_mllm", "flamingo", "apart"])  # whose layers differ most
@on_fake_cuda
def test_every_step_neither_waits_nor_mixes_devices(mechanism):
    check(mechanism, everything())


def test_the_choice_has_every_case_of_a_backend_with_some_mechanism():
    """Mechanism and backend meet by themselves; so do each two of the rest."""
    chosen = {case for mechanism in MECHANISMS for case in covering(mechanism)}
    for first, second in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        assert {(c[first], c[second]) for c in chosen} == {(c[first], c[second]) for c in everything()}
