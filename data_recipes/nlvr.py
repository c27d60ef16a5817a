"""NLVR: is a sentence true of a drawn picture of three boxes? True or false.

From: Suhr et al. 2017, github.com/lil-lab/nlvr. There, ``train/train.json`` has a JSON object a line (sentence, label, identifier,
directory) and ``train/images/DIRECTORY/train-IDENTIFIER-0.png`` to ``-5.png`` are its pictures, the boxes in six orders; ``dev`` and
``test`` likewise. Read here is a copy in LLaVA's form, of which there are two: with one picture (nlvr), or cut into its three boxes
(nlvr_boxes).
Licence: CC BY 4.0.

Below --root::

    train.json  val.json            lists of {"id", "image": path below images/ or a list of them, "conversations"}
    images/
"""

from lit_eemllm.data.sources import llava

SPLITS = ("train", "val")


def rows(root, split):
    return llava(root / f"{split}.json", images="images")
