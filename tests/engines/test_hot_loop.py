"""The hot loop on a pretended GPU: nothing waits, no tensors of two devices meet, and random numbers are a small part."""

import threading
from functools import partial

import numpy as np
import pytest
import torch
from pretended_cuda import DEVICE, GENERATOR, pretended_gpu

from harness import registry
from harness.data.images import ImageSet
from harness.data.read_ahead import ReadAhead
from harness.diffusion.guidance import Guidance
from harness.diffusion.sampler_plan import sampler_plan
from harness.engines.torch import trainer
from harness.engines.torch.sampler import CHECK_EVERY_ROWS, sample_loop
from harness.engines.torch.sampling import TorchChain, TorchStage, WeakGuide
from harness.errors import UserError
from harness.protocols import Recipe
from harness.runs.run import Resolved

MAX_RANDOM_SHARE = 0.15  # of the launches
# Narrow networks. The depth, on which launches depend, is that of DiT-S, and less than that of the real U-Nets.
UNET = {"num_classes": 10, "width": 32, "input_size": 16, "multipliers": (1, 2), "res_blocks": 2}
ADM = {**UNET, "head_channels": 16, "attention_resolutions": (8,)}
DIT = {"input_size": 8, "in_channels": 4, "num_classes": 10, "depth": 12, "width": 32, "heads": 2}
NETWORKS = {
    "dit": ("dit-s-2", DIT),
    "adm": ("adm-64", ADM),
    "ldm": ("ldm-4", {**UNET, "attention_rates": (2,), "in_channels": 4}),
    "upsampler": ("adm-u-64-256", {**ADM, "low_res_size": 4, "heads": 4, "head_channels": 0}),
    "classifier": ("adm-classifier-64", {**ADM, "multipliers": (1, 2, 2)}),
}


class Posteriors:
    """Latents, as `harness.data.latents.LatentSet` has them: mean and standard deviation, of which training draws."""

    name, identity, source_paths = "latents", {}, {}

    def __init__(self, size):
        self.labels = np.arange(64) % 10
        self.latents = np.ones((64, 2, 4, size, size), np.float32)

    def check(self, protocol):
        pass

    def gather(self, rows, mirrored):
        return self.latents[rows]

    def to_model_input(self, stored, normal):
        return stored[:, 0] + stored[:, 1] * normal(tuple(stored.shape[2:]))


def network(kind, objective="epsilon-fixed", **changes):
    name, arguments = NETWORKS[kind]
    spec, arguments = registry.backbones.get(name), {**arguments, **changes}
    if kind != "classifier":
        channels = spec.arguments(**arguments)["in_channels"]
        arguments["out_channels"] = channels * (1 + registry.objectives.get(objective).learned_variance)
    return spec, spec.arguments(**arguments)


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("dit", {}),
        ("dit", {"clip_norm": 1.0, "ema_ramp": True, "objective": "velocity", "schedule": "flow"}),
        ("adm", {}),
        ("ldm", {"objective": "epsilon-fixed"}),
        ("upsampler", {"conditioning_noise": 0.2}),
        ("classifier", {}),
    ],
)
def test_a_training_step_waits_for_nothing(kind, recipe, monkeypatch):
    recipe = Recipe(batch=8, **recipe)
    spec, arguments = network(kind, recipe.objective)
    size, channels = arguments["input_size"], arguments["in_channels"]
    images = np.zeros((64, size, size, channels), np.uint8)
    data = Posteriors(size) if channels == 4 else ImageSet(name="noise", images=images, labels=np.arange(64) % 10)
    resolved = Resolved(device="cuda", device_name="", precision="float32", micro_batch=4, threads=1)
    net = trainer.build(spec, arguments, 0)
    with pretended_gpu(monkeypatch) as gpu:
        engine = trainer.TorchEngine(
            spec, net, arguments=arguments, recipe=recipe, seed=0, resolved=resolved, data=data
        )
        gpu.reset()  # weights are copied once
        for step in (1, 2) if kind == "dit" else (1,):
            engine.step(step, lambda: False)
            assert len(engine.pop_losses(wait=False)) == step - 1  # of the step before
        assert not gpu.waits and not gpu.mixed, gpu.summary()
        assert 0 < gpu.random_share < MAX_RANDOM_SHARE, gpu.summary()


SAMPLERS = {  # sampler: schedule, objective
    "ddpm": ("linear", "epsilon-learned-range"),
    "ddim": ("linear", "epsilon-fixed"),
    "dpm++-2m": ("linear", "epsilon-fixed"),
    "euler": ("flow", "velocity"),
    "euler-maruyama": ("flow", "velocity"),
}


