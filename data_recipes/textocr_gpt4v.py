"""TextOCR-GPT4V: 25 k images of TextOCR with captions by GPT-4V that say what is written in them.

From: train.jsonl of the dataset repository jimmycarter/textocr-gpt4v of the Hugging Face hub; the images from textvqa.org
(train_val_images.zip of TextVQA and TextOCR).
Licence: CC BY-NC 4.0, and OpenAI's terms of use; the images keep those of Open Images.

Below --root::

    train.jsonl                     a line each: {"filename", "caption", "caption_image", "caption_text", "caption_condensed"}
    train_images/FILENAME

"caption" is what GPT-4V said, under the headings DESCRIPTION and TEXT; "caption_condensed" says the same in one piece and is
what is trained. The captions have no question; all rows ask the same (`DESCRIBE`). Both are our choice.
"""

from lit_eemllm.data.json_rows import read_json
from lit_eemllm.data.sources import Question, each
from lit_eemllm.inputs.rows import DESCRIBE

SPLITS = ("train",)


def rows(root, split):
    def question(number, record):
        image = record["filename"]
        return Question(image, DESCRIBE, record["caption_condensed"], (f"train_images/{image}",))

    return each(read_json(root / "train.jsonl"), question)
