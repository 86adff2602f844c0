"""What figures are made of: groups of comparable records, the lines through them, and means over seeds.

Functions pass over the records once, with plain tuples as keys, so that a hundred thousand records are fast.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from harness.diffusion.guidance import Guidance
from reports.charts import Axis, Mark, Series, model_of
from reports.rows import groups
from reports.tables import may_share
from reports.texts import count_text, guidance_text, measured_text, metric_name, row_metadata, suite_text
from results.experiments import group_of
from results.metrics import shared_direction
from results.records import Record, Sampling, Training, comparable_key

QUALITY_METRICS = ("fid", "fd")
MAX_LINES = 24  # in a panel; more cannot be told apart
WIDE_RANGE = 8.0  # largest over smallest value from which the axis of quality is logarithmic
BEYOND = 1e60  # larger numbers are no measurements and fit on no axis
# Which values are better -> the factor that makes the best value the smallest. "": not known, so all become equal.
SIGNS = {"lower": 1, "higher": -1, "": 0}
MAX_GROUPS = 6  # of comparable records in a figure
# Metadata that the label of a line may name, where another line of the same system differs in it.
_LABEL_METADATA = (
    *("training steps", "recipe", "batch", "learning rate", "objective", "schedule", "training precision", "sampler"),
    *("time distribution", "loss weight", "noise scale", "auxiliary loss", "spacing", "EMA width"),
    *("training data", "training latents", "plug-in code", "earlier precision"),
    *("sampling steps", "eta", "guidance", "clip denoised", "decoder", "uint8 rule", "label policy"),
    *("sampling precision", "framework", "protocol version", "suite version", "mode"),
)
# Metadata whose text needs no name before it.
_WITHOUT_NAME = frozenset({"training steps", "sampler", "sampling steps", "guidance", "decoder", "framework"})
# Fields of Training and Sampling in which records of one line may differ: seeds, what follows from seeds, and what changes
# only low bits.
_IGNORED = ("seed", "checkpoint_sha256", "micro_batch", "forked_at", "parent_sha256", "samples_sha256", "batch")
ALONG_SAMPLING = ("steps", "stage_steps", "evaluations", "gflops_per_image")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Comparable records, which may be in one panel."""

    heading: str
    records: tuple[Record, ...]  # published ones first

    @property
    def representative(self) -> Record:
        """A record for reading what all have in common: a measured one if there is one, because it states more."""
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
    quality: Mapping[tuple, Sequence[Record]]  # of these the records of FID and FD; only keys that have some


def index_of(measured: Iterable[Record]) -> RecordIndex:
    """The index of measured records, without those whose values fit on no axis."""
    every: dict[tuple, list[Record]] = {}
    for record in measured:
        if abs(record.value) < BEYOND:
            every.setdefault(comparable_key(record), []).append(record)
    with_empty = {key: [record for record in found if record.metric in QUALITY_METRICS] for key, found in every.items()}
    return RecordIndex(every=every, quality={key: found for key, found in with_empty.items() if found})


def comparable_groups(
    measured: Mapping[tuple, Sequence[Record]], published: Iterable[Record]
) -> tuple[list[Group], int]:
    """(groups of comparable records, the paper's first; number of groups that are left out).

    measured: comparable key -> records. Published records join a measured group if they may share a table with exactly
    one; otherwise they are a group of their own. At most MAX_GROUPS other measured groups are kept, the largest.
    """
    unjoined = dict(measured)
    papers: dict[tuple, list[Record]] = {}
    for record in published:
        papers.setdefault(comparable_key(record), []).append(record)
    members_of_groups = []
    for members in papers.values():
        matching = [key for key, records in unjoined.items() if may_share(members[0], records[0])]
        joined = unjoined.pop(matching[0]) if len(matching) == 1 else []
        members_of_groups.append([*members, *joined])
    kept = sorted(unjoined, key=lambda key: (-len(unjoined[key]), str(key)))[:MAX_GROUPS]
    # In the order of tables, as `groups` sorts them; the first record of each key is enough for that.
    firsts = [record for (record,) in groups(unjoined[key][0] for key in kept)]
    members_of_groups += [unjoined[comparable_key(record)] for record in firsts]
    without_heading = [Group(heading="", records=tuple(members)) for members in members_of_groups]
    # The heading is that of the representative, which the group chooses.
    found = [dataclasses.replace(group, heading=heading_of(group.representative)) for group in without_heading]
    return found, len(unjoined) - len(kept)


