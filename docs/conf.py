"""Settings of the site that `make docs` builds of README.md and the pages in docs/. Warnings, such as of a link that leads nowhere, are errors.

The source is the repository, not docs/, so that links from page to page are the same on the site as in the repository.
"""

import os
import sys
from pathlib import Path

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
