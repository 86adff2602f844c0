"""Samplers as tables: every fixed-step sampler is one loop over rows of coefficients, computed here in float64.

With D the image that the network predicts at row k (one evaluation), and D', D'' those of the rows before,

    x    <- x_from    . (x, base, D, D', D'', ...) + noise_to_x    n        what the next evaluation sees
    base <- base_from . (x, base, D, D', D'', ...) + noise_to_base n        a state that a later row still needs

where n is one draw of standard normal noise. x is the state x_t itself, so that a row's coefficients hold whatever the
process is. After the last row x is the sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.diffusion.grids import Grid
from harness.errors import UserError
from harness.registry import unknown

X, BASE, D = 0, 1, 2  # columns of a row; D + j is the predicted image of j rows before


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplerTable:
    """What a sampler is: E rows, float64, in the order of execution. E is the number of network evaluations."""

    times: np.ndarray  # (E,): t of the process at which the network is asked; timesteps, of a process that is a table
    a: np.ndarray  # (E,): the process at these times
    s: np.ndarray  # (E,)
    x_from: np.ndarray  # (E, 2 + H): of x, base, D and the H - 1 predicted images before it
    base_from: np.ndarray  # (E, 2 + H)
    noise_to_x: np.ndarray  # (E,)
    noise_to_base: np.ndarray  # (E,)
    initial_noise: float  # standard deviation of x at the first row
    # (low, high), (E,) each: log variances between which the variance channels of the network choose (Nichol & Dhariwal
    # 2021, eq. 15) and so replace noise_to_x. None: the variance is fixed.
    log_variances: tuple[np.ndarray, np.ndarray] | None = None
    # (E,): t at which the step of a row ends, where a row is one step along its D alone: what networks of two times are asked
    # for. None: the sampler is not for them.
    end_times: np.ndarray | None = None
    shifts_mean: bool = False  # a classifier's gradient shifts the mean of a step by its variance; else epsilon

    def __post_init__(self) -> None:
        rows = len(self.times)
        assert self.a.shape == self.s.shape == (rows,)
        assert self.x_from.shape == self.base_from.shape == (rows, self.x_from.shape[1])
        assert self.noise_to_x.shape == self.noise_to_base.shape == (rows,)
        assert self.end_times is None or self.end_times.shape == (rows,)
        for values in (self.x_from, self.base_from, self.noise_to_x, self.noise_to_base):
            assert np.isfinite(values).all()
        for j in range(self.x_from.shape[1] - D):  # no row asks for an image that was not predicted yet
            assert not self.x_from[:j, D + j].any() and not self.base_from[:j, D + j].any()


class _Rows:
    """A table in the making: rows of zeros that ask the network at the nodes `nodes` of `grid`."""

    def __init__(self, grid: Grid, nodes: Sequence[int] | None = None, history: int = 1):
        nodes = list(range(len(grid)) if nodes is None else nodes)
        self.times, self.a, self.s = grid.times[nodes], grid.a[nodes], grid.s[nodes]
        self.x_from, self.base_from = np.zeros((len(nodes), 2 + history)), np.zeros((len(nodes), 2 + history))
        self.noise_to_x, self.noise_to_base = np.zeros(len(nodes)), np.zeros(len(nodes))
        self.initial_noise = float(grid.s[0])
        self.end_times: np.ndarray | None = None

    def table(self) -> SamplerTable:
        return SamplerTable(**vars(self))


def _first_order(grid: Grid, i: int, j: int) -> tuple[float, float]:
    """(of x, of D): the exact step from node i to node j for a D that does not change, DDIM's with eta 0.

    x' = a' D + (s' / s)(x - a D).
    """
    ratio = grid.s[j] / grid.s[i]
    return float(ratio), float(grid.a[j] - grid.a[i] * ratio)


def euler(grid: Grid) -> SamplerTable:
    """First order: DDIM with eta 0 on every process (Song et al. 2021, eq. 12), and Euler's rule on flow (SiT)."""
    rows = _Rows(grid)
    rows.end_times = grid.times[1:]
    for k in range(len(grid)):
        rows.x_from[k, X], rows.x_from[k, D] = _first_order(grid, k, k + 1)
    return rows.table()


STEEP_SIGMA = 1000.0  # steps in sigma from there on lose the image in the first few


def heun(grid: Grid) -> SamplerTable:
    """Second order: the trapezoid rule, 2 evaluations a step and 1 at the last (Karras et al. 2022, algorithm 1).

    It is taken in t where the process has derivatives (in sigma for EDM's, in the velocity for flow), else in
    sigma = s / a of x / a; on a schedule as steep as cosine, whose sigma begins at 20,000, in the angle atan(s / a), in
    which the slope is the v-prediction. The last step is the first-order one, for at s = 0 the slope is not defined.
    """
    steps = len(grid)
    rows = _Rows(grid, [(k + 1) // 2 for k in range(2 * steps - 1)], history=2)
    if grid.da is None and grid.s[0] > STEEP_SIGMA * grid.a[0]:
        angle = np.arctan2(grid.s, grid.a)
        grid = dataclasses.replace(grid, times=angle, da=-np.sin(angle), ds=np.cos(angle))
    for i in range(steps):
        k = 2 * i
        rows.x_from[k, X], rows.x_from[k, D] = _first_order(grid, i, i + 1)
        if i == steps - 1:
            break
        rows.base_from[k, X] = 1.0
        k += 1
        # x <- base + h/2 (slope(base, D') + slope(x, D)), slope = from_x x + from_d D
        if grid.da is None:
            # in y = x / a over sigma: slope of y = (y - D) / sigma, so all of it divided by a and multiplied with a again
            sigma, sigma_next = grid.s[i] / grid.a[i], grid.s[i + 1] / grid.a[i + 1]
            half, a, a_next = (sigma_next - sigma) / 2, grid.a[i], grid.a[i + 1]
            rows.x_from[k, BASE] = a_next * (1 + half / sigma) / a
            rows.x_from[k, D + 1] = -a_next * half / sigma
            rows.x_from[k, X] = half / sigma_next
            rows.x_from[k, D] = -a_next * half / sigma_next
        else:
            half = (grid.times[i + 1] - grid.times[i]) / 2
            (x_0, d_0), (x_1, d_1) = _slope(grid, i), _slope(grid, i + 1)
            rows.x_from[k, BASE], rows.x_from[k, D + 1] = 1 + half * x_0, half * d_0
            rows.x_from[k, X], rows.x_from[k, D] = half * x_1, half * d_1
    return rows.table()


def _slope(grid: Grid, i: int) -> tuple[float, float]:
    """(of x, of D): dx/dt = a' D + s' eps^ at node i, with eps^ = (x - a D) / s."""
    assert grid.da is not None and grid.ds is not None
    rate = grid.ds[i] / grid.s[i]
    return float(rate), float(grid.da[i] - grid.a[i] * rate)


def dpm_solver_2m(grid: Grid) -> SamplerTable:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2): one evaluation a step, second order.

    The first step, and the last one, to s = 0, are of first order.
    """
    steps = len(grid)
    rows = _Rows(grid, history=2)
    h = np.diff(grid.lam)  # inf at the last step, and at the first where the process begins at a = 0
    for k in range(steps):
        rows.x_from[k, X], from_d = _first_order(grid, k, k + 1)
        half_ratio = 0.0 if k in (0, steps - 1) else h[k] / (2 * h[k - 1])  # 1 / (2 r)
        rows.x_from[k, D], rows.x_from[k, D + 1] = from_d * (1 + half_ratio), -from_d * half_ratio
    return rows.table()


def dpm_solver_2s(grid: Grid) -> SamplerTable:
    """DPM-Solver++(2S) (arXiv:2211.01095, algorithm 1): the nodes of the grid are taken in pairs.

    An odd node lies between the beginning and the end of a step of second order, so that n evaluations make n / 2
    steps. A step that ends at s = 0 or begins at a = 0 is two of first order.
    """
    nodes = len(grid)
    rows = _Rows(grid, history=2)
    for k in range(nodes):
        rows.x_from[k, X], rows.x_from[k, D] = _first_order(grid, k, k + 1)
        begin, end = k - 1, k + 1  # of the step of which node k is the middle
        if k % 2 == 0 or not math.isfinite(grid.lam[end] - grid.lam[begin]):
            continue
        rows.base_from[k - 1, X] = 1.0
        r = (grid.lam[k] - grid.lam[begin]) / (grid.lam[end] - grid.lam[begin])
        from_x, from_d = _first_order(grid, begin, end)
        rows.x_from[k] = 0.0
        rows.x_from[k, BASE] = from_x
        rows.x_from[k, D], rows.x_from[k, D + 1] = from_d / (2 * r), from_d * (1 - 1 / (2 * r))
    return rows.table()


def dpm_solver_3m(grid: Grid) -> SamplerTable:
    """DPM-Solver++ multistep of third order (arXiv:2211.01095, app. B); steps 1 and 2 and the last are of lower order."""
    steps = len(grid)
    rows = _Rows(grid, history=3)
    h = np.diff(grid.lam)
    for k in range(steps):
        rows.x_from[k, X], from_d = _first_order(grid, k, k + 1)
        if k in (0, steps - 1) or not math.isfinite(h[k - 1]):
            rows.x_from[k, D] = from_d
            continue
        if k == 1 or not math.isfinite(h[k - 2]):
            half_ratio = h[k] / (2 * h[k - 1])
            rows.x_from[k, D], rows.x_from[k, D + 1] = from_d * (1 + half_ratio), -from_d * half_ratio
            continue
        # D as a parabola in lambda through the last three images: first and second differences in units of h
        r0, r1 = h[k - 1] / h[k], h[k - 2] / h[k]
        near = np.array([1.0, -1.0, 0.0]) / r0
        far = np.array([0.0, 1.0, -1.0]) / r1
        first = near + r0 / (r0 + r1) * (near - far)
        second = (near - far) / (r0 + r1)
        a, step = grid.a[k + 1], h[k]
        phi_1 = -np.expm1(-step)
        phi_2 = 1 - phi_1 / step
        phi_3 = 0.5 - phi_2 / step
        rows.x_from[k, D : D + 3] = a * (phi_1 * np.array([1.0, 0.0, 0.0]) + phi_2 * first + phi_3 * second)
    return rows.table()


def sde_dpm_solver_2m(grid: Grid) -> SamplerTable:
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095, sec. 6 and app. B.5): the reverse SDE, noise in every step but the last."""
    steps = len(grid)
    rows = _Rows(grid, history=2)
    h = np.diff(grid.lam)
    for k in range(steps):
        decay, share = math.exp(-h[k]), -math.expm1(-2 * h[k])
        rows.x_from[k, X] = grid.s[k + 1] / grid.s[k] * decay
        from_d = grid.a[k + 1] * share
        half_ratio = 0.0 if k in (0, steps - 1) else h[k] / (2 * h[k - 1])
        rows.x_from[k, D], rows.x_from[k, D + 1] = from_d * (1 + half_ratio), -from_d * half_ratio
        rows.noise_to_x[k] = grid.s[k + 1] * math.sqrt(share)
    return rows.table()


def unipc(grid: Grid, order: int) -> SamplerTable:
    """UniPC with B(h) = e^h - 1, its "bh2" (Zhao et al. 2023, arXiv:2302.04867): one evaluation a step.

    The evaluation at x_k first corrects x_k itself (UniC), then predicts x_k+1 from the corrected state (UniP). base is
    the corrected state of the row before. The first order - 1 steps and the last ones, to s = 0, are of lower order.
    """
    steps = len(grid)
    rows = _Rows(grid, history=order + 1)
    begin = 0 if math.isfinite(grid.lam[0]) else 1  # the first node with a finite lambda
    used = 0  # order of the step that led to node k
    for k in range(steps):
        corrected = np.zeros(rows.x_from.shape[1])
        if used == 0:
            corrected[X] = 1.0
        else:
            corrected = _unipc_step(grid, k - 1, k, used, corrector=True, width=len(corrected))
        used = max(0, min(order, k + 1 - begin, steps - k))  # 0: node 0 of a process that begins at a = 0
        step = _unipc_step(grid, k, k + 1, max(used, 1), corrector=False, width=len(corrected))
        rows.base_from[k] = corrected
        rows.x_from[k] = step[X] * corrected
        rows.x_from[k, D:] += step[D:]
    return rows.table()


def _unipc_step(grid: Grid, i: int, j: int, order: int, *, corrector: bool, width: int) -> np.ndarray:
    """The row of coefficients of a step from node i to node j = i + 1 of this order.

    Predictor: x at j from (x at i, D of i, i - 1, ...), where D of i is the newest image. Corrector: x at j from
    (base = x at i, D of j, i, i - 1, ...), where D of j is the newest.
    """
    row = np.zeros(width)
    state, newest = (BASE, D + 1) if corrector else (X, D)  # newest: the column of D of node i
    row[state], from_d = _first_order(grid, i, j)
    row[newest] = from_d
    if order == 1 and not corrector:
        return row
    h = grid.lam[j] - grid.lam[i]
    # D_n - D_i over its distance in lambda, for the nodes before i and, in the corrector, j
    distances = [(grid.lam[i - n] - grid.lam[i]) / h for n in range(1, order)]
    columns = [newest + n for n in range(1, order)]
    if corrector:
        distances, columns = [*distances, 1.0], [*columns, D]
    size = len(distances)
    if size == 1:  # the order conditions hold for 1/2 up to O(h), and the public code takes it
        weights = np.array([0.5])
    else:
        powers = np.vander(distances, size, increasing=True).T
        weights = np.linalg.solve(powers, _unipc_moments(h, size))
    # from_d = -a' expm1(-h) = a' B(h) for bh2
    for weight, distance, column in zip(weights, distances, columns, strict=True):
        row[column] += from_d * weight / distance
        row[newest] -= from_d * weight / distance
    return row


def _unipc_moments(h: float, size: int) -> np.ndarray:
    """The right-hand side of UniPC's order conditions for the data prediction: n! phi_n+1(-h) h / B(h), n = 1 ... size."""
    hh, moments, factorial = -h, [], 1
    phi = math.expm1(hh) / hh - 1
    for n in range(1, size + 1):
        moments.append(phi * factorial / math.expm1(hh))
        factorial *= n + 1
        phi = phi / hh - 1 / factorial
    return np.array(moments)


def edm_stochastic(
    grid: Grid, *, s_churn: float = 40.0, s_min: float = 0.05, s_max: float = 50.0, s_noise: float = 1.003
) -> SamplerTable:
    """EDM's stochastic sampler (Karras et al. 2022, algorithm 2; its settings for ImageNet at 64 x 64) for a = 1.

    The noise that raises sigma before a step belongs to the row before, so that the network sees it; before the first
    step it is a part of the initial noise.
    """
    if not (grid.a == 1).all():
        raise UserError("the sampler edm-stochastic raises sigma between steps and needs the schedule ve")
    steps, sigma = len(grid), grid.s
    gamma = min(s_churn / steps, math.sqrt(2) - 1)
    raised = np.where((s_min <= sigma[:-1]) & (sigma[:-1] <= s_max), sigma[:-1] * (1 + gamma), sigma[:-1])
    added = s_noise * np.sqrt(raised**2 - sigma[:-1] ** 2)  # noise before step i
    rows = _Rows(grid, [(k + 1) // 2 for k in range(2 * steps - 1)], history=2)
    rows.times[::2] = rows.s[::2] = raised  # the step's second evaluation, at its end, is not raised
    rows.initial_noise = math.hypot(float(sigma[0]), float(added[0]))
    for i in range(steps):
        k, hat, end = 2 * i, raised[i], sigma[i + 1]
        rows.x_from[k, X], rows.x_from[k, D] = end / hat, 1 - end / hat
        if i == steps - 1:
            break
        rows.base_from[k, X] = 1.0
        half = (end - hat) / 2
        rows.x_from[k + 1] = half / end, 1 + half / hat, -half / end, -half / hat
        rows.noise_to_x[k + 1] = added[i + 1]
    return rows.table()


def euler_maruyama(grid: Grid, diffusion: str = "sigma", last: str = "mean") -> SamplerTable:
    """SiT's SDE (Ma et al. 2024, arXiv:2401.08740, eq. 5; transport.py): noise in every step but the last.

    dx = (v - w score) dt + sqrt(2 w) dW from noise to data, with v = dx/dt and score = -eps^ / s. diffusion: w(t), a key
    of DIFFUSIONS. last: the last step, to the image, which takes the mean of a step without noise ("mean"), the predicted
    image ("tweedie"), or a step of the ODE dx = v dt ("euler"); "none": it is like the others, with noise. With "none",
    SiT's num_steps counts the beginning, too, so that it makes one evaluation less.
    """
    for noun, name, known in (("diffusion", diffusion, DIFFUSIONS), ("last step", last, LAST_STEPS)):
        if name not in known:
            raise UserError(unknown(f"{noun} of euler-maruyama", name, known))
    if grid.da is None or grid.ds is None:
        raise UserError(
            "the sampler euler-maruyama needs a process in continuous time, and this one is a table of timesteps"
        )
    if len(grid) < 3:
        raise UserError(f"the sampler euler-maruyama gives noise after {len(grid)} steps: give at least 3")
    if diffusion == "decreasing" and grid.times[0] > 1:
        raise UserError("the diffusion decreasing of euler-maruyama needs a schedule with t in [0, 1]")
    rows = _Rows(grid)
    for k in range(len(grid)):
        is_last = k == len(grid) - 1
        if is_last and last == "tweedie":
            rows.x_from[k, D] = 1.0
            break
        w = 0.0 if is_last and last == "euler" else DIFFUSIONS[diffusion](grid, k)
        if not math.isfinite(w):
            raise UserError(f"the diffusion {diffusion} is infinite at t = {grid.times[k]:g}, where the grid begins")
        from_x, from_d = _slope(grid, k)
        # score = -(x - a D) / s^2
        from_x, from_d = from_x + w / grid.s[k] ** 2, from_d - w * grid.a[k] / grid.s[k] ** 2
        dt = grid.times[k + 1] - grid.times[k]  # negative
        rows.x_from[k, X], rows.x_from[k, D] = 1 + dt * from_x, dt * from_d
        if not is_last or last == "none":
            rows.noise_to_x[k] = math.sqrt(2 * w * -dt)
    return rows.table()


LAST_STEPS = ("mean", "tweedie", "euler", "none")


def _sbdm(grid: Grid, k: int) -> float:
    """The diffusion of the forward SDE, halved: s s' - a' s^2 / a."""
    assert grid.da is not None and grid.ds is not None
    with np.errstate(divide="ignore"):
        return float(grid.s[k] * grid.ds[k] - grid.da[k] / grid.a[k] * grid.s[k] ** 2)


DIFFUSIONS: Mapping[str, Callable[[Grid, int], float]] = {  # w at node k (SiT transport/path.py, compute_diffusion)
    "sigma": lambda grid, k: float(grid.s[k]),
    "sbdm": _sbdm,
    "constant": lambda grid, k: 1.0,
    "linear": lambda grid, k: float(grid.times[k]),
    "decreasing": lambda grid, k: 0.25 * (math.cos(math.pi * (1 - float(grid.times[k]))) + 1) ** 2,
}
