"""Sample sets of runs: the request, the identity (all that decides the bytes), the folder's name and the labels.

Sampling and studies both call `sample_request`, so that both look for the same folder.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.autoencoders.files import identity_behind_latents
from harness.diffusion.samplers import has_eta, is_adaptive, name_with_steps
from harness.errors import UserError
from harness.io import files
from harness.protocols import Sampling
from harness.randomness import Purpose, integers
from harness.runs.posthoc_ema import plan_reconstruction
from harness.runs.run import Run

PRECISION = "float32"  # default arithmetic of the network in sampling
BATCH = 128  # default batch size on an accelerator
# Largest sampling compute of a batch on a CPU, so that a shard (one batch) takes minutes and not hours.
SHARD_GFLOPS = 500_000.0


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One sample set of a run: the checkpoint of `step`, `sampling` with `steps` sampler steps, `count` images."""

    step: int
    sampling: Sampling
    steps: int
    count: int
    precision: str
    batch: int  # can change the last bits of float32 arithmetic
    compile: str  # "on" or "off"; can change the last bits, too
    checkpoint_sha256: str  # of the EMA weights; with an `ema_width`, of all that its weights are reconstructed from
    decoder: dict[str, Any] | None  # identity of the decoder (`harness.autoencoders.files.identity`); None: in pixels

    @property
    def eta(self) -> float | None:
        """DDIM's share of noise; None for a sampler without this setting, such as DDPM."""
        return self.sampling.eta if has_eta(self.sampling.sampler) else None

    @property
    def guidance_channels(self) -> str | None:
        """The channels that are guided; None: there is no guidance."""
        return None if self.sampling.guidance_scale == 1 else self.sampling.guidance_channels

    @property
    def settings(self) -> dict[str, Any]:
        """The sampling settings as plain data, with `steps` as one number. Settings without effect are None.

        `compile` is left out when it is "off", as in the identities of sample sets from before this setting existed.
        """
        settings = {
            **dataclasses.asdict(self.sampling),
            "steps": None if is_adaptive(self.sampling.sampler) else self.steps,
            "eta": self.eta,
            "guidance_channels": self.guidance_channels,
            "precision": self.precision,
        }
        # Added later: older sample sets keep their identity.
        for name in ("spacing", "guidance_interval", "guidance_rule", "ema_width"):
            if not settings[name]:
                del settings[name]
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

    @property
    def short_settings(self) -> str:
        """Sampler, steps and guidance for names of folders: "ddpm250", "heun10-cfg1.5@0.1-0.8", "heun10-cfg1.5_NAME", "dopri5"."""
        # Not every file system has colons, as in `name_with_steps`.
        guidance = f"-cfg{self.sampling.guidance.short.replace(':', '_')}" if self.sampling.guidance_scale != 1 else ""
        return f"{name_with_steps(self.sampling.sampler, self.steps)}{guidance}"

    def name(self, run: Run) -> str:
        """The folder's name below RUN/samples; 8 digits of the identity's hash make it unique."""
        short = files.sha256_json(self.identity(run))[:8]
        return f"step{self.step}-{self.short_settings}-n{self.count}-{short}"


def sample_request(
    run: Run,
    step: int,  # whose EMA checkpoint is sampled
    sampling: Sampling,
    steps: int,  # of the sampler; `sampling.steps` is not used
    count: int,
    *,
    gflops_image: float,  # sampling compute of one image
    precision: str = PRECISION,  # "auto": that of the run's training
    batch: int | None = None,  # None: `default_batch`
    compile: str | None = None,  # None: as the run was created
    decoder: dict[str, Any] | None = None,  # identity; None: `default_decoder`
) -> SampleRequest:
    """The request of a sample set, with all defaults filled in. Reads a few small files and imports no framework.

    The hash of the checkpoint is read from its state.json and not compared with the weights, as
    `harness.runs.checkpoints.verify` does. Raises `UserError` if the run has no EMA checkpoint of `step`, or not the
    averages that an `ema_width` needs.
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
    if sampling.ema_width:
        checkpoint_sha256 = plan_reconstruction(run, step, sampling.ema_width, checkpoint_sha256).sha256
    return SampleRequest(
        step=step,
        sampling=sampling,
        steps=steps,
        count=count,
        precision=run.resolved.precision if precision == "auto" else precision,
        batch=batch or default_batch(gflops_image, run.resolved.device),
        compile=compile or run.resolved.compile,
        checkpoint_sha256=checkpoint_sha256,
        decoder=default_decoder(run) if decoder is None else decoder,
    )


def default_decoder(run: Run) -> dict[str, Any] | None:
    """The identity of the autoencoder that made the latents of a run, its default decoder. None: the run is in pixels.

    It comes from run.json: the weights, which may be large or gone, are neither read nor hashed.
    """
    latents = run.identity.get("latents")
    return None if latents is None else identity_behind_latents(latents, run.source_paths.get("vae", ""))


def default_batch(gflops_per_image: float, device: str) -> int:
    """The default batch size in sampling. device: as in `Resolved.device`, such as "cpu" or "cuda:1"."""
    if not device.startswith("cpu"):
        return BATCH
    return max(1, min(BATCH, int(SHARD_GFLOPS / max(gflops_per_image, 1e-9))))


def labels_of(policy: str, seed: int, count: int, num_classes: int) -> np.ndarray:
    """Labels of samples 0 ... count-1, int64 (count,).

    policy: "random": each label is uniform over the classes; "balanced": 0, 1, ..., num_classes - 1, 0, 1, ...
    Without classes (num_classes 0) all labels are 0, which no network reads.
    """
    num_classes = max(num_classes, 1)
    index = np.arange(count, dtype=np.int64)
    if policy == "balanced":
        return index % num_classes
    return integers(seed, Purpose.SAMPLE_LABEL, index, step=0, high=num_classes)
