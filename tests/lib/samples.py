"""Samples that are good, and one of every kind that is refused."""

from __future__ import annotations

import struct
import zlib

from shards_util import sample


def bomb() -> bytes:
    """A PNG whose header says 20,000 x 20,000 and which is 60 bytes long."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
        + chunk(b"IEND", b"")
    )


good = sample(1)


BAD = {
    "bad_json": {"json": b'{"conversations": [', "0.png": good["0.png"]},
    "bad_json, too deep": {"json": b"[" * 100_000},
    "bad_json, missing": {"0.png": good["0.png"]},
    "bad_json, a list": {"json": b"[]"},
    "bad_json, not text": {"json": b"\xff\xfe"},
    "bad_json, too long": {**good, "json": good["json"] + b" " * 2**23},
    "placeholder_mismatch": {"json": good["json"]},
    "no_target": {"json": good["json"].replace(b"it is 1", b" "), "0.png": good["0.png"]},
    "image_too_large": {"json": good["json"], "0.png": bomb()},
    "bad_image": {"json": good["json"], "0.png": b"no image"},
    "pickle": {**good, "pkl": b"cos\nsystem\n(S'touch pwned'\ntR."},
    "pickle, as weights": {**good, "0.pth": b""},
    "unexpected_member": {**good, "sh": b"rm"},
    "unexpected_member, twice": {**good, "0.jpg": good["0.png"]},
    "missing_image": {"json": good["json"], "1.png": good["0.png"]},
}
