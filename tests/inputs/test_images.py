"""Decoding of untrusted image files, and the transform against transformers' own image processors."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import warnings
import zlib

import numpy as np
import pytest
import tiny
import torch
from PIL import ExifTags, Image, ImageOps
from simplejpeg import decode_jpeg
from torch.nn.functional import interpolate

from lit_eemllm.errors import ConfigError, SampleError
from lit_eemllm.inputs import images
from lit_eemllm.inputs.images import MAX_SIDE, ImageTransform, image_size, open_image, picture_of, read_picture, resized

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, so that resampling filters matter."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 9 + y / 17), np.cos(x / 23), np.sin(y / 5)], -1) * 90 + 128
    return Image.fromarray((waves + rng.normal(0, 25, waves.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixel(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    return tuple(np.asarray(image)[y, x].tolist())


def two_colours(mode: str) -> Image.Image:
    """Left half red, right half white with half of its opacity where the mode has one."""
    image = Image.new("RGBA", (8, 4), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (4, 0, 8, 4))
    return image.convert(mode)


# ---------------------------------------------------------------------------------------------------- open_image


def palette_with_transparency() -> bytes:
    image = Image.new("P", (8, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (4, 0, 8, 4))
    return encoded(image, transparency=1)


def sixteen_bit() -> bytes:
    values = np.full((4, 8), 65535, dtype=np.uint16)
    values[:, :4] = 32768
    return encoded(Image.fromarray(values))


def animated() -> bytes:
    frames = [Image.new("RGB", (8, 4), colour) for colour in ("red", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def cmyk() -> bytes:
    return encoded(Image.new("RGB", (8, 4), "red").convert("CMYK"), "TIFF")


@pytest.mark.parametrize(
    ("data", "left", "right"),
    [
        pytest.param(encoded(two_colours("RGBA")), (255, 0, 0), (255, 255, 255), id="alpha-over-white"),
        pytest.param(encoded(two_colours("LA")), (76, 76, 76), (255, 255, 255), id="grey-alpha"),
        pytest.param(palette_with_transparency(), (255, 0, 0), (255, 255, 255), id="palette-transparency"),
        pytest.param(encoded(Image.new("1", (8, 4), 1)), (255, 255, 255), (255, 255, 255), id="one-bit"),
        pytest.param(sixteen_bit(), (128, 128, 128), (255, 255, 255), id="sixteen-bit"),
        pytest.param(b"P5 2 1 65535\n\x80\x00\xff\xff", (128, 128, 128), (255, 255, 255), id="sixteen-bit-ppm"),
        pytest.param(animated(), (255, 0, 0), (255, 0, 0), id="first-frame"),
        pytest.param(cmyk(), (255, 0, 0), (255, 0, 0), id="cmyk"),
    ],
)
def test_every_mode_becomes_rgb(data, left, right) -> None:
    image = open_image(data, "x", 100)
    assert image.mode == "RGB"
    assert pixel(image, 0, 0) == left
    assert pixel(image, image.width - 1, 0) == right


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (8, 4), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    assert open_image(encoded(image, "JPEG", exif=exif), "x", 100).size == (4, 8)


def png_promise(width: int, height: int) -> bytes:
    """A PNG whose header promises a size and that holds no pixels: decoding it must fail."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"")]
    packed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("side", [101, 12_000, 100_000])
def test_size_is_checked_before_decoding(side) -> None:
    """Above our own limit, above Pillow's warning and above Pillow's refusal, by the header alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(SampleError, match=r"'a/b\.png'") as caught:
            open_image(png_promise(side, side), "a/b.png", 10_000)
        with pytest.raises(SampleError) as by_header:
            image_size(png_promise(side, side), "a/b.png", 10_000)
    assert caught.value.reason == by_header.value.reason == "image_too_large"
    assert image_size(png_promise(90, 80), "x", 10_000) == (90, 80), "nothing is decoded"
    assert open_image(encoded(Image.new("RGB", (100, 100))), "x", 10_000).size == (100, 100)


def test_a_warning_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python forgets what it has shown whenever its filters change, so they must not change with every picture."""
    shown, registry = list[str](), dict[str, int]()
    data = encoded(Image.new("RGB", (8, 4)))
    with warnings.catch_warnings():
        warnings.filterwarnings("default", message="often")
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
        for _ in range(3):
            read_picture(data, "x", 100)
            warnings.warn_explicit("often", UserWarning, "elsewhere.py", 1, registry=registry)
    assert shown == ["often"]


