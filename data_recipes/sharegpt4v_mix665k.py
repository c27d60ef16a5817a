"""ShareGPT4V's instruction mixture: LLaVA-1.5's 665 k rows, 23 k of their captions exchanged for ShareGPT4V's.

From: sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json of the dataset repository Lin-Chen/ShareGPT4V.
Licence and layout: those of data_recipes/sharegpt4v.py and llava_v1_5_mix665k.py together, in one --root::

    sharegpt4v/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json       a list of {"id", "image", "conversations"}
    coco/train2017/  gqa/images/  ocr_vqa/images/  textvqa/train_images/  vg/VG_100K/  vg/VG_100K_2/  ...
"""

from lit_eemllm.data.sources import llava, with_suffix_on_disk

SPLITS = ("train",)


def rows(root, split):
    path = root / "sharegpt4v" / "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json"
    return with_suffix_on_disk(llava(path), root, "ocr_vqa/")
