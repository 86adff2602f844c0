"""Objectives and samplers for networks of two times: the time of x_t, and the end of the step that is predicted."""

import dataclasses
import re

import numpy as np
import pytest

from harness import registry
from harness.diffusion.grids import continuous_grid
from harness.diffusion.objectives import Objective, Target, TwoTimes
from harness.diffusion.plans import make_plan
from harness.diffusion.processes import PROCESSES
from harness.diffusion.sampler_plan import sampler_plan
from harness.diffusion.solvers import euler, heun
from harness.diffusion.training import TrainingObjective, check_fit
from harness.errors import UserError
from harness.protocols import Recipe

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
jnp = jax.numpy

from harness.engines.jax.loss import DenoisingLoss as JaxDenoisingLoss  # noqa: E402
from harness.engines.jax.plan_arrays import split_plan  # noqa: E402
from harness.engines.jax.sampler import first_carry, sample_steps  # noqa: E402
from harness.engines.torch.loss import DenoisingLoss  # noqa: E402
from harness.engines.torch.sampler import sample_loop  # noqa: E402
from harness.randomness.threefry_jax import words  # noqa: E402

MEAN, SPREAD = 0.7, 0.4  # of the data


def end_time(t, draw, xp):
    return xp.where(draw < 0.5, t, t * (2 * draw - 1))


def two_halves(net, x, t, r, u, xp):
    middle = (t + r) / 2
    first = net(x, t, middle)
    return xp.where(r == t, u, (first + net(x - (t - middle) * first, middle, r)) / 2)


def mean_flow(net, x, t, r, u, xp):
    """Geng et al. 2025, arXiv:2505.13447, eq. 11: u - (t - r) du/dt along the path."""
    jvp = torch.func.jvp if xp is torch else jax.jvp
    _, slope = jvp(net, (x, t, r), (u, xp.ones_like(t), xp.zeros_like(r)))
    return u - (t - r) * slope


def objective(target, evaluations=2, name="of-steps"):
    two_times = TwoTimes(end_time=end_time, target=target, evaluations=evaluations)
    return Objective(name=name, target=lambda at, xp: Target(at.da, at.ds), two_times=two_times)


@pytest.fixture
def registered():
    """The objectives "halves" and "mean-flow"."""
    before = {**vars(registry.objectives)}
    for name in ("_items", "_owners"):
        setattr(registry.objectives, name, dict(getattr(registry.objectives, name)))
    registry.objectives.register((objective(two_halves, name="halves"), objective(mean_flow, name="mean-flow")))
    yield
    vars(registry.objectives).update(before)


def mean_velocity(x, t, r, xp):
    """The exact prediction for Gaussian data on flow: (x_t - x_r) / (t - r) on the path of the ODE."""

    def spread(t):
        return xp.sqrt(((1 - t) * SPREAD) ** 2 + t**2)

    x_r = MEAN * (1 - r) + (x - MEAN * (1 - t)) * spread(r) / spread(t)
    return (x - x_r) / (t - r)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("form", ["unit", "timestep"])
def test_euler_takes_whole_steps(steps, form):
    """With the exact mean velocity, any number of steps ends exactly where the ODE does, in both frameworks."""
    flow = PROCESSES["flow"]
    table = euler(continuous_grid(flow, steps, "uniform", first=0.0, last=1.0))
    plan = make_plan("euler", table, objective(two_halves), flow, steps=steps, eta=None, clip_denoised=False, time=form)
    assert plan.network_times.shape == (steps, 2) and plan.network_times[-1, 1] == 0
    np.testing.assert_array_equal(plan.network_times[1:, 0], plan.network_times[:-1, 1])
    scale = plan.network_times[0, 0]  # of the time that the network is given
    x = np.random.default_rng(0).standard_normal((3, 1, 4, 4), np.float32)
    expected = MEAN + SPREAD * x

    def call(xp):
        return lambda x, t, row: mean_velocity(x, *(c[:, None, None, None] / scale for c in (t[:, 0], t[:, 1])), xp)

    found = sample_loop(call(torch), plan, torch.from_numpy(x), noise=lambda k: None)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)
    form_of_plan, arrays = split_plan(plan)
    carry = sample_steps(call(jnp), form_of_plan, arrays, first_carry(form_of_plan, jnp.asarray(x)), 0, steps, None)
    np.testing.assert_allclose(np.asarray(carry.x), expected, atol=2e-6)


