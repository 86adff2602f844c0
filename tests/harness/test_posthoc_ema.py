"""Post-hoc EMA: power-function averages that a run saves, and any width reconstructed of them."""

import dataclasses
import hashlib
import json
import math
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from small_runs import request, workshop

from harness.cli import group
from harness.engines.ema import ema_decay, gamma_of, parts, power_weight, snapshot_steps, update_weights, width_of
from harness.engines.torch import trainer as torch_trainer
from harness.errors import UserError
from harness.pipeline import training_loop
from harness.pipeline.sample import sample
from harness.pipeline.sidecar import read_fields, samples_sha256
from harness.pipeline.train import RunSession
from harness.planning.matching import request_from
from harness.planning.plan import make_plan
from harness.planning.plan_text import costs_text
from harness.protocols import MAX_EMA_WIDTH, Recipe, Sampling
from harness.runs.posthoc_ema import inner_products, plan_reconstruction, solve_weights, write_reconstruction
from harness.runs.run import recipe_identity
from harness.runs.sample_set import sample_request
from harness.settings import RunOptions
from reports.commands import reproduction
from reports.grid import PICTURE_GAP, picture_scale
from reports.texts import row_metadata
from results.records import Evaluation, Record

WIDTHS = (0.05, 0.1)
POSTHOC = {"ema_widths": "0.05:0.10", "ema_snapshots": "4"}


@pytest.mark.parametrize("width", [1e-3, 0.05, 0.1, 0.15, 0.25, MAX_EMA_WIDTH])
def test_width_and_exponent(width):
    gamma = gamma_of(width)
    assert gamma >= 0 and width_of(gamma) == pytest.approx(width, rel=1e-14)
    # the cubic of the paper's appendix
    cubic = gamma**3 + 7 * gamma**2 + (16 - width**-2) * gamma + 12 - width**-2
    assert abs(cubic) <= 1e-12 * (gamma**3 + 7 * gamma**2 + 16 * gamma + 12)


def test_exponents_of_the_paper():
    """Sec. 3.1: gamma = 16.97 and 6.94 for the widths that it saves; the plain mean has a width of 1/sqrt(12)."""
    assert [round(gamma_of(width), 2) for width in WIDTHS] == [16.97, 6.94]
    assert gamma_of(MAX_EMA_WIDTH) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 6.94, 16.97])
def test_the_update_averages_with_the_power_function(gamma):
    """The update's weight of step i after t steps is the integral of the profile from i - 1 to i."""
    t, values = 50, np.random.RandomState(0).standard_normal(50)
    average = 123.0  # the initial weights, which must not count
    for step, value in enumerate(values, 1):
        average += power_weight(gamma, step) * (value - average)
    edges = (np.arange(t + 1) / t) ** (gamma + 1)
    assert average == pytest.approx(np.diff(edges) @ values, rel=1e-12)
    assert power_weight(gamma, 10**9) == pytest.approx((gamma + 1) * 1e-9, rel=1e-7)


def profile(times, step, gamma):
    return np.where(times <= step, (gamma + 1) * (times / step) ** gamma / step, 0.0)


def test_inner_products_against_numerical_integration():
    """The integrand is a polynomial-like power up to the earlier step: Gauss-Legendre, of 200 nodes, is exact for it."""
    steps, gammas = [3, 40, 40, 100, 77], [gamma_of(0.1), gamma_of(0.05), 0.0, gamma_of(0.2), 2.5]
    found = inner_products(steps, gammas, steps[:3], gammas[:3])
    assert found.shape == (5, 3) and found.dtype == np.float64
    nodes, weights = np.polynomial.legendre.leggauss(200)
    for i in range(5):
        for j in range(3):
            end = min(steps[i], steps[j])
            times = (nodes + 1) / 2 * end
            integrand = profile(times, steps[i], gammas[i]) * profile(times, steps[j], gammas[j])
            assert found[i, j] == pytest.approx(weights @ integrand * end / 2, rel=1e-10)
    huge = inner_products([10**7], [gamma_of(1e-3)], [1], [gamma_of(1e-3)])
    assert np.isfinite(huge).all()


def power_averages(sequence, gamma):
    """The power average after each step, float64 (T, D), by the update."""
    average, found = sequence[0], []
    for step, value in enumerate(sequence, 1):
        average = average + power_weight(gamma, step) * (value - average)
        found.append(average)
    return np.array(found)


