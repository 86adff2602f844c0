"""Noising processes in continuous time: x_t = a(t) x_0 + s(t) eps, from data at t = 0 to noise at the largest t.

`harness.diffusion.schedule` holds the processes that are tables over trained timesteps. The functions here are plain
arithmetic, so that numpy in float64 (samplers), torch and JAX in float32 (training) all call the same ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

Floats: TypeAlias = Any  # a float, or an array of numpy, torch or jax
Namespace: TypeAlias = Any  # the module numpy, torch or jax.numpy: what gives exp, sqrt, sin, cos of its own arrays


class Coefficients(NamedTuple):
    """The coefficients of x_t = a x_0 + s eps at some times, and their derivatives in t."""

    a: Floats
    s: Floats
    da: Floats
    ds: Floats


def _thousandfold(t: Floats, xp: Namespace) -> Floats:
    return 1000.0 * t


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process in continuous time.

    coefficients: function of (t, the module of the array t) that returns `Coefficients`; a derivative that does not
    depend on t may be a float. Its arithmetic must stay accurate in float32. network_time: function of the same that
    returns what the network is given as time: about 0 ... 1000, as timesteps are, unless a paper has it otherwise.
    """

    name: str
    coefficients: Callable[[Floats, Namespace], Coefficients]
    first: float = 0.0  # smallest t that training and samplers ask for; below it the derivatives are not finite
    last: float = 1.0  # t at which sampling begins
    is_bounded: bool = True  # False: t has no upper limit in training (it is the noise level itself)
    network_time: Callable[[Floats, Namespace], Floats] = _thousandfold

    @property
    def is_straight(self) -> bool:
        """Whether a and s are linear in t, so that Euler's step in t is the exact step for an x_0 that does not change."""
        early, late = (self.coefficients(t, math) for t in (0.25, 0.75))
        return (early.da, early.ds) == (late.da, late.ds)

    def scaled(self, noise_scale: float) -> Process:
        """The process with noise_scale x s(t) in place of s(t) (JiT, arXiv:2511.13720, sec. 4: 2 at 512 x 512)."""
        if noise_scale == 1.0:
            return self

        def coefficients(t: Floats, xp: Namespace) -> Coefficients:
            a, s, da, ds = self.coefficients(t, xp)
            return Coefficients(a, noise_scale * s, da, noise_scale * ds)

        return dataclasses.replace(self, coefficients=coefficients)


def _flow(t: Floats, xp: Namespace) -> Coefficients:
    return Coefficients(1.0 - t, t, -1.0, 1.0)


def _gvp(t: Floats, xp: Namespace) -> Coefficients:
    half_pi = math.pi / 2
    cos, sin = xp.cos(half_pi * t), xp.sin(half_pi * t)
    return Coefficients(cos, sin, -half_pi * sin, half_pi * cos)


BETA_MIN, BETA_MAX = 0.1, 20.0  # of the continuous-time variance-preserving process (Song et al. 2021, app. C)


def _vp_continuous(t: Floats, xp: Namespace) -> Coefficients:
    log_a = -(t**2) * (BETA_MAX - BETA_MIN) / 4 - t * BETA_MIN / 2
    slope = -t * (BETA_MAX - BETA_MIN) / 2 - BETA_MIN / 2  # of log a
    a, s = xp.exp(log_a), xp.sqrt(-xp.expm1(2 * log_a))  # expm1: 1 - a**2 would lose all digits at small t
    return Coefficients(a, s, a * slope, -(a**2) * slope / s)


SMALLEST_SIGMA = math.exp(-10.0)  # that a network is told: the last step of a network of two times ends at 0


def _quarter_log(t: Floats, xp: Namespace) -> Floats:
    return xp.log(xp.clip(t, SMALLEST_SIGMA, None)) / 4


def _ve(t: Floats, xp: Namespace) -> Coefficients:
    return Coefficients(1.0, t, 0.0, 1.0)


PROCESSES: Mapping[str, Process] = {
    process.name: process
    for process in (
        Process(name="flow", coefficients=_flow),  # rectified flow: a straight line from noise to data
        Process(name="gvp", coefficients=_gvp),  # a quarter of a circle (SiT, arXiv:2401.08740, sec. 2; its GVP)
        Process(name="vp-continuous", coefficients=_vp_continuous, first=1e-5),
        Process(  # EDM (Karras et al. 2022, table 1): t is sigma itself
            name="ve", coefficients=_ve, first=0.002, last=80.0, is_bounded=False, network_time=_quarter_log
        ),
    )
}
