"""Guidance by a classifier: against the public code's samples, against the equations in float64, and in distribution.

The figures were computed with openai/guided-diffusion 22e0df8 (respace.SpacedDiffusion, p_sample_loop and
ddim_sample_loop with the cond_fn of scripts/classifier_sample.py), on a CPU in float32, with the networks below.
"""

import math

import numpy as np
import pytest
import torch
from sampler_plans import ddim_plan, ddpm_plan

from harness.diffusion.schedule import Schedule
from harness.engines.torch.sampler import classifier_guide, sample_loop
from harness.errors import UserError

LINEAR = Schedule.named("linear")
SHAPE = (2, 3, 8, 8)
STEPS = 25
SCALE = 2.0
LABELS = torch.tensor([1, 3])
WEIGHT = torch.sin(1.7 * torch.arange(5 * 192, dtype=torch.float64)).reshape(5, 192).float() / 8  # (classes, C H W)
BIAS = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])


def toy_network(x, t, row=0):
    """cat[0.1 x + 0.001 t, tanh x]: epsilon and variance of the golden figures."""
    return torch.cat([0.1 * x + 0.001 * t.float()[:, None, None, None], torch.tanh(x)], dim=1)


def toy_epsilon(x, t, row=0):
    return toy_network(x, t)[:, :3]


def toy_classifier(x, t):
    """Logits (N, 5), linear in x and t."""
    return x.flatten(1) @ WEIGHT.T + BIAS * (t.float() / 250)[:, None]


def draws():
    """(x_T, noise of every step) in the order in which the public loops draw them after torch.manual_seed(0)."""
    generator = torch.Generator().manual_seed(0)
    z, *noise = (torch.randn(SHAPE, generator=generator) for _ in range(STEPS + 1))
    return z, noise


def make_plan(variance, clip, eta):
    if eta is None:
        return ddpm_plan(LINEAR, str(STEPS), variance=variance, clip_denoised=clip)
    return ddim_plan(LINEAR, f"ddim{STEPS}", eta=eta, clip_denoised=clip)


GOLDENS = {  # (variance, clip_denoised, eta): mean, std, the last three pixels
    ("learned-range", True, None): (-0.37038593, 0.70662862, [-0.74885005, -0.85146815, 0.17970204]),
    ("learned-range", False, None): (-112.089, 81.750885, [-26.988108, -128.2346, -135.17621]),
    ("fixed-small", True, None): (-0.3493831, 0.72446009, [-0.73885685, -0.84579676, 0.1442468]),
    ("fixed-small", False, None): (-112.0876, 81.751512, [-26.986074, -128.23445, -135.17615]),
    ("learned-range", True, 0.0): (-0.37346111, 0.85196003, [0.8246702, -0.99597687, -0.99977303]),
    ("learned-range", False, 0.0): (-59.29489, 63.772701, [-23.580717, -72.374435, -79.884659]),
    ("learned-range", True, 1.0): (-0.34762681, 0.72394584, [-0.72091579, -0.84790593, 0.034881007]),
    ("learned-range", False, 1.0): (-76.762022, 59.189469, [-16.436771, -88.114632, -93.753983]),
}


def equations(variance, clip, eta):
    """The sample by algorithms 1 and 2 of Dhariwal and Nichol, float64 numpy, the gradient written out."""
    abar_all = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    kept = [round(k * 999 / 24) for k in range(25)] if eta is None else list(range(0, 1000, 40))
    abar = abar_all[kept]
    before = np.append(1.0, abar[:-1])
    beta = 1 - abar / before
    posterior = beta * (1 - before) / (1 - abar)
    z, noise = draws()
    x = z.double().numpy()
    weight, bias = WEIGHT.double().numpy(), BIAS.double().numpy()
    for k, (step, t) in zip(range(STEPS), reversed(list(enumerate(kept))), strict=True):
        eps, v = 0.1 * x + 0.001 * t, np.tanh(x)
        logits = x.reshape(2, -1) @ weight.T + bias * t / 250
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        gradient = SCALE * (weight[LABELS.numpy()] - p @ weight).reshape(SHAPE)
        a, b = abar[step], before[step]
        x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        x0 = np.clip(x0, -1, 1) if clip else x0
        drawn = noise[k].double().numpy()
        if eta is None:
            mean = (np.sqrt(b) * beta[step] * x0 + np.sqrt(1 - beta[step]) * (1 - b) * x) / (1 - a)
            spread = np.full(SHAPE, posterior[step])
            if variance == "learned-range":
                low = posterior[max(step, 1)]
                spread = np.exp((v + 1) / 2 * np.log(beta[step]) + (1 - v) / 2 * np.log(low))
            x = mean + spread * gradient + (np.sqrt(spread) * drawn if step else 0)
        else:
            eps = (x - np.sqrt(a) * x0) / np.sqrt(1 - a) - np.sqrt(1 - a) * gradient
            x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
            sigma = eta * np.sqrt(posterior[step])
            x = np.sqrt(b) * x0 + np.sqrt(1 - b - sigma**2) * eps + sigma * drawn
    return x


