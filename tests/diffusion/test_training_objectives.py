"""Losses of objectives against formulas typed anew from the papers, and jax's against torch's.

`output` stands for a network: any tensor. Times, noise and images are given.
"""

import functools

import jax
import numpy as np
import pytest
import torch

from harness.diffusion.grids import continuous_grid
from harness.diffusion.objectives import OBJECTIVES, PRESETS, Objective
from harness.diffusion.plans import make_plan
from harness.diffusion.processes import PROCESSES
from harness.diffusion.sampler_plan import sampler_plan
from harness.diffusion.schedule import Schedule
from harness.diffusion.solvers import euler
from harness.diffusion.training import TrainingObjective
from harness.engines.jax.loss import DenoisingLoss as JaxDenoisingLoss
from harness.engines.torch.loss import DenoisingLoss
from harness.errors import UserError
from harness.planning.request import make_request
from harness.protocols import Recipe, override
from harness.randomness.threefry_jax import words

GENERATOR = np.random.default_rng(2)
X0 = GENERATOR.uniform(-1, 1, (6, 3, 4, 4)).astype(np.float32)
NOISE = GENERATOR.standard_normal(X0.shape).astype(np.float32)
OUTPUT = GENERATOR.standard_normal(X0.shape).astype(np.float32)
TIMES = np.array([0.02, 0.1, 0.3, 0.5, 0.9, 0.999], np.float32)
SIGMAS = np.array([0.003, 0.05, 0.5, 1.0, 7.0, 80.0], np.float32)
STEPS = np.array([0, 1, 250, 500, 900, 999])


def recipe(**items):
    return override(Recipe(), items)


def loss(**items):
    return DenoisingLoss(TrainingObjective.from_recipe(recipe(**items)))


def terms(loss, t):
    """(x_t, what the network is given as x and as t, loss of each image) in float64."""
    x0, noise, output, t = map(torch.from_numpy, (X0, NOISE, OUTPUT, t))
    xt = loss.noised(x0, t, noise)
    seen, time = loss.network_inputs(xt, t)
    assert xt.dtype == seen.dtype == torch.float32
    return [each.numpy().astype(np.float64) for each in (xt, seen, time, loss.terms(output, x0, t, noise).mse)]


def wide(values):
    return values.astype(np.float64)[:, None, None, None]


def mean_square(error):
    return (error**2).mean(axis=(1, 2, 3))


def test_sit():
    """SiT, eq. 1-4 with alpha = 1 - t: x_t = (1 - t) x + t eps, and the velocity is eps - x; uniform t, no weight."""
    t = wide(TIMES)
    xt, seen, time, found = terms(loss(objective="sit"), TIMES)
    np.testing.assert_allclose(xt, (1 - t) * X0 + t * NOISE, atol=1e-6)
    np.testing.assert_array_equal(seen, xt)
    np.testing.assert_allclose(time, 1000 * TIMES, rtol=1e-6)
    np.testing.assert_allclose(found, mean_square(OUTPUT - (NOISE - X0)), rtol=1e-5)


def test_sit_as_released():
    """SiT's own time is tau = 1 - t, its velocity dx / d tau, and its network is given tau itself."""
    t = wide(TIMES)
    xt, _, time, found = terms(loss(objective="velocity-sit", schedule="flow"), TIMES)
    np.testing.assert_allclose(xt, (1 - t) * X0 + t * NOISE, atol=1e-6)
    np.testing.assert_allclose(time, 1 - TIMES.astype(np.float64), rtol=1e-4)
    np.testing.assert_allclose(found, mean_square(OUTPUT - (X0 - NOISE)), rtol=1e-5)


