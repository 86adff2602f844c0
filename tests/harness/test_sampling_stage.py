"""The sampling stage: image i does not know its batch, labels, the sidecar, what is drawn again and what is not."""

import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny_suite
import torch
from small_runs import SecondProcess, request, workshop

from harness.diffusion.sampler_plan import sampler_plan
from harness.distributed.group import ProcessGroup
from harness.engines.torch import sampling as sampling_module
from harness.engines.torch.sampling import TorchSampler, load_weights, to_uint8
from harness.errors import UserError
from harness.io.files import sha256_file
from harness.pipeline import sampling_loop
from harness.pipeline.evaluation_config import EvaluationConfig
from harness.pipeline.measure import evaluate_samples_file
from harness.pipeline.sample import sample_run
from harness.randomness import Purpose
from harness.randomness import threefry_torch as noise
from harness.runs.provenance import UNKNOWN, TrainingTime, environment, timing_of
from harness.runs.sample_set import labels_of
from harness.runs.samples import read_samples
from results.records import Environment

INDICES = 64
BATCHES = (64, 16, 1)
# What a float32 sum of a few hundred terms may differ by between two orders, carried through the sampler's steps. The
# largest deviation seen in images of [-1, 1] is a hundredth of this: 9e-7.
ARITHMETIC = 1e-4


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A short training: the network's output layer, zero at first, has become something."""
    shop = workshop(tmp_path_factory.mktemp("sampling") / "run", request(steps=30))
    shop.train(30)
    return shop


class PerElement(torch.nn.Module):
    """A network whose every output element is a function of its own input element, time and label: no sum, no order."""

    def forward(self, x, t, y):
        shade = (t.float() / 1000 + y.float() / 10)[:, None, None, None]
        return torch.cat([0.3 * x + shade, x * 0.1 - shade], dim=1)


def images(monkeypatch, net, wanted, batch, steps=10, **settings):
    """(float32 (64, C, H, W) before rounding, uint8 (64, H, W, C)) of indices 0 ... 63, drawn `batch` at a time."""
    floats = []
    monkeypatch.setattr(sampling_module, "to_uint8", lambda x, rule: (floats.append(x.clone()), to_uint8(x, rule))[1])
    plan = sampler_plan(
        "ddpm", steps, schedule="linear", diffusion_steps=1000, objective=wanted.recipe.objective, clip_denoised=True
    )
    sampler = TorchSampler(
        wanted.spec, net, plan, wanted.sampling, arguments=wanted.arguments, precision="float32",
        device=torch.device("cpu"), **settings,
    )  # fmt: skip
    labels = labels_of("random", 0, INDICES, 10)
    rounded = [
        sampler.draw(index, labels[index], lambda: None)
        for index in np.split(np.arange(INDICES, dtype=np.int64), range(batch, INDICES, batch))
    ]
    monkeypatch.setattr(sampling_module, "to_uint8", to_uint8)
    return torch.cat(floats), np.concatenate(rounded)


def test_noise_of_an_index_does_not_know_its_batch():
    for purpose, step in ((Purpose.INITIAL_NOISE, 0), (Purpose.STEP_NOISE, 7)):
        index = torch.arange(INDICES)
        whole = noise.normal(0, purpose, index, step, (1, 8, 8))
        assert whole.shape == (64, 1, 8, 8) and whole.dtype == torch.float32
        for batch in BATCHES:
            parts = [noise.normal(0, purpose, rows, step, (1, 8, 8)) for rows in index.split(batch)]
            assert torch.equal(torch.cat(parts), whole)
        assert not torch.equal(whole[0], whole[1])


def test_with_arithmetic_per_element_samples_are_bit_identical(shop, monkeypatch):
    """Everything around the network - noise, labels, plan, guidance, rounding - is the same to the last bit."""
    guided = request(steps=30, sampling={"guidance_scale": 2.0})
    for wanted in (shop.request, guided):
        floats, rounded = images(monkeypatch, PerElement(), wanted, 64)
        assert floats.shape == (64, 1, 8, 8) and floats.dtype == torch.float32
        assert rounded.shape == (64, 8, 8, 1) and rounded.dtype == np.uint8 and len(np.unique(rounded)) > 50
        for batch in BATCHES[1:]:
            other, rounded_other = images(monkeypatch, PerElement(), wanted, batch)
            assert torch.equal(other, floats)
            assert np.array_equal(rounded_other, rounded)


