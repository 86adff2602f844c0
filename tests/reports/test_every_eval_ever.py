"""The export for every_eval_ever: what its fields hold, and, where the package is at hand, its own validator."""

import json
import re

import pytest

from reports.every_eval_ever import to_files
from reports.report import write_report
from results.store import append

TEXTS = ("model_info", "eval_library")


def documents(records):
    return {path: json.loads(data) for path, data in to_files(records).items()}


def test_direction_interval_and_generation_are_where_the_schema_wants_them(record):
    fd, recall = record("fd", 12.0), record("recall", 0.5, half=0.02)
    (found,) = documents([fd, recall]).values()
    assert (
        found["schema_version"] == "0.3.0"
        and found["model_info"]["id"] == "self-trained/dit-xs-2-800steps-seed0-abababab"
    )
    by_metric = {each["metric_config"]["metric_kind"]: each for each in found["evaluation_results"]}
    assert (
        by_metric["fd"]["metric_config"]["lower_is_better"]
        and not by_metric["recall"]["metric_config"]["lower_is_better"]
    )
    assert (by_metric["recall"]["metric_config"]["min_score"], by_metric["fd"]["metric_config"]["max_score"]) == (
        0.0,
        "Infinity",
    )
    interval = by_metric["fd"]["score_details"]["uncertainty"]["confidence_interval"]
    assert (interval["lower"], interval["upper"], interval["confidence_level"]) == (11.5, 12.5, 0.95)
    generation = by_metric["fd"]["generation_config"]["additional_details"]
    assert generation["sampler"] == "ddpm" and generation["steps"] == "25"
    assert by_metric["fd"]["metric_config"]["metric_parameters"]["n"] == 1000
    for part in (*(found[name] for name in TEXTS), by_metric["fd"]["generation_config"]):
        assert all(isinstance(value, str) for value in part["additional_details"].values())


def test_files_have_the_datastores_names_and_do_not_depend_on_the_order(study):
    once, again = to_files(study), to_files(reversed(study))
    assert set(once) == set(again) and len(once) == len({(r.system, r.training.seed, r.sampling.steps) for r in study})
    pattern = r"every-eval-ever/data/digits/self-trained/[^/]+/[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\.json"
    assert all(re.fullmatch(pattern, path) for path in once)


def test_the_report_writes_them(tmp_path, record):
    append(tmp_path / "runs" / "records.jsonl", [record()])
    written = write_report([tmp_path / "runs"], tmp_path / "report", protocol="digits", export=True).files
    (path,) = [each for each in written if "every-eval-ever" in each.parts]
    assert json.loads(path.read_text())["evaluation_results"][0]["score_details"]["score"] == 12.0


@pytest.mark.slow
def test_the_packages_own_validator_accepts_them(tmp_path, study):
    """Needs Python 3.12 or newer, as the package does."""
    validation = pytest.importorskip("every_eval_ever.validator.validate", reason="every_eval_ever is not installed")
    for path, data in to_files(study).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
        repo = path.removeprefix("every-eval-ever/")
        found = validation.validate_file(tmp_path / path, repo_path=repo, available_files=(), run_semantic_checks=True)
        assert found.valid and not found.errors and not found.warnings, (found.errors, found.warnings)
