"""Encoders of images of many sizes and tiles: against transformers' own models, in packs, in generation, in training."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
from lib.connectors import case, squares_of
from lib.equations import RANKED, encoder_attention
from lib.mechanisms import KINDS
from lib.vision import PICTURES, alone, make_model, pack, picture, prompts
from PIL import Image
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Siglip2Config,
    Siglip2Model,
)

from lit_eemllm.errors import ConfigError
from lit_eemllm.evaluation.loss import with_moved_images
from lit_eemllm.mechanisms import PRESETS, Mechanism
from lit_eemllm.model import EEMLLM
from lit_eemllm.model import vision as encoders
from lit_eemllm.model.image_cache import ImageCache
from lit_eemllm.model.vision import TransformersVision, alike_lengths
from lit_eemllm.training.module import with_blank_image

MANY = ["siglip2", "idefics2", "anyres"]


# --- encoders alone


def test_siglip2_as_transformers_computes_it_with_padding():
    encoder = tiny.vision("siglip2").eval()
    pixels = encoder.transform.views([encoder.transform(picture(size, i)) for i, size in enumerate(PICTURES)])
    grids = [(x.shape[1] // 4, x.shape[2] // 4) for x in pixels]
    patches = torch.zeros(len(pixels), 20, 48)
    for row, image, (height, width) in zip(patches, pixels, grids, strict=True):
        for i in range(height * width):
            y, x = divmod(i, width)
            row[i] = image[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].permute(1, 2, 0).flatten()
    lengths = [height * width for height, width in grids]
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    states = encoder.model(patches, mask.long(), torch.tensor(grids), output_hidden_states=True).hidden_states[-2]
    assert len(set(lengths)) > 2
    torch.testing.assert_close(encoder(pixels), states[mask], rtol=0, atol=2e-6)
    assert not encoder(pixels)[:5].allclose(encoder(pixels[1:])[:5])


@pytest.mark.parametrize("select_layer", [None, -1])
def test_idefics2_as_transformers_computes_it_with_padding(select_layer):
    """None: what Idefics2 itself reads, with its padding, masks and last norm."""
    encoder = tiny.vision("idefics2").eval()
    encoder.select_layer = select_layer
    encoder.model.post_layernorm.bias.data.normal_()
    pixels = [encoder.transform(picture(size, i)) for i, size in enumerate(PICTURES)]
    whole = torch.zeros(len(pixels), 3, 20, 20)
    mask = torch.zeros(len(pixels), 5, 5, dtype=torch.bool)
    for i, image in enumerate(pixels):
        whole[i, :, : image.shape[1], : image.shape[2]] = encoder.transform.views([image])[0]
        mask[i, : image.shape[1] // 4, : image.shape[2] // 4] = True
    output = encoder.model(whole, mask, output_hidden_states=True)
    states = output.last_hidden_state if select_layer is None else output.hidden_states[-1]
    torch.testing.assert_close(encoder(encoder.transform.views(pixels)), states[mask.flatten(1)], rtol=0, atol=1e-5)
    assert not output.last_hidden_state.allclose(output.hidden_states[-1], atol=0.1)
    assert len({x.shape for x in pixels}) > 2


@pytest.mark.parametrize("select_layer", [None, -1, -2])
@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2", "idefics2"])
def test_importance_is_the_attention_of_transformers(family, select_layer, monkeypatch):
    """As its eager attention gives it, picture by picture; few queries at a time; the features stay what they are."""
    torch.manual_seed(0)
    encoder = tiny.vision(family).eval()
    encoder.select_layer = select_layer
    for block in encoder.blocks():  # attention that differs from patch to patch
        block.self_attn.q_proj.weight.data.mul_(20)
    if encoder.transform.fixed:
        pixels = torch.stack([encoder.transform(picture(size, i)) for i, size in enumerate(PICTURES)])
        expected = encoder_attention(encoder, encoder.transform.views(pixels))
    else:
        pixels = [encoder.transform(picture(size, i)) for i, size in enumerate(PICTURES)]
        alone = [patches_and_shape(encoder, image) for image in encoder.transform.views(pixels)]
        expected = torch.cat([encoder_attention(encoder, *arguments)[0] for arguments in alone])
    monkeypatch.setattr(encoders, "ROWS", 3)
    views = encoder.transform.views(pixels)
    features, importance = encoder(views, importance=True)
    assert features.equal(encoder(views)) and not importance.requires_grad
    torch.testing.assert_close(importance, expected, rtol=1e-4, atol=2e-5)
    assert importance.std() > 0.01 * importance.mean() and importance.shape == features.shape[:-1]
    assert not any(block.self_attn.k_proj._forward_hooks for block in encoder.blocks())


def patches_and_shape(encoder, image):
    """What transformers' model takes of one image."""
    if encoder.model.config.model_type == "idefics2_vision":
        return (image[None],)
    _, height, width = image.shape
    mask = torch.ones(1, height * width // 16, dtype=torch.long)
    return encoders.patches_of(image, 4)[None], mask, torch.tensor([[height // 4, width // 4]])


@pytest.mark.parametrize("encoder", [*MANY, "clip"])
@pytest.mark.parametrize("connector", ["mlp", "average", "pixel_shuffle, cut squares"])
def test_tokens_that_the_encoder_attends_to_most_enter(encoder, connector):
    """Of each picture, tiles and squares of patches included, one by one; newlines are the first to leave."""
    if encoder == "idefics2" and "cut" in connector:
        pytest.skip("its smallest images are 2 x 2 patches")
    model = make_model(encoder, replace(PRESETS["visionzip"], drop=0.6), connector=case(connector))
    for block in model.vision.blocks():
        block.self_attn.q_proj.weight.data.mul_(20)
    sizes = [(40, 20), (9, 30), (64, 17)]
    batch = pack(model, [[3, sizes[0], 4], [2, sizes[1], sizes[2], 3]])
    entered = []
    model.language_model.model.layers[0].register_forward_hook(lambda module, args, out: entered.append(out[2].rows_v))
    model.packed_loss(batch)
    side, first, expected = case(connector).side, 0, []
    for image, size, length in zip(batch.pixel_values, sizes, batch.layout.image_lengths, strict=True):
        views = model.vision.transform.views([image] if not model.vision.transform.fixed else image[None])
        importance = model.vision(views, importance=True)[1].flatten()
        scores, grids = [], model.vision.transform.view_grids([size])
        for rows, columns in grids or [(4, 4)]:
            view, importance = importance[: rows * columns].view(rows, columns, 1), importance[rows * columns :]
            for square in squares_of(view, side):
                there = [z.item() for z in square if z is not None]
                scores.append(sum(there) / len(there))
        if encoder == "anyres":
            scores = [[*scores, -1][i] for i in model.vision.transform.order([size])[0].tolist()]
        assert len(scores) == length
        stay = sorted(range(length), key=lambda i, scores=scores: -scores[i])[: length - int(0.6 * length)]
        expected += sorted(first + i for i in stay)
        first += length
    assert entered[0].tolist() == expected


@pytest.mark.parametrize("select_layer", [None, -1, -2])
@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2", "idefics2"])
def test_states_of_lower_layers_lie_beside_the_features(family, select_layer):
    """As transformers itself gives them; what the encoder gives alone is unchanged, importance too."""
    torch.manual_seed(0)
    encoder = tiny.vision(family).eval()
    encoder.select_layer = select_layer
    pixels = [encoder.transform(picture(size, i)) for i, size in enumerate(PICTURES)]
    views = encoder.transform.views(torch.stack(pixels) if encoder.transform.fixed else pixels)
    arguments = [(views,)] if encoder.transform.fixed else [patches_and_shape(encoder, image) for image in views]
    outputs = [encoder.model(*each, output_hidden_states=True).hidden_states for each in arguments]
    below = 2 if select_layer == -2 else 3
    class_token = family == "clip"
    expected = [torch.cat([x[layer][:, class_token:].flatten(0, 1) for x in outputs]) for layer in (below, 0, 1)]
    found, importance = encoder(views, importance=True, depths=(1.0, 0.0, 0.4))
    own, *others = found.flatten(0, -2).chunk(4, -1)
    assert own.equal(encoder(views).flatten(0, -2)) and importance.equal(encoder(views, importance=True)[1])
    for one, other in zip(others, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_depths_need_an_encoder_that_reads_them_and_tokens_that_stand_for_places():
    with pytest.raises(ConfigError, match=r"^model.connector.name: found attention, but deepstack"):
        make_model("clip", "deepstack", connector=case("attention"))
    model = tiny.model("llama-gqa", "deepstack")
    model.vision = tiny.Patches()
    with pytest.raises(
        ConfigError, match=r"^model.mechanism.preset: reads layers inside the encoder, and Patches lacks"
    ):
        model.set_mechanism(model.mechanism)


def test_what_cannot_be_ranked_by_the_encoder_is_refused():
    ranked = PRESETS["visionzip"]
    with pytest.raises(ConfigError, match=r"^model.mechanism.preset: .* no token of the connector attention stands"):
        make_model("clip", ranked, connector=case("attention"))
    unread = tiny.model("llama-gqa", "llava")
    unread.vision.select_layer = 0  # the embeddings
    with pytest.raises(
        ConfigError, match=r"^model.mechanism.preset: .* TransformersVision says none: it reads no layer"
    ):
        unread.set_mechanism(ranked)
    rows = Mechanism(rows=(("1-", (("tokens", "all but 0.5 ranked in 1 by encoder"),)),))
    with pytest.raises(ConfigError, match="no token of the connector attention"):
        make_model("clip", rows, connector=case("attention"))


@pytest.mark.parametrize("select_layer", [None, -1, -2])
@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2", "idefics2"])
def test_what_is_unused_has_no_gradient_and_the_rest_has(family, select_layer):
    encoder = tiny.vision(family)
    encoder.select_layer = select_layer
    pixels = encoder.transform(picture((16, 16), 1))
    encoder(encoder.transform.views(pixels[None] if encoder.transform.fixed else [pixels])).square().sum().backward()
    unused = {parameter for part in encoder.unused() for parameter in part.parameters()}
    assert unused or select_layer is None
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is None) == (parameter in unused), name


def test_images_go_together_with_little_padding():
    lengths = [100, 3, 80, 75, 74, 4, 100]
    groups = alike_lengths(lengths)
    assert groups == [[0, 6, 2, 3], [4], [5, 1]] and alike_lengths([]) == []


def test_encoders_in_the_folders_of_whole_models(tmp_path):
    common = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    text = dict(common, vocab_size=30, max_position_embeddings=8)
    siglip2 = Siglip2Model(
        Siglip2Config(vision_config={**common, "num_patches": 16, "patch_size": 4}, text_config=text)
    )
    siglip2.save_pretrained(tmp_path / "siglip2")
    naflex = {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 20, "patch_size": 4, "resample": 2}
    (tmp_path / "siglip2" / "preprocessor_config.json").write_text(json.dumps(naflex))
    options = {"select_layer": -1, "policy": "native"}
    found = TransformersVision.from_path(str(tmp_path / "siglip2"), **options)
    for name, tensor in siglip2.vision_model.state_dict().items():
        assert found.model.state_dict()[name].equal(tensor), name
    assert found.transform == tiny.TRANSFORMS["siglip2"]
    assert TransformersVision.from_path(str(tmp_path / "siglip2"), **options, max_tokens=9).transform.most == 9

    decoder = {**tiny.COMMON, "num_attention_heads": 4, "num_key_value_heads": 4, "model_type": "llama"}
    config = Idefics2Config(
        vision_config={**common, "image_size": 20, "patch_size": 4}, text_config=decoder, image_token_id=3,
        perceiver_config={"resampler_n_heads": 2, "resampler_head_dim": 8, "num_key_value_heads": 2, "hidden_size": 32},
    )  # fmt: skip
    idefics2 = Idefics2ForConditionalGeneration(config)
    idefics2.save_pretrained(tmp_path / "idefics2")
    edges = {"size": {"shortest_edge": 8, "longest_edge": 20}, "resample": 2, "do_image_splitting": True}
    edges |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "idefics2" / "preprocessor_config.json").write_text(json.dumps(edges))
    found = TransformersVision.from_path(str(tmp_path / "idefics2"), **options)
    for name, tensor in idefics2.model.vision_model.state_dict().items():
        assert found.model.state_dict()[name].equal(tensor), name
    assert found.transform == tiny.TRANSFORMS["idefics2"]
    with pytest.raises(ConfigError, match="set native, not pad"):
        TransformersVision.from_path(str(tmp_path / "idefics2"), select_layer=-1, policy="pad")


@pytest.mark.parametrize("encoder", MANY)
def test_saved_and_loaded(tmp_path, encoder):
    model = make_model(encoder, "saisa")
    model.save_pretrained(tmp_path)
    again = EEMLLM.from_pretrained(tmp_path).eval()
    again.set_attention("reference")
    batch = pack(model, [[2, (40, 20), 4]])
    assert again.packed_logits(batch).equal(model.packed_logits(batch))
    vision = TransformersVision.from_path(str(tmp_path), select_layer=-1, policy=model.vision.transform.policy)
    assert vision.transform == model.vision.transform
    assert all(x.equal(model.vision.state_dict()[name]) for name, x in vision.state_dict().items())


# --- in the model


def test_llava_next_of_transformers():
    """LLaVA-1.6: the same logits from the same weights and pixels, for pictures of many sizes in one batch."""
    model = make_model("anyres", "llava")
    decoder = model.config.text_config
    config = LlavaNextConfig(
        vision_config=model.vision.model.config, text_config=decoder.to_dict() | {"vocab_size": tiny.VOCAB + 1},
        image_token_index=tiny.VOCAB, image_grid_pinpoints=[[16 * r, 16 * c] for r, c in model.vision.transform.grids],
    )  # fmt: skip
    twin = LlavaNextForConditionalGeneration(config).eval()
    names = {
        "vision.model.": "model.vision_tower.", "projector.newline": "model.image_newline",
        "projector.": "model.multi_modal_projector.", "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    }  # fmt: skip
    state = {}
    for name, tensor in model.state_dict().items():
        old = next(old for old in names if name.startswith(old))
        if tensor.shape[:1] == (tiny.VOCAB,):
            tensor = torch.cat([tensor, torch.zeros(1, *tensor.shape[1:])])
        state[names[old] + name.removeprefix(old)] = tensor
    twin.load_state_dict(state)
    for i, size in enumerate([*PICTURES, (1000, 3), (3, 1000)]):
        batch = pack(model, [[3, size, 5]], seed=i)
        ids = batch.input_ids.index_fill(0, batch.layout.visual_index, tiny.VOCAB)[None]
        ours = model(ids, pixel_values=batch.pixel_values, image_sizes=[size]).logits
        sizes = torch.tensor([[size[1], size[0]]])
        pixels = model.vision.transform.views(batch.pixel_values)[None]
        theirs = twin(input_ids=ids, pixel_values=pixels, image_sizes=sizes).logits
        text = ids[0] != tiny.VOCAB
        assert tiny.max_error(ours[0, text][:, : tiny.VOCAB], theirs[0, text][:, : tiny.VOCAB]) < 1e-5


THINNED = Mechanism(
    rows=(("0", (("attend", "causal"), ("seen", "every 3"))), ("1", (("attend", 2), ("tokens", "every 2"))))
)


READERS = ("llava", "saisa", "flamingo", "visionzip", "deepstack")
"""Presets that differ in what they read of an encoder. To the others it makes no difference which one gave the visual tokens."""
MIXED = [("anyres", preset) for preset in KINDS] + [(encoder, preset) for encoder in MANY[:2] for preset in READERS]


@pytest.mark.parametrize(("encoder", "preset"), [*MIXED, pytest.param("siglip2", THINNED, id="siglip2-thinned")])
def test_a_pack_of_many_sizes_is_one_image_at_a_time(encoder, preset):
    model = make_model(encoder, preset)
    batch = pack(model, [[3, (40, 20), 4, (9, 30), 2], [5], [(5, 5), 3], [2, (64, 17), (40, 20), 4]])
    assert len(set(batch.layout.image_lengths)) > 1
    model.packed_loss(batch).backward()
    together = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert "vision.model.embeddings.position_embedding.weight" in together
    assert ("projector.newline" in together) or encoder != "anyres" or preset in ("saisa", "flamingo")
    model.zero_grad()
    logits = []
    for one in alone(batch):
        model.packed_loss(one).backward()
        logits.append(model.packed_logits(one))
    assert tiny.max_error(model.packed_logits(batch), torch.cat(logits)) < 2e-5
    for name, gradient in together.items():
        other = model.get_parameter(name).grad
        rounding = 4e-6  # all there is of the gradient of a key's bias, which has no effect
        torch.testing.assert_close(gradient, other, rtol=2e-3, atol=2e-5 * gradient.abs().max().item() + rounding)


@pytest.mark.parametrize(
    ("encoder", "preset"),
    [*(pair for pair in MIXED if pair[1] not in RANKED), pytest.param("siglip2", THINNED, id="siglip2-thinned")],
)
def test_generation_of_many_sizes(encoder, preset):
    """A batch gives what each prompt gives alone, with the cache what is recomputed, with remembered images the same."""
    model = make_model(encoder, preset)
    documents = [[3, (40, 20), 4], [2, (9, 30), (64, 17), 3], [6], [(5, 5), 2]]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    found = model.generate(**prompts(model, documents), **options)
    assert found.equal(model.generate(**prompts(model, documents), **options, use_cache=False))
    for i, document in enumerate(documents):
        batch = pack(model, [document], 10 * i)
        ids = batch.input_ids.index_fill(0, batch.layout.visual_index, tiny.VOCAB)[None]
        images = (
            {} if batch.pixel_values is None else {"pixel_values": batch.pixel_values, "image_sizes": batch.image_sizes}
        )
        one = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **images, **options)
        assert one[0, -5:].equal(found[i, -5:])
    beams = model.generate(**prompts(model, documents), **options, num_beams=2)
    assert beams.shape == found.shape
    sampled = prompts(model, documents[:2])
    torch.manual_seed(1)
    several = model.generate(**sampled, **{**options, "do_sample": True}, num_return_sequences=2, top_k=1)
    assert several[::2].equal(several[1::2])
    if not any(row.dense for row in model.table) and not all(row.blind for row in model.table):
        model.image_cache = ImageCache(10**9)
        for _ in range(2):
            assert model.generate(**prompts(model, documents), **options).equal(found)
        assert (model.image_cache.hits, model.image_cache.misses) == (4, 4)


def test_the_image_cache_tells_pictures_apart_by_size():
    """Tiles of two pictures may be the same pixels, but not all of them are kept."""
    model = make_model("anyres", "ee_mllm")
    model.image_cache = ImageCache(10**9)
    white = [(32, 16), (31, 15)]
    pixels = [model.vision.transform(Image.new("RGB", size)) for size in white]
    assert pixels[0].equal(pixels[1])
    with torch.no_grad():
        model.image_cache.keys(pixels, model.image_keys, 0, white)
    assert model.image_cache.misses == 2


@pytest.mark.parametrize("encoder", MANY)
def test_sizes_that_are_missing_or_wrong_are_told(encoder):
    model = make_model(encoder)
    given = prompts(model, [[3, (40, 20), 4]])
    with pytest.raises(ValueError, match="image_sizes: found 0 for 1 images"):
        model(given["input_ids"], pixel_values=given["pixel_values"])
    batch = pack(model, [[3, (40, 20), 4]])
    with pytest.raises(ValueError, match="the layout holds"):
        model.packed_loss(replace(batch, pixel_values=[model.vision.transform(picture((20, 20)))]))


def test_blocks_without_a_resampler_read_newlines():
    flamingo = PRESETS["flamingo"].stretched(3)
    model = tiny.model("llama-gqa", replace(flamingo, gated=replace(flamingo.gated, latents=0)), "anyres")
    batch = pack(model, [[3, (40, 20), 4, (9, 30), 2], [2, (64, 17), 4]])
    model.packed_loss(batch).backward()
    assert model.projector.newline.grad.abs().max() > 0
    logits = torch.cat([model.packed_logits(one) for one in alone(batch)])
    assert tiny.max_error(model.packed_logits(batch), logits) < 2e-5


# --- around the model


@pytest.mark.parametrize("encoder", [*MANY, "clip"])
def test_images_move_with_their_tokens(encoder):
    model = make_model(encoder)
    batch = pack(model, [[3, (40, 20), 4], [2, (9, 30), 2], [5], [(64, 17), 3]])
    ((same, moved),) = with_moved_images([batch])
    assert same is batch
    origin = [next(i for i, own in enumerate(batch.pixel_values) if own.equal(image)) for image in moved.pixel_values]
    assert sorted(origin) == [0, 1, 2] and all(i != j for i, j in enumerate(origin))
    assert moved.image_sizes == [batch.image_sizes[i] for i in origin]
    assert moved.layout.image_lengths == [batch.layout.image_lengths[i] for i in origin]
    assert moved.input_ids[moved.layout.text_index].equal(batch.input_ids[batch.layout.text_index])
    assert moved.layout.text_lengths == batch.layout.text_lengths and len(moved.input_ids) == len(batch.input_ids)
    model.packed_loss(moved)


@pytest.mark.parametrize("encoder", MANY)
def test_a_blank_image_changes_no_gradient_but_gives_one_to_every_weight(encoder):
    model = make_model(encoder, "llava")
    batch = pack(model, [[5], [4]])
    model.packed_loss(batch).backward()
    without = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = model.packed_loss(with_blank_image(batch, model.vision.transform))
    loss.backward()
    assert loss.item() == pytest.approx(model.packed_loss(batch).item(), rel=1e-6)
    unused = {id(p) for part in model.vision.unused() for p in part.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in unused:
            assert parameter.grad is not None, name
            torch.testing.assert_close(
                parameter.grad, without.get(name, torch.zeros_like(parameter)), rtol=1e-3, atol=2e-5
            )


def test_a_batch_moves_and_pins_images_of_many_sizes(monkeypatch):
    batch = pack(make_model("siglip2"), [[3, (40, 20), 4, (9, 30), 2]])
    assert isinstance(batch.pixel_values, list) and len(batch.pixel_values) == 2
    assert all(x.device.type == "meta" for x in batch.to("meta").pixel_values)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x + 1)
    assert batch.pin_memory().pixel_values[1].equal(batch.pixel_values[1] + 1)
