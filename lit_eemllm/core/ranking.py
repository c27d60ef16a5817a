"""Which visual tokens of each image score highest; and scores by the attention that a few text rows pay them (FastV, PyramidDrop).

Importance of a visual token is the weight it gets in the layer's full attention, before anything is dropped there and with rotated
keys, summed over all heads and over the rows that rank. Scores are those of these rows only; gradients do not pass through them.

Legend of shapes, beside that of `lit_eemllm.layout`; here L are the keys of a document and n rows that rank:
    D documents with images    A rows that rank, of the document with most    G heads that share a key head    M A x G
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import SequenceLayout, Window, first_place, upload

ROWS = 64  # that rank at a time: bounds the memory of scores

Past = tuple[Tensor, Tensor, Tensor | None]
Near = tuple[Tensor, Window]
"""See `Ranking.most_attended`."""


def ranking_rows(layout: SequenceLayout, document: int, by: str) -> list[int]:
    """Text rows that rank a document's images, counted in the document; see `Top.by`."""
    text = layout.text_lengths[document]
    answers = layout.answers[document] if layout.answers else ()
    if by == "question" and answers:
        return [first - 1 for first, _ in answers if first]
    if by == "question":
        return [text - 1] if text else []
    answered = {row for first, end in answers for row in range(first, end)}
    return [row for row in range(text) if row not in answered]


@dataclass(frozen=True)
class Highest:
    """How many tokens of each image are taken, made on the CPU from lengths alone.

    Attributes:
        places_IL: place of each image's tokens among the scores; behind the last of them, where there is none.
        first_I1: index of each image's first token among all.
        stay: places in [I x L], tokens of each image by score, of those that are taken.
    """

    places_IL: Tensor
    first_I1: Tensor
    stay: Tensor

    @classmethod
    def of(cls, places: list[Tensor], scores: int, counts: list[int]) -> Highest:
        """Of images: the places of the tokens of each among so many scores, and how many are taken."""
        deepest, lengths = max(map(len, places)), torch.tensor([len(x) for x in places])
        stay = torch.cat([i * deepest + torch.arange(count) for i, count in enumerate(counts)])
        return cls(_stacked(places, deepest, scores), lengths.cumsum(0)[:, None] - lengths[:, None], stay)

    def to(self, device: torch.device) -> Highest:
        return Highest(**{name: upload(tensor, device) for name, tensor in vars(self).items()})

    def __call__(self, scores: Tensor) -> Tensor:
        """Indices of those that are taken, ascending, among the tokens of all images; of equal scores the first."""
        scores = torch.cat([scores.flatten(), scores.new_full((1,), float("-inf"))])
        order_IL = scores[self.places_IL].argsort(dim=1, descending=True, stable=True)
        return (order_IL + self.first_I1).flatten()[self.stay].sort().values


