"""EEMLLM, a transformers model: packed for training, left-padded ids with a cache for `generate`.

The decoder is an ordinary causal LM of transformers under its own weight names; legend of shapes in `lit_eemllm.layout`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from inspect import signature
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..attention import KERNELS, AttentionBackend, Choice, resolve_backend
from ..compat.torch import changes
from ..compat.transformers import CACHE, Generating
from ..core.families import check_decoder, table_problems
from ..core.stream import Stream, Tokens, VisualKeys
from ..core.table import Table, Top, executed
from ..errors import ConfigError
from ..layout import PackedBatch, Pixels, Run, SequenceLayout, map_images, take_images, upload
from ..mechanisms import Added, Features, Mechanism, Sizes
from .cache import CachedPass, StreamCache, continue_positions, layout_of_padded, one_token_each
from .configuration import EEMLLMConfig, load_decoder_config
from .folders import HUB, MODEL_FILES, opened
from .image_cache import ImageCache
from .pretrained import adopt, load_weighted, rotary, take_over
from .vision import VisionEncoder, get_vision_encoder


class EEMLLM(PreTrainedModel, Generating, GenerationMixin):  # which transformers wants to see by name
    """A multimodal LLM whose treatment of visual tokens is a `Mechanism`.

    Args:
        config: the architecture.
        decoder: a causal LM to take over with its weights; built from the config when None.
        vision: likewise, the vision encoder.
    """

    config_class = EEMLLMConfig
    config: EEMLLMConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    _no_split_modules = ["DecoderLayer"]

    def __init__(
        self, config: EEMLLMConfig, decoder: PreTrainedModel | None = None, vision: VisionEncoder | None = None
    ) -> None:
        super().__init__(config)
        check_decoder(config.text_config)
        encoder = get_vision_encoder(config.vision["encoder"])
        self.vision = vision or encoder.from_config(config.vision["config"])
        self.language_model = decoder or AutoModelForCausalLM.from_config(config.text_config)
        self.mechanism = Mechanism.from_dict(config.mechanism)
        self._refuse(self._problems(self.mechanism))
        adopt(self.language_model)
        self._connect()
        self._take(self.mechanism)
        self._backend: AttentionBackend | None = None
        self.image_cache: ImageCache | None = None
        self.activation_checkpointing = False
        self._fused_loss: nn.Module | None = None
        self.post_init()

    def _connect(self) -> None:
        """Make the modules that the mechanism adds."""
        sizes = self.sizes
        self.projector = self.mechanism.connector(sizes)
        blocks = {str(layer): self.mechanism.block(layer, sizes) for layer in range(sizes.layers)}
        made = nn.ModuleDict({layer: block for layer, block in blocks.items() if block is not None})
        self.add_module(self.mechanism.blocks_name, made)

    @property
    def sizes(self) -> Sizes:
        decoder, newline = self.config.text_config, self.vision.transform.order([]) is not None
        return Sizes(decoder.hidden_size, decoder.num_hidden_layers, self.vision.hidden_size, newline)

    @property
    def blocks(self) -> nn.ModuleDict:
        """Modules that the mechanism adds before layers, by the layer's number."""
        blocks: nn.ModuleDict = getattr(self, self.mechanism.blocks_name)
        return blocks

    @property
    def table(self) -> Table:
        """What the layers execute."""
        return tuple(layer.row for layer in self.language_model.model.layers)

    def _init_weights(self, module: nn.Module) -> None:
        """Only what is added is ours to initialise; transformers' own parts do it themselves, and an encoder that is no
        transformers model comes with its weights."""
        if isinstance(module, Added):
            module.reset_parameters()

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str], *args: Any, **options: Any) -> Any:
        """As transformers', of what `opened` lets through: no code, no adapters, no pickle. `path` is a folder or hub id.

        Args:
            options: those in `HUB` say which files are read, the others are transformers'.

        Raises:
            ConfigError: it is none of an EEMLLM, or broken.
            CheckpointError: weights are missing or broken.
        """
        hub = {name: options.pop(name) for name in HUB & options.keys()}
        with opened(str(path), "EEMLLM.from_pretrained", cls.__name__, MODEL_FILES, weights=True, **hub) as folder:
            made = super().from_pretrained(str(folder), *args, **{**options, "use_safetensors": True})
        model = made[0] if options.get("output_loading_info") else made
        model.name_or_path = model.config.name_or_path = str(path)  # not the folder that is gone
        return made

    @classmethod
    def from_parts(
        cls,
        decoder: str,
        encoder: str,
        vision: VisionEncoder,
        mechanism: Mechanism,
        image_token_id: int,
        quantization: Any = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> EEMLLM:
        """Join pretrained parts with a fresh projector (seed torch before).

        Args:
            decoder: folder or hub id of a causal LM, or folder of an EEMLLM that has one; safetensors only.
            encoder: registered name of the vision encoder.
            vision: that encoder, with its weights.
            mechanism: how visual tokens are treated.
            image_token_id: see `EEMLLMConfig`.
            quantization: of the decoder's linear layers, as transformers takes it.
            weights: the decoder's, if not those in its folder.
        """
        text_config, options = load_decoder_config(decoder)
        how = {} if quantization is None else {"quantization_config": quantization}
        if weights:
            language_model = take_over(AutoModelForCausalLM, text_config, weights, decoder, "model.decoder", **how)
        else:
            language_model = load_weighted(AutoModelForCausalLM, decoder, "model.decoder", **options, **how)
        config = EEMLLMConfig(
            text_config=text_config,
            vision={"encoder": encoder, "config": vision.to_config()},
            mechanism=mechanism.to_dict(),
            image_token_id=image_token_id,
        )
        return cls(config, language_model, vision)

    # --- switches, neither of which touches a weight ---

    def _problems(self, mechanism: Mechanism) -> list[tuple[str, str]]:
        """Of a mechanism with this decoder: (field, what is wrong)."""
        decoder = self.config.text_config
        problems = mechanism.problems(decoder.num_hidden_layers)
        return problems + table_problems(decoder, mechanism.table(decoder.num_hidden_layers))

    @staticmethod
    def _refuse(problems: list[tuple[str, str]]) -> None:
        if problems:
            raise ConfigError("\n".join(f"model.mechanism.{name}: {text}" for name, text in problems))

    def set_mechanism(self, mechanism: Mechanism) -> None:
        """Raises ConfigError if the mechanism contradicts itself or needs other modules than this model has."""
        problems = self._problems(mechanism)
        if mechanism.modules != self.mechanism.modules:
            problems.append(("preset", "this mechanism has modules that the model lacks; see `lit-eemllm convert`"))
        self._refuse(problems)
        self._forget_images()
        self._take(mechanism)

    def _take(self, mechanism: Mechanism) -> None:
        """Tell the layers what to execute."""
        self.mechanism, self.config.mechanism = mechanism, mechanism.to_dict()
        layers = self.language_model.model.layers
        for layer, row in zip(layers, executed(mechanism.table(len(layers))), strict=True):
            layer.row, layer.freeze_prefix = row, mechanism.freeze_prefix
            layer.unrotated = mechanism.visual_positions == "unrotated"

    def train(self, mode: bool = True) -> EEMLLM:
        if mode:
            self._forget_images()  # their weights are about to change
        return super().train(mode)

    def _forget_images(self) -> None:
        if getattr(self, "image_cache", None) is not None:
            self.image_cache.clear()

    def set_attention(self, name: str, dtype: torch.dtype | None = None, training: bool = True) -> Choice:
        """Choose the attention backend for this model's device; see `resolve_backend`.

        Args:
            name: a registered name or ``auto``.
            dtype: type of the queries, keys and values; None = autocast's where it is on, else the decoder's.
            training: whether gradients are needed.
        """
        head_size = self.language_model.model.layers[0].self_attn.head_dim
        head_size *= 2 if self.mechanism.visual_positions == "unrotated" else 1
        if dtype is None and torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        choice = resolve_backend(name, self.device, dtype or self.language_model.dtype, training, head_size)
        self._backend = choice.backend
        return choice

    @property
    def backend(self) -> AttentionBackend:
        if self._backend is None:
            self.set_attention("auto")
        assert self._backend is not None
        return self._backend

    def use_liger(self) -> None:
        """Replace norms, feed-forward networks and the loss by liger-kernel's fused ones. Raises ConfigError without it."""
        if find_spec("liger_kernel") is None or not torch.cuda.is_available():
            raise ConfigError("model.liger: needs a CUDA device and liger-kernel; pip install 'lit_eemllm[liger]'")
        import liger_kernel.transformers as liger

        parts = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
        apply = getattr(liger, f"apply_liger_kernel_to_{self.config.text_config.model_type}")
        apply(model=self.language_model, **parts, rms_norm=True, swiglu=True)
        self._fused_loss = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    # --- the packed stream ---

    def image_features(self, pixels: Pixels) -> Tensor:
        """The encoder's features of all images in a row, [V, vision width]; of images in tiles, those of all tiles."""
        dtype = next(self.vision.parameters()).dtype
        grad = torch.is_grad_enabled() and any(p.requires_grad for p in self.vision.parameters())
        with torch.set_grad_enabled(grad), sdpa_kernel(KERNELS):
            features = self.vision(map_images(self.vision.transform.views(pixels), lambda x: x.to(dtype)))
        return features.to(next(self.projector.parameters()).dtype).flatten(0, -2)

    def _text_states(
        self,
        input_ids: Tensor,
        pixels: Pixels | None,
        layout: SequenceLayout,
        cached: CachedPass | None = None,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> Tensor:
        """Ids [S] (not read in visual rows) to the normalised last states of the text rows, [T, h]."""
        decoder, mechanism = self.language_model.model, self.mechanism
        image_takes = {"shared": 1, "none": 0}.get(mechanism.visual_positions)
        if image_takes is not None:
            layout = layout.with_image_positions(image_takes)
        if cached is not None and cached.cache is not None:
            layout = continue_positions(layout, cached.cache, image_takes)

        x_Th = decoder.embed_tokens(input_ids[layout.text_index])
        stream = self._stream(x_Th, layout, cached)
        if pixels is not None and self.image_cache is not None and self._images_are_independent:
            keys = self.image_cache.keys(pixels, self.image_keys, self._stamp(), sizes)
            return self._run_layers(x_Th, x_Th[:0], replace(stream, keys=keys))
        if pixels is None and cached is not None and cached.past:  # the cache has what text sees of images
            return self._run_layers(x_Th, x_Th[:0], stream)
        features = self._features(pixels, sizes, layout)
        return self._run_layers(x_Th, *self.mechanism.enter(self.projector, features, x_Th, stream))

    def _stream(self, x_Th: Tensor, layout: SequenceLayout, cached: CachedPass | None = None) -> Stream:
        return Stream(layout, rotary(self.language_model, x_Th), self.backend, cached=cached)

    def _run_layers(self, x_Th: Tensor, x_Vh: Tensor, stream: Stream) -> Tensor:
        decoder, blocks = self.language_model.model, self.blocks

        def run(layer: nn.Module, x_Th: Tensor, x_Vh: Tensor, kept: Tokens | None) -> Any:
            if str(layer.index) in blocks:
                x_Th, x_Vh = blocks[str(layer.index)](x_Th, x_Vh, stream)
            return layer(x_Th, x_Vh, stream, kept)

        again, kept = self.activation_checkpointing and torch.is_grad_enabled(), None
        none_0h = x_Th.new_zeros(0, x_Th.shape[1])
        for layer in decoder.layers:
            if layer.row.source == "own":  # else it would be kept with the layer's input
                x_Vh = none_0h
            if again:
                x_Th, x_Vh, kept = checkpoint(run, layer, x_Th, x_Vh, kept, use_reentrant=False)
            else:
                x_Th, x_Vh, kept = run(layer, x_Th, x_Vh, kept)
        return decoder.norm(x_Th)

    @property
    def _images_are_independent(self) -> bool:
        """No text changes them."""
        apart = not self.mechanism.no_later_images and not any(row.causal for row in self.table)
        return apart and not torch.is_grad_enabled()

    def _stamp(self) -> Hashable:
        """Changes with weights, their type or place, and with autocast."""
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return autocast, tuple((p.data_ptr(), changes(p), p.dtype, str(p.device)) for p in self.parameters())

    def _image_lengths(self, pixels: Pixels, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Visual tokens of each image."""
        transform = self.vision.transform
        if transform.fixed:
            return [transform.num_tokens(pixels[0].shape[-1], pixels[0].shape[-2])] * len(pixels)
        if len(sizes) != len(pixels):
            raise ValueError(
                f"image_sizes: found {len(sizes)} for {len(pixels)} images, expected (width, height) of each"
            )
        return [transform.num_tokens(*size) for size in sizes]

    def image_keys(self, pixels: Pixels, sizes: Sequence[tuple[int, int]] = ()) -> list[VisualKeys]:
        """Keys, before rotation, and values of each image by itself in every layer in which text sees it.

        Only for mechanisms in which visual states do not depend on the text.
        """
        lengths = self._image_lengths(pixels, sizes)
        layout = SequenceLayout.of([[Run(True, tokens)] for tokens in lengths]).to(self.device)
        none_0h = self.get_input_embeddings()(layout.text_index)
        stream = self._stream(none_0h, layout)
        x_Vh, stream = self.mechanism.enter(self.projector, self._features(pixels, sizes, layout), none_0h, stream)
        images: list[VisualKeys] = [[] for _ in lengths]
        for layer in self.language_model.model.layers:
            if str(layer.index) in self.blocks:
                _, x_Vh = self.blocks[str(layer.index)](none_0h, x_Vh, stream)
            x_Vh, pair = layer.images_alone(x_Vh, stream)
            of_each = stream.tokens(layer.row.tokens).lengths
            parts = None if pair is None else zip(*(x.split(of_each) for x in pair), strict=True)
            for image in images:  # copies: a view would keep the others' alive
                image.append(None if parts is None else tuple(x.clone() for x in next(parts)))
        return images

    def _features(self, pixels: Pixels | None, sizes: Sequence[tuple[int, int]], layout: SequenceLayout) -> Features:
        """What a projector reads: features of the images, and which of them are visual tokens where not each is one.

        Without images no rows, but in the graph: no pack may leave a weight without gradient.
        """
        order = self.vision.transform.order(sizes)
        if pixels is None:
            features = next(self.projector.parameters()).new_zeros(0, self.vision.hidden_size)
        else:
            features = self.image_features(map_images(pixels, lambda x: upload(x, layout.positions.device)))
        tokens, rows = (len(features), len(features)) if order is None else (len(order[0]), order[1])
        if tokens != layout.num_visual or rows != len(features):
            images = 0 if pixels is None else len(pixels)
            text = f"{images} images give {tokens} visual tokens, but the layout holds {layout.num_visual}"
            raise ValueError(text if rows == len(features) else f"{text}; image_sizes are of images of other shapes")
        return Features(features, None if order is None else upload(order[0], features.device))

    def _packed_states(self, batch: PackedBatch) -> Tensor:
        return self._text_states(batch.input_ids, batch.pixel_values, batch.layout, sizes=batch.image_sizes)

    def packed_logits(self, batch: PackedBatch) -> Tensor:
        """Logits at the supervised positions only, [n, vocabulary]."""
        text_Th = self._packed_states(batch)
        return self.language_model.lm_head(text_Th[batch.target_rows])

    def packed_loss(self, batch: PackedBatch) -> Tensor:
        """Cross-entropy summed over the supervised tokens of the pack, a float32 scalar."""
        if self._fused_loss is not None:
            text_Th = self._packed_states(batch)
            return self._fused_loss(self.language_model.lm_head.weight, text_Th[batch.target_rows], batch.targets)
        return cross_entropy(self.packed_logits(batch).float(), batch.targets, reduction="sum")

    # --- transformers' interface: left-padded ids, cache, generate ---

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Pixels | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        image_sizes: Sequence[tuple[int, int]] = (),
        past_key_values: Cache | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits for left-padded ids in which every image is its `image_token_id`, repeated once per visual token.

        Args:
            input_ids: [B, L], the new ids.
            attention_mask: [B, past + L], 0 at padding.
            pixel_values: [I, 3, height, width], the images of the new ids in order; a tensor each where they differ in shape.
            cache: of the earlier ids, as this method returned it; appended to.
            logits_to_keep: only the last so many columns; 0 keeps all.
            image_sizes: width and height of each picture as it was (transformers' own have the height first); needed where
                images have many sizes.
            past_key_values: what transformers before 5.24 calls `cache`.

        Returns:
            logits [B, kept, vocab_size], zero at padding and at image tokens: nothing is predicted from an image row.
            The image token has the logit -inf.
        """
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, StreamCache):
            if cache.get_seq_length():
                raise ValueError(f"a cache with tokens in it must come from this model, found {type(cache)}")
            cache, use_cache = None, True  # as `generate` begins; the cache returned is the one to go on with
        if use_cache and cache is None:
            cache = StreamCache()
        past = cache.columns if cache is not None else 0
        if past and pixel_values is not None and self.mechanism.no_later_images:
            raise ValueError(self.mechanism.no_later_images)
        if cache is None and pixel_values is not None and any(isinstance(row.tokens, Top) for row in self.table):
            raise ValueError("visual_drop is decided once, for a prompt whose keys are kept: use_cache=True")
        new_BL = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask[:, past:]
        one_each = past > 0 and input_ids.shape[1] == 1 and pixel_values is None
        lengths = [] if pixel_values is None else self._image_lengths(pixel_values, image_sizes)
        real_BL = None
        if one_each:
            layout = one_token_each(len(input_ids), input_ids.device)
        else:  # the one time that a prompt is read from the device: lengths are needed on the CPU
            visual_BL, real_BL = torch.stack([input_ids == self.config.image_token_id, new_BL.bool()]).cpu()
            layout = layout_of_padded(visual_BL, real_BL, lengths).to(input_ids.device)
        cached = CachedPass(cache, new_BL, real_BL)
        grid = cached.grid("all", [])
        ids_S = input_ids.flatten() if grid.slots_R is None else input_ids.flatten()[grid.slots_R]
        text_Th = self._text_states(
            ids_S, pixel_values, layout, cached, image_sizes if pixel_values is not None else ()
        )
        states_BLh = grid.pad(text_Th[:, None], layout.text_index)[:, 0]
        real_BL1 = grid.pad(torch.ones_like(text_Th[:, None, :1]), layout.text_index)[:, 0]
        kept = slice(-logits_to_keep if logits_to_keep else None, None)
        logits = self.language_model.lm_head(states_BLh[:, kept]) * real_BL1[:, kept]
        logits = pad(logits, (0, self.config.vocab_size - logits.shape[-1]))
        logits[..., self.config.image_token_id] = float("-inf")  # is never said
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        is_first_iteration: bool = False,
        pixel_values: Pixels | None = None,
        image_sizes: Sequence[tuple[int, int]] = (),
        **kwargs: Any,
    ) -> dict[str, Any]:
        if is_first_iteration and (input_ids[:, -1] == self.config.image_token_id).any():
            raise ValueError("a prompt ends with an image: nothing can be predicted from one, end it with text")
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        inputs = {name: inputs[name] for name in inputs if name in signature(self.forward).parameters}  # no tokenizer
        again = is_first_iteration or not kwargs.get("use_cache", True)
        return {**inputs, "pixel_values": pixel_values if again else None, "image_sizes": image_sizes}

    def repeated_images(self, times: int, input_ids: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """Beams and several samples per prompt: images go with their prompt, not one by one."""
        pixels, sizes = options.pop("pixel_values", None), options.pop("image_sizes", ())
        if pixels is None:
            return {}
        if times > 1:
            lengths, chosen, image = self._image_lengths(pixels, sizes), [], 0
            for tokens in input_ids.eq(self.config.image_token_id).sum(-1).tolist():
                first = image
                while tokens > 0 and image < len(lengths):
                    tokens, image = tokens - lengths[image], image + 1
                chosen += [*range(first, image)] * times
            pixels, sizes = take_images(pixels, chosen), [sizes[i] for i in chosen] if sizes else sizes
        return {"pixel_values": pixels, "image_sizes": sizes}
