"""Tiny random models and packs shared by the tests."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from hypothesis import strategies as st
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolLM3Config,
)
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.llama4.modeling_llama4 import apply_rotary_emb

from lit_eemllm import plugins
from lit_eemllm.attention.base import _BACKENDS
from lit_eemllm.config import Config, load_config
from lit_eemllm.core.families import FAMILIES
from lit_eemllm.data import shards
from lit_eemllm.data.sources import REGISTERED
from lit_eemllm.evaluation.metrics import METRICS
from lit_eemllm.inputs.images import ImageTransform
from lit_eemllm.inputs.resolutions import NativeTransform
from lit_eemllm.inputs.tiles import AnyresTransform
from lit_eemllm.layout import PackedBatch, Run, SequenceLayout
from lit_eemllm.mechanisms import CONNECTORS, PRESETS, Connector, Mechanism
from lit_eemllm.mechanisms.connectors import DEFAULT
from lit_eemllm.model import EEMLLM, EEMLLMConfig
from lit_eemllm.model.vision import _ENCODERS, TransformersVision, VisionEncoder

VOCAB, TOKENS = 40, 16  # text vocabulary; visual tokens of an image
COMMON = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, max_position_embeddings=256,
    attention_bias=False, initializer_range=0.3, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
DECODERS = {
    "llama": LlamaConfig(**COMMON, num_attention_heads=4, num_key_value_heads=4),
    "llama-gqa": LlamaConfig(**COMMON, num_attention_heads=4, num_key_value_heads=2),
    "llama-16": LlamaConfig(**COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "mistral": MistralConfig(**COMMON, num_attention_heads=4, num_key_value_heads=2, sliding_window=None),
    "qwen2": Qwen2Config(**COMMON, num_attention_heads=4, num_key_value_heads=2),
    "qwen3": Qwen3Config(**COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=12),
    "olmo2": Olmo2Config(**COMMON, num_attention_heads=4, num_key_value_heads=2),
    "smollm3": SmolLM3Config(
        **COMMON,
        num_attention_heads=4,
        num_key_value_heads=2,
        no_rope_layers=[1, 0, 1, 1, 0, 1, 0, 1],  # 3 of 8 are used
    ),
    # Windows smaller than any document with an image.
    "mistral-window": MistralConfig(**COMMON, num_attention_heads=4, num_key_value_heads=2, sliding_window=6),
    "qwen2-window": Qwen2Config(
        **COMMON, num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3-window": Qwen3Config(
        **COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=12, use_sliding_window=True, sliding_window=5,
        layer_types=SLIDING,
    ),
    "olmo3": Olmo3Config(
        **COMMON, num_attention_heads=4, num_key_value_heads=2, sliding_window=6, layer_types=SLIDING,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "gemma3_text": Gemma3TextConfig(
        **COMMON | {"tie_word_embeddings": True}, num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=6,
        layer_types=SLIDING, query_pre_attn_scalar=20, rope_theta=100.0, rope_local_base_freq=10.0,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    ),
    # Chunks smaller than any document with an image, and queries that grow every few tokens. A layer without experts, and two with.
    "llama4_text": Llama4TextConfig(
        **COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size_mlp=40, num_local_experts=3,
        num_experts_per_tok=2, moe_layers=[1, 2], no_rope_layers=[1, 0, 1, 1, 0, 1, 0, 1], attention_chunk_size=6, floor_scale=4, attn_scale=0.5,
        layer_types=["chunked_attention", "full_attention", "chunked_attention"], rope_scaling=LLAMA3,
    ),
    # As Maverick: no norms of queries and keys.
    "llama4-no-norms": Llama4TextConfig(
        **COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size_mlp=40, num_local_experts=2,
        interleave_moe_layer_step=2, no_rope_layer_interval=2, attention_chunk_size=None, layer_types=["full_attention"] * 3, attn_temperature_tuning=False,
        floor_scale=4, attn_scale=0.5, use_qk_norm=False,
    ),
}  # fmt: skip
TRANSFORM = ImageTransform(height=16, width=16, patch=4, mean=(0.5,) * 3, std=(0.5,) * 3)
TRANSFORMS = {
    "clip": TRANSFORM,
    "anyres": AnyresTransform(TRANSFORM),
    "siglip2": NativeTransform(4, (0.5,) * 3, (0.5,) * 3, most=20),
    "idefics2": NativeTransform(4, (0.5,) * 3, (0.5,) * 3, edges=(8, 20)),
}


DEEPER = {"ee_mllm_f": 5, "shortv": 5, "operator_skipping": 8, "hidrop": 8, "visipruner": 8}
"""Presets that with three layers compute what llava does or lack a step, and layers with which they do not."""


def layers_of(mechanism: Mechanism | str) -> int:
    return DEEPER.get(mechanism, 3) if isinstance(mechanism, str) else 3


def tables(layers: int = 3) -> st.SearchStrategy[Mechanism]:
    """Mechanisms whose every column is overridden in every layer, by anything that a table can say."""
    selects = st.sampled_from(["all", "none", "every 2", "every 3"])
    halves = st.sampled_from(
        ["none", "value", "output", "ffn", "value ffn", "output ffn", "value output", "value output ffn"]
    )
    wholes = st.sampled_from(["value output", "value output ffn"])
    ways = st.sampled_from(["none", "causal", "image", 3]).flatmap(
        lambda attend: st.tuples(st.just(attend), halves if attend == "none" else wholes)
    )
    places = st.sampled_from([*("every 2", "all") * 2, "even 0.4", "random 0.6 seed 3"])
    # A share of the tokens and every n-th cannot be combined, but the feed-forward network may take either.
    pairs = st.one_of(st.tuples(selects, selects), st.sampled_from([("even 0.4", "all"), ("all", "random 0.6 seed 3")]))
    row = st.tuples(pairs, ways, places).map(
        lambda drawn: (
            ("tokens", drawn[0][0]), ("attend", drawn[1][0]), ("update", drawn[1][1]), ("ffn", drawn[2]), ("seen", drawn[0][1]),
        )
    )  # fmt: skip
    rows = st.lists(row, min_size=layers, max_size=layers)
    return rows.map(lambda rows: Mechanism(rows=tuple((str(n), columns) for n, columns in enumerate(rows))))


def vision(family: str = "clip") -> TransformersVision:
    """An encoder of fixed images (clip, siglip), of tiles (anyres: CLIP's) or of images of many sizes (siglip2, idefics2)."""
    common = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    if family in ("clip", "anyres"):
        return TransformersVision(CLIPVisionModel(CLIPVisionConfig(**common)), TRANSFORMS[family], select_layer=-2)
    if family == "siglip2":
        common["num_patches"] = (common.pop("image_size") // 4) ** 2
        model = Siglip2VisionModel(Siglip2VisionConfig(**common, vision_use_head=False))
        return TransformersVision(model, TRANSFORMS[family], select_layer=-2)
    if family == "idefics2":
        config = Idefics2VisionConfig(**common, initializer_range=0.2)
        return TransformersVision(Idefics2VisionTransformer(config), TRANSFORMS[family], select_layer=-1)
    model = SiglipVisionModel(SiglipVisionConfig(**common, vision_use_head=False))
    return TransformersVision(model, TRANSFORM, select_layer=-1)


class Patches(VisionEncoder):
    """An encoder of a user's own, which is no transformers model: one convolution."""

    hidden_size, transform = 16, TRANSFORM

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 4, 4)

    @classmethod
    def from_path(cls, path, *, select_layer, policy):
        return cls()

    @classmethod
    def from_config(cls, config):
        return cls()

    def to_config(self):
        return {"transform": self.transform.to_dict()}

    def forward(self, pixels):
        return self.conv(pixels).flatten(2).transpose(1, 2)


def model(
    decoder: str = "llama-gqa",
    mechanism: Mechanism | str = "ee_mllm",
    encoder: str = "clip",
    seed: int = 0,
    layers: int | None = None,
    connector: Connector = DEFAULT,
) -> EEMLLM:
    """A random EEMLLM in float32 on the CPU, attention through the reference; by default of `layers_of`."""
    torch.manual_seed(seed)
    tower, text = vision(encoder), DECODERS[decoder]
    layers = layers or max(text.num_hidden_layers, layers_of(mechanism))
    if layers != text.num_hidden_layers:
        text = copy.deepcopy(text)
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = (text.layer_types * text.num_hidden_layers)[: text.num_hidden_layers]
    if isinstance(mechanism, str):
        mechanism = PRESETS[mechanism].stretched(text.num_hidden_layers)
    config = EEMLLMConfig(
        text_config=text,
        vision={"encoder": "transformers", "config": tower.to_config()},
        mechanism=mechanism.to_dict(),
        image_token_id=VOCAB,
        connector=connector.to_dict(),
    )
    result = EEMLLM(config, vision=tower).eval()
    with torch.no_grad():  # random norms and biases: nothing may hide behind ones and zeros
        for name, parameter in result.named_parameters():
            if (name.startswith("language_model") and parameter.ndim == 1) or name.endswith("_gate"):
                parameter.add_(0.2 * torch.randn_like(parameter) + 0.5 * name.endswith("_gate"))
            if name.startswith(("experts", "casa", "routers")):  # they begin as copies, and at zero
                parameter.add_(0.1 * torch.randn_like(parameter))
    result.set_attention("reference")
    return result


def pack(documents: list[list[int]], seed: int = 0, dtype: torch.dtype = torch.float32) -> PackedBatch:
    """A pack from documents of run lengths: a positive number is that much text, 0 an image of TOKENS tokens."""
    generator = torch.Generator().manual_seed(seed)
    layout = SequenceLayout.of([[Run(n == 0, n or TOKENS) for n in doc] for doc in documents])
    ids = torch.randint(3, VOCAB, (layout.num_tokens,), generator=generator)
    row_of = {s: t for t, s in enumerate(layout.text_index.tolist())}
    same_document = layout.positions[1:] > 0
    pairs = [s for s in range(layout.num_tokens - 1) if same_document[s] and s in row_of and s + 1 in row_of]
    images = len(layout.image_lengths)
    return PackedBatch(
        input_ids=ids.index_fill(0, layout.visual_index, 0),
        target_rows=torch.tensor([row_of[s] for s in pairs], dtype=torch.long),
        targets=ids[torch.tensor(pairs, dtype=torch.long) + 1],
        pixel_values=torch.randn(images, 3, 16, 16, generator=generator).to(dtype) if images else None,
        layout=layout,
        keys=[str(i) for i in range(len(documents))],
    )


def prompt(model, documents, seed=3, dtype=torch.float32):
    """Left-padded ids of documents (run lengths, 0 an image) and their images."""
    batches = [pack([doc], seed + i, dtype) for i, doc in enumerate(documents)]
    image = model.config.image_token_id
    ids = [b.input_ids.index_fill(0, b.layout.visual_index, image) for b in batches]
    longest = max(map(len, ids))
    pixels = [b.pixel_values for b in batches if b.pixel_values is not None]
    return {
        "input_ids": torch.stack([torch.nn.functional.pad(x, (longest - len(x), 0)) for x in ids]),
        "attention_mask": torch.stack([(torch.arange(longest) >= longest - len(x)).long() for x in ids]),
        **({"pixel_values": torch.cat(pixels)} if pixels else {}),
    }


def norms(layer):
    """Of a layer of transformers: before attention and after it, before the feed-forward network and after it."""
    none = torch.nn.Identity()
    if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma 3
        return (
            layer.input_layernorm, layer.post_attention_layernorm, layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm,
        )  # fmt: skip
    if hasattr(layer, "post_feedforward_layernorm"):  # OLMo 2
        return none, layer.post_attention_layernorm, none, layer.post_feedforward_layernorm
    return layer.input_layernorm, none, layer.post_attention_layernorm, none


def angles(decoder, positions_L, number):
    """Cos and sin of a layer, of transformers' own module, [1, L, H] or of pairs [1, L, H / 2]; and the positions."""
    kinds = getattr(decoder.config, "layer_types", None)
    by_kind = [kinds[number]] if hasattr(decoder.rotary_emb, "layer_types") else []
    found = decoder.rotary_emb(torch.zeros(1, len(positions_L), 1), positions_L[None], *by_kind)
    return *((found.real, found.imag) if isinstance(found, torch.Tensor) else found), positions_L


def near(decoder, positions_L, number):
    """What a layer's window lets a token see, [L, L] bool: keys fewer than its size of positions before it, all without one. Or those
    that are not before its chunk."""
    if getattr(decoder.config, "layer_types", [""] * 9)[number] == "chunked_attention":
        chunk_L = positions_L // decoder.config.attention_chunk_size
        return chunk_L[:, None] <= chunk_L
    size, kinds = getattr(decoder.config, "sliding_window", None), getattr(decoder.config, "layer_types", None)
    if size is None or (kinds is not None and kinds[number] != "sliding_attention"):
        size = 10**6
    return positions_L[:, None] - positions_L[None] < size


def rows(made):
    """Of what a module gives: experts say how they were chosen, too."""
    return made[0] if isinstance(made, tuple) else made


def feed_forward(layer):
    """The layer's network, of rows to rows."""
    network = layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp
    return lambda x_Lh: rows(network(x_Lh))


def projections(layer, u_Lh, cos, sin, positions_L):
    """Of a document that has passed the layer's norm: queries and keys, the same rotated, and values, each [N, L, H]."""
    attn = layer.self_attn
    q, k, v = attn.q_proj(u_Lh), attn.k_proj(u_Lh), attn.v_proj(u_Lh)
    whole = hasattr(attn, "q_norm") and len(attn.q_norm.weight) == q.shape[-1]  # else of each head
    if whole:
        q, k = attn.q_norm(q), attn.k_norm(k)
    q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in (q, k, v))
    if hasattr(attn, "q_norm") and not whole:
        q, k = attn.q_norm(q), attn.k_norm(k)
    turned_q, turned_k = q, k
    if hasattr(attn, "attn_temperature_tuning"):  # Llama 4: pairs of neighbours turn, then come norms
        if attn.use_rope:
            turned_q, turned_k = (x[0] for x in apply_rotary_emb(q[None], k[None], torch.complex(cos, sin)))
        elif attn.attn_temperature_tuning:
            grown = torch.log1p((positions_L + 1) // attn.floor_scale) * attn.attn_scale + 1
            q = turned_q = q * grown[:, None, None]
        norm = getattr(attn, "qk_norm", torch.nn.Identity())
        q, k, turned_q, turned_k = map(norm, (q, k, turned_q, turned_k))
    elif getattr(attn, "use_rope", True):
        turned_q, turned_k = (
            x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*(x.transpose(0, 1)[None] for x in (q, k)), cos, sin)
        )
    q, k, turned_q, turned_k, v = (x.transpose(0, 1)[None] for x in (q, k, turned_q, turned_k, v))
    groups = q.shape[1] // k.shape[1]
    k, turned_k, v = (x.repeat_interleave(groups, 1) for x in (k, turned_k, v))
    return [x[0] for x in (q, k, turned_q, turned_k, v)]


