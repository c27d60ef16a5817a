"""Training with padded ids and labels, as transformers' and TRL's trainers do, against packs of the same conversations."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from lit_eemllm.data.packing import collate
from lit_eemllm.data.samples import EncodedSample, TokenSample
from lit_eemllm.inputs.spans import IMAGE_SLOT

IMAGE = -1
DOCUMENTS = [
    [5, 6, IMAGE, 7, 8, *"aab", 9, *"ab"],
    [11, *"abc", 12],
    [IMAGE, IMAGE, 13, *"b"],
    [14, IMAGE, 15, *"ca", IMAGE, 4, *"b"],
]
"""Ids, of which letters are answers, and images."""
PRESETS = ["llava", "ee_mllm", "flamingo", "fastv", "pyramid_drop", "p_mod", "visionzip", "casa", "shortv"]


def sizes_of(encoder: str, count: int) -> list[tuple[int, int]]:
    return [((30, 12), (9, 20), (16, 16))[i % 3] for i in range(count)]


def samples(model: tiny.EEMLLM, encoder: str) -> list[EncodedSample]:
    made, transform, number = list[EncodedSample](), model.vision.transform, 0
    generator = torch.Generator().manual_seed(0)
    for key, document in enumerate(DOCUMENTS):
        images = document.count(IMAGE)
        sizes = sizes_of(encoder, number + images)[number:]
        pictures = [torch.randint(256, (3, height, width), generator=generator).byte() for width, height in sizes]
        ids = [IMAGE_SLOT if x == IMAGE else 20 + ord(x) % 8 if isinstance(x, str) else x for x in document]
        tokens = [transform.num_tokens(*size) for size in sizes]
        flags = [isinstance(x, str) for x in document]
        entries = [(i, i + 1) for i, token in enumerate(ids) if token == IMAGE_SLOT]
        sample = TokenSample(str(key), ids, flags, tokens, [], entries, images)
        made.append(EncodedSample(sample, [transform(picture) for picture in pictures], sizes))
        number += images
    return made


def padded(model: tiny.EEMLLM, made: list[EncodedSample], side: str) -> dict[str, Tensor]:
    """Everything again by hand: ids [B, L] with each image's token repeated, the mask, the labels."""
    rows = []
    for sample in made:
        left, ids, labels = iter(sample.tokens.image_tokens), list[int](), list[int]()
        for token, flag in zip(sample.tokens.ids, sample.tokens.supervised, strict=True):
            count = next(left) if token == IMAGE_SLOT else 1
            ids += [model.config.image_token_id if token == IMAGE_SLOT else token] * count
            labels += [token if flag else -100] * count
        rows.append((torch.tensor(ids), torch.ones(len(ids), dtype=torch.long), torch.tensor(labels)))
    longest = max(len(ids) for ids, _, _ in rows)

    def batch(column: int, value: int) -> Tensor:
        space = [(0, longest - len(row[0])) if side == "right" else (longest - len(row[0]), 0) for row in rows]
        return torch.stack([pad(row[column], by, value=value) for row, by in zip(rows, space, strict=True)])

    return {"input_ids": batch(0, 0), "attention_mask": batch(1, 0), "labels": batch(2, -100)}


def gradients(model: tiny.EEMLLM, loss: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True))


def assert_close(found: list[Tensor | None], true: list[Tensor | None]) -> None:
    most = max(x.abs().max() for x in true if x is not None)
    for one, other in zip(found, true, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or (one - other).abs().max() <= 1e-6 * most


@pytest.mark.parametrize(
    ("preset", "encoder", "side"),
    [*((preset, "clip", "right") for preset in PRESETS), ("ee_mllm", "siglip2", "left"), ("llava", "anyres", "left")],
)
def test_loss_and_gradients_are_those_of_the_pack(preset: str, encoder: str, side: str) -> None:
    model = tiny.model("llama-gqa", preset, encoder, layers=None).train()
    made = samples(model, encoder)
    batch, inputs = collate(made), padded(model, made, side)
    images = {"pixel_values": batch.pixel_values, "image_sizes": batch.image_sizes}
    out, true = model(**inputs, **images), model.packed_loss(batch)
    assert batch.num_targets == 3 + 2 + 3 + 1 + 2 + 1
    assert abs(out.loss.item() - true.item() / batch.num_targets) <= 1e-6
    assert_close(gradients(model, out.loss), gradients(model, true / batch.num_targets))
    of_step = model(**inputs, **images, num_items_in_batch=torch.tensor(50))
    assert abs(of_step.loss.item() - true.item() / 50) <= 1e-6

    labels = inputs["labels"][:, 1:]
    ours = cross_entropy(out.logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert abs(ours.item() - out.loss.item()) <= 1e-6, "logits are those of the loss, where transformers has them"
    assert not out.logits[inputs["attention_mask"] == 0].any()


def test_labels_that_nothing_predicts_do_not_count() -> None:
    """What collators do that know no image token: all that is no padding has a label."""
    model = tiny.model().train()
    made = samples(model, "clip")
    inputs, images = padded(model, made, "right"), {"pixel_values": collate(made).pixel_values}
    every = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    text = (inputs["input_ids"] != model.config.image_token_id) & (inputs["attention_mask"] == 1)
    told = every.masked_fill(~text, -100)
    told[:, 1:][~text[:, :-1]] = -100  # behind an image
    found, true = (model(**{**inputs, "labels": labels}, **images).loss for labels in (every, told))
    assert found.equal(true)


def test_no_label_is_a_loss_of_zero_with_gradients() -> None:
    model = tiny.model().train()
    made = samples(model, "clip")
    inputs = {**padded(model, made, "right"), "pixel_values": collate(made).pixel_values}
    loss = model(**{**inputs, "labels": torch.full_like(inputs["labels"], -100)}).loss
    assert loss.item() == 0
    loss.backward()


def test_a_cut_image_is_refused() -> None:
    model = tiny.model()
    made = samples(model, "clip")
    inputs = {name: x[:1, :10] for name, x in padded(model, made, "right").items()}
    with pytest.raises(ValueError, match="1 images give 16 visual tokens, but the ids hold 8 image tokens"):
        model(**inputs, pixel_values=made[0].pixels[0][None])


def test_transformers_switches_recomputing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny.model().train(), []
    run = model.run_layer
    monkeypatch.setattr(model, "run_layer", lambda *arguments: calls.append(1) or run(*arguments))
    made = samples(model, "clip")
    inputs = {**padded(model, made, "right"), "pixel_values": collate(made).pixel_values}
    before = gradients(model, model(**inputs).loss)
    assert len(calls) == 3
    model.gradient_checkpointing_enable()
    assert model.activation_checkpointing
    assert_close(gradients(model, model(**inputs).loss), before)
    assert len(calls) == 3 + 6
    model.gradient_checkpointing_disable()
    assert not model.activation_checkpointing


def test_last_states_are_what_the_head_reads() -> None:
    """TRL's trainers compute the loss of them by themselves."""
    model = tiny.model()
    made = samples(model, "clip")
    inputs, images = padded(model, made, "right"), {"pixel_values": collate(made).pixel_values}
    states = model.base_model(
        inputs["input_ids"], inputs["attention_mask"], **images, use_cache=False
    ).last_hidden_state
    assert model.language_model.lm_head(states).equal(model(**inputs, **images).logits)
    with pytest.raises(ValueError, match=r"labels tell, .* train with transformers\.Trainer"):
        tiny.model(mechanism="fastv").base_model(inputs["input_ids"], inputs["attention_mask"], **images)