@pytest.mark.parametrize("form", ["timestep", "log-sigma"])
def test_the_last_step_ends_at_a_time_that_a_network_can_be_given(form, registered):
    """On ve, where t is sigma and the network is given its logarithm, the end of the last step is 0."""
    words = {"schedule": "ve", "diffusion_steps": 1000, "objective": "halves", "time": form}
    plan = sampler_plan("euler", 3, **words)
    assert np.isfinite(plan.network_times).all() and (np.diff(plan.network_times) < 0).all()
    training = TrainingObjective.from_recipe(
        Recipe(objective="halves", schedule="ve", time_distribution="log-normal"), form
    )
    t = np.array([[0.5, 0.0], [0.002, 0.0]], np.float32)
    _, given = DenoisingLoss(training).network_inputs(torch.zeros(2, 1, 2, 2), torch.from_numpy(t))
    _, theirs = JaxDenoisingLoss(training).network_inputs(jnp.zeros((2, 1, 2, 2)), jnp.asarray(t))
    np.testing.assert_allclose(given[:, 1].numpy(), plan.network_times[-1, 1], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(theirs), given.numpy(), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, at the first jvp
@pytest.mark.parametrize("name", ["halves", "mean-flow"])
@pytest.mark.parametrize("form", ["unit", "timestep", "log-sigma"])
def test_what_is_learned_is_the_same_in_both_frameworks(name, form, registered):
    training = TrainingObjective.from_recipe(Recipe(objective=name, schedule="flow"), form)
    ours, theirs = DenoisingLoss(training), JaxDenoisingLoss(training)
    positions = np.arange(64)
    t = ours.times(3, torch.from_numpy(positions))
    np.testing.assert_allclose(np.asarray(theirs.times(3, words(positions))), t.numpy(), rtol=1e-5)
    assert t.shape == (64, 2) and (t[:, 1] <= t[:, 0]).all() and 10 < int((t[:, 1] == t[:, 0]).sum()) < 54
    rng = np.random.default_rng(1)
    x0, noise, output = (rng.standard_normal((64, 1, 2, 2)).astype(np.float32) for _ in range(3))

    def net(xp):
        return lambda x, t: x * xp.cos(t[:, 0] / 9)[:, None, None, None] + xp.sin(t[:, 1] / 9)[:, None, None, None]

    given = [torch.from_numpy(each) for each in (x0, noise, output)]
    target = ours.step_target(net(torch), given[0], t, given[1])
    mine = theirs.step_target(net(jnp), x0, jnp.asarray(t.numpy()), noise)
    np.testing.assert_allclose(np.asarray(mine), target.numpy(), atol=5e-5)
    is_plain = (t[:, 1] == t[:, 0]).numpy()
    np.testing.assert_allclose(target.numpy()[is_plain], (noise - x0)[is_plain], atol=1e-6)
    assert np.abs(target.numpy() - (noise - x0))[~is_plain].min(axis=(1, 2, 3)).max() > 0.1
    mse = ours.terms(given[2], given[0], t, given[1], target).mse
    np.testing.assert_allclose(mse.numpy(), ((output - target.numpy()) ** 2).mean(axis=(1, 2, 3)), rtol=1e-5)
    other = theirs.terms(output, x0, jnp.asarray(t.numpy()), noise, mine).mse
    np.testing.assert_allclose(np.asarray(other), mse.numpy(), rtol=1e-3)


def test_the_target_has_no_gradient(registered):
    training = TrainingObjective.from_recipe(Recipe(objective="halves", schedule="flow"))
    x0 = torch.ones(4, 1, 2, 2)
    t = torch.tensor([[0.9, 0.1]] * 4)
    weight = torch.ones((), requires_grad=True)
    assert not DenoisingLoss(training).step_target(lambda x, t: weight * x, x0, t, x0).requires_grad

    def loss(weight):
        return JaxDenoisingLoss(training).step_target(lambda x, t: weight * x, jnp.ones((4, 1, 2, 2)), jnp.asarray(t.numpy()), 2.0 * jnp.ones((4, 1, 2, 2))).sum()  # fmt: skip

    assert jax.grad(loss)(1.0) == 0


def test_more_evaluations_than_stated_and_targets_of_another_shape_are_refused(registered):
    registry.objectives.register(objective(two_halves, evaluations=1, name="understated"))
    registry.objectives.register(objective(lambda net, x, t, r, u, xp: u.mean(), evaluations=0, name="scalar"))
    x0, t = torch.ones(4, 1, 2, 2), torch.tensor([[0.9, 0.1]] * 4)
    for name, message in (
        ("understated", r"'understated': its target evaluates the network 2 times, .* are 1"),
        ("scalar", r"expected a target of shape \(4, 1, 2, 2\), came \(\)"),
    ):
        training = TrainingObjective.from_recipe(Recipe(objective=name, schedule="flow"))
        with pytest.raises(UserError, match=message):
            DenoisingLoss(training).step_target(lambda x, t: x, x0, t, x0)


def test_what_cannot_be_sampled_or_trained(registered):
    def plan(sampler, schedule="flow", **options):
        return sampler_plan(sampler, 4, schedule=schedule, diffusion_steps=1000, objective="halves", **options)

    assert plan("euler").evaluations == 4
    for sampler in ("heun", "dpm++-2m", "unipc-2", "euler-maruyama"):
        with pytest.raises(
            UserError, match=f"the sampler {re.escape(sampler)} does not state where its steps end, .*: take euler"
        ):
            plan(sampler)
    with pytest.raises(UserError, match="the sampler dopri5 follows the direction at one time"):
        plan("dopri5")
    with pytest.raises(UserError, match="clip_denoised would clamp where a long one leads"):
        plan("euler", clip_denoised=True)
    with pytest.raises(UserError, match="predicts steps between any two times, and linear is a table of timesteps"):
        plan("euler", schedule="linear")
    for schedule in ("gvp", "vp-continuous"):
        message = f"a step of euler on {schedule} is not t - r times their mean direction: give the schedule flow or ve"
        with pytest.raises(UserError, match=message):
            plan("euler", schedule)
        with pytest.raises(UserError, match=message):
            TrainingObjective.from_recipe(Recipe(objective="halves", schedule=schedule))
        made_for_it = dataclasses.replace(objective(two_halves, name=f"of-{schedule}"), schedules=(schedule,))
        check_fit(made_for_it, PROCESSES[schedule], "unit")
    with pytest.raises(UserError, match="has no variance"):
        Objective(name="both", learned_variance=True, two_times=objective(two_halves).two_times)
    flow = PROCESSES["flow"]
    grid = continuous_grid(flow, 4, "uniform", first=0.0, last=1.0)
    assert heun(grid).end_times is None
