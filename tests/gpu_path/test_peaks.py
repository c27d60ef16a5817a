"""The most memory that an optimiser step takes on a GPU, beside what `estimate` says: four layers as wide as a 7B decoder's and
LLaVA's encoder, on tensors without numbers."""

from itertools import product

import pytest
from lib.fake_cuda import on_fake_cuda
from lib.fake_cuda.cases import TUNINGS

LAYERS, TEXT, VISUAL, VOCABULARY = 4, 256, 576, 32000


def measured_and_estimated(
    mechanism: str,
    tuning: str,
    checkpointing: bool,
    documents: int,
    kind: str,
    teacher: str | None = None,
    offload: bool = False,
) -> list[float]:
    """Peaks of a step in which the optimiser has its moments, beyond weights and moments, and those."""
    import torch
    from lib.fake_cuda import steps
    from lib.fake_cuda.world import World

    from lit_eemllm.attention.flash import Flash
    from lit_eemllm.attention.sdpa import Sdpa
    from lit_eemllm.cost.trace import Document, trace
    from lit_eemllm.cost.weightless import parts_of_shape
    from lit_eemllm.layout import PackedBatch, Run, SequenceLayout
    from lit_eemllm.mechanisms import build_mechanism
    from lit_eemllm.model import EEMLLM, EEMLLMConfig

    taught = [] if teacher is None else [f"optim.mechanisms=[{{teacher: {{preset: {teacher}}}}}]"]
    options = [f"model.mechanism.preset={mechanism}", f"optim.activation_offload={str(offload).lower()}", *taught]
    config = steps.configuration(tuning, checkpointing, kind, *options)
    parts = parts_of_shape("vicuna-7b")
    parts.decoder.num_hidden_layers, parts.decoder.vocab_size = LAYERS, VOCABULARY
    made = build_mechanism(mechanism, LAYERS)
    vision = {"encoder": parts.encoder, "config": parts.vision}
    with torch.device("meta"):
        model = EEMLLM(EEMLLMConfig(parts.decoder, vision, made.to_dict(), parts.decoder.vocab_size))
        module = steps.LitEEMLLM(model, config)
    layout = SequenceLayout.of([[Run(True, VISUAL), Run(False, TEXT)]] * documents)
    rows, ids = torch.arange(layout.num_text), torch.zeros(layout.num_tokens, dtype=torch.long)
    batch = PackedBatch(ids, rows, torch.zeros_like(rows), torch.zeros(documents, 3, 336, 336), layout, [])
    with World(numbers=False) as world:
        module.trainer = steps.TRAINER
        module.to_empty(device="cuda").to("cuda")
        steps.set_modes(model, module.trained)
        model._backend = Sdpa() if kind == "exact" else Flash("PyTorch")
        optimizer = module.configure_optimizers()["optimizer"]
        for _ in range(2):
            world.peak = world.now
            steps.optimiser_step(module, batch, optimizer)
    source = None if teacher is None else build_mechanism(teacher, LAYERS)
    step = trace(config, parts, made, Document(TEXT, VISUAL, TEXT), source)
    stays = step.weights + step.optimiser
    estimated = step.most_bytes(documents, checkpointing=checkpointing, offload=offload)
    return [world.peak - stays, estimated - stays, stays]


def check(*case):
    measured, estimated, stays = measured_and_estimated(*case)
    found = f"{estimated / 2**30:.2f} of {measured / 2**30:.2f} GiB beyond {stays / 2**30:.2f} GiB"
    assert abs(estimated - measured) <= 0.05 * (measured + stays), found
    assert 0.9 * measured <= estimated <= 1.1 * measured, found  # which weights do not hide


@pytest.mark.parametrize(
    ("mechanism", "tuning", "checkpointing"), [("llava", "lora", True), ("ee_mllm", "frozen", False)]
)
@on_fake_cuda
def test_peak(mechanism, tuning, checkpointing):
    check(mechanism, tuning, checkpointing, 6, "bfloat16")


@pytest.mark.slow
@on_fake_cuda
def test_peak_at_the_loss():
    """Of Qwen's vocabulary the supervised tokens have 234 million logits: 2.8 GB, if all were there at a time."""
    global VOCABULARY
    VOCABULARY = 152064  # in this process
    check("vica", "frozen", True, 6, "bfloat16")


@pytest.mark.parametrize(("mechanism", "kind"), [("ee_mllm", "bfloat16"), ("vica", "exact")])
@on_fake_cuda
def test_peak_with_a_teacher(mechanism, kind):
    """At the loss: of a mechanism that saves little, or with recomputing."""
    check(mechanism, "frozen", mechanism == "ee_mllm", 12, kind, "llava")


@pytest.mark.slow
@on_fake_cuda
def test_peak_with_inputs_in_main_memory():
    """It falls, by what `estimate` says."""
    global LAYERS
    LAYERS = 12  # in this process
    there, away = (measured_and_estimated("llava", "lora", True, 12, "bfloat16", None, way) for way in (False, True))
    assert [there[1], away[1]] == pytest.approx([there[0], away[0]], rel=0.03)
    assert there[0] - away[0] > 0.3 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize("case", list(product(("llava", "saisa"), TUNINGS, (False, True))), ids=str)
@on_fake_cuda
def test_every_peak(case):
    """With a decoder that is trained, of a pack so large that its activations outweigh the optimiser; but the more documents, the more
    counts that the last layer, which saves less than others, is differentiated before the largest."""
    mechanism, tuning, checkpointing = case
    check(mechanism, tuning, checkpointing, (60 if checkpointing else 50) if tuning == "full" else 6, "bfloat16")


@pytest.mark.slow
@on_fake_cuda
def test_peak_of_the_optimiser():
    """Of a pack so small that its activations do not matter: all gradients, and nothing for AdamW."""
    check("ee_mllm", "full", True, 1, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@on_fake_cuda
def test_peak_in_float32(checkpointing):
    check("ee_mllm", "lora", checkpointing, 6, "exact")
