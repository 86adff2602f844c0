"""The sampling loop and guidance in torch."""

import math

import numpy as np
import pytest
import torch
from sampler_plans import ddim_plan, ddpm_plan

from harness.diffusion.schedule import Schedule
from harness.engines.guidance import GUIDED_CHANNELS
from harness.engines.torch.sampler import guided, sample_loop
from harness.errors import RunError, UserError

LINEAR = Schedule.named("linear")


def toy_network(x, t, row=0):
    """cat[0.1 x + 0.001 t, tanh x]: the network of the golden figures."""
    return torch.cat([0.1 * x + 0.001 * t.float()[:, None, None, None], torch.tanh(x)], dim=1)


def test_golden_250():
    torch.manual_seed(0)
    z = torch.randn(2, 4, 8, 8)
    kept = z.clone()
    out = sample_loop(toy_network, ddpm_plan(LINEAR, "250"), z, lambda k: torch.randn_like(z))
    assert out.dtype == torch.float32 and out.shape == z.shape
    assert torch.equal(z, kept)
    assert out.mean().item() == pytest.approx(-109.421448, abs=2e-4)
    assert out.std().item() == pytest.approx(74.626389, abs=2e-4)
    np.testing.assert_allclose(out[0, 0, 0, :3].numpy(), [-195.276581, -101.666565, -105.036179], rtol=3e-6)


def exact_network(mean, std):
    """The epsilon of data that is N(mean, std^2) in every pixel, with and without variance channels."""

    def predict(x, t, row):
        abar = torch.from_numpy(LINEAR.abar.copy())[t][:, None, None, None]
        variance = abar * std**2 + 1 - abar
        return ((1 - abar).sqrt() * (x - abar.sqrt() * mean) / variance).float()

    return predict


