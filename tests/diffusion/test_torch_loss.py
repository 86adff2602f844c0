"""The training loss in torch against the public DiT code's figures, and its gradients."""

import math

import numpy as np
import pytest
import torch

from harness.diffusion.objectives import OBJECTIVES
from harness.diffusion.schedule import Schedule
from harness.diffusion.training import TrainingObjective
from harness.engines.torch.loss import DenoisingLoss, LossTables, hybrid_loss
from harness.protocols import Recipe

TABLES = LossTables(Schedule.named("linear"))
HYBRID_LOSS = DenoisingLoss(TrainingObjective.from_recipe(Recipe()))
FIXED_LOSS = DenoisingLoss(TrainingObjective.from_recipe(Recipe(objective="epsilon-fixed")))
HYBRID = OBJECTIVES["epsilon-learned-range"]


def toy_network(x, t):
    """cat[0.1 x + 0.001 t, tanh x]: the network of the golden figures."""
    return torch.cat([0.1 * x + 0.001 * t.float()[:, None, None, None], torch.tanh(x)], dim=1)


def test_golden():
    torch.manual_seed(1)
    x0 = torch.randn(4, 4, 8, 8)
    t = torch.tensor([0, 1, 500, 999])
    noise = torch.randn_like(x0)
    terms = HYBRID_LOSS.terms(toy_network(HYBRID_LOSS.noised(x0, t, noise), t), x0, t, noise)
    for term, golden in (
        (terms.mse, [1.1095242500, 0.9403723478, 1.1909056902, 1.8073136806]),
        (terms.vb, [2.0801875591, 0.6391848922, 0.0094727874, 0.0266072340]),
    ):
        assert term.dtype == torch.float32 and term.shape == (4,)
        # The figures are the public code's in float32; at t = 0 it cancels and lies 2e-6 off float64's 2.0801834926.
        np.testing.assert_allclose(term.numpy(), golden, rtol=5e-6)
    assert terms.vb[0].item() == pytest.approx(2.0801834926, rel=5e-7)


def test_q_sample_moments():
    x0 = torch.full((1000, 1, 1, 1), 0.5)
    noise = torch.randn(1000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    for t, abar in ((0, 0.9999), (999, 4.035829765375676e-05)):
        x = HYBRID_LOSS.noised(x0, torch.full((1000,), t), noise)
        assert x.dtype == torch.float32 and x.shape == x0.shape
        torch.testing.assert_close(x, math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noise, rtol=1e-6, atol=1e-6)


def make_batch(channels_out):
    generator = torch.Generator().manual_seed(2)
    x0, noise = (torch.randn(4, 3, 4, 4, generator=generator) for _ in range(2))
    output = torch.randn(4, channels_out, 4, 4, generator=generator).requires_grad_()
    return output, x0, torch.tensor([0, 3, 400, 999]), noise


def test_bound_teaches_only_the_variance():
    output, x0, t, noise = make_batch(6)
    hybrid_loss(TABLES, output, x0, t, noise).vb.sum().backward()
    assert output.grad[:, :3].abs().max() == 0
    assert (output.grad[:, 3:].abs() > 0).all()
    output.grad = None
    hybrid_loss(TABLES, output, x0, t, noise).mse.sum().backward()
    torch.testing.assert_close(output.grad[:, :3], 2 * (output.detach()[:, :3] - noise) / (3 * 4 * 4))
    assert output.grad[:, 3:].abs().max() == 0


def test_kl_is_the_divergence_of_two_gaussians():
    """In float64 from the means, which the loss never computes."""
    output, x0, t, noise = make_batch(6)
    schedule = Schedule.named("linear").respaced()
    vb = hybrid_loss(TABLES, output, x0, t, noise).vb
    at = {name: torch.from_numpy(getattr(schedule, name).copy())[t][:, None, None, None] for name in (
        "sqrt_abar", "sqrt_one_minus_abar", "sqrt_recip_abar", "sqrt_recipm1_abar", "posterior_mean_from_x0",
        "posterior_mean_from_xt", "posterior_log_variance_clipped", "log_betas")}  # fmt: skip
    xt = at["sqrt_abar"] * x0 + at["sqrt_one_minus_abar"] * noise
    estimate = at["sqrt_recip_abar"] * xt - at["sqrt_recipm1_abar"] * output[:, :3].detach()
    frac = (output[:, 3:].detach().double() + 1) / 2
    variance = torch.exp(frac * at["log_betas"] + (1 - frac) * at["posterior_log_variance_clipped"])
    means = [at["posterior_mean_from_x0"] * x + at["posterior_mean_from_xt"] * xt for x in (x0, estimate)]
    true = torch.distributions.Normal(means[0], torch.exp(at["posterior_log_variance_clipped"] / 2))
    kl = torch.distributions.kl_divergence(true, torch.distributions.Normal(means[1], variance.sqrt()))
    np.testing.assert_allclose(vb[1:].detach(), kl.mean(dim=(1, 2, 3))[1:] / math.log(2), rtol=1e-5)


@pytest.mark.parametrize("level", [0, 3, 128, 255])
def test_likelihood_of_a_pixel_at_step_0(level):
    """Against the exact normal cumulative distribution; the code's tanh form is within 1e-3 of it."""
    x0 = torch.full((1, 1, 1, 1), level / 127.5 - 1)
    noise = torch.zeros_like(x0)
    eps, v = 0.4, 0.2
    output = torch.tensor([eps, v]).reshape(1, 2, 1, 1)
    schedule = Schedule.named("linear").respaced()
    frac = (v + 1) / 2
    std = math.exp((frac * schedule.log_betas[0] + (1 - frac) * schedule.posterior_log_variance_clipped[0]) / 2)
    normal = torch.distributions.Normal(0.0, std)
    centred = float(schedule.sqrt_recipm1_abar[0]) * eps  # x0 - mean
    above = normal.cdf(torch.tensor(centred + 1 / 255)) if level < 255 else torch.tensor(1.0)
    below = normal.cdf(torch.tensor(centred - 1 / 255)) if level > 0 else torch.tensor(0.0)
    vb = hybrid_loss(TABLES, output, x0, torch.tensor([0]), noise).vb
    assert vb.item() == pytest.approx(-math.log2(above - below), abs=3e-3)


def test_fixed_variance_has_no_bound():
    output, x0, t, noise = make_batch(3)
    terms = FIXED_LOSS.terms(output, x0, t, noise)
    torch.testing.assert_close(terms.mse, (output - noise).square().mean(dim=(1, 2, 3)))
    assert terms.vb.dtype == torch.float32 and terms.vb.tolist() == [0.0] * 4


def test_half_precision_output_gives_a_float32_loss():
    output, x0, t, noise = make_batch(6)
    terms = HYBRID_LOSS.terms(output.bfloat16(), x0, t, noise)
    exact = HYBRID_LOSS.terms(output.bfloat16().float(), x0, t, noise)
    assert terms.mse.dtype == terms.vb.dtype == torch.float32
    assert torch.equal(terms.mse, exact.mse) and torch.equal(terms.vb, exact.vb)


def test_wrong_channels():
    output, x0, t, noise = make_batch(3)
    with pytest.raises(AssertionError):
        HYBRID_LOSS.terms(output, x0, t, noise)
