"""Which decoders are supported: an allow-list, each tested to equal transformers' own model, forward and gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from transformers import PretrainedConfig

from ..errors import ConfigError
from ..layout import Chunk, Window
from .table import Table, executed

TEMPERED = "tempered"
"""How queries turn that are multiplied by a factor of their position, where others rotate."""
Turns = tuple[str | None, str | None]
"""Of a layer's queries, and of its keys; see `Family.rotary`."""


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
        ffn: name of a layer's feed-forward network.
        ffn_matrices: matrices of hidden size x intermediate size in a feed-forward network; 3 = gated, as SwiGLU.
        expert_layers: key of config.json with the numbers of the layers of experts. There a token runs through one that all share and
            all `num_local_experts` others, weighted, most by zero; other layers are `intermediate_size_mlp` wide. None = no such layers.
        norms: names of a layer's norms.
        head_norms: names of the norms of queries and keys, if present.
        qk_norm: what these normalise over: each ``head``, or the ``width`` of all heads.
        interleaved: rotary positions turn neighbours, not halves, of a query or key.
        rotary_layers: key of config.json with a flag for each layer, true where it rotates queries and keys; None = all do.
        tempered: key of config.json that, if true, has queries grow with the position in layers that do not rotate (2501.19399);
            None = they do not.
        sliding: layers in which a token sees only the last `sliding_window` tokens, itself included, where config.json sets it: ``none``,
            ``all``, or those that ``layer_types`` calls sliding_attention. Or ``chunks``: those that it calls chunked_attention, where
            a token sees its chunk of `attention_chunk_size`.
    """

    ffn: str = "mlp"
    ffn_matrices: int = 3
    expert_layers: str | None = None
    norms: Norms = field(default_factory=Norms)
    head_norms: tuple[str, str] = ("q_norm", "k_norm")
    qk_norm: Literal["head", "width"] = "head"
    interleaved: bool = False
    rotary_layers: str | None = None
    tempered: str | None = None
    sliding: Literal["none", "all", "layer_types", "chunks"] = "none"

    def ffn_weights(self, config: PretrainedConfig) -> list[int]:
        """For each layer, how many weights of its feed-forward network a token is multiplied by."""
        row, wide = self.ffn_matrices * config.hidden_size, config.intermediate_size
        if self.expert_layers is None:
            return [row * wide] * config.num_hidden_layers
        experts, layers = config.num_local_experts, getattr(config, self.expert_layers)
        routed, dense = row * wide * (experts + 1) + config.hidden_size * experts, row * config.intermediate_size_mlp
        return [routed if layer in layers else dense for layer in range(config.num_hidden_layers)]

    def rotary(self, config: PretrainedConfig) -> list[Turns]:
        """For each layer, which rotary positions its queries and its keys have: those of its type where `rope_parameters` tells types
        apart, else ""; None = it does not rotate them. Queries that do not rotate may be `TEMPERED`."""
        layers = config.num_hidden_layers
        flags = getattr(config, self.rotary_layers) if self.rotary_layers else [1] * layers
        kinds = [""] * layers if "" in ropes(config) else config.layer_types
        still = TEMPERED if self.tempered and getattr(config, self.tempered) else None, None
        return [(kind, kind) if flag else still for kind, flag in zip(kinds, flags, strict=False)]

    @property
    def near(self) -> tuple[str, str]:
        """What `layer_types` calls layers in which a token sees only what is near, and the key of how much that is."""
        chunks = "chunked_attention", "attention_chunk_size"
        return chunks if self.sliding == "chunks" else ("sliding_attention", "sliding_window")

    def windows(self, config: PretrainedConfig) -> list[Window | None]:
        """For each layer, how many tokens before itself a token sees, or of what chunk; None = all."""
        near, key = self.near
        if self.sliding == "none" or (size := getattr(config, key, None)) is None:
            return [None] * config.num_hidden_layers
        types = [near] * config.num_hidden_layers if self.sliding == "all" else config.layer_types
        seen = Chunk(size) if self.sliding == "chunks" else size - 1
        return [seen if kind == near else None for kind in types]


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
    "llama4_text": Family(
        ffn="feed_forward", expert_layers="moe_layers", head_norms=("qk_norm", "qk_norm"), interleaved=True,
        rotary_layers="no_rope_layers", tempered="attn_temperature_tuning", sliding="chunks",
    ),
}  # fmt: skip
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
    near, key = family.near
    window = getattr(config, key, None) is not None and getattr(config, "use_sliding_window", True)
    types, full, windowed = set(getattr(config, "layer_types", None) or ()), {"full_attention"}, {near}
    some = full | windowed if window else full
    known = {"none": full, "all": windowed if window else full, "layer_types": some, "chunks": some}
    if config.model_type not in FAMILIES:
        wrong.append(f"model_type {config.model_type!r} is not one of {tuple(FAMILIES)}")
    if other := types - known[family.sliding]:
        wrong.append(f"layer_types has {', '.join(sorted(other))}, expected {', '.join(sorted(known[family.sliding]))}")
    elif window and family.sliding == "none":
        wrong.append("it uses a sliding window, expected full attention")
    elif (told := len(family.rotary(config))) < config.num_hidden_layers:
        wrong.append(f"{told} of its {config.num_hidden_layers} layers say whether they rotate queries and keys")
    known_ropes = ROPE_TYPES[:-1] if family.interleaved else ROPE_TYPES  # such queries have norms after yarn's factor
    for rope in ropes(config).values():
        if rope.get("rope_type", "default") not in known_ropes:
            wrong.append(f"rope type {rope['rope_type']!r} is not one of {known_ropes}")
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
