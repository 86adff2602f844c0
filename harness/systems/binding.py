"""Sampling a system: its weights, its identity, and the sample set that comes of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.errors import UserError
from harness.runs import checkpoints
from harness.runs.run import build_arguments, open_run
from harness.systems.spec import Component, GuidanceClassifier, System

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DECODER = "decoder"  # the name of the decoder's weights beside those of the parts


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights of a part come from: a file of any known format, or a snapshot of a run."""

    path: Path
    sha256: str
    run: dict[str, Any] | None = None  # identity of the run
    steps: int | None = None  # of its training


@dataclass(frozen=True, kw_only=True)
class LoadedSystem:
    """A system with weights for each of its parts."""

    system: System
    sources: dict[str, Source]
    decoder: Path | None  # where the decoder's weights lie; None: by its name, or nothing to decode
    notes: tuple[str, ...] = ()  # where a run took the place of what the system says, a line each

    @property
    def identity(self) -> dict[str, Any]:
        """Everything but the settings of a sample set."""
        weights = {
            name: {"sha256": source.sha256, "run": source.run, "training_steps": source.steps}
            for name, source in self.sources.items()
        }
        return {"system": self.system.as_dict(), "weights": weights}

    @property
    def stages(self) -> list[tuple[Component, Source]]:
        """The base and the upsamplers in their order, each with its weights."""
        names = [name for name in self.system.parts if name != "classifier"]
        return [(stage, self.sources[name]) for stage, name in zip(self.system.stages, names, strict=True)]


def load_parts(system: System, weights: Mapping[str, Path]) -> LoadedSystem:
    """Match `weights` (name of a part, path) with the system's parts.

    A run brings its own arguments, objective and schedule. Refused: a part without weights, weights without a part, a
    file that is not there, a run of another kind or another number of classes.
    """
    system.check()
    wanted = [*system.parts, *([DECODER] if system.decoder else [])]
    if strange := [name for name in weights if name not in wanted]:
        raise UserError(f"system {system.name!r} has no part {strange[0]!r}; it has {', '.join(wanted)}")
    if lacking := [name for name in system.parts if name not in weights]:
        part = system.parts[lacking[0]]
        raise UserError(
            f"system {system.name!r} needs weights of {', '.join(lacking)}: give --weights {lacking[0]}=FILE "
            f"(a checkpoint of {part.backbone}, or the folder of a run)"
        )
    parts, sources = {}, {}
    for name, part in system.parts.items():
        path = weights[name].expanduser()
        if not path.exists():
            raise UserError(f"--weights {name}={path}: no such file or folder")
        parts[name], sources[name] = _of_run(name, part, path) if (path / "run.json").exists() else (part, _file(path))
    upsamplers = tuple(part for name, part in parts.items() if name.startswith("upsampler"))
    bound = replace(system, base=parts["base"], classifier=parts.get("classifier"), upsamplers=upsamplers)
    bound.check()
    notes = tuple(note for name, part in parts.items() for note in _notes(name, system.parts[name], part))
    return LoadedSystem(system=bound, sources=sources, decoder=weights.get(DECODER), notes=notes)


def _notes(name: str, said: Component | GuidanceClassifier, taken: Component | GuidanceClassifier) -> Iterator[str]:
    """What of a part the run brought otherwise than the system has it, which nobody should find out from the images."""
    for item in ("backbone", "objective", "schedule", "diffusion_steps"):
        before, after = getattr(said, item, None), getattr(taken, item, None)
        if before != after:
            yield f"{name}: {item} {after}, as its run was trained; the system has {before}"


def with_steps(bound: LoadedSystem, steps: int) -> LoadedSystem:
    """The same with so many sampler steps in every stage."""
    system = bound.system
    assert system.base is not None
    changed = replace(
        system,
        base=replace(system.base, steps=steps),
        upsamplers=tuple(replace(stage, steps=steps) for stage in system.upsamplers),
    )
    changed.check()
    return replace(bound, system=changed)


def _file(path: Path) -> Source:
    from harness.weights.files import open_weights, sha256

    file = open_weights(path).path
    return Source(path=file, sha256=sha256(file))


def _of_run(
    name: str, part: Component | GuidanceClassifier, folder: Path
) -> tuple[Component | GuidanceClassifier, Source]:
    """The part as the run in `folder` trained it, and its newest snapshot."""
    run = open_run(folder)
    steps = max(run.ema_checkpoint_steps(), default=0)
    if not steps:
        raise UserError(f"--weights {name}={folder}: the run has no snapshot yet; train it with `harness train` first")
    spec = registry.backbones.get(run.backbone)
    if spec.kind != part.spec.kind:
        raise UserError(
            f"--weights {name}={folder}: the run is of {run.backbone} ({spec.kind}); wanted is one of kind {part.spec.kind}"
        )
    objective = registry.objectives.get(run.recipe.objective)
    arguments = build_arguments(spec, run.protocol, objective.out_channels(run.protocol.in_channels))
    recipe = run.recipe
    changes: dict[str, Any] = {
        "backbone": run.backbone, "arguments": arguments, "schedule": recipe.schedule,
        "diffusion_steps": recipe.diffusion_steps,
    }  # fmt: skip
    if isinstance(part, Component):
        if part.conditioning_noise > recipe.conditioning_noise:
            raise UserError(
                f"--weights {name}={folder}: it was trained with conditioning_noise {recipe.conditioning_noise:g}, and the "
                f"system gives it {part.conditioning_noise:g}; train it with --set conditioning_noise="
                f"{part.conditioning_noise:g} or more"
            )
        changes["objective"] = recipe.objective
        if part.guidance_scale != 1 and recipe.label_dropout == 0:
            raise UserError(f"--weights {name}={folder}: trained without label dropout, so guidance cannot be had")
    snapshot = checkpoints.verify(run.ema_checkpoint(steps))
    source = Source(path=snapshot.part("ema"), sha256=snapshot.sha256("ema"), run=run.identity, steps=steps)
    return replace(part, **changes), source


def read_network(part: Component | GuidanceClassifier, source: Source) -> torch.nn.Module:
    """The torch network of a part without storage, then filled tensor by tensor: the weights are held once."""
    from harness.compute.meta_torch import build_on_meta
    from harness.weights.load import load_into

    logger.info(f"reading {part.backbone} from {source.path} ...")
    arguments = part.build_arguments()
    net = build_on_meta(part.spec, arguments)
    if set(dict(net.named_buffers())) - set(net.state_dict()):  # computed when it is built, and in no file
        net = part.spec.build("torch", **arguments)
    provenance = load_into(net, source.path, part.spec)
    if provenance.sha256 != source.sha256:  # hashed when it was named, read when it is needed
        raise UserError(f"{source.path} has changed since sampling began; give the same command again")
    for note in provenance.notes:
        logger.info(f"  {note}")
    return net
