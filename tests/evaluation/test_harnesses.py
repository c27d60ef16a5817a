"""lmms-eval and VLMEvalKit ask a run the questions of `validate`, and it answers and scores the same.

The suites themselves are rarely installed: most tests put a stand-in of their interface in their place, so that our side is
tested everywhere; the last ones start the real suites, where they are.
"""

import base64
import csv
import json
import logging
import os
import random
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lit_eemllm.data import shards
from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.evaluation import run
from lit_eemllm.evaluation.harnesses.answerer import Answerer, Question, open_picture, read_config, write
from lit_eemllm.formats.convert import convert
from lit_eemllm.formats.merge import merge
from lit_eemllm.inputs.chat import VICUNA_SYSTEM
from lit_eemllm.inputs.images import open_image
from lit_eemllm.training.fit import fit

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230)}
SUFFIX = "\nAnswer the question using a single word or phrase."  # VLMEvalKit's VQA data sets add it
GREEDY = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "num_beams": 1, "top_p": 0.9}

LMMS_EVAL = {
    "lmms_eval/api/model.py": "class lmms:\n    def __init__(self):\n        self.task_dict = {}\n",
    "lmms_eval/api/instance.py": "class GenerationResult:\n    def __init__(self, text):\n        self.text = text\n",
    "lmms_eval/models/registry_v2.py": "def ModelManifest(*arguments):\n    return arguments\n",
}
VLMEVALKIT = {
    "vlmeval/vlm/base.py": "class BaseModel:\n    pass\n",
    "vlmeval/vlm/llava.py": """class LLaVA:
    def use_custom_prompt(self, dataset):
        return dataset == "choice"
    def build_prompt(self, line, dataset=None):
        return [line, dataset]
""",
    "run.py": """import sys
supported_VLM = {"theirs": lambda: None}
def main():
    global found
    names = sys.argv[sys.argv.index("--model") + 1:]
    found = sys.argv[:sys.argv.index("--model")], {name: supported_VLM[name]() for name in names}
""",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run that has learned some of 48 questions about two, one and no images, its rows, and the answers of `validate`."""
    folder = tmp_path_factory.mktemp("harnesses")
    tiny.write_parts(folder / "parts")
    (folder / "images").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (16, 16), colour).save(folder / "images" / f"{name}.png")
    generator, rows = random.Random(0), []
    for i in range(48):
        one, two = generator.choices(list(COLOURS), k=2)
        images, question, answer = [
            ([one], f"What colour is the picture?{SUFFIX}", one),
            ([one, two], "Same colour?", "yes" if one == two else "no"),
            ([], "How many legs has a cat?" if one == "red" else "How many eyes?", "4" if one == "red" else "2"),
        ][i % 3]
        paths = [str(folder / "images" / f"{image}.png") for image in images]
        rows.append({"images": paths, "question": question, "answer": answer})
    write_shards(folder / "shards", rows)
    options = ["optim.max_steps=30", "optim.lr=1e-2", "optim.val_every=100", "optim.save_every=100", "eval.control=0"]
    config = tiny.config(folder / "parts", folder / "shards", folder / "run", *options, "data.pack_tokens=1024")
    fit(config)
    answers = asked_by_validate(config)
    assert len({*answers}) > 3 and 0.3 < score(rows, answers) < 1, "chosen so that scores can differ"
    return SimpleNamespace(folder=folder, run=folder / "run", config=config, rows=rows, answers=answers)


def write_shards(folder, rows):
    written = []
    for i, row in enumerate(rows):
        prompt = "<image>\n" * len(row["images"]) + row["question"]
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": row["answer"]}]
        shown = {"image": [Path(path).name for path in row["images"]]} if row["images"] else {}
        written.append({"id": f"{i:03}", "conversations": turns, **shown})
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(written))
    shards.make({"train": file, "val": file}, folder.parent / "images", folder)


def asked_by_validate(config):
    """The answers of `lit-eemllm validate`, in the order of the rows."""
    run.validate(config, None)
    lines = (Path(config.out) / "eval" / "predictions.jsonl").read_text().splitlines()
    return [line["answer"] for line in sorted(map(json.loads, lines), key=lambda line: line["key"])]


def score(rows, answers):
    return sum(row["answer"] == answer for row, answer in zip(rows, answers, strict=True)) / len(rows)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts files that hold the interface of a suite where Python looks first, and forgets what came of them afterwards."""
    ours = "lit_eemllm.evaluation.harnesses"

    def forget():
        for name in [*sys.modules]:
            if name.partition(".")[0] in ("lmms_eval", "vlmeval", "run") or name in (
                f"{ours}.lmms_eval", f"{ours}.vlmeval", f"{ours}.vlmeval_model",
            ):  # fmt: skip
                del sys.modules[name]

    def put(files, module):
        for name, text in files.items():
            for folder in Path(name).parents[:-1]:
                (tmp_path / folder).mkdir(parents=True, exist_ok=True)
                (tmp_path / folder / "__init__.py").touch()
            (tmp_path / name).write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        forget()
        return import_module(f"{ours}.{module}")

    yield put
    forget()


def visuals(row):
    return [Image.open(path) for path in row["images"]]


def requests(rows, settings=GREEDY):
    """What lmms-eval gives to a simple model, of each row."""
    return [
        SimpleNamespace(args=(row["question"], dict(settings), visuals, i, "ours", "val")) for i, row in enumerate(rows)
    ]


def lmms_model(module, place, kind="LitEEMLLM", run=None, **options):
    model = getattr(module, kind)(run=str(run or place.run), device="cpu", **options)
    model.task_dict["ours"] = {"val": place.rows}
    return model


# --- lmms-eval


@pytest.mark.parametrize("batch_size", ["1", 7])
def test_lmms_eval_gets_the_answers_of_validate(place, stand_in, batch_size):
    model = lmms_model(stand_in(LMMS_EVAL, "lmms_eval"), place, batch_size=batch_size)
    assert model.is_simple and model.device == torch.device("cpu")
    assert model.generate_until(requests(place.rows)) == place.answers
    mixed = requests(place.rows)
    for request in mixed[::2]:
        request.args[1]["max_new_tokens"] = 1
    found = model.generate_until(mixed)
    assert found[1::2] == place.answers[1::2]
    assert all(long.startswith(short) for short, long in zip(found[::2], place.answers[::2], strict=True))
    assert found[::2] != place.answers[::2]


def test_lmms_eval_asks_in_messages_too(place, stand_in):
    model = lmms_model(stand_in(LMMS_EVAL, "lmms_eval"), place, "ChatLitEEMLLM", batch_size=8)
    assert not model.is_simple

    def to_messages(row):
        content = [{"type": "image", "url": path} for path in row["images"]]
        return [{"role": "user", "content": [*content, {"type": "text", "text": row["question"]}]}]

    rows = range(len(place.rows))
    asked = [SimpleNamespace(args=("few shots", to_messages, dict(GREEDY), i, "ours", "val")) for i in rows]
    assert model.generate_until(asked) == place.answers


def test_a_merged_folder_and_overrides(place, stand_in, tmp_path):
    """The folder alone: neither the run nor the parts that it was made from."""
    merge(place.config, None, tmp_path / "merged", adapter=False)
    module = stand_in(LMMS_EVAL, "lmms_eval")
    assert lmms_model(module, place, run=tmp_path / "merged").generate_until(requests(place.rows)) == place.answers
    (tmp_path / "merged" / "config.yaml").unlink()  # as `save_pretrained` writes it
    options = {"batch_size": 16, "model.attention": "reference", "eval.image_cache": 0, "model.vision.policy": "resize"}
    with pytest.raises(UserError, match=r"merged does not say .* add model\.template="):
        lmms_model(module, place, run=tmp_path / "merged")
    options["model.template"] = "vicuna_v1"
    model = lmms_model(module, place, run=tmp_path / "merged", **options)
    assert (model.answerer.model.backend.name, model.answerer.model.image_cache) == ("reference", None)
    assert model.generate_until(requests(place.rows)) == place.answers
    with pytest.raises(UserError, match=r"model\.atention"):
        lmms_model(module, place, **{"model.atention": "reference"})
    with pytest.raises(UserError, match="batch_size=auto"):
        lmms_model(module, place, batch_size="auto")


def test_settings_of_a_task(stand_in):
    generation = stand_in(LMMS_EVAL, "lmms_eval").Generation
    assert generation.of({}, "t") == (1024, 0.0, ())
    assert generation.of({**GREEDY, "temperature": 0.7, "until": "\n\n"}, "t") == (4, 0.0, ("\n\n",))
    sampling = {"temperature": 0.5, "top_p": 1.0, "top_k": None, "max_new_tokens": 9, "until": ["a", "b"]}
    assert generation.of(sampling, "t") == (9, 0.5, ("a", "b"))
    with pytest.raises(UserError, match=r"task x: num_beams=3 cannot be done; .*--gen_kwargs num_beams=1"):
        generation.of({**GREEDY, "num_beams": 3}, "task x")
    with pytest.raises(UserError, match=r"top_p=0\.9, top_k=5 cannot"):
        generation.of({**sampling, "top_p": 0.9, "top_k": 5}, "t")


def test_an_answer_ends_where_a_task_says(place):
    answerer = Answerer(place.run, None, [], [])
    asked = [Question(str(i), [("user", [*visuals(row), row["question"]])]) for i, row in enumerate(place.rows[:9])]
    full = answerer.answers(asked, 4)
    assert full == place.answers[:9]
    cut = answerer.answers(asked, 4, until=("e", "", "lu"))
    assert cut == [text.partition("lu")[0].partition("e")[0] for text in full] != full


def test_what_is_no_image_is_refused_by_name(place, stand_in):
    model = lmms_model(stand_in(LMMS_EVAL, "lmms_eval"), place)
    (request,) = requests(place.rows[:1])
    for visual, named in (("clip.mp4", "'clip.mp4'"), ({"type": "audio", "array": [0]}, "audio")):
        request.args = (*request.args[:2], lambda row, shown=visual: [shown], *request.args[3:])
        with pytest.raises(UserError, match=f"task ours, document 0: it shows video or sound.*{named}"):
            model.generate_until([request])
    with pytest.raises(UserError, match="task ours: asks in several rounds"):
        model.generate_until_multi_round([request])
    module = sys.modules[type(model).__module__]
    chat = lmms_model(module, place, "ChatLitEEMLLM")
    message = {"role": "user", "content": [{"type": "video", "url": "clip.mp4"}, {"type": "text", "text": "?"}]}
    with pytest.raises(UserError, match="task ours, document 0: it shows video;"):
        chat.generate_until([SimpleNamespace(args=("", lambda row: [message], {}, 0, "ours", "val"))])


def test_a_question_that_cannot_be_asked_is_answered_with_nothing(place, caplog):
    answerer = Answerer(place.run, None, [], [])
    row = place.rows[0]
    good = ("user", [*visuals(row), row["question"]])
    bad = [("user", ["a</s>b"]), ("user", [Path("gone.png"), "What?"]), ("user", [*visuals(row), "<image> <image>?"])]
    with caplog.at_level(logging.WARNING):
        found = answerer.answers([Question(str(i), [turn]) for i, turn in enumerate([bad[0], good, *bad[1:]])], 4)
    assert found == ["", place.answers[0], "", ""]
    assert len(caplog.messages) == 3 and all(text.endswith('it is answered ""') for text in caplog.messages)
    assert "special token" in caplog.text and "gone.png" in caplog.text and "2 <image> placeholders" in caplog.text


def test_likelihoods_are_those_of_transformers(place, stand_in, tmp_path):
    """The same weights as a LLaVA of transformers; prompt and answer written by hand, one question at a time."""
    overrides = ["model.mechanism.preset=llava"]
    convert(place.run, tmp_path / "ours", overrides, to_transformers=False)
    convert(place.run, tmp_path / "theirs", overrides, to_transformers=True)
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "theirs")
    model = lmms_model(stand_in(LMMS_EVAL, "lmms_eval"), place, run=tmp_path / "ours", batch_size=4)

    asked = [(i, choice) for i in range(6) for choice in ("green", "no", "2 red squares")]
    arguments = [(place.rows[i]["question"], f" {choice}", visuals, i, "ours", "val") for i, choice in asked]
    found = [one.text for one in model.loglikelihood([SimpleNamespace(args=args) for args in arguments])]

    expected = []
    for i, choice in asked:
        row = place.rows[i]
        prompt = f"{VICUNA_SYSTEM} USER: {'<image>' * len(row['images'])}{row['question']} ASSISTANT:"
        prompt = prompt.replace("<image>", "<image>\n")
        inputs = processor(text=prompt, images=visuals(row) or None, return_tensors="pt")
        answer = processor.tokenizer(f" {choice}</s>", add_special_tokens=False, return_tensors="pt").input_ids
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            logits = llava(**inputs).logits[0, -answer.shape[1] - 1 : -1, : llava.config.text_config.vocab_size - 1]
        loss = torch.nn.functional.cross_entropy(logits, answer[0]).item()
        expected.append((loss, bool((logits.argmax(-1) == answer[0]).all())))
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert model.loglikelihood([SimpleNamespace(args=(*arguments[0][:1], lambda row: "green", *arguments[0][2:]))])[
        0
    ].text == pytest.approx(found[0])


