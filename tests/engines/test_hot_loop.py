"""The hot loop on a pretended GPU: nothing waits, no tensors of two devices meet, and random numbers are a small part."""

import numpy as np
import pytest
from pretended_cuda import DEVICE, pretended_gpu

from harness import registry
from harness.data.images import ImageSet
from harness.diffusion.guidance import Guidance
from harness.diffusion.sampler_plan import sampler_plan
from harness.engines.torch import trainer
from harness.engines.torch.sampling import TorchChain, TorchStage, WeakGuide
from harness.protocols import Recipe
from harness.runs.run import Resolved

MICRO_BATCH = 4
# Fewer layers than the real networks have, so fewer launches beside those of random numbers.
UNET = {"num_classes": 10, "width": 32, "input_size": 16, "multipliers": (1, 2, 2), "res_blocks": 2}
ADM = {**UNET, "head_channels": 16, "attention_resolutions": (8, 4)}
NETWORKS = {
    "dit": ("dit-xs-2", {"input_size": 8, "in_channels": 4, "num_classes": 10}),
    "adm": ("adm-64", ADM),
    "ldm": ("ldm-4", {**UNET, "attention_rates": (2, 4), "in_channels": 4}),
    "upsampler": ("adm-u-64-256", {**ADM, "low_res_size": 4, "heads": 4, "head_channels": 0}),
    "classifier": ("adm-classifier-64", ADM),
}
CONTINUOUS = {"objective": "velocity", "schedule": "flow"}


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


def network(kind):
    name, arguments = NETWORKS[kind]
    spec = registry.backbones.get(name)
    return spec, spec.arguments(**arguments)


def data_of(arguments):
    size, channels = arguments["input_size"], arguments["in_channels"]
    if channels == 4:
        return Posteriors(size)
    return ImageSet(name="noise", images=np.zeros((64, size, size, channels), np.uint8), labels=np.arange(64) % 10)


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("dit", {}),
        ("dit", {"clip_norm": 1.0, "ema_ramp": True, **CONTINUOUS}),
        ("adm", {}),
        ("ldm", {"objective": "epsilon-fixed"}),
        ("upsampler", {"conditioning_noise": 0.2}),
        ("classifier", {}),
    ],
)
def test_a_training_step_waits_for_nothing(kind, recipe, monkeypatch):
    spec, arguments = network(kind)
    recipe = Recipe(**{"batch": 2 * MICRO_BATCH, **recipe})
    arguments = {**arguments}
    if kind != "classifier":
        learned = registry.objectives.get(recipe.objective).learned_variance
        arguments["out_channels"] = arguments["in_channels"] * (2 if learned else 1)
    resolved = Resolved(device="cuda", device_name="", precision="float32", micro_batch=MICRO_BATCH, threads=1)
    net = trainer.build(spec, arguments, 0)
    with pretended_gpu(monkeypatch) as gpu:
        engine = trainer.TorchEngine(
            spec, net, arguments=arguments, recipe=recipe, seed=0, resolved=resolved, data=data_of(arguments),
        )  # fmt: skip
        assert engine.device == DEVICE
        engine.step(1, lambda: False)
        gpu.reset()
        for step in (2, 3):
            engine.step(step, lambda: False)
    print(kind, gpu.summary())
    assert not gpu.waits and not gpu.mixed
    assert 0 < gpu.random_share < 0.15


SAMPLERS = {  # sampler, schedule, objective
    "ddpm": ("ddpm", "linear", "epsilon-learned-range"),
    "ddim": ("ddim", "linear", "epsilon-fixed"),
    "dpm++-2m": ("dpm++-2m", "linear", "epsilon-fixed"),
    "euler": ("euler", "flow", "velocity"),
    "euler-maruyama": ("euler-maruyama", "flow", "velocity"),
}


def plan_of(case, steps=10):
    sampler, schedule, objective = SAMPLERS[case]
    return sampler_plan(sampler, steps, schedule=schedule, diffusion_steps=1000, objective=objective, eta=0.5)


def waits_while_sampling(monkeypatch, kind, plan, objective, **options):
    """(the pretended device after a batch of samples, its launches in the middle of the loop)"""
    spec, arguments = network(kind)
    learned = registry.objectives.get(objective).learned_variance
    arguments = {**arguments, "out_channels": arguments["in_channels"] * (2 if learned else 1)}
    net = spec.build("torch", **arguments)
    with pretended_gpu(monkeypatch) as gpu:
        if options.pop("weak", False):
            options["weak"] = WeakGuide(spec.build("torch", **arguments), plan, 1)
        if "classifier" in options:
            other, its = network(options["classifier"])
            its = {**its, "in_channels": arguments["in_channels"], "input_size": arguments["input_size"]}
            options["classifier"] = other.build("torch", **its)
        stage = TorchStage(spec, net, plan, arguments=arguments, precision="float32", device=DEVICE, **options)
        steps = []

        def advance():
            steps.append(gpu.waits.total())

        chain = TorchChain([stage], None, seed=0, uint8_rule="adm", device=DEVICE)
        images = chain.draw(np.arange(3), np.arange(3), advance)
    assert images.shape == (3, arguments["input_size"], arguments["input_size"], arguments["in_channels"])
    assert len(steps) == plan.evaluations
    return gpu, steps


@pytest.mark.parametrize("guidance", [1.0, 1.5, "classifier", "weak"])
@pytest.mark.parametrize("case", SAMPLERS)
def test_a_sampler_waits_for_nothing_before_its_last_step(case, guidance, monkeypatch):
    options = (
        {"guidance": Guidance(guidance)} if isinstance(guidance, float) else {"weak": True, "guidance": Guidance(2.0)}
    )
    if guidance == "classifier":
        options = {"classifier": "classifier", "classifier_scale": 2.0}
    gpu, steps = waits_while_sampling(monkeypatch, "dit", plan_of(case), SAMPLERS[case][2], **options)
    print(case, guidance, gpu.summary())
    assert steps[-2] == 0 and not gpu.mixed
