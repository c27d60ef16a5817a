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
        sliding: layers in which a token sees only the last `sliding_window` tokens, itself included, where config.json sets it: ``none``,
            ``all``, or those that ``layer_types`` calls sliding_attention.
    """

    ffn_matrices: int = 3
    norms: Norms = field(default_factory=Norms)
    qk_norm: Literal["head", "width"] = "head"
    rotary_layers: str | None = None
    sliding: Literal["none", "all", "layer_types"] = "none"

    def rotary(self, config: PretrainedConfig) -> list[str | None]:
        """For each layer, which rotary positions it has: those of its type where `rope_parameters` tells types apart, else "";
        None = it does not rotate queries and keys."""
        layers = config.num_hidden_layers
        flags = getattr(config, self.rotary_layers) if self.rotary_layers else [1] * layers
        kinds = [""] * layers if "" in ropes(config) else config.layer_types
        return [kind if flag else None for kind, flag in zip(kinds, flags, strict=False)]

    def windows(self, config: PretrainedConfig) -> list[int | None]:
        """For each layer, how many tokens before itself a token sees; None = all."""
        size, types = getattr(config, "sliding_window", None), ["sliding_attention"] * config.num_hidden_layers
        if self.sliding == "none" or size is None:
            return [None] * len(types)
        types = config.layer_types if self.sliding == "layer_types" else types
        return [size - 1 if kind == "sliding_attention" else None for kind in types]


def ropes(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """Parameters of rotary positions by type of layer, or under "" those of all layers."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope if any(isinstance(value, dict) for value in rope.values()) else {"": rope}


AFTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
BOTH = Norms("input_layernorm", AFTER.after_attention, "pre_feedforward_layernorm", AFTER.after_ffn)


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(sliding="all"),
    **{name: Family(sliding="layer_types") for name in ("qwen2", "qwen3")},
    "olmo2": Family(norms=AFTER, qk_norm="width"),
    "olmo3": Family(norms=AFTER, qk_norm="width", sliding="layer_types"),
    "gemma3_text": Family(norms=BOTH, sliding="layer_types"),
    # 1 where a layer has RoPE, despite the name:
    "smollm3": Family(rotary_layers="no_rope_layers", sliding="layer_types"),
}
"""Decoder families by `model_type`; these are proved equal to transformers' own model in tests/model/test_model.py."""
PROVED = frozenset(FAMILIES)  # a user's families are compared with transformers' model when one is loaded
UNSET = ("attention_dropout", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
"""Keys of config.json that change what a layer or the head computes, and are not computed here."""
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
    family = FAMILIES.get(config.model_type, Family())
    window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    types, full, windowed = set(getattr(config, "layer_types", None) or ()), {"full_attention"}, {"sliding_attention"}
    known = {"none": full, "all": windowed if window else full, "layer_types": full | windowed if window else full}
    if config.model_type not in FAMILIES:
        wrong.append(f"model_type {config.model_type!r} is not one of {tuple(FAMILIES)}")
    if other := types - known[family.sliding]:
        wrong.append(f"layer_types has {', '.join(sorted(other))}, expected {', '.join(sorted(known[family.sliding]))}")
    elif window and family.sliding == "none":
        wrong.append("it uses a sliding window, expected full attention")
    elif (told := len(family.rotary(config))) < config.num_hidden_layers:
        wrong.append(f"{told} of its {config.num_hidden_layers} layers say whether they rotate queries and keys")
    for rope in ropes(config).values():
        if rope.get("rope_type", "default") not in ROPE_TYPES:
            wrong.append(f"rope type {rope['rope_type']!r} is not one of {ROPE_TYPES}")
    for key in UNSET:
        if value := getattr(config, key, None):
            wrong.append(f"{key} is {value}, expected none")
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