def test_edm():
    """EDM: lambda(sigma) |D - y|^2, D = c_skip (y + n) + c_out F(c_in (y + n); c_noise), table 1 with sigma_data 0.5."""
    sigma, data = wide(SIGMAS), 0.5
    xt, seen, time, found = terms(loss(objective="edm"), SIGMAS)
    noised = X0 + sigma * NOISE
    np.testing.assert_allclose(xt, noised, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(seen, noised / np.sqrt(sigma**2 + data**2), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(time, np.log(SIGMAS.astype(np.float64)) / 4, rtol=1e-5, atol=1e-7)
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / np.sqrt(sigma**2 + data**2)
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    expected = (weight * (c_skip * noised + c_out * OUTPUT - X0) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=2e-3)  # float32 of x_t at sigma 80
    np.testing.assert_allclose(found[:4], expected[:4], rtol=1e-4)


def test_v_cosine():
    """Salimans & Ho 2022, sec. 4: v = alpha eps - sigma x; Nichol & Dhariwal's cosine schedule over 1000 timesteps."""
    schedule = Schedule.named("cosine")
    a, s = (wide(values[STEPS]) for values in (np.sqrt(schedule.abar), np.sqrt(1 - schedule.abar)))
    xt, _, time, found = terms(loss(objective="v-cosine"), STEPS)
    np.testing.assert_allclose(xt, a * X0 + s * NOISE, atol=1e-6)
    np.testing.assert_array_equal(time, STEPS)
    np.testing.assert_allclose(found, mean_square(OUTPUT - (a * NOISE - s * X0)), rtol=1e-5)


def test_jit():
    """JiT (arXiv:2511.13720, sec. 4), in our time: v of the network's image against v of the image, t not below 0.05."""
    t, scale = wide(TIMES), 2.0
    xt, _, _, found = terms(loss(objective="jit", noise_scale=scale), TIMES)
    noised = (1 - t) * X0 + t * scale * NOISE
    np.testing.assert_allclose(xt, noised, atol=1e-6)
    velocity_of = lambda image: (noised - image) / np.maximum(t, 0.05)  # noqa: E731
    np.testing.assert_allclose(found, mean_square(velocity_of(OUTPUT) - velocity_of(X0)), rtol=1e-4)


@pytest.mark.parametrize("objective", ["epsilon-fixed", "v", "x0"])
def test_min_snr(objective):
    """Hang et al. 2023, sec. 3.4: weights of the losses of eps, v and x0 with gamma = 5."""
    schedule = Schedule.named("linear")
    snr = schedule.abar[STEPS] / (1 - schedule.abar[STEPS])
    clamped = np.minimum(snr, 5)
    weight = {"epsilon-fixed": clamped / snr, "v": clamped / (snr + 1), "x0": clamped}[objective]
    plain = terms(loss(objective=objective), STEPS)[-1]
    for name in ("min-snr", "min-snr:5"):
        np.testing.assert_allclose(
            terms(loss(objective=objective, loss_weight=name), STEPS)[-1] / plain, weight, rtol=2e-4
        )
    halved = terms(loss(objective=objective, loss_weight="min-snr:0.5"), STEPS)[-1] / plain
    np.testing.assert_allclose(halved, weight * np.minimum(snr, 0.5) / clamped, rtol=2e-4)


def test_edm_weight_on_the_image():
    """The weight edm of an x0-prediction on ve is EDM's lambda."""
    sigma = wide(SIGMAS)
    found = terms(
        loss(objective="x0", schedule="ve", time_distribution="log-normal:-1.2:1.2", loss_weight="edm"), SIGMAS
    )[-1]
    expected = ((sigma**2 + 0.25) / (sigma * 0.5) ** 2 * (OUTPUT - X0) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


ITEMS = {  # a case: recipe items
    **{name: {"objective": name} for name in PRESETS if name != "dit"},
    "eps on flow": {"objective": "epsilon-fixed", "schedule": "flow"},
    "velocity of SiT": {"objective": "velocity-sit", "schedule": "gvp"},
    "velocity on gvp": {"objective": "velocity", "schedule": "gvp"},
    "velocity on vp-continuous": {"objective": "velocity", "schedule": "vp-continuous"},
    "v on gvp": {"objective": "v", "schedule": "gvp", "loss_weight": "min-snr"},
    "logit-normal timesteps": {"objective": "epsilon-fixed", "time_distribution": "logit-normal:0:1"},
    "jit at 512": {"objective": "jit", "noise_scale": 2.0},
}


@pytest.mark.parametrize("case", ITEMS)
def test_jax_is_torch(case):
    """Times to the float, losses within 1e-5, gradients within 1e-4 of the largest."""
    training = TrainingObjective.from_recipe(recipe(**ITEMS[case]))
    ours, theirs = JaxDenoisingLoss(training), DenoisingLoss(training)
    positions = np.arange(200)
    t = np.asarray(ours.times(7, words(positions)))
    expected = theirs.times(7, torch.from_numpy(positions)).numpy()
    np.testing.assert_allclose(t, expected, rtol=2e-6)
    if not isinstance(training.process, Schedule):
        assert t.dtype == np.float32 and (t > 0).all()
    t = expected[:6]
    output = torch.from_numpy(OUTPUT).requires_grad_()
    x0, noise, times = map(torch.from_numpy, (X0, NOISE, t))
    wanted = theirs.terms(output, x0, times, noise).mse
    wanted.sum().backward()

    def total(output):
        terms = ours.terms(output, X0, t, NOISE)
        return terms.mse.sum(), terms.mse

    gradient, found = jax.jit(jax.grad(total, has_aux=True))(OUTPUT)
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-5)
    scale = output.grad.abs().max().item()
    np.testing.assert_allclose(gradient, output.grad.numpy(), rtol=1e-4, atol=1e-6 * scale)
    for mine, other in zip(ours.network_inputs(X0, t), theirs.network_inputs(x0, times), strict=True):
        np.testing.assert_allclose(mine, other.numpy(), rtol=1e-5, atol=1e-7)


def test_distributions_of_t():
    positions = torch.arange(20_000)
    logit = loss(objective="jit").times(3, positions).numpy().astype(np.float64)
    z = np.log(logit / (1 - logit))
    assert abs(z.mean() - 0.8) < 0.03 and abs(z.std() - 0.8) < 0.02
    sigma = np.log(loss(objective="edm").times(3, positions).numpy().astype(np.float64))
    assert abs(sigma.mean() + 1.2) < 0.04 and abs(sigma.std() - 1.2) < 0.03
    uniform = loss(objective="sit").times(3, positions).numpy()
    assert abs(uniform.mean() - 0.5) < 0.01 and uniform.min() < 0.001 and uniform.max() > 0.999
    kept = loss(objective="epsilon-fixed", schedule="flow").times(3, positions).numpy()
    assert kept.min() >= 0.001 and kept.max() <= 0.999  # SiT: its eps is not trained at the ends


def test_presets_are_items():
    """A preset stands for items, which others beside it override; what is given by the preset has the same identity."""
    assert recipe(objective="dit") == Recipe()
    assert recipe(objective="sit") == recipe(objective="velocity", schedule="flow")
    assert recipe(objective="sit", schedule="gvp") == recipe(schedule="gvp", objective="velocity")
    for name in PRESETS:
        TrainingObjective.from_recipe(recipe(objective=name))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"objective": "epsilon-learned-range", "schedule": "flow"}, "learns the variance"),
        ({"objective": "velocity"}, "continuous time"),
        ({"objective": "edm", "schedule": "linear", "time_distribution": "uniform"}, "defined on the schedule ve"),
        ({"objective": "edm", "time_distribution": "uniform"}, "take log-normal"),
        ({"objective": "sit", "time_distribution": "log-normal:0:1"}, "take logit-normal or uniform"),
        ({"objective": "sit", "time_distribution": "logit-normal:1"}, "give logit-normal:NUMBER:NUMBER"),
        ({"objective": "sit", "time_distribution": "logit-normal:0:inf"}, "give logit-normal:NUMBER:NUMBER"),
        ({"objective": "sit", "time_distribution": "normal"}, "time_distribution"),
        ({"objective": "sit", "loss_weight": "snr"}, "loss_weight"),
        ({"loss_weight": "min-snr"}, "learned variance"),
        ({"objective": "v-cosine", "loss_weight": "velocity-of-x0"}, "needs the schedule flow"),
        ({"objective": "v-cosine", "noise_scale": 2.0}, "noise_scale"),
        ({"objective": "edm", "noise_scale": 2.0}, "noise_scale 2 means nothing on ve"),
        ({"schedule": "flows"}, "flow"),
    ],
)
def test_what_cannot_be_combined(items, message):
    with pytest.raises(UserError, match=message):
        TrainingObjective.from_recipe(recipe(**items))


