"""Selections: some of the visual tokens of each image, by their place or by rank.

How many of an image's tokens a selection holds is known from how many there are, whatever they are: so lengths stay on the CPU.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor


class Select(ABC):
    """Some of the visual tokens of each image; its text form (`str`, `parse_select`) is that of a configuration."""

    @abstractmethod
    def count(self, visual: int) -> int:
        """How many of an image's tokens these are."""

    @abstractmethod
    def of_image(self, visual: int) -> Tensor:
        """[visual] bool, True where a token of an image is one of them."""

    def flags(self, lengths: Sequence[int]) -> Tensor:
        """[V] bool, likewise of several images; `lengths` are the visual tokens of each."""
        return torch.cat([torch.zeros(0, dtype=torch.bool), *map(self.of_image, lengths)])

    def __and__(self, other: Select) -> Select:
        """Those that are in both. Raises ValueError if neither holds the other."""
        if other.empty or self in (ALL, other):
            return other
        if self.empty or other == ALL:
            return self
        raise ValueError(f"{self} cannot be combined with {other}, only with all or none")

    @property
    def empty(self) -> bool:
        return False


@dataclass(frozen=True)
class Every(Select):
    """The first token of an image and each n-th after it; 1 = all."""

    n: int

    def __str__(self) -> str:
        return "all" if self.n == 1 else f"every {self.n}"

    def __and__(self, other: Select) -> Select:
        return Every(lcm(self.n, other.n)) if isinstance(other, Every) else super().__and__(other)

    def count(self, visual: int) -> int:
        return -(-visual // self.n)

    def of_image(self, visual: int) -> Tensor:
        return torch.arange(visual) % min(self.n, visual + 1) == 0


@dataclass(frozen=True)
class Nothing(Select):
    """No visual token: before they enter, after they have left, or where text sees none."""

    def __str__(self) -> str:
        return "none"

    def count(self, visual: int) -> int:
        return 0

    def of_image(self, visual: int) -> Tensor:
        return torch.zeros(visual, dtype=torch.bool)

    @property
    def empty(self) -> bool:
        return True


@dataclass(frozen=True)
class Share(Select):
    """A share of an image's tokens whatever they hold: evenly spaced, or drawn once for all images of a length.

    The plain choices that ranking must beat. An image keeps at least one token.

    Args:
        share: that is kept.
        seed: of the draw; None = evenly spaced.
    """

    share: float
    seed: int | None = None

    def __str__(self) -> str:
        share = _written(self.share)
        return f"even {share}" if self.seed is None else f"random {share} seed {self.seed}"

    def count(self, visual: int) -> int:
        return _left(visual, 1 - self.share)

    def of_image(self, visual: int) -> Tensor:
        count, flags = self.count(visual), torch.zeros(visual, dtype=torch.bool)
        if self.seed is None:
            flags[torch.arange(count) * visual // count] = True
        else:
            flags[torch.randperm(visual, generator=torch.Generator().manual_seed(self.seed))[:count]] = True
        return flags


RANKED_BY = {"": "question", " by text": "text", " by encoder": "encoder"}
"""Ending of a `Top`'s text form -> whose attention ranks."""


class Scored(Select):
    """Which they are, scores tell: by place it is all."""

    def of_image(self, visual: int) -> Tensor:
        return ALL.of_image(visual)


@dataclass(frozen=True)
class Routed(Scored):
    """A share of an image's tokens, those that a layer's own router scores highest; the others pass by this layer. It has no text form in a
    configuration: only a mechanism that adds the router can say it.

    Args:
        share: at least one token.
        layer: which has the router.
    """

    share: float
    layer: int

    def __str__(self) -> str:
        return f"{self.share:.4g} by the router of {self.layer}"

    def count(self, visual: int) -> int:
        return min(visual, max(1, int(self.share * visual + 1e-9)))


@dataclass(frozen=True)
class Top(Scored):
    """All but a share of an image's original tokens: those that get least attention. They are gone for good.

    Args:
        dropped: the share, of the original tokens.
        layer: in which they are ranked, among those that were left before. They leave before this layer's attention if its own row
            says so, or after the layer if the next row is the first to say so.
        before: the share that was dropped until then.
        by: whose attention counts: of the ``question``, the last token before each answer (when generating, the prompt's last); or of
            all ``text`` that is not an answer; or that in the vision ``encoder``, which is known before the first layer.
    """

    dropped: float
    layer: int
    before: float = 0.0
    by: str = "question"

    def __str__(self) -> str:
        after = f" after {_written(self.before)}" if self.before else ""
        return (
            f"all but {_written(self.dropped)} ranked in {self.layer}{after}"
            + {by: end for end, by in RANKED_BY.items()}[self.by]
        )

    def count(self, visual: int) -> int:
        return _left(visual, self.dropped)

    @property
    def by_encoder(self) -> bool:
        """Importance comes with the tokens (`Stream.importance_V`), whatever the text is."""
        return self.by == "encoder"

    def ranked(self, visual: int) -> int:
        """How many of an image's tokens are ranked."""
        return _left(visual, self.before)


def _left(visual: int, dropped: float) -> int:
    """At least one token of an image. 0.7 of 10 is 7, whatever 0.7 is in binary."""
    return max(min(visual, 1), visual - int(dropped * visual + 1e-9))


def _written(share: float) -> str:
    """As `parse_select` reads it, and as exactly as a count can tell: a selection is known by its text."""
    return f"{share:.12f}".rstrip("0")


ALL, NOTHING = Every(1), Nothing()

_SHARE = re.compile(r"even (0?\.\d+)|random (0?\.\d+)(?: seed (\d{1,9}))?")
_TOP = re.compile(r"all but (0?\.\d+) ranked in (\d+)(?: after (0?\.\d+))?( by text| by encoder)?")


def parse_select(text: str) -> Select:
    """``all``, ``none``, ``every 2``, ``even 0.25``, ``random 0.25``, perhaps with ``seed 3``, or ``all but 0.5 ranked in 7``, perhaps
    ``after 0.25`` and ``by text`` or ``by encoder``. Raises ValueError saying so."""
    if text in ("all", "none"):
        return ALL if text == "all" else NOTHING
    if match := re.fullmatch(r"every ([1-9]\d{0,8})", text):
        return Every(int(match[1]))
    if (match := _SHARE.fullmatch(text)) and float(match[1] or match[2]):
        return Share(float(match[1])) if match[1] else Share(float(match[2]), int(match[3] or 0))
    if match := _TOP.fullmatch(text):
        return Top(float(match[1]), int(match[2]), float(match[3] or 0), RANKED_BY[match[4] or ""])
    expected = "all, none, every N, even SHARE, random SHARE, or all but SHARE ranked in LAYER"
    raise ValueError(f"found {text!r}, expected {expected}")
