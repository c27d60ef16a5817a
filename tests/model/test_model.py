"""The model against transformers' own: mechanisms, families, packing, cache, generation, round trips."""

import itertools
from dataclasses import replace

import pytest
import tiny
import torch
from lib.decoders import (
    assert_same_gradients,
    check_decoder_equals_transformers,
    gradients,
    hf_decoder,
    split_documents,
)
from lib.equations import RANKED
from lib.mechanisms import BOUND, KINDS, check_generation, text_logits
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SmolLM3Config,
)

from lit_eemllm.attention import resolve_backend
from lit_eemllm.compat.transformers import CACHE
from lit_eemllm.core.families import check_decoder
from lit_eemllm.errors import ConfigError
from lit_eemllm.mechanisms import PRESETS, Aligner, Mechanism, build_mechanism
from lit_eemllm.mechanisms.connectors import Projector, Sizes
from lit_eemllm.model import EEMLLM, register_vision_encoder
from lit_eemllm.model.vision import TransformersVision

PACK = [[3, 0, 4], [5], [2, 0, 1, 0, 3], [0, 6]]  # text-image-text, text only, two images, image first
FAMILIES = ["llama-gqa", "olmo2", "smollm3"]  # of each way in which layers differ
WITH_GEMMA = [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3_text", "llama4_text"))]
ALIGNERS = [Aligner(*switches) for switches in itertools.product([False, True], repeat=3)]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("preset", ["ee_mllm", "llava"])
@pytest.mark.parametrize("decoder", tiny.DECODERS)
def test_decoder_equals_transformers_under_the_mechanisms_mask(decoder, preset, backend):
    model = tiny.model(decoder, preset)
    model.set_attention(backend)
    check_decoder_equals_transformers(model, PACK, diagonal=preset == "ee_mllm")


def llava_twin(model, implementation="eager"):
    vision, text = model.vision.model.config, model.config.text_config
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tiny.VOCAB - 1,
        vision_feature_layer=model.vision.select_layer,
    )
    config._attn_implementation = implementation
    twin = LlavaForConditionalGeneration(config).eval()
    names = {
        "vision.model.": "model.vision_tower.", "projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.", "language_model.lm_head": "lm_head",
    }  # fmt: skip
    rename = {
        key: next(new + key.removeprefix(old) for old, new in names.items() if key.startswith(old))
        for key in model.state_dict()
    }
    twin.load_state_dict({rename[key]: value for key, value in model.state_dict().items()}, strict=True)
    return twin, rename


WINDOWED = ["mistral-window", "qwen2-window", "qwen3-window", "olmo3", "gemma3_text"]


@pytest.mark.parametrize("decoder", ["llama", "llama-gqa", "qwen3", "olmo2", "smollm3", "llama4_text", *WINDOWED])
def test_llava_equals_transformers_llava(decoder):
    model, batch = tiny.model(decoder, "llava"), tiny.pack([[3, 0, 4], [2, 0, 1, 0, 3]])
    batch.input_ids.clamp_(max=tiny.VOCAB - 2)  # the twin's image token is the last of its vocabulary
    twin, rename = llava_twin(model)
    loss_sum, count, used, logits_Tv = 0.0, 0, 0, []
    targets = torch.full((batch.layout.num_tokens,), -100)
    targets[batch.layout.text_index[batch.target_rows] + 1] = batch.targets.clamp(max=tiny.VOCAB - 2)
    batch.targets.clamp_(max=tiny.VOCAB - 2)
    for rows, visual in split_documents(batch):
        ids = batch.input_ids[rows].masked_fill(visual, tiny.VOCAB - 1)
        images = int(visual.sum()) // tiny.TOKENS
        pixels = batch.pixel_values[used : used + images]
        used += images
        out = twin(input_ids=ids[None], pixel_values=pixels, labels=targets[rows][None])
        n = int((targets[rows][1:] >= 0).sum())
        loss_sum, count = loss_sum + out.loss * n, count + n
        logits_Tv.append(out.logits[0, ~visual])
    assert count == batch.num_targets
    assert tiny.max_error(text_logits(model, batch), torch.cat(logits_Tv)) <= BOUND
    loss = model.packed_loss(batch)
    torch.testing.assert_close(loss, loss_sum, rtol=BOUND, atol=0)
    true = gradients(twin, loss_sum)
    assert_same_gradients({rename[k]: v for k, v in gradients(model, loss).items()}, true)


