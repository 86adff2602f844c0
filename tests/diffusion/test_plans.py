"""Sampler plans in numpy, compared with the samplers' textbook forms."""

import numpy as np
import pytest

from harness.diffusion.plans import ddim_plan, ddpm_plan
from harness.diffusion.respacing import space_timesteps
from harness.diffusion.schedule import Schedule
from harness.errors import UserError

LINEAR = Schedule.named("linear")


@pytest.mark.parametrize("plan", [ddpm_plan(LINEAR, 25), ddim_plan(LINEAR, "ddim25", eta=0.5)], ids=["ddpm", "ddim"])
def test_fields(plan):
    assert plan.steps == plan.evaluations == 25
    assert plan.schedule == "linear"
    assert plan.timesteps.dtype == np.int64 and (np.diff(plan.timesteps) < 0).all() and plan.timesteps[-1] == 0
    assert plan.adds_noise.dtype == np.bool_ and plan.adds_noise[:-1].all() and not plan.adds_noise[-1]
    assert plan.noise_std[-1] == 0 and (plan.noise_std[:-1] > 0).all()
    arrays = [value for value in vars(plan).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 9
    for array in arrays:
        assert array.shape == (25,) and not array.flags.writeable
        assert array.dtype in (np.float64, np.int64, np.bool_)


@pytest.mark.parametrize("steps", [1, 10, 250, 1000])
@pytest.mark.parametrize("make", [ddpm_plan, ddim_plan])
def test_true_epsilon_gives_the_image_back(make, steps):
    """With the exact epsilon, x0 is exact at every step, and the last step returns it."""
    plan = make(LINEAR, steps)
    x0, x = 0.3, 1.1
    abar = LINEAR.abar[plan.timesteps]
    for k in range(plan.steps):
        eps = (x - np.sqrt(abar[k]) * x0) / np.sqrt(1 - abar[k])
        estimate = plan.x0_from_x[k] * x - plan.x0_from_eps[k] * eps
        assert estimate == pytest.approx(x0, abs=1e-9)
        x = plan.mean_from_x0[k] * estimate + plan.mean_from_x[k] * x
    assert x == pytest.approx(x0, abs=1e-9)


def test_ddpm_is_algorithm_2():
    """mean = (x - beta / sqrt(1 - abar) eps) / sqrt(1 - beta), Ho et al. 2020."""
    plan, spaced = ddpm_plan(LINEAR, 64), LINEAR.respaced(space_timesteps(1000, 64))
    x, eps = 0.8, -0.4
    mean = (x - spaced.betas / np.sqrt(1 - spaced.abar) * eps) / np.sqrt(1 - spaced.betas)
    ours = plan.mean_from_x0 * (plan.x0_from_x * x - plan.x0_from_eps * eps) + plan.mean_from_x * x
    np.testing.assert_allclose(ours, mean[::-1], rtol=1e-9)
    np.testing.assert_allclose(np.exp(plan.log_variance_high), spaced.betas[::-1], rtol=1e-12)
    np.testing.assert_allclose(np.exp(plan.log_variance_low[:-1]), spaced.posterior_variance[:0:-1], rtol=1e-12)
    fixed = ddpm_plan(LINEAR, 64, variance="fixed-small")
    assert plan.learned_variance and not fixed.learned_variance
    np.testing.assert_allclose(fixed.noise_std[:-1] ** 2, spaced.posterior_variance[:0:-1], rtol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_equation_12(eta):
    plan, spaced = ddim_plan(LINEAR, "ddim50", eta=eta), LINEAR.respaced(space_timesteps(1000, "ddim50"))
    abar, abar_prev = spaced.abar, spaced.abar_prev
    x, eps = 0.8, -0.4
    sigma = eta * np.sqrt((1 - abar_prev) / (1 - abar)) * np.sqrt(1 - abar / abar_prev)  # eq. 16
    x0 = (x - np.sqrt(1 - abar) * eps) / np.sqrt(abar)
    mean = np.sqrt(abar_prev) * x0 + np.sqrt(1 - abar_prev - sigma**2) * eps  # eq. 12
    estimate = plan.x0_from_x * x - plan.x0_from_eps * eps
    np.testing.assert_allclose(plan.mean_from_x0 * estimate + plan.mean_from_x * x, mean[::-1], rtol=1e-9)
    np.testing.assert_allclose(plan.noise_std, sigma[::-1], rtol=1e-9, atol=1e-12)
    assert plan.adds_noise.any() == (eta > 0)
    assert plan.timesteps[0] == 980 and plan.eta == eta


def test_ddim_with_eta_1_is_ddpm():
    ddim, ddpm = ddim_plan(LINEAR, 50, eta=1.0), ddpm_plan(LINEAR, 50, variance="fixed-small")
    for name in ("mean_from_x0", "mean_from_x", "noise_std"):
        np.testing.assert_allclose(getattr(ddim, name), getattr(ddpm, name), rtol=1e-9, atol=1e-12)


def test_refused():
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="eta"):
            ddim_plan(LINEAR, 10, eta=eta)
    with pytest.raises(UserError, match="variance"):
        ddpm_plan(LINEAR, 10, variance="learned")
    with pytest.raises(UserError, match="sampling steps"):
        ddpm_plan(LINEAR, 1001)
