"""Costs against PyTorch's FLOP counter and the memory really taken, of real models and training steps."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from lib.mechanisms import TEXT, VISUAL, check_flops_and_cache, counted, scores_past_the_window
from transformers import CLIPVisionConfig, LlamaConfig

from lit_eemllm import cli
from lit_eemllm.config import load_config
from lit_eemllm.cost.formulas import layer_flops, prefill_flops
from lit_eemllm.cost.trace import Document, Step, trace
from lit_eemllm.cost.weightless import Parts, as_on_a_gpu, build_weightless, parts_of_config, parts_of_shape
from lit_eemllm.inputs.images import ImageTransform
from lit_eemllm.layout import PackedBatch, Run, SequenceLayout
from lit_eemllm.mechanisms import CONNECTORS, NO_ALIGNER, PRESETS, Aligner, Mechanism, build_mechanism
from lit_eemllm.mechanisms.flamingo import Gated
from lit_eemllm.model import EEMLLM, EEMLLMConfig
from lit_eemllm.model.build import build
from lit_eemllm.training.module import compute_dtype
from lit_eemllm.training.tuning import apply_tuning, parameter_groups, set_modes

# --- real models: FLOPs and caches
SMALL_GATED = Gated(every=2, latents=5, heads=2, head_size=8, depth=1)
MECHANISMS = {
    **{name: build_mechanism(name, 3) for name in PRESETS if name != "flamingo"},
    "flamingo": replace(PRESETS["flamingo"], gated=SMALL_GATED),
    "flamingo, all tokens": replace(PRESETS["flamingo"], gated=replace(SMALL_GATED, latents=0)),
    "ee_mllm, text blind in the last layer": Mechanism(cross_layers=(0, 1)),
    "ee_mllm, text blind in the first layer": Mechanism(cross_layers=(1, 2)),  # which makes values, and no keys
    "no ffn": Mechanism(aligner=Aligner(ffn=False)),
    "unrotated": Mechanism(visual_positions="unrotated"),
    "unrotated vica": Mechanism(visual_positions="unrotated", cross_layers=(1,), aligner=NO_ALIGNER),
    "dropping": Mechanism(aligner=NO_ALIGNER, visual_drop=((1, 0.4), (2, 0.3))),
    "window": Mechanism(visual_window=3),
    "window, wider than an image": Mechanism(visual_window=20),
}


@given(tiny.tables())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_flops_and_cache_of_any_table(mechanism):
    check_flops_and_cache(tiny.model("llama", mechanism))


REAL = [(name, "qwen3") for name in MECHANISMS]  # whose heads are together wider than its states
REAL += [
    (name, decoder)
    for name in ("llava", "ee_mllm", "flamingo", "casa", "unrotated")
    for decoder in ("llama-gqa", "olmo2", "smollm3", "gemma3_text", "llama4_text")
]


@pytest.mark.parametrize(("name", "decoder"), REAL)
def test_flops_and_cache_of_a_real_prompt(name, decoder):
    check_flops_and_cache(tiny.model(decoder, MECHANISMS[name]))


# --- what is not computed: of weights alone, for 40 text and 256 visual tokens in a layer of h = 256, m = 512
BLIND = (
    40 * 2 * (4 * 256**2 + 3 * 256 * 512)
)  # every row of text through W_q, W_k, W_v, W_o and the feed-forward network
SEEN = BLIND + 256 * 2 * 2 * 256**2  # every visual row through W_k and W_v
UPDATED = (40 + 256) * 2 * (4 * 256**2 + 3 * 256 * 512)
SCORES = {BLIND: 4 * 40 * 40 * 256, SEEN: 4 * 40 * 296 * 256, UPDATED: 4 * 296 * 296 * 256}
ABSENT = (("tokens", "none"),)
LAYERS = {
    "llava": (Mechanism(dense_layers="all"), [UPDATED] * 7 + [SEEN]),
    "llava, visual tokens enter at layer 4": (
        Mechanism(dense_layers="all", rows=(("0-3", ABSENT),)), [BLIND] * 4 + [UPDATED] * 3 + [SEEN]
    ),
    "llava, they leave after layer 3": (
        Mechanism(dense_layers="all", rows=(("4-", ABSENT),)), [UPDATED] * 3 + [SEEN] + [BLIND] * 4
    ),
    "vica, text sees them in layer 7 only": (Mechanism(cross_layers=(7,), aligner=NO_ALIGNER), [BLIND] * 7 + [SEEN]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_leave_something_out_by_hand(name):
    """By the formulas, and measured in a real model, layer by layer."""
    assert [round(flops / 1e6, 2) for flops in (BLIND, SEEN, UPDATED)] == [52.43, 119.54, 387.97]
    mechanism, expected = LAYERS[name]
    text = LlamaConfig(
        vocab_size=99, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4
    )
    found = layer_flops(mechanism, text, 40, 256)
    assert [flops - SCORES[weights] for flops, weights in zip(found, expected, strict=True)] == expected
    encoder = {**PARTS.vision["model"], "image_size": 64}
    parts = Parts(text, "transformers", {**PARTS.vision, "model": encoder, "transform": IMAGE.to_dict()})
    model = built(configured(), parts, mechanism)
    model.set_attention("reference")
    ids = torch.tensor([[1] * 9 + [model.config.image_token_id] * 256 + [1] * 31])
    with torch.no_grad():
        counts = counted(lambda: model(ids, pixel_values=torch.randn(1, 3, 64, 64)))[1].get_flop_counts()
    layers = [counts[f"EEMLLM.language_model.model.layers.{layer}"] for layer in range(8)]
    scores = [layer.pop(torch.ops.aten.bmm) for layer in layers]
    assert [sum(layer.values()) for layer in layers] == expected
    assert scores == [SCORES[weights] for weights in expected]


# --- real models: a training step
WORDS = {
    "projector": [],
    "decoder": ["optim.tuning.llm=full"],
    "everything": ["optim.tuning.llm=full", "optim.tuning.vision=full"],
    "decoder alone": ["optim.tuning.llm=full", "optim.tuning.projector=frozen"],
    "lora": ["optim.tuning.llm=lora", "optim.lora.r=4", "optim.lora.dropout=0"],
}


def configured(*overrides: str):
    """A configuration whose parts are never opened."""
    given = ["model.decoder=none", "model.vision.path=none", "data.train=none", "optim.lr=1e-3", "optim.max_steps=1"]
    return load_config([], [*given, *overrides])


def built(config, parts: Parts, mechanism: Mechanism) -> EEMLLM:
    """A real model as it is trained."""
    torch.manual_seed(0)
    vision = {"encoder": parts.encoder, "config": parts.vision}
    made = EEMLLMConfig(parts.decoder, vision, mechanism.to_dict(), parts.decoder.vocab_size, parts.connector.to_dict())
    model = EEMLLM(made)
    set_modes(model, apply_tuning(model, config.optim, config.model.dtype))
    return model


STEPS = [(name, "projector", "llama-gqa") for name in MECHANISMS]
STEPS += [(name, "everything", "llama-gqa") for name in ("llava", "ee_mllm", "shortv", "saisa", "flamingo")]
STEPS += [
    (name, words, "llama-gqa")
    for name in ("llava", "vica", "flamingo")
    for words in ("decoder", "decoder alone", "lora")
]
STEPS += [
    (name, "decoder", decoder)
    for name in ("llava", "ee_mllm")
    for decoder in ("olmo2", "smollm3", "gemma3_text", "llama4_text")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words", "decoder"), STEPS)
def test_parameters_and_flops_of_a_real_training_step(name, words, decoder):
    mechanism, config = MECHANISMS[name], configured(*WORDS[words])
    parts = Parts(tiny.DECODERS[decoder], "transformers", tiny.vision().to_config())
    step = trace(config, parts, mechanism, Document(TEXT, VISUAL, TEXT - 1))
    model = built(config, parts, mechanism)
    model.set_attention("reference")
    batch = tiny.pack([[0, TEXT]])

    loss, forward = counted(lambda: model.packed_loss(batch))
    _, backward = counted(loss.backward)
    extra = scores_past_the_window(mechanism, model)
    assert forward.get_total_flops() == step.forward_flops + extra
    if model.blocks and words == "decoder alone":  # a fused kernel has no choice: keys and values get gradients too
        extra -= len(model.blocks) * 2 * TEXT * SMALL_GATED.latents * SMALL_GATED.heads * SMALL_GATED.head_size
    assert backward.get_total_flops() == step.backward_flops + 2 * extra
    if words != "lora" and not mechanism.visual_drop:  # which training does not do
        assert step.decoder_flops == prefill_flops(mechanism, parts.decoder, TEXT, VISUAL, vision_width=16)

    held = [p for group in parameter_groups(model, config.optim) for p in group["params"]]
    assert step.trained == sum(p.numel() for p in held)
    assert step.parameters == sum(p.numel() for p in model.parameters())
    assert step.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = torch.optim.AdamW(held)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for kind, x in state.items() if kind != "step"]
    assert step.optimiser == sum(x.numel() * x.element_size() for x in moments)


@pytest.mark.parametrize("name", ["llava", "vica"])
def test_backward_flops_in_closed_form(name):
    """Twice the forward pass, but once under frozen weights, and nothing for what needs no gradient."""
    parts = Parts(tiny.DECODERS["llama-gqa"], "transformers", tiny.vision().to_config())
    mechanism, h, d = MECHANISMS[name], 32, 16
    document = Document(TEXT, VISUAL, TEXT)
    seen = [mechanism.sees_images(layer) for layer in range(3)]
    scores = 2 * TEXT * (TEXT + VISUAL) + TEXT * TEXT if name == "vica" else 2 * (TEXT + VISUAL) ** 2
    scores += TEXT * (TEXT + VISUAL) if name == "llava" else 0
    assert sum(seen) == (2 if name == "vica" else 3)
    frozen = trace(configured(), parts, mechanism, document)
    to_features = 2 * VISUAL * d * h  # of the projector's first layer: the features are frozen
    attention = 4 * scores * h
    forward = frozen.decoder_flops + frozen.head_flops
    # Images enter in the first layer, so everything there is on trained ground.
    assert seen[0] and frozen.connector_flops == 2 * VISUAL * (d * h + h * h)
    assert frozen.backward_flops == forward + attention + 2 * frozen.connector_flops - to_features
    full = trace(configured("optim.tuning.llm=full"), parts, mechanism, document)
    assert full.backward_flops == 2 * (forward + full.connector_flops) - to_features


# --- real models: memory
WIDE = LlamaConfig(
    vocab_size=300,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
)
CLIP = CLIPVisionConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
)
TRANSFORM, IMAGE = (ImageTransform(side, side, 4, (0.5,) * 3, (0.5,) * 3) for side in (32, 64))
PARTS = Parts(
    WIDE,
    "transformers",
    {
        "model": {**CLIP.to_diff_dict(), "model_type": CLIP.model_type},
        "transform": TRANSFORM.to_dict(),
        "select_layer": -2,
    },
)
DOCUMENT, DOCUMENTS = Document(40, 64, 30), 6
SETTINGS = {
    "float32": [],
    "bf16, decoder too": ["trainer.precision=bf16-mixed", "optim.tuning.llm=full"],
    "bf16, frozen in 16 bits": ["trainer.precision=bf16-mixed", "model.dtype=bfloat16"],
}
SETTINGS["bf16, lora"] = [*SETTINGS["bf16, frozen in 16 bits"], "optim.tuning.llm=lora", "optim.lora.dropout=0"]
MEASURED = [(name, "bf16, decoder too") for name in PRESETS] + [("ee_mllm", "bf16, lora")]
MEASURED += [("llava", "float32"), ("saisa", "float32"), ("ee_mllm", "bf16, frozen in 16 bits")]


def wide(name: str) -> Mechanism:
    mechanism = build_mechanism(name, 6)
    return replace(mechanism, gated=SMALL_GATED) if name == "flamingo" else mechanism


def packed(visual: int = DOCUMENT.visual) -> PackedBatch:
    layout = SequenceLayout.of([[Run(True, visual), Run(False, DOCUMENT.text)]] * DOCUMENTS)
    rows = torch.cat([torch.arange(DOCUMENT.targets) + i * DOCUMENT.text for i in range(DOCUMENTS)])
    ids, targets = torch.ones(layout.num_tokens, dtype=torch.long), torch.ones(len(rows), dtype=torch.long)
    return PackedBatch(ids, rows, targets, torch.randn(DOCUMENTS, 3, 32, 32), layout, [])


def peak(function) -> int:
    """The most bytes that the allocator of the CPU had handed out at any time, by PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