@pytest.mark.parametrize("width", [0.05, 0.1])
def test_a_saved_profile_is_its_own_reconstruction(width):
    steps = np.repeat([25, 50, 75, 100], 2)
    weights, error = solve_weights(steps, [gamma_of(each) for each in WIDTHS] * 4, 100, gamma_of(width))
    wanted = np.zeros(8)
    wanted[6 + WIDTHS.index(width)] = 1
    np.testing.assert_allclose(weights, wanted, atol=1e-6)
    assert error < 1e-6


@pytest.mark.parametrize("width, wanted", [(0.07, 1e-2), (0.075, 1e-2), (0.15, 2e-2)])
def test_more_snapshots_reconstruct_better(width, wanted):
    """Of a random walk, against the exact average of all steps; the unit is what the average lags behind.

    A handful of snapshots suffices: eight err by about half a percent, sixteen by a tenth of that.
    """
    total = 400
    sequence = np.cumsum(np.random.RandomState(0).standard_normal((total, 50)), 0)
    exact = power_averages(sequence, gamma_of(width))[-1]
    saved = {each: power_averages(sequence, gamma_of(each)).astype(np.float32) for each in WIDTHS}
    errors, profile_errors = [], []
    for count in (1, 2, 4, 8, 16):
        kept = [
            (step, each)
            for step in snapshot_steps(Recipe(ema_widths="0.05:0.1", ema_snapshots=count), total)
            for each in WIDTHS
        ]
        weights, error = solve_weights(
            [step for step, _ in kept], [gamma_of(each) for _, each in kept], total, gamma_of(width)
        )
        found = sum(
            weight * saved[each][step - 1].astype(float) for weight, (step, each) in zip(weights, kept, strict=True)
        )
        errors.append(np.linalg.norm(found - exact) / np.linalg.norm(sequence[-1] - exact))
        profile_errors.append(error)
    assert errors == sorted(errors, reverse=True) and profile_errors == sorted(profile_errors, reverse=True)
    assert errors[0] > 0.05 and errors[3] < wanted and errors[4] < wanted / 5


@pytest.mark.parametrize("width", [0.07, 0.075, 0.15])
@pytest.mark.parametrize("begin", [0.0, 100.0])
def test_weights_that_sum_to_one_reconstruct_best(begin, width):
    """Of a random walk from `begin`: against least squares alone, and against EDM2's division by the sum.

    The normal equations are typed anew. Measured with 8 snapshots: alone 1.75 to 4.10 times as far off from zero, and 8.4 to
    26 times from 100; divided 1.00 to 2.06 times.
    """
    total = 400
    sequence = begin * np.sign(np.random.RandomState(1).standard_normal(50))
    sequence = sequence + np.cumsum(np.random.RandomState(0).standard_normal((total, 50)), 0)
    exact = power_averages(sequence, gamma_of(width))[-1]
    saved = {each: power_averages(sequence, gamma_of(each)) for each in WIDTHS}
    steps = np.repeat(snapshot_steps(Recipe(ema_widths="0.05:0.1", ema_snapshots=8), total), 2)
    gammas = [gamma_of(each) for each in WIDTHS] * 8
    weights, _ = solve_weights(steps, gammas, total, gamma_of(width))
    assert weights.sum() == pytest.approx(1, abs=1e-14)
    alone = np.linalg.solve(
        inner_products(steps, gammas, steps, gammas), inner_products(steps, gammas, [total], [gamma_of(width)])[:, 0]
    )
    assert 3e-4 < abs(alone.sum() - 1) < 1e-2

    def error(weights):
        found = sum(
            weight * saved[each][step - 1] for weight, step, each in zip(weights, steps, WIDTHS * 8, strict=True)
        )
        return np.linalg.norm(found - exact) / np.linalg.norm(sequence[-1] - exact)

    ratios = error(alone) / error(weights), error(alone / alone.sum()) / error(weights)
    assert ratios[0] > (7 if begin else 1.6) and 0.99 < ratios[1] < 2.5, ratios
    # nothing is nearer among the combinations with this sum: the gradient does not depend on the snapshot
    gradient = inner_products(steps, gammas, steps, gammas) @ weights
    gradient -= inner_products(steps, gammas, [total], [gamma_of(width)])[:, 0]
    np.testing.assert_allclose(gradient, gradient.mean(), atol=1e-7)


