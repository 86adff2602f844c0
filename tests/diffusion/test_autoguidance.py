"""Guidance of the predicted image, by a weaker network or by a rule of a package, in both loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from harness import registry
from harness.diffusion.guidance import Guidance, extrapolated, read_guidance
from harness.diffusion.guidance_rules import GuidanceRule
from harness.diffusion.sampler_plan import (
    check_guided_rows,
    guided_evaluations,
    guided_rows,
    reference_plan,
    sampler_plan,
)
from harness.engines.jax import sampler as in_jax
from harness.engines.jax.plan_arrays import split_plan
from harness.engines.torch import sampler as in_torch
from harness.errors import UserError

NOISE = np.random.default_rng(2).standard_normal((40, 3, 4, 4, 4)).astype(np.float32)  # of rows; the last is x_T
SCALE = 2.5
CASES = {  # sampler: (schedule, objective, objective of the weak network)
    "ddpm": ("linear", "epsilon-learned-range", "epsilon-fixed"),
    "ddim": ("linear", "v", "epsilon-learned-range"),
    "heun": ("flow", "velocity", "x0"),
    "euler": ("flow", "x0", "velocity-sit"),  # whose time is 1 - t
    "edm-stochastic": ("ve", "edm", "epsilon-fixed"),  # the one sees x scaled, the other not
}


def plans_of(sampler):
    """The plan of the network and that of a weak one of another objective."""
    schedule, objective, weak_objective = CASES[sampler]
    plan = sampler_plan(sampler, 10, schedule=schedule, objective=objective, diffusion_steps=1000, clip_denoised=True)
    return plan, reference_plan(plan, objective=weak_objective, schedule=schedule, diffusion_steps=1000)


def middle(plan):
    """An interval with some rows on either side of it."""
    levels = np.unique(plan.sigma)
    return f"{levels[2]:.6f}-{levels[-3]:.6f}"


def network(xp, plan, image, learned=False):
    """A network of the plan's kind of prediction, whose predicted image is `image` of (xp, x, row)."""
    scale = np.ones(plan.evaluations) if plan.input_scale is None else plan.input_scale
    columns = [np.float32(each) for each in (plan.network_times, scale, plan.x0_from_x, plan.x0_from_output)]

    def net(x, t):
        times, scales, from_x, from_output = map(xp.asarray, columns)
        row = abs(times - t[0]).argmin()  # rows of one time have one prediction
        state = x / scales[row]
        out = (from_x[row] * state - image(xp, state, row)) / from_output[row]
        return xp.concatenate([out, 0.5 * xp.sin(state)], 1) if learned else out

    return net


def good(xp, x, row):
    return 0.4 * xp.tanh(x) + 0.1


def weak(xp, x, row):
    return 0.3 * xp.sin(x)


def run_torch(plan, net, image_guidance=None):
    predict = lambda x, t, row: net(x, t)  # noqa: E731
    return in_torch.sample_loop(
        predict, plan, torch.from_numpy(NOISE[-1]), lambda k: torch.from_numpy(NOISE[k]), image_guidance=image_guidance
    ).numpy()


def run_jax(plan, rows, net, image_guidance=None):
    form, arrays = split_plan(plan, rows)

    @jax.jit
    def traced(x):
        return in_jax.sample_steps(
            lambda x, t, row: net(x, t), form, arrays, in_jax.first_carry(form, x), 0, plan.evaluations,
            lambda k: jnp.asarray(NOISE)[k], image_guidance=image_guidance,
        ).x  # fmt: skip

    out = np.asarray(traced(NOISE[-1]))
    jax.effects_barrier()
    return out


