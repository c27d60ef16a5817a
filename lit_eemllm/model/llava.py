"""LLaVA-1.5 checkpoints in transformers' format (`LlavaForConditionalGeneration`), read as an EEMLLM and written again.

transformers itself reads the files, so every layout of theirs is understood: one file or shards, and the names of tensors
before version 4.52 (``language_model.model.layers...``, ``vision_tower.vision_model...``) or since
(``model.language_model.layers...``). What LLaVA-1.5 is and an EEMLLM is not, or the other way round, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from ..chat import IMAGE
from ..errors import CheckpointError, ConfigError
from ..images import RESAMPLING, ImageTransform
from ..mechanisms import PRESETS, Mechanism
from .decoder import check_decoder
from .modeling import EEMLLM, EEMLLMConfig
from .pretrained import load_pretrained
from .vision import TransformersVision

STRATEGIES = {"clip_vision_model": "default", "siglip_vision_model": "full"}
"""Encoder -> the ``vision_feature_select_strategy`` that keeps exactly its patches: CLIP has a class token, SigLIP none."""

NAMES = {
    "vision.model.": "model.vision_tower.",
    "projector.": "model.multi_modal_projector.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}
"""Prefixes of our tensors -> those of transformers' LLaVA."""

ANYRES = "cuts an image into several crops of its own resolution (anyres), here every image has one size"
RELATIVES = {
    "llava_next": ANYRES,
    "llava_next_video": ANYRES,
    "llava_onevision": ANYRES,
    "vipllava": "feeds its projector from several layers of the encoder",
    "video_llava": "has a second encoder, for videos",
    "llava_llama": "is in the format of the authors' own code; take the same model in transformers' format (..-hf)",
}
"""Model types that are not LLaVA-1.5 though they sound like it -> why an EEMLLM cannot hold them."""

FORWARD_UP_TO = 1_000_000_000
"""Parameters up to which `check_llava` also compares logits: more would take minutes on a CPU and tens of gigabytes."""

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_UNUSED = (".position_ids", ".inv_freq")  # buffers that old versions of transformers stored


