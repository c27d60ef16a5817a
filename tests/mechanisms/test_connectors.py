"""Connectors against plain implementations, transformers' own modules and PyTorch's pooling; how many tokens they make of any picture,
in packs, in generation, in every layer, counted, frozen and adapted."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lib.connectors import CASES, case, plain_tokens
from lib.equations import plain
from lib.mechanisms import BOUND, compared_gradients, counted, text_logits
from lib.vision import PICTURES, alone, make_model, pack, picture, prompts
from torch.nn.functional import avg_pool2d
from transformers import InternVLConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.llava_next.modeling_llava_next import unpad_image

from lit_eemllm.config import load_config
from lit_eemllm.config.keys import ConnectorConfig, LoraConfig, OptimConfig, TuningConfig
from lit_eemllm.cost.formulas import prefill_flops, token_flops
from lit_eemllm.cost.trace import Document, grids_of, trace
from lit_eemllm.cost.weightless import Parts
from lit_eemllm.errors import ConfigError
from lit_eemllm.inputs.images import Transform
from lit_eemllm.inputs.reduction import EACH
from lit_eemllm.layout import Run, SequenceLayout, join_images
from lit_eemllm.mechanisms import (
    CONNECTORS,
    PRESETS,
    Connector,
    ConnectorModule,
    Projector,
    Sizes,
    build_connector,
    build_mechanism,
    configured_connector,
    register_connector,
)
from lit_eemllm.mechanisms.pooling import MOST
from lit_eemllm.model import EEMLLM
from lit_eemllm.model.image_cache import ImageCache
from lit_eemllm.plugins import import_user_code
from lit_eemllm.training.fsdp2 import shared_out
from lit_eemllm.training.module import with_blank_image
from lit_eemllm.training.tuning import apply_tuning, parameter_groups

ENCODERS = ["clip", "siglip2", "idefics2", "anyres"]
EVERYWHERE = [(encoder, name) for encoder in ENCODERS for name in CASES
              if (encoder, case(name).side) != ("idefics2", 3)]  # fmt: skip
"""The smallest images of tiny Idefics2 are 2 x 2 patches."""
FEWER = [name for name in CASES if case(name).by_place]
OWN = Path(__file__).parents[2] / "docs" / "my_connector.py"


def model_of(encoder: str, name: str, mechanism: str = "llava") -> EEMLLM:
    """With random values in place of initial ones, behind which an error could hide."""
    model = make_model(encoder, mechanism, connector=case(name))
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


# --- what they compute
def expected_tokens(model: EEMLLM, features: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """Visual tokens of pictures, each put together from its views by hand."""
    transform, found = model.vision.transform, []
    start = 0
    for width, height in sizes:
        pixels = transform(picture((width, height)))
        views = len(pixels) if pixels.ndim == 4 else 1
        rows, columns = (side // 4 for side in pixels.shape[-2:])
        each = []
        for _ in range(views):
            view = features[start : start + rows * columns].view(rows, columns, -1)
            each.append(plain_tokens(model.connector, model.projector, view))
            start += rows * columns
        if views > 1:
            high, wide = transform.grid(width, height)
            one_token = not case_is_spatial(model.connector)
            side = (1, len(each[0])) if one_token else (int(len(each[0]) ** 0.5),) * 2
            tiles = torch.stack(each[1:]).view(high, wide, *side, -1).permute(4, 0, 2, 1, 3)
            whole = tiles.reshape(-1, high * side[0], wide * side[1])
            kept = whole if one_token else unpad_image(whole, (height, width))
            newline = model.projector.newline[:, None, None].expand(-1, kept.shape[1], 1)
            each = [each[0], torch.cat([kept, newline], 2).flatten(1).T]
        found += each
    assert start == len(features)
    return torch.cat(found)


def case_is_spatial(connector: Connector) -> bool:
    return connector.name != "attention"


@pytest.mark.parametrize(("encoder", "name"), EVERYWHERE)
def test_a_connector_equals_its_equations_with_gradients(encoder, name):
    """Several pictures of many sizes in a pack; of the features too."""
    model = model_of(encoder, name)
    batch = pack(model, [[3, size, 4] for size in PICTURES])
    given_ = model._features(batch.pixel_values, batch.image_sizes, batch.layout)
    rows = given_.rows.detach().requires_grad_()
    found, true = model.projector(rows, *given_[1:3]), expected_tokens(model, rows, PICTURES)
    assert tiny.max_error(found, true) <= BOUND and len(found) == batch.layout.num_visual
    weights = torch.linspace(-1, 1, true.numel()).view_as(true)
    wanted = [rows, *model.projector.parameters()]
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), wanted) for x in (true, found)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * a.abs().max().item())
        assert a.any()


@pytest.mark.parametrize("grid", [(4, 4), (4, 6), (6, 2)])
def test_pixel_shuffle_as_in_internvl_and_idefics3(grid):
    rows, columns = grid
    config = InternVLConfig(vision_config={"hidden_size": 8}, text_config={"hidden_size": 12, "model_type": "qwen2"})
    theirs = InternVLMultiModalProjector(config)
    ours = build_connector({"name": "pixel_shuffle"}).module(Sizes(12, 1, vision=8))
    state = {name.replace("layer_norm", "norm"): 1 + torch.randn_like(x) for name, x in theirs.state_dict().items()}
    theirs.load_state_dict({name.replace("norm", "layer_norm"): x for name, x in state.items()})
    ours.load_state_dict(state)
    images = torch.randn(2, rows, columns, 8)
    shuffled = InternVLModel.pixel_shuffle(None, images, 0.5)
    expected = theirs(shuffled.flatten(1, 2)).flatten(0, 1)
    found = ours(images.flatten(0, 2), None, (grid, grid))
    assert found.shape == (rows * columns // 2, 12) and tiny.max_error(found, expected) <= BOUND
    if rows == columns:
        idefics3 = Idefics3Connector.pixel_shuffle(None, images.flatten(1, 2), 2)
        assert idefics3.flatten(0, 1).equal(shuffled.flatten(0, 2))


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (1, 6), (27, 27)])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_averages_as_pytorch_pools(grid, factor):
    connector = build_connector({"name": "average", "options": {"factor": factor}})
    module, features = connector.module(Sizes(12, 1, vision=8)), torch.randn(2, *grid, 8)
    pooled = avg_pool2d(features.permute(0, 3, 1, 2), factor, ceil_mode=True, count_include_pad=False)
    expected = pooled.flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(module.pool(features.flatten(0, 2), (grid, grid)), expected)
    assert connector.count((grid, grid)) == len(expected)


@pytest.mark.parametrize("name", FEWER)
def test_a_token_depends_on_the_features_of_its_view_alone(name):
    connector = case(name)
    module, grids = connector.module(Sizes(12, 1, vision=8)), ((2, 3), (4, 4), (1, 1))
    features = torch.randn(23, 8, requires_grad=True)
    counts = [connector.count((grid,)) for grid in grids]
    for tokens, mine in zip(module(features, None, grids).split(counts), features.split([6, 16, 1]), strict=True):
        (gradient,) = torch.autograd.grad(tokens.sum(), features, retain_graph=True)
        reached = gradient.abs().sum(1).nonzero().flatten()
        first = next(i for i in range(23) if features[i].equal(mine[0]))
        assert reached.tolist() == list(range(first, first + len(mine)))


# --- how many
SIZES = st.tuples(st.integers(1, 300), st.integers(1, 300))


@pytest.mark.parametrize("encoder", ENCODERS)
@given(
    name=st.sampled_from(sorted(CASES)),
    factor=st.sampled_from([1, 2, 3]),
    sizes=st.lists(SIZES, min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_header_tells_how_many_tokens_the_model_makes(encoder, name, factor, sizes):
    connector = case(name)
    if hasattr(connector, "factor"):
        connector = replace(connector, factor=factor)
    if encoder == "idefics2" and connector.side > 2:
        return
    module = modules(encoder, connector)
    transform = module.vision.transform
    counts = [transform.num_tokens(*size) for size in sizes]
    assert all(1 <= count <= transform.num_tokens(*transform.largest) for count in counts)
    layout = SequenceLayout.of([[Run(True, count)] for count in counts])
    pixels = join_images([transform(picture(size)) for size in sizes])
    with torch.no_grad():
        rows, order, grids, _ = module._features(pixels, sizes, layout)
        assert len(module.projector(rows, order, grids)) == sum(counts)
    if transform.policy == "native":  # whole squares
        assert all(side % connector.side == 0 for grid in grids for side in grid)
        assert all(image.shape[1] % (4 * connector.side) == 0 for image in pixels)


MODELS: dict[tuple[str, Connector], EEMLLM] = {}


def modules(encoder: str, connector: Connector) -> EEMLLM:
    if (encoder, connector) not in MODELS:
        MODELS[encoder, connector] = make_model(encoder, connector=connector)
    return MODELS[encoder, connector]


def test_tokens_by_hand():
    """Those that docs/vision.md tells, of 24, 27 and 32 patches in a row; of pictures of many sizes and in tiles."""
    page = (OWN.parent / "vision.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`.* \| (\d+), (\d+), (\d+) \|$", page, re.MULTILINE)
    assert {name for name, *_ in rows} == set(CONNECTORS)
    for name, *told in rows:
        assert [CONNECTORS[name].count(((side, side),)) for side in (24, 27, 32)] == [int(count) for count in told]
    assert [CONNECTORS["average"].count(((side, side),)) for side in (24, 27, 32)] == [12 * 12, 14 * 14, 16 * 16]
    naflex = replace(tiny.TRANSFORMS["siglip2"], most=256).with_reduction(CONNECTORS["average"])
    assert naflex.num_tokens(*naflex.largest) == 64 and naflex.largest == (8, 512)
    assert naflex.num_tokens(640, 480) == 63 and naflex.view_grids([(640, 480)]) == ((14, 18),)
    anyres = tiny.TRANSFORMS["anyres"].with_reduction(CONNECTORS["average"])  # a view is 4 x 4 patches, 2 x 2 tokens
    assert anyres.num_tokens(32, 32) == 4 + 4 * (4 + 1) and anyres.num_tokens(32, 16) == 4 + 2 * (4 + 1)
    pooled = tiny.TRANSFORMS["anyres"].with_reduction(build_connector({"name": "attention", "options": {"tokens": 3}}))
    assert pooled.num_tokens(32, 32) == 3 + 2 * (2 * 3 + 1)  # a newline after each row of tiles
    assert pooled.num_tokens(40, 3) == 3 + (3 * 3 + 1)  # of which none is dropped, though most of them is padding
    order, made_, _ = pooled.order([(32, 32)])
    assert made_ == 15 and order.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 15, 9, 10, 11, 12, 13, 14, 15]


# --- in the model
@pytest.mark.parametrize("mechanism", ["llava", "ee_mllm", "saisa"])
@pytest.mark.parametrize("name", CASES)
def test_the_model_equals_its_equations_with_gradients(name, mechanism):
    model = make_model("clip", mechanism, connector=case(name))
    batch = pack(model, [[3, (16, 16), 4], [2, (9, 9), 1, (5, 5), 3], [7], [(16, 16), 2]])
    true, found = plain(model, batch), text_logits(model, batch)
    assert tiny.max_error(found, true) <= BOUND
    compared = compared_gradients(model, batch, true, found)
    assert sum(n.startswith("projector") for n in compared) == len(list(model.projector.parameters()))


@pytest.mark.parametrize("mechanism", ["llava", "saisa"])
@pytest.mark.parametrize(("encoder", "name"), [pair for pair in EVERYWHERE if pair[1] in FEWER])
def test_packing_generation_and_remembered_images(encoder, name, mechanism):
    """A pack gives what each document gives alone, gradients included; a batch of prompts what each gives, with a cache and without."""
    model = model_of(encoder, name, mechanism)
    batch = pack(model, [[3, (40, 20), 4, (9, 30), 2], [5], [(5, 5), 3], [2, (64, 17), (40, 20), 4]])
    model.packed_loss(batch).backward()
    together = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n, _ in model.named_parameters() if n.startswith("projector")} <= set(together)
    model.zero_grad()
    logits = []
    for one in alone(batch):
        model.packed_loss(one).backward()
        logits.append(model.packed_logits(one))
    assert tiny.max_error(model.packed_logits(batch), torch.cat(logits)) < 2e-5
    for n, gradient in together.items():
        other = model.get_parameter(n).grad
        torch.testing.assert_close(gradient, other, rtol=2e-3, atol=2e-5 * gradient.abs().max().item() + 4e-6)

    documents = [[3, (40, 20), 4], [2, (9, 30), (64, 17), 3], [6], [(5, 5), 2]]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    found = model.generate(**inputs(model, documents), **options)
    assert found.equal(model.generate(**inputs(model, documents), **options, use_cache=False))
    for i, document in enumerate(documents):
        one = model.generate(**inputs(model, [document], 10 * i), **options)
        assert one[0, -5:].equal(found[i, -5:])
    assert model.generate(**inputs(model, documents), **options, num_beams=2).shape == found.shape
    if mechanism != "llava":
        model.image_cache = ImageCache(10**9)
        for _ in range(2):
            assert model.generate(**inputs(model, documents), **options).equal(found)
        assert (model.image_cache.hits, model.image_cache.misses) == (4, 4)


def inputs(model, documents, seed=0):
    """Left-padded prompts."""
    given_ = prompts(model, documents, seed)
    return {**given_, "pixel_values": join_images(given_["pixel_values"]) if given_["pixel_values"] else None}


@pytest.mark.parametrize("mechanism", ["llava", "saisa"])
@pytest.mark.parametrize("encoder", ["clip", "siglip2", "anyres"])
@pytest.mark.parametrize("name", FEWER)
def test_without_images_every_weight_has_a_gradient(name, encoder, mechanism):
    model = model_of(encoder, name, mechanism)
    batch = pack(model, [[5], [4]])
    model.packed_loss(batch).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())
    blank = with_blank_image(batch, model.vision.transform)
    assert model.packed_loss(blank).item() == pytest.approx(model.packed_loss(batch).item(), rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_decoder_frozen_in_16_bits_without_autocast(name):
    model = model_of("clip", name)
    for part in (model.vision, model.language_model):
        part.requires_grad_(False).to(torch.bfloat16)
    for documents in ([[3, (16, 16), 4], [2]], [[5]]):
        model.packed_loss(pack(model, documents)).backward()
        assert all(p.grad.isfinite().all() for p in model.projector.parameters())


def test_images_of_other_shapes_are_told():
    model = make_model("siglip2", connector=case("average"))
    batch = pack(model, [[3, (40, 20), 4]])
    with pytest.raises(ValueError, match="image_sizes are of images of other shapes"):
        model.packed_loss(replace(batch, pixel_values=[model.vision.transform(picture((20, 20)))]))
    with pytest.raises(ValueError, match="1 images give 4 visual tokens, but the layout holds 16"):
        make_model("clip", connector=case("average")).packed_loss(tiny.pack([[3, 0, 4]]))


def test_one_for_each_layer():
    """SAISA's layers have a connector each, of any kind, sharded each by itself."""
    for name in CASES:
        model = make_model("clip", "saisa", connector=case(name))
        one = case(name).module(model.sizes)
        assert len(model.projector.layers) == 3 and {type(part) for part in model.projector.layers} == {type(one)}
        assert all(part in shared_out(model) for part in model.projector.layers)
        values = [part.state_dict() for part in model.projector.layers]
        assert values[0].keys() == one.state_dict().keys() and values[0].keys() == values[2].keys()


