"""Settings of the site that `make docs` builds of README.md and the pages in docs/. Warnings, such as of a link that leads nowhere, are errors.

The source is the repository, not docs/, so that links from page to page are the same on the site as in the repository.
"""

import os
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from messages import matching, messages, quoted

project = "lit_eemllm"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "docs/tour.ipynb", "*.md", "benchmarks/**.md", "data_recipes/**.md"]
exclude_patterns = [".*", "build", "runs"]
# Reports of benchmarks and the like are in no index; that the pages of docs/ are is a test, tests/test_docs_site.py.
suppress_warnings = ["toc.not_included"]
html_theme = "furo"
html_title = "lit_eemllm"
html_copy_source = False
html_show_copyright = False
toc_object_entries = False
myst_heading_anchors = 4
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# The tour is run, in a folder that is removed, with the commands of the environment that builds the site.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 600
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.setdefault("OMP_NUM_THREADS", "1")


class Messages(SphinxDirective):
    """Lists the messages of files and folders of the package; what troubleshooting.md explains leads to its section."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        page = Path(__file__).with_name("troubleshooting.md").read_text(encoding="utf-8")
        explained = [(matching(quote), section) for quote, section in quoted(page).items()]
        lines = []
        for file, texts in messages(*" ".join(self.content).split()).items():
            for text, line in texts.items():
                section = next((section for quote, section in explained if quote.search(text)), "")
                anchor = re.sub("[^a-z ]", "", section.lower()).replace(" ", "-")
                more = f"; explained under [{section}](troubleshooting.md#{anchor})" if section else ""
                lines.append(f"- `` {text} ``\\\n  {file.replace('_', '&#95;')}:{line}{more}")
        made = nodes.container()
        self.state.nested_parse(StringList("\n".join(lines).splitlines()), self.content_offset, made)
        return made.children


def setup(app: Sphinx) -> None:
    """Sphinx calls it."""
    app.add_directive("messages", Messages)
