"""diagnose: runs that are broken on purpose, one stage each, are named by that stage; healthy runs are healthy."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_trained as small
from click.testing import CliRunner
from PIL import Image

import harness
from harness.cli import group
from harness.data.digits import load
from harness.data.images import ImageSet
from harness.data.load import load_data
from harness.diagnose.data import Classifier, check_labels, compare_statistics, cross_validated
from harness.diagnose.evaluation import KNOWN_FEATURES, built_in_images
from harness.diagnose.expectation import Expectation
from harness.diagnose.run import diagnose
from harness.pipeline.evaluation_config import EvaluationConfig
from harness.pipeline.measure import evaluate_and_record
from harness.planning.request import request_of_run
from harness.runs.run import open_run
from harness.runs.samples import read_sidecar, write_samples
from results.store import append
from results.store import load as load_results

STEPS = 240


def resized(images, how):
    """Digits as they would be had they been photographed at 24 pixels and resized to 8: by averaging, or by picking pixels."""
    large = np.stack(
        [np.asarray(Image.fromarray(each[..., 0]).resize((24, 24), Image.Resampling.BICUBIC)) for each in images]
    )
    if how == "average":
        return large.reshape(len(large), 8, 3, 8, 3).mean(axis=(2, 4)).round().astype(np.uint8)[..., None]
    return np.ascontiguousarray(large[:, 1::3, 1::3])[..., None]


@pytest.fixture(scope="module", autouse=True)
def registered():
    with small.registered():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A protocol over an .npz of resized digits, and a healthy run on it."""
    home = tmp_path_factory.mktemp("diagnose")
    digits = load()
    small.write_images(home / "good.npz", resized(digits.images, "average"), digits.labels)
    small.write_protocol(home, dataset="npz", steps=STEPS)
    small.train(home / "healthy", home / "small.toml", data=home / "good.npz")
    return home


def named(found):
    """The stages at fault that follow from no other."""
    return [each.stage for each in found.findings if each.status == "fault" and not each.follows]


def of_stage(found, stage):
    return next(each for each in found.findings if each.stage == stage)


def copied(home, name):
    """A copy of the healthy run without its samples and records; its request."""
    shutil.copytree(home / "healthy", home / name)
    shutil.rmtree(home / name / "samples")
    (home / name / "records.jsonl").unlink()
    run = open_run(home / name)
    return run, request_of_run(run, sampling={})


def run_diagnose(home, name, **options):
    options = {"data": home / "good.npz", "against": home / "healthy", "cache": home / "cache", **options}
    return diagnose(home / name, options.pop("against"), **options)


