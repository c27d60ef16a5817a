"""Which decoders can be driven: an allow-list, each proved equal to transformers' own model, forward and gradients."""

from __future__ import annotations

from transformers import PretrainedConfig

from ..errors import ConfigError
from .table import Table, executed

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Decoder families (`model_type`) proved equal to transformers' own model in tests/test_model.py."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the others change with the length of the batch


def check_decoder(config: PretrainedConfig) -> None:
    """Refuse a decoder whose layers would be computed wrongly. Raises ConfigError that says what to do."""
    found: list[str] = []
    if config.model_type not in FAMILIES:
        found.append(f"model_type {config.model_type!r} is not one of {FAMILIES}")
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if windowed or set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        found.append("it uses a sliding window")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        found.append(f"rope type {rope['rope_type']!r} is not one of {ROPE_TYPES}")
    if getattr(config, "attention_dropout", 0.0):
        found.append(f"attention_dropout is {config.attention_dropout}, expected 0")
    if found:
        raise ConfigError(
            f"model.decoder: this decoder is not supported: {'; '.join(found)}. To add a family: put its model_type into "
            "FAMILIES in lit_eemllm/core/families.py and make its parity test in tests/test_model.py pass; a layer that "
            "differs from Llama's in more than biases and q/k norms needs its own code in DecoderLayer."
        )


def table_problems(config: PretrainedConfig, table: Table) -> list[tuple[str, str]]:
    """Why a decoder cannot execute a table: (key of the mechanism, what is wrong)."""
    hidden = config.hidden_size
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    halves = {frozenset(row.update & {"value", "output"}) for row in executed(table)}
    half = next((parts for parts in halves if len(parts) == 1), None)
    if half is None or width == hidden:
        return []
    value, output = "value" in half, "output" in half
    text = f"value={value} with output={output} needs heads x head size = hidden size, this decoder has {width} and {hidden}"
    return [("aligner", f"{text}; switch both on or both off")]
