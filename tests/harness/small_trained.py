"""Runs of a very small DiT on real digits, trained, sampled and measured within seconds: for diagnose and convergence."""

import dataclasses
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tiny_suite
import torch

from backbones.dit.spec import SPECS
from harness import registry
from harness.data.digits import load
from harness.data.images import ImageSet
from harness.data.load import load_data
from harness.pipeline.evaluation_config import EvaluationConfig
from harness.pipeline.measure import evaluate_and_record
from harness.pipeline.sample import decoder_of, sample_run
from harness.pipeline.train import RunSession
from harness.planning.request import make_request
from harness.runs.run import Resolved

BACKBONE = "dit-for-tests-2"
COUNT = 300  # images of a sample set
PROTOCOL = """
name = "{name}"
dataset = "{dataset}"
resolution = 8
image_channels = 1
num_classes = 10
input_size = 8
in_channels = 1
samples = {count}
suite = "tiny"
[recipe]
steps = {steps}
batch = 32
learning_rate = 3e-3
ema_decay = 0.99
flip = false
[sampling]
steps = [20]
clip_denoised = true
guidance_channels = "all"
"""


@contextmanager
def registered():
    """The small backbone and the suites of `tiny_suite`, known by name meanwhile; one thread."""
    spec = next(each for each in SPECS if each.name == "dit-xs-2")
    small = {**spec.defaults, "depth": 2, "width": 32, "heads": 2}
    registry.backbones.register(dataclasses.replace(spec, name=BACKBONE, defaults=small), registry.OWN_DISTRIBUTION)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tiny_suite.registered():
            yield
    finally:
        torch.set_num_threads(before)
        del registry.backbones._items[BACKBONE], registry.backbones._owners[BACKBONE]


def write_protocol(folder: Path, name="small", dataset="digits", steps=200, count=COUNT) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(PROTOCOL.format(name=name, dataset=dataset, steps=steps, count=count))
    return path


def write_images(path: Path, images, labels) -> Path:
    np.savez(path, arr_0=images, arr_1=labels)
    return path


def train(folder: Path, protocol: Path, *, seed=0, settings=None, data=None, reference=None):
    """A run in `folder`: trained to its end, sampled, and measured against `reference` (path of images; None: its own)."""
    request = make_request(
        backbone=BACKBONE, protocol=str(protocol), seed=seed, data=data, settings=settings or {}
    )  # fmt: skip
    images = load() if data is None else load_data(request.protocol, data)
    session = RunSession(request, images, folder)
    if session.run is None:
        resolved = Resolved(device="cpu", device_name="test", precision="float32", micro_batch=32, threads=1)
        session.create(resolved)
    step = request.recipe.steps
    session.train(step)
    draw(session.run, request, step, images if reference is None else load_data(request.protocol, reference))
    return session.run


def draw(run, request, step, reference: ImageSet, *, steps=None, precision="float32"):
    """Sample a checkpoint and measure the samples; returns the path of the samples."""
    path = sample_run(
        run,
        request,
        step,
        steps or request.sampling.steps[0],
        precision=precision,
        batch=100,
        decoder=decoder_of(run, None),
    )
    evaluate_and_record(
        path, request.protocol, reference, run.records, cache=run.folder.parent / "cache",
        config=EvaluationConfig.of(request.protocol),
    )  # fmt: skip
    return path
