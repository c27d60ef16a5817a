"""Images of many sizes: pixels, sizes and token counts against transformers' own image processors, and counts from headers."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from lit_eemllm.errors import ConfigError
from lit_eemllm.inputs.images import MAX_SIDE, ImageTransform, image_size, open_image
from lit_eemllm.inputs.resolutions import NativeTransform, transform_from_dict, with_policy
from lit_eemllm.inputs.tiles import AnyresTransform, SplitTransform, TilesTransform
from lit_eemllm.model.vision import patches_of

HALF = (0.5, 0.5, 0.5)
SIZES = [
    (1, 1),
    (1, 300),
    (300, 1),
    (2, 3),
    (48, 48),
    (49, 47),
    (900, 40),
    (33, 700),
    (640, 480),
    (481, 641),
    (1300, 1100),
]
LONG = [(3 * MAX_SIDE, 2), (1, 3 * MAX_SIDE), (MAX_SIDE + 1, 300)]


def picture(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def naflex(most: int = 64, patch: int = 8) -> NativeTransform:
    return NativeTransform(patch, HALF, HALF, most=most)


def tiled(side: int = 24, patch: int = 4) -> AnyresTransform:
    return AnyresTransform(ImageTransform(side, side, patch, HALF, HALF))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("patch", "most"), [(16, 256), (8, 50), (14, 7)])
def test_naflex_as_siglip2(patch, most):
    processor = Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=most)
    transform = NativeTransform.from_preprocessor_config(json.loads(processor.to_json_string()), patch)
    for size in SIZES:
        image = picture(*size)
        expected = processor(image, return_tensors="pt")
        height, width = expected["spatial_shapes"][0].tolist()
        pixels = transform(image)
        assert pixels.shape == (3, height * patch, width * patch)
        assert transform.num_tokens(*size) == height * width == expected["pixel_attention_mask"].sum() <= most
        found = patches_of(transform.views([pixels])[0], patch)
        tiny.assert_same_picture(found, expected["pixel_values"][0, : len(found)], transform.std)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("edges", [(378, 980), (28, 100)])
def test_native_as_idefics2(edges):
    processor = Idefics2ImageProcessorPil(size={"shortest_edge": edges[0], "longest_edge": edges[1]})
    transform = NativeTransform.from_preprocessor_config(json.loads(processor.to_json_string()), 14)
    for size in SIZES:
        image = picture(*size)
        expected = processor([[image]], return_tensors="pt")["pixel_values"][0, 0]
        rows, columns = (side // 14 for side in expected.shape[-2:])
        pixels = transform(image)
        assert transform.num_tokens(*size) == rows * columns and pixels.shape == (3, rows * 14, columns * 14)
        tiny.assert_same_picture(transform.views([pixels])[0], expected[:, : rows * 14, : columns * 14], transform.std)
    assert NativeTransform(14, HALF, HALF, edges=(378, 980)).num_tokens(5000, 5000) == 4900  # the EE-MLLM paper's most


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pinpoints", [None, [[48, 24], [24, 96], [24, 24]]])
def test_anyres_as_llava_next(pinpoints):
    side, patch = 24, 4
    pinpoints = pinpoints or [[side * rows, side * columns] for rows, columns in AnyresTransform(tiled().view).grids]
    options = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = LlavaNextImageProcessorPil(**options, image_grid_pinpoints=pinpoints)
    view = ImageTransform(side, side, patch, tuple(processor.image_mean), tuple(processor.image_std))
    transform = AnyresTransform(view, tuple((height // side, width // side) for height, width in pinpoints))
    for size in SIZES:
        image = picture(*size)
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        tiny.assert_same_picture(transform.views([transform(image)]), expected, transform.std)
        # which features, against transformers' own cutting of a grid
        rows, columns = transform.grid(*size)
        n = side // patch
        tiles = torch.arange(n * n, n * n * (1 + rows * columns)).view(rows, columns, n, n)
        whole = tiles.permute(0, 2, 1, 3).reshape(1, rows * n, columns * n)
        kept = unpad_image(whole, (size[1], size[0]))[0]
        newline = n * n * (1 + rows * columns)
        lines = torch.cat([kept, torch.full((len(kept), 1), newline)], dim=1)
        order, features, _ = transform.order([size])
        assert features == newline and order.tolist() == [*range(n * n), *lines.flatten().tolist()]
        assert len(order) == transform.num_tokens(*size)


@pytest.mark.parametrize("transform", [naflex(), NativeTransform(14, HALF, HALF, edges=(28, 98)), tiled()])
@pytest.mark.parametrize("size", SIZES + LONG)
def test_a_count_is_what_the_pixels_give(transform, size):
    pixels, tokens = transform(Image.new("RGB", size)), transform.num_tokens(*size)
    assert tokens <= transform.num_tokens(*transform.largest)
    if isinstance(transform, AnyresTransform):
        order, features, _ = transform.order([size])
        assert len(order) == tokens and features == 36 * len(pixels)
    else:
        assert pixels.shape[1] * pixels.shape[2] == tokens * transform.patch**2
    assert transform.picture(pixels).mode == "RGB"


@pytest.mark.parametrize(("tile", "longest"), [(16, 40), (16, 64), (14, 81), (32, 25)])
def test_split_as_idefics3(tile, longest):
    """Rows and columns of tiles, and views; the tiles that the longer side is rounded up to are what the shorter one grows with."""
    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": longest}, max_image_size={"longest_edge": tile}, resample=2
    )
    transform = SplitTransform(ImageTransform(tile, tile, 2, HALF, HALF), longest)
    generator = np.random.default_rng(tile)
    for size in [*SIZES, (40, 30), *map(tuple, generator.integers(1, 80, (60, 2)).tolist())]:
        image = picture(*size)
        true = processor(image, return_row_col_info=True, return_tensors="pt")
        grid = transform.grid(*size)
        assert grid == (max(1, true["rows"][0][0]), max(1, true["cols"][0][0])), size
        assert len(transform(image)) == transform.num_views(*size) == len(true["pixel_values"][0]), size


def test_order_of_several_pictures():
    transform = tiled()
    (first, features, _), (both, last, _) = transform.order([(40, 20)]), transform.order([(40, 20), (20, 70)])
    assert (features, last - features) == tuple(36 * len(transform(picture(*size))) for size in ((40, 20), (20, 70)))
    assert both[: len(first)].masked_fill(both[: len(first)] == last, features).equal(first)
    patches = both[both < last].tolist()
    assert patches != sorted(patches) and len(patches) == len(set(patches)) and (both == last).any()
    assert transform.order([])[0].tolist() == [] and transform.order([])[1] == 0


def test_kinds_of_transforms_are_stored_and_changed():
    for transform in (naflex(), NativeTransform(14, HALF, HALF, edges=(28, 98)), tiled(), tiled().view):
        stored = json.loads(json.dumps(transform.to_dict()))
        assert transform_from_dict(stored) == transform == with_policy(transform, transform.policy)
        hash(transform)
        with pytest.raises(ConfigError, match="sise"):
            transform_from_dict({**stored, "sise": 3})
    assert with_policy(tiled(), "pad").policy == "pad" and with_policy(tiled().view, "anyres") == tiled()
    with pytest.raises(ConfigError, match="one size"):
        with_policy(tiled(), "native")
    with pytest.raises(ConfigError, match="set native, not pad"):
        with_policy(naflex(), "pad")
    smaller = NativeTransform(14, HALF, HALF, edges=(378, 980)).within(100)
    assert smaller.edges == (140, 140) and naflex().within(9).num_tokens(500, 500) == 9
    assert max(smaller.num_tokens(*size) for size in SIZES) <= 100


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NativeTransform(14, HALF, HALF), "bounded by patches, edges or area"),
        *(
            (lambda area=area: NativeTransform(14, HALF, HALF, area=area), "image area: found")
            for area in ([1], ["1", 2], [1, 2, 3], [5, 4], [1, 2**40], [0, 9])
        ),
        *(
            (lambda grids=grids: replace(tiled(), grids=grids), "'anyres' chooses from 1 to 128 grids")
            for grids in ([], [[1, 1]] * 129, [[10**4, 10**4]], [[1, 129]], [["1", "2"]], [[1, 2, 3]], [[0, 1]])
        ),
        (lambda: replace(tiled(), most=True), "tokens of 1 tile at least, found True"),
        *(
            (lambda sizes=sizes: TilesTransform(tiled().view, *sizes), "into 1 to 128 tiles, found")
            for sizes in ((0, 4), (3, 2), (1, 129), ("1", 2), (1, None), (1, 0.5))
        ),
        *(
            (lambda texts=texts: TilesTransform(tiled().view, around=texts), "'tiles' puts two short texts around")
            for texts in ("a", ["a", 1], ["a" * 10**6, ""], [])
        ),
        *(
            (
                lambda longest=longest: SplitTransform(tiled().view, longest),
                "a longer side of 1 to 144 pixels, six tiles, found",
            )
            for longest in (-1, 145, "9", None, True, [9])
        ),
        (lambda: NativeTransform(14, HALF, HALF, most=0), "image patches: found 0, expected a whole number from 1"),
        (lambda: NativeTransform(14, HALF, HALF, edges=(9, 20)), r"\(9, 20\)"),
        (lambda: NativeTransform(14, HALF, HALF, edges=(50, 20)), r"\(50, 20\)"),
        (lambda: NativeTransform(14, HALF, (0, 1, 1), most=4), "std above 0"),
        (lambda: NativeTransform.from_preprocessor_config({"size": {"height": 9, "width": 9}}, 3), "max_num_patches"),
        (lambda: AnyresTransform(ImageTransform(20, 24, 4, HALF, HALF)), "square"),
    ],
)
def test_impossible_transforms_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 5, 6, 8])
def test_headers_tell_the_upright_size(kind, orientation):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    file = io.BytesIO()
    picture(40, 20).save(file, kind, **({} if kind == "GIF" else {"exif": exif}))
    data = file.getvalue()
    assert image_size(data, "x", 10_000) == open_image(data, "x", 10_000).size
    if kind == "JPEG":
        assert image_size(data, "x", 10_000) == ((20, 40) if orientation in (5, 6, 8) else (40, 20))
