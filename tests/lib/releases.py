"""Published sets in miniature, as they are released, and what each must become."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards_util import picture

from lit_eemllm.data.sources import SHORT

RELEASES: dict[str, Callable[[Path], dict[str, Any]]] = {}
"""By source: writes a miniature below a folder, returns what `convert` must make of it."""


def release(build: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    RELEASES[build.__name__] = build
    return build


def pictures(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number, "JPEG" if name.endswith(".jpg") else "PNG"))


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content), encoding="utf-8")


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def said(row: dict[str, Any]) -> list[str]:
    assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(row["conversations"]) // 2)
    return [turn["value"] for turn in row["conversations"]]


@release
def blip_laion_cc_sbu_558k(root: Path) -> dict[str, Any]:
    pictures(root, "images/00453/004539375.jpg")
    (root / "images/00453/cut.jpg").write_bytes(picture(1, "JPEG")[:60])
    row = {"id": "004539375", "image": "00453/004539375.jpg"}
    row["conversations"] = turns("Render a clear and concise summary of the photo.\n<image>", "select luxury furniture")
    write(root / "blip_laion_cc_sbu_558k.json", [
        row, {**row, "image": "00453/000000000.jpg"}, {**row, "image": "00453/cut.jpg"}, {**row, "image": "../x.jpg"},
        {"id": "1", "image": row["image"]}, "no row", {**row, "conversations": turns("<image>", " ")}])  # fmt: skip
    first = ["<image>\nRender a clear and concise summary of the photo.", "select luxury furniture"]
    bad = {"missing_image": 1, "bad_image": 1, "path_escape": 1, "bad_record": 2, "no_target": 1}
    return {"good": {"train": 1}, "bad": bad, "said": {"train": [first]}}


@release
def llava_v1_5_mix665k(root: Path, file: str = "llava_v1_5_mix665k.json") -> dict[str, Any]:
    pictures(root, "coco/train2017/000000033471.jpg", "gqa/images/2354786.jpg", "ocr_vqa/images/140031996X.jpg",
             "textvqa/train_images/011e7e629fb9ae7b.jpg", "vg/VG_100K_2/2.jpg", "vg/VG_100K/3.jpg")  # fmt: skip
    (root / "ocr_vqa/images/1.gif").write_bytes(b"GIF89a")
    (root / "ocr_vqa/images/2.png").write_bytes(picture(2))
    (root / "vg/VG_100K_2/empty.jpg").write_bytes(b"")
    book = turns("<image>\nWho is the author of this book?\nAnswer the question using a single word or phrase.",
                 "H. Jackson Brown", "What is the title of this book?", "Life's Little Instruction Book")  # fmt: skip
    seen = turns("What are the colors of the bus in the image?\n<image>", "The bus is white and red.", "Why?", "It is.")
    text = {"id": "wgByO4Y_0", "model": ""}
    write(root / file, [
        {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": seen},
        {"id": "140031996X", "image": "ocr_vqa/images/140031996X.jpg", "conversations": book},
        {"id": "2", "image": "ocr_vqa/images/2.jpg", "conversations": book},  # a .png on disk
        {"id": "1", "image": "ocr_vqa/images/1.jpg", "conversations": book},  # a .gif, and broken
        {"id": "0", "image": "ocr_vqa/images/0.jpg", "conversations": book},  # nowhere
            {"id": "3", "image": "ocr_vqa/images/" + "x" * 5000 + ".jpg", "conversations": book},  # no file can
        {"id": "2354786", "image": "gqa/images/2354786.jpg", "conversations": book},
        {"id": "011e", "image": "textvqa/train_images/011e7e629fb9ae7b.jpg", "conversations": book},
        {"id": "VG_2", "image": "vg/VG_100K_2/2.jpg", "conversations": turns("Where?\\n<image>", "There.")},
        {"id": "VG_3", "image": "vg/VG_100K/3.jpg", "conversations": turns("Where?", "There.")},  # no placeholder
        {"id": "VG_4", "image": "vg/VG_100K_2/empty.jpg", "conversations": book},
        {**text, "conversations": turns("Hi", "Hello", "Bye")},
        {**text, "conversations": [{"from": "gpt", "value": "As I said"}, *turns("Go on", "Well")]},
        {**text, "conversations": turns("What does <image> mean in HTML?", "Nothing.")},
        {**text, "conversations": [{"from": "gpt", "value": "As I said"}]},
        {**text, "conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}]},
    ])  # fmt: skip
    first = ["<image>\nWhat are the colors of the bus in the image?", "The bus is white and red.", "Why?", "It is."]
    told = [first, [turn["value"] for turn in book]]
    bad = {"bad_image": 2, "missing_image": 2, "placeholder_mismatch": 2, "bad_conversation": 1, "bad_record": 1}
    fixed = {"leading_answer": 1, "trailing_question": 1, "escaped_newline": 1, "other_suffix": 1}
    return {"good": {"train": 8}, "bad": bad, "mended": fixed, "said": {"train": told}}


@release
def sharegpt4v_mix665k(root: Path) -> dict[str, Any]:
    return llava_v1_5_mix665k(root, "sharegpt4v/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json")


@release
def sharegpt4v(root: Path, file: str = "sharegpt4v_instruct_gpt4-vision_cap100k.json") -> dict[str, Any]:
    names = ("coco/train2017/000000000009.jpg", "sam/images/sa_545504.jpg", "wikiart/images/a_b.jpg",
             "llava/llava_pretrain/images/00007/000077797.jpg", "share_textvqa/images/00a1.jpg")  # fmt: skip
    pictures(root, *names)
    asked = turns(
        "What do you see happening in this image?\n<image>", "In the center of the image, a vibrant blue tray"
    )
    rows = [
        {"id": Path(name).stem, "image": name, "conversations": asked}
        for name in (*names, "web-celebrity/images/x.jpg")
    ]
    write(root / "sharegpt4v" / file, rows)
    first = ["<image>\nWhat do you see happening in this image?", asked[1]["value"]]
    return {"good": {"train": 5}, "bad": {"missing_image": 1}, "said": {"train": [first]}}


@release
def sharegpt4v_pt(root: Path) -> dict[str, Any]:
    return sharegpt4v(root, "share-captioner_coco_lcs_sam_1246k_1107.json")


@release
def lvis_instruct4v(root: Path) -> dict[str, Any]:
    pictures(root, "coco/train2017/000000387655.jpg", "coco/val2017/000000000139.jpg")
    asked = turns("<image>\nWhat is on the table?", "A blue plate.", "Who sits there?", "Nobody.")
    rows = [{"id": str(i), "image": name, "conversations": asked} for i, name in enumerate(
        ("coco/train2017/000000387655.jpg", "coco/val2017/000000000139.jpg", "coco/train2017/0.jpg"))]  # fmt: skip
    write(root / "lvis_instruct4v_220k.json", rows)
    said = {"train": [[turn["value"] for turn in asked]]}
    return {"good": {"train": 2}, "bad": {"missing_image": 1}, "said": said}


def _local(root: Path) -> dict[str, Any]:
    pictures(root, "images/a b (c).jpg", "images/x/1_a.png", "images/x/1_b.png")
    one = {"id": "a", "image": "a b (c).jpg", "conversations": turns("<image>\nWhat is in this figure?", "A bone.")}
    two = {
        "id": "b",
        "image": ["x/1_a.png", "x/1_b.png"],
        "conversations": turns("Left: <image>\nRight: <image>\nTrue?", "true"),
    }
    write(root / "train.json", [one, two, {**two, "image": ["x/1_a.png"]}, {**one, "image": ["x/1_a.png", "x/2.png"]}])
    write(root / "val.json", [one])
    told = {"train": [said(one), said(two)], "val": [said(one)]}
    return {"good": {"train": 2, "val": 1}, "bad": {"placeholder_mismatch": 2}, "said": told}


RELEASES |= dict.fromkeys(("openstax", "nlvr", "grocery"), _local)


@release
def laion_gpt4v(root: Path) -> dict[str, Any]:
    """As img2dataset writes it: a folder per shard, image, caption and metadata of what could be fetched, and counts."""
    pictures(root, "00000/000000000.jpg", "00000/000000002.jpg")
    meta = {"url": "https://cdn.example/a.png", "status": "success", "error_message": None, "width": 8, "height": 8}
    for number, caption in ((0, "This image shows a dog."), (2, "")):
        key = f"{number:09d}"
        write(root / f"00000/{key}.json", {**meta, "key": key, "caption": caption})
        (root / f"00000/{key}.txt").write_text(caption)
    (root / "00000/000000003.json").write_text("{")
    counts = {"count": 7, "successes": 3, "failed_to_download": 3, "failed_to_resize": 1, "duration": 1.5}
    write(root / "00000_stats.json", {**counts, "status_dict": {"success": 3}})
    bad = {"failed_to_download": 3, "failed_to_resize": 1, "bad_record": 2}
    told = [["<image>\nDescribe this image in detail.", "This image shows a dog."]]
    return {"good": {"train": 1}, "bad": bad, "said": {"train": told}}


@release
def textocr_gpt4v(root: Path) -> dict[str, Any]:
    pictures(root, "train_images/a4ea732cd3d5948a.jpg")
    row = {"filename": "a4ea732cd3d5948a.jpg", "caption": "DESCRIPTION\nA sign.\n\nTEXT\nIt says, \"STOP\".",
           "caption_image": "A sign.", "caption_text": "It says, \"STOP\".", "caption_condensed": "A sign that says STOP."}  # fmt: skip
    without = {key: value for key, value in row.items() if key != "caption_condensed"}
    write(root / "train.jsonl", [row, without, {**row, "filename": "b.jpg"}, {**row, "filename": None}])
    told = [["<image>\nDescribe this image in detail.", "A sign that says STOP."]]
    return {"good": {"train": 1}, "bad": {"bad_record": 1, "missing_image": 2}, "said": {"train": told}}


@release
def localized_narratives(root: Path) -> dict[str, Any]:
    """Each part of the release has a row in each of its splits, and its images alone, where the image's own release has them."""
    parts = {  # file: dataset, image_id, and where the image is
        "open_images_train_v6_localized_narratives-00003-of-00010": ("open_images_train", "000002b66c9c498e", "open_images/train/000002b66c9c498e.jpg"),
        "coco_train_localized_narratives-00000-of-00004": ("mscoco_train2017", "137576", "coco/train2017/000000137576.jpg"),
        "flickr30k_train_localized_narratives": ("Flickr30k_train", "1000092795", "flickr30k/flickr30k-images/1000092795.jpg"),
        "ade20k_train_localized_narratives": ("ADE20k_train", "ADE_train_00000001", "ade20k/images/training/ADE_train_00000001.jpg"),
        "open_images_validation_localized_narratives": ("open_images_validation", "0001eeaf4aed83f9", "open_images/validation/0001eeaf4aed83f9.jpg"),
        "coco_val_localized_narratives": ("mscoco_val2017", "139", "coco/val2017/000000000139.jpg"),
        "flickr30k_val_localized_narratives": ("Flickr30k_val", "1018148011", "flickr30k/flickr30k-images/1018148011.jpg"),
        "ade20k_validation_localized_narratives": ("ADE20k_validation", "ADE_val_00000001", "ade20k/images/validation/ADE_val_00000001.jpg"),
        "open_images_test_localized_narratives": ("open_images_test", "000026e7ee790996", "open_images/test/000026e7ee790996.jpg"),
        "flickr30k_test_localized_narratives": ("Flickr30k_test", "1007129816", "flickr30k/flickr30k-images/1007129816.jpg"),
    }  # fmt: skip
    pictures(root, *(image for _, _, image in parts.values()))
    row = {"dataset_id": "mscoco_train2017", "image_id": "137576", "annotator_id": 93,
           "caption": "In this image there are group of cows standing.",
           "timed_caption": [{"utterance": "In this", "start_time": 0.0, "end_time": 0.4}],
           "traces": [[{"x": 0.2086, "y": -0.0533, "t": 0.022}]], "voice_recording": "coco_train/a.ogg"}  # fmt: skip
    wanted: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for file, (dataset, name, image) in parts.items():
        rows = [{**row, "dataset_id": dataset, "image_id": name, "caption": f"A narrative of {dataset}."}]
        split = "train" if "train" in file else "val" if "_val" in file else "test"
        if split == "train":  # another's narrative of the same image
            rows.append({**rows[0], "annotator_id": 7})
        write(root / f"{file}.jsonl", rows)
        wanted[split] += [image] * len(rows)
    write(root / "coco_train_localized_narratives-00001-of-00004.jsonl", [{**row, "image_id": "1"}])
    write(root / "open_images_train_v6_localized_narratives-00009-of-00010.jsonl", [
        {**row, "image_id": "../../../../etc/x"}, {"image_id": "000002b66c9c498e"}])  # fmt: skip
    bad = {"missing_image": 1, "path_escape": 1, "bad_record": 1}
    told = {
        split: [["<image>\nDescribe this image in detail.", f"A narrative of {dataset}."]
                for file, (dataset, _, image) in parts.items() if image in images for _ in range(images.count(image))]
        for split, images in wanted.items()
    }  # fmt: skip
    good = {split: len(images) for split, images in wanted.items()}
    return {"good": good, "bad": bad, "said": told, "images": wanted}


