"""`harness.report`: tables and figures from published and measured records."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from harness import registry
from harness.io.progress import Stages
from harness.runs.run import RUNS_FOLDER
from harness.settings import ReportOptions, keyword_options

if TYPE_CHECKING:
    from reports.report import ReportSummary

logger = logging.getLogger(__name__)


@keyword_options(ReportOptions)
def report(options: ReportOptions) -> ReportSummary:
    """Write the paper's tables and figures, with your own models in them, from published and measured records.

    report.html shows all of them on one page, which loads no other file. UserError: a path does not exist; RunError:
    the folder cannot be written.
    """
    from reports.report import TABLES, write_report

    name = options.protocol
    if name is not None and name not in registry.protocols and not name.endswith(".toml"):
        # Only a warning: the records may be of a protocol that is not installed here.
        logger.warning(registry.unknown("protocol", name, registry.protocols.names()))
    paths = options.results or ((RUNS_FOLDER,) if RUNS_FOLDER.exists() else ())
    with Stages({"records": "files", TABLES: "parts", "figures": "figures"}) as progress:
        out = options.out or RUNS_FOLDER / "report"
        return write_report(paths, out, protocol=name, progress=progress, export=options.export is not None)
