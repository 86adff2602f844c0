"""A sampler plan applied in torch, with guidance: classifier-free, of a package's rule, by a weaker network, by a classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import torch

from harness.diffusion.guidance import extrapolated
from harness.diffusion.plans import SamplerPlan
from harness.diffusion.solvers import BASE, D, X
from harness.engines.guidance import (
    check_channels,
    check_classifier_scale,
    check_guidance,
    check_guided_image,
    divergence_error,
    guided_channels,
)
from harness.frameworks.torch_transfer import HostCopy

# (x (N, C, H, W), t (N,), plan row) -> (N, C or 2 C, H, W)
Predict = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
Guide = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x (N, C, H, W), t (N,)) -> (N, C, H, W)
# (D, x, plan row) -> the guided D, each (N, C, H, W) and not yet clamped
ImageGuidance = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
# (conditional, unconditional, scale, sigma, torch) -> guided, as in `harness.diffusion.guidance_rules.GuidanceRule`
Combine = Callable[[torch.Tensor, torch.Tensor | None, float, float, ModuleType], torch.Tensor]
CHECK_EVERY_ROWS = 50  # whether x is finite


@torch.inference_mode()
def sample_loop(
    predict: Predict,
    plan: SamplerPlan,
    x: torch.Tensor,  # float32 (N, C, H, W): the initial noise, standard normal
    noise: Callable[[int], torch.Tensor],  # plan row k -> float32 (N, C, H, W); called where the plan adds noise
    progress: Callable[[int, int], None] | None = None,  # called with (rows done, rows)
    guide: Guide | None = None,  # returns the scaled gradient of a log likelihood with respect to x
    watch: Callable[[int, torch.Tensor], None] | None = None,  # called with (row, D of that row (N, C, H, W))
    image_guidance: ImageGuidance | None = None,  # applied to D before it is clamped
) -> torch.Tensor:
    """Run the plan and return x_0, an inference tensor float32 (N, C, H, W). `x` is not changed.

    A guide shifts the mean of a DDPM step by its variance times the gradient, and epsilon of other samplers by
    -s times the gradient (Dhariwal and Nichol 2021, algorithms 1 and 2). As in the public code, the predicted image is
    clamped before that and not after.

    Everything but the network is float32. Raises UserError where the network's channels do not fit the plan, and RunError
    with the row where x is infinite or NaN (checked every 50 rows and at the end). The result of a check is looked at one
    row later, except at the end, so that a GPU has work while the host waits for it.
    """
    table = plan.table
    x = x.float()
    if table.initial_noise != 1.0:
        x = table.initial_noise * x
    channels = x.shape[1]
    base: torch.Tensor | None = None  # until a row makes one
    check: tuple[int, HostCopy] | None = None  # (rows done, whether x was finite then), not yet looked at
    images: list[torch.Tensor] = []  # predicted by the last rows, newest first: (N, C, H, W) each
    for k in range(plan.evaluations):
        x0, out, t = _predicted(predict, plan, x, k)
        if image_guidance is not None:
            x0 = image_guidance(x0, x, k)
        if plan.clip_denoised:
            x0.clamp_(-1.0, 1.0)
        gradient = None if guide is None else guide(x, t)  # (N, C, H, W)
        if gradient is not None and not table.shifts_mean:
            # x0 contains -(s / a) eps, and eps is shifted by -s gradient.
            x0 = x0 + float(plan.x0_from_gradient[k]) * gradient
        if watch is not None:
            watch(k, x0)
        images = [x0, *images][: table.x_from.shape[1] - D]
        states = [x, base, *images]
        x, base = _combined(table.x_from[k], states), _combined_base(table.base_from[k], states)
        mean_gradient = gradient if table.shifts_mean else None  # of DDPM; for others x0 is shifted already
        std: torch.Tensor | float
        if table.log_variances is not None and (plan.adds_noise[k] or mean_gradient is not None):
            low, high = table.log_variances
            frac = (out[:, channels:] + 1) / 2  # (N, C, H, W)
            log_variance = frac * float(high[k]) + (1 - frac) * float(low[k])
            std = torch.exp(0.5 * log_variance)  # (N, C, H, W)
        else:
            std = float(table.noise_to_x[k])
        if mean_gradient is not None:
            x = x + std**2 * mean_gradient
        if plan.adds_noise[k]:
            n = noise(k)  # (N, C, H, W)
            if table.noise_to_x[k]:
                x = x + std * n
            if table.noise_to_base[k]:
                assert base is not None
                base = base + float(table.noise_to_base[k]) * n
        done, checks = k + 1, [check] if check is not None else []
        check = None
        if done % CHECK_EVERY_ROWS == 0 or done == plan.evaluations:
            check = done, HostCopy(torch.isfinite(x).all())
            if done == plan.evaluations:
                checks.append(check)
        for row, finite in checks:
            if not finite.wait():
                raise divergence_error(plan, row)
        if progress is not None:
            progress(done, plan.evaluations)
    return x


def _predicted(
    predict: Predict, plan: SamplerPlan, x: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(D (N, C, H, W) not yet clamped, the network's output (N, C or 2 C, H, W), its time (N,) or (N, 2)) at row k of the plan."""
    samples, channels = x.shape[:2]
    if plan.network_times.ndim == 2:
        columns = [torch.full((samples,), float(each), device=x.device) for each in plan.network_times[k]]
        t = torch.stack(columns, dim=1)
    elif plan.network_times.dtype == np.int64:
        t = torch.full((samples,), int(plan.network_times[k]), dtype=torch.int64, device=x.device)
    else:
        t = torch.full((samples,), float(plan.network_times[k]), dtype=torch.float32, device=x.device)
    seen = x if plan.input_scale is None else float(plan.input_scale[k]) * x
    out = predict(seen, t, k).float()
    check_channels(plan, out.shape[1], channels)
    return float(plan.x0_from_x[k]) * x - float(plan.x0_from_output[k]) * out[:, :channels], out, t


