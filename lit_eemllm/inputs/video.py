"""Video bytes -> frames, each an image file, and the text that tells their times: a video is images in time.

::

    "<video>\\nWhat happens?"  --`with_frames`-->  "Frame1: <image>\\nFrame2: <image>\\nWhat happens?"  and two images

What trains and answers afterwards sees images alone. Of equal stretches of the video's time the frame in the middle is taken.

`read_clip` reads untrusted bytes, by FFmpeg's libraries (PyAV, the extra ``video``). It opens no other file and no address: the bytes
come from an open file, and playlists are none of the formats. First all packets are counted, without decoding, so that times are those
of the frames and not what a header says; then only what leads from a key frame to a wanted one is decoded.
"""

from __future__ import annotations

import io
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import numpy as np
from PIL import Image

from lit_eemllm import limits
from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.inputs.conversation import IMAGE
from lit_eemllm.inputs.rows import VIDEO, show, videos_of

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

    from lit_eemllm.config.keys import VideoConfig

Picture = TypeVar("Picture")
FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"
"""Containers by FFmpeg's names (mov: MP4 too). None that names other files, as playlists do."""
DECODERS = (
    "h264,hevc,libdav1d,av1,vp8,vp9,libvpx,libvpx-vp9,mpeg1video,mpeg2video,mpeg4,msmpeg4v2,msmpeg4,h263,flv,wmv1,wmv2,wmv3,vc1,"
    "theora,mjpeg,gif"
)
_QUALITY = 95  # of the JPEG that a frame becomes
_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen",
    "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True)
class Clip:
    """What is shown of a video.

    Attributes:
        frames: image files.
        seconds: when each is shown, counted from the video's first frame.
        duration: seconds of the whole video.
    """

    frames: list[bytes]
    seconds: list[float]
    duration: float


def with_frames(
    row: Mapping[str, Any], key: str, images: Sequence[Picture], read: Callable[[str], Clip], markers: str
) -> tuple[dict[str, Any], list[Picture | bytes]]:
    """A row with its videos as images: `IMAGE` and a text that tells its time for each frame in place of `VIDEO`.

    A newline after `VIDEO` belongs to it, as one after `IMAGE` does; a row without turns shows first what no placeholder shows. The row
    says under ``frames`` where they are from.

    Args:
        row: in LLaVA's form (`rows.as_llava`). Without a video it is given back as it is.
        key: names it in messages.
        images: those that the row names.
        read: decodes a video by its path.
        markers: a name of `MARKERS`.

    Returns:
        The row, and all its images in the order of their placeholders, a frame as an image file.

    Raises:
        SampleError: ``placeholder_mismatch``, or what `read` says.
    """
    videos = videos_of(row)
    if not videos:
        return dict(row), list(images)
    found = {name: value for name, value in row.items() if name != "video"}
    asked = "question" if row.get("question") is not None else "text"
    if isinstance(turns := row.get("conversations"), list):
        texts = [turn.get("value") for turn in turns if isinstance(turn, Mapping) and turn.get("from") == "human"]
    else:
        texts = [show(show(str(row.get(asked) or ""), VIDEO, len(videos)), IMAGE, len(images))]
    placeholders = sum(text.count(VIDEO) for text in texts if isinstance(text, str))
    if placeholders != len(videos):
        named = f"sample {key!r}: {placeholders} {VIDEO} placeholders in the text but {len(videos)} videos"
        raise SampleError("placeholder_mismatch", f"{named}; each video needs one in a human turn")
    pictures, left, clips = list[Picture | bytes](), list(images), iter(videos)
    found["frames"] = []

    def put(mark: re.Match[str]) -> str:
        if mark.group() == IMAGE:
            pictures.extend(left[:1])
            del left[:1]
            return IMAGE
        clip = read(path := next(clips))
        pictures.extend(clip.frames)
        found["frames"].append({"video": path, "seconds": [round(second, 3) for second in clip.seconds]})
        return MARKERS[markers](clip)

    shown = [re.sub(f"{IMAGE}|{VIDEO}\n?", put, text) if isinstance(text, str) else text for text in texts]
    if isinstance(turns, list):
        said = iter(shown)
        human = [isinstance(turn, Mapping) and turn.get("from") == "human" for turn in turns]
        found["conversations"] = [
            {**turn, "value": next(said)} if asks else turn for turn, asks in zip(turns, human, strict=True)
        ]
    else:
        found[asked] = shown[0]
    return found, [*pictures, *left]


