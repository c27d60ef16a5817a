"""Mechanisms in a user's own file, as docs/mechanisms.md tells it: all that holds for the shipped ones holds for them."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from lib.mechanisms import (
    PACK,
    check_flops_and_cache,
    check_frozen_in_16_bits,
    check_generation,
    check_gradients,
    check_later_turns,
    check_packing,
    text_logits,
)
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig

from lit_eemllm import cli
from lit_eemllm.config import load_config, to_yaml
from lit_eemllm.cost.trace import Document, trace
from lit_eemllm.cost.weightless import Parts
from lit_eemllm.errors import ConfigError
from lit_eemllm.formats.mechanism import change_mechanism, choose_mechanism, mechanism_settings
from lit_eemllm.mechanisms import PRESETS, Mechanism, build_mechanism
from lit_eemllm.model import EEMLLM
from lit_eemllm.plugins import import_user_code
from lit_eemllm.report.runs import read_run
from lit_eemllm.training.fsdp2 import shared_out
from lit_eemllm.training.tuning import apply_tuning, parameter_groups

ROOT = Path(__file__).parents[2]
LAYERS = 4
EXAMPLES = {
    "thinning": ("docs/my_mechanism.py", {"scaled": 3}),
    "skipping": ("tests/examples/skipping.py", {"k": 1}),
    "adapted": ("tests/examples/adapted.py", {"k": 1, "r": 4}),
}
"""Preset -> the file that registers it, and options for four layers, such that modules stand before some if it has any."""


@pytest.fixture(params=EXAMPLES)
def preset(request):
    with tiny.forgotten_imports():
        import_user_code([ROOT / EXAMPLES[request.param][0]])
        yield request.param


def options(preset: str) -> dict:
    return EXAMPLES[preset][1]


def made(preset: str, decoder: str = "llama-gqa") -> EEMLLM:
    """With random values in place of initial ones, behind which an error could hide."""
    model = tiny.model(decoder, build_mechanism(preset, LAYERS, options(preset)), layers=LAYERS)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_it_does_something_and_begins_as_its_table_alone(preset):
    model, batch = made(preset), tiny.pack(PACK)
    changed = text_logits(model, batch)
    if len(model.blocks):
        for block in model.blocks.values():
            block.reset_parameters()
        begun = text_logits(model, batch)
        assert tiny.max_error(changed, begun) > 1e-3
        model.blocks.__dict__["_modules"] = {}
        assert tiny.max_error(text_logits(model, batch), begun) <= 1e-6
    usual = tiny.model("llama-gqa", "ee_mllm", layers=LAYERS)
    usual.load_state_dict({n: x for n, x in model.state_dict().items() if n in usual.state_dict()})
    assert tiny.max_error(changed, text_logits(usual, batch)) > 1e-3
    base = tiny.model("llama-gqa", "llava", layers=LAYERS)
    base.language_model.load_state_dict(model.language_model.state_dict())
    assert tiny.max_error(text_logits(model, tiny.pack([[5], [9]])), text_logits(base, tiny.pack([[5], [9]]))) <= 1e-5


def test_a_decoder_frozen_in_16_bits_without_autocast(preset):
    """Where the states that enter a block have another type than its weights."""
    check_frozen_in_16_bits(made(preset))


def test_options_of_another_type_are_refused(preset, capsys):
    with tiny.forgotten_imports():
        for name, told in (("nonsense", f"options.nonsense: the preset {preset} has no such option; found 'nonsense'"),
                           (next(iter(options(preset))), "found 'x', expected a whole number")):  # fmt: skip
            line = [
                "explain",
                "--shape",
                "vicuna-7b",
                f"model.mechanism.preset={preset}",
                f"model.mechanism.options.{name}=x",
            ]
            assert cli.main(line) == 2
            assert told in capsys.readouterr().err


@pytest.mark.parametrize("pack", [PACK, [[5], [9]]], ids=["images", "text only"])
def test_gradients(preset, pack):
    check_gradients(made(preset), pack)


def test_gradients_are_those_of_finite_differences(preset):
    model, batch = made(preset).double(), tiny.pack([[2, 0, 3], [1, 0, 2]], dtype=torch.float64)

    def loss():  # the model's own is float32
        return cross_entropy(model.packed_logits(batch), batch.targets, reduction="sum")

    loss().backward()
    parameters = [p for block in model.blocks.values() for p in block.parameters()]
    for parameter in parameters or [model.projector.linear_2.weight]:
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        i = int(gradient.abs().argmax())
        with torch.no_grad():
            before, losses = flat[i].item(), []
            for step in (1e-3, -1e-3):
                flat[i] = before + step
                losses.append(loss().item())
            flat[i] = before
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(gradient[i].item(), rel=5e-3)  # norms are float32


def test_packing_cache_and_later_turns(preset):
    check_packing(made(preset))
    check_generation(made(preset))
    check_later_turns(made(preset))


def test_backends_and_activation_checkpointing_change_nothing(preset):
    model, batch = made(preset), tiny.pack(PACK)
    results = []
    for backend, checkpointing in (("reference", False), ("sdpa", False), ("reference", True)):
        model.set_attention(backend)
        model.activation_checkpointing = checkpointing
        model.zero_grad()
        model.packed_loss(batch).backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for other in results[1:]:
        for name, gradient in results[0].items():
            torch.testing.assert_close(
                other[name], gradient, rtol=1e-3, atol=1e-4 * max(1, gradient.abs().max().item())
            )


@pytest.mark.parametrize("decoder", ["llama", "qwen3", "olmo2", "smollm3", "gemma3_text", "llama4_text"])
def test_costs(preset, decoder):
    """Of a prompt and a new token against PyTorch's counter."""
    check_flops_and_cache(made(preset, decoder))