@pytest.mark.parametrize("name", [name for name in CASES if case(name).spatial])
def test_one_before_each_of_some_layers(name):
    """DeepStack's modules are connectors of this kind, and cost what these do for each token."""
    model = make_model("clip", "deepstack", connector=case(name))
    batch = pack(model, [[3, (16, 16), 4], [(16, 16), 2], [5]])
    assert tiny.max_error(text_logits(model, batch), plain(model, batch)) <= BOUND
    tokens = batch.layout.image_lengths[0]
    cost = model.mechanism.block_cost(1, model.sizes, 9, tokens)
    assert cost.prefill == round(tokens * token_flops(model.sizes, (4, 4))) and not cost.decode and not cost.kept
    assert model.mechanism.block_cost(0, model.sizes, 9, tokens).prefill == 0


# --- mechanisms with a resampler of their own
def test_flamingos_resampler_refuses_another_connector_and_its_blocks_take_any():
    for name in CASES:
        raw = build_mechanism("flamingo", 3, {"gated": {"latents": 0, "every": 1, "heads": 2, "head_size": 8}})
        model = tiny.model("llama-gqa", raw, "clip", connector=case(name))
        for parameter in model.gated.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        batch = pack(model, [[3, (16, 16), 4], [(16, 16), 2]])
        assert tiny.max_error(text_logits(model, batch), plain(model, batch)) <= BOUND
        if name != "mlp":
            with pytest.raises(ConfigError, match=rf"^model.connector.name: found {case(name).name}, but flamingo"):
                make_model("clip", "flamingo", connector=case(name))
    make_model("clip", "flamingo")


