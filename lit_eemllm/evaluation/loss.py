"""The loss on validation data, and its control: the same packs with every image given to another document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.loader import FiniteLoader, worker_config
from ..layout import PackedBatch

if TYPE_CHECKING:
    from ..data.module import ShardDataModule
    from ..model import EEMLLM


def validation_packs(data: ShardDataModule) -> FiniteLoader:
    """All of ``data.val`` on this rank, whatever the number of ranks, so that the packs are those of one process."""
    recipe, config = data.recipe("val"), data.config
    workers = worker_config(min(config.workers, recipe.num_samples), data.seed)
    return FiniteLoader(
        recipe, data.task(), replace(workers, rank=0, world_size=1), config.packing_buffer, config.timeout
    )


@torch.inference_mode()
def losses(model: EEMLLM, packs: Iterable[PackedBatch], most: int) -> dict[str, float | None]:
    """Mean loss per supervised token over the first packs, and with each image given to another document.

    Both numbers are of the same packs: those in which every image can move, see `with_moved_images`.
    """
    found, tokens = list[Tensor](), 0  # on the device, which is not waited for
    for pair in islice(with_moved_images(packs), most):
        found.append(torch.stack([model.packed_loss(batch.to(model.device)) for batch in pair]))
        tokens += pair[0].num_targets
    sums = zip(*torch.stack(found).tolist(), strict=True) if found else ((), ())
    right, wrong = (sum(losses) / tokens if tokens else None for losses in sums)
    return {"loss": right, "loss_shuffled_images": wrong, "loss_tokens": tokens}


def with_moved_images(batches: Iterable[PackedBatch]) -> Iterator[tuple[PackedBatch, PackedBatch]]:
    """Packs, each beside itself with all images moved on until every one stands in another document for another picture, of as many runs.

    Packs in which no such move exists are left out.
    """
    for batch in batches:
        if batch.pixel_values is None:
            continue
        pixels, images = batch.pixel_values, range(len(batch.pixel_values))
        runs = batch.image_runs or [1] * len(pixels)
        left = iter([i for i, document in enumerate(batch.layout.documents) for run in document if run.visual])
        owners = [min(islice(left, n)) for n in runs]
        for turn in images[1:]:
            origin = [(i - turn) % len(images) for i in images]
            away = all(owners[i] != owners[origin[i]] and runs[i] == runs[origin[i]] for i in images)
            if away and not any(pixels[i].equal(pixels[origin[i]]) for i in images):
                yield batch, batch.with_images_moved(origin)
                break
