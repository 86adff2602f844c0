"""Loads a system: matches weights to its parts, checks them against each other, and reads a network when it is needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from harness import registry
from harness.errors import UserError
from harness.protocols import Recipe
from harness.runs import checkpoints
from harness.runs.run import build_arguments, open_run
from harness.systems.checks import check_system
from harness.systems.spec import Component, GuidanceClassifier, System, WeakNetwork

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DECODER = "decoder"  # the name of the decoder's weights; the other names are those of `System.parts`

Network: TypeAlias = Component | WeakNetwork | GuidanceClassifier
Part = TypeVar("Part", Component, WeakNetwork, GuidanceClassifier)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How the weights of a part were trained, if they come from a run."""

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
    entry: str = ""  # of the file; "": the file itself
    entry_in_identity: str = ""  # as `entry`; "" where it is the one that was always read
    # fields of `results.records.Training` on the data and the fork of the run; empty: not known
    origin: Mapping[str, Any] = field(default_factory=dict)
    trained_with: Sequence[Mapping[str, str]] = ()  # versions that trained the run in turn; empty: not known

    @property
    def trained(self) -> Trained | None:
        """How the weights were trained; None: they are a file."""
        if self.run is None or self.steps is None:
            return None
        recipe = Recipe(**self.run["recipe"], steps=self.steps)  # the recipe of an identity has no steps
        return Trained(recipe=recipe, steps=self.steps, seed=self.run["seed"])


