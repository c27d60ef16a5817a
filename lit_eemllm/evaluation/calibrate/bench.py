"""What calibration measures on: a run's model, conversations of its validation data, and what a prompt of theirs costs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import TYPE_CHECKING, Any

from ...console import console, progress
from ...core.select import ALL
from ...core.table import LayerPlan
from ...cost.formulas import prefill_flops
from ...data.module import ShardDataModule
from ...data.packing import collate, plan_packs
from ...data.recipe import Recipe
from ...data.samples import EncodedSample, SampleEncoder, TokenSample
from ...data.shards import read_shard
from ...doctor import provenance
from ...errors import ConfigError, SampleError, UserError
from ...inputs.spans import IMAGE_SLOT
from ...layout import PackedBatch
from ...mechanisms import Mechanism
from ..run import load

if TYPE_CHECKING:
    from ...config.keys import Config
    from ...model import EEMLLM


@dataclass(frozen=True)
class Bench:
    """A model, and the conversations on which it is compared with itself under other mechanisms.

    Attributes:
        model: in evaluation mode.
        packs: the conversations, on its device.
        text, visual: tokens of their mean prompt, for which FLOPs are counted.
        about: where the numbers come from, for the files.
    """

    model: EEMLLM
    packs: Sequence[PackedBatch]
    text: int
    visual: int
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> Mechanism:
        return self.model.mechanism

    @property
    def depth(self) -> int:
        return len(self.model.language_model.model.layers)

    def flops(self, mechanism: Mechanism, visual: int | None = None) -> int:
        """Of the decoder's layers, as the program computes, for the mean prompt or its text with so many visual tokens."""
        decoder, visual = self.model.config.text_config, self.visual if visual is None else visual
        vision, connector = self.model.vision, self.model.connector
        connected: dict[str, Any] = {"connector": connector, "view": vision.transform.largest_view}
        return prefill_flops(mechanism, decoder, self.text, visual, vision_width=vision.hidden_size, **connected)

    @contextmanager
    def under(self, mechanism: Mechanism) -> Iterator[None]:
        """The model under another mechanism, and then as it was."""
        base = self.base
        self.model.set_mechanism(mechanism)
        try:
            yield
        finally:
            self.model.set_mechanism(base)


def prepare(
    config: Config, checkpoint: str | None, samples: int, refuse: Callable[[Mechanism, int], None] | None = None
) -> Bench:
    """Load a run's model and draw conversations with images.

    Args:
        config: of the run.
        checkpoint: a file; None takes the run's newest; "none" the untrained parts.
        samples: conversations, drawn from ``data.val`` with the seed.
        refuse: raises for a mechanism, in a decoder of so many layers, that is not what is measured; None = `refuse_modules`.

    Raises:
        UserError: the data or the model cannot be used.
    """
    if samples < 1:
        raise UserError(f"--samples {samples}: expected 1 or more")
    c = config.data
    recipe = ShardDataModule(c, config.seed).recipe("val")  # what is wrong with it is said before the model is built
    model, processor, source = load(config, checkpoint)
    (refuse or refuse_modules)(model.mechanism, len(model.language_model.model.layers))
    encoder = SampleEncoder(processor.template, model.vision.transform, c.max_length, c.truncation, c.max_image_pixels)
    drawn, skipped = draw_samples(recipe, encoder, samples, config.seed)
    plan = plan_packs([sample.tokens.length for sample in drawn], c.pack_tokens, c.pack_samples)
    packs = [collate([drawn[i] for i in pack]).to(model.device) for pack in plan]
    bench = Bench(model, packs, *mean_prompt([sample.tokens for sample in drawn]))
    tokens = sum(pack.num_targets for pack in packs)
    console.print(
        f"{source}; attention {model.backend.name}; {len(drawn)} conversations with images of {c.val}, {tokens} tokens; "
        f"their mean prompt: {bench.text:,} text and {bench.visual:,} visual tokens"
    )
    about = {
        "checkpoint": source,
        "data": c.val,
        "samples": len(drawn),
        "tokens": tokens,
        "seed": config.seed,
        "skipped": dict(skipped),
        "prompt": {"text": bench.text, "visual": bench.visual},
        "base_flops": bench.flops(bench.base),
        "text_flops": bench.flops(bench.base, visual=0),
        "base": bench.base.to_dict(),
        "made": provenance(),
    }
    return replace(bench, about=about)