def test_recipe_items():
    recipe = Recipe(ema_widths="0.10:0.05")
    assert recipe.ema_widths == "0.05:0.1" and recipe.widths == WIDTHS  # one set of widths has one identity
    assert parts(recipe) == ("ema", "ema-0.05", "ema-0.1") and parts(Recipe()) == ("ema",)
    assert update_weights(Recipe(), 7) == {"ema": 1 - ema_decay(Recipe(), 7)}
    assert snapshot_steps(recipe, 80) == (10, 20, 30, 40, 50, 60, 70, 80) and snapshot_steps(recipe, 3) == (1, 2, 3)
    assert snapshot_steps(Recipe(), 80) == ()
    assert not {"ema_widths", "ema_snapshots"} & recipe_identity(Recipe()).keys()
    assert recipe_identity(recipe)["ema_widths"] == "0.05:0.1" and "ema_snapshots" not in recipe_identity(recipe)
    for text in ("0.05:", "a", "0", "-0.1", "0.3", "nan", "inf"):
        with pytest.raises(UserError, match="ema_widths .*give widths between 0 and 0.2887, as in 0.05:0.10"):
            Recipe(ema_widths=text)
    with pytest.raises(UserError, match="ema_snapshots must be positive"):
        Recipe(ema_widths="0.05", ema_snapshots=0)
    with pytest.raises(UserError, match="ema_snapshots saves the averages of ema_widths, of which there are none"):
        Recipe(ema_snapshots=3)
    for width in (-0.1, 0.3, math.inf):
        with pytest.raises(UserError, match="ema_width"):
            Sampling(ema_width=width)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 12 steps with two averages, saved after 3, 6, 9 and 12."""
    shop = workshop(tmp_path_factory.mktemp("whole") / "run", request(steps=12, settings=POSTHOC))
    shop.train(12)
    return shop


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same run without the option."""
    shop = workshop(tmp_path_factory.mktemp("plain") / "run", request(steps=12))
    shop.train(12)
    return shop


def saved(run, step, width):
    return load_file(run.posthoc_checkpoint(step) / f"ema-{width!r}.safetensors")


