"""Tokens, truncation, packs and targets, against slow independent constructions."""

from __future__ import annotations

import io
import json
import random
from typing import Any

import pytest
import torch
from lib.samples import BAD, good
from PIL import Image
from shards_util import BEGIN, END, IMAGE_TOKENS, TRANSFORM, encoder, picture, row, sample

from lit_eemllm.data.packing import balance_packs, collate, plan_packs
from lit_eemllm.data.samples import TokenSample
from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.inputs.images import open_image
from lit_eemllm.inputs.spans import IMAGE_SLOT


@pytest.mark.parametrize("most", [None, 3])
def test_plan_packs(most: int | None) -> None:
    random.seed(0)
    for trial in range(50):
        lengths = [random.randint(1, 60) for _ in range(random.randint(1, 80))]
        packs = plan_packs(lengths, 100, most)
        assert sorted(i for pack in packs for i in pack) == list(range(len(lengths))), "each once"
        assert all(sum(lengths[i] for i in pack) <= 100 and len(pack) <= (most or 99) for pack in packs)
        assert all(pack == sorted(pack) for pack in packs) and [p[0] for p in packs] == sorted(p[0] for p in packs)
        if most is None:  # no pack could have taken the first conversation of a later one
            for earlier, later in ((a, b) for i, a in enumerate(packs) for b in packs[i + 1 :]):
                assert sum(lengths[i] for i in earlier if i < later[0]) + lengths[later[0]] > 100, trial
    assert plan_packs([50, 60, 30], 100, most) == [[0], [1, 2]], "30 fits both and goes where it leaves less room"
    with pytest.raises(ValueError, match="101"):
        plan_packs([5, 101], 100)


@pytest.mark.parametrize("most", [None, 3])
def test_balance_packs(most: int | None) -> None:
    random.seed(0)
    for _ in range(50):
        lengths = [random.randint(1, 60) for _ in range(random.randint(1, 80))]
        flops = [length * random.uniform(0.2, 2) for length in lengths]
        packs = balance_packs(lengths, flops, 100, most)
        assert sorted(i for pack in packs for i in pack) == list(range(len(lengths))), "each once"
        assert all(sum(lengths[i] for i in pack) <= 100 and len(pack) <= (most or 99) for pack in packs)
        assert packs == sorted(sorted(pack) for pack in packs) and all(packs)
    assert plan_packs([50] * 4, 100, most) == [[0, 1], [2, 3]]
    assert balance_packs([50] * 4, [9, 9, 1, 1], 100, most) == [[0, 2], [1, 3]], "a dear one with a cheap one"
    assert balance_packs([60, 60, 30, 30], [1, 1, 9, 9], 100, most) == [[0, 2], [1, 3]], "a long one leaves room"
    assert balance_packs([90, 40, 40, 20], [1, 9, 9, 1], 100, most) == [[0], [1, 2, 3]], "room comes first"
    with pytest.raises(ValueError, match="101"):
        balance_packs([5, 101], [1, 1], 100)


def brute_force(tokens: TokenSample) -> list[tuple[bool, int, bool]]:
    """The stream of one document row by row: is it visual, its id, is it to be predicted."""
    rows, images = [], iter(tokens.image_tokens)
    for entry, supervised in zip(tokens.ids, tokens.supervised, strict=True):
        rows += [(True, 0, False)] * next(images) if entry == IMAGE_SLOT else [(False, entry, supervised)]
    return rows