@release
def chartqa(root: Path) -> dict[str, Any]:
    for split in ("train", "val", "test"):
        pictures(root, *(f"{split}/png/{name}.png" for name in ("41699051005347", "OECD_X_000042", "8127")))
        row = {"imgname": "41699051005347.png", "query": "How many food item is shown in the bar graph?", "label": "14"}
        other = {**row, "query": "What is the difference in value between Lamb and Corn?", "label": "0.57"}
        write(root / split / f"{split}_human.json", [row, other, {**row, "imgname": "8127.png"}, {**row, "label": ""}])
        write(root / split / f"{split}_augmented.json", [
            {**row, "imgname": "OECD_X_000042.png"}, {**row, "imgname": "gone.png"}, {"imgname": "8127.png"}])  # fmt: skip
    asked = f"<image>\n{row['query']}\n{SHORT}"
    together = [asked, "14", other["query"], "0.57"]
    alone = [[asked, "14"], [f"<image>\n{other['query']}\n{SHORT}", "0.57"]]
    good = {"train": 3, "val": 4, "test": 4}
    return {"good": good, "bad": {"bad_record": 6, "missing_image": 3}, "said": {"train": [together], "val": alone, "test": alone},
            "row": {"answers": ["14"], "type": "human", "metric": "relaxed_accuracy"}}  # fmt: skip


