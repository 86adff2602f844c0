"""Loads the weights of any accepted file into a torch network, without holding them twice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from harness import registry
from harness.errors import UserError
from harness.spec import BackboneSpec
from harness.weights.files import WeightFile, open_weights, unchanged, with_progress
from harness.weights.identify import (
    OWN_NAMES,
    choose_layout,
    contradiction,
    differences,
    markings_of,
    misfit,
    null_row_notes,
    translate,
    weight_map,
)
from harness.weights.maps import Layout, Mismatch, Recipe, Take, WithNullRow
from harness.weights.tensors import BY_TORCH_NAME, DTYPES, all_finite, raw_dtype, refuse_not_finite


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a network's weights come from."""

    path: Path  # the file that held them
    sha256: str
    format: str  # such as "DiT state dict, train.py checkpoint, torch zip"
    backbone: str | None  # name of the spec that was given
    dtypes: tuple[str, ...]  # of the tensors in the file, safetensors' names
    notes: tuple[str, ...]  # choices and conversions, one line each
    entry: str = ""  # of the file; "": the file itself
    null_row_is_made: bool = False  # whether the file has no embedding for "no class", so that guidance is not possible


def load_into(
    net: nn.Module, path: Path, spec: BackboneSpec | None = None, *, prefix: str = "", entry: str | None = None
) -> Provenance:
    """Load the file strictly into `net`: every tensor of its state dict, with its shape, and no other.

    net: on any device; if on the meta device, its parameters are made on the CPU, in their dtype. Tensors are read into
    their place one at a time, so the weights are in memory once. spec: backbone whose family's public files are accepted;
    None: the names must be those of the network or of a registered family. prefix: selects one part of a file, such as
    "first_stage_model." of an LDM's model.ckpt, and is dropped. entry: of a checkpoint that has several, as for
    `open_weights`. UserError, with the first problem, if the file does not
    fit; then `net` is unchanged. UserError also if damage is found while reading; then `net` must not be used.
    """
    state = net.state_dict(keep_vars=True)  # the parameters themselves, which `_fill` replaces on the meta device
    specs = [spec] if spec is not None else list(registry.backbones)
    weights = open_weights(path, entry=entry, markings=markings_of(specs, own=[prefix + name for name in state]))
    weights.refuse_code()
    expected = {prefix + name: tuple(tensor.shape) for name, tensor in state.items()}
    layout = _layout(weights, spec)
    name = spec.name if spec is not None else type(net).__name__
    try:
        recipes, ours, missing = translate(weights, layout, expected)
    except Mismatch as error:
        raise UserError(misfit(weights, layout, name, str(error))) from error
    if prefix:  # the file may hold other parts, but in this part every tensor must be one of the network
        ours = {key: shape for key, shape in ours.items() if key.startswith(prefix)}
        layout = replace(layout, beside=lambda key: False)
    problems = differences(ours, expected, missing, layout)
    if problems and prefix:
        raise UserError(f"{weights.path}, {prefix}*, does not fit {name}: {problems.first()}")
    if problems:
        raise UserError(misfit(weights, layout, name, problems.first()))
    # With a prefix there is no such check: config.json describes a whole file.
    if not prefix and (problem := contradiction(weights, layout, ours, _heads(net))):
        raise UserError(f"{weights.path} ({layout.title}) does not fit {name}: {problem}")
    with unchanged(weights):
        digest = weights.sha256()
        _fill(net, state, {key: recipes[prefix + key] for key in state}, weights)
    unused = sorted({key.partition(".")[0] for key in recipes if key not in expected})
    notes = (*weights.notes, *layout.notes(weights.shapes), *null_row_notes(recipes))
    if unused:
        notes = (*notes, f"not used of the file: {', '.join(unused)}")
    return Provenance(
        path=weights.path,
        sha256=digest,
        format=f"{layout.title}, {weights.wrapping}, {weights.container}",
        backbone=spec.name if spec is not None else None,
        dtypes=tuple(sorted({tensor.dtype for tensor in weights.tensors.values()})),
        notes=notes,
        entry=weights.entry,
        null_row_is_made=any(isinstance(recipes[prefix + key], WithNullRow) for key in state),
    )


def _heads(net: nn.Module) -> int | None:
    """Number of attention heads of `net`, which no shape implies: that of the first module with an int attribute `heads`."""
    found = (getattr(module, "heads", None) for module in net.modules())
    return next((heads for heads in found if type(heads) is int), None)


