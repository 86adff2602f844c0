"""Tables as text: CSV, Markdown, and LaTeX with booktabs. All text from records is escaped for its format."""

import csv
import io
import operator
import re
from collections.abc import Callable, Mapping, Sequence

from reports.sections import Line, Section, Table, note_mark

PUBLISHED_MARK = "\u2020"  # dagger
_MARKDOWN = {character: f"\\{character}" for character in "\\`*_[]|~#!"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_LATEX = {character: f"\\{character}" for character in "{}$&#%_"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "[": "{[}",  # after a line break \\, a bare bracket would be read as its optional argument
    "]": "{]}",
    "\u2193": r"$\downarrow$",
    "\u2191": r"$\uparrow$",
    "\u00b1": r"$\pm$",
}
_MARKDOWN_ESCAPES, _LATEX_ESCAPES = str.maketrans(_MARKDOWN), str.maketrans(_LATEX)


def to_csv(table: Table) -> str:
    """The data of a table as CSV with one header line; floats with all digits."""
    return csv_text(table.data)


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """CSV with one header line: floats with all digits, None empty, control characters as spaces.

    rows: at least one. All have the same keys, of which there are at least two (`itemgetter` of one gives no tuple).
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    cells = map(operator.itemgetter(*rows[0]), rows)  # a tuple for each row
    writer.writerows(
        [value if type(value) is not str or value.isprintable() else one_line(value) for value in row] for row in cells
    )
    return text.getvalue()


def to_markdown(table: Table) -> str:
    """The table as GitHub-flavoured Markdown: a Markdown table for each section, published rows marked with a dagger."""
    parts = [f"# {escape_markdown(table.title)}"]
    for section in table.sections:
        if section.heading:
            parts.append(f"**{escape_markdown(section.heading)}**")
        aligns = ["--:" if is_number else ":--" for is_number in section.numeric]
        rows = ["| " + " | ".join(map(escape_markdown, section.columns)) + " |", "|" + "|".join(aligns) + "|"]
        for line in section.lines:
            first, *rest = _cells(line, escape_markdown, "**{}**", "**{}**<sup>=</sup>")
            marks = line_marks(line)
            mark = f"<sup>{','.join(marks)}</sup>" if marks else ""
            rows.append("| " + " | ".join([first + mark, *rest]) + " |")
        parts.append("\n".join(rows))
        notes = [f"<sup>{mark}</sup> {escape_markdown(text)}" for mark, text in section_notes(section)]
        notes += [escape_markdown(text) for text in section.remarks]
        if notes:
            parts.append("<br>\n".join(notes))
    return "\n\n".join(parts) + "\n"


def to_latex(table: Table) -> str:
    r"""The table as LaTeX: a `table*` for each section. Needs \usepackage{booktabs} and \usepackage{graphicx}."""
    parts = [r"% needs \usepackage{booktabs,graphicx}"]
    title = re.sub(r"^Table (\d+)\. ", r"After Table \1 of the DiT paper. ", table.title)  # LaTeX numbers tables itself
    for index, section in enumerate(table.sections):
        caption = ". ".join(text.rstrip(".") for text in (title, section.heading) if text)
        # TeX reads labels itself, so special characters are left out instead of escaped.
        name = "".join(character for character in table.name if character.isascii() and character not in _LATEX)
        label = f"tab:{name}" + (f"-{index + 1}" if index else "")
        rows = [" & ".join(map(escape_latex, section.columns)) + r" \\", r"\midrule"]
        was_published = section.lines[0].published
        for line in section.lines:
            if was_published and not line.published:
                rows.append(r"\midrule")
            was_published = line.published
            rows.append(_latex_line(line))
        notes = [f"{_latex_marks([mark])}~{escape_latex(text)}" for mark, text in section_notes(section)]
        notes += [escape_latex(text) for text in section.remarks]
        parts.append(
            "\n".join(
                [
                    r"\begin{table*}[t]",
                    r"\centering",
                    rf"\caption{{{escape_latex(caption)}.}}",
                    rf"\label{{{label}}}",
                    # A table that is wider than the page is scaled down, others stay as they are.
                    r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
                    rf"\begin{{tabular}}{{{''.join('r' if is_number else 'l' for is_number in section.numeric)}}}",
                    r"\toprule",
                    *rows,
                    r"\bottomrule",
                    r"\end{tabular}}",
                    *([r"\par\smallskip\footnotesize\raggedright", r" \\".join(notes)] if notes else []),
                    r"\end{table*}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def escape_markdown(text: str) -> str:
    """The text, escaped so that Markdown shows it literally: no markup, no HTML, no new table cell."""
    return one_line(text).translate(_MARKDOWN_ESCAPES)


def escape_latex(text: str) -> str:
    """The text, escaped so that LaTeX shows it literally."""
    return one_line(text).translate(_LATEX_ESCAPES)


def one_line(text: str) -> str:
    """The text with control characters, such as line breaks, replaced by spaces."""
    return text if text.isprintable() else "".join(character if character.isprintable() else " " for character in text)


def _latex_line(line: Line) -> str:
    """A line as a row of a tabular."""
    first, *rest = _cells(line, escape_latex, r"\textbf{{{}}}", r"\textbf{{{}}}$^{{=}}$")
    return " & ".join([first + _latex_marks(line_marks(line)), *rest]) + r" \\"


def _cells(line: Line, escape: Callable[[str], str], best: str, tie: str) -> list[str]:
    """The escaped cells of a line.

    best, tie: templates for cells with the mark "best" or "tie", with {} for the value; the interval after it, as in
    "3.27 [3.21, 3.33]", stays outside.
    """
    if not any(line.marks):
        return [escape(text) for text in line.cells]
    templates = {"best": best, "tie": tie}
    texts = []
    for text, mark in zip(line.cells, line.marks, strict=True):
        value, bracket, interval = text.partition(" [") if mark in templates else (text, "", "")
        texts.append(templates.get(mark, "{}").format(escape(value)) + escape(bracket + interval))
    return texts


def line_marks(line: Line) -> list[str]:
    """The superscripts of a line: a dagger if it is published, then the marks of its footnotes."""
    return ([PUBLISHED_MARK] if line.published else []) + [note_mark(index) for index in line.notes]


def _latex_marks(marks: list[str]) -> str:
    """The superscripts as LaTeX; "" for none."""
    names = [r"\dagger" if mark == PUBLISHED_MARK else mark for mark in marks]
    return f"$^{{{','.join(names)}}}$" if names else ""


def section_notes(section: Section) -> list[tuple[str, str]]:
    """(mark, text) of each footnote of a section, first the dagger's, which says that a row is published."""
    notes = [(note_mark(index), text) for index, text in enumerate(section.footnotes)]
    if any(line.published for line in section.lines):
        text = f"as published ({section.origin})"
        if section.footnotes:
            text += "; what its footnote does not name is not stated there"
        notes.insert(0, (PUBLISHED_MARK, text))
    return notes
