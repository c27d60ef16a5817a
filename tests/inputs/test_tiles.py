"""How many tokens a picture of any size has in the families that people use, as transformers' own processors count them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lib.vlms import KINDS, conversation, of_images, tokenizer_of
from transformers import LlavaOnevisionProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lit_eemllm.errors import ConfigError
from lit_eemllm.inputs.images import ImageTransform
from lit_eemllm.inputs.resolutions import NativeTransform, transform_from_dict, with_policy
from lit_eemllm.inputs.tiles import TILED, AnyresTransform, SplitTransform, TilesTransform
from lit_eemllm.mechanisms.pooling import Merger, PixelShuffle

HALF = (0.5, 0.5, 0.5)
SIDES = st.integers(1, 5000)


def view(side: int, patch: int) -> ImageTransform:
    return ImageTransform(side, side, patch, HALF, HALF)


@settings(deadline=None)
@given(SIDES, SIDES)
def test_internvl(width, height):
    ours = TilesTransform(view(448, 14), around=("<img>", "</img>")).with_reduction(PixelShuffle(2))
    theirs = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=1, max_patches=12
    )
    views = theirs.get_number_of_image_patches(height, width)
    assert ours.num_views(width, height) == views <= 13 and ours.pieces(width, height) == (
        "<img>",
        256 * views,
        "</img>",
    )


@settings(deadline=None)
@given(SIDES, SIDES, st.sampled_from([(512, 2048), (364, 1456), (384, 1536), (512, 512)]))
def test_smolvlm_and_idefics3(width, height, sizes):
    side, longest = sizes
    ours = SplitTransform(view(side, 16 if side == 512 else 14), longest=longest)
    theirs = Idefics3ImageProcessorPil(size={"longest_edge": longest}, max_image_size={"longest_edge": side})
    views, rows, columns = theirs.get_number_of_image_patches(height, width)
    assert ours.num_views(width, height) == max(views, 1)
    assert ours.grid(width, height) == (max(rows, 1), max(columns, 1))


@settings(deadline=None, max_examples=50)
@given(SIDES, SIDES)
def test_llava_onevision(width, height):
    grids = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    ours = AnyresTransform(view(384, 14), tuple((y // 384, x // 384) for y, x in grids), most=9, lone=True)
    images = LlavaOnevisionImageProcessorPil(size={"height": 384, "width": 384}, image_grid_pinpoints=grids)
    theirs = of_images(LlavaOnevisionProcessor)(
        images,
        tokenizer_of(KINDS["llava_onevision"]),
        None,
        num_image_tokens=729,
        vision_feature_select_strategy="full",
    )
    (count,) = theirs._get_num_multimodal_tokens([(height, width)])["num_image_tokens"]
    assert ours.num_tokens(width, height) == count == len(ours.order([(width, height)]).index_V)


@settings(deadline=None)
@given(SIDES, SIDES)
def test_qwen(width, height):
    ours = NativeTransform(14, HALF, HALF, area=(56 * 56, 28 * 28 * 1280)).with_reduction(Merger(2))
    theirs = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2)
    if max(width, height) <= 200 * min(width, height):
        assert ours.num_tokens(width, height) == theirs.get_number_of_image_patches(height, width) // 4 <= 1280
    assert ours.num_tokens(*ours.largest) == 1280
    few = NativeTransform(14, HALF, HALF, area=(256 * 28**2, 16384 * 28**2)).with_reduction(Merger(2)).within(4 * 64)
    if max(width, height) <= 200 * min(width, height):
        limit = 64 if max(width, height) < 30 * min(width, height) else few.num_tokens(*few.largest)
        assert few.num_tokens(width, height) <= limit <= 114


@pytest.mark.parametrize("policy", TILED)
def test_transforms_go_through_files_and_policies(policy):
    made = with_policy(view(16, 4), policy)
    assert transform_from_dict(made.to_dict()) == made and with_policy(made, policy) is made
    assert with_policy(made, "resize") == view(16, 4)
    later = {"most", "lone"} & made.to_dict().keys()  # a folder of an earlier version has none of them
    assert not later or policy == "tiles"
    assert made.num_tokens(*made.largest) >= max(
        made.num_tokens(*size) for size in [(1, 1), (900, 3), (70, 70), (3, 900)]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TilesTransform(view(16, 4), least=3, most=2), "found 3 to 2"),
        (lambda: TilesTransform(view(16, 4), most=129), "1 to 128 tiles"),
        (lambda: AnyresTransform(view(16, 4), most=0), "1 tile at least"),
        (
            lambda: AnyresTransform(view(16, 4), ((1, 2), (10**6, 10**6))),
            r"1 to 128 tiles each; found 2 grids, such as \(1000000, 1000000\)",
        ),
        (lambda: AnyresTransform(view(16, 4), ((1, 2),) * 129), "found 129 grids"),
        (lambda: NativeTransform(4, HALF, HALF, area=(64, 16)), "least and the most"),
        (lambda: NativeTransform(4, HALF, HALF, 9, area=(64, 160)), "patches, edges or area"),
        (lambda: SplitTransform(ImageTransform(16, 20, 4, HALF, HALF)), "square"),
    ],
)
def test_bounds(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_pictures_pieces_are_those_of_its_words():
    """Text around and between a picture's runs is the tokenizer's own; a template that takes parts gets them."""
    asked, _ = conversation([["see ", (4, 4), (4, 4), "what?"]])
    assert [turn.text for turn in asked.turns] == ["see <image>\n<image>\nwhat?"]
