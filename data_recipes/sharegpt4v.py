"""ShareGPT4V: 102 k images with long captions by GPT-4V.

From: sharegpt4v_instruct_gpt4-vision_cap100k.json of the dataset repository Lin-Chen/ShareGPT4V of the Hugging Face hub; the
images as docs/Data.md of ShareGPT4Omni/ShareGPT4V says.
Licence: CC BY-NC 4.0, and OpenAI's terms of use; the images keep their own, the web ones are for academic use.

Below --root, the folder `data` of that page::

    sharegpt4v/sharegpt4v_instruct_gpt4-vision_cap100k.json     a list of {"id", "image", "conversations"}
    coco/train2017/  sam/images/  llava/llava_pretrain/images/  share_textvqa/images/
    web-celebrity/images/  web-landmark/images/  wikiart/images/

Image paths are relative to --root. The other two files are the sources sharegpt4v_pt and sharegpt4v_mix665k.
"""

from lit_eemllm.data.sources import llava

SPLITS = ("train",)


def rows(root, split):
    return llava(root / "sharegpt4v" / "sharegpt4v_instruct_gpt4-vision_cap100k.json")
