"""EEMLLM, a transformers model: packed for training, left-padded ids with a cache for `generate`.

The decoder is an ordinary causal LM of transformers under its own weight names; legend of shapes in `lit_eemllm.layout`.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..attention import AttentionBackend, Choice, resolve_backend
from ..layout import PackedBatch, SequenceLayout
from ..mechanisms import Mechanism
from .cache import PaddedCache, layout_of_padded
from .decoder import StreamContext, adopt_layers, check_decoder
from .pretrained import load_pretrained, load_weighted
from .vision import VisionEncoder, get_vision_encoder


class EEMLLMConfig(PretrainedConfig):
    """Everything needed to rebuild the architecture; the attention backend is no part of it.

    Args:
        text_config: the decoder's own transformers config.
        vision: ``encoder``, a registered name, and ``config``, what that encoder's `to_config` returned.
        mechanism: `Mechanism.to_dict`.
        image_token_id: the id that stands for one visual token in `generate`'s ids; it may lie past the decoder's
            vocabulary, since it is never embedded.
    """

    model_type = "eemllm"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        vision: dict[str, Any] | None = None,
        mechanism: dict[str, Any] | None = None,
        image_token_id: int = -1,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.vision, self.mechanism = vision or {}, mechanism or {}
        self.image_token_id = image_token_id
        if text_config is not None:
            kwargs.setdefault("tie_word_embeddings", text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Columns of the logits that `forward` returns: the decoder's vocabulary, and the image token if it lies past it."""
        return max(self.text_config.vocab_size, self.image_token_id + 1)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """The decoder's config as `generate` needs it: beam search counts the columns of the logits by its vocabulary."""
        if self.text_config is None or self.text_config.vocab_size == self.vocab_size:
            return self.text_config or self
        text_config = copy(self.text_config)
        text_config.vocab_size = self.vocab_size
        return text_config


