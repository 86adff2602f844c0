"""Figures made of what lies beside records: sample sets (7) and logs (13); and the frontier and budget of a study."""

import dataclasses
import json

import numpy as np
import pytest

from harness.errors import UserError
from harness.images.npz import read_npz_head
from harness.io.files import sha256_json
from harness.runs.samples import write_samples
from reports import figures_loss, figures_samples
from reports.charts import model_styles
from reports.drawing import draw
from reports.figures import ABSENT, absent, figures, published_records
from reports.figures_frontier import best_size, pareto
from reports.figures_study import studies
from reports.points import index_of

PROTOCOL = {"name": "digits", "dataset": "digits", "resolution": 8}


def identity(backbone, seed=0, **recipe):
    recipe = {"batch": 128, "schedule": "linear", "learning_rate": 0.002, **recipe}
    return {"backbone": backbone, "protocol": PROTOCOL, "recipe": recipe, "seed": seed, "framework": "torch"}


def draw_set(run, backbone, *, steps=800, sampling_steps=50, seed=0, images=None, labels=None, training_seed=0):
    images = np.full((12, 8, 8, 1), 40, np.uint8) if images is None else images
    labels = np.arange(len(images)) % 10 if labels is None else labels
    sampling = {"sampler": "ddpm", "steps": sampling_steps, "seed": seed, "guidance_scale": 1.0}
    facts = {"run": identity(backbone, training_seed), "training_steps": steps, "sampling": sampling}
    path = run / "samples" / f"set-{sha256_json([facts, labels.tolist()])[:8]}" / "samples.npz"
    write_samples(path, [images], labels.astype(np.int64), {"schema": 1, "identity": facts})
    return path


def log(run, backbone, losses, *, seed=0, tail="", **recipe):
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text(json.dumps({"schema": 1, "identity": identity(backbone, seed, **recipe)}))
    lines = [json.dumps({"step": step, "mse": loss, "vb": 0.01}) for step, loss in enumerate(losses, start=1)]
    (run / "log.jsonl").write_text("\n".join(lines) + "\n" + tail)
    return run


@pytest.fixture
def records(record):
    return [record(system=name, gflops=gflops) for name, gflops in (("dit-xs-2", 0.0637), ("dit-xs-4", 0.0171))]


def test_the_same_noise_is_drawn_by_every_model(tmp_path, records):
    ours = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    for name, pixels in (("dit-xs-2", ours), ("dit-xs-4", 255 - ours)):
        for sampling_steps in (10, 50):
            for steps in (400, 800):
                draw_set(
                    tmp_path / name, name, steps=steps, sampling_steps=sampling_steps,
                    images=pixels if (steps, sampling_steps) == (800, 50) else pixels // 2,
                )  # fmt: skip
    draw_set(tmp_path / "dit-xs-2", "dit-xs-2", seed=1)  # other noise
    draw_set(tmp_path / "dit-xs-4b", "dit-xs-4", images=ours // 3, training_seed=1)  # a second seed of the training
    folders = [tmp_path / name for name in ("dit-xs-2", "dit-xs-4", "dit-xs-4b")]
    figure = figures_samples.same_noise(folders, records)
    (grid,) = figure.grids
    assert grid.rows == ("dit-xs-4", "dit-xs-2") and grid.columns == tuple(f"label {label}" for label in range(10))
    assert np.array_equal(grid.tiles, np.stack([255 - ours[:10], ours[:10]]))
    assert "ddpm with 50 steps, sampling seed 0, after 800 training steps" in grid.heading
    assert len(figure.rows) == 20 and {row["training_seed"] for row in figure.rows} == {0}
    files = draw(figure, model_styles(records), ("png", "svg"))
    assert b"dit-xs-4" in files["svg"] and files == draw(figure, model_styles(records), ("png", "svg"))
    assert figure in [figure] and "figure-7" in {each.name for each in figures(records, folders)}


def test_models_stand_by_family_patch_and_size(tmp_path, record):
    gflops = {"dit-s-8": 0.4, "dit-s-4": 1.4, "dit-b-8": 1.4, "dit-b-4": 5.6, "adm-64": 100.0, "dit-xl-8": 7.4}
    for name in gflops:
        draw_set(tmp_path / name, name)
    records = [record(system=name, gflops=cost) for name, cost in gflops.items()]
    (grid,) = figures_samples.same_noise([tmp_path / name for name in gflops], records).grids
    assert grid.rows == ("dit-s-8", "dit-b-8", "dit-xl-8", "dit-s-4", "dit-b-4", "adm-64")


def test_what_is_not_the_same_sample_or_damaged_is_not_compared(tmp_path, records):
    draw_set(tmp_path / "a", "dit-xs-2")
    assert figures_samples.same_noise([tmp_path / "a"], records) is None
    draw_set(tmp_path / "b", "dit-xs-4", labels=np.zeros(12, int))  # other labels
    assert figures_samples.same_noise([tmp_path / "a", tmp_path / "b"], records) is None
    path = draw_set(tmp_path / "c", "unet")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    (tmp_path / "d" / "samples" / "x").mkdir(parents=True)
    (tmp_path / "d" / "samples" / "x" / "samples.json").write_text('{"identity": []}')
    (tmp_path / "d" / "samples" / "x" / "samples.npz").write_bytes(whole)
    folders = [tmp_path / name for name in "acd"]
    assert figures_samples.same_noise(folders, records) is None
    path.write_bytes(whole)
    assert figures_samples.same_noise(folders, records).grids[0].rows == ("unet", "dit-xs-2")
    assert figures_samples.same_noise(folders, []) is None  # of no protocol that is reported


def test_the_first_images_are_read_without_the_rest(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), np.uint8)
    path = tmp_path / "samples.npz"
    write_samples(path, [images], np.arange(50), {})
    first, labels = read_npz_head(path, 7)
    assert np.array_equal(first, images[:7]) and labels.tolist() == list(range(7))
    assert len(read_npz_head(path, 99)[0]) == 50
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images)
    first, labels = read_npz_head(tmp_path / "packed.npz", 3)
    assert np.array_equal(first, images[:3]) and labels is None
    np.savez(tmp_path / "floats.npz", arr_0=images / 255)
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], dtype=object))
    np.savez(tmp_path / "other.npz", images=images)
    (tmp_path / "none.npz").write_bytes(b"nothing")
    for name in ("floats", "objects", "other", "none", "missing"):
        with pytest.raises(UserError, match=name):
            read_npz_head(tmp_path / f"{name}.npz", 3)