def test_the_answer_that_is_given_is_the_greedy_one(place):
    answerer = Answerer(place.run, None, [], [])
    asked = [Question(str(i), [("user", [*visuals(row), row["question"]])]) for i, row in enumerate(place.rows[:12])]
    given = place.answers[:12]
    assert all(one.greedy for one in answerer.likelihoods(asked, given))
    assert not any(one.greedy for one in answerer.likelihoods(asked, [f"{text} or" for text in given]))
    with pytest.raises(SampleError, match="no answer that could be weighed"):
        answerer.likelihoods(asked[:1], [" "])


def test_lmms_eval_finds_the_model(stand_in):
    stand_in(LMMS_EVAL, "lmms_eval")
    name, *paths = import_module("lit_eemllm.evaluation.harnesses").lmms_eval_models()
    assert name == "lit_eemllm"
    for path in paths:
        module, _, kind = path.rpartition(".")
        assert getattr(import_module(module), kind).is_simple == (path == paths[0])


# --- what is shown


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (["What?"], "What?"),
        (["I", "What?"], "<image>\nWhat?"),
        (["I", "I", "What?"], "<image>\n<image>\nWhat?"),
        (["a ", "I", " b ", "I", " c"], "a <image> b <image> c"),
        (["I", "a", "I"], "<image>\na<image>"),
        (["I", "hint", "What?"], "<image>\nhint\nWhat?"),
        (["I", "I", "a <image> b <image>?"], "a <image> b <image>?"),
        (["I", "hint", "<image> what?"], "hint\n<image> what?"),
        (["I"], "<image>\n"),
        (["I", "I", "one <image> place"], "one <image> place"),  # and so refused
    ],
)
def test_where_images_stand(parts, text):
    assert write([Path("x.png") if part == "I" else part for part in parts]) == text


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "upright"])
def test_a_picture_is_as_if_from_a_file(mode, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    picture = Image.fromarray(values, "RGBA")
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    exif = Image.Exif()
    if mode == "P":
        picture = picture.convert("RGB").quantize(16)
        picture.info["transparency"] = 3
    elif mode == "I;16":
        picture = Image.fromarray(values[..., 0].astype(np.uint16) * 200)
    elif mode == "upright":
        picture, exif[0x0112] = picture.convert("L"), 6  # a quarter turn
    else:
        picture = picture.convert("RGB").convert(mode) if mode == "CMYK" else picture.convert(mode)
    picture.save(file, **({"exif": exif} if mode == "upright" else {}))
    expected = open_image(file.read_bytes(), "x", 1000)
    assert expected.size == ((6, 9) if mode == "upright" else (9, 6))
    for given in (Image.open(file), file):
        found = open_picture(given, "x", 1000)
        assert found.mode == "RGB" and np.array_equal(np.asarray(found), np.asarray(expected))


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder; expected a run directory"):
        read_config(tmp_path / "nowhere", [])
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match="neither is in it; expected a run directory"):
        read_config(tmp_path, [])