@release
def docvqa(root: Path) -> dict[str, Any]:
    pictures(root, "spdocvqa_images/xnbl0037_1.png", "spdocvqa_images/ffbf0227_1.png")
    row = {"questionId": 337, "question": "what is the date mentioned in this letter?", "question_types": ["handwritten"],
           "image": "documents/xnbl0037_1.png", "docId": 279, "ucsf_document_id": "xnbl0037",
           "ucsf_document_page_no": "1", "answers": ["1/8/93", "1/8/1993"], "data_split": "train"}  # fmt: skip
    header = {"dataset_name": "SP-DocVQA", "dataset_split": "train", "dataset_version": "1.0"}
    rows = [row, {**row, "image": "documents/ffbf0227_1.png"}, {**row, "answers": []}, {**row, "answers": None},
            {**row, "image": "documents/../../x.png"}, {**row, "image": "documents/none_1.png"}]  # fmt: skip
    write(root / "spdocvqa_qas/train_v1.0_withQT.json", {**header, "data": rows})
    write(root / "spdocvqa_qas/val_v1.0_withQT.json", {**header, "data": rows[:2]})
    told = [[f"<image>\n{row['question']}\n{SHORT}", "1/8/93"]] * 2
    bad = {"bad_record": 2, "path_escape": 1, "missing_image": 1}
    return {"good": {"train": 2, "val": 2}, "bad": bad, "said": {"train": told, "val": told},
            "row": {"answers": ["1/8/93", "1/8/1993"], "id": "val-337", "metric": "anls"}}  # fmt: skip


