"""Tables as HTML: as a fragment of a page, and as a page of its own. All text from records is escaped."""

import html
from collections.abc import Sequence

from reports.render import line_marks, one_line, section_notes
from reports.sections import Line, Section, Table

_TIPS = {"best": "the best of the column", "tie": "tied with the best of the column"}
_ESCAPES = str.maketrans({character: html.escape(character) for character in "&<>\"'"})
_STYLE = """
body { font: 13.5px/1.4 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 1.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; border-block: 2px solid #1b1b1b; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-block: .5rem; }
th, td { padding: .15rem .5rem; text-align: left; font-weight: normal; white-space: nowrap; }
th[scope=row] { position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 1px solid #1b1b1b; font-weight: 600; white-space: normal; vertical-align: bottom; }
.number { text-align: right; }
tr.published + tr.measured > * { border-top: 1px solid #999; }
tr.measured > th { font-weight: 600; }
.best, .tie { font-weight: 700; }
.tie::after { content: " ="; }
.notes { font-size: .87rem; color: #444; padding: 0; max-width: 75rem; }
.notes li { list-style: none; }
"""


def to_html(table: Table) -> str:
    """The table as a `<section class="table">` with a `<table>` for each of its sections.

    Rows are `<tr class="published">` or `"measured"`; cells with numbers have the class `number`, those of the best
    values `best` or `tie`. `data-value` is the unrounded number, `data-record` the id of its record.
    """
    parts = [f'<section class="table" id="{_escape(table.name)}">', f"<h2>{_escape(table.title)}</h2>"]
    for section in table.sections:
        parts += _section_html(section, table.title)
    parts.append("</section>")
    return "\n".join(parts) + "\n"


def to_html_page(table: Table) -> str:
    """The table as a page of its own, which loads no other files and runs no script."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{_escape(table.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"{to_html(table)}</body>\n</html>\n"
    )


def _section_html(section: Section, title: str) -> list[str]:
    """The lines of HTML of a section. title: of the table, the caption of a section without a heading."""
    kinds = [' class="number"' if is_number else "" for is_number in section.numeric]
    heads = (f'<th scope="col"{kind}>{_escape(text)}</th>' for kind, text in zip(kinds, section.columns, strict=True))
    parts = [
        '<div class="scroll"><table>',
        f"<caption>{_escape(section.heading or title)}</caption>",
        f"<thead><tr>{''.join(heads)}</tr></thead>",
        "<tbody>",
        *(_line_html(line, section.numeric) for line in section.lines),
        "</tbody></table></div>",
    ]
    notes = [f"<li>{_superscript([mark])} {_escape(text)}</li>" for mark, text in section_notes(section)]
    notes += [f"<li>{_escape(text)}</li>" for text in section.remarks]
    if notes:
        parts.append(f'<ul class="notes">{"".join(notes)}</ul>')
    return parts


def _line_html(line: Line, numeric: Sequence[bool]) -> str:
    """The `<tr>` of a line. numeric: for each column, whether it contains numbers."""
    count = len(line.cells)
    values, ids, marks = line.values or (None,) * count, line.record_ids or ("",) * count, line.marks or ("",) * count
    cells = [f'<th scope="row">{_escape(line.cells[0])}{_superscript(line_marks(line))}</th>']
    for index in range(1, count):
        classes = [*(["number"] if numeric[index] else []), *([marks[index]] if marks[index] else [])]
        attributes = f' class="{" ".join(classes)}"' if classes else ""
        if values[index] is not None:
            attributes += f' data-value="{values[index]!r}"'
        if ids[index]:
            attributes += f' data-record="{_escape(ids[index])}"'
        if marks[index] in _TIPS:
            attributes += f' title="{_TIPS[marks[index]]}"'
        cells.append(f"<td{attributes}>{_escape(line.cells[index])}</td>")
    return f'<tr class="{"published" if line.published else "measured"}">{"".join(cells)}</tr>'


def _superscript(marks: Sequence[str]) -> str:
    """The marks of footnotes as a `<sup>`; "" for none."""
    return f"<sup>{','.join(marks)}</sup>" if marks else ""


def _escape(text: str) -> str:
    """Text that a browser shows literally, in an element and in an attribute."""
    return one_line(text).translate(_ESCAPES)