@pytest.mark.parametrize(
    "plan",
    [
        ddpm_plan(LINEAR, 1000, variance="fixed-small"),
        ddim_plan(LINEAR, 1000),
        ddim_plan(LINEAR, 1000, eta=0.5),
    ],
    ids=["ddpm", "ddim", "ddim-eta"],
)
def test_samples_have_the_distribution_of_the_data(plan):
    """All 1000 steps: with fewer the spread shrinks by the samplers' own error (DDIM: 0.475 at 50, 0.496 at 200)."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 1, 16, 16, generator=generator)
    out = sample_loop(exact_network(0.3, 0.5), plan, x, lambda k: torch.randn(x.shape, generator=generator))
    assert out.mean().item() == pytest.approx(0.3, abs=0.01)  # 16,384 pixels: standard errors 0.004 and 0.003
    assert out.std().item() == pytest.approx(0.5, abs=0.01)


def test_learned_variance_ends_are_fixed_small_and_beta():
    z = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(4))

    def network(v):
        return lambda x, t, row: torch.cat([0.1 * x, torch.full_like(x, v)], dim=1)

    low = sample_loop(network(-1.0), ddpm_plan(LINEAR, 10), z, lambda k: torch.ones_like(z))
    small = sample_loop(network(-1.0), ddpm_plan(LINEAR, 10, variance="fixed-small"), z, lambda k: torch.ones_like(z))
    torch.testing.assert_close(low, small, rtol=1e-5, atol=1e-5)
    high = sample_loop(network(1.0), ddpm_plan(LINEAR, 10), z, lambda k: torch.ones_like(z))
    assert (high > low).all()


def test_noise_is_asked_only_where_it_is_added():
    z = torch.zeros(1, 1, 2, 2)
    for plan, expected in ((ddpm_plan(LINEAR, 10), list(range(9))), (ddim_plan(LINEAR, 10), [])):
        asked, done, seen = [], [], []

        def noise(k, asked=asked):
            asked.append(k)
            return z

        def network(x, t, row, seen=seen):
            assert torch.is_inference_mode_enabled() and x.dtype == torch.float32 and t.dtype == torch.int64
            seen.append(t.tolist())
            return torch.zeros(1, 2, 2, 2, dtype=torch.bfloat16)

        sample_loop(network, plan, z, noise, progress=lambda k, n, done=done: done.append((k, n)))
        assert asked == expected
        assert done == [(k, 10) for k in range(1, 11)]
        assert seen == [[t] for t in plan.network_times] and seen[0] == [999]


def test_clip_denoised():
    z = torch.full((1, 1, 2, 2), 3.0)
    network = lambda x, t, row: torch.zeros_like(x)  # noqa: E731
    for make in (lambda **k: ddpm_plan(LINEAR, 5, variance="fixed-small", **k), lambda **k: ddim_plan(LINEAR, 5, **k)):
        off = sample_loop(network, make(), z, lambda k: torch.zeros_like(z))
        assert off.min() > 100  # zero epsilon takes x for the signal, scaled up by 1 / sqrt(abar)
        on = sample_loop(network, make(clip_denoised=True), z, lambda k: torch.zeros_like(z))
        assert torch.equal(on, torch.ones_like(z))


def test_divergence_is_a_failure_that_names_the_step():
    def network(x, t, row):
        return torch.full_like(x, math.nan if t[0] < 500 else 0.0)

    plan = ddpm_plan(LINEAR, 200, variance="fixed-small")
    with pytest.raises(RunError, match=r"ddpm evaluation 150 of 200 \(t = 251\)"):
        sample_loop(network, plan, torch.zeros(1, 1, 2, 2), lambda k: torch.zeros(1, 1, 2, 2))
    with pytest.raises(RunError, match="evaluation 10 of 10"):
        sample_loop(network, ddim_plan(LINEAR, 10), torch.zeros(1, 1, 2, 2), lambda k: torch.zeros(1, 1, 2, 2))


def test_channels_that_do_not_fit_are_refused():
    z = torch.zeros(1, 4, 2, 2)
    for plan, channels, fits in (
        (ddpm_plan(LINEAR, 2), 8, True),
        (ddpm_plan(LINEAR, 2), 4, False),
        (ddim_plan(LINEAR, 2), 8, True),
        (ddim_plan(LINEAR, 2), 4, True),
        (ddim_plan(LINEAR, 2), 5, False),
    ):
        network = lambda x, t, row, channels=channels: torch.zeros(1, channels, 2, 2)  # noqa: E731
        if fits:
            sample_loop(network, plan, z, lambda k: z)
        else:
            with pytest.raises(UserError, match=f"gives {channels} channels for 4"):
                sample_loop(network, plan, z, lambda k: z)


def labelled_network(calls):
    def net(x, t, y):
        calls.append((len(x), y.tolist()))
        return torch.cat([x * (1 + y[:, None, None, None]), x + y[:, None, None, None]], dim=1)

    return net


@pytest.mark.parametrize("rule", GUIDED_CHANNELS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_guidance(rule, channels):
    calls = []
    x = torch.randn(2, channels, 3, 3, generator=torch.Generator().manual_seed(5))
    t, y = torch.tensor([3, 3]), torch.tensor([2, 5])
    out = guided(labelled_network(calls), y, 4.0, rule, 10)(x, t, 0)
    assert calls == [(4, [2, 5, 10, 10])]
    plain = labelled_network([])
    conditional, unconditional = plain(x, t, y), plain(x, t, torch.tensor([10, 10]))
    count = channels if rule == "all" else min(3, channels)
    expected = conditional.clone()
    expected[:, :count] = (unconditional + 4.0 * (conditional - unconditional))[:, :count]
    assert out.shape == (2, 2 * channels, 3, 3) and out.dtype == torch.float32
    torch.testing.assert_close(out, expected)
    assert torch.equal(out[:, channels:], conditional[:, channels:])  # the variance is never guided


def test_scale_1_is_no_guidance():
    calls = []
    x, t, y = torch.ones(2, 1, 2, 2), torch.tensor([3, 3]), torch.tensor([2, 5])
    for null_label in (None, 10):
        out = guided(labelled_network(calls), y, 1.0, "first-3", null_label)(x, t, 0)
        assert torch.equal(out, labelled_network([])(x, t, y))
    assert calls == [(2, [2, 5])] * 2


def test_guidance_refused():
    y = torch.tensor([1])
    with pytest.raises(UserError, match="label dropout"):
        guided(labelled_network([]), y, 1.5, "all", None)
    with pytest.raises(UserError, match="did you mean 'first-3'"):
        guided(labelled_network([]), y, 1.5, "first-4", 10)
    with pytest.raises(UserError, match="finite"):
        guided(labelled_network([]), y, math.nan, "all", 10)
