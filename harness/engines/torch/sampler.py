"""A sampler plan applied in torch, with classifier-free guidance or guidance by a classifier of noised images."""

from __future__ import annotations

from collections.abc import Callable

import torch

from harness.diffusion.plans import SamplerPlan
from harness.engines.guidance import (
    check_channels,
    check_classifier_scale,
    check_guidance,
    divergence_error,
    guided_channels,
)

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x (N, C, H, W), t (N,)) -> (N, C or 2 C, H, W)
Guide = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x (N, C, H, W), t (N,)) -> (N, C, H, W)
CHECK_EVERY_STEPS = 50  # whether x is finite: a check waits for the accelerator


@torch.inference_mode()
def sample_loop(
    predict: Predict,
    plan: SamplerPlan,
    x: torch.Tensor,  # float32 (N, C, H, W): the initial noise
    noise: Callable[[int], torch.Tensor],  # plan step k -> float32 (N, C, H, W); called where the plan adds noise
    progress: Callable[[int, int], None] | None = None,  # called with (steps done, steps)
    guide: Guide | None = None,  # returns the scaled gradient of a log likelihood with respect to x
) -> torch.Tensor:
    """Run the plan and return x_0, an inference tensor float32 (N, C, H, W). `x` is not changed.

    A guide shifts the mean of a DDPM step by its variance times the gradient, and epsilon of a DDIM step by
    -sqrt(1 - abar) times the gradient (Dhariwal and Nichol 2021, algorithms 1 and 2). As in the public code, the predicted
    image of a DDIM step is clamped before that and not after.

    Everything but the network is float32. Raises UserError where the network's channels do not fit the plan, and RunError
    with the step where x is infinite or NaN (checked every 50 steps and at the end).
    """
    x = x.float()
    samples, channels = x.shape[:2]
    for k in range(plan.steps):
        t = torch.full((samples,), int(plan.timesteps[k]), dtype=torch.int64, device=x.device)  # (N,)
        out = predict(x, t).float()  # (N, C or 2 C, H, W)
        if k == 0:
            check_channels(plan, out.shape[1], channels)
        x0 = float(plan.x0_from_x[k]) * x - float(plan.x0_from_eps[k]) * out[:, :channels]
        if plan.clip_denoised:
            x0.clamp_(-1.0, 1.0)
        gradient = None if guide is None else guide(x, t)  # (N, C, H, W)
        if gradient is not None and plan.eta is not None:  # DDIM; eta is None for DDPM
            # x0 contains -x0_from_eps eps, and eps is shifted by -sqrt(1 - abar) gradient. The factor is x0_from_eps ** 2 /
            # x0_from_x, because abar = 1 / x0_from_x ** 2 and 1 / abar - 1 = x0_from_eps ** 2.
            x0 = x0 + float(plan.x0_from_eps[k] ** 2 / plan.x0_from_x[k]) * gradient
        x = float(plan.mean_from_x0[k]) * x0 + float(plan.mean_from_x[k]) * x  # the mean of the step
        mean_gradient = gradient if plan.eta is None else None  # of DDPM, which shifts the mean; DDIM has shifted x0
        std: torch.Tensor | float
        if plan.learned_variance and (plan.adds_noise[k] or mean_gradient is not None):
            frac = (out[:, channels:] + 1) / 2  # (N, C, H, W)
            log_variance = frac * float(plan.log_variance_high[k]) + (1 - frac) * float(plan.log_variance_low[k])
            std = torch.exp(0.5 * log_variance)  # (N, C, H, W)
        else:
            std = float(plan.noise_std[k])
        if mean_gradient is not None:
            x = x + std**2 * mean_gradient
        if plan.adds_noise[k]:
            x = x + std * noise(k)
        done = k + 1
        if (done % CHECK_EVERY_STEPS == 0 or done == plan.steps) and not torch.isfinite(x).all():
            raise divergence_error(plan, done)
        if progress is not None:
            progress(done, plan.steps)
    return x


def guided(
    net: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],  # (x, t, y) -> (N, C or 2 C, H, W)
    y: torch.Tensor,  # int64 (N,): labels
    scale: float,  # 1 is no guidance: one evaluation, no doubled batch
    channels: str,  # a key of `harness.engines.guidance.GUIDED_CHANNELS`
    null_label: int | None,  # label index of "no class"; None: the network was trained without label dropout
) -> Predict:
    """A `predict` for `sample_loop` with classifier-free guidance: eps = eps_uncond + scale (eps_cond - eps_uncond).

    Each step calls the network once, on the doubled batch [conditional; unconditional]. Epsilon channels outside the rule
    and all variance channels stay conditional. Images of fewer than 3 channels are guided in all of them. Raises UserError
    for guidance without a null label, an unknown channel rule and a scale that is not finite.
    """
    check_guidance(scale, channels, null_label)
    if scale == 1.0:
        return lambda x, t: net(x, t, y)
    assert null_label is not None  # or check_guidance had raised
    labels = torch.cat([y, torch.full_like(y, null_label)])  # (2 N,)

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out = net(torch.cat([x, x]), torch.cat([t, t]), labels)  # (2 N, C or 2 C, H, W)
        conditional, unconditional = out.float().chunk(2)  # (N, C or 2 C, H, W) each
        count = guided_channels(channels, x.shape[1])
        result = conditional.clone()
        result[:, :count] = unconditional[:, :count] + scale * (conditional[:, :count] - unconditional[:, :count])
        return result

    return predict


def classifier_guide(
    classifier: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],  # (x, t) -> logits (N, num_classes)
    y: torch.Tensor,  # int64 (N,)
    scale: float,
) -> Guide:
    """A guide for `sample_loop`: scale x the gradient of log p(y | x, t) with respect to x.

    Dhariwal and Nichol 2021, sec. 4.
    """
    check_classifier_scale(scale)

    def guide(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            # Autograd cannot use the tensors of `sample_loop`, which are made in inference mode; their clones are ordinary.
            x = x.clone().requires_grad_(True)  # (N, C, H, W)
            log_probs = classifier(x, t.clone()).float().log_softmax(dim=-1)  # (N, num_classes)
            # The sum over the batch: images are independent, so each gets its own gradient.
            log_likelihood = log_probs.gather(1, y.clone()[:, None]).sum()
            (gradient,) = torch.autograd.grad(log_likelihood, x)
        return gradient.float() * scale  # (N, C, H, W)

    return guide
