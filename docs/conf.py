"""Sphinx configuration: the maths, the API from docstrings, and the examples as a gallery that is executed."""

from importlib.metadata import version as installed_version

from sphinx_gallery.sorting import FileNameSortKey

project = "sim2real"
author = "the sim2real authors"
release = version = installed_version("sim2real")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["templates"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "simulators tuned for the real return", "page_width": "1080px"}

autosummary_generate = True
autodoc_typehints = "description"
autodoc_member_order = "bysource"
default_role = "code"

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/(?!make_)\w+\.py$",
    "within_subsection_order": FileNameSortKey,
    "reset_argv": "conf.quick_arguments",
    "abort_on_example_error": True,
    "show_memory": False,
}


def quick_arguments(gallery_conf: dict, script_vars: dict) -> list[str]:
    """Every example runs with `--quick` when the gallery is built."""
    return ["--quick"]