def test_collate_against_brute_force() -> None:
    made = encoder()
    members = [sample(3, 2), sample(5, 0), sample(7, 1), sample(9, 3)]
    members[2]["json"] = members[2]["json"].replace(b"see 0<image>", b"<image>")  # an image first of all
    members[3]["json"] = members[3]["json"].replace(b"see 1", b"")  # two images side by side
    encoded = [made.load_pixels(made.tokenize(f"key{i}", m)) for i, m in enumerate(members)]
    batch = collate(encoded)

    stream = [(d, *entry) for d, e in enumerate(encoded) for entry in brute_force(e.tokens)]
    assert batch.input_ids.tolist() == [i for _, _, i, _ in stream]
    visual = [s for s, (_, v, _, _) in enumerate(stream) if v]
    assert batch.layout.visual_index.tolist() == visual and len(visual) == IMAGE_TOKENS * 6
    assert [len(doc) for doc in batch.layout.documents] == [5, 1, 3, 6]
    # whatever is supervised is predicted by the row before it: text, and of the same document
    rows = batch.layout.text_index[batch.target_rows]
    wanted = [s for s, (_, _, _, supervised) in enumerate(stream) if supervised]
    assert (rows + 1).tolist() == wanted and batch.num_targets == len(wanted) > 0
    assert batch.targets.tolist() == [stream[s][2] for s in wanted]
    assert all(stream[s][0] == stream[s - 1][0] and not stream[s - 1][1] for s in wanted)
    assert chr(batch.targets[0]) == "i" and batch.targets[-1] == END
    # pixels in stream order, exactly what the transform makes of the file
    assert batch.pixel_values is not None and batch.keys == ["key0", "key1", "key2", "key3"]
    numbers = [3, 4, 7, 9, 10, 11]
    expected = torch.stack([TRANSFORM(open_image(picture(n), "", 1000)) for n in numbers])
    assert torch.equal(batch.pixel_values, expected)
    assert collate([encoded[1]]).pixel_values is None


def tokens_of(made: Any, turns: list[str], images: int) -> TokenSample:
    item = row(0, 0) | {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    }
    return made.tokenize("k", {"json": json.dumps(item).encode(), **{f"{i}.png": picture(i) for i in range(images)}})


def test_truncation() -> None:
    turns = ["<image>ab", "cdef", "<image>gh", "ijkl"]
    # BEGIN V a b \n c d e f END V g h \n i j k l END: lengths with 4 tokens per image
    whole = tokens_of(encoder(25), turns, 2)
    assert whole.length == 25 and not whole.truncated and whole.image_tokens == [4, 4]
    for limit, text, images in (
        (24, "ab\ncdef|gh\nijkl", 2),  # the end-of-turn goes
        (21, "ab\ncdef|gh\ni", 2),
        (20, "ab\ncdef|", 1),  # no target would remain in the second turn: all of it goes, image included
        (15, "ab\ncdef|", 1),  # the second image does not fit: never a part of it
        (10, "ab\ncd", 1),
        (9, "ab\nc", 1),
    ):
        short = tokens_of(encoder(limit, "truncate"), turns, 2)
        shown = "".join("|" if i == END else chr(i) for i in short.ids if i not in (BEGIN, IMAGE_SLOT))
        assert (shown, len(short.images)) == (text, images), limit
        assert (
            short.truncated
            and short.length <= limit
            and short.targets()
            and short.ids[-1] == short.ids[short.targets()[-1]]
        )
        assert short.ids.count(IMAGE_SLOT) == len(short.images) == len(short.image_tokens)
    with pytest.raises(SampleError, match="25 tokens") as error:
        tokens_of(encoder(24, "drop"), turns, 2)
    assert error.value.reason == "too_long"
    with pytest.raises(SampleError, match="16 tokens") as error:
        tokens_of(encoder(9, "truncate"), ["<image>abcdefgh", "i"], 1)
    assert error.value.reason == "too_long"
    for policy, limit, least in (("drop", 9, 10), ("truncate", 8, 9), ("truncate", 3, 9)):
        with pytest.raises(UserError, match=f"a word to say {least}, so data.max_length={limit} leaves no room"):
            tokens_of(encoder(limit, policy), turns, 2)
    with pytest.raises(UserError, match="max_length") as stop:
        tokens_of(encoder(24, "error"), turns, 2)
    assert not isinstance(stop.value, SampleError)


@pytest.mark.parametrize("case", BAD)
def test_bad_samples_are_refused_by_name(case: str) -> None:
    with pytest.raises(SampleError, match="the-key") as error:
        encoder().tokenize("the-key", BAD[case])
    assert error.value.reason == case.split(",")[0]


def test_broken_image_body_is_found_when_decoded() -> None:
    made = encoder()
    file = io.BytesIO()
    Image.effect_noise((80, 60), 50).convert("RGB").save(file, "JPEG")
    tokens = made.tokenize("the-key", {"json": good["json"], "0.jpg": file.getvalue()[: file.tell() // 2]})
    with pytest.raises(SampleError, match="the-key, image 0") as error:
        made.load_pixels(tokens)
    assert error.value.reason == "bad_image"
