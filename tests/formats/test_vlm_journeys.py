"""Models of images and text that people use, from the command line: converted, trained, continued, asked, merged, estimated and written
again for transformers."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from lib.mechanisms import counted, of_layers
from lib.vision import picture
from lib.vlms import KINDS, TALKS, conversation, messages
from transformers import AutoModelForImageTextToText, AutoProcessor

from lit_eemllm import cli
from lit_eemllm.config import load_config
from lit_eemllm.cost.trace import Document, trace
from lit_eemllm.cost.weightless import parts_of_config
from lit_eemllm.evaluation.run import load
from lit_eemllm.formats.vlm import load_vlm
from lit_eemllm.mechanisms import build_mechanism
from lit_eemllm.model import EEMLLM, Processor, QwenVision

BOUND = 1e-5
JOURNEYS = {
    "internvl": ("ee_mllm", "lora"),
    "idefics3": ("vica", "full"),
    "smolvlm": ("pyramid_drop", "lora"),
    "llava_onevision": ("ee_mllm", "full"),
    "qwen2_5_vl": ("pyramid_drop", "full"),
    "qwen3_vl": ("ee_mllm", "lora"),
}
"""Mechanism, and tuning of all parts."""
TALK = [[(40, 30), "What is it?"]]


def run(*words) -> None:
    assert cli.main([str(word) for word in words]) == 0


def prompt(model, tokenizer, talk):
    asked, pictures = conversation(talk)
    processor = Processor(tokenizer, "jinja", model.vision.transform, model.config.image_token_id)
    return processor.prompts([asked], [pictures]), pictures


def words(model, given, **options):
    """Logits of words, in text rows."""
    ids, image = given["input_ids"], model.config.image_token_id
    known = torch.arange(model.config.text_config.vocab_size) != image
    with torch.no_grad():
        return model(**given, **options).logits[ids != image][:, : len(known)][:, known]


def both_words(model, theirs, tokenizer, kind):
    """Of a prompt with a picture: ours and those of transformers' model."""
    ours, pictures = prompt(model, tokenizer, TALK)
    own = kind.processor(tokenizer, kind.preprocessor)
    given = own(
        text=own.apply_chat_template(messages(TALK), add_generation_prompt=True), images=[pictures], return_tensors="pt"
    )
    views = model.vision.transform.views(list(ours["pixel_values"]))  # Pillow's are a level apart here and there
    views = torch.cat([model.vision.patches(x) for x in views]) if isinstance(model.vision, QwenVision) else views
    given["pixel_values"] = views.view(given["pixel_values"].shape)
    return words(model, ours), words(theirs, given)


def test_its_folder_opens_by_transformers_doors(folder, tmp_path):
    """As an EEMLLM, with tiles, texts between them and pictures of many sizes: the ids of training, token for token the same answers."""
    model, tokenizer = load_vlm(folder)
    Processor(tokenizer, "jinja", model.vision.transform, model.config.image_token_id).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    found, theirs = (
        AutoProcessor.from_pretrained(tmp_path),
        AutoModelForImageTextToText.from_pretrained(tmp_path).eval(),
    )
    for talk in ("no image", "text between", "turns"):
        ours, pictures = prompt(model, tokenizer, TALKS[talk])
        told, left = messages(TALKS[talk]), iter(pictures)
        for part in (part for message in told for part in message["content"] if part["type"] == "image"):
            part["image"] = next(left)
        given = found.apply_chat_template(told, tokenize=True, return_dict=True)
        again = found(text=found.apply_chat_template(told), images=pictures)
        assert all(x["input_ids"].equal(ours["input_ids"]) and x.keys() == ours.keys() for x in (given, again)), talk
        answers = [x.generate(**y, max_new_tokens=3, do_sample=False) for x, y in ((theirs, given), (model, ours))]
        assert answers[0].equal(answers[1])


