"""The report: every table and figure, from record files, written whole or not at all."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path

from harness.errors import UserError
from harness.io.files import write_bytes
from reports import charts
from reports.figures import absent, figures, published_records
from reports.html_tables import to_html_page
from reports.page.writer import NAME, page_data, write_page
from reports.render import to_csv, to_latex, to_markdown
from reports.render_pool import RenderPool
from reports.sections import Table
from reports.tables import paper_tables, protocol_table
from reports.verdicts import verdict_table
from results import paper
from results.records import Record
from results.store import Problem, collector_paused, find_record_files, load

TABLES = "tables and page"  # a stage of three parts, between "records" and "figures"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportSummary:
    """What was written and what could not be used.

    problems: unusable lines of record files. conflicts: disputed identities, in no table. records: those used.
    notes: what is not drawn for want of files beside the records, a sentence each.
    """

    files: tuple[Path, ...]
    problems: tuple[Problem, ...]
    conflicts: tuple[str, ...]
    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> int:
        """Number of the measured records."""
        return sum(record.provenance == "measured" for record in self.records)


def write_report(
    record_paths: Iterable[str | os.PathLike],
    out: str | os.PathLike,
    *,
    protocol: str | None = None,  # table and figures of this protocol alone; None: of every protocol with records
    progress: Callable[[str, int, int], None] | None = None,  # called as (stage, done, in all)
) -> ReportSummary:
    """Writes tables 1-6, `table-<protocol>` and the figures from the records given and those packaged in results/.

    record_paths: record files, or folders that are searched for `records.jsonl`. All files are built before the first
    is written, and each takes its name only when it is whole. Tables are a pure function of the set of records: order,
    splitting and duplication of the files change no byte.
    Raises UserError (no such path), RunError (cannot write).
    """
    told = progress or (lambda stage, done, total: None)
    found = find_record_files(record_paths)
    packaged = resources.files("results").joinpath("measured")
    with RenderPool() as pool:
        with collector_paused():
            with resources.as_file(packaged) as folder:
                loaded = load([*found, *sorted(folder.glob("*.jsonl"))], progress)
            records = loaded.records
            protocols = sorted({record.protocol for record in records}) if protocol is None else [protocol]
            drawn = [record for record in records if record.protocol in protocols]
            drawn += published_records(None if protocol is None else protocols)
            styles = charts.model_styles(drawn)
            told(TABLES, 0, 3)
            shown = figures(drawn, [path.parent for path in found])
            pool.begin(shown, styles)  # they draw while the rest is made here
            told(TABLES, 1, 3)
            tables, contents = table_files(records, protocols)
            contents |= {f"{figure.name}.csv": charts.to_csv(figure).encode("utf-8") for figure in shown}
            told(TABLES, 2, 3)
            page = page_data(
                tables,
                shown,
                records,
                styles=styles,
                published=paper.records(),
                record_files=found,
                problems=loaded.problems,
                conflicts=loaded.conflicts,
            )
            told(TABLES, 3, 3)
        for name, files in pool.finish(progress).items():
            contents |= {f"{name}.{kind}": data for kind, data in files.items()}
    contents[NAME] = write_page(page, shown, contents)
    return ReportSummary(
        files=_write_all(Path(out), contents),
        problems=loaded.problems,
        conflicts=loaded.conflicts,
        records=records,
        notes=absent(shown),
    )


@collector_paused()
def table_files(records: Sequence[Record], protocols: Sequence[str]) -> tuple[list[Table], dict[str, bytes]]:
    """The tables, and their files by name."""
    tables = paper_tables(records)
    tables += [table for name in protocols if (table := protocol_table(name, records)) is not None]
    verdicts = verdict_table([record for record in records if record.protocol in protocols])
    tables += [verdicts] if verdicts is not None else []
    renderers = (("csv", to_csv), ("md", to_markdown), ("tex", to_latex), ("html", to_html_page))
    return tables, {
        f"{table.name}.{ending}": render(table).encode("utf-8") for table in tables for ending, render in renderers
    }


def _write_all(out: Path, contents: dict[str, bytes]) -> tuple[Path, ...]:
    if out.exists() and not out.is_dir():
        raise UserError(f"cannot write the report to {out}: it is a file; name a folder with --out")
    for name, data in contents.items():
        write_bytes(out / name, data, shared=True)
    return tuple(out / name for name in contents)