@pytest.mark.parametrize("length", [6, 7])
def test_a_document_one_token_longer_than_the_window_has_one(length):
    model, batch = tiny.model("mistral-window", "llava"), tiny.pack([[length]])
    assert tiny.max_error(text_logits(model, batch), hf_decoder(model)(batch.input_ids[None]).logits[0]) <= BOUND


def test_images_both_ways_equal_transformers_gemma():
    """Its own masks of image blocks and windows, given which tokens are visual; an image is wider than the window."""
    model, batch = tiny.model("gemma3_text", "bidirectional"), tiny.pack([[3, 0, 4], [2, 0, 1, 0, 3]])
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    twin = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=model.config.text_config, vision_config=vision, mm_tokens_per_image=4)
    ).eval()
    decoder = twin.model.language_model
    decoder.load_state_dict(model.language_model.model.state_dict(), strict=True)
    visual_Vh, logits_Tv, used = model.projector(model.image_features(batch.pixel_values)).detach(), [], 0
    for rows, visual in split_documents(batch):
        used += (n := int(visual.sum()))
        x_Lh = decoder.embed_tokens(batch.input_ids[rows]).masked_scatter(visual[:, None], visual_Vh[used - n : used])
        out = twin(inputs_embeds=x_Lh[None], token_type_ids=visual[None].long(), use_cache=False)
        logits_Tv.append(out.logits[0, ~visual])
    true, found = torch.cat(logits_Tv), text_logits(model, batch)
    assert tiny.max_error(found, true) <= BOUND
    losses = (cross_entropy(logits[batch.target_rows], batch.targets, reduction="sum") for logits in (found, true))
    modules = (model.language_model.model, decoder)
    assert_same_gradients(*(gradients(*pair) for pair in zip(modules, losses, strict=True)))


