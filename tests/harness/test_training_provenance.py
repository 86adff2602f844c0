"""What a run writes down of its training, so that its records can say it: data, versions, and the run it was forked from."""

import dataclasses
import json

import torch
from small_runs import request, workshop

from harness.data.digits import load
from harness.io import files
from harness.pipeline.sample import sample_run
from harness.pipeline.sidecar import read_fields
from harness.pipeline.train import RunSession
from harness.runs.provenance import timing_of, versions_in_turn
from harness.runs.run import open_run

WANTED = {"samples": 3}


def sampled(session, step):
    """(record fields, times and versions) of three samples of a run."""
    path = sample_run(session.run, session.request, step, 1, precision="float32", batch=None)
    return read_fields(path, files.sha256_file(path)), timing_of(path)


def test_records_state_data_versions_and_forks(tmp_path):
    parent = workshop(tmp_path / "parent", request(steps=2, **WANTED))
    parent.train(2)
    fields, timing = sampled(parent, 2)
    training = fields.training
    assert (training.dataset_sha256, training.latents_sha256) == (load().sha256, None)
    assert (training.forked_at, training.parent_sha256, training.earlier_precision) == (None, None, None)
    versions = timing["training_versions"]
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__
    assert {"harness", "numpy", "torch"} <= versions.keys()

    bfloat16 = dataclasses.replace(parent.run.resolved, precision="bfloat16")
    fork = RunSession(request(steps=3, **WANTED), load(), tmp_path / "fork")
    fork.fork(parent.folder, bfloat16)
    assert fork.run.identity == parent.run.identity
    fork.train(3)
    training = sampled(fork, 3)[0].training
    assert (training.precision, training.earlier_precision) == ("bfloat16", "float32 to step 2")
    assert training.forked_at == 2 and training.parent_sha256 == fields.training.checkpoint_sha256

    moved = RunSession(request(steps=3, **WANTED), load(), tmp_path / "moved")  # with the same settings elsewhere
    moved.fork(fork.folder, bfloat16)
    assert moved.run.fork == {
        "forked_at": 3, "parent_sha256": training.checkpoint_sha256, "earlier_precision": "float32 to step 2",
    }  # fmt: skip
    assert open_run(moved.folder).fork == moved.run.fork


def test_a_run_in_latents_states_both_hashes(tmp_path):
    session = workshop(tmp_path / "run", request(steps=1))
    latents = {"sha256": "ab", "scale_factor": 0.2}
    run = dataclasses.replace(session.run, identity={**session.run.identity, "latents": latents})
    assert run.training_data == {"dataset_sha256": load().sha256, "latents_sha256": files.sha256_json(latents)}


def test_versions_in_turn(tmp_path):
    (now,) = versions_in_turn(None, "torch")
    assert versions_in_turn({"trained_with": [now]}, "torch") == [now]
    older = {**now, "torch": "1.0"}
    assert versions_in_turn({"trained_with": [older]}, "torch") == [older, now]
    assert versions_in_turn({"seconds": 1.0}, "torch") == [{}, now]  # from before versions were recorded
    for before, text in ((older, f"1.0, then {now['torch']}"), ({}, f"not recorded, then {now['torch']}")):
        side = {"images": 1, "sha256": "0" * 64, "shape": [8, 8, 1], "trained_with": [before, now]}
        (tmp_path / "samples.json").write_text(json.dumps(side))
        (tmp_path / "samples.npz").touch()
        assert timing_of(tmp_path / "samples.npz")["training_versions"]["torch"] == text
