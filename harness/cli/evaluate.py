"""`harness evaluate`: the third stage of run.

Its flags are the fields of `EvaluateOptions` in `harness/settings/evaluate_flags.py` and what it imports.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from harness.cli.flags_from_settings import json_option, settings_options
from harness.settings import EvaluateOptions

if TYPE_CHECKING:
    from harness.pipeline.evaluate import EvaluateResult


@click.command("evaluate")
@settings_options(EvaluateOptions)
@json_option
def command(as_json: bool, **options: Any) -> None:
    """Measure a sample set and keep the records. SAMPLES: an .npz of ADM's layout or the folder that holds
    samples.npz, an .npy, a folder of PNG files, shards (.npz, .tar), or a pattern of these.

    \b
        harness evaluate samples.npz --protocol imagenet-256 --suite adm \\
                --reference VIRTUAL_imagenet256_labeled.npz --inception classify_image_graph_def.pb
    """
    from harness.pipeline.evaluate import RecordsNotWritten, evaluate

    try:
        result = evaluate(**options)
    except RecordsNotWritten as error:
        _print(error.result, as_json)  # measuring may have taken hours
        raise
    _print(result, as_json)
    if result.records and not as_json:
        click.echo(f"records: {result.records_file}")


def _print(result: EvaluateResult, as_json: bool) -> None:
    """Print what was measured; nothing in processes other than the main one of several."""
    from results.records import to_json

    if not result.records:
        return
    if as_json:
        document = {"records": [json.loads(to_json(record)) for record in result.records], "notes": result.notes}
        click.echo(json.dumps(document, indent=2))
        return
    from harness.cli.tables import print_records

    print_records(result.records)
    if result.note:
        click.echo(f"suite {result.suite}: {result.note}")
