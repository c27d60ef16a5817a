"""LLaVA-1.5's instruction mixture: 665 k conversations over COCO, GQA, OCR-VQA, TextVQA and Visual Genome, and text alone.

From: llava_v1_5_mix665k.json of the dataset repository liuhaotian/LLaVA-Instruct-150K of the Hugging Face hub; the images from
their own sites, see "Visual Instruction Tuning" in the README of haotian-liu/LLaVA.
Licence: CC BY 4.0, and OpenAI's terms of use for what GPT-4 wrote; the images keep their own.

Below --root, as that README lays it out::

    llava_v1_5_mix665k.json         a list of {"id", "image": "coco/train2017/000000033471.jpg", "conversations": [...]};
                                    rows of text alone (40,688, from ShareGPT) have "model" and no "image"
    coco/train2017/                 364,100 rows
    gqa/images/                      72,140
    ocr_vqa/images/                  80,000; the file calls every image .jpg, the download script keeps .png and .gif
    textvqa/train_images/            21,953
    vg/VG_100K/, vg/VG_100K_2/       86,417

Questions with short answers carry LLaVA's format prompt already, in the first turn of a conversation alone.
"""

from lit_eemllm.data.sources import llava, with_suffix_on_disk

SPLITS = ("train",)


def rows(root, split):
    return with_suffix_on_disk(llava(root / "llava_v1_5_mix665k.json"), root, "ocr_vqa/")