def read_json(file: Path) -> dict[str, Any]:
    """Raises CheckpointError for a file that is missing or no JSON mapping."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a mapping, found {str(values)[:40]!r}")
    return values


def load_whole(kind: Any, folder: Path) -> Any:
    """A transformers model with every tensor of its safetensors files, in the narrowest type that holds them all exactly.

    Raises:
        CheckpointError: no such files, quantised tensors, or tensors missing, misshapen or left over.
    """
    types = set()
    files = sorted(folder.glob("model*.safetensors"))
    try:
        for path in files:
            with safe_open(path, "pt") as file:
                types |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 no mapping
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not readable: {error}") from error
    if not types:
        raise CheckpointError(f"{folder}: no model*.safetensors in it; weights in other formats are not read")
    if packed := {name for name in types if name.startswith(("F", "BF"))} - set(_FLOATS):
        raise CheckpointError(f"{folder}: quantised weights ({', '.join(sorted(packed))}); take the unquantised model")
    dtype = reduce(torch.promote_types, [_FLOATS[name] for name in types if name in _FLOATS])
    options = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}  # told below
    model, info = load_pretrained(kind, str(folder), str(folder), dtype=dtype, **options)
    wrong = {
        "missing": info["missing_keys"],
        "misshapen": {name for name, *_ in info["mismatched_keys"]},
        "left over": {name for name in info["unexpected_keys"] if not name.endswith(_UNUSED)},
    }
    found = [f"{len(names)} {text}, such as {min(names)}" for text, names in wrong.items() if names]
    if found:
        raise CheckpointError(f"{folder}: its tensors do not make a {kind.__name__}: {'; '.join(found)}")
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_pretrained(AutoTokenizer, str(folder), str(folder))


# --- reading


def load_llava(folder: Path) -> tuple[EEMLLM, PreTrainedTokenizerBase]:
    """A LLaVA-1.5 as an EEMLLM with mechanism ``llava``, bit for bit the same weights, and its tokenizer.

    Raises:
        ConfigError: it is no LLaVA-1.5, or one that cannot be represented; lists every reason.
        CheckpointError: files are missing or broken.
    """
    config = _read_config(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.convert_tokens_to_ids(IMAGE) != config.image_token_index:
        raise ConfigError(
            f"{folder}: image_token_index is {config.image_token_index}, but the tokenizer has {IMAGE} as "
            f"{tokenizer.convert_tokens_to_ids(IMAGE)}; expected the tokenizer's {IMAGE} to stand for an image"
        )
    transform = _read_transform(folder, config.vision_config.patch_size)
    llava = load_whole(LlavaForConditionalGeneration, folder)

    text_config = llava.config.text_config
    text_config.tie_word_embeddings = llava.config.tie_word_embeddings
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(text_config)
    decoder.model, decoder.lm_head = llava.model.language_model, llava.lm_head
    vision = TransformersVision(llava.model.vision_tower, transform, config.vision_feature_layer)
    ours = EEMLLMConfig(
        text_config=text_config,
        vision={"encoder": "transformers", "config": vision.to_config()},
        mechanism=PRESETS["llava"].to_dict(),
        image_token_id=config.image_token_index,
    )
    model = EEMLLM(ours, decoder, vision)
    model.projector.to(llava.dtype).load_state_dict(llava.model.multi_modal_projector.state_dict())
    model.generation_config = llava.generation_config
    return model.eval(), tokenizer


def _read_config(folder: Path) -> LlavaConfig:
    """Raises ConfigError listing everything in it that an EEMLLM cannot represent."""
    raw = read_json(folder / "config.json")
    kind = "llava_llama" if "mm_vision_tower" in raw else raw.get("model_type")
    if kind in RELATIVES:
        raise ConfigError(f"{folder}: a {kind!r} {RELATIVES[kind]}; expected a LLaVA-1.5 (model_type 'llava')")
    if kind != "llava":
        raise ConfigError(f"{folder}: its model_type is {kind!r}, expected 'llava'")
    config = load_pretrained(LlavaConfig, str(folder), str(folder))
    found = []
    if raw.get("quantization_config"):
        found.append("quantization_config: quantised weights; take the unquantised model")
    encoder, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    if encoder not in STRATEGIES:
        found.append(f"vision_config.model_type: {encoder!r}, expected {' or '.join(STRATEGIES)}")
    elif strategy != STRATEGIES[encoder]:
        why = "the class token would be" if encoder == "clip_vision_model" else "the first patch would not be"
        text = f"{strategy!r}: {why} a visual token; expected {STRATEGIES[encoder]!r} for {encoder}"
        found.append(f"vision_feature_select_strategy: {text}")
    if not isinstance(config.vision_feature_layer, int):
        found.append(f"vision_feature_layer: a list, {config.vision_feature_layer}; expected one layer")
    if config.projector_hidden_act != "gelu":
        found.append(f"projector_hidden_act: {config.projector_hidden_act!r}, expected 'gelu'")
    if not config.multimodal_projector_bias:
        found.append("multimodal_projector_bias: false, expected true")
    if found:
        raise ConfigError("\n  ".join([f"{folder}/config.json: this LLaVA cannot be represented:", *found]))
    check_decoder(config.text_config)
    return config


def _read_transform(folder: Path, patch: int) -> ImageTransform:
    """From preprocessor_config.json or, since transformers 5, a section of processor_config.json."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        values = read_json(file)
    else:
        file = folder / "processor_config.json"
        values = read_json(file).get("image_processor") or {}
    padded = bool(values.pop("do_pad", False)) and "Llava" in str(values.get("image_processor_type"))
    try:
        transform = ImageTransform.from_preprocessor_config(values, patch)
        if not padded:
            return transform
        if (transform.policy, transform.shortest) != ("crop", transform.height):
            raise ConfigError(f"do_pad with size {values['size']} and crop_size {values.get('crop_size')}")
        return replace(transform, policy="pad", shortest=None)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


# --- writing


def is_llava(mechanism: Mechanism, num_layers: int) -> bool:
    """Whether the mechanism computes what LLaVA does; with visual tokens that query everywhere, the aligner is not used."""
    idle = replace(mechanism, dense_layers="all", cross_layers="all", aligner=PRESETS["llava"].aligner, visual_window=0)
    everywhere = all(mechanism.is_dense(layer) and mechanism.sees_images(layer) for layer in range(num_layers))
    return everywhere and idle == PRESETS["llava"]


