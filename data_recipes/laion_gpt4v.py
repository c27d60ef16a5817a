"""LAION GPT-4V: images of the web with long captions by GPT-4V.

From: the dataset repository laion/gpt4v-dataset of the Hugging Face hub.
Licence: CC0 1.0 for the captions; OpenAI's terms of use apply; the images are their owners'.

The release is a parquet file of links ("link", "caption"), not of images. They are fetched with img2dataset, LAION's own tool,
which puts link and caption beside each image::

    img2dataset --url_list gpt4v-dataset/data --input_format parquet --url_col link --caption_col caption \\
        --resize_mode no --output_format files --output_folder ROOT

Below --root, then::

    00000/000000000.jpg             the image
    00000/000000000.json            {"url", "caption", "key", "status": "success", ...}
    00000_stats.json                {"failed_to_download", "failed_to_resize", ...}: counted as dropped

as the README of rom1504/img2dataset says. A link whose image is gone is a dropped row. The captions have no question; all rows ask
the same (`DESCRIBE`), our choice.
"""

from lit_eemllm.console import read_object
from lit_eemllm.data.sources import Question, each
from lit_eemllm.errors import SampleError
from lit_eemllm.inputs.rows import DESCRIBE

SPLITS = ("train",)


def rows(root, split):
    def question(number, path):
        record = read_object(path)
        return Question(record["key"], DESCRIBE, record["caption"], (f"{path.parent.name}/{path.stem}.jpg",))

    stats = sorted(root.glob("*_stats.json"))
    if not stats:
        raise FileNotFoundError(2, "not there", str(root / "00000_stats.json"))
    for path in stats:
        counts = read_object(path)
        for reason in ("failed_to_download", "failed_to_resize"):
            yield from [SampleError(reason, f"{path}: img2dataset has no image")] * int(counts.get(reason, 0))
        yield from each(sorted((root / path.name.removesuffix("_stats.json")).glob("*.json")), question)
