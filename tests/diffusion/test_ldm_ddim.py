"""LDM's DDIM: timesteps from 1, the last step to abar[0].

The figures were computed with CompVis/latent-diffusion a506df5 (DDIMSampler of ldm/models/diffusion/ddim.py over
make_beta_schedule("linear", 1000, linear_start=0.0015, linear_end=0.0195), as cin256-v2.yaml has it), on a CPU in
float32, with the network below.
"""

import numpy as np
import pytest
import torch
from sampler_plans import ldm_ddim_plan

from harness.diffusion.schedule import Schedule
from harness.engines.torch.sampler import classifier_guide, guided, sample_loop
from harness.errors import UserError

SCHEDULE = Schedule.named("sqrt-linear")
SHAPE = (2, 3, 8, 8)
LABELS, NULL = torch.tensor([1, 3]), 5
GOLDENS = {  # (steps, eta, guidance scale): mean, std, the last three values
    (50, 0.0, 1.0): (-40.072992, 42.055528, [-18.991493, -50.303432, -52.536289]),
    (50, 0.0, 1.5): (-39.712818, 42.208982, [-18.353779, -50.021233, -52.287804]),
    (50, 1.0, 1.0): (-55.097008, 40.748644, [-25.404169, -64.978859, -58.43256]),
    (50, 1.0, 1.5): (-54.757047, 40.92192, [-24.954821, -64.735481, -58.179634]),
    (200, 0.0, 1.0): (-45.462251, 47.138736, [-21.809824, -56.85041, -59.340855]),
    (200, 1.0, 1.0): (-64.062106, 45.41078, [-22.341339, -77.217888, -52.408913]),
    (250, 0.0, 1.5): (-45.484466, 47.692094, [-21.328825, -57.049282, -59.595535]),
    (250, 1.0, 1.5): (-64.526156, 45.846619, [-21.69198, -77.830048, -52.378517]),
}


def toy_network(x, t, y):
    """0.1 x + 0.001 t + 0.02 y cos x: epsilon."""
    return 0.1 * x + 0.001 * t.float()[:, None, None, None] + 0.02 * y.float()[:, None, None, None] * torch.cos(x)


def draws(steps):
    """(x_T, noise of every step) in the order in which the public loop draws them after torch.manual_seed(0)."""
    generator = torch.Generator().manual_seed(0)
    z, *noise = (torch.randn(SHAPE, generator=generator) for _ in range(steps + 1))
    return z, noise


