"""LAION/CC/SBU, 558 k images with BLIP captions: the pre-training set of LLaVA-1.5 and EE-MLLM.

From: the dataset repository liuhaotian/LLaVA-Pretrain of the Hugging Face hub.
Licence: "other" on its card; the images keep the terms of LAION, CC-3M and SBU, the captions those of BLIP.

Below --root, as it comes, with images.zip unpacked into images/::

    blip_laion_cc_sbu_558k.json     a list of {"id", "image": "00453/004539375.jpg", "conversations": one human, one gpt turn}
    images/00453/004539375.jpg
"""

from lit_eemllm.data.sources import llava

SPLITS = ("train",)


def rows(root, split):
    return llava(root / "blip_laion_cc_sbu_558k.json", images="images")
