"""Image bytes -> RGB picture -> pixels for the vision encoder, and the number of visual tokens they become.

`read_picture` and `image_size` read untrusted bytes: only plain raster formats (no reader that starts another program), and
nothing is decoded before the size in the file's header was found acceptable. Pixels stay bytes from the loader to the device, a
quarter of what floats take; they are normalised there.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from simplejpeg import decode_jpeg
from torch.nn.functional import interpolate

from lit_eemllm import limits
from lit_eemllm.errors import ConfigError, SampleError
from lit_eemllm.inputs.reduction import EACH, Grids, Order, Reduction
from lit_eemllm.inputs.spans import Pieces
from lit_eemllm.layout import Pixels, map_images, upload

if TYPE_CHECKING:
    from typing_extensions import Self

_TEXTS = (b"zTXt", b"iTXt", b"tEXt", b"iCCP")  # of a PNG
_LONGEST_TEXT = 2**18
_SCAN, _END = b"\xff\xda", b"\xff\xd9"  # of a JPEG
_MARK = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")  # of a segment, which has a length; the others have none
_TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), 2))  # fmt: skip
_DAMAGED = (ValueError, TypeError, LookupError, AttributeError, SyntaxError, ArithmeticError, OSError, struct.error)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
POLICIES = ("pad", "resize", "crop")
RESAMPLING = {method.name.lower(): method for method in Image.Resampling}
LATER = {"later": True}
"""Metadata of a transform's field that folders and checkpoints of earlier versions lack."""
WHOLE = (0, 0)
MAX_SIDE = 8192  # pixels; pictures with a longer side are first reduced by a whole factor, to bound memory
LARGEST_SIZE = 2**14  # that an encoder may ask for, in pixels or patches
MAX_ASPECT = 16  # of what "crop" resizes; longer ends are cut off before, not after, to bound memory
# of damaged EXIF; once for all, since Python forgets which warnings it has shown whenever its filters change
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")


def read_picture(data: bytes, name: str, max_pixels: int) -> torch.Tensor:
    """Decode the first frame of an image file, upright, in RGB, with transparent pixels on white: bytes [3, height, width].

    What Pillow reads and refuses, and its pixels. Plain JPEG, which data sets are full of, simplejpeg decodes to the same bytes
    (both are libjpeg-turbo) in down to half the time; what it finds fault with is Pillow's to judge.

    Args:
        data: the file's content.
        name: names the image in messages.
        max_pixels: largest accepted width x height; Pillow's own limit (`Image.MAX_IMAGE_PIXELS`) holds as well.

    Raises:
        SampleError: ``image_too_large`` (by its header, or by the work it would be) or ``bad_image`` (other format, damaged,
            truncated).
    """
    with _opened(data, name, max_pixels) as image:
        if image.format == "JPEG" and image.mode in ("RGB", "L") and not _orientation(image):
            room = np.empty((image.height, image.width, 3), dtype=np.uint8)  # for what was found acceptable, no more
            with suppress(ValueError):
                return torch.from_numpy(decode_jpeg(data, "RGB", buffer=room)).permute(2, 0, 1)
        image.load()
        turn = _TURNS.get(_orientation(image))  # of a PNG it may stand behind the pixels
        return picture_of(_to_rgb(image if turn is None else image.transpose(turn)))