def _layout(weights: WeightFile, spec: BackboneSpec | None) -> Layout:
    """The layout that fits the file best, among those of the spec's family; spec None: of all families, or OWN_NAMES."""
    maps = [weight_map(spec)] if spec is not None else [weight_map(each) for each in registry.backbones]
    share, layout = choose_layout([layout for each in maps for layout in each.layouts], weights.tensors)
    if share == 0 and spec is None:
        return OWN_NAMES
    return layout


@torch.no_grad()
def _fill(net: nn.Module, state: dict[str, torch.Tensor], recipes: dict[str, Recipe], weights: WeightFile) -> None:
    """Read every tensor of `state` in place; those on the meta device are replaced in `net` by new tensors on the CPU.

    state: of `net`, with keep_vars=True: the parameters and buffers themselves, not detached copies. recipes: by the same
    names.
    """
    replaced: dict[int, torch.Tensor] = {}  # by the meta tensor's id: a tensor that the network uses twice stays one

    def load_one(name: str) -> torch.Tensor:
        """Read one tensor; returns the network's tensor, whose bytes the progress bar counts."""
        target = state[name]
        if target.is_meta:
            if id(target) in replaced:
                _replace(net, name, replaced[id(target)])
                return replaced[id(target)]
            real = torch.empty(target.shape, dtype=target.dtype, device="cpu")
            _read(name, recipes[name], weights, real)
            if isinstance(target, nn.Parameter):
                real = nn.Parameter(real, requires_grad=target.requires_grad)
            replaced[id(target)] = real
            _replace(net, name, real)
            return real
        _read(name, recipes[name], weights, target)
        return target

    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    for _ in with_progress(f"load {weights.path.name}", (load_one(name) for name in state), nbytes):
        pass
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if tensor.is_meta:  # a non-persistent buffer, which is not in the state dict
            raise UserError(f"{name} is on the meta device and in no file; build the network on the CPU, then load it")


def _read(name: str, recipe: Recipe, weights: WeightFile, target: torch.Tensor) -> None:
    """Write the result of `recipe` into `target`, in place; UserError where it is not finite.

    name: of the tensor, for messages. A tensor that is taken unchanged is read directly into the target's memory if
    device, dtype and layout allow it.
    """
    stored_dtype = weights.tensors[recipe.sources[0]].dtype if recipe.sources else "F32"  # `Made` has no sources
    dtype = getattr(torch, DTYPES[stored_dtype][1])
    direct = target.device.type == "cpu" and target.is_contiguous() and target.dtype == dtype
    if isinstance(recipe, Take) and direct:
        weights.tensors[recipe.name].read_into(target.detach().view(_integer_dtype(dtype)).numpy())
    else:
        array = recipe.evaluate(lambda source: weights.tensors[source].read())
        target.copy_(as_torch(array, stored_dtype))
    if target.is_floating_point() and not _is_finite(target.detach()):
        refuse_not_finite(weights.path, name)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite. A tensor on the CPU is checked without a temporary copy of it."""
    if tensor.device.type != "cpu":
        return bool(torch.isfinite(tensor).all())
    dtype = BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")]
    raw = tensor.reshape(-1).view(_integer_dtype(tensor.dtype)).numpy()
    return all_finite(raw.view(raw_dtype(dtype)), dtype)


def as_torch(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A torch tensor of `dtype` (safetensors' name) that shares the memory of `array`, whose dtype is `raw_dtype(dtype)`."""
    wanted = getattr(torch, DTYPES[dtype][1])
    return torch.from_numpy(array.view(_numpy_integer_dtype(array))).view(wanted)


def _numpy_integer_dtype(array: np.ndarray) -> np.dtype:
    """An integer dtype of the same width as the array's, which torch.from_numpy accepts."""
    return np.dtype({1: "u1", 2: "i2", 4: "i4", 8: "i8"}[array.itemsize])


def _integer_dtype(dtype: torch.dtype) -> torch.dtype:
    """torch's integer dtype of the same width, which numpy has, too (numpy has no bfloat16)."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def _replace(net: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace the parameter or buffer `name` of `net`."""
    path, _, leaf = name.rpartition(".")
    module = net.get_submodule(path)
    if leaf in module._parameters:
        assert isinstance(tensor, nn.Parameter)
        module._parameters[leaf] = tensor
    else:
        module._buffers[leaf] = tensor
