"""CLEVR: questions about rendered scenes of simple objects, made by programs.

From: cs.stanford.edu/people/jcjohns/clevr, CLEVR_v1.0.zip.
Licence: CC BY 4.0.

Below --root, the folder CLEVR_v1.0 of the archive::

    questions/CLEVR_train_questions.json    {"info", "questions": [{"question", "answer", "image_filename", "program", ...}]}
    images/train/CLEVR_train_000000.png
    the same for val; the test questions have no answers, so there is no test split here

Files are as question_generation/generate_questions.py of facebookresearch/clevr-dataset-gen writes them, programs as iep/programs.py
of facebookresearch/clevr-iep reads them. `type` is the last function of a question's program: count, exist, query_color ...
"""

from lit_eemllm.data.json_rows import read_json
from lit_eemllm.data.sources import SHORT, Question, each

SPLITS = ("train", "val")


def rows(root, split):
    def question(number, record):
        image = f"images/{split}/{record['image_filename']}"
        kind = record["program"][-1]["function"]
        return Question(f"{split}-{number}", record["question"], record["answer"], (image,), SHORT, type=kind)

    return each(read_json(root / "questions" / f"CLEVR_{split}_questions.json", "questions"), question)
