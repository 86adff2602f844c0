"""Stages loss and EMA: how the training went, and which average of its weights was sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance
from typing import Any

import numpy as np

from harness.diagnose.expectation import Expectation
from harness.diagnose.finding import FAULT, OK, SUSPECT, UNKNOWN, Finding
from harness.diagnose.subject import Subject
from harness.runs import checkpoints
from harness.runs.checkpoints import Checkpoint
from results.reference_points import check, loss_at, losses_at

# One other run tells nothing of the spread over training seeds. Over seeds, the mean loss of these windows differs by about
# 1 % besides the noise of the batches; three times as much counts as worse.
SEEDS_SHARE = 0.03
NOISES = 4.0  # standard errors of the mean difference of two logs
PARTS = 10  # of the steps that are compared, whose means give the standard error
POINT_LEVEL = 0.005  # share of healthy runs whose loss is at fault against a reference point: one of many stages
FRACTIONS = (0.25, 0.5, 1.0)  # of the shared steps, at which two runs are compared
RISEN = 1.3  # the loss at the end over the lowest window: more is a training that went wrong
# Items of a recipe that say nothing against a run: how long averages are kept, and how often they are saved.
_NO_TRAINING = ("ema_decay", "ema_ramp", "ema_widths", "ema_snapshots")


def check_loss(subject: Subject, expected: Expectation) -> Finding:
    """The loss curve against the expectation's; without one, whether it fell and stayed down. Recipes are compared too."""
    stage = "loss"
    if subject.run is None:
        return Finding(
            stage=stage, status=UNKNOWN, measured="the samples have no run beside them, so no log of the loss"
        )
    losses = subject.losses[: subject.step]
    if len(losses) < PARTS:
        return Finding(stage=stage, status=UNKNOWN, measured=f"the log has {len(losses)} steps")
    recipe = subject.run.identity["recipe"]
    changed = _recipe_text(recipe, expected.recipe)
    if expected.point is not None:
        steps = [quantity.step for quantity in expected.point.values if quantity.name == "loss"]
        mine = losses_at(losses, steps)
        if mine:
            found = check(expected.point, mine, recipe, POINT_LEVEL)
            far = [each for each in found.deviations if each.side != "as expected"]
            text = f"loss {mine[max(mine, key=lambda each: each.step)]:.4g} at step {max(each.step for each in mine)}"
            last = found.deviations[-1]
            wanted = f"{last.low:.4g} to {last.high:.4g} ({found.seeds} seeds)"
            if far:
                words = ", ".join(f"{each.side} at step {each.quantity.step} ({each.value:.4g})" for each in far)
                return Finding(stage=stage, status=FAULT, measured=f"{words}{changed}", expected=wanted)
            return Finding(stage=stage, status=SUSPECT if changed else OK, measured=f"{text}{changed}", expected=wanted)
    if len(expected.losses) >= PARTS:
        return _against_run(stage, losses, expected.losses, changed)
    return _alone(stage, losses, changed)


