"""LLaVA-1.5 and LLaVA-1.6 in transformers' formats (`LlavaForConditionalGeneration`, `LlavaNextForConditionalGeneration`),
read as an EEMLLM and written again.

transformers itself reads the files, so every layout of theirs is understood: one file or shards, and the names of tensors
before version 4.52 (``language_model.model.layers...``, ``vision_tower.vision_model...``) or since
(``model.language_model.layers...``). What a LLaVA is and an EEMLLM is not, or the other way round, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from ..core.families import check_decoder
from ..errors import CheckpointError, ConfigError
from ..inputs.chat import IMAGE, Conversation, Turn, get_template
from ..inputs.images import RESAMPLING, ImageTransform, Transform
from ..inputs.processor import Processor
from ..inputs.resolutions import AnyresTransform
from ..mechanisms import PRESETS
from ..mechanisms.connectors import DEFAULT
from ..model.configuration import EEMLLMConfig
from ..model.folders import naming, read_config
from ..model.modeling import EEMLLM
from ..model.pretrained import load_model, load_pretrained
from ..model.vision import TransformersVision
from .llava_template import jinja_of

KINDS: dict[str, tuple[Any, Any]] = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
}
"""Model types, LLaVA-1.5 and LLaVA-1.6, with transformers' classes."""

STRATEGIES = {"clip_vision_model": "default", "siglip_vision_model": "full"}
"""Encoder -> the ``vision_feature_select_strategy`` that keeps exactly its patches: CLIP has a class token, SigLIP none."""

