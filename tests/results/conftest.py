"""A measured record as the digits protocol makes them."""

import pytest

from results.records import Environment, Evaluation, Record, Sampling, Training


def make_measured(**changes) -> Record:
    fields = {
        "provenance": "measured",
        "metric": "fd",
        "value": 1 / 3,
        "low": 0.3,
        "high": 0.4,
        "interval": "95 % delete-block jackknife",
        "n": 1000,
        "protocol": "digits",
        "protocol_version": "1",
        "resolution": 8,
        "dataset": "digits",
        "system": "dit-xs-2",
        "backbone": "dit-xs-2",
        "kind": "denoiser",
        "framework": "torch",
        "params": 4_123_456,
        "gflops": 0.0637,
        "training": Training(steps=800, images=102_400, gflops=19_568.6, learning_rate=1e-3, seed=0),
        "sampling": Sampling(sampler="ddpm", steps=25, evaluations=25, gflops_per_image=1.59, seed=0),
        "evaluation": Evaluation(suite="embedded", features="efficientnet-lite0", features_sha256="ab" * 32),
        "environment": Environment(device="cpu", versions={"torch": "2.13.0", "numpy": "2.4.6"}),
    }
    return Record(**{**fields, **changes})


@pytest.fixture
def measured():
    return make_measured