def as_measured(config, parts: Parts, mechanism: Mechanism) -> EEMLLM:
    model = built(config, parts, mechanism)
    as_on_a_gpu(model)  # a norm keeps its input, of PyTorch's LayerNorm here and of its RMSNorm there
    model.set_attention("sdpa")
    return model


def passes(model: EEMLLM, config, batch: PackedBatch) -> None:
    dtype = compute_dtype(config)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model.packed_loss(batch)
    loss.backward()


def peak_of_a_step(config, parts: Parts, mechanism: Mechanism, batch: PackedBatch) -> int:
    """As in the middle of a run."""
    model = as_measured(config, parts, mechanism)
    passes(model, config, batch)
    model.zero_grad()
    return peak(lambda: passes(model, config, batch))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "setting"), MEASURED)
def test_activations_against_the_measured_peak(name, setting):
    """Within 12 %: this attention backend also saves masks, the most for its size in SAISA."""
    config = configured(*SETTINGS[setting])
    step = trace(config, PARTS, wide(name), DOCUMENT)
    found = peak_of_a_step(config, PARTS, wide(name), packed())
    expected = step.most_bytes(DOCUMENTS) - step.weights - step.optimiser
    assert expected > 3 * step.gradients  # gradients are no part of it
    assert found == pytest.approx(expected, rel=0.12)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["llava", "saisa"])
