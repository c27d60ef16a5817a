"""`lit-eemllm shrink`: a preset made small: stand-ins for its decoder and encoder, data, and a file of overrides that goes last.

    lit-eemllm shrink tiny configs/presets/ee_mllm_7b_pretrain.yaml
    lit-eemllm fit configs/presets/ee_mllm_7b_pretrain.yaml tiny/shrink.yaml        # two steps on a CPU, in seconds

The parts have random weights and the families of the real ones. What a preset says stays as it is: mechanism and its layer
numbers (the decoder keeps its depth), template, policy of images, tuning, LoRA, rates, schedule, precision, recomputing,
`init_from`. What becomes small: widths, heads, vocabulary, encoder, images; packs, packs a step, steps, devices, workers.

With ``--published`` it writes the config files of the parts in their published size, and nothing else: for `lit-eemllm
estimate`, which reads no weights, where the model hub is out of reach.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Idefics2VisionConfig,
    LlamaConfig,
    Qwen2Config,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)

from .config import strict_yaml
from .config.keys import Config
from .cost.shapes import SO400M
from .cost.weightless import CLIP_L, SHAPES
from .data import shards
from .data.sources import RECIPES, run_recipe
from .errors import ConfigError
from .model.vision import NATIVE, TransformersVision

TOKENIZER = RECIPES / "parts" / "decoder"
TEXTS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# The parts that presets name. Each was compared with a published config.json: its own, an unchanged copy of it, or, where said so,
# that of a model which was made from it.
PUBLISHED = {
    "lmsys/vicuna-7b-v1.5": LlamaConfig(**SHAPES["vicuna-7b"]),  # copy Reizend/bhai_insights_v3
    "lmsys/vicuna-13b-v1.5": LlamaConfig(**SHAPES["vicuna-13b"]),  # its own
    # ViCA's base by its README. Of mtgv/MobileVLM-3B, whose decoder is its chat version; the file's size, 5.4 GB in 16 bits, agrees
    "mtgv/MobileLLaMA-2.7B-Base": LlamaConfig(
        hidden_size=2560, intermediate_size=6912, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(  # of models tuned from it: thatupiso/SmolLM2-FT-DPO2 and others
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config(  # of models tuned from it: djuna-test-lab/QwenFocusedCoder and others
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    ),
    "openai/clip-vit-large-patch14-336": CLIPVisionConfig(**CLIP_L),  # copy sheldonrobinson/clip-vit-large-patch14-336
    "HuggingFaceM4/idefics2-8b": Idefics2VisionConfig(**SO400M, image_size=980),  # HuggingFaceM4/idefics2-8b-base
    "google/siglip-base-patch16-224": SiglipVisionConfig(),  # its file names no size: transformers' defaults, 768 x 12 layers
    "google/siglip-so400m-patch14-384": SiglipVisionConfig(**SO400M, image_size=384),  # HuggingFaceM4/siglip-so400m-14-384-flash-attn2
    # of LFM2-VL's encoder, which was made from it
    "google/siglip2-so400m-patch16-naflex": Siglip2VisionConfig(**SO400M | {"patch_size": 16}, num_patches=256),
}  # fmt: skip
OVERRIDES = """\
data: {workers: 0, pack_tokens: 320, max_length: 320, shuffle_buffer: 16, packing_buffer: 16}
optim: {max_steps: 2, log_every: 1}
trainer: {accelerator: cpu, strategy: auto, devices: 1, num_nodes: 1, accumulate_grad_batches: 1}
"""


def shrunk(config: Any) -> Any:
    """The same family, narrow. A decoder keeps its depth and how many query heads share a key head."""
    small = type(config)(**config.to_diff_dict())
    if isinstance(config, LlamaConfig | Qwen2Config):
        heads, keys = config.num_attention_heads, config.num_key_value_heads
        group = math.gcd(heads, keys) // (1 + (heads == keys))  # two heads at least
        small.num_attention_heads, small.num_key_value_heads = heads // group, keys // group
        small.hidden_size, small.head_dim = 16 * small.num_attention_heads, 16
        small.vocab_size = (
            832  # of the 821 tokens of data_recipes/parts, and a few that tokenizers of other families add
        )
        small.bos_token_id, small.eos_token_id, small.pad_token_id = 1, 2, 0
    else:
        small.hidden_size, small.num_attention_heads, small.num_hidden_layers = 16, 2, 3
        if config.model_type == "siglip2_vision_model":
            small.num_patches = 16
        else:
            small.image_size = 4 * config.patch_size
    small.intermediate_size = 2 * small.hidden_size
    return small


def preprocessor(config: Any) -> dict[str, Any]:
    """What ``preprocessor_config.json`` says to an encoder of these sizes."""
    half = [0.5, 0.5, 0.5]
    common = {"resample": 3, "image_mean": half, "image_std": half}
    if config.model_type == "siglip2_vision_model":
        return {**common, "resample": 2, "max_num_patches": config.num_patches}
    side = config.image_size
    if config.model_type in NATIVE:  # as Idefics2's 378 and 980
        patches = round(0.386 * side / config.patch_size)
        return {**common, "size": {"shortest_edge": patches * config.patch_size, "longest_edge": side}}
    if config.model_type == "clip_vision_model":
        square = {"height": side, "width": side}
        return {**common, "size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square}
    return {**common, "size": {"height": side, "width": side}}


def write_part(name: str, folder: Path, published: bool) -> None:
    """A decoder with its tokenizer, or an encoder, in transformers' format. Raises ConfigError for an unknown part."""
    if name not in PUBLISHED:
        raise ConfigError(f"{name}: no published size is known here; known: {', '.join(PUBLISHED)}")
    config = PUBLISHED[name] if published else shrunk(PUBLISHED[name])
    decoder = isinstance(config, LlamaConfig | Qwen2Config)
    if published:
        config.save_pretrained(folder)
    elif decoder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for text in TEXTS:
            shutil.copy(TOKENIZER / text, folder)
    else:
        TransformersVision.FAMILIES[config.model_type][1](config).save_pretrained(folder)
    if not decoder:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor(config)))


def shrink(config: Config, out: Path, published: bool = False) -> Path:
    """Write below `out` what is not there yet, and the file of overrides, whose path is returned."""
    torch.manual_seed(0)
    overrides = {} if published else strict_yaml.parse(OVERRIDES)
    parts = {name: out / name.replace("/", "--") for name in (config.model.decoder, config.model.vision.path or "")}
    for name, folder in parts.items():
        if not folder.exists():
            write_part(name, folder, published)
    decoder, encoder = (str(folder.absolute()) for folder in parts.values())
    overrides["model"] = {"decoder": decoder, "vision": {"path": encoder}}
    if not published:
        data = out / "data"
        if not data.exists():
            rows = run_recipe("shapes.py").write(out / "raw", "train", 64)
            asked_once = [row for row in json.loads(rows.read_text()) if len(row["conversations"]) == 2]
            rows.write_text(json.dumps(asked_once))  # the template of stage 1 takes no more
            shards.make({"train": rows}, out / "raw" / "images", data, shard_size=32)
        overrides["data"]["train"] = str(data.absolute())
    (out / "shrink.yaml").write_text(strict_yaml.dump(overrides))
    return out / "shrink.yaml"
