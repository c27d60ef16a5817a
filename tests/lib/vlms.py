"""Models of images and text of transformers' own, with random weights, written as their folders are; and conversations for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers as hf
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lib.chat import build
from lib.llava import shake
from lib.vision import picture
from lit_eemllm.formats.vlm import load_vlm
from lit_eemllm.inputs.conversation import IMAGE, Conversation, Turn
from lit_eemllm.mechanisms import PRESETS
from lit_eemllm.model import EEMLLM

TOWER = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
)
LAYERWISE = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
PIXELS = {"image_mean": LAYERWISE["mean"], "image_std": LAYERWISE["std"], "resample": 3, "do_normalize": True}
CHATML = "{%% for m in messages %%}<|im_start|>{{ m['role'] }}\n%s<|im_end|>\n{%% endfor %%}{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
IN_ORDER = (
    "{%% if m['content'] is string %%}{{ m['content'] }}{%% else %%}{%% for part in m['content'] %%}"
    "{%% if part['type'] == 'image' %%}%s{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}{%% endif %%}"
)
IMAGES_FIRST = (
    "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
)
UTTERANCES = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}{% if m['content'][0]['type'] == 'image' %}:{% else %}: "
    "{% endif %}{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """How a family's models, tokenizers and processors are made.

    Attributes:
        config: from the decoder's configuration and the image token's id to the model's.
        model: its class.
        template: the chat template.
        preprocessor: what its preprocessor_config.json says.
        processor: from tokenizer and preprocessor to its processor, of the image processors that need Pillow alone.
        tokens: special tokens, the image token first; those with a name are the tokenizer's attributes.
        decoder: class of the decoder's configuration.
    """

    config: Callable[[Any, int], Any]
    model: Any
    template: str
    preprocessor: dict[str, Any]
    processor: Callable[[Any, dict[str, Any]], Any]
    tokens: tuple[str, ...]
    named: dict[str, str] = field(default_factory=dict)
    decoder: Any = hf.Qwen2Config


def _internvl(text: Any, image: int) -> Any:
    tower = hf.InternVLVisionConfig(**TOWER, norm_type="layer_norm")
    return hf.InternVLConfig(
        vision_config=tower, text_config=text, image_token_id=image, image_seq_length=4, tie_word_embeddings=False
    )


def _idefics3(text: Any, image: int) -> Any:
    return hf.Idefics3Config(
        vision_config=hf.Idefics3VisionConfig(**TOWER).to_dict(), text_config=text, image_token_id=image, scale_factor=2,
        tie_word_embeddings=False,
    )  # fmt: skip


def _smolvlm(text: Any, image: int) -> Any:
    return hf.SmolVLMConfig(
        vision_config=hf.SmolVLMVisionConfig(**TOWER).to_dict(), text_config=text, image_token_id=image, scale_factor=2,
        tie_word_embeddings=False,
    )  # fmt: skip


GRIDS = [[16, 16], [16, 32], [32, 16], [32, 32], [48, 16], [16, 64], [48, 48]]


def _onevision(text: Any, image: int) -> Any:
    return hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False), text_config=text, image_token_index=image,
        video_token_index=image + 1, image_grid_pinpoints=GRIDS, vision_aspect_ratio="anyres_max_3", tie_word_embeddings=False,
    )  # fmt: skip


QWEN = dict(depth=4, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, out_hidden_size=32)


def _qwen2_5_vl(text: Any, image: int) -> Any:
    values = {k: v for k, v in text.to_dict().items() if k != "model_type"}
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return hf.Qwen2_5_VLConfig(
        vision_config={**QWEN, "window_size": 16, "fullatt_block_indexes": [1, 3]}, text_config=values, image_token_id=image,
        video_token_id=image + 1, vision_start_token_id=image + 2, vision_end_token_id=image + 3, tie_word_embeddings=False,
    )  # fmt: skip


def _qwen3_vl(text: Any, image: int) -> Any:
    values = {k: v for k, v in text.to_dict().items() if k != "model_type"}
    values |= {
        "head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
    }
    return hf.Qwen3VLConfig(
        vision_config={**QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}, text_config=values,
        image_token_id=image, video_token_id=image + 1, vision_start_token_id=image + 2, vision_end_token_id=image + 3,
        tie_word_embeddings=False,
    )  # fmt: skip


def of_images(processor: Any) -> Any:
    """A processor class without its part for videos, which needs torchvision."""
    return type(processor.__name__, (processor,), {"check_argument_for_proper_class": lambda *arguments: None})


SQUARE = {"size": {"height": 16, "width": 16}, **PIXELS}
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
AREA = {
    **PIXELS, "size": {"shortest_edge": 256, "longest_edge": 2304}, "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2,
    "image_processor_type": "Qwen2VLImageProcessor",
}  # fmt: skip
SPLIT = {"size": {"longest_edge": 40}, "max_image_size": {"longest_edge": 16}, **PIXELS, "do_image_splitting": True}
KINDS = {
    "internvl": Kind(
        _internvl, hf.InternVLForConditionalGeneration, CHATML % (IN_ORDER % "<IMG_CONTEXT>\n"),
        {**SQUARE, "crop_to_patches": False, "min_patches": 1, "max_patches": 6, "image_processor_type": "GotOcr2ImageProcessor"},
        lambda tokenizer, values: of_images(hf.InternVLProcessor)(
            GotOcr2ImageProcessorPil(**values), tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
        ),
        ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
        {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
        hf.Qwen3Config,
    ),
    "idefics3": Kind(
        _idefics3, hf.Idefics3ForConditionalGeneration, UTTERANCES, {**SPLIT, "image_processor_type": "Idefics3ImageProcessor"},
        lambda tokenizer, values: hf.Idefics3Processor(
            Idefics3ImageProcessorPil(**values), tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
        ),
        ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"), decoder=hf.LlamaConfig,
    ),
    "smolvlm": Kind(
        _smolvlm, hf.SmolVLMForConditionalGeneration, UTTERANCES, {**SPLIT, "image_processor_type": "SmolVLMImageProcessor"},
        lambda tokenizer, values: hf.Idefics3Processor(  # SmolVLM's own needs a package for videos
            Idefics3ImageProcessorPil(**values), tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
        ),
        ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>"),
        decoder=hf.LlamaConfig,
    ),
    "llava_onevision": Kind(
        _onevision, hf.LlavaOnevisionForConditionalGeneration, CHATML % IMAGES_FIRST,
        {**SQUARE, "image_grid_pinpoints": GRIDS, "do_pad": True, "image_processor_type": "LlavaOnevisionImageProcessor"},
        lambda tokenizer, values: of_images(hf.LlavaOnevisionProcessor)(
            LlavaOnevisionImageProcessorPil(**values), tokenizer, None, num_image_tokens=16, vision_feature_select_strategy="full",
            chat_template=tokenizer.chat_template, vision_aspect_ratio="anyres_max_3",
        ),
        ("<image>", "<video>"),
    ),
    "qwen2_5_vl": Kind(
        _qwen2_5_vl, hf.Qwen2_5_VLForConditionalGeneration, CHATML % (IN_ORDER % VISION), AREA,
        lambda tokenizer, values: of_images(hf.Qwen2_5_VLProcessor)(
            Qwen2VLImageProcessorPil(**values), tokenizer, None, chat_template=tokenizer.chat_template
        ),
        ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    ),
    "qwen3_vl": Kind(
        _qwen3_vl, hf.Qwen3VLForConditionalGeneration, CHATML % (IN_ORDER % VISION), AREA,
        lambda tokenizer, values: of_images(hf.Qwen3VLProcessor)(
            Qwen2VLImageProcessorPil(**values), tokenizer, None, chat_template=tokenizer.chat_template
        ),
        ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    ),
}  # fmt: skip
"""By `model_type`."""


def tokenizer_of(kind: Kind) -> Any:
    tokenizer = deepcopy(build("chatml"))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", *kind.tokens]})
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        model_specific_special_tokens=kind.named, chat_template=kind.template,
    )  # fmt: skip


def write(name: str, folder: Path, **text: Any) -> Path:
    """A model with random weights. `text`: of the decoder."""
    kind, tokenizer = KINDS[name], tokenizer_of(KINDS[name])
    torch.manual_seed(0)
    values = {**tiny.COMMON, "vocab_size": len(tokenizer) + 5, "num_attention_heads": 4, "num_key_value_heads": 2}
    values.pop("attention_bias")
    decoder = kind.decoder(
        **{**values, "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 4096, **text}
    )
    model = kind.model(kind.config(decoder, tokenizer.convert_tokens_to_ids(kind.tokens[0]))).eval()
    shake(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(kind.preprocessor))
    return folder


def model_of(folder: Path, mechanism: str) -> EEMLLM:
    """What `write` wrote as an EEMLLM, attention through the reference."""
    model = load_vlm(folder)[0]
    model.set_mechanism(PRESETS[mechanism].stretched(len(model.table)))
    model.set_attention("reference")
    torch.manual_seed(0)  # of adapters
    return model


Part = str | tuple[int, int]
TALKS: dict[str, list[list[Part]]] = {
    "no image": [["What is it?"]],
    "one": [[(40, 20), "What is it?"]],
    "narrow": [[(9, 30), "a cat"]],
    "one pixel": [[(1, 1), "a cat"]],
    "very wide": [[(900, 8), "near"]],
    "very high": [[(8, 900), "near"]],
    "two side by side": [[(40, 20), (20, 40), "What?"]],
    "text between": [["a ", (40, 20), " left of ", (33, 32), " what?"]],
    "image last": [["what is ", (30, 31)]],
    "turns": [[(40, 20), "a?"], ["b"], [(16, 16), "and?"], ["c d"], ["sofa?"]],
}
"""By what is odd about them: turns of text and pictures (width, height), a human's first."""


def conversation(talk: list[list[Part]]) -> tuple[Conversation, list[Image.Image]]:
    """As ours; a newline stands beside each placeholder, as in LLaVA's rows."""
    sizes = [part for turn in talk for part in turn if not isinstance(part, str)]
    turns = [
        Turn(("human", "gpt")[i % 2], "".join(part if isinstance(part, str) else f"{IMAGE}\n" for part in turn))
        for i, turn in enumerate(talk)
    ]
    return Conversation("k", tuple(turns), len(sizes)), [picture(size, i) for i, size in enumerate(sizes)]


def messages(talk: list[list[Part]]) -> list[dict[str, Any]]:
    """As transformers takes them."""
    return [
        {
            "role": ("user", "assistant")[i % 2],
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in turn
            ],
        }
        for i, turn in enumerate(talk)
    ]
