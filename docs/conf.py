"""Sphinx's settings: `make docs` builds the documentation with warnings as errors."""

from harness import __version__

project = "backbone-harness"
copyright = "the authors of backbone-harness"  # noqa: A001
release = version = __version__
html_title = f"backbone-harness {version}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # the changelog, included, begins at the second level

# Types in signatures are shown and not linked: most are of numpy, torch and the standard library.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r".*")]
default_role = "literal"  # `name` in docstrings, which are plain text elsewhere
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_theme_options = {"navigation_with_keys": False}
exclude_patterns = ["_build"]

# `make links` follows these by hand: the tests and `make docs` need no network.
linkcheck_timeout = 20
linkcheck_ignore = [r"https://doi\.org/.*"]  # publishers refuse programs
