"""Localized Narratives: spoken descriptions of 849 k images of Open Images, COCO, Flickr30k and ADE20K, transcribed.

From: google.github.io/localized-narratives (the full narratives, JSON lines).
Licence: CC BY 4.0 for the annotations; the images keep their own.

Below --root, any of the files under the names they have there, beside the images that they describe::

    open_images_train_v6_localized_narratives-00000-of-00010.jsonl ...      open_images/train/IMAGE_ID.jpg
    coco_train_localized_narratives-00000-of-00004.jsonl ...                coco/train2017/, twelve digits .jpg
    flickr30k_train_localized_narratives.jsonl                              flickr30k/flickr30k-images/IMAGE_ID.jpg
    ade20k_train_localized_narratives.jsonl                                 ade20k/images/training/IMAGE_ID.jpg
    and those of the validation and test sets (open_images_validation_..., coco_val_..., open_images_test_...)

Each line has "image_id" and "caption" (and "dataset_id", "annotator_id", timings and traces, which are not used). The names of the
files and their fields are those of localized_narratives.py and index.html of google/localized-narratives. The folders of images are
ours, below them those of the images' own releases (flickr30k-images, and ADEChallengeData2016's images/training and
images/validation); an image is called as its "image_id", COCO's filled up to twelve digits, as the loaders of facebook/pmd, a
dataset of the Hugging Face hub, look for it: 000002b66c9c498e, 137576, 1000092795, ADE_train_00000001. Some images have several
narratives: a row each. The narratives answer no question; all rows ask the same (`DESCRIBE`), our choice.
"""

from lit_eemllm.data.json_rows import read_json
from lit_eemllm.data.sources import Question, each
from lit_eemllm.inputs.rows import DESCRIBE

SPLITS = ("train", "val", "test")
FILES = {
    "train": {
        "open_images_train_v6_localized_narratives*.jsonl": "open_images/train/{}.jpg",
        "coco_train_localized_narratives*.jsonl": "coco/train2017/{:0>12}.jpg",
        "flickr30k_train_localized_narratives.jsonl": "flickr30k/flickr30k-images/{}.jpg",
        "ade20k_train_localized_narratives.jsonl": "ade20k/images/training/{}.jpg",
    },
    "val": {
        "open_images_validation_localized_narratives.jsonl": "open_images/validation/{}.jpg",
        "coco_val_localized_narratives.jsonl": "coco/val2017/{:0>12}.jpg",
        "flickr30k_val_localized_narratives.jsonl": "flickr30k/flickr30k-images/{}.jpg",
        "ade20k_validation_localized_narratives.jsonl": "ade20k/images/validation/{}.jpg",
    },
    "test": {
        "open_images_test_localized_narratives.jsonl": "open_images/test/{}.jpg",
        "flickr30k_test_localized_narratives.jsonl": "flickr30k/flickr30k-images/{}.jpg",
    },
}


def rows(root, split):
    found = [(path, image) for name, image in FILES[split].items() for path in sorted(root.glob(name))]
    if not found:
        raise FileNotFoundError(2, "not there", str(root / next(iter(FILES[split]))))
    for path, image in found:
        prefix = path.name.partition("_localized")[0]

        def question(number, record, image=image, prefix=prefix):
            path = image.format(record["image_id"])
            return Question(f"{prefix}/{record['image_id']}", DESCRIBE, record["caption"], (path,))

        yield from each(read_json(path), question)
