"""A video becomes the right frames at the right times, in text as transformers writes it; what is damaged or too much is a bad sample."""

from __future__ import annotations

import io
import random
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from lib.films import SIZE, film, number
from lib.vlms import KINDS, tokenizer_of
from PIL import Image
from transformers.models.smolvlm import processing_smolvlm

from lit_eemllm import limits
from lit_eemllm.config.keys import VideoConfig
from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.inputs.chat import get_template
from lit_eemllm.inputs.conversation import IMAGE, parse_conversation
from lit_eemllm.inputs.rows import VIDEO, as_llava
from lit_eemllm.inputs.video import MARKERS, Clip, in_words, read_clip, with_frames

PIXELS = 10_000


def clip(data: bytes, folder: Path, frames: int = 5, rate: float | None = None, most: int = PIXELS) -> Clip:
    (folder / "film").write_bytes(data)
    return read_clip(folder / "film", "film", VideoConfig(frames, rate), most)


def refused(data: bytes, folder: Path, **options: Any) -> SampleError:
    with pytest.raises(SampleError, match="video 'film'") as caught:
        clip(data, folder, **options)
    return caught.value


@pytest.mark.parametrize(("form", "codec", "sound"), [
    ("mp4", "libx264", False), ("mp4", "libx264", True), ("matroska", "libx264", True), ("webm", "libvpx-vp9", False),
    ("avi", "mpeg4", False), ("mpegts", "libx264", True), ("gif", "gif", False),
])  # fmt: skip
def test_frames_are_those_in_the_middle_of_equal_stretches(form: str, codec: str, sound: bool, tmp_path: Path) -> None:
    data = film(form, codec, sound=sound)
    for frames, rate, expected in (
        (5, None, [1, 3, 5, 7, 9]), (1, None, [5]), (4, None, [1, 3, 6, 8]), (8, 1.0, [2, 7]), (8, 0.01, [5]), (99, None, range(10)),
    ):  # fmt: skip
        found = clip(data, tmp_path, frames, rate)
        assert [number(image) for image in found.frames] == list(expected), (frames, rate)
        assert found.seconds == pytest.approx([0.2 * n for n in expected], abs=2e-3)
        assert found.duration == pytest.approx(2, abs=2e-3)
        assert {Image.open(io.BytesIO(image)).size for image in found.frames} == {SIZE}


def test_times_are_those_of_the_frames_where_they_vary(tmp_path: Path) -> None:
    """Of 9.2 seconds and a little: the middles of four stretches are near 1.2, 3.5, 5.8 and 8.1."""
    data = film("matroska", times=[0, 100, 200, 3300, 3400, 3600, 5000, 8600, 9100, 9200])
    found = clip(data, tmp_path, 4)
    assert ([number(image) for image in found.frames], found.seconds) == ([2, 4, 6], [0.2, 3.4, 5.0])
    assert 9.2 <= found.duration <= 9.5


def test_frames_that_a_cut_hides_are_not_shown(tmp_path: Path) -> None:
    """Its edit list begins 0.6 seconds later than the first frame, which those after it need."""
    data = film()
    place = data.index(b"elst") + 16
    later = int.from_bytes(data[place : place + 4], "big") + 3 * 2048  # of 10,240 in a second
    found = clip(data[:place] + later.to_bytes(4, "big") + data[place + 4 :], tmp_path, 10)
    assert [number(image) for image in found.frames] == [3, 4, 5, 6, 7, 8, 9]
    assert found.seconds == pytest.approx([0.2 * i for i in range(7)])