def bytes_below(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_the_option_changes_no_other_byte(whole, plain):
    assert plain.run.posthoc_steps() == [] and not (plain.folder / "posthoc").exists()
    assert whole.run.log.read_bytes() == plain.run.log.read_bytes()
    with_option, without = bytes_below(whole.folder), bytes_below(plain.folder)
    checkpoint = "checkpoints/step-00000012/"
    expected = {f"{checkpoint}{part}.safetensors" for part in ("model", "ema", "first_moment", "second_moment")}
    assert {name for name in without if name.startswith(checkpoint)} == expected
    for name in (*expected, "snapshots/step-00000012/ema.safetensors"):
        assert with_option[name] == without[name]


def test_checkpoint_bytes_without_the_option_are_those_of_before(plain):
    """The names and shapes in the parts, and the recipe's identity, as they were before there was this option."""
    assert "ema_widths" not in json.dumps(json.loads((plain.folder / "run.json").read_text())["identity"])
    state = json.loads((plain.run.ema_checkpoint(12) / "state.json").read_text())
    assert list(state) == ["schema", "step", "seconds", "spent", "trained_with", "files"] and list(state["files"]) == [
        "ema.safetensors"
    ]


def test_what_a_run_saves_is_the_exact_average(whole, tmp_path):
    """Against averages in float64 over the weights of all steps."""
    assert whole.run.posthoc_steps() == [3, 6, 9, 12] and whole.run.ema_checkpoint_steps() == [12]
    wanted = whole.request
    engine = torch_trainer.TorchEngine(
        wanted.spec, torch_trainer.build(wanted.spec, wanted.arguments, 0), arguments=wanted.spec.arguments(**wanted.arguments), recipe=wanted.recipe,
        seed=0, resolved=whole.run.resolved, data=whole.data,
    )  # fmt: skip
    trained = {name for name, weight in engine.net.named_parameters() if weight.requires_grad}
    expected = {width: {name: np.zeros(1) for name in trained} for width in WIDTHS}
    for step in range(1, 13):
        engine.step(step, lambda: False)
        state = engine.net.state_dict()
        for width in WIDTHS:
            beta = (1 - 1 / step) ** (gamma_of(width) + 1)
            for name in trained:
                expected[width][name] = beta * expected[width][name] + (1 - beta) * state[name].double().numpy()
        if step in (3, 12):
            for width in WIDTHS:
                found = saved(whole.run, step, width)
                assert found.keys() == trained  # without tables, which are not averaged
                for name in trained:
                    assert found[name].dtype == np.float32
                    np.testing.assert_allclose(found[name], expected[width][name], rtol=1e-5, atol=1e-7)
    name = "final_layer.linear.weight"
    assert np.abs(saved(whole.run, 12, 0.05)[name] - saved(whole.run, 12, 0.1)[name]).max() > 1e-5


def test_stopping_and_continuing_keeps_the_averages(whole, tmp_path):
    for until in (4, 6, 12):  # a new process's worth of objects each time; the steps that end a call are saved, too
        workshop(tmp_path / "run", request(steps=12, settings=POSTHOC)).train(until)
    run = workshop(tmp_path / "run", request(steps=12, settings=POSTHOC)).run
    assert run.posthoc_steps() == [3, 4, 6, 9, 12]
    for step in (3, 6, 9, 12):
        for width in WIDTHS:
            name = f"ema-{width!r}.safetensors"
            files = [each.posthoc_checkpoint(step) / name for each in (run, whole.run)]
            assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("step", [6, 12])
def test_killed_between_checkpoint_and_snapshot(step, whole, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    keep = training_loop.keep_snapshot

    def killed(run, checkpoint):
        if checkpoint.step == step:
            raise Killed
        keep(run, checkpoint)

    monkeypatch.setattr(training_loop, "keep_snapshot", killed)
    with pytest.raises(Killed):
        workshop(tmp_path / "run", request(steps=12, settings=POSTHOC)).train(12)
    monkeypatch.setattr(training_loop, "keep_snapshot", keep)
    shop = workshop(tmp_path / "run", request(steps=12, settings=POSTHOC))
    assert step not in shop.run.posthoc_steps()
    shop.train(12)
    assert shop.run.posthoc_steps() == [3, 6, 9, 12]
    one, other = bytes_below(shop.folder / "posthoc"), bytes_below(whole.folder / "posthoc")
    assert one == other and len(one) == 8


def test_a_fork_takes_the_saved_averages_along(whole, tmp_path):
    parent = workshop(tmp_path / "parent", request(steps=12, settings=POSTHOC))
    parent.train(7)
    fork = RunSession(request(steps=12, settings=POSTHOC), parent.data, tmp_path / "fork")
    fork.fork(parent.folder, parent.run.resolved)
    assert fork.run.posthoc_steps() == [3, 6, 7]
    fork.train(12)
    assert saved(fork.run, 12, 0.1).keys() == saved(whole.run, 12, 0.1).keys()
    np.testing.assert_array_equal(
        saved(fork.run, 12, 0.1)["final_layer.linear.weight"],
        saved(whole.run, 12, 0.1)["final_layer.linear.weight"],
    )


def reconstruct(run, step, width, target):
    base = run.ema_checkpoint(step) / "ema.safetensors"
    plan = plan_reconstruction(run, step, width, hashlib.sha256(base.read_bytes()).hexdigest())
    write_reconstruction(plan, base, target)
    return load_file(target), load_file(base)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_saved_width_is_given_back(width, whole, tmp_path):
    found, base = reconstruct(whole.run, 12, width, tmp_path / "a.safetensors")
    expected = saved(whole.run, 12, width)
    assert found.keys() == base.keys() > expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected.get(name, base[name]))  # what is not averaged is as it is
        assert value.dtype == base[name].dtype
    # A width within 1e-12 of it goes the way of least squares.
    near, _ = reconstruct(whole.run, 12, width * (1 + 1e-12), tmp_path / "b.safetensors")
    for name, value in expected.items():
        np.testing.assert_allclose(near[name], value, rtol=1e-6, atol=1e-6)


def test_a_width_between_is_between(whole, tmp_path):
    """Each weight of the reconstruction against the combination written out here, and near the middle of the two."""
    found, base = reconstruct(whole.run, 12, 0.075, tmp_path / "a.safetensors")
    steps = [3, 3, 6, 6, 9, 9, 12, 12]
    weights, _ = solve_weights(steps, [gamma_of(each) for each in WIDTHS] * 4, 12, gamma_of(0.075))
    name = "final_layer.linear.weight"
    terms = [
        weight * saved(whole.run, step, width)[name].astype(float)
        for weight, step, width in zip(weights, steps, WIDTHS * 4, strict=True)
    ]
    np.testing.assert_allclose(found[name], sum(terms), rtol=1e-6, atol=1e-9)
    narrow, wide = saved(whole.run, 12, 0.05)[name], saved(whole.run, 12, 0.1)[name]
    middle = np.linalg.norm(found[name] - (narrow + wide) / 2)
    assert middle < 0.5 * np.linalg.norm(narrow - wide)
    np.testing.assert_array_equal(found["pos_embed"], base["pos_embed"])


def test_a_far_width_warns(whole, tmp_path, caplog):
    reconstruct(whole.run, 12, 0.005, tmp_path / "a.safetensors")
    assert [each.levelname for each in caplog.records if "saved averages is only near" in each.message] == ["WARNING"]


def sampled(shop, **options):
    (path,) = sample(run=shop.folder, samples=8, sampling_steps=3, batch=8, **options).samples
    return path, json.loads(path.with_name("samples.json").read_text())


def test_sampling_a_width(whole, plain):
    """The width is part of the identity and of the record; a sample set without it is that of a run without the option."""
    path, sidecar = sampled(whole, ema_width=0.075)
    usual, usual_sidecar = sampled(whole)
    narrow, _ = sampled(whole, ema_width=0.05)
    _, old = sampled(plain)
    assert len({path.parent, usual.parent, narrow.parent}) == 3
    assert sidecar["identity"]["sampling"]["ema_width"] == 0.075 == sidecar["record"]["sampling"]["ema_width"]
    assert sidecar["record"]["training"]["ema_widths"] == "0.05:0.1"
    assert sidecar["record"]["training"]["ema_snapshots"] == 4
    for text in map(json.dumps, (usual_sidecar["identity"]["sampling"], old["identity"], old["record"])):
        assert "ema_width" not in text and "ema_snapshots" not in text
    assert sidecar["identity"]["checkpoint_sha256"] != usual_sidecar["identity"]["checkpoint_sha256"]
    images = [np.load(each)["arr_0"] for each in (path, usual, narrow)]
    assert not np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])
    assert sorted(each.name for each in path.parent.iterdir()) == ["grid.png", "samples.json", "samples.npz"]
    before = path.read_bytes()
    path.unlink()  # made again, it has the same bytes
    assert sampled(whole, ema_width=0.075)[0].read_bytes() == before


