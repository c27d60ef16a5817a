"""What is used of transformers."""

from __future__ import annotations

import logging
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from . import compat, contract, lacks


def other_cache_name(patch: pytest.MonkeyPatch) -> None:
    (other,) = {"cache", "past_key_values"} - {compat("transformers").CACHE}
    patch.setattr("lit_eemllm.compat.transformers.CACHE", other)
    patch.setattr("lit_eemllm.model.modeling.CACHE", other)


@contract("transformers", "models and outputs call the cache by CACHE, and deprecate that nowhere", other_cache_name)
def the_cache_has_a_name():
    import tiny
    from transformers.utils import logging as transformers_logging

    inputs = tiny.prompt(model := tiny.model(), [[3, 0, 4], [5]])
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    root, level = transformers_logging.get_logger("transformers"), transformers_logging.get_verbosity()
    type(root).warning_once.cache_clear()  # what another test was told is told again
    root.addHandler(handler)
    transformers_logging.set_verbosity_warning()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            filled = model(**inputs, use_cache=True)
            options = dict(max_new_tokens=3, pad_token_id=0, return_dict_in_generate=True, do_sample=False)
            outs = [model.generate(**inputs, **options, num_beams=beams) for beams in (1, 2)]
        said += [str(warning.message) for warning in warned]
    finally:
        transformers_logging.set_verbosity(level)
        root.removeHandler(handler)
    assert not [text for text in said if "deprecat" in text.lower()], said
    name = compat("transformers").CACHE
    assert filled[name].get_seq_length() == inputs["input_ids"].shape[1]
    for out in outs:
        assert out[name].columns == out.sequences.shape[1] - 1
        assert not out[name].is_croppable


@contract(
    "transformers",
    "generate repeats inputs for beams by _expand_inputs_for_generation",
    lambda patch: patch.delattr("lit_eemllm.compat.transformers.Generating._expand_inputs_for_generation"),
)
def generate_repeats_images():
    import tiny

    model, calls = tiny.model(), []
    repeated = model.repeated_images
    model.repeated_images = lambda times, *rest: calls.append(times) or repeated(times, *rest)
    model.generate(**tiny.prompt(model, [[3, 0, 4]]), max_new_tokens=2, num_beams=2, pad_token_id=0)
    assert calls == [2]