def save_llava(model: EEMLLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that transformers' LlavaForConditionalGeneration and AutoProcessor load.

    An image token past the decoder's vocabulary gets rows of zeros in embeddings and head, since transformers embeds it;
    `generate` there is told never to say it.

    Args:
        model: of mechanism ``llava`` (`is_llava`), with an encoder of transformers.
        tokenizer: has ``<image>`` as the model's image token.
        folder: exists.
    """
    vision, old = model.vision, model.config.text_config
    if not isinstance(vision, TransformersVision):
        raise ConfigError(f"the vision encoder is a {type(vision).__name__}; LLaVA's format holds CLIP and SigLIP only")
    if tokenizer.convert_tokens_to_ids(IMAGE) != model.config.image_token_id:
        raise ConfigError(
            f"the tokenizer has {IMAGE} as {tokenizer.convert_tokens_to_ids(IMAGE)}, the model as "
            f"{model.config.image_token_id}; take the tokenizer that the model was trained with"
        )
    text_config = deepcopy(old)
    text_config.vocab_size = model.config.vocab_size
    strategy = STRATEGIES[str(vision.model.config.model_type)]
    transform = vision.transform
    config = LlavaConfig(
        vision_config=deepcopy(vision.model.config),
        text_config=text_config,
        image_token_index=model.config.image_token_id,
        image_seq_length=transform.num_tokens(transform.width, transform.height),
        vision_feature_layer=vision.select_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=old.tie_word_embeddings,
    )
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    added = range(old.vocab_size, text_config.vocab_size)
    llava.load_state_dict(
        {theirs: _with_rows(tensor, theirs, len(added)) for theirs, tensor in _tensors(model).items()}, assign=True
    )
    llava.tie_weights()
    llava.generation_config = deepcopy(model.generation_config)
    llava.generation_config.suppress_tokens = sorted({model.config.image_token_id, *added})
    llava.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    values = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": transform.patch,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(strategy == "default"),  # CLIP's class token
    }
    (folder / "processor_config.json").write_text(json.dumps(values, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(transform), indent=2))


def _tensors(model: EEMLLM) -> dict[str, Tensor]:
    """The model's tensors under the names of transformers' LLaVA."""
    return {
        next(new + name.removeprefix(old) for old, new in NAMES.items() if name.startswith(old)): tensor
        for name, tensor in model.state_dict().items()
    }


def _with_rows(tensor: Tensor, name: str, rows: int) -> Tensor:
    """With so many rows of zeros below, if this tensor has a row for each token."""
    return pad(tensor, (0, 0, 0, rows)) if rows and name.endswith(("embed_tokens.weight", "lm_head.weight")) else tensor


def preprocessor_config(transform: ImageTransform) -> Mapping[str, Any]:
    """transformers' preprocessor_config.json of an image transform."""
    size = {"height": transform.height, "width": transform.width}
    values = {
        "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(transform.mean), "image_std": list(transform.std), "resample": int(RESAMPLING[transform.resample]),
    }  # fmt: skip
    if transform.policy == "resize":
        return {**values, "image_processor_type": "SiglipImageProcessor", "size": size}
    shortest = {"shortest_edge": transform.shortest or max(transform.height, transform.width)}
    values |= {"size": shortest, "crop_size": size, "do_center_crop": True}
    if transform.policy == "pad":
        return {**values, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return {**values, "image_processor_type": "CLIPImageProcessor"}


@torch.inference_mode()
def check_llava(model: EEMLLM, folder: Path) -> str:
    """Read back what `save_llava` wrote, as transformers does, and compare; afterwards the model is in float32.

    Every tensor must be equal and, up to FORWARD_UP_TO parameters, the logits for random ids and a random image to rounding.

    Returns:
        what was compared, in words.

    Raises:
        CheckpointError: they differ: a mistake of this program, or transformers has changed.
    """
    llava = load_whole(LlavaForConditionalGeneration, folder).eval()
    theirs = llava.state_dict()
    rows = model.config.vocab_size - model.config.text_config.vocab_size
    different = [
        name for name, tensor in _tensors(model).items() if not theirs[name].equal(_with_rows(tensor, name, rows))
    ]
    if different:
        raise CheckpointError(f"{folder}: {len(different)} tensors differ from the model's, such as {different[0]}")
    if llava.num_parameters() > FORWARD_UP_TO:
        return f"{len(theirs)} tensors equal as transformers reads them (too large to compare logits)"
    generator = torch.Generator().manual_seed(0)
    image, known = model.config.image_token_id, model.config.text_config.vocab_size
    spoken = torch.tensor([token for token in range(known) if token != image])
    text = spoken[torch.randint(len(spoken), (12,), generator=generator)]
    transform = model.vision.transform
    slots = text.new_full((transform.num_tokens(transform.width, transform.height),), image)
    ids = torch.cat([text[:5], slots, text[5:]])[None]
    pixels = torch.randn(1, 3, transform.height, transform.width, generator=generator)
    model.float().eval()
    model.set_attention("sdpa", training=False)
    is_text = ids[0] != image
    found = llava.float()(input_ids=ids, pixel_values=pixels).logits[0, is_text][:, spoken]
    ours = model(ids, pixel_values=pixels).logits[0, is_text][:, spoken]
    error = ((found - ours).abs().max() / ours.abs().max()).item()
    if not error <= 1e-4:
        raise CheckpointError(f"{folder}: transformers' logits differ from ours by {error:.1e} of the largest")
    return f"{len(theirs)} tensors equal as transformers reads them, logits differ by {error:.0e} of the largest"