# --- costs
PROJECTOR = ["model.decoder=none", "model.vision.path=none", "data.train=none", "optim.lr=1e-3", "optim.max_steps=1"]


@pytest.mark.parametrize("mechanism", ["ee_mllm", "saisa"])  # one for all layers, one for each
@pytest.mark.parametrize("name", CASES)
def test_flops_and_parameters_of_a_real_training_step(name, mechanism):
    connector, config = case(name), load_config([], PROJECTOR)
    parts = Parts(tiny.DECODERS["llama-gqa"], "transformers", tiny.vision().to_config(), connector)
    visual = parts.transform.num_tokens(16, 16)
    step = trace(config, parts, build_mechanism(mechanism, 3), Document(9, visual, 8))
    model = make_model("clip", mechanism, connector=connector)
    apply_tuning(model, config.optim, "float32")
    batch = pack(model, [[(16, 16), 9]])
    loss, forward = counted(lambda: model.packed_loss(batch))
    _, backward = counted(loss.backward)
    if "cut squares" in name:  # the formula's squares are whole: they cost the same
        assert visual == 4
    assert forward.get_total_flops() == step.forward_flops
    assert backward.get_total_flops() == step.backward_flops
    own = {"vision_width": 16, "connector": connector, "view": parts.view}
    assert step.decoder_flops == prefill_flops(model.mechanism, parts.decoder, 9, visual, **own)
    assert step.parameters == sum(p.numel() for p in model.parameters())
    assert step.trained == sum(p.numel() for p in model.projector.parameters())