@pytest.mark.parametrize("aligner", ALIGNERS, ids=str)
@pytest.mark.parametrize("decoder", ["llama", "llama-gqa", "olmo2", "smollm3", "gemma3_text", "llama4_text"])
def test_aligner_combinations_follow_their_formula(decoder, aligner):
    """One layer's visual states from the formula of `Aligner`, written out with transformers' submodules."""
    model, batch = tiny.model(decoder, Mechanism(aligner=aligner)), tiny.pack(PACK)
    layer = model.language_model.model.layers[0]
    inputs, outputs = [], []
    layer.register_forward_hook(lambda _, args, out: inputs.append(args[1]) or outputs.append(out[1]))
    model.packed_loss(batch).backward()
    if aligner.off:  # nothing updates visual states: they do not run through the layers
        assert outputs[0] is inputs[0]
        return
    visual = inputs[0]
    norm1, post1, norm2, post2 = tiny.norms(layer)
    u = norm1(visual)
    heads = model.config.text_config.num_attention_heads
    path = u
    if aligner.value:
        values = layer.self_attn.v_proj(u).view(len(u), -1, layer.self_attn.head_dim)
        path = torch.stack([values[:, n // (heads // values.shape[1])] for n in range(heads)], 1).flatten(1)
    path = layer.self_attn.o_proj(path) if aligner.output else path
    h = visual + post1(path) if aligner.value or aligner.output else visual
    expected = h + post2(tiny.feed_forward(layer)(norm2(h))) if aligner.ffn else h
    assert tiny.max_error(outputs[0], expected) <= BOUND
    assert all(p.grad is not None for n, p in model.named_parameters() if "projector" in n or "language_model" in n)


def test_aligner_half_on_needs_square_heads_and_says_so():
    with pytest.raises(ConfigError, match=r"value=False with output=True.*48 and 32"):
        tiny.model("qwen3", Mechanism(aligner=Aligner(value=False)))
    tiny.model("qwen3", Mechanism(aligner=Aligner(value=False, output=False)))
    tiny.model("qwen3", Mechanism(dense_layers="all", aligner=Aligner(value=False)))


def test_mixed_dense_layers_and_switching_touch_no_weight():
    model, batch = tiny.model("llama-gqa", "llava"), tiny.pack(PACK)
    dense, weights = text_logits(model, batch), {k: v.clone() for k, v in model.state_dict().items()}
    model.set_mechanism(Mechanism(dense_layers=(0, 1)))  # the last layer's visual rows reach no text
    assert text_logits(model, batch).equal(dense)
    model.set_mechanism(Mechanism(dense_layers=(0,)))
    assert tiny.max_error(text_logits(model, batch), dense) > 1e-3
    assert all(v.equal(weights[k]) for k, v in model.state_dict().items())
    with pytest.raises(ConfigError, match=r"dense_layers: found \[7\].*layers 0 to 2"):
        tiny.model("llama", Mechanism(dense_layers=(7,)))


@pytest.mark.parametrize("decoder", [*FAMILIES, "gemma3_text", "llama4_text"])
@pytest.mark.parametrize("preset", KINDS)
def test_without_image_every_mechanism_is_the_base_model(preset, decoder):
    """Also token for token; and where a document is by one token longer than a window or a chunk."""
    model, batch = tiny.model(decoder, preset), tiny.pack([[5], [7]])
    twin = hf_decoder(model)
    true = [twin(batch.input_ids[None, rows]).logits[0] for rows, _ in split_documents(batch)]
    assert tiny.max_error(text_logits(model, batch), torch.cat(true)) <= BOUND
    inputs = tiny.prompt(model, [[5], [9]])
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    found = model.generate(**inputs, **options)
    for row, length in enumerate([5, 9]):  # alone: in transformers' Llama 4 queries grow with padding, too
        ids = inputs["input_ids"][row : row + 1, 9 - length :]
        assert found[row, 9 - length :].equal(twin.generate(ids, **options)[0])


@pytest.mark.parametrize(
    ("decoder", "backend"),
    [("llama-gqa", "sdpa"), ("olmo2", "reference"), ("gemma3_text", "sdpa"), ("llama4_text", "sdpa")],
)
@pytest.mark.parametrize("preset", KINDS)
def test_packing_leaks_nothing(preset, decoder, backend):
    model, batch = tiny.model(decoder, preset), tiny.pack(PACK)
    model.set_attention(backend)
    n = len([r for r in batch.layout.text_index.tolist() if r < 3 + tiny.TOKENS + 4])
    logits = text_logits(model, batch)
    ids, pixels = batch.input_ids.clone(), batch.pixel_values.clone()
    ids[3 + tiny.TOKENS + 4 :] = 7
    pixels[1:] *= -2
    changed = replace(batch, input_ids=ids, pixel_values=pixels)
    assert text_logits(model, changed)[:n].equal(logits[:n])
    assert not text_logits(model, changed)[n:].equal(logits[n:])

    pixels = batch.pixel_values.clone().requires_grad_()
    embeddings = []
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.retain_grad() or embeddings.append(out))
    text_logits(model, replace(batch, pixel_values=pixels))[:n].square().sum().backward()
    assert embeddings[0].grad[n:].count_nonzero() == 0 and embeddings[0].grad[:n].count_nonzero()
    assert pixels.grad[1:].count_nonzero() == 0 and pixels.grad[0].count_nonzero()


def test_packed_equals_one_document_at_a_time():
    model = tiny.model("llama-gqa", "ee_mllm")
    batch = tiny.pack(PACK)
    model.set_attention("sdpa")
    joint, used = model.packed_loss(batch), 0
    total = 0.0
    for (rows, visual), document in zip(split_documents(batch), PACK, strict=True):
        single = tiny.pack([document])
        images = document.count(0)
        single.input_ids = batch.input_ids[rows]
        texts = single.input_ids[~visual]
        single.targets = texts[single.target_rows + 1]
        single.pixel_values = batch.pixel_values[used : used + images] if images else None
        used += images
        total = total + model.packed_loss(single)
    torch.testing.assert_close(joint, total, rtol=BOUND, atol=0)


@pytest.mark.parametrize(
    ("decoder", "backend"),
    [*((decoder, "sdpa") for decoder in (*FAMILIES, "gemma3_text", "llama4_text")), ("llama-gqa", "reference")],
)
@pytest.mark.parametrize(
    "mechanism",
    [*(name for name in KINDS if name not in ("flamingo", *RANKED)), Mechanism(dense_layers=(1,), aligner=Aligner(ffn=False)),
     Mechanism(visual_positions="shared"), Mechanism(visual_positions="unrotated"), Mechanism(visual_window=3),
     Mechanism(dense_layers=(0,), cross_layers=(0, 2))], ids=str,
)  # fmt: skip
def test_cached_steps_equal_one_pass(mechanism, decoder, backend):
    """Prefill + single tokens + a chunk with a new image give the logits of one pass without cache."""
    model = tiny.model(decoder, mechanism)
    model.set_attention(backend)
    inputs = tiny.prompt(model, [[3, 0, 6, 0, 3], [0, 9, 0, 2], [1, 0, 8, 0, 3]])
    whole = model(**inputs).logits
    assert (whole[inputs["input_ids"] == model.config.image_token_id][:, : tiny.VOCAB] == 0).all()
    ids, mask, pixels = inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]
    cut = 22  # the first image of each row lies before, the second behind
    assert (ids[:, :cut] == tiny.VOCAB).sum(1).tolist() == [16, 16, 16]
    out = model(ids[:, :cut], mask[:, :cut], pixels[[0, 2, 4]], use_cache=True)
    parts = [out.logits]
    for a, b, images in [(cut, cut + 1, None), (cut + 1, cut + 2, None), (cut + 2, ids.shape[1], pixels[[1, 3, 5]])]:
        if images is None and (ids[:, a:b] == tiny.VOCAB).any():
            pytest.fail("the cut lies in an image")
        parts.append(model(ids[:, a:b], mask[:, :b], images, cache=out[CACHE]).logits)
    found = torch.cat(parts, 1)[mask.bool()][:, : tiny.VOCAB]
    assert tiny.max_error(found, whole[mask.bool()][:, : tiny.VOCAB]) <= BOUND


@pytest.mark.parametrize("decoder", WITH_GEMMA[1:])  # of llama every mechanism is tried in tests/mechanisms
@pytest.mark.parametrize("preset", [name for name in KINDS if name not in RANKED])
def test_greedy_generation_alone_equals_in_a_batch_and_without_cache(preset, decoder):
    check_generation(tiny.model(decoder, preset, seed=1))  # one with which answers differ


def test_sampling_beams_and_penalties_work_with_images():
    model = tiny.model()
    inputs = tiny.prompt(model, [[3, 0, 4], [2, 0, 1, 0, 3]])
    options = dict(max_new_tokens=6, pad_token_id=0, eos_token_id=None)
    torch.manual_seed(5)
    sampled = model.generate(**inputs, **options, do_sample=True, repetition_penalty=1.3, num_return_sequences=3)
    torch.manual_seed(5)
    assert sampled.equal(
        model.generate(**inputs, **options, do_sample=True, repetition_penalty=1.3, num_return_sequences=3)
    )
    assert sampled.shape[0] == 6 and (sampled[:, -6:] < tiny.VOCAB).all()  # an image token is never generated
    beams = model.generate(**inputs, **options, num_beams=4, do_sample=False)
    greedy = model.generate(**inputs, **options, do_sample=False)
    alone = model.generate(**tiny.prompt(model, [[3, 0, 4]]), **options, num_beams=4, do_sample=False)
    assert beams[:1, -6:].equal(alone[:, -6:])

    def score(ids):
        logits = model(
            ids, torch.cat([inputs["attention_mask"], torch.ones(2, 6).long()], 1), inputs["pixel_values"]
        ).logits
        return logits[:, -7:-1].log_softmax(-1).gather(-1, ids[:, -6:, None]).sum((1, 2))

    assert (score(beams) >= score(greedy) - 1e-4).all()


def test_mismatch_of_images_and_image_tokens_names_both_numbers():
    model = tiny.model()
    inputs = tiny.prompt(model, [[3, 0, 4]])
    with pytest.raises(ValueError, match="2 images give 32 visual tokens, but the ids hold 16"):
        model(inputs["input_ids"], pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="0 images give 0 visual tokens, but the ids hold 16"):
        model(inputs["input_ids"])
    ids = torch.tensor([[tiny.VOCAB] * 10 + [5] + [tiny.VOCAB] * 22 + [5]])  # as many as two images have, elsewhere
    with pytest.raises(ValueError, match="an image of 16 tokens has only 10 image tokens"):
        model(ids, pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1))


