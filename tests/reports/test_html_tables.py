"""Tables as HTML: every cell, the marks, escaping, and markup that is well formed."""

import html.parser

from reports.html_tables import to_html, to_html_page
from reports.sections import Line, Section, Table
from reports.tables import paper_tables, protocol_table

VOID = {"meta"}
NASTY = "<script>alert('x')</script>&\"' onload=\u202e\ud800\n"


class Reader(html.parser.HTMLParser):
    """Tags must nest; rows are collected as (class, texts, attributes)."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.tags, self.inside = [], [], set(), None
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append((dict(attributes).get("class", ""), [], []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")
            self.rows[-1][2].append(dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open) and "sup" not in self.open:
            self.rows[-1][1][-1] += data


def test_every_cell_of_the_paper_is_there():
    for table in paper_tables([]):
        read = Reader(to_html(table))
        expected = []
        for section in table.sections:
            expected += [("", section.columns), *(("published", line.cells) for line in section.lines)]
        assert [(kind, tuple(texts)) for kind, texts, _ in read.rows] == expected


def test_values_records_and_marks_are_attributes(study):
    table = protocol_table("digits", study)
    by_id = {record.id: record for record in study}
    rows = [row for row in Reader(to_html(table)).rows if row[0] == "measured"]
    found = [cell for _, _, cells in rows for cell in cells if "data-record" in cell]
    assert len(found) == len(study)
    for cell in found:
        assert float(cell["data-value"]) == by_id[cell["data-record"]].value and "number" in cell["class"]
    line = Line(
        cells=("a", "1", "2", "x"), published=True, marks=("", "best", "tie", ""), values=(None, 1.0, 2.0, None)
    )
    section = Section(heading="h", columns=("m", "p", "q", "r"), lines=(line,))
    (_, (kind, _, cells)) = Reader(to_html(Table(name="n", title="t", sections=(section,), data=()))).rows
    assert kind == "published"
    assert [cell.get("class") for cell in cells] == [None, "number best", "number tie", None]


def test_text_from_records_is_text(record):
    table = protocol_table(NASTY, [record(protocol=NASTY, system=NASTY, framework=NASTY, interval=NASTY)])
    for text in (to_html(table), to_html_page(table)):
        read = Reader(text)
        assert "script" not in read.tags and not any("onload" in cell for _, _, cells in read.rows for cell in cells)
        assert read.rows[1][1][0] == "".join(c if c.isprintable() else " " for c in NASTY)
        text.encode("utf-8")
    assert "default-src 'none'" in to_html_page(table)
