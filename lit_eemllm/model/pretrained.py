"""Load pretrained parts with transformers. No code in a folder runs, no weight is silently random, no family computed wrongly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from ..attention.reference import Reference
from ..core.decoder import adopt_layers
from ..core.families import FAMILIES, PROVED, TEMPERED, Family
from ..core.stream import Angles, Stream
from ..errors import CheckpointError, ConfigError
from ..layout import Run, SequenceLayout, upload
from .folders import MODEL_FILES, TOKENIZER_FILES, opened, stored

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_pretrained(kind: Any, path: str, key: str, **options: Any) -> Any:
    """``kind.from_pretrained(path)`` for a configuration or a tokenizer, without running any code of the folder.

    Args:
        kind: a class of transformers.
        path: folder, the user's own or a shipped one, or hub id.
        key: the configuration key that named it, for messages.

    Raises:
        ConfigError: it is not there, not of this kind, or broken; see `opened`.
    """
    names = TOKENIZER_FILES if kind is AutoTokenizer else ("config.json",)
    with opened(path, key, kind.__name__, names) as folder:
        loaded = kind.from_pretrained(str(folder), trust_remote_code=False, **options)
        loaded.name_or_path = path
        return loaded


def load_model(kind: Any, path: str, key: str, dtype: torch.dtype | None = None, **options: Any) -> tuple[Any, dict]:
    """A transformers model with its weights, and transformers' report of missing and mismatched tensors.

    Args:
        dtype: None takes the narrowest type that holds every tensor of the files exactly.
        options: of ``from_pretrained``; see `load_pretrained` for the others.

    Raises:
        ConfigError: as `load_pretrained`; or the configuration describes a model larger than the weights in its files.
        CheckpointError: there are no weights, or files are missing or broken.
    """
    with opened(path, key, kind.__name__, MODEL_FILES, weights=True) as folder:
        tensors = stored(sorted(folder.glob("*.safetensors")), key)
        if dtype is None:
            dtype = reduce(torch.promote_types, [_FLOATS[name] for name, _ in tensors.values() if name in _FLOATS])
        config = options.get("config")
        if config is None:
            config = getattr(kind, "config_class", None) or AutoConfig
            config = options["config"] = config.from_pretrained(str(folder))
        _refuse_larger(kind, config, sum(torch.Size(shape).numel() for _, shape in tensors.values()), f"{key}: {path}")
        model, info = kind.from_pretrained(
            str(folder),
            trust_remote_code=False,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the callers raise an error for them
            **options,
        )
        model.name_or_path = model.config.name_or_path = path
        return model, info


def _refuse_larger(kind: Any, config: Any, stored: int, where: str) -> None:
    """Raises CheckpointError for a config much larger than the weights: transformers would allocate random weights for the rest."""
    needed = sum(parameter.numel() for parameter in without_weights(kind, config).parameters())
    if needed > 2 * stored:
        raise CheckpointError(
            f"{where}: its config.json describes {needed:,} parameters, its files hold {stored:,}. Copy the folder again."
        )


def without_weights(kind: Any, config: Any) -> Any:
    """A model on the meta device: names and shapes, no data."""
    make = getattr(kind, "from_config", kind)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return make(config)


def take_over(
    kind: Any,
    config: Any,
    weights: Mapping[str, Tensor],
    path: str,
    key: str,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """A model of weights in memory, in a type or quantised; those of that type are not copied. The rest, such as the generation config,
    comes from the folder `path`."""
    model = type(without_weights(kind, config)).from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, **options
    )
    with opened(path, key, kind.__name__, MODEL_FILES) as folder:
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = model.config.name_or_path = path
    return model


def load_weighted(kind: Any, path: str, key: str, **options: Any) -> Any:
    """A model with its weights in float32, from safetensors. Raises CheckpointError if a tensor is missing or misshapen."""
    model, info = load_model(kind, path, key, torch.float32, **options)
    refuse_missing(model, info, key, path)
    return model


def refuse_missing(model: Any, info: Mapping[str, Any], key: str, path: str) -> None:
    """Raises CheckpointError if transformers reports tensors that the files lack, or have in other shapes. It only tells of them, and
    leaves whatever the memory held in modules that are not its own."""
    missing = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if missing:
        raise CheckpointError(
            f"{key}: {path!r} lacks {len(missing)} tensors of a {type(model).__name__}, such as {sorted(missing)[0]}; "
            "they would be random. Copy the folder again."
        )


def adopt(decoder: PreTrainedModel) -> None:
    """`adopt_layers`, and for a family that the user registered, a check that the logits of a few tokens equal transformers'. There is
    no check on the meta device.

    Raises:
        ConfigError: the decoder is not supported, or its family is registered wrongly.
    """
    family, device, training = decoder.config.model_type, decoder.device, decoder.training
    if family in PROVED or device.type == "meta":
        return adopt_layers(decoder)
    ids_T = torch.linspace(0, decoder.config.vocab_size - 1, 16).long().to(device)
    stream = Stream(
        SequenceLayout.of([[Run(False, 16)]]).to(device), rotary(decoder, torch.ones(1, device=device)), Reference()
    )
    wrong = f"model.decoder: family {family!r} differs from Llama in more than register_family was told"
    with torch.no_grad():
        expected_Tv = decoder.eval()(ids_T[None], use_cache=False).logits[0]
    try:
        with torch.no_grad():
            adopt_layers(decoder)
            x_Th = decoder.model.embed_tokens(ids_T)
            for layer in decoder.model.layers:
                x_Th, _, _ = layer(x_Th, x_Th[:0], stream)
            found_Tv = decoder.train(training).lm_head(decoder.model.norm(x_Th))
    except (AttributeError, RuntimeError) as raised:  # a module is missing, or has another shape
        raise ConfigError(f"{wrong}: {raised}; see docs/decoders.md") from raised
    error = ((found_Tv - expected_Tv).norm() / expected_Tv.norm()).item()
    exact = decoder.dtype == torch.float32 and not getattr(decoder, "is_quantized", False)  # else in 16 bits
    if not error <= (1e-3 if exact else 0.05):  # NaN too
        raise ConfigError(f"{wrong}: logits of text are {error:.2%} off transformers' own; see docs/decoders.md")


class ImageRotary(NamedTuple):
    """Multimodal rotary positions (Qwen2-VL): which frequencies count time, rows and columns.

    Attributes:
        sections: how many frequencies each of the three has.
        interleaved: they take turns, and what is left counts time (Qwen3-VL); else one after the other (Qwen2.5-VL).
    """

    sections: tuple[int, int, int]
    interleaved: bool = False

    @classmethod
    def of(cls, decoder: PretrainedConfig) -> ImageRotary | None:
        """Of a decoder's configuration; None = images have sequence positions. Raises ConfigError."""
        told = getattr(decoder, "image_rotary", None)
        if told is None:
            return None
        half = (getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads) // 2
        sections = told.get("sections") if isinstance(told, dict) else None
        numbers = isinstance(sections, list | tuple) and len(sections) == 3 and {type(n) for n in sections} == {int}
        if not numbers or min(sections) < 0 or sum(sections) != half:
            raise ConfigError(
                f"image_rotary: found {told!r:.99}, expected sections, three numbers that add up to {half}"
            )
        family = FAMILIES.get(decoder.model_type, Family())
        if family.tempered or {*family.windows(decoder)} != {None}:
            raise ConfigError("image_rotary: windows, chunks and queries that grow count positions, expected none")
        return cls(tuple(sections), bool(told.get("interleaved")))

    def axes(self) -> Tensor:
        """[H] which of the three each component of a query or key counts."""
        sections = torch.tensor(self.sections)
        if not self.interleaved:
            return torch.arange(3).repeat_interleave(sections).repeat(2)
        place = torch.arange(sum(self.sections))
        return (place % 3 * (place < 3 * sections[place % 3])).repeat(2)


