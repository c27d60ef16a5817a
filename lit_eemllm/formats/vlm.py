"""Models of images and text in transformers' own formats, read as an EEMLLM and written again; a `Format` says what a family needs.

transformers itself reads the files, so every layout of theirs is understood: one file or shards, and the names of tensors
before version 4.52 (``language_model.model.layers...``, ``vision_tower.vision_model...``) or since
(``model.language_model.layers...``). What such a model is and an EEMLLM is not, or the other way round, is refused.
"""

from __future__ import annotations

import json
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ..core.families import check_decoder
from ..errors import CheckpointError, ConfigError
from ..inputs.chat import get_template
from ..inputs.conversation import IMAGE, Conversation, Turn
from ..inputs.images import Transform
from ..inputs.jinja import jinja_of
from ..mechanisms import PRESETS
from ..model.configuration import EEMLLMConfig
from ..model.folders import naming, read_config
from ..model.modeling import EEMLLM
from ..model.pretrained import load_model, load_pretrained, take_over, without_weights
from ..model.processor import Processor
from ..model.qwen_vision import QwenVision
from ..model.vision import TransformersVision, encoder_name
from .base import Format
from .idefics3 import Idefics3, SmolVLM
from .internvl import InternVL
from .llava import Llava, LlavaNext, LlavaOnevision
from .qwen_vl import Qwen3VL, Qwen25VL

FORWARD_UP_TO = 1_000_000_000
"""Parameters up to which `check_vlm` also compares logits: more would take minutes on a CPU and tens of gigabytes."""

SOURCE = "source"  # names a folder in messages, as the command line does
_UNUSED = (".position_ids", ".inv_freq")  # buffers that old versions of transformers stored


FORMATS: dict[str, Format] = {
    form.model_type: form
    for form in (Llava(), LlavaNext(), LlavaOnevision(), InternVL(), Idefics3(), SmolVLM(), Qwen25VL(), Qwen3VL())
}
"""By `model_type`."""

RELATIVES = {
    "llava_next_video": "has tokens for videos too",
    "vipllava": "feeds its projector from several layers of the encoder",
    "video_llava": "has a second encoder, for videos",
    "llava_llama": "is in the format of the authors' own code; take the same model in transformers' format (..-hf)",
}
"""Model types that sound like one of these -> why an EEMLLM cannot hold them."""


def load_whole(kind: Any, folder: Path, **options: Any) -> Any:
    """A transformers model with every tensor of its safetensors files, in the narrowest type that holds them all exactly.

    Raises:
        ConfigError: a configuration that cannot be used.
        CheckpointError: no such files, quantised tensors, or tensors missing, misshapen or left over.
    """
    model, info = load_model(kind, str(folder), SOURCE, **options)
    wrong = {
        "missing": info["missing_keys"],
        "misshapen": {name for name, *_ in info["mismatched_keys"]},
        "left over": {name for name in info["unexpected_keys"] if not name.endswith(_UNUSED)},
    }
    found = [f"{len(names)} {text}, such as {min(names)}" for text, names in wrong.items() if names]
    if found:
        raise CheckpointError(f"{folder}: its tensors do not make a {kind.__name__}: {'; '.join(found)}")
    return model