@pytest.mark.parametrize("case", GOLDENS, ids=str)
def test_guided_samples(case):
    """The largest difference seen from the public code is 3e-6 of the largest pixel, from the equations 2e-6."""
    variance, clip, eta = case
    predict = toy_network if variance == "learned-range" else toy_epsilon
    z, noise = draws()
    plan = make_plan(*case)
    out = sample_loop(predict, plan, z, lambda k: noise[k], guide=classifier_guide(toy_classifier, LABELS, SCALE))
    assert out.dtype == torch.float32 and out.shape == SHAPE and not out.requires_grad
    largest = out.abs().max().item()
    mean, std, last = GOLDENS[case]
    wide = out.double()
    assert wide.mean().item() == pytest.approx(mean, abs=1e-5 * largest)
    assert wide.std().item() == pytest.approx(std, abs=1e-5 * largest)
    np.testing.assert_allclose(out[1, 2, -1, -3:].numpy(), last, rtol=0, atol=1e-5 * largest)
    np.testing.assert_allclose(out.numpy(), equations(*case), rtol=0, atol=1e-5 * largest)
    plain = sample_loop(predict, plan, z, lambda k: noise[k])
    assert (out - plain).abs().max() > 0.02 * largest  # guidance is more than the tolerance


@pytest.mark.parametrize("eta", [None, 0.0])
def test_the_classifier_sees_what_the_network_sees(eta):
    """The gradient is taken at x_t and the original timestep, after the network's call, without a gradient to it."""
    calls = []
    z, noise = draws()

    def network(x, t, row):
        calls.append(("network", x.clone(), t.clone()))
        return toy_network(x, t)

    def classifier(x, t):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert x.requires_grad and x.dtype == torch.float32 and t.dtype == torch.int64
        calls.append(("classifier", x.detach().clone(), t.clone()))
        return toy_classifier(x, t)

    plan = make_plan("learned-range", True, eta)
    sample_loop(network, plan, z, lambda k: noise[k], guide=classifier_guide(classifier, LABELS, SCALE))
    assert [name for name, *_ in calls] == ["network", "classifier"] * STEPS
    for k in range(STEPS):
        (_, x, t), (_, seen, at) = calls[2 * k : 2 * k + 2]
        assert torch.equal(x, seen) and torch.equal(t, at)
        assert t.tolist() == [plan.network_times[k]] * 2


@pytest.mark.parametrize("v", [-1.0, 0.0, 1.0, None])
def test_the_last_step_is_shifted_by_its_variance(v):
    """Learned: between the clipped posterior variance and beta, not 0; fixed-small: 0, because the last step adds no noise."""
    z, noise = draws()
    plan = ddpm_plan(LINEAR, STEPS, variance="fixed-small" if v is None else "learned-range")

    def network(x, t, row):
        return torch.zeros_like(x) if v is None else torch.cat([torch.zeros_like(x), torch.full_like(x, v)], dim=1)

    def last(x, t):
        return torch.full_like(x, 1e6 if t[0] == 0 else 0.0)

    x = z / 100  # keeps the images small, for x0 = x / sqrt(abar)
    plain, shifted = (sample_loop(network, plan, x, lambda k: 0.01 * noise[k], guide=guide) for guide in (None, last))
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[[0, round(999 / 24)]]
    low, high = (1 - abar[1] / abar[0]) * (1 - abar[0]) / (1 - abar[1]), 1 - abar[0]
    expected = 0.0 if v is None else math.exp((v + 1) / 2 * math.log(high) + (1 - v) / 2 * math.log(low)) * 1e6
    np.testing.assert_allclose((shifted - plain).numpy(), expected, rtol=1e-4)


