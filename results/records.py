"""The record: one immutable measurement with its whole identity.

Tables and curves are made of records. The *identity* of a record is everything that determines its number: all fields
but value, interval, direction, environment and the schema number. Its *id* is a hash of the identity together with the value: the same
measurement made twice has one id, and two values of one identity that differ by more than 1e-5 (relative) are a conflict
(see `results.store`).
"""

import dataclasses
import functools
import hashlib
import json
import marshal
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from harness.diffusion.guidance import Guidance
from harness.errors import UserError
from results.checked_fields import BrokenRecord, CheckedFields, canonical_json, field_types, required_fields, to_dict

SCHEMA_VERSION = 1
ComparableKey = tuple[str, int, int, str | None, str | None, str | None, str | None]  # see `comparable_key`
PROVENANCES = ("measured", "published")

_METRIC_KEY = re.compile(r"[a-z][a-z0-9_]*")
_NOT_IDENTITY = ("value", "low", "high", "interval", "higher_is_better", "environment", "schema")


class NewerSchema(UserError):
    """A record written under a later schema than this version of the harness knows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(CheckedFields):
    """How the weights were trained. None: not known, never "zero"."""

    steps: int | None = None  # optimizer steps
    images: int | None = None  # images seen: steps x batch
    gflops: float | None = None  # whole training: Gflops per forward pass x images x 3 (DiT paper, sec. 5, Figure 9)
    batch: int | None = None  # images per optimizer step
    learning_rate: float | None = None
    ema_decay: float | None = None
    seed: int | None = None
    objective: str | None = None
    schedule: str | None = None  # noise schedule
    time_distribution: str | None = None  # of t in training; None: uniform, as for the two below their usual values
    loss_weight: str | None = None  # of the squared error; None: 1
    noise_scale: float | None = None  # factor of the noise in continuous time; None: 1
    ema_widths: str | None = (
        None  # sigma_rel of the power-function averages that were saved, "0.05:0.1"; None: none were
    )
    ema_snapshots: int | None = None  # how many times they were saved
    precision: str | None = None  # of the network's arithmetic in training
    micro_batch: int | None = None  # images per forward pass; changes low bits
    recipe_hash: str | None = None  # sha256 of the resolved recipe
    checkpoint_sha256: str | None = None
    # None in the fields below: not known (also in records from before these fields existed), or as said.
    dataset_sha256: str | None = None  # of the training images with their labels
    latents_sha256: str | None = None  # of the "latents" in the identity of a run; None: trained in pixels
    auxiliary: str | None = None  # auxiliary loss, "repa:ENCODER:TAP"; None: none
    auxiliary_gflops: float | None = None  # the part of `gflops` that is its encoder's forward passes and its heads'
    forward_gflops: float | None = None  # of a forward pass in training (masked); None: that of the record
    plugins_sha256: str | None = None  # of the "plugins" in the identity of a run, their code; None: all is built in
    earlier_precision: str | None = None  # of a fork, "float32 to step 30"; None: `precision` from the first step on
    forked_at: int | None = None  # step of the other run's checkpoint with which training began; None: not a fork
    parent_sha256: str | None = None  # of the EMA weights of that checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(CheckedFields):
    """How the images were sampled."""

    sampler: str | None = None  # "ddpm", "ddim", ...
    steps: int | None = None
    evaluations: int | None = None  # network evaluations per image; a row with classifier-free or autoguidance: two
    # Of an adaptive sampler, of which every image has its own number; steps and evaluations are None then.
    evaluations_mean: float | None = None
    evaluations_max: int | None = None
    eta: float | None = None  # DDIM's noise share, in [0, 1]
    spacing: str | None = None  # of the times at which the network is asked; None: the usual one of the schedule
    ema_width: float | None = (
        None  # sigma_rel of the reconstructed average of the weights; None: the EMA of `ema_decay`
    )
    guidance_scale: float | None = None  # None: no guidance; so is 1.0, except with a classifier
    guidance_interval: str | None = None  # "0.1-0.8", "0.3-": of sigma = s / a; None: guidance at all noise levels
    guidance_rule: str | None = (
        None  # of a package, by name; None: classifier-free guidance, or as `guidance_channels` says
    )
    # "first-3" as published, "all", "classifier": by a classifier's gradient, or "autoguidance": by a weaker network
    guidance_channels: str | None = None
    gflops_per_image: float | None = None  # all evaluations of one image, without the decoder
    decoder: str | None = None  # None: the model makes pixels
    decoder_gflops: float | None = None  # per image
    uint8_rule: str | None = None
    label_policy: str | None = None  # "random" or "balanced"
    clip_denoised: bool | None = None  # whether the predicted image is clamped to [-1, 1] at every step
    precision: str | None = None  # of the network's arithmetic in sampling: "float32", "bfloat16", ...
    batch: int | None = None  # images per forward pass; changes low bits
    seed: int | None = None
    stage_steps: str | None = None  # "50 + 50": steps of each network of a cascade; `steps` is the first's
    settings: str | None = None  # in words, the settings of a system of several networks that have no field here
    settings_hash: str | None = None  # of all settings of a system of several networks
    samples_sha256: str | None = None

    @property
    def without_counts(self) -> "Sampling":
        """A copy without what an adaptive sampler counts, which differs from seed to seed: for keys of equal settings."""
        if self.evaluations_mean is None:
            return self
        return dataclasses.replace(self, evaluations_mean=None, evaluations_max=None, gflops_per_image=None)

    @property
    def guidance(self) -> Guidance | None:
        """The guidance scale with its interval and rule; None if no scale is stated."""
        if self.guidance_scale is None:
            return None
        return Guidance(self.guidance_scale, self.guidance_interval or "", self.guidance_rule or "")

    @property
    def is_guided(self) -> bool:
        """Whether images were guided. The scale 1 is no guidance, but with a classifier it adds its gradient once."""
        return self.guidance_scale not in (None, 1.0) or self.guidance_channels == "classifier"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(CheckedFields):
    """The suite that measured, its features and its reference."""

    suite: str
    suite_version: str | None = None
    features: str | None = None  # name of the feature network
    features_sha256: str | None = None
    reference_sha256: str | None = None
    training_sha256: str | None = None  # of the images that copies were sought in; None: the reference images
    mode: str | None = None  # a named variant of the metrics: "adm", "exact", "clean", "torch-fidelity"
    code_sha256: str | None = None  # of the code of plug-ins that measured (metric, features, suite); None: built in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment(CheckedFields):
    """Where and when it was measured, and how long it took. Description, not identity.

    device: of the evaluation. Seconds are stated only where the same devices did all of the work; several devices are
    named after the first one.
    """

    device: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)  # library -> version
    git_commit: str | None = None
    time: str | None = None  # ISO 8601, UTC
    harness_version: str | None = None
    # Of the training: library, "harness" or "git_commit" -> version; of several in turn "2.12.0, then 2.13.0". None: not known.
    training_versions: Mapping[str, str] | None = dataclasses.field(default=None, hash=False)
    training_seconds: float | None = None  # until the checkpoint that was sampled, without pauses
    training_device: str | None = None
    sampling_seconds_per_image: float | None = None  # decoder included
    sampling_device: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(CheckedFields):
    """Where a published number is printed."""

    table: str  # "Table 2", "Section 5.2"
    row: str
    column: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record(CheckedFields):
    """One measurement. None means "not known"; published records leave out what their source does not state.

    Raises BrokenRecord (a ValueError) that names the field: for a wrong type, NaN or infinity, or a value out of range.
    Integers in float fields become floats, so that a record equals its JSON read back.
    """

    schema: int = SCHEMA_VERSION
    provenance: str  # "measured" or "published"
    metric: str  # "fd", "fid", "sfid", "kid", "is", "precision", "recall", "copies", "loss_mse", "loss_vb", ...
    value: float
    low: float | None = None  # lower end of the 95 % interval
    high: float | None = None  # upper end
    interval: str | None = None  # method: "jackknife-20", "jackknife-20+halves", "clopper-pearson", "jeffreys", "none"
    higher_is_better: bool | None = None  # None: not stated (`results.metrics` asks the registry then)
    n: int  # number of images evaluated
    protocol: str
    protocol_version: str | None = None
    resolution: int  # side of an image in pixels
    dataset: str
    system: str  # the name of the table row
    backbone: str | None = None  # the parts of a system of several networks are joined with "+"
    kind: str | None = None  # "denoiser", "upsampler", "classifier", "generator"
    framework: str | None = None
    params: int | None = None
    gflops: float | None = None  # per forward pass at this input (1 multiply-add = 1 flop)
    gflops_published_input: float | None = None  # per forward pass at the paper's input
    gflops_source: str | None = None  # "traced": counted from the network; None: by a closed form, or not known
    training: Training | None = None
    sampling: Sampling | None = None
    evaluation: Evaluation | None = None
    environment: Environment | None = None
    source: Source | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schema != SCHEMA_VERSION:
            raise NewerSchema(f"record schema {self.schema} is not {SCHEMA_VERSION}, the one this version writes")
        if self.provenance not in PROVENANCES:
            raise BrokenRecord(f"record field Record.provenance: {self.provenance!r} is none of {PROVENANCES}")
        if not _METRIC_KEY.fullmatch(self.metric):
            raise BrokenRecord(f"record field Record.metric: {self.metric!r} is not a lower-case key such as 'fd'")
        for name in ("n", "resolution"):
            if getattr(self, name) < 1:
                raise BrokenRecord(f"record field Record.{name}: {getattr(self, name)} is below 1")
        if (self.low is None) != (self.high is None):
            raise BrokenRecord("record field Record.low: an interval needs both low and high")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise BrokenRecord(f"record field Record.low: {self.low!r} is above high, {self.high!r}")
        if self.provenance == "published" and self.source is None:
            raise BrokenRecord("record field Record.source: a published record names its table, row and column")

    @property
    def identity_sha256(self) -> str:
        """sha256 of everything but value, low, high, interval, higher_is_better, environment and the schema number."""
        return self._hashes[0]

    @property
    def id(self) -> str:
        """sha256 of identity and value: the same measurement made twice has one id."""
        return self._hashes[1]

    @property
    def interval_check(self) -> str:
        """First 16 digits of a sha256 of id, low, high, interval and direction (see `interval_check_of`)."""
        return interval_check_of(self.id, self.low, self.high, self.interval, self.higher_is_better)

    @property
    def table(self) -> str:
        """The table in which a published number is printed, as `Table 2`; "" for a measured one."""
        return self.source.table if self.source is not None else ""

    @property
    def row(self) -> str:
        """The row of the table in which a published number is printed; "" for a measured one."""
        return self.source.row if self.source is not None else ""

    @functools.cached_property
    def _hashes(self) -> tuple[str, str]:
        """(sha256 of the identity, sha256 of the identity followed by the text of the value)."""
        identity = hashlib.sha256(self.identity_json.encode("ascii"))
        with_value = identity.copy()
        with_value.update(float.__repr__(self.value).encode("ascii"))
        return identity.hexdigest(), with_value.hexdigest()

    @property
    def identity_json(self) -> str:
        """Canonical JSON of the identity, joined from the JSON of its fields; that of a part is cached in the part.

        Fields that are None are left out, so a later schema can add optional fields without changing old hashes.
        """
        texts = []
        fields = vars(self)
        for name in _IDENTITY:
            value = fields[name]
            if value is not None:
                write = _WRITERS.get(type(value))
                texts.append(f'"{name}":{write(value) if write else _canonical_part(value)}')
        return f"{{{','.join(texts)}}}"


# The names of the identity's fields, sorted as the keys of canonical JSON are.
_IDENTITY = sorted(field.name for field in dataclasses.fields(Record) if field.name not in _NOT_IDENTITY)
_DEFAULTS = {  # of all fields of a record; None for required ones, which have no default
    field.name: None if field.default is dataclasses.MISSING else field.default for field in dataclasses.fields(Record)
}
_PARTS = frozenset((Training, Sampling, Evaluation, Environment, Source))
# The functions by which canonical_json writes these types; called directly, they are faster.
_WRITERS: dict[type, Callable[[Any], str]] = {
    str: json.encoder.encode_basestring_ascii,
    int: int.__repr__,
    float: float.__repr__,
}


def interval_check_of(
    record_id: str, low: float | None, high: float | None, interval: str | None, higher_is_better: bool | None
) -> str:
    """`Record.interval_check` of these fields; a function, so that a fast reader needs no record."""
    text = f"{record_id} {low!r} {high!r} {interval!r} {higher_is_better!r}"
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def to_json(record: Record) -> str:
    """The record as one line of canonical JSON (ASCII, sorted keys, no newline); floats round-trip exactly.

    With its `id`, and with `interval_check`, by which an edit of what the id does not cover is detected.
    """
    return canonical_json({**to_dict(record), "id": record.id, "interval_check": record.interval_check})


def from_json(text: str) -> Record:
    """The record of one line of JSON.

    Raises BrokenRecord that names the field (unknown, missing, of a wrong type, or an id or interval_check that is not the
    hash of the content; lines from before interval_check existed have none), and NewerSchema for a line of a later
    schema, whatever its other fields are.
    """
    try:
        fields = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise BrokenRecord(f"not a JSON object: {error}") from None
    if not isinstance(fields, dict):
        raise BrokenRecord(f"not a JSON object but a {type(fields).__name__}")
    schema = fields.get("schema")
    if type(schema) is not int or schema < 1:
        raise BrokenRecord(f"record field Record.schema: {schema!r} is not a schema number")
    if schema > SCHEMA_VERSION:
        raise NewerSchema(f"schema {schema} is newer than {SCHEMA_VERSION}: upgrade backbone-harness to read it")
    stated_id, stated_check = fields.pop("id", None), fields.pop("interval_check", None)
    record = _from_dict(Record, fields)
    if stated_id != record.id:
        raise BrokenRecord(
            f"record field id: {stated_id!r} is not the content's, {record.id[:16]}...: the line was edited"
        )
    if stated_check not in (None, record.interval_check):
        raise BrokenRecord(
            "record field interval_check: it is not that of low, high, interval and higher_is_better: the line was edited"
        )
    return record


def comparable_key(record: Record) -> ComparableKey:
    """Equal for records that may share a table.

    (dataset, resolution, n, suite, suite_version, features_sha256, reference_sha256): the version of a suite rises
    whenever a number would change.
    """
    evaluation = record.evaluation
    if evaluation is None:
        return (record.dataset, record.resolution, record.n, None, None, None, None)
    suite = (evaluation.suite, evaluation.suite_version, evaluation.features_sha256, evaluation.reference_sha256)
    return (record.dataset, record.resolution, record.n, *suite)


def _canonical_part(value: object) -> str:
    """`canonical_json` of a field's value; a part of a record has its text cached."""
    return value.canonical if isinstance(value, CheckedFields) else canonical_json(value)


