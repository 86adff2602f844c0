"""A cascade guided by a classifier, drawn by both frameworks from the same weight files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from jax_runs import DIT, KINDS
from safetensors.torch import save_file

from harness import registry
from harness.engines.torch.trainer import build
from harness.errors import UserError
from harness.io.files import sha256_file
from harness.pipeline.sample_system import sample_system
from harness.pipeline.sidecar import read_fields
from harness.runs.samples import read_samples, read_sidecar
from harness.systems.binding import load_parts
from harness.systems.spec import Component, GuidanceClassifier, System

TASK = {"in_channels": 1, "num_classes": 10}


def arguments(kind, **more):
    return {**KINDS[kind][1], **TASK, **more}


GUIDED = System(
    name="guided", protocol="digits-4", uint8_rule="adm", label_policy="random",
    base=Component(backbone="dit-xs-2", arguments={**DIT, **TASK, "input_size": 4}, steps=4, clip_denoised=True),
    classifier=GuidanceClassifier(backbone="adm-classifier-xs", arguments=arguments("classifier", input_size=4), scale=2.0),
)  # fmt: skip
CASCADE = replace(
    GUIDED, name="cascade", protocol="digits",
    upsamplers=(
        Component(
            backbone="adm-u-xs", arguments=arguments("upsampler", input_size=8, low_res_size=4), steps=3,
            sampler="ddim", clip_denoised=True, conditioning_noise=0.1,
        ),
    ),
)  # fmt: skip


def files_of(system, folder):
    """A weight file for every part: no value at its initialisation, where much is zero."""
    paths = {}
    for number, (name, part) in enumerate(system.parts.items()):
        net = build(part.spec, part.build_arguments(), number)
        generator = torch.Generator().manual_seed(number)
        state = {n: v + 0.05 * torch.randn(v.shape, generator=generator) for n, v in net.state_dict().items()}
        paths[name] = folder / f"{name}.safetensors"
        save_file(state, paths[name])
    return paths


@pytest.mark.parametrize("system", [GUIDED, pytest.param(CASCADE, marks=pytest.mark.slow)], ids=lambda s: s.name)
def test_images_are_torchs(system, tmp_path):
    bound = load_parts(system, files_of(system, tmp_path))
    settings = {"count": 30, "seed": 7, "precision": "float32", "batch": 12, "device": "cpu"}
    paths = {each: sample_system(bound, folder=tmp_path, framework=each, **settings) for each in ("torch", "jax")}
    theirs, mine = (read_samples(paths[each], classes=10) for each in ("torch", "jax"))
    assert paths["torch"] != paths["jax"]
    np.testing.assert_array_equal(mine.labels, theirs.labels)
    apart = np.abs(mine.images.astype(int) - theirs.images)
    assert mine.images.std() > 10 and apart.max() <= 1 and (apart > 0).mean() < 0.01
    facts = read_sidecar(paths["jax"])
    assert facts["evaluations"] == read_sidecar(paths["torch"])["evaluations"]
    for each, path in paths.items():
        assert read_fields(path, sha256_file(path)).framework == each


def test_a_network_that_is_missing_in_jax_is_named(tmp_path):
    system = registry.systems.get("biggan-deep-256")
    (tmp_path / "base.safetensors").touch()
    save_file({"x": torch.zeros(1)}, tmp_path / "base.safetensors")
    with pytest.raises(UserError, match="biggan-deep-256 has no jax network"):
        sample_system(
            load_parts(system, {"base": tmp_path / "base.safetensors"}), folder=tmp_path, framework="jax", count=1, seed=0,
            precision="float32", batch=1, device=None,
        )  # fmt: skip