def _plain(clip: Clip) -> str:
    return f"{IMAGE}\n" * len(clip.frames)


def _internvl(clip: Clip) -> str:
    return "".join(f"Frame{number}: {IMAGE}\n" for number in range(1, len(clip.frames) + 1))


def _smolvlm(clip: Clip) -> str:
    count, duration = in_words(len(clip.frames)), timedelta(seconds=int(clip.duration))
    times = (divmod(int(second), 60) for second in clip.seconds)
    shown = "".join(f"\nFrame from {minute:02d}:{second:02d}:{IMAGE}\n" for minute, second in times)
    return f"You are provided the following series of {count} frames from a {duration} [H:MM:SS] video.\n{shown}\n\n"


def _qwen3_vl(clip: Clip) -> str:
    return "".join(f"<{second:.1f} seconds>{IMAGE}\n" for second in clip.seconds)


MARKERS: dict[str, Callable[[Clip], str]] = {
    "plain": _plain,
    "internvl": _internvl,
    "smolvlm": _smolvlm,
    "qwen3_vl": _qwen3_vl,
}
"""What stands for a video: the text that transformers' processors of these families write, and a newline after each image, which is the
placeholder's own: chat templates that take parts leave it out (`chat.parts_of`)."""


def in_words(number: int) -> str:
    """A number from 0 to 1000 in English."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        return _TENS[number // 10 - 2] + f"-{_UNITS[number % 10]}" * (number % 10 > 0)
    if number < 1000:
        return f"{_UNITS[number // 100]} hundred" + f" and {in_words(number % 100)}" * (number % 100 > 0)
    return "one thousand"


def read_clip(path: Path, name: str, video: VideoConfig, max_pixels: int) -> Clip:
    """Frames of a video file, upright, as JPEG.

    Args:
        path: of the file.
        name: names the video in messages.
        video: how many frames.
        max_pixels: largest accepted width x height of a frame.

    Raises:
        SampleError: ``video_too_large`` (bytes, pixels, packets, seconds, or the work it would be) or ``bad_video`` (other format,
            damaged, truncated, without a frame).
        UserError: PyAV is not installed.
        OSError: the file cannot be read.
    """
    try:
        import av
    except ImportError:
        raise UserError(f"video {name!r}: PyAV, which reads videos, is not installed; pip install 'lit_eemllm[video]'") from None  # fmt: skip
    with path.open("rb") as file:
        if (size := path.stat().st_size) > limits.VIDEO_BYTES:
            raise _too_large(name, f"{size:,} bytes, more than {limits.VIDEO_BYTES:,}")
        try:
            timeline = _timeline(file, name, max_pixels)
            wanted = timeline.wanted(video)
            frames = dict(_frames(file, name, max_pixels, timeline, wanted))
        except SampleError:
            raise
        except (
            av.FFmpegError,
            OSError,
            ValueError,
            LookupError,
            OverflowError,
        ) as error:  # PyAV's own too, as of a seek below 0
            raise _bad(name, f"cannot be read: {str(getattr(error, 'strerror', None) or error)[:300]}") from None
    seconds = [float((time - timeline.times[0]) * timeline.unit) for time in frames]
    return Clip(list(frames.values()), seconds, float(timeline.span * timeline.unit))


@dataclass(frozen=True)
class _Timeline:
    """When frames are shown, in units of so many seconds.

    Attributes:
        times: of all frames, in order.
        span: from the first frame to the end of the last.
        keys: times at which decoding can begin, in order.
        numbers: of each of them, how many packets of the file come before it.
    """

    unit: Fraction
    times: list[int]
    span: int
    keys: list[int]
    numbers: list[int]

    def wanted(self, video: VideoConfig) -> list[int]:
        """Times of the frames that are shown in the middle of equal stretches, each once."""
        count = video.frames
        if video.rate is not None:
            count = min(count, max(1, round(video.rate * float(self.span * self.unit))))
        middles = (self.times[0] + (2 * i + 1) * self.span // (2 * count) for i in range(count))
        return sorted({self.times[bisect_right(self.times, middle) - 1] for middle in middles})

    def begin(self, time: int) -> int:
        """Packets that can be left out before the frame of this time."""
        before = bisect_right(self.keys, time)
        return self.numbers[before - 1] if before else 0


def _timeline(file: BinaryIO, name: str, max_pixels: int) -> _Timeline:
    """Read all packets, decoding none."""
    times, keys = dict[int, int](), list[tuple[int, int]]()  # duration by time; time and number
    end = Fraction(0)
    with _opened(file, name, max_pixels) as (container, stream):
        promised = Fraction(container.duration or 0, 10**6) + Fraction(container.start_time or 0, 10**6)
        for number, packet in enumerate(container.demux()):
            if number >= limits.VIDEO_PACKETS:
                raise _too_large(name, f"more than {limits.VIDEO_PACKETS:,} packets")
            if packet.pts is None:
                continue
            end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
            if packet.stream_index == stream.index:
                if packet.is_keyframe:
                    keys.append((packet.pts, number))
                if not packet.is_discard:
                    times[packet.pts] = packet.duration or 0
        unit = Fraction(stream.time_base or 1)
    if not times:
        raise _bad(name, "has no frame")
    order = sorted(times)
    span = max(time + duration for time, duration in times.items()) - order[0]
    if (seconds := float(span * unit)) > limits.VIDEO_SECONDS:
        raise _too_large(name, f"{seconds:,.0f} seconds, more than {limits.VIDEO_SECONDS:,}")
    if end < promised * Fraction(9, 10) - 1:
        raise _bad(name, f"is truncated: {float(promised):.1f} seconds by its header, {float(end):.1f} in it")
    keys.sort()
    return _Timeline(unit, order, span, [time for time, _ in keys], list(accumulate((n for _, n in keys), max)))


def _frames(
    file: BinaryIO, name: str, max_pixels: int, timeline: _Timeline, wanted: list[int]
) -> Iterator[tuple[int, bytes]]:
    """Time and image of each wanted frame, or of the next one where a packet shows nothing."""
    file.seek(0)
    number_wanted, work, skipped, last = 0, 0, False, None
    with _opened(file, name, max_pixels) as (container, stream):
        codec = stream.codec_context
        for number, packet in enumerate(container.demux()):
            if packet.stream_index != stream.index:
                continue
            if packet.size and number < timeline.begin(wanted[number_wanted]):
                skipped = True
                continue
            if skipped:
                codec.flush_buffers()
                skipped = False
            work += codec.width * codec.height
            if work > limits.VIDEO_PIXELS:
                raise _too_large(name, f"more than {limits.VIDEO_PIXELS:,} pixels to decode, with few key frames")
            for frame in codec.decode(packet):
                if frame.pts is None or frame.pts < wanted[number_wanted] or frame.pts == last:
                    continue
                last = frame.pts
                _check_size(name, frame.width, frame.height, max_pixels)  # which may change on the way
                if frame.is_corrupt:
                    raise _bad(name, f"is damaged at {float((last - timeline.times[0]) * timeline.unit):.1f} seconds")
                yield last, _as_jpeg(frame)
                number_wanted = bisect_right(wanted, last)
                if number_wanted == len(wanted):
                    return
    raise _bad(name, f"has {len(wanted)} frames to show, of which {number_wanted} can be decoded")


def _as_jpeg(frame: Any) -> bytes:
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


@contextmanager
def _opened(file: BinaryIO, name: str, max_pixels: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video, of an accepted size, on one thread."""
    import av

    room = str(2 * max_pixels + 2**20)  # FFmpeg counts what it adds on the sides
    options = {
        "format_whitelist": FORMATS,
        "codec_whitelist": DECODERS,
        "protocol_whitelist": "none",
        "max_pixels": room,
        "max_streams": "64",
    }
    with av.open(file, "r", options=options, metadata_errors="replace") as container:
        stream = cast("VideoStream | None", container.streams.best("video"))  # not a cover's picture
        if stream is None:
            raise _bad(name, "has no stream of video")
        codec = stream.codec_context
        if codec is None or codec.name not in DECODERS.split(","):
            raise _bad(name, f"is coded as {codec and codec.name!r}; read are {DECODERS.replace(',', ', ')}")
        _check_size(name, codec.width, codec.height, max_pixels)
        codec.options = {"max_pixels": room}
        codec.thread_count = 1
        yield container, stream


def _check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _too_large(
            name, f"{width} x {height} pixels, more than {max_pixels}; shrink it or allow more, as for images"
        )


def _too_large(name: str, found: str) -> SampleError:
    return SampleError("video_too_large", f"video {name!r} has {found}")


def _bad(name: str, found: str) -> SampleError:
    return SampleError("bad_video", f"video {name!r} {found}")
