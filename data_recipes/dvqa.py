"""DVQA: questions about drawn bar charts, made from templates.

From: github.com/kushalkafle/DVQA_dataset.
Licence: CC BY-NC 4.0.

Below --root::

    train_qa.json  val_easy_qa.json  val_hard_qa.json       lists of {"question", "question_id", "template_id", "answer",
                                                            "image": "bar_train_00200000.png", "answer_bbox"}
    images/bar_train_00200000.png

The validation split is both: `type` is easy or hard, then structure, data or reasoning. (The release's page calls template_id
"question_type"; the files have template_id.)
"""

from lit_eemllm.data.json_rows import read_json
from lit_eemllm.data.sources import SHORT, Question, each

SPLITS = ("train", "val")
PARTS = {"train": ("train",), "val": ("val_easy", "val_hard")}


def rows(root, split):
    for part in PARTS[split]:

        def question(number, record, part=part):
            kind = f"{part.removeprefix('val_')}-{record['template_id']}"
            name, image = f"{part}-{record['question_id']}", f"images/{record['image']}"
            return Question(name, record["question"], record["answer"], (image,), SHORT, type=kind)

        yield from each(read_json(root / f"{part}_qa.json"), question)
