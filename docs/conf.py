"""Sphinx's settings: `make docs` builds the documentation with warnings as errors."""

import re

from docutils import nodes

from harness import __version__

project = "backbone-harness"
copyright = "the authors of backbone-harness"  # noqa: A001
release = version = __version__
html_title = f"backbone-harness {version}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

# Types in signatures are shown and not linked: most are of numpy, torch and the standard library.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r".*")]
default_role = "literal"  # `name` in docstrings, which are plain text elsewhere
smartquotes = False  # which makes a dash of --flag
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


def mark_up(app, what, name, obj, options, lines):
    """Docstrings are plain text: indented lines are code, and those below "Keyword arguments" a list."""
    marked = []
    for before, line in zip(["", *lines], lines, strict=False):
        if item := re.match(r"    (\w+): (.*)", line) if marked and "Keyword arguments" in "".join(lines) else None:
            marked += [""] * before.startswith("Keyword") + [f"- `{item[1]}`: {item[2]}"]
        elif line.startswith("    ") and not before.strip():
            marked += ["::", "", line]
        else:
            marked.append(line)
    lines[:] = marked


def sign(app, what, name, obj, options, signature, returns):
    """What is made anew for each call has no text that could be read as Python."""
    return (signature or "").replace("<factory>", "...") or None, returns


def without_mail(app, doctree):
    """dit-xs-2@800 is no address of mail."""
    for link in list(doctree.findall(nodes.reference)):
        if link.get("refuri", "").startswith("mailto:"):
            link.replace_self(nodes.Text(link.astext()))


def setup(app):
    app.connect("autodoc-process-docstring", mark_up)
    app.connect("autodoc-process-signature", sign)
    app.connect("doctree-read", without_mail)
