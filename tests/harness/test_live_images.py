"""Images straight from a program, and of any size: the same numbers as from a file, and one batch at a time."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny_suite
from PIL import Image

from evaluators import suites
from harness.data.digits import load
from harness.errors import UserError
from harness.images import spool
from harness.images.open import open_images
from harness.images.spool import IN_MEMORY_BYTES, spooled
from harness.pipeline.evaluation_config import EvaluationConfig
from harness.pipeline.measure import evaluate_images, evaluate_samples_file
from harness.protocols import get_protocol
from harness.runs.samples import write_samples


def generated(images, step):
    """Batches in one buffer that is used again, as a careful sampler does."""
    buffer = np.empty((step, *images.shape[1:]), np.uint8)
    for start in range(0, len(images), step):
        part = images[start : start + step]
        buffer[: len(part)] = part
        yield buffer[: len(part)]


@pytest.fixture(scope="module")
def samples():
    return load().images[:200] // 2 * 2  # not the reference's own


@pytest.fixture(scope="module")
def from_file(tmp_path_factory, samples):
    folder = tmp_path_factory.mktemp("file")
    np.savez(folder / "samples.npz", arr_0=samples)
    judge = EvaluationConfig(suite=tiny_suite.made("tiny"))
    return evaluate_samples_file(
        folder / "samples.npz", get_protocol("digits"), load(), cache=folder, config=judge, name="mine"
    )


def numbers(records):
    return {each.metric: (each.value, each.low, each.high, each.n, each.system, each.evaluation) for each in records}


@pytest.mark.parametrize("step", [1, 7, 200])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_generator_gives_what_the_file_gives(samples, from_file, step, on_disk, monkeypatch, tmp_path):
    if on_disk:
        monkeypatch.setattr(spool, "IN_MEMORY_BYTES", 1000)
    judge = EvaluationConfig(suite=tiny_suite.made("tiny"))
    records = evaluate_images(generated(samples, step), "digits", name="mine", config=judge, cache=tmp_path)
    assert numbers(records) == numbers(from_file)
    assert all(path.name.startswith("features-") for path in tmp_path.iterdir())


def test_with_the_protocols_own_suite_and_an_endless_generator(samples, caplog):
    def endless():
        while True:
            yield samples[:60]
            yield samples[60:]

    judge = EvaluationConfig(suite=tiny_suite.made("tiny"))
    records = evaluate_images(endless(), "digits", name="mine", count=200, labels=np.arange(200) % 10, config=judge)
    assert {each.n for each in records} == {200} and "labels-missing" not in caplog.text
    assert len({each.sampling.samples_sha256 for each in records}) == 1


def test_intervals_know_balanced_labels_and_copies(samples, monkeypatch):
    """Error bars follow how the samples were drawn; values do not change."""
    judge, seen, original = EvaluationConfig(suite=tiny_suite.made("tiny")), [], suites.evaluate_samples

    def spy(*args, **options):
        seen.append(options)
        return original(*args, **options)

    monkeypatch.setattr(suites, "evaluate_samples", spy)
    labels = np.arange(200) % 10
    plain = evaluate_images([samples], "digits", name="mine", config=judge)
    balanced = evaluate_images([samples], "digits", name="mine", config=judge, labels=labels)
    twice = evaluate_images([samples[:100].repeat(2, axis=0)], "digits", name="mine", config=judge)
    assert [each.value for each in plain] == [each.value for each in balanced]
    assert [(each.low, each.high) for each in plain] != [(each.low, each.high) for each in balanced]
    assert seen[0]["labels"] is None and seen[0]["copies"] is None and twice
    np.testing.assert_array_equal(seen[1]["labels"], labels)
    assert len(np.unique(seen[2]["copies"])) == 100


@pytest.mark.parametrize(("policy", "stratified"), [("balanced", True), (None, True), ("random", False)])
def test_random_labels_are_not_taken_for_balanced_ones(samples, monkeypatch, tmp_path, policy, stratified):
    """Labels that were drawn at random may be balanced by chance; blocks with as many of each would be too narrow."""
    seen, original = [], suites.evaluate_samples
    monkeypatch.setattr(
        suites, "evaluate_samples", lambda *given, **options: seen.append(options) or original(*given, **options)
    )
    labels = np.arange(200) % 10
    sampling = {} if policy is None else {"label_policy": policy}
    sidecar = {"schema": 2, "record": {"system": "mine", "sampling": sampling}}
    write_samples(tmp_path / "s.npz", [samples], labels, sidecar)
    judge = EvaluationConfig(suite=tiny_suite.made("tiny"))
    evaluate_samples_file(tmp_path / "s.npz", get_protocol("digits"), load(), cache=tmp_path, config=judge)
    assert (seen[0]["labels"] is not None) == stratified


@pytest.mark.parametrize(
    ("images", "more", "message"),
    [
        ([np.zeros((120, 8, 8, 1), np.float32)], {}, "a batch is float32"),
        ([np.zeros((120, 16, 16, 1), np.uint8)], {}, "protocol 'digits' has (8, 8, 1)"),
        (iter([np.zeros((20, 8, 8, 1), np.uint8)]), {}, "too few"),
        ([np.zeros((20, 8, 8, 1), np.uint8)], {"count": 20}, "too few"),
        ([np.zeros((120, 8, 8, 1), np.uint8)], {}, "(duplicates;"),
        ([], {}, "there are no images"),
        (iter([np.zeros((50, 8, 8, 1), np.uint8)]), {"count": 120}, "50 images came, 120 were expected"),
        ([load().images[:120] // 2], {"labels": np.arange(120)}, "label 10 of image 10"),
        ([load().images[:120] // 2], {"name": None}, "name = None is no str"),
        ([load().images[:120] // 2], {"config": np.zeros(2)}, "is no EvaluationConfig"),
    ],
)
def test_what_makes_no_sense_is_refused(images, more, message):
    judge = EvaluationConfig(suite=tiny_suite.made("tiny"))
    with pytest.raises(UserError) as caught:
        evaluate_images(images, "digits", **{"name": "mine", "config": judge, **more})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["png", "deflated.npz", "stored.npz"])
def test_images_that_are_held_are_the_images(kind, samples, tmp_path, monkeypatch):
    path = tmp_path / kind
    if kind == "png":
        path.mkdir()
        for place, image in enumerate(samples):
            Image.fromarray(image[..., 0]).save(path / f"{place}.png")
    else:
        (np.savez if kind == "stored.npz" else np.savez_compressed)(path, arr_0=samples, arr_1=np.arange(200))
    monkeypatch.setattr(spool, "IN_MEMORY_BYTES", 5000)
    source = open_images(path)
    with spooled(source, tmp_path / "room") as kept:
        np.testing.assert_array_equal(kept.array(), samples)
        np.testing.assert_array_equal(np.concatenate(list(kept.batches(64))), samples)
        assert kept.sha256() == open_images(path).sha256() and kept.count == 200
        assert (kept.labels is None) == (kind == "png")
    assert not (tmp_path / "room").exists() or list((tmp_path / "room").iterdir()) == []


CHILD = """
import json, sys, threading, time
sys.path.insert(0, {tests!r})
import numpy as np, tiny_suite
from pathlib import Path
from harness.images import spool
from harness.data.images import ImageSet
from harness.pipeline.measure import evaluate_images, evaluate_samples_file
from harness.pipeline.evaluation_config import EvaluationConfig
from harness.protocols import load
from test_live_images import made_images

