"""What a recipe trains: an objective on a process, with a distribution of times and a weight of the loss.

Plain arithmetic that torch and JAX share; random numbers come from the engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from harness import registry
from harness.diffusion.network_times import check_time, network_time
from harness.diffusion.objectives import Objective, image_from, is_constant
from harness.diffusion.processes import PROCESSES, Coefficients, Floats, Namespace, Process
from harness.diffusion.schedule import SCHEDULES, Schedule
from harness.errors import UserError, shown
from harness.registry import unknown

if TYPE_CHECKING:
    from harness.protocols import Recipe


def process_named(schedule: str, diffusion_steps: int, noise_scale: float = 1.0) -> Schedule | Process:
    """The process of a noise schedule by name: a table over `diffusion_steps` timesteps, or one in continuous time.

    Raises UserError for an unknown name, and for a noise scale on a table.
    """
    if schedule in PROCESSES:
        if noise_scale != 1.0 and not PROCESSES[schedule].is_bounded:
            raise UserError(
                f"noise_scale {noise_scale:g} means nothing on {schedule}, whose t is the noise level: leave it out"
            )
        return PROCESSES[schedule].scaled(noise_scale)
    if schedule not in SCHEDULES:
        raise UserError(unknown("noise schedule", schedule, [*SCHEDULES, *PROCESSES]))
    if noise_scale != 1.0:
        raise UserError(f"noise_scale {noise_scale:g} needs a schedule in continuous time ({', '.join(PROCESSES)})")
    return Schedule.named(schedule, diffusion_steps)


# Of a table of timesteps, which has no derivatives in t: a target that needs them is NaN.
WITHOUT_SLOPES = Coefficients(np.float64(0.6), np.float64(0.8), np.float64(np.nan), np.float64(np.nan))


def check_fit(objective: Objective, process: Schedule | Process, time: str) -> None:
    """Raise UserError where `objective` is not defined on `process`, or a network's time is not (`harness.spec.TIMES`)."""
    check_time(time, process)
    if objective.schedules is not None and process.name not in objective.schedules:
        raise UserError(
            f"the objective {objective.name} is defined on the schedule {' or '.join(objective.schedules)}, not on "
            f"{process.name}: give --set schedule={objective.schedules[0]}"
        )
    if isinstance(process, Schedule) and objective.two_times is not None:
        raise UserError(
            f"the objective {objective.name} predicts steps between any two times, and {process.name} is a table of timesteps: "
            f"give a schedule in continuous time ({', '.join(PROCESSES)})"
        )
    if isinstance(process, Process) and objective.two_times and not (objective.schedules or process.is_straight):
        straight = " or ".join(name for name, each in PROCESSES.items() if each.is_straight)
        raise UserError(
            f"the objective {objective.name} predicts steps, and a step of euler on {process.name} is not t - r times their mean "
            f"direction: give the schedule {straight}, or state {process.name} in its schedules if its target is made for that"
        )
    if isinstance(process, Process) and objective.learned_variance:
        raise UserError(
            f"the objective {objective.name} learns the variance of DDPM's steps, which the schedule {process.name} does "
            "not have: give another objective, or the schedule linear"
        )
    if isinstance(process, Schedule) and np.isnan(objective.target(WITHOUT_SLOPES, np)).any():
        raise UserError(
            f"the objective {objective.name} needs a schedule in continuous time ({', '.join(PROCESSES)}), and {process.name} is "
            "a table of timesteps"
        )


def time_range(objective: Objective, process: Process) -> tuple[float, float]:
    """The smallest and the largest t at which a network of `objective` can be trained and asked."""
    if not process.is_bounded:
        return process.first, process.last
    return max(process.first, objective.margin), min(process.last, 1 - objective.margin)


SMALLEST_TIME = 1e-7  # in training: a draw of exactly 0, where s = 0, would make weights of the loss infinite


@dataclass(frozen=True, kw_only=True)
class TimeDistribution:
    """How t is drawn in training. from_draw: function of (standard normal z, its module, two parameters) -> t."""

    from_normal: Callable[[Floats, Namespace, float, float], Floats]
    is_bounded: bool  # whether t lies in [0, 1]


