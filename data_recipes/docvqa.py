"""DocVQA (single pages): 50 k questions about scanned pages.

From: rrc.cvc.uab.es, "Document Visual Question Answering", task 1 (after registration).
Licence: the terms of that site; the files state none.

Below --root, the archives unpacked::

    spdocvqa_qas/train_v1.0_withQT.json     {"data": [{"questionId", "question", "answers": [...], "image":
    spdocvqa_qas/val_v1.0_withQT.json       "documents/xnbl0037_1.png", "docId", ...}, ...]}
    spdocvqa_images/xnbl0037_1.png          what the rows call documents/
    the test questions have no answers, so there is no test split here

The first answer is trained; all are in the row's "answers". The metric is ANLS.
"""

from lit_eemllm.data.json_rows import read_json
from lit_eemllm.data.sources import SHORT, Question, each

SPLITS = ("train", "val")


def rows(root, split):
    def question(number, record):
        image = "spdocvqa_images/" + record["image"].removeprefix("documents/")
        name, answers = f"{split}-{record['questionId']}", tuple(record["answers"])
        return Question(name, record["question"], answers[0], (image,), SHORT, answers, metric="anls")

    return each(read_json(root / "spdocvqa_qas" / f"{split}_v1.0_withQT.json", "data"), question)
