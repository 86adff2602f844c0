"""Post-hoc EMA: the average of a run with any width, put together after training from the averages that it has saved.

    RUN/posthoc/step-N/{ema-0.05,ema-0.1}.safetensors, state.json: the power-function averages after N steps, a snapshot

Karras et al. 2024, arXiv:2312.02696, sec. 3 and appendix C. An average is an integral of the weights over training time
with a profile p(tau); so the linear combination of saved averages whose profile is nearest to the wanted one, by least
squares with weights that sum to 1, is nearest to the wanted average. The profile of step t and exponent gamma (`harness.engines.ema`) is
(gamma + 1) tau^gamma / t^(gamma + 1) for tau in [0, t] and 0 after it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.engines.ema import gamma_of, power_part
from harness.errors import UserError
from harness.io import files
from harness.runs import checkpoints
from harness.runs.run import Run

logger = logging.getLogger(__name__)

MAX_PROFILE_ERROR = 0.1  # a larger one is logged as a warning

Floats = npt.NDArray[np.float64]


def inner_products(
    steps: npt.ArrayLike,  # (A,)
    gammas: npt.ArrayLike,  # (A,)
    other_steps: npt.ArrayLike,  # (B,)
    other_gammas: npt.ArrayLike,  # (B,)
) -> Floats:
    """The integrals of the products of two profiles, float64 (A, B): one profile by each step and gamma.

    With the earlier step u and the later step t, whose exponent is g:
    (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) x (u / t)^g / t. In this form nothing overflows.
    """
    a, b = np.asarray(steps, np.float64)[:, None], np.asarray(other_steps, np.float64)[None, :]
    gamma_a, gamma_b = np.asarray(gammas, np.float64)[:, None], np.asarray(other_gammas, np.float64)[None, :]
    later = np.maximum(a, b)
    exponent = np.where(a > b, gamma_a, gamma_b)
    factor = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return factor * (np.minimum(a, b) / later) ** exponent / later


def solve_weights(
    steps: npt.ArrayLike,  # (N,): of the saved averages
    gammas: npt.ArrayLike,  # (N,)
    step: int,  # of the wanted average
    gamma: float,
) -> tuple[Floats, float]:
    """(weights float64 (N,), error): of the combinations of N profiles whose weights sum to 1, the one nearest to the wanted.

    Without the constraint the sum is only near 1, and all that the averages have in common, such as the initial weights,
    would be scaled by it. Of random walks with 8 snapshots of 0.05 and 0.1 and widths from 0.07 to 0.15, the error of the
    average is then 1.8 to 4.1 times larger, and 8 to 26 times if the walk begins far from zero. EDM2's code divides the weights
    by their sum (training/phema.py @4bf8162), which is as good or up to 2.1 times worse (`tests/harness/test_posthoc_ema.py`).

    error: the norm of the difference of the two profiles, divided by the norm of the wanted one. It is no error of the
    weights of a network: that also depends on how they moved.
    """
    matrix = inner_products(steps, gammas, steps, gammas)  # (N, N)
    right = inner_products(steps, gammas, [step], [gamma])[:, 0]  # (N,)
    square = inner_products([step], [gamma], [step], [gamma])[0, 0]
    # Scaled to profiles of norm 1, because those of late steps are much wider; the last row and column are the constraint
    # and its Lagrange multiplier. Least squares, because neighbouring profiles may be equal within float64.
    scale = 1 / np.sqrt(np.diag(matrix))
    length = np.linalg.norm(scale)
    system = np.block([[matrix * scale[:, None] * scale, scale[:, None] / length], [scale / length, np.zeros((1, 1))]])
    solved = np.linalg.lstsq(system, np.append(right * scale, 1 / length), rcond=None)[0][:-1]
    weights: Floats = solved * scale
    weights /= weights.sum()  # which the rounding of the solver leaves off by about 1e-12
    error = 1 + (weights @ matrix @ weights - 2 * weights @ right) / square
    return weights, float(np.sqrt(max(error, 0.0)))  # rounding may make it negative


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One saved power-function average of a run."""

    step: int
    width: float
    path: Path
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """The average of a run with some width after `step` steps, as a combination of snapshots.

    base_sha256: of the run's EMA checkpoint of `step`, which gives the tensors that are not averaged. weights: one for
    each snapshot. error: as in `solve_weights`.
    """

    step: int
    width: float
    base_sha256: str
    snapshots: tuple[Snapshot, ...]
    weights: tuple[float, ...]
    error: float

    @property
    def sha256(self) -> str:
        """Hash of all that decides the reconstructed weights."""
        data: dict[str, Any] = {
            "ema_width": self.width,
            "base": self.base_sha256,
            "snapshots": [[each.step, each.width, each.sha256] for each in self.snapshots],
        }
        if [(each.step, each.width) for each in self.snapshots] != [(self.step, self.width)]:
            data["sum"] = 1  # of the weights that were solved for; in the first version it was only near 1
        return files.sha256_json(data)


