"""Options in the name of a sampler: the papers' formulas, the variance of samples in closed form, one text for equal ones."""

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

from harness import registry
from harness.cli import group
from harness.diffusion import solvers
from harness.diffusion.sampler_plan import sampler_plan
from harness.diffusion.samplers import (
    SamplerOption,
    SamplerSpec,
    canonical_sampler,
    has_eta,
    name_with_steps,
    read_sampler,
)
from harness.errors import UserError
from harness.protocols import Sampling
from harness.systems.spec import Component

MEAN, STD = 0.3, 0.5  # of the Gaussian data
FORMS = ("sigma", "sbdm", "constant", "linear", "decreasing")


def table_of(sampler, steps, schedule, objective="velocity", **options):
    return sampler_plan(sampler, steps, schedule=schedule, objective=objective, diffusion_steps=1000, **options).table


def run(table, x, predict, noise):
    """The sample of `table` from x at its first row, float64. predict: (x, row) -> image; noise: of a row."""
    base, images = np.zeros_like(x), []
    for k in range(len(table.times)):
        images = [predict(x, k), *images][: table.x_from.shape[1] - 2]
        columns = np.array([x, base, *images])
        x_next = table.x_from[k, : len(columns)] @ columns + table.noise_to_x[k] * noise(k)
        base = table.base_from[k, : len(columns)] @ columns + table.noise_to_base[k] * noise(k)
        x = x_next
    return x


# SiT's own time tau runs from noise (0) to data (1): alpha, sigma and their slopes, typed from its paper
PATHS = {
    "flow": lambda tau: (tau, 1 - tau, 1.0, -1.0),
    "gvp": lambda tau: (
        np.sin(np.pi * tau / 2), np.cos(np.pi * tau / 2), np.pi / 2 * np.cos(np.pi * tau / 2), -np.pi / 2 * np.sin(np.pi * tau / 2),
    ),
    "vp-continuous": lambda tau: vp(tau),
}  # fmt: skip


def vp(tau):
    """beta falls linearly from 20 to 0.1; alpha = exp(-1/2 integral of beta), alpha' = alpha beta / 2, alpha^2 + sigma^2 = 1."""
    rest, beta = 1 - tau, 0.1 + (1 - tau) * 19.9
    alpha = np.exp(-0.5 * (0.1 * rest + 19.9 * rest**2 / 2))
    sigma = np.sqrt(1 - alpha**2)
    return alpha, sigma, alpha * beta / 2, -(alpha**2) * beta / 2 / sigma


def w_of(path, form, tau):
    """SiT's table 2, with the norm 1."""
    alpha, sigma, d_alpha, d_sigma = PATHS[path](tau)
    return {
        "constant": lambda: 1.0,
        "sigma": lambda: sigma,
        "linear": lambda: 1 - tau,
        "decreasing": lambda: ((np.cos(np.pi * tau) + 1) / 2) ** 2,
        "sbdm": lambda: d_alpha / alpha * sigma**2 - sigma * d_sigma,
    }[form]()


def first_tau(path, form):
    return 1e-3 if form == "sbdm" and path != "vp-continuous" else 0.0  # where sbdm's diffusion is infinite


def velocity(x, tau):
    return 0.7 * x - np.sin(x + 2 * tau)