def test_pillow_limit_holds_when_ours_is_larger(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(SampleError) as caught:
        open_image(encoded(Image.new("RGB", (20, 20))), "x", 10**9)
    assert caught.value.reason == "image_too_large"


def with_chunk(data: bytes, kind: bytes, body: bytes, after: bool = False) -> bytes:
    """A PNG with another chunk before or after its pixels."""
    at = data.index(b"IEND" if after else b"IDAT") - 4
    made = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data[:at] + made + data[at:]


def test_what_is_said_about_a_picture_does_not_lose_it() -> None:
    """Damaged EXIF, long texts, large colour profiles: the pixels are whole."""
    image = Image.effect_noise((40, 24), 90).convert("RGB")
    plain = encoded(image)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    exif = turned.tobytes().removeprefix(b"Exif\0\0")
    long, profile = zlib.compress(b"x" * 2_000_000), b"Raw profile type exif\0\0"
    hex_profile = zlib.compress(b"\nexif\n%8d\n%s\n" % (6 + len(exif), (b"Exif\0\0" + exif).hex().encode()))
    for kind, body in {
        (b"eXIf", b"\0\x08\0\2\1\x12\0\3"), (b"eXIf", b""), (b"zTXt", profile + zlib.compress(b"\nexif\n 12\nzzzz\n")),
        (b"zTXt", b"parameters\0\0" + long), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + long), (b"iCCP", b"icc\0\0" + long),
        (b"zTXt", b"parameters\0\0" + long[:9]), (b"tEXt", b"a" * 200), (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x>\xe9</x>"),
    }:  # fmt: skip
        for after in (False, True):
            data = with_chunk(plain, kind, body, after)
            assert open_image(data, "x", 10_000).tobytes() == image.tobytes(), (kind, after)
            assert image_size(data, "x", 10_000) == (40, 24)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    for data in (with_chunk(plain, b"eXIf", exif), with_chunk(plain, b"zTXt", profile + hex_profile)):
        assert open_image(data, "x", 10_000).tobytes() == upright.tobytes() and image_size(data, "x", 10_000) == (
            24,
            40,
        )
    lossless = dict(lossless=True, exact=True)
    for exif, right in ((b"Exif\0\0garbage", image), (turned.tobytes(), upright)):
        assert open_image(encoded(image, "WEBP", exif=exif, **lossless), "x", 10_000).tobytes() == right.tobytes()


NO_IMAGES = {
    "empty": b"",
    "text": b"no image",
    "other-format": encoded(Image.new("RGB", (8, 8)), "PCX"),  # Pillow could read it
    "no-pixels": png_promise(10, 10),
    "float": encoded(Image.new("F", (8, 8)), "TIFF"),
}


@pytest.mark.parametrize("data", NO_IMAGES.values(), ids=NO_IMAGES.keys())
def test_what_is_no_image_is_refused(data) -> None:
    with pytest.raises(SampleError, match="'name'") as caught:
        open_image(data, "name", 10_000)
    assert caught.value.reason == "bad_image"
    assert "object at 0x" not in caught.value.message
    if not data.startswith((b"\x89PNG", b"II")):
        assert f"it begins with {data[:8]!r}" in caught.value.message
        with pytest.raises(SampleError, match="'name'"):
            image_size(data, "name", 10_000)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_files_never_raise_anything_else(format) -> None:
    data = encoded(picture(40, 30), format)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(SampleError) as caught:
            open_image(data[: int(len(data) * share)], "x", 10_000)
        assert caught.value.reason == "bad_image" and "object at 0x" not in caught.value.message
    rng = np.random.default_rng(0)
    for _ in range(60):  # flipped bytes may leave a readable picture
        damaged = bytearray(data)
        for position in rng.integers(0, min(len(data), 400), 4):
            damaged[position] = rng.integers(256)
        with contextlib.suppress(SampleError):
            assert open_image(bytes(damaged), "x", 10_000).mode == "RGB"


def a_jpeg(number: int, rng: np.random.Generator) -> bytes:
    """Of any kind, and every other one damaged."""
    size = tuple(rng.integers(1, 90, 2).tolist())
    smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size)
    noise = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    mode = ("RGB", "RGB", "L", "CMYK")[number % 4]
    options = {"quality": int(rng.integers(1, 100)), "progressive": bool(rng.integers(2))}
    if mode == "RGB":
        options |= {"keep_rgb": True} if rng.random() < 0.2 else {"subsampling": int(rng.integers(3))}
    if rng.random() < 0.2:
        options["restart_marker_rows"] = 1
    if rng.random() < 0.3:
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.Orientation] = int(rng.integers(10))
    data = bytearray(encoded((smooth, noise)[number // 4 % 2].convert(mode), "JPEG", **options))
    damage = rng.integers(8)
    if damage == 0:
        del data[int(len(data) * rng.random()) :]
    elif damage == 1:
        for position in rng.integers(0, len(data), 3):
            data[position] = rng.integers(256)
    elif damage == 2:
        data += rng.bytes(20)
    elif damage == 3:
        start = int(rng.integers(len(data) // 2, len(data)))
        del data[start : start + 5]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
def test_jpeg_is_read_as_pillow_reads_it(monkeypatch) -> None:
    """The same pixels, and the same files refused: what simplejpeg finds fault with, Pillow decides."""
    decoded = {True: 0, False: 0}

    def decode(*args, **kwargs):
        decoded[False] += 1
        picture = decode_jpeg(*args, **kwargs)
        decoded[True] += 1
        return picture

    monkeypatch.setattr(images, "decode_jpeg", decode)
    rng, refused = np.random.default_rng(0), 0
    for number in range(800):
        data = a_jpeg(number, rng)
        try:
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as file:
                expected = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
        except (OSError, SyntaxError, ValueError, struct.error):
            refused += 1
            with pytest.raises(SampleError):
                read_picture(data, "x", 10**7)
        else:
            assert np.array_equal(read_picture(data, "x", 10**7).permute(1, 2, 0), expected), number
    assert refused > 80
    assert decoded[True] > 300, "simplejpeg has decoded"
    assert decoded[False] - decoded[True] > 80, "and has found fault, with a file that Pillow reads or refuses"


# ------------------------------------------------------------------------------------------------ ImageTransform


CLIP_336 = dict(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
LANDSCAPE = dict(size={"shortest_edge": 64}, crop_size={"height": 30, "width": 64})
PROCESSORS = [
    pytest.param("clip", {}, id="clip"),
    pytest.param("clip", CLIP_336, id="clip-336"),
    pytest.param("clip", dict(size={"shortest_edge": 256}, resample=2), id="dinov2"),
    pytest.param("clip", LANDSCAPE, id="crop-landscape"),
    pytest.param("siglip", dict(size={"height": 384, "width": 384}), id="siglip"),
    pytest.param("siglip", dict(size={"height": 64, "width": 96}), id="stretch-not-square"),
    pytest.param("siglip", dict(do_normalize=False), id="not-normalised"),
]


def make_processor(family: str, options: dict):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}[family](**options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "options"), PROCESSORS)
def test_same_pixels_as_transformers(family, options) -> None:
    """Of Pillow's resize a level of 255 away at times, otherwise equal up to float32 rounding."""
    processor = make_processor(family, options)
    from_file = json.loads(processor.to_json_string())
    transform = ImageTransform.from_preprocessor_config(from_file, patch=14)
    for width, height in ((64, 48), (48, 64), (224, 224), (225, 301), (53, 47), (600, 40), (700, 500)):
        image = picture(width, height)
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        pixels = transform(image)
        assert pixels.dtype == torch.uint8
        assert pixels.is_contiguous() and pixels.untyped_storage().nbytes() == pixels.numel()
        tiny.assert_same_picture(transform.views(pixels[None])[0], expected, transform.std)


@pytest.mark.parametrize("policy", ["pad", "resize", "crop"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_an_image_of_another_mode_is_taken_as_its_file_is(mode, policy) -> None:
    transform = ImageTransform(28, 28, 14, MEAN, STD, policy)
    image = two_colours(mode)
    expected = transform(read_picture(encoded(image), "x", 100))
    assert torch.equal(transform(image), expected)
    assert expected.shape == (3, 28, 28)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_resizing_is_pillows_one_side_after_the_other(resample) -> None:
    """Of black and white dots, the sharpest there is."""
    rng = np.random.default_rng(0)
    sizes = [
        (333, 1000),
        (300, 600),
        (1000, 333),
        (225, 301),
        (1, 40),
        (40, 1),
        *rng.integers(2, 400, (40, 2)).tolist(),
    ]
    targets = [(336, 336), (336, 336), (336, 336), (224, 224), (9, 7), (9, 7), *rng.integers(2, 400, (40, 2)).tolist()]
    for (width, height), (wide, high) in zip(sizes, targets, strict=True):
        image = Image.fromarray(rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255)
        method = Image.Resampling[resample.upper()]
        expected = np.asarray(image.resize((wide, height), method).resize((wide, high), method)).astype(int)
        found = resized(picture_of(image), wide, high, resample).permute(1, 2, 0).numpy()
        assert np.abs(found - expected).max() <= 2, (width, height, wide, high)
    image = picture(50, 40)
    assert np.array_equal(
        resized(picture_of(image), 30, 20, "lanczos").permute(1, 2, 0), image.resize((30, 20), Image.Resampling.LANCZOS)
    )


def test_old_preprocessor_config_with_numbers() -> None:
    old = {"crop_size": 336, "size": 336, "do_center_crop": True, "do_normalize": True, "resample": 3}
    old |= {"image_mean": list(MEAN), "image_std": list(STD), "feature_extractor_type": "CLIPFeatureExtractor"}
    expected = ImageTransform(336, 336, 14, MEAN, STD, "crop", "bicubic", 336)
    assert ImageTransform.from_preprocessor_config(old, 14) == expected
    assert ImageTransform.from_preprocessor_config({**old, "do_center_crop": False}, 14).policy == "resize"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"shortest_edge": 224}}, "shortest_edge"),
        ({"size": {"height": 64, "width": 64}, "do_center_crop": True, "crop_size": 32}, "crop_size=32"),
        ({"size": 32, "do_center_crop": True, "crop_size": 64}, "cannot be cropped"),
        ({"do_resize": False}, "do_resize=False"),
        ({"do_rescale": False}, "do_rescale=False"),
        ({"do_pad": True}, "do_pad=True"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"resample": 99}, "99"),
        ({"image_mean": None}, "image_mean is missing"),
        ({"image_std": [0.5]}, "3 values"),
        ({"size": 8}, "patch"),
    ],
)
def test_unsupported_preprocessor_config_is_refused(change, message) -> None:
    config = {"size": 224, "resample": 3, "image_mean": list(MEAN), "image_std": list(STD)}
    ImageTransform.from_preprocessor_config(config, 14)
    with pytest.raises(ConfigError, match=message):
        ImageTransform.from_preprocessor_config(config | change, 14)