def plan_of(sampler, steps):
    schedule, objective = SAMPLERS[sampler]
    return sampler_plan(sampler, steps, schedule=schedule, diffusion_steps=1000, objective=objective, eta=0.5)


@pytest.mark.parametrize(
    ("sampler", "guidance"),
    [
        *((sampler, guidance) for sampler in SAMPLERS for guidance in ("none", "classifier-free")),
        ("ddpm", "classifier"),
        ("ddim", "classifier"),
        ("ddim", "weaker network"),
    ],
)
def test_a_sampler_waits_for_nothing_before_the_last_row(sampler, guidance, monkeypatch):
    plan, objective = plan_of(sampler, 5), SAMPLERS[sampler][1]
    spec, arguments = network("dit", objective, depth=2)
    options = {
        "none": {},
        "classifier-free": {"guidance": Guidance(1.5)},
        "classifier": {"classifier_scale": 2.0},
        "weaker network": {"guidance": Guidance(2.0)},
    }[guidance]
    if guidance == "weaker network":
        options["weak"] = WeakGuide(spec.build("torch", **arguments), plan, 1)
    if guidance == "classifier":
        other, sizes = network("classifier", in_channels=4, input_size=8, attention_resolutions=(4,))
        options["classifier"] = other.build("torch", **sizes)
    net = spec.build("torch", **arguments)
    waits, random = [], []

    def advance():
        waits.append(gpu.waits.total())
        random.append(gpu.launches[GENERATOR])

    with pretended_gpu(monkeypatch) as gpu:
        stage = TorchStage(spec, net, plan, arguments=arguments, precision="float32", device=DEVICE, **options)
        chain = TorchChain([stage], None, seed=0, uint8_rule="adm", device=DEVICE)
        gpu.reset()
        images = chain.draw(np.arange(3), np.arange(3), advance)
    assert images.shape == (3, 8, 8, 4)
    assert waits[:-1] == [0] * (plan.evaluations - 1) and not gpu.mixed, gpu.summary()
    assert random[-1] == random[0]  # the first row draws for all; where images are large, each row is many launches


def test_samples_are_checked_on_the_way_without_waiting(monkeypatch):
    plan, waits = plan_of("ddim", 2 * CHECK_EVERY_ROWS), []
    with pretended_gpu(monkeypatch) as gpu:
        sample_loop(
            lambda x, t, row: x, plan, torch.zeros(2, 1, 2, 2, device=DEVICE), lambda row: torch.zeros(2, 1, 2, 2, device=DEVICE),
            progress=lambda *_: waits.append((gpu.waits.total(), gpu.events)),
        )  # fmt: skip
    assert waits[CHECK_EVERY_ROWS - 1] == (0, 0) and waits[-2] == (0, 1)


def test_batches_read_ahead_are_the_same():
    """With a thread that reads ahead, as on a GPU, and without, as on a CPU: the same losses, after a repeated step as well."""
    spec, arguments = network("dit", "epsilon-learned-range", depth=1)
    resolved = Resolved(device="cpu", device_name="", precision="float32", micro_batch=4, threads=1)
    found = []
    for ahead in (False, True):
        recipe = Recipe(batch=12, learning_rate=1e-2)
        net = trainer.build(spec, arguments, 0)
        engine = trainer.TorchEngine(
            spec, net, arguments=arguments, recipe=recipe, seed=0, resolved=resolved, data=Posteriors(8)
        )
        if ahead:
            engine._ahead = ReadAhead(engine._host_batch)
        assert engine.step(1, lambda: False)
        asked = iter([False, True])
        assert not engine.step(2, partial(next, asked))  # interrupted after its first micro-batch
        for step in (2, 3):
            assert engine.step(step, lambda: False)
        found.append(engine.pop_losses())
    assert len(found[0]) == 3 and found[0] == found[1]


def test_an_error_of_reading_is_raised_where_the_batch_is_taken():
    made = []

    def make(positions):
        made.append((positions, threading.current_thread() is threading.main_thread()))
        if positions.start == 2:
            raise UserError("damaged")
        return sum(positions)

    ahead = ReadAhead(make)
    assert ahead.take(range(2), range(2, 4)) == 1  # the batch that cannot be read is the next one
    with pytest.raises(UserError, match="damaged"):
        ahead.take(range(2, 4), range(4, 6))
    assert ahead.take(range(4, 6), range(6, 8)) == 9
    assert ahead.take(range(8, 10), None) == 17  # not what was read ahead
    assert made == [(range(start, start + 2), False) for start in (0, 2, 4, 6, 8)]