@pytest.mark.parametrize("sampler", CASES)
@pytest.mark.parametrize("has_interval", [False, True])
def test_networks_of_two_objectives_are_combined_in_the_image_and_evaluated_as_planned(sampler, has_interval):
    """As one network would sample whose predicted image were the combination; each network as often as counted."""
    plan, weak_plan = plans_of(sampler)
    guidance = Guidance(SCALE, middle(plan) if has_interval else "")
    rows = guided_rows(plan, guidance)
    assert 0 < rows.sum() < len(rows) if has_interval else rows.all()
    learned = plan.learned_variance
    calls = {"base": 0, "weak": 0}

    def combination(xp, x, row):
        guided = weak(xp, x, row) + SCALE * (good(xp, x, row) - weak(xp, x, row))  # arXiv:2406.02507
        return xp.where(xp.asarray(rows)[row], guided, good(xp, x, row))

    def counting(name, net):
        def counted(x, t):
            calls[name] += 1
            return net(x, t)

        return counted

    base_net = counting("base", network(torch, plan, good, learned))
    # variance channels of the weak network are not used
    weak_net = counting("weak", network(torch, weak_plan, weak, learned=sampler == "ddim"))
    found = run_torch(plan, base_net, in_torch.guided_image(weak_net, weak_plan, SCALE, extrapolated, rows))
    assert calls == {"base": plan.evaluations, "weak": rows.sum()}
    assert sum(calls.values()) == guided_evaluations(plan, guidance)
    expected = run_torch(plan, network(torch, plan, combination, learned))
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-4 * size)
    assert np.abs(found - run_torch(plan, network(torch, plan, good, learned))).max() > 1e-2 * size

    calls |= {"base": 0, "weak": 0}

    def counting_jax(name, net):
        def seen(_):
            calls[name] += 1

        def counted(x, t):
            jax.debug.callback(seen, x[0, 0, 0, 0])  # of the branch that runs, and not the other
            return net(x, t)

        return counted

    form, arrays = split_plan(weak_plan, rows)
    weak_net = counting_jax("weak", network(jnp, weak_plan, weak))
    guide = in_jax.guided_image(weak_net, form, arrays, SCALE, extrapolated)
    out = run_jax(plan, rows, counting_jax("base", network(jnp, plan, good, learned)), guide)
    assert calls == {"base": plan.evaluations, "weak": rows.sum()}
    np.testing.assert_allclose(out, found, atol=1e-4 * size)


def test_with_one_kind_of_prediction_it_is_the_combination_of_the_outputs():
    """D is linear in the output: classifier-free guidance, where the outputs are combined, gives the same images."""
    plan, _ = plans_of("ddim")
    same = reference_plan(plan, objective="v", schedule="linear", diffusion_steps=1000)
    rows = np.ones(plan.evaluations, bool)
    nets = network(torch, plan, good), network(torch, plan, weak)

    def labelled(x, t, y):
        return torch.where(y[:, None, None, None] == 10, nets[1](x, t), nets[0](x, t))

    predict = in_torch.guided(labelled, torch.zeros(3, dtype=torch.int64), SCALE, "all", 10)
    of_outputs = run_torch(plan, lambda x, t: predict(x, t, 0))
    found = run_torch(plan, nets[0], in_torch.guided_image(nets[1], same, SCALE, extrapolated, rows))
    np.testing.assert_allclose(found, of_outputs, atol=1e-5)


def test_a_weak_network_that_tells_no_image_at_a_row_is_refused():
    plan = sampler_plan("euler", 4, schedule="flow", objective="velocity", diffusion_steps=1000)
    with pytest.raises(UserError, match="epsilon-fixed cannot be sampled on flow at t = 1"):
        reference_plan(plan, objective="epsilon-fixed", schedule="flow", diffusion_steps=1000)
    with pytest.raises(UserError, match="the objective edm is defined on the schedule ve"):
        reference_plan(plan, objective="edm", schedule="flow", diffusion_steps=1000)


def rescaled(conditional, unconditional, scale, sigma, xp):
    """Guidance rescaled to the standard deviation with the label (Lin et al. 2024, arXiv:2305.08891, sec. 3.4)."""
    guided = unconditional + scale * (conditional - unconditional)
    spread = [xp.sqrt(each.var(axis=(1, 2, 3), keepdims=True)) for each in (conditional, guided)]
    return guided * (0.7 * spread[0] / spread[1] + 0.3)


def softened(conditional, unconditional, scale, sigma, xp):
    """Of the image with the label alone, less of it the smaller the noise."""
    assert unconditional is None
    return conditional * (1 - 1 / (1 + scale * sigma))


RULES = (
    GuidanceRule(name="rescaled", combine=rescaled),
    GuidanceRule(name="softened", combine=softened, evaluations=1),
)


@pytest.fixture(autouse=True)
def rules():
    registry.guidance_rules.register(list(RULES), "the tests")
    yield
    for each in RULES:
        del registry.guidance_rules._items[each.name], registry.guidance_rules._owners[each.name]


@pytest.mark.parametrize("rule", RULES, ids=lambda each: each.name)
@pytest.mark.parametrize("channels", ["all", "first-3"])
@pytest.mark.parametrize("interval", ["", "0.3-3"])
def test_a_rule_gets_the_images_of_its_channels_in_both_loops(rule, channels, interval):
    plan, _ = plans_of("heun")
    guidance = Guidance(SCALE, interval, rule.name)
    rows = guided_rows(plan, guidance)
    needs_two = rule.evaluations == 2
    assert guided_evaluations(plan, guidance) == plan.evaluations + rows.sum() * (rule.evaluations - 1)
    count, calls = 3 if channels == "first-3" else 4, []

    def expected_image(xp, x, row):
        conditional, unconditional = good(xp, x, row), weak(xp, x, row) if needs_two else None
        result = rule.combine(
            conditional[:, :count], None if unconditional is None else unconditional[:, :count], SCALE,
            float(np.float32(plan.sigma[row])), xp,
        )  # fmt: skip
        result = xp.concatenate([result, conditional[:, count:]], 1)
        return result if rows[row] else conditional

    def reference(x, t):
        calls.append(t)
        return network(torch, plan, weak)(x, t)

    given = reference if needs_two else None
    found = run_torch(
        plan, network(torch, plan, good), in_torch.guided_image(given, plan, SCALE, rule.combine, rows, channels)
    )
    assert len(calls) == (rows.sum() if needs_two else 0)
    expected = run_torch(plan, network(torch, plan, expected_image))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    form, arrays = split_plan(plan, rows)
    given = network(jnp, plan, weak) if needs_two else None
    guide = in_jax.guided_image(given, form, arrays, SCALE, rule.combine, channels)
    np.testing.assert_allclose(run_jax(plan, rows, network(jnp, plan, good), guide), found, atol=1e-4)


