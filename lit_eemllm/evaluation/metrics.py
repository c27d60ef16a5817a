"""Scores of generated answers, as torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def normalise(answer: str) -> str:
    """Case, surrounding white space and a final full stop do not count."""
    return " ".join(answer.lower().split()).removesuffix(".")


class ExactMatch(Metric):
    """Share of answers equal to the truth after `normalise`; 0 to 1."""

    correct: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, answers: list[str], truths: list[str]) -> None:
        self.correct += sum(normalise(a) == normalise(t) for a, t in zip(answers, truths, strict=True))
        self.total += len(truths)

    def compute(self) -> Tensor:
        return self.correct / self.total
