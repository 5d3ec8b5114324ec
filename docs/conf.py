"""Sphinx configuration; `make docs` builds, `make check` does so with warnings as errors."""

from importlib.metadata import version as installed_version

project = "Loopwright"
author = "The Loopwright contributors"
copyright = f"2026, {author}"
release = installed_version("loopwright")
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]  # no intersphinx: builds without a network
exclude_patterns = ["_build"]
default_role = "code"  # `name` in a docstring is code, as in Markdown

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# What a class of ours defines itself; the hundred methods of a base like nn.Module belong to their own documentation.
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an "Attributes:" section and an annotated attribute would otherwise be documented twice
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"Loopwright {release}"
html_copy_source = False
html_show_sourcelink = False