def plan_reconstruction(run: Run, step: int, width: float, base_sha256: str) -> Reconstruction:
    """How the average of `width` after `step` steps is made. Reads state files, no weights.

    base_sha256: as in `Reconstruction`. A width that was saved at this step is taken as it is; for another, all
    snapshots up to this step are combined. Raises `UserError` if the run has no snapshot of this step.
    """
    saved = [each for each in _snapshots(run) if each.step <= step]
    if step not in {each.step for each in saved}:
        have = ", ".join(map(str, sorted({each.step for each in saved}))) or "none"
        raise UserError(
            f"{run.folder} has no power-function averages of step {step} (it has: {have}), which --ema-width needs; "
            "train with --set ema_widths=0.05:0.10"
        )
    exact = [each for each in saved if (each.step, each.width) == (step, width)]
    if exact:
        weights, error = np.ones(1), 0.0
    else:
        weights, error = solve_weights(
            [each.step for each in saved], [gamma_of(each.width) for each in saved], step, gamma_of(width)
        )
    return Reconstruction(
        step=step, width=width, base_sha256=base_sha256, snapshots=tuple(exact or saved), weights=tuple(weights.tolist()),
        error=error,
    )  # fmt: skip


def _snapshots(run: Run) -> list[Snapshot]:
    """All snapshots of a run, by step and width. Raises `UserError` for a state file of another form."""
    found = []
    for step in run.posthoc_steps():
        folder = run.posthoc_checkpoint(step)
        entries = files.read_json(folder / "state.json", "checkpoint")
        try:
            for width in run.recipe.widths:
                path = folder / f"{power_part(width)}.safetensors"
                found.append(Snapshot(step=step, width=width, path=path, sha256=entries["files"][path.name]["sha256"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / 'state.json'} is not a checkpoint's state of this harness ({error})") from error
    return found


def write_reconstruction(reconstruction: Reconstruction, base: Path, target: Path) -> None:
    """Write the reconstructed weights as a safetensors file `target`, with all tensors that the file `base` has.

    base: the EMA weights of the same step; what is not averaged, such as tables of positions, is taken from it. Sums are
    in float64. Raises `UserError` for snapshots that are missing or damaged or do not fit.
    """
    from safetensors.numpy import save_file

    width, count = reconstruction.width, len(reconstruction.snapshots)
    error = reconstruction.error
    text = f"EMA width {width:g} of step {reconstruction.step} from {count} saved averages"
    if error > MAX_PROFILE_ERROR:
        logger.warning(
            f"{text} is only near: its profile differs by {100 * error:.2g} % from the one wanted; take a width nearer to "
            "the run's ema_widths, or train with more ema_snapshots"
        )
    else:
        logger.info(f"{text}; difference of the profile: {100 * error:.2g} %")
    for folder in sorted({each.path.parent for each in reconstruction.snapshots}):
        checkpoints.verify(folder)
    sums: dict[str, Floats] = {}
    for snapshot, weight in zip(reconstruction.snapshots, reconstruction.weights, strict=True):
        for name, array in checkpoints.tensors(snapshot.path):
            term = weight * array.astype(np.float64)
            if name not in sums:
                sums[name] = term
            elif sums[name].shape == term.shape:
                sums[name] += term
            else:
                raise UserError(f"{snapshot.path} does not fit the run: {name} has the shape {term.shape}")
    arrays = {}
    for name, array in checkpoints.tensors(base):
        averaged = sums.pop(name, None)
        arrays[name] = array if averaged is None else averaged.astype(array.dtype)
    if sums:
        raise UserError(f"{reconstruction.snapshots[-1].path} does not fit {base}: {min(sums)} is not in it")
    with files.explained(target):
        save_file(arrays, target)
