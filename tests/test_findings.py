"""docs/findings.md and benchmarks/README.md against the result files: every decimal number of a sentence stands in a file that its paragraph links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("docs/findings.md",)
_LINK = re.compile(r"\]\(([^)#]+?)\)")
_NUMBER = re.compile(r"(?<![\w.,])[-+]?\d+\.\d+(?![\w.]*\d)")


def paragraphs(text: str) -> list[str]:
    """Paragraphs and rows of tables; what is quoted as code says nothing."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    parts = [
        line for part in re.split(r"\n\s*\n|\n(?=- )", text) for line in (part.split("\n") if "|" in part else [part])
    ]
    return [re.sub(r"`[^`]*`", "", part) for part in parts]


def unfounded(paragraph: str, folder: Path) -> list[str]:
    """Its decimal numbers that no linked result has, rounded as they are."""
    linked = [folder / link for link in _LINK.findall(paragraph)]
    told = " ".join(file.read_text(encoding="utf-8") for file in linked if file.suffix in (".md", ".csv", ".json"))
    known = [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", told.replace(",", " "))]
    return [
        found
        for found in _NUMBER.findall(_LINK.sub("]", paragraph))
        if not any(f"{abs(one):.{len(found.partition('.')[2])}f}" == found.lstrip("+-") for one in known)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_number_is_in_a_result_that_is_linked(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = {part[:90]: numbers for part in paragraphs(text) if (numbers := unfounded(part, (ROOT / page).parent))}
    assert not found
    assert len(_NUMBER.findall(text)) > 20


def test_a_number_that_no_result_has_is_found(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("| llava | 0.4706 ± 0.020 | 1,234 | -0.012 |")
    (tmp_path / "numbers.csv").write_text("a,b\nloss,7e-05\n")
    say = "It is 0.47, 0.471 or {} ([report](report.md), [numbers](numbers.csv))."
    assert unfounded(say.format("-0.012"), tmp_path) == []
    assert unfounded(say.format("0.48"), tmp_path) == ["0.48"]
    assert unfounded(say.format("0.00007"), tmp_path) == []
    assert unfounded("No link: 0.471.", tmp_path) == ["0.471"]
