"""Samplers by name: functions that make a table from a process, a number of steps and the settings.

`harness.diffusion.solvers` and `ddpm` are imported when a table is made, so that listing samplers is fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
class SamplerSpec:
    """A named sampler.

    make: function of a `SamplerTask` that returns the `SamplerTable`, or raises UserError where they do not fit. None: the
    adaptive sampler (`harness.diffusion.adaptive`), which has no table, no steps to set and no evaluations known before.
    has_eta: whether the table depends on eta; if not, sample sets and records have no eta.
    """

    name: str
    summary: str
    make: Callable[[SamplerTask], SamplerTable] | None
    has_eta: bool = False


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


def _euler_maruyama(task: SamplerTask) -> SamplerTable:
    """On SiT's own times unless a grid is named: evenly from noise to t = 0.04, and from there to the image at once."""
    import numpy as np

    from harness.diffusion.grids import at_times
    from harness.diffusion.processes import Process
    from harness.diffusion.solvers import euler_maruyama

    if task.spacing or not isinstance(task.process, Process) or not task.process.is_bounded or task.steps == 1:
        return euler_maruyama(task.nodes())
    return euler_maruyama(at_times(task.process, np.append(np.linspace(task.last, 0.04, task.steps), 0.0)))


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
    ),
    SamplerSpec(name="ddim", summary="DDIM (Song et al. 2021); --eta 0 is deterministic", make=_ddim, has_eta=True),
    SamplerSpec(
        name="ddim-ldm",
        summary="DDIM over the timesteps of LDM's code, which ends one step early",
        make=_ddim_ldm,
        has_eta=True,
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
        make=_of_nodes("edm_stochastic"),
    ),
    SamplerSpec(
        name="euler-maruyama",
        summary="reverse SDE, first order (SiT's; schedules in continuous time)",
        make=_euler_maruyama,
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
