"""Runs with an auxiliary loss: a small encoder of a test, and the work of one process of several."""

import os
from pathlib import Path

import torch
from small_runs import request

from evaluators.features.spec import FeatureSpec
from harness import registry
from harness.data.digits import load
from harness.engines.backend import join_processes
from harness.engines.torch import repa
from harness.pipeline.train import RunSession
from harness.runs.run import Resolved

ENCODER = FeatureSpec(
    name="small-encoder", dim=6, classes=None, input_size=8, loader="nowhere:load", description="four by four patches of 2",
    tokens=f"{__name__}:load_tokens",
)  # fmt: skip
AUXILIARY = "repa:small-encoder:blocks.0:0.5"
SETTINGS = {"batch": "16", "learning_rate": "3e-4", "clip_norm": "1.6", "weight_decay": "0.1", "auxiliary": AUXILIARY}


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(torch.randn(6, 1, 2, 2, generator=generator))

    def forward(self, images):
        return torch.nn.functional.conv2d(images, self.weight, stride=2).flatten(2).transpose(1, 2)  # (N, 16, 6)


def load_tokens(spec, device):
    return Encoder().to(device)


def registered():
    """In this process: the encoder, and projectors that are quickly trained and written."""
    repa.PROJECTOR_WIDTH = 32
    if ENCODER.name not in registry.features:
        registry.features.register(ENCODER)


def session(folder, steps, *, micro_batch=16, group=None, **options):
    registered()
    settings = {**SETTINGS, **options.pop("settings", {})}
    wanted = request(steps=steps, settings=settings, **options)
    shop = RunSession(wanted, load(), Path(folder), *([] if group is None else [group]))
    if shop.run is None:
        plain = {"device": "cpu", "device_name": "test", "precision": "float32", "threads": 1}
        shop.create(Resolved(**plain, micro_batch=micro_batch))
    return shop


def main(folder, milestones, environment):
    """One process of several, which opens the run anew for each milestone."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    group = join_processes("torch")
    for steps in milestones:
        session(folder, steps, micro_batch=4, group=group).train(steps)