def renamed_mlp(patch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    made = LlamaDecoderLayer.__init__

    def make(self: Any, *args: Any) -> None:
        made(self, *args)
        self.feed_forward = self.__dict__["_modules"].pop("mlp")

    patch.setattr(LlamaDecoderLayer, "__init__", make)


@contract("transformers", "decoders of every family have the submodules that model/decoder.py calls", renamed_mlp)
def decoder_layers_have_their_parts():
    import tiny
    import transformers

    from lit_eemllm.core.families import FAMILIES

    for config in tiny.DECODERS.values():
        family = FAMILIES[config.model_type]
        norms = [name for name in family.norms if name is not None]
        decoder = transformers.AutoModelForCausalLM.from_config(config)
        assert decoder.lm_head.weight.shape == (config.vocab_size, config.hidden_size)
        for number, layer in enumerate(decoder.model.layers):
            cos, sin, _ = tiny.angles(decoder.model, torch.arange(5), number)
            parts = (*(f"self_attn.{x}_proj" for x in "qkvo"), family.ffn, *norms)
            assert all(callable(layer.get_submodule(part)) for part in parts)
            assert {name for name, _ in layer.named_children()} == {"self_attn", family.ffn, *norms}
            assert (
                hasattr(layer.self_attn, "q_norm")
                == hasattr(layer.self_attn, "k_norm")
                == (config.model_type in ("qwen3", "olmo2", "olmo3", "gemma3_text"))
            )
            assert cos.shape == sin.shape == (1, 5, layer.self_attn.head_dim // (1 + family.interleaved))
            scaled_for = getattr(config, "query_pre_attn_scalar", layer.self_attn.head_dim)
            assert layer.self_attn.scaling == pytest.approx(scaled_for**-0.5)
        assert callable(decoder.model.norm) and decoder.model.embed_tokens.weight.shape[0] == config.vocab_size


@contract(
    "transformers",
    "_compile_jinja_template gives a template whose environment has the filters and names of chat templates",
    lacks("transformers.utils.chat_template_utils._compile_jinja_template"),
)
def chat_templates_have_names():
    filters, names = compat("transformers").template_names()
    assert filters["tojson"]({"é": "<"}) == '{"é": "<"}' and {"trim", "length", "selectattr"} <= set(filters)
    assert {"raise_exception", "strftime_now", "namespace", "range"} <= set(names)


@contract(
    "transformers",
    "SigLIP 2 sizes a picture to at most so many patches, height first",
    lambda patch: patch.setattr(
        "transformers.models.siglip2.image_processing_pil_siglip2.get_image_size_for_max_num_patches",
        lambda height, width, patch, most: (width, height),
    ),
)
def naflex_sizes_are_whole_patches():
    height, width = compat("transformers").naflex_size(100, 400, 16, 64)
    assert (height, width) == (64, 256)  # 4 x 16 patches, all 64


@contract(
    "transformers",
    "select_best_resolution takes the grid that keeps most pixels, height first",
    lambda patch: patch.setattr(
        "transformers.image_processing_utils.select_best_resolution", lambda _, sizes: sizes[0]
    ),
)
def a_wide_picture_takes_a_wide_grid():
    assert compat("transformers").best_grid((300, 900), [(672, 336), (336, 672), (336, 1008)]) == (336, 1008)


@contract(
    "transformers",
    "InternVL's tiles: the grid whose aspect ratio is nearest, columns first, of a picture's height and width",
    lambda patch: patch.setattr(
        "transformers.models.got_ocr2.image_processing_pil_got_ocr2.get_optimal_tiled_canvas",
        lambda size, tile, least, most: (1, most),
    ),
)
def a_wide_picture_is_cut_into_columns():
    assert compat("transformers").nearest_grid((300, 900), 448, 1, 12) == (1, 3)


@contract(
    "transformers",
    "cached_file finds a file of a model, and gives None for one that is not needed and not there",
    lambda patch: patch.setattr("transformers.utils.cached_file", lambda *_, **options: None),
)
def a_file_of_a_model_is_found():
    file_of, here = compat("transformers").file_of, Path(__file__)
    assert file_of(str(here.parent), here.name) == here and file_of(str(here.parent), "no_such_file.json") is None
    with pytest.raises(OSError, match=r"no_such_file\.json"):
        file_of(str(here.parent), "no_such_file.json", needed=True)


@contract(
    "transformers",
    "constants of the hub's client say where it is, and a file is looked for in the cache alone",
    lambda patch: patch.delattr("huggingface_hub.constants.ENDPOINT"),
)
def a_hub_without_an_address_is_not_asked():
    module, asked = compat("transformers"), {}

    def no_address(*_):
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(module, "getaddrinfo", no_address)
        patch.setattr(module, "getproxies", dict)
        patch.setattr("transformers.utils.cached_file", lambda *_, **options: asked.update(options))
        module.unreachable.cache_clear()
        try:
            assert "huggingface.co has no address here (Name or service" in module.unreachable()
            assert module.file_of("me/mine", "chat_template.jinja") is None
            with pytest.raises(OSError, match=r"estimate --shape. and .lit-eemllm shrink --published"):
                module.file_of("me/mine", "config.json", needed=True)
            patch.setattr(module, "getproxies", lambda: {"https": "proxy"})
            module.unreachable.cache_clear()
            assert module.unreachable() == "", "a proxy knows"
        finally:
            module.unreachable.cache_clear()
    assert asked["local_files_only"]


@contract(
    "transformers",
    "Idefics2VisionTransformer is the encoder alone: pixels to states of all patches",
    lacks("transformers.models.idefics2.modeling_idefics2.Idefics2VisionTransformer"),
)
def an_encoder_stands_alone():
    import transformers

    sizes = dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    encoder = compat("transformers").Idefics2VisionTransformer(transformers.Idefics2VisionConfig(**sizes))
    assert encoder(torch.zeros(2, 3, 8, 4)).last_hidden_state.shape == (2, 2, 8)


def wrong_places(patch: pytest.MonkeyPatch) -> None:
    """In versions that compute them beforehand; in others the grids themselves are wrong."""
    module = compat("transformers")
    made = module.vision_arguments

    def wrong(encoder: Any, grid_thw: torch.Tensor) -> Any:
        sent, kept = made(encoder, grid_thw)
        return (
            {**sent, "position_ids": torch.zeros_like(sent["position_ids"])} if kept else {"grid_thw": grid_thw.flip(1)}
        ), kept

    patch.setattr(module, "vision_arguments", wrong)


@contract("transformers", "Qwen's encoders take what they would compute from grids", wrong_places)
def grids_are_read_beforehand():
    from transformers import AutoConfig, AutoModel

    grids = torch.tensor([[1, 4, 6], [1, 8, 2]])
    small = {
        "hidden_size": 32,
        "num_heads": 2,
        "depth": 2,
        "patch_size": 2,
        "intermediate_size": 32,
        "out_hidden_size": 32,
    }
    of = {
        "qwen2_5_vl_vision": {"window_size": 8, "fullatt_block_indexes": [1]},
        "qwen3_vl_vision": {"deepstack_visual_indexes": [0]},
    }
    for kind, more in of.items():
        torch.manual_seed(0)
        encoder = AutoModel.from_config(AutoConfig.for_model(kind, **small, **more)).eval()
        patches = torch.randn(40, 3 * 2 * 2 * 2)
        sent, kept = compat("transformers").vision_arguments(encoder, grids)
        with torch.no_grad():
            found, true = encoder(patches, **sent, **kept), encoder(patches, grid_thw=grids)
        assert torch.equal(found.last_hidden_state, true.last_hidden_state), kind
