"""The adaptive sampler: closed-form end points, torchdiffeq and diffrax, counted evaluations, independence of the batch."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchdiffeq

from harness.diffusion.adaptive import (
    ATOL,
    ERROR_WEIGHTS,
    MAX_ATTEMPTS,
    RTOL,
    STAGE_TIMES,
    STAGE_WEIGHTS,
    is_stuck,
)
from harness.diffusion.guidance import Guidance
from harness.diffusion.sampler_plan import check_guided_rows, guided_evaluations, sampler_plan
from harness.engines.jax import ode as jax_ode
from harness.engines.torch.ode import solve
from harness.errors import RunError, UserError

MEAN, STD = 0.3, 0.5  # of the Gaussian data
IMAGES = np.random.default_rng(0).standard_normal((6, 3, 4, 4)).astype(np.float32)
CASES = [  # schedule, objective
    ("flow", "velocity"),
    ("flow", "velocity-sit"),
    ("flow", "x0"),
    ("flow", "v"),
    ("flow", "epsilon-fixed"),
    ("gvp", "velocity"),
    ("gvp", "x0"),
    ("gvp", "epsilon-fixed"),
    ("vp-continuous", "v"),
    ("vp-continuous", "velocity"),
    ("vp-continuous", "x0"),
    ("vp-continuous", "epsilon-fixed"),
    ("ve", "edm"),
    ("ve", "x0"),
    ("ve", "epsilon-fixed"),
]


def plan_of(schedule, objective, **options):
    return sampler_plan("dopri5", 1, schedule=schedule, objective=objective, diffusion_steps=1000, **options)


def time_from(plan, given, xp):
    """t (N, 1, 1, 1) of what the network is given as time."""
    if plan.objective.name == "velocity-sit":
        given = 1 - given
    else:
        given = xp.exp(4 * given) if plan.schedule == "ve" else given / 1000
    return given[:, None, None, None]


def exact_network(plan, xp, mean=MEAN):
    """The network for Gaussian data of this mean (a number, or (N, 1, 1, 1)): E[x0 | x] and E[eps | x] in closed form."""

    def net(x, given):
        at = plan.process.coefficients(time_from(plan, given, xp), xp)
        if plan.objective.input_scale is not None:
            x = x / plan.objective.input_scale(at, xp)
        residual = (x - at.a * mean) / (at.a**2 * STD**2 + at.s**2)
        target = plan.objective.target(at, xp)
        return target.from_x0 * (mean + at.a * STD**2 * residual) + target.from_noise * at.s * residual

    return net


def exact_end(plan, x, mean=MEAN):
    """Where the probability-flow ODE takes the standard normal x (SOLVERS: sec. 4)."""
    at = plan.process.coefficients(np.float64(plan.begin), np)
    return mean + STD * (at.s * x - at.a * mean) / np.sqrt(at.a**2 * STD**2 + at.s**2)


def torch_solve(plan, net, x=IMAGES):
    """(samples, evaluations of each image); net: (x, time) -> output."""
    predict = lambda x, t, which, is_guided: net(x, t)  # noqa: E731
    samples, counts = solve(predict, plan, plan.segments(Guidance(1.0)), torch.from_numpy(x))
    return samples.numpy(), counts


def jax_solve(plan, net, x=IMAGES):
    begin, end = np.float32(plan.begin), np.float32(plan.end)

    @jax.jit
    def run(x):
        zero = jnp.zeros(len(x))
        carry = jax_ode.Carry(plan.initial_noise * x, jnp.zeros_like(x), zero, zero, zero.astype(int))
        carry = jax_ode.begin_segment(net, plan, carry, begin, end, 1, True)
        carry = jax_ode.attempt_steps(net, plan, carry, end, 1000, 1)
        if plan.has_last_step:
            carry = carry._replace(x=jax_ode.last_image(net, plan, carry.x), evaluations=carry.evaluations + 1)
        return carry

    carry = run(x)
    assert (np.asarray(carry.t) == end).all()
    return np.asarray(carry.x), np.asarray(carry.evaluations)


def test_coefficients():
    """The conditions of order 1 to 5 (Hairer et al., table II.2.2) that a quadrature has, and consistency of the stages."""
    np.testing.assert_allclose(STAGE_WEIGHTS.sum(1), STAGE_TIMES, atol=1e-14)
    for order in range(5):
        assert STAGE_WEIGHTS[6] @ STAGE_TIMES**order == pytest.approx(1 / (order + 1))
    assert ERROR_WEIGHTS.sum() == pytest.approx(0, abs=1e-15)
    assert all(abs(ERROR_WEIGHTS @ STAGE_TIMES**order) < 1e-15 for order in range(4))  # the embedded one has order 4
    assert abs(ERROR_WEIGHTS @ STAGE_TIMES**4) > 1e-4


@pytest.mark.parametrize(("schedule", "objective"), CASES)
def test_end_point(schedule, objective, monkeypatch):
    """Seen: at most 0.011 from the exact end (3 steps on gvp), and 4e-4 with a hundredth of the tolerance."""
    plan = plan_of(schedule, objective)
    expected = exact_end(plan, IMAGES.astype(np.float64))
    found, counts = torch_solve(plan, exact_network(plan, torch))
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert found.dtype == np.float32 and counts.min() >= 20 and counts.max() <= 120
    assert (counts % 6 == (3 if plan.has_last_step else 2)).all()  # 6 a step, 2 at the beginning, 1 at the end
    monkeypatch.setattr("harness.diffusion.adaptive.RTOL", 1e-5)
    found, more = torch_solve(plan, exact_network(plan, torch))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert (more > counts).all()


def test_where_it_ends():
    for schedule, objective, end, last_step in (
        ("flow", "velocity", 0.0, False),
        ("gvp", "velocity-sit", 0.0, False),
        ("gvp", "v", 0.0, False),
        ("flow", "x0", 0.001, True),
        ("flow", "epsilon-fixed", 0.001, True),
        ("vp-continuous", "v", 1e-5, True),
        ("ve", "edm", 0.002, True),
    ):
        plan = plan_of(schedule, objective)
        assert (plan.end, plan.has_last_step) == (end, last_step)
        assert plan.begin == (80.0 if schedule == "ve" else 0.999 if objective == "epsilon-fixed" else 1.0)
    assert plan_of("flow", "velocity", clip_denoised=True).end == 0.001  # its slope has x - D over s
    assert plan_of("flow", "x0", noise_scale=2.0).initial_noise == 2.0


@pytest.mark.parametrize(("schedule", "objective"), [("flow", "velocity"), ("gvp", "x0"), ("ve", "edm")])
def test_jax_solves_as_torch(schedule, objective):
    """Seen: 2e-5, and the same evaluations."""
    plan = plan_of(schedule, objective)
    found, counts = torch_solve(plan, exact_network(plan, torch))
    again, again_counts = jax_solve(plan, exact_network(plan, jnp))
    np.testing.assert_allclose(again, found, atol=2e-4)
    np.testing.assert_array_equal(again_counts, counts)


def last_image(plan, x):
    """The last Euler step from x, where there is one."""
    if not plan.has_last_step:
        return np.asarray(x)
    x, t = torch.tensor(np.asarray(x)), torch.full((len(x),), plan.end)
    return plan.image(x, exact_network(plan, torch)(*plan.network_inputs(x, t, torch)), t, torch).numpy()


@pytest.mark.parametrize(
    ("schedule", "objective", "rtol"),
    [("flow", "velocity", RTOL), ("flow", "velocity", 1e-5), ("gvp", "v", RTOL), ("ve", "edm", RTOL)],
)
def test_torchdiffeq_on_the_same_ode(schedule, objective, rtol, monkeypatch):
    """One image at a time, for its steps are those of a batch: the same steps, and the same image.

    It is told to step to the end exactly: by itself it steps over it, to negative t, and interpolates.
    """
    monkeypatch.setattr("harness.diffusion.adaptive.RTOL", rtol)
    plan = plan_of(schedule, objective)
    net, times = exact_network(plan, torch), []
    found, counts = torch_solve(plan, net)
    ends = torch.tensor([plan.begin, plan.end])

    def slope(t, x):
        times.append(t)
        return plan.slope(x, net(*plan.network_inputs(x, t.expand(1), torch)), t.expand(1), torch)

    for i in range(len(IMAGES)):
        times.clear()
        x = torch.from_numpy(np.float32(plan.initial_noise) * IMAGES[i : i + 1])
        other = torchdiffeq.odeint(slope, x, ends, method="dopri5", rtol=rtol, atol=ATOL, options={"step_t": ends[1:]})[
            -1
        ]
        np.testing.assert_allclose(found[i : i + 1], last_image(plan, other), atol=5e-5)
        assert counts[i] - plan.has_last_step == len(times)


def test_diffrax_on_the_same_ode(monkeypatch):
    """One image at a time. Its estimate of the error is 1.5 times ours, so it takes a few steps more."""
    monkeypatch.setattr("harness.diffusion.adaptive.RTOL", 1e-5)
    plan = plan_of("flow", "velocity")
    net = exact_network(plan, jnp)
    found, counts = torch_solve(plan, exact_network(plan, torch))

    @jax.jit
    def solved(x):
        def slope(t, x, _):
            return plan.slope(x, net(*plan.network_inputs(x, jnp.full(1, t), jnp)), jnp.full(1, t), jnp)

        controller = diffrax.PIDController(rtol=1e-5, atol=ATOL)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(slope), diffrax.Dopri5(), plan.begin, plan.end, None, x, stepsize_controller=controller
        )
        return solution.ys[-1], solution.stats["num_steps"]

    for i in range(len(IMAGES)):
        other, steps = solved(IMAGES[i : i + 1])
        np.testing.assert_allclose(found[i : i + 1], other, atol=5e-4)
        assert counts[i] <= 2 + 6 * int(steps) <= 1.5 * counts[i]


def test_an_image_does_not_know_its_batch():
    """Alone, in another order, and beside one that needs ten times the steps: the same image and evaluations."""
    plan = plan_of("flow", "velocity")
    means = torch.tensor([0.3, -0.2, 0.0, 0.1, 40.0, 0.2])[:, None, None, None]

    def solved(order):
        """Images of these positions; the network is told which image it has by the mean of its data."""

        def predict(x, t, which, is_guided):
            assert len(which) == len(x)
            return exact_network(plan, torch, means[order][which])(x, t)

        samples, counts = solve(predict, plan, plan.segments(Guidance(1.0)), torch.from_numpy(IMAGES[order]))
        return samples.numpy(), counts

    together, counts = solved([0, 1, 2, 3, 4, 5])
    for order in ([0], [4], [5, 4, 3, 2, 1, 0], [2, 4]):
        found, numbers = solved(order)
        np.testing.assert_allclose(found, together[order], atol=1e-5)  # last bits: sums of other sizes
        np.testing.assert_array_equal(numbers, counts[order])
    assert len(set(counts.tolist())) > 1


@pytest.mark.parametrize(("interval", "calls"), [("", 1), ("0.2-3", 3), ("0.2-", 2), ("-3", 2)])
def test_guidance_and_its_interval(interval, calls):
    """Every evaluation is counted for its image, twice with guidance; a step ends where the interval does."""
    plan, guidance = plan_of("flow", "velocity"), Guidance(2.0, interval)
    net, seen = exact_network(plan, torch), np.zeros(len(IMAGES), int)
    guided_sigmas, other_sigmas = [], []

    def predict(x, t, which, is_guided):
        seen[which.numpy()] += 2 if is_guided else 1
        t = t / 1000
        (guided_sigmas if is_guided else other_sigmas).extend((t / (1 - t)).tolist())
        conditional = net(x, 1000 * t)
        # guidance of a network without a label: twice the velocity beyond the mean's
        return 2 * conditional - exact_network(plan, torch, 0.1)(x, 1000 * t) if is_guided else conditional

    segments = plan.segments(guidance)
    assert len(segments) == calls
    samples, counts = solve(predict, plan, segments, torch.from_numpy(IMAGES))
    np.testing.assert_array_equal(counts, seen)
    low, high = (float(end or fill) for end, fill in zip((interval or "-").split("-"), (0, "inf"), strict=True))
    assert min(guided_sigmas) >= low * (1 - 1e-5) and max(guided_sigmas) <= high * (1 + 1e-5)
    assert all(sigma <= low * (1 + 1e-5) or sigma >= high * (1 - 1e-5) for sigma in other_sigmas)
    assert bool(other_sigmas) == bool(interval)
    whole, _ = solve(predict, plan, plan.segments(Guidance(1.0)), torch.from_numpy(IMAGES))
    assert (samples - whole).abs().max() > 0.05


def test_an_interval_without_a_noise_level_is_refused():
    plan = plan_of("ve", "edm")
    check_guided_rows(plan, Guidance(1.5, "70-90"))
    with pytest.raises(UserError, match="guides nothing: the noise levels sigma of dopri5 go from 80 to 0.002"):
        check_guided_rows(plan, Guidance(1.5, "90-100"))


def test_refusals():
    with pytest.raises(UserError, match="asks the network at any t, and linear is a table of the timesteps"):
        plan_of("linear", "epsilon-fixed")
    with pytest.raises(UserError, match="dopri5 chooses its own times: leave out the spacing 'karras'"):
        plan_of("flow", "velocity", spacing="karras")
    plan = plan_of("flow", "velocity")
    assert guided_evaluations(plan, Guidance(1.5)) is None
    with pytest.raises(UserError, match="the network gives 2 channels for 3"):
        torch_solve(plan, lambda x, t: x[:, :2])


@pytest.mark.parametrize("solver", [torch_solve, jax_solve])
def test_a_network_that_is_not_finite(solver):
    """torch names it; jax's loop ends, and its stage names it."""
    plan = plan_of("flow", "velocity")
    if solver is torch_solve:
        with pytest.raises(RunError, match="sampling diverged: dopri5 makes no progress at t = 1"):
            torch_solve(plan, lambda x, t: x * float("nan"))
    else:
        with pytest.raises(AssertionError):  # of `jax_solve`: t never reaches the end
            jax_solve(plan, lambda x, t: x * float("nan"))


