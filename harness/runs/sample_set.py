"""The sampling stage: from a snapshot of a run to samples.npz with its sidecar.

Work is kept shard by shard, so a killed process repeats at most one shard, and the same command ends with the same
bytes. Image i depends on checkpoint, settings, seed and i alone; the batch it is drawn in is recorded because it can
move the last bits of float32 arithmetic.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.io import files
from harness.protocols import Sampling
from harness.randomness import Purpose, integers
from harness.runs import checkpoints
from harness.runs.run import Run

BATCH = 128


SHARD_GFLOPS = 500_000.0  # on a CPU a shard should be minutes, not hours, of work


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One sample set of a run: the snapshot of `step`, `sampling` with `steps` sampler steps, `count` images."""

    step: int
    sampling: Sampling
    steps: int
    count: int
    precision: str
    batch: int
    checkpoint_sha256: str
    decoder: dict[str, Any] | None = None  # identity of what decodes latents
    compile: str = "off"  # or "on", which can move the last bits as the batch can

    @property
    def settings(self) -> dict[str, Any]:
        """The sampling settings as plain data, with the one number of steps; None for what has no effect."""
        settings = {**dataclasses.asdict(self.sampling), "steps": self.steps, "precision": self.precision}
        if self.sampling.sampler == "ddpm":
            settings["eta"] = None
        if self.sampling.guidance_scale == 1:
            settings["guidance_channels"] = None
        if self.compile != "off":
            settings["compile"] = self.compile
        return settings

    def identity(self, run: Run) -> dict[str, Any]:
        """Everything that decides the bytes of the images."""
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
        """Folder name below RUN/samples: readable, and unique through a part of the identity's hash."""
        guidance = f"-cfg{self.sampling.guidance_scale:g}" if self.sampling.guidance_scale != 1 else ""
        short = files.sha256_json(self.identity(run))[:8]
        return f"step{self.step}-{self.sampling.sampler}{self.steps}{guidance}-n{self.count}-{short}"


def default_batch(gflops_per_image: float, device: str) -> int:
    """Images a forward pass while sampling."""
    if not device.startswith("cpu"):
        return BATCH
    return max(1, min(BATCH, int(SHARD_GFLOPS / max(gflops_per_image, 1e-9))))


def labels_of(policy: str, seed: int, count: int, num_classes: int) -> np.ndarray:
    """Labels of samples 0 ... count-1, int64: "random" draws each uniformly, "balanced" goes round the classes."""
    index = np.arange(count, dtype=np.int64)
    if policy == "balanced":
        return index % num_classes
    return integers(seed, Purpose.SAMPLE_LABEL, index, 0, num_classes)


def make_sample_request(
    run: Run,
    step: int,
    sampling: Sampling,
    steps: int,
    count: int,
    precision: str,
    batch: int,
    compile: str = "off",
    decoder: dict[str, Any] | None = None,
) -> SampleRequest:
    """A request for the snapshot of `step`, whose hash it carries; a missing snapshot is refused."""
    snapshots = run.ema_checkpoint_steps()
    if step not in snapshots:
        have = ", ".join(map(str, snapshots)) or "none yet"
        raise UserError(
            f"{run.folder} has no snapshot of step {step} (it has: {have}); train to it with --steps {step}"
        )
    snapshot = checkpoints.verify(run.ema_checkpoint(step))
    return SampleRequest(
        step=step, sampling=sampling, steps=steps, count=count, precision=precision, batch=batch,
        checkpoint_sha256=snapshot.sha256("ema"), compile=compile, decoder=decoder,
    )  # fmt: skip
