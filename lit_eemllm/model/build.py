"""Build a model and its processor from the configuration: load the parts, join them, check that they fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoTokenizer

from ..errors import ConfigError
from ..inputs.conversation import IMAGE
from ..mechanisms import configured_connector, configured_mechanism
from .configuration import load_decoder_config, refuse_experts
from .folders import naming
from .modeling import EEMLLM
from .pretrained import load_pretrained, quantized
from .processor import Processor
from .vision import VisionEncoder, get_vision_encoder

if TYPE_CHECKING:
    from ..config.keys import ModelConfig


def build_processor(config: ModelConfig) -> tuple[Processor, VisionEncoder]:
    """The processor (tokenizer, template, image transform) and the vision encoder, whose transform it is, before the connector of the
    configuration; no decoder is loaded."""
    vision = get_vision_encoder(config.vision.encoder).from_path(
        config.vision.path or "",  # an encoder of one's own may need none
        select_layer=config.vision.select_layer,
        policy=config.vision.policy,
        **({} if config.vision.max_tokens is None else {"max_tokens": config.vision.max_tokens}),
    )
    vision.transform = vision.transform.with_reduction(configured_connector(config.connector))
    path = config.tokenizer or config.decoder
    tokenizer = load_pretrained(AutoTokenizer, path, "model.tokenizer")
    with naming("model.tokenizer", "Processor", path):
        image = getattr(tokenizer, "image_token", None) or IMAGE
        tokenizer.add_tokens([AddedToken(image, special=True)])  # no effect if it has that token
        image_token_id = tokenizer.convert_tokens_to_ids(image)
        tokenizer("what a broken one fails at")
        return Processor(tokenizer, config.template, vision.transform, image_token_id), vision


def build(config: ModelConfig, decoder: Mapping[str, Tensor] | None = None) -> tuple[EEMLLM, Processor]:
    """Load decoder, encoder and tokenizer and join them. Seed torch before: the projector is randomly initialised.

    Args:
        config: of the model.
        decoder: all weights of the decoder; those in float32 are not copied. None or empty = those in its folder.
    """
    text_config, _ = load_decoder_config(config.decoder)
    refuse_experts(config, text_config)
    mechanism = configured_mechanism(config.mechanism, text_config.num_hidden_layers)
    processor, vision = build_processor(config)
    how = quantized(config.quantization, getattr(torch, config.dtype)) if config.quantization else None
    parts = config.decoder, config.vision.encoder, vision, mechanism, processor.image_token_id
    model = EEMLLM.from_parts(*parts, how, decoder, configured_connector(config.connector))
    if config.quantization is not None:
        from ..compat.peft import keep_packing

        keep_packing(model.language_model)
    if config.liger:
        model.use_liger()
    known = model.config.text_config.vocab_size
    beyond = [
        text for text, i in processor.tokenizer.get_vocab().items() if i >= known and i != processor.image_token_id
    ]
    if beyond:
        raise ConfigError(
            f"model.tokenizer: {len(beyond)} of its tokens, such as {beyond[0]!r}, lie past the {known} of the decoder's "
            "vocabulary; use the decoder's own tokenizer"
        )
    model.generation_config.eos_token_id = processor.template.stop_ids
    model.generation_config.pad_token_id = processor.template.stop_ids[0]
    return model, processor


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """16 hexadecimal digits of names, shapes and a sample of every tensor's values: are these the same base weights?"""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().flatten()
        values = flat[:: max(1, flat.numel() // 64)].float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]
