"""Others' code scores the tricky answers in tests/fixtures/metrics_reference.json, with which tests/evaluation/test_metrics.py compares ours.

    python tools/metrics_reference.py LLAVA     # haotian-liu/LLaVA at the commit below; needs lmms-eval and ms-vlmeval

The answers were drawn once, at random, from parts that parsers trip over: add rows of inputs and run it again. "on_purpose",
where ours differs and why, is written by hand.
"""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp

import pandas as pd

COMMIT = "c121f0432da27facab705978f83c4ada465e46fd"
FIXTURE = Path(__file__).parents[1] / "tests" / "fixtures" / "metrics_reference.json"
LLAVA, FOLDER = Path(sys.argv[1], "llava", "eval").resolve(), Path(mkdtemp())
TASKS, KIT = "lmms_eval.tasks", "vlmeval.dataset.utils"


def named(dotted):
    module, _, name = dotted.rpartition(".")
    return getattr(import_module(module), name)


def table(rows):
    pd.DataFrame(rows).to_csv(FOLDER / "table.tsv", sep="\t", index=False)
    return str(FOLDER / "table.tsv")


def lines(name, rows):
    (FOLDER / name).write_text("\n".join(map(json.dumps, rows)))
    return name


def llava_scienceqa(rows):
    """The letter each answer names, by a run of the script."""
    problems = {str(i): {"answer": 0, "choices": row[1], "question": ""} for i, row in enumerate(rows)}
    lines("problems.json", [problems]), lines("pid_splits.json", [{"test": list(problems)}])
    said = lines("said", [{"question_id": str(i), "text": row[0], "prompt": "<image>"} for i, row in enumerate(rows)])
    options = ["--base-dir", ".", "--result-file", said, "--output-file", "out", "--output-result", "letters"]
    subprocess.run(
        [sys.executable, LLAVA / "eval_science_qa.py", *options], check=True, cwd=FOLDER, capture_output=True
    )
    found = json.loads((FOLDER / "letters").read_text())["results"].values()
    return {row[0]: "ABCD"[i] if i >= 0 else "" for row, i in zip(rows, found, strict=True)}


def llava_pope(rows):
    """What it takes each answer to say, and its numbers of all."""
    said, labels = [{"text": row[0]} for row in rows], lines("labels", [{"label": row[1]} for row in rows])
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        runpy.run_path(str(LLAVA / "eval_pope.py"))["eval_pope"](said, FOLDER / labels)
    numbers = re.findall(r"(\w+)(?: score| ratio)?: ([\d.]+)", shown.getvalue())
    return {row[0]: one["text"] for row, one in zip(rows, said, strict=True)}, {k.lower(): float(v) for k, v in numbers}


def letter(right):
    """The one as which an answer is right."""
    return lambda f, text, own: "".join(x for x, _ in zip("ABCD", own, strict=False) if right(f, text, own, x))


def ai2d(f, text, own, x):
    (found,) = f().apply([[text]], [{"options": own}])
    same = named("lmms_eval.api.metrics.exact_match_hf_evaluate")
    return same([found], [x], ignore_case=True, ignore_punctuation=True)["exact_match"]


def process_line(method, of):
    def scored(f, text, own):
        match = f({"answer": str(own), "prediction": text}, method)
        return float(named(f"{KIT}.vqa_eval.hit_calculate")([match], of)[0])

    return scored


