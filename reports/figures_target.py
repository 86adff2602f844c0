"""Beyond the paper: training compute until a target is reached, over training seeds."""

import math
from collections.abc import Sequence

from reports.charts import Axis, Figure, Mark, Panel, Series
from reports.figures_study import Study, figure_or_none, name_of, training_gflops
from reports.points import better, quality_axis
from results.time_to_target import TimeToTarget, curves, log_scale, time_to_target

TARGETS = 8  # in a panel, evenly spaced over the values of its records
DIGITS = 2  # of a target


def compute_to_target(all_studies: Sequence[Study]) -> Figure | None:
    """`time-to-target`: for several targets, the training Gflops until each model reaches them, with 95 % intervals over seeds.

    Only of models with two training seeds or more that were evaluated at several lengths: never from one run. A target that
    a seed did not reach, or had reached at its first mark, has no mark.
    """
    panels: list[Panel] = []
    rows: list[dict] = []
    for study in all_studies:
        lines = [
            line
            for line in study.lines
            if line.provenance == "measured"
            and len(found := curves(r for r in line.records if training_gflops(r))) > 1
            and all(len(points) > 1 for points in found.values())
        ]
        records = [record for line in lines for record in line.records]
        direction = better(records) if records else ""
        if not direction:
            continue
        axis = quality_axis(records)
        targets = _targets([record.value for record in records], is_log=log_scale(records, 1.0))
        log = log_scale(records, targets[0])
        series = []
        for line in lines:
            marks = []
            for target in targets:
                time = time_to_target(line.records, target, higher=direction == "higher", log=log)
                if time.gflops is None:
                    continue
                marks.append(_mark(axis, target, time))
                rows.append(
                    {
                        "panel": len(panels) + 1,
                        "line": name_of(line),
                        "model": line.model,
                        "metric": line.records[0].metric,
                        "n": line.records[0].n,
                        "target": target,
                        "training_gflops": time.gflops,
                        "low": time.low,
                        "high": time.high,
                        "training_seeds": len(time.seeds),
                        "hours": time.hours,
                        "device": time.device,
                    }
                )
            if marks:
                series.append(
                    Series(
                        label=name_of(line), model=line.model, kind="line", provenance="measured", marks=tuple(marks)
                    )
                )
        if not series:
            continue
        notes = [
            *study.notes,
            "geometric means over training seeds, bars: 95 % intervals; no mark where a seed did not reach the target, or "
            "had at its first evaluation",
        ]
        panels.append(
            Panel(
                heading=study.group.heading,
                x=Axis(title=axis.title, scale=axis.scale, better=axis.better),
                y=Axis(title="Training compute to reach it", unit="Gflops", scale="log"),
                series=tuple(series),
                note="; ".join(notes),
            )
        )
    return figure_or_none("time-to-target", "Training compute to a target", panels, rows)


def _mark(axis: Axis, target: float, time: TimeToTarget) -> Mark:
    """The mark of one target. time: with a mean."""
    assert time.gflops is not None
    facts = [
        ("system", time.system),
        (f"target {axis.title}", f"{target:g}"),
        ("training Gflops", f"{time.gflops:.4g}"),
    ]
    if time.low is not None:
        facts.append(("95 % interval", f"{time.low:.4g} to {time.high:.4g}"))
    facts.append(("training seeds", str(len(time.seeds))))
    if time.hours is not None:
        facts.append((f"hours on {time.device}", f"{time.hours:.3g}"))
    return Mark(x=target, y=time.gflops, low=time.low, high=time.high, facts=tuple(facts))


def _targets(values: Sequence[float], *, is_log: bool) -> list[float]:
    """Targets of few digits, evenly spaced (is_log: in the log) over the values, ascending."""
    low, high = min(values), max(values)
    if low == high:
        return [low]
    shares = [(index + 0.5) / TARGETS for index in range(TARGETS)]
    if is_log:
        spaced = [math.exp(math.log(low) + share * (math.log(high) - math.log(low))) for share in shares]
    else:
        spaced = [low + share * (high - low) for share in shares]
    return sorted({float(f"{value:.{DIGITS}g}") for value in spaced})
