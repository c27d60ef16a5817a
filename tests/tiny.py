"""Tiny random models and packs shared by the tests."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from lit_eemllm.images import ImageTransform
from lit_eemllm.layout import PackedBatch, Run, SequenceLayout
from lit_eemllm.mechanisms import PRESETS, Mechanism
from lit_eemllm.model import EEMLLM, EEMLLMConfig
from lit_eemllm.model.vision import TransformersVision

VOCAB, TOKENS = 40, 16  # text vocabulary; visual tokens of an image
COMMON = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, max_position_embeddings=256,
    attention_bias=False, initializer_range=0.3, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
DECODERS = {
    "llama": LlamaConfig(**COMMON, num_attention_heads=4, num_key_value_heads=4),
    "llama-gqa": LlamaConfig(**COMMON, num_attention_heads=4, num_key_value_heads=2),
    "mistral": MistralConfig(**COMMON, num_attention_heads=4, num_key_value_heads=2, sliding_window=None),
    "qwen2": Qwen2Config(**COMMON, num_attention_heads=4, num_key_value_heads=2),
    "qwen3": Qwen3Config(**COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=12),
}
TRANSFORM = ImageTransform(height=16, width=16, patch=4, mean=(0.5,) * 3, std=(0.5,) * 3)


def vision(family: str = "clip") -> TransformersVision:
    common = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4)
    if family == "clip":
        return TransformersVision(CLIPVisionModel(CLIPVisionConfig(**common)), TRANSFORM, select_layer=-2)
    model = SiglipVisionModel(SiglipVisionConfig(**common, vision_use_head=False))
    return TransformersVision(model, TRANSFORM, select_layer=-1)


def model(decoder: str = "llama-gqa", mechanism: Mechanism | str = "ee_mllm", encoder: str = "clip", seed: int = 0) -> EEMLLM:
    """A random EEMLLM in float32 on the CPU, attention through the reference."""
    torch.manual_seed(seed)
    tower = vision(encoder)
    config = EEMLLMConfig(
        text_config=DECODERS[decoder],
        vision={"encoder": "transformers", "config": tower.to_config()},
        mechanism=(PRESETS[mechanism] if isinstance(mechanism, str) else mechanism).to_dict(),
        image_token_id=VOCAB,
    )
    result = EEMLLM(config, vision=tower).eval()
    with torch.no_grad():  # random norms and biases: nothing may hide behind ones and zeros
        for name, parameter in result.named_parameters():
            if name.startswith("language_model") and (parameter.ndim == 1):
                parameter.add_(0.2 * torch.randn_like(parameter))
    result.set_attention("reference")
    return result


def pack(documents: list[list[int]], seed: int = 0) -> PackedBatch:
    """A pack from documents of run lengths: a positive number is that much text, 0 an image of TOKENS tokens."""
    generator = torch.Generator().manual_seed(seed)
    layout = SequenceLayout.of([[Run(n == 0, n or TOKENS) for n in doc] for doc in documents])
    ids = torch.randint(3, VOCAB, (layout.num_tokens,), generator=generator)
    row_of = {s: t for t, s in enumerate(layout.text_index.tolist())}
    same_document = layout.positions[1:] > 0
    pairs = [s for s in range(layout.num_tokens - 1) if same_document[s] and s in row_of and s + 1 in row_of]
    images = len(layout.image_lengths)
    return PackedBatch(
        input_ids=ids.index_fill(0, layout.visual_index, 0),
        target_rows=torch.tensor([row_of[s] for s in pairs], dtype=torch.long),
        targets=ids[torch.tensor(pairs, dtype=torch.long) + 1],
        pixel_values=torch.randn(images, 3, 16, 16, generator=generator) if images else None,
        layout=layout,
        keys=[str(i) for i in range(len(documents))],
    )


def max_error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Largest difference relative to the tensor's largest value."""
    return ((found - true).abs().max() / true.abs().max()).item()
