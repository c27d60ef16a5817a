"""PlotQA: questions about 224 k plots of data from the world: bars, lines, dots.

From: PlotQA_Dataset.md of NiteshMethani/PlotQA. V1 (8.2 M questions); V2, 29 M, has the same form.
Licence: CC BY 4.0.

Below --root::

    train/png/0.png                 images by number
    train/qa_pairs_V1.json          {"qa_pairs": [{"image_index", "question_string", "answer", "type", ...}, ...]}
    val/...  test/...

The release's page calls the file a list; other readers of it find the list under "qa_pairs". Both are read. `type` is the kind
of plot. Answers are texts or numbers; the metric is relaxed accuracy.
"""

from lit_eemllm.data.json_rows import read_json
from lit_eemllm.data.sources import SHORT, Question, each

SPLITS = ("train", "val", "test")


def rows(root, split):
    def question(number, record):
        text, answer = record["question_string"], record["answer"]
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise TypeError(f"'answer' is {answer!r}, expected a text or a number")
        image = f"{split}/png/{record['image_index']}.png"
        kind, metric = record["type"], "relaxed_accuracy"
        return Question(f"{split}-{number}", text, str(answer), (image,), SHORT, type=kind, metric=metric)

    return each(read_json(root / split / "qa_pairs_V1.json", "qa_pairs"), question)
