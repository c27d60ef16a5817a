"""How many packs one pass over the training data has: all samples are turned into tokens once, to learn their lengths.

The lengths are kept beside the shards, 4 bytes each, under a name that stands for what the shards hold and for all that decides how
many tokens a sample has. Which samples share a pack is decided while training shuffles; packed here in one fixed random order by
the same rule they make as many packs, up to a few in a thousand, and every start counts the same. (With ``data.pack_by=flops`` there are
about one in a hundred more.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lit_eemllm.console import progress, write_atomically
from lit_eemllm.data.contents import contents
from lit_eemllm.data.packing import emptiest, plan_packs
from lit_eemllm.data.recipe import META, Recipe, Source
from lit_eemllm.data.samples import SampleEncoder
from lit_eemllm.data.shards import read_shard
from lit_eemllm.errors import SampleError, UserError, WriteError

if TYPE_CHECKING:
    from lit_eemllm.config.keys import DataConfig

PREFIX = "tokens-"
_STORED = "<i4"
_log = logging.getLogger("lit_eemllm.data")


def epoch_packs(recipe: Recipe, encoder: SampleEncoder, config: DataConfig, count: bool) -> int | None:
    """Packs of one pass: of so many passes over each source by repetitions; by weights, of as many samples as all sources have
    together, of each source by its weight and evenly spread over it. Samples that cannot be used do not count.

    Args:
        recipe: the training data.
        encoder: as in training.
        config: says how packs are made.
        count: read samples whose lengths are not known, which takes minutes for a million; else there is None in that case.

    Raises:
        UserError: no sample can be used, a shard cannot be read, or a sample is too long where that is an error.
    """
    known: dict[Source, np.ndarray] = {}
    for source in recipe.sources:
        if (lengths := _known(source, encoder)) is not None:
            known[source] = lengths
        elif not count:
            return None
    if unknown := [source for source in recipe.sources if source not in known]:
        many = sum(source.num_samples for source in unknown)
        _log.info(f"counting the tokens of {many:,} samples, once: their lengths are kept beside the shards")
        with progress("counting tokens of samples", many) as advance:
            for source in unknown:
                known[source] = _measured(source, encoder, advance)
                _keep(source, encoder, known[source])
    taken = [(source, known[source]) for source in recipe.sources if len(known[source])]
    if not taken:
        raise UserError(f"{recipe.path}: no sample can be used. Try: lit-eemllm shards check {recipe.path} CONFIG")
    total, shares = sum(len(lengths) for _, lengths in taken), sum(source.share for source, _ in taken)
    drawn: list[int] = []
    for source, lengths in taken:
        many = round(total * source.share / shares) if recipe.blend == "weight" else len(lengths) * int(source.share)
        drawn += lengths[np.arange(many) * len(lengths) // many].tolist()
    random.Random(0).shuffle(drawn)
    return count_packs(drawn, config.pack_tokens, config.pack_samples, config.packing_buffer)


def count_packs(lengths: list[int], budget: int, most: int | None, buffer: int) -> int:
    """Packs that a loader process makes of conversations that come in this order, of `buffer` at a time."""
    packs, waiting, start = 0, list[int](), 0
    while waiting or start < len(lengths):
        more = buffer - len(waiting)
        held, start = waiting + lengths[start : start + more], start + more
        plans = [[held[index] for index in pack] for pack in plan_packs(held, budget, most)]
        waits = emptiest(plans) if start < len(lengths) else None
        waiting = [] if waits is None else plans.pop(waits)
        packs += len(plans)
    return packs


def _file(source: Source, encoder: SampleEncoder) -> Path:
    """Where the lengths of a source's usable samples are kept."""
    identity = json.dumps([contents(source), encoder.identity()], sort_keys=True)
    return source.folder / META / f"{PREFIX}{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _known(source: Source, encoder: SampleEncoder) -> np.ndarray | None:
    """None: not measured yet, or the file is not as it was written."""
    if not any((source.folder / META).glob(f"{PREFIX}*")):
        return None
    file = _file(source, encoder)
    if not file.is_file() or file.stat().st_size % 4 or file.stat().st_size > 4 * source.num_samples:
        return None
    lengths = np.frombuffer(file.read_bytes(), _STORED)
    return lengths if ((lengths > 0) & (lengths <= encoder.max_length)).all() else None


def _measured(source: Source, encoder: SampleEncoder, advance: Callable[[int], None]) -> np.ndarray:
    lengths = []
    for name, _ in source.shards:
        for key, members in read_shard(source.folder / name):
            with contextlib.suppress(SampleError):  # training skips, counts and names it
                lengths.append(encoder.tokenize(key, members).length)
            advance(1)
    return np.array(lengths, _STORED)


def _keep(source: Source, encoder: SampleEncoder, lengths: np.ndarray) -> None:
    try:
        write_atomically(_file(source, encoder), lengths.tobytes())
    except WriteError as error:  # data that belong to others, perhaps: it is counted again next time
        _log.warning(f"the lengths are counted again next time: {error}")
