"""What a denoiser predicts, as plain arithmetic that numpy, torch and JAX share.

A network is trained to give the target u = from_x0 x_0 + from_noise eps. With x_t = a x_0 + s eps, both x_0 and eps then
follow from x_t and u by linear equations, so the two coefficients of the target are all that a prediction has to state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from harness.diffusion.processes import Coefficients, Floats, Namespace


class Target(NamedTuple):
    """u = from_x0 x_0 + from_noise eps. A coefficient that does not depend on t is a float, and 0.0 and 1.0 cost nothing."""

    from_x0: Floats
    from_noise: Floats


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A kind of prediction.

    target: function of (coefficients of the process at t, the module of their arrays). input_scale: what x_t is multiplied
    with before the network sees it, a function of the same; None: nothing. margin: distance in t that is kept from both
    ends of a process in [0, 1] on which the image cannot be told from the target (a = 0 or s = 0).
    """

    name: str
    target: Callable[[Coefficients, Namespace], Target]
    input_scale: Callable[[Coefficients, Namespace], Floats] | None = None
    margin: float = 0.0


def image_from(at: Coefficients, target: Target) -> tuple[Floats, Floats]:
    """The coefficients (of x_t, of u) with which x_0 = from_x x_t + from_u u.

    Solves x_t = a x_0 + s eps and u = from_x0 x_0 + from_noise eps. Where the target holds no noise, u is x_0 itself up
    to a factor, also where s = 0.
    """
    if _is_zero(target.from_noise):
        return 0.0, 1.0 / target.from_x0
    determinant = at.a * target.from_noise - at.s * target.from_x0
    return target.from_noise / determinant, -at.s / determinant


def image_error_per_target_error(at: Coefficients, target: Target) -> Floats:
    """By how much x_0 is off for an error of 1 in u: the absolute value of the second coefficient of `image_from`."""
    return abs(image_from(at, target)[1])


def _is_zero(value: Floats) -> bool:
    """Whether a coefficient is the constant 0.0; an array is not, whatever it holds."""
    return isinstance(value, float) and value == 0.0


SIGMA_DATA = 0.5  # standard deviation of images in [-1, 1] that EDM assumes (Karras et al. 2022, table 1)


def _edm_target(at: Coefficients, xp: Namespace) -> Target:
    """F of D(x) = c_skip x + c_out F(c_in x): (x_0 - c_skip x_t) / c_out, at sigma = s with a = 1.

    Karras et al. 2022, table 1. The loss of EDM, (sigma^2 + sd^2) / (sigma sd)^2 |D - x_0|^2, is |F - target|^2.
    """
    norm = xp.sqrt(at.s**2 + SIGMA_DATA**2)
    return Target(at.s / (SIGMA_DATA * norm), -SIGMA_DATA / norm)


def _edm_input_scale(at: Coefficients, xp: Namespace) -> Floats:
    return 1.0 / xp.sqrt(at.s**2 + SIGMA_DATA**2)


PREDICTIONS: Mapping[str, Prediction] = {
    prediction.name: prediction
    for prediction in (
        Prediction(name="eps", target=lambda at, xp: Target(0.0, 1.0), margin=1e-3),  # margin: SiT transport.py
        Prediction(name="x0", target=lambda at, xp: Target(1.0, 0.0)),
        Prediction(name="v", target=lambda at, xp: Target(-at.s, at.a)),  # Salimans & Ho 2022, sec. 4
        Prediction(name="velocity", target=lambda at, xp: Target(at.da, at.ds)),  # dx_t / dt
        Prediction(name="edm", target=_edm_target, input_scale=_edm_input_scale),
    )
}