@pytest.mark.parametrize(("width", "height"), [(60, 20), (20, 60), (31, 40), (50, 50)])
def test_pad_is_a_square_of_the_mean_colour(width, height) -> None:
    """Against NumPy: the rows (or columns) around the picture hold int(255 x mean), as LLaVA's padding does."""
    side = max(width, height)
    image = picture(width, height)
    expected = np.broadcast_to(np.array([int(255 * channel) for channel in MEAN], np.uint8), (side, side, 3)).copy()
    top, left = (side - height) // 2, (side - width) // 2
    expected[top : top + height, left : left + width] = np.asarray(image)
    seen = ImageTransform(side, side, 10, MEAN, STD, "pad")
    assert np.array_equal(np.asarray(seen.picture(seen(image))), expected)
    smaller = ImageTransform(24, 24, 8, MEAN, STD, "pad")
    resized = Image.fromarray(expected).resize((24, 24), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(smaller.picture(smaller(image))).astype(int) - np.asarray(resized)).max() <= 2


@pytest.mark.parametrize("policy", ["pad", "resize", "crop"])
@pytest.mark.parametrize(("width", "height"), [(3 * MAX_SIDE, 1), (1, 3 * MAX_SIDE), (MAX_SIDE + 1, 300)])
def test_extreme_sides_stay_within_bounds(policy, width, height, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(
        images, "interpolate", lambda x, s, **k: calls.append((x.shape[2:], s)) or interpolate(x, s, **k)
    )
    transform = ImageTransform(28, 28, 14, MEAN, STD, policy)
    pixels = transform(Image.new("RGB", (width, height), "white"))
    assert pixels.shape == (3, 28, 28)
    assert pixel(transform.picture(pixels), 14, 14)[0] > 100
    assert max(calls[-1][0]) <= MAX_SIDE
    assert calls[-1][1][0] * calls[-1][1][1] <= 17 * 28 * 28


def test_tokens_dict_and_resampling() -> None:
    transform = ImageTransform(384, 384, 14, MEAN, STD, "resize", "bilinear")
    assert transform.num_tokens(1000, 3) == 27 * 27  # SigLIP so400m/14 at 384 pixels
    assert ImageTransform(28, 56, 14, MEAN, STD).num_tokens(9, 9) == 2 * 4
    stored = json.loads(json.dumps(transform.to_dict()))
    assert ImageTransform.from_dict(stored) == transform
    assert hash(ImageTransform.from_dict(stored)) == hash(transform)
    image = picture(50, 40)
    nearest = ImageTransform(40, 50, 10, MEAN, STD, "resize", "nearest")
    assert np.array_equal(np.asarray(nearest.picture(nearest(image))), np.asarray(image))
    assert not torch.equal(transform(image), ImageTransform(384, 384, 14, MEAN, STD)(image))
    for broken in ({**stored, "sise": 3}, {key: stored[key] for key in stored if key != "mean"}):
        with pytest.raises(ConfigError, match=r"sise|mean"):
            ImageTransform.from_dict(broken)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "squash"}, "pad, resize, crop"),
        ({"resample": "cubic"}, "bicubic"),
        ({"policy": "pad", "width": 56}, "28 x 56"),
        ({"policy": "crop", "shortest": 20}, "20"),
        ({"patch": 29}, "29"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
        ({"mean": (0.5,)}, "3 values"),
    ],
)
def test_impossible_transforms_are_refused(values, message) -> None:
    good = {"height": 28, "width": 28, "patch": 14, "mean": MEAN, "std": STD}
    with pytest.raises(ConfigError, match=message):
        ImageTransform(**{**good, **values})
