"""EEMLLM as a transformers model: packs for training, left-padded ids with a KV cache for `generate`.

The decoder is an ordinary causal LM of transformers under its own weight names; legend of shapes in `lit_eemllm.layout`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from inspect import signature
from itertools import chain
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cache,
    GenerationMixin,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..compat.transformers import CACHE, Generating
from ..core.select import Top
from ..layout import Pixels, take_images
from ..mechanisms import Connector, Mechanism
from ..mechanisms.connectors import DEFAULT
from .cache import CachedPass, StreamCache, layout_of_padded, one_token_each
from .configuration import EEMLLMConfig, load_decoder_config
from .folders import HUB, MODEL_FILES, opened
from .padded import Padded
from .pretrained import load_weighted, refuse_missing, take_over
from .steps import ROOM, Replay, StepPass
from .vision import VisionEncoder


class EEMLLM(Padded, Generating, GenerationMixin):  # which transformers wants to see by name
    """A multimodal LLM whose treatment of visual tokens is a `Mechanism`; made by `from_parts` or `from_pretrained`."""

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str], *args: Any, **options: Any) -> Any:
        """As transformers' own, but it reads only what `opened` allows: no code, adapters or pickle. `path`: folder or hub id.

        Args:
            options: those in `HUB` say which files are read, the others are transformers'.

        Raises:
            ConfigError: the folder does not hold an EEMLLM, or is broken.
            CheckpointError: weights are missing or broken.
        """
        hub = {name: options.pop(name) for name in HUB & options.keys()}
        with opened(str(path), "EEMLLM.from_pretrained", cls.__name__, MODEL_FILES, weights=True, **hub) as folder:
            told = {**options, "use_safetensors": True, "output_loading_info": True}
            model, info = super().from_pretrained(str(folder), *args, **told)
        refuse_missing(model, info, "EEMLLM.from_pretrained", str(path))
        model.name_or_path = model.config.name_or_path = str(path)  # not the folder that is gone
        return (model, info) if options.get("output_loading_info") else model

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
        connector: Connector = DEFAULT,
    ) -> EEMLLM:
        """Join pretrained parts with a randomly initialised projector (seed torch before).

        Args:
            decoder: folder or hub id of a causal LM, or folder of an EEMLLM that has one; safetensors only.
            encoder: registered name of the vision encoder.
            vision: that encoder, with its weights.
            mechanism: how visual tokens are treated.
            image_token_id: see `EEMLLMConfig`.
            quantization: of the decoder's linear layers, as transformers takes it.
            weights: the decoder's, if not those in its folder.
            connector: what makes visual tokens of the encoder's features.
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
            connector=connector.to_dict(),
        )
        return cls(config, language_model, vision)

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
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits for left-padded ids in which every image is its `image_token_id`, repeated once per visual token.

        Args:
            input_ids: [B, L], the new ids.
            attention_mask: [B, past + L], 0 at padding.
            pixel_values: [I, 3, height, width], the images of the new ids in order; a tensor each where they differ in shape.
            cache: of the earlier ids, as this method returned it; appended to.
            logits_to_keep: only the last so many columns; 0 keeps all.
            image_sizes: original (width, height) of each image, unlike transformers, which has the height first; needed where
                images differ in size.
            past_key_values: what transformers before 5.24 calls `cache`.
            labels: [B, L], to train; ids may then be padded on either side, there is no cache, and logits are the decoder's own. A label
                counts that is not -100, no image token, and right behind text.
            num_items_in_batch: labels of the optimiser step, by which the sum of the losses is divided; default: those that count here.

        Returns:
            logits [B, kept, vocab_size], zero at padding and at image tokens: nothing is predicted from an image row.
            The image token has the logit -inf. With labels also the loss.
        """
        if labels is not None:
            return self.with_loss(input_ids, labels, attention_mask, pixel_values, image_sizes, num_items_in_batch)
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
        tops = [row.tokens for row in self.table if isinstance(row.tokens, Top)]
        if cache is None and pixel_values is not None and not all(top.by_encoder for top in tops):
            raise ValueError(
                "which visual tokens are dropped is decided once, for a prompt whose keys are kept: use_cache=True"
            )
        new_BL = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask[:, past:]
        if past and input_ids.shape[1] == 1 and pixel_values is None and not torch.is_grad_enabled():
            assert cache is not None
            return CausalLMOutputWithPast(logits=self._next(input_ids, new_BL, cache), **{CACHE: cache})
        if cache is not None:
            cache.settle()
        runs = [] if pixel_values is None else self._image_runs(pixel_values, image_sizes)
        # the one time that a prompt is read from the device: lengths are needed on the CPU
        visual_BL, real_BL = torch.stack([input_ids == self.config.image_token_id, new_BL.bool()]).cpu()
        layout = layout_of_padded(visual_BL, real_BL, list(chain(*runs))).to(input_ids.device)
        cached = CachedPass(cache, new_BL, real_BL)
        grid = cached.grid("all", [])
        ids_S = input_ids.flatten() if grid.slots_R is None else input_ids.flatten()[grid.slots_R]
        text_Th = self._text_states(
            ids_S, pixel_values, layout, cached, image_sizes if pixel_values is not None else ()
        )
        states_BLh = grid.pad(text_Th[:, None], layout.text_index)[:, 0]
        real_BL1 = grid.pad(torch.ones_like(text_Th[:, None, :1]), layout.text_index)[:, 0]
        kept = slice(-logits_to_keep if logits_to_keep else None, None)
        logits = self._scores(states_BLh[:, kept], real_BL1[:, kept])
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})

    def _scores(self, states_BLh: Tensor, real_BL1: Tensor | None = None) -> Tensor:
        """Logits of last hidden states; zero where `real_BL1` is."""
        logits = self.language_model.lm_head(states_BLh)
        logits = logits if real_BL1 is None else logits * real_BL1
        logits = pad(logits, (0, self.config.vocab_size - logits.shape[-1]))
        logits[..., self.config.image_token_id] = float("-inf")  # is never said
        return logits

    def _next(self, ids_B1: Tensor, new_B1: Tensor, cache: StreamCache) -> Tensor:
        """Logits after one new token for each sequence, [B, 1, vocab_size]: eagerly, or as it was recorded, see `record_steps`."""
        first = not cache.room
        if first:
            cache.make_room(ROOM)

        def step(ids_B1: Tensor, new_B1: Tensor) -> Tensor:
            layout = one_token_each(len(ids_B1), ids_B1.device)
            logits = self._scores(self._text_states(ids_B1[:, 0], None, layout, StepPass(cache, new_B1))[:, None])
            assert cache.room_1 is not None
            cache.room_1.sub_(1)
            return logits

        if self.record_steps and not first and not cache.grows and cache.replay is None:
            cache.replay = Replay(step, ids_B1, new_B1)
        logits = (step if cache.replay is None else cache.replay)(ids_B1, new_B1)
        cache.columns, cache.room = cache.columns + 1, cache.room - 1
        return logits

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
        inputs = {name: inputs[name] for name in inputs if name in _arguments(type(self))}  # no tokenizer
        again = is_first_iteration or not kwargs.get("use_cache", True)
        return {**inputs, "pixel_values": pixel_values if again else None, "image_sizes": image_sizes}

    def repeated_images(self, times: int, input_ids: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """Beams and several samples per prompt: images go with their prompt, not one by one."""
        pixels, sizes = options.pop("pixel_values", None), options.pop("image_sizes", ())
        if pixels is None:
            return {}
        if times > 1:
            lengths, chosen, image = list(map(sum, self._image_runs(pixels, sizes))), [], 0
            for tokens in input_ids.eq(self.config.image_token_id).sum(-1).tolist():
                first = image
                while tokens > 0 and image < len(lengths):
                    tokens, image = tokens - lengths[image], image + 1
                chosen += [*range(first, image)] * times
            pixels, sizes = take_images(pixels, chosen), [sizes[i] for i in chosen] if sizes else sizes
        return {"pixel_values": pixels, "image_sizes": sizes}


AutoModelForImageTextToText.register(EEMLLMConfig, EEMLLM)


@cache
def _arguments(model: type[EEMLLM]) -> frozenset[str]:
    """Names that `forward` takes."""
    return frozenset(signature(model.forward).parameters)
