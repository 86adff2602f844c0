"""A package with an item for each door (tests/plugin_doors), from `harness list` to the page."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from package_of_doors import NAME, harness, installed

from evaluators.metrics import Metric
from harness import registry
from harness.conformance.checks import ALL, run_checks
from harness.conformance.parity import parity
from harness.conformance.suite import subject_of
from harness.data.digits import load
from harness.runs.samples import read_samples
from results import store

WORDS = ("--precision", "float32", "--micro-batch", "16", "--device", "cpu", "--no-report")
STUDY = """
protocol = "doors-unlabelled"
backbones = ["doors-sigma"]
budgets = { steps = [4] }
precision = "float32"
micro_batch = 16
device = "cpu"
"""
DOWN, UP = "\u2193", "\u2191"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The working folder, with the package installed."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "site").mkdir()
    with pytest.MonkeyPatch.context() as patch, installed(folder / "site"):
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def pixels(home):
    """A run with the package's network, objective, sampler, rule of guidance, auxiliary loss, data, features and metrics;
    real digits evaluated beside it; and the report of both. The records of the run by metric."""
    harness(
        "run", "--backbone", "doors-masked", "--protocol", "doors-pixels", "--sampler", "doors-euler", "--cfg", "2:doors-mean",
        "--logger", "doors-lines", "--out", "runs/pixels", *WORDS,
    )  # fmt: skip
    np.savez("real.npz", arr_0=load().images[300:400], arr_1=load().labels[300:400])
    harness("evaluate", "real.npz", "--protocol", "doors-pixels", "--name", "real", "--out", "real.jsonl")
    of_run = store.load([Path("runs/pixels/records.jsonl")]).records[0]
    as_of_a_run = {name: getattr(of_run, name) for name in ("params", "gflops", "training", "kind", "framework")}
    real = [  # as if a model of the same training compute had made them
        replace(each, backbone="real", sampling=replace(of_run.sampling, samples_sha256="1" * 64), **as_of_a_run)
        for each in store.load([Path("real.jsonl")]).records
    ]
    store.append(Path("model.jsonl"), real)
    files = ("--results", "runs/pixels", "--results", "model.jsonl")
    _, said = harness("report", *files, "--protocol", "doors-pixels", "--out", "report")
    Path("said-by-report.txt").write_text(said)
    return records_of("runs/pixels/records.jsonl")


def records_of(path):
    return {each["metric"]: each for each in map(json.loads, Path(path).read_text().splitlines())}


def training_of(folder):
    """The rows of a run's log."""
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def test_each_door_has_an_item_and_it_is_listed(home):
    document = json.loads(harness("list", "--json")[0])
    assert document.pop("problems") == []
    ours = {noun: [row["name"] for row in rows if row["from"] == NAME] for noun, rows in document.items()}
    assert all(ours.values()) and len(ours) == len(registry.GROUPS), ours
    brought = {name for each in registry.GROUPS.values() for name in each.names() if each.owner(name) == NAME}
    assert brought == {name for names in ours.values() for name in names}
    assert f"2x2 pixels turned into 4 channels  [{NAME}]" in harness("list", "autoencoders")[0]


def test_a_metric_whose_key_no_record_can_have_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match="metric 'doors-gap': a key is of lower-case letters"):
        Metric(key="doors-gap", direction="lower", minimum=1, paper="", compute="")


def test_what_a_run_states_of_the_package(home, pixels):
    record = pixels["doors_gap"]
    assert (record["backbone"], record["protocol"], record["dataset"]) == (
        "doors-masked",
        "doors-pixels",
        "doors-digits",
    )
    sampling, training, evaluation = record["sampling"], record["training"], record["evaluation"]
    assert (sampling["sampler"], sampling["guidance_rule"], sampling["evaluations"]) == ("doors-euler", "doors-mean", 6)
    assert (training["objective"], training["auxiliary"]) == ("doors-half", "doors-quiet:none:inner")
    assert (evaluation["suite"], evaluation["features"]) == ("doors-suite", "doors-corner")
    assert set(training_of("runs/pixels")[0]) == {"step", "mse", "vb", "doors-quiet"}
    assert NAME in record["environment"]["training_versions"]


