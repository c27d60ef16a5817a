"""A decoder family in a user's own file, as docs/decoders.md tells it: docs/my_decoder.py against transformers' own model."""

from dataclasses import fields
from pathlib import Path

import pytest
import tiny
from lib.decoders import check_decoder_equals_transformers
from lib.mechanisms import PACK, check_flops_and_cache, check_generation
from transformers import ArceeConfig, GraniteConfig, PreTrainedConfig

from lit_eemllm.core.families import FAMILIES, Norms, check_decoder, register_family
from lit_eemllm.errors import ConfigError
from lit_eemllm.model import pretrained
from lit_eemllm.model.folders import CONFIG
from lit_eemllm.plugins import import_user_code

ROOT = Path(__file__).parents[2]
AFTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
LLAMA4 = {
    "ffn": "feed_forward", "expert_layers": "moe_layers", "head_norms": ("qk_norm",) * 2, "interleaved": True,
    "rotary_layers": "no_rope_layers", "tempered": "attn_temperature_tuning", "sliding": "chunks",
}  # fmt: skip
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXAMPLES = {
    "arcee": ("docs/my_decoder.py", ArceeConfig(**tiny.COMMON, **HEADS)),
}
"""Family -> the file that registers it, and a config of a few narrow layers that has all kinds of layers that the family has."""


@pytest.fixture(params=EXAMPLES)
def family(request, monkeypatch):
    file, config = EXAMPLES[request.param]
    monkeypatch.setitem(tiny.DECODERS, request.param, config)
    with tiny.forgotten_imports():
        import_user_code([ROOT / file])
        yield request.param


@pytest.mark.parametrize("preset", ["ee_mllm", "llava"])
def test_it_equals_transformers(family, preset):
    check_decoder_equals_transformers(tiny.model(family, preset), PACK, diagonal=preset == "ee_mllm")


@pytest.mark.parametrize("preset", ["ee_mllm", "llava", "vica"])
def test_costs_and_generation(family, preset):
    check_flops_and_cache(tiny.model(family, preset))
    check_generation(tiny.model(family, preset))


def test_every_field_of_its_configuration_is_read(family):
    """What a folder's reader leaves out has its default, whatever the folder says."""
    own = {field.name for field in fields(type(tiny.DECODERS[family]))}
    assert own - {field.name for field in fields(PreTrainedConfig)} - CONFIG == set()


def test_it_is_known_only_once_imported_and_registered_once():
    file, config = EXAMPLES["arcee"]
    with pytest.raises(ConfigError, match=r"model_type 'arcee' is not one of \('llama', .*register_family in a file"):
        check_decoder(config)
    with tiny.forgotten_imports():
        import_user_code([ROOT / file])
        check_decoder(config)
        with pytest.raises(ValueError, match=r"'arcee' is registered already; registered: llama, mistral, .*, arcee"):
            register_family("arcee")
    assert "arcee" not in FAMILIES


@pytest.mark.parametrize(
    ("kind", "told", "message"),
    [
        ("olmo2", {"norms": AFTER, "qk_norm": "width"}, None),
        ("olmo2", {"qk_norm": "width"}, "no attribute 'input_layernorm'"),
        ("olmo2", {"norms": AFTER}, "must match the size"),
        ("olmo2", {"norms": Norms(AFTER[1], None, AFTER[3], None), "qk_norm": "width"}, r"logits of text are \d+\.\d+% off"),
        ("smollm3", {"rotary_layers": "no_rope_layers"}, None),
        ("olmo3", {"norms": AFTER, "qk_norm": "width", "sliding": "layer_types"}, None),
        ("gemma3_text", {"norms": AFTER, "sliding": "layer_types"}, "logits of text are"),
        ("mistral-window", {"sliding": "all"}, None),
        ("llama4_text", LLAMA4, None),
        ("llama4_text", LLAMA4 | {"interleaved": False}, "logits of text are"),
        ("llama4_text", LLAMA4 | {"tempered": None}, "logits of text are"),
        ("llama4_text", LLAMA4 | {"head_norms": ("q_norm", "k_norm")}, "logits of text are"),
        ("smollm3", {}, r"logits of text are \d+\.\d+% off transformers' own; see docs/decoders\.md"),
        ("granite", {}, r"logits of text are \d+\.\d+% off"),  # a factor on its residuals
    ],
)  # fmt: skip
def test_one_that_differs_otherwise_is_refused_as_its_decoder_is_loaded(kind, told, message, monkeypatch):
    monkeypatch.setattr(pretrained, "PROVED", frozenset())
    monkeypatch.setitem(tiny.DECODERS, "granite", GraniteConfig(**tiny.COMMON, **HEADS, residual_multiplier=0.9))
    with tiny.forgotten_imports():
        family = tiny.DECODERS[kind].model_type
        FAMILIES.pop(family, None)
        register_family(family, **told)
        if message is None:
            check_decoder_equals_transformers(tiny.model(kind, "ee_mllm"), PACK, diagonal=True)
            return
        with pytest.raises(
            ConfigError, match=f"^model.decoder: family '{family}' differs from Llama in more .*: .*{message}"
        ):
            tiny.model(kind, "ee_mllm")