class Projector(nn.Module):
    """Two linear layers with a GELU between them, from the encoder's width to the decoder's (LLaVA-1.5's connector)."""

    def __init__(self, vision_width: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, hidden)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class EEMLLM(PreTrainedModel, GenerationMixin):
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
        self.projector = Projector(self.vision.hidden_size, config.text_config.hidden_size)
        adopt_layers(self.language_model, Mechanism.from_dict(config.mechanism))
        self._backend: AttentionBackend | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Only the projector is ours to initialise; transformers' own parts do it themselves, and an encoder that is no
        transformers model comes with its weights. Torch's default, as LLaVA: biases of zero would keep a visual token
        whose features are zero at zero in every layer, with gradients that explode in the norms."""
        if isinstance(module, Projector):
            module.linear_1.reset_parameters()
            module.linear_2.reset_parameters()

    @classmethod
    def from_parts(
        cls, decoder: str, encoder: str, vision: VisionEncoder, mechanism: Mechanism, image_token_id: int
    ) -> EEMLLM:
        """Join pretrained parts with a fresh projector (seed torch before).

        Args:
            decoder: folder or hub id of a causal LM; safetensors only.
            encoder: registered name of the vision encoder.
            vision: that encoder, with its weights.
            mechanism: how visual tokens are treated.
            image_token_id: see `EEMLLMConfig`.
        """
        text_config = load_pretrained(AutoConfig, decoder, "model.decoder")
        check_decoder(text_config)
        language_model = load_weighted(AutoModelForCausalLM, decoder, "model.decoder")
        config = EEMLLMConfig(
            text_config=text_config,
            vision={"encoder": encoder, "config": vision.to_config()},
            mechanism=mechanism.to_dict(),
            image_token_id=image_token_id,
        )
        return cls(config, language_model, vision)

    # --- switches, neither of which touches a weight ---

    def set_mechanism(self, mechanism: Mechanism) -> None:
        for layer in self.language_model.model.layers:
            layer.set_mechanism(mechanism)
        self.config.mechanism = mechanism.to_dict()

    def set_attention(self, name: str, dtype: torch.dtype | None = None, training: bool = True) -> Choice:
        """Choose the attention backend for this model's device; see `resolve_backend`.

        Args:
            name: a registered name or ``auto``.
            dtype: type of the queries, keys and values; None = the decoder's, right without autocast.
            training: whether gradients are needed.
        """
        head_size = self.language_model.model.layers[0].self_attn.head_dim
        choice = resolve_backend(name, self.device, dtype or self.language_model.dtype, training, head_size)
        self._backend = choice.backend
        return choice

    @property
    def backend(self) -> AttentionBackend:
        if self._backend is None:
            self.set_attention("auto")
        assert self._backend is not None
        return self._backend

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    # --- the packed stream ---

    def encode_images(self, pixels: Tensor) -> Tensor:
        """[I, 3, height, width] to projected visual tokens of all images in order, [V, h]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in self.vision.parameters())):
            features = self.vision(pixels.to(next(self.vision.parameters()).dtype))
        return self.projector(features.to(self.projector.linear_1.weight.dtype)).flatten(0, 1)

    def _text_states(
        self, input_ids: Tensor, pixels: Tensor | None, layout: SequenceLayout, cache: PaddedCache | None = None
    ) -> Tensor:
        """Ids [S] (not read in visual rows) to the normalised last states of the text rows, [T, h]."""
        decoder = self.language_model.model
        text_Th = decoder.embed_tokens(input_ids[layout.text_index])
        if pixels is None:  # no rows, but in the graph: a text-only pack must not leave the projector without gradient
            visual_Vh = self.projector(self.projector.linear_1.weight.new_zeros(0, self.vision.hidden_size))
        else:
            visual_Vh = self.encode_images(pixels)
        if len(visual_Vh) != layout.num_visual:
            images = 0 if pixels is None else len(pixels)
            raise ValueError(
                f"{images} images give {len(visual_Vh)} visual tokens, but the ids hold {layout.num_visual} image tokens"
            )
        x_Sh = layout.merge(text_Th, visual_Vh.to(text_Th.dtype))
        cos_1SH, sin_1SH = decoder.rotary_emb(x_Sh, layout.positions[None])
        context = StreamContext(layout, (cos_1SH[0, :, None], sin_1SH[0, :, None]), self.backend, cache)
        for layer in decoder.layers:
            x_Sh = layer(x_Sh, context)
        return decoder.norm(x_Sh)

    def packed_logits(self, batch: PackedBatch) -> Tensor:
        """Logits at the supervised positions only, [n, vocabulary]."""
        text_Th = self._text_states(batch.input_ids, batch.pixel_values, batch.layout)
        return self.language_model.lm_head(text_Th[batch.target_rows])

    def packed_loss(self, batch: PackedBatch) -> Tensor:
        """Cross-entropy summed over the supervised tokens of the pack, a float32 scalar."""
        return cross_entropy(self.packed_logits(batch).float(), batch.targets, reduction="sum")

    # --- transformers' interface: left-padded ids, cache, generate ---

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits for left-padded ids in which every image is its `image_token_id`, repeated once per visual token.

        Args:
            input_ids: [B, L], the new ids.
            attention_mask: [B, past + L], 0 at padding.
            pixel_values: [I, 3, height, width], the images of the new ids in order.
            past_key_values: cache of the earlier ids; appended to.
            logits_to_keep: only the last so many columns; 0 keeps all.

        Returns:
            logits [B, kept, vocab_size], zero at padding and at image tokens: nothing is predicted from an image row.
            The image token has the logit -inf.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None:
            attention_mask = input_ids.new_ones(input_ids.shape[0], past + input_ids.shape[1])
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        layout = layout_of_padded(input_ids, attention_mask, self.config.image_token_id)
        grid = PaddedCache(past_key_values, input_ids, attention_mask)
        text_Th = self._text_states(
            input_ids.flatten()[grid.slots_S], pixel_values, layout, grid if past_key_values is not None else None
        )
        states_BLh = grid.pad(text_Th[:, None], layout.text_index)[:, 0]
        real_BL1 = grid.pad(torch.ones_like(text_Th[:, None, :1]), layout.text_index)[:, 0]
        kept = slice(-logits_to_keep if logits_to_keep else None, None)
        logits = self.language_model.lm_head(states_BLh[:, kept]) * real_BL1[:, kept]
        logits = pad(logits, (0, self.config.vocab_size - logits.shape[-1]))
        logits[..., self.config.image_token_id] = float("-inf")  # is never said
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        is_first_iteration: bool = False,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        return {
            **inputs,
            "pixel_values": pixel_values if is_first_iteration or not kwargs.get("use_cache", True) else None,
        }

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Beams and several samples per prompt: images go with their prompt, not one by one."""
        pixels = kwargs.pop("pixel_values", None)
        if pixels is not None and expand_size > 1 and input_ids is not None:
            tokens = self.vision.transform.num_tokens(pixels.shape[-1], pixels.shape[-2])
            counts = (input_ids.eq(self.config.image_token_id).sum(-1) // tokens).tolist()
            pixels = torch.cat([part.repeat(expand_size, 1, 1, 1) for part in pixels.split(counts)])
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs if pixels is None else {**kwargs, "pixel_values": pixels}
