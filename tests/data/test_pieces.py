"""Images that stand in the ids as several runs of tokens with text between them: truncation, packs, moved images, preview."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from lib.vision import picture
from shards_util import BEGIN, END, CharTemplate, encoder
from shards_util import picture as png

from lit_eemllm.data.packing import collate
from lit_eemllm.data.preview import read_pack
from lit_eemllm.data.samples import EncodedSample, SampleEncoder, TokenSample
from lit_eemllm.errors import ConfigError
from lit_eemllm.evaluation.loss import with_moved_images
from lit_eemllm.inputs.conversation import IMAGE, Conversation, Turn
from lit_eemllm.inputs.images import WHOLE, ImageTransform
from lit_eemllm.inputs.spans import IMAGE_SLOT
from lit_eemllm.inputs.tiles import AnyresTransform, SplitTransform

VIEW = ImageTransform(height=8, width=8, patch=4, mean=(0.5,) * 3, std=(0.5,) * 3)
SPLIT = SplitTransform(VIEW, longest=16)
TILED = "<fake_token_around_image><row_1_col_1>|<fake_token_around_image><row_1_col_2>|\n\n<fake_token_around_image><global-img>|"
TILED += "<fake_token_around_image>"  # of a picture twice as wide as high; | is a run of 4 tokens


def sample(made: SampleEncoder, *turns: str, images: int) -> TokenSample:
    row = {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]}
    return made.tokenize("k", {"json": json.dumps(row).encode(), **{f"{i}.png": png(i) for i in range(images)}})


def shown(tokens: TokenSample) -> str:
    return "".join(
        {BEGIN: "", END: "$", IMAGE_SLOT: "|"}.get(entry, chr(entry) if entry > 0 else "") for entry in tokens.ids
    )


def encoded(*sizes: tuple[int, int], transform: SplitTransform = SPLIT) -> EncodedSample:
    """A conversation with pictures of these sizes."""
    turns = (Turn("human", IMAGE * len(sizes) + "ab"), Turn("gpt", "c"))
    pieces = [transform.pieces(*size) for size in sizes]
    text = CharTemplate().encode(Conversation("k", turns, len(sizes))).with_pieces(pieces, CharTemplate().text_ids)
    tokens = TokenSample("k", text.ids, text.supervised, text.runs, [], text.images)
    return EncodedSample(tokens, [transform(picture(size, i)) for i, size in enumerate(sizes)], list(sizes))


def test_pieces_of_pictures() -> None:
    assert SPLIT.pieces(20, 10)[::2][:1] == ("<fake_token_around_image><row_1_col_1>",)
    assert "".join(x if isinstance(x, str) else "|" for x in SPLIT.pieces(20, 10)) == TILED
    assert SPLIT.runs(20, 10) == [4, 4, 4] and SPLIT.num_tokens(20, 10) == 12 and SPLIT.num_views(20, 10) == 3
    assert SPLIT.runs(10, 10) == [4] * 5
    assert replace(SPLIT, longest=8).runs(300, 10) == [4] and replace(SPLIT, cuts=False).runs(10, 10) == [4]


def test_an_image_is_cut_off_whole() -> None:
    made = replace(encoder(1000, "truncate"), transform=SPLIT)
    whole = sample(made, "<image>ab", "cdef", "<image>gh", "ijkl", images=2)
    first, second = whole.entries
    assert first[0] == 1 and shown(whole).startswith("<fake") and whole.ids[first[1]] == ord("a")
    assert len(whole.image_tokens) == whole.ids.count(IMAGE_SLOT) and whole.length == len(whole.ids) + 3 * len(
        whole.image_tokens
    )
    before = second[0] + 3 * whole.ids[: second[0]].count(IMAGE_SLOT)  # tokens before the second image
    inside = whole.ids[: second[1]].count(IMAGE_SLOT) * 3 + second[1]
    for limit in range(before, inside + 1):  # it ends in the second image, or just behind it
        short = sample(replace(made, max_length=limit), "<image>ab", "cdef", "<image>gh", "ijkl", images=2)
        assert shown(short).endswith("cdef$") and len(short.images) == len(short.entries) == 1 and short.truncated
        assert short.ids.count(IMAGE_SLOT) == len(short.image_tokens) and made.load_pixels(short)


def test_what_is_cut_off_does_not_change_how_an_image_is_shown() -> None:
    """Of several pictures LLaVA-OneVision shows the whole alone; also if only one is left."""
    made = replace(encoder(1000, "truncate"), transform=AnyresTransform(VIEW, lone=True))
    one = sample(made, "<image>ab", "cdef", "<image>gh", "ijkl", images=2)
    assert one.image_tokens == [5, 5]
    short = sample(replace(made, max_length=one.length - 8), "<image>ab", "cdef", "<image>gh", "ijkl", images=2)
    (pixels,), (size,) = made.load_pixels(short).pixels, made.load_pixels(short).sizes
    assert len(short.images) == 1 and size == WHOLE and pixels.shape == (1, 3, 8, 8)


def test_packs_tell_how_many_runs_an_image_has_and_images_move_to_where_as_many_stand() -> None:
    wide, square = encoded((20, 10)), encoded((10, 10))
    batch = collate([wide, encoded((20, 10), (10, 10)), square])
    assert batch.image_runs == [3, 3, 5, 5] and batch.layout.image_lengths == [4] * 16
    assert not list(with_moved_images([collate([wide, square])]))  # there is no other place with as many
    other = encoded((22, 11))
    ((same, moved),) = with_moved_images([collate([wide, other])])
    assert moved.layout.documents == same.layout.documents and moved.input_ids.equal(same.input_ids)
    assert moved.pixel_values[0].equal(other.pixels[0]) and moved.image_sizes == [(22, 11), (20, 10)]


def test_the_preview_shows_each_tile_where_its_tokens_are() -> None:
    one = encoded((20, 10))
    (document,) = read_pack(collate([one]), CharTemplate(), SPLIT)
    pictures = [piece.picture for piece in document.pieces if piece.picture is not None]
    assert len(pictures) == 3
    for tile, view in zip(pictures, one.pixels[0], strict=True):
        assert list(tile.convert("RGB").tobytes()) == view.permute(1, 2, 0).flatten().tolist()


@pytest.mark.parametrize("longest", [-1, 4097, 49])
def test_sizes_are_bounded(longest: int) -> None:
    with pytest.raises(ConfigError, match="longer side of 1 to 48 pixels"):
        SplitTransform(VIEW, longest=longest)
