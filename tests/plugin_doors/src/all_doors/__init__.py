"""An item for each door, described without a framework."""

import numpy as np

from harness.autoencoders.tokenizer import Tokenizer
from harness.data import DatasetSpec
from harness.diffusion.auxiliary import AuxiliaryLoss
from harness.diffusion.guidance_rules import GuidanceRule
from harness.diffusion.objectives import Objective, Target, TwoTimes
from harness.diffusion.samplers import SamplerSpec
from harness.plugins.hook import Hook
from harness.spec import BackboneSpec

DEFAULTS = {"input_size": 8, "in_channels": 1, "num_classes": 10, "out_channels": None}
BACKBONES = (
    BackboneSpec(
        name="doors-masked", summary="tokens, half of them in training, time from 0 to 1", defaults=DEFAULTS, time="unit",
        masked_training=True, null_label="num_classes", builders={"torch": "all_doors.networks:Masked"},
    ),
    BackboneSpec(
        name="doors-sigma", summary="pixels one by one, told the log of the noise level; no classes", defaults=DEFAULTS,
        time="log-sigma",
        builders={"torch": "all_doors.networks:Pixelwise", "jax": "all_doors.jax_networks:Pixelwise"},
    ),
    BackboneSpec(
        name="doors-masked-jax", summary="tokens, half of them in training, in JAX alone", defaults=DEFAULTS,
        masked_training=True, null_label="num_classes", builders={"jax": "all_doors.jax_networks:Masked"},
    ),
    BackboneSpec(
        name="doors-steps", summary="a perceptron over all pixels, told the end of a step", defaults=DEFAULTS, time="unit",
        times=2, null_label="num_classes",
        builders={"torch": "all_doors.networks:Steps", "jax": "all_doors.jax_networks:Steps"},
    ),
)  # fmt: skip


def end_time(t, draw, xp):
    """r = t for half of the images, else uniform from 0 to t."""
    return xp.where(draw < 0.5, t, t * (2 * draw - 1))


def two_halves(net, x, t, r, u, xp):
    """The mean of the two halves of a step, as the network predicts them (arXiv:2410.12557, eq. 4); u for no step at all."""
    middle = (t + r) / 2
    first = net(x, t, middle)
    second = net(x - (t - middle) * first, middle, r)
    return xp.where(r == t, u, (first + second) / 2)


OBJECTIVES = (
    Objective(name="doors-half", target=lambda at, xp: Target(-0.5, 1.0)),
    Objective(
        name="doors-shortcut", target=lambda at, xp: Target(at.da, at.ds),
        two_times=TwoTimes(end_time=end_time, target=two_halves, evaluations=2),
    ),
)  # fmt: skip
GUIDANCE = GuidanceRule(
    name="doors-mean", summary="the mean of both images", combine=lambda with_label, without, *rest: (with_label + without) / 2
)  # fmt: skip
AUXILIARY_LOSS = AuxiliaryLoss(
    name="doors-quiet", summary="mean square of a tap", weight=0.1, needs_encoder=False,
    builders={"torch": "all_doors.networks:Quiet"},
)  # fmt: skip
TOKENIZERS = tuple(
    Tokenizer(
        name=f"doors-{name}", summary="2x2 pixels turned into 4 channels", builder=f"all_doors.networks:{builder}", channels=4,
        factor=2, image_channels=1, round_trip=0.01,
    )
    for name, builder in (("blocks", "Blocks"), ("one-way", "OneWay"))
)  # fmt: skip


def euler(task):
    """Each step goes to the next level along the noise that the predicted image leaves: DDIM, eta 0."""
    from harness.diffusion.solvers import SamplerTable

    grid = task.nodes()
    rows = len(grid)
    kept = grid.s[1:] / grid.s[:-1]
    x_from = np.zeros((rows, 3))  # columns: x, base, D
    x_from[:, 0], x_from[:, 2] = kept, grid.a[1:] - kept * grid.a[:-1]
    return SamplerTable(
        times=grid.times[:-1], a=grid.a[:-1], s=grid.s[:-1], x_from=x_from, base_from=np.zeros((rows, 3)),
        noise_to_x=np.zeros(rows), noise_to_base=np.zeros(rows), initial_noise=float(grid.s[0]),
    )  # fmt: skip


LOGGER = Hook(name="doors-lines", summary="a text file", call="all_doors.services:Lines")
LAUNCHER = Hook(name="doors-inline", summary="one command after the other", call="all_doors.services:launch")
FIGURES = tuple(
    Hook(name=f"doors-{name}", summary="gap over Gflops", call=f"all_doors.services:{call}")
    for name, call in (("figure", "figure"), ("torn", "torn"))
)
SAMPLER = SamplerSpec(name="doors-euler", summary="Euler's method", make=euler)
DATASETS = tuple(
    DatasetSpec(name=f"doors-{name}", summary="300 digits", loader=f"all_doors:{name}", images=300)
    for name in ("digits", "unlabelled")
)


def digits(folder, labelled=True):
    from harness import ImageSet
    from harness.data.digits import load

    found = load()
    labels = found.labels[:300] if labelled else np.zeros(300, np.int64)
    return ImageSet(name="doors-digits", images=found.images[:300], labels=labels)


def unlabelled(folder):
    return digits(folder, labelled=False)


def protocols():
    """On pixels, on latents, by steps, and without classes."""
    from harness.protocols import from_dict

    def make(name, **items):
        recipe = {"steps": 6, "batch": 16, "learning_rate": 1e-3, "flip": False, **items.pop("recipe", {})}
        sampling = {"steps": [3], "clip_denoised": "space" not in items, "guidance_channels": "all"}
        fields = {
            "name": f"doors-{name}", "dataset": "doors-digits", "resolution": 8, "image_channels": 1, "num_classes": 10,
            "input_size": 8, "in_channels": 1, "samples": 100, "suite": "doors-suite", "recipe": recipe, "sampling": sampling,
        }  # fmt: skip
        return from_dict({**fields, **items}, name)

    flow = {"objective": "velocity", "schedule": "flow"}
    return (
        make("pixels", recipe={"objective": "doors-half", "auxiliary": "doors-quiet:none:inner"}),
        make("latents", space="latents", input_size=4, in_channels=4, recipe=flow),
        make("steps", recipe={"objective": "doors-shortcut", "schedule": "flow"}),
        make("unlabelled", dataset="doors-unlabelled", num_classes=0, recipe=flow),
    )


def system():
    from harness.systems.spec import Component, System

    base = Component(
        backbone="doors-masked", arguments={"num_classes": 10}, objective="doors-half", sampler="doors-euler", steps=3,
        clip_denoised=True,
    )  # fmt: skip
    return System(
        name="doors-system", summary="the masked network by Euler's method", protocol="doors-pixels", base=base
    )