def load_tokenizer(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    return load_pretrained(AutoTokenizer, str(folder), SOURCE, **options)


# --- reading


def load_vlm(folder: Path) -> tuple[EEMLLM, PreTrainedTokenizerBase]:
    """Such a model as an EEMLLM with mechanism ``llava``, bit for bit the same weights, and its tokenizer.

    Raises:
        ConfigError: it is of no format in `FORMATS`, or a model that cannot be represented; lists every reason.
        CheckpointError: files are missing or broken.
    """
    with naming(SOURCE, "model of images and text", folder):
        return _load_vlm(folder)


def _load_vlm(folder: Path) -> tuple[EEMLLM, PreTrainedTokenizerBase]:
    form, config = read_format(folder)
    tokenizer, token = load_tokenizer(folder), image_token_id(config)
    word = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    if form.template == "jinja" and isinstance(word, str):
        tokenizer = load_tokenizer(folder, image_token=word)
        old = folder / "chat_template.json"  # the processor's, which goes before the tokenizer's
        if old.is_file() and not (folder / "chat_template.jinja").is_file():
            tokenizer.chat_template = read_config(old, SOURCE).get("chat_template") or tokenizer.chat_template
    elif tokenizer.convert_tokens_to_ids(IMAGE) != token:
        raise ConfigError(
            f"{folder}: image_token_index is {token}, but the tokenizer has {IMAGE} as "
            f"{tokenizer.convert_tokens_to_ids(IMAGE)}; expected the tokenizer's {IMAGE} to stand for an image"
        )
    transform = read_transform(folder, form, config)
    theirs = load_whole(form.model_class, folder, config=config)

    tensors, text_config = theirs.state_dict(), form.decoder_config(theirs.config)
    names = without_weights(AutoModelForCausalLM, text_config).state_dict()
    weights = {name: tensors[form.theirs(f"language_model.{name}")] for name in names}
    decoder = take_over(AutoModelForCausalLM, text_config, weights, str(folder), SOURCE, theirs.dtype)
    vision = form.vision(theirs.get_submodule(form.theirs("vision.model.")[:-1]), transform, config)
    ours = EEMLLMConfig(
        text_config=text_config,
        vision={"encoder": encoder_name(vision), "config": vision.to_config()},
        mechanism=PRESETS["llava"].to_dict(),
        image_token_id=token,
        connector=form.connector(config).to_dict(),
    )
    model = EEMLLM(ours, decoder, vision)
    model.projector.to(theirs.dtype).load_state_dict(
        {name: tensors[form.theirs(f"projector.{name}")] for name in model.projector.state_dict()}
    )
    model.generation_config = theirs.generation_config
    return model.eval(), tokenizer


def image_token_id(config: Any) -> int:
    """The id of a visual token, under the name that it has in any of the formats."""
    return int(getattr(config, "image_token_id", None) or config.image_token_index)


def read_format(folder: Path) -> tuple[Format, PretrainedConfig]:
    """The format of a folder, and its configuration. Raises ConfigError listing everything in it that an EEMLLM cannot represent."""
    raw = read_config(folder / "config.json", SOURCE)
    kind = "llava_llama" if "mm_vision_tower" in raw else raw.get("model_type")
    if kind in RELATIVES:
        raise ConfigError(f"{folder}: a {kind!r} {RELATIVES[kind]}; expected one of {', '.join(FORMATS)}")
    if kind not in FORMATS:
        raise ConfigError(f"{folder}: its model_type is {kind!r}, expected one of {', '.join(FORMATS)}")
    form = FORMATS[str(kind)]
    config = load_pretrained(form.config_class, str(folder), SOURCE)
    found, encoder = form.problems(config), config.vision_config.model_type
    if encoder not in form.encoders:
        found = [f"vision_config.model_type: {encoder!r}, expected {' or '.join(form.encoders)}", *found]
    if found:
        raise ConfigError("\n  ".join([f"{folder}/config.json: this {kind} cannot be represented:", *found]))
    check_decoder(form.decoder_config(config))
    return form, config


def read_transform(folder: Path, form: Format, config: PretrainedConfig) -> Transform:
    """From preprocessor_config.json or, since transformers 5, a section of processor_config.json."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        values = read_config(file, SOURCE)
    else:
        file = folder / "processor_config.json"
        values = read_config(file, SOURCE).get("image_processor") or {}
    try:
        return form.transform(config, values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


# --- writing


def format_of(model: EEMLLM) -> Format:
    """The format that a model is written in. Raises ConfigError if none holds it."""
    vision = model.vision
    known = isinstance(vision, TransformersVision | QwenVision)
    family, reasons = Format.encoder(model).model_type if known else type(vision).__name__, list[str]()
    for form in FORMATS.values() if known else ():
        if family in form.encoders:
            reason = form.refusal(model)
            if reason is None:
                return form
            reasons.append(reason)
    if reasons:
        raise ConfigError(reasons[0])
    held = sorted({encoder for form in FORMATS.values() for encoder in form.encoders})
    raise ConfigError(f"the vision encoder is a {family}; transformers' formats hold {', '.join(held)} only")


def save_vlm(model: EEMLLM, tokenizer: PreTrainedTokenizerBase, folder: Path, template: str | None = None) -> None:
    """Write a folder that transformers' own model and AutoProcessor load.

    An image token past the decoder's vocabulary gets rows of zeros in embeddings and head, since transformers embeds it;
    `generate` there is told never to say it.

    Args:
        model: of mechanism ``llava`` (`Mechanism.is_llava`), with an encoder of transformers.
        tokenizer: has the model's image token, as ``<image>`` or as its ``image_token``.
        folder: exists.
        template: name of the chat template that the model was trained with; None keeps the tokenizer's own as it is.
    """
    form, old = format_of(model), model.config.text_config
    word = getattr(tokenizer, "image_token", None) or IMAGE
    if tokenizer.convert_tokens_to_ids(word) != model.config.image_token_id:
        raise ConfigError(
            f"the tokenizer has {word} as {tokenizer.convert_tokens_to_ids(word)}, the model as "
            f"{model.config.image_token_id}; take the tokenizer that the model was trained with"
        )
    text_config = form.text_config(model)
    text_config.vocab_size = model.config.vocab_size
    config = form.config_class(
        vision_config=deepcopy(form.encoder(model)),
        text_config=text_config,
        tie_word_embeddings=old.tie_word_embeddings,
        **{_key_of_token(form): model.config.image_token_id},
        **form.settings(model),
    )
    with torch.device("meta"):
        theirs = form.model_class(config)
    added = range(old.vocab_size, text_config.vocab_size)
    theirs.load_state_dict(
        {form.theirs(name): _with_rows(tensor, name, len(added)) for name, tensor in model.state_dict().items()},
        assign=True,
    )
    theirs.tie_weights()
    theirs.generation_config = deepcopy(model.generation_config)
    theirs.generation_config.suppress_tokens = sorted({model.config.image_token_id, *added})
    theirs.save_pretrained(folder)
    tokenizer = deepcopy(tokenizer)
    tokenizer.padding_side = "left"  # a row that is padded on the right goes on from its padding
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if template is not None:
        tokenizer.chat_template = jinja_of(get_template(template, tokenizer))
    tokenizer.save_pretrained(folder)
    for name, values in form.files(model).items():
        (folder / name).write_text(json.dumps(values, indent=2))


def _key_of_token(form: Format) -> str:
    return "image_token_id" if "image_token_id" in form.config_class.__dataclass_fields__ else "image_token_index"


def _with_rows(tensor: Tensor, name: str, rows: int) -> Tensor:
    """With so many rows of zeros below, if this tensor has a row for each token."""
    return pad(tensor, (0, 0, 0, rows)) if rows and name.endswith(("embed_tokens.weight", "lm_head.weight")) else tensor


@torch.inference_mode()
def check_vlm(model: EEMLLM, folder: Path, processor: Processor | None = None) -> str:
    """Read back what `save_vlm` wrote, as transformers does, and compare; afterwards the model is in float32.

    Every tensor must be equal and, up to FORWARD_UP_TO parameters, the logits for random ids and a random image to rounding. With a
    `processor`, the prompts that transformers' own makes of a conversation must be its, where all is installed that it needs.

    Returns:
        what was compared, in words.

    Raises:
        CheckpointError: they differ: a mistake of this program, or transformers has changed.
    """
    form, transform = format_of(model), model.vision.transform
    theirs = load_whole(form.model_class, folder).eval()
    tensors = theirs.state_dict()
    rows = model.config.vocab_size - model.config.text_config.vocab_size
    written = {form.theirs(name): _with_rows(tensor, name, rows) for name, tensor in model.state_dict().items()}
    different = [name for name, tensor in written.items() if not tensors[name].equal(tensor)]
    if different:
        raise CheckpointError(f"{folder}: {len(different)} tensors differ from the model's, such as {different[0]}")
    prompts, lacking = "", [package for package in form.needs if find_spec(package) is None]
    if processor is not None and lacking:
        prompts = (
            f"; prompts are not compared: {' and '.join(lacking)}, which transformers' processor needs, not installed"
        )
    elif processor is not None:
        _check_prompts(processor, folder)
    if theirs.num_parameters() > FORWARD_UP_TO:
        return f"{len(tensors)} tensors equal as transformers reads them (too large to compare logits){prompts}"
    generator = torch.Generator().manual_seed(0)
    image, known = model.config.image_token_id, model.config.text_config.vocab_size
    spoken = torch.tensor([token for token in range(known) if token != image])
    text = spoken[torch.randint(len(spoken), (12,), generator=generator)]
    size = transform.largest
    slots = text.new_full((transform.num_tokens(*size),), image)
    parts = [text[:5], *(part for run in slots.split(transform.runs(*size)) for part in (run, text[5:6])), text[6:]]
    ids = torch.cat(parts)[None]
    pixels = torch.randn(1, *transform(Image.new("RGB", size)).shape, generator=generator)
    model.float().eval()
    model.set_attention("sdpa", training=False)
    is_text = ids[0] != image
    given, more = form.pixels(model, pixels[0] if pixels.ndim > 4 else pixels), form.inputs(model, size, ids)
    found = theirs.float()(input_ids=ids, pixel_values=given, **more).logits[0, is_text][:, spoken]
    ours = model(ids, pixel_values=pixels, image_sizes=[size]).logits[0, is_text][:, spoken]
    error = ((found - ours).abs().max() / ours.abs().max()).item()
    if not error <= 1e-4:
        raise CheckpointError(f"{folder}: transformers' logits differ from ours by {error:.1e} of the largest")
    return (
        f"{len(tensors)} tensors equal as transformers reads them, logits differ by {error:.0e} of the largest{prompts}"
    )


def _check_prompts(processor: Processor, folder: Path) -> None:
    """Raises CheckpointError where transformers' processor of the folder makes other ids of a conversation with an image."""
    theirs, picture = AutoProcessor.from_pretrained(folder), Image.new("RGB", (40, 30))
    turns: tuple[Turn, ...] = (Turn("human", f"{IMAGE}\nWhat is it?"), Turn("gpt", "A cat."), Turn("human", "Sure?"))
    turns = turns[:1] if processor.template.name == "plain" else turns
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    found = theirs.apply_chat_template(messages[: len(turns)], **options)["input_ids"]
    ours = processor.prompts([Conversation("check", turns, 1)], [[picture]])["input_ids"]
    if not found.equal(ours):
        shown = processor.tokenizer.decode(found[0][found[0] != processor.image_token_id])
        raise CheckpointError(f"{folder}: transformers prompts otherwise than the model was trained: {shown[:300]!r}")