@pytest.mark.parametrize("name", ["linear", "pixel_shuffle", "average", "attention"])
def test_activations_behind_a_connector_against_the_measured_peak(name, mechanism):
    config, parts = configured(), replace(PARTS, connector=CONNECTORS[name])
    visual = parts.transform.num_tokens(32, 32)
    step = trace(config, parts, wide(mechanism), replace(DOCUMENT, visual=visual))
    found = peak_of_a_step(config, parts, wide(mechanism), packed(visual))
    expected = step.most_bytes(DOCUMENTS) - step.weights - step.optimiser
    assert found == pytest.approx(expected, rel=0.12)


RECOMPUTED = [(name, "float32") for name in ("llava", "ee_mllm", "saisa", "vica", "flamingo")]
RECOMPUTED += [("llava", "bf16, decoder too"), ("ee_mllm", "bf16, decoder too")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "setting"), RECOMPUTED)
def test_recomputed_activations_against_the_measured_peak(name, setting):
    """Within 25 %: beside a single layer's, what lives for a moment and the masks weigh more."""
    config = configured(*SETTINGS[setting])
    step = trace(config, PARTS, wide(name), DOCUMENT)
    model, batch = as_measured(config, PARTS, wide(name)), packed()
    model.activation_checkpointing = True
    found = peak(lambda: passes(model, config, batch))
    expected = step.most_bytes(DOCUMENTS, checkpointing=True) - step.weights - step.optimiser
    assert found == pytest.approx(expected, rel=0.25)
    assert expected < 0.6 * (step.most_bytes(DOCUMENTS) - step.weights - step.optimiser)