def make_point(runs, path):
    """A reference point of these runs, made as the script makes it."""
    from harness.diagnose.convergence import make_reference_point

    make_reference_point(runs, marks=(STEPS // 2, STEPS), name="small").write(path)


def good(home):
    return load_data(open_run(home / "healthy").protocol, home / "good.npz")


def test_a_healthy_run_is_healthy(home):
    alone = run_diagnose(home, "healthy", against=None)
    assert alone.healthy and not named(alone) and "healthy" in alone.conclusion and alone.gap is None
    assert all(each.status in ("ok", "not used") for each in alone.findings), alone.findings
    assert "gives these samples again" in of_stage(alone, "sampler").measured.replace("give ", "gives ")
    words = [
        "diagnose",
        str(home / "healthy"),
        "--data",
        str(home / "good.npz"),
        "--cache",
        str(home / "cache"),
        "--json",
    ]
    done = CliRunner().invoke(group, words)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["healthy"] and [each["stage"] for each in document["findings"]][:3] == ["data", "labels", "loss"]


def test_a_part_of_the_data_set_as_reference_is_the_right_reference(home):
    """Of a protocol with `reference_images`: `harness evaluate` compares with that part, and so does diagnose."""
    run, request = copied(home, "part")
    protocol = dataclasses.replace(run.protocol, reference_images=200)
    document = json.loads((run.folder / "run.json").read_text())
    document["protocol"]["reference_images"] = 200
    (run.folder / "run.json").write_text(json.dumps(document))
    request = dataclasses.replace(request, protocol=protocol)
    small.draw(open_run(home / "part"), request, STEPS, good(home).reference(200))
    found = run_diagnose(home, "part", against=None)
    assert of_stage(found, "reference").status == "ok" and "reference" not in named(found)


def test_of_another_run_the_nearest_sample_set_and_the_same_suite_are_expected(home):
    """It may have sets of more steps, and records of other suites."""
    shutil.copytree(home / "healthy", home / "richer")
    run = open_run(home / "richer")
    small.draw(run, request_of_run(run, sampling={}), STEPS, good(home), steps=40)
    other = [
        dataclasses.replace(
            record,
            value=1e6,
            evaluation=dataclasses.replace(record.evaluation, suite="tiny-other", features_sha256="other"),
        )
        for record in load_results([home / "healthy" / "records.jsonl"]).records
    ]
    lines = run.records.read_text()
    run.records.unlink()
    append(run.records, other)  # first in the file
    run.records.write_text(run.records.read_text() + lines)
    found = run_diagnose(home, "healthy", against=home / "richer")
    assert found.healthy and found.gap == 0 and not named(found)
    assert of_stage(found, "sampler").status == "ok" and "20 steps" in of_stage(found, "sampler").expected


def broken_sampler(home):
    run, request = copied(home, "sampler")
    small.draw(run, request, STEPS, good(home), steps=5, precision="bfloat16")


def broken_count(home):
    run, request = copied(home, "count")
    small.draw(run, request_of_run(run, sampling={}, samples=small.COUNT // 2), STEPS, good(home))


def broken_reference(home):
    run, request = copied(home, "reference")
    images = 255 - load().images
    small.draw(run, request, STEPS, ImageSet(name="negatives", images=images, labels=load().labels))


def broken_ema(home):
    """The samples of the raw weights, with the sidecar that the EMA's would have."""
    run, request = copied(home, "ema")
    path = small.draw(run, request, STEPS, good(home))
    from harness.diagnose.sampling import Redrawer, drawing_of
    from harness.diagnose.subject import open_subject

    subject = open_subject(home / "ema", data=home / "good.npz", cache=home / "cache")
    redrawer = Redrawer(subject, drawing_of(subject))
    images = redrawer.draw(small.COUNT, weights=redrawer.raw)
    sidecar = read_sidecar(path)
    write_samples(path, [images], subject.labels, sidecar)
    run.records.unlink()
    evaluate_and_record(
        path, run.protocol, good(home), run.records, cache=home / "cache", config=EvaluationConfig.of(run.protocol)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "break_it"),
    [("sampler", broken_sampler), ("N", broken_count), ("reference", broken_reference), ("EMA", broken_ema)],
)
def test_what_breaks_sampling_or_evaluation_is_named(home, stage, break_it):
    break_it(home)
    folder = {"N": "count"}.get(stage, stage.lower())
    found = run_diagnose(home, folder)
    print(found.conclusion)
    assert named(found) == [stage], found.findings
    assert not found.healthy and f"the stage {stage}" in found.conclusion
    share = of_stage(found, stage).share
    assert share is None or 0 <= share <= 1
    if stage in ("sampler", "reference"):  # what it costs can be measured to the last digit
        assert share == pytest.approx(1.0, abs=0.05), found
    if stage == "sampler":
        assert named(run_diagnose(home, folder, against=None)) == [stage]  # also by the protocol alone


def test_statistics_tell_filters_crops_and_brightness_apart():
    digits = load().images
    same = compare_statistics(resized(digits[::2], "average"), resized(digits[1::2], "average"))
    assert not any(each.differs for each in same)
    other = {each.name: each for each in compare_statistics(resized(digits, "pick"), resized(digits, "average"))}
    assert other["sharpness"].differs and not other["brightness"].differs
    zoomed = np.kron(digits[:, 2:6, 2:6], np.ones((1, 2, 2, 1), np.uint8))
    cropped = {each.name: each for each in compare_statistics(zoomed, digits)}
    assert cropped["border"].differs
    dark = {each.name: each for each in compare_statistics(digits // 2, digits)}
    assert dark["brightness"].differs


class OfImages:
    """A subject of which the stage labels asks no more than this."""

    def __init__(self, images, labels, training, reference):
        self.images, self.labels, self.training, self.reference = images, labels, training, reference
        self.protocol = type("Protocol", (), {"num_classes": 10})


def test_labels_in_another_order_and_shuffled_labels():
    digits = load()
    images, labels = digits.images, digits.labels
    assert 0.85 < cross_validated(images, labels, 10) < 1
    assert (Classifier(images, labels, 10).predict(images) == labels).mean() > 0.9
    reference = ImageSet(name="reference", images=images, labels=labels)
    moved = ImageSet(name="training", images=images, labels=(labels + 1) % 10)
    shuffled = ImageSet(name="training", images=images, labels=np.random.default_rng(0).permutation(labels))
    samples = (images[::3], labels[::3])
    expected = Expectation(source="the tests")
    found = check_labels(OfImages(*samples, moved, reference), expected)
    assert found.status == "fault" and "another order of classes" in found.measured
    found = check_labels(OfImages(*samples, shuffled, reference), expected)
    assert found.status == "fault" and "shuffled" in found.measured
    found = check_labels(OfImages(samples[0], (samples[1] + 3) % 10, reference, reference), expected)
    assert found.status == "fault"
    assert check_labels(OfImages(*samples, reference, reference), expected).status == "ok"
    noise = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), dtype=np.uint8)
    assert check_labels(OfImages(noise, labels[:300], reference, reference), expected).status == "ok"


def test_what_is_no_run_is_refused_in_one_line(home, tmp_path):
    for words, text in (
        ([tmp_path / "nothing"], "neither a run nor a sample set"),
        ([tmp_path], "no images in it"),
        ([home / "healthy"], "name its path with --data"),
        ([home / "healthy", "--data", home / "good.npz", "--against", tmp_path / "nothing"], "no record file"),
    ):
        done = CliRunner().invoke(group, ["diagnose", *map(str, words)])
        assert done.exit_code != 0 and done.exception is not None and text in str(done.exception)
        assert "\n" not in str(done.exception)


def test_samples_without_a_run(home, tmp_path):
    """Only the files: nothing can be drawn again, and what cannot be told is said."""
    path = next((home / "healthy" / "samples").glob("*/samples.npz"))
    shutil.copy(path, tmp_path / "mine.npz")
    found = diagnose(
        tmp_path / "mine.npz", protocol=str(home / "small.toml"), data=home / "good.npz", cache=home / "cache"
    )
    assert found.healthy and {each.stage for each in found.findings if each.status == "not told"} >= {"loss", "sampler"}


def small_vae(folder, images, seed):
    """An autoencoder of 8x8 grey images with latents 4x4, trained for a short while from a seed of its own."""
    import torch
    from diffusers import AutoencoderKL
    from small_vae import save_vae

    save_vae(folder, seed=seed, levels=2, channels=4, image_channels=1, width=16)
    vae = AutoencoderKL.from_pretrained(folder)
    x = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    optimizer = torch.optim.Adam(vae.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(400):
        batch = x[torch.randint(len(x), (64,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        loss = (vae.decode(posterior.mean).sample - batch).square().mean() + 1e-4 * posterior.mean.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vae.save_pretrained(folder)
    return float(loss.detach())


def done(*words):
    result = CliRunner().invoke(group, [str(each) for each in words])
    assert result.exit_code == 0, (result.exception, result.output)


@pytest.fixture(scope="module")
def studied(home):
    """Six healthy seeds, a reference point of the first five, and runs whose training is broken."""
    digits = load()
    rng = np.random.default_rng(0)
    small.write_images(home / "filter.npz", resized(digits.images, "pick"), digits.labels)
    small.write_images(home / "shuffled.npz", resized(digits.images, "average"), rng.permutation(digits.labels))
    for seed in range(5):
        small.train(home / f"point{seed}", home / "small.toml", data=home / "good.npz", seed=100 + seed)
    make_point([home / f"point{seed}" for seed in range(5)], home / "point.json")
    for name in ("filter", "shuffled"):
        small.train(home / name, home / "small.toml", data=home / f"{name}.npz", reference=home / "good.npz", seed=7)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("against", ["point.json", "healthy"])
@pytest.mark.parametrize(
    ("name", "data", "stage"),
    [("filter", "filter.npz", "data"), ("shuffled", "shuffled.npz", "labels")],
)
def test_what_breaks_training_is_named(studied, name, data, stage, against):
    found = run_diagnose(studied, name, data=studied / data, reference=studied / "good.npz", against=studied / against)
    print(name, against, found.conclusion)
    assert not found.healthy and f"the stage {stage}" in found.conclusion, found


@pytest.mark.slow
def test_a_learning_rate_times_ten_is_named(home):
    """From a rate that is the largest of which a run of so few steps makes use."""
    text = (home / "small.toml").read_text().replace("learning_rate = 3e-3", "learning_rate = 1e-2")
    (home / "steep.toml").write_text(text)
    for name, settings in (("steep", {}), ("ten-times", {"learning_rate": "0.1"})):
        small.train(home / name, home / "steep.toml", data=home / "good.npz", settings=settings, seed=len(name))
    found = run_diagnose(home, "ten-times", against=home / "steep")
    print(found.conclusion)
    assert named(found) == ["loss"] and "learning_rate is 0.1, expected 0.01" in found.conclusion, found
    assert run_diagnose(home, "steep", against=None).healthy


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "end"), [("2e-3", "healthy"), ("2e-2", "the stage loss")])
def test_a_learning_rate_times_ten_is_named_by_a_packaged_point(tmp_path, rate, end):
    """The smallest backbone with the recipe of its point, and with ten times its learning rate."""
    settings = {"objective": "sit", "learning_rate": rate}
    harness.run(
        backbone="dit-3xs-8", set=settings, seed=50, sampling_steps=(50,), precision="float32", micro_batch=128,
        out=tmp_path / "run", report=False,
    )  # fmt: skip
    found = diagnose(tmp_path / "run", Path("digits-dit-3xs-8"))
    print(found.conclusion)
    assert end in found.conclusion and found.expected is not None, found
    assert found.healthy or "learning_rate is 0.02, expected 0.002" in found.conclusion


@pytest.mark.slow
def test_ten_healthy_seeds_are_healthy(studied):
    """Against the reference point, against one other run, and by the protocol alone."""
    alarms = []
    for seed in range(10):
        small.train(studied / f"seed{seed}", studied / "small.toml", data=studied / "good.npz", seed=seed)
        for against in (studied / "point.json", studied / "healthy", None):
            found = run_diagnose(studied, f"seed{seed}", against=against)
            if not found.healthy:
                alarms.append((seed, against, found.conclusion))
    assert not alarms


@pytest.mark.slow
def test_the_decoder_of_another_autoencoder_is_named(home):
    digits = load()
    images = resized(digits.images, "average")
    for name, seed in (("vae", 0), ("other", 1)):
        print("reconstruction", small_vae(home / name, images, seed))
    text = small.PROTOCOL.format(name="latents", dataset="npz", count=small.COUNT, steps=400)
    text = text.replace("input_size = 8", 'space = "latents"\ninput_size = 4').replace(
        "in_channels = 1", "in_channels = 4"
    )
    (home / "latents.toml").write_text(text.replace("clip_denoised = true", "clip_denoised = false"))
    done(
        "data",
        "latents",
        home / "good.npz",
        "--vae",
        home / "vae",
        "--out",
        home / "cache-of-latents",
        "--device",
        "cpu",
    )
    words = ["--backbone", small.BACKBONE, "--protocol", home / "latents.toml", "--data", home / "cache-of-latents"]
    fixed = [
        "--precision",
        "float32",
        "--micro-batch",
        "32",
        "--device",
        "cpu",
        "--no-report",
        "--cache",
        home / "cache",
    ]
    done("run", *words, *fixed, "--out", home / "latents")
    found = diagnose(home / "latents", cache=home / "cache")
    assert found.healthy and of_stage(found, "decoder").status == "ok", found
    shutil.copytree(home / "latents", home / "decoded")
    shutil.rmtree(home / "decoded" / "samples")
    (home / "decoded" / "records.jsonl").unlink()
    done("run", *words, *fixed, "--out", home / "decoded", "--decoder", home / "other")
    for against in (None, home / "latents"):
        found = diagnose(home / "decoded", against, cache=home / "cache")
        print(found.conclusion)
        assert named(found) == ["decoder"] and "the stage decoder" in found.conclusion, found


@pytest.mark.slow
def test_the_features_of_the_built_in_images_are_known():
    from evaluators.suites import EMBEDDED

    rows = EMBEDDED.features.load("cpu")(built_in_images(3)).pooled.astype(np.float64)
    assert np.sqrt((rows**2).mean()) == pytest.approx(KNOWN_FEATURES[EMBEDDED.features.name], rel=1e-5)
