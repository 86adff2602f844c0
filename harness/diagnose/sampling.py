"""Stages sampler, decoder and uint8: the samples drawn again, as they say they were made and as they should be."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.diagnose.expectation import Expectation
from harness.diagnose.finding import ABSENT, FAULT, OK, SUSPECT, UNKNOWN, Finding
from harness.diagnose.subject import Distance, Subject
from harness.diagnose.training import raw_checkpoint
from harness.diffusion.samplers import is_adaptive
from harness.engines.backend import get_backend
from harness.errors import UserError
from harness.pipeline.sample import decoder_of
from harness.planning.request import plan_of, request_of_run
from harness.runs import checkpoints
from harness.runs.run import Run
from harness.runs.sample_set import labels_of
from results.records import Sampling

if TYPE_CHECKING:
    from pathlib import Path

    from harness.autoencoders.decoder import Decoder

logger = logging.getLogger(__name__)

FEW = 16  # images that are drawn again to see which weights made them
LEVELS = 1  # largest difference of a pixel that counts as equal: other batches and processors move the last bit
EQUAL = 0.98  # share of the pixels that must be equal
DECODED = 32  # training images that are encoded and decoded again
# Settings that decide images, as `results.records.Sampling` names them.
_SETTINGS = (
    "sampler",
    "steps",
    "eta",
    "spacing",
    "guidance_scale",
    "guidance_interval",
    "guidance_rule",
    "clip_denoised",
    "precision",
)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a sample set of a run was drawn: settings of `harness.protocols.Sampling`, and those of the request."""

    sampling: dict[str, Any]
    steps: int
    precision: str
    batch: int
    count: int


def drawing_of(subject: Subject) -> Drawing | None:
    """How the samples say that they were drawn; None where they are not of a run."""
    identity = (subject.sidecar or {}).get("identity")
    if subject.run is None or not isinstance(identity, dict) or "sampling" not in identity:
        return None
    settings = {name: value for name, value in identity["sampling"].items() if value is not None}
    steps, precision = settings.pop("steps", 1), settings.pop("precision", "float32")
    settings.pop("compile", None)
    return Drawing(
        sampling=settings, steps=steps, precision=precision, batch=identity["batch"], count=identity["count"]
    )


class Redrawer:
    """Draws samples of a run's checkpoint again. Nothing is written."""

    def __init__(self, subject: Subject, drawing: Drawing):
        assert subject.run is not None and subject.step is not None
        self.run: Run = subject.run
        self.step, self.drawing, self.protocol = subject.step, drawing, subject.protocol
        self.ema = checkpoints.verify(self.run.ema_checkpoint(self.step)).part("ema")
        raw = raw_checkpoint(subject)
        self.raw: Path | None = None if raw is None else raw.part("model")

    def draw(
        self,
        count: int,
        *,
        weights: Path | None = None,  # None: the EMA's
        sampling: dict[str, Any] | None = None,  # settings other than the recorded ones
        steps: int | None = None,
        precision: str | None = None,
        decoder: Decoder | None = None,
    ) -> np.ndarray:
        """The first `count` images, uint8 (count, H, W, C)."""
        drawing = self.drawing
        steps = steps or drawing.steps
        settings = {**drawing.sampling, **(sampling or {})}
        adaptive = is_adaptive(settings.get("sampler", self.protocol.sampling.sampler))
        request = request_of_run(
            self.run, sampling=settings if adaptive else {**settings, "steps": (steps,)}, samples=count
        )
        batch = min(drawing.batch, count)
        sampler = get_backend(self.run.framework).make_sampler(
            request, self.run, weights or self.ema, plan_of(self.run.recipe, request.sampling, steps, request.spec.time),
            precision=precision or drawing.precision, batch=batch, compile="off", decoder=decoder,
        )  # fmt: skip
        # As many labels as the sample set has, so that a label does not depend on how many images are drawn again.
        labels = labels_of(
            request.sampling.label_policy, request.sampling.seed, drawing.count, self.protocol.num_classes
        )
        parts = []
        for start in range(0, count, batch):
            index = np.arange(start, min(start + batch, count), dtype=np.int64)
            parts.append(sampler.draw(index, labels[index], lambda: None))
        return np.concatenate(parts)