def test_pictures_of_a_width(whole):
    """The images of a class are those of a sample set with the same width and label; the weights are not kept."""
    path, sidecar = sampled(whole, ema_width=0.075)
    labels = np.load(path)["arr_1"]
    (picture,) = sample(
        run=whole.folder, classes=str(labels[0]), grid="2x4", sampling_steps=3, batch=8, ema_width=0.075
    ).pictures
    (usual,) = sample(run=whole.folder, classes=str(labels[0]), grid="2x4", sampling_steps=3, batch=8).pictures
    assert picture.parent != usual.parent and picture.read_bytes() != usual.read_bytes()
    about = json.loads(picture.with_suffix(".json").read_text())
    assert about["identity"]["checkpoint_sha256"] == sidecar["identity"]["checkpoint_sha256"]
    assert about["identity"]["sampling"]["ema_width"] == 0.075
    assert sorted(each.suffix for each in picture.parent.iterdir()) == [".json", ".png"]
    with Image.open(picture) as image:
        canvas = np.asarray(image)
    scale = picture_scale(8, 8)
    found = canvas[PICTURE_GAP : PICTURE_GAP + 8 * scale : scale, PICTURE_GAP : PICTURE_GAP + 8 * scale : scale]
    np.testing.assert_array_equal(found, np.load(path)["arr_0"][0].reshape(8, 8))


