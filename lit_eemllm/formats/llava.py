"""LLaVA-1.5, LLaVA-1.6 and LLaVA-OneVision in transformers' formats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from ..errors import ConfigError
from ..inputs.images import ImageTransform, Transform
from ..inputs.tiles import AnyresTransform
from ..mechanisms.connectors import DEFAULT
from ..model.modeling import EEMLLM
from .base import Format, normalisation

STRATEGIES = {"clip_vision_model": "default", "siglip_vision_model": "full"}
"""Encoder -> the ``vision_feature_select_strategy`` that keeps exactly its patches: CLIP has a class token, SigLIP none."""


class Llava(Format):
    """LLaVA-1.5."""

    model_type = "llava"
    config_class, model_class = LlavaConfig, LlavaForConditionalGeneration
    encoders = tuple(STRATEGIES)
    names = {
        "vision.model.": "model.vision_tower.",
        "projector.newline": "model.image_newline",
        "projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    }
    template = "vicuna_v1"

    def problems(self, config: Any) -> list[str]:
        found = []
        encoder, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if strategy != STRATEGIES.get(encoder, strategy):
            why = "the class token would be" if encoder == "clip_vision_model" else "the first patch would not be"
            text = f"{strategy!r}: {why} a visual token; expected {STRATEGIES[encoder]!r} for {encoder}"
            found.append(f"vision_feature_select_strategy: {text}")
        if not isinstance(config.vision_feature_layer, int):
            found.append(f"vision_feature_layer: a list, {config.vision_feature_layer}; expected one layer")
        if config.projector_hidden_act != "gelu":
            found.append(f"projector_hidden_act: {config.projector_hidden_act!r}, expected 'gelu'")
        if not config.multimodal_projector_bias:
            found.append("multimodal_projector_bias: false, expected true")
        return found

    def transform(self, config: Any, values: dict[str, Any]) -> Transform:
        padded = bool(values.pop("do_pad", False)) and "Llava" in str(values.get("image_processor_type"))
        transform = ImageTransform.from_preprocessor_config(values, config.vision_config.patch_size)
        if not padded:
            return transform
        if (transform.policy, transform.shortest) != ("crop", transform.height):
            raise ConfigError(f"do_pad with size {values['size']} and crop_size {values.get('crop_size')}")
        return replace(transform, policy="pad", shortest=None)

    def select_layer(self, config: Any) -> int | None:
        return int(config.vision_feature_layer)

    def refusal(self, model: EEMLLM) -> str | None:
        if model.connector != DEFAULT:
            return (
                f"model.connector.name: found {model.connector.name}, LLaVA's format holds {DEFAULT.name} only; with "
                f"model.connector.name={DEFAULT.name} convert begins a fresh one, to be trained"
            )
        if model.vision.select_layer is None:
            return "model.vision.select_layer: found null, LLaVA's format needs a layer: hidden states before the last norm"
        if not self._shows(model.vision.transform):
            return f"model.vision.policy: found {model.vision.transform.policy}, which LLaVA's formats cannot say"
        return None

    def _shows(self, transform: Transform) -> bool:
        """Whether this is how pictures become pixels in this format."""
        return isinstance(transform, ImageTransform)

    def settings(self, model: EEMLLM) -> dict[str, Any]:
        view = self._view(model)
        return {
            "image_seq_length": view.num_tokens(view.width, view.height),
            "vision_feature_layer": model.vision.select_layer,
            "vision_feature_select_strategy": self._strategy(model),
        }

    @staticmethod
    def _strategy(model: EEMLLM) -> str:
        return STRATEGIES[Format.encoder(model).model_type]

    @staticmethod
    def _view(model: EEMLLM) -> ImageTransform:
        view = getattr(model.vision.transform, "view", model.vision.transform)
        assert isinstance(view, ImageTransform)
        return view

    def files(self, model: EEMLLM) -> dict[str, dict[str, Any]]:
        return {
            "processor_config.json": self._processor(model, "LlavaProcessor"),
            "preprocessor_config.json": preprocessor_config(self._view(model)),
        }

    def _processor(self, model: EEMLLM, name: str) -> dict[str, Any]:
        strategy = self._strategy(model)
        return {
            "processor_class": name,
            "image_token": "<image>",
            "patch_size": self._view(model).patch,
            "vision_feature_select_strategy": strategy,
            "num_additional_image_tokens": int(strategy == "default"),  # CLIP's class token
        }


class LlavaNext(Llava):
    """LLaVA-1.6: tiles."""

    model_type = "llava_next"
    config_class, model_class = LlavaNextConfig, LlavaNextForConditionalGeneration

    def transform(self, config: Any, values: dict[str, Any]) -> Transform:
        """Raises ConfigError where the encoder, its preprocessor and the grids do not fit each other."""
        values.pop("do_pad", None)
        view = ImageTransform.from_preprocessor_config(values, config.vision_config.patch_size)
        pinpoints = values.get("image_grid_pinpoints")
        side, grids = config.vision_config.image_size, config.image_grid_pinpoints or []
        if (view.height, view.width, view.shortest or side) != (side, side, side):
            raise ConfigError(
                f"its images have {view.height} x {view.width} pixels, expected the encoder's {side} x {side}"
            )
        if pinpoints is not None and pinpoints != grids:
            raise ConfigError(f"image_grid_pinpoints: found {pinpoints}, but config.json has {grids}")
        if any(length % side for grid in grids for length in grid):
            raise ConfigError(f"image_grid_pinpoints: found {grids}, expected multiples of {side}, the encoder's size")
        return AnyresTransform(view, tuple((height // side, width // side) for height, width in grids))

    def _shows(self, transform: Transform) -> bool:
        return isinstance(transform, AnyresTransform) and transform.most is None and not transform.lone

    def settings(self, model: EEMLLM) -> dict[str, Any]:
        return {**super().settings(model), **self._grids(model)}

    def _grids(self, model: EEMLLM) -> dict[str, Any]:
        view, transform = self._view(model), self._tiles(model)
        return {"image_grid_pinpoints": [[rows * view.height, cols * view.width] for rows, cols in transform.grids]}

    @staticmethod
    def _tiles(model: EEMLLM) -> AnyresTransform:
        transform = model.vision.transform
        assert isinstance(transform, AnyresTransform)
        return transform

    def files(self, model: EEMLLM) -> dict[str, dict[str, Any]]:
        # of a view, resizing is the whole of "crop"
        values = {
            **preprocessor_config(replace(self._view(model), policy="crop")),
            **self._grids(model),
            "do_pad": True,
        }
        return {
            "processor_config.json": self._processor(model, "LlavaNextProcessor"),
            "preprocessor_config.json": {**values, "image_processor_type": "LlavaNextImageProcessor"},
        }

    def inputs(self, model: EEMLLM, size: tuple[int, int], ids: torch.Tensor) -> dict[str, Any]:
        return {"image_sizes": torch.tensor([size[::-1]])}

    def pixels(self, model: EEMLLM, views: torch.Tensor) -> torch.Tensor:
        return views[None]


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: at most so many tiles' tokens, and of several images the view alone. Videos are not read."""

    model_type = "llava_onevision"
    config_class, model_class = LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
    template = "jinja"
    needs = ("torchvision",)

    def problems(self, config: Any) -> list[str]:
        found, ratio = super().problems(config), config.vision_aspect_ratio
        if not ratio.removeprefix("anyres_max_").isdecimal():
            found.append(f"vision_aspect_ratio: {ratio!r}, expected anyres_max_ and a number of tiles")
        return found

    def transform(self, config: Any, values: dict[str, Any]) -> Transform:
        transform = super().transform(config, values)
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        return replace(transform, most=most, lone=True)  # type: ignore[type-var]

    def _shows(self, transform: Transform) -> bool:
        return isinstance(transform, AnyresTransform) and transform.most is not None and transform.lone

    def settings(self, model: EEMLLM) -> dict[str, Any]:
        settings = {**super().settings(model), "vision_aspect_ratio": f"anyres_max_{self._tiles(model).most}"}
        settings.pop("image_seq_length")
        return settings

    def files(self, model: EEMLLM) -> dict[str, dict[str, Any]]:
        view = self._view(model)
        values = {**normalisation(view), "size": {"height": view.height, "width": view.width}, **self._grids(model)}
        return {
            "processor_config.json": {
                "processor_class": "LlavaOnevisionProcessor",
                "num_image_tokens": view.num_tokens(view.width, view.height),
                "vision_feature_select_strategy": self._strategy(model),
                "vision_aspect_ratio": f"anyres_max_{self._tiles(model).most}",
            },
            "preprocessor_config.json": {
                **values, "do_pad": True, "image_processor_type": "LlavaOnevisionImageProcessor",
            },
        }  # fmt: skip


def preprocessor_config(transform: ImageTransform) -> dict[str, Any]:
    """transformers' preprocessor_config.json of an image transform."""
    size = {"height": transform.height, "width": transform.width}
    values = normalisation(transform)
    if transform.policy == "resize":
        return {**values, "image_processor_type": "SiglipImageProcessor", "size": size}
    shortest = {"shortest_edge": transform.shortest or max(transform.height, transform.width)}
    values |= {"size": shortest, "crop_size": size, "do_center_crop": True}
    if transform.policy == "pad":
        return {**values, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return {**values, "image_processor_type": "CLIPImageProcessor"}
