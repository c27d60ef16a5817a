"""README.md, docs/findings.md and benchmarks/README.md against the result files: every decimal number of a paragraph that links a result stands in it;
the numbers of benchmarks/README.md, whose table links them all, in one of all."""

from __future__ import annotations

import csv
import gzip
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {"docs/findings.md": 40, "README.md": 40, "benchmarks/README.md": 40}
"""Pages, and how many numbers are looked up there at least."""
ELSEWHERE = {
    "41.8": "the paper's Table 6",
    "39.3": "the paper's Table 6",
    "5.8": "the pictures",
    "2.5": "InternVL",
    "3.5": "InternVL",
}
"""Numbers that are no results of ours, and whose they are."""
SUFFIXES = (".md", ".csv", ".json")
_LINK = re.compile(r"\]\(([^)#]+?)\)")
_NUMBER = re.compile(r"(?<![\w.,=-])[-+]?\d+\.\d+(?![\w.]*\d)")


def paragraphs(text: str, folder: Path) -> list[tuple[str, list[Path]]]:
    """Paragraphs, items and rows of tables, with the results that they link; a row without a link has those of the paragraph before its
    table. What is quoted as code says nothing."""
    found, before = [], list[Path]()
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for block in re.split(r"\n\s*\n|\n(?=- )", text):
        rows = block.split("\n") if block.lstrip().startswith("|") else [block]
        for part in rows:
            part = re.sub(r"`[^`]*`", "", part)
            files = [folder / link for link in _LINK.findall(part)]
            results = [
                file
                for file in files
                if "benchmarks" in file.resolve().parts and file.suffix in (".md", ".csv", ".json")
            ]
            found.append((part, results or (before if len(rows) > 1 else [])))
        if len(rows) == 1:
            before = found[-1][1]
    return found


def numbers(paragraph: str) -> list[str]:
    return _NUMBER.findall(_LINK.sub("]", paragraph))


def unfounded(paragraph: str, results: list[Path]) -> list[str]:
    """Its decimal numbers that no result has, rounded as they are."""
    told = " ".join(file.read_text(encoding="utf-8") for file in results)
    known = [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", told.replace(",", " "))]
    return [
        found
        for found in numbers(paragraph)
        if not any(f"{abs(one):.{len(found.partition('.')[2])}f}" == found.lstrip("+-") for one in known)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_number_is_in_a_result_that_is_linked(page: str) -> None:
    told = paragraphs((ROOT / page).read_text(encoding="utf-8"), (ROOT / page).parent)
    if page == "benchmarks/README.md":
        told = [
            (part, [file for file in (ROOT / "benchmarks").glob("*/*") if file.suffix in SUFFIXES]) for part, _ in told
        ]
    told = [(part, results) for part, results in told if results or "findings" in page]
    assert sum(len(numbers(part)) for part, _ in told) >= PAGES[page]
    wrong = {part[:90]: sorted({*unfounded(part, results)} - {*ELSEWHERE}) for part, results in told}
    assert {part: some for part, some in wrong.items() if some} == {}


def test_a_number_that_no_result_has_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "one"
    folder.mkdir(parents=True)
    (folder / "report.md").write_text("| llava | 0.4706 ± 0.020 | 1,234 | -0.012 |")
    (folder / "numbers.csv").write_text("a,b\nloss,7e-05\n")
    text = "It is 0.47, 0.471 or {} ([report](report.md), [numbers](numbers.csv)).\n\n| a |\n|---|\n| {} |\n\nAnd 0.9, `0.8`."
    for number, wrong in (("-0.012", []), ("0.48", ["0.48"]), ("0.00007", [])):
        told = paragraphs(text.format(number, number), folder)
        assert [unfounded(*one) for one in told] == [wrong, [], [], wrong, ["0.9"]]


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("benchmarks/*/predictions.csv.gz")), ids=lambda file: file.parent.name
)
def test_kept_answers_score_as_reported(file: Path) -> None:
    """The score of each type, row and seed, computed from the answers, is that of numbers.csv."""
    lines = csv.DictReader(gzip.decompress(file.read_bytes()).decode().splitlines())
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for line in lines:
        kind = line["set"] if line["type"] == "all" else line["type"]  # questions without a type are named by their set
        for run in [*line][4:]:
            right[run, kind].append(line[run].strip().casefold() == line["truth"].strip().casefold())
    with (file.parent / "numbers.csv").open() as text:
        reported = {
            (f"{one['row']}/{one['seed']}", one["quantity"].split(".")[1]): float(one["value"])
            for one in csv.DictReader(text)
            if one["quantity"].startswith("types.") and one["quantity"].endswith(".score")
        }
    assert len(reported) == len(right) > 0
    for key, scores in right.items():
        assert sum(scores) / len(scores) == pytest.approx(reported[key], abs=1e-6), key