# --- VLMEvalKit


def message(row):
    shown = [{"type": "image", "value": path} for path in row["images"]]
    return [*shown, {"type": "text", "value": row["question"]}]


def test_vlmevalkit_gets_the_answers_of_validate(place, stand_in):
    kind = stand_in(VLMEVALKIT, "vlmeval_model").LitEEMLLM
    model = kind(run=str(place.run), max_new_tokens=4)
    assert [model.generate_inner(message(row), "ours") for row in place.rows] == place.answers
    turns = [("user", message(place.rows[0])), ("assistant", [{"type": "text", "value": place.answers[0]}])]
    talk = [{"role": role, "content": content} for role, content in [*turns, ("user", message(place.rows[2]))]]
    assert isinstance(model.chat_inner(talk, "ours"), str)
    assert model.chat_inner(talk[:1], "ours") == place.answers[0]
    with pytest.raises(UserError, match="data set ours: it shows video;"):
        model.generate_inner([{"type": "video", "value": "clip.mp4"}], "ours")
    assert not model.use_custom_prompt("choice")
    asked_as_llava = kind(run=str(place.run), prompts="llava")
    assert asked_as_llava.use_custom_prompt("choice") and not asked_as_llava.use_custom_prompt("words")
    assert asked_as_llava.build_prompt("line", "choice") == ["line", "choice"]
    with pytest.raises(UserError, match="prompts=mine: expected dataset or llava"):
        kind(run=str(place.run), prompts="mine")