def heading_of(record: Record) -> str:
    """What the records of a group have in common: `digits 8x8, N = 1,000, suite ..., features (hash), reference hash`."""
    text = f"{record.dataset} {record.resolution}x{record.resolution}, N = {record.n:,}"
    evaluation = record.evaluation
    if evaluation is None:
        return text
    features, reference = (evaluation.features_sha256 or "")[:8], (evaluation.reference_sha256 or "")[:8]
    text += (
        f", suite {suite_text(evaluation)}, {evaluation.features or 'features'}{f' ({features})' if features else ''}"
    )
    return f"{text}, reference {reference}" if reference else text


def by_metric(records: Iterable[Record], wanted: Sequence[str]) -> dict[tuple[str, str], list[Record]]:
    """(metric, mode) -> records of the metrics in `wanted`, in that order, then by mode; most records have the mode ""."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.metric in wanted:
            mode = record.evaluation.mode if record.evaluation is not None else None
            found.setdefault((record.metric, mode or ""), []).append(record)
    return dict(sorted(found.items(), key=lambda pair: (wanted.index(pair[0][0]), pair[0][1])))


def quality(records: Sequence[Record]) -> list[Record]:
    """The records of FID, or of FD if there are none of FID; [] if there are neither.

    Of several modes: those without a mode, or else those of the first mode by name.
    """
    return next(iter(by_metric(records, QUALITY_METRICS).values()), [])


def longest_trained(records: Iterable[Record]) -> list[Record]:
    """The records of the longest training of each system; published and measured systems count separately.

    Training steps that are not stated count as 0.
    """
    found: dict[tuple, list[Record]] = {}  # (provenance, system) -> records of its longest training so far
    longest: dict[tuple, int] = {}  # (provenance, system) -> steps of that training
    for record in records:
        key, steps = (record.provenance, record.system), (record.training.steps or 0) if record.training else 0
        if steps > longest.get(key, -1):
            longest[key], found[key] = steps, []
        if steps == longest[key]:
            found[key].append(record)
    return [record for records_of_system in found.values() for record in records_of_system]


def is_guided(record: Record) -> bool:
    """Whether the images were sampled with guidance, as the record states or, for a published one, as its name says."""
    sampling = record.sampling
    if record.source is not None and "-G" in record.row:  # "ADM-G", "LDM-4-G", "DiT-XL/2-G": G is for guided
        return True
    if sampling is None:
        return False
    return sampling.is_guided


def usual_sampling(records: Sequence[Record]) -> tuple[list[Record], str]:
    """(records without guidance at the sampling setting that most models share, note that names the setting).

    If several settings are shared by equally many models, it is the one with the most sampling steps. A system that was
    not sampled with it is shown at its own setting with the most steps. If all records are guided, the guided ones are
    taken, and guidance is part of the setting.
    """
    candidates = [record for record in records if not is_guided(record)] or list(records)
    models: dict[_SamplingSetting, set[str]] = {}  # setting -> models
    systems: dict[tuple, dict[_SamplingSetting, list[Record]]] = {}  # system -> setting -> records
    for record in candidates:
        setting = _sampling_setting(record)
        models.setdefault(setting, set()).add(model_of(record))
        of_system = systems.setdefault((record.provenance, record.system, record.backbone), {})
        of_system.setdefault(setting, []).append(record)
    usual = max(models, key=lambda setting: (len(models[setting]), setting.steps, str(setting)))
    kept, others = [], 0  # others: number of systems without the usual setting
    for of_system in systems.values():
        others += usual not in of_system
        shown = usual if usual in of_system else max(of_system, key=lambda setting: (setting.steps, str(setting)))
        kept += of_system[shown]
    words = []
    if usual.sampler:
        guidance = "guidance, scale not stated" if is_guided(candidates[0]) else "no guidance"
        guidance = guidance if usual.guidance is None else f"guidance {usual.guidance.short}"
        steps = f" with {usual.steps} steps" if usual.steps else ""
        words.append(f"sampled by {usual.sampler}{steps}, {guidance}")
        words += [f"{others} of {len(systems)} systems at their own most steps"] if others else []
    return kept, "; ".join(words)


class _SamplingSetting(NamedTuple):
    """How images were sampled, without seeds and precision."""

    sampler: str  # "": not stated
    steps: int  # 0: not stated
    eta: float | None
    guidance: Guidance | None  # None: without guidance, or not stated


def _sampling_setting(record: Record) -> _SamplingSetting:
    sampling = record.sampling or Sampling()
    guidance = sampling.guidance if sampling.is_guided else None
    return _SamplingSetting(sampling.sampler or "", sampling.steps or 0, sampling.eta, guidance)


def quality_axis(records: Sequence[Record]) -> Axis:
    """The axis of these records' metric: logarithmic if the largest value is more than WIDE_RANGE times the smallest."""
    first = records[0]
    mode = (first.evaluation.mode if first.evaluation else None) or ""
    features = first.evaluation.features if first.evaluation else None
    title = metric_name(first.metric, first.n, mode, features)
    values = [record.value for record in records]
    wide = min(values) > 0 and max(values) > WIDE_RANGE * min(values)
    return Axis(title=title, scale="log" if wide else "linear", better=better(records))