def open_image(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """What `read_picture` reads, as Pillow's image. Raises SampleError."""
    return image_of(read_picture(data, name, max_pixels))


def picture_of(image: Image.Image) -> torch.Tensor:
    """An RGB image of Pillow's as bytes [3, height, width], in memory pixel after pixel, which resizing is fastest with."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def image_of(picture: torch.Tensor) -> Image.Image:
    """The other way round."""
    return Image.fromarray(picture.cpu().permute(1, 2, 0).numpy())


def image_size(data: bytes, name: str, max_pixels: int) -> tuple[int, int]:
    """Upright width and height by the header alone; refuses what `read_picture` would refuse without decoding.

    An orientation that a PNG states behind its pixels is not seen. Raises SampleError.
    """
    with _opened(data, name, max_pixels) as image:
        width, height = image.size
        turned = image.format != "TIFF" and _orientation(image) >= 5  # a TIFF's size is upright already
        return (height, width) if turned else (width, height)


def read_file(path: Path, name: str) -> bytes:
    """An image's file. Raises SampleError if it is larger than is read, OSError if it cannot be."""
    if (size := path.stat().st_size) > limits.IMAGE_BYTES:
        raise _too_long(name, size)
    return path.read_bytes()


def _too_long(name: str, size: int) -> SampleError:
    return SampleError("image_too_large", f"image {name!r} has {size:,} bytes, more than {limits.IMAGE_BYTES:,}")


def _scans(image: Image.Image, data: bytes) -> float:
    """How often a JPEG goes over its pixels: a small file can say so thousands of times."""
    tiles = 1
    if isinstance(image, TiffImageFile):
        if "jpeg" not in str(image.info.get("compression")):
            return 1
        tiles = max(len(image.tag_v2.get(tag, ())) for tag in (ExifTags.Base.StripOffsets, ExifTags.Base.TileOffsets))
    elif image.format in ("JPEG", "MPO"):
        return _scans_of_jpeg(data)
    else:
        return 1
    return data.count(_SCAN) / max(1, tiles)  # in between there are none by chance


def _scans_of_jpeg(data: bytes) -> int:
    """Its scans up to its end, found as libjpeg does. What segments hold (a thumbnail) and what stands behind (a phone's film) is
    no part of the picture."""
    scans, at = 0, 2
    while (mark := _MARK.search(data, at)) and mark.group() != _END:
        scans += mark.group() == _SCAN
        at = mark.end() + max(2, int.from_bytes(data[mark.end() : mark.end() + 2], "big"))
    return scans


def _without_texts(data: bytes) -> bytes:
    """A PNG without compressed texts and colour profiles, over which Pillow loses the picture where they are damaged or long.

    What tells its orientation stays, unless it is damaged; any other file is as it was.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or not any(kind in data for kind in _TEXTS):
        return data
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 8 : end - 4]
        if kind not in _TEXTS or _short_text(kind, body):
            kept.append(data[at:end])
        at = end
        if kind == b"IEND":
            break
    return b"".join(kept)


def _short_text(kind: bytes, body: bytes) -> bool:
    """Whether a chunk holds what tells an orientation, and that is no longer than that takes."""
    keyword, _, rest = body.partition(b"\0")
    if keyword not in (b"Raw profile type exif", b"XML:com.adobe.xmp") or len(rest) > _LONGEST_TEXT:
        return False
    if kind == b"iTXt":  # whether it is compressed, how, language, keyword in it
        compressed, rest = rest[:1] == b"\1", b"".join(rest[2:].split(b"\0", 2)[2:])
    else:
        compressed, rest = kind == b"zTXt", rest[1:]
    with suppress(zlib.error):
        return not compressed or len(zlib.decompressobj().decompress(rest, _LONGEST_TEXT)) < _LONGEST_TEXT
    return False


def _orientation(image: Image.Image) -> int:
    """2 to 8 as EXIF counts them, 0 where nothing is to be turned; without decoding (`getexif` of PNG files would decode)."""
    found: object = None
    with suppress(*_DAMAGED):  # what is said about a whole picture is no reason to lose it
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    return found if isinstance(found, int) and found in _TURNS else 0


@contextmanager
def _opened(data: bytes, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """The image with its header read and its size accepted; what goes wrong, also inside the block, is a SampleError."""
    if len(data) > limits.IMAGE_BYTES:
        raise _too_long(name, len(data))
    try:
        with Image.open(io.BytesIO(_without_texts(data)), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                found = f"image {name!r} has {image.width} x {image.height} pixels, more than {max_pixels}"
                raise SampleError("image_too_large", f"{found}; shrink it or raise data.max_image_pixels")
            if (scans := _scans(image, data)) * image.width * image.height > limits.IMAGE_SCANS * max_pixels:
                found = f"image {name!r} goes {scans:,.0f} times over {image.width} x {image.height} pixels"
                raise SampleError(
                    "image_too_large", f"{found}, which is far more work than a picture needs; write it anew"
                )
            yield image
    except (SampleError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError("image_too_large", f"image {name!r}: {error}") from error
    except Exception as error:  # on damaged files Pillow's readers raise nearly anything
        reason = f"it begins with {data[:8]!r}" if isinstance(error, UnidentifiedImageError) else error
        message = f"image {name!r} ({len(data)} bytes) cannot be read as {', '.join(FORMATS)}: {reason}"
        raise SampleError("bad_image", message) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):  # 16-bit grey values, which Pillow would clip to 255
        values = np.asarray(image).clip(0, 65535)
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies


def _centre(picture: torch.Tensor, width: int, height: int) -> torch.Tensor:
    left, top = (picture.shape[2] - width) // 2, (picture.shape[1] - height) // 2
    return picture[:, top : top + height, left : left + width]


def _squared(picture: torch.Tensor, colour: Sequence[int]) -> torch.Tensor:
    """The picture in the middle of a square of the colour."""
    _, height, width = picture.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    bottom, right = top + height, left + width
    row = np.tile(np.array(colour, dtype=np.uint8), (side, 1))
    square = np.empty((side, side, 3), dtype=np.uint8)  # NumPy fills rows twice as fast as PyTorch
    square[:top] = square[bottom:] = row
    square[:, :left], square[:, right:] = row[:left], row[right:]
    square[top:bottom, left:right] = picture.permute(1, 2, 0)
    return torch.from_numpy(square).permute(2, 0, 1)


def within_max_side(picture: torch.Tensor) -> torch.Tensor:
    """The picture, reduced if it is longer than MAX_SIDE."""
    longest = max(picture.shape)
    return picture_of(image_of(picture).reduce(math.ceil(longest / MAX_SIDE))) if longest > MAX_SIDE else picture


def resized(picture: torch.Tensor, width: int, height: int, resample: str) -> torch.Tensor:
    """The picture as bytes [3, height, width].

    PyTorch's antialiased filters, as in transformers with torchvision: Pillow's within two of 255 levels, several times as fast,
    and always the horizontal pass first. (Pillow 13 chooses; what overshoots is clipped in between, so the order can change
    sharp strokes by 30 levels.) PyTorch has two filters; the others are Pillow's.
    """
    if resample not in ("bilinear", "bicubic"):
        return picture_of(image_of(picture).resize((width, height), RESAMPLING[resample]))
    if picture.shape[1:] == (height, width):
        return picture
    return interpolate(picture[None], (height, width), mode=resample, antialias=True)[0]


class Transform(ABC):
    """RGB picture -> pixels, and how many visual tokens they become. A frozen dataclass of plain values.

    Attributes:
        fixed: every picture becomes pixels of one shape [3, height, width].
        policy: its word in ``model.vision.policy``.
        mean, std: of the values 0..1 of each channel.
        reduction: what the connector behind the encoder makes of its features; not stored with the transform.
    """

    fixed: ClassVar[bool] = False
    reduction: Reduction = EACH
    policy: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, picture: Image.Image | torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Pixels of a picture (`read_picture`'s bytes, or Pillow's image), bytes: do not cast them, since floats are taken as
        normalised. `size`: what `size_among` says, if that is not the picture's."""
        made = picture if isinstance(picture, torch.Tensor) else picture_of(_to_rgb(picture))
        return self._whole(made) if size == WHOLE else self._pixels(made)

    def size_among(self, size: tuple[int, int], pictures: int) -> tuple[int, int]:
        """Width and height of a picture, as all that follows is to take them where a conversation has so many pictures: `WHOLE` if only a
        view of the whole is shown."""
        return size

    def _whole(self, picture: torch.Tensor) -> torch.Tensor:
        """As `_pixels`, of a picture whose size is `WHOLE`."""
        return self._pixels(picture)

    @abstractmethod
    def _pixels(self, picture: torch.Tensor) -> torch.Tensor:
        """Of bytes [3, height, width]; never a view of what is larger, which would be kept."""

    @abstractmethod
    def num_tokens(self, width: int, height: int) -> int:
        """Visual tokens of a picture of width x height pixels."""

    def pieces(self, width: int, height: int) -> Pieces:
        """What stands in the ids for such a picture: its visual tokens, all in one run."""
        return (self.num_tokens(width, height),)

    def runs(self, width: int, height: int) -> list[int]:
        """Visual tokens of each of the picture's runs, which text may lie between."""
        return [piece for piece in self.pieces(width, height) if isinstance(piece, int)]

    @property
    @abstractmethod
    def largest(self) -> tuple[int, int]:
        """Width and height of a picture that becomes as many tokens as any."""

    @property
    def largest_view(self) -> tuple[int, int]:
        """Rows and columns of features in a view of that picture; of one token, where each feature is one."""
        return self.view_grids([self.largest])[0] if self.reduction.by_place else (1, 1)

    def picture(self, pixels: torch.Tensor) -> Image.Image:
        """What the model sees, from the pixels of a picture."""
        return image_of(pixels)

    def views(self, pixels: Pixels) -> Pixels:
        """What the encoder gets of several pictures: their pixels, normalised, float32. Floats are taken as normalised already."""
        if pixels[0].is_floating_point():
            return pixels
        mean, std = (upload(torch.tensor(values).view(3, 1, 1), pixels[0].device) for values in (self.mean, self.std))
        return map_images(pixels, lambda x: (x / 255 - mean) / std)

    def view_grids(self, sizes: Sequence[tuple[int, int]]) -> Grids:
        """Of the features of pictures of these sizes (width, height), one after the other. Raises ConfigError if they are not known."""
        raise ConfigError(
            f"model.connector.name: needs to know the rows and columns of features, which {type(self).__name__}, the transform of "
            "this encoder, does not tell (Transform.view_grids); set one that makes a token of each feature, such as mlp"
        )

    def with_reduction(self, reduction: Reduction) -> Self:
        """The same before a connector that reduces features so. Raises ConfigError if `view_grids` does not tell what it needs."""
        reduction = reduction if reduction.by_place else EACH
        if reduction == self.reduction:
            return self
        self.view_grids([])
        return replace(self, reduction=reduction)  # type: ignore[type-var]

    def order(self, sizes: Sequence[tuple[int, int]]) -> Order | None:
        """Which row of what the connector makes each visual token is, of pictures of these sizes (width, height) one after the
        other. None = each row is a token."""
        return None

    def identity(self) -> dict[str, Any]:
        """All that decides what becomes of a picture: pixels, and tokens."""
        return self.to_dict() | ({"reduction": str(self.reduction)} if self.reduction.by_place else {})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values from which `from_dict` makes the same transform, without a reduction and, so that they stay what they
        were, without `LATER` fields that say nothing."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items() if key != "reduction"}
            return [plain(item) for item in value] if isinstance(value, tuple) else value

        silent = {
            each.name
            for each in fields(self)  # type: ignore[arg-type]
            if each.metadata == LATER and getattr(self, each.name) == each.default
        }
        return {key: value for key, value in plain(asdict(self)).items() if key not in silent}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises ConfigError on unknown or missing keys."""
        known = {each.name: each.metadata == LATER for each in fields(cls) if each.name != "reduction"}  # type: ignore[arg-type]
        if wrong := {
            *(values.keys() - known.keys()),
            *(name for name in known.keys() - values.keys() if not known[name]),
        }:
            raise ConfigError(f"image transform: unknown or missing keys {', '.join(sorted(wrong))}")
        return cls(**values)


def check_normalisation(mean: Sequence[float], std: Sequence[float], resample: str) -> None:
    """Raises ConfigError."""
    if resample not in RESAMPLING:
        raise ConfigError(f"unknown image resampling {resample!r}; known: {', '.join(RESAMPLING)}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ConfigError(f"image mean and std need 3 values, std above 0; found {mean} and {std}")


def check_sizes(**sizes: int) -> None:
    """Of sides in pixels, or of patches. Raises ConfigError."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST_SIZE:
            raise ConfigError(f"image {name}: found {size!r}, expected a whole number from 1 to {LARGEST_SIZE}")


@dataclass(frozen=True)
class ImageTransform(Transform):
    """RGB picture -> pixels of a fixed size, [3, height, width].

    Policies: ``pad`` puts the picture in the middle of a square of the mean colour and resizes that, as LLaVA-1.5 does
    (height must equal width); ``resize`` stretches it; ``crop`` resizes its shortest side to `shortest` and cuts out
    the centre, as CLIP does.
    """

    fixed: ClassVar[bool] = True

    height: int  # pixels of the result
    width: int
    patch: int  # side in pixels of the square that becomes a feature; a remainder at the border is dropped
    mean: tuple[float, float, float]  # of the values 0..1 of each channel
    std: tuple[float, float, float]
    policy: str = "resize"
    resample: str = "bicubic"
    shortest: int | None = None  # pixels, used by "crop" alone; default: the larger of height and width
    reduction: Reduction = field(default=EACH, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if self.policy not in POLICIES:
            raise ConfigError(f"unknown image policy {self.policy!r}; known: {', '.join(POLICIES)}")
        check_normalisation(self.mean, self.std, self.resample)
        check_sizes(height=self.height, width=self.width, patch=self.patch, shortest=self.shortest or self.height)
        size = f"{self.height} x {self.width} pixels"
        if not 1 <= self.patch <= min(self.height, self.width):
            raise ConfigError(f"a patch of {self.patch} pixels does not fit into images of {size}")
        if self.policy == "pad" and self.height != self.width:
            raise ConfigError(f"image policy 'pad' makes squares, but images are to have {size}")
        if self.policy == "crop" and self.shortest and self.shortest < max(self.height, self.width):
            raise ConfigError(f"images resized to a shortest side of {self.shortest} cannot be cropped to {size}")

    def _pixels(self, picture: torch.Tensor) -> torch.Tensor:
        picture = within_max_side(picture)
        size = (self.width, self.height)
        if self.policy == "pad":
            picture = _squared(picture, [int(channel * 255) for channel in self.mean])
        elif self.policy == "crop":
            _, height, width = picture.shape
            keep = MAX_ASPECT * min(width, height)
            picture = _centre(picture, min(width, keep), min(height, keep))
            _, height, width = picture.shape
            shortest, before = self.shortest or max(size), min(width, height)
            size = (width * shortest // before, height * shortest // before)
        return _centre(resized(picture, *size, self.resample), self.width, self.height).contiguous()

    def view_grids(self, sizes: Sequence[tuple[int, int]]) -> Grids:
        return ((self.height // self.patch, self.width // self.patch),) * len(sizes)

    def num_tokens(self, width: int, height: int) -> int:
        """Visual tokens of a picture of width x height pixels: the same for all, as the result has a fixed size."""
        return self.reduction.count(self.view_grids([(width, height)]))

    @property
    def largest(self) -> tuple[int, int]:
        return self.width, self.height

    @classmethod
    def from_preprocessor_config(cls, config: Mapping[str, Any], patch: int) -> ImageTransform:
        """The transform that a transformers ``preprocessor_config.json`` describes (CLIP, SigLIP, DINOv2, ViT, ...).

        Sizes may be in the old form (a number) or the new one (a mapping); `patch` is the encoder's patch size in
        pixels. Raises ConfigError if a key is missing or asks for something that no policy does.
        """
        crop, normalize = config.get("do_center_crop"), config.get("do_normalize", True)
        needed = ["size", "resample"] + ["crop_size"] * bool(crop) + ["image_mean", "image_std"] * bool(normalize)
        if missing := [key for key in needed if config.get(key) is None]:
            raise ConfigError(f"preprocessor config: {', '.join(missing)} is missing")
        size, target = config["size"], config["crop_size" if crop else "size"]
        if isinstance(size, int):
            size = {"shortest_edge": size} if crop else {"height": size, "width": size}
        if isinstance(target, int):
            target = {"height": target, "width": target}
        by_side = bool(crop) and set(size) == {"shortest_edge"}
        policy = "crop" if by_side else "resize"
        refused = {"do_resize": False, "do_rescale": False, "do_pad": True}
        wrong = [key for key, value in refused.items() if config.get(key) is value]
        if set(target) != {"height", "width"} or (not by_side and size != target):
            wrong += ["size", "crop_size"]
        if not math.isclose(config.get("rescale_factor") or 1 / 255, 1 / 255):
            wrong.append("rescale_factor")
        if wrong:
            found = ", ".join(f"{key}={config.get(key)}" for key in wrong)
            raise ConfigError(f"preprocessor config: {found} fits none of the image policies {', '.join(POLICIES)}")
        mean, std = (config["image_mean"], config["image_std"]) if normalize else ((0.0,) * 3, (1.0,) * 3)
        names = {int(method): name for name, method in RESAMPLING.items()}
        resample = names.get(config["resample"], config["resample"])
        shortest = size.get("shortest_edge")
        return cls(**target, patch=patch, mean=mean, std=std, policy=policy, resample=resample, shortest=shortest)