def sit(path, form, last, size, steps, x, noise):
    """SiT's sampler of the SDE, with the velocity above, in its own time: `steps` evaluations."""

    def drift(x, tau, w):
        alpha, sigma, d_alpha, d_sigma = PATHS[path](tau)
        v = velocity(x, tau)
        ratio = alpha / d_alpha
        return v + w * (ratio * v - x) / (sigma**2 - ratio * d_sigma * sigma)

    count = steps + 1 if last == "none" else steps
    end = 1.0 if last == "none" else 1 - size
    taus = np.linspace(first_tau(path, form), end, count)
    dt = taus[1] - taus[0]
    for k, tau in enumerate(taus[:-1]):
        w = w_of(path, form, tau)
        x = x + drift(x, tau, w) * dt + np.sqrt(2 * w * dt) * noise[k]
    alpha, sigma, *_ = PATHS[path](end)
    if last == "mean":
        return x + drift(x, end, w_of(path, form, end)) * size
    if last == "euler":
        return x + velocity(x, end) * size
    if last == "tweedie":
        score = drift(x, end, 1.0) - velocity(x, end)
        return x / alpha + sigma**2 / alpha * score
    return x


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", PATHS)
def test_euler_maruyama_is_sits(path, form):
    x, noise = np.array([-1.0, 0.2, 1.5]), 0.5 * np.cos(np.arange(40)[:, None] + np.arange(3))
    for last, size in (("mean", 0.04), ("tweedie", 0.04), ("euler", 0.1), ("mean", 0.02), ("none", 0.04)):
        if (path, last) == ("vp-continuous", "none"):  # SiT ends at 1e-3 there, and the harness at 1e-5
            continue
        text = f"euler-maruyama:{form}:{last}" + (f":{size}" if last != "none" else "")
        table = table_of(text, 40, path)
        assert len(table.times) == 40
        np.testing.assert_allclose(table.times[0], 1 - first_tau(path, form))

        def predict(x, k, table=table):
            alpha, sigma, d_alpha, d_sigma = PATHS[path](1 - table.times[k])
            # v = alpha' x0 + sigma' (x - alpha x0) / sigma, solved for x0
            return (sigma * velocity(x, 1 - table.times[k]) - d_sigma * x) / (sigma * d_alpha - alpha * d_sigma)

        found = run(table, x, predict, lambda k: noise[k])
        np.testing.assert_allclose(found, sit(path, form, last, size, 40, x, noise), rtol=1e-7, err_msg=text)


