"""LLaVAs of transformers' own, with random weights, and comparisons with them."""

import json
from copy import deepcopy
from dataclasses import replace

import tiny
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

BOUND = 1e-5  # of the largest value, float32
TOWER = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
)
TEXT = {key: value for key, value in tiny.COMMON.items() if key not in ("vocab_size", "attention_bias")}
CLIP = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4],
}  # fmt: skip
SIGLIP = {**CLIP, "image_processor_type": "SiglipImageProcessor", "size": {"height": 16, "width": 16}, "do_center_crop": False}  # fmt: skip


def shake(model):
    """No weight may hide behind a one, a zero or another."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def random_llava(tokenizer, encoder="clip", decoder="llama", sizes=(), **changes):
    """transformers' own, with the image token inside a vocabulary that has room to spare, as LLaVA-1.5's; `sizes` are the decoder's."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(**TOWER) if encoder == "siglip" else CLIPVisionConfig(**TOWER)
    text = (Qwen2Config if "qwen2" in decoder else LlamaConfig)(
        **{**TEXT, "tie_word_embeddings": decoder == "qwen2-tied", **dict(sizes)},
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer) + 7,
    )
    values = {
        "vision_feature_layer": -2 if encoder == "clip" else -1,
        "vision_feature_select_strategy": "default" if encoder == "clip" else "full",
        "image_seq_length": tiny.TOKENS,
        "tie_word_embeddings": "tied" in decoder,
        **changes,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **values,
    )
    llava = LlavaForConditionalGeneration(config).eval()
    shake(llava)
    return llava


def write_llava(llava, tokenizer, folder, preprocessor=None, **options):
    llava.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    default = CLIP if llava.config.vision_config.model_type == "clip_vision_model" else SIGLIP
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor or default))
    return folder


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(model, expected, but=("-",)):
    found = model.state_dict()
    for name, tensor in expected.items():
        assert name.startswith(but) or tensor.equal(found[name]), name


def to_write(decoder="llama-gqa", encoder="clip", vocabulary=None, **transform):
    model = deepcopy(tiny.model(decoder, "llava", encoder))  # whose config others share
    if vocabulary is not None:
        model.language_model.resize_token_embeddings(vocabulary)
        model.config.text_config.vocab_size = vocabulary
    model.vision.transform = replace(model.vision.transform, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), **transform)
    shake(model)
    return model