def test_half_an_aligner_needs_heads_as_wide_as_the_model_wherever_it_is_executed():
    """Of the last layer only keys and values of images are read, so there it may be."""
    half = Aligner(output=False)
    assert not tiny.model("llama-16", Mechanism((0, 1), aligner=half)).table[-1].update
    for dense in ((0,), (1, 2)):
        with pytest.raises(ConfigError, match=r"aligner: value=True with output=False.*has 64 and 32"):
            tiny.model("llama-16", Mechanism(dense, aligner=half))


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
@pytest.mark.parametrize("mechanism", [*KINDS, Mechanism(dense_layers=(1,), aligner=Aligner(ffn=False))], ids=str)
def test_round_trip_through_a_folder(tmp_path, mechanism, encoder):
    model, batch = tiny.model("llama-gqa", mechanism, encoder), tiny.pack(PACK)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = EEMLLM.from_pretrained(tmp_path)
    again.set_attention("reference")
    assert again.mechanism == model.mechanism
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert text_logits(again.eval(), batch).equal(text_logits(model, batch))


@pytest.mark.parametrize("decoder", ["mistral-window", "olmo3", "gemma3_text", "llama4_text"])
def test_windows_and_rotary_positions_survive_a_folder(tmp_path, decoder):
    model, batch = tiny.model(decoder), tiny.pack(PACK)
    model.save_pretrained(tmp_path)
    again = EEMLLM.from_pretrained(tmp_path)
    again.set_attention("reference")
    assert text_logits(again.eval(), batch).equal(text_logits(model, batch))


