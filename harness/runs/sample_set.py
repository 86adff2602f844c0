"""What a sample set of a run is: its request, everything that decides its bytes, its folder's name, its labels.

Sampling and studies both call `sample_request`, so that what one has made the other finds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.autoencoders.files import identity_behind_latents
from harness.errors import UserError
from harness.io import files
from harness.protocols import Sampling
from harness.randomness import Purpose, integers
from harness.runs.run import Run

PRECISION = "float32"  # of the network's arithmetic in sampling, unless another one is named
BATCH = 128  # images of one batch on an accelerator
SHARD_GFLOPS = 500_000.0  # of a batch on a CPU, where a shard should be minutes, not hours, of work


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One sample set of a run: the checkpoint of `step`, `sampling` with `steps` sampler steps, `count` images."""

    step: int
    sampling: Sampling
    steps: int
    count: int
    precision: str
    batch: int  # can move the last bits of float32 arithmetic
    compile: str  # "on" or "off"; can move the last bits, too
    checkpoint_sha256: str
    decoder: dict[str, Any] | None  # identity of what decodes latents (`harness.autoencoders.files.identity`)

    @property
    def eta(self) -> float | None:
        """DDIM's share of noise; None for DDPM, which has no such setting."""
        return None if self.sampling.sampler == "ddpm" else self.sampling.eta

    @property
    def guidance_channels(self) -> str | None:
        """The channels that are guided; None: there is no guidance."""
        return None if self.sampling.guidance_scale == 1 else self.sampling.guidance_channels

    @property
    def settings(self) -> dict[str, Any]:
        """The sampling settings as plain data, with the one number of steps; None for what has no effect."""
        settings = {
            **dataclasses.asdict(self.sampling),
            "steps": self.steps,
            "eta": self.eta,
            "guidance_channels": self.guidance_channels,
            "precision": self.precision,
        }
        if self.compile != "off":
            settings["compile"] = self.compile
        return settings

    def identity(self, run: Run) -> dict[str, Any]:
        """Everything that decides the bytes of the images, as plain data."""
        return {
            "run": run.identity,
            "training_steps": self.step,
            "checkpoint_sha256": self.checkpoint_sha256,
            "sampling": self.settings,
            **({} if self.decoder is None else {"decoder": self.decoder}),
            "count": self.count,
            "batch": self.batch,
        }

    def name(self, run: Run) -> str:
        """The folder's name below RUN/samples: readable, and unique through a part of the identity's hash."""
        guidance = f"-cfg{self.sampling.guidance_scale:g}" if self.sampling.guidance_scale != 1 else ""
        short = files.sha256_json(self.identity(run))[:8]
        return f"step{self.step}-{self.sampling.sampler}{self.steps}{guidance}-n{self.count}-{short}"


def sample_request(
    run: Run,
    step: int,  # whose EMA checkpoint is sampled
    sampling: Sampling,
    steps: int,  # of the sampler; `sampling.steps` is not used
    count: int,
    *,
    gflops_image: float,  # sampling compute of one image
    precision: str = PRECISION,
    batch: int | None = None,  # None: `default_batch`
    compile: str | None = None,  # None: as the run was created
    decoder: dict[str, Any] | None = None,  # identity; None: `default_decoder`
) -> SampleRequest:
    """The sample set that these settings stand for. Reads a few small files and imports no framework.

    The checkpoint's hash is taken as its state.json states it; `harness.runs.checkpoints.verify` compares it with the
    weights. Raises `UserError` where the run has no checkpoint of `step`.
    """
    available = run.ema_checkpoint_steps()
    if step not in available:
        have = ", ".join(map(str, available)) or "none yet"
        raise UserError(
            f"{run.folder} has no EMA checkpoint of step {step} (it has: {have}); train to it with --steps {step}"
        )
    state = run.ema_checkpoint(step) / "state.json"
    try:
        checkpoint_sha256 = files.read_json(state, "checkpoint")["files"]["ema.safetensors"]["sha256"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{state} is not a checkpoint's state of this harness ({error})") from error
    return SampleRequest(
        step=step,
        sampling=sampling,
        steps=steps,
        count=count,
        precision=precision,
        batch=batch or default_batch(gflops_image, run.resolved.device),
        compile=compile or run.resolved.compile,
        checkpoint_sha256=checkpoint_sha256,
        decoder=default_decoder(run) if decoder is None else decoder,
    )


def default_decoder(run: Run) -> dict[str, Any] | None:
    """The identity of what decodes the samples of a run in latents: the autoencoder that made them. None: pixels.

    Known from run.json alone: the weights, which may be large or gone, are neither read nor hashed.
    """
    latents = run.identity.get("latents")
    return None if latents is None else identity_behind_latents(latents, run.source_paths.get("vae", ""))


def default_batch(gflops_per_image: float, device: str) -> int:
    """The batch size of sampling."""
    if not device.startswith("cpu"):
        return BATCH
    return max(1, min(BATCH, int(SHARD_GFLOPS / max(gflops_per_image, 1e-9))))


def labels_of(policy: str, seed: int, count: int, num_classes: int) -> np.ndarray:
    """Labels of samples 0 ... count-1, int64 (count,).

    policy: "random" draws each uniformly, "balanced" goes through the classes in turn.
    """
    index = np.arange(count, dtype=np.int64)
    if policy == "balanced":
        return index % num_classes
    return integers(seed, Purpose.SAMPLE_LABEL, index, 0, num_classes)