def moments(table):
    """(mean, variance) of the samples of a table from Gaussian data, exact: all states are Gaussian."""
    width = table.x_from.shape[1]
    mean, covariance = np.zeros(width), np.zeros((width, width))  # of x, base and the images before
    covariance[0, 0] = table.initial_noise**2
    for k in range(len(table.times)):
        a, s = table.a[k], table.s[k]
        slope = a * STD**2 / (a**2 * STD**2 + s**2)  # E[x0 | x] = MEAN + slope (x - a MEAN)
        predict, offset = np.zeros((width, width)), np.zeros(width)
        predict[0, 0] = predict[1, 1] = 1.0
        predict[2, 0], offset[2] = slope, MEAN - slope * a * MEAN
        predict[range(3, width), range(2, width - 1)] = 1.0
        step = np.eye(width)
        step[0], step[1] = table.x_from[k], table.base_from[k]
        noise = np.zeros(width)
        noise[:2] = table.noise_to_x[k], table.noise_to_base[k]
        mean, both = step @ (predict @ mean + offset), step @ predict
        covariance = both @ covariance @ both.T + np.outer(noise, noise)
    return mean[0], covariance[0, 0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", PATHS)
def test_variance_of_samples_of_gaussian_data(path, form):
    """At t = SIZE the state has the variance V = a^2 c^2 + s^2 whatever the diffusion; the last step then scales it."""
    size = 0.1
    a, s, minus_da, minus_ds = PATHS[path](1 - size)  # derivatives in tau = 1 - t
    variance = a**2 * STD**2 + s**2
    v_slope = (a * minus_da * STD**2 + s * minus_ds) / variance  # of the velocity in x, for Gaussian data
    w = w_of(path, form, 1 - size)
    expected = {
        "mean": ((a + size * minus_da) * MEAN, (1 + size * (v_slope - w / variance)) ** 2 * variance),
        "euler": ((a + size * minus_da) * MEAN, (1 + size * v_slope) ** 2 * variance),
        "tweedie": (MEAN, (a * STD**2) ** 2 / variance),
        "none": (MEAN, STD**2),
    }
    for last, (mean, variance) in expected.items():
        text = f"euler-maruyama:{form}:{last}" + (f":{size}" if last != "none" else "")
        found = moments(table_of(text, 400, path))
        np.testing.assert_allclose(found, (mean, variance), rtol=0.02, err_msg=text)


def algorithm_2(churn, low, high, noise_scale, steps, x, noise):
    """Karras et al. 2022, algorithm 2, with the Gaussian denoiser. noise: one draw before each step."""

    def denoised(x, sigma):
        return MEAN + STD**2 * (x - MEAN) / (STD**2 + sigma**2)

    i = np.arange(steps)
    t = np.append((80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, 0.0)
    for i in range(steps):
        gamma = min(churn / steps, math.sqrt(2) - 1) if low <= t[i] <= high else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * noise_scale * noise[i]
        d = (x_hat - denoised(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            x = x_hat + (t[i + 1] - t_hat) * (d + (x - denoised(x, t[i + 1])) / t[i + 1]) / 2
    return x


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("edm-stochastic", (40, 0.05, 50, 1.003)),
        ("edm-stochastic:80", (80, 0.05, 50, 1.003)),
        ("edm-stochastic:30:0.01:1:1.007", (30, 0.01, 1, 1.007)),
        ("edm-stochastic:20:0:inf:1", (20, 0, math.inf, 1)),
        ("edm-stochastic:0", (0, 0, 0, 1)),
    ],
)
def test_edm_stochastic_is_algorithm_2(text, values):
    table = table_of(text, 18, "ve", "edm")
    draws = np.random.default_rng(0).standard_normal((18, 3))
    x = 80 * np.array([-1.0, 0.2, 1.5])

    def predict(x, k):
        return MEAN + STD**2 * (x - MEAN) / (STD**2 + table.s[k] ** 2)

    found_from = x
    if table.s[0] > 80.01:  # the noise before the first step is a part of the initial noise
        added = values[3] * math.sqrt(table.s[0] ** 2 - 80**2)
        assert table.initial_noise == pytest.approx(math.hypot(80, added))
        found_from = x + added * draws[0]
    found = run(table, found_from, predict, lambda k: draws[min((k + 1) // 2, 17)])  # row 2 i - 1 draws for step i
    np.testing.assert_allclose(found, algorithm_2(*values, 18, x, draws), rtol=1e-9)


def test_variance_of_edm_stochastic():
    for text in ("edm-stochastic:40:0:inf:1", "edm-stochastic:20:0.05:50:1", "edm-stochastic:0"):
        np.testing.assert_allclose(moments(table_of(text, 200, "ve", "edm")), (MEAN, STD**2), rtol=0.01)
    louder = moments(table_of("edm-stochastic:40:0.05:50:1.1", 200, "ve", "edm"))[1]
    assert louder > 1.02 * STD**2


def test_the_defaults_are_those_of_the_tables():
    for name, steps, schedule, objective in (
        ("edm-stochastic", 9, "ve", "edm"),
        ("euler-maruyama", 9, "flow", "velocity"),
    ):
        spec, options = read_sampler(name)
        plain = table_of(name, steps, schedule, objective)
        for each in (spec.name, ":".join([name, *(str(value) for value in options.values())])):
            assert table_of(each, steps, schedule, objective) is plain  # one plan, from the cache
    for option, known in zip(
        registry.samplers.get("euler-maruyama").options, (solvers.DIFFUSIONS, solvers.LAST_STEPS), strict=False
    ):
        assert option.choices == tuple(known)
    grid_times = table_of("euler-maruyama", 250, "flow").times
    np.testing.assert_allclose(grid_times, np.linspace(1.0, 0.04, 250))


EQUAL = {
    "edm-stochastic": ["edm-stochastic:40", "edm-stochastic:40.0:5e-2:50:1.003"],
    "edm-stochastic:20:0:inf:1": ["edm-stochastic:20.0:-0:inf:1.00"],
    "edm-stochastic:40:0": ["edm-stochastic:40:0.0:50"],
    "euler-maruyama": ["euler-maruyama:sigma:mean:0.04"],
    "euler-maruyama:sigma:tweedie": ["euler-maruyama:sigma:tweedie:.04"],
    "heun": [],
    "not-installed:3": [],
}


@pytest.mark.parametrize("text", EQUAL)
def test_equal_options_have_one_text(text):
    for each in (text, *EQUAL[text]):
        assert canonical_sampler(each) == Sampling(sampler=each).sampler == text
        assert Component(backbone="dit-xs-2", sampler=each).sampler == text


def test_names():
    assert name_with_steps("ddpm", 250) == "ddpm250"
    assert name_with_steps("edm-stochastic:20:0:inf:1", 18) == "edm-stochastic_20_0_inf_1-18"
    assert not has_eta("euler-maruyama:sbdm") and has_eta("ddim") and has_eta("not-installed:3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heun:3", "sampler 'heun:3': heun has no options; write heun"),
        ("edm-stochastic:x", "CHURN must be a number of at least 0, not 'x'; the form is edm-stochastic:CHURN:MIN:MAX:NOISE"),
        ("edm-stochastic:-1", "CHURN must be a number of at least 0, not '-1'"),
        ("edm-stochastic:nan", "CHURN must be"),
        ("edm-stochastic::0", "CHURN must be"),
        ("edm-stochastic:40:0:50:99", "NOISE must be a number of at least 0 and at most 10, not '99'"),
        ("edm-stochastic:1:2:3:4:5", "too many options; the form is"),
        ("euler-maruyama:loud", "DIFFUSION must be one of sigma, sbdm, constant, linear, decreasing, not 'loud'"),
        ("euler-maruyama:sigma:mean:0", "SIZE must be a number of at least 0.001 and at most 0.5, not '0'"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_in_one_line(text, message):
    for use in (lambda: Sampling(sampler=text), lambda: sampler_plan(text, 9, schedule="flow", objective="velocity", diffusion_steps=1000)):  # fmt: skip
        with pytest.raises(UserError) as caught:
            use()
        assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "schedule", "spacing", "message"),
    [
        ("edm-stochastic:40:9:1", "ve", "", "from MIN to MAX, and 9 is more than 1"),
        ("euler-maruyama:sigma:mean:0.1", "flow", "log-snr", "on its own times only: leave out SIZE"),
        ("euler-maruyama:sigma:none:0.1", "flow", "", "leave out SIZE, as LAST is none"),
        ("euler-maruyama:decreasing", "ve", "", "needs a schedule with t in [0, 1]"),
        ("nobody:3", "flow", "", "unknown sampler 'nobody'"),
    ],
)
def test_options_that_do_not_fit(text, schedule, spacing, message):
    with pytest.raises(UserError) as caught:
        table_of(text, 9, schedule, "edm" if schedule == "ve" else "velocity", spacing=spacing)
    assert message in str(caught.value)


def test_options_of_a_plug_in_and_the_list():
    """They come to its table parsed and with their types; `harness list samplers` shows the form."""
    seen = []

    def make(task):
        seen.append(dict(task.options))
        return solvers.euler(task.nodes())

    options = (
        SamplerOption(name="rounds", default=2, low=1),
        SamplerOption(name="scale", default=0.5),
        SamplerOption(name="kind", default="soft"),
    )
    spec = SamplerSpec(name="of-the-tests", summary="Euler's rule", make=make, options=options)
    registry.samplers.register(spec, "the tests")
    try:
        table_of("of-the-tests", 9, "flow")
        table_of("of-the-tests:3:1e-1:a-b.c", 9, "flow")
        assert seen == [{"rounds": 2, "scale": 0.5, "kind": "soft"}, {"rounds": 3, "scale": 0.1, "kind": "a-b.c"}]
        assert [type(value) for value in seen[1].values()] == [int, float, str]
        assert canonical_sampler("of-the-tests:2:.25") == "of-the-tests:2:0.25"
        for text, message in (
            ("of-the-tests:1.5", "ROUNDS must be a whole number of at least 1, not '1.5'"),
            ("of-the-tests:2:0.5:a/b", "KIND must be a word of letters, digits, '.', '+' and '-', not 'a/b'"),
        ):
            with pytest.raises(UserError) as caught:
                canonical_sampler(text)
            assert message in str(caught.value)
        shown = CliRunner().invoke(group, ["list", "samplers"]).output
        rows = json.loads(CliRunner().invoke(group, ["list", "samplers", "--json"]).output)["samplers"]
    finally:
        del registry.samplers._items[spec.name], registry.samplers._owners[spec.name]
    assert "of-the-tests:ROUNDS:SCALE:KIND, by default 2:0.5:soft" in shown
    assert "euler-maruyama:DIFFUSION:LAST:SIZE, by default sigma:mean:0.04; DIFFUSION: sigma, sbdm, " in shown
    by_name = {row["name"]: row for row in rows}
    assert by_name["edm-stochastic"]["form"] == "edm-stochastic:CHURN:MIN:MAX:NOISE" and "form" not in by_name["heun"]