@release
def dvqa(root: Path) -> dict[str, Any]:
    pictures(
        root, "images/bar_train_00200000.png", "images/bar_val_easy_00000992.png", "images/bar_val_hard_00000001.png"
    )
    row = {"question": "What is the label of the second bar from the bottom in each group?", "question_id": 120000013,
           "template_id": "data", "answer": "bond", "image": "bar_train_00200000.png", "answer_bbox": [295.4, 379.8, 54.5, 35.0]}  # fmt: skip
    write(root / "train_qa.json", [row] * 12 + [{**row, "image": "bar_train_0.png"}, {**row, "answer": None}])
    write(root / "val_easy_qa.json", [{**row, "image": "bar_val_easy_00000992.png", "template_id": "structure"}])
    hard = {**row, "image": "bar_val_hard_00000001.png", "template_id": "reasoning", "answer_bbox": []}
    write(root / "val_hard_qa.json", [hard, {key: value for key, value in hard.items() if key != "template_id"}])
    first = [f"<image>\n{row['question']}\n{SHORT}", "bond"]
    ten = first + [row["question"], "bond"] * 9
    return {"good": {"train": 2, "val": 2}, "bad": {"missing_image": 1, "bad_record": 2},
            "said": {"train": [ten, [*first, *ten[2:4]]], "val": [first, first]},
            "row": {"type": "easy-structure", "answers": ["bond"], "id": "val_easy-120000013"}}  # fmt: skip