@pytest.mark.slow
def test_the_journey_of_a_user(name, folder, shapes, tmp_path, capsys):
    (mechanism, tuning), out = JOURNEYS[name], tmp_path / "out"
    run("convert", folder, "--out", out, "--mechanism", mechanism)
    assert f"lit-eemllm fit {out} out=" in capsys.readouterr().out
    settings = [f"data.train={shapes}", f"data.val={shapes}", "data.workers=0", "data.max_length=400", "data.pack_tokens=500",
                "optim.lr=1e-3", "optim.max_steps=4", "optim.save_every=2", "optim.val_every=2", "optim.val_batches=1",
                "trainer.accelerator=cpu", "eval.max_new_tokens=3", "model.dtype=float32"]  # fmt: skip
    tuned = [f"optim.tuning.{part}={tuning}" for part in ("vision", "projector", "llm")] + ["optim.lora.r=2"]
    run("fit", out, f"out={tmp_path / tuning}", *settings, *tuned)
    one, again = tmp_path / tuning, tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    shutil.copy(one / "checkpoints" / "step-2.ckpt", again / "checkpoints")
    capsys.readouterr()
    run("fit", one, f"out={again}")
    printed = capsys.readouterr().out
    assert "continuing from" in printed and " -" not in printed.partition("continuing from")[2]
    first, last, resumed = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (one / "checkpoints/step-2.ckpt", *(x / "checkpoints/step-4.ckpt" for x in (one, again)))
    )
    assert resumed.keys() == last.keys() and all(x.equal(last[key]) for key, x in resumed.items())
    parts = {key.split(".")[1] for key, x in resumed.items() if not x.equal(first[key])}
    assert parts == {"vision", "projector", "language_model"}

    picture((40, 20)).save(tmp_path / "a.png")
    run("validate", one, "eval.samples=2")
    run("generate", one, "--image", tmp_path / "a.png", "--prompt", "What?")
    model, processor, _ = load(load_config([one / "config.yaml"]), None)
    if tuning == "lora":
        run("merge", one, "--to", tmp_path / "merged")
        merged, (given, _) = (
            EEMLLM.from_pretrained(tmp_path / "merged").eval(),
            prompt(model, processor.tokenizer, TALK),
        )
        found, true = (words(each, given, use_cache=True) for each in (merged, model))
        assert tiny.max_error(found, true) < 2 * BOUND  # a merged weight is rounded once more

    capsys.readouterr()
    run("convert", one, "--out", tmp_path / "hf", "--to-transformers", "--mechanism", "llava")
    assert "logits differ by" in capsys.readouterr().out
    run("convert", one, "--out", tmp_path / "llava", "--mechanism", "llava")
    written = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").eval()
    assert type(written) is KINDS[name].model
    ours = EEMLLM.from_pretrained(tmp_path / "llava").eval()
    assert tiny.max_error(*both_words(ours, written, processor.tokenizer, KINDS[name])) < BOUND

    run(
        "fit",
        tmp_path / "llava",
        f"out={tmp_path / 'llava-run'}",
        *settings,
        "optim.max_steps=2",
        "optim.tuning.llm=frozen",
    )
    run("calibrate", tmp_path / "llava-run", "--target", "ee_mllm_f", "--layers", "2", "--samples", "2")
    found = json.loads((tmp_path / "llava-run" / "calibrate-ee_mllm_f" / "layers.json").read_text())
    assert (
        found["ranking"][0] == 3 and len(found["chosen"]) == 2
    )  # nothing reads what the last layer makes of visual tokens


def test_what_is_estimated_is_what_a_prompt_takes(name, folder, tmp_path, capsys):
    """Encoder, connector and decoder apart, of a picture of the size that the estimate is for; the numbers printed are of the folder."""
    out = tmp_path / "out"
    run("convert", folder, "--out", out, "--mechanism", "ee_mllm")
    needed = ["data.train=none", "optim.lr=1", "optim.max_steps=1"]
    run("explain", out, *needed)
    capsys.readouterr()
    run("estimate", out, *needed, "--only", "--json")
    printed = json.loads(capsys.readouterr().out)
    config = load_config([out / "config.yaml"], needed)
    model, tokenizer = EEMLLM.from_pretrained(out).eval(), load_vlm(folder)[1]
    transform = model.vision.transform
    given, _ = prompt(model, tokenizer, [[transform.largest, "What is it?"]])
    visual = int((given["input_ids"] == model.config.image_token_id).sum())
    text = given["input_ids"].numel() - visual
    assert visual == printed["visual"] == transform.num_tokens(*transform.largest)
    model.set_attention("reference")
    with torch.no_grad():
        counts = counted(lambda: model(**given))[1]
    step = trace(config, parts_of_config(config.model), build_mechanism("ee_mllm", 4), Document(text, visual, text))
    by_part = {part: sum(counts.get_flop_counts()[f"EEMLLM.{part}"].values()) for part in ("vision", "projector")}
    assert (step.encoder_flops, step.connector_flops) == (by_part["vision"], by_part["projector"])
    assert step.decoder_flops == of_layers(model, counts)
    assert step.parameters == sum(x.numel() for x in model.parameters())
