"""Grocery Store: photos of groceries, which product is it and what kind of food.

From: Klasson et al. 2019, github.com/marcusklasson/GroceryStoreDataset, rows in LLaVA's form; also its product descriptions as
text alone (grocery_text, which has no val.json: --splits train).
Licence: MIT.

Below --root::

    train.json  val.json            lists of {"id", "image": path below images/, "conversations": two questions}
    images/
"""

from lit_eemllm.data.sources import llava

SPLITS = ("train", "val")


def rows(root, split):
    return llava(root / f"{split}.json", images="images")
