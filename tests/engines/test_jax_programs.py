"""What is compiled once: the loop of a sampler, for all its numbers of steps and all weights of one network."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax._src.lru_cache import LRUCache

from harness import registry
from harness.diffusion.guidance import Guidance
from harness.diffusion.sampler_plan import sampler_plan
from harness.engines.jax import mesh as devices
from harness.engines.jax.compiling import remove_incomplete
from harness.engines.jax.sampling import JaxStage, Network, _compiled
from harness.randomness.threefry_jax import words

ARGUMENTS = registry.backbones.get("dit-xs-4").arguments(input_size=8, in_channels=1, num_classes=10, out_channels=2)


def stage(sampler, steps, mesh, **options):
    spec = registry.backbones.get("dit-xs-4")
    graph, state = nnx.split(spec.builder("jax")(**ARGUMENTS, rngs=nnx.Rngs(0)))
    objective = "epsilon-learned-range" if sampler == "ddpm" else "epsilon-fixed"
    plan = sampler_plan(sampler, steps, schedule="linear", diffusion_steps=1000, objective=objective)
    return JaxStage(spec, Network(graph, state), plan, arguments=ARGUMENTS, precision="float32", mesh=mesh, **options)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++-3m", "heun"])
def test_other_numbers_of_steps_run_the_same_program(sampler):
    mesh = devices.make_mesh(jax.devices()[:1], None)
    index, labels = words(np.arange(2)), np.array([3, 7], np.int32)
    _compiled.cache_clear()
    images = {}
    for steps in (4, 9, 30, 4):
        drawn = stage(sampler, steps, mesh, guidance=Guidance(1.5))
        found = np.asarray(drawn.draw(0, index, labels, None, lambda: None))
        assert np.array_equal(images.setdefault(steps, found), found)
    assert _compiled.cache_info().misses == 1
    assert drawn._steps._cache_size() == 1
    assert not np.array_equal(images[4], images[9])
    stage(sampler, 4, mesh, guidance=Guidance(3.0))
    assert _compiled.cache_info().misses == 2  # another scale is another program


KEPT = """
import sys
from pathlib import Path
import os
import subprocess
import sys
from pathlib import Path

import jax
from harness.engines.backend import get_backend
get_backend("jax")
folder = jax.config.jax_compilation_cache_dir
if folder is not None:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8))).block_until_ready()
    print(len(list(Path(folder).glob("*-cache"))), folder)
"""


def test_programs_are_kept_in_the_users_cache(tmp_path):
    def said(cache, **more):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
        environment |= {"HARNESS_CACHE": str(cache), "JAX_PLATFORMS": "cpu", **more}
        done = subprocess.run(
            [sys.executable, "-c", KEPT], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout.split()

    number, folder = said(tmp_path / "cache")
    assert int(number) > 0 and Path(folder).parent == tmp_path / "cache" / "compiled"
    written = {path: path.stat().st_mtime_ns for path in Path(folder).glob("*-cache")}
    assert said(tmp_path / "cache") == [number, folder]  # taken from there
    assert {path: path.stat().st_mtime_ns for path in Path(folder).glob("*-cache")} == written
    assert said(tmp_path / "cache", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))[1] == str(tmp_path / "mine")
    (tmp_path / "file").touch()
    assert said(tmp_path / "file") == []  # no folder can be made there


def test_a_program_that_was_written_in_part_is_removed(tmp_path):
    """By a process that was killed. JAX would fail at it whenever it adds another, and keep nothing from then on."""
    kept = LRUCache(str(tmp_path), max_size=1 << 20)
    kept.put("whole", b"program")
    for name in ("killed", "writing"):
        (tmp_path / f"{name}-cache").write_bytes(b"pro")
    for name in ("killed", "whole"):
        os.utime(tmp_path / f"{name}-cache", (0, 0))
    remove_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == ["whole-cache", "writing-cache"]
    (tmp_path / "writing-cache").unlink()
    kept.put("other", b"program")
    assert kept.get("other") == kept.get("whole") == b"program"