@pytest.mark.slow
def test_a_whole_run_against_the_measured_peak():
    """From nothing through two steps of two packs: weights, optimiser, gradients and activations together."""
    config = configured("optim.tuning.llm=full", "trainer.precision=bf16-mixed", "trainer.accumulate_grad_batches=2")
    mechanism, batch = wide("ee_mllm"), packed()
    step = trace(config, PARTS, mechanism, DOCUMENT)

    def run(packs: int) -> None:
        model = as_measured(config, PARTS, mechanism)
        optimizer = torch.optim.AdamW(parameter_groups(model, config.optim), lr=1e-3)
        for _ in range(2):
            for _ in range(packs):
                passes(model, config, batch)
            optimizer.step()
            optimizer.zero_grad()

    one, two = peak(lambda: run(1)), peak(lambda: run(2))
    assert one == pytest.approx(step.most_bytes(DOCUMENTS), rel=0.1)
    assert two == pytest.approx(step.most_bytes(DOCUMENTS, accumulate=2), rel=0.1)
    assert two - one == pytest.approx(step.gradients, rel=0.1)
    # Copies of all weights that the gradient flows through: not of embeddings, norms and what the first layer reads.
    linear = sum(
        p.numel() for name, p in built(config, PARTS, mechanism).language_model.named_parameters() if p.ndim == 2
    )
    linear += WIDE.hidden_size**2 - WIDE.vocab_size * WIDE.hidden_size
    assert step.copies == 2 * linear


def test_dropout_keeps_a_byte_a_number_as_on_a_gpu():
    options = [*SETTINGS["bf16, lora"], "optim.lora.targets=[down_proj]"]
    none, some = (
        trace(configured(*options, f"optim.lora.dropout={share}"), PARTS, wide("llava"), DOCUMENT) for share in (0, 0.1)
    )
    rows = [DOCUMENT.text + DOCUMENT.visual] * (WIDE.num_hidden_layers - 1) + [DOCUMENT.text]
    assert some.activations - none.activations == sum(rows) * WIDE.intermediate_size