def test_a_film_that_was_turned_is_shown_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", SIZE, "red")
    picture.paste("blue", (SIZE[0] // 2, 0, *SIZE))
    data = film(frames=1, picture=picture)
    matrix = data.index(b"tkhd") + 44  # of a telephone: what is left in the file is on top
    numbers = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    turned = b"".join(value.to_bytes(4, "big", signed=True) for value in numbers)
    for film_data, size, first, last in (
        (data, SIZE, (0, 0), (SIZE[0] - 1, 0)),
        (data[:matrix] + turned + data[matrix + 36 :], SIZE[::-1], (0, 0), (0, SIZE[0] - 1)),
    ):
        found = Image.open(io.BytesIO(clip(film_data, tmp_path).frames[0]))
        ends = [found.getpixel(place) for place in (first, last)]
        assert found.size == size and ends[0][0] > 240 > 20 > ends[0][2] and ends[1][2] > 240 > 20 > ends[1][0]


def test_work_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what leads from a key frame to a wanted one is decoded."""
    many, few = film(frames=60, keys=5), film(frames=60, keys=60)
    monkeypatch.setattr(limits, "VIDEO_PIXELS", 24 * SIZE[0] * SIZE[1])
    assert len(clip(many, tmp_path, 2).frames) == 2
    assert refused(few, tmp_path, frames=2).reason == "video_too_large"
    for name, most in (("VIDEO_BYTES", 100), ("VIDEO_PACKETS", 20), ("VIDEO_SECONDS", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(limits, name, most)
            assert refused(many, tmp_path, frames=2).reason == "video_too_large", name
    assert refused(many, tmp_path, most=SIZE[0] * SIZE[1] - 1).reason == "video_too_large"


def overwritten(data: bytes, at: bytes, new: bytes) -> bytes:
    place = data.index(at) + len(at)
    return data[:place] + new + data[place + len(new) :]


def still() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", SIZE).save(file, "PNG")
    return file.getvalue()


SLOW = film("matroska", times=range(0, 10_000, 1000))
DAMAGED = {
    "empty": b"",
    "text": b"no film" * 100,
    "an image": still(),
    "cut": film()[:1000],
    "cut, with its header": SLOW[: int(len(SLOW) * 0.8)],
    "without a frame": SLOW[: SLOW.index(b"\x1f\x43\xb6\x75")],  # its first cluster
    "overwritten": overwritten(film(), b"mdat", b"\xff" * 900),
    "a playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfilm.mp4\n#EXT-X-ENDLIST\n",
    "a list of files": b"ffconcat version 1.0\nfile film.mp4\n",
    "sound alone": film("mp4", frames=0, sound=True),
    "a codec of few": film("avi", "ffv1"),
    "a container of few": film("nut", "libx264"),
    "without its key frame": film("mpegts", frames=30, keys=60)[188 * 30 :],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_a_bad_video(name: str, tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(film())  # which playlists would find
    assert refused(DAMAGED[name], tmp_path).reason == "bad_video"


def test_sizes_are_bounded_in_the_header_and_on_the_way(tmp_path: Path) -> None:
    huge = overwritten(film("gif", "gif"), b"GIF89a", (30_000).to_bytes(2, "little") * 2)
    assert refused(huge, tmp_path).reason == "bad_video"  # FFmpeg's own word, before it takes memory
    damaged = overwritten(film(), b"mdat", b"\xff" * 900)
    assert refused(damaged, tmp_path, most=100).reason == "video_too_large"  # before anything is decoded
    growing = film("mpegts") + film("mpegts", size=(320, 240), times=range(2000, 4000, 200))
    assert len(clip(growing, tmp_path, most=320 * 240).frames) == 5
    assert refused(growing, tmp_path, most=320 * 240 - 1).reason == "video_too_large"


def test_any_damage_ends_in_frames_or_in_a_bad_sample(tmp_path: Path) -> None:
    rng, found = random.Random(0), Counter[str]()
    whole = film("flv")
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 3, 10, 40])):
            data[rng.randrange(rng.choice([600, len(data)]))] = rng.randrange(256)
        try:
            found["frames"] += len(clip(bytes(data), tmp_path).frames) > 0
        except SampleError as error:
            found[error.reason] += 1
            found["concealed"] += "is damaged at" in error.message
            found["missing"] += "can be decoded" in error.message
    assert found["frames"] + found["bad_video"] + found["video_too_large"] == 200
    assert min(found.values()) > 0 and len(found) == 5, found


def test_without_the_extra_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'lit_eemllm\[video\]'") as caught:
        clip(b"", tmp_path)
    assert not isinstance(caught.value, SampleError)


SECONDS, DURATION = [0.5, 61.25, 130.0], 3725.5


def theirs(name: str) -> str:
    """What stands for a video of three frames in transformers' processor, with one token for an image and nothing around."""
    metadata = SimpleNamespace(fps=4, frames_indices=[2, 245, 520], timestamps=SECONDS, duration=DURATION)
    given: dict[str, Any] = {"video_metadata": [metadata]}
    if name == "internvl":
        own = SimpleNamespace(start_image_token="", end_image_token="", image_token="<IMG_CONTEXT>", image_seq_length=1)
        return hf.InternVLProcessor.replace_video_token(own, {"pixel_values_videos": torch.zeros(1, 3, 1)}, 0) + "\n"
    if name == "smolvlm":
        own = SimpleNamespace(image_seq_len=1, image_token="<image>", fake_image_token="", global_image_token="")
        return hf.SmolVLMProcessor.replace_video_token(own, {"pixel_values": torch.zeros(1, 3), **given}, 0)
    times = partial(hf.Qwen3VLProcessor._calculate_timestamps, None)
    own = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=1, temporal_patch_size=1), video_token="<|image_pad|>",
        vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>", _calculate_timestamps=times,
    )  # fmt: skip
    return hf.Qwen3VLProcessor.replace_video_token(own, {"video_grid_thw": torch.tensor([[3, 1, 1]]), **given}, 0)


