"""Checks of guidance and of a network's output channels, the same for all engines."""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import Protocol

from harness.diffusion.adaptive import AdaptivePlan
from harness.diffusion.plans import SamplerPlan
from harness.errors import RunError, UserError

GUIDED_CHANNELS = {  # how many of the epsilon channels are guided; None: all
    "first-3": 3,  # as published (facebookresearch/DiT models.py, forward_with_cfg): latent channel 3 stays conditional
    "all": None,
}


def guided_channels(rule: str, channels: int) -> int:
    """The number of epsilon channels that are guided; they are the first ones.

    rule: a key of GUIDED_CHANNELS. channels: the number of all epsilon channels.
    """
    count = GUIDED_CHANNELS[rule]
    return channels if count is None else min(count, channels)


def check_guidance(scale: float, channels: str, null_label: int | None) -> None:
    """Raise UserError for an unknown channel rule, a scale that is not finite, and guidance without a null label.

    channels: the rule, a key of GUIDED_CHANNELS. null_label: None for a network that was trained without label dropout.
    """
    if channels not in GUIDED_CHANNELS:
        closest = get_close_matches(channels, GUIDED_CHANNELS, n=1)
        hint = f"did you mean {closest[0]!r}? " if closest else ""
        raise UserError(f"unknown guidance channels {channels!r}: {hint}known are {', '.join(GUIDED_CHANNELS)}")
    if not math.isfinite(scale):
        raise UserError(f"guidance scale {scale} is not a finite number: give 1 for none, or for example 1.5")
    if scale != 1.0 and null_label is None:
        raise UserError(
            f"guidance scale {scale:g} needs a network trained with label dropout, and this one has no null label: "
            "give scale 1"
        )


def check_classifier_scale(scale: float) -> None:
    """Raise UserError for a scale that is not finite."""
    if not math.isfinite(scale):
        raise UserError(f"classifier scale {scale} is not a finite number: give 0 for none, or for example 1")


class NamedPlan(Protocol):
    """A `SamplerPlan`, or what a compiled loop knows of one."""

    @property
    def name(self) -> str:
        """Of the sampler."""

    @property
    def learned_variance(self) -> bool:
        """Whether the network must give 2 C channels."""


def check_channels(plan: NamedPlan, output_channels: int, channels: int) -> None:
    """Raise UserError if a network's output does not have the channels that `plan` needs.

    output_channels: channels of the network's output. channels: channels of the images.
    """
    # A plan with a fixed variance ignores the variance channels of a network that has them.
    fitting = (2 * channels,) if plan.learned_variance else (channels, 2 * channels)
    if output_channels not in fitting:
        raise UserError(
            f"the network gives {output_channels} channels for {channels}, and {plan.name} with "
            f"{'a learned' if plan.learned_variance else 'a fixed'} variance needs {' or '.join(map(str, fitting))}: "
            "choose the objective and the sampling variance alike"
        )


def divergence_error(plan: SamplerPlan, done: int) -> RunError:
    """The error of a sampler with non-finite values after `done` steps of the plan."""
    return RunError(
        f"sampling diverged: non-finite values after {plan.name} evaluation {done} of {plan.evaluations} "
        f"(t = {plan.table.times[done - 1]:g}); check the checkpoint, or sample in float32"
    )


def stuck_error(plan: AdaptivePlan, t: float) -> RunError:
    """The error of an adaptive sampler whose steps became too small, at the largest `t` of an image."""
    return RunError(
        f"sampling diverged: {plan.name} makes no progress at t = {t:g}, where values are not finite or change too fast for "
        "float32; check the checkpoint, or sample in float32 with a sampler of fixed steps"
    )
