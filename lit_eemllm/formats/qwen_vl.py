"""Qwen2.5-VL and Qwen3-VL in transformers' formats, for images."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from ..errors import ConfigError
from ..inputs.images import ImageTransform, Transform
from ..inputs.resolutions import NativeTransform
from ..mechanisms import Connector
from ..mechanisms.pooling import Merger
from ..model.modeling import EEMLLM
from ..model.pretrained import ImageRotary
from ..model.qwen_vision import QwenVision
from .base import Format, normalisation


def _as(kind: Any, config: PretrainedConfig, **changes: Any) -> PretrainedConfig:
    """What a configuration has of another class's fields, as one of that class."""
    known = set(kind.__dataclass_fields__) - {"model_type"}
    kept = {key: value for key, value in config.to_dict().items() if key in known}
    made: PretrainedConfig = kind(**{**kept, **changes})
    return made


class Qwen25VL(Format):
    """Its decoder is a Qwen2 in which images have positions of rows and columns."""

    model_type = "qwen2_5_vl"
    config_class, model_class = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    encoders = ("qwen2_5_vl_vision",)
    needs = ("torchvision",)
    names = {
        "vision.model.": "model.visual.",
        "projector.main.norm.": "model.visual.merger.ln_q.",
        "projector.main.linear_1.": "model.visual.merger.mlp.0.",
        "projector.main.linear_2.": "model.visual.merger.mlp.2.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    }
    decoder_class: Any = Qwen2Config
    sections, interleaved = (16, 24, 24), False
    processor = "Qwen2_5_VLProcessor", "Qwen2VLImageProcessor"

    def problems(self, config: Any) -> list[str]:
        text, found = config.text_config, []
        if getattr(text, "use_sliding_window", False):
            found.append("text_config.use_sliding_window: true, expected false")
        if not isinstance(config.vision_config.patch_size, int):
            found.append(f"vision_config.patch_size: {config.vision_config.patch_size}, expected one number")
        if config.vision_config.out_hidden_size != text.hidden_size:
            found.append(
                f"vision_config.out_hidden_size: {config.vision_config.out_hidden_size}, expected {text.hidden_size}, the decoder's"
            )
        return found

    def decoder_config(self, config: Any) -> PretrainedConfig:
        text = config.text_config
        rope = dict(text.rope_parameters)
        sections = rope.pop("mrope_section", None) or self.sections
        if not isinstance(sections, list | tuple):
            raise ConfigError(
                f"text_config.rope_parameters.mrope_section: found {sections!r:.99}, expected three numbers"
            )
        rope.pop("mrope_interleaved", None)
        made = _as(self.decoder_class, text, rope_parameters=rope, tie_word_embeddings=config.tie_word_embeddings)
        made.image_rotary = {"sections": list(sections), "interleaved": self.interleaved}
        return made

    def text_config(self, model: EEMLLM) -> PretrainedConfig:
        ours, kind = model.config.text_config, type(self.config_class().text_config)
        rope = {**ours.rope_parameters, "mrope_section": ours.image_rotary["sections"]}
        if self.interleaved:
            rope["mrope_interleaved"] = True
        return _as(kind, ours, rope_parameters=rope)

    def transform(self, config: Any, values: dict[str, Any]) -> Transform:
        vision, size = config.vision_config, dict(values.get("size") or {})
        area = (
            values.get("min_pixels") or size.get("shortest_edge") or 56 * 56,
            values.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280,
        )
        told = {key: values.get(key, getattr(vision, key)) for key in ("patch_size", "temporal_patch_size")}
        told["merge_size"] = values.get("merge_size", vision.spatial_merge_size)
        if list(told.values()) != [vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size]:
            raise ConfigError(f"found {told}, which is not the encoder's in config.json")
        unit = vision.patch_size * vision.spatial_merge_size
        one = ImageTransform.from_preprocessor_config(
            {"resample": 3, **values, "size": {"height": unit, "width": unit}, "do_center_crop": False},
            vision.patch_size,
        )
        return NativeTransform(
            one.patch, one.mean, one.std, resample=one.resample, area=area, merges=vision.spatial_merge_size
        )

    def vision(self, tower: nn.Module, transform: Transform, config: Any) -> QwenVision:
        return QwenVision(tower, transform)

    def connector(self, config: Any) -> Connector:
        return Merger(config.vision_config.spatial_merge_size, rms=True)

    def refusal(self, model: EEMLLM) -> str | None:
        name, transform, text = type(self).__name__, model.vision.transform, model.config.text_config
        needed = self.connector(SimpleNamespace(vision_config=self.encoder(model)))
        if model.connector != needed:
            return f"model.connector: found {model.connector}, {name}'s format holds {needed} with this encoder"
        if not isinstance(transform, NativeTransform) or transform.area is None:
            return f"model.vision.policy: found {transform.policy}, {name}'s format holds its own only"
        rotary = ImageRotary.of(text)
        if text.model_type != self.decoder_class.model_type or rotary is None or rotary.interleaved != self.interleaved:
            found = f"{text.model_type} with image_rotary {getattr(text, 'image_rotary', None)}"
            return f"the decoder is a {found}, {name}'s is a {self.decoder_class.model_type} with interleaved={self.interleaved}"
        return None

    def settings(self, model: EEMLLM) -> dict[str, Any]:
        return {}

    def files(self, model: EEMLLM) -> dict[str, dict[str, Any]]:
        transform, (name, images), vision = model.vision.transform, self.processor, self.encoder(model)
        assert isinstance(transform, NativeTransform) and transform.area is not None
        least, most = transform.area
        return {
            "processor_config.json": {"processor_class": name},
            "preprocessor_config.json": {
                **normalisation(transform),
                "image_processor_type": images,
                "size": {"shortest_edge": least, "longest_edge": most},
                "patch_size": vision.patch_size,
                "temporal_patch_size": vision.temporal_patch_size,
                "merge_size": vision.spatial_merge_size,
            },
        }

    def inputs(self, model: EEMLLM, size: tuple[int, int], ids: Tensor) -> dict[str, Any]:
        (rows, columns), token = model.vision.transform.view_grids([size])[0], model.config.image_token_id
        return {"image_grid_thw": torch.tensor([[1, rows, columns]]), "mm_token_type_ids": (ids == token).int()}

    def pixels(self, model: EEMLLM, views: Tensor) -> Tensor:
        assert isinstance(model.vision, QwenVision)
        return model.vision.patches(views[0])


class Qwen3VL(Qwen25VL):
    """Its decoder is a Qwen3; states of lower encoder layers are added after its first layers."""

    model_type = "qwen3_vl"
    config_class, model_class = Qwen3VLConfig, Qwen3VLForConditionalGeneration
    encoders = ("qwen3_vl_vision",)
    names = {
        **Qwen25VL.names,
        "projector.main.norm.": "model.visual.merger.norm.",
        "projector.main.linear_1.": "model.visual.merger.linear_fc1.",
        "projector.main.linear_2.": "model.visual.merger.linear_fc2.",
    }
    decoder_class: Any = Qwen3Config
    sections, interleaved = (24, 20, 20), True
    processor = "Qwen3VLProcessor", "Qwen2VLImageProcessor"

    def problems(self, config: Any) -> list[str]:
        found, vision = super().problems(config), config.vision_config
        layers, depth = list(vision.deepstack_visual_indexes), vision.depth
        if layers != sorted({layer for layer in layers if 0 <= layer < depth}):
            text = f"{layers}, expected layers from 0 to {depth - 1}, in order"
            found.append(f"vision_config.deepstack_visual_indexes: {text}")
        return found

    def connector(self, config: Any) -> Connector:
        return Merger(
            config.vision_config.spatial_merge_size, levels=len(config.vision_config.deepstack_visual_indexes)
        )

    def theirs(self, name: str) -> str:
        deep = re.fullmatch(r"projector\.deep\.(\d+)\.(norm|linear_1|linear_2)\.(\w+)", name)
        if deep is None:
            return super().theirs(name)
        part = {"norm": "norm", "linear_1": "linear_fc1", "linear_2": "linear_fc2"}[deep[2]]
        return f"model.visual.deepstack_merger_list.{deep[1]}.{part}.{deep[3]}"