def bars_note(series: Iterable[Series]) -> list[str]:
    """Notes on how the paper's marks look, and on what the error bars are; empty if there is nothing to explain."""
    series = list(series)
    has_both = {each.provenance for each in series} >= {"published", "measured"}
    notes = ["hollow, dotted or pale: the paper's"] if has_both else []
    marks = [mark for each in series for mark in each.marks if mark.low is not None]
    if any(len(mark.record_ids) > 1 for mark in marks):
        return [*notes, "marks: means over seeds, bars: lowest and highest seed"]
    return [*notes, "bars: 95 % intervals"] if marks else notes


def group_by_settings(records: Iterable[Record], along: Sequence[str], part: type) -> list[list[Record]]:
    """Groups of records that differ only in metric, seeds, settings that change low bits, and the fields `along` of `part`.

    part: Training or Sampling, the part of a record that has the fields `along`.
    """
    training_key = _settings_getter(Training, along if part is Training else ())
    sampling_key = _settings_getter(Sampling, along if part is Sampling else ())
    found: dict[tuple, list[Record]] = {}
    for record in records:
        key = (
            record.provenance,
            record.system,
            record.backbone,
            record.framework,
            record.protocol_version,
            training_key(record.training) if record.training is not None else None,
            # checkpoints whose training seed is not known are no seeds of one line
            record.training.checkpoint_sha256 if record.training and record.training.seed is None else None,
            sampling_key(record.sampling.without_counts) if record.sampling is not None else None,
            record.evaluation.suite_version if record.evaluation is not None else None,
            # The paper does not state every setting, so its rows stay apart, except as points along a line.
            (record.table, record.row) if record.source is not None and not along else None,
        )
        found.setdefault(key, []).append(record)
    return list(found.values())


def lines_of(records: Sequence[Record], along: Sequence[str], part: type) -> tuple[list[Line], int]:
    """(lines, sorted by name; number of lines that are left out). At most MAX_LINES are kept: published ones, then the best.

    records: of one metric. along: the fields of `part` (Training or Sampling) that may differ within a line.
    """
    found = group_by_settings(records, along, part)
    kept = found
    if len(kept) > MAX_LINES:  # published lines first, then by the best value of a line
        sign = SIGNS[better(records)]
        order = [
            (line[0].provenance != "published", min(sign * r.value for r in line), line[0].system) for line in kept
        ]
        kept = [line for _, line in sorted(zip(order, kept, strict=True), key=lambda pair: pair[0])[:MAX_LINES]]
    kept = [sorted(line, key=lambda record: record.id) for line in kept]
    kept.sort(key=lambda line: (model_of(line[0]), line[0].system, line[0].provenance, line[0].id))
    labels = _labels([line[0] for line in kept], along, part)
    lines = [Line(label=label, records=tuple(members)) for label, members in zip(labels, kept, strict=True)]
    return lines, len(found) - len(kept)


def marks_of(
    records: Iterable[Record], x: Callable[[Record], float | None], text: Callable[[Record], str] = lambda record: ""
) -> tuple[Mark, ...]:
    """One mark for each x, ascending: a record with its interval, or the mean of several with lowest and highest value.

    x: function from a record to its x; if it returns None, the record is not drawn. text: function from a mark's first
    record to the text at the mark.
    """
    found: dict[float, list[Record]] = {}
    for record in records:
        place = x(record)
        if place is not None and abs(place) < BEYOND:
            found.setdefault(float(place), []).append(record)
    return tuple(_mark(place, members, text(members[0])) for place, members in sorted(found.items()))


def _mark(x: float, records: list[Record], text: str) -> Mark:
    """The mark of records that differ in seeds.

    y, low, high: of one record its value and interval, of several the mean, the lowest and the highest value. The mean is
    that of `results.compare`: over training seeds, of their means over sampling seeds. An interval that fits on no axis is
    left out.
    """
    records = sorted(records, key=lambda record: record.id)
    first, values = records[0], [record.value for record in records]
    mean, low, high = values[0], first.low, first.high
    if low is not None and high is not None and max(abs(low), abs(high)) >= BEYOND:
        low = high = None
    if len(records) > 1:
        mean, low, high = group_of(records).value, min(values), max(values)
    return Mark(
        x=x,
        y=mean,
        low=low,
        high=high,
        text=text,
        record_ids=tuple(record.id for record in records),
        facts=mark_details(first, len(records), measured_text(mean, low, high)),
    )


