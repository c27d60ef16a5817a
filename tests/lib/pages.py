"""The pages of the documentation, and the commands in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def commands(markdown: str) -> list[list[str]]:
    """The commands in the ```bash blocks of a text, comments and prompts taken off, continued lines joined."""
    found = []
    for block in re.findall(r"^```(?:bash|sh|shell)[^\n]*\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            found += [words] if words else []
    return found


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md")))]