def test_ddim_clamps_before_guidance():
    """One step to abar = 1: the result is the predicted image, clamped to 1 and then shifted."""
    z = torch.full((1, 1, 2, 2), 3.0)
    plan = ddim_plan(LINEAR, 1, clip_denoised=True)
    abar = float(LINEAR.abar[plan.network_times[0]])
    out = sample_loop(
        lambda x, t, row: torch.zeros_like(x), plan, z, lambda k: z, guide=lambda x, t: torch.full_like(x, 400.0)
    )
    np.testing.assert_allclose(out.numpy(), 1 + 400 * (1 - abar) / math.sqrt(abar), rtol=1e-6)
    assert out.min() > 1.03


MEANS, STD = (-0.6, 0.7), 0.3  # two classes of one pixel, equally likely


def exact(x, t):
    """(mean of x_t in each class (N, 2), variance of x_t (N, 1), its log density up to a constant (N, 2), abar)."""
    abar = torch.from_numpy(LINEAR.abar.copy())[t][:, None]
    mean, variance = abar.sqrt() * torch.tensor([MEANS], dtype=torch.float64), abar * STD**2 + 1 - abar
    return mean, variance, -((x.flatten(1).double() - mean) ** 2) / (2 * variance), abar


def exact_network(v):
    """Epsilon of the mixture of both classes; v: the constant of the variance channel."""

    def predict(x, t, row):
        mean, variance, density, abar = exact(x, t)
        score = (density.softmax(dim=1) * (mean - x.flatten(1)) / variance).sum(dim=1, keepdim=True)
        eps = -(1 - abar).sqrt() * score  # (N, 1)
        return torch.stack([eps, torch.full_like(eps, v)], dim=1)[..., None].float()

    return predict


@pytest.mark.parametrize(
    "plan",
    [
        ddpm_plan(LINEAR, 1000),
        ddpm_plan(LINEAR, 1000, variance="fixed-small"),
        ddim_plan(LINEAR, 1000),
    ],
    ids=["ddpm-learned", "ddpm-small", "ddim"],
)
def test_an_exact_classifier_makes_the_mixture_its_class(plan):
    """Bayes: the score of p(x) plus the gradient of log p(y | x) is the score of p(x | y)."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(8192, 1, 1, 1, generator=generator)
    y = torch.arange(len(x)) % 2
    guide = classifier_guide(lambda x, t: exact(x, t)[2], y, 1.0)
    predict = exact_network(1.0)
    out = sample_loop(predict, plan, x, lambda k: torch.randn(x.shape, generator=generator), guide=guide).flatten()
    for label, mean in enumerate(MEANS):
        drawn = out[y == label].double()  # 4096: standard errors 0.005 of the mean and 0.0033 of the std
        assert drawn.mean().item() == pytest.approx(mean, abs=0.015)
        assert drawn.std().item() == pytest.approx(STD, abs=0.012)


def test_scale_multiplies_the_gradient_of_each_image_alone():
    x, t = torch.randn(SHAPE, generator=torch.Generator().manual_seed(8)), torch.tensor([500, 500])
    one = classifier_guide(toy_classifier, LABELS, 1.0)(x, t)
    assert one.shape == SHAPE and one.dtype == torch.float32
    torch.testing.assert_close(classifier_guide(toy_classifier, LABELS, -3.0)(x, t), -3 * one)
    assert classifier_guide(toy_classifier, LABELS, 0.0)(x, t).abs().max() == 0
    for i in range(2):
        alone = classifier_guide(toy_classifier, LABELS[i : i + 1], 1.0)(x[i : i + 1], t[:1])
        torch.testing.assert_close(alone, one[i : i + 1])
    half = classifier_guide(lambda x, t: toy_classifier(x, t).bfloat16(), LABELS, 1.0)(x, t)
    torch.testing.assert_close(half, one, rtol=0.1, atol=0.02)  # bfloat16 logits, float32 softmax
    for scale in (math.nan, math.inf):
        with pytest.raises(UserError, match="classifier scale .* is not a finite number"):
            classifier_guide(toy_classifier, LABELS, scale)
