"""Links of the documents: files and headings exist; addresses elsewhere are on a list, which `make links` follows by hand."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from blocks import ROOT, pages

LIST = Path(__file__).parent / "external_links.txt"
DOCUMENTS = [
    *pages(),
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def text_of(path):
    """The page without its code."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def links_of(path):
    return LINK.findall(text_of(path))


def anchors_of(path):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_lead_somewhere(page):
    for link in links_of(page):
        if urlsplit(link).scheme:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_file() and ROOT in target.parents, f"{page.name}: {link}"
        assert not anchor or anchor in anchors_of(target), f"{page.name}: {link}: no such heading"


def test_links_elsewhere_are_on_the_list():
    found = {link for page in DOCUMENTS for link in links_of(page) if urlsplit(link).scheme}
    for link in found:
        parts = urlsplit(link)
        assert parts.scheme == "https" and "." in parts.netloc and link.isascii(), link
    assert sorted(found) == LIST.read_text(encoding="utf-8").split(), "write the links into external_links.txt"


def test_every_page_is_in_the_table_of_contents():
    listed = re.findall(r"^[\w/-]+$", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    there = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in pages() if path.name != "README.md"}
    assert there - {"index"} == set(listed)


def test_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
    for image in (ROOT / "docs" / "images").glob("*.png"):
        assert image.stat().st_size < 200_000, image
