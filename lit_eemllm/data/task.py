"""What Energon runs in its worker processes: our sample encoder, with bad samples counted, and our packing.

Energon's own ways are not kept: its decoder unpickles (`decoder = None`), and its error handler swallows any exception a
hundred times in a row (`reraise_exception`, see loader.py). Here a `SampleError` is a skip, counted and named, and everything
else is a mistake in the program and ends the run.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar

from megatron.energon import Cooker, CrudeSample, SavableDataset, SkipSample, TaskEncoder, WorkerConfig, stateless
from torch import Tensor

from lit_eemllm.compat.energon import Packing
from lit_eemllm.data.packing import balance_packs, collate, emptiest, plan_packs
from lit_eemllm.data.samples import EncodedSample, SampleEncoder, TokenSample
from lit_eemllm.data.sending import received, sent
from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.layout import PackedBatch

NAMED_PER_REASON = 3
"""Skipped samples of one reason that a worker names in its log; the others are only counted."""

_log = logging.getLogger("lit_eemllm.data")
_T = TypeVar("_T")


@dataclass
class RawSample:
    """The members of a sample by extension, unread, and where they come from."""

    key: str
    origin: str
    folder: str
    members: dict[str, bytes]
    __restore_key__: tuple


@dataclass
class Packed:
    """What a worker sends: a batch, and what happened to samples since its previous batch.

    Counting increments, not totals, makes the sum over delivered batches right after a resume, when a worker re-reads some.
    """

    batch: PackedBatch
    skipped: Counter[str]
    truncated: int
    samples: Counter[str] = field(default_factory=Counter)  # in the batch, by source
    tokens: Counter[str] = field(default_factory=Counter)  # of those samples, visual tokens counted

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, sent([getattr(self, field.name) for field in fields(self)])

    def pin_memory(self) -> Packed:
        return replace(self, batch=self.batch.pin_memory())


def _unpacked(content: bytes, block: Tensor) -> Packed:
    return Packed(*received(content, block))


class BadSamples:
    """Turns `SampleError` into a counted skip, and too many of them in a row into the end of the run.

    Args:
        counts: shared by the stages of a worker; emptied with every batch.
        most_in_a_row: consecutive failures of one source at this stage that stop the run, however good the others are.
    """

    def __init__(self, counts: Counter[str], most_in_a_row: int) -> None:
        self.counts = counts
        self.most_in_a_row = most_in_a_row
        self.in_a_row: Counter[str] = Counter()  # by source
        self.named: Counter[str] = Counter()
        self.last: dict[str, deque[str]] = {}  # by source

    def attempt(self, source: str, origin: str, function: Callable[[], _T]) -> _T:
        """`function()`, or `SkipSample` where it raises `SampleError`."""
        try:
            result = function()
        except SampleError as error:
            self._count(source, f"{origin}: {error.message} [{error.reason}]", error.reason)
            raise SkipSample from error
        self.in_a_row[source] = 0
        return result

    def _count(self, source: str, text: str, reason: str) -> None:
        self.counts[reason] += 1
        self.named[reason] += 1
        last = self.last.setdefault(source, deque(maxlen=3))
        last.append(text)
        self.in_a_row[source] += 1
        if self.named[reason] <= NAMED_PER_REASON:
            more = "; more of these are only counted" if self.named[reason] == NAMED_PER_REASON else ""
            _log.warning("skipped a sample: %s%s", text, more)
        if self.in_a_row[source] >= self.most_in_a_row:
            raise UserError(
                f"{self.in_a_row[source]} samples in a row{f' of {source}' * bool(source)} could not be used "
                f"(data.max_bad_in_a_row={self.most_in_a_row}). The last:\n"
                + "\n".join(f"  {line}" for line in last)
                + "\nCheck the data with: lit-eemllm shards check"
            )


class PackTask(TaskEncoder):
    """Bytes to packs.

    Args:
        encoder: bytes to tokens and pixels.
        pack_tokens: budget of a pack, visual tokens counted.
        pack_samples: most conversations in a pack; None = as many as fit.
        max_bad_in_a_row: consecutive unusable samples, per worker, that stop the run.
        names: of sources by folder, under which samples are counted (`Recipe.names`).
        flops: of a training step with a conversation of so many text and visual tokens: packs cost the same, as far as they can.
    """

    decoder = None

    def __init__(
        self,
        encoder: SampleEncoder,
        pack_tokens: int,
        pack_samples: int | None,
        max_bad_in_a_row: int,
        names: Mapping[str, str],
        flops: Callable[[int, int], float] | None = None,
    ) -> None:
        self.encoder = encoder
        self.flops = flops
        self.names = names
        self.pack_tokens = pack_tokens
        self.pack_samples = pack_samples
        self.skipped: Counter[str] = Counter()
        self.truncated = 0
        self._reading = BadSamples(self.skipped, max_bad_in_a_row)
        self._decoding = BadSamples(self.skipped, max_bad_in_a_row)  # runs long after reading: counts its own row
        self.cookers = [Cooker(_cook)]

    @stateless
    def preencode_sample(self, sample: RawSample) -> TokenSample:
        source = self.names.get(sample.folder, sample.folder)
        read = partial(self.encoder.tokenize, sample.key, sample.members)
        tokens = self._reading.attempt(source, sample.origin, read)
        return replace(tokens, source=source, __restore_key__=sample.__restore_key__)

    def select_samples_to_pack(self, samples: list[TokenSample]) -> list[list[TokenSample]]:
        lengths, limits = [sample.length for sample in samples], (self.pack_tokens, self.pack_samples)
        if self.flops is None:
            packs = plan_packs(lengths, *limits)
        else:
            flops = [self.flops(sample.text, sum(sample.image_tokens)) for sample in samples]
            packs = balance_packs(lengths, flops, *limits)
        return [[samples[index] for index in pack] for pack in packs]

    @stateless
    def postencode_sample(self, sample: TokenSample) -> EncodedSample:
        encoded = self._decoding.attempt(sample.source, "decoding", partial(self.encoder.load_pixels, sample))
        self.truncated += sample.truncated
        return encoded

    @stateless
    def pack_selected_samples(self, samples: list[EncodedSample]) -> Packed:
        if not samples:
            raise SkipSample  # all of them turned out to be bad, and are counted
        packed = Packed(collate(samples), Counter(self.skipped), self.truncated)
        for tokens in (sample.tokens for sample in samples):
            packed.samples[tokens.source] += 1
            packed.tokens[tokens.source] += tokens.length
        self.skipped.clear()
        self.truncated = 0
        return packed

    def build_batch(
        self, dataset: SavableDataset, *, packing_buffer_size: int, worker_config: WorkerConfig, **_: Any
    ) -> SavableDataset:
        return _Packing(
            dataset,
            buffer_size=packing_buffer_size,
            pre_packer=self.select_samples_to_pack,
            final_packer=self.pack_selected_samples,
            final_packer_stateless=True,
            sample_encoder=self.postencode_sample,
            sample_encoder_stateless=True,
            worker_config=worker_config,
        )


class _Packing(Packing):
    """Energon's packing, whose last pack of every round is not sent off half empty: its samples wait for the next round.

    At the end of finite data nothing waits.
    """

    def __init__(
        self, dataset: SavableDataset, *, pre_packer: Callable[[list[TokenSample]], list[list[TokenSample]]], **kw: Any
    ):
        self._plan = pre_packer
        super().__init__(dataset, pre_packer=self._choose, **kw)

    def _choose(self, samples: list[TokenSample]) -> list[list[TokenSample]]:
        packs = self._plan(samples)
        waits = emptiest([[sample.length for sample in pack] for pack in packs])
        if len(samples) >= self.buffer_size and waits is not None:
            self.hold_back(packs.pop(waits))
        return packs


@stateless
def _cook(sample: CrudeSample) -> RawSample:
    source = sample["__sources__"][0]
    return RawSample(
        key=sample["__key__"],
        origin=f"{source.dataset_path.name}/{source.shard_name}",
        folder=str(source.dataset_path),
        members={name: data for name, data in sample.items() if not name.startswith("__")},
        __restore_key__=sample["__restore_key__"],
    )