def test_moments_in_8_bits():
    bnb, mechanism = pytest.importorskip("bitsandbytes"), wide("ee_mllm")
    config = configured("optim.tuning.llm=full", "optim.states=8bit")
    step = trace(config, PARTS, mechanism, DOCUMENT)
    held = [p for p in built(config, PARTS, mechanism).parameters() if p.requires_grad]
    for p in held:
        p.grad = torch.zeros_like(p)
    optimizer = bnb.optim.AdamW8bit(held)
    optimizer.step()
    kept = {id(x): x for state in optimizer.state.values() for key, x in state.items() if key != "step"}
    assert step.optimiser + 2 * 256 * 4 == sum(
        x.nbytes for x in kept.values()
    )  # with the tables of what bytes stand for
    assert step.optimiser < 0.6 * step.gradients


def test_a_tied_head_is_one_matrix():
    tied = LlamaConfig(**{**WIDE.to_dict(), "tie_word_embeddings": True})
    parts, mechanism = replace(PARTS, decoder=tied), wide("llava")
    step, apart = (trace(configured("optim.tuning.llm=full"), each, mechanism, DOCUMENT) for each in (parts, PARTS))
    real = built(configured("optim.tuning.llm=full"), parts, mechanism)
    assert step.parameters == sum(p.numel() for p in real.parameters()) == apart.parameters - 300 * 96
    assert step.gradients == apart.gradients - 4 * 300 * 96


def test_what_fsdp2_gathers():
    """A layer and the next one, a layer's gradient and its copy to be reduced, and what is not divided by itself: encoder,
    embeddings, head, norm. In 16 bits layers are gathered in them, and autocast copies only of the rest: the head."""
    options = ["optim.tuning.llm=full", "model.dtype=bfloat16"]
    config = configured(*options)
    step = trace(config, PARTS, wide("ee_mllm"), DOCUMENT)
    model = built(config, PARTS, wide("ee_mllm"))
    layer = sum(p.numel() for p in model.language_model.model.layers[0].parameters())
    rest = sum(p.nbytes for p in model.vision.parameters()) + (2 * 300 * 96 + 96) * 4
    assert step.gathered == 2 * 4 * layer + (4 + 4) * layer + rest and step.rest_copies == 0
    half = trace(configured(*options, "trainer.precision=bf16-mixed"), PARTS, wide("ee_mllm"), DOCUMENT)
    assert half.gathered == 2 * 2 * layer + (2 + 4) * layer + rest
    assert half.rest_copies == 2 * 300 * 96 < half.copies / 5
    step = trace(config, PARTS, wide("flamingo"), DOCUMENT)
    block = sum(p.numel() for p in built(config, PARTS, wide("flamingo")).gated["0"].parameters())
    assert step.gathered == rest + 16 * max(layer, block)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_quantised_weights(tmp_path, how):
    bnb = pytest.importorskip("bitsandbytes")
    tiny.write_parts(tmp_path)
    quantised = [f"model.quantization={how}", "optim.tuning.llm=lora", "optim.lora.r=4"]
    config = tiny.config(tmp_path, "none", tmp_path, *quantised, "model.dtype=bfloat16")
    parts = parts_of_config(config.model)
    step = trace(config, parts, build_mechanism("ee_mllm", 3), DOCUMENT)
    plain = trace(
        replace(config, model=replace(config.model, quantization=None)), parts, build_mechanism("ee_mllm", 3), DOCUMENT
    )
    assert replace(step, weights=plain.weights, gathered=plain.gathered) == plain
    model = build(config.model)[0]
    apply_tuning(model, config.optim, config.model.dtype)
    total = sum(p.nbytes for p in model.parameters())
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):  # scales; not its tables, the same few bytes for a layer of any size
            state = module.weight.quant_state
            total += state.absmax.nbytes + state.state2.absmax.nbytes
    assert step.weights == pytest.approx(total, rel=0.01) and step.weights < 0.9 * plain.weights


def test_the_parts_of_a_whole_model(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path)
    config = tiny.config(tmp_path, "none", tmp_path, f"model.decoder={tmp_path}", f"model.vision.path={tmp_path}")
    step = trace(config, parts_of_config(config.model), model.mechanism, DOCUMENT)
    assert step.parameters == sum(p.numel() for p in model.parameters())