TIME_DISTRIBUTIONS: Mapping[str, TimeDistribution] = {
    "logit-normal": TimeDistribution(  # Esser et al. 2024 (SD3), eq. 19
        from_normal=lambda z, xp, mean, std: 1 / (1 + xp.exp(-(mean + std * z))), is_bounded=True
    ),
    "log-normal": TimeDistribution(  # of sigma: Karras et al. 2022, table 1
        from_normal=lambda z, xp, mean, std: xp.exp(mean + std * z), is_bounded=False
    ),
}


def _min_snr(t: Floats, at: Coefficients, xp: Namespace, parameter: float) -> Floats:
    """min(snr, gamma) of the squared error of x_0 (Hang et al. 2023, arXiv:2303.09556, sec. 3.4)."""
    snr = at.a**2 / at.s**2
    return xp.where(snr < parameter, snr, parameter)


def _edm(t: Floats, at: Coefficients, xp: Namespace, parameter: float) -> Floats:
    """(sigma^2 + p^2) / (sigma p)^2 with sigma = s / a (Karras et al. 2022, table 1), written so that a may be 0."""
    return 1 / parameter**2 + (at.a / at.s) ** 2


def _velocity(t: Floats, at: Coefficients, xp: Namespace, parameter: float) -> Floats:
    """The error of the velocity on flow for one of x_0, 1 / t^2, with t not below `parameter` (JiT, arXiv:2511.13720)."""
    return 1 / xp.where(t > parameter, t, parameter) ** 2


# name: (weight of the squared error of x_0, its parameter where none is given)
LOSS_WEIGHTS: Mapping[str, tuple[Callable[[Floats, Coefficients, Namespace, float], Floats], float]] = {
    "min-snr": (_min_snr, 5.0),
    "edm": (_edm, 0.5),
    "velocity-of-x0": (_velocity, 0.05),
}


