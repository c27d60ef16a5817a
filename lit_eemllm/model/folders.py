"""Read a model's folder or hub id safely: only files and keys on the lists below, nothing else.

transformers does more than load weights where a folder asks for it: it imports, fetches and runs what a key names (``auto_map``,
``attn_implementation: org/repo``), puts adapters into the decoder, unpickles. So it never sees the folder itself but a copy made
here: links to data files, and configurations with the keys below, each a plain value within its bounds. Other keys and files are
ignored, unless the model would be another one without them: then it is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..compat.transformers import file_of
from ..console import read_object, writing
from ..errors import CheckpointError, ConfigError, UserError, WriteError, is_panic
from ..shipped import find, nowhere

SIZES = {
    "num_hidden_layers": 512, "num_attention_heads": 2**12, "num_key_value_heads": 2**12, "head_dim": 2**14, "hidden_size": 2**20,
    "intermediate_size": 2**20, "projection_dim": 2**20, "vocab_size": 2**24, "num_channels": 2**8, "image_size": 2**14,
    "patch_size": 2**12, "num_patches": 2**20, "max_position_embeddings": 2**40, "image_seq_length": 2**24,
    "depth": 512, "num_heads": 2**12, "in_channels": 2**8, "spatial_merge_size": 16, "temporal_patch_size": 64, "window_size": 2**14,
    "out_hidden_size": 2**20, "num_position_embeddings": 2**20, "tokens_per_second": 2**10,
    "no_rope_layer_interval": 512, "scale_factor": 64, "sliding_window": 2**31, "sliding_window_pattern": 512, "query_pre_attn_scalar": 2**20,
    "intermediate_size_mlp": 2**20, "num_local_experts": 2**12, "num_experts_per_tok": 2**12, "interleave_moe_layer_step": 512,
    "attention_chunk_size": 2**31, "floor_scale": 2**31,
}  # fmt: skip
"""Keys of config.json that are whole numbers, and their maxima: modules of these sizes are built before weights are read."""
IDS = {"bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "image_token_index", "video_token_index",
       "video_token_id", "vision_start_token_id", "vision_end_token_id"}  # fmt: skip
CONFIG = {
    *SIZES, *IDS, "model_type", "text_config", "vision_config", "transformers_version", "tokenizer_class",
    "tie_word_embeddings", "use_cache", "hidden_act", "attention_bias", "mlp_bias", "attention_dropout", "rms_norm_eps",
    "layer_norm_eps", "initializer_range", "initializer_factor", "rope_theta", "rope_parameters", "rope_scaling",
    "partial_rotary_factor", "use_sliding_window", "max_window_layers", "layer_types", "no_rope_layers", "rope_local_base_freq",
    "hidden_activation", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention",
    "vision_use_head", "projector_hidden_act", "multimodal_projector_bias", "vision_feature_layer",
    "vision_feature_select_strategy", "image_grid_pinpoints", "vision_aspect_ratio", "downsample_ratio", "use_mask_token",
    "use_absolute_position_embeddings", "projection_dropout", "norm_type", "use_qk_norm", "use_mean_pooling", "hidden_dropout_prob",
    "moe_layers", "attn_temperature_tuning", "attn_scale", "layer_scale_init_value", "fullatt_block_indexes", "deepstack_visual_indexes", "image_rotary", "vision", "mechanism", "connector",
}  # fmt: skip
"""Keys of config.json. Those that an EEMLLM adds, the last three, we read ourselves, but see `clean_config`."""
ROPE = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor",
    "attention_factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "mrope_section", "mrope_interleaved",
}  # fmt: skip
LAYER_TYPES = {"full_attention", "sliding_attention"}
GENERATION = {
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "num_beams", "early_stopping",
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens",
    "bad_words_ids", "use_cache", "transformers_version", "_from_model_config",
}  # fmt: skip
TOKENIZER = {
    "tokenizer_class", "backend", "model_max_length", "padding_side", "truncation_side", "chat_template", "legacy",
    "add_prefix_space", "add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "split_special_tokens",
    "spaces_between_special_tokens", "additional_special_tokens", "extra_special_tokens", "added_tokens_decoder",
    "model_specific_special_tokens", "use_default_system_prompt", "errors", "do_lower_case", "strip_accents", "tokenize_chinese_chars", "trim_offsets",
}  # fmt: skip
"""Keys of tokenizer_config.json and special_tokens_map.json; keys that end with ``_token`` are read too."""
TOKEN = {"content", "lstrip", "rstrip", "normalized", "single_word", "special", "__type"}
"""Keys of a token that is described by an object."""
TOKENIZERS = {
    "PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer", "CodeLlamaTokenizer", "Qwen2Tokenizer",
    "GPT2Tokenizer", "GPTNeoXTokenizer", "BloomTokenizer", "CohereTokenizer", "GemmaTokenizer", "CodeGenTokenizer",
    "OpenAIGPTTokenizer", "BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "RobertaTokenizer",
    "BartTokenizer", "MBartTokenizer", "T5Tokenizer", "AlbertTokenizer", "XLMRobertaTokenizer", "DebertaV2Tokenizer",
    "NllbTokenizer", "WhisperTokenizer",
}  # fmt: skip
"""Tokenizer classes of transformers, each also with ``Fast`` behind its name."""
LARGEST = 2**28
"""Most bytes of a file that is read whole, as all but weights are."""
LARGEST_ID = 2**24

TOKENIZER_FILES = (
    "config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "tokenizer.model",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip
MODEL_FILES = ("config.json", "generation_config.json")
PROCESSOR = "processor_config.json"
HUB = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"}
"""Options of ``from_pretrained`` that say where a file is; for a local folder only ``subfolder`` has an effect."""
INDEX = "model.safetensors.index.json"
_STORED = {"F64", "F32", "F16", "BF16", "I64", "I32", "BOOL"}  # integers: position ids, which old versions stored

Finder = Callable[..., Path | None]


@contextmanager
def opened(path: str, key: str, kind: str, names: tuple[str, ...], weights: bool = False, **hub: Any) -> Iterator[Path]:
    """A temporary folder for transformers to read, with those of the named files that exist; deleted when the context ends.

    Args:
        path: folder, the user's own or a shipped one, or hub id.
        key: the configuration key that named it, for messages.
        kind: the class to be loaded from it, for messages.
        names: file names; config.json must exist, unless only a tokenizer is wanted.
        weights: whether to include the weights.
        hub: see `HUB`.

    Raises:
        ConfigError: there is no such folder, a configuration file cannot be used, or the context raises something.
        CheckpointError: weights that are missing or broken.
    """
    get = finder(path, key, **hub)
    with TemporaryDirectory(prefix="lit_eemllm-") as made, naming(key, kind, path, hide=made):
        if names != TOKENIZER_FILES:
            refuse_adapter(get, key, path)
        files = {name: get(name, needed=name == "config.json" and names != TOKENIZER_FILES) for name in names}
        if not any(files.values()):
            get(names[0], needed=True)  # says why
        files |= {file.name: file for file in weight_files(get, key, path)} if weights else {}
        for name, file in files.items():
            if file is not None and name in _CLEANED:
                cleaned = json.dumps(_CLEANED[name](read_config(file, key), f"{key}: {file}"))
                with writing(Path(made, name)):
                    Path(made, name).write_text(cleaned)
            elif file is not None:
                if not name.endswith(".safetensors"):
                    _bounded(file)
                Path(made, name).symlink_to(file.absolute())
        yield Path(made)


@contextmanager
def naming(key: str, kind: str, path: str | Path, hide: str = "") -> Iterator[None]:
    """A context that loads a `kind` from `path`. What it raises, even a panic of tokenizers, becomes a ConfigError that names `key`,
    `kind` and `path`. `hide` is the temporary folder that stands in for `path`."""
    try:
        yield
    except WriteError:  # the temporary folder is full
        raise
    except UserError as error:
        text = str(error).removeprefix(f"{key}: ")
        if text.startswith("model.") and key.startswith("model."):  # the mistake is another key's
            raise
        raise type(error)(f"{key}: {text}" if str(path) in text else f"{key}: {path}: {text}") from error
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        text = str(error).replace(hide, str(path)) if hide else str(error)
        reason = next((line for line in text.splitlines() if line.strip()), "")
        known = isinstance(error, OSError | ValueError) and reason  # its text says what is wrong
        reason = reason if known else f"{type(error).__name__}: {reason}".rstrip(": ")
        raise ConfigError(f"{key}: {kind} cannot load {str(path)!r}: {reason}") from error


def finder(path: str, key: str, **hub: Any) -> Finder:
    """A function from a file's name to its path in a folder or hub id, or None if there is no such file; with ``needed=True`` that is
    an OSError. `HUB` holds the names of the options.

    Raises:
        ConfigError: there is no such folder.
    """
    folder = find(path)
    # a path that cannot be a hub id is not looked up on the hub
    if (path.startswith(("/", ".", "~")) or path.count("/") > 1) and not folder.exists():
        home = "; ~ is not expanded after a key, write your home folder out" if path.startswith("~") else ""
        raise ConfigError(f"{key}: no such folder: {path}{home or nowhere(path)}")
    if path and folder.is_dir():
        return partial(_in_folder, folder / hub.get("subfolder", ""))
    return partial(file_of, path, **hub)


def refuse_adapter(get: Finder, key: str, path: str) -> None:
    """Raises ConfigError for a folder of peft, whatever else is in it."""
    if get("adapter_config.json") is not None:
        raise ConfigError(
            f"{key}: {path} holds an adapter (adapter_config.json), expected a whole model: merge it (lit-eemllm merge without "
            "--adapter, or peft's merge_and_unload), and save the model into a folder of its own"
        )


def _in_folder(folder: Path, name: str, needed: bool = False) -> Path | None:
    file = folder / name
    if not file.exists() and not needed:
        return None
    if not file.is_file():
        raise OSError(f"no {name} in it" if not file.exists() else f"{file}: not a file")
    return file


def read_config(file: Path, key: str) -> dict[str, Any]:
    """A JSON object of plain values. Raises CheckpointError naming key and file."""
    try:
        _bounded(file)
        return _plain(read_object(file, CheckpointError), str(file))
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error
    except (OSError, RecursionError) as error:
        raise CheckpointError(f"{key}: {file}: cannot be read: {error}") from error


def read_of(path: str, key: str, name: str) -> dict[str, Any]:
    """The contents of a JSON file in a folder or hub id. Raises CheckpointError naming key, path and file."""
    with naming(key, name, path):
        file = finder(path, key)(name, needed=True)
        assert file is not None
        return read_config(file, key)


def _bounded(file: Path) -> None:
    if file.stat().st_size > LARGEST:
        raise CheckpointError(f"{file}: {file.stat().st_size:,} bytes, expected at most {LARGEST:,}")


def _plain(value: Any, where: str) -> Any:
    """The value itself. Raises CheckpointError for NaN, infinity or an integer that no int64 holds, at any depth."""
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            _plain(item, f"{where}: {name}" if isinstance(value, dict) else where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"{where}: found {value}, expected a finite number")
    elif (
        isinstance(value, int) and abs(value) >= 2**63 and not where.endswith(": model_max_length")
    ):  # 10^30 = no limit
        raise CheckpointError(f"{where}: found {value!r:.20}..., expected a smaller number")
    return value


# --- configurations


def clean_config(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json with the keys in `CONFIG`. Raises ConfigError; also for a key that cannot be ignored, quantization_config."""
    if values.get("quantization_config"):
        raise ConfigError(
            f"{where}: quantization_config: its weights are quantised; take the unquantised model, which "
            "model.quantization=nf4 quantises as it is loaded"
        )
    kept = {name: value for name, value in values.items() if name in CONFIG}
    for name in kept.keys() & {*SIZES, *IDS}:
        least, most = (1, SIZES[name]) if name in SIZES else (-1, LARGEST_ID)
        for number in kept[name] if isinstance(kept[name], list) else [kept[name]]:
            if number is not None and not (type(number) is int and least <= number <= most):
                expected = f"a whole number from {least} to {most}"
                raise ConfigError(f"{where}: {name}: found {number!r:.99}, expected {expected}")
    for name in ("text_config", "vision_config"):
        if kept.get(name) is not None:
            kept[name] = clean_config(_mapping(kept[name], where, name), f"{where}: {name}")
    for name in ("rope_parameters", "rope_scaling"):
        if kept.get(name) is not None:
            kept[name] = _rope(_mapping(kept[name], where, name))
    own = kept.get("vision")
    if (
        isinstance(own, dict)
        and own.get("encoder") in ("transformers", "qwen_vl")
        and isinstance(own.get("config"), dict)
    ):
        model = clean_config(_mapping(own["config"].get("model"), where, "vision: config: model"), f"{where}: vision")
        kept["vision"] = {**own, "config": {**own["config"], "model": model}}
    return {**kept, **_class(kept, where)}


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of rotary positions: the keys in `ROPE`, perhaps for each type of layer."""
    types = {name: _rope(value) for name, value in values.items() if name in LAYER_TYPES and isinstance(value, dict)}
    return types or {name: value for name, value in values.items() if name in ROPE}


def _processor(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name == "template"}


def _generation(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in GENERATION}


def _tokenizer(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    kept = {name: value for name, value in values.items() if name in TOKENIZER or name.endswith("_token")}
    decoder = _mapping(kept.get("added_tokens_decoder", {}), where, "added_tokens_decoder")
    if wrong := [i for i in decoder if not (i.isascii() and i.isdecimal() and len(i) < 9 and int(i) < LARGEST_ID)]:
        raise ConfigError(f"{where}: added_tokens_decoder: found {wrong[0]!r:.99}, expected an id below {LARGEST_ID}")
    template = {name: kept[name] for name in ("chat_template",) if name in kept}
    return {**_tokens(kept), **template, **_class(kept, where)}


def _tokens(value: Any) -> Any:
    """The value, with every token that is described by an object reduced to the keys in `TOKEN`."""
    if isinstance(value, dict):
        whole = "content" not in value
        return {name: _tokens(item) for name, item in value.items() if whole or name in TOKEN}
    return [_tokens(item) for item in value] if isinstance(value, list) else value


def _added(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    for text, number in values.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < LARGEST_ID:
            raise ConfigError(f"{where}: {text!r:.99}: found {number!r:.99}, expected an id below {LARGEST_ID}")
    return dict(values)


def _index(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The index of sharded weights. Raises CheckpointError for names that are not safetensors files beside it."""
    places = _mapping(values.get("weight_map"), where, "weight_map")
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{where}: weight_map: found {name!r:.99}, expected names of files beside it")
    return {"metadata": {}, "weight_map": places}


