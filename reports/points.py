"""The material of figures: groups of comparable records, the lines through them, and means over seeds.

Every function is one pass over the records with plain tuples as keys, so that a hundred thousand records are fast.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from reports.charts import Axis, Mark, Series, model_of
from reports.rows import groups
from reports.tables import may_share
from reports.texts import count_text, guidance_text, measured_text, metric_name, row_metadata
from results.metrics import shared_direction
from results.records import Record, Sampling, Training, comparable_key

QUALITY_METRICS = ("fid", "fd")
MAX_LINES = 24  # in a panel; more cannot be told apart
WIDE_RANGE = 8.0  # largest over smallest value from which the axis of quality is logarithmic
BEYOND = 1e60  # larger numbers are no measurements and fit on no axis
SIGNS = {"lower": 1, "higher": -1, "": 0}  # the factor of a value that makes the best the smallest
MAX_GROUPS = 6  # of comparable records in a figure
# Metadata that the label of a line may name, where another line of the same system differs in it.
_LABEL_METADATA = (
    *("training steps", "recipe", "batch", "learning rate", "objective", "schedule", "training precision", "sampler"),
    *("sampling steps", "eta", "guidance", "clip denoised", "decoder", "uint8 rule", "label policy"),
    *("sampling precision", "framework", "protocol version", "suite version", "mode"),
)
_WITHOUT_NAME = frozenset({"training steps", "sampler", "sampling steps", "guidance", "decoder", "framework"})
_SEEDS = ("seed", "checkpoint_sha256", "micro_batch", "samples_sha256", "batch")
ALONG_SAMPLING = ("steps", "stage_steps", "evaluations", "gflops_per_image")
ALONG_TRAINING = ("steps", "images", "gflops")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Records that may stand in one panel."""

    heading: str
    records: tuple[Record, ...]  # published ones first

    @property
    def representative(self) -> Record:
        """A record from which to read what all have in common: a measured one if there is one, because it states more."""
        return next((record for record in self.records if record.provenance == "measured"), self.records[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """Records that differ only in what varies along the line, in seeds, and in settings that only move low bits."""

    label: str
    records: tuple[Record, ...]

    @property
    def model(self) -> str:
        return model_of(self.records[0])

    @property
    def provenance(self) -> str:
        return self.records[0].provenance


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RecordIndex:
    """Measured records by comparable key, sorted once for all figures."""

    every: Mapping[tuple, Sequence[Record]]  # comparable key -> records
    quality: Mapping[tuple, Sequence[Record]]  # those of FID or FD


def index_of(measured: Iterable[Record]) -> RecordIndex:
    """The index of measured records, without values that fit on no axis."""
    every: dict[tuple, list[Record]] = {}
    for record in measured:
        if abs(record.value) < BEYOND:
            every.setdefault(comparable_key(record), []).append(record)
    best = {key: [record for record in own if record.metric in QUALITY_METRICS] for key, own in every.items()}
    return RecordIndex(every=every, quality={key: own for key, own in best.items() if own})


def comparable_groups(
    measured: Mapping[tuple, Sequence[Record]], published: Iterable[Record]
) -> tuple[list[Group], int]:
    """Groups of comparable records, the paper's first, and the number of groups that are left out.

    Published records join a measured group if they may share a table with exactly one; otherwise they are a group.
    """
    ours = dict(measured)
    papers: dict[tuple, list[Record]] = {}
    for record in published:
        papers.setdefault(comparable_key(record), []).append(record)
    made = []
    for members in papers.values():
        joined = [key for key, own in ours.items() if may_share(members[0], own[0])]
        own = ours.pop(joined[0]) if len(joined) == 1 else []
        made.append([*members, *own])
    kept = sorted(ours, key=lambda key: (-len(ours[key]), str(key)))[:MAX_GROUPS]
    order = [found[0] for found in groups(ours[key][0] for key in kept)]
    made += [ours[comparable_key(record)] for record in order]
    found = [Group(heading="", records=tuple(members)) for members in made]
    found = [dataclasses.replace(group, heading=heading_of(group.representative)) for group in found]
    return found, len(ours) - len(kept)


def heading_of(record: Record) -> str:
    """In words, what the records of a group have in common."""
    text = f"{record.dataset} {record.resolution}x{record.resolution}, N = {record.n:,}"
    evaluation = record.evaluation
    if evaluation is None:
        return text
    features, reference = (evaluation.features_sha256 or "")[:8], (evaluation.reference_sha256 or "")[:8]
    text += f", suite {evaluation.suite}, {evaluation.features or 'features'}{f' ({features})' if features else ''}"
    return f"{text}, reference {reference}" if reference else text


def by_metric(records: Iterable[Record], wanted: Sequence[str]) -> dict[tuple[str, str], list[Record]]:
    """(metric, mode) -> records, in the order of `wanted`."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.metric in wanted:
            mode = record.evaluation.mode if record.evaluation is not None else None
            found.setdefault((record.metric, mode or ""), []).append(record)
    return dict(sorted(found.items(), key=lambda pair: (wanted.index(pair[0][0]), pair[0][1])))


def quality(records: Sequence[Record]) -> list[Record]:
    """The records of FID, or of FD where there is no FID, in the first mode by name."""
    return next(iter(by_metric(records, QUALITY_METRICS).values()), [])


def longest_trained(records: Iterable[Record]) -> list[Record]:
    """The records of the longest training of each system, published and measured apart."""
    found: dict[tuple, list[Record]] = {}
    longest: dict[tuple, int] = {}
    for record in records:
        key, steps = (record.provenance, record.system), (record.training.steps or 0) if record.training else 0
        if steps > longest.get(key, -1):
            longest[key], found[key] = steps, []
        if steps == longest[key]:
            found[key].append(record)
    return [record for own in found.values() for record in own]


def is_guided(record: Record) -> bool:
    """Whether the images were sampled with guidance."""
    sampling = record.sampling
    if record.source is not None and "-G" in record.row:  # the paper names guided systems so
        return True
    if sampling is None:
        return False
    return sampling.guidance_scale not in (None, 1.0) or sampling.guidance_channels == "classifier"


def usual_sampling(records: Sequence[Record]) -> tuple[list[Record], str]:
    """The records without guidance at the setting that most models share, and the name of that setting.

    Of several such settings it is the one with the most steps. A system without it has its setting of the most
    steps. Where all records are guided, guidance is part of the setting.
    """
    plain = [record for record in records if not is_guided(record)] or list(records)
    models: dict[tuple, set[str]] = {}
    own: dict[tuple, dict[tuple, list[Record]]] = {}  # system -> setting -> records
    for record in plain:
        setting = _setting(record)
        models.setdefault(setting, set()).add(model_of(record))
        drawn = own.setdefault((record.provenance, record.system, record.backbone), {})
        drawn.setdefault(setting, []).append(record)
    usual = max(models, key=lambda setting: (len(models[setting]), setting[1], str(setting)))
    kept, others = [], 0
    for drawn in own.values():
        others += usual not in drawn
        most = usual if usual in drawn else max(drawn, key=lambda setting: (setting[1], str(setting)))
        kept += drawn[most]
    words = []
    if usual[0]:
        guidance = f"guidance {usual[3]:g}" if usual[3] is not None else "no guidance"
        words.append(f"sampled by {usual[0]} with {usual[1]} steps, {guidance}")
    words += [f"{others} of {len(own)} systems at their own most steps"] if others and usual[0] else []
    return kept, "; ".join(words)


def _setting(record: Record) -> tuple:
    """(sampler, steps, eta, guidance scale)."""
    sampling = record.sampling
    if sampling is None:
        return ("", 0, None, None)
    scale = None if sampling.guidance_scale == 1.0 else sampling.guidance_scale
    return (sampling.sampler or "", sampling.steps or 0, sampling.eta, scale)


def quality_axis(records: Sequence[Record]) -> Axis:
    """The axis of a metric: logarithmic where its values are far apart."""
    first = records[0]
    mode = (first.evaluation.mode if first.evaluation else None) or ""
    features = first.evaluation.features if first.evaluation else None
    title = metric_name(first.metric, first.n, mode, features)
    values = [record.value for record in records]
    wide = min(values) > 0 and max(values) > WIDE_RANGE * min(values)
    return Axis(title=title, scale="log" if wide else "linear", better=better(records))


def bars_note(series: Iterable[Series]) -> list[str]:
    """Notes on how the paper's marks look and what bars are; empty where there are neither."""
    series = list(series)
    both = {each.provenance for each in series} >= {"published", "measured"}
    notes = ["hollow, dotted or pale: the paper's"] if both else []
    marks = [mark for each in series for mark in each.marks if mark.low is not None]
    if any(len(mark.record_ids) > 1 for mark in marks):
        return [*notes, "marks: means over seeds, bars: lowest and highest seed"]
    return [*notes, "bars: 95 % intervals"] if marks else notes


def settings_of(records: Iterable[Record], along: Sequence[str], part: type) -> list[list[Record]]:
    """Groups of records that differ only in seeds, in settings that move low bits, and in the fields `along` of `part`."""
    training = _getter(Training, along if part is Training else ())
    sampling = _getter(Sampling, along if part is Sampling else ())
    found: dict[tuple, list[Record]] = {}
    for record in records:
        key = (
            *(record.provenance, record.system, record.backbone, record.framework, record.protocol_version),
            training(record.training) if record.training is not None else None,
            sampling(record.sampling) if record.sampling is not None else None,
            record.evaluation.suite_version if record.evaluation is not None else None,
            (record.table, record.row) if record.source is not None and not along else None,
        )
        found.setdefault(key, []).append(record)
    return list(found.values())


def lines_of(records: Sequence[Record], along: Sequence[str], part: type) -> tuple[list[Line], int]:
    """Lines by name, and the number of lines left out: published lines and the best MAX_LINES are kept.

    along: the fields of `part` (Training or Sampling) that may differ within a line.
    """
    found = settings_of(records, along, part)
    kept = found
    if len(kept) > MAX_LINES:
        sign = SIGNS[better(records)]
        order = [(own[0].provenance != "published", min(sign * r.value for r in own), own[0].system) for own in kept]
        kept = [own for _, own in sorted(zip(order, kept, strict=True), key=lambda pair: pair[0])[:MAX_LINES]]
    kept = [sorted(own, key=lambda record: record.id) for own in kept]
    kept.sort(key=lambda own: (model_of(own[0]), own[0].system, own[0].provenance, own[0].id))
    labels = _labels([own[0] for own in kept], along, part)
    lines = [Line(label=label, records=tuple(own)) for label, own in zip(labels, kept, strict=True)]
    return lines, len(found) - len(kept)


def marks_of(
    records: Iterable[Record], x: Callable[[Record], float | None], text: Callable[[Record], str] = lambda record: ""
) -> tuple[Mark, ...]:
    """One mark for each x, ascending: a record with its interval, or the mean of several with their range."""
    found: dict[float, list[Record]] = {}
    for record in records:
        place = x(record)
        if place is not None and abs(place) < BEYOND:
            found.setdefault(float(place), []).append(record)
    return tuple(_mark(place, own, text(own[0])) for place, own in sorted(found.items()))


def _mark(x: float, records: list[Record], text: str) -> Mark:
    records = sorted(records, key=lambda record: record.id)
    first, values = records[0], [record.value for record in records]
    mean, low, high = values[0], first.low, first.high
    if low is not None and high is not None and max(abs(low), abs(high)) >= BEYOND:
        low = high = None
    if len(records) > 1:
        mean, low, high = sum(values) / len(values), min(values), max(values)
    return Mark(
        x=x,
        y=mean,
        low=low,
        high=high,
        text=text,
        record_ids=tuple(record.id for record in records),
        facts=mark_details(first, len(records), measured_text(mean, low, high)),
    )


def at_place(x: float) -> Callable[[Record], float]:
    """A function that puts every record at `x`."""
    return lambda record: x


def mark_details(record: Record, runs: int, value: str) -> tuple[tuple[str, str], ...]:
    """(name, text) pairs that the page shows when the pointer is at a mark."""
    title = metric_name(record.metric, record.n)
    shown = {"system": record.system, title: value}
    if runs > 1:
        shown["runs"] = f"{runs}: mean [lowest, highest]"
    known = row_metadata(record)
    names = ("training steps", "sampler", "sampling steps", "guidance", "decoder", "framework")
    shown |= {name: known[name] for name in names if name in known}
    if record.source is not None:
        shown["printed in"] = f"{record.table}: {record.row}"
    return tuple(shown.items())


def better(records: Iterable[Record]) -> str:
    """Which way is better for records of one metric: "higher" or "lower", or "" where that is not known."""
    direction = shared_direction(records)
    return "" if direction is None else "higher" if direction else "lower"


def data_row(record: Record, panel: int, line: str, x: Mapping[str, object]) -> dict[str, object]:
    """A row of a figure's CSV: where the record is drawn, what it is, and its value, nothing rounded."""
    training, sampling, source = record.training, record.sampling, record.source
    return {
        "panel": panel,
        "line": line,
        "provenance": record.provenance,
        "model": model_of(record),
        "system": record.system,
        "protocol": record.protocol,
        **x,
        "training_steps": training.steps if training else None,
        "training_seed": training.seed if training else None,
        "sampler": sampling.sampler if sampling else None,
        "sampling_steps": sampling.steps if sampling else None,
        "guidance_scale": sampling.guidance_scale if sampling else None,
        "sampling_seed": sampling.seed if sampling else None,
        "metric": record.metric,
        "n": record.n,
        "value": record.value,
        "low": record.low,
        "high": record.high,
        "source": f"{source.table}: {source.row}" if source else "",
        "record_id": record.id,
    }


def left_out(lines: int, groups: int = 0) -> str:
    """A note on the lines and groups that are not drawn; "" where all are."""
    words = [f"{lines} more lines are not drawn (the best {MAX_LINES} are)"] if lines else []
    words += (
        [f"{groups} more sets of comparable records are not drawn (the {MAX_GROUPS} largest are)"] if groups else []
    )
    return "; ".join(words)


def _getter(part: type, along: Sequence[str]) -> Callable[[object], tuple]:
    names = [field.name for field in dataclasses.fields(part) if field.name not in (*along, *_SEEDS)]
    if part is Training:
        names.append("batch")  # of training it is part of the recipe; of sampling it moves low bits
    return operator.attrgetter(*names)


def paper_name(record: Record) -> str:
    """`DiT-XL/2`, `ADM-G, ADM-U`: the printed model of a published row, without the settings that follow it."""
    return re.split(r", (?=\d)", record.row)[0]


def _labels(records: Sequence[Record], along: Sequence[str], part: type) -> list[str]:
    """The system's name; where it has several lines, with the metadata in which they differ."""
    words = []
    for record in records:
        training, mode = record.training, record.evaluation.mode if record.evaluation else None
        found = row_metadata(record) | {"guidance": f"guidance {guidance_text(record)}", "mode": mode or ""}
        found["training steps"] = f"{count_text(training.steps)} steps" if training else ""
        found["sampling steps"] = f"{found['sampling steps']} sampling steps" if "sampling steps" in found else ""
        if "steps" in along:
            found["training steps" if part is Training else "sampling steps"] = ""
        words.append({name: found.get(name, "") for name in _LABEL_METADATA})
    peers: dict[str, dict[str, set[str]]] = {}  # system -> name -> texts of its lines
    for record, found in zip(records, words, strict=True):
        own = peers.setdefault(record.system, {name: set() for name in _LABEL_METADATA})
        for name, text in found.items():
            own[name].add(text)
    taken: dict[str, int] = {}
    labels = []
    for record, found in zip(records, words, strict=True):
        own = peers[record.system]
        differences = [
            text if name in _WITHOUT_NAME else f"{name} {text}"
            for name, text in found.items()
            if text and len(own[name]) > 1
        ]
        differences += ["paper"] if record.provenance == "published" else []
        label = f"{record.system} ({', '.join(differences)})" if differences else record.system
        taken[label] = taken.get(label, 0) + 1
        labels.append(f"{label} #{taken[label]}" if taken[label] > 1 else label)
    return labels
