"""What a report writes on a fresh clone, without any run: every cell of Tables 1-6 as the paper prints it.

Against a transcription of the paper that was made apart from results/published, cell by cell, in each format.
"""

import csv
import html.parser
import io
import json
import re
from pathlib import Path

import pytest

from reports.html_tables import to_html_page
from reports.render import escape_latex, to_csv, to_latex, to_markdown
from reports.tables import paper_tables

TABLES = json.loads((Path(__file__).parent / "paper_tables.json").read_text(encoding="ascii"))
METRICS = {"FID": "fid", "sFID": "sfid", "IS": "is", "Precision": "precision", "Recall": "recall"}
NAMED = ("Model", "Image Resolution", "Decoder")  # the row's name, not cells of it
CELLS = {"Table 1": 16, "Table 2": 75, "Table 3": 45, "Table 4": 133, "Table 5": 15, "Table 6": 21}


@pytest.fixture(scope="module")
def made():
    return {table.title.partition(".")[0]: table for table in paper_tables([])}


def _expected(table):
    """(name of the row, title of the column, text) of every cell, and the rows' names in the order of the paper."""
    head, *rows = TABLES[table]
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        name = cells.get("Model") or cells["Decoder"]
        if "Image Resolution" in cells:
            name = f"{name}, {cells['Image Resolution']}"
        if table == "Table 4":
            name = f"{name}, {cells['Training Steps (K)']}K, {cells['DiT Block']}"
        yield name, {title: text for title, text in cells.items() if title not in NAMED}


@pytest.mark.parametrize("table", CELLS)
def test_the_csv_has_every_cell_as_printed(made, table):
    rows = list(csv.DictReader(io.StringIO(to_csv(made[table]))))
    expected = list(_expected(table))
    assert [row["model"] for row in rows] == [name for name, _ in expected]
    checked = 0
    for row, (_, cells) in zip(rows, expected, strict=True):
        assert row["provenance"] == "published"
        for title, text in cells.items():
            if table == "Table 4" and title == "Image Resolution":
                continue
            assert row[METRICS.get(title, title)] == ("" if text == "-" else text), (row["model"], title)
            checked += 1
    assert checked == CELLS[table]


class _Rows(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.rows, self.skip, self.cell = [], False, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.skip = tag == "sup"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.skip = False
        if tag in ("td", "th"):
            self.cell = False

    def handle_data(self, data):
        if self.cell and not self.skip:
            self.rows[-1][-1] += data


def _markdown_rows(text):
    for line in text.splitlines():
        if line.startswith("| "):
            plain = re.sub(r"<sup>.*?</sup>|\*\*|\\(?=[\\`*_\[\]|~#!])", "", line)
            yield [cell.strip() for cell in plain.strip("|").split(" | ")]


def _latex_rows(text):
    for line in text.splitlines():
        if line.endswith(r" \\") and not line.startswith("%"):
            plain = re.sub(r"\$\^\{.*?\}\$", "", line.removesuffix(r" \\"))
            yield [re.sub(r"\\textbf\{(.*)\}", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)&", plain)]


@pytest.mark.parametrize("table", CELLS)
def test_markdown_latex_and_html_print_the_same_cells(made, table):
    for rows, written in (
        (list(_markdown_rows(to_markdown(made[table]))), str),
        (list(_latex_rows(to_latex(made[table]))), escape_latex),
        (_Rows(to_html_page(made[table])).rows, str),
    ):
        expected = list(_expected(table))
        bodies = [row for row in rows if row[0] not in ("Model", written("Model"))]
        assert len(bodies) == len(expected)
        for row, (name, cells) in zip(bodies, expected, strict=True):
            assert row[0] == written(name.split(", ")[0] if table in ("Table 4", "Table 6") else name)
            shown = [text for text in row if text != written("paper")]
            for text in cells.values():
                text = text or "-"
                assert written(text) in shown, (name, text)
                shown.remove(written(text))


@pytest.mark.parametrize("table", CELLS)
def test_latex_is_whole(made, table):
    """As many cells in each row as the table has columns, braces that close, environments that end."""
    text = to_latex(made[table])
    width = None
    for line in text.splitlines():
        if found := re.match(r"\\begin\{tabular\}\{([lr]+)\}", line):
            width = len(found[1])
        elif line.startswith(r"\end{tabular}"):
            width = None
        elif width and line.endswith(r"\\"):
            assert len(re.split(r"(?<!\\)&", line)) == width, line
    depth = 0
    for character in re.sub(r"\\[\\{}]", "", text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert re.findall(r"\\begin\{(\w+\*?)\}", text)[0::2] == re.findall(r"\\end\{(\w+\*?)\}", text)[1::2]
    body = "\n".join(line.removesuffix("{%") for line in text.splitlines() if not line.startswith("%"))
    assert not re.search(r"(?<!\\)[#_%]", body)
    assert body.isascii()
