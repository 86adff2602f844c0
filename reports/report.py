"""The report: every table and figure, made from record files, each file written atomically."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from harness.errors import UserError
from harness.io.files import explained, read_json, write_bytes
from reports import charts, every_eval_ever
from reports.figures import absent, figures, published_records
from reports.html_tables import to_html_page
from reports.lottery import seeds_table
from reports.page.writer import NAME, page_bytes, page_data
from reports.render import to_csv, to_latex, to_markdown
from reports.render_pool import RenderPool
from reports.sections import Table
from reports.tables import paper_tables, protocol_table
from reports.verdicts import verdict_table
from results import paper
from results.records import Record
from results.store import RECORDS_FILE, Loaded, Problem, collector_paused, find_record_files, load

TABLES = "tables and page"  # a stage of three parts, between "records" and "figures"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportSummary:
    """What was written and what could not be used.

    files: the paths of the written files. problems: unusable lines of record files. conflicts: a sentence for each
    identity with several values; its records are in no table. records: those of the protocols shown, packaged ones
    included. notes: a sentence for each figure that is not drawn because files are missing.
    """

    files: tuple[Path, ...]
    problems: tuple[Problem, ...]
    conflicts: tuple[str, ...]
    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> int:
        """Number of measured records."""
        return sum(record.provenance == "measured" for record in self.records)


def write_report(
    record_paths: Iterable[str | os.PathLike],
    out: str | os.PathLike,
    *,
    protocol: str | None = None,  # only this protocol's table and figures; None: those of every protocol with records
    progress: Callable[[str, int, int], None] | None = None,  # called as (stage, number done, number in all)
    export: bool = False,  # also write the measured records in the schema of `reports.every_eval_ever`
) -> ReportSummary:
    """Write Tables 1-6, `table-<protocol>`, the figures and the page, from these records and those packaged in results/.

    Packaged measurements are shown of `protocol` and with records of the same protocols, or all of them where there are no
    other records.

    record_paths: record files, or folders that are searched for `records.jsonl`. All files are built before the first
    is written. Tables are a pure function of the set of records: order, splitting and duplication of the files change no
    byte.
    Raises UserError (no such path, or `out` is a file) and RunError (a file cannot be written).
    """
    out = Path(out)
    if out.exists() and not out.is_dir():  # before anything is drawn
        raise UserError(f"cannot write the report to {out}: it is a file; name a folder with --out")
    notify = progress or (lambda stage, done, total: None)
    record_files = find_record_files(record_paths)
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)  # now, and not after minutes of drawing
    with RenderPool() as pool, packaged_runs() as packaged:
        with collector_paused():  # the garbage collector, which would traverse the records again and again
            loaded, packaged = _load(record_files, packaged, progress, protocol)
            records = loaded.records
            protocols = sorted({record.protocol for record in records}) if protocol is None else [protocol]
            figure_records = [record for record in records if record.protocol in protocols]
            # Without `protocol`, all of the paper's records: also those of protocols that nobody has measured.
            figure_records += published_records(None if protocol is None else protocols)
            styles = charts.model_styles(figure_records)
            notify(TABLES, 0, 3)
            shown = figures(figure_records, [path.parent for path in (*record_files, *packaged)])
            pool.begin(shown, styles)  # the workers draw while this process makes the rest
            notify(TABLES, 1, 3)
            tables, contents = table_files(records, protocols)
            contents |= {f"{figure.name}.csv": charts.to_csv(figure).encode("utf-8") for figure in shown}
            notify(TABLES, 2, 3)
            page = page_data(
                tables,
                shown,
                records,
                styles=styles,
                published=paper.records(),
                record_files=record_files,
                problems=loaded.problems,
                conflicts=loaded.conflicts,
            )
            notify(TABLES, 3, 3)
        for name, files in pool.finish(progress).items():
            contents |= {f"{name}.{kind}": data for kind, data in files.items()}
    contents[NAME] = page_bytes(page, shown, contents)
    if export:
        contents |= every_eval_ever.to_files(record for record in records if record.protocol in protocols)
    return ReportSummary(
        files=_write_all(out, contents),
        problems=loaded.problems,
        conflicts=loaded.conflicts,
        records=tuple(record for record in records if record.protocol in protocols),
        notes=absent(shown),
    )


@contextmanager
def packaged_runs() -> Iterator[list[Path]]:
    """The record files of the runs that are shipped in results/measured, each in the folder of its run."""
    with resources.as_file(resources.files("results").joinpath("measured")) as folder:
        yield sorted(folder.glob(f"*/{RECORDS_FILE}"))


def _load(
    record_files: Sequence[Path],
    packaged: Sequence[Path],
    progress: Callable[[str, int, int], None] | None,
    protocol: str | None,  # as of `write_report`
) -> tuple[Loaded, list[Path]]:
    """(the records of the files and of those packaged files that are shown with them, these packaged files)."""
    if not record_files:
        return load(packaged, progress), list(packaged)
    own = load(record_files, progress)
    protocols = {protocol, *(record.protocol for record in own.records)}
    known = {record.id for record in own.records}
    shown = [
        path
        for path in packaged
        if read_json(path.with_name("run.json"), "run")["protocol"]["name"] in protocols
        and not known.issuperset(record.id for record in load([path]).records)  # the user has the same run
    ]
    return (load([*record_files, *shown]), shown) if shown else (own, [])


@collector_paused()
def table_files(records: Sequence[Record], protocols: Sequence[str]) -> tuple[list[Table], dict[str, bytes]]:
    """(tables, file name -> content of their CSV, Markdown, LaTeX and HTML files).

    The tables: the paper's, that of each of these protocols with records, and the verdicts and the noise of seeds of
    records of these protocols.
    """
    tables = paper_tables(records)
    tables += [table for name in protocols if (table := protocol_table(name, records)) is not None]
    of_protocols = [record for record in records if record.protocol in protocols]
    tables += [table for make in (verdict_table, seeds_table) if (table := make(of_protocols)) is not None]
    renderers = (("csv", to_csv), ("md", to_markdown), ("tex", to_latex), ("html", to_html_page))
    return tables, {
        f"{table.name}.{ending}": render(table).encode("utf-8") for table in tables for ending, render in renderers
    }


def _write_all(out: Path, contents: dict[str, bytes]) -> tuple[Path, ...]:
    """Write the files (name -> content) into the folder `out`; returns their paths."""
    for name, data in contents.items():
        write_bytes(out / name, data, shared=True)  # shared: another report may write it at the same time
    return tuple(out / name for name in contents)