@dataclass(frozen=True)
class Ranking:
    """Who ranks what in a pack: indices made on the CPU from lengths alone, so that no length is read from a device.

    Attributes:
        rows_n: the text rows that rank.
        slots_DA, real_DA: place of each in n, and whether there is one.
        keys_DL: rows R of a layer that the document has, first its text.
        sees_DAL: whether a row that ranks sees a key.
        highest: from importance [D x L] to the tokens that stay.
        documents: those with images, among all.
    """

    rows_n: Tensor
    slots_DA: Tensor
    real_DA: Tensor
    keys_DL: Tensor
    sees_DAL: Tensor
    highest: Highest
    documents: Tensor

    @classmethod
    def of(cls, layout: SequenceLayout, by: str, lengths: list[int], stay: list[int]) -> Ranking:
        """For a layout with images: `lengths` tokens of each image are ranked, `stay` of them stay."""
        rows: list[Tensor] = []
        documents: list[int] = []
        images: list[tuple[int, Tensor]] = []
        slots, keys, sees = list[Tensor](), list[Tensor](), list[Tensor]()
        text = visual = image = 0
        for number, runs in enumerate(layout.documents):
            own = range(image, image + sum(run.visual for run in runs))
            length = layout.text_lengths[number]
            if own:
                ranking = torch.tensor(ranking_rows(layout, number, by), dtype=torch.long)
                before, starts = 0, []  # text before each image: its tokens are seen from that row on
                for run in runs:
                    starts += [before] * run.visual
                    before += 0 if run.visual else run.length
                tokens = torch.tensor([lengths[i] for i in own])
                first = torch.cat([torch.arange(length), torch.tensor(starts).repeat_interleave(tokens)])
                places = torch.split(torch.arange(length, len(first)), tokens.tolist())
                images += [(len(documents), part) for part in places]
                slots.append(torch.arange(len(ranking)) + sum(len(x) for x in rows))
                rows.append(ranking + text)
                total = layout.num_text + visual
                keys.append(torch.cat([torch.arange(length) + text, torch.arange(int(tokens.sum())) + total]))
                sees.append(first[None] <= ranking[:, None])
                visual += int(tokens.sum())
                documents.append(number)
            text, image = text + length, image + len(own)
        most, longest = max(map(len, slots)), max(map(len, keys))
        sees_DAL = torch.stack([pad(x, (0, longest - x.shape[1], 0, most - len(x))) for x in sees])
        sees_DAL[:, :, 0] |= ~sees_DAL.any(-1)  # a row that is none sees something, or its weights were no numbers
        device = layout.positions.device

        def there(tensor: Tensor) -> Tensor:
            return upload(tensor, device)

        return cls(
            rows_n=there(torch.cat(rows)),
            slots_DA=there(_stacked(slots, most, 0)),
            real_DA=there(torch.arange(most) < torch.tensor([[len(x)] for x in slots])),
            keys_DL=there(_stacked(keys, longest, 0)),
            sees_DAL=there(sees_DAL),
            highest=Highest.of([d * longest + part for d, part in images], len(keys) * longest, stay).to(device),
            documents=there(torch.tensor(documents)),
        )

    def most_attended(
        self, q_nNH: Tensor, k_RKH: Tensor, scale: float, past: Past | None = None, near: Near | None = None
    ) -> Tensor:
        """Indices of the visual tokens that stay, ascending, among those that are ranked.

        Args:
            q_nNH: rotated queries of `rows_n`.
            k_RKH: rotated keys of all text, then of the visual tokens that are ranked.
            scale: of the scores.
            past: cached rotated keys of earlier turns, a sequence a document, [B, K, L, H], which of them are no padding, and where there
                is a window their positions, [B, L].
            near: positions of all text and of the visual tokens that are ranked, and how far a row that ranks sees back.
        """
        with torch.autocast(k_RKH.device.type, enabled=False):
            return self.highest(self._importance(q_nNH.float(), k_RKH.float(), scale, past, near))

    def _importance(self, q_nNH: Tensor, k_RKH: Tensor, scale: float, past: Past | None, near: Near | None) -> Tensor:
        k_DKHL = k_RKH[self.keys_DL].permute(0, 2, 3, 1)
        length, heads = k_DKHL.shape[-1], k_DKHL.shape[1]
        sees_DAL, importance_DL = self.sees_DAL, k_DKHL.new_zeros(len(k_DKHL), length)
        place_DL = None if near is None else near[0][self.keys_DL]
        if past is not None:
            keys_BKLH, real_BL, place_BL = past
            k_DKHL = torch.cat([k_DKHL, keys_BKLH[self.documents].float().transpose(2, 3)], -1)
            real_DL = real_BL[self.documents]
            sees_DAL = torch.cat([sees_DAL, real_DL[:, None].expand(-1, sees_DAL.shape[1], -1)], -1)
            if place_DL is not None and place_BL is not None:
                place_DL = torch.cat([place_DL, place_BL[self.documents]], -1)
        if not len(q_nNH):  # documents of images alone
            return importance_DL
        if near is not None and place_DL is not None:
            first_DA = first_place(near[0][self.rows_n][self.slots_DA], near[1])
            sees_DAL = sees_DAL & ((first_DA[:, :, None] <= place_DL[:, None]) | ~self.real_DA[:, :, None])
        for start in range(0, self.slots_DA.shape[1], ROWS):
            some = slice(start, start + ROWS)
            q_DAKGH = torch.unflatten(q_nNH[self.slots_DA[:, some]], 2, (heads, -1))
            q_DKMH = q_DAKGH.permute(0, 2, 1, 3, 4).flatten(2, 3)
            scores_DKAGL = torch.unflatten(q_DKMH @ k_DKHL * scale, 2, (q_DAKGH.shape[1], -1))
            sees_D1A1L = sees_DAL[:, None, some, None]
            weights_DKAGL = scores_DKAGL.masked_fill(~sees_D1A1L, float("-inf")).softmax(-1)
            real_D1A11 = self.real_DA[:, None, some, None, None]
            importance_DL += (weights_DKAGL * real_D1A11).sum((1, 2, 3))[:, :length]
        return importance_DL


def _stacked(rows: list[Tensor], length: int, value: int) -> Tensor:
    return torch.stack([pad(x, (0, length - len(x)), value=value) for x in rows])
