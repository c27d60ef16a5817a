"""One sample, from the bytes in a shard to ids and pixels. Knows nothing of Energon: loader, checker and preview share it.

Two steps, because choosing packs needs lengths only, and a buffer of hundreds of decoded images would not fit in memory:
`tokenize` reads the JSON and the headers of the images, `load_pixels` decodes the images of a chosen pack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from torch import Tensor

from lit_eemllm import limits
from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.inputs.chat import ChatTemplate
from lit_eemllm.inputs.conversation import IMAGE, Conversation, Turn, parse_conversation
from lit_eemllm.inputs.images import Transform, image_size, read_picture
from lit_eemllm.inputs.rows import as_llava
from lit_eemllm.inputs.spans import IMAGE_SLOT

OVERSIZE = "oversize"
"""The one member of a sample of more bytes than are read: it says how many."""
TRUNCATION = ("drop", "truncate", "error")

_IMAGE_MEMBER = re.compile(r"(?:(\d{1,6})\.)?(jpg|jpeg|png|webp|bmp|gif|tif|tiff|ppm|pgm|pbm|pnm)", re.IGNORECASE)
_PICKLE_MEMBER = re.compile(r"(.*\.)?(pkl|pickle|pyd|pth|pt|joblib|npy|npz|ckpt|bin)", re.IGNORECASE)


@dataclass
class TokenSample:
    """A conversation as ids; its images are still files.

    Attributes:
        key: names the sample in messages and in `PackedBatch.keys`.
        ids: token ids; `IMAGE_SLOT` stands for a run of visual tokens.
        supervised: per entry of `ids`, whether the model is to say it.
        image_tokens: visual tokens of each run, in order of appearance.
        images: the image files.
        entries: of each image, its first entry of `ids` and the one after its last.
        pictures: images of the conversation, those that were cut off with its end among them.
        truncated: whether text was cut off its end.
        source: name of the blend's source that it was drawn from.
    """

    key: str
    ids: list[int]
    supervised: list[bool]
    image_tokens: list[int]
    images: list[bytes]
    entries: list[tuple[int, int]] = field(default_factory=list)
    pictures: int = 0
    truncated: bool = False
    source: str = ""
    __restore_key__: tuple = ()  # Energon's address of the sample: its buffers are saved as addresses

    @property
    def length(self) -> int:
        """Tokens, visual tokens counted."""
        return self.text + sum(self.image_tokens)

    @property
    def text(self) -> int:
        """Text tokens."""
        return len(self.ids) - len(self.image_tokens)

    def targets(self) -> list[int]:
        """Entries to be predicted, each by the entry before it, which is text: templates refuse an answer after an image."""
        return [i for i, supervised in enumerate(self.supervised) if supervised and i > 0]


@dataclass
class EncodedSample:
    """A `TokenSample` with decoded images: `pixels[i]` is what the transform makes of one, `sizes[i]` its width and height, or `WHOLE`."""

    tokens: TokenSample
    pixels: list[Tensor]
    sizes: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class SampleEncoder:
    """Everything that decides how a sample becomes tokens and pixels.

    Args:
        template: renders conversations and marks what is supervised.
        transform: image to pixels and number of visual tokens.
        max_length: most tokens of a conversation, visual tokens counted.
        truncation: what happens to a longer one: "drop" it; "truncate": keep the longest beginning that fits, cutting text
            only (an image that does not fit goes whole, with all that follows it), and drop the sample if no target remains;
            "error": stop.
        max_image_pixels: larger images are refused by their header.
    """

    template: ChatTemplate
    transform: Transform
    max_length: int
    truncation: str
    max_image_pixels: int

    def __post_init__(self) -> None:
        if self.truncation not in TRUNCATION:
            raise ValueError(f"truncation is {self.truncation!r}, expected one of {', '.join(TRUNCATION)}")

    def identity(self) -> dict[str, Any]:
        """What of it a run must keep when it goes on, by the words in which a difference is told."""
        return {
            "model.template with its tokenizer": self.template.fingerprint(),
            "images": self.transform.identity(),
            **{f"data.{key}": getattr(self, key) for key in ("max_length", "truncation", "max_image_pixels")},
        }

    def tokenize(self, key: str, members: Mapping[str, bytes]) -> TokenSample:
        """Members of a shard's sample, by extension (``json``, ``0.jpg``), to token ids.

        Raises:
            SampleError: the sample cannot be used; `reason` is the slug under which it is counted.
            UserError: it is too long and `truncation` is "error", or no image at all fits in `max_length`.
        """
        conversation, images = read_members(key, members)
        encoded = self.template.encode(conversation)
        # by their headers: an unusable image need not wait for its pack to be refused
        found = [image_size(data, f"{key}, image {i}", self.max_image_pixels) for i, data in enumerate(images)]
        sizes = [self.transform.size_among(size, len(found)) for size in found]
        shown = encoded.with_pieces([self.transform.pieces(*size) for size in sizes], self.template.text_ids)
        sample = TokenSample(key, shown.ids, shown.supervised, shown.runs, images, shown.images, len(images))
        if not sample.targets():
            raise SampleError("no_target", f"{key}: there is no answer to learn from")
        return sample if sample.length <= self.max_length else self._shorten(sample)

    def load_pixels(self, sample: TokenSample) -> EncodedSample:
        """Decode the images. Raises SampleError."""
        encoded, left = EncodedSample(sample, []), iter(sample.image_tokens)
        for i, (data, (first, end)) in enumerate(zip(sample.images, sample.entries, strict=True)):
            counted = sum(next(left) for entry in sample.ids[first:end] if entry == IMAGE_SLOT)
            name = f"{sample.key}, image {i}"
            picture = read_picture(data, name, self.max_image_pixels)
            size = self.transform.size_among((picture.shape[2], picture.shape[1]), sample.pictures)
            if (tokens := self.transform.num_tokens(*size)) != counted:  # the pack has no room for others
                found = f"image {name!r}: its header promises {counted} visual tokens, its content gives {tokens}"
                raise SampleError("bad_image", found)
            encoded.pixels.append(self.transform(picture, size))
            encoded.sizes.append(size)
        return encoded

    @cached_property
    def _least_with_image(self) -> int:
        """Tokens of a conversation of one image, a word that asks and one that answers; where it may be cut, up to the first target."""
        encoded = self.template.encode(Conversation("image", (Turn("human", f"{IMAGE}\na"), Turn("gpt", "a")), 1))
        shown = encoded.with_pieces([self.transform.pieces(1, 1)], self.template.text_ids)
        entries = shown.supervised.index(True) + 1 if self.truncation == "truncate" else len(shown.ids)
        return entries - len(shown.runs) + sum(shown.runs)

    def _shorten(self, sample: TokenSample) -> TokenSample:
        found = f"{sample.key}: {sample.length} tokens with {len(sample.images)} images, at most {self.max_length} are allowed"
        if sample.images and self.transform.fixed and self._least_with_image > self.max_length:
            raise UserError(
                f"{sample.key}: an image takes {sample.image_tokens[0]} tokens, with the template and a word to say "
                f"{self._least_with_image}, so data.max_length={self.max_length} leaves no room for any. Raise it, and data.pack_tokens "
                "if need be."
            )
        if self.truncation == "error":
            raise UserError(f"{found}. Raise data.max_length, or set data.truncation to drop or truncate.")
        if self.truncation == "drop":
            raise SampleError("too_long", found)
        left = iter(sample.image_tokens)
        lengths = accumulate(next(left) if entry == IMAGE_SLOT else 1 for entry in sample.ids)
        entries = next(i for i, length in enumerate(lengths) if length > self.max_length)
        targets = [target for target in sample.targets() if target < entries]
        if not targets:
            raise SampleError("too_long", f"{found}, and the answer begins after that")
        end = targets[-1] + 1  # what follows the last target would be computed for nothing
        kept = [span for span in sample.entries if span[0] < end]
        return replace(
            sample,
            ids=sample.ids[:end],
            supervised=sample.supervised[:end],
            image_tokens=sample.image_tokens[: sample.ids[:end].count(IMAGE_SLOT)],
            images=sample.images[: len(kept)],
            entries=kept,
            truncated=True,
        )


def read_members(key: str, members: Mapping[str, bytes]) -> tuple[Conversation, list[bytes]]:
    """Check a sample's members and parse its conversation. Only JSON is parsed; images stay bytes. Raises SampleError."""
    row, images = read_row(key, members)
    return parse_conversation(row, len(images), key), list(images.values())


