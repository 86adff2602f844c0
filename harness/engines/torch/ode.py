"""The adaptive sampler in torch: each image with steps of its own, and the network called on those that are not done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from harness.diffusion import adaptive
from harness.diffusion.adaptive import AdaptivePlan, Segment
from harness.engines.guidance import check_channels, stuck_error

# (x (n, C, H, W) as the network sees it, time (n,), positions of the images in the batch int64 (n,), with guidance)
# -> (n, C or 2 C, H, W)
Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]


@torch.inference_mode()
def solve(
    predict: Predict,
    plan: AdaptivePlan,
    segments: Sequence[Segment],  # of the plan
    x: torch.Tensor,  # float32 (N, C, H, W): the initial noise, standard normal
    progress: Callable[[float], None] = lambda share: None,  # called with the share of t that all images are through
) -> tuple[torch.Tensor, np.ndarray]:
    """(x_0 float32 (N, C, H, W), an inference tensor; the network evaluations of each image, int64 (N,)).

    Everything but the network is float32. Raises UserError where the network's channels do not fit, and RunError where an
    image makes no progress, for example because values are not finite.
    """
    images, channels = x.shape[:2]
    device = x.device
    weights, error_weights = (
        torch.from_numpy(each).to(device, torch.float32)
        for each in (adaptive.STAGE_WEIGHTS, adaptive.ERROR_WEIGHTS)
    )  # fmt: skip
    x = plan.initial_noise * x.float()
    counts = np.zeros(images, np.int64)
    everyone = torch.arange(images, device=device)

    def output_at(x: torch.Tensor, t: torch.Tensor, which: torch.Tensor, is_guided: bool) -> torch.Tensor:
        counts[which.cpu().numpy()] += 2 if is_guided else 1
        out = predict(*plan.network_inputs(x, t, torch), which, is_guided).float()
        check_channels(plan, out.shape[1], channels)
        return out[:, :channels]

    step: torch.Tensor | None = None  # (N,): size of the next step
    for segment in segments:

        def slope(
            x: torch.Tensor, t: torch.Tensor, which: torch.Tensor = everyone, is_guided: bool = segment.is_guided
        ) -> torch.Tensor:
            return plan.slope(x, output_at(x, t, which, is_guided), t, torch)

        end = segment.end
        t = torch.full((images,), segment.begin, dtype=torch.float32, device=device)
        k = slope(x, t)
        if step is None:
            step = adaptive.first_step(slope, x, k, t, end, torch)
        active, attempts = everyone, 0
        while len(active):
            x_0, t_0, proposed = x[active], t[active], step[active]
            is_last = proposed >= t_0 - end
            tried = torch.where(is_last, t_0 - end, proposed)
            t_1 = torch.where(is_last, end, t_0 - tried)
            slopes = torch.zeros((adaptive.STAGES, *x_0.shape), device=device)
            slopes[0], after = k[active], x_0
            for i in range(1, adaptive.STAGES):
                share = float(adaptive.STAGE_TIMES[i])
                after = adaptive.stage_state(x_0, slopes, weights[i], -tried)
                slopes[i] = slope(after, t_1 if share == 1 else t_0 - share * tried, active)
            accepted, new_step = adaptive.judged(x_0, after, slopes, error_weights, tried, proposed, torch)
            moved = active[accepted]
            x[moved], k[moved], t[moved] = after[accepted], slopes[-1][accepted], t_1[accepted]
            step[active] = new_step
            attempts += 1
            if adaptive.is_stuck(t.cpu().numpy(), end, step.cpu().numpy(), attempts):
                raise stuck_error(plan, float(t.max()))
            progress((plan.begin - float(t.max())) / (plan.begin - plan.end))
            active = torch.nonzero(t > end).flatten()
    if plan.has_last_step:
        t = torch.full((images,), plan.end, dtype=torch.float32, device=device)
        x = plan.image(x, output_at(x, t, everyone, segments[-1].is_guided), t, torch)
    return x, counts