def test_losses_of_seeds_are_one_line_with_a_band(tmp_path, records):
    steps = np.arange(1, 401)
    for seed in (0, 1):
        log(tmp_path / f"a{seed}", "dit-xs-2", 1 / steps + 0.1 * seed, seed=seed, tail='{"step": 401, "ms')
    log(tmp_path / "b", "dit-xs-4", 2 / steps)
    log(tmp_path / "c", "dit-xs-4", 3 / steps, learning_rate=0.1)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "log.jsonl").write_text('{"step": 1}\n')
    figure = figures_loss.training_loss([tmp_path / name for name in ("a0", "a1", "b", "c", "d", "e")], records)
    whole, early, compute = figure.panels
    assert [panel.title for panel in figure.panels] == ["Whole training", "Early training", "Over training compute"]
    lines = {each.label: each for each in whole.series if each.kind == "line"}
    assert set(lines) == {"dit-xs-2", "dit-xs-4 (learning_rate 0.002)", "dit-xs-4 (learning_rate 0.1)"}
    (band,) = [each for each in whole.series if each.kind == "band"]
    assert (
        band.model == "dit-xs-2"
        and band.marks[0].low == pytest.approx(1.01)
        and band.marks[0].high == pytest.approx(1.11)
    )
    assert lines["dit-xs-2"].marks[0].y == pytest.approx(1.06)  # 1 + 0.01, and the mean of 0 and 0.1
    assert lines["dit-xs-2"].marks[-1].x == 400 and max(mark.x for each in early.series for mark in each.marks) == 40
    per_step = records[0].training.gflops / records[0].training.steps
    (costed,) = [each for each in compute.series if each.label == "dit-xs-2" and each.kind == "line"]
    assert costed.marks[-1].x == pytest.approx(400 * per_step)
    smooth = 0.02 * 400  # steps of the mean: a curve of 1 / step is smoothed upwards, never below
    assert all(mark.y >= 1 / mark.x + 0.06 for mark in lines["dit-xs-2"].marks) and smooth > 2
    assert {row["training_seed"] for row in figure.rows if row["model"] == "dit-xs-2"} == {0, 1}
    assert figures_loss.training_loss([tmp_path / "d"], records) is None


def test_a_long_log_is_read_in_places(tmp_path, records, monkeypatch):
    noise = 0.05 * np.random.default_rng(0).normal(size=20_000)
    run = log(tmp_path / "a", "dit-xs-2", 1 / np.sqrt(np.arange(1, 20_001)) + noise)
    whole = figures_loss.training_loss([run], records)
    monkeypatch.setattr(figures_loss, "WHOLE_BYTES", 10_000)
    places = figures_loss.training_loss([run], records)
    for figure in (whole, places):
        marks = figure.panels[0].series[-1].marks
        assert marks[-1].y == pytest.approx(0.01 + 1 / np.sqrt(20_000), abs=0.02) and marks[-1].x > 19_900
        assert len(marks) <= figures_loss.PLACES
    assert len(places.rows) < len(noise)


def test_what_needs_more_than_records_is_named_where_it_is_missing(records):
    made = figures(records)
    assert absent(made) == tuple(ABSENT.values()) and all("not drawn" in text for text in absent(made))


