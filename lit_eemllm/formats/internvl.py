"""InternVL 2.5, 3 and 3.5 in transformers' format (``..-hf``)."""

from __future__ import annotations

import math
from typing import Any

from transformers import InternVLConfig, InternVLForConditionalGeneration

from ..errors import ConfigError
from ..inputs.images import ImageTransform, Transform
from ..inputs.tiles import TilesTransform
from ..mechanisms import Connector
from ..mechanisms.pooling import PixelShuffle
from ..model.modeling import EEMLLM
from .base import Format, normalisation

AROUND = ("<img>", "</img>")


class InternVL(Format):
    model_type = "internvl"
    config_class, model_class = InternVLConfig, InternVLForConditionalGeneration
    encoders = ("internvl_vision",)
    needs = ("torchvision",)
    names = {
        "vision.model.": "model.vision_tower.",
        "projector.norm.": "model.multi_modal_projector.layer_norm.",
        "projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    }

    def problems(self, config: Any) -> list[str]:
        wanted = {"vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"}
        found = [
            f"{key}: {getattr(config, key)!r}, expected {value!r}"
            for key, value in wanted.items()
            if getattr(config, key) != value
        ]
        ratio = config.downsample_ratio
        if not isinstance(config.vision_feature_layer, int):
            found.append(f"vision_feature_layer: a list, {config.vision_feature_layer}; expected one layer")
        if not 0 < ratio <= 1 or 1 / ratio != round(1 / ratio):
            found.append(f"downsample_ratio: {ratio}, expected one over a whole number")
        sides = {*config.vision_config.image_size, *config.vision_config.patch_size}
        if len(sides) > 2:
            found.append(f"vision_config: images or patches that are no squares, {sorted(sides)}")
        return found

    def transform(self, config: Any, values: dict[str, Any]) -> Transform:
        side = config.vision_config.image_size[0]
        # its processor cuts, whatever a file says of cutting
        least, most = (values.pop(key, default) for key, default in (("min_patches", 1), ("max_patches", 12)))
        view = ImageTransform.from_preprocessor_config(
            {**values, "do_center_crop": False}, config.vision_config.patch_size[0]
        )
        if (view.height, view.width) != (side, side):
            raise ConfigError(
                f"its images have {view.height} x {view.width} pixels, expected the encoder's {side} x {side}"
            )
        return TilesTransform(view, least, most, AROUND)

    def select_layer(self, config: Any) -> int | None:
        return None if config.vision_feature_layer == -1 else int(config.vision_feature_layer)

    def connector(self, config: Any) -> Connector:
        return PixelShuffle(round(1 / config.downsample_ratio))

    def refusal(self, model: EEMLLM) -> str | None:
        transform = model.vision.transform
        if not isinstance(model.connector, PixelShuffle):
            return (
                f"model.connector.name: found {model.connector.name}, InternVL's format holds {PixelShuffle.name} only"
            )
        if not isinstance(transform, TilesTransform) or transform.around != AROUND:
            return f"model.vision.policy: found {transform.policy}, InternVL's format holds its own tiles only"
        return None

    def settings(self, model: EEMLLM) -> dict[str, Any]:
        transform, layer = model.vision.transform, model.vision.select_layer
        assert isinstance(model.connector, PixelShuffle) and isinstance(transform, TilesTransform)
        return {
            "downsample_ratio": 1 / model.connector.factor,
            "vision_feature_layer": -1 if layer is None else layer,
            "image_seq_length": math.prod(transform.tokens),
        }

    def files(self, model: EEMLLM) -> dict[str, dict[str, Any]]:
        transform = model.vision.transform
        assert isinstance(transform, TilesTransform)
        view = transform.view
        return {
            "processor_config.json": {
                "processor_class": "InternVLProcessor",
                "image_seq_length": math.prod(transform.tokens),
            },
            "preprocessor_config.json": {
                **normalisation(view),
                "image_processor_type": "GotOcr2ImageProcessor",
                "size": {"height": view.height, "width": view.width},
                "crop_to_patches": True,
                "min_patches": transform.least,
                "max_patches": transform.most,
            },
        }
