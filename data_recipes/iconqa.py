"""IconQA: 107 k questions about abstract diagrams, in three kinds: choose an image, choose a text, fill in the blank.

From: iconqa_data.zip, see iconqa.github.io and lupantech/IconQA.
Licence: CC BY-NC-SA 4.0.

Below --root, the folder iconqa_data of the archive::

    problems.json                   {PID: {"question", "choices", "answer", "ques_type", "split", ...}}
    pid_splits.json                 {"choose_txt_train": [PID, ...], "fill_in_blank_val": ..., ...}
    iconqa/SPLIT/QUES_TYPE/PID/image.png, and for choose_img the choices, choice_0.png ...

The layout is what lupantech/IconQA reads (run_*/dataset.py, tools/generate_img_choice_feature.py).
"answer" is a text for fill_in_blank and else the number of a choice. How EE-MLLM words these questions is not published;
here choices are lettered as in LLaVA-1.5's multiple choice questions, images among them.
"""

from lit_eemllm.console import read_object
from lit_eemllm.data.sources import IMAGE, LETTER, SHORT, Question, each, letter, lettered

SPLITS = ("train", "val", "test")
KINDS = ("choose_txt", "choose_img", "fill_in_blank")


def rows(root, split):
    problems, pids = read_object(root / "problems.json"), read_object(root / "pid_splits.json")
    for kind in KINDS:

        def question(number, pid, kind=kind):
            problem = problems[pid]
            folder = f"iconqa/{problem['split']}/{kind}/{pid}"
            images, text, answer = [f"{folder}/image.png"], problem["question"], problem["answer"]
            if kind == "fill_in_blank":
                return Question(pid, text, str(answer), tuple(images), SHORT, type=kind)
            choices = problem["choices"]
            answer = letter(int(answer), choices)
            if kind == "choose_img":
                images += [f"{folder}/{name}" for name in choices]
                choices = [IMAGE] * len(choices)
            text = f"{text}\n{lettered(choices)}"
            shown = () if kind == "choose_img" else tuple(choices)
            return Question(pid, text, answer, tuple(images), LETTER, choices=shown, type=kind)

        yield from each(pids[f"{kind}_{split}"], question)