@release
def plotqa(root: Path) -> dict[str, Any]:
    row = {"image_index": 0, "qid": "0", "question_string": "Across all years, what is the maximum percentage ?",
           "answer_bbox": {}, "template": "min_max", "answer": 82.0172, "answer_id": 1, "type": "dot_line"}  # fmt: skip
    for split in ("train", "val", "test"):
        pictures(root, f"{split}/png/0.png", f"{split}/png/1.png")
        pairs = [row, {**row, "answer": "Yes"}, {**row, "image_index": 1, "answer": 3}, {**row, "answer": [1]},
                 {**row, "image_index": 7}, {**row, "answer": True}]  # fmt: skip
        listed = split == "test"  # the release's page says that the file is a list
        write(root / split / "qa_pairs_V1.json", pairs if listed else {"qa_pairs": pairs})
    first = f"<image>\n{row['question_string']}\n{SHORT}"
    told = [[first, "82.0172"], [first, "Yes"], [first, "3"]]
    together = [[first, "82.0172", row["question_string"], "Yes"], [first, "3"]]
    return {"good": {"train": 2, "val": 3, "test": 3}, "bad": {"bad_record": 6, "missing_image": 3},
            "said": {"train": together, "val": told, "test": told}, "row": {"answers": ["82.0172"], "type": "dot_line", "metric": "relaxed_accuracy"}}  # fmt: skip