def equations(steps, eta, scale):
    """Song et al. 2021, eq. 12 and 16, over LDM's timesteps, float64 numpy."""
    abar_all = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    timesteps = range(1, 1000, 1000 // steps)
    z, noise = draws(steps)
    x = z.double().numpy()
    y = LABELS.double().numpy()[:, None, None, None]
    for k, i in enumerate(reversed(range(steps))):
        a, before = abar_all[timesteps[i]], abar_all[timesteps[i - 1] if i else 0]
        common = 0.1 * x + 0.001 * timesteps[i]
        with_label, without = common + 0.02 * y * np.cos(x), common + 0.02 * NULL * np.cos(x)
        eps = without + scale * (with_label - without)
        sigma = eta * np.sqrt((1 - before) / (1 - a) * (1 - a / before))
        x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        x = np.sqrt(before) * x0 + np.sqrt(1 - before - sigma**2) * eps + sigma * noise[k].double().numpy()
    return x


@pytest.mark.parametrize("case", GOLDENS, ids=str)
def test_samples(case):
    """The largest difference seen from the public code, whose tables are float32, is 2.1e-6 of the largest value."""
    steps, eta, scale = case
    z, noise = draws(steps)
    plan = ldm_ddim_plan(SCHEDULE, steps, eta=eta)
    out = sample_loop(guided(toy_network, LABELS, scale, "all", NULL), plan, z, lambda k: noise[k])
    largest = out.abs().max().item()
    mean, std, last = GOLDENS[case]
    wide = out.double()
    assert wide.mean().item() == pytest.approx(mean, abs=1e-5 * largest)
    assert wide.std().item() == pytest.approx(std, abs=1e-5 * largest)
    np.testing.assert_allclose(out[1, 2, -1, -3:].numpy(), last, rtol=0, atol=1e-5 * largest)
    np.testing.assert_allclose(out.numpy(), equations(*case), rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(("steps", "stride"), [(50, 20), (200, 5), (250, 4), (1, 1000), (500, 2)])
def test_timesteps_and_the_last_step(steps, stride):
    plan = ldm_ddim_plan(SCHEDULE, steps, eta=1.0)
    assert (plan.name, plan.schedule, plan.steps, plan.evaluations) == ("ddim-ldm", "sqrt-linear", steps, steps)
    assert plan.network_times.tolist() == list(range(1, 1001, stride))[:steps][::-1] and plan.network_times[-1] == 1
    # ddim_sigmas[0] of DDIMSampler.make_schedule, for eta 1; in float32, where 1 - abar[0] has lost four digits.
    assert plan.adds_noise.all() and plan.table.noise_to_x[-1] == pytest.approx(0.02743204779, rel=1e-5)
    assert not ldm_ddim_plan(SCHEDULE, steps).adds_noise.any()
    z = torch.zeros(1, 1, 1, 1)
    one = torch.ones(1, 1, 1, 1)
    last = steps - 1
    out = sample_loop(lambda x, t, row: torch.zeros_like(x), plan, z, lambda k: one * (k == last))
    assert out.item() == pytest.approx(plan.table.noise_to_x[-1], rel=1e-6)  # the last step's noise stays in the sample


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_true_epsilon_leaves_the_noise_of_timestep_0(eta):
    """x_0 = 0.5 known exactly: the sample is N(sqrt(abar[0]) 0.5, 1 - abar[0]), not the image itself."""
    generator = torch.Generator().manual_seed(2)
    abar = torch.from_numpy(SCHEDULE.abar.copy())

    def predict(x, t, row):
        a = abar[t][:, None, None, None]
        return ((x - a.sqrt() * 0.5) / (1 - a).sqrt()).float()

    plan = ldm_ddim_plan(SCHEDULE, 50, eta=eta)
    x = torch.randn(64, 1, 16, 16, generator=generator)
    out = sample_loop(predict, plan, x, lambda k: torch.randn(x.shape, generator=generator))
    assert out.mean().item() == pytest.approx(0.5 * (1 - 0.0015) ** 0.5, abs=2e-3)  # standard error 3e-4
    assert out.std().item() == pytest.approx(0.0015**0.5, rel=0.05)  # 0.0387; standard error 0.6 %


def test_schedule():
    """betas of make_beta_schedule("linear", 1000, linear_start=0.0015, linear_end=0.0195), float64."""
    assert SCHEDULE.betas[0] == pytest.approx(0.0015, rel=1e-14)
    assert SCHEDULE.betas[499] == pytest.approx(0.007945156998524846, rel=1e-13)
    assert SCHEDULE.betas[-1] == pytest.approx(0.0195, rel=1e-14)
    assert SCHEDULE.betas.sum() == pytest.approx(8.80447456101755, rel=1e-13)
    assert SCHEDULE.abar.sum() == pytest.approx(275.3718068434238, rel=1e-12)


def test_clip_and_a_classifier_work_as_in_ddim():
    """The guided epsilon of eq. 12 in one step of two; the clamp comes before."""
    plan = ldm_ddim_plan(SCHEDULE, 2, clip_denoised=True)
    assert plan.network_times.tolist() == [501, 1]
    x = torch.full((1, 1, 1, 1), 3.0)
    guide = classifier_guide(lambda x, t: torch.stack([x.flatten(), 0 * x.flatten()], dim=1), torch.tensor([0]), 2.0)
    out = sample_loop(lambda x, t, row: torch.zeros_like(x), plan, x, lambda k: x, guide=guide).item()
    value, abar = 3.0, SCHEDULE.abar
    for a, before in ((abar[501], abar[1]), (abar[1], abar[0])):
        x0 = min(1.0, value / np.sqrt(a))
        gradient = 2.0 / (1 + np.exp(value))
        eps = (value - np.sqrt(a) * x0) / np.sqrt(1 - a) - np.sqrt(1 - a) * gradient
        x0 = (value - np.sqrt(1 - a) * eps) / np.sqrt(a)
        value = np.sqrt(before) * x0 + np.sqrt(1 - before) * eps
    assert out == pytest.approx(value, rel=1e-5)


def test_by_name_and_refused():
    plan = ldm_ddim_plan(SCHEDULE, 50, eta=0.5, clip_denoised=True)
    assert (plan.name, plan.eta, plan.clip_denoised, plan.learned_variance) == ("ddim-ldm", 0.5, True, False)
    for steps, near in ((300, 250), (7, 8), (51, 50), (999, 500), (1000, 500)):
        with pytest.raises(UserError, match=rf"no stride takes {steps} of 1000 timesteps; {near} steps fit"):
            ldm_ddim_plan(SCHEDULE, steps)
    for steps in (0, -5, 2000):
        with pytest.raises(UserError, match=f"no stride takes {steps} of 1000"):
            ldm_ddim_plan(SCHEDULE, steps)
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="eta"):
            ldm_ddim_plan(SCHEDULE, 50, eta=eta)