def rotary(
    decoder: PreTrainedModel, x_Th: Tensor, images: ImageRotary | None = None
) -> Callable[[Tensor, str], Angles]:
    """The function from positions, [R] or [R, 3], and how a layer turns queries or keys (`Family.rotary`), to angles, in the dtype of
    these rows. The factors of `TEMPERED` queries are cosines of no angle."""

    config = decoder.config

    def angles(positions: Tensor, kind: str) -> Angles:
        places = positions[None] if positions.ndim == 1 else positions.T.contiguous()
        if kind == TEMPERED:
            steps_R = ((positions.float() + 1) / config.floor_scale).floor()
            factor_R = 1 + config.attn_scale * steps_R.log1p()
            cos_R1H = factor_R[:, None, None].repeat(1, 1, decoder.model.layers[0].self_attn.head_dim)
            return cos_R1H, torch.zeros_like(cos_R1H)
        found = decoder.model.rotary_emb(x_Th, places, *([kind] if kind else []))
        if isinstance(found, Tensor):  # complex, of half the size of a head, and in float32
            found = (torch.cat([part, part], -1) for part in (found.real, found.imag))
        cos, sin = found
        if positions.ndim == 1:
            return cos[0, :, None], sin[0, :, None]
        assert images is not None
        axis_1RH = upload(images.axes(), cos.device)[None, None].expand(1, *cos.shape[1:])
        return cos.gather(0, axis_1RH)[0, :, None], sin.gather(0, axis_1RH)[0, :, None]

    return angles


def quantized(how: str, compute: torch.dtype) -> Any:
    """transformers' quantization config for linear layers in 4 ("nf4") or 8 bits ("int8").

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"model.quantization={how}: bitsandbytes is not installed; pip install 'lit_eemllm[qlora]'")
    if how == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