def test_estimate_traces_a_training_step(preset):
    config = load_config(
        [], ["model.decoder=none", "model.vision.path=none", "data.train=none", "optim.lr=1e-3", "optim.max_steps=1"]
    )
    decoder_config = LlamaConfig(
        **{**tiny.COMMON, "num_hidden_layers": LAYERS}, num_attention_heads=4, num_key_value_heads=2
    )
    parts = Parts(decoder_config, "transformers", tiny.vision().to_config())
    mechanism = build_mechanism(preset, LAYERS, options(preset))
    step = trace(config, parts, mechanism, Document(9, 16, 8))
    assert step.trained == sum(
        p.numel() for p in [*made(preset).projector.parameters(), *made(preset).blocks.parameters()]
    )


def test_tuning_and_sharding(preset):
    model = made(preset)
    component = model.mechanism.component
    base = ["model.decoder=none", "model.vision.path=none", "data.train=none", "optim.lr=1e-3", "optim.max_steps=1"]
    config = load_config([], [*base, "optim.tuning.llm=lora", "optim.tuning.projector=full", "optim.lora.r=2"]).optim
    apply_tuning(model, config, "float32")
    trained = {id(p) for group in parameter_groups(model, config) for p in group["params"]}
    blocks = list(model.blocks.parameters())
    assert component in ("projector", "llm") and {id(p) for p in blocks if p.requires_grad} <= trained
    assert all(p.requires_grad for p in blocks)
    model.packed_loss(tiny.pack(PACK)).backward()
    assert all(p.grad is not None for p in blocks)
    apart = [id(p) for part in shared_out(model) for p in part.parameters()]
    assert len(apart) == len(set(apart)) and {id(p) for p in blocks} <= set(apart)


def test_folders_dictionaries_and_conversion(preset, tmp_path):
    model, batch = made(preset), tiny.pack(PACK)
    mechanism = model.mechanism
    assert Mechanism.from_dict(json.loads(json.dumps(mechanism.to_dict()))) == mechanism
    settings = mechanism_settings(mechanism, LAYERS)
    assert choose_mechanism(PRESETS["llava"], LAYERS, settings) == mechanism
    assert load_config([], [f"model.mechanism={json.dumps(settings)}", "model.decoder=d", "data.train=t", "optim.lr=1",
                            "model.vision.path=v", "optim.max_steps=1"]).model.mechanism.preset == preset  # fmt: skip
    model.save_pretrained(tmp_path)
    again = EEMLLM.from_pretrained(tmp_path)
    again.set_attention("reference")
    assert again.mechanism == mechanism and text_logits(again, batch).equal(text_logits(model, batch))
    plain, _ = change_mechanism(again, PRESETS["ee_mllm"], seed=0)
    back, fates = change_mechanism(plain, mechanism, seed=0)
    fresh = {fate.name for fate in fates if fate.fate == "fresh"}
    assert fresh == {f"{mechanism.blocks_name}.{name}" for name in back.blocks.state_dict()}
    with pytest.raises(ConfigError, match=r"no such option|has none"):
        build_mechanism(preset, LAYERS, {"options": {"nonsense": 1}})


@pytest.mark.parametrize("preset", EXAMPLES)
def test_a_run_resumes_to_the_bit_is_evaluated_and_reported(preset, parts, shapes, tmp_path, monkeypatch):
    """Under --import, without which its name is unknown."""
    monkeypatch.chdir(tmp_path)
    file, own = str(ROOT / EXAMPLES[preset][0]), json.dumps(options(preset))
    words = [f"model.mechanism.preset={preset}", f"model.mechanism.options={own}", "--import", file]
    for name, steps in (("whole", (4,)), ("cut", (2, 4))):
        Path("c.yaml").write_text(
            to_yaml(
                tiny.config(
                    parts,
                    shapes,
                    Path(name),
                    "optim.save_every=2",
                    "optim.val_every=2",
                    "optim.schedule=constant",
                    "optim.warmup_ratio=0",
                )
            )
        )
        for count in steps:
            with tiny.forgotten_imports():
                assert cli.main(["fit", "c.yaml", *words, f"optim.max_steps={count}"]) == 0
    states = [
        torch.load(f"{name}/checkpoints/step-4.ckpt", weights_only=True)["state_dict"] for name in ("whole", "cut")
    ]
    assert states[0].keys() == states[1].keys() and all(states[0][n].equal(x) for n, x in states[1].items())
    with tiny.forgotten_imports():
        import_user_code([ROOT / EXAMPLES[preset][0]])
        has_modules = bool(len(made(preset).blocks))
    assert any(name.startswith("model.added.") for name in states[0]) == has_modules
    with tiny.forgotten_imports():
        assert cli.main(["validate", "cut", "--import", file, "eval.samples=4"]) == 0
    label = read_run(Path("cut")).label  # of files alone: nothing is imported
    assert label.startswith(preset) and all(f"{key}={value}" in label for key, value in options(preset).items())
