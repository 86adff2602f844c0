"""Guidance within an interval of noise levels: which rows are guided, and what both loops do at them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from harness import registry
from harness.diffusion.guidance import Guidance, read_guidance, read_interval
from harness.diffusion.sampler_plan import check_guided_rows, guided_evaluations, guided_rows, sampler_plan
from harness.engines.jax.plan_arrays import split_plan
from harness.engines.jax.sampler import first_carry, sample_steps
from harness.engines.jax.sampler import guided as jax_guided
from harness.engines.torch.sampler import guided, sample_loop
from harness.errors import UserError

NULL = 10
NOISE = np.random.default_rng(1).standard_normal((40, 3, 1, 4, 4)).astype(np.float32)  # of rows; the last is x_T
CASES = {  # sampler: (schedule, objective)
    "ddpm": ("linear", "epsilon-learned-range"),
    "ddim": ("cosine", "v"),
    "heun": ("flow", "velocity"),
    "dpm++-2m": ("linear", "epsilon-fixed"),
    "edm-stochastic": ("ve", "edm"),
}


def plan_of(sampler, steps=10, schedule=None, objective=None):
    schedule, objective = (schedule, objective) if schedule else CASES[sampler]
    return sampler_plan(sampler, steps, schedule=schedule, objective=objective, diffusion_steps=1000)


def middle(plan):
    """An interval with some rows on either side of it."""
    levels = np.unique(plan.sigma)
    return f"{levels[2]:.6f}-{levels[-3]:.6f}"


@pytest.mark.parametrize(
    ("text", "scale", "interval"),
    [
        ("1.5", 1.5, ""), ("2@0.1-0.8", 2.0, "0.1-0.8"), ("2@.10 - 8e-1", 2.0, "0.1-0.8"), ("2@0.3-", 2.0, "0.3-"),
        ("2@-0.8", 2.0, "0-0.8"), ("2@0-0.80", 2.0, "0-0.8"), ("2@1e-05-80", 2.0, "1e-05-80"), (3, 3.0, ""),
        ("2@1e-5-80.0", 2.0, "1e-05-80"),
    ],
)  # fmt: skip
def test_intervals_are_read_into_one_form(text, scale, interval):
    found = read_guidance(text)
    assert found == Guidance(scale, interval) and read_guidance(str(found)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.5@", "is not an interval"), ("1.5@0.3", "is not an interval"), ("1.5@a-b", "is not an interval"),
        ("1.5@0.1--0.8", "is not an interval"), ("1.5@0.1-nan", "is not an interval"), ("1.5@-", "holds all"),
        ("1.5@0-", "holds all"), ("1.5@0.8-0.1", "lower end"), ("1.5@0.1-1e999", "finite"), ("1@0.1-0.8", "no guidance"),
        ("x@0.1-0.8", "not a valid float"), ("1.5@0.1-0.8@2", "is not an interval"),
    ],
)  # fmt: skip
def test_other_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_guidance(text)
    assert "\n" not in str(error.value)


def test_the_noise_level_is_s_over_a_and_the_ends_are_inside():
    """On flow sigma = t / (1 - t), infinite at t = 1; on ve it is t itself."""
    plan = plan_of("euler", 10, "flow", "velocity")
    t = np.linspace(1, 0.1, 10)
    np.testing.assert_allclose(plan.sigma, np.append(math.inf, t[1:] / (1 - t[1:])), rtol=1e-12)
    assert guided_rows(plan, Guidance(1.5, "1-9")).tolist() == [k in (1, 2, 3, 4, 5) for k in range(10)]  # 9 ... 1
    assert guided_rows(plan, Guidance(1.5, "9-")).tolist() == [True, True] + [False] * 8
    assert guided_rows(plan, Guidance(1.5, "0-0.12")).tolist() == [False] * 9 + [True]
    assert guided_rows(plan, Guidance(1.5)).all() and not guided_rows(plan, Guidance(1.0)).any()
    karras = plan_of("euler", 5, "ve", "edm")
    assert guided_rows(karras, Guidance(2.0, "80-")).tolist() == [True] + [False] * 4
    assert guided_rows(karras, Guidance(2.0, "-0.002")).tolist() == [False] * 4 + [True]
    discrete = plan_of("ddim", 4, "linear", "epsilon-fixed")
    np.testing.assert_allclose(discrete.sigma, discrete.table.s / discrete.table.a)


def test_an_interval_without_a_row_is_refused():
    plan = plan_of("euler", 10, "flow", "velocity")
    check_guided_rows(plan, Guidance(1.5, "9-20"))
    with pytest.raises(UserError, match=r"guidance 1.5@10-20 guides none of the 10 euler steps: .* from inf to 0.1111"):
        check_guided_rows(plan, Guidance(1.5, "10-20"))


@pytest.mark.parametrize("sampler", [each.name for each in registry.samplers if each.make])
def test_more_steps_never_cost_less(sampler):
    """As the search for matched steps needs: rows and guided rows in sum do not decrease."""
    schedule, objective = CASES.get(sampler, ("flow", "velocity"))
    for interval in ("0.5-2", "0.9-1.1", "3-", "-0.3"):
        counts = []
        for steps in range(1, 60):
            try:
                plan = plan_of(
                    sampler, steps, *(("linear", "epsilon-fixed") if sampler == "ddim-ldm" else (schedule, objective))
                )
            except UserError:
                continue
            counts.append(guided_evaluations(plan, Guidance(2.0, interval)))
        assert counts == sorted(counts) and counts[-1] > counts[0]


def toy(xp, learned):
    """A network whose output depends on x, t and the label; eps channels, and variance channels if learned."""

    def net(x, t, y):
        shape = (-1, 1, 1, 1)
        out = 0.3 * x + 0.1 * xp.cos(t * 0.01).reshape(shape) + 0.05 * (y % 7).reshape(shape) * xp.sin(x)
        return xp.concatenate([out, 0.5 * out], 1) if learned else out

    return net


@pytest.mark.parametrize("sampler", CASES)
def test_the_network_is_evaluated_as_planned_and_both_loops_agree(sampler):
    plan = plan_of(sampler)
    guidance = Guidance(2.5, middle(plan))
    rows = guided_rows(plan, guidance)
    assert 0 < rows.sum() < len(rows)
    y = np.array([1, 4, 9])
    calls, net = [], toy(torch, plan.learned_variance)

    def counting(x, t, labels):
        calls.append(labels.tolist())
        return net(x, t, labels)

    def run(rows):
        predict = guided(counting, torch.from_numpy(y), guidance.scale, "all", NULL, rows)
        return sample_loop(predict, plan, torch.from_numpy(NOISE[-1]), lambda k: torch.from_numpy(NOISE[k])).numpy()

    found = run(rows)
    assert calls == [[1, 4, 9, NULL, NULL, NULL] if each else [1, 4, 9] for each in rows]
    assert sum(map(len, calls)) == len(y) * guided_evaluations(plan, guidance)

    jax_net, images = toy(jnp, plan.learned_variance), []

    def counting_jax(x, t, labels):
        jax.debug.callback(lambda _: images.append(len(x)), x[0, 0, 0, 0])  # of the branch that runs, and not the other
        return jax_net(x, t, labels)

    form, arrays = split_plan(plan, rows)

    @jax.jit
    def traced(x):
        predict = jax_guided(counting_jax, jnp.asarray(y), guidance.scale, "all", NULL, rows)
        return sample_steps(
            predict, form, arrays, first_carry(form, x), 0, plan.evaluations, lambda k: jnp.asarray(NOISE)[k]
        ).x

    out = np.asarray(traced(NOISE[-1]))
    jax.effects_barrier()
    assert sorted(images) == sorted(map(len, calls))
    np.testing.assert_allclose(out, found, atol=1e-4 * np.abs(found).max())

    everywhere, nowhere = run(np.ones(len(rows), bool)), run(np.zeros(len(rows), bool))
    assert np.array_equal(everywhere, run(None))  # as without an interval
    for other in (everywhere, nowhere):
        assert np.abs(found - other).max() > 1e-3 * np.abs(found).max()


def test_ends_of_an_open_interval():
    assert read_interval("0.3-") == (0.3, math.inf) and read_interval("-0.8") == (0.0, 0.8)
