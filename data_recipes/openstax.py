"""OpenStax figures: pictures of open textbooks with the alternative text that people wrote for them.

From: the figures and their alternative texts of twelve OpenStax books, gathered in LLaVA's form.
Licence: CC BY 4.0, © Rice University; access for free at openstax.org.

Below --root::

    train.json  val.json            lists of {"id", "image": path below images/, "conversations"}
    images/
"""

from lit_eemllm.data.sources import llava

SPLITS = ("train", "val")


def rows(root, split):
    return llava(root / f"{split}.json", images="images")