def max_error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Largest difference relative to the tensor's largest value."""
    return ((found - true).abs().max() / true.abs().max()).item()


def assert_same_picture(found: torch.Tensor, true: torch.Tensor, std: tuple[float, ...]) -> None:
    """Normalised pixels of a picture that PyTorch and Pillow have resized: of 255 levels few apart anywhere, less than half a one
    on average. (Of noise; Pillow's bilinear and bicubic filters are 8 apart on average.)"""
    assert found.dtype == true.dtype == torch.float32 and found.shape == true.shape
    levels = (found - true).abs() * min(std) * 255
    assert levels.max() <= 8.001 and levels.mean() <= 0.3, (levels.max(), levels.mean())


def write_parts(folder: Path, family: str = "llama", **sizes: Any) -> None:
    """A random decoder of a family, of other `sizes` than the common ones, with its tokenizer and a random encoder, as transformers
    folders `decoder` and `encoder`."""
    torch.manual_seed(0)
    words = [
        "What colour is the big circle left of a square in this picture? It is red, green or blue.",
        "USER: ASSISTANT: 12345",
    ]
    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator(words, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "decoder")
    own = {**COMMON, "vocab_size": len(tokenizer), "num_attention_heads": 4, "num_key_value_heads": 2, **sizes}
    text = CONFIG_MAPPING[family](**own)
    AutoModelForCausalLM.from_config(text).save_pretrained(folder / "decoder")
    vision("siglip").model.save_pretrained(folder / "encoder")
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor", "size": {"height": 16, "width": 16},
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3,
    }  # fmt: skip
    (folder / "encoder" / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def write_shards(folder: Path, train: int = 160, val: int = 60) -> Path:
    """Prepared shards of the embedded set, in `folder`, and its loose images beside."""
    recipes = Path(__file__).parents[1] / "data_recipes" / "shapes.py"
    spec = importlib.util.spec_from_file_location("shapes", recipes)
    shapes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shapes)
    raw = folder.parent / f"{folder.name}-raw"
    rows = {split: shapes.write(raw, split, count) for split, count in (("train", train), ("val", val))}
    shards.make(rows, raw / "images", folder, shard_size=40)
    return folder