@release
def clevr(root: Path) -> dict[str, Any]:
    info = {
        "split": "train",
        "version": "1.0",
        "date": "2/14/2017",
        "license": "Creative Commons Attribution (CC BY 4.0)",
    }
    for split in ("train", "val"):
        pictures(root, f"images/{split}/CLEVR_{split}_000000.png")
        count = {"inputs": [0], "function": "count", "value_inputs": []}
        row = {"split": split, "image_index": 0, "image_filename": f"CLEVR_{split}_000000.png", "image": f"CLEVR_{split}_000000",
               "question": "How many small spheres are there?", "answer": "2", "question_family_index": 13,
               "program": [{"inputs": [], "function": "scene", "value_inputs": []}, count], "question_index": 0}  # fmt: skip
        test = {key: value for key, value in row.items() if key not in ("answer", "program")}
        write(root / f"questions/CLEVR_{split}_questions.json", {"info": info, "questions": [row] * 3 + [test, {
            **row, "image_filename": "CLEVR_x.png"}]})  # fmt: skip
    first = [f"<image>\n{row['question']}\n{SHORT}", "2"]
    bad = {"bad_record": 2, "missing_image": 2}
    return {"good": {"train": 1, "val": 3}, "bad": bad, "row": {"type": "count", "answers": ["2"]},
            "said": {"train": [first + [row["question"], "2"] * 2], "val": [first] * 3}}  # fmt: skip


@release
def iconqa(root: Path) -> dict[str, Any]:
    problems, pids = {}, {}
    text = {
        "question": "What has been done to this letter?",
        "choices": ["slide", "turn", "flip"],
        "answer": 1,
        "ques_type": "choose_txt",
    }
    image = {
        "question": "Which is a cone?",
        "choices": ["choice_0.png", "choice_1.png"],
        "answer": "0",
        "ques_type": "choose_img",
    }
    blank = {"question": "How many shapes are there?", "answer": "8", "ques_type": "fill_in_blank"}
    for offset, split in ((0, "train"), (100, "val"), (200, "test")):
        broken = {**text, "answer": 3}
        for number, problem in enumerate(
            (text, image, blank, broken, {**text, "answer": -1}, {**blank, "question": None})
        ):
            pid = str(offset + number)
            problems[pid] = {**problem, "split": split, "grade": "grade2", "label": "N", "skill": []}
            pids.setdefault(f"{problem['ques_type']}_{split}", []).append(pid)
            pictures(root, f"iconqa/{split}/{problem['ques_type']}/{pid}/image.png")
        pictures(root, *(f"iconqa/{split}/choose_img/{offset + 1}/choice_{i}.png" for i in (0, 1)))
        pids[f"choose_txt_{split}"].append("9999")  # no such problem
    write(root / "problems.json", problems)
    write(root / "pid_splits.json", {**pids, "choose_txt_trainval": []})
    letters = "Answer with the option's letter from the given choices directly."
    told = [[f"<image>\n{text['question']}\nA. slide\nB. turn\nC. flip\n{letters}", "B"],
            [f"<image>\n{image['question']}\nA. <image>\nB. <image>\n{letters}", "A"],
            [f"<image>\n{blank['question']}\n{SHORT}", "8"]]  # fmt: skip
    row = {"choices": ["slide", "turn", "flip"], "answers": ["B"], "type": "choose_txt", "metric": "multiple_choice"}
    return {"good": dict.fromkeys(("train", "val", "test"), 3), "bad": {"bad_record": 12},
            "said": dict.fromkeys(("train", "val", "test"), told), "row": row}  # fmt: skip