def test_joins_ordinary_checkpoints_unchanged(tmp_path):
    """from_parts: decoder and encoder folders as transformers writes them; tied embeddings survive a round trip."""
    torch.manual_seed(0)
    text = LlamaConfig(**{**tiny.COMMON, "tie_word_embeddings": True}, num_attention_heads=4, num_key_value_heads=2)
    decoder = AutoModelForCausalLM.from_config(text)
    decoder.save_pretrained(tmp_path / "lm")
    tower = tiny.vision().model
    tower.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor", "do_center_crop": true, "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16},'
        ' "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3}'
    )
    encoder = TransformersVision.from_path(str(tmp_path / "clip"), select_layer=-2, policy="pad")
    model = EEMLLM.from_parts(str(tmp_path / "lm"), "transformers", encoder, PRESETS["ee_mllm"], tiny.VOCAB)
    assert model.vision.transform.policy == "pad"
    assert all(model.language_model.state_dict()[k].equal(v) for k, v in decoder.state_dict().items())
    assert all(model.vision.model.state_dict()[k].equal(v) for k, v in tower.state_dict().items())
    model.save_pretrained(tmp_path / "both")
    again = EEMLLM.from_pretrained(tmp_path / "both")
    assert again.language_model.lm_head.weight is again.language_model.model.embed_tokens.weight
    model.set_attention("reference"), again.set_attention("reference")
    batch = tiny.pack(PACK)
    assert text_logits(again.eval(), batch).equal(text_logits(model.eval(), batch))