def test_the_frontier_of_a_study(study):
    figure = pareto(index_of(study), [])
    assert [panel.x.title for panel in figure.panels] == ["Training compute", "Sampling compute"]
    for number, panel in enumerate(figure.panels, start=1):
        on = {row["record_id"] for row in figure.rows if row["panel"] == number and row["frontier"] == "yes"}
        costs = {}
        for each in study:
            if each.metric == "fd":
                cost = each.training.gflops if number == 1 else each.sampling.gflops_per_image
                costs.setdefault((cost, each.system, each.sampling.steps), []).append(each)
        means = {key: sum(each.value for each in own) / 2 for key, own in costs.items()}
        beaten = {
            key for key, mean in means.items()
            if any(other[0] <= key[0] and value < mean for other, value in means.items())
            or any(other[0] < key[0] and value <= mean for other, value in means.items())
        }  # fmt: skip
        assert on == {each.id for key, own in costs.items() if key not in beaten for each in own}
        named = {mark.text for each in panel.series if not each.faint and each.kind == "points" for mark in each.marks}
        assert len(named) == len(on) / 2 and all(text for text in named)
        assert "energy is not in the records" in panel.note
    higher = [dataclasses.replace(each, metric="fid", value=each.value) for each in study if each.metric == "fd"]
    assert pareto(index_of(higher), []) is not None
    labels = {series.label for series in pareto(index_of([]), published_records()).panels[0].series}
    assert {"DiT-XL/2", "DiT-XL/2 in-context"} <= labels and not labels & {"ft-EMA", "original", "dit-xl-2"}
    assert pareto(index_of(each for each in study if each.system == "unet-small"), []) is None


def test_time_is_compared_on_the_device_that_most_models_were_timed_on(study):
    timed = []
    for index, each in enumerate(study):
        spent = {"training_seconds": 1000 * each.gflops + each.training.seed, "training_device": "one GPU"}
        spent |= {"sampling_seconds_per_image": each.gflops, "sampling_device": "one GPU"}
        if index % 9 == 0:
            spent = {"training_seconds": 1.0, "training_device": "another GPU"}
        timed.append(dataclasses.replace(each, environment=dataclasses.replace(each.environment, **spent)))
    panels = {panel.x.text: panel for panel in pareto(index_of(timed), []).panels}
    training = panels["Training time (seconds on one GPU)"]
    assert len(panels) == 4 and "times on 1 more devices" in training.note
    marks = [mark for each in training.series if each.kind == "points" for mark in each.marks]
    by_id = {each.id: each for each in timed}
    for mark in marks:
        spent = [by_id[name].environment for name in mark.record_ids]
        assert {each.training_device for each in spent} == {"one GPU"}
        assert mark.x == pytest.approx(sum(each.training_seconds for each in spent) / len(spent))
    drawn = {name for mark in marks for name in mark.record_ids}
    rows = pareto(index_of(timed), []).rows
    assert drawn == {each.id for each in timed if each.metric == "fd" and each.environment.training_device == "one GPU"}
    assert {row["training_seconds"] for row in rows if row["record_id"] in drawn} > {17.1}
    sampling = panels["Sampling time (seconds an image on one GPU)"]
    assert min(mark.x for each in sampling.series for mark in each.marks) == pytest.approx(0.0171)


def test_the_best_size_at_a_budget(record):
    """Known curves: the small model is better below 6,000 Gflops, the large one above."""
    made = []
    for system, gflops, exponent, factor in (("small", 0.02, -0.2, 100.0), ("large", 0.08, -0.5, 100.0 * 6000**0.3)):
        for steps in (100, 400, 1500):
            cost = 3 * gflops * 128 * steps
            for seed in range(3):  # of one seed, nobody knows whether it would win again
                base = record(system=system, gflops=gflops, value=factor * cost**exponent * (1 + 1e-7 * (seed - 1)))
                training = dataclasses.replace(base.training, steps=steps, gflops=cost, seed=seed)
                made.append(dataclasses.replace(base, training=training))
    figure = best_size(studies(index_of(made), []))
    budgets = {row["budget_gflops"] for row in figure.rows}
    assert min(budgets) == pytest.approx(3 * 0.08 * 128 * 100) and max(budgets) == pytest.approx(3 * 0.02 * 128 * 1500)
    for row in figure.rows:
        exponent, factor = {"small": (-0.2, 100.0), "large": (-0.5, 100.0 * 6000**0.3)}[row["model"]]
        assert row["value"] == pytest.approx(factor * row["budget_gflops"] ** exponent)
        winner = "small" if row["budget_gflops"] < 6000 else "large"
        assert row["best"] == ("yes" if row["model"] == winner else "no")
    assert {row["model"] for row in figure.rows if row["best"] == "yes"} == {"small", "large"}
    assert best_size(studies(index_of(made[:4]), [])) is None  # the large one at one length has no curve
