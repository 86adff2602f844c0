"""Runs: one backbone trained on one protocol with one seed for a number of steps, in one folder.

    RUN/run.json                identity, resolved settings (measured when it was created), environment, source paths
    RUN/log.jsonl               one line per step: step, mse, vb (of a classifier: step, cross_entropy, accuracy)
    RUN/checkpoints/            the newest two checkpoints, from which training continues
    RUN/snapshots/step-N/       EMA checkpoint, for sampling
    RUN/posthoc/step-N/         averages of the recipe's ema_widths, for `harness sample --ema-width`
    RUN/samples/NAME/           samples.npz, samples.json, grid.png
    RUN/pictures/NAME/          pictures of single classes, to look at
    RUN/records.jsonl           measurements

A run can be killed at any time; the same command continues it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.diffusion.auxiliary import AuxiliaryCompute, read_auxiliary
from harness.errors import UserError, shown
from harness.io import files
from harness.plugins.code import Code
from harness.protocols import Protocol, Recipe, fill, from_dict
from harness.registry import auxiliary_losses, backbones, features, objectives
from harness.spec import BackboneSpec

SCHEMA = 1
BEFORE_RUN_FILE = frozenset(  # files that may exist if a run was killed while it was created
    {"lock", "checkpoints", "posthoc", "log.jsonl", f"log.jsonl{files.PARTIAL}", f"run.json{files.PARTIAL}"}
)
RUNS_FOLDER = Path("runs")  # folder of the runs, in the working directory


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """The definition of a run. Two runs are the same experiment if, and only if, their identities are equal."""

    backbone: str
    protocol: Protocol
    recipe: Recipe
    seed: int
    framework: str
    dataset_sha256: str
    latents: dict[str, Any] | None = None  # if it is trained in latents: which latents, of which autoencoder
    plugins: dict[str, Code] = dataclasses.field(default_factory=dict)  # see `training_plugins`
    auxiliary: AuxiliaryCompute | None = None  # of the recipe's auxiliary loss; no part of the identity

    @property
    def identity(self) -> dict[str, Any]:
        """What defines the run, as plain data. The number of steps is no part of it, because more steps continue the run."""
        protocol = self.protocol.as_dict()
        for part in ("recipe", "sampling", "summary", "samples", "suite"):
            del protocol[part]  # the recipe is an item of its own; the others do not change the training
        return {
            "backbone": self.backbone,
            "protocol": protocol,
            "recipe": recipe_identity(self.recipe),
            "seed": self.seed,
            "framework": self.framework,
            "dataset_sha256": self.dataset_sha256,
            **({} if self.latents is None else {"latents": self.latents}),
            **({"plugins": {role: code.sha256 for role, code in self.plugins.items()}} if self.plugins else {}),
        }

    @property
    def name(self) -> str:
        """Folder name; it ends with 8 digits of the identity's hash if the recipe differs from the protocol's."""
        protocol = Path(self.protocol.name).name  # a name may contain slashes
        base = f"{protocol}-{self.backbone}-seed{self.seed}"
        if self.framework != "torch":
            base += f"-{self.framework}"
        # steps=1 in both: the number of steps is not compared
        if dataclasses.replace(self.recipe, steps=1) != dataclasses.replace(self.protocol.recipe, steps=1):
            # Without the code of plug-ins: changed code finds the folder of its run, and is refused there.
            base += f"-{files.sha256_json(without_plugins(self.identity))[:8]}"
        return base


def training_plugins(backbone: str, recipe: Recipe) -> dict[str, Code]:
    """The code of plug-ins that decides a training, by what it brings: "backbone", "objective", ... Empty: all is built in."""
    codes = {"backbone": backbones.code(backbone), "objective": objectives.code(recipe.objective)}
    if recipe.auxiliary:
        wanted = read_auxiliary(recipe.auxiliary)
        codes["auxiliary loss"] = auxiliary_losses.code(wanted.name)
        codes["encoder"] = features.code(wanted.encoder) if wanted.encoder else None
    return {role: code for role, code in codes.items() if code is not None}


OF_TRAINING_ALONE = ("auxiliary loss", "encoder")


def without_plugins(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a run without the code of plug-ins, which older runs do not state (`check_plugins`)."""
    return {name: value for name, value in identity.items() if name != "plugins"}


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """The items of a recipe that define the experiment: all except `steps`, and except items that were added later and
    have their default value (`harness.protocols.ADDED_LATER`)."""
    return {
        item.name: value
        for item in dataclasses.fields(recipe)
        if (value := getattr(recipe, item.name)) != item.default or not item.metadata.get("added_later")
        if item.name != "steps"
    }


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Settings that were measured or chosen when the run was created. They are frozen because they decide bits."""

    device: str
    device_name: str
    precision: str
    micro_batch: int
    threads: int
    gradient_checkpointing: bool = False
    mesh: str = "1x1"  # device mesh DATAxMODEL (jax only)
    compile: str = "off"  # or "on": the network is compiled by torch.compile, in training and sampling
    deterministic: bool = False  # only deterministic algorithms on a GPU, in training and sampling


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that exists on disk. `identity` and `resolved` are read from its run.json."""

    folder: Path
    identity: dict[str, Any]
    resolved: Resolved
    environment: Mapping[str, Any]
    protocol: Protocol
    recipe: Recipe  # its `steps` are the protocol's, not those of this run, which more steps can continue
    source_paths: dict[str, str] = dataclasses.field(default_factory=dict)  # see `harness.data.examples`
    # Of a run that --fork created: fields of `results.records.Training` on its origin. Empty: it is no fork, or one from
    # before this was recorded.
    fork: dict[str, Any] = dataclasses.field(default_factory=dict)
    # Paths of the plug-in files that it was created with; never loaded from here, only named.
    plugin_files: tuple[str, ...] = ()
    auxiliary: AuxiliaryCompute | None = None  # of the recipe's auxiliary loss; None: it has none

    @property
    def backbone(self) -> str:
        return self.identity["backbone"]

    @property
    def seed(self) -> int:
        return self.identity["seed"]

    @property
    def framework(self) -> str:
        return self.identity["framework"]

    @property
    def training_data(self) -> dict[str, str]:
        """The fields of `results.records.Training` on data and plug-ins: hash of the images, and of latents and plug-ins if
        there are any."""
        latents = self.identity.get("latents")
        in_latents = {} if latents is None else {"latents_sha256": files.sha256_json(latents)}
        plugins = self.identity.get("plugins")
        with_plugins = {} if plugins is None else {"plugins_sha256": files.sha256_json(plugins)}
        return {"dataset_sha256": self.identity["dataset_sha256"], **in_latents, **with_plugins}

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def records(self) -> Path:
        return self.folder / "records.jsonl"

    def ema_checkpoint(self, step: int) -> Path:
        """Folder of the EMA checkpoint after `step` steps."""
        return self.folder / "snapshots" / f"step-{step:08d}"

    def ema_checkpoint_steps(self) -> list[int]:
        """Steps that have an EMA checkpoint, ascending."""
        return _steps_with_state(self.folder / "snapshots")

    def posthoc_checkpoint(self, step: int) -> Path:
        """Folder of the power-function averages after `step` steps (`harness.runs.posthoc_ema`)."""
        return self.folder / "posthoc" / f"step-{step:08d}"

    def posthoc_steps(self) -> list[int]:
        """Steps whose power-function averages were saved, ascending."""
        return _steps_with_state(self.folder / "posthoc")


