"""Small real runs for the tests: real digits, a small DiT, seconds on one core."""

import json
from pathlib import Path

import torch

from harness.data.digits import load
from harness.distributed.group import ProcessGroup
from harness.pipeline.train import RunSession
from harness.planning.request import make_request
from harness.runs.run import Resolved

SETTINGS = {"batch": "24", "learning_rate": "1e-3", "ema_decay": "0.9"}


def request(backbone="dit-xs-4", steps=12, seed=0, settings=None, **options):
    return make_request(
        backbone=backbone,
        protocol="digits",
        steps=steps,
        seed=seed,
        settings={**SETTINGS, **(settings or {})},
        **options,
    )


def workshop(folder: Path, wanted=None, *, micro_batch=24, precision="float32", loggers=()):
    """A run in `folder`, created if it is not there, with everything that would be measured fixed."""
    shop = RunSession(wanted or request(), load(), folder, loggers=loggers)
    if shop.run is None:
        resolved = Resolved(
            device="cpu", device_name="test", precision=precision, micro_batch=micro_batch,
            threads=torch.get_num_threads(),
        )  # fmt: skip
        shop.create(resolved)
    return shop


def losses(shop):
    """The lines of a run's log."""
    return [json.loads(line) for line in shop.run.log.read_text().splitlines()]


class SecondProcess(ProcessGroup):
    """A process that is not the main process, which broadcasts `value` whatever this one has."""

    size, index = 2, 1

    def __init__(self, value):
        self.value = value

    def broadcast(self, value):
        return self.value
