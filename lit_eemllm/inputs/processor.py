"""Conversations and images to the inputs of `EEMLLM.generate`, and answers back to text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..layout import join_images, upload
from .chat import IMAGE_SLOT, ChatTemplate, Conversation, get_template
from .images import Transform


class Processor:
    """Tokenizer, chat template and image transform of a model, kept together.

    Args:
        tokenizer: a fast tokenizer.
        template: name of the chat template.
        transform: image to pixels.
        image_token_id: stands for a visual token in the ids.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, transform: Transform, image_token_id: int
    ) -> None:
        self.tokenizer, self.transform, self.image_token_id = tokenizer, transform, image_token_id
        self.template: ChatTemplate = get_template(template, tokenizer)

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the vocabulary: do the same ids mean the same text?"""
        return sha256(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()).hexdigest()[:16]

    def prompts(
        self,
        conversations: Sequence[Conversation],
        images: Sequence[Sequence[Image]],
        device: torch.device | str = "cpu",
    ) -> dict[str, Any]:
        """Left-padded prompts up to where the model speaks: input_ids, attention_mask and, if there is any image,
        pixel_values, with image_sizes where images have many.

        Args:
            conversations: a trailing answer, if any, is left out.
            images: those of each conversation, in order.
            device: where the ids go. Pixels stay on the CPU, and the model sends those that it has not seen.
        """
        rows: list[list[int]] = []
        pixels: list[Tensor] = []
        counted: list[tuple[int, int]] = []
        for conversation, pictures in zip(conversations, images, strict=True):
            sizes = [self.transform.size_among(picture.size, len(pictures)) for picture in pictures]
            encoded = self.template.encode(conversation, generation=True)
            shown = encoded.with_pieces([self.transform.pieces(*size) for size in sizes], self.template.text_ids)
            runs, ids = iter(shown.runs), list[int]()
            for token in shown.ids:
                ids.extend([self.image_token_id] * next(runs) if token == IMAGE_SLOT else [token])
            rows.append(ids)
            pixels.extend(map(self.transform, pictures, sizes))
            counted += sizes
        longest = max(map(len, rows))
        inputs: dict[str, Any] = {
            name: upload(torch.tensor(values), torch.device(device))
            for name, values in (
                ("input_ids", [[0] * (longest - len(ids)) + ids for ids in rows]),
                ("attention_mask", [[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows]),
            )
        }
        if pixels:
            inputs["pixel_values"] = join_images(pixels)
            if not self.transform.fixed:
                inputs["image_sizes"] = counted
        return inputs

    def answers(self, ids_BL: Tensor, prompt_length: int) -> list[str]:
        """Text of the generated ids behind the prompt, up to the first id that ends a turn."""
        texts = []
        for row in ids_BL[:, prompt_length:].tolist():
            end = next((i for i, token in enumerate(row) if token in self.template.stop_ids), len(row))
            text = self.tokenizer.decode(row[:end], skip_special_tokens=True).strip()
            texts.append(text.removeprefix(self.template.lead).strip())
        return texts
