"""The documentation site, which `make docs` builds."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

import averaging_optim

sys.path.append(str(Path(__file__).parent))
from formulas import set_formulas

project = "averaging_optim"
release = averaging_optim.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

# Notebooks are shown with the outputs they are kept with; `make notebooks` makes them anew.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # its default has no tables
myst_enable_extensions = ["dollarmath"]  # as GitHub has it
myst_heading_anchors = 3  # as GitHub has them

# On a phone, long formulas are broken into lines.
mathjax4_config = {"output": {"displayOverflow": "linebreak"}}

# In the docstrings `x` is code, and a link if there is something of that name.
default_role = "py:obj"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autosummary_generate = False  # its lists link to entries that the pages have
autodoc_inherit_docstrings = False  # or every rule would explain `weight` again
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"averaging_optim {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_use_index = False  # each page of the reference lists what is on it
html_show_copyright = False
html_show_sphinx = False
copybutton_selector = ":not(.cell_output) > .highlight pre"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


def as_literals(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Double the backticks of `a_<b>`, which roles would take for the text a_ of a link to b."""
    lines[:] = [re.sub(r"`[^`]*<[^`]*>`", r"`\g<0>`", line) for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", as_literals)
    app.connect("autodoc-process-docstring", set_formulas)