folder, kind, count, side, limit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
spool.IN_MEMORY_BYTES = limit


def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


reference = next(iter(made_images(200, side, step=200, first=10**7)))
data = ImageSet(name="npz", images=reference, labels=np.zeros(200, np.int64))
judge = EvaluationConfig(suite=tiny_suite.made("tiny", metrics=("fd",)))
protocol = load(folder / "task.toml")
run = lambda what, **more: (
    evaluate_images(what, protocol, data, name="x", config=judge, cache=folder / "cache") if kind == "generator"
    else evaluate_samples_file(what, protocol, data, config=judge, cache=folder / "cache", name="x")
)
run(made_images(200, side, step=50) if kind == "generator" else folder / ("small-" + kind))  # everything is loaded
before, peak, done = anonymous(), [0], threading.Event()


def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)


thread = threading.Thread(target=watch)
thread.start()
(record,) = run(made_images(count, side, step=50) if kind == "generator" else folder / kind)
done.set()
thread.join()
print(json.dumps(dict(growth=peak[0] - before, fd=record.value, n=record.n)))
"""


def made_images(count, side, step=50, first=0):
    """uint8 (step, side, side, 3) batches of distinct images: a pattern, moved, with its number in the corner."""
    pattern = np.random.RandomState(0).randint(0, 256, (side, side, 3)).astype(np.uint8)
    for start in range(first, first + count, step):
        numbers = np.arange(start, min(start + step, first + count))
        batch = np.stack([np.roll(pattern, int(n) % side, axis=1) for n in numbers])
        batch[:, 0, :3, 0] = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536 % 256], axis=1)
        yield batch


def write(path, count, side):
    shape = (count, side, side, 3)
    packing = zipfile.ZIP_DEFLATED if "deflated" in path.name else zipfile.ZIP_STORED
    with (
        zipfile.ZipFile(path, "w", packing, compresslevel=1) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as out,
    ):
        np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for batch in made_images(count, side):
            out.write(batch.data)


def growth_of(folder, kind, count, side, limit):
    (folder / "task.toml").write_text(
        f'name = "big"\ndataset = "npz"\nresolution = {side}\nnum_classes = 1\ninput_size = {side}\nin_channels = 3\n'
        'samples = 100\nsuite = "embedded"\n'
    )
    if kind != "generator":
        write(folder / kind, count, side)
        write(folder / f"small-{kind}", 200, side)
    code = CHILD.format(tests=str(Path(__file__).parent))
    words = [sys.executable, "-c", code, str(folder), kind, str(count), str(side), str(limit)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["n"] == count
    print(kind, said)
    return said


KINDS = ["stored.npz", "deflated.npz", "generator"]


def test_samples_are_streamed(tmp_path):
    """100 MB of images never lie in memory: it grows by a few batches, and the numbers are the same for each kind."""
    found = {kind: growth_of(tmp_path, kind, 8_000, 64, 1 << 24) for kind in KINDS}
    for kind, said in found.items():
        assert said["growth"] < 50e6, kind
        assert said["fd"] == found["stored.npz"]["fd"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gigabytes_are_streamed(kind, tmp_path):
    """3.9 GB of images, with the limits as they are."""
    assert growth_of(tmp_path, kind, 20_000, 256, IN_MEMORY_BYTES)["growth"] < 900e6
