"""`ShardDataModule`: the data room's door to Lightning. Endless training packs with exact resume, finite validation packs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule

from lit_eemllm.compat.lightning import packs
from lit_eemllm.config import flat
from lit_eemllm.data import state as loader_state
from lit_eemllm.data.check import look, warn_of_unread
from lit_eemllm.data.contents import contents
from lit_eemllm.data.epoch import epoch_packs
from lit_eemllm.data.loader import (
    EndlessLoader,
    FiniteLoader,
    Position,
    PositionLoader,
    collective_device,
    train_dataset,
    worker_config,
)
from lit_eemllm.data.recipe import Recipe, read_recipe
from lit_eemllm.data.samples import SampleEncoder
from lit_eemllm.data.task import PackTask
from lit_eemllm.errors import CheckpointError, ConfigError, UserError
from lit_eemllm.layout import PackedBatch

if TYPE_CHECKING:
    from lit_eemllm.config.keys import DataConfig
    from lit_eemllm.inputs.chat import ChatTemplate
    from lit_eemllm.inputs.images import Transform

_SHAPING = ("workers", "shuffle_buffer", "packing_buffer", "pack_tokens", "pack_samples", "pack_by")
_EARLIER = {"data.pack_by": "tokens"}  # what earlier versions did without saying so
_TOTALS = ("offset", "batches", "skipped", "truncated")
_NO_POSITION = "The checkpoint holds no loader position that this version can read."
_COUNTS = ("skipped", "samples", "tokens")  # Counters
_SIZES = ("ranks", "data.workers")


class ShardDataModule(LightningDataModule):
    """Yields `PackedBatch`.

    A checkpoint holds, as plain JSON, the position of every rank after the last batch it trained on; a run continued from it
    sees the batches an unbroken run would have seen. All that decides a batch must be as it was: what the shards hold, template,
    tokenizer and image transform, keys of the configuration; and as many ranks and workers, or as many workers in all (`_deal`).
    What differs is named.

    It learns what is trained on by its hook `on_before_batch_transfer`, which a LightningModule must not override. Do not touch
    `trainer.estimated_stepping_batches`: it builds the loader, perhaps before Lightning has restored anything.

    Args:
        config: section `data` of the configuration.
        seed: of all shuffling and blending.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self._encoder: SampleEncoder | None = None
        self._flops: Callable[[int, int], float] | None = None
        self._loader: EndlessLoader | None = None
        self._saved: dict[str, Any] = {}  # where to start from, or where the last fit ended
        self._shape: dict[str, Any] = {}  # of the loader
        self._done = self._in_hand = self._final = Position([], 0)
        self._asked: dict[str, float] = {}  # `Recipe.shares`

    def connect(
        self, template: ChatTemplate, transform: Transform, flops: Callable[[int, int], float] | None = None
    ) -> None:
        """Tell how text and images become tokens, which is known once the model is. Call before the trainer starts.

        flops: of a training step with a conversation of so many text and visual tokens, by which training packs are made even
            (``data.pack_by=flops``). Loader processes get it, so it must pickle. None: packs are made by tokens alone.
        """
        c = self.config
        self._encoder = SampleEncoder(template, transform, c.max_length, c.truncation, c.max_image_pixels)
        self._flops = flops

    def setup(self, stage: str) -> None:
        """Read the recipes, the first sample of each source, and for validation one that this rank can use, so that what is wrong is
        said before anything expensive is built. A collective call where there are several ranks."""
        for split in ["train"] * (stage == "fit") + ["val"] * (self.config.val is not None):
            recipe = self.recipe(split) if split == "train" else self._for_every_rank()
            if self._encoder is None:
                continue
            look(recipe, self._encoder, self.config.max_bad_in_a_row)
            if self.trainer is None or self.trainer.local_rank == 0:  # once per node
                warn_of_unread(recipe)
            if stage == "fit" and split == "val":
                with closing(iter(self._validation(recipe, packing_buffer=1))) as batches:
                    next(batches)

    def recipe(self, split: str) -> Recipe:
        """The checked recipe of split "train" or "val". Raises UserError."""
        path = {"train": self.config.train, "val": self.config.val}[split]
        if path is None:
            raise ConfigError(f"data.{split} is not set: name a recipe or a folder of prepared shards")
        return read_recipe(path, split)

    def _for_every_rank(self) -> Recipe:
        """The validation data. Raises UserError where there are more ranks than samples."""
        recipe, ranks = self.recipe("val"), worker_config(0, self.seed).world_size
        if recipe.num_samples < ranks:
            found = f"{recipe.path}: {recipe.num_samples} validation samples cannot feed {ranks} ranks"
            raise UserError(f"{found}. Add data, or train on fewer devices.")
        return recipe

    def packs(self, count: bool) -> int | None:
        """Packs of a pass over the training data: see `epoch_packs`. Call after `connect`."""
        return epoch_packs(self.recipe("train"), self._connected, self.config, count)

    @property
    def skipped(self) -> dict[str, int]:
        """Unusable training samples by reason, since the run began, on this rank, up to the batch handed out last."""
        return dict(self._handed_out().skipped)

    @property
    def truncated(self) -> int:
        """Training conversations that were shortened; as `skipped`."""
        return self._handed_out().truncated

    def drawn(self) -> dict[str, tuple[float, float, float]]:
        """By source of a blend: the share of samples that the recipe asks for, and those of samples and of tokens trained on,
        since the run began, on all ranks. Empty for a single source. A sample that is skipped does not count.

        A collective call where there are several ranks.
        """
        if len(self._asked) < 2:
            return {}
        position = self._trained_on()
        counts = torch.tensor(
            [[position.samples[name], position.tokens[name]] for name in self._asked], dtype=torch.float64
        )
        if dist.is_available() and dist.is_initialized():
            counts = counts.to(collective_device())
            dist.all_reduce(counts)
        shares = (counts / counts.sum(0).clamp(min=1)).tolist()
        return {name: (asked, *shares[i]) for i, (name, asked) in enumerate(self._asked.items())}

    def train_dataloader(self) -> Iterable[PackedBatch]:
        c, workers, recipe = self.config, worker_config(self.config.workers, self.seed), self.recipe("train")
        task = self.task(recipe.names, self._flops)
        dataset = train_dataset(recipe, task, workers, c.shuffle_buffer, c.packing_buffer)
        loader, self._asked = PositionLoader(dataset, c.timeout), recipe.shares
        start = Position(*loader.counters)
        self._shape = self._describe()
        if self._saved:
            self._refuse_changes(self._shape)
            try:
                mine = self._saved["ranks"][workers.rank]
                loader.restore(loader_state.loads(mine["loader"]))
                counts = {key: Counter(mine.get(key, {})) for key in _COUNTS}  # earlier versions: of skipped only
                start = Position(*loader.counters, **{**{key: mine[key] for key in _TOTALS}, **counts})
                numbers = [
                    start.offset,
                    start.batches,
                    start.truncated,
                    *(n for count in counts.values() for n in count.values()),
                ]
                if not all(isinstance(number, int) for number in numbers):  # used later, with the first pack
                    raise TypeError("counts that are no numbers")
            except (LookupError, AttributeError, OverflowError, TypeError, ValueError) as error:
                raise CheckpointError(_NO_POSITION) from error
        self._loader = EndlessLoader(loader, start, trained=self.trainer is not None)
        self._done = self._in_hand = self._loader.last
        return self._loader

    def val_dataloader(self) -> Iterable[PackedBatch]:
        if self.config.val is None:
            return []
        return self._validation(self._for_every_rank(), self.config.packing_buffer)

    def _validation(self, recipe: Recipe, packing_buffer: int) -> FiniteLoader:
        workers = min(self.config.workers, recipe.num_samples // worker_config(0, self.seed).world_size)
        return FiniteLoader(recipe, self.task(), worker_config(workers, self.seed), packing_buffer, self.config.timeout)

    def on_before_batch_transfer(self, batch: PackedBatch, dataloader_idx: int) -> PackedBatch:
        """The trainer takes a batch in hand, which it may have fetched earlier; so it is done with the one before."""
        if self._loader is not None and self.trainer is not None and self.trainer.training:
            self._done, self._in_hand = self._in_hand, self._loader.taken(batch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch trained on, of all ranks: text, numbers, lists and dicts only.

        A collective call where there are several ranks. Without a trainer: after the last batch handed out.
        """
        if self._loader is None:
            return self._saved
        if self._loader.closed:
            raise UserError("The data loader has failed, its position is lost; continue from an earlier checkpoint.")
        position = self._trained_on()
        mine = {"loader": loader_state.dumps(self._loader.loader.state_at(position))}
        mine |= {key: getattr(position, key) for key in _TOTALS} | {
            key: dict(getattr(position, key)) for key in _COUNTS
        }
        ranks: list[Any] = [mine]
        if dist.is_available() and dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, mine)
        return {"shape": self._shape, "ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._loader is not None:
            raise RuntimeError(
                "The training loader was built before its position was restored, so the run would begin anew. "
                "Something touched trainer.estimated_stepping_batches: use optim.steps instead."
            )
        try:
            self._saved = state_dict = {**state_dict, "shape": _EARLIER | state_dict["shape"]}
            now = self._describe()
            self._refuse_changes(now)
            if not all(set(_TOTALS) < set(rank) for rank in state_dict["ranks"]):
                raise ValueError("keys are missing")
            if state_dict["shape"] != now:
                self._saved = {"shape": now, "ranks": _deal(state_dict["ranks"], now["ranks"])}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(_NO_POSITION) from error

    def teardown(self, stage: str) -> None:
        """End the loader's processes. The position is kept, for a checkpoint saved after `fit` and for another `fit`."""
        if stage == "fit":
            self._finish()

    def on_exception(self, exception: BaseException) -> None:
        """As `teardown`, but with several ranks, of which maybe only this one has failed, there is no position to gather."""
        if self._loader is not None and dist.is_available() and dist.is_initialized():
            self._loader.close()
        try:
            self._finish()
        except UserError:  # a loader process is dead or hangs, as the exception in hand tells
            assert self._loader is not None
            self._loader.close()

    def _finish(self) -> None:
        if self._loader is not None and not self._loader.closed:
            self._saved, self._final = self.state_dict(), self._loader.last
            self._loader.close()
            self._loader = None

    def _handed_out(self) -> Position:
        return self._final if self._loader is None else self._loader.last

    def _trained_on(self) -> Position:
        if self.trainer is None:
            return self._handed_out()
        progress = packs(self.trainer)
        return self._in_hand if progress.processed >= progress.ready else self._done

    def task(
        self, names: Mapping[str, str] | None = None, flops: Callable[[int, int], float] | None = None
    ) -> PackTask:
        # a warning of every forked worker otherwise; a worker has one core to itself anyway
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        c = self.config
        return PackTask(self._connected, c.pack_tokens, c.pack_samples, c.max_bad_in_a_row, names or {}, flops)

    @property
    def _connected(self) -> SampleEncoder:
        if self._encoder is None:
            raise RuntimeError("ShardDataModule.connect(template, transform) must be called before a loader is made")
        return self._encoder

    def _describe(self) -> dict[str, Any]:
        """Everything that decides what is in batch n."""
        return {
            "ranks": worker_config(0, self.seed).world_size,
            "seed": self.seed,
            **{f"data.{key}": getattr(self.config, key) for key in _SHAPING},
            **flat(self._connected.identity()),
            **self._sources,
        }

    @cached_property
    def _sources(self) -> dict[str, list[str]]:
        """The training data, read once, by rank 0 for all: see `contents`. A collective call where there are several ranks."""
        recipe = self.recipe("train")
        found: list[Any] = [None]
        several = dist.is_available() and dist.is_initialized()
        if not several or dist.get_rank() == 0:
            try:
                found = [[contents(source, len(recipe.sources)) for source in recipe.sources]]
            except UserError as error:  # which the others wait to hear
                found = [error]
        if several:
            dist.broadcast_object_list(found)
        if isinstance(found[0], UserError):
            raise found[0]
        return {"data.train": recipe.fingerprint(), "contents of data.train": found[0]}

    def _refuse_changes(self, now: dict[str, Any]) -> None:
        was = self._saved["shape"]
        changed = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        reason = self._cannot_deal(was, now)
        if reason is None:
            changed = [key for key in changed if key not in _SIZES]
        if changed:
            processes = [f"{s.get('ranks')} ranks x {s.get('data.workers')} workers" for s in (was, now)]
            raise CheckpointError(
                "This run cannot continue with the batches it would have seen: "
                + "; ".join(f"{key} was {was.get(key)} and is {now.get(key)}" for key in changed)
                + f". The position was saved by {processes[0]}, this is {processes[1]}{reason or ''}. "
                "Set it back, or begin a new run from the weights (init_from)."
            )

    def _cannot_deal(self, was: dict[str, Any], now: dict[str, Any]) -> str | None:
        """Why the saved positions do not continue the same global batches here, if they do not."""
        if all(was[key] == now[key] for key in _SIZES):
            return None
        ranks, workers = now["ranks"], now["data.workers"]
        if not workers or ranks * workers != was["ranks"] * was["data.workers"]:
            return "; ranks x workers must stay the same, with one worker at least"
        accumulate = workers if self.trainer is None else self.trainer.accumulate_grad_batches
        if accumulate % workers or any(rank["batches"] % was["data.workers"] for rank in self._saved["ranks"]):
            return (
                "; every step must take as many packs of each worker: trainer.accumulate_grad_batches a multiple of "
                f"data.workers, found {accumulate} and {workers}"
            )
        return None


def _deal(saved: list[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
    """The positions of all workers dealt out to another number of ranks, when all have delivered as many batches.

    Energon numbers workers through all ranks and divides the data by that number, so each goes on with its own stream.
    """
    states = [loader_state.loads(rank["loader"]) for rank in saved]
    if any(state is None for state in states):  # the very beginning
        shares = [None] * ranks
    else:
        workers = [worker for state in states for worker in state.worker_states]
        each = len(workers) // ranks
        shares = [replace(states[0], worker_states=workers[r * each : (r + 1) * each]) for r in range(ranks)]
    counts = {key: dict(sum((Counter(rank.get(key, {})) for rank in saved), Counter())) for key in _COUNTS}
    none = {"offset": 0, "truncated": 0, **{key: {} for key in _COUNTS}}
    dealt = [{**none, "loader": loader_state.dumps(share)} for share in shares]
    dealt[0] |= {**counts, "truncated": sum(rank["truncated"] for rank in saved)}
    return [{**rank, "batches": saved[0]["batches"] * len(saved) // ranks} for rank in dealt]
