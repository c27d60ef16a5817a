"""easy-VQA: 48 k questions about 5,000 drawn images of one shape; 13 answers.

From: the package easy-vqa of the Python Package Index (`pip download easy-vqa`, a wheel is a zip archive), or vzhou842/easy-VQA.
Licence: MIT.

Below --root, the folder easy_vqa/data of the package::

    train/questions.json            a list of [question, answer, number of the image]
    train/images/0.png
    test/...

The release's test set is the val split here.
"""

from lit_eemllm.data.json_rows import read_json
from lit_eemllm.data.sources import SHORT, Question, each

SPLITS = ("train", "val")


def rows(root, split):
    part = "test" if split == "val" else split

    def question(number, record):
        text, answer, image = record
        return Question(f"{part}-{number}", text, answer, (f"{part}/images/{image}.png",), SHORT)

    return each(read_json(root / part / "questions.json"), question)