def test_training_compute_of_masked_training_is_apart_from_that_of_sampling(home, pixels):
    record = pixels["doors_gap"]
    tokens, width, images = 16, 16, 6 * 16
    around = tokens * 4 * width * 2 + width  # both convolutions and the layer of the time
    assert record["gflops"] == pytest.approx((around + tokens * width**2) / 1e9)
    assert record["sampling"]["gflops_per_image"] == pytest.approx(6 * record["gflops"])
    training = record["training"]
    assert training["forward_gflops"] == pytest.approx((around + tokens // 2 * width**2) / 1e9)
    assert training["gflops"] == pytest.approx(3 * images * training["forward_gflops"] + training["auxiliary_gflops"])
    plan = json.loads(harness("plan", "--backbone", "doors-masked", "--protocol", "doors-pixels", "--json")[0])
    assert plan["gflops"] == record["gflops"] and plan["training"]["forward_gflops"] == training["forward_gflops"]
    assert plan["training"]["gflops"] == training["gflops"]
    assert "Gflops of a training pass" in Path("report/table-doors-pixels.md").read_text()
    # in another protocol, whose recipe has no auxiliary loss to be counted on every backbone
    spec = registry.backbones.get("doors-masked")
    compute = spec.count(input_size=4, in_channels=4, num_classes=10, out_channels=4)
    budget = ("--budget", str(3 * 16 * 7 * compute.in_training.gflops), "--protocol", "doors-latents", "--json")
    (row,) = (row for row in json.loads(harness("plan", *budget)[0])["rows"] if row["name"] == "doors-masked")
    assert row["steps"] == 7 and row["gflops"] == compute.gflops
    assert row["gflops_in_training"] == compute.in_training.gflops < compute.gflops


def test_both_directions_are_judged_the_right_way_everywhere(home, pixels):
    higher = {"doors_gap": False, "doors_likeness": True}
    said = json.loads(
        harness(
            "evaluate", "real.npz", "--protocol", "doors-pixels", "--name", "real", "--out", "real.jsonl", "--json"
        )[0]
    )
    assert {each["metric"]: each["higher_is_better"] for each in said["records"] if each["metric"] in higher} == higher
    assert {name: pixels[name]["higher_is_better"] for name in higher} == higher
    real = records_of("model.jsonl")
    assert real["doors_gap"]["value"] < 0.05 < 0.2 < pixels["doors_gap"]["value"]
    for sides, verdict in ((("model.jsonl", "runs/pixels"), "win"), (("runs/pixels", "model.jsonl"), "loss")):
        rows = json.loads(harness("compare", *sides, "--json")[0])["rows"]
        assert {row["metric"]: row["verdict"] for row in rows if row["metric"] in higher} == dict.fromkeys(
            higher, verdict
        )

    table = [line for line in Path("report/table-doors-pixels.md").read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    titles = [f"Gap (share) {DOWN}", f"Likeness (share) {UP}"]
    (heading,) = (row for row in rows if any("Gap (share)" in cell for cell in row))
    places = {key: next(i for i, cell in enumerate(heading) if title[:-1].strip() in cell and title[-1] in cell)
              for key, title in zip(higher, titles, strict=True)}  # fmt: skip
    best, worse = (next(row for row in rows if row[0].startswith(name)) for name in ("real", "doors-masked"))
    for place in places.values():
        assert best[place].startswith("**") and "**" not in worse[place]

    with Path("report/table-verdicts.csv").open(newline="", encoding="utf-8") as file:
        found = {(row["metric"], row["system"], row["verdict"]) for row in csv.DictReader(file)}
    assert found >= {(name, "real", "win") for name in higher} and not any(
        each[1:] == ("doors-masked", "win") for each in found
    )
    page = Path("report/report.html").read_text()
    data = json.JSONDecoder().raw_decode(page, page.index("{", page.index('type="application/json"')))[0]
    shown = {each["id"]: each["metric"][-1] for each in data["records"]}
    for record in (*real.values(), *pixels.values()):
        if record["metric"] in higher:
            assert shown[record["id"]] == (UP if higher[record["metric"]] else DOWN)


def test_a_logger_and_a_figure_of_the_package(home, pixels):
    lines = [line.split() for line in Path("runs/pixels/lines.txt").read_text().splitlines()]
    rows = training_of("runs/pixels")
    assert [int(step) for step, _ in lines] == [row["step"] for row in rows]
    expected = [row["mse"] + row["vb"] + 0.1 * row["doors-quiet"] for row in rows]
    assert [float(loss) for _, loss in lines] == pytest.approx(expected, rel=1e-4)
    with Path("report/doors-figure.csv").open(newline="", encoding="utf-8") as file:
        found = {row["system"]: float(row["gap"]) for row in csv.DictReader(file)}
    assert found["doors-masked"] == pixels["doors_gap"]["value"] and "real" in found
    assert "Gap over Gflops" in Path("report/report.html").read_text()
    warning = f"figure 'doors-torn' of {NAME} is not drawn: OSError: no ink"
    assert Path("said-by-report.txt").read_text().count(warning) == 1


def test_a_launcher_of_the_package_runs_a_study(home, pixels, monkeypatch):
    """It is handed the commands that are left, here of a run that is there already but for one more sample set."""
    started = []

    def run(words, **options):
        started.append(words)
        harness(*words[words.index("run") :])
        return SimpleNamespace(returncode=0)

    from all_doors import services  # type: ignore[import-not-found]

    monkeypatch.setattr(services, "subprocess", SimpleNamespace(run=run))
    Path("study.toml").write_text(STUDY)
    harness("study", "study.toml", "--launcher", "doors-inline")
    assert len(started) == 1 and "doors-sigma" in started[0]
    status = json.loads(harness("study", "study.toml", "--status", "--json")[0])
    assert status["counts"]["done"] == 1
    assert "doors-sigma" in Path("runs/studies/study/report/table-doors-unlabelled.md").read_text()
    _, said = harness("study", "study.toml", "--launcher", "doors-inlin", code=2)
    assert "unknown launcher 'doors-inlin'; did you mean doors-inline" in said


def test_a_system_of_the_package_takes_the_run(home, pixels):
    out = ("--samples", "20", "--out", "of-system")
    harness("sample", "--system", "doors-system", "--weights", "base=runs/pixels", "--device", "cpu", *out)
    (path,) = Path("of-system").rglob("samples.npz")
    record = json.loads(path.with_suffix(".json").read_text())["record"]
    assert (record["system"], record["sampling"]["sampler"]) == ("doors-system", "doors-euler")


def test_a_tokenizer_encodes_trains_and_decodes(home, pixels):
    np.savez("digits.npz", arr_0=load().images[:300], arr_1=load().labels[:300])
    out, said = harness("data", "latents", "digits.npz", "--vae", "doors-blocks", "--device", "cpu", "--out", "cache")
    assert "300 images of npz, latents 4x4x4" in out and "by doors-blocks" in out and "scale 1" in out
    again, _ = harness("data", "latents", "digits.npz", "--vae", "doors-blocks", "--device", "cpu", "--out", "cache")
    assert "exists already, the same latents" in again
    assert "every hash holds" in harness("data", "verify", "cache")[0]
    words = ("--backbone", "doors-masked", "--protocol", "doors-latents", "--data", "cache")
    harness("run", *words, "--out", "runs/latents", *WORDS)
    (path,) = Path("runs/latents").glob("samples/*/samples.npz")
    samples = read_samples(path)
    assert samples.images.shape == (100, 8, 8, 1) and samples.images.std() > 20
    record = records_of("runs/latents/records.jsonl")["doors_gap"]
    assert record["sampling"]["decoder"] == "doors-blocks" and record["training"]["latents_sha256"]
    assert record["sampling"]["decoder_gflops"] == pytest.approx(4 * 4 * 4 * 4 / 1e9)
    identity = json.loads(Path("runs/latents/run.json").read_text())["identity"]["latents"]
    assert (identity["scale_factor"], identity["shift_factor"]) == (1.0, 0.0)
    harness("report", "--results", "runs/latents", "--out", "report-latents")
    assert "doors-blocks" in Path("report-latents/table-doors-latents.md").read_text()
    decoded = ("sample", "--run", "runs/latents", "--decoder", "doors-blocks", "--samples", "100")
    assert (
        "is there" in " ".join(harness(*decoded)) or len(list(Path("runs/latents").glob("samples/*/samples.npz"))) == 1
    )


def test_a_tokenizer_that_does_not_come_back_is_refused(home):
    np.savez("some.npz", arr_0=load().images[:30], arr_1=load().labels[:30])
    _, said = harness("data", "latents", "some.npz", "--vae", "doors-one-way", "--out", "no-cache", code=2)
    assert "images come back with an error of 0." in said and "does decode undo the normalisation of encode?" in said
    assert not Path("no-cache").exists()
    _, said = harness("data", "latents", "some.npz", "--vae", "doors-block", "--out", "no-cache", code=2)
    assert "did you mean doors-blocks" in said


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_without_classes_and_with_the_log_of_the_noise_level(home, framework):
    """From the data to a verdict: no label, in training, sampling, records, tables and comparisons."""
    sides = [f"runs/{framework}-{seed}" for seed in (0, 1)]
    for seed, out in enumerate(sides):
        words = ("--backbone", "doors-sigma", "--protocol", "doors-unlabelled", "--framework", framework)
        harness("run", *words, "--seed", seed, "--out", out, *WORDS)
    (path,) = Path(sides[0]).glob("samples/*/samples.npz")
    samples = read_samples(path)
    assert samples.images.std() > 20 and (samples.labels == 0).all()
    losses = [row["mse"] for row in training_of(sides[0])]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    _, said = harness("sample", "--run", sides[0], "--cfg", "2", code=2)
    assert "has no null label" in said
    rows = json.loads(harness("compare", *sides, "--json")[0])["rows"]
    assert {row["verdict"] for row in rows if row["metric"] == "doors_gap"} <= {"win", "loss", "tie"}
    harness("report", *(word for side in sides for word in ("--results", side)), "--out", f"report-{framework}")
    assert "doors-sigma" in Path(f"report-{framework}/table-doors-unlabelled.md").read_text()


CHECKS = (
    "output",
    "image, time and label matter",
    "training and sampling mode",
    "gradients",
    "fractional times",
    "compute",
)


def test_networks_pass_the_checks(home):
    """The time in its form, the compute of masked training, and torch against jax."""
    with_classes, without = ({"num_classes": count, "out_channels": 2} for count in (10, 0))
    for name, arguments in (("doors-masked", with_classes), ("doors-sigma", without)):
        subject = subject_of(registry.backbones.get(name), "torch", arguments)
        found = list(run_checks(subject, {check: ALL["torch"][check] for check in CHECKS}))
        assert [each for each in found if each.status == "failed"] == []
        assert ["masked training: " in found[-1].message] == [name == "doors-masked"]
    other = subject_of(registry.backbones.get("doors-sigma"), "jax", without)
    assert parity(subject, other).status == "ok"


def test_masked_training_in_jax_alone(home):
    """Counted in JAX, checked, trained and sampled, without a torch network."""
    spec, (tokens, width) = registry.backbones.get("doors-masked-jax"), (64, 16)
    around = 2 * width + tokens * width * (1 + 1)
    arguments = {"out_channels": 1}
    found = list(run_checks(subject_of(spec, "jax", arguments), ALL["jax"]))
    assert [each for each in found if each.status == "failed"] == []
    (remark,) = [each.message for each in found if each.check == "compute"]
    assert "masked training: " in remark and "in sampling" in remark
    compute = spec.count(input_size=8, in_channels=1, num_classes=10, **arguments)
    assert compute.flops == around + tokens * width**2 and compute.in_training.flops == around + tokens // 2 * width**2
    (failure,) = run_checks(
        subject_of(replace(spec, masked_training=False), "jax", arguments), {"compute": ALL["jax"]["compute"]}
    )
    assert "give the spec masked_training=True" in failure.message
    words = ("--backbone", "doors-masked-jax", "--protocol", "doors-steps", "--set", "objective=velocity")
    harness("run", *words, "--framework", "jax", "--out", "runs/masked-jax", *WORDS)
    losses = [row["mse"] for row in training_of("runs/masked-jax")]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    record = records_of("runs/masked-jax/records.jsonl")["doors_gap"]
    assert (record["framework"], record["gflops"]) == ("jax", compute.gflops)
    assert record["training"]["forward_gflops"] == compute.in_training.gflops
