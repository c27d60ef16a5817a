"""Cache of images' keys and values: where visual states do not depend on text, an image is computed once.

Keys are cached before rotation, so they can be used in other prompts, later turns and at other positions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from hashlib import sha256

import torch

from ..core.stream import VisualKeys
from ..layout import Pixels, take_images


class ImageCache:
    """The most recently used images within a budget of bytes, on the model's device.

    Args:
        max_bytes: of all keys and values together; the images of one call are kept whatever they take.

    Attributes:
        hits, misses: images so far that were there, and that were computed.
        known: of each image of the last call, whether it was there.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self.known: list[bool] = []
        self._images: OrderedDict[bytes, VisualKeys] = OrderedDict()
        self._stamp: Hashable = None

    def clear(self) -> None:
        self._images.clear()

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for keys in self._images.values() for pair in keys if pair is not None for x in pair)

    def keys(
        self,
        pixels: Pixels,
        compute: Callable[[Pixels, Sequence[tuple[int, int]]], list[VisualKeys]],
        stamp: Hashable,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> VisualKeys:
        """For each layer the keys and values of all images, concatenated; only new images are computed.

        Args:
            pixels: the images.
            compute: from images and their sizes to the keys of each (`EEMLLM.image_keys`).
            stamp: stands for weights, device and precision; another stamp than last time empties the cache.
            sizes: original (width, height) of each image, where the encoder needs them.
        """
        if stamp != self._stamp:
            self.clear()
            self._stamp = stamp
        names = []
        for i, image in enumerate(pixels):
            kind = f"{tuple(image.shape)}{image.dtype}{sizes[i] if sizes else ''}".encode()
            names.append(sha256(kind + image.contiguous().view(torch.uint8).cpu().numpy().tobytes()).digest())
        self.known = [name in self._images for name in names]
        new = {name: i for i, name in enumerate(names) if name not in self._images}
        self.misses += len(new)
        self.hits += len(names) - len(new)
        if new:
            some = list(new.values())
            computed = compute(take_images(pixels, some), [sizes[i] for i in some] if sizes else sizes)
            self._images |= zip(new, computed, strict=True)
        for name in names:
            self._images.move_to_end(name)
        images = [self._images[name] for name in names]
        joined: VisualKeys = []
        for pairs in zip(*images, strict=True):
            joined.append(
                None if pairs[0] is None else (torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs]))
            )
        while len(self._images) > len(set(names)) and self.num_bytes > self.max_bytes:
            self._images.popitem(last=False)
        return joined
