"""Samplers as tables: answers known in closed form, and diffusers' schedulers on the same grid."""

import functools
import inspect

import numpy as np
import pytest

from harness.diffusion import solvers
from harness.diffusion.grids import at_times, continuous_grid, discrete_grid
from harness.diffusion.objectives import OBJECTIVES, image_from
from harness.diffusion.processes import PROCESSES
from harness.diffusion.schedule import Schedule
from harness.errors import UserError

LINEAR = Schedule.named("linear")
# diffusers 0.42 with numpy 2: "__array__ implementation doesn't accept a copy keyword"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
MEAN, STD = 0.3, 0.5  # of the Gaussian data
SAMPLERS = {
    "euler": solvers.euler,
    "heun": solvers.heun,
    "dpm++-2m": solvers.dpm_solver_2m,
    "dpm++-2s": solvers.dpm_solver_2s,
    "dpm++-3m": solvers.dpm_solver_3m,
    "unipc-2": functools.partial(solvers.unipc, order=2),
    "unipc-3": functools.partial(solvers.unipc, order=3),
}


def run(table, x, predict, noise=lambda k: 0.0, rows=None):
    """x after the first `rows` rows of `table` (None: all), in float64. predict: (x, row) -> predicted image."""
    base, images = np.zeros_like(x), []
    for k in range(len(table.times) if rows is None else rows):
        images = [predict(x, k), *images][: table.x_from.shape[1] - 2]
        columns = [x, base, *images]
        n = noise(k)
        x, base = (
            sum(c * value for c, value in zip(coefficients[k], columns, strict=False)) + scale[k] * n
            for coefficients, scale in ((table.x_from, table.noise_to_x), (table.base_from, table.noise_to_base))
        )
    return x


def gaussian(table):
    """E[x0 | x] for data N(MEAN, STD^2), at the rows of `table` (SOLVERS: a c^2 / (a^2 c^2 + s^2))."""

    def predict(x, k):
        a, s = table.a[k], table.s[k]
        return MEAN + a * STD**2 * (x - a * MEAN) / (a**2 * STD**2 + s**2)

    return predict


def exact(x, begin, end):
    """Where the probability-flow ODE takes x from (a, s) = begin to end, for that data."""
    (a1, s1), (a, s) = begin, end
    return a * MEAN + np.sqrt(a**2 * STD**2 + s**2) * (x - a1 * MEAN) / np.sqrt(a1**2 * STD**2 + s1**2)


# (process, grid): the range of measured orders from 32 to 512 steps, up to the last node before s = 0, whose step is of
# first order for every sampler. On grids with a = 0 at the first node the multistep samplers begin with first order.
ORDERS = {
    "euler": (0.9, 1.1),
    "heun": (1.9, 2.3),
    "dpm++-2m": (1.5, 2.6),
    "dpm++-2s": (1.7, 2.2),
    "dpm++-3m": (1.7, 3.3),
    "unipc-2": (1.7, 3.3),
    "unipc-3": (1.7, 4.3),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [("vp-continuous", "log-snr"), ("flow", "uniform"), ("flow", "log-snr"), ("gvp", "log-snr"), ("ve", "karras")],
)
def test_order(sampler, name, kind):
    process = PROCESSES[name]
    x, errors = np.linspace(-2, 2, 101), []
    for steps in (64, 512):
        grid = continuous_grid(process, steps, kind, first=process.first, last=process.last)
        table = SAMPLERS[sampler](grid)
        start = table.initial_noise * x
        found = run(table, start, gaussian(table), rows=len(table.times) - 1)
        errors.append(np.abs(found - exact(start, (grid.a[0], grid.s[0]), (grid.a[-2], grid.s[-2]))).max())
    order = np.log2(errors[0] / errors[1]) / 3
    low, high = ORDERS[sampler]
    assert low < order < high, (order, errors)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", PROCESSES)