@pytest.mark.parametrize("decoder", WITH_GEMMA)
@pytest.mark.parametrize("preset", KINDS)
def test_adapters_of_peft_act_and_merge(preset, decoder):
    """Submodules are called, so peft's LoRA works in the aligner too, and merging it changes nothing."""
    model, batch = tiny.model(decoder, preset), tiny.pack(PACK)
    before = text_logits(model, batch)
    config = LoraConfig(r=4, target_modules=["v_proj", "o_proj", "gate_proj"], init_lora_weights=False)
    adapted = get_peft_model(model.language_model, config)
    acting = text_logits(model, batch)
    assert tiny.max_error(acting, before) > 1e-2
    model.language_model = adapted.merge_and_unload()
    assert tiny.max_error(text_logits(model, batch), acting) <= BOUND


def test_an_encoder_of_ones_own_keeps_its_weights(tmp_path):
    with tiny.forgotten_imports():
        register_vision_encoder("patches")(tiny.Patches)
        tiny.write_parts(tmp_path)
        vision = tiny.Patches()
        weights = {k: v.clone() for k, v in vision.state_dict().items()}
        model = EEMLLM.from_parts(str(tmp_path / "decoder"), "patches", vision, PRESETS["ee_mllm"], 400)
        assert all(model.vision.state_dict()[k].equal(v) for k, v in weights.items())
        model.save_pretrained(tmp_path / "both")
        with pytest.raises(ConfigError, match=r"^model.mechanism.preset: .* and Patches says none"):
            model.set_mechanism(PRESETS["visionzip"].stretched(3))
        again = EEMLLM.from_pretrained(tmp_path / "both")
        assert all(again.state_dict()[k].equal(v) for k, v in model.state_dict().items())
    with pytest.raises(ConfigError, match=r"unknown encoder 'patches'.*--import"):
        EEMLLM.from_pretrained(tmp_path / "both")


def test_a_fresh_projector_has_no_zero_bias():
    """Features of zero must not stay zero through the layers: that made gradients of 1e20 in the norms of 30 layers."""
    fresh = EEMLLM(tiny.model().config).projector
    for linear in (fresh.linear_1, fresh.linear_2):  # torch's default, as LLaVA
        bound = linear.in_features**-0.5
        assert linear.bias.abs().max() > 0.5 * bound and linear.weight.abs().max() <= bound


@pytest.mark.parametrize("preset", KINDS)
def test_every_parameter_that_is_added_gets_its_initial_value(preset):
    """Also where it was made without one, as transformers makes what a folder lacks: norms begin at one and zero."""
    model = tiny.model("llama-gqa", preset, "anyres")
    added = [*model.projector.modules(), *model.blocks.modules()]
    with torch.no_grad():
        for module in added:
            for parameter in module.parameters(recurse=False):
                parameter.fill_(float("nan"))
    model.apply(model._init_weights)
    assert all(p.isfinite().all() for module in added for p in module.parameters())
    norms = [module for module in added if isinstance(module, torch.nn.LayerNorm)]
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)
    assert bool(norms) == (preset == "flamingo")


def test_a_fresh_newline_is_as_long_as_that_of_llava():
    """Which divides normal numbers by the root of the width."""
    torch.manual_seed(0)
    assert Projector(Sizes(4096, 1, vision=8, newline=True)).newline.norm().item() == pytest.approx(1, rel=0.05)


