"""Batches of transformers' and TRL's trainers: padded ids and labels, which become packs and go the way of every training.

Legend of shapes in `lit_eemllm.layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from ..core.select import Top
from ..layout import Pixels, SequenceLayout, stretches, upload
from .cache import CachedPass, layout_of_padded
from .packed import Packed


class Padded(Packed):
    """Trains with labels, [B, L], -100 where a token is not to be said."""

    accepts_loss_kwargs = True  # the Trainer tells how many labels a whole optimiser step has
    supports_gradient_checkpointing = True

    @property
    def gradient_checkpointing(self) -> bool:
        """transformers' name of `activation_checkpointing`, which its trainers set."""
        return self.activation_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.activation_checkpointing = value

    def with_loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None,
        pixels: Pixels | None,
        sizes: Sequence[tuple[int, int]],
        count: Tensor | int | None,
    ) -> CausalLMOutputWithPast:
        """The mean loss of the labels that count (`targets_of_padded`), and all logits; other arguments as of `forward`.

        count: what the sum is divided by, if not the number of these labels.
        """
        text_Th, states_BLh, rows_n, targets_n = self._states(input_ids, attention_mask, pixels, sizes, labels)
        loss = self.loss_of(text_Th[rows_n], targets_n) / (max(1, len(targets_n)) if count is None else count)
        return CausalLMOutputWithPast(loss=loss, logits=self.language_model.lm_head(states_BLh))

    def last_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Pixels | None = None,
        image_sizes: Sequence[tuple[int, int]] = (),
        use_cache: bool = False,
    ) -> BaseModelOutput:
        """The last hidden states [B, L, h] of padded ids, zero at padding and at image tokens; arguments as of `forward`.

        Raises:
            ValueError: a layer ranks visual tokens by the text before the answers, and where those are is not said.
        """
        if any(isinstance(row.tokens, Top) and not row.tokens.by_encoder for row in self.table):
            raise ValueError(
                "this mechanism ranks visual tokens by the text before the answers, which labels tell, and TRL's trainers do not hand "
                "them on: train with transformers.Trainer, or with lit-eemllm fit"
            )
        no_labels = torch.full_like(input_ids, -100)
        _, states_BLh, _, _ = self._states(input_ids, attention_mask, pixel_values, image_sizes, no_labels)
        return BaseModelOutput(last_hidden_state=states_BLh)

    @property
    def base_model(self) -> Any:
        """What TRL's trainers call for hidden states, of which they compute the loss by themselves."""
        return self.last_states

    def _states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixels: Pixels | None,
        sizes: Sequence[tuple[int, int]],
        labels: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The last hidden states of the text, [T, h], the same in columns, [B, L, h], and of what counts among the labels the rows that
        predict it and the ids, [n]."""
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        image = self.config.image_token_id
        visual_BL, real_BL, labels_BL = torch.stack([input_ids == image, mask_BL.bool(), labels]).cpu()  # the one wait
        visual_BL, real_BL = visual_BL.bool(), real_BL.bool()
        lengths = [] if pixels is None else list(chain(*self._image_runs(pixels, sizes)))
        layout, rows_n, targets_n = targets_of_padded(visual_BL, real_BL, labels_BL, lengths)
        layout = layout.to(input_ids.device)
        rows_n, targets_n = (upload(x, input_ids.device) for x in (rows_n, targets_n))
        grid = CachedPass(None, mask_BL, real_BL).grid("all", [])
        ids_S = input_ids.flatten() if grid.slots_R is None else input_ids.flatten()[grid.slots_R]
        text_Th = self._text_states(ids_S, pixels, layout, sizes=sizes if pixels is not None else ())
        return text_Th, grid.pad(text_Th[:, None], layout.text_index)[:, 0], rows_n, targets_n


def targets_of_padded(
    visual_BL: Tensor, real_BL: Tensor, labels_BL: Tensor, image_lengths: list[int]
) -> tuple[SequenceLayout, Tensor, Tensor]:
    """The layout of padded ids with its answers, and `PackedBatch.target_rows` and `PackedBatch.targets`; all on the CPU.

    A label counts where it and the token before it are text: nothing is predicted from an image, and none is said.
    """
    text_BL = real_BL & ~visual_BL
    row_BL = (text_BL.flatten().cumsum(0) - 1).view_as(text_BL)
    said_BL = (labels_BL[:, 1:] != -100) & text_BL[:, 1:] & text_BL[:, :-1]
    before_B = text_BL.sum(1).cumsum(0) - text_BL.sum(1)
    answers = [
        stretches((row_L[1:][said_L] - before).tolist())
        for row_L, said_L, before in zip(row_BL, said_BL, before_B, strict=True)
    ]
    layout = replace(layout_of_padded(visual_BL, real_BL, image_lengths), answers=tuple(answers))
    return layout, row_BL[:, :-1][said_BL], labels_BL[:, 1:][said_BL]
