"""Sampler plans in numpy, compared with the samplers' textbook forms."""

import numpy as np
import pytest
from sampler_plans import ddim_plan, ddpm_plan

from harness.diffusion.respacing import space_timesteps
from harness.diffusion.schedule import Schedule
from harness.diffusion.solvers import D, X
from harness.errors import UserError

LINEAR = Schedule.named("linear")


@pytest.mark.parametrize("plan", [ddpm_plan(LINEAR, 25), ddim_plan(LINEAR, "ddim25", eta=0.5)], ids=["ddpm", "ddim"])
def test_fields(plan):
    assert plan.evaluations == 25
    assert plan.schedule == "linear"
    assert (
        plan.network_times.dtype == np.int64 and (np.diff(plan.network_times) < 0).all() and plan.network_times[-1] == 0
    )
    assert plan.adds_noise.dtype == np.bool_ and plan.adds_noise[:-1].all() and not plan.adds_noise[-1]
    assert plan.table.noise_to_x[-1] == 0 and (plan.table.noise_to_x[:-1] > 0).all()
    for array in (plan.x0_from_x, plan.x0_from_output, plan.x0_from_gradient):
        assert array.shape == (25,) and not array.flags.writeable and array.dtype == np.float64


@pytest.mark.parametrize("steps", [1, 10, 250, 1000])
@pytest.mark.parametrize("make", [ddpm_plan, ddim_plan])
def test_true_epsilon_gives_the_image_back(make, steps):
    """With the exact epsilon, x0 is exact at every step, and the last step returns it."""
    plan = make(LINEAR, steps)
    x0, x = 0.3, 1.1
    abar = LINEAR.abar[plan.network_times]
    for k in range(plan.steps):
        eps = (x - np.sqrt(abar[k]) * x0) / np.sqrt(1 - abar[k])
        estimate = plan.x0_from_x[k] * x - plan.x0_from_output[k] * eps
        assert estimate == pytest.approx(x0, abs=1e-9)
        x = plan.table.x_from[k, D] * estimate + plan.table.x_from[k, X] * x
    assert x == pytest.approx(x0, abs=1e-9)


def test_ddpm_is_algorithm_2():
    """mean = (x - beta / sqrt(1 - abar) eps) / sqrt(1 - beta), Ho et al. 2020."""
    plan, spaced = ddpm_plan(LINEAR, 64), LINEAR.respaced(space_timesteps(1000, 64))
    x, eps = 0.8, -0.4
    mean = (x - spaced.betas / np.sqrt(1 - spaced.abar) * eps) / np.sqrt(1 - spaced.betas)
    ours = plan.table.x_from[:, D] * (plan.x0_from_x * x - plan.x0_from_output * eps) + plan.table.x_from[:, X] * x
    np.testing.assert_allclose(ours, mean[::-1], rtol=1e-9)
    np.testing.assert_allclose(np.exp(plan.table.log_variances[1]), spaced.betas[::-1], rtol=1e-12)
    np.testing.assert_allclose(np.exp(plan.table.log_variances[0][:-1]), spaced.posterior_variance[:0:-1], rtol=1e-12)
    fixed = ddpm_plan(LINEAR, 64, variance="fixed-small")
    assert plan.learned_variance and not fixed.learned_variance
    np.testing.assert_allclose(fixed.table.noise_to_x[:-1] ** 2, spaced.posterior_variance[:0:-1], rtol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_equation_12(eta):
    plan, spaced = ddim_plan(LINEAR, "ddim50", eta=eta), LINEAR.respaced(space_timesteps(1000, "ddim50"))
    abar, abar_prev = spaced.abar, spaced.abar_prev
    x, eps = 0.8, -0.4
    sigma = eta * np.sqrt((1 - abar_prev) / (1 - abar)) * np.sqrt(1 - abar / abar_prev)  # eq. 16
    x0 = (x - np.sqrt(1 - abar) * eps) / np.sqrt(abar)
    mean = np.sqrt(abar_prev) * x0 + np.sqrt(1 - abar_prev - sigma**2) * eps  # eq. 12
    estimate = plan.x0_from_x * x - plan.x0_from_output * eps
    np.testing.assert_allclose(plan.table.x_from[:, D] * estimate + plan.table.x_from[:, X] * x, mean[::-1], rtol=1e-9)
    np.testing.assert_allclose(plan.table.noise_to_x, sigma[::-1], rtol=1e-9, atol=1e-12)
    assert plan.adds_noise.any() == (eta > 0)
    assert plan.network_times[0] == 980 and plan.eta == eta


def test_ddim_with_eta_1_is_ddpm():
    ddim, ddpm = ddim_plan(LINEAR, 50, eta=1.0), ddpm_plan(LINEAR, 50, variance="fixed-small")
    for name in ("x_from", "noise_to_x"):
        np.testing.assert_allclose(getattr(ddim.table, name), getattr(ddpm.table, name), rtol=1e-9, atol=1e-12)


def test_refused():
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="eta"):
            ddim_plan(LINEAR, 10, eta=eta)
    with pytest.raises(UserError, match="sampling steps"):
        ddpm_plan(LINEAR, 1001)
