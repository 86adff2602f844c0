"""The loops of torch and jax over every sampler's table: in float32 as the table in float64, and as often as it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from harness import registry
from harness.diffusion.objectives import image_from
from harness.diffusion.sampler_plan import sampler_plan
from harness.diffusion.training import process_named
from harness.engines.jax.plan_arrays import split_plan
from harness.engines.jax.sampler import first_carry, sample_steps
from harness.engines.torch.sampler import guided, sample_loop
from harness.errors import UserError

MEAN, STD = 0.2, 0.5  # of the Gaussian data
STEPS = 10
NOISE = np.random.default_rng(0).standard_normal((40, 2, 3, 4, 4)).astype(np.float32)  # of rows; the last is x_T
CASES = {  # schedule, objective of the network
    "linear": "v",
    "cosine": "x0",
    "sqrt-linear": "epsilon-fixed",
    "flow": "velocity",
    "gvp": "velocity",
    "vp-continuous": "v",
    "ve": "edm",
}


def plan_of(sampler, schedule):
    """The plan, or None where the sampler is not defined on the schedule."""
    try:
        return sampler_plan(sampler, STEPS, schedule=schedule, objective=CASES[schedule], diffusion_steps=1000, eta=0.5)
    except UserError as error:
        assert "sampler" in str(error)  # says which
        return None


def network(plan):
    """The exact network for Gaussian data: slope and offset of its output in what it sees, float64 (rows,) each.

    Solves D = from_x x + from_u u for u, with D = E[x0 | x] in closed form (SOLVERS.md, sec. 4).
    """
    a, s = plan.table.a, plan.table.s
    scale = np.ones(len(a)) if plan.input_scale is None else plan.input_scale
    slope = a * STD**2 / (a**2 * STD**2 + s**2)  # D = MEAN + slope (x - a MEAN)
    from_x, from_u = plan.x0_from_x, -plan.x0_from_output
    return (slope - from_x) / from_u / scale, (MEAN - slope * a * MEAN) / from_u


def exact(plan, x):
    """The sample in float64, by the table alone."""
    table, base, images = plan.table, np.zeros_like(x), []
    x = table.initial_noise * x
    for k in range(plan.evaluations):
        a, s = table.a[k], table.s[k]
        images = [MEAN + a * STD**2 * (x - a * MEAN) / (a**2 * STD**2 + s**2), *images][: table.x_from.shape[1] - 2]
        columns = [x, base, *images]
        x = sum(c * each for c, each in zip(table.x_from[k], columns, strict=False)) + table.noise_to_x[k] * NOISE[k]
        base = sum(c * each for c, each in zip(table.base_from[k], columns, strict=False))
    return x


@pytest.mark.parametrize("schedule", CASES)
@pytest.mark.parametrize("sampler", [each.name for each in registry.samplers if each.make])
def test_both_loops(sampler, schedule):
    plan = plan_of(sampler, schedule)
    if plan is None:
        assert sampler in ("ddpm", "ddim", "ddim-ldm", "edm-stochastic", "euler-maruyama")
        return
    slope, offset = network(plan)
    expected = exact(plan, NOISE[-1].astype(np.float64))
    seen = []

    def predict(x, t, row):
        k = len(seen)
        seen.append(float(t[0]))
        assert t.shape == (2,) and len(set(t.tolist())) == 1
        return float(slope[k]) * x + float(offset[k])

    found = sample_loop(predict, plan, torch.from_numpy(NOISE[-1]), lambda k: torch.from_numpy(NOISE[k])).numpy()
    assert len(seen) == plan.evaluations
    np.testing.assert_allclose(seen, plan.network_times, rtol=1e-6)
    scale = np.abs(expected).max()
    # float32: x of ve begins at 80, and D of eps is a difference of numbers s / a times as large
    np.testing.assert_allclose(found, expected, atol=2e-4 * scale)

    if schedule not in ("linear", "flow", "ve"):  # one of each kind: most of the time is compiling
        return

    def traced(x, t, row):
        k = jnp.argmin(jnp.abs(jnp.asarray(plan.network_times.astype(np.float32)) - t[0].astype(jnp.float32)))
        return jnp.asarray(slope.astype(np.float32))[k] * x + jnp.asarray(offset.astype(np.float32))[k]

    form, arrays = split_plan(plan)

    @jax.jit
    def run(x):
        return sample_steps(
            traced, form, arrays, first_carry(form, x), 0, plan.evaluations, lambda k: jnp.asarray(NOISE)[k]
        ).x

    np.testing.assert_allclose(run(NOISE[-1]), found, atol=1e-4 * scale)


@pytest.mark.parametrize("sampler", ["ddpm", "heun", "dpm++-2s", "unipc-3"])
def test_guidance_doubles_the_batch_and_not_the_calls(sampler):
    schedule, objective = ("linear", "epsilon-learned-range") if sampler == "ddpm" else ("flow", "velocity")
    plan = sampler_plan(sampler, STEPS, schedule=schedule, objective=objective, diffusion_steps=1000)
    images = []

    def net(x, t, y):
        images.append(len(x))
        return torch.cat([0.5 * x] * (2 if sampler == "ddpm" else 1), dim=1)

    predict = guided(net, torch.tensor([0, 1]), 1.5, "all", 10)
    sample_loop(predict, plan, torch.from_numpy(NOISE[-1]), lambda k: torch.from_numpy(NOISE[k]))
    assert images == [4] * plan.evaluations


def test_evaluations_of_every_sampler():
    """What the papers say: one a step; Heun's rule 2 N - 1; the single-step solver 2 N."""
    for spec in (each for each in registry.samplers if each.make):  # an adaptive one has no number
        schedule = "ve" if spec.name == "edm-stochastic" else "flow" if spec.name == "euler-maruyama" else "linear"
        plan = plan_of(spec.name, schedule)
        expected = {"heun": 2 * STEPS - 1, "edm-stochastic": 2 * STEPS - 1, "dpm++-2s": 2 * STEPS}.get(spec.name, STEPS)
        assert (plan.steps, plan.evaluations) == (STEPS, expected), spec.name


def test_the_image_does_not_depend_on_the_kind_of_prediction():
    """One network, told as velocity, as v, as x0: the same plan of images."""
    process = process_named("flow", 1000)
    plans = {
        name: sampler_plan("heun", STEPS, schedule="flow", objective=name, diffusion_steps=1000)
        for name in ("velocity", "v", "x0")
    }
    finals = {}
    for name, plan in plans.items():
        slope, offset = network(plan)
        count = iter(range(plan.evaluations))

        def predict(x, t, row, count=count, slope=slope, offset=offset):
            k = next(count)
            return float(slope[k]) * x + float(offset[k])

        finals[name] = sample_loop(predict, plan, torch.from_numpy(NOISE[-1]), lambda k: torch.from_numpy(NOISE[k]))
    at = process.coefficients(np.float64(0.3), np)
    assert image_from(at, registry.objectives.get("x0").target(at, np)) == (0.0, 1.0)
    for name in ("v", "x0"):
        torch.testing.assert_close(finals[name], finals["velocity"], rtol=0, atol=2e-5)