def test_what_cannot_be_sampled():
    options = {"diffusion_steps": 1000, "clip_denoised": False}
    flow = PROCESSES["flow"]
    table = euler(continuous_grid(flow, 10, "uniform", first=0.0, last=1.0))
    with pytest.raises(UserError, match="cannot be sampled on flow at t = 1: its output does not tell the image there"):
        make_plan("euler", table, Objective(name="eps"), flow, steps=10, eta=None, clip_denoised=False, time="timestep")
    with pytest.raises(UserError, match="needs a schedule of timesteps"):
        sampler_plan("ddpm", 10, schedule="flow", objective="velocity", **options)
    with pytest.raises(UserError, match="continuous time"):
        sampler_plan("euler", 10, schedule="linear", objective="velocity", **options)


def test_every_process_and_objective_has_a_plan_of_finite_numbers():
    count = 0
    for schedule in ["linear", "cosine", *PROCESSES]:
        for objective in OBJECTIVES:
            for sampler in ("euler", "heun", "dpm++-2m", "unipc-3"):
                try:
                    plan = sampler_plan(sampler, 9, schedule=schedule, objective=objective, diffusion_steps=1000)
                except UserError:
                    continue
                count += 1
                assert np.isfinite(plan.x0_from_x).all() and np.isfinite(plan.x0_from_output).all()
    assert count == 4 * (2 * 4 + 3 * 5 + 6), count