def _combined(coefficients: np.ndarray, states: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The sum of a row's coefficients (x, base, D, D', ...) times these states: the image D first, then x, then others."""
    x, image = states[X], states[D]
    assert x is not None and image is not None
    result = float(coefficients[D]) * image + float(coefficients[X]) * x
    for column in (BASE, *range(D + 1, len(states))):
        state = states[column]
        if coefficients[column]:
            assert state is not None
            result = result + float(coefficients[column]) * state
    return result


def _combined_base(coefficients: np.ndarray, states: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """As `_combined`; None where the row keeps no base."""
    return _combined(coefficients, states) if coefficients.any() else None


def guided(
    net: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],  # (x, t, y) -> (N, C or 2 C, H, W)
    y: torch.Tensor,  # int64 (N,): labels
    scale: float,  # 1 is no guidance: one evaluation, no doubled batch
    channels: str,  # a key of `harness.engines.guidance.GUIDED_CHANNELS`
    null_label: int | None,  # label index of "no class"; None: the network was trained without label dropout
    rows: np.ndarray | None = None,  # bool (E,): the plan rows with guidance; None: all
) -> Predict:
    """A `predict` for `sample_loop` with classifier-free guidance: eps = eps_uncond + scale (eps_cond - eps_uncond).

    A row with guidance calls the network once, on the doubled batch [conditional; unconditional]; other rows call it on
    the conditional half alone. Epsilon channels outside the rule and all variance channels stay conditional. Images of
    fewer than 3 channels are guided in all of them. Raises UserError for guidance without a null label, an unknown
    channel rule and a scale that is not finite.
    """
    check_guidance(scale, channels, null_label)
    if scale == 1.0:
        return lambda x, t, row: net(x, t, y)
    assert null_label is not None  # or check_guidance had raised
    labels = torch.cat([y, torch.full_like(y, null_label)])  # (2 N,)

    def predict(x: torch.Tensor, t: torch.Tensor, row: int) -> torch.Tensor:
        if rows is not None and not rows[row]:
            return net(x, t, y)
        out = net(torch.cat([x, x]), torch.cat([t, t]), labels)  # (2 N, C or 2 C, H, W)
        conditional, unconditional = out.float().chunk(2)  # (N, C or 2 C, H, W) each
        count = guided_channels(channels, x.shape[1])
        result = conditional.clone()
        result[:, :count] = extrapolated(conditional[:, :count], unconditional[:, :count], scale)
        return result

    return predict


def guided_image(
    reference: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,  # (x, t) -> (N, C or 2 C, H, W)
    plan: SamplerPlan,  # of the reference's kind of prediction, with the rows of the loop's
    scale: float,
    combine: Combine,
    rows: np.ndarray,  # bool (E,): the plan rows with guidance
    channels: str = "all",  # a key of `harness.engines.guidance.GUIDED_CHANNELS`; others keep the D of the network
) -> ImageGuidance:
    """An image guidance for `sample_loop`: in guided rows `combine` gets D and the D that the reference predicts from x.

    For autoguidance the reference is a weaker network, given the same x, t and labels (Karras et al. 2024,
    arXiv:2406.02507); it may have another objective, on the same process. For a rule of a package it is the network
    itself without a label; None: the rule has one evaluation. Unguided rows do not evaluate the reference.

    With `extrapolated` and two networks of one kind of prediction, this is extrapolation of their outputs up to rounding:
    D is linear in the output, with coefficients that the row alone decides.
    """

    def guide(x0: torch.Tensor, x: torch.Tensor, k: int) -> torch.Tensor:
        if not rows[k]:
            return x0
        count = guided_channels(channels, x.shape[1])
        other = None
        if reference is not None:
            other = _predicted(lambda x, t, row: reference(x, t), plan, x, k)[0][:, :count]
        result = combine(x0[:, :count], other, scale, float(plan.sigma[k]), torch).float()
        check_guided_image(result.shape, x0[:, :count].shape)
        return result if count == x.shape[1] else torch.cat([result, x0[:, count:]], dim=1)

    return guide


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
