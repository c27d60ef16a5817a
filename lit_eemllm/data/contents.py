"""What shards hold, as a digest that costs the same for gigabytes and terabytes: has a run still the data that it began with?"""

from __future__ import annotations

import hashlib

from lit_eemllm.data.recipe import Source
from lit_eemllm.errors import UserError

PLACES = 1024
"""Evenly spread places at which the sources of a recipe are read, shared evenly, beside the beginning of each shard."""
BYTES = 64 * 2**10
"""Read at each place. Of up to 64 MiB, divided by the number of sources, a source is read whole."""


def contents(source: Source, of: int = 1) -> str:
    """12 hexadecimal digits of the shards, in their order: their sizes, where each of their samples begins (their indices), and
    what stands at `PLACES`.

    So other samples, another order, and members of other sizes are always seen. A member that was replaced by one of the same
    size in the tar is seen for sure in a small source, and in a large one where it happened to many; to read terabytes for one
    would take hours. When files were changed says nothing: they may have been copied.

    Args:
        source: the shards.
        of: sources of the recipe, which share the places.

    Raises:
        UserError: a shard cannot be read.
    """
    digest = hashlib.sha256()
    shards = [source.folder / name for name, _ in source.shards]
    try:
        sizes = [shard.stat().st_size for shard in shards]
        step = max(BYTES, sum(sizes) * of // PLACES)
        for shard, size in zip(shards, sizes, strict=True):
            digest.update(size.to_bytes(8, "little") + shard.with_suffix(".tar.idx").read_bytes())
            with shard.open("rb", buffering=0) as file:
                for place in range(0, size, step):
                    file.seek(place)
                    digest.update(file.read(BYTES))
    except OSError as error:
        raise UserError(f"{source.folder}: a shard or its index cannot be read: {error}") from error
    return digest.hexdigest()[:12]
