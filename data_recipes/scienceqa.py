"""ScienceQA: 21 k multiple choice questions of school science, with and without an image.

From: github.com/lupantech/ScienceQA (tools/download.sh fetches the images).
Licence: CC BY-NC-SA 4.0.

Below --root, the folder data/scienceqa of that repository::

    problems.json                   {ID: {"question", "choices", "answer": number of a choice, "hint", "image", "subject", ...}}
    pid_splits.json                 {"train": [ID, ...], "val": ..., "test": ..., ...}
    images/train/ID/image.png       where "image" is not null; the same for val and test

The hint comes first, then the question and the choices as LLaVA-1.5 writes them, and the answer is a letter. Lecture and solution
are not used. `type` is the subject. (The copies in parquet on the hub are not read.)
"""

from lit_eemllm.console import read_object
from lit_eemllm.data.sources import LETTER, Question, each, letter, lettered

SPLITS = ("train", "val", "test")


def rows(root, split):
    problems, pids = read_object(root / "problems.json"), read_object(root / "pid_splits.json")

    def question(number, pid):
        problem = problems[pid]
        choices = tuple(problem["choices"])
        answer = letter(problem["answer"], choices)
        images = (f"images/{split}/{pid}/{problem['image']}",) if problem["image"] else ()
        text = "\n".join(filter(None, (problem["hint"], problem["question"], lettered(choices))))
        return Question(pid, text, answer, images, LETTER, choices=choices, type=problem["subject"])

    return each(pids[split], question)
