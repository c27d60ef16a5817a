"""ShareGPT4V-PT: 1,246 k images with captions by ShareCaptioner, for pre-training.

From: share-captioner_coco_lcs_sam_1246k_1107.json of the dataset repository Lin-Chen/ShareGPT4V of the Hugging Face hub.
Licence and layout: those of data_recipes/sharegpt4v.py; the images are in coco/, llava/llava_pretrain/ and sam/ (000000 to
000050.tar of Segment Anything)::

    sharegpt4v/share-captioner_coco_lcs_sam_1246k_1107.json     a list of {"id", "image", "conversations"}
"""

from lit_eemllm.data.sources import llava

SPLITS = ("train",)


def rows(root, split):
    return llava(root / "sharegpt4v" / "share-captioner_coco_lcs_sam_1246k_1107.json")
