"""check --convergence on real small runs: healthy seeds, a weight decay that hurts, and samples that are training images."""

import json
import shutil

import numpy as np
import pytest
import small_trained as small
from click.testing import CliRunner

from harness.cli import group
from harness.data.digits import load
from harness.diagnose.convergence import check_convergence, make_reference_point
from harness.errors import UserError
from harness.pipeline.evaluation_config import EvaluationConfig
from harness.pipeline.measure import evaluate_and_record
from harness.pipeline.train import RunSession
from harness.planning.request import make_request
from harness.runs.run import Resolved, open_run
from harness.runs.samples import read_sidecar, write_samples

POINT_SEEDS, STEPS = 8, 300


@pytest.fixture(scope="module", autouse=True)
def registered():
    with small.registered():
        yield


def test_a_run_against_its_seeds(tmp_path):
    """Quick: a few steps of five seeds. The command names the point, its seeds, and each value."""
    protocol = small.write_protocol(tmp_path, steps=12, count=100)
    for seed in range(6):
        small.train(tmp_path / f"s{seed}", protocol, seed=seed)
    make_reference_point([tmp_path / f"s{seed}" for seed in range(5)], [6, 12]).write(tmp_path / "point.json")
    words = ["check", str(tmp_path / "s5"), "--convergence", "--reference-point", str(tmp_path / "point.json")]
    done = CliRunner().invoke(group, words)
    assert "loss at step 12" in done.output and "5 seeds" in done.output and "fd (ddpm-20) at step 12" in done.output
    document = json.loads(CliRunner().invoke(group, [*words, "--json"]).stdout)
    assert len(document["rows"]) == 3 and document["seeds"] == 5
    assert (done.exit_code == 0) == (document["verdict"] == "as expected")
    other = check_convergence(
        small.train(tmp_path / "other", protocol, seed=9, settings={"weight_decay": "0.3"}).folder,
        tmp_path / "point.json",
    )
    assert not other.passed and other.recipe_differences == {"weight_decay": (0.3, 0.0)}
    with pytest.raises(UserError, match="different experiments"):
        make_reference_point([tmp_path / "s0", tmp_path / "other"], [6])


def test_a_run_finds_the_packaged_point_by_itself(tmp_path):
    """A hundred steps of the smallest backbone; with a tenth of the learning rate they are worse."""
    found = {}
    for name, settings in (("healthy", {}), ("slow", {"learning_rate": "0.0002"})):
        request = make_request(
            backbone="dit-3xs-8", protocol="digits", steps=100, seed=77, settings={"objective": "sit", **settings}
        )  # fmt: skip
        session = RunSession(request, load(), tmp_path / name)
        session.create(
            Resolved(device="cpu", device_name="test", precision="float32", micro_batch=128, threads=1)
        )  # fmt: skip
        session.train(100)
        found[name] = check_convergence(tmp_path / name)
    assert found["healthy"].point == "digits-dit-3xs-8" and found["healthy"].passed, found
    assert [str(each.quantity) for each in found["healthy"].deviations] == ["loss at step 100"]
    assert found["slow"].verdict == "worse" and found["slow"].recipe_differences == {"learning_rate": (0.0002, 0.002)}


def memorise(source, target):
    """A copy of a run whose samples are training images."""
    shutil.copytree(source, target)
    run = open_run(target)
    run.records.unlink()
    for path in (target / "samples").glob("*/samples.npz"):
        sidecar = read_sidecar(path)
        rows = np.random.default_rng(0).permutation(len(load()))[: sidecar["images"]]
        write_samples(path, [load().images[rows]], load().labels[rows], sidecar)
        config = EvaluationConfig.of(run.protocol)
        evaluate_and_record(path, run.protocol, load(), run.records, cache=target.parent / "cache", config=config)


@pytest.mark.slow
def test_twenty_healthy_seeds_and_two_that_are_not(tmp_path):
    protocol = small.write_protocol(tmp_path, steps=STEPS, count=300)
    marks = (100, 200, STEPS)
    for seed in range(POINT_SEEDS):
        small.train(tmp_path / f"p{seed}", protocol, seed=1000 + seed)
    point = tmp_path / "point.json"
    make_reference_point([tmp_path / f"p{seed}" for seed in range(POINT_SEEDS)], marks).write(point)
    verdicts = {}
    for seed in range(20):
        small.train(tmp_path / f"h{seed}", protocol, seed=seed)
        verdicts[seed] = check_convergence(tmp_path / f"h{seed}", point).verdict
    print(verdicts)
    assert sum(verdict != "as expected" for verdict in verdicts.values()) <= 2
    small.train(tmp_path / "decay", protocol, seed=50, settings={"weight_decay": "0.3"})
    found = check_convergence(tmp_path / "decay", point)
    print("weight decay", found)
    assert not found.passed and "weight_decay" in found.recipe_differences
    memorise(tmp_path / "h0", tmp_path / "memorised")
    found = check_convergence(tmp_path / "memorised", point)
    print("memorised", found)
    assert found.verdict == "suspiciously better"
