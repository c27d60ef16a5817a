"""NLVR: is a sentence true of a drawn picture of three boxes? True or false.

From: Suhr et al. 2017, github.com/lil-lab/nlvr, rows in LLaVA's form; with one picture (nlvr) or cut into three (nlvr_boxes).
Licence: CC BY 4.0.

Below --root::

    train.json  val.json            lists of {"id", "image": path below images/ or a list of them, "conversations"}
    images/
"""

from lit_eemllm.data.sources import llava

SPLITS = ("train", "val")


def rows(root, split):
    return llava(root / f"{split}.json", images="images")
