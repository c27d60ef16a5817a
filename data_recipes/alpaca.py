"""Alpaca: 52 k instructions with answers by text-davinci-003. Text alone.

From: alpaca_data.json of tatsu-lab/stanford_alpaca; many other sets have its form.
Licence: CC BY-NC 4.0.

Below --root::

    alpaca_data.json                a list of {"instruction", "input": may be "", "output"}

The human turn is the instruction, an empty line, and the input. Alpaca's own preamble ("Below is an instruction ...") is left
to the chat template.
"""

from lit_eemllm.data.json_rows import read_json
from lit_eemllm.data.sources import Question, each

SPLITS = ("train",)


def rows(root, split):
    def question(number, record):
        text = "\n\n".join(filter(None, (record["instruction"].strip(), record["input"].strip())))
        return Question(f"alpaca-{number}", text, record["output"])

    return each(read_json(root / "alpaca_data.json"), question)
