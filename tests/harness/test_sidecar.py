"""The sidecar of a sample set: the fields of records that it carries, and sidecars of schema 1 read as those of schema 2."""

import dataclasses
import json
import math

import numpy as np
import pytest

from harness import registry
from harness.errors import UserError
from harness.pipeline.sidecar import RecordFields, read_fields
from harness.runs.samples import read_sidecar, write_samples
from harness.systems.spec import System
from results.records import Sampling, Training

FIELDS = RecordFields(
    system="a",
    backbone="a+b",
    kind="denoiser",
    framework="torch",
    params=7,
    gflops=0.1,
    training=Training(steps=3, learning_rate=1e-4, recipe_hash="ab"),
    sampling=Sampling(sampler="ddim", steps=4, eta=0.0, clip_denoised=False, guidance_scale=1.5),
)


def written(folder, **sidecar):
    """A sample set with that sidecar: its path and its hash."""
    path = folder / "samples.npz"
    sha256 = write_samples(path, [np.zeros((2, 8, 8, 1), np.uint8)], np.arange(2), sidecar)
    return path, sha256


def test_fields_come_back_as_they_were_written(tmp_path):
    path, sha256 = written(tmp_path, schema=2, record=FIELDS.as_dict())
    assert read_sidecar(path)["record"]["training"] == {"steps": 3, "learning_rate": 1e-4, "recipe_hash": "ab"}
    assert read_fields(path, sha256) == FIELDS.with_samples(sha256)
    found = read_fields(path, sha256, "another name")
    assert found == FIELDS.with_samples(sha256, "another name") and found.system == "another name"
    assert found.sampling.samples_sha256 == sha256
    bare = RecordFields(system="a", sampling=Sampling(seed=0))
    path, sha256 = written(tmp_path, schema=2, record=bare.as_dict())
    assert read_fields(path, sha256) == bare.with_samples(sha256) and "training" not in bare.as_dict()


def test_samples_without_a_sidecar_are_known_by_a_name(tmp_path):
    path, sha256 = written(tmp_path)
    path.with_suffix(".json").unlink()
    for name in (None, "mine"):
        expected = RecordFields(system=name or "samples", sampling=Sampling(samples_sha256=sha256))
        assert read_fields(path, sha256, name) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 3}, r"samples.json was written by a newer harness \(schema 3\); update this one"),
        ({"record": {}}, r"does not say how the samples were made \('sampling'\); give --name and move it away"),
        ({"record": {**FIELDS.as_dict(), "colour": "red"}}, "does not say how the samples were made .*colour"),
        ({"record": {**FIELDS.as_dict(), "sampling": {"steps": "four"}}}, "Sampling.steps: 'four' is not an integer"),
        ({"schema": "new"}, "does not say how the samples were made"),
        *(
            ({"schema": each}, "is not a schema number")
            for each in (0, -1, True, False, 1.0, 1.5, 2.0, math.nan, "2", None)
        ),
        *(({"record": each}, "does not say how the samples were made") for each in (None, 5, "x", [])),
        ({"record": {**FIELDS.as_dict(), "params": "x"}}, "Record.params: 'x' is not an integer"),
        ({"record": {**FIELDS.as_dict(), "system": 5}}, "Record.system: 5 is not a str"),
        ({"record": {**FIELDS.as_dict(), "gflops": math.inf}}, "Record.gflops: inf is not finite"),
        ({"schema": 1}, r"does not say how the samples were made \('identity'\)"),
    ],
)
def test_another_sidecar_is_refused(change, words, tmp_path):
    path, sha256 = written(tmp_path, **{"schema": 2, "record": FIELDS.as_dict(), **change})
    with pytest.raises(UserError, match=words):
        read_fields(path, sha256)


def test_the_sidecar_of_other_samples_is_refused(tmp_path):
    path, sha256 = written(tmp_path, schema=2, record=FIELDS.as_dict())
    with pytest.raises(UserError, match="its hash differs"):
        read_fields(path, "0" + sha256[1:])


@pytest.mark.parametrize("name", [each.name for each in registry.systems if not each.unavailable])
def test_a_system_comes_back_from_its_identity(name):
    """But for what describes it, and for the decoder, which has an identity by itself."""
    system = registry.systems.get(name)
    found = System.from_dict(json.loads(json.dumps(system.as_dict())))
    assert found == dataclasses.replace(system, summary="", row="", decoder="")