def test_flops_by_hand():
    """Of 4 x 4 features of width 16 to width 32: two for each multiply-add."""
    mlp = 2 * (16 * 32 + 32 * 32)
    hand = {
        "mlp": 16 * mlp,
        "linear": 16 * 2 * 16 * 32,
        "pixel_shuffle": 4 * 2 * (64 * 32 + 32 * 32),
        "average": 4 * mlp,
        # keys and values of 16 features, queries, scores and values of 3 tokens, W_o, MLP
        "attention": 2 * 16 * 2 * 16 * 16 + 2 * 3 * 16 * 16 + 2 * 2 * 3 * 16 * 16 + 3 * (2 * 16 * 16 + mlp),
    }
    config, mechanism = load_config([], PROJECTOR), build_mechanism("llava", 3)
    for name, expected in hand.items():
        parts = Parts(tiny.DECODERS["llama-gqa"], "transformers", tiny.vision().to_config(), case(name))
        visual = parts.transform.num_tokens(16, 16)
        assert trace(config, parts, mechanism, Document(9, visual, 8)).connector_flops == expected, name


def test_documents_of_any_number_of_tokens_can_be_traced():
    average, attention = (tiny.TRANSFORM.with_reduction(case(name)) for name in ("average", "attention"))
    few, many = Document(9, 6, 8), Document(9, 7, 8)
    assert grids_of(average, many)[0] == ((2, 14),) and grids_of(tiny.TRANSFORM, many)[0] == ((1, 7),)
    assert grids_of(attention, few)[0] == ((4, 4),) * 2 and grids_of(attention, many)[0] == ((4, 4),) * 3
    parts = Parts(tiny.DECODERS["llama-gqa"], "transformers", tiny.vision().to_config(), case("attention"))
    step = trace(load_config([], PROJECTOR), parts, build_mechanism("saisa", 3), Document(9, 7, 8))
    assert step.forward_flops > 0


