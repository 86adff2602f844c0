"""Runs in jax keep the promises of runs: killed and continued, cut into micro-batches, interrupted, failing in one line."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_runs import engine, losses, request, workshop
from sampler_plans import ddpm_plan

from harness.diffusion.schedule import Schedule
from harness.engines.backend import get_backend
from harness.engines.jax import mesh
from harness.engines.jax.errors import errors_in_one_line
from harness.engines.jax.sampling import _compiled
from harness.engines.torch.sampling import load_weights
from harness.errors import RunError, UserError


def state_of(made):
    return {part: tensors() for part, tensors in made.state_dicts()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for part in one:
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            np.testing.assert_array_equal(other[part][name], value, err_msg=f"{part} {name}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of 8 steps."""
    shop = workshop(tmp_path_factory.mktemp("whole") / "run", request(steps=8))
    shop.train(8)
    return shop.run


def test_a_continued_run_has_the_bytes_of_a_whole_one(whole, tmp_path):
    workshop(tmp_path / "run", request(steps=3)).train(3)
    again = workshop(tmp_path / "run", request(steps=8))  # another process would build all of it anew, as this does
    again.train(8)
    assert again.run.log.read_bytes() == whole.log.read_bytes()
    for part in ("model", "ema", "first_moment", "second_moment"):
        file = f"checkpoints/step-00000008/{part}.safetensors"
        assert (again.folder / file).read_bytes() == (whole.folder / file).read_bytes(), part


def test_micro_batches_add_up(whole, tmp_path):
    shop = workshop(tmp_path / "run", request(steps=3), micro_batch=10)  # 10, 10 and 4
    shop.train(3)
    for found, expected in zip(
        losses(shop), [json.loads(line) for line in whole.log.read_text().splitlines()], strict=False
    ):
        assert found == pytest.approx(expected, rel=1e-5)
    made = engine(shop)
    before = state_of(made)
    answers = iter((False, False, True))
    assert made.step(1, lambda: next(answers)) is False  # interrupted between micro-batches
    assert_equal(state_of(made), before)


def test_copies_of_the_state_stay_as_they_are(whole):
    """A thread writes them while later steps change the state."""
    made = engine(workshop(whole.folder, request(steps=8)))
    made.step(1, lambda: False)
    copies = made.state_dicts(copy=True)
    expected = {
        part: {name: np.array(value) for name, value in tensors().items()} for part, tensors in made.state_dicts()
    }
    for step in range(2, 5):
        made.step(step, lambda: False)
    found = {part: tensors() for part, tensors in copies}
    assert_equal(found, expected)
    assert not any(np.shares_memory(value, found["model"][name]) for name, value in state_of(made)["model"].items())


def test_a_step_is_traced_once(whole):
    made = engine(workshop(whole.folder, request(steps=8)))
    for step in range(1, 4):
        assert made.step(step, lambda: False)
    assert made._step._cache_size() == 1
    wanted = request(steps=8)
    plan = ddpm_plan(Schedule.named("linear", 1000), 9)
    _compiled.cache_clear()  # those of other tests with other batches
    chain = get_backend("jax").make_sampler(
        wanted, whole, whole.ema_checkpoint(8) / "ema.safetensors", plan, precision="float32", batch=4
    )
    seen = []
    for _ in range(2):
        chain.draw(np.arange(4), np.arange(4), lambda: seen.append(1))
    assert chain._stages[0]._steps._cache_size() == 1 and len(seen) == 18
    part = chain.draw(np.arange(1, 3), np.arange(1, 3))  # a batch that is not full is no other program
    assert chain._stages[0]._steps._cache_size() == 1 and part.shape == (2, 8, 8, 1)
    np.testing.assert_array_equal(part, chain.draw(np.arange(4), np.arange(4))[1:3])


def test_the_average_takes_its_share_to_the_last_digits(tmp_path):
    """1 - 0.9999 in float32 errs by 1.7e-4 of itself."""
    decay = 0.9999
    made = engine(
        workshop(
            tmp_path / "run", request(settings={"ema_decay": str(decay), "ema_ramp": "false", "learning_rate": "1"})
        )
    )
    name = "final_layer.linear.weight"  # begins at 0, where float32 has digits enough
    assert not state_of(made)["ema"][name].any()
    made.step(1, lambda: False)
    after = state_of(made)
    np.testing.assert_allclose(after["ema"][name], (1 - decay) * after["model"][name].astype(float), rtol=1e-6)
    assert np.abs(after["model"][name]).max() > 0.5


