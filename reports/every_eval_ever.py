"""Records in the schema of the PyPI package every_eval_ever 0.3.0: one file for each sample set and suite.

What the schema's fields hold here:

- `metric_config.lower_is_better`: the direction; a metric without a known one is left out.
- `score_details.uncertainty.confidence_interval`: the 95 % interval over the draw of the samples, with its method; the
  interval leaves out training again. `num_samples`: N.
- `generation_config`: `generation_args` is closed and made for language models, so that it holds only the command that
  measures the record again; sampler, steps, guidance, seeds, precision and decoder are texts in `additional_details`.
- `metric_config.metric_parameters`: what decides whether two numbers are comparable: N, features and reference by hash.
- `model_info.additional_details`: the training, with Gflops.

Published numbers are left out: their sources have not been converted, and their authors should do it.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
import time
from collections.abc import Iterable
from typing import Any

from harness._version import VERSION
from reports.commands import reproduction
from reports.texts import metric_name
from results.experiments import sampling_text
from results.metrics import higher_is_better, known
from results.records import Record

SCHEMA_VERSION = "0.3.0"
FOLDER = "every-eval-ever"
DEVELOPER = "self-trained"  # of a model that was trained here: its id has no organisation


def to_files(records: Iterable[Record]) -> dict[str, bytes]:
    """Path below the folder of the report -> JSON, of the measured records. The same records give the same bytes."""
    sets: dict[tuple, list[Record]] = {}
    for record in records:
        if record.provenance == "measured" and higher_is_better(record) is not None:
            sets.setdefault(_set_key(record), []).append(record)
    found = {}
    for key, members in sorted(sets.items(), key=lambda pair: str(pair[0])):
        members.sort(key=lambda record: record.id)
        first = members[0]
        collection, model = _component(first.protocol), _component(_model(first))
        name = _uuid4(json.dumps(key, default=str) + "".join(record.id for record in members))
        path = f"{FOLDER}/data/{collection}/{DEVELOPER}/{model}/{name}.json"
        found[path] = (json.dumps(_document(members), indent=2, ensure_ascii=True) + "\n").encode("ascii")
    return found


def _set_key(record: Record) -> tuple:
    sampling, evaluation = record.sampling, record.evaluation
    return (
        record.protocol,
        _model(record),
        sampling.canonical if sampling else "",
        evaluation.suite if evaluation else "",
        (evaluation.features_sha256 or "", evaluation.reference_sha256 or "") if evaluation else "",
        record.n,
    )


def _model(record: Record) -> str:
    """`dit-xs-2-800steps-seed0-d6774812`: the system with what tells its checkpoints apart, the recipe by its hash."""
    training = record.training
    words = [record.system]
    if training is not None and training.steps:
        words.append(f"{training.steps}steps")
    if training is not None and training.seed is not None:
        words.append(f"seed{training.seed}")
    if training is not None and training.recipe_hash:
        words.append(training.recipe_hash[:8])
    return "-".join(words)


def _component(text: str) -> str:
    """The text as a name of a folder on every system."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text).strip("._ ") or "unnamed"


def _uuid4(text: str) -> str:
    """A UUID of the form of version 4, from a hash: the datastore's names of files."""
    digits = hashlib.sha256(text.encode()).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:32]}"


def _document(members: list[Record]) -> dict[str, Any]:
    first = members[0]
    environment = first.environment
    when = environment.time if environment and environment.time else None
    seconds = _epoch(when)
    model_id = f"{DEVELOPER}/{_component(_model(first))}"
    versions = dict(environment.versions) if environment else {}
    framework = first.framework or "torch"
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": f"{_component(f'{first.protocol} {sampling_text(first)}')}/{model_id}/{seconds}",
        **({"evaluation_timestamp": when} if when else {}),
        "retrieved_timestamp": seconds,
        "source_metadata": {
            "source_name": "backbone-harness",
            "source_type": "evaluation_run",
            "source_organization_name": DEVELOPER,
            "evaluator_relationship": "first_party",
        },
        "eval_library": {
            "name": "backbone-harness",
            "version": (environment.harness_version if environment else None) or VERSION,
            "additional_details": _texts({"git_commit": environment.git_commit if environment else None, **versions}),
        },
        "model_info": {
            "name": _model(first),
            "id": model_id,
            "developer": DEVELOPER,
            "inference_engine": {"name": framework, "version": versions.get(framework, "unknown")},
            "additional_details": {
                "deployment_type": "self_deployed",
                "model_availability": "unknown",
                **_texts({"backbone": first.backbone, "kind": first.kind, "parameters": first.params, "gflops_per_forward_pass": first.gflops}),
                **_texts(_fields(first.training, "training_")),
            },
        },
        "evaluation_results": [_result(record) for record in members],
    }  # fmt: skip


def _epoch(when: str | None) -> str:
    """Seconds since 1970 of an ISO 8601 time; of an unknown one, of now."""
    if when is None:
        return str(int(time.time()))
    return str(int(datetime.datetime.fromisoformat(when).timestamp()))


def _result(record: Record) -> dict[str, Any]:
    evaluation, sampling, environment = record.evaluation, record.sampling, record.environment
    metric = known(record.metric)
    low, high = getattr(metric, "bounds", None) or ("-Infinity", "Infinity")
    suite = evaluation.suite if evaluation else "unknown"
    title = metric_name(
        record.metric,
        record.n,
        (evaluation.mode if evaluation else None) or "",
        evaluation.features if evaluation else None,
    )
    parameters = {"n": record.n, **(_fields(evaluation) if evaluation else {})}
    score: dict[str, Any] = {"score": record.value, "details": {"record_id": record.id}}
    if record.low is not None and record.high is not None:
        score["uncertainty"] = {
            "confidence_interval": {
                "lower": record.low,
                "upper": record.high,
                "confidence_level": 0.95,
                "method": f"{record.interval or 'not stated'}, over the draw of the samples; without training again",
            },
            "num_samples": record.n,
        }
    commands = reproduction(record).commands
    when = environment.time if environment else None
    seconds = {
        "seconds_per_image": environment.sampling_seconds_per_image if environment else None,
        "sampling_device": environment.sampling_device if environment else None,
    }
    return {
        "evaluation_result_id": record.id,
        "evaluation_name": f"{record.protocol} {suite}",
        "source_data": {
            "dataset_name": record.dataset,
            "source_type": "other",
            "additional_details": _texts(
                {
                    "resolution": record.resolution,
                    "protocol_version": record.protocol_version,
                    "reference_sha256": evaluation.reference_sha256 if evaluation else None,
                }
            ),
        },
        **({"evaluation_timestamp": when} if when else {}),
        "metric_config": {
            "evaluation_description": f"{title} of {record.n:,} generated images",
            "metric_id": f"{suite}.{record.metric}",
            "metric_name": title,
            "metric_kind": record.metric,
            "metric_parameters": parameters,
            "lower_is_better": not higher_is_better(record),
            "score_type": "continuous",
            "min_score": low,
            "max_score": high,
        },
        "score_details": score,
        "generation_config": {
            **({"generation_args": {"execution_command": " && ".join(commands)}} if commands else {}),
            "additional_details": _texts({**(_fields(sampling) if sampling else {}), **seconds}),
        },
    }


def _fields(part: Any, prefix: str = "") -> dict[str, Any]:
    """The fields of a part of a record that are stated."""
    if part is None:
        return {}
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    return {f"{prefix}{name}": value for name, value in values.items() if value is not None}


def _texts(values: dict[str, Any]) -> dict[str, str]:
    """As the schema wants further details: texts alone, none empty."""
    return {name: str(value) for name, value in values.items() if value is not None}
