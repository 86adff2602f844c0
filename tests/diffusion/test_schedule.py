"""Schedules, respacing and objectives against figures of the public DiT and ADM code."""

import hashlib

import numpy as np
import pytest

from harness.diffusion.objectives import OBJECTIVES
from harness.diffusion.respacing import space_timesteps
from harness.diffusion.schedule import Schedule
from harness.errors import UserError
from harness.registry import objectives


def test_linear_1000():
    original = Schedule.named("linear")
    assert len(original) == 1000 and original.betas.dtype == np.float64
    assert original.betas[0] == 1e-4 and original.betas[-1] == 0.02
    full = original.respaced()
    assert full.betas[0] == 9.999999999998899e-05  # recomputed, though all steps are kept
    assert full.betas[-1] == 0.020000000000000018
    assert full.abar.sum() == pytest.approx(275.51323339680613, rel=1e-13)
    assert full.posterior_log_variance_clipped[0] == pytest.approx(-9.81672513529595, rel=1e-13)


def test_linear_250():
    spaced = Schedule.named("linear").respaced(space_timesteps(1000, "250"))
    assert len(spaced) == 250 and spaced.original_steps == 1000
    assert spaced.betas[-1] == pytest.approx(0.07751934499235003, rel=1e-13)
    assert spaced.posterior_variance[1] == pytest.approx(8.570253440564813e-05, rel=1e-13)
    assert spaced.posterior_log_variance_clipped[0] == pytest.approx(-9.364628159803084, rel=1e-13)
    np.testing.assert_array_equal(spaced.timesteps, space_timesteps(1000, 250))
    np.testing.assert_allclose(spaced.abar, Schedule.named("linear").abar[spaced.timesteps], rtol=1e-12)


@pytest.mark.parametrize("kept", [None, "250", "ddim50"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_tables_are_the_gaussian_posterior(name, kept):
    """Compared with Bayes' rule for q(x_{t-1} | x_t, x_0), not with the formulas of the code."""
    schedule = Schedule.named(name).respaced(None if kept is None else space_timesteps(1000, kept))
    for table in vars(schedule).values():
        if isinstance(table, np.ndarray):
            assert table.shape == (len(schedule),) and np.isfinite(table).all()
            assert table.dtype == (np.int64 if table is schedule.timesteps else np.float64)
            with pytest.raises(ValueError, match="read-only"):
                table[0] = 0
    np.testing.assert_allclose(schedule.sqrt_abar**2 + schedule.sqrt_one_minus_abar**2, 1, rtol=1e-14)
    x0, eps = 0.7, -1.3
    xt = schedule.sqrt_abar * x0 + schedule.sqrt_one_minus_abar * eps
    np.testing.assert_allclose(schedule.sqrt_recip_abar * xt - schedule.sqrt_recipm1_abar * eps, x0, rtol=1e-9)
    prior = 1 - schedule.abar_prev[1:]  # variance of x_{t-1} given x_0
    precision = 1 / prior + (1 - schedule.betas[1:]) / schedule.betas[1:]
    np.testing.assert_allclose(schedule.posterior_variance[1:], 1 / precision, rtol=1e-9)
    mean = np.sqrt(schedule.abar_prev[1:]) * x0 / prior + np.sqrt(1 - schedule.betas[1:]) * xt[1:] / schedule.betas[1:]
    ours = schedule.posterior_mean_from_x0[1:] * x0 + schedule.posterior_mean_from_xt[1:] * xt[1:]
    np.testing.assert_allclose(ours, mean / precision, rtol=1e-9)
    assert schedule.posterior_variance[0] == 0
    assert schedule.posterior_log_variance_clipped[0] == np.log(schedule.posterior_variance[1])
    assert schedule.posterior_mean_from_x0[0] == pytest.approx(1) and schedule.posterior_mean_from_xt[0] == 0


def test_cosine():
    schedule = Schedule.named("cosine")
    time = np.arange(1, 1000) / 1000  # the last beta is capped
    exact = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedule.abar[:-1], exact, rtol=1e-9)
    assert schedule.betas[-1] == 0.999


def test_one_step():
    schedule = Schedule.named("linear").respaced(space_timesteps(1000, 1))
    assert len(schedule) == 1 and np.isfinite(schedule.posterior_log_variance_clipped).all()


@pytest.mark.parametrize(
    ("spacing", "digest", "count", "last"),
    [
        ("250", "17ff773ce55c", 250, 999),
        ("1000", "4262534a94d6", 1000, 999),
        ("64", "3b4f77baccef", 64, 999),
        ("128", "8c83834f3575", 128, 999),
        ("32", "8f18c17e0083", 32, 999),
        ("16", "66108ddf0d3e", 16, 999),
        ("25", "98ed9e17e176", 25, 999),
        ("ddim250", "872a31b542db", 250, 996),
        ("ddim50", "5a81cfff42eb", 50, 980),
        ("ddim25", "349f654bb541", 25, 960),
    ],
)
def test_respacing(spacing, digest, count, last):
    kept = space_timesteps(1000, spacing)
    assert kept.dtype == np.int64 and kept.shape == (count,)
    assert kept[0] == 0 and kept[-1] == last and (np.diff(kept) > 0).all()
    assert hashlib.sha1(",".join(map(str, kept)).encode()).hexdigest()[:12] == digest
    if spacing.isdigit():
        np.testing.assert_array_equal(space_timesteps(1000, int(spacing)), kept)


def test_respacing_250_sum():
    assert space_timesteps(1000, "250").sum() == 124875


def test_respacing_sections():
    kept = space_timesteps(300, "10,15,20")  # the example of guided-diffusion's docstring
    assert [((kept >= low) & (kept < low + 100)).sum() for low in (0, 100, 200)] == [10, 15, 20]
    assert space_timesteps(10, "2,2,2").tolist() == [0, 3, 4, 6, 7, 9]  # the first section takes the rest
    assert space_timesteps(1000, 1).tolist() == [0]


@pytest.mark.parametrize("spacing", ["", "0", 0, -5, "fast", "10,", "1.5", "1001", 1001, "ddim", "ddim64", "ddim1001"])
def test_respacing_refused(spacing):
    with pytest.raises(UserError, match="sampling steps"):
        space_timesteps(1000, spacing)


def test_schedule_refused():
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        Schedule.named("cosin")
    for steps in (0, 1, 2, 20, 2**31, 10**30):
        with pytest.raises(UserError, match="timesteps"):
            Schedule.named("linear", steps)
    assert len(Schedule.named("linear", 21)) == 21


def test_objectives():
    learned, fixed = OBJECTIVES["epsilon-learned-range"], OBJECTIVES["epsilon-fixed"]
    assert (learned.out_channels(4), fixed.out_channels(4)) == (8, 4)
    assert all(objective.name == name for name, objective in OBJECTIVES.items())
    with pytest.raises(UserError, match="did you mean epsilon-fixed"):
        objectives.get("epsilon-fix")
