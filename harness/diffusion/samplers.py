"""Samplers by name: functions that make a table from a process, a number of steps and the settings.

The name of a sampler may end with values of its options: "edm-stochastic:20:0.05". `canonical_sampler` gives the one text
of equal options, which identities and records have.

`harness.diffusion.solvers` and `ddpm` are imported when a table is made, so that listing samplers is fast.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.errors import UserError, shown

if TYPE_CHECKING:
    from harness.diffusion.grids import Grid
    from harness.diffusion.processes import Process
    from harness.diffusion.schedule import Schedule
    from harness.diffusion.solvers import SamplerTable


@dataclass(frozen=True, kw_only=True)
class SamplerTask:
    """What a sampler makes its table for."""

    process: Schedule | Process  # a table of timesteps, not respaced, or a process in continuous time
    steps: int  # as the user gives them; a step may take several network evaluations
    eta: float = 0.0  # share of DDPM's noise in DDIM
    spacing: str = ""  # of the times, by name (`harness.diffusion.grids`); "" for the usual one of the process
    learned_variance: bool = False  # whether the network gives variance channels
    first: float = 0.0  # range of t, in continuous time, in which the network can be asked
    last: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)  # of `SamplerSpec.options`, each by its name

    def nodes(self, count: int | None = None) -> Grid:
        """The grid of `count` times (None: `steps`) and the image at its end. Raises UserError if it does not fit."""
        from harness.diffusion.grids import continuous_grid, discrete_grid
        from harness.diffusion.schedule import Schedule

        count = self.steps if count is None else count
        if isinstance(self.process, Schedule):
            return discrete_grid(self.process, count, self.spacing or "respaced")
        usual = "uniform" if self.process.is_bounded else "karras"
        return continuous_grid(self.process, count, self.spacing or usual, first=self.first, last=self.last)

    @property
    def respacing(self) -> int | str:
        """Steps and spacing as `space_timesteps` takes them. Raises UserError for another spacing."""
        from harness.diffusion.respacing import respacing

        if (wanted := respacing(self.steps, self.spacing)) is not None:
            return wanted
        raise UserError(
            f"a sampler over its own timesteps has no spacing {shown(self.spacing)}: leave it out, or give whole-stride "
            "or counts of steps for equal sections, as in 10:10:20"
        )

    def timesteps_of(self, sampler: str) -> Schedule:
        """The process, for a sampler that is defined on trained timesteps. Raises UserError for another process."""
        from harness.diffusion.schedule import Schedule

        if not isinstance(self.process, Schedule):
            raise UserError(
                f"the sampler {sampler} needs a schedule of timesteps, and {self.process.name} is one in continuous "
                "time: take euler or heun"
            )
        return self.process


@dataclass(frozen=True, kw_only=True)
class SamplerOption:
    """An option of a sampler, whose values are of the type of `default`: float, int or str.

    name: its key in `SamplerTask.options`, and in capitals its place in the sampler's form. choices: of a str; none: any
    word. low, high: of a number, both ends included.
    """

    name: str
    default: float | int | str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf

    @property
    def wanted(self) -> str:
        """What values it takes, in words."""
        if isinstance(self.default, str):
            return (
                f"one of {', '.join(self.choices)}" if self.choices else "a word of letters, digits, '.', '+' and '-'"
            )
        noun = "a whole number" if isinstance(self.default, int) else "a number"
        ends = [f"at least {self.low:g}"] * (self.low > -math.inf) + [f"at most {self.high:g}"] * (self.high < math.inf)
        return " of ".join([noun, *([" and ".join(ends)] if ends else [])])

    def read(self, text: str) -> float | int | str:
        """The value that `text` states. Raises ValueError."""
        if isinstance(self.default, str):
            if not (text in self.choices if self.choices else re.fullmatch(r"[A-Za-z0-9.+-]+", text)):
                raise ValueError(text)
            return text
        value = type(self.default)(text)
        if not self.low <= value <= self.high:  # NaN, too
            raise ValueError(text)
        return value + 0  # equal values have equal texts: -0.0 becomes 0.0


def option_text(value: float | int | str) -> str:
    """The value in the one form that names of samplers have: 40 for 40.0."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """A named sampler.

    make: function of a `SamplerTask` that returns the `SamplerTable`, or raises UserError where they do not fit. None: the
    adaptive sampler (`harness.diffusion.adaptive`), which has no table, no steps to set and no evaluations known before.
    has_eta: whether the table depends on eta; if not, sample sets and records have no eta. needs_timesteps: whether it goes
    over the timesteps of a table and is refused in continuous time. options: what may follow the
    name, in this order.
    """

    name: str
    summary: str
    make: Callable[[SamplerTask], SamplerTable] | None
    has_eta: bool = False
    needs_timesteps: bool = False
    options: tuple[SamplerOption, ...] = ()

    @property
    def form(self) -> str:
        """The name with its options: "edm-stochastic:CHURN:MIN:MAX:NOISE"."""
        return ":".join([self.name, *(option.name.upper() for option in self.options)])


def read_sampler(text: str) -> tuple[SamplerSpec, dict[str, Any]]:
    """(the sampler, the values of all its options by name) of NAME or NAME:VALUE:...; values may be left out from the end.

    Raises UserError for an unknown name, for too many values and for one that the option does not take.
    """
    name, *values = _split(text)
    spec: SamplerSpec = registry.samplers.get(name)
    options: tuple[SamplerOption, ...] = getattr(spec, "options", ())  # plug-ins may register another class
    if values and not options:
        raise UserError(f"sampler {shown(text)}: {name} has no options; write {name}")
    if len(values) > len(options):
        raise UserError(f"sampler {shown(text)}: too many options; the form is {spec.form}")
    read = {option.name: option.default for option in options}
    for option, value in zip(options, values, strict=False):
        try:
            read[option.name] = option.read(value)
        except ValueError:
            raise UserError(
                f"sampler {shown(text)}: {option.name.upper()} must be {option.wanted}, not {shown(value)}; the form is "
                f"{spec.form}"
            ) from None
    return spec, read


def canonical_sampler(text: str) -> str:
    """The text of the sampler `text` in identities and records: without the last options as far as they are the defaults.

    Raises UserError for wrong options. A sampler that is not installed keeps its text.
    """
    if ":" not in text or _split(text)[0] not in registry.samplers:
        return text
    spec, values = read_sampler(text)
    options = list(getattr(spec, "options", ()))
    while options and values[options[-1].name] == options[-1].default:
        options.pop()
    return ":".join([spec.name, *(option_text(values[option.name]) for option in options)])


def has_eta(sampler: str) -> bool:
    """Whether the sampler has the setting eta. True if that is not known: for a sampler that is not installed now, and
    for one whose plug-in does not say."""
    name = _split(sampler)[0]
    return name not in registry.samplers or getattr(registry.samplers.get(name), "has_eta", True)


def needs_timesteps(sampler: str) -> bool:
    """Whether the sampler is refused in continuous time. False if that is not known, as of one that is not installed now."""
    name = _split(sampler)[0]
    return name in registry.samplers and bool(getattr(registry.samplers.get(name), "needs_timesteps", False))


def is_adaptive(sampler: str) -> bool:
    """Whether the sampler chooses its own steps. False if that is not known, as of a sampler that is not installed now."""
    name = _split(sampler)[0]
    return name in registry.samplers and getattr(registry.samplers.get(name), "make", True) is None


def name_with_steps(sampler: str, steps: int | None) -> str:
    """Sampler and steps in the names of folders: "ddpm250", "dopri5", "edm-stochastic_20_0.05-18".

    Not every file system has colons. steps: None, or without meaning, for an adaptive sampler.
    """
    if is_adaptive(sampler) or steps is None:
        return sampler.replace(":", "_")
    return f"{sampler.replace(':', '_')}-{steps}" if ":" in sampler else f"{sampler}{steps}"


def _split(text: str) -> list[str]:
    """The name of a sampler and the texts of its options."""
    return [text] if text in registry.samplers else text.split(":")


def _ddpm(task: SamplerTask) -> SamplerTable:
    from harness.diffusion.ddpm import ddpm

    return ddpm(task.timesteps_of("ddpm"), task.respacing, learned_variance=task.learned_variance)


def _ddim(task: SamplerTask) -> SamplerTable:
    from harness.diffusion.ddpm import ddim

    return ddim(task.timesteps_of("ddim"), task.respacing, eta=task.eta)


def _ddim_ldm(task: SamplerTask) -> SamplerTable:
    from harness.diffusion.ddpm import ddim_ldm

    if task.spacing not in ("", "respaced"):
        raise UserError(f"the sampler ddim-ldm has its own timesteps: leave out the spacing {shown(task.spacing)}")
    return ddim_ldm(task.timesteps_of("ddim-ldm"), task.steps, eta=task.eta)


LAST_STEP = 0.04  # SiT's last_step_size


def _euler_maruyama(task: SamplerTask) -> SamplerTable:
    """On SiT's own times unless a grid is named: evenly from noise to t = SIZE, and from there to the image at once."""
    import numpy as np

    from harness.diffusion.grids import END_MARGIN, at_times
    from harness.diffusion.processes import Process
    from harness.diffusion.solvers import euler_maruyama

    options = dict(task.options)
    size = options.pop("size", LAST_STEP)
    has_last = options.get("last") != "none"
    on_own_times = not task.spacing and isinstance(task.process, Process) and task.process.is_bounded
    if size != LAST_STEP and not (on_own_times and has_last):
        raise UserError(
            f"the sampler euler-maruyama has a last step of {size:g} on its own times only: leave out SIZE"
            + ("" if has_last else ", as LAST is none")
        )
    if isinstance(task.process, Process) and options.get("diffusion") == "sbdm":
        begins_at_noise = task.process.coefficients(np.float64(task.last), np).a < 1e-12
        if begins_at_noise:  # where this diffusion is infinite (SiT begins at its sample_eps)
            task = dataclasses.replace(task, last=task.last - END_MARGIN)
    if not on_own_times or task.steps == 1:
        return euler_maruyama(task.nodes(), **options)
    assert isinstance(task.process, Process)
    times = (
        np.append(np.linspace(task.last, size, task.steps), 0.0)
        if has_last
        else np.linspace(task.last, task.first, task.steps + 1)
    )
    return euler_maruyama(at_times(task.process, times), **options)


