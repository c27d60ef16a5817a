"""LVIS-Instruct4V: 220 k conversations and captions by GPT-4V over COCO images with LVIS boxes.

From: lvis_instruct4v_220k.json of the dataset repository X2FD/LVIS-Instruct4V of the Hugging Face hub.
Licence: none was found on its card; OpenAI's terms of use apply to what GPT-4V wrote, COCO's to the images.

Below --root, as for LLaVA-1.5, with COCO's val2017 besides (LVIS divides COCO in its own way)::

    lvis_instruct4v_220k.json       a list of {"id", "image": "coco/train2017/....jpg", "conversations": [...]}
    coco/train2017/  coco/val2017/
"""

from lit_eemllm.data.sources import llava

SPLITS = ("train",)


def rows(root, split):
    return llava(root / "lvis_instruct4v_220k.json")
