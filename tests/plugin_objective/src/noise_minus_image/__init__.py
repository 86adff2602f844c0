"""A prediction and a sampler of one's own: plain arithmetic and one table, for torch and JAX alike."""

import numpy as np

from harness.diffusion.objectives import Objective, Target
from harness.diffusion.samplers import SamplerOption, SamplerSpec

# u = eps - x_0 / 2: any target that is linear in image and noise, unless it is a multiple of x_t itself
OBJECTIVE = Objective(name="noise-minus-image", target=lambda at, xp: Target(-0.5, 1.0))


def restarted(task):
    """Each step predicts the image, and noises it to the next level: x <- a' D + s' (sqrt(1 - f^2) eps^ + f n).

    f: the option `fresh`, the share of new noise n beside that in the state, eps^ = (x - a D) / s.
    """
    from harness.diffusion.solvers import SamplerTable

    grid = task.nodes()
    rows = len(grid)
    x_from, nothing = np.zeros((rows, 3)), np.zeros(rows)
    fresh = task.options["fresh"]
    kept = grid.s[1:] * np.sqrt(1 - fresh**2) / grid.s[:-1]
    x_from[:, 0], x_from[:, 2] = kept, grid.a[1:] - kept * grid.a[:-1]  # columns: x, base, D
    return SamplerTable(
        times=grid.times[:-1],
        a=grid.a[:-1],
        s=grid.s[:-1],
        x_from=x_from,
        base_from=np.zeros((rows, 3)),
        noise_to_x=fresh * grid.s[1:],
        noise_to_base=nothing,
        initial_noise=float(grid.s[0]),
    )


SAMPLER = SamplerSpec(
    name="restarted",
    summary="noises the predicted image anew at each step",
    make=restarted,
    options=(SamplerOption(name="fresh", default=1.0, low=0.0, high=1.0),),
)