def test_vlmevalkit_is_started_with_runs_among_its_models(place, stand_in, monkeypatch):
    launcher = stand_in(VLMEVALKIT, "vlmeval")
    monkeypatch.setattr(sys, "argv", ["pytest"])
    options = ["--set", "model.attention=reference", "--max-new-tokens", "4"]
    status = launcher.main(["--data", "MME", "--run", f"mine={place.run}", *options, "--reuse", "--model", "theirs"])
    (file, *rest), models = sys.modules["run"].found
    assert (status, Path(file).name, rest) == (0, "run.py", ["--data", "MME", "--reuse"])
    assert list(models) == ["theirs", "mine"] and models["theirs"] is None
    assert models["mine"].generate_inner(message(place.rows[0])) == place.answers[0]
    assert models["mine"].answerer.model.backend.name == "reference"
    assert sys.modules["vlmeval.vlm"].LitEEMLLM is type(models["mine"])


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (["nowhere"], "--run nowhere: no such folder: nowhere"),
        (["a=x/../nowhere"], "no such folder: x/../nowhere"),
        (["{run}", "run={run}"], "run stands for {run} already"),
        (["theirs={run}"], "VLMEvalKit has a model of this name"),
    ],
)
def test_vlmevalkit_is_not_started_on_a_mistake(runs, said, place, stand_in, capsys):
    launcher = stand_in(VLMEVALKIT, "vlmeval")
    arguments = [part for text in runs for part in ("--run", text.format(run=place.run))]
    assert launcher.main([*arguments, "--data", "MME"]) == 2
    assert said.format(run=place.run) in capsys.readouterr().err