NAMES = {
    "vision.model.": "model.vision_tower.",
    "projector.newline": "model.image_newline",
    "projector.": "model.multi_modal_projector.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}
"""Prefixes of our tensors -> those of transformers' LLaVA; the first that fits."""

RELATIVES = {
    "llava_next_video": "has tokens for videos too",
    "llava_onevision": "shrinks the features of images in many tiles (anyres_max) and has tokens for videos too",
    "vipllava": "feeds its projector from several layers of the encoder",
    "video_llava": "has a second encoder, for videos",
    "llava_llama": "is in the format of the authors' own code; take the same model in transformers' format (..-hf)",
}
"""Model types that are no such LLaVA though they sound like it -> why an EEMLLM cannot hold them."""

FORWARD_UP_TO = 1_000_000_000
"""Parameters up to which `check_llava` also compares logits: more would take minutes on a CPU and tens of gigabytes."""

SOURCE = "source"  # names a folder in messages, as the command line does
_UNUSED = (".position_ids", ".inv_freq")  # buffers that old versions of transformers stored


def load_whole(kind: Any, folder: Path) -> Any:
    """A transformers model with every tensor of its safetensors files, in the narrowest type that holds them all exactly.

    Raises:
        ConfigError: a configuration that cannot be used.
        CheckpointError: no such files, quantised tensors, or tensors missing, misshapen or left over.
    """
    model, info = load_model(kind, str(folder), SOURCE)
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
    return load_pretrained(AutoTokenizer, str(folder), SOURCE)


# --- reading


def load_llava(folder: Path) -> tuple[EEMLLM, PreTrainedTokenizerBase]:
    """A LLaVA as an EEMLLM with mechanism ``llava``, bit for bit the same weights, and its tokenizer.

    Raises:
        ConfigError: it is no LLaVA-1.5 or 1.6, or one that cannot be represented; lists every reason.
        CheckpointError: files are missing or broken.
    """
    with naming(SOURCE, "LLaVA", folder):
        return _load_llava(folder)


def _load_llava(folder: Path) -> tuple[EEMLLM, PreTrainedTokenizerBase]:
    config = _read_config(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.convert_tokens_to_ids(IMAGE) != config.image_token_index:
        raise ConfigError(
            f"{folder}: image_token_index is {config.image_token_index}, but the tokenizer has {IMAGE} as "
            f"{tokenizer.convert_tokens_to_ids(IMAGE)}; expected the tokenizer's {IMAGE} to stand for an image"
        )
    transform = _read_transform(folder, config)
    llava = load_whole(KINDS[config.model_type][1], folder)

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
    newline = {} if transform.fixed else {"newline": llava.model.image_newline}
    model.projector.to(llava.dtype).load_state_dict({**llava.model.multi_modal_projector.state_dict(), **newline})
    model.generation_config = llava.generation_config
    return model.eval(), tokenizer


def _read_config(folder: Path) -> LlavaConfig | LlavaNextConfig:
    """Raises ConfigError listing everything in it that an EEMLLM cannot represent."""
    raw = read_config(folder / "config.json", SOURCE)
    kind = "llava_llama" if "mm_vision_tower" in raw else raw.get("model_type")
    if kind in RELATIVES:
        raise ConfigError(
            f"{folder}: a {kind!r} {RELATIVES[kind]}; expected a LLaVA-1.5 or 1.6 ('llava' or 'llava_next')"
        )
    if kind not in KINDS:
        raise ConfigError(f"{folder}: its model_type is {kind!r}, expected 'llava' or 'llava_next'")
    config = load_pretrained(KINDS[str(kind)][0], str(folder), SOURCE)
    found = []
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


def _read_transform(folder: Path, config: LlavaConfig | LlavaNextConfig) -> Transform:
    """From preprocessor_config.json or, since transformers 5, a section of processor_config.json."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        values = read_config(file, SOURCE)
    else:
        file = folder / "processor_config.json"
        values = read_config(file, SOURCE).get("image_processor") or {}
    padded = bool(values.pop("do_pad", False)) and "Llava" in str(values.get("image_processor_type"))
    try:
        transform = ImageTransform.from_preprocessor_config(values, config.vision_config.patch_size)
        if isinstance(config, LlavaNextConfig):
            return _tiles(transform, config, values.get("image_grid_pinpoints"))
        if not padded:
            return transform
        if (transform.policy, transform.shortest) != ("crop", transform.height):
            raise ConfigError(f"do_pad with size {values['size']} and crop_size {values.get('crop_size')}")
        return replace(transform, policy="pad", shortest=None)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _tiles(view: ImageTransform, config: LlavaNextConfig, pinpoints: list[list[int]] | None) -> AnyresTransform:
    """Raises ConfigError where the encoder, its preprocessor and the grids do not fit each other."""
    side, grids = config.vision_config.image_size, config.image_grid_pinpoints or []
    if (view.height, view.width, view.shortest or side) != (side, side, side):
        raise ConfigError(
            f"its images have {view.height} x {view.width} pixels, expected the encoder's {side} x {side}"
        )
    if pinpoints is not None and pinpoints != grids:
        raise ConfigError(f"image_grid_pinpoints: found {pinpoints}, but config.json has {grids}")
    if any(length % side for grid in grids for length in grid):
        raise ConfigError(f"image_grid_pinpoints: found {grids}, expected multiples of {side}, the encoder's size")
    return AnyresTransform(view, tuple((height // side, width // side) for height, width in grids))


# --- writing


def save_llava(model: EEMLLM, tokenizer: PreTrainedTokenizerBase, folder: Path, template: str | None = None) -> None:
    """Write a folder that transformers' LlavaForConditionalGeneration, or LlavaNext..., and AutoProcessor load.

    An image token past the decoder's vocabulary gets rows of zeros in embeddings and head, since transformers embeds it;
    `generate` there is told never to say it.

    Args:
        model: of mechanism ``llava`` (`Mechanism.is_llava`), with an encoder of transformers.
        tokenizer: has ``<image>`` as the model's image token.
        folder: exists.
        template: name of the chat template that the model was trained with; None keeps the tokenizer's own as it is.
    """
    vision, old = model.vision, model.config.text_config
    family = vision.model.config.model_type if isinstance(vision, TransformersVision) else type(vision).__name__
    if not isinstance(vision, TransformersVision) or family not in STRATEGIES:
        raise ConfigError(f"the vision encoder is a {family}; LLaVA's format holds CLIP and SigLIP only")
    if model.connector != DEFAULT:
        raise ConfigError(
            f"model.connector.name: found {model.connector.name}, LLaVA's format holds {DEFAULT.name} only; with "
            f"model.connector.name={DEFAULT.name} convert begins a fresh one, to be trained"
        )
    if vision.select_layer is None:
        raise ConfigError(
            "model.vision.select_layer: found null, LLaVA's format needs a layer: hidden states before the last norm"
        )
    if tokenizer.convert_tokens_to_ids(IMAGE) != model.config.image_token_id:
        raise ConfigError(
            f"the tokenizer has {IMAGE} as {tokenizer.convert_tokens_to_ids(IMAGE)}, the model as "
            f"{model.config.image_token_id}; take the tokenizer that the model was trained with"
        )
    text_config = deepcopy(old)
    text_config.vocab_size = model.config.vocab_size
    strategy, transform, kind, tiles = STRATEGIES[str(family)], vision.transform, "llava", {}
    if isinstance(transform, AnyresTransform):
        kind, view = "llava_next", transform.view
        tiles = {"image_grid_pinpoints": [[rows * view.height, cols * view.width] for rows, cols in transform.grids]}
    else:
        assert isinstance(transform, ImageTransform)
        view = transform
    config_class, model_class = KINDS[kind]
    config = config_class(
        vision_config=deepcopy(vision.model.config),
        text_config=text_config,
        image_token_index=model.config.image_token_id,
        image_seq_length=view.num_tokens(view.width, view.height),
        vision_feature_layer=vision.select_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=old.tie_word_embeddings,
        **tiles,
    )
    with torch.device("meta"):
        llava = model_class(config)
    added = range(old.vocab_size, text_config.vocab_size)
    llava.load_state_dict(
        {theirs: _with_rows(tensor, theirs, len(added)) for theirs, tensor in _tensors(model).items()}, assign=True
    )
    llava.tie_weights()
    llava.generation_config = deepcopy(model.generation_config)
    llava.generation_config.suppress_tokens = sorted({model.config.image_token_id, *added})
    llava.save_pretrained(folder)
    tokenizer = deepcopy(tokenizer)
    tokenizer.padding_side = "left"  # a row that is padded on the right goes on from its padding
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if template is not None:
        tokenizer.chat_template = jinja_of(get_template(template, tokenizer))
    tokenizer.save_pretrained(folder)
    values = {
        "processor_class": "LlavaNextProcessor" if tiles else "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": view.patch,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(strategy == "default"),  # CLIP's class token
    }
    (folder / "processor_config.json").write_text(json.dumps(values, indent=2))
    if tiles:  # of which the view's resizing is the whole of "crop"
        preprocessor = {**preprocessor_config(replace(view, policy="crop")), **tiles, "do_pad": True}
        preprocessor["image_processor_type"] = "LlavaNextImageProcessor"
    else:
        preprocessor = {**preprocessor_config(view)}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))


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
def check_llava(model: EEMLLM, folder: Path, processor: Processor | None = None) -> str:
    """Read back what `save_llava` wrote, as transformers does, and compare; afterwards the model is in float32.

    Every tensor must be equal and, up to FORWARD_UP_TO parameters, the logits for random ids and a random image to rounding. With a
    `processor`, the prompts that transformers' own makes of a conversation must be its.

    Returns:
        what was compared, in words.

    Raises:
        CheckpointError: they differ: a mistake of this program, or transformers has changed.
    """
    transform = model.vision.transform
    llava = load_whole(KINDS["llava" if transform.fixed else "llava_next"][1], folder).eval()
    theirs = llava.state_dict()
    rows = model.config.vocab_size - model.config.text_config.vocab_size
    different = [
        name for name, tensor in _tensors(model).items() if not theirs[name].equal(_with_rows(tensor, name, rows))
    ]
    if different:
        raise CheckpointError(f"{folder}: {len(different)} tensors differ from the model's, such as {different[0]}")
    if processor is not None:
        _check_prompts(processor, folder)
    if llava.num_parameters() > FORWARD_UP_TO:
        return f"{len(theirs)} tensors equal as transformers reads them (too large to compare logits)"
    generator = torch.Generator().manual_seed(0)
    image, known = model.config.image_token_id, model.config.text_config.vocab_size
    spoken = torch.tensor([token for token in range(known) if token != image])
    text = spoken[torch.randint(len(spoken), (12,), generator=generator)]
    width, height = transform.largest
    slots = text.new_full((transform.num_tokens(width, height),), image)
    ids = torch.cat([text[:5], slots, text[5:]])[None]
    pixels = torch.randn(1, *transform(Image.new("RGB", (width, height))).shape, generator=generator)
    model.float().eval()
    model.set_attention("sdpa", training=False)
    is_text = ids[0] != image
    sizes = {} if transform.fixed else {"image_sizes": torch.tensor([[height, width]])}
    found = llava.float()(input_ids=ids, pixel_values=pixels, **sizes).logits[0, is_text][:, spoken]
    ours = model(ids, pixel_values=pixels, image_sizes=[(width, height)]).logits[0, is_text][:, spoken]
    error = ((found - ours).abs().max() / ours.abs().max()).item()
    if not error <= 1e-4:
        raise CheckpointError(f"{folder}: transformers' logits differ from ours by {error:.1e} of the largest")
    return f"{len(theirs)} tensors equal as transformers reads them, logits differ by {error:.0e} of the largest"


def _check_prompts(processor: Processor, folder: Path) -> None:
    """Raises CheckpointError where transformers' processor of the folder makes other ids of a conversation with an image."""
    theirs, picture = AutoProcessor.from_pretrained(folder), Image.new("RGB", (40, 30))
    turns: tuple[Turn, ...] = (Turn("human", f"{IMAGE}\nWhat is it?"), Turn("gpt", "A cat."), Turn("human", "Sure?"))
    turns = turns[:1] if processor.template.name == "plain" else turns
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    found = theirs.apply_chat_template(messages[: len(turns)], **options)["input_ids"]
    ours = processor.prompts([Conversation("check", turns, 1)], [[picture]])["input_ids"]
    if not found.equal(ours):
        shown = processor.tokenizer.decode(found[0][found[0] != processor.image_token_id])
        raise CheckpointError(f"{folder}: transformers prompts otherwise than the model was trained: {shown[:300]!r}")