def test_a_rule_that_returns_no_image_is_refused_in_both_loops():
    plan, _ = plans_of("heun")
    rows = np.ones(plan.evaluations, bool)
    mean = lambda image, _, scale, sigma, xp: image.mean(axis=1, keepdims=True)  # noqa: E731
    with pytest.raises(UserError, match=r"shape \(3, 1, 4, 4\) for images of shape \(3, 4, 4, 4\)"):
        run_torch(plan, network(torch, plan, good), in_torch.guided_image(None, plan, SCALE, mean, rows))
    guide = in_jax.guided_image(None, *split_plan(plan, rows), SCALE, mean)
    with pytest.raises(UserError, match=r"shape \(3, 1, 4, 4\) for images of shape \(3, 4, 4, 4\)"):
        run_jax(plan, rows, network(jnp, plan, good), guide)


def test_an_item_that_is_no_rule_is_refused():
    other = type("Other", (), {"name": "other"})()
    with pytest.raises(UserError, match="a package: 'other' is a Other, not a GuidanceRule"):
        registry.guidance_rules.register(other, "a package")
    assert "other" not in registry.guidance_rules


def test_an_adaptive_sampler_has_no_rule_of_a_package():
    plan = sampler_plan("dopri5", 1, schedule="flow", objective="velocity", diffusion_steps=1000)
    assert guided_evaluations(plan, Guidance(2.0, "", "rescaled")) is None
    for refused in (check_guided_rows, lambda plan, guidance: plan.segments(guidance)):
        with pytest.raises(UserError, match="guidance 2:rescaled: a rule .* dopri5 chooses its own") as error:
            refused(plan, Guidance(2.0, "", "rescaled"))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="unknown guidance rule"):
        check_guided_rows(plan, Guidance(2.0, "", "not-installed"))


def test_the_plan_of_a_reference_has_the_scale_of_the_noise():
    settings = {"schedule": "flow", "diffusion_steps": 1000, "noise_scale": 2.0}
    plan = sampler_plan("heun", 5, objective="epsilon-fixed", **settings)
    same = reference_plan(plan, objective="epsilon-fixed", **settings)
    for name in ("x0_from_x", "x0_from_output"):
        np.testing.assert_array_equal(getattr(same, name), getattr(plan, name))
    plain = reference_plan(plan, objective="epsilon-fixed", schedule="flow", diffusion_steps=1000)
    assert not np.allclose(plain.x0_from_output, plan.x0_from_output)


@pytest.mark.parametrize(
    ("text", "guidance"),
    [
        ("1.5:rescaled", Guidance(1.5, "", "rescaled")),
        ("2:rescaled@.10-0.8", Guidance(2.0, "0.1-0.8", "rescaled")),
        ("3:not-installed", Guidance(3.0, "", "not-installed")),
    ],
)
def test_a_rule_is_part_of_the_text_of_guidance(text, guidance):
    assert read_guidance(text) == guidance and read_guidance(str(guidance)) == guidance


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.5:", "'' is no name of a guidance rule"), ("1.5:a b", "'a b' is no name"), ("1:rescaled", "so it has no rule"),
        ("1.5@0.1-0.8:rescaled", "is not an interval"), ("1.5:a:b", "'a:b' is no name"),
    ],
)  # fmt: skip
def test_other_text_of_a_rule_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_guidance(text)


def test_a_rule_that_is_not_installed_is_named():
    plan, _ = plans_of("ddim")
    for refused in (guided_evaluations, check_guided_rows):
        with pytest.raises(UserError, match="unknown guidance rule 'rescale'; did you mean rescaled"):
            refused(plan, Guidance(1.5, "", "rescale"))


@pytest.mark.parametrize(
    ("change", "message"), [({"name": "a:b"}, "is no name of a guidance rule"), ({"evaluations": 3}, "is 1 or 2")]
)
def test_a_rule_that_cannot_be_stated_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GuidanceRule(**{"name": "mine", "combine": rescaled, **change})
