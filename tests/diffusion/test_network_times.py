"""A network's time in the form that its backbone states: the same in training and in sampling, in torch and in jax."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from harness.diffusion.sampler_plan import reference_plan, sampler_plan
from harness.diffusion.schedule import Schedule
from harness.diffusion.training import TrainingObjective
from harness.engines.jax.loss import DenoisingLoss as JaxDenoisingLoss
from harness.engines.torch.loss import DenoisingLoss
from harness.errors import UserError
from harness.protocols import Recipe, override
from harness.spec import BackboneSpec

STEPS = np.array([0, 1, 250, 500, 999])
TIMES = np.array([1e-7, 0.02, 0.3, 0.5, 0.9, 1 - 2**-24], np.float32)  # the ends are those that training can draw
SIGMAS = np.array([0.003, 0.5, 1.0, 7.0, 80.0], np.float32)
ABAR = Schedule.named("linear", 1000).respaced().abar


def half_log_odds(t):
    return np.clip(np.log(t / (1 - t)), -10, 10)


def of_gvp(t):
    return np.clip(np.log(np.tan(np.pi / 2 * t)), -10, 10)


@pytest.mark.parametrize(
    ("form", "objective", "t", "expected"),
    [
        ("timestep", "dit", STEPS, STEPS),
        ("unit", "dit", STEPS, STEPS / 1000),
        ("log-sigma", "dit", STEPS, np.log((1 - ABAR[STEPS]) / ABAR[STEPS]) / 2),
        ("timestep", "sit", TIMES, 1000 * TIMES.astype(np.float64)),
        ("unit", "sit", TIMES, TIMES),
        ("unit", "velocity-sit", TIMES, TIMES),  # the backbone's form goes before the objective's, which is 1 - t
        ("log-sigma", "sit", TIMES, half_log_odds(TIMES.astype(np.float64))),
        ("log-sigma", "velocity", TIMES, of_gvp(TIMES.astype(np.float64))),
        ("timestep", "edm", SIGMAS, np.log(SIGMAS.astype(np.float64)) / 4),
        ("log-sigma", "edm", SIGMAS, np.log(SIGMAS.astype(np.float64))),
    ],
)
def test_training_gives_the_time_in_the_form_of_the_backbone(form, objective, t, expected):
    schedule = {"velocity": "gvp", "velocity-sit": "flow"}.get(objective)
    settings = {"objective": objective, **({"schedule": schedule} if schedule else {})}
    training = TrainingObjective.from_recipe(override(Recipe(), settings), form)
    x = np.zeros((len(t), 1, 2, 2), np.float32)
    _, by_torch = DenoisingLoss(training).network_inputs(torch.from_numpy(x), torch.from_numpy(t))
    of_jax = jnp.asarray(t.astype(np.int32) if t.dtype == np.int64 else t)
    _, by_jax = JaxDenoisingLoss(training).network_inputs(jnp.asarray(x), of_jax)
    assert by_torch.shape == by_jax.shape == t.shape
    kind = np.int64 if (form, objective) == ("timestep", "dit") else np.float32
    assert by_torch.numpy().dtype == kind and np.asarray(by_jax).dtype == (np.int32 if kind == np.int64 else kind)
    np.testing.assert_allclose(by_torch.numpy(), expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(np.asarray(by_jax), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("sampler", "schedule", "objective"),
    [
        ("ddpm", "linear", "epsilon-learned-range"),
        ("heun", "flow", "velocity"),
        ("heun", "gvp", "velocity"),
        ("heun", "ve", "edm"),
        ("dopri5", "flow", "velocity"),
    ],
)
def test_sampling_gives_the_time_of_training(sampler, schedule, objective):
    for form in ("unit", "log-sigma") if schedule != "ve" else ("log-sigma",):
        settings = {"objective": objective, "schedule": schedule, "diffusion_steps": 1000}
        plan = sampler_plan(sampler, 5, **settings, time=form)
        recipe = {**settings, "time_distribution": "log-normal" if schedule == "ve" else "uniform"}
        loss = DenoisingLoss(TrainingObjective.from_recipe(override(Recipe(), recipe), form))
        if sampler == "dopri5":
            t = TIMES
            _, given = plan.network_inputs(torch.zeros(len(t), 1, 1, 1), torch.from_numpy(t), torch)
            given = given.numpy()
        else:
            t, given = plan.table.times, plan.network_times
            assert given.dtype == np.float64 and np.isfinite(given).all() and (np.diff(given) <= 0).all()
            weak = reference_plan(plan, **settings, time=form)
            np.testing.assert_array_equal(weak.network_times, given)
            assert not np.array_equal(reference_plan(plan, **settings).network_times, given)
        t = torch.from_numpy(t if t.dtype == np.int64 else t.astype(np.float32))
        _, trained = loss.network_inputs(torch.zeros(len(t), 1, 1, 1), t)
        np.testing.assert_allclose(given, trained.numpy(), rtol=2e-5, atol=2e-6)


def test_a_time_that_does_not_fit_is_one_line():
    with pytest.raises(UserError, match="takes time from 0 to 1, and t of the schedule ve is the noise level"):
        TrainingObjective.from_recipe(override(Recipe(), {"objective": "edm"}), "unit")
    builders = {"torch": "no:where"}
    with pytest.raises(UserError, match="'seconds' is not one of timestep, unit, log-sigma"):
        BackboneSpec(name="mine", builders=builders, time="seconds")
    with pytest.raises(UserError, match="a classifier has no time 'unit'"):
        BackboneSpec(name="mine", kind="classifier", builders=builders, time="unit")
