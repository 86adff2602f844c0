"""Calls of `harness data reference` and `harness evaluate` on made pictures, and what they return."""

import json

import numpy as np
import tiny_suite
from click.testing import CliRunner

from harness.cli import group
from harness.errors import UserError

N = 700  # more than one call of the network


def harness(*words):
    return CliRunner().invoke(group, [str(word) for word in words])


def reference(source, out, *more, suite="tiny"):
    return harness("data", "reference", source, "--out", out, "--suite", suite, *more)


def facts(done):
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)


def refused(done):
    assert isinstance(done.exception, UserError), done.exception or done.output
    assert "\n" not in str(done.exception)
    return str(done.exception)


def arrays(path):
    with np.load(path, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def edited(path, out, **changed):
    np.savez(out, **{**arrays(path), **changed})
    return out


def made_pictures():
    images = np.random.RandomState(0).randint(0, 256, (N, 8, 8, 3)).astype(np.uint8)
    return images, np.arange(N) % 7


def seen_by_network(images):
    return tiny_suite.Projection(tiny_suite.made("tiny").features, "cpu")(images)