def _class(values: Mapping[str, Any], where: str) -> dict[str, str]:
    """The class of a tokenizer, if one is named. Raises ConfigError."""
    name = values.get("tokenizer_class")
    if name is None:
        return {}
    if not isinstance(name, str) or name.removesuffix("Fast") not in TOKENIZERS:
        raise ConfigError(
            f"{where}: tokenizer_class: found {name!r:.99}, expected one of {', '.join(sorted(TOKENIZERS))}; a tokenizer of "
            "another class that has a tokenizer.json is a PreTrainedTokenizerFast too"
        )
    return {"tokenizer_class": name}


def _mapping(value: Any, where: str, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {name}: found {value!r:.99}, expected an object")
    return value


_CLEANED: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "config.json": clean_config,
    PROCESSOR: _processor,
    "generation_config.json": _generation,
    "tokenizer_config.json": _tokenizer,
    "special_tokens_map.json": _tokenizer,
    "added_tokens.json": _added,
    INDEX: _index,
}


# --- weights


def tensors_of(folder: Path, key: str) -> dict[str, Tensor]:
    """The weights in a folder. Raises CheckpointError."""
    files = [file for file in weight_files(finder(str(folder), key), key, str(folder)) if file.name != INDEX]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def weight_files(get: Finder, key: str, path: str) -> list[Path]:
    """The files that hold the weights, and their index. Raises CheckpointError if there are none, or one is missing or broken."""
    whole = get("model.safetensors")
    if whole is not None:
        stored([whole], key)
        return [whole]
    index = get(INDEX)
    if index is None:
        raise CheckpointError(f"{key}: no model*.safetensors in {path}; weights in other formats are not read")
    places = _index(read_config(index, key), f"{key}: {index}")["weight_map"]
    files = {name: get(name) for name in sorted(set(places.values()))}
    if missing := [name for name, file in files.items() if file is None]:
        raise CheckpointError(f"{key}: {path} lacks {len(missing)} of {len(files)} files of weights: {missing[0]}")
    present = [file for file in files.values() if file is not None]
    stored(present, key)
    return [index, *present]


def stored(files: Iterable[Path], key: str) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor in the files. Raises CheckpointError for a file that is broken, or quantised weights."""
    tensors: dict[str, tuple[str, list[int]]] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 no mapping
                    part = file.get_slice(name)
                    tensors[name] = part.get_dtype(), part.get_shape()
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{key}: {path}: not readable: {error}. Copy it again: it may have been cut"
            ) from error
    if not tensors:
        raise CheckpointError(f"{key}: {', '.join(map(str, files))}: no tensors in it")
    if packed := {kind for kind, _ in tensors.values()} - _STORED:
        raise CheckpointError(f"{key}: quantised weights ({', '.join(sorted(packed))}); take the unquantised model")
    return tensors
