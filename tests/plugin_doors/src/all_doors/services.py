"""A logger, a launcher and a figure."""

import subprocess


class Lines:
    """Steps and losses as lines of text."""

    needs_past_steps = False

    def __init__(self, run, done):
        self.file = (run.folder / "lines.txt").open("a")

    def write(self, step, values):
        self.file.write(f"{step} {values['train/loss']:.6g}\n")

    def flush(self):
        self.file.flush()

    def close(self):
        self.file.close()


def launch(study, rows):
    from harness.studies.state import log_path

    for row in rows:
        with log_path(study, row.run).open("a") as log:
            for words in row.pending:
                if subprocess.run(words, stdout=log, stderr=log).returncode:
                    break


def figure(records):
    from reports.charts import Axis, Figure, Mark, Panel, Series

    found = [each for each in records if each.metric == "doors_gap" and each.gflops]
    series = tuple(
        Series(
            label=each.system, model=each.backbone, kind="points", provenance="measured",
            marks=(Mark(x=each.gflops, y=each.value, text=each.system, record_ids=(each.id,)),),
        )
        for each in found
    )  # fmt: skip
    panel = Panel(
        heading="digits",
        x=Axis(title="Gflops", scale="log"),
        y=Axis(title="gap", unit="share", better="lower"),
        series=series,
    )
    rows = tuple({"system": each.system, "gflops": each.gflops, "gap": each.value} for each in found)
    return Figure(name="doors-figure", title="Gap over Gflops", panels=(panel,), rows=rows) if found else None


def torn(records):
    raise OSError("no ink")
