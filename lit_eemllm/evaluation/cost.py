"""What a run's prompts cost: FLOPs from shapes, prefill time and cache size as measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from ..compat.transformers import CACHE
from ..cost.formulas import prefill_flops
from ..inputs.images import open_image
from .questions import Question

if TYPE_CHECKING:
    from ..config.keys import Config
    from ..model import EEMLLM, Processor

PROMPTS, REPEATS = 32, 5  # prompts of the measured batch; times it is computed


@torch.inference_mode()
def costs(model: EEMLLM, processor: Processor, questions: Sequence[Question], config: Config) -> dict[str, Any]:
    """Mean FLOPs of a prompt's prefill in the decoder, median prefill time and cache bytes a prompt, encoder included.

    Args:
        questions: all of them for the FLOPs (every n-th of many); the first 32 that can be opened are measured.
    """
    transform, most = model.vision.transform, config.data.max_image_pixels
    lengths = []
    for question in questions[:: max(1, len(questions) // 500)]:
        encoded = processor.template.encode(question.conversation, generation=True)
        sizes = [transform.size_among(picture.size, len(question.pictures)) for picture in question.pictures]
        shown = encoded.with_pieces([transform.pieces(*size) for size in sizes], processor.template.text_ids)
        lengths.append((len(shown.ids) - len(shown.runs), sum(shown.runs)))
    flops = [flops_of(model, *each) for each in lengths]

    some = questions[:PROMPTS]
    opened = [[open_image(x, q.conversation.key, most) for x in q.images] for q in some]
    inputs = processor.prompts([question.conversation for question in some], opened, model.device)
    cache, seconds = model.image_cache, []
    model.image_cache = None  # the first time an image is seen
    try:
        for _ in range(REPEATS):
            synchronize(model.device)
            start = time.perf_counter()
            filled = model(**inputs, use_cache=True, logits_to_keep=1)[CACHE]
            synchronize(model.device)
            seconds.append(time.perf_counter() - start)
    finally:
        model.image_cache = cache
    return {
        "prefill_flops": sum(flops) / len(flops),
        "prefill_seconds": median(seconds) / len(some),
        "cache_bytes": filled.num_bytes / len(some),
        "prompt_text_tokens": sum(text for text, _ in lengths) / len(lengths),
        "prompt_visual_tokens": sum(visual for _, visual in lengths) / len(lengths),
    }


def flops_of(model: EEMLLM, text: int, visual: int) -> int:
    """FLOPs of a prompt's prefill in the decoder, its images seen for the first time. text, visual: its tokens."""
    decoder, width, view = model.config.text_config, model.vision.hidden_size, model.vision.transform.largest_view
    made = model.connector
    return prefill_flops(model.mechanism, decoder, text, visual, vision_width=width, connector=made, view=view)


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of a GPU, to time it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