def test_torch_reads_what_jax_wrote(whole):
    wanted = request(framework="torch")
    net = load_weights(
        wanted.spec.build("torch", **wanted.arguments), whole.ema_checkpoint(8) / "ema.safetensors"
    ).eval()
    mine = engine(workshop(whole.folder, request(steps=8)))
    mine.load("ema", whole.ema_checkpoint(8) / "ema.safetensors")
    for name, value in state_of(mine)["ema"].items():
        np.testing.assert_array_equal(value, net.state_dict()[name].numpy())
    assert all(torch.isfinite(each).all() for each in net.parameters())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    shop = workshop(tmp_path / "run", request(settings={"learning_rate": "1e30"}))
    with pytest.raises(RunError, match=r"not finite (at|after) step \d+.*--set learning_rate") as caught:
        shop.train(12)
    assert "\n" not in str(caught.value)


def test_missing_memory_is_one_line():
    with pytest.raises(RunError, match="out of memory in training step 7: .*; take less") as caught:  # noqa: SIM117
        with errors_in_one_line("training step 7", "take less"):
            jax.jit(lambda: jnp.ones(1 << 46))().block_until_ready()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_what_fails_after_a_step_has_returned_is_one_line(tmp_path, monkeypatch):
    """A device computes asynchronously, so its error may come up where the weights are read next."""
    made = engine(workshop(tmp_path / "run"))

    def fails(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating")

    monkeypatch.setattr(made, "_finite", fails)
    monkeypatch.setattr(mesh, "gather", fails)
    for look in (made.finite, lambda: state_of(made)):
        with pytest.raises(RunError, match="^out of memory in .*RESOURCE_EXHAUSTED") as caught:
            look()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("device", "environment", "says"),
    [
        ("cpu:", {}, "--device cpu: is not available here: jax sees 1 of cpu"),
        ("cpu:x", {}, "--device cpu:x is not available here: jax sees 1 of cpu"),
        ("tpu", {}, r"--device tpu is not available to jax here \(it has: "),
        (None, {"JAX_PLATFORMS": "tpu"}, r"jax finds no devices here \(Unable to initialize backend 'tpu'"),
        (
            None,
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "nonsense"},
            "the 2 processes of JAX_NUM_PROCESSES cannot be joined",
        ),
    ],
)
def test_devices_that_are_not_there_are_refused_in_one_line(device, environment, says):
    code = f"""
from harness.engines.jax.mesh import pick_devices
from harness.errors import UserError
try:
    pick_devices({device!r})
except UserError as error:
    print(error)
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert re.match(says, line), line


def test_one_device_is_not_for_several_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="--device cpu:0 is one device, and 2 processes work here; give --device cpu"):
        mesh.pick_devices("cpu:0")


def test_a_shape_that_does_not_fit_is_one_line(tmp_path):
    shop = workshop(tmp_path / "run")
    images = np.concatenate([shop.data.images] * 2, axis=3)  # (N, 8, 8, 2)
    shop.data = dataclasses.replace(shop.data, images=images)
    with pytest.raises(UserError, match=r"input of shape \(24, 2, 8, 8\), but this network takes \(N, 1, 8, 8\)"):
        engine(shop).step(1, lambda: False)
    with pytest.raises(RunError, match="the network cannot be run in training step 7: TypeError: ") as caught:  # noqa: SIM117
        with errors_in_one_line("training step 7", ""):  # of a plug-in that does not look
            jax.jit(lambda x: x @ jnp.ones((3, 3)))(jnp.ones((4, 4)))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_network_is_refused(whole, tmp_path):
    made = engine(workshop(tmp_path / "run", request("in-context")))
    with pytest.raises(UserError, match="does not fit this network: "):
        made.load("model", whole.folder / "checkpoints/step-00000008/model.safetensors")