def read_row(key: str, members: Mapping[str, bytes]) -> tuple[Mapping[str, Any], dict[str, bytes]]:
    """A sample's row in LLaVA's form, with fields that only evaluation knows, and its images in order, by member name."""
    numbered: dict[int, str] = {}
    for name in members:
        if name == "json":
            continue
        if _PICKLE_MEMBER.fullmatch(name):
            raise SampleError(
                "pickle", f"{key}.{name}: pickled or binary Python data is never opened; only JSON and images are"
            )
        if name == OVERSIZE:
            found = f"{int(members[name]):,} bytes, at most {limits.SAMPLE_BYTES:,} are read"
            raise SampleError("oversize", f"{key}: {found}")
        match = _IMAGE_MEMBER.fullmatch(name)
        if match is None:
            raise SampleError(
                "unexpected_member", f"{key}.{name}: expected {key}.json and images {key}.0.jpg, {key}.1.png …"
            )
        if (index := int(match[1] or 0)) in numbered:
            raise SampleError("unexpected_member", f"{key}.{name}: there are two images number {index}")
        numbered[index] = name
    if sorted(numbered) != list(range(len(numbered))):
        raise SampleError("missing_image", f"{key}: images {sorted(numbered)} found, expected 0 to {max(numbered)}")
    row = as_llava(_parse_json(key, members.get("json")), key, len(numbered))
    return row, {name: members[name] for _, name in sorted(numbered.items())}


def _parse_json(key: str, data: bytes | None) -> Mapping[str, Any]:
    if data is None:
        raise SampleError("bad_json", f"{key}.json is missing")
    if len(data) > limits.ROW_BYTES:
        raise SampleError("bad_json", f"{key}.json: {len(data):,} bytes, at most {limits.ROW_BYTES:,} are read")
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", f"{key}.json: {error}") from None
    if not isinstance(row, dict):
        raise SampleError(
            "bad_json", f"{key}.json: found {type(row).__name__}, expected an object with 'conversations'"
        )
    return row