def test_weights_are_finite_at_the_ends():
    """Uniform draws of exactly 0, and logits so large that t is 1 in float32."""
    for items in ({"objective": "sit"}, {"objective": "v", "schedule": "gvp"}, {"objective": "x0", "schedule": "flow"}):
        training = TrainingObjective.from_recipe(recipe(**items, loss_weight="edm"))
        draws = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24, 1.0, 0.3])
        t = training.continuous_times(draws, torch)
        assert t.min() > 0 and t.max() <= 1
        found = DenoisingLoss(training).terms(*map(torch.from_numpy, (OUTPUT, X0)), t, torch.from_numpy(NOISE)).mse
        assert found.isfinite().all()


def test_samplers_at_their_edges():
    plan = functools.partial(sampler_plan, diffusion_steps=1000)
    # one step of a solver begins at the noise
    assert plan("euler", 1, schedule="linear", objective="epsilon-fixed").table.times.tolist() == [999]
    assert plan("ddim", 1, schedule="linear", objective="epsilon-fixed").table.times.tolist() == [0]
    for c in np.linspace(0.05, 20, 100):
        times = plan("euler", 10, schedule="flow", objective="velocity", spacing=f"shift:{c}").table.times
        assert times[0] == 1 and (np.diff(times) < 0).all()
    assert plan("euler", 4, schedule="flow", objective="epsilon-fixed", spacing="shift:3").table.times[0] == 0.999
    with pytest.raises(UserError, match="spacing shift needs"):
        plan("euler", 4, schedule="ve", objective="edm", spacing="shift:3")
    with pytest.raises(UserError, match="same time twice"):
        plan("euler", 100, schedule="flow", objective="epsilon-fixed", spacing="shift:10000")
    with pytest.raises(UserError, match="at least 3"):
        plan("euler-maruyama", 2, schedule="flow", objective="velocity")
    for schedule in ("flow", "gvp"):
        assert plan("euler", 10, schedule=schedule, objective="velocity").x0_from_gradient[0] == 0


def test_continuous_time_has_no_largest_number_of_steps():
    """A table of 1,000 timesteps has: see `harness.planning.request`."""
    sampling = {"sampler": "euler", "steps": (1500,)}
    found = make_request(backbone="dit-xs-4", protocol="digits", settings={"objective": "sit"}, sampling=sampling)
    assert found.evaluations(1500) == 1500
    with pytest.raises(UserError, match="1500 sampling steps are more than the 1000 steps of the diffusion"):
        make_request(backbone="dit-xs-4", protocol="digits", settings={"objective": "v-cosine"}, sampling=sampling)


def test_continuous_time_has_a_sampler_where_none_is_named():
    from harness.planning.request import make_request

    options = {"backbone": "dit-xs-4", "protocol": "digits"}
    for objective in ("sit", "sd3", "jit", "edm"):
        request = make_request(settings={"objective": objective}, **options)
        assert request.sampling.sampler == "dpm++-2m"
    assert make_request(settings={"objective": "v-cosine"}, **options).sampling.sampler == "ddpm"
    named = make_request(settings={"objective": "sit"}, sampling={"sampler": "heun"}, **options)
    assert named.sampling.sampler == "heun"
    with pytest.raises(UserError, match="needs a schedule of timesteps"):
        make_request(settings={"objective": "sit"}, sampling={"sampler": "ddim"}, **options)
    with pytest.raises(UserError, match="unknown objective 'sitt'; did you mean sit"):
        make_request(settings={"objective": "sitt"}, **options)
