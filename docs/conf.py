"""How `make docs` builds the pages of this folder into site/: Sphinx, the furo theme, Markdown by MyST."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # docstrings, mathml, outside

project = "endoreward_fast"
copyright = "the authors of endoreward_fast"
version = release = version_of("endoreward-fast")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "docstrings", "mathml", "outside"]
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "endoreward_fast"
html_static_path = ["_static"]
html_css_files = ["site.css"]

# Pages read the same on a code host: $...$ is a formula, and a heading's anchor is its text in lower case.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
python_use_unqualified_type_names = True
maximum_signature_line_length = 100
