"""Settings of the documentation site: `sphinx-build -W --keep-going -b html docs docs/_build/html`."""

import re

import cflow_plugin

project = "cflow-plugin"
author = "The cflow-plugin developers"
copyright = "2026, The cflow-plugin developers"  # Sphinx looks for this name
release = version = cflow_plugin.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"cflow-plugin {release}"
html_theme_options = {"source_repository": "https://github.com/cflow-plugin/cflow-plugin/", "source_directory": "docs/"}

# Headings get the anchors that GitHub gives them, so that a link works in both places.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # it would copy `NDArray[np.bool_]` as it stands, which is a link in RST

# No intersphinx: the build would need the network, and fail where there is none.

_FILES = "https://github.com/cflow-plugin/cflow-plugin/blob/main/"


def _link_to_repository(_app: object, _page: str, source: list[str]) -> None:
    """Pages link to files outside of docs/ by relative paths, which GitHub follows; the site needs whole addresses."""
    source[0] = re.sub(r"\]\((?:\.\./)+(?!docs/)", f"]({_FILES}", source[0])


def setup(app: object) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _link_to_repository)