def test_a_batch_is_put_through_the_network_in_equal_parts(shop, monkeypatch):
    calls = []

    class Counting(PerElement):
        def forward(self, x, t, y):
            calls.append(len(x))
            return super().forward(x, t, y)

    wanted = request(steps=30, sampling={"guidance_scale": 2.0})
    floats, _ = images(monkeypatch, Counting(), wanted, 64)
    assert calls == [128] * 10  # the network is small: all at once
    calls.clear()
    monkeypatch.setattr(sampling_module, "CALL_MACS", 20.5 * wanted.spec.count(**wanted.arguments).macs)
    parted, _ = images(monkeypatch, Counting(), wanted, 64)
    assert calls == [19, 19, 18, 18, 18, 18, 18] * 10
    assert torch.equal(parted, floats)

    calls.clear()
    monkeypatch.setattr(sampling_module, "compile_sampler", lambda net, device: net)
    monkeypatch.setattr(sampling_module, "check_available", lambda device: None)
    images(monkeypatch, Counting(), wanted, 64, compile="on")
    assert calls == [16] * 80  # every size would be compiled by itself


def test_with_a_network_the_batch_moves_last_bits_alone(shop, monkeypatch, record_property):
    """What is left is the order of sums in matrix products: in float64 it all but vanishes, as randomness would not."""
    net = load_weights(
        shop.request.spec.build("torch", **shop.request.arguments), shop.run.ema_checkpoint(30) / "ema.safetensors"
    )
    floats, rounded = images(monkeypatch, net, shop.request, 64)
    assert len(np.unique(rounded)) > 50
    deviations = {}
    for batch in BATCHES[1:]:
        other, rounded_other = images(monkeypatch, net, shop.request, batch)
        moved = np.abs(rounded_other.astype(int) - rounded.astype(int))
        deviations[batch] = (float((other - floats).abs().max()), int(moved.max()), float((moved > 0).mean()))
        record_property(f"deviation of batch {batch}: float, uint8, share of pixels", deviations[batch])
        print(f"batch {batch} against 64: {deviations[batch]}")
    for largest, levels, share in deviations.values():
        assert largest < ARITHMETIC
        assert levels <= 1 and share < 0.01  # a value at the edge of two levels

    # The deviation belongs to float32's rounding: one forward pass in float64 agrees a millionfold better.
    x = noise.normal(0, Purpose.INITIAL_NOISE, torch.arange(INDICES), 0, (1, 8, 8)).double()
    t, y = torch.full((INDICES,), 500), torch.arange(INDICES) % 10
    net = net.double()
    for module in net.modules():  # the time features are float32 whatever the weights are
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    with torch.inference_mode():
        whole = net(x, t, y)
        single = torch.cat([net(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(INDICES)])
    assert whole.dtype == torch.float64 and whole.std() > 0.01
    assert (whole - single).abs().max() < 1e-12


def test_another_seed_or_index_is_another_image(shop, monkeypatch):
    floats, _ = images(monkeypatch, PerElement(), shop.request, 64)
    reseeded = request(steps=30, sampling={"seed": 1})
    other, _ = images(monkeypatch, PerElement(), reseeded, 64)
    assert not any(torch.equal(a, b) for a, b in zip(floats, other, strict=True))
    assert len({image.numpy().tobytes() for image in floats}) == INDICES


def test_label_policies():
    balanced = labels_of("balanced", 0, 25, 10)
    assert balanced.dtype == np.int64 and balanced.tolist() == [*range(10), *range(10), *range(5)]
    drawn = labels_of("random", 0, 10_000, 10)
    assert drawn.dtype == np.int64 and drawn.shape == (10_000,) and drawn.min() == 0 and drawn.max() == 9
    share = np.bincount(drawn, minlength=10) / 10_000
    assert np.abs(share - 0.1).max() < 4 * np.sqrt(0.1 * 0.9 / 10_000)
    assert np.array_equal(drawn[:100], labels_of("random", 0, 100, 10))  # label i does not know N
    assert not np.array_equal(drawn, labels_of("random", 1, 10_000, 10))


def draw_set(shop, *, batch=16, samples=40, **settings):
    wanted = request(steps=30, sampling=settings or None, samples=samples)
    return sample_run(shop.run, wanted, 30, 3, precision="float32", batch=batch)


def test_sample_set_and_sidecar(shop):
    path = draw_set(shop, label_policy="balanced")
    found = read_samples(path, classes=10)
    assert found.images.shape == (40, 8, 8, 1) and found.images.dtype == np.uint8
    assert found.labels.tolist() == [i % 10 for i in range(40)]
    side = json.loads(path.with_suffix(".json").read_text())
    assert side["images"] == 40 and side["shape"] == [8, 8, 1] and side["sha256"] == sha256_file(path)
    identity = side["identity"]
    assert identity["run"] == shop.run.identity and identity["training_steps"] == 30
    assert identity["checkpoint_sha256"] == sha256_file(shop.run.ema_checkpoint(30) / "ema.safetensors")
    drawn = identity["sampling"]
    assert (drawn["sampler"], drawn["steps"], drawn["precision"], drawn["seed"]) == ("ddpm", 3, "float32", 0)
    assert (drawn["label_policy"], drawn["uint8_rule"], drawn["guidance_scale"]) == ("balanced", "dit", 1.0)
    assert (identity["count"], identity["batch"], side["evaluations"]) == (40, 16, 3)
    record = side["record"]
    assert side["schema"] == 2 and not {"compute", "trained"} & side.keys()
    assert (record["params"], record["gflops"]) == (shop.request.compute.params, shop.request.compute.gflops)
    assert {"device", "versions", "time", "harness_version"} <= side["environment"].keys()
    assert path.with_name("grid.png").stat().st_size > 0
    assert sorted(each.name for each in path.parent.iterdir()) == ["grid.png", "samples.json", "samples.npz"]


def test_records_say_how_long_training_and_sampling_took(shop, tmp_path):
    path = draw_set(shop, samples=100, seed=5)
    judge = EvaluationConfig(suite=tiny_suite.made("tiny", metrics=("fd",)))
    (record,) = evaluate_samples_file(path, shop.run.protocol, shop.data, cache=tmp_path, config=judge)
    found = record.environment
    state = json.loads((shop.run.ema_checkpoint(30) / "state.json").read_text())
    assert found.training_seconds == state["seconds"] > 0 and 0 < found.sampling_seconds_per_image < 1
    assert (
        found.training_device == found.sampling_device
        and f", {torch.get_num_threads()} threads" in found.training_device
    )
    untimed = dataclasses.replace(record, environment=Environment(device="other"))
    assert untimed.id == record.id and untimed.identity_sha256 == record.identity_sha256


def test_only_the_time_of_one_device_is_stated(shop):
    path = draw_set(shop, seed=6)
    side = path.with_suffix(".json")
    facts = json.loads(side.read_text())
    known = timing_of(path)
    for spent in ({"a": 1.0, "b": 2.0}, {UNKNOWN: 3.0}, {}, [1], None):
        side.write_text(json.dumps(facts | {"spent": spent}))
        assert not {"training_seconds", "training_device"} & timing_of(path).keys()
    side.write_text(json.dumps(facts | {"drawn": {"device": "a", "seconds": None}}))  # went on after a kill
    assert timing_of(path) == {
        name: known[name] for name in ("training_seconds", "training_device", "training_versions")
    }
    assert timing_of(path.with_name("none.npz")) == {}


def test_the_commit_is_that_of_the_checkout():
    """With a "+" where files differ from it; nothing where the code is installed, without a checkout around it."""
    root = Path(__file__).resolve().parents[2]
    found = environment("any")["git_commit"]
    if not (root / ".git").exists():
        assert found is None
        return
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert found is not None and found.removesuffix("+") == head.stdout.strip()


def test_time_goes_on_where_the_checkpoint_left_it(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("harness.runs.provenance.time.monotonic", lambda: now[0])
    first = TrainingTime(None, "a")
    now[0] += 7
    assert first.now() == {"a": 7.0}
    again = TrainingTime({"seconds": 7.0, "spent": first.now()}, "b")
    now[0] += 2
    assert again.now() == {"a": 7.0, "b": 2.0}
    assert TrainingTime({"seconds": 7.0}, "a").now() == {UNKNOWN: 7.0, "a": 0.0}  # of a checkpoint that named no device


def test_guidance_doubles_the_evaluations_and_has_its_own_folder(shop):
    plain, guided = draw_set(shop), draw_set(shop, guidance_scale=1.5)
    assert plain.parent != guided.parent and "cfg1.5" in guided.parent.name
    assert json.loads(guided.with_suffix(".json").read_text())["evaluations"] == 6
    assert sha256_file(plain) != sha256_file(guided)


@pytest.fixture
def counted(monkeypatch):
    """The first index of every batch that is drawn."""
    drawn = []
    original = TorchSampler.draw
    monkeypatch.setattr(
        TorchSampler, "draw", lambda self, index, *rest: (drawn.append(int(index[0])), original(self, index, *rest))[1]
    )
    return drawn


def test_samples_that_are_there_are_not_drawn_again(shop, counted):
    path = draw_set(shop, seed=11)
    before = path.stat().st_mtime_ns, path.with_suffix(".json").read_bytes()
    assert counted == [0, 16, 32]
    assert draw_set(shop, seed=11) == path
    assert counted == [0, 16, 32]
    assert (path.stat().st_mtime_ns, path.with_suffix(".json").read_bytes()) == before
    assert draw_set(shop, seed=12) != path


@pytest.mark.parametrize("damage", ["cut", "empty", "short", "dtype", "shape", "missing"])
def test_a_damaged_shard_is_drawn_again(damage, shop, counted, monkeypatch):
    seed = 100 + sum(map(ord, damage))
    others = set(shop.run.folder.glob("samples/*"))
    with monkeypatch.context() as patch:  # as if killed before the shards are put together
        patch.setattr(sampling_loop, "write_samples", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            draw_set(shop, seed=seed)
    (folder,) = set(shop.run.folder.glob("samples/*")) - others
    shards = sorted((folder / "shards").iterdir())
    assert [path.name for path in shards] == [f"shard-{start:08d}.npy" for start in (0, 16, 32)]
    whole = [np.load(path) for path in shards]
    target = shards[1]
    if damage == "cut":
        target.write_bytes(target.read_bytes()[:-10])
    elif damage == "empty":
        target.write_bytes(b"")
    elif damage == "short":
        np.save(target, whole[1][:-1])
    elif damage == "dtype":
        np.save(target, whole[1].astype(np.float32))
    elif damage == "shape":
        np.save(target, whole[1][:, :4])
    else:
        target.unlink()
    counted.clear()
    path = draw_set(shop, seed=seed)
    assert counted == [16]
    assert json.loads(path.with_suffix(".json").read_text())["drawn"]["seconds"] is None  # of a part
    assert np.array_equal(read_samples(path).images, np.concatenate(whole))
    assert not (path.parent / "shards").exists()


def test_a_snapshot_that_is_not_there_is_refused(shop):
    with pytest.raises(UserError, match=r"no EMA checkpoint of step 31 \(it has: 30\); train to it with --steps 31"):
        sample_run(shop.run, shop.request, 31, 3, precision="float32", batch=16)


def test_a_folder_with_other_samples_than_its_name_says_is_refused(shop):
    path = draw_set(shop, seed=21)
    side = path.with_suffix(".json")
    facts = json.loads(side.read_text())
    facts["identity"]["count"] = 41
    side.write_text(json.dumps(facts))
    before = path.read_bytes()
    with pytest.raises(UserError, match="holds other samples than its name and sidecar say"):
        draw_set(shop, seed=21)
    assert path.read_bytes() == before


def test_the_leader_says_whether_a_sample_set_is_there(shop):
    """See the same of snapshots: another process may not see it yet, or see it too soon."""

    def drawn(group):
        return sample_run(shop.run, request(steps=30, samples=4), 30, 2, precision="float32", batch=4, group=group)

    assert not drawn(SecondProcess(value=1)).exists()
    path = drawn(ProcessGroup())
    before, shards = path.read_bytes(), path.parent / "shards"
    assert drawn(SecondProcess(value=0)) == path and path.read_bytes() == before
    assert [each.name for each in shards.iterdir()] == []  # of its share, which is the leader's here