def made_step(**values: float) -> Step:
    return Step(**{name: values.get(name, 0) for name in Step.__dataclass_fields__})


def test_most_bytes_and_documents():
    step = made_step(weights=1000, gradients=400, optimiser=800, copies=200, unit_copies=20, activations=10, kept=2,
                     largest=3, logits=5, passing=4, gathered=420, rest_copies=30)  # fmt: skip
    assert step.most_bytes(1) == 1800 + 400 + (3 + 4) + 20  # as it ends, which outweighs 200 + (10 + 5)
    assert replace(step, late=399).most_bytes(1) == 1800 + 400  # all gradients, before the optimiser's step
    assert step.most_bytes(100) == 1800 + 200 + 100 * (10 + 5)
    assert step.most_bytes(100, accumulate=2) == 1800 + 200 + 100 * (10 + 5) + 400
    assert step.most_bytes(100, checkpointing=True) == 1800 + 400 + 100 * (3 + 4) + 20  # as it ends
    assert step.most_bytes(100, checkpointing=True, accumulate=2) == 1800 + 400 + 100 * (2 + 3 + 4) + 20
    assert replace(step, logits=9).most_bytes(100, checkpointing=True) == 1800 + 200 + 100 * (2 + 9)  # at the loss
    parts = replace(step, loss_chunk=800)  # of 100 x 9
    assert replace(parts, logits=9).most_bytes(100, checkpointing=True) == 1800 + 200 + 100 * 2 + 800
    assert parts.most_bytes(200) == 1800 + 200 + 200 * (10 + 4)
    assert replace(step, passing=9).most_bytes(100) == 1800 + 200 + 100 * (10 + 9)
    assert step.most_bytes(100, gpus=4) == 1800 + 400 + 200 + 100 * (10 + 5)
    sharded = {"gpus": 4, "sharded": True}
    assert step.most_bytes(100, **sharded) == 1800 / 4 + 420 + 30 + 100 * (10 + 5)
    assert step.most_bytes(100, **sharded, accumulate=2) == 1800 / 4 + 420 + 30 + 100 * (10 + 5) + 400 / 4
    assert step.most_bytes(100, **sharded, checkpointing=True) == 1800 / 4 + 420 + 100 * (3 + 4) + max(400 / 4, 200)
    assert step.most_bytes(1, **sharded) == 1800 / 4 + 420 + 400 / 4 + (3 + 4)  # as it ends
    assert step.most_bytes(100, gpus=1, sharded=True) == step.most_bytes(100)
    late = replace(step, deferred=True)  # whole until they are summed, of several packs
    assert late.most_bytes(100, **sharded, accumulate=2) == 1800 / 4 + 420 + 30 + 100 * (10 + 5) + 400
    assert late.most_bytes(100, **sharded) == step.most_bytes(100, **sharded)
    for limit in (2599, 2600, 2615, 3500, 1e6):
        fitting = [n for n in range(1, 70_000) if step.most_bytes(n) <= limit]
        assert step.most_documents(limit) == max(fitting, default=0)


def test_llava_1_5_by_its_shape(tmp_path, capsys):
    """Its parameters are public: 7.06 billion, of which 20,979,712 in the projector."""
    stage = tmp_path / "stage.yaml"
    types = "model: {dtype: bfloat16}\ntrainer: {precision: bf16-mixed}\n"
    stage.write_text(f"{types}optim: {{tuning: {{llm: full}}}}\ndata: {{pack_tokens: 1280, max_length: 1280}}\n")
    assert cli.main(["estimate", str(stage), "--shape", "vicuna-7b", "--only", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = found["mechanisms"]["ee_mllm"]
    assert (found["visual"], found["documents"], found["precision"]) == (576, 2, "bf16-mixed")
    assert row["parameters"] == 7_062_902_784 and row["trained"] == 6_738_415_616 + 20_979_712
    assert round(row["flops"]["prefill_published"] / 1e12, 3) == 7.692
    assert row["cache_bytes"] == 2 * 640 * 32 * 2 * 4096 * 2
    assert row["training_bytes"]["weights"] == 4 * row["trained"] + 2 * (row["parameters"] - row["trained"])
    saisa = build_weightless(configured(), parts_of_shape("vicuna-7b"), build_mechanism("saisa", 32))[0]
    assert sum(p.numel() for p in saisa.projector.parameters()) == 32 * (1024 * 4096 + 4096 + 4096 * 4096 + 4096)