def test_unsupported_decoders_are_refused_with_what_to_do():
    common = {**tiny.COMMON, "num_attention_heads": 4, "num_key_value_heads": 2}
    for config, reason in [
        (GemmaConfig(**common), "model_type 'gemma'"),
        (Olmo2Config(**common, sliding_window=8), "it uses a sliding window, expected full attention"),
        (
            MistralConfig(**common, sliding_window=8, layer_types=["sliding_attention"] * 2 + ["full_attention"]),
            "layer_types has full_attention, expected sliding_attention",
        ),
        (
            Qwen2Config(**common, layer_types=["sliding_attention"] * 3),
            "layer_types has sliding_attention, expected full_attention",
        ),
        (
            Qwen3Config(**common, use_sliding_window=True, sliding_window=8, layer_types=["chunked_attention"] * 3),
            "layer_types has chunked_attention, expected full_attention, sliding_attention",
        ),
        (Gemma3TextConfig(**common, final_logit_softcapping=30.0), "final_logit_softcapping is 30.0, expected none"),
        (Gemma3TextConfig(**common, use_bidirectional_attention=True), "use_bidirectional_attention is True"),
        (Gemma3TextConfig(**common, rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "rope type 'dynamic'"),
        (
            LlamaConfig(**common, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "rope type 'dynamic'",
        ),
        (LlamaConfig(**common, attention_dropout=0.1), "attention_dropout is 0.1"),
        (
            SmolLM3Config(**common, no_rope_layers=[1, 0], layer_types=["full_attention"] * 3),
            "2 of its 3 layers say whether they rotate",
        ),
        (
            Llama4TextConfig(**common, rope_scaling={"rope_type": "yarn", "factor": 2.0}),
            r"rope type 'yarn' is not one of \('default', 'linear', 'llama3'\)",
        ),
        (
            Llama4TextConfig(**common, attention_chunk_size=None, layer_types=["chunked_attention"] * 3),
            "layer_types has chunked_attention, expected full_attention",
        ),
    ]:
        with pytest.raises(ConfigError, match=f"{reason}.*To add a family"):
            check_decoder(config)


def test_presets_and_their_mistakes():
    assert build_mechanism("llava", 8).is_dense(5) and not build_mechanism("ee_mllm", 8).is_dense(5)
    assert build_mechanism("ee_mllm", 8, {"dense_layers": [1, 2]}).is_dense(2)
    made = build_mechanism("ee_mllm", 8, {"dense_layers": [1], "aligner": {"ffn": False, "value": None}})
    assert Mechanism.from_dict(made.to_dict()) == Mechanism((1,), aligner=Aligner(ffn=False))
    with pytest.raises(ConfigError, match="unknown preset 'ee-mllm'"):
        build_mechanism("ee-mllm", 8)
    with pytest.raises(ConfigError, match="dense_layers"):
        build_mechanism("llava", 8, {"dense_layers": "every"})


def test_under_autocast_queries_keys_and_values_have_its_type():
    """Kernels take one type; rotary angles are float32 and would make queries and keys float32 too."""
    model, seen = tiny.model(), set()
    attend = model.backend.attend

    def spy(q, k, v, plan, scale):
        seen.update((q.dtype, k.dtype, v.dtype))
        return attend(q, k, v, plan, scale)

    model.backend.attend = spy
    with torch.autocast("cpu", torch.bfloat16):
        model.packed_loss(tiny.pack(PACK)).backward()
    assert seen == {torch.bfloat16}


def test_a_loss_is_summed_in_float32_whatever_the_model_is_in():
    model, batch = tiny.model().to(torch.bfloat16), tiny.pack(PACK)
    loss, logits = model.packed_loss(batch), model.packed_logits(batch)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    true = cross_entropy(logits.double(), batch.targets, reduction="sum")
    assert loss.item() == pytest.approx(true.item(), rel=1e-6)


def test_unrotated_positions_try_a_backend_with_the_size_of_head_that_they_give_it(monkeypatch):
    tried = []
    monkeypatch.setattr(
        "lit_eemllm.model.parts.resolve_backend",
        lambda *args: tried.append(args[-1]) or resolve_backend("reference"),
    )
    for mechanism in (Mechanism(), Mechanism(visual_positions="unrotated")):
        model, given = tiny.model("llama-16", mechanism), []
        attend = model.backend.attend
        monkeypatch.setattr(
            model.backend, "attend", lambda q, *rest, a=attend, g=given: g.append(q.shape[-1]) or a(q, *rest)
        )
        model.packed_loss(tiny.pack(PACK))
        assert set(given) == {tried[-1]}
    assert tried == [16, 32]


def test_a_backend_is_found_in_the_middle_of_generate():
    model = tiny.model()
    model._backend = None
    ids = torch.randint(3, tiny.VOCAB, (1, 6))
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 8)
    assert model.backend.name == "sdpa"
