"""The points of the figures: which records are drawn, on which panel, on which line."""

import dataclasses
from collections.abc import Iterable, Sequence

from reports.columns import count_text, facts, guidance_text, key_text
from reports.rows import groups
from reports.tables import may_share
from results import paper
from results.records import Record, canonical_json

QUALITY_METRICS = ("fid", "fd")
# What a line's label may name where another line of the same system differs in it.
_LABEL_FACTS = (
    *("training steps", "recipe", "batch", "learning rate", "objective", "schedule", "training precision", "sampler"),
    *("eta", "guidance", "clip denoised", "decoder", "uint8 rule", "label policy", "sampling precision", "framework"),
    *("protocol version", "suite version", "mode", "provenance"),
)
_SPEAK_FOR_THEMSELVES = frozenset(
    {"training steps", "sampler", "guidance", "decoder", "framework", "mode", "provenance"}
)
FIGURE_10_SOURCE = "Section 5.2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One point of Figure 10."""

    panel: int  # from 1; points of different panels are not comparable
    heading: str  # what the points of a panel agree in
    line: str  # label of the line; runs that differ only in seeds share it
    run: str  # tells the seeds of a line apart
    model: str  # decides the colour
    provenance: str
    sampling_steps: int | None
    stage_steps: str | None  # "50 + 50", where several networks make an image one after another
    gflops_per_image: float
    metric: str
    n: int
    value: float
    low: float | None
    high: float | None
    source: str  # where a published value is printed, or ""
    record_id: str


def sampling_points(records: Iterable[Record], metric: str | None = None) -> list[Point]:
    """The points of Figure 10: sampling compute against quality, for records that know both.

    metric: the record key on the y axis; None: `fid` or `fd`, whichever a panel has. Published points are drawn where
    no measured ones are, and beside measured ones that may share a table with them.
    """
    metrics = QUALITY_METRICS if metric is None else (metric,)
    usable = [
        record
        for record in records
        if record.metric in metrics and record.sampling is not None and record.sampling.gflops_per_image
    ]
    measured = [record for record in usable if record.provenance == "measured"]
    published = [record for record in usable if record.source and record.source.table == FIGURE_10_SOURCE]
    panels = groups(measured)
    joined = [panel for panel in panels if published and may_share(published[0], panel[0])]
    if len(joined) == 1:
        joined[0] += published
    elif not panels and published:
        panels = [published]
    parts = [[record for record in panel if record.metric == key] for panel in panels for key in metrics]
    parts = [part for part in parts if part]
    return [point for number, part in enumerate(parts, start=1) for point in _panel_points(number, part)]


def published_sampling_records() -> list[Record]:
    """The two points of Figure 10 that the paper's text states."""
    return [record for record in paper.records() if record.source.table == FIGURE_10_SOURCE]


def _panel_points(number: int, records: Sequence[Record]) -> list[Point]:
    measured = [record for record in records if record.provenance == "measured"]
    heading = key_text((measured or records)[0])
    labels = _line_labels(records)
    points = [
        Point(
            panel=number,
            heading=heading,
            line=labels[_line_key(record)],
            run=_run_text(record),
            model=record.backbone or record.system,
            provenance=record.provenance,
            sampling_steps=record.sampling.steps,
            stage_steps=record.sampling.stage_steps,
            gflops_per_image=record.sampling.gflops_per_image,
            metric=record.metric,
            n=record.n,
            value=record.value,
            low=record.low,
            high=record.high,
            source=f"{record.source.table}: {record.source.row}" if record.source else "",
            record_id=record.id,
        )
        for record in records
    ]
    return sorted(
        points, key=lambda point: (point.model, point.line, point.run, point.gflops_per_image, point.record_id)
    )


def _line_labels(records: Sequence[Record]) -> dict[str, str]:
    """The system's name, with what tells its lines apart where it has several."""
    words: dict[str, tuple[str, dict[str, str]]] = {}
    for record in records:
        training, mode = record.training, record.evaluation.mode if record.evaluation else None
        found = facts(record) | {"guidance": f"guidance {guidance_text(record)}", "mode": mode or ""}
        found |= {"training steps": f"{count_text(training.steps)} steps" if training else ""}
        found |= {"provenance": "paper" if record.provenance == "published" else ""}
        words[_line_key(record)] = (record.system, {name: found.get(name, "") for name in _LABEL_FACTS})
    labels: dict[str, str] = {}
    for key, (system, found) in sorted(words.items()):
        peers = [other for name, other in words.values() if name == system]
        told = [
            text if name in _SPEAK_FOR_THEMSELVES else f"{name} {text}"
            for name, text in found.items()
            if text and len({peer[name] for peer in peers}) > 1
        ]
        if found["provenance"] and "paper" not in told:
            told.append("paper")
        label = f"{system} ({', '.join(told)})" if told else system
        taken = sum(other == label or other.startswith(f"{label} #") for other in labels.values())
        labels[key] = f"{label} #{taken + 1}" if taken else label
    return labels


def _line_key(record: Record) -> str:
    """What the points of one line agree in: all of the identity but the number of sampling steps and the seeds."""
    sampling = dataclasses.asdict(record.sampling)
    for name in ("steps", "stage_steps", "evaluations", "gflops_per_image", "samples_sha256", "seed", "batch"):
        del sampling[name]
    training = dataclasses.asdict(record.training) if record.training else {}
    for name in ("seed", "checkpoint_sha256", "micro_batch"):
        training.pop(name, None)
    evaluation = record.evaluation
    judged = [evaluation.mode, evaluation.suite_version] if evaluation else []
    parts = [record.provenance, record.protocol_version, record.metric, record.system, record.backbone]
    return canonical_json([*parts, record.framework, *judged, training, sampling])


def _run_text(record: Record) -> str:
    training = record.training
    seeds = {
        "training seed": training.seed if training else None,
        "sampling seed": record.sampling.seed,
        "checkpoint": training.checkpoint_sha256[:12] if training and training.checkpoint_sha256 else None,
    }
    return ", ".join(f"{name} {value}" for name, value in seeds.items() if value is not None)