@release
def scienceqa(root: Path) -> dict[str, Any]:
    problem = {"question": "Which of these states is farthest north?", "choices": ["West Virginia", "Louisiana", "Arizona"],
               "answer": 0, "hint": "", "image": "image.png", "task": "closed choice", "grade": "grade2",
               "subject": "social science", "topic": "geography", "category": "Geography", "skill": "Read a map",
               "lecture": "Maps have four cardinal directions.\nNorth.", "solution": "To find the answer, look.", "split": "train"}  # fmt: skip
    hinted = {**problem, "image": None, "hint": "Figure: sturgeon.", "answer": 2, "subject": "natural science"}
    problems, splits = {}, {}
    for offset, split in ((1, "train"), (11, "val"), (21, "test")):
        made = [problem, hinted, {**problem, "answer": 3}, {**problem, "choices": None}, problem]
        splits[split] = [str(offset + number) for number in range(len(made))]
        problems |= {pid: {**row, "split": split} for pid, row in zip(splits[split], made, strict=True)}
        pictures(root, f"images/{split}/{offset}/image.png")  # the last problem's is missing
    write(root / "problems.json", problems)
    write(root / "pid_splits.json", {**splits, "trainval": [], "minitest": []})
    letters = "Answer with the option's letter from the given choices directly."
    options = "A. West Virginia\nB. Louisiana\nC. Arizona"
    told = [[f"<image>\n{problem['question']}\n{options}\n{letters}", "A"],
            [f"Figure: sturgeon.\n{problem['question']}\n{options}\n{letters}", "C"]]  # fmt: skip
    row = {"choices": problem["choices"], "answers": ["A"], "type": "social science", "id": "11"}
    return {"good": dict.fromkeys(("train", "val", "test"), 2), "bad": {"bad_record": 6, "missing_image": 3},
            "said": dict.fromkeys(("train", "val", "test"), told), "row": row}  # fmt: skip


@release
def easy_vqa(root: Path) -> dict[str, Any]:
    for part in ("train", "test"):
        pictures(root, f"{part}/images/0.png", f"{part}/images/1.png")
        write(root / part / "questions.json", [["what is the blue shape?", "rectangle", 0], ["what color is the shape?", "blue", 0],
            ["is there a triangle in the image?", "no", 1], ["why?", "no"], ["is it red?", "no", 7]])  # fmt: skip
    asked = [f"<image>\nwhat is the blue shape?\n{SHORT}", "rectangle"]
    triangle = [f"<image>\nis there a triangle in the image?\n{SHORT}", "no"]
    val = [asked, [f"<image>\nwhat color is the shape?\n{SHORT}", "blue"], triangle]
    return {"good": {"train": 2, "val": 3}, "bad": {"bad_record": 2, "missing_image": 2},
            "said": {"train": [[*asked, "what color is the shape?", "blue"], triangle], "val": val},
            "row": {"answers": ["rectangle"]}}  # fmt: skip


@release
def alpaca(root: Path) -> dict[str, Any]:
    row = {"instruction": "Give three tips for staying healthy.", "input": "", "output": "1. Eat."}
    write(
        root / "alpaca_data.json",
        [row, {**row, "input": "twitter, snapchat"}, {**row, "output": ""}, {"instruction": "x"}],
    )
    told = [[row["instruction"], "1. Eat."], [f"{row['instruction']}\n\ntwitter, snapchat", "1. Eat."]]
    return {"good": {"train": 2}, "bad": {"bad_record": 2}, "said": {"train": told}}


@release
def sharegpt(root: Path) -> dict[str, Any]:
    hi = turns("Who are you?", "Vicuna.", "Have a nice day!", "You too!")
    write(root / "sg_90k_part1.json", [
        {"id": "identity_0", "conversations": hi},
        {"id": "QWJhYvA_0", "conversations": [{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "Hello"}]},
        {"id": "i6IyJda_0", "conversations": [{"from": "gpt", "value": "How to tell"}, *turns("A", "B", "C")]},
        {"id": "A5AbcES_0", "conversations": [{"from": "system", "value": "Be brief."}, *turns("A", "B")]},
        {"id": "x", "conversations": []}, {"id": "y", "conversations": [{"from": "narrator", "value": "A"}]},
        {"id": "z", "conversations": turns("A", "B")[1:] * 2},
    ])  # fmt: skip
    write(root / "sg_90k_part2.jsonl", [{"id": "identity_1", "conversations": turns("A", "B")}, {"id": "w"}])
    (root / "README.md").write_text("not rows")
    bad = {"bad_record": 2, "bad_conversation": 2}
    told = [[turn["value"] for turn in hi], ["Hi", "Hello"], ["A", "B"]]
    fixed = {"leading_answer": 1, "trailing_question": 1}
    return {"good": {"train": 5}, "bad": bad, "mended": fixed, "said": {"train": told}}