def _from_dict(cls: type, fields: dict[str, Any]) -> Any:
    """The record or part with these fields, as JSON gives them. Replaces the dicts of parts in `fields` by the parts."""
    hints = field_types(cls)
    if not fields.keys() <= hints.keys():
        unknown = next(name for name in fields if name not in hints)
        raise BrokenRecord(f"record field {cls.__name__}.{unknown}: unknown to schema {SCHEMA_VERSION}")
    for name in _part_fields(cls) & fields.keys():
        value = fields[name]
        if value is not None:
            if not isinstance(value, dict):
                raise BrokenRecord(f"record field {cls.__name__}.{name}: {value!r} is not an object")
            fields[name] = _shared_part(hints[name], value)
    if missing := required_fields(cls) - fields.keys():
        raise BrokenRecord(f"record field {cls.__name__}.{min(missing)}: missing")
    if cls is not Record:
        return cls(**fields)
    # As Record(**fields), without the slow object.__setattr__ for each field of a frozen dataclass.
    record = object.__new__(Record)
    vars(record).update(_DEFAULTS | fields)
    record.__post_init__()
    return record


@functools.cache
def _part_fields(cls: type) -> frozenset[str]:
    """The names of the fields that are parts of a record: of Record "training", "sampling", ..."""
    return frozenset(name for name, hint in field_types(cls).items() if hint in _PARTS)


def _refuse_constant(name: str) -> NoReturn:
    """Called by the JSON decoder for NaN, Infinity and -Infinity."""
    raise ValueError(f"{name} is not a number that a record may hold")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_SHARED: dict[tuple[type, bytes], CheckedFields] = {}  # the cache of `_shared_part`
_MAX_SHARED = 4096


def _shared_part(cls: type, fields: dict[str, Any]) -> CheckedFields:
    """As `_from_dict`, for a part of a record: equal content gives the same object, because most records share their parts."""
    # The bytes of marshal tell 1, 1.0 and True apart, as a key made of the values would not. In its version 2 they depend
    # on the content alone, in later ones also on which objects are shared.
    key = (cls, marshal.dumps(fields, 2))
    part = _SHARED.get(key)
    if part is None:
        if len(_SHARED) >= _MAX_SHARED:
            _SHARED.clear()
        part = _SHARED[key] = _from_dict(cls, fields)
    return part