# --- tuning
@pytest.mark.parametrize("choice", ["frozen", "full", "lora"])
@pytest.mark.parametrize("mechanism", ["llava", "saisa"])
@pytest.mark.parametrize("name", CASES)
def test_tuning(name, mechanism, choice):
    model = make_model("anyres", mechanism, connector=case(name))
    tuning = TuningConfig(projector=choice, llm="full", vision="frozen")
    config = OptimConfig(lr=1e-3, max_steps=1, tuning=tuning, lora=LoraConfig(r=2, dropout=0))
    apply_tuning(model, config, "float32")
    model.packed_loss(pack(model, [[3, (40, 20), 4, (9, 30), 2]])).backward()
    groups = {id(p) for group in parameter_groups(model, config) for p in group["params"]}
    for parameter_name, parameter in model.projector.named_parameters():
        whole = parameter_name.endswith(("newline", "queries"))
        trained = choice == "full" or (choice == "lora" and ("lora_" in parameter_name or whole))
        assert parameter.requires_grad == trained == (id(parameter) in groups), parameter_name
        assert not trained or parameter.grad is not None


# --- configurations
@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"name": "pixel"}, "model.connector.name: unknown connector 'pixel'; choose one of mlp, linear, pixel_shuffle"),
        ({"name": "mlp", "options": {"factor": 2}}, "options.factor: the connector mlp has no such option; use connector=pixel_shuffle or linear_shuffle or merger or average"),
        ({"name": "average", "options": {"side": 2}}, "options.side: the connector average has no such option; found 'side', expected factor"),
        ({"name": "average", "options": {"factor": True}}, "options.factor: found True, expected a whole number"),
        ({"name": "average", "options": {"factor": 0}}, "options.factor: found 0, expected 1 to 16"),
        ({"name": "attention", "options": {"tokens": 10**9, "heads": 0}}, "options.tokens: found 1000000000, expected 1 to 1024"),
        ({"name": ["mlp"]}, "expected a name and options"),
        ({"name": "mlp", "options": 3}, "expected a name and options"),
    ],
)  # fmt: skip
def test_mistakes(section, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        build_connector(section)


def test_options_that_do_not_fit_the_encoder_are_told():
    with pytest.raises(ConfigError, match=r"options.heads: found 3, expected a divisor of 16, the width"):
        make_model("clip", connector=build_connector({"name": "attention", "options": {"heads": 3}}))
    with pytest.raises(ConfigError, match="squares of 5 x 5 patches, but images are as small as 4 x 4"):
        make_model("siglip2", connector=build_connector({"name": "average", "options": {"factor": 5}}))
    with pytest.raises(ConfigError, match="squares of 3 x 3 patches, but images are as small as 2 x 2"):
        make_model("idefics2", connector=case("average, cut squares"))

    class Unknown(Transform):
        _pixels = num_tokens = largest = None

    assert Unknown().with_reduction(CONNECTORS["linear"]).reduction is EACH
    with pytest.raises(ConfigError, match="which Unknown, the transform of this encoder, does not tell"):
        Unknown().with_reduction(CONNECTORS["average"])


def test_what_is_stored():
    """A connector as its section; a transform without it, but not the same to a run that goes on."""
    for name in CASES:
        connector = case(name)
        stored = json.loads(json.dumps(connector.to_dict()))
        assert build_connector(stored) == connector == configured_connector(ConnectorConfig(**stored))
        for transform in tiny.TRANSFORMS.values():
            if connector.side == 3 and transform.policy == "native" and transform.edges:
                continue
            behind = transform.with_reduction(connector)
            assert behind.to_dict() == transform.to_dict()
            assert (behind.identity() == transform.identity()) == (behind == transform) == (not connector.by_place)
            assert behind.with_reduction(CONNECTORS["mlp"]) == transform
    assert build_connector({}) == CONNECTORS["mlp"] == Connector()
    assert str(case("attention")) == "attention tokens=3 heads=2"
    assert set(MOST) == {"factor", "tokens", "heads"}


@pytest.mark.parametrize("encoder", ["clip", "siglip2", "anyres"])
@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded(name, encoder, tmp_path):
    model = model_of(encoder, name, "saisa")
    model.save_pretrained(tmp_path)
    again = EEMLLM.from_pretrained(tmp_path).eval()
    again.set_attention("reference")
    assert again.connector == model.connector and again.vision.transform == model.vision.transform
    batch = pack(model, [[2, (40, 20), 4]])
    assert again.packed_logits(batch).equal(model.packed_logits(batch))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "reduction" not in json.dumps(saved["vision"])


def test_a_folder_of_before_has_the_mlp(tmp_path):
    model = make_model("clip")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    del saved["connector"]
    file.write_text(json.dumps(saved))
    again = EEMLLM.from_pretrained(tmp_path)
    assert again.connector == Connector() and isinstance(again.projector, Projector)
    for damage in ({"name": "gone"}, {"name": "average", "options": {"factor": 10**6}}, 3):
        file.write_text(json.dumps({**saved, "connector": damage}))
        with pytest.raises(ConfigError, match="connector"):
            EEMLLM.from_pretrained(tmp_path)


# --- one's own
def test_one_of_ones_own():
    with tiny.forgotten_imports():
        import_user_code([OWN])
        strips = build_connector({"name": "strips"})
        for encoder in ENCODERS:
            for mechanism in ("ee_mllm", "saisa"):
                model = make_model(encoder, mechanism, connector=strips)
                batch = pack(model, [[3, size, 4] for size in PICTURES] + [[5]])
                model.packed_loss(batch).backward()
                assert all(p.grad.any() for p in model.projector.parameters())
                logits = torch.cat([model.packed_logits(one) for one in alone(batch)])
                assert tiny.max_error(model.packed_logits(batch), logits) < 2e-5
        model = make_model("clip", connector=strips)
        batch = pack(model, [[3, (16, 16), 4]])
        rows, order, grids, _ = model._features(batch.pixel_values, batch.image_sizes, batch.layout)
        halves = rows.view(2, 8, 16).mean(1)
        torch.testing.assert_close(
            model.projector(rows, order, grids),
            model.projector.linear_2(model.projector.act(model.projector.linear_1(halves))),
        )
        parts = Parts(tiny.DECODERS["llama-gqa"], "transformers", tiny.vision().to_config(), strips)
        step = trace(load_config([], PROJECTOR), parts, build_mechanism("saisa", 3), Document(9, 2, 8))
        own = {"vision_width": 16, "connector": strips, "view": parts.view}
        assert step.decoder_flops == prefill_flops(PRESETS["saisa"], parts.decoder, 9, 2, **own)
        with pytest.raises(ConfigError, match=r"options.rows: found 0, expected 1 or more"):
            build_connector({"name": "strips", "options": {"rows": 0}})
        with pytest.raises(ValueError, match="connector 'strips' is registered already"):
            register_connector("strips")(Connector)
    assert "strips" not in CONNECTORS and issubclass(Projector, ConnectorModule)