def refuse_base(base: Mechanism, depth: int) -> None:
    """Raises ConfigError unless visual tokens query in every layer (in the last one it makes no difference), and the same modules do
    for other tables."""
    *rows, last = base.table(depth)
    sparse = [layer for layer, row in enumerate(rows) if not row.dense or row != LayerPlan(attend=row.attend)]
    found = ""
    if sparse:
        found = f"layers {sparse} of {depth} are not dense"
    elif last.seen != ALL:
        found = f"in layer {depth - 1} text sees {last.seen} of an image"
    if found:
        raise ConfigError(
            f"model.mechanism: {found}, but --target compares the weights of a model in which visual tokens query in every layer with "
            "themselves under other tables. Name a run of model.mechanism.preset=llava, or one whose weights were trained like that; "
            "single operators (--budget, --beside) can be cut in others too."
        )
    refuse_modules(base, depth)


def refuse_modules(base: Mechanism, depth: int) -> None:
    """Raises ConfigError unless the same modules do for other tables."""
    if replace(base, rows=(*base.rows, ("0-", (("seen", "none"),)))).modules != base.modules:
        raise ConfigError(
            f"model.mechanism: other rows of {base.name} need other modules, but calibrate compares a model's weights with themselves "
            "under other tables. Name a run whose modules do not depend on its table, such as one of llava or ee_mllm."
        )


def draw_samples(
    recipe: Recipe, encoder: SampleEncoder, samples: int, seed: int
) -> tuple[list[EncodedSample], Counter[str]]:
    """Conversations with images drawn evenly from all of the data; and the unusable, by reason.

    Raises:
        UserError: none is usable.
    """
    generator, seen = random.Random(seed), 0
    drawn: list[tuple[str, dict[str, bytes]]] = []
    shards = (source.folder / name for source in recipe.sources for name, _ in source.shards)
    with progress("reading", recipe.num_samples) as advance:
        for key, members in (sample for shard in shards for sample in read_shard(shard)):
            advance(1)
            if set(members) == {"json"}:
                continue
            seen += 1
            if len(drawn) < samples:
                drawn.append((key, members))
            elif (slot := generator.randrange(seen)) < samples:  # reservoir sampling: all are equally likely to stay
                drawn[slot] = key, members
    encoded: list[EncodedSample] = []
    skipped = Counter[str]()
    for key, members in drawn:
        try:
            encoded.append(encoder.load_pixels(encoder.tokenize(key, members)))
        except SampleError as error:
            skipped[error.reason] += 1
    encoded = [sample for sample in encoded if sample.pixels]  # truncation may leave none
    if not encoded:
        reasons = ", ".join(f"{reason} {n}" for reason, n in skipped.items()) or "it has no conversation with an image"
        raise UserError(f"{recipe.path}: nothing to calibrate with: {reasons}")
    return encoded, skipped


def mean_prompt(samples: Sequence[TokenSample]) -> tuple[int, int]:
    """Text and visual tokens of the mean prompt, rounded. A prompt is what stands before the first answer after the last image."""
    texts = list[int]()
    for sample in samples:
        last = max(i for i, entry in enumerate(sample.ids) if entry == IMAGE_SLOT)
        end = next((target for target in sample.targets() if target > last), len(sample.ids))
        texts.append(end - len(sample.image_tokens))
    return round(mean(texts)), round(mean(sum(sample.image_tokens) for sample in samples))
