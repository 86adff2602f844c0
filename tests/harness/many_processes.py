"""The work of one process in the tests of several."""

import dataclasses
import os
from itertools import chain
from pathlib import Path

import tiny_suite
import torch

from evaluators import reference
from harness.data.digits import load
from harness.engines.backend import get_backend, join_processes
from harness.engines.torch import parallel
from harness.pipeline import training_loop
from harness.pipeline.evaluation_config import EvaluationConfig
from harness.pipeline.measure import evaluate_and_record
from harness.pipeline.sample import sample_run
from harness.pipeline.train import RunSession
from harness.planning.request import make_request
from harness.protocols import get_protocol
from harness.runs.run import Resolved
from harness.runs.samples import read_sidecar

NARROW = {"depth": 2, "width": 48, "heads": 4}
RECIPE = {  # every item that changes the arithmetic of a step; some gradients are longer than clip_norm, and some are not
    "batch": "16", "learning_rate": "3e-4", "weight_decay": "1", "warmup_steps": "5", "clip_norm": "1.6",
    "ema_decay": "0.99", "ema_ramp": "true", "label_dropout": "0.2", "flip": "true",
    "ema_widths": "0.05:0.10", "ema_snapshots": "2",
}  # fmt: skip
SAMPLES = 64


def request(steps):
    wanted = make_request(backbone="dit-xs-2", protocol="digits", steps=steps, settings=RECIPE, samples=SAMPLES)
    return dataclasses.replace(wanted, arguments={**wanted.arguments, **NARROW})


def run(folder, steps, mesh, group):
    """Train on `mesh` and draw samples; one process accumulates gradients over four micro-batches. Returns the bytes of
    weights, averages and moments that this process holds."""
    wanted = request(steps)
    shop = RunSession(wanted, load(), folder, group, mesh=mesh)
    if shop.run is None:
        plain = {"device": "cpu", "device_name": "test", "precision": "float32", "threads": 1}
        shop.create(Resolved(**plain, micro_batch=4, mesh=mesh))
    held = []
    engine_of = get_backend(shop.run.framework).make_engine

    def kept(*arguments):
        held[:] = [engine_of(*arguments)]
        return held[0]

    get_backend(shop.run.framework).make_engine = kept
    try:
        shop.train(steps)
    finally:
        get_backend(shop.run.framework).make_engine = engine_of
    sample_run(shop.run, wanted, steps, 5, precision="float32", batch=16, group=group)
    reconstructed = dataclasses.replace(wanted, sampling=dataclasses.replace(wanted.sampling, ema_width=0.075))
    sample_run(shop.run, reconstructed, steps, 5, precision="float32", batch=16, group=group)
    if not held:
        return 0
    moments = [state[key] for state in held[0]._optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return sum(
        parallel.local_shard(each).numel() * 4
        for each in [*held[0]._weights, *chain(*held[0]._averages.values()), *moments]
    )


def measured(folder, out, group):
    """Metrics of the samples of the run in `folder`, with features extracted ten images a call."""
    calls, reference.IMAGES_PER_CALL = reference.IMAGES_PER_CALL, 10
    suite = tiny_suite.made("tiny", metrics=("fd", "precision"))
    suite = dataclasses.replace(suite, metrics=tuple(dataclasses.replace(each, minimum=20) for each in suite.metrics))
    (path,) = (
        each
        for each in folder.glob("samples/*/samples.npz")
        if "ema_width" not in read_sidecar(each)["identity"]["sampling"]
    )
    task = get_protocol("digits")
    config = EvaluationConfig(suite=suite)
    try:
        return evaluate_and_record(
            path, task, load(), out / "records.jsonl", cache=out / "cache", config=config, group=group
        )
    finally:
        reference.IMAGES_PER_CALL = calls


def main(folder, steps, meshes, environment):
    """One process after its start: a run on each mesh, in a folder of its name or as NAME=MESH, with a checkpoint every
    0.2 s. The bytes that it holds go into held-INDEX.txt."""
    folder = Path(folder)
    with (folder / f"output-{environment.get('RANK', 'alone')}.txt").open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    training_loop.MIN_CHECKPOINT_SECONDS = training_loop.CHECKPOINT_SHARE = 1e-9
    training_loop.MAX_LOST_SECONDS = 0.2
    group = join_processes("torch")
    with group.collective_scope():
        for each in meshes:
            name, mesh = each.split("=") if "=" in each else (each, each)
            held = run(folder / name, steps, mesh, group)
            (folder / name / f"held-{group.index}.txt").write_text(str(held))
            if mesh == "2x1":
                measured(folder / name, folder, group)
                (folder / f"seen-{group.index}.txt").write_text(str(tiny_suite.Projection.seen))
