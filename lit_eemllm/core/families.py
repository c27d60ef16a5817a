"""Which decoders can be driven: an allow-list, each proved equal to transformers' own model, forward and gradients."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from ..errors import ConfigError
from .table import Table, executed


@dataclass(frozen=True)
class Family:
    """Where layers differ from Llama's. Biases, norms of heads and activations need no word: the family's own modules are called.

    Attributes:
        ffn_matrices: of hidden size x intermediate size in a feed-forward network; 3 is a gated one.
    """

    ffn_matrices: int = 3


FAMILIES: dict[str, Family] = {name: Family() for name in ("llama", "mistral", "qwen2", "qwen3")}
"""Decoder families by `model_type`; these are proved equal to transformers' own model in tests/model/test_model.py."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the others change with the length of the batch


def register_family(model_type: str, **differs: int) -> None:
    """Let decoders of this family be driven. Prove it first: a family that differs otherwise is computed wrongly, without a word.

    Args:
        model_type: as in its config.json.
        differs: attributes of `Family`.

    Raises:
        ValueError: it is known already.
    """
    if model_type in FAMILIES:
        raise ValueError(f"decoder family {model_type!r} is registered already; registered: {', '.join(FAMILIES)}")
    FAMILIES[model_type] = Family(**differs)


def check_decoder(config: PretrainedConfig) -> None:
    """Refuse a decoder whose layers would be computed wrongly. Raises ConfigError that says what to do."""
    found: list[str] = []
    if config.model_type not in FAMILIES:
        found.append(f"model_type {config.model_type!r} is not one of {tuple(FAMILIES)}")
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
            f"model.decoder: this decoder is not supported: {'; '.join(found)}. To add a family whose layers "
            "differ from Llama's in biases, norms of heads and activations alone: register_family in a file given with --import; "
            "others need their own code in DecoderLayer."
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
