"""A system with weights for each of its parts: matched, checked against each other, and read when they are needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from harness import registry
from harness.errors import UserError
from harness.protocols import Recipe
from harness.runs import checkpoints
from harness.runs.run import build_arguments, open_run
from harness.systems.spec import Component, GuidanceClassifier, System

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DECODER = "decoder"  # the name of the decoder's weights beside those of the parts

Part = TypeVar("Part", Component, GuidanceClassifier)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How the weights of a part were trained, where they are those of a run."""

    recipe: Recipe
    steps: int
    seed: int

    @property
    def images(self) -> int:
        """Training images, repetitions counted."""
        return self.steps * self.recipe.batch


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights of a part come from: a file of any known format, or an EMA checkpoint of a run."""

    path: Path
    sha256: str
    run: dict[str, Any] | None = None  # identity of the run
    steps: int | None = None  # of its training

    @property
    def trained(self) -> Trained | None:
        """The training behind the weights; None: they are a file."""
        if self.run is None or self.steps is None:
            return None
        recipe = Recipe(**{"steps": self.steps, **self.run["recipe"]})
        return Trained(recipe=recipe, steps=self.steps, seed=self.run["seed"])


@dataclass(frozen=True, kw_only=True)
class LoadedSystem:
    """A system with weights for each of its parts."""

    system: System
    sources: dict[str, Source]
    decoder: Path | None  # where the decoder's weights lie; None: by its name, or nothing to decode
    notes: tuple[str, ...] = ()  # one line for each item that a run changed in the system

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the images of every sample set of it, as plain data; the settings of one set come on top."""
        weights = {
            name: {"sha256": source.sha256, "run": source.run, "training_steps": source.steps}
            for name, source in self.sources.items()
        }
        return {"system": self.system.as_dict(), "weights": weights}

    @property
    def components(self) -> list[tuple[Component, Source]]:
        """The base and the upsamplers in their order, each with its weights."""
        names = [name for name in self.system.parts if name != "classifier"]
        return [(part, self.sources[name]) for part, name in zip(self.system.components, names, strict=True)]


def load_parts(system: System, weights: Mapping[str, Path]) -> LoadedSystem:
    """Match `weights` (name of a part: path) with the system's parts.

    A run brings its arguments, objective and schedule. Raises `UserError` for a part without weights, weights without
    a part, a file that is not there, and a run of another kind or another number of classes.
    """
    system.check()
    wanted = [*system.parts, *([DECODER] if system.decoder else [])]
    if strange := [name for name in weights if name not in wanted]:
        raise UserError(f"system {system.name!r} has no part {strange[0]!r}; it has {', '.join(wanted)}")
    if missing := [name for name in system.parts if name not in weights]:
        part = system.parts[missing[0]]
        raise UserError(
            f"system {system.name!r} needs weights of {', '.join(missing)}: give --weights {missing[0]}=FILE "
            f"(a checkpoint of {part.backbone}, or the folder of a run)"
        )
    sources: dict[str, Source] = {}

    def loaded(name: str, part: Part) -> Part:
        path = weights[name].expanduser()
        if not path.exists():
            raise UserError(f"--weights {name}={path}: no such file or folder")
        if (path / "run.json").exists():
            part, sources[name] = _from_run(name, part, path)
        else:
            sources[name] = _from_file(path)
        return part

    assert system.base is not None
    changed = replace(
        system,
        base=loaded("base", system.base),
        classifier=None if system.classifier is None else loaded("classifier", system.classifier),
        upsamplers=tuple(loaded(name, part) for name, part in system.named_upsamplers.items()),
    )
    changed.check()
    notes = tuple(note for name, part in changed.parts.items() for note in _notes(name, system.parts[name], part))
    return LoadedSystem(system=changed, sources=sources, decoder=weights.get(DECODER), notes=notes)


def _notes(name: str, before: Component | GuidanceClassifier, after: Component | GuidanceClassifier) -> Iterator[str]:
    """One line for each item that a run changed in a part: nobody should have to find it out from the images."""
    for item in ("backbone", "objective", "schedule", "diffusion_steps"):
        old, new = getattr(before, item, None), getattr(after, item, None)
        if old != new:
            yield f"{name}: {item} {new}, as its run was trained; the system has {old}"


def with_steps(loaded: LoadedSystem, steps: int) -> LoadedSystem:
    """The same system with `steps` sampler steps in every component."""
    system = loaded.system
    assert system.base is not None
    changed = replace(
        system,
        base=replace(system.base, steps=steps),
        upsamplers=tuple(replace(each, steps=steps) for each in system.upsamplers),
    )
    changed.check()
    return replace(loaded, system=changed)


def _from_file(path: Path) -> Source:
    from harness.weights.files import open_weights, sha256

    file = open_weights(path).path
    return Source(path=file, sha256=sha256(file))


def _from_run(name: str, part: Part, folder: Path) -> tuple[Part, Source]:
    """The part as the run in `folder` trained it, and the run's newest EMA checkpoint."""
    run = open_run(folder)
    steps = max(run.ema_checkpoint_steps(), default=0)
    if not steps:
        raise UserError(
            f"--weights {name}={folder}: the run has no EMA checkpoint yet; train it with `harness train` first"
        )
    spec = registry.backbones.get(run.backbone)
    if spec.kind != part.spec.kind:
        raise UserError(
            f"--weights {name}={folder}: the run is of {run.backbone} ({spec.kind}); wanted is one of kind {part.spec.kind}"
        )
    recipe = run.recipe
    objective = registry.objectives.get(recipe.objective)
    changes: dict[str, Any] = {
        "backbone": run.backbone,
        "arguments": build_arguments(spec, run.protocol, objective.out_channels(run.protocol.in_channels)),
        "schedule": recipe.schedule,
        "diffusion_steps": recipe.diffusion_steps,
    }
    if isinstance(part, Component):
        if part.conditioning_noise > recipe.conditioning_noise:
            raise UserError(
                f"--weights {name}={folder}: it was trained with conditioning_noise {recipe.conditioning_noise:g}, and the "
                f"system gives it {part.conditioning_noise:g}; train it with --set conditioning_noise="
                f"{part.conditioning_noise:g} or more"
            )
        if part.guidance_scale != 1 and recipe.label_dropout == 0:
            raise UserError(
                f"--weights {name}={folder}: trained without label dropout, which classifier-free guidance needs"
            )
        changes["objective"] = recipe.objective
    checkpoint = checkpoints.verify(run.ema_checkpoint(steps))
    source = Source(path=checkpoint.part("ema"), sha256=checkpoint.sha256("ema"), run=run.identity, steps=steps)
    return replace(part, **changes), source


def read_network(part: Component | GuidanceClassifier, source: Source) -> torch.nn.Module:
    """The torch network of a part, filled tensor by tensor from its weights, which are in memory only once.

    Raises `UserError` for weights that do not fit, and for a file that is another one by now.
    """
    from harness.compute.meta_torch import build_on_meta
    from harness.weights.load import load_into

    logger.info("reading %s from %s ...", part.backbone, source.path)
    arguments = part.build_arguments()
    net = build_on_meta(part.spec, arguments)
    if set(dict(net.named_buffers())) - set(net.state_dict()):  # computed when it is built, and in no file
        net = part.spec.build("torch", **arguments)
    provenance = load_into(net, source.path, part.spec)
    if provenance.sha256 != source.sha256:  # hashed when it was named, read when it is needed
        raise UserError(f"{source.path} has changed since sampling began; give the same command again")
    for note in provenance.notes:
        logger.info("  %s", note)
    return net
