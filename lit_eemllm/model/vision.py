"""Vision encoders: transformers' CLIP and SigLIP, and a registry through which a user's own encoder enters."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers.utils import cached_file

from ..errors import ConfigError
from ..images import ImageTransform
from .pretrained import load_pretrained, load_weighted


class VisionEncoder(nn.Module, ABC):
    """Pixels to visual tokens.

    Attributes:
        hidden_size: width d of a visual token.
        transform: how an image becomes pixels, and how many tokens it gives.
    """

    hidden_size: int
    transform: ImageTransform

    @classmethod
    @abstractmethod
    def from_path(cls, path: str, *, select_layer: int, policy: str) -> VisionEncoder:
        """With pretrained weights; the arguments are the keys of ``model.vision``."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> VisionEncoder:
        """The same architecture from what `to_config` returned, without weights."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Plain types that describe the architecture, stored in the model's config.json."""

    @abstractmethod
    def forward(self, pixels: Tensor) -> Tensor:
        """[I, 3, height, width] to [I, tokens, d]."""

    def unused(self) -> list[nn.Module]:
        """Parts whose output is never read, such as layers above the chosen one: they are never trained."""
        return []


_ENCODERS: dict[str, type[VisionEncoder]] = {}


def register_vision_encoder(name: str) -> Callable[[type[VisionEncoder]], type[VisionEncoder]]:
    """Class decorator that makes an encoder available as ``model.vision.encoder=NAME``. Raises ValueError if taken."""

    def register(cls: type[VisionEncoder]) -> type[VisionEncoder]:
        if name in _ENCODERS:
            raise ValueError(f"vision encoder {name!r} is registered already; registered: {sorted(_ENCODERS)}")
        _ENCODERS[name] = cls
        return cls

    return register


def get_vision_encoder(name: str) -> type[VisionEncoder]:
    """Raises ConfigError naming the registered encoders."""
    if name not in _ENCODERS:
        raise ConfigError(
            f"model.vision.encoder: unknown encoder {name!r}; registered: {sorted(_ENCODERS)}. "
            "An encoder of your own is registered by a file given with --import FILE."
        )
    return _ENCODERS[name]


@register_vision_encoder("transformers")
class TransformersVision(VisionEncoder):
    """CLIP and SigLIP from transformers: hidden states of one layer, class token dropped, as LLaVA takes them."""

    FAMILIES = {
        "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
        "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
    }

    def __init__(self, model: nn.Module, transform: ImageTransform, select_layer: int) -> None:
        super().__init__()
        self.model, self.transform, self.select_layer = model, transform, select_layer
        self.hidden_size, depth = int(model.config.hidden_size), int(model.config.num_hidden_layers)
        if not -depth - 1 <= select_layer <= depth:
            raise ConfigError(f"model.vision.select_layer: found {select_layer}, this encoder has {depth} layers")

    @classmethod
    def read_config(cls, path: str) -> tuple[Any, dict[str, Any]]:
        """transformers' config of the encoder in a folder and, if the folder is an EEMLLM's, what its `to_config` gave."""
        config = load_pretrained(AutoConfig, path, "model.vision.path")
        made = config.vision["config"] if config.model_type == "eemllm" else {}
        if "model" in made:
            config = cls.FAMILIES[made["model"]["model_type"]][0](**made["model"])
        config = getattr(config, "vision_config", config)  # a whole CLIP or SigLIP, image and text
        if config.model_type not in cls.FAMILIES:
            raise ConfigError(
                f"model.vision.path: {path} is a {config.model_type!r}, expected one of {sorted(cls.FAMILIES)}; "
                "register a class of your own for another encoder"
            )
        return config, made

    @classmethod
    def from_path(cls, path: str, *, select_layer: int, policy: str) -> TransformersVision:
        config, made = cls.read_config(path)
        options: dict[str, Any] = {}
        if made:
            options = {"config": config, "key_mapping": {r"^vision\.model\.": ""}}
            transform = ImageTransform.from_dict(made["transform"])
        else:
            try:
                preprocessor = json.loads(Path(cached_file(path, "preprocessor_config.json")).read_text())
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"model.vision.path: no readable preprocessor_config.json in {path!r}: {error}"
                ) from error
            transform = ImageTransform.from_preprocessor_config(preprocessor, patch=config.patch_size)
        model = load_weighted(cls.FAMILIES[config.model_type][1], path, "model.vision.path", **options)
        return cls(model, replace(transform, policy=policy), select_layer)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TransformersVision:
        config_class, model_class = cls.FAMILIES[config["model"]["model_type"]]
        model = model_class(config_class(**config["model"]))
        return cls(model, ImageTransform.from_dict(config["transform"]), config["select_layer"])

    def to_config(self) -> dict[str, Any]:
        model = {**self.model.config.to_diff_dict(), "model_type": self.model.config.model_type}
        return {"model": model, "transform": self.transform.to_dict(), "select_layer": self.select_layer}

    def unused(self) -> list[nn.Module]:
        depth = self.model.config.num_hidden_layers
        layers = next(m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
        rest = [m for name, m in self.model.named_modules() if name.rpartition(".")[2] in ("post_layernorm", "head")]
        return [*layers[self.select_layer % (depth + 1) :], *rest]

    def forward(self, pixels: Tensor) -> Tensor:
        states = self.model(pixels, output_hidden_states=True).hidden_states[self.select_layer]
        return states[
            :, -self.transform.num_tokens(pixels.shape[-1], pixels.shape[-2]) :
        ]  # CLIP's class token is first