def constant_x(x: float) -> Callable[[Record], float]:
    """A function from a record to `x`, whatever the record."""
    return lambda record: x


def mark_details(record: Record, runs: int, value: str) -> tuple[tuple[str, str], ...]:
    """(name, text) pairs that the page shows when the pointer is at a mark.

    record: one of the mark's records. runs: their number. value: the text of the mark's value and interval.
    """
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
    """Which values are better, for records of one metric: "higher" or "lower", or "" where that is not known."""
    higher_is_better = shared_direction(records)
    if higher_is_better is None:
        return ""
    return "higher" if higher_is_better else "lower"


def figure_row(record: Record, panel: int, line: str, x: Mapping[str, object]) -> dict[str, object]:
    """A row of a figure's CSV, column -> value: where the record is drawn, what it is, and its value, nothing rounded.

    panel: number from 1. line: label of its line. x: column -> value for further columns, above all the place on the x axis.
    """
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


def left_out_note(lines: int, groups: int = 0) -> str:
    """A note on the numbers of lines and groups that are not drawn; "" if both are 0."""
    words = [f"{lines} more lines are not drawn (the best {MAX_LINES} are)"] if lines else []
    words += (
        [f"{groups} more sets of comparable records are not drawn (the {MAX_GROUPS} largest are)"] if groups else []
    )
    return "; ".join(words)


def _settings_getter(part: type, along: Sequence[str]) -> Callable[[object], tuple]:
    """A function from a part (Training or Sampling) to the tuple of its fields that are neither `along` nor _IGNORED.

    The batch is ignored only in sampling, where it moves low bits; in training it is an item of the recipe.
    """
    names = [field.name for field in dataclasses.fields(part) if field.name not in (*along, *_IGNORED)]
    if part is Training:
        names.append("batch")
    return operator.attrgetter(*names)


def paper_name(record: Record) -> str:
    """The model in the name of a published row, without the settings that follow it: `DiT-XL/2`, `ADM-G, ADM-U`."""
    return re.split(r", (?=\d)", record.row)[0]


def _telling_names(metadata: Sequence[dict[str, str]]) -> list[str]:
    """Names of metadata that tell lines apart: as few as do, and the recipe's hash only where nothing else does."""
    names: list[str] = []
    apart = 1
    for name in sorted(_LABEL_METADATA, key=lambda name: name == "recipe"):
        with_it = len({tuple(found[each] for each in (*names, name)) for found in metadata})
        if with_it > apart:
            names.append(name)
            apart = with_it
    return names


def _labels(records: Sequence[Record], along: Sequence[str], part: type) -> list[str]:
    """The label of each line: the system's name and, if it has several lines, metadata that tell them apart.

    Labels of published lines also say "paper". Equal labels get " #2", " #3", ...
    records: one of each line. along, part: as in `lines_of`.
    """
    metadata = []  # of each line: name -> text, for all names of _LABEL_METADATA; "" where there is nothing to name
    for record in records:
        training, mode = record.training, record.evaluation.mode if record.evaluation else None
        found = row_metadata(record) | {"guidance": f"guidance {guidance_text(record)}", "mode": mode or ""}
        found["training steps"] = (
            f"{count_text(training.steps)} steps" if training and training.steps is not None else ""
        )
        found["sampling steps"] = f"{found['sampling steps']} sampling steps" if "sampling steps" in found else ""
        if "steps" in along:  # they differ within a line
            found["training steps" if part is Training else "sampling steps"] = ""
        metadata.append({name: found.get(name, "") for name in _LABEL_METADATA})
    chosen = {
        system: _telling_names(
            [found for record, found in zip(records, metadata, strict=True) if record.system == system]
        )
        for system in {record.system for record in records}
    }
    taken: dict[str, int] = {}  # label -> number of lines that have it so far
    labels = []
    for record, found in zip(records, metadata, strict=True):
        differences = [
            text if name in _WITHOUT_NAME else f"{name} {text}"
            for name, text in found.items()
            if text and name in chosen[record.system]
        ]
        differences += ["paper"] if record.provenance == "published" else []
        label = f"{record.system} ({', '.join(differences)})" if differences else record.system
        taken[label] = taken.get(label, 0) + 1
        labels.append(f"{label} #{taken[label]}" if taken[label] > 1 else label)
    return labels
