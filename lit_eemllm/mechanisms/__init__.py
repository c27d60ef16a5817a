"""A mechanism says how visual tokens are treated, as data: one decoder executes all of them.

Inside a layer, text always queries ``[visual; text]`` keys. Mechanisms differ in whether visual tokens query too
(`dense_layers`) and in how the visual stream is updated where they do not (`aligner`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import ConfigError
from ..layout import Visibility


@dataclass(frozen=True)
class Aligner:
    """Which weights of the decoder layer update a visual state I that does not query (EE-MLLM Eq. 2-3, Table 6).

    Norm placement is not printed in the paper; our reading is pre-norm, which makes the full aligner equal to the
    pretrained layer under a visual mask reduced to its diagonal. With u = norm1(I) and R = repetition of the value
    heads under grouped-query attention::

        value & output  H = I + R(u W_v) W_o        value only  H = I + R(u W_v)
        output only     H = I + u W_o               neither     H = I
        ffn             I' = H + FFN(norm2(H))      no ffn      I' = H
    """

    value: bool = True
    output: bool = True
    ffn: bool = True


@dataclass(frozen=True)
class Mechanism:
    """How a decoder treats visual tokens.

    Args:
        dense_layers: layers in which visual tokens query, as in LLaVA: ``"all"``, ``"none"`` or layer numbers from 0.
        aligner: how visual states are updated in the other layers.
    """

    dense_layers: str | tuple[int, ...] = "none"
    aligner: Aligner = field(default_factory=Aligner)

    def visibility(self, layer: int) -> Visibility:
        dense = self.dense_layers == "all" or (self.dense_layers != "none" and layer in self.dense_layers)
        return Visibility(visual_queries=dense)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for the model's config.json."""
        layers = self.dense_layers
        return {**asdict(self), "dense_layers": layers if isinstance(layers, str) else list(layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Mechanism:
        layers = values["dense_layers"]
        return cls(layers if isinstance(layers, str) else tuple(layers), Aligner(**values["aligner"]))


PRESETS = {
    "llava": Mechanism(dense_layers="all"),
    "ee_mllm": Mechanism(dense_layers="none"),
}


def build_mechanism(
    preset: str, dense_layers: str | Sequence[int] | None = None, aligner: Mapping[str, bool | None] | None = None
) -> Mechanism:
    """A preset with overrides; None keeps what the preset says. Raises ConfigError naming the key."""
    if preset not in PRESETS:
        raise ConfigError(f"model.mechanism.preset: unknown preset {preset!r}; choose one of {sorted(PRESETS)}")
    mechanism = PRESETS[preset]
    if dense_layers is not None:
        if isinstance(dense_layers, str) and dense_layers not in ("all", "none"):
            raise ConfigError(f'model.mechanism.dense_layers: found {dense_layers!r}, expected "all", "none" or a list')
        layers = dense_layers if isinstance(dense_layers, str) else tuple(int(layer) for layer in dense_layers)
        mechanism = replace(mechanism, dense_layers=layers)
    switches = {name: value for name, value in (aligner or {}).items() if value is not None}
    return replace(mechanism, aligner=replace(mechanism.aligner, **switches))
