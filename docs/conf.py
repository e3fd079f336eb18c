"""Sphinx configuration: the maths, the API from docstrings, and the examples as a gallery that is executed."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from sphinx_gallery.sorting import FileNameSortKey

sys.path.insert(0, str(Path(__file__).parent))  # for gallery_arguments

project = "sim2real"
author = "the sim2real authors"
release = version = installed_version("sim2real")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "simulators tuned for the real return", "page_width": "1080px"}

autodoc_typehints = "description"
autodoc_member_order = "bysource"
default_role = "code"

suppress_warnings = ["config.cache"]  # the gallery's settings hold a sorting class

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/(?!make_)\w+\.py$",
    "within_subsection_order": FileNameSortKey,
    "reset_argv": "gallery_arguments.quick",
    "abort_on_example_error": True,
    "show_memory": False,
}