def same_pixels(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of images are equal up to LEVELS in a share EQUAL of the pixels."""
    gap = np.abs(a.astype(np.int16) - b.astype(np.int16))
    return a.shape == b.shape and float((gap <= LEVELS).mean()) >= EQUAL


@dataclass(frozen=True, kw_only=True)
class Redrawn:
    """What drawing the samples again has shown.

    drawn_with: "ema" or "raw", the weights that give the samples again; None: neither, or not tried. findings: of sampler
    and decoder. ema_value: the distance of samples of the EMA weights, if the samples were not drawn with them.
    """

    drawn_with: str | None
    ema_value: float | None
    findings: tuple[Finding, ...]


def check_sampling(subject: Subject, expected: Expectation, limit: int) -> Redrawn:
    """The stages sampler and decoder. limit: of the images that are drawn again for a distance."""
    drawing = drawing_of(subject)
    run = subject.run
    stated = _stated(subject, expected)
    width = subject.fields.sampling.ema_width
    if drawing is None or run is None or subject.step not in run.ema_checkpoint_steps() or width:
        why = "the checkpoint is not at hand, so nothing can be drawn again"
        why = f"drawn with the average of width {width:g}, which is not made again" if width else why
        sampler = Finding(stage="sampler", status=SUSPECT if stated else UNKNOWN, measured="; ".join([*stated, why]))
        absent = run is not None and subject.protocol.space == "pixels"
        decoder = Finding(
            stage="decoder", status=ABSENT if absent else UNKNOWN, measured="pixels" if absent else "no run beside the samples"
        )  # fmt: skip
        return Redrawn(drawn_with=None, ema_value=None, findings=(sampler, decoder))
    redrawer = Redrawer(subject, drawing)
    own = decoder_of(run, None)
    used, decoder_finding = _check_decoder(subject, redrawer, own, limit)
    few = min(FEW, len(subject.images))
    drawn_with = None
    if used is not None or own is None:
        for name, weights in (("ema", redrawer.ema), ("raw", redrawer.raw)):
            if weights is not None and same_pixels(
                redrawer.draw(few, weights=weights, decoder=used), subject.images[:few]
            ):
                drawn_with = name
                break
    ema_value = None
    count = min(limit, len(subject.images))
    if drawn_with == "raw" and subject.can_count(count):
        ema_value = _scaled(subject, subject.distance(redrawer.draw(count, decoder=used)), count).value
    sampler = _check_sampler(subject, expected, redrawer, used, drawn_with, stated, count)
    return Redrawn(drawn_with=drawn_with, ema_value=ema_value, findings=(sampler, decoder_finding))


def _stated(subject: Subject, expected: Expectation) -> list[str]:
    """The stated settings that are not as expected, in words."""
    mine, theirs = subject.fields.sampling, expected.sampling
    if theirs is None:
        return []
    words = []
    for name in _SETTINGS:
        a, b = getattr(mine, name), getattr(theirs, name)
        if name == "steps":
            if a is not None and expected.sampling_steps and a not in expected.sampling_steps:
                words.append(f"{a} steps, expected {_steps_text(expected.sampling_steps)}")
        elif None not in (a, b) and _usual(name, a) != _usual(name, b):
            words.append(f"{name.replace('_', ' ')} {a}, expected {b}")
    return words


def _usual(name: str, value: Any) -> Any:
    return value if name != "eta" else float(value or 0.0)


def _steps_text(steps: tuple[int, ...]) -> str:
    return " or ".join(map(str, steps))


def _check_sampler(
    subject: Subject,
    expected: Expectation,
    redrawer: Redrawer,
    decoder: Decoder | None,
    drawn_with: str | None,
    stated: list[str],
    count: int,
) -> Finding:
    """Settings against the expectation's; the same checkpoint with the expected ones, of several steps the most, in float32."""
    stage = "sampler"
    theirs = expected.sampling or Sampling()
    names = ("sampler", "eta", "spacing", "guidance_scale", "guidance_interval", "guidance_rule", "clip_denoised")
    settings = {name: value for name in names if (value := getattr(theirs, name)) is not None}
    wanted = f"{theirs.sampler or redrawer.drawing.sampling.get('sampler')}, {_steps_text(expected.sampling_steps)} steps, float32"
    again = {
        "ema": "the checkpoint gives these samples again",
        "raw": "the raw weights give these samples again",
        None: "the checkpoint does not give these samples again",
    }[drawn_with]
    if subject.protocol.space == "latents" and decoder is None:
        again = "not drawn again, because the decoder of the samples is not at hand"
        status = SUSPECT if stated else UNKNOWN
        return Finding(stage=stage, status=status, measured="; ".join([*stated, again]), expected=wanted)
    if not subject.can_count(count):
        status = SUSPECT if stated or drawn_with is None else OK
        return Finding(stage=stage, status=status, measured="; ".join([*stated, again]), expected=wanted)
    steps = max(expected.sampling_steps or (redrawer.drawing.steps,))
    try:
        better = subject.distance(
            redrawer.draw(count, sampling=settings, steps=steps, precision="float32", decoder=decoder)
        )
    except UserError as error:  # sampler and schedule do not fit together
        logger.info(f"note: not drawn with the expected settings: {error}")
        return Finding(
            stage=stage, status=SUSPECT if stated else UNKNOWN, measured="; ".join([*stated, again]), expected=wanted
        )
    scaled = _scaled(subject, better, count)
    own = subject.own_distance
    text = f"{subject.metric.key} {own.value:.4g}; with {steps} steps in float32 {scaled.value:.4g}"
    text = "; ".join([*stated, text, again])
    gains = own.value - scaled.value > np.hypot(own.half, scaled.half)
    if stated and gains and drawn_with != "raw":
        return Finding(stage=stage, status=FAULT, measured=text, expected=wanted, mended=scaled.value)
    if drawn_with is None and decoder_is_own(subject):
        # Neither weights nor settings give these images: they were made in another way than they say.
        status = FAULT if gains else SUSPECT
        return Finding(stage=stage, status=status, measured=text, expected=wanted, mended=scaled.value)
    return Finding(stage=stage, status=SUSPECT if stated else OK, measured=text, expected=wanted)


def decoder_is_own(subject: Subject) -> bool:
    """Whether the samples were decoded by the autoencoder that made the latents, or are of a run in pixels."""
    identity = (subject.sidecar or {}).get("identity") or {}
    decoder, latents = identity.get("decoder"), (subject.run.identity.get("latents") if subject.run else None)
    if decoder is None or latents is None:
        return True
    own = (latents.get("vae_sha256"), latents.get("vae_entry"))
    return (decoder.get("weights_sha256"), decoder.get("entry")) == own


def _scaled(subject: Subject, distance: Distance, count: int) -> Distance:
    """The distance of `count` images at the N of the samples: by as much higher or lower as theirs is with as few."""
    if count == len(subject.images):
        return distance
    few = subject.distance(subject.images[:count])
    factor = subject.own_distance.value / few.value if few.value > 0 else 1.0
    return Distance(value=distance.value * factor, half=distance.half * factor)


def _check_decoder(
    subject: Subject, redrawer: Redrawer, own: Decoder | None, limit: int
) -> tuple[Decoder | None, Finding]:
    """(the decoder of the samples, None where it is not at hand or there is none; the finding)."""
    stage = "decoder"
    run = subject.run
    assert run is not None
    if own is None:
        return None, Finding(stage=stage, status=ABSENT, measured="the run is in pixels")
    wanted = f"{own.name} ({own.sha256[:12]}), which made the latents"
    own_error = _reconstruction(subject, own, own)
    error_text = "" if own_error is None else f"; it gives training images back with an error of {own_error:.3g} levels"
    if decoder_is_own(subject):
        return own, Finding(stage=stage, status=OK, measured=f"that autoencoder{error_text}", expected=wanted)
    identity = (subject.sidecar or {})["identity"]["decoder"]
    count = min(limit, len(subject.images))
    mended = None
    if subject.can_count(count):
        mended = _scaled(subject, subject.distance(redrawer.draw(count, decoder=own)), count)
    own_distance = subject.own_distance if mended is not None else None
    text = f"decoder {identity['name']} ({identity['weights_sha256'][:12]})"
    if mended is not None and own_distance is not None:
        text += f": {subject.metric.key} {own_distance.value:.4g}, with {own.name} {mended.value:.4g}"
        worse = own_distance.value - mended.value > np.hypot(own_distance.half, mended.half)
        status = FAULT if worse else SUSPECT
    else:
        status = SUSPECT
    return None, Finding(
        stage=stage, status=status, measured=text + error_text, expected=wanted, mended=None if mended is None else mended.value
    )  # fmt: skip


def _reconstruction(subject: Subject, encoder: Decoder, decoder: Decoder) -> float | None:
    """The root mean square error, in levels of 255, of training images that are encoded and decoded; None without images.

    None also for an autoencoder with a codebook, which has no posterior to encode with.
    """
    if subject.training is None or encoder.kind != "kl":
        return None
    import torch

    rows = np.linspace(0, len(subject.training) - 1, min(DECODED, len(subject.training))).astype(np.int64)
    images = subject.training.images[rows]
    x = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1  # (n, C, H, W)
    if x.shape[1] != encoder.image_channels:
        return None
    means = encoder.posterior(x)[:, 0]
    scaled = (means - encoder.shift_factor) * encoder.scale_factor
    back = decoder.decode(scaled).cpu()
    return float((back - x).square().mean().sqrt() * 127.5)


def check_uint8(subject: Subject, expected: Expectation) -> Finding:
    """The rule of the conversion to uint8, and whether the pixels look as if it went wrong."""
    from evaluators.guards import GuardContext, check

    stage = "uint8"
    rule = subject.fields.sampling.uint8_rule
    wanted = None if expected.sampling is None else expected.sampling.uint8_rule
    context = GuardContext(minimum={}, names=(), classes=None)
    found = [
        each
        for each in check(np.asarray(subject.images), np.asarray(subject.reference.images), context)
        if each.name in ("unit-range", "signed-range", "half-range", "constant")
    ]
    text = f"rule {rule}" if rule else "rule not stated"
    wanted_text = f"rule {wanted}" if wanted else ""
    if found:
        status = FAULT if any(each.level == "refuse" for each in found) else SUSPECT
        return Finding(stage=stage, status=status, measured=f"{text}; {found[0].text}", expected=wanted_text)
    if rule and wanted and rule != wanted:
        # Half a level: truncation after an offset of 0.5 or without it. The images show it as a shift of their brightness.
        from harness.protocols import UINT8_RULES

        (shift, factor, offset), (shift_b, factor_b, offset_b) = UINT8_RULES[rule], UINT8_RULES[wanted]
        levels = (shift * factor + offset) - (shift_b * factor_b + offset_b)
        return Finding(
            stage=stage, status=SUSPECT, measured=f"{text}: mid-grey is {levels:+.2g} levels off", expected=wanted_text
        )
    return Finding(stage=stage, status=OK if rule or not wanted else UNKNOWN, measured=text, expected=wanted_text)
