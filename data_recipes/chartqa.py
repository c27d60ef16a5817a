"""ChartQA: 33 k questions about charts of the web, by people and by a machine (28,299 train, 1,920 val, 2,500 test).

From: github.com/vis-nlp/ChartQA, or the dataset repository ahmed-masry/ChartQA of the Hugging Face hub.
Licence: GPL 3.0; the charts keep those of their sites.

Below --root, the folder "ChartQA Dataset"::

    train/train_human.json          lists of {"imgname": "41699051005347.png", "query", "label"}
    train/train_augmented.json
    train/png/41699051005347.png
    val/...  test/...

`type` is human or augmented, which the benchmark scores apart and averages. The metric is relaxed accuracy.
"""

from lit_eemllm.data.json_rows import read_json
from lit_eemllm.data.sources import SHORT, Question, each

SPLITS = ("train", "val", "test")


def rows(root, split):
    for kind in ("human", "augmented"):

        def question(number, record, kind=kind):
            image = f"{split}/png/{record['imgname']}"
            name, text, answer = f"{split}-{kind}-{number}", record["query"], record["label"]
            return Question(name, text, answer, (image,), SHORT, type=kind, metric="relaxed_accuracy")

        yield from each(read_json(root / split / f"{split}_{kind}.json"), question)
