"""A data source of your own, complete: a table of questions about pictures.

lit-eemllm shards make --import docs/my_source.py --source quiz --root quiz --out shards/quiz
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_eemllm.data.sources import SHORT, Question, each, register_source


@register_source("quiz", splits=("train", "val"))
def rows(root: Path, split: str) -> Iterator[Any]:
    """Below --root::

    train.csv    picture,question,answer
    val.csv
    pictures/
    """

    def question(number: int, record: dict[str, str]) -> Question:
        image = f"pictures/{record['picture']}"
        return Question(f"{split}-{number}", record["question"], record["answer"], (image,), SHORT)

    with (root / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        yield from each(csv.DictReader(file), question)
