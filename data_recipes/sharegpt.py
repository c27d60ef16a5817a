"""Conversations with chat models in ShareGPT's form. Text alone.

From: for example ShareGPT_V3_unfiltered_cleaned_split.json of anon8231489123/ShareGPT_Vicuna_unfiltered, or sg_90k_part1.json
and sg_90k_part2.json of RyokoAI/ShareGPT52K (CC0 1.0), dataset repositories of the Hugging Face hub.
Licence: that of the file.

Below --root::

    any number of .json and .jsonl files, each a list of {"id", "conversations": [{"from", "value"}, ...]}

"from" is human or user, gpt, chatgpt, bing, bard or assistant, or system. Turns are taken as they are: HTML, which raw dumps have,
is not made into text (FastChat's clean_sharegpt does), and long conversations are not split, but cut to `data.max_length` in
training. A first answer to nothing and a last question without answer are dropped, as FastChat does.
"""

from lit_eemllm.data.json_rows import read_json
from lit_eemllm.data.sources import each, mended

SPLITS = ("train",)
ROLES = dict.fromkeys(("human", "user"), "human") | {"system": "system"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant"), "gpt")


def rows(root, split):
    def row(number, record):
        turns = [{"from": ROLES[turn["from"]], "value": turn["value"]} for turn in record["conversations"]]
        return mended({"id": record["id"], "conversations": turns})

    paths = sorted(path for path in root.iterdir() if path.suffix in (".json", ".jsonl"))
    if not paths:
        raise FileNotFoundError(2, "not there", str(root / "*.json"))
    for path in paths:
        yield from each(read_json(path), row)