@contextlib.contextmanager
def forgotten_imports() -> Iterator[None]:
    """Whatever is registered and imported within, as by --import, is gone after it, as it is in another process."""
    registries = (_BACKENDS, _ENCODERS, CONNECTORS, FAMILIES, METRICS, PRESETS, REGISTERED, plugins.imported)
    before, modules = [dict(registry) for registry in registries], set(sys.modules)
    try:
        yield
    finally:
        for registry, names in zip(registries, before, strict=True):
            registry.clear()
            registry.update(names)
        for name in set(sys.modules) - modules:
            if name.startswith("lit_eemllm_user_"):
                del sys.modules[name]


def config(parts: Path, data: str | Path, out: Path, *overrides: str) -> Config:
    """A short run of the parts of `write_parts` on shards or a recipe."""
    return load_config([], [
        f"model.decoder={parts / 'decoder'}", f"model.vision.path={parts / 'encoder'}", "model.vision.select_layer=-1",
        "model.vision.policy=resize", f"data.train={data}", f"data.val={data}", "data.pack_tokens=512", "data.max_length=256",
        "data.workers=0", "data.shuffle_buffer=30", "data.packing_buffer=24", "optim.max_steps=20", "optim.lr=3e-3",
        "optim.tuning.llm=full", "optim.save_every=10", "optim.val_every=10", "optim.val_batches=2", "optim.log_every=1",
        "optim.warmup_ratio=0.2", "trainer.accelerator=cpu", "eval.max_new_tokens=4", f"out={out}", *overrides,
    ])  # fmt: skip
