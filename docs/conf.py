"""How Sphinx builds the site: `make docs` writes it to out/site. Nothing is fetched while it is built."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sparsedsl  # noqa: E402

project = "sparsedsl"
author = "the sparsedsl authors"
version = release = sparsedsl.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures in the source are long; the docstrings say what is given
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
copybutton_exclude = ".linenos, .gp, .go"  # prompts and results of docstrings' examples are not copied

html_theme = "furo"
html_title = f"sparsedsl {version}"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_copyright = False
