"""The training loss in jax against torch's and the public code's figures."""

import jax
import numpy as np
import pytest
import torch

from harness.diffusion.objectives import OBJECTIVES
from harness.diffusion.training import TrainingObjective
from harness.engines.jax.loss import DenoisingLoss
from harness.engines.torch.loss import DenoisingLoss as TorchDenoisingLoss
from harness.protocols import Recipe


def test_golden():
    torch.manual_seed(1)
    x0 = torch.randn(4, 4, 8, 8)
    t = np.array([0, 1, 500, 999], np.int32)
    noise = torch.randn_like(x0).numpy()
    x0 = x0.numpy()

    loss = DenoisingLoss(TrainingObjective.from_recipe(Recipe()))

    @jax.jit
    def terms(x0, t, noise):
        x = loss.noised(x0, t, noise)
        output = jax.numpy.concatenate([0.1 * x + 0.001 * t[:, None, None, None], jax.numpy.tanh(x)], axis=1)
        return loss.terms(output, x0, t, noise)

    found = terms(x0, t, noise)
    for term, golden in (
        (found.mse, [1.1095242500, 0.9403723478, 1.1909056902, 1.8073136806]),
        (found.vb, [2.0801875591, 0.6391848922, 0.0094727874, 0.0266072340]),
    ):
        assert term.dtype == np.float32 and term.shape == (4,)
        np.testing.assert_allclose(term, golden, rtol=5e-6)


@pytest.mark.parametrize("objective", ["epsilon-learned-range", "epsilon-fixed", "v", "x0"])
def test_terms_and_gradients_are_torchs(objective):
    """Pixels at the edges, bins of no probability, every kind of timestep."""
    generator = np.random.RandomState(0)
    x0 = np.clip(generator.standard_normal((6, 3, 4, 4)), -1, 1).astype(np.float32)
    noise = generator.standard_normal(x0.shape).astype(np.float32)
    t = np.array([0, 0, 1, 37, 500, 999])
    channels = OBJECTIVES[objective].out_channels(3)
    output = generator.standard_normal((6, channels, 4, 4)).astype(np.float32)
    output[0] *= 9  # far off: the probability of the bin is below its floor

    training = TrainingObjective.from_recipe(Recipe(objective=objective))
    given = torch.from_numpy(output).requires_grad_()
    rest = (torch.from_numpy(x0), torch.from_numpy(t), torch.from_numpy(noise))
    expected = TorchDenoisingLoss(training).terms(given, *rest)
    (2 * expected.mse + expected.vb).sum().backward()

    def total(output):
        terms = DenoisingLoss(training).terms(output, x0, t.astype(np.int32), noise)
        return (2 * terms.mse + terms.vb).sum(), terms

    gradient, terms = jax.jit(jax.grad(total, has_aux=True))(output)
    for mine, theirs in zip(terms, expected, strict=True):
        assert mine.dtype == np.float32
        theirs = theirs.detach().numpy()
        np.testing.assert_allclose(mine[t > 0], theirs[t > 0], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(mine[t == 0], theirs[t == 0], rtol=2e-4)  # a small difference of two large numbers
    expected, scale = given.grad.numpy(), given.grad.abs().max().item()
    np.testing.assert_allclose(gradient[t > 0], expected[t > 0], rtol=1e-4, atol=1e-6 * scale)
    np.testing.assert_allclose(gradient[t == 0], expected[t == 0], rtol=5e-3, atol=1e-6 * scale)
    assert np.isfinite(gradient).all()
