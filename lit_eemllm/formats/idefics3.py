"""Idefics3 and SmolVLM in transformers' formats."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from ..errors import ConfigError
from ..inputs.images import ImageTransform, Transform
from ..inputs.tiles import SplitTransform
from ..mechanisms import Connector
from ..mechanisms.pooling import LinearShuffle
from ..model.modeling import EEMLLM
from .base import Format, normalisation


class Idefics3(Format):
    model_type = "idefics3"
    config_class, model_class = Idefics3Config, Idefics3ForConditionalGeneration
    encoders = ("idefics3_vision",)
    names = {
        "vision.model.": "model.vision_model.",
        "projector.linear.": "model.connector.modality_projection.proj.",
        "language_model.model.": "model.text_model.",
        "language_model.lm_head.": "lm_head.",
    }
    processor = "Idefics3Processor", "Idefics3ImageProcessor"

    def problems(self, config: Any) -> list[str]:
        if config.vision_config.model_type == self.model_type:  # as transformers wrote it before 5
            config.vision_config.model_type = self.encoders[0]
        side, patch = config.vision_config.image_size, config.vision_config.patch_size
        if not isinstance(side, int) or not isinstance(patch, int):
            return [f"vision_config: image_size {side} and patch_size {patch}, expected one number each"]
        if side // patch % config.scale_factor:
            return [f"scale_factor: {config.scale_factor}, expected a divisor of {side // patch}, the patches in a row"]
        return []

    def transform(self, config: Any, values: dict[str, Any]) -> Transform:
        side, size = config.vision_config.image_size, values.get("size") or {"longest_edge": 4 * 364}
        tile = (values.get("max_image_size") or {"longest_edge": 364}).get("longest_edge")
        if tile != side or "longest_edge" not in size:
            raise ConfigError(
                f"max_image_size {values.get('max_image_size')} and size {size}: expected longest_edge of both, of the first {side}, "
                "the encoder's"
            )
        view = ImageTransform.from_preprocessor_config(
            {**values, "size": {"height": side, "width": side}, "do_pad": None}, config.vision_config.patch_size
        )
        return SplitTransform(view, size["longest_edge"], bool(values.get("do_image_splitting", True)))

    def connector(self, config: Any) -> Connector:
        return LinearShuffle(config.scale_factor)

    def refusal(self, model: EEMLLM) -> str | None:
        transform, name = model.vision.transform, type(self).__name__
        if not isinstance(model.connector, LinearShuffle):
            return (
                f"model.connector.name: found {model.connector.name}, {name}'s format holds {LinearShuffle.name} only"
            )
        if model.vision.select_layer is not None:
            return f"model.vision.select_layer: found {model.vision.select_layer}, {name}'s format reads the encoder's output: null"
        if not isinstance(transform, SplitTransform):
            return f"model.vision.policy: found {transform.policy}, {name}'s format holds split only"
        return None

    def settings(self, model: EEMLLM) -> dict[str, Any]:
        assert isinstance(model.connector, LinearShuffle)
        return {"scale_factor": model.connector.factor}

    def files(self, model: EEMLLM) -> dict[str, dict[str, Any]]:
        transform = model.vision.transform
        assert isinstance(transform, SplitTransform)
        name, images = self.processor
        return {
            "processor_config.json": {"processor_class": name, "image_seq_len": math.prod(transform.tokens)},
            "preprocessor_config.json": {
                **normalisation(transform.view),
                "image_processor_type": images,
                "size": {"longest_edge": transform.longest},
                "max_image_size": {"longest_edge": transform.view.width},
                "do_image_splitting": transform.cuts,
                "do_pad": True,
            },
        }

    def pixels(self, model: EEMLLM, views: Tensor) -> Tensor:
        return views[None]


class SmolVLM(Idefics3):
    model_type = "smolvlm"
    config_class, model_class = SmolVLMConfig, SmolVLMForConditionalGeneration
    encoders = ("smolvlm_vision",)
    needs = ("torchvision", "num2words")
    processor = "SmolVLMProcessor", "SmolVLMImageProcessor"
