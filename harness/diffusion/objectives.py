"""Objectives: what a denoiser predicts and how its error is weighed, as plain arithmetic that numpy, torch and JAX share.

A network is trained to give the target u = from_x0 x_0 + from_noise eps. With x_t = a x_0 + s eps, both x_0 and eps then
follow from x_t and u by linear equations, so the two coefficients of the target are all that an objective has to state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from harness.diffusion.processes import Coefficients, Floats, Namespace
from harness.errors import UserError


class Target(NamedTuple):
    """u = from_x0 x_0 + from_noise eps. A coefficient that does not depend on t is a float; 0.0 and 1.0 cost nothing."""

    from_x0: Floats
    from_noise: Floats


def _epsilon(at: Coefficients, xp: Namespace) -> Target:
    return Target(0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class TwoTimes:
    """How an objective trains networks of two times, which predict the mean of the target from t to an earlier time r.

    Euler's step from t to r with such a prediction of the velocity is the whole step, however long it is, on schedules whose a
    and s are linear in t (flow, ve): others have to be named in `Objective.schedules`, by an objective whose target is made for
    the sampler's step there. At r = t the prediction is the objective's usual target.

    end_time: function of (t, one random number each in [0, 1), their module) -> r, 0 <= r <= t; arrays (N,).
    target: function of (net, x, t, r, u, module) -> what the network learns to predict at (x, t, r), (N, C, H, W). x is x_t and
    u the objective's usual target there, (N, C, H, W); t and r are (N, 1, 1, 1). net is a function of (x, t, r) -> the network's
    prediction (N, C, H, W), float32, for the same labels. The target has no gradient.
    evaluations: of the network in one call of `target`, on each image: training compute counts them beside the 3 of a step. A
    derivative in forward mode (jvp) counts as 2.
    """

    end_time: Callable[[Floats, Floats, Namespace], Floats]
    target: Callable[[Callable[[Floats, Floats, Floats], Floats], Floats, Floats, Floats, Floats, Namespace], Floats]
    evaluations: int


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A kind of prediction.

    target: function of (the coefficients of the process at t, the module of their arrays).
    input_scale: what x_t is multiplied with before the network sees it, a function of the same; None: nothing.
    margin: distance in t that is kept from an end of the process at which x_0 does not follow from x_t and u.
    schedules: names of the noise schedules that it is defined on; None: all that have what its target needs.
    network_time: what the network is given as time in continuous time, a function of (t, the module); None: the process's.
    two_times: for networks that are also given the time at which a step ends; None: the objective is for all others.
    """

    name: str
    learned_variance: bool = False  # True: hybrid loss mse + vb (Nichol & Dhariwal 2021, eq. 16); False: mse alone
    target: Callable[[Coefficients, Namespace], Target] = _epsilon
    input_scale: Callable[[Coefficients, Namespace], Floats] | None = None
    margin: float = 0.0
    schedules: tuple[str, ...] | None = None
    network_time: Callable[[Floats, Namespace], Floats] | None = None
    two_times: TwoTimes | None = None

    def __post_init__(self) -> None:
        if self.two_times is not None and self.learned_variance:
            raise UserError(f"objective {self.name!r}: a step from t to r has no variance; leave out learned_variance")

    def out_channels(self, in_channels: int) -> int:
        """Output channels of a network for inputs of `in_channels`: the prediction first, then the variance if learned."""
        return 2 * in_channels if self.learned_variance else in_channels


def image_from(at: Coefficients, target: Target) -> tuple[Floats, Floats]:
    """The coefficients (of x_t, of u) with which x_0 = from_x x_t + from_u u.

    Solves x_t = a x_0 + s eps and u = from_x0 x_0 + from_noise eps. Where the target holds no noise, u is x_0 itself up
    to a factor, also where s = 0.
    """
    if is_constant(target.from_noise, 0.0):
        return 0.0, 1.0 / target.from_x0
    determinant = at.a * target.from_noise - at.s * target.from_x0
    return target.from_noise / determinant, -at.s / determinant


def is_constant(coefficient: Floats, value: float) -> bool:
    """Whether a coefficient is this float; an array is not, whatever it holds."""
    return isinstance(coefficient, float) and coefficient == value


SIGMA_DATA = 0.5  # standard deviation of images in [-1, 1] that EDM assumes (Karras et al. 2022, table 1)


def _edm_target(at: Coefficients, xp: Namespace) -> Target:
    """F of D(x) = c_skip x + c_out F(c_in x): (x_0 - c_skip x_t) / c_out, at sigma = s with a = 1.

    Karras et al. 2022, table 1. EDM's loss, (sigma^2 + sd^2) / (sigma sd)^2 |D - x_0|^2, is |F - target|^2.
    """
    norm = xp.sqrt(at.s**2 + SIGMA_DATA**2)
    return Target(at.s / (SIGMA_DATA * norm), -SIGMA_DATA / norm)


def _edm_input_scale(at: Coefficients, xp: Namespace) -> Floats:
    return 1.0 / xp.sqrt(at.s**2 + SIGMA_DATA**2)


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective(name="epsilon-learned-range", learned_variance=True),  # ADM and DiT
        # DDPM's L_simple (Ho et al. 2020, eq. 14). margin: as SiT trains it on flow (transport.py, check_interval)
        Objective(name="epsilon-fixed", margin=1e-3),
        Objective(name="x0", target=lambda at, xp: Target(1.0, 0.0)),
        Objective(name="v", target=lambda at, xp: Target(-at.s, at.a)),  # Salimans & Ho 2022, sec. 4
        Objective(name="velocity", target=lambda at, xp: Target(at.da, at.ds)),  # dx_t / dt; flow matching
        # The released weights of SiT: dx / d tau and the time tau = 1 - t, not multiplied (transport.py, path.py @947f95b)
        Objective(
            name="velocity-sit",
            target=lambda at, xp: Target(-at.da, -at.ds),
            network_time=lambda t, xp: 1.0 - t,
        ),
        Objective(name="edm", target=_edm_target, input_scale=_edm_input_scale, schedules=("ve",)),
    )
}

# What `objective=NAME` in a recipe stands for besides an objective: the recipe items that a paper trains with.
PRESETS: Mapping[str, Mapping[str, str]] = {
    "dit": {"objective": "epsilon-learned-range", "schedule": "linear"},
    "sit": {"objective": "velocity", "schedule": "flow"},  # Ma et al. 2024, arXiv:2401.08740
    "sd3": {"objective": "velocity", "schedule": "flow", "time_distribution": "logit-normal:0:1"},  # arXiv:2403.03206
    "v-cosine": {"objective": "v", "schedule": "cosine"},  # Salimans & Ho 2022, arXiv:2202.00512
    "edm": {"objective": "edm", "schedule": "ve", "time_distribution": "log-normal:-1.2:1.2"},  # arXiv:2206.00364
    # arXiv:2511.13720, whose t is 1 - t here: its logit-normal has the mean -0.8
    "jit": {
        "objective": "x0",
        "schedule": "flow",
        "time_distribution": "logit-normal:0.8:0.8",
        "loss_weight": "velocity-of-x0",
    },
}