made = json.loads(FIXTURE.read_text())
rows = {name: part["rows"] for name, part in made["sections"].items()}
letters = llava_scienceqa(rows["multiple_choice"])
pope, numbers = llava_pope(rows["yes_or_no"])
SECTIONS = {  # the inputs; functions, and how they are called
    "yes_or_no": ("answer truth", {
        f"{TASKS}.mme.utils.parse_pred_ans": lambda f, text, _: f(text),
        f"{KIT}.yorn.YOrN_Extraction": lambda f, text, _: f(text).lower(),
        "llava.eval.eval_pope": lambda text, _: pope[text]}),
    "multiple_choice": ("answer choices", {
        f"{TASKS}.scienceqa.utils.sqa_process_results": letter(
            lambda f, text, own, x: f({"choices": own, "answer": "ABCD".index(x)}, [text])["exact_match"]),
        f"{TASKS}.ai2d.utils.MultiChoiceRegexFilter": letter(ai2d),
        f"{TASKS}.seedbench.utils.seed_process_result": letter(
            lambda f, text, own, x: f({"answer": x, "data_type": "", "question_id": 0}, [text])["seed_all"]["pred"].upper() == x),
        "vlmeval.utils.matching_util.can_infer": lambda f, text, own: f(text, dict(zip("ABCD", own, strict=False))) or "",
        "llava.eval.eval_science_qa": lambda text, _: letters[text]}),
    "vqa_normalise": ("answer", {
        f"{TASKS}._task_utils.vqa_eval_metric.EvalAIAnswerProcessor": lambda f, text: f().process_digit_article(
            f().process_punctuation(text.replace("\n", " ").strip())),
        f"{KIT}.vqa_eval.process_answer": lambda f, text: f(text)}),
    "vqa": ("answer answers", {
        f"{TASKS}.vqav2.utils.vqav2_process_results_val": lambda f, text, own: f(
            {"question_id": 0, "answers": [{"answer": x, "answer_id": i} for i, x in enumerate(own)]}, [text])["exact_match"],
        f"{TASKS}.textvqa.utils.textvqa_process_results": lambda f, text, own: f(
            {"question_id": 0, "answers": list(own)}, [text])["exact_match"],
        f"{KIT}.vqa_eval.process_line": process_line("vqa_score", "VQAv2")}),
    "ocrbench": ("answer answers type", {
        f"{TASKS}.ocrbench.utils.ocrbench_process_results": lambda f, text, own, kind: f(
            {"answer": own, "dataset": "HME100k" * ("Math" in kind), "question_type": kind}, [text])["ocrbench_accuracy"]["score"],
        "vlmeval.dataset.image_vqa.OCRBench": lambda f, text, own, kind: f.evaluate(
            table([{"prediction": text, "answer": str(own), "category": kind}]))["Final Score"]}),
    "relaxed_accuracy": ("answer truth", {
        f"{TASKS}.chartqa.utils.relaxed_correctness": lambda f, text, true: int(f(text, true)),
        f"{KIT}.vqa_eval.relaxed_correctness": lambda f, text, true: int(f(true, text))}),
    "anls": ("answer answers", {
        "lmms_eval.api.metrics.anls": lambda f, text, own: f(own, [text])["anls"],
        f"{KIT}.vqa_eval.process_line": process_line("anls", "DocVQA")}),
}  # fmt: skip
for name, (inputs, functions) in SECTIONS.items():
    columns = inputs.split()
    calls = [call if f.startswith("llava") else partial(call, named(f)) for f, call in functions.items()]
    scored = [[*row[: len(columns)], *(call(*row[: len(columns)]) for call in calls)] for row in rows[name]]
    made["sections"][name] = {"columns": [*columns, *functions], "rows": scored}

# Sets: two answers in turn are about one image, every other image is of another type; each as their parsers read them.
said = [dict(zip(("truth", "mme", "kit"), row[1:], strict=False)) for row in made["sections"]["yes_or_no"]["rows"]]
docs = [
    {"question_id": i // 2, "category": ("count", "scene")[i // 2 % 2], "answer": x["truth"]}
    for i, x in enumerate(said)
]
one = named(f"{TASKS}.mme.utils.mme_process_results")
scores = [one(doc, [x["mme"]])["mme_perception_score"] for doc, x in zip(docs, said, strict=True)]
points = named(f"{KIT}.yorn.MME_rating")(table([{**x, "image_path": x["question_id"]} for x in scores]))
known = [
    {"answer": x["truth"].title(), "extracted": x["kit"].title(), "score": x["truth"] == x["kit"], "category": "x"}
    for x in said
    if x["kit"] != "unknown"
]
rating = named(f"{KIT}.yorn.POPE_rating")(table(known)).iloc[0]
made["sets"] = {
    "llava.eval.eval_pope": numbers,
    f"{KIT}.yorn.POPE_rating": {"f1": rating["Overall"] / 100, "recall": rating["recall"] / 100},
    f"{TASKS}.mme.utils.mme_aggregate_results": named(f"{TASKS}.mme.utils.mme_aggregate_results")(scores),
    f"{KIT}.yorn.MME_rating": float(points["perception"].iloc[0]),
}
made["made_by"] = "tools/metrics_reference.py"
made["versions"] = {name: version(name) for name in ("lmms-eval", "ms-vlmeval")} | {"LLaVA": COMMIT}
FIXTURE.write_text(re.sub(r"\n {5,}|\n {4}(?=])", " ", json.dumps(made, indent=1)) + "\n")