@dataclass(frozen=True, kw_only=True)
class TrainingObjective:
    """An objective on a process. `from_recipe` makes it and refuses what cannot be combined."""

    objective: Objective
    process: Schedule | Process
    time_distribution: str  # "uniform", or a key of TIME_DISTRIBUTIONS
    time_parameters: tuple[float, float]
    loss_weight: str  # "none", or a key of LOSS_WEIGHTS
    weight_parameter: float
    time: str = "timestep"  # the form of the network's time (`harness.spec.TIMES`)

    @classmethod
    def from_recipe(cls, recipe: Recipe, time: str = "timestep") -> TrainingObjective:
        """Raises UserError for unknown names and for parts that do not fit each other. time: of the backbone."""
        objective = registry.objectives.get(recipe.objective)
        process = process_named(recipe.schedule, recipe.diffusion_steps, recipe.noise_scale)
        check_fit(objective, process, time)
        distribution, parameters = _parse(
            "time_distribution", recipe.time_distribution, ["uniform", *TIME_DISTRIBUTIONS], 2
        )
        is_bounded = distribution == "uniform" or TIME_DISTRIBUTIONS[distribution].is_bounded
        if is_bounded == (isinstance(process, Process) and not process.is_bounded):
            fitting = [name for name, each in TIME_DISTRIBUTIONS.items() if each.is_bounded != is_bounded]
            raise UserError(
                f"recipe: the time distribution {shown(recipe.time_distribution)} does not fit the schedule {process.name}: take "
                f"{' or '.join(fitting + ['uniform'] * (not is_bounded))}"
            )
        weight, weight_parameters = _parse("loss_weight", recipe.loss_weight, ["none", *LOSS_WEIGHTS], 1)
        if weight != "none" and objective.learned_variance:
            raise UserError(f"recipe: the loss weight {weight} needs an objective without a learned variance")
        if weight == "velocity-of-x0" and process.name != "flow":
            raise UserError(f"recipe: the loss weight velocity-of-x0 needs the schedule flow, not {process.name}")
        default = LOSS_WEIGHTS[weight][1] if weight != "none" else 0.0
        return cls(
            objective=objective,
            process=process,
            time_distribution=distribution,
            time_parameters=(parameters[0], parameters[1]) if parameters else (0.0, 1.0),
            loss_weight=weight,
            weight_parameter=weight_parameters[0] if weight_parameters else default,
            time=time,
        )

    @property
    def draws_normal(self) -> bool:
        """Whether a time is made from a standard normal number; else from a uniform one in [0, 1)."""
        return self.time_distribution != "uniform"

    def continuous_times(self, draw: Floats, xp: Namespace) -> Floats:
        """t from one random number each, uniform in [0, 1) or standard normal: float32 (N,) as `draw`.

        A time that a bounded process draws is squeezed into the range that the objective can be trained on.
        """
        if self.time_distribution == "uniform":
            t = draw
        else:
            mean, std = self.time_parameters
            t = TIME_DISTRIBUTIONS[self.time_distribution].from_normal(draw, xp, mean, std)
        if isinstance(self.process, Process) and self.process.is_bounded:
            first, last = time_range(self.objective, self.process)
            first = max(first, SMALLEST_TIME)
            t = first + (last - first) * t
        return t

    def network_time(self, t: Floats, at: Callable[[], Coefficients], xp: Namespace) -> Floats:
        """What the network is given as time at t (N,); `at` returns the process there."""
        return network_time(self.time, self.objective, self.process, t, at, xp)

    def wanted(self, x0: Floats, noise: Floats, at: Coefficients, xp: Namespace) -> Floats:
        """What the network is to predict at x_t = a x0 + s noise, (N, C, H, W); of an objective of two times, at r = t."""
        target = self.objective.target(at, xp)
        parts = [
            state if is_constant(coefficient, 1.0) else coefficient * state
            for coefficient, state in ((target.from_x0, x0), (target.from_noise, noise))
            if not is_constant(coefficient, 0.0)
        ]
        return sum(parts[1:], parts[0])

    def squared_error(self, output: Floats, wanted: Floats, t: Floats, at: Coefficients, xp: Namespace) -> Floats:
        """The weighted squared error of the prediction `output` from `wanted`, elementwise; both float32 (N, C, H, W).

        t and the coefficients `at`: (N, 1, 1, 1), or floats where they do not depend on t. LOSS_WEIGHTS weigh the error of
        x_0, which is off by |from_u| for an error of 1 in the prediction.
        """
        error = (output - wanted) ** 2
        if self.loss_weight == "none":
            return error
        of_image = LOSS_WEIGHTS[self.loss_weight][0](t, at, xp, self.weight_parameter)
        return of_image * image_from(at, self.objective.target(at, xp))[1] ** 2 * error

    def wanted_of_step(
        self,
        net: Callable[[Floats, Floats, Floats], Floats],  # as of `TwoTimes.target`
        x0: Floats,
        noise: Floats,
        times: tuple[Floats, Floats],  # t and r, (N, 1, 1, 1) each
        at: Coefficients,
        xp: Namespace,
    ) -> Floats:
        """What a network of two times is to predict at x_t = a x0 + s noise, (N, C, H, W).

        Raises UserError where the objective evaluates the network more often than it states.
        """
        two_times = self.objective.two_times
        assert two_times is not None
        calls = 0

        def counted(x: Floats, t: Floats, r: Floats) -> Floats:
            nonlocal calls
            calls += 1
            return net(x, t, r)

        u = self.wanted(x0, noise, at, xp)
        wanted = two_times.target(counted, at.a * x0 + at.s * noise, *times, u, xp)
        if calls > two_times.evaluations:
            raise UserError(
                f"objective {self.objective.name!r}: its target evaluates the network {calls} times, and its `evaluations`, from "
                f"which training compute is counted, are {two_times.evaluations}"
            )
        if getattr(wanted, "shape", None) != x0.shape:
            raise UserError(
                f"objective {self.objective.name!r}: expected a target of shape {tuple(x0.shape)}, came "
                f"{tuple(wanted.shape) if hasattr(wanted, 'shape') else type(wanted).__name__}"
            )
        return wanted


def _parse(item: str, text: str, known: list[str], parameters: int) -> tuple[str, tuple[float, ...]]:
    """(name, numbers) of "name:1:2", with all `parameters` numbers or none. Raises UserError."""
    name, *rest = text.split(":")
    if name not in known:
        raise UserError(f"recipe: {unknown(item, text, known)}")
    try:
        numbers = tuple(float(each) for each in rest)
    except ValueError:
        numbers = (float("nan"),)
    plain = name in ("uniform", "none")
    if (len(numbers) not in ((0,) if plain else (0, parameters))) or not all(
        abs(each) < float("inf") for each in numbers
    ):
        form = name if plain else ":".join([name, *("NUMBER",) * parameters])
        raise UserError(f"recipe: {item} {shown(text)} is not understood: give {form}")
    return name, numbers
