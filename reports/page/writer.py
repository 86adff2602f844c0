"""The page as one file: data as JSON that a browser never runs, and scripts and styles that are allowed by their hash."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

from harness._version import VERSION
from reports.charts import Figure, Style
from reports.page.curves import figure_data, figure_pictures, record_ids
from reports.page.payload import MAX_PROBLEMS, MAX_RECORDS, InternTable, Json, record_data, shown_records, table_data
from reports.page.run_artifacts import pictures, run_recipes, sample_grids
from reports.sections import Table
from reports.verdicts import NAME as VERDICTS
from results.records import Record
from results.store import Problem

NAME = "report.html"
SCRIPTS = ("dom.js", "records.js", "tables.js", "charts.js", "page.js")  # in the order in which they are needed
MAX_FALLBACK_BYTES = 2_000_000  # of static figures for readers without scripts
_POLICY = (
    "default-src 'none'; img-src data:; script-src '{script}'; style-src '{style}'; base-uri 'none'; form-action 'none'"
)


def page_data(
    tables: Sequence[Table],
    figures: Sequence[Figure],
    records: Sequence[Record],
    *,
    styles: Mapping[str, Style],
    published: Sequence[Record],
    record_files: Sequence[Path],
    problems: Sequence[Problem],
    conflicts: Sequence[str],
) -> Json:
    """The data of a report's page for `page_bytes`, without the pictures of figures, which are drawn later.

    records: those that were loaded. published: the paper's. styles: model -> style, as in the figures. record_files: in
    their folders, recipes and sample grids are looked for. What exceeds the limits is left out and counted on the page.
    """
    shown_tables = [table_data(table) for table in sorted(tables, key=_sort_key)]
    in_tables = [
        record_id
        for table in shown_tables
        for section in table["sections"]
        for line in section["lines"]
        for record_id in line["records"]
        if record_id
    ]
    grids, grids_note = pictures(sample_grids(record_files, records))
    # In the order in which records are kept if not all fit on the page.
    wanted = [*record_ids(figures), *(record.id for grid, _ in grids for record in grid.records), *in_tables]
    chosen, left_out = shown_records([*records, *published], wanted, MAX_RECORDS)
    chosen_ids = {record.id for record in chosen}
    # Record files may hold published records as well, also the paper's.
    every = {record.id: record for record in (*records, *published)}.values()
    measured = sum(record.provenance == "measured" for record in every)
    recipes, interned = run_recipes(record_files), InternTable()
    return {
        "version": VERSION,
        "summary": {
            "protocols": _protocols(every),
            "measured": measured,
            "published": len(every) - measured,
            "problems": _capped([str(problem) for problem in problems]),
            "conflicts": _capped(list(conflicts)),
            "records_left_out": left_out,
        },
        "tables": shown_tables,
        "figures": [figure_data(figure, styles) for figure in figures],
        "grids": [
            {
                "src": uri,
                "title": grid.title,
                "records": [record.id for record in grid.records if record.id in chosen_ids],
            }
            for grid, uri in grids
        ],
        "grids_left_out": grids_note,
        "records": [record_data(record, recipes, interned) for record in chosen],
        "pool": interned.items,
    }


def page_bytes(data: Json, figures: Sequence[Figure], files: Mapping[str, bytes]) -> bytes:
    """The content of the page's file. data: of `page_data`, for the same figures.

    files: name -> content of the report's other files. Of these the page shows the pictures of figures that have some and,
    to readers without scripts, the SVG figures.
    """
    figures_data = [
        each | {"pictures": figure_pictures(figure, files)}
        for figure, each in zip(figures, data["figures"], strict=True)
    ]
    return _assemble({**data, "figures": figures_data}, files)


def _sort_key(table: Table) -> int:
    """The order of tables on the page: verdicts, then tables of protocols, then the paper's tables."""
    if table.name == VERDICTS:
        return 0
    return 2 if re.fullmatch(r"table-\d", table.name) else 1


def _assemble(data: Json, files: Mapping[str, bytes]) -> bytes:
    """page.html with its placeholders (@POLICY@, @STYLE@, ...) filled in."""
    style = _asset("page.css")
    script = "'use strict';\n(() => {\n" + "\n".join(_asset(name) for name in SCRIPTS) + "})();\n"
    policy = _POLICY.format(script=_hash(script), style=_hash(style))
    page = _asset("page.html")
    # The data comes last, because it may contain text that looks like a placeholder.
    for mark, text in (
        ("POLICY", policy),
        ("STYLE", style),
        ("SCRIPT", script),
        ("FALLBACK", _fallback(files)),
        ("DATA", _json(data)),
    ):
        page = page.replace(f"@{mark}@", text, 1)
    return page.encode("utf-8")


def _json(data: object) -> str:
    """JSON in ASCII without `<`, so that it cannot end a script element."""
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _fallback(files: Mapping[str, bytes]) -> str:
    """The HTML for readers without scripts: a hint at the tables, and SVG figures, at most MAX_FALLBACK_BYTES of them."""
    parts = ["<p>Without scripts this page shows figures alone; the tables lie beside it.</p>"]
    total = 0
    for name, content in files.items():
        if name.endswith(".svg") and total + len(content) <= MAX_FALLBACK_BYTES:
            total += len(content)
            uri = f"data:image/svg+xml;base64,{base64.b64encode(content).decode('ascii')}"
            parts.append(f'<p><img alt="{html.escape(Path(name).stem)}" src="{uri}"></p>')
    return "\n".join(parts)


def _protocols(records: Iterable[Record]) -> list[dict[str, object]]:
    """For each protocol its name and its numbers of measured and published records."""
    counts: dict[str, dict[str, int]] = {}
    for record in records:
        counts.setdefault(record.protocol, {"measured": 0, "published": 0})[record.provenance] += 1
    return [{"name": name, **counts[name]} for name in sorted(counts)]


def _capped(texts: list[str]) -> dict[str, object]:
    """The number of the texts, and the first MAX_PROBLEMS of them."""
    return {"count": len(texts), "texts": texts[:MAX_PROBLEMS]}


def _asset(name: str) -> str:
    """The text of a file of this package."""
    return resources.files("reports.page").joinpath(name).read_text(encoding="ascii")


def _hash(text: str) -> str:
    """The hash of a script or style as a Content-Security-Policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"