@pytest.mark.parametrize("name", ["internvl", "smolvlm", "qwen3_vl"])
def test_markers_are_the_text_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the family's own chat template, whose parts are those of our text."""
    monkeypatch.setattr(processing_smolvlm, "num2words", {3: "three"}.get)
    row = {
        "video": ["a"],
        "conversations": [{"from": "human", "value": f"{VIDEO}\nWhat?"}, {"from": "gpt", "value": "so"}],
    }
    shown, images = with_frames(row, "k", [], lambda _: Clip([b"0", b"1", b"2"], SECONDS, DURATION), name)
    tokenizer = tokenizer_of(KINDS[name])
    tokenizer.image_token = KINDS[name].tokens[0]
    template = get_template("jinja", tokenizer)
    rendered = "".join(span.text for span in template.render(parse_conversation(shown, 3, "k")))
    assert theirs(name) + "What?" in rendered and images == [b"0", b"1", b"2"]
    assert set(MARKERS) == {"plain", "internvl", "smolvlm", "qwen3_vl"}


def test_numbers_in_words() -> None:
    expected = {1: "one", 8: "eight", 16: "sixteen", 20: "twenty", 32: "thirty-two", 64: "sixty-four", 100: "one hundred",
                101: "one hundred and one", 256: "two hundred and fifty-six", 990: "nine hundred and ninety", 1000: "one thousand"}  # fmt: skip
    assert {n: in_words(n) for n in expected} == expected
    assert len({in_words(n) for n in range(1001)}) == 1001


ANSWER = {"from": "gpt", "value": "so"}


def asked(text: str, **row: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": text}, ANSWER], **row}


def shown(row: dict[str, Any], *images: str) -> tuple[str, list[str | bytes]]:
    """The first question once its videos, of two frames each, are images; and these."""
    found, pictures = with_frames(
        as_llava(row, "k"), "k", images, lambda path: Clip([path.encode()] * 2, [0.0, 1.0], 2.0), "qwen3_vl"
    )
    assert "video" not in found and [entry["video"] for entry in found.get("frames", [])] == as_llava(row, "k")["video"]
    return (found["conversations"][0]["value"] if "conversations" in found else found["question"]), pictures


FRAMES = f"<0.0 seconds>{IMAGE}\n<1.0 seconds>{IMAGE}\n"


@pytest.mark.parametrize(
    ("row", "images", "text", "pictures"),
    [
        (asked(f"{VIDEO}\nWhat?", video="a"), [], f"{FRAMES}What?", "aa"),
        (asked(f"{IMAGE}\nWhat?", video="a"), [], f"{FRAMES}What?", "aa"),  # LLaVA-Video's form
        (asked(f"{IMAGE}\n{VIDEO}{IMAGE} so? {VIDEO}", image=["x", "y"], video=["a", "b"]), ["x", "y"],
         f"{IMAGE}\n{FRAMES}{IMAGE} so? {FRAMES}", "xaaybb"),
        (asked(VIDEO, image="x", video="a"), ["x"], FRAMES, "aax"),  # whose image is missed afterwards
        (asked("What?", videos=["a", "b"]), [], f"{FRAMES}{FRAMES}What?", "aabb"),
        (asked("What?", videos=["a"], images=["x"]), ["x"], f"{IMAGE}\n{FRAMES}What?", "xaa"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a"}, {"type": "text", "text": "What?"}]},
                       {"role": "assistant", "content": "so"}]}, [], f"{FRAMES}What?", "aa"),
        ({"question": "What?", "answer": "so", "video": "a", "image": "x"}, ["x"], f"{IMAGE}\n{FRAMES}What?", "xaa"),
    ],
)  # fmt: skip
def test_rows_show_frames_in_the_order_of_their_placeholders(
    row: dict[str, Any], images: list[str], text: str, pictures: str
) -> None:
    found, listed = shown(row, *images)
    assert found == text
    assert "".join(one if isinstance(one, str) else one.decode() for one in listed) == pictures


def test_what_shows_a_video_twice_or_never_is_told() -> None:
    for row in (asked("What?", video="a"), asked(VIDEO * 2, video="a"), asked(f"{VIDEO}{IMAGE}", video=["a", "b"])):
        with pytest.raises(SampleError, match=r"sample 'k': \d <video> placeholders in the text but \d videos"):
            shown(row)
    with pytest.raises(SampleError, match="no frames come with it") as caught:
        parse_conversation(asked(f"{VIDEO} What?", video="a"), 0, "k")
    assert caught.value.reason == "missing_video"