@dataclass(frozen=True, kw_only=True)
class LoadedSystem:
    """A system with weights for each of its parts."""

    system: System
    sources: dict[str, Source]
    decoder: Path | None  # the decoder's weights; None: found by the decoder's name, or there is no decoder
    notes: tuple[str, ...] = ()  # one line for each item that a run changed in the system
    decoder_entry: str | None = None  # of the decoder's weights; None: the usual one

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the images of all its sample sets, as plain data. A sample set adds its own settings."""
        weights = {
            name: {
                "sha256": source.sha256,
                "run": source.run,
                "training_steps": source.steps,
                **({"entry": source.entry_in_identity} if source.entry_in_identity else {}),
            }
            for name, source in self.sources.items()
        }
        return {"system": self.system.as_dict(), "weights": weights}

    @property
    def components(self) -> list[tuple[Component, Source]]:
        """The base and the upsamplers in their order, each with its weights."""
        return [(part, self.sources[name]) for name, part in self.system.named_components.items()]


def load_parts(
    system: System, weights: Mapping[str, Path], entries: Mapping[str, str] = MappingProxyType({})
) -> LoadedSystem:
    """Match `weights` (name of a part: path) to the system's parts.

    entries: name of a part -> entry of its checkpoint, where the file has several that fit. If weights are a run, its
    backbone, arguments, objective, schedule and noise scale replace the part's. Raises `UserError` for a part without
    weights, weights without a part, a file that does not exist, and a run of another kind or number of classes. The
    decoder's weights are optional, and are not looked at here.
    """
    check_system(system)
    names = [*system.parts, *([DECODER] if system.decoder else [])]
    if unknown := [name for name in weights if name not in names]:
        raise UserError(f"system {system.name!r} has no part {unknown[0]!r}; it has {', '.join(names)}")
    if missing := [name for name in system.parts if name not in weights]:
        part = system.parts[missing[0]]
        raise UserError(
            f"system {system.name!r} needs weights of {', '.join(missing)}: give --weights {missing[0]}=FILE "
            f"(a checkpoint of {part.backbone}, or the folder of a run)"
        )
    if unknown := [name for name in entries if name not in names]:
        raise UserError(f"--entry {unknown[0]}: system {system.name!r} has the parts {', '.join(names)}")
    sources: dict[str, Source] = {}

    def resolve(name: str, part: Part) -> Part:
        """The part, as its run trained it if its weights are a run; adds its weights to `sources`."""
        path = weights[name].expanduser()
        if not path.exists():
            raise UserError(f"--weights {name}={path}: no such file or folder")
        if (path / "run.json").exists():
            if name in entries:
                raise UserError(f"--entry {name}={entries[name]}: {path} is a run, whose moving average is taken")
            part, sources[name] = _from_run(name, part, path)
        else:
            sources[name] = _from_file(part, path, entries.get(name))
        return part

    assert system.base is not None  # check_system has refused a system without one
    changed = replace(
        system,
        base=resolve("base", system.base),
        weak=None if system.weak is None else resolve("weak", system.weak),
        classifier=None if system.classifier is None else resolve("classifier", system.classifier),
        upsamplers=tuple(resolve(name, part) for name, part in system.named_upsamplers.items()),
    )
    check_system(changed)
    notes = tuple(note for name, part in changed.parts.items() for note in _notes(name, system.parts[name], part))
    return LoadedSystem(
        system=changed, sources=sources, decoder=weights.get(DECODER), notes=notes, decoder_entry=entries.get(DECODER)
    )


def _notes(name: str, before: Network, after: Network) -> Iterator[str]:
    """Yields one line for each item of a part that a run has changed, for the user."""
    for item in ("backbone", "objective", "schedule", "diffusion_steps", "noise_scale"):
        old, new = getattr(before, item, None), getattr(after, item, None)  # a classifier has no objective
        if old != new:
            yield f"{name}: {item} {new}, as its run was trained; the system has {old}"


def with_steps(loaded: LoadedSystem, steps: int) -> LoadedSystem:
    """A copy of the system with `steps` sampler steps in every component."""
    system = loaded.system
    assert system.base is not None
    changed = replace(
        system,
        base=replace(system.base, steps=steps),
        upsamplers=tuple(replace(each, steps=steps) for each in system.upsamplers),
    )
    check_system(changed)
    return replace(loaded, system=changed)


def _from_file(part: Part, path: Path, entry: str | None) -> Source:
    """The weights in the file or folder `path`, hashed but not loaded. entry: as in `load_parts`."""
    from harness.weights.files import open_weights
    from harness.weights.identify import markings_of

    file = open_weights(path, entry=entry, markings=markings_of([part.spec]))
    return Source(path=file.path, sha256=file.sha256(), entry=file.entry, entry_in_identity=file.entry_in_identity)


def _from_run(name: str, part: Part, folder: Path) -> tuple[Part, Source]:
    """(the part as the run in `folder` trained it, the run's newest EMA checkpoint). name: of the part."""
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
        "noise_scale": recipe.noise_scale,
    }
    if isinstance(part, Component):
        if part.conditioning_noise > recipe.conditioning_noise:
            raise UserError(
                f"--weights {name}={folder}: it was trained with conditioning_noise {recipe.conditioning_noise:g}, and the "
                f"system gives it {part.conditioning_noise:g}; train it with --set conditioning_noise="
                f"{part.conditioning_noise:g} or more"
            )
        if part.guidance.needs_null_label and recipe.label_dropout == 0:
            raise UserError(
                f"--weights {name}={folder}: trained without label dropout, which classifier-free guidance needs"
            )
    if not isinstance(part, GuidanceClassifier):
        changes["objective"] = recipe.objective
    checkpoint = checkpoints.verify(run.ema_checkpoint(steps))
    source = Source(
        path=checkpoint.part("ema"), sha256=checkpoint.sha256("ema"), run=run.identity, steps=steps,
        origin={**run.training_data, **run.fork}, trained_with=checkpoint.state.get("trained_with", ()),
    )  # fmt: skip
    return replace(part, **changes), source


def read_network(part: Network, source: Source) -> torch.nn.Module:
    """The torch network of a part, with its weights, which are in memory only once.

    Raises `UserError` for weights that do not fit, and for a file that has changed since `load_parts`.
    """
    from harness.compute.meta_torch import build_on_meta
    from harness.weights.load import load_into

    logger.info("reading %s from %s ...", part.backbone, source.path)
    arguments = part.build_arguments()
    net = build_on_meta(part.spec, arguments)
    non_persistent = {name for name, _ in net.named_buffers()} - set(net.state_dict())
    if non_persistent:  # no file holds these buffers; their values are computed only by a build outside the meta device
        net = part.spec.build("torch", **arguments)
    provenance = load_into(net, source.path, part.spec, entry=source.entry or None)
    if provenance.sha256 != source.sha256:  # the hash that `load_parts` computed
        raise UserError(f"{source.path} has changed since sampling began; give the same command again")
    if provenance.null_row_is_made and isinstance(part, Component) and part.guidance.needs_null_label:
        raise UserError(
            f"{source.path} has no row for the null label, which guidance needs: it was trained without label dropout; "
            "choose a system without guidance"
        )
    for note in provenance.notes:
        logger.info("  %s", note)
    return net
