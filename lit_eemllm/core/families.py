"""Which decoders are supported: an allow-list, each tested to equal transformers' own model, forward and gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from transformers import PretrainedConfig

from ..errors import ConfigError
from .table import Table, executed


class Norms(NamedTuple):
    """Names of a layer's norms, before and after its two blocks; None = there is none."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_ffn: str | None = "post_attention_layernorm"
    after_ffn: str | None = None


@dataclass(frozen=True)
class Family:
    """How a family's layers differ from Llama's. Biases and activations need no entry: the family's own modules are called.

    Attributes:
        ffn_matrices: matrices of hidden size x intermediate size in a feed-forward network; 3 = gated, as SwiGLU.
        norms: names of a layer's norms.
        qk_norm: what `q_norm` and `k_norm`, if present, normalise over: each ``head``, or the ``width`` of all heads.
        rotary_layers: key of config.json with a flag for each layer, true where it rotates queries and keys; None = all do.
    """

    ffn_matrices: int = 3
    norms: Norms = field(default_factory=Norms)
    qk_norm: Literal["head", "width"] = "head"
    rotary_layers: str | None = None

    def rotates(self, config: PretrainedConfig) -> list[bool]:
        """For each layer, whether it rotates queries and keys."""
        flags = getattr(config, self.rotary_layers) if self.rotary_layers else [1] * config.num_hidden_layers
        return [bool(flag) for flag in flags[: config.num_hidden_layers]]


FAMILIES: dict[str, Family] = {
    **{name: Family() for name in ("llama", "mistral", "qwen2", "qwen3")},
    "olmo2": Family(norms=Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"), qk_norm="width"),
    "smollm3": Family(rotary_layers="no_rope_layers"),  # 1 where a layer has RoPE, despite the name
}
"""Decoder families by `model_type`; these are proved equal to transformers' own model in tests/model/test_model.py."""
PROVED = frozenset(FAMILIES)  # a user's families are compared with transformers' model when one is loaded
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the frequencies of others change with the length of the batch


def register_family(model_type: str, **differs: Any) -> None:
    """Support decoders of this family. Test it first (docs/decoders.md); loading one compares logits with transformers'.

    Args:
        model_type: as in its config.json.
        differs: attributes of `Family`.

    Raises:
        ValueError: the family is registered already.
    """
    if model_type in FAMILIES:
        raise ValueError(f"decoder family {model_type!r} is registered already; registered: {', '.join(FAMILIES)}")
    FAMILIES[model_type] = Family(**differs)


def check_decoder(config: PretrainedConfig) -> None:
    """Refuse a decoder whose layers would be computed wrongly. Raises ConfigError that says what to do."""
    wrong: list[str] = []
    if config.model_type not in FAMILIES:
        wrong.append(f"model_type {config.model_type!r} is not one of {tuple(FAMILIES)}")
    elif (flags := len(FAMILIES[config.model_type].rotates(config))) < config.num_hidden_layers:
        wrong.append(f"{flags} of its {config.num_hidden_layers} layers say whether they rotate queries and keys")
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if windowed or set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        wrong.append("it uses a sliding window, expected full attention")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        wrong.append(f"rope type {rope['rope_type']!r} is not one of {ROPE_TYPES}")
    if getattr(config, "attention_dropout", 0.0):
        wrong.append(f"attention_dropout is {config.attention_dropout}, expected 0")
    if wrong:
        raise ConfigError(
            f"model.decoder: this decoder is not supported: {'; '.join(wrong)}. To add a family whose layers "
            "differ from Llama's in what docs/decoders.md lists: register_family in a file given with --import; "
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
    text = f"value={'value' in half} with output={'output' in half} needs heads x head size = hidden size, this decoder has"
    return [("aligner", f"{text} {width} and {hidden}; set value and output both true or both false")]