def test_end_point(sampler, name):
    process = PROCESSES[name]
    grid = continuous_grid(process, 500, "log-snr", first=process.first, last=process.last)
    table = SAMPLERS[sampler](grid)
    x = table.initial_noise * np.linspace(-2, 2, 101)
    found = run(table, x, gaussian(table))
    np.testing.assert_allclose(
        found, exact(x, (grid.a[0], grid.s[0]), (1, 0)), atol=2e-2 if sampler == "euler" else 1e-3
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_constant_image_is_reached_exactly(sampler):
    """D that does not depend on x: every sampler is exact in one step."""
    for grid in (discrete_grid(LINEAR, 10), continuous_grid(PROCESSES["flow"], 10, "uniform", first=0, last=1)):
        table = SAMPLERS[sampler](grid)
        x = np.array([-1.3, 0.2, 1.7])
        found = run(table, x, lambda x, k: np.full(3, 0.7))
        np.testing.assert_allclose(found, 0.7, rtol=1e-9)


def mixture(table):
    """E[x0 | x] of 0.3 N(-1, 0.2^2) + 0.7 N(1, 0.1^2)."""

    def predict(x, k):
        a, s = table.a[k], table.s[k]
        weights, images = [], []
        for share, mean, std in ((0.3, -1.0, 0.2), (0.7, 1.0, 0.1)):
            variance = a**2 * std**2 + s**2
            weights.append(np.log(share) - 0.5 * np.log(variance) - (x - a * mean) ** 2 / (2 * variance))
            images.append(mean + a * std**2 * (x - a * mean) / variance)
        share = 1 / (1 + np.exp(np.clip(weights[0] - weights[1], -700, 700)))
        return images[0] * (1 - share) + images[1] * share

    return predict


MIXTURE_MEAN = 0.3 * -1 + 0.7 * 1
MIXTURE_VARIANCE = 0.3 * (1 + 0.04) + 0.7 * (1 + 0.01) - MIXTURE_MEAN**2


@pytest.mark.parametrize(
    ("name", "kind", "sampler"),
    [
        ("flow", "uniform", solvers.heun),
        ("flow", "uniform", solvers.euler_maruyama),
        ("gvp", "uniform", solvers.euler_maruyama),
        ("vp-continuous", "uniform", solvers.sde_dpm_solver_2m),
        ("ve", "karras", functools.partial(solvers.edm_stochastic, s_noise=1.0)),
        ("ve", "karras", solvers.sde_dpm_solver_2m),
        ("ve", "karras", solvers.dpm_solver_3m),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_mixture(name, kind, sampler):
    process, n = PROCESSES[name], 40_000
    rng = np.random.default_rng(5)
    grid = continuous_grid(process, 400, kind, first=process.first, last=process.last)
    table = sampler(grid)
    found = run(table, table.initial_noise * rng.standard_normal(n), mixture(table), lambda k: rng.standard_normal(n))
    # standard errors at 40,000: mean 0.0047, variance 0.006, share 0.0023; and the bias of 400 steps
    assert abs(found.mean() - MIXTURE_MEAN) < 0.02
    assert abs(found.var() - MIXTURE_VARIANCE) < 0.02
    assert abs((found < 0).mean() - 0.3) < 0.01
    for low, mean, std in ((True, -1.0, 0.2), (False, 1.0, 0.1)):
        mode = found[(found < 0) == low]
        assert abs(mode.mean() - mean) < 0.01 and abs(mode.std() / std - 1) < 0.05


def stand_in(x, t):
    """A smooth function of a state and a time, as a network's output."""
    return 0.9 * x + 0.2 * np.sin(2 * x + 0.003 * t)


def diffusers_samples(scheduler, x, noise=None, scaled=False, **kwargs):
    """x after all steps of a scheduler of diffusers, float64, and its timesteps. noise: (n, ...) or None."""
    torch = pytest.importorskip("torch")
    scheduler.set_timesteps(**kwargs)
    sample = torch.from_numpy(x).double()
    timesteps = scheduler.timesteps.numpy()
    takes_noise = "variance_noise" in inspect.signature(scheduler.step).parameters
    for k, t in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(sample, t) if scaled else sample
        output = torch.from_numpy(stand_in(given.numpy(), float(t)))
        extra = {"variance_noise": torch.from_numpy(noise[k])} if noise is not None and takes_noise else {}
        sample = scheduler.step(output, t, sample, **extra).prev_sample
    return sample.numpy(), timesteps


def from_stand_in(table, prediction):
    """The predicted image of `stand_in` as a network of `prediction` at the timesteps of `table`."""

    def predict(x, k):
        at = (table.a[k], table.s[k], 0.0, 0.0)
        from_x, from_u = image_from(
            _coefficients(*at),
            OBJECTIVES[{"eps": "epsilon-fixed"}.get(prediction, prediction)].target(_coefficients(*at), np),
        )
        return from_x * x + from_u * stand_in(x, table.times[k])

    return predict


def _coefficients(a, s, da, ds):
    from harness.diffusion.processes import Coefficients

    return Coefficients(np.float64(a), np.float64(s), np.float64(da), np.float64(ds))


X = np.random.default_rng(3).standard_normal((2, 3, 4, 4))
TABLE_KWARGS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(
    ("sampler", "scheduler", "options"),
    [
        ("euler", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
        ("dpm++-2m", "DPMSolverMultistepScheduler", {"solver_order": 2}),
        ("dpm++-3m", "DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("dpm++-2s", "DPMSolverSinglestepScheduler", {"solver_order": 2}),
        ("unipc-2", "UniPCMultistepScheduler", {"solver_order": 2}),
        ("unipc-3", "UniPCMultistepScheduler", {"solver_order": 3}),
    ],
)
def test_diffusers(sampler, scheduler, options, prediction):
    diffusers = pytest.importorskip("diffusers")
    kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    if scheduler != "DDIMScheduler":
        options = {**options, "final_sigmas_type": "zero"}
    if "Multistep" in scheduler:  # the single-step one has no other spacing
        options = {**options, "timestep_spacing": "linspace"}
    theirs = getattr(diffusers, scheduler)(**TABLE_KWARGS, **options, prediction_type=kind)
    expected, timesteps = diffusers_samples(theirs, X, num_inference_steps=20)
    grid = discrete_grid(LINEAR, 20, "linspace")
    if scheduler == "DDIMScheduler":
        # DDIM's own strides; its previous timestep is t - 50, so the last step goes from 0 + offset to the image
        a = np.append(LINEAR.sqrt_abar[timesteps], 1.0)
        s = np.append(LINEAR.sqrt_one_minus_abar[timesteps], 0.0)
        grid = type(grid)(times=np.append(timesteps, -1), a=a, s=s, da=None, ds=None)
    np.testing.assert_array_equal(grid.times[:-1], timesteps)
    table = SAMPLERS[sampler](grid)
    np.testing.assert_allclose(run(table, X, from_stand_in(table, prediction)), expected, atol=2e-5, rtol=2e-5)


def test_diffusers_sde():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        **TABLE_KWARGS, algorithm_type="sde-dpmsolver++", final_sigmas_type="zero", solver_order=2
    )
    noise = np.random.default_rng(4).standard_normal((20, *X.shape))
    expected, _ = diffusers_samples(theirs, X, noise, num_inference_steps=20)
    table = solvers.sde_dpm_solver_2m(discrete_grid(LINEAR, 20, "linspace"))
    found = run(table, X, from_stand_in(table, "eps"), lambda k: noise[k])
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)
    assert np.abs(found - run(table, X, from_stand_in(table, "eps"))).max() > 0.1  # the noise matters


def test_diffusers_heun():
    """HeunDiscreteScheduler holds x / a, and asks at float timesteps: with 28 steps of 1000 they are whole."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.HeunDiscreteScheduler(**TABLE_KWARGS, timestep_spacing="linspace")
    grid = discrete_grid(LINEAR, 28)
    table = solvers.heun(grid)
    expected, timesteps = diffusers_samples(theirs, X / grid.a[0], scaled=True, num_inference_steps=28)
    np.testing.assert_allclose(table.times, timesteps)
    np.testing.assert_allclose(run(table, X, from_stand_in(table, "eps")), expected, atol=2e-4, rtol=2e-5)


def test_diffusers_flow():
    diffusers = pytest.importorskip("diffusers")
    for shift, kind in ((1.0, "uniform"), (3.0, "shift:3")):
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        grid = continuous_grid(PROCESSES["flow"], 20, kind, first=0.0, last=1.0)
        table = solvers.euler(grid)
        expected, timesteps = diffusers_samples(theirs, X, sigmas=np.linspace(1, 1 / 20, 20))
        np.testing.assert_allclose(1000 * table.times, timesteps, rtol=1e-5)

        def predict(x, k, table=table, timesteps=timesteps):
            return x - table.times[k] * stand_in(x, float(timesteps[k]))

        np.testing.assert_allclose(run(table, X, predict), expected, atol=2e-5, rtol=2e-5)


def test_diffusers_edm_euler():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.EDMEulerScheduler()
    process = PROCESSES["ve"]
    grid = continuous_grid(process, 18, "karras", first=process.first, last=process.last)
    table = solvers.euler(grid)
    expected, timesteps = diffusers_samples(theirs, 80 * X, scaled=True, num_inference_steps=18)
    np.testing.assert_allclose(np.log(table.times) / 4, timesteps, rtol=1e-5, atol=1e-6)

    def predict(x, k):
        at = process.coefficients(table.times[k], np)
        prediction = OBJECTIVES["edm"]
        from_x, from_u = image_from(at, prediction.target(at, np))
        return from_x * x + from_u * stand_in(prediction.input_scale(at, np) * x, float(timesteps[k]))

    np.testing.assert_allclose(run(table, 80 * X, predict), expected, atol=2e-5, rtol=2e-5)


def test_heun_on_a_steep_schedule():
    """On cosine, whose sigma begins at 20,000, it is better than euler from 5 steps on."""
    schedule = Schedule.named("cosine")
    for steps in (5, 10, 25, 50):
        grid = discrete_grid(schedule, steps)
        assert grid.s[0] / grid.a[0] == pytest.approx(20_000, rel=0.02)
        errors = {}
        for sampler in ("heun", "euler"):
            table = SAMPLERS[sampler](grid)
            x = table.initial_noise * np.linspace(-2, 2, 101)
            found = run(table, x, gaussian(table))
            errors[sampler] = np.abs(found - exact(x, (grid.a[0], grid.s[0]), (1, 0))).max()
        assert errors["heun"] < 0.3 * errors["euler"]


def test_evaluations_and_times():
    grid = continuous_grid(PROCESSES["ve"], 18, "karras", first=0.002, last=80.0)
    assert len(solvers.heun(grid).times) == 35  # EDM: 2 N - 1
    table = solvers.edm_stochastic(grid)
    assert len(table.times) == 35 and table.initial_noise == pytest.approx(80.0)  # above s_max nothing is added
    assert (table.times[2::2] >= table.times[1:-1:2]).all() and (table.times[2::2] > table.times[1:-1:2]).any()


def test_sit_sde_grid():
    """249 steps from t = 1 to 0.04 and one to the image: 250 evaluations, the last of which adds no noise."""
    times = np.append(np.linspace(1.0, 0.04, 250), 0.0)
    table = solvers.euler_maruyama(at_times(PROCESSES["flow"], times))
    assert len(table.times) == 250 and table.noise_to_x[-1] == 0 and (table.noise_to_x[:-1] > 0).all()


# x after the last step of willisma/SiT 947f95b, Sampler.sample_sde (Euler, diffusion form, Mean, 0.04, 250) in float64 with
# the velocity 0.7 x - sin(x + 2 tau), all 249 draws of noise 0.5 cos(k + (0, 1, 2)) and x_T = (-1, 0.2, 1.5)
SIT = {
    ("flow", "sigma"): [-1.319690369954, -0.9632661722403, -0.05580162292919],
    ("flow", "linear"): [-1.319690369954, -0.9632661722403, -0.05580162292919],
    ("flow", "decreasing"): [-1.351551917679, -0.7570163888139, 0.5517206363236],
    ("gvp", "sigma"): [-1.532380639777, -1.034556889398, 0.2738285518715],
    ("gvp", "linear"): [-1.505989032219, -0.9205644410363, 0.6056632859503],
    ("gvp", "decreasing"): [-1.419976119972, -0.7328585073962, 0.8530222327452],
}


@pytest.mark.parametrize(("path", "form"), SIT)
def test_sit_sde_is_sits(path, form):
    table = solvers.euler_maruyama(at_times(PROCESSES[path], np.append(np.linspace(1.0, 0.04, 250), 0.0)), form)

    def predict(x, k):
        t = table.times[k]
        at = PROCESSES[path].coefficients(np.float64(t), np)
        from_x, from_u = image_from(at, OBJECTIVES["velocity-sit"].target(at, np))
        return from_x * x + from_u * (0.7 * x - np.sin(x + 2 * (1 - t)))

    found = run(table, np.array([-1.0, 0.2, 1.5]), predict, lambda k: 0.5 * np.cos(k + np.arange(3)))
    np.testing.assert_allclose(found, SIT[path, form], rtol=1e-10)


def test_refusals():
    with pytest.raises(UserError, match="needs the schedule ve"):
        solvers.edm_stochastic(discrete_grid(LINEAR, 10))
    with pytest.raises(UserError, match="continuous time"):
        solvers.euler_maruyama(discrete_grid(LINEAR, 10))
    with pytest.raises(UserError, match="infinite at t = 1"):
        solvers.euler_maruyama(continuous_grid(PROCESSES["flow"], 10, "uniform", first=0, last=1), "sbdm")
    with pytest.raises(UserError, match="same timestep twice"):
        discrete_grid(LINEAR, 900, "karras")
    with pytest.raises(UserError, match="shift"):
        continuous_grid(PROCESSES["flow"], 10, "shift:-1", first=0, last=1)