def test_a_network_of_zeros_ends_at_once():
    """As an untrained DiT: nothing to scale a first step by."""
    plan = plan_of("flow", "velocity")
    found, counts = torch_solve(plan, lambda x, t: torch.zeros_like(x))
    np.testing.assert_array_equal(found, IMAGES)
    assert counts.max() <= 2 + 6 * 8


@pytest.mark.parametrize(
    ("schedule", "objective", "interval"), [("flow", "velocity", "0.1-1e8"), ("ve", "edm", "0.1-79.9999999")]
)
def test_an_end_of_an_interval_beside_the_beginning_is_the_beginning(schedule, objective, interval):
    """Float32 times have no room for a step between the two: the solver would divide by a step of zero."""
    plan = plan_of(schedule, objective)
    assert plan.segments(Guidance(1.5, interval)) == plan.segments(Guidance(1.5, interval.partition("-")[0] + "-"))


def test_an_end_of_an_interval_beside_the_end_is_the_end():
    assert len(plan_of("flow", "velocity").segments(Guidance(1.5, "1e-50-2"))) == 2


def test_only_an_image_that_is_still_at_work_can_be_stuck():
    step = np.full(2, 0.1, np.float32)
    done, half_done = np.zeros(2, np.float32), np.array([0, 0.5], np.float32)
    assert not is_stuck(done, 0.0, step, MAX_ATTEMPTS + 1)
    assert is_stuck(half_done, 0.0, step, MAX_ATTEMPTS + 1) and not is_stuck(half_done, 0.0, step, MAX_ATTEMPTS)
    assert is_stuck(half_done, 0.0, np.array([0.1, np.nan], np.float32), 1)