def _against_run(stage: str, losses: Sequence[float], theirs: Sequence[float], changed: str) -> Finding:
    """The loss against that of one other run, over the second half of the steps until several shares of those both have."""
    last = min(len(losses), len(theirs))
    far, measured, wanted = [], "", ""
    for fraction in FRACTIONS:
        step = max(2 * PARTS, round(fraction * last))
        # Step by step, because both fall: the differences of the logs do not.
        pairs = [
            (a, b) for a, b in zip(losses[step // 2 : step], theirs[step // 2 : step], strict=False) if a > 0 and b > 0
        ]
        if len(pairs) < PARTS:
            continue
        ratios = [math.log(a / b) for a, b in pairs]
        size = len(ratios) // PARTS
        parts = [fmean(ratios[start : start + size]) for start in range(0, PARTS * size, size)]
        ratio, tolerance = fmean(ratios), NOISES * math.sqrt(variance(parts) / PARTS) + SEEDS_SHARE
        mine, other = fmean(a for a, _ in pairs), fmean(b for _, b in pairs)
        measured = f"loss {mine:.4g} in the steps to {step}"
        wanted = f"{other:.4g}, up to {math.expm1(tolerance):.0%} more or less"
        if abs(ratio) > tolerance:
            far.append(f"{'worse' if ratio > 0 else 'better'} by {abs(math.expm1(ratio)):.0%} in the steps to {step}")
    if far:
        return Finding(stage=stage, status=FAULT, measured=f"{'; '.join(far)}{changed}", expected=wanted)
    return Finding(stage=stage, status=SUSPECT if changed else OK, measured=f"{measured}{changed}", expected=wanted)


def _alone(stage: str, losses: Sequence[float], changed: str) -> Finding:
    """The loss without another to compare it with: it must fall and stay down."""
    windows = [loss_at(losses, step) for step in range(PARTS, len(losses) + 1, max(1, len(losses) // 50))]
    end, lowest = windows[-1], min(windows)
    text = f"loss {end:.4g} at the end, lowest {lowest:.4g}"
    if not math.isfinite(end) or end > RISEN * lowest:
        return Finding(
            stage=stage, status=FAULT, measured=f"{text}: it has risen{changed}", expected="a loss that stays down"
        )
    status = SUSPECT if changed else OK
    return Finding(stage=stage, status=status, measured=f"{text}{changed}", expected="a loss that stays down")


def _recipe_text(recipe: Mapping[str, Any], expected: Mapping[str, Any] | None) -> str:
    """`; learning_rate is 0.02, expected 0.002`; "" where the recipes agree in what decides the loss."""
    if expected is None:
        return ""
    differing = [
        f"{name} is {recipe.get(name, 'the default')}, expected {expected.get(name, 'the default')}"
        for name in dict.fromkeys([*expected, *recipe])
        if recipe.get(name) != expected.get(name) and name not in _NO_TRAINING
    ]
    return "".join(f"; {text}" for text in differing)


def raw_checkpoint(subject: Subject) -> Checkpoint | None:
    """The checkpoint of the sampled step with the weights themselves; None where it is no longer kept."""
    if subject.run is None:
        return None
    for folder in sorted(subject.run.checkpoints.glob("step-*")):
        if folder.name == f"step-{subject.step or 0:08d}" and (folder / "state.json").is_file():
            return checkpoints.verify(folder)
    return None


def check_ema(subject: Subject, expected: Expectation, drawn_with: str | None, ema_value: float | None) -> Finding:
    """The average of the weights that was sampled. drawn_with: "ema" or "raw", the weights that reproduce the samples; None:
    not told. ema_value: the distance of samples of the EMA weights, if the samples were drawn with others.
    """
    stage = "EMA"
    run = subject.run
    if run is None:
        return Finding(stage=stage, status=UNKNOWN, measured="the samples have no run beside them")
    decay = run.recipe.ema_decay
    wanted = None if expected.recipe is None else expected.recipe.get("ema_decay")
    wanted_text = "samples of the EMA weights" + ("" if wanted is None else f", decay {wanted:g}")
    if drawn_with == "raw":
        return Finding(
            stage=stage, status=FAULT, measured="the raw weights give these samples, and the EMA weights do not",
            expected=wanted_text, mended=ema_value,
        )  # fmt: skip
    if not decay and wanted:
        return Finding(stage=stage, status=FAULT, measured="decay 0: the EMA is the raw weights", expected=wanted_text)
    distance = _distance_to_raw(subject)
    if distance == 0 and decay:
        text = f"decay {decay:g}, and the saved EMA equals the raw weights"
        return Finding(stage=stage, status=FAULT, measured=text, expected=wanted_text)
    text = f"decay {decay:g}"
    text += "" if distance is None else f", {distance:.2g} of their norm from the raw weights"
    text += "; the EMA weights give these samples again" if drawn_with == "ema" else ""
    status = SUSPECT if wanted not in (None, decay) else OK
    return Finding(stage=stage, status=status, measured=text, expected=wanted_text)


def _distance_to_raw(subject: Subject) -> float | None:
    """|EMA - raw weights| over |raw weights|; None where the raw weights of the step are not kept."""
    raw = raw_checkpoint(subject)
    if raw is None or subject.run is None or subject.step not in subject.run.ema_checkpoint_steps():
        return None
    from safetensors.numpy import load_file

    weights = load_file(raw.part("model"))
    average = load_file(subject.run.ema_checkpoint(subject.step) / "ema.safetensors")
    gap = norm = 0.0
    for name, value in weights.items():
        if name in average and np.issubdtype(value.dtype, np.floating):
            gap += float(((value - average[name]).astype(np.float64) ** 2).sum())
            norm += float((value.astype(np.float64) ** 2).sum())
    return math.sqrt(gap / norm) if norm else None
