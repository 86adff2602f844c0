"""Launchers of packages: the commands of a study are handed to a function that was registered by name."""

from __future__ import annotations

from harness import registry
from harness.errors import RunError, UserError, one_line
from harness.io import files
from harness.runs.run import lock_folder
from harness.spec import load_attribute
from harness.studies.expand import Expansion
from harness.studies.state import Overview, failure_path, log_path, overview


def launch(study: Expansion, name: str, *, retry_failed: bool) -> Overview:
    """Call the launcher `name` with the runs that have work left and are not running; returns the progress after it."""
    hook = registry.launchers.get(name)
    call = load_attribute(hook.call, f"launcher {name!r}")
    states = ("to do", "interrupted", *(["failed"] if retry_failed else []))
    rows = [row for row in overview(study).rows if row.state in states and row.pending]
    with lock_folder(study.folder):
        for row in rows:
            with files.explained(study.folder):
                failure_path(study, row.run).unlink(missing_ok=True)
                log_path(study, row.run).parent.mkdir(parents=True, exist_ok=True)
        try:
            call(study, rows)
        except (UserError, RunError):
            raise
        except Exception as error:  # other people's code can raise anything
            raise RunError(f"launcher {name!r} failed: {one_line(error)}") from error
    return overview(study)
