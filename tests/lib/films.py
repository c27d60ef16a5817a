"""Small films whose colours tell the number of each frame, written by PyAV."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image

SIZE = (64, 48)
STEP = 25  # of red between a frame and the next


def film(
    form: str = "mp4",
    codec: str = "libx264",
    frames: int = 10,
    *,
    size: tuple[int, int] = SIZE,
    times: Sequence[int] | None = None,
    keys: int = 4,
    sound: bool = False,
    picture: Image.Image | None = None,
) -> bytes:
    """A film, 5 frames a second or at the given milliseconds; one of so many frames is a key frame, or more. All frames may be one picture."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=5)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        context = stream.codec_context
        context.gop_size, context.thread_count = keys, 1
        if codec == "libx264":
            context.options = {"sc_threshold": "0"}  # no further key frame where colours change
        if times is not None:
            context.time_base = Fraction(1, 1000)
        if sound:
            track = container.add_stream("aac", rate=8000)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
            silence.sample_rate, silence.pts = 8000, 0
            container.mux(track.encode(silence) + track.encode())
        for number in range(frames):
            red = STEP * number % 256
            frame = av.VideoFrame.from_image(picture or Image.new("RGB", size, (red, 0, 255 - red)))
            frame.pts, frame.time_base = (
                (number, Fraction(1, 5)) if times is None else (times[number], Fraction(1, 1000))
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def number(image: bytes) -> int:
    """Of the frame that an image is."""
    return round(np.asarray(Image.open(io.BytesIO(image)))[..., 0].mean() / STEP)
