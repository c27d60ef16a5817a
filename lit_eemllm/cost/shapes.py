"""Models of images and text without weights: shapes of published ones, or a folder that holds their config files alone."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ..formats.base import Format
from ..formats.vlm import FORMATS, read_format, read_transform
from ..inputs.images import Transform
from ..mechanisms import Connector
from ..model.vision import encoder_name

QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4,
}  # fmt: skip
QWEN3 = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = {"resample": 3, **HALF}


def _split(side: int, tiles: int) -> dict[str, Any]:
    return {**SQUARE, "size": {"longest_edge": tiles * side}, "max_image_size": {"longest_edge": side}}


def _square(side: int) -> dict[str, Any]:
    return {**SQUARE, "size": {"height": side, "width": side}}


PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # HuggingFaceTB/SmolVLM2-500M-Video-Instruct
    "smolvlm2-500m": (
        "smolvlm",
        {
            "scale_factor": 4,
            "vision_config": {"hidden_size": 768, "num_attention_heads": 12, "image_size": 512, "patch_size": 16},
            "text_config": {
                "model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
                "num_key_value_heads": 5, "head_dim": 64, "vocab_size": 49280,
            },
        },
        _split(512, 4),
    ),
    # HuggingFaceTB/SmolVLM2-2.2B-Instruct: SmolLM2-1.7B, SigLIP SO400M, 81 tokens a tile
    "smolvlm2-2.2b": (
        "smolvlm",
        {
            "scale_factor": 3,
            "vision_config": {**SO400M, "image_size": 384},
            "text_config": {
                "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
                "vocab_size": 49280,
            },
        },
        _split(384, 4),
    ),
    # HuggingFaceM4/Idefics3-8B-Llama3: Llama 3.1 8B and three tokens more, SigLIP SO400M at 364 pixels
    "idefics3-8b": (
        "idefics3",
        {
            "scale_factor": 2,
            "vision_config": {**SO400M, "image_size": 364},
            "text_config": {
                "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 128259,
            },
        },
        _split(364, 4),
    ),
    # OpenGVLab/InternVL3-8B-hf: Qwen2.5-7B, InternViT-300M
    "internvl3-8b": (
        "internvl",
        {
            "tie_word_embeddings": False,
            "vision_config": {"attention_bias": True},
            "text_config": {**QWEN_7B, "vocab_size": 151674},
        },
        _square(448),
    ),
    # llava-hf/llava-onevision-qwen2-7b-ov-hf: Qwen2-7B, its vocabulary and two tokens filled up to a multiple of 64
    "llava-onevision-7b": ("llava_onevision", {"text_config": {**QWEN_7B, "vocab_size": 152128}}, _square(384)),
    # Qwen/Qwen2.5-VL-3B-Instruct
    "qwen2.5-vl-3b": (
        "qwen2_5_vl",
        {
            "tie_word_embeddings": True,
            "vision_config": {**QWEN_VISION, "out_hidden_size": 2048},
            "text_config": {
                "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
                "num_key_value_heads": 2, "vocab_size": 151936,
            },
        },
        {**CLIP, "min_pixels": 4 * 28**2, "max_pixels": 16384 * 28**2},
    ),
    # Qwen/Qwen2.5-VL-7B-Instruct
    "qwen2.5-vl-7b": (
        "qwen2_5_vl",
        {
            "vision_config": {**QWEN_VISION, "out_hidden_size": 3584},
            "text_config": {**QWEN_7B, "model_type": "qwen2_5_vl_text", "vocab_size": 152064},
        },
        {**CLIP, "min_pixels": 4 * 28**2, "max_pixels": 16384 * 28**2},
    ),
    # Qwen/Qwen3-VL-4B-Instruct
    "qwen3-vl-4b": (
        "qwen3_vl",
        {
            "tie_word_embeddings": True,
            "vision_config": {
                "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560,
                "deepstack_visual_indexes": [5, 11, 17],
            },
            "text_config": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728},
        },
        {**HALF, "min_pixels": 64 * 32**2, "max_pixels": 16384 * 32**2},
    ),
    # Qwen/Qwen3-VL-8B-Instruct
    "qwen3-vl-8b": (
        "qwen3_vl",
        {"vision_config": {"out_hidden_size": 4096}, "text_config": {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288}},
        {**HALF, "min_pixels": 64 * 32**2, "max_pixels": 16384 * 32**2},
    ),
}  # fmt: skip
"""Name -> model_type, what of config.json is not as transformers' defaults, and what preprocessor_config.json says. Each was compared
with a copy of the published file, with what reads it, or, if the comment says what the model was made of, with those parts' files."""


def read_shape(name: str) -> tuple[PretrainedConfig, str, dict[str, Any], Connector]:
    """The decoder's configuration, the encoder's registered name and its `to_config`, the connector.

    Args:
        name: of `PUBLISHED`, or a folder with config.json and preprocessor_config.json (or processor_config.json) of a model in a format
            of `FORMATS`.

    Raises:
        ConfigError: neither, or a model that an EEMLLM cannot be.
    """
    form, config, transform = _published(name) if name in PUBLISHED else _of_folder(Path(name))
    with torch.device("meta"):
        theirs = form.model_class(deepcopy(config))
    vision = form.vision(theirs.get_submodule(form.theirs("vision.model.")[:-1]), transform, config)
    return form.decoder_config(config), encoder_name(vision), vision.to_config(), form.connector(config)


def _published(name: str) -> tuple[Format, PretrainedConfig, Transform]:
    kind, values, preprocessor = deepcopy(PUBLISHED[name])
    form = FORMATS[kind]
    config = form.config_class(**values)
    return form, config, form.transform(config, preprocessor)


def _of_folder(folder: Path) -> tuple[Format, PretrainedConfig, Transform]:
    form, config = read_format(folder)
    return form, config, read_transform(folder, form, config)