def _steps_with_state(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in `folder`, ascending."""
    states = folder.glob("step-*/state.json")  # written last, when the weights are complete
    return sorted(int(path.parent.name.removeprefix("step-")) for path in states)


def create_run(
    folder: Path,
    spec: RunSpec,
    resolved: Resolved,
    environment: Mapping[str, Any],
    source_paths: dict[str, str] | None = None,  # of files on this machine that the run needs later
    fork: Mapping[str, Any] | None = None,  # see `Run.fork`
) -> Run:
    """Create the folder and its run.json; returns the run."""
    files.write_json(
        folder / "run.json",
        {
            "schema": SCHEMA,
            "identity": spec.identity,
            "protocol": spec.protocol.as_dict(),
            "resolved": dataclasses.asdict(resolved),
            "environment": environment,
            **({"places": source_paths} if source_paths else {}),
            **({"fork": fork} if fork else {}),
            **({} if spec.auxiliary is None else {"auxiliary": dataclasses.asdict(spec.auxiliary)}),
            **({"plugin_files": plugin_files} if (plugin_files := _files_of(spec.plugins)) else {}),
        },
    )
    return open_run(folder)


def open_run(folder: Path) -> Run:
    """The run in `folder`. Raises `UserError` if there is none, or if its run.json is not valid."""
    path = folder / "run.json"
    if not path.exists():
        raise UserError(f"{folder} is not a run: it has no run.json; `harness run` or `harness train` makes one")
    data = files.read_json(path, "run file")
    try:
        if data["schema"] > SCHEMA:
            raise UserError(f"{path} was written by a newer harness (schema {data['schema']}); update this one")
        protocol = from_dict(data["protocol"], str(path))
        # The recipe of an identity has no steps. `recipe_identity` makes the identity the same, whether or not the file
        # states the default of an item that was added later.
        items = {"steps": protocol.recipe.steps, **data["identity"]["recipe"]}
        recipe = fill(Recipe, items, f"{path}: [identity.recipe]")
        resolved = fill(Resolved, data["resolved"], f"{path}: [resolved]")
        if not isinstance(data["environment"], dict):
            raise TypeError(f"environment = {shown(data['environment'])}")
        auxiliary = data.get("auxiliary")
        return Run(
            folder=folder, identity={**data["identity"], "recipe": recipe_identity(recipe)}, resolved=resolved, environment=data["environment"],
            protocol=protocol, recipe=recipe, source_paths=dict(data.get("places", {})),
            fork=dict(data.get("fork", {})), plugin_files=tuple(data.get("plugin_files", ())),
            auxiliary=None if auxiliary is None else fill(AuxiliaryCompute, auxiliary, f"{path}: [auxiliary]"),
        )  # fmt: skip
    except UserError:  # which is a ValueError
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a run file of this harness: {error}") from error


def find_run(folder: Path, spec: RunSpec) -> Run | None:
    """The run in `folder`; None if there is none. Raises `UserError` if the folder holds another run or other files."""
    if not (folder / "run.json").exists():
        if folder.is_file():
            raise UserError(f"--out {folder} is a file; name a folder")
        if above := [parent for parent in folder.parents if parent.is_file()]:
            raise UserError(f"--out {folder} cannot be created, because {above[0]} is a file; name another folder")
        if folder.is_dir() and not {each.name for each in folder.iterdir()} <= BEFORE_RUN_FILE:
            raise UserError(f"--out {folder} holds other files and no run; name a new or empty folder")
        return None
    run = open_run(folder)
    if without_plugins(run.identity) == without_plugins(spec.identity):
        check_plugins(run, spec.plugins)
    elif run.identity != spec.identity:
        raise UserError(
            f"{folder} holds another run ({identity_difference(run.identity, spec.identity)}); name another --out"
        )
    return run


def check_plugins(run: Run, now: Mapping[str, Code], *, sampling: bool = False) -> None:
    """Raise `UserError` if the run was trained with other code of a plug-in than that of `now` (`training_plugins`).

    A run that does not state its code, because it was created before that was recorded, fits any. sampling: without what
    only training needs.
    """
    for role, sha256 in run.identity.get("plugins", {}).items():
        if sampling and role in OF_TRAINING_ALONE:
            continue
        code = now.get(role)
        if code is None or code.sha256 != sha256:
            raise UserError(
                f"{run.folder} was trained with other code of its {role} (sha256 {sha256[:12]}) than "
                f"{'that of this harness' if code is None else code}; put that code back, name another --out, or continue "
                f"from its checkpoint with --fork {run.folder} --out NEW"
            )


def _files_of(plugins: Mapping[str, Code]) -> list[str]:
    """The paths of the plug-in files, without repetitions."""
    return list(dict.fromkeys(str(code.file) for code in plugins.values() if code.file is not None))


def identity_difference(old: dict[str, Any], new: dict[str, Any], path: str = "") -> str:
    """The first item that differs between two identities, as text. path: keys of the enclosing items, as "protocol."."""
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            return identity_difference(before, after, f"{path}{key}.")
        return f"{path}{key} is {before!r} there and {after!r} here"
    return "no difference"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock the folder for this process. Raises `UserError` at once if another process has locked it.

    The kernel releases the lock when the process ends, however it ends. What is refused in this context leaves no folder
    behind that was not there before and holds nothing else.
    """
    existed, lock = folder.exists(), folder / "lock"
    with files.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if (
            not files.lock(descriptor) or os.fstat(descriptor).st_nlink == 0
        ):  # 0: removed, as below, since it was opened
            raise UserError(f"another process is using {folder}; wait for it or stop it")
        try:
            yield
        except UserError:
            if not existed and [path.name for path in folder.iterdir()] == ["lock"]:
                with suppress(OSError):
                    lock.unlink()
                    folder.rmdir()
            raise
    finally:
        os.close(descriptor)


def network_classes(spec: BackboneSpec, protocol: Protocol) -> int:
    """The number of classes of the network. Without classes (num_classes 0) it is 0, or 1 where labels can be dropped: such
    a network has a table of labels, whose one class all images have.
    """
    return max(protocol.num_classes, 0 if spec.null_label is None else 1)


def build_arguments(spec: BackboneSpec, protocol: Protocol, out_channels: int | None = None) -> dict[str, Any]:
    """The builder's arguments that the protocol decides: input size, channels, classes (and out_channels, if given)."""
    values = {
        "input_size": protocol.input_size,
        "in_channels": protocol.in_channels,
        "num_classes": network_classes(spec, protocol),
        "out_channels": out_channels,
    }
    arguments = {name: value for name, value in values.items() if name in spec.defaults and value is not None}
    if "low_res_size" in spec.defaults:  # an upsampler keeps the factor that its defaults have
        factor = spec.defaults["input_size"] / spec.defaults["low_res_size"]
        arguments["low_res_size"] = max(1, round(protocol.input_size / factor))
    return arguments
