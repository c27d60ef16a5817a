"""A mechanism says how visual tokens are treated, as data: one decoder executes all of them.

Inside a layer, text always queries ``[visual; text]`` keys. Mechanisms differ in whether visual tokens query too
(`dense_layers`), how the visual stream is updated where they do not (`aligner`), where it comes from (`visual_source`)
and in which layers text sees it at all (`cross_layers`). Gated cross-attention adds modules of its own (`gated`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import ConfigError

Layers = str | tuple[int, ...]
"""``"all"``, ``"none"`` or layer numbers from 0."""


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

    @property
    def off(self) -> bool:
        return not (self.value or self.output or self.ffn)


NO_ALIGNER = Aligner(False, False, False)


@dataclass(frozen=True)
class Gated:
    """Gated cross-attention (Flamingo): own modules before every k-th layer; text is the only stream.

    Args:
        every: a block stands before layers 0, every, 2 every, ...
        latents: tokens per image after a perceiver resampler; 0 = the projected visual tokens as they are.
        heads: heads of the cross-attention and of the resampler.
        head_size: their size.
        depth: layers of the resampler.
        immediate: text sees only the last image before it; False = all images before it.
    """

    every: int = 4
    latents: int = 64
    heads: int = 8
    head_size: int = 64
    depth: int = 6
    immediate: bool = True


@dataclass(frozen=True)
class Mechanism:
    """How a decoder treats visual tokens.

    Args:
        dense_layers: layers in which visual tokens query, as in LLaVA.
        cross_layers: layers in which text sees the image (ViCA: 8 of 32). Positions keep the gap in the others.
        visual_source: ``stream``: a layer's visual states come from the layer before; ``layerwise``: from a projector of
            its own, over the encoder's features (SAISA).
        aligner: how visual states are updated in layers that are not dense.
        visual_window: in layers that are not dense, a visual token sees itself and so many visual tokens of its image
            before it (EE-MLLM-F); 0 = itself only, which is the aligner's value path.
        visual_positions: ``sequence``: LLaVA's; ``shared``: an image takes one position, as all its tokens do
            (mPLUG-Owl3); ``unrotated``: text scores visual keys without rotary positions on either (D-Attn); ``none``: an
            image takes no position (gated cross-attention, whose images are no part of the sequence).
        freeze_prefix: text before a document's first image takes no attention, only the feed-forward network (a fact of
            ViCA's code for 7B). It looks ahead: text cached before an image came in a later turn was not frozen.
        visual_drop: ``(layer, share)``: from that layer on, that share of each image's original tokens is no longer seen,
            those that the prompt's last token attends to least there (ViCA with progressive dropping), by keys at their
            positions. Only when generating with a cache: training and validation losses are those of the model without dropping.
        gated: gated cross-attention, or None.
    """

    dense_layers: Layers = "none"
    cross_layers: Layers = "all"
    visual_source: str = "stream"
    aligner: Aligner = field(default_factory=Aligner)
    visual_window: int = 0
    visual_positions: str = "sequence"
    freeze_prefix: bool = False
    visual_drop: tuple[tuple[int, float], ...] = ()
    gated: Gated | None = None

    def is_dense(self, layer: int) -> bool:
        return _contains(self.dense_layers, layer)

    def sees_images(self, layer: int) -> bool:
        return _contains(self.cross_layers, layer)

    @property
    def independent(self) -> bool:
        """Visual states depend on their image alone, never on the text: they can be computed once per image."""
        return self.dense_layers == "none" or self.dense_layers == ()

    @property
    def constant(self) -> bool:
        """No layer updates visual states: the stream that runs through the layers is text only."""
        return self.independent and self.aligner.off

    def is_llava(self, num_layers: int) -> bool:
        """Whether this is what LLaVA computes, bit for bit, in a decoder of so many layers: of the last layer only text is read, so
        visual tokens that query in all others are enough."""
        base = PRESETS["llava"]
        idle = replace(self, dense_layers="all", cross_layers="all", aligner=base.aligner, visual_window=0)
        dense = all(self.is_dense(layer) for layer in range(num_layers - 1))
        return idle == base and dense and all(self.sees_images(layer) for layer in range(num_layers))

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        """What contradicts itself or a decoder of so many layers: (field, what is wrong)."""
        found: list[tuple[str, str]] = []
        words = {
            "visual_source": ("stream", "layerwise"),
            "visual_positions": ("sequence", "shared", "unrotated", "none"),
        }
        for name, known in words.items():
            if getattr(self, name) not in known:
                found.append((name, f"found {getattr(self, name)!r}, expected {' or '.join(known)}"))
        if self.visual_window < 0:
            found.append(("visual_window", f"found {self.visual_window}, expected 0 or more"))
        for name in ("dense_layers", "cross_layers"):
            layers = getattr(self, name)
            if isinstance(layers, tuple) and not set(layers) <= set(range(num_layers)):
                found.append((name, f"found {list(layers)}, this decoder has layers 0 to {num_layers - 1}"))
        blind = [n for n in range(num_layers - 1) if self.is_dense(n) and not self.sees_images(n)]
        if blind:
            found.append(
                (
                    "cross_layers",
                    f"layers {blind} are dense: there, text sees the image; leave them out of dense_layers",
                )
            )
        if self.visual_source == "layerwise" and not (self.constant and self.cross_layers == "all"):
            text = "layerwise projectors make the visual states of every layer: needs dense_layers none, the aligner off and cross_layers all"
            found.append(("visual_source", text))
        if self.visual_window and not (self.aligner.value and self.aligner.output):
            found.append(("visual_window", "replaces the aligner's value path: needs aligner value and output"))
        if self.visual_positions == "unrotated" and not self.independent:
            found.append(
                ("visual_positions", "unrotated needs dense_layers none: visual tokens that query have positions")
            )
        if self.visual_drop:
            layers, shares = zip(*self.visual_drop, strict=True)
            if not self.constant or self.gated or not all(self.sees_images(n) and 0 <= n < num_layers for n in layers):
                text = (
                    "dropping needs constant visual states (dense_layers none, aligner off) and layers in cross_layers"
                )
                found.append(("visual_drop", text))
            if self.visual_positions == "unrotated":
                text = "dropping ranks visual tokens by their rotated keys, which text does not score if visual_positions is unrotated"
                found.append(("visual_drop", text))
            if list(layers) != sorted(set(layers)) or min(shares) <= 0 or sum(shares) >= 1:
                found.append(
                    ("visual_drop", f"found {self.visual_drop}: layers must ascend, shares must sum to less than 1")
                )
        if self.gated is not None and (
            self.cross_layers != "none" or self.visual_positions != "none" or not self.constant
        ):
            text = "needs cross_layers none, dense_layers none, the aligner off and visual_positions none"
            found.append(("gated", text))
        if (
            self.gated is not None
            and min(self.gated.every, self.gated.heads, self.gated.head_size, self.gated.depth) < 1
        ):
            found.append(("gated", f"found {self.gated}: every, heads, head_size and depth are 1 or more"))
        return found

    def stretched(self, num_layers: int, of: int = 32) -> Mechanism:
        """Layer numbers given for a decoder of `of` layers, carried over to another depth in proportion."""

        def stretch(layers: Layers) -> Layers:
            return layers if isinstance(layers, str) else tuple(sorted({n * num_layers // of for n in layers}))

        return replace(self, dense_layers=stretch(self.dense_layers), cross_layers=stretch(self.cross_layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for the model's config.json."""

        def plain(value: Any) -> Any:
            return [plain(item) for item in value] if isinstance(value, tuple) else value

        return {name: plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Mechanism:
        def fixed(value: Any) -> Any:
            return tuple(fixed(item) for item in value) if isinstance(value, list | tuple) else value

        made = {name: fixed(value) for name, value in values.items()}
        gated = made.get("gated")
        return cls(
            **{**made, "aligner": Aligner(**made["aligner"]), "gated": None if gated is None else Gated(**gated)}
        )


def _contains(layers: Layers, layer: int) -> bool:
    return layers == "all" or (layers != "none" and layer in layers)


_LEAST_USEFUL = (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19)  # ShortV's ranking, 32 layers

PRESETS = {
    "llava": Mechanism(dense_layers="all"),
    "ee_mllm": Mechanism(),
    # Our reading: the paper's layers and window were not found. Late layers do least between visual tokens.
    "ee_mllm_f": Mechanism(dense_layers=tuple(range(16))),
    "naavit": Mechanism(aligner=Aligner(value=False, output=False)),
    "shortv": Mechanism(dense_layers=tuple(n for n in range(32) if n not in _LEAST_USEFUL), aligner=NO_ALIGNER),
    "saisa": Mechanism(visual_source="layerwise", aligner=NO_ALIGNER),
    "vica": Mechanism(cross_layers=(0, 1, 7, 8, 9, 10, 11, 14), aligner=NO_ALIGNER),
    "flamingo": Mechanism(cross_layers="none", aligner=NO_ALIGNER, visual_positions="none", gated=Gated()),
}
"""Layer numbers are those of a decoder of 32 layers; `build_mechanism` carries them over to others (our reading)."""


def build_mechanism(preset: str, num_layers: int, overrides: Mapping[str, Any] | None = None) -> Mechanism:
    """A preset for a decoder of so many layers, with overrides; None keeps what the preset says.

    Args:
        preset: a name of `PRESETS`.
        num_layers: the decoder's.
        overrides: fields of `Mechanism`; `aligner` and `gated` as mappings of their own fields.

    Raises:
        ConfigError: naming every key that is wrong.
    """
    if preset not in PRESETS:
        raise ConfigError(f"model.mechanism.preset: unknown preset {preset!r}; choose one of {sorted(PRESETS)}")
    mechanism = PRESETS[preset].stretched(num_layers)
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    for name in ("aligner", "gated"):
        part = {key: value for key, value in (given.pop(name, None) or {}).items() if value is not None}
        if part:
            base = getattr(mechanism, name)
            if base is None:
                raise ConfigError(f"model.mechanism.{name}: the preset {preset} has none; use preset=flamingo")
            given[name] = replace(base, **part)
    for name in ("dense_layers", "cross_layers"):
        layers = given.get(name)
        if isinstance(layers, Sequence) and not isinstance(layers, str):
            given[name] = tuple(sorted(int(layer) for layer in layers))
        elif layers not in (None, "all", "none"):
            raise ConfigError(f'model.mechanism.{name}: found {layers!r}, expected "all", "none" or a list')
    if "visual_drop" in given:
        given["visual_drop"] = tuple((int(layer), float(share)) for layer, share in given["visual_drop"])
    mechanism = replace(mechanism, **given)
    problems = mechanism.problems(num_layers)
    if mechanism.gated is None and not any(mechanism.sees_images(layer) for layer in range(num_layers)):
        problems.append(("cross_layers", "text sees the image in no layer"))
    if problems:
        raise ConfigError("\n".join(f"model.mechanism.{name}: {text}" for name, text in problems))
    return mechanism