def test_the_record_gives_its_command(whole):
    """`harness run` with the widths of the recipe, which the record states, and the width that was sampled."""
    path, _ = sampled(whole, ema_width=0.075)
    fields = read_fields(path, samples_sha256(path))
    record = Record(
        provenance="measured", metric="fd", value=1.0, n=8, protocol="digits", resolution=8, dataset="digits",
        evaluation=Evaluation(suite=whole.request.protocol.suite), **fields.arguments(),
    )  # fmt: skip
    (command,) = reproduction(record).commands
    words = shlex.split(command)
    assert words[:2] == ["harness", "run"] and "ema_widths=0.05:0.1" in words and "ema_snapshots=4" in words
    with group.get_command(None, "run").make_context("run", words[2:]) as context:
        asked = request_from(RunOptions(**context.params))
    assert recipe_identity(asked.recipe) == recipe_identity(whole.request.recipe)
    assert asked.sampling.ema_width == 0.075
    texts = row_metadata(record)
    assert texts["EMA width"] == "0.075" and texts["EMA widths"] == "0.05:0.1" and texts["EMA snapshots"] == "4"


def test_the_identity_follows_the_snapshots(whole, tmp_path):
    folder = shutil.copytree(whole.folder, tmp_path / "run", ignore=shutil.ignore_patterns("samples"))
    shop = workshop(folder, request(steps=12, settings=POSTHOC))
    sampling = dataclasses.replace(shop.request.sampling, ema_width=0.075)

    def named():
        return sample_request(shop.run, 12, sampling, 3, 8, gflops_image=1.0).name(shop.run)

    before = named()
    shutil.rmtree(shop.run.posthoc_checkpoint(6))
    assert named() != before
    path = shop.run.posthoc_checkpoint(9) / "ema-0.05.safetensors"
    path.unlink()  # a hard link of the checkpoint's
    save_file(saved(whole.run, 12, 0.05), path)
    with pytest.raises(UserError, match=r"step-00000009 is corrupt: ema-0.05.safetensors does not match its checksum"):
        sample(run=folder, samples=8, sampling_steps=3, batch=8, ema_width=0.075)
    assert list(folder.rglob("*.partial")) == []
    shutil.rmtree(shop.run.posthoc_checkpoint(12))
    with pytest.raises(
        UserError, match=r"no power-function averages of step 12 \(it has: 3, 9\), which --ema-width needs"
    ):
        named()


def test_errors(whole, plain, tmp_path):
    with pytest.raises(
        UserError, match="--ema-width needs a run that keeps averages of several widths; train with --set"
    ):
        sample(run=plain.folder, ema_width=0.075)
    with pytest.raises(UserError, match="ema_width must lie between 0 and 0.2887"):
        sample(run=whole.folder, ema_width=0.3)
    with pytest.raises(UserError, match="--ema-width is fixed by the system"):
        sample(system="dit-xl-2-256", weights={"base": tmp_path}, ema_width=0.1)


def test_the_plan_counts_disk_and_memory():
    with_option, without = (make_plan(request(steps=12, settings=each)) for each in (POSTHOC, {}))
    assert "two checkpoints, 4 x 2 averages and the samples" in costs_text(with_option)
    assert "two checkpoints and the samples" in costs_text(without)
    # two checkpoints with two averages more, and three snapshots besides the one that the newest checkpoint holds
    assert with_option.disk_bytes - without.disk_bytes == (2 * 2 + 3 * 2) * 4 * without.params
    from harness.engines.memory import state_bytes

    assert state_bytes(1000, "float32", 3) - state_bytes(1000, "float32") == 8000


def test_a_shared_weight_is_averaged_once_and_saved_under_all_names(whole):
    """A weight under two names: both are in the part, so that no name of it keeps the EMA of the single decay."""
    wanted = whole.request
    net = torch_trainer.build(wanted.spec, wanted.arguments, 0)
    net.blocks[1].attn.qkv.weight = net.blocks[0].attn.qkv.weight
    engine = torch_trainer.TorchEngine(
        wanted.spec, net, arguments=wanted.spec.arguments(**wanted.arguments), recipe=wanted.recipe, seed=0,
        resolved=whole.run.resolved, data=whole.data,
    )  # fmt: skip
    engine.step(1, lambda: False)
    part = dict(engine.state_dicts())["ema-0.05"]()
    np.testing.assert_array_equal(part["blocks.0.attn.qkv.weight"], part["blocks.1.attn.qkv.weight"])