def test_without_vlmevalkit_it_is_said(stand_in, monkeypatch, capsys):
    launcher = stand_in({}, "vlmeval")
    monkeypatch.setattr(launcher, "find_spec", lambda name: None)
    assert launcher.main(["--data", "MME"]) == 2
    assert "VLMEvalKit: it is not installed; install it from its source" in capsys.readouterr().err


# --- the real ones


def started(*command, place, **environment):
    """What the process wrote; it must end well."""
    variables = {
        **os.environ,
        "HF_HOME": str(place.folder / "hf"),
        "LMUData": str(place.folder / "LMUData"),
        **environment,
    }
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=variables, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def lmms_eval(place):
    """A folder of two tasks, questions and choices, for the real lmms-eval."""
    if find_spec("lmms_eval") is None:
        pytest.skip("needs lmms-eval: pip install 'lit_eemllm[lmms-eval]'")
    if "lit_eemllm" not in entry_points(group="lmms_eval.models").names:
        pytest.skip("installed before it had an entry point: pip install again")
    folder = place.folder / "tasks"
    if not folder.exists():
        folder.mkdir()
        choices = [*COLOURS, "yes", "no", "2", "4"]
        rows = [{**row, "choices": choices, "number": choices.index(row["answer"])} for row in place.rows]
        (folder / "rows.json").write_text(json.dumps(rows))
        utils = (
            'from PIL import Image\n\n\ndef visuals(row):\n    return [Image.open(path) for path in row["images"]]\n'
        )
        (folder / "utils.py").write_text(utils)
        common = f"""dataset_path: json
dataset_kwargs: {{data_files: {{val: {folder / "rows.json"}}}}}
test_split: val
doc_to_visual: !function utils.visuals
doc_to_text: "{{{{question}}}}"
"""
        (folder / "ours.yaml").write_text(f"""task: ours
{common}output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}]
""")
        (folder / "choice.yaml").write_text(f"""task: ours_choice
{common}output_type: multiple_choice
doc_to_choice: choices
doc_to_target: "{{{{number}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--tasks", "ours"], ["--tasks", "ours,ours_choice", "--force_simple"]])
def test_the_real_lmms_eval(lmms_eval, place, tmp_path, options):
    where = ["--include_path", str(lmms_eval), "--output_path", str(tmp_path), "--log_samples", "--batch_size", "6"]
    run_ = f"run={place.run},model.attention=reference"
    started("lmms_eval", "--model", "lit_eemllm", "--model_args", run_, *options, *where, place=place)
    (file,) = tmp_path.rglob("*results.json")
    results = json.loads(file.read_text())["results"]
    assert results["ours"]["exact_match,none"] == pytest.approx(score(place.rows, place.answers))
    (file,) = tmp_path.rglob("*samples_ours.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"] for sample in samples] == place.answers
    if "--force_simple" in options:
        answerer = Answerer(place.run, None, [], [])
        chosen = []
        for row in place.rows:
            choices = [*COLOURS, "yes", "no", "2", "4"]
            asked = [Question("x", [("user", [*visuals(row), row["question"]])])] * len(choices)
            mean = [one.log_probability / one.tokens for one in answerer.likelihoods(asked, choices)]
            chosen.append(choices[int(np.argmax(mean))])
        assert results["ours_choice"]["acc,none"] == pytest.approx(score(place.rows, chosen))


@pytest.mark.slow
def test_the_real_vlmevalkit(place, tmp_path):
    """Questions on one image as a VQA data set with exact match, those on two as one of yes or no."""
    if find_spec("vlmeval") is None:
        pytest.skip("needs VLMEvalKit: see docs/evaluation.md")
    (place.folder / "LMUData").mkdir()
    expected = {}
    for name, images in (("OursGQA", 1), ("OursYesNo", 2)):  # how VQA is scored hangs on the data set's name
        asked = [
            (row, text) for row, text in zip(place.rows, place.answers, strict=True) if len(row["images"]) == images
        ]
        expected[name] = [text for _, text in asked], score(*zip(*asked, strict=True))
        with (place.folder / "LMUData" / f"{name}.tsv").open("w", newline="") as file:
            table = csv.writer(file, delimiter="\t")
            table.writerow(["index", "image", "question", "answer"])
            for i, (row, _) in enumerate(asked):
                shown = [base64.b64encode(Path(path).read_bytes()).decode() for path in row["images"]]
                answer = row["answer"] if images == 1 else row["answer"].capitalize()
                table.writerow([i, shown[0] if images == 1 else shown, row["question"].removesuffix(SUFFIX), answer])
    model = {"class": "LitEEMLLM", "run": str(place.run), "max_new_tokens": 4}
    kinds = {"OursGQA": "ImageVQADataset", "OursYesNo": "ImageYORNDataset"}
    data = {name: {"class": kind, "dataset": name} for name, kind in kinds.items()}
    (tmp_path / "both.json").write_text(json.dumps({"model": {"ours": model}, "data": data}))
    arguments = ["--config", str(tmp_path / "both.json"), "--work-dir", str(tmp_path), "--judge", "exact_matching"]
    started("lit_eemllm.evaluation.harnesses.vlmeval", *arguments, place=place, PRED_FORMAT="tsv")
    for name, (answers, accuracy) in expected.items():
        with (tmp_path / "ours" / f"ours_{name}.tsv").open(newline="") as file:
            assert [line["prediction"] for line in csv.DictReader(file, delimiter="\t")] == answers
        (file,) = (file for end in ("acc", "score") for file in (tmp_path / "ours").glob(f"ours_{name}*_{end}.csv"))
        assert float(next(csv.DictReader(file.read_text().splitlines()))["Overall"]) == pytest.approx(100 * accuracy)