def _edm_stochastic(task: SamplerTask) -> SamplerTable:
    from harness.diffusion.solvers import edm_stochastic

    options = {f"s_{name}": value for name, value in task.options.items()}
    if options and options["s_min"] > options["s_max"]:
        raise UserError(
            f"the sampler edm-stochastic adds noise where sigma lies from MIN to MAX, and {options['s_min']:g} is more than "
            f"{options['s_max']:g}"
        )
    return edm_stochastic(task.nodes(), **options)


def _of_nodes(name: str, nodes_per_step: int = 1, **options: int) -> Callable[[SamplerTask], SamplerTable]:
    """The function `name` of `harness.diffusion.solvers` on the task's grid."""

    def make(task: SamplerTask) -> SamplerTable:
        from harness.diffusion import solvers

        table: SamplerTable = getattr(solvers, name)(task.nodes(nodes_per_step * task.steps), **options)
        return table

    return make


BUILT_IN = (
    SamplerSpec(
        name="ddpm",
        summary="ancestral sampling over respaced steps (Ho et al. 2020; the paper's, 250)",
        make=_ddpm,
        needs_timesteps=True,
    ),
    SamplerSpec(
        name="ddim",
        summary="DDIM (Song et al. 2021); --eta 0 is deterministic",
        make=_ddim,
        has_eta=True,
        needs_timesteps=True,
    ),
    SamplerSpec(
        name="ddim-ldm",
        summary="DDIM over the timesteps of LDM's code, which ends one step early",
        make=_ddim_ldm,
        has_eta=True,
        needs_timesteps=True,
    ),
    SamplerSpec(
        name="euler", summary="first-order ODE: DDIM on any schedule, Euler's rule on flow", make=_of_nodes("euler")
    ),
    SamplerSpec(
        name="heun", summary="trapezoid rule, 2 evaluations a step (Karras et al. 2022)", make=_of_nodes("heun")
    ),
    SamplerSpec(
        name="edm-stochastic",
        summary="Heun with fresh noise before steps (Karras et al. 2022, algorithm 2); schedule ve",
        make=_edm_stochastic,
        options=(
            SamplerOption(name="churn", default=40.0, low=0.0),
            SamplerOption(name="min", default=0.05, low=0.0),
            SamplerOption(name="max", default=50.0, low=0.0),
            SamplerOption(name="noise", default=1.003, low=0.0, high=10.0),
        ),
    ),
    SamplerSpec(
        name="euler-maruyama",
        summary="reverse SDE, first order (SiT's; schedules in continuous time)",
        make=_euler_maruyama,
        options=(
            SamplerOption(
                name="diffusion", default="sigma", choices=("sigma", "sbdm", "constant", "linear", "decreasing")
            ),
            SamplerOption(name="last", default="mean", choices=("mean", "tweedie", "euler", "none")),
            SamplerOption(name="size", default=LAST_STEP, low=0.001, high=0.5),
        ),
    ),
    SamplerSpec(
        name="dpm++-2m", summary="DPM-Solver++ multistep, order 2 (Lu et al. 2022)", make=_of_nodes("dpm_solver_2m")
    ),
    SamplerSpec(
        name="dpm++-2s", summary="DPM-Solver++ single step, order 2, 2 evaluations", make=_of_nodes("dpm_solver_2s", 2)
    ),
    SamplerSpec(name="dpm++-3m", summary="DPM-Solver++ multistep, order 3", make=_of_nodes("dpm_solver_3m")),
    SamplerSpec(
        name="sde-dpm++-2m", summary="SDE-DPM-Solver++ multistep, order 2", make=_of_nodes("sde_dpm_solver_2m")
    ),
    SamplerSpec(name="unipc-2", summary="UniPC, order 2 (Zhao et al. 2023)", make=_of_nodes("unipc", order=2)),
    SamplerSpec(name="unipc-3", summary="UniPC, order 3", make=_of_nodes("unipc", order=3)),
    SamplerSpec(
        name="dopri5",
        summary="adaptive ODE, Dormand-Prince 5(4) with rtol 1e-3 and atol 1e-6 (SiT's; schedules in continuous time)",
        make=None,
    ),
)
