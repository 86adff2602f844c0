"""`harness data reference`: what is in the file, who may use it, what is not done twice, and what a kill leaves."""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny_suite
from click.testing import CliRunner
from PIL import Image

from evaluators.features import Features
from evaluators.frechet import frechet_distance
from evaluators.reference import build_reference, images_sha256
from evaluators.reference_file import read_about
from evaluators.statistics import statistics
from harness.cli import group
from harness.data.digits import load
from harness.errors import RunError, UserError
from harness.io import files

N = 700  # more than one call of the network


def harness(*words):
    return CliRunner().invoke(group, [str(word) for word in words])


def reference(source, out, *more, suite="tiny"):
    return harness("data", "reference", source, "--out", out, "--suite", suite, *more)


def facts(done):
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)


def refused(done):
    assert isinstance(done.exception, UserError), done.exception or done.output
    assert "\n" not in str(done.exception)
    return str(done.exception)


def arrays(path):
    with np.load(path, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


@pytest.fixture(scope="module", autouse=True)
def suites():
    with tiny_suite.registered():
        yield


@pytest.fixture(scope="module")
def pictures():
    images = np.random.RandomState(0).randint(0, 256, (N, 8, 8, 3)).astype(np.uint8)
    return images, np.arange(N) % 7


@pytest.fixture
def source(tmp_path, pictures):
    np.savez(tmp_path / "source.npz", arr_0=pictures[0], arr_1=pictures[1])
    return tmp_path / "source.npz"


def seen_by_network(images):
    return tiny_suite.Projection(tiny_suite.made("tiny").features, "cpu")(images)


def test_the_file_holds_what_adms_evaluator_reads_and_says_what_it_is(tmp_path, source, pictures):
    images, labels = pictures
    said = facts(reference(source, tmp_path / "r.npz", "--images", 100, "--seed", 3, "--json"))
    found = arrays(tmp_path / "r.npz")
    features = seen_by_network(images)
    for mean, covariance, rows in (("mu", "sigma", features.pooled), ("mu_s", "sigma_s", features.spatial)):
        assert found[mean].dtype == found[covariance].dtype == np.float64
        np.testing.assert_allclose(found[mean], rows.astype(np.float64).mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found[covariance], np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-10)
    assert found["arr_0"].dtype == np.uint8 and found["arr_0"].shape == (100, 8, 8, 3)
    places = {image.tobytes(): place for place, image in enumerate(images)}
    chosen = [places[image.tobytes()] for image in found["arr_0"]]
    assert len(set(chosen)) == 100 and chosen == sorted(chosen) and chosen != list(range(100))
    np.testing.assert_array_equal(found["arr_1"], labels[chosen])
    np.testing.assert_array_equal(found["label_values"], range(7))
    np.testing.assert_array_equal(found["label_counts"], np.bincount(labels))
    about = read_about(tmp_path / "r.npz")
    assert (about.images, about.kept, about.seed, about.suite, about.features) == (N, 100, 3, "tiny", "tiny")
    assert about.images_sha256 == images_sha256(images) and about.kept_sha256 == images_sha256(found["arr_0"])
    assert said["reference_sha256"] == about.sha256 not in (about.images_sha256, about.kept_sha256)
    with zipfile.ZipFile(tmp_path / "r.npz") as archive:  # read member by member, as ADM's evaluator does
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        with archive.open("arr_0.npy") as member:
            assert np.lib.format.read_magic(member) == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            assert (shape, fortran, dtype) == ((100, 8, 8, 3), False, np.uint8)
            assert member.read(192) == found["arr_0"][0].tobytes()


def test_every_kind_of_source_gives_the_same_file(tmp_path, source, pictures):
    images, labels = pictures
    images, labels = images[:60], labels[:60]
    np.savez_compressed(tmp_path / "deflated.npz", arr_0=images, arr_1=labels)
    (tmp_path / "shards").mkdir()
    for start in range(0, 60, 25):
        part = slice(start, start + 25)
        np.savez(tmp_path / "shards" / f"s-{start}.npz", arr_0=images[part], arr_1=labels[part])
    np.save(tmp_path / "array.npy", images)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for place, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(tmp_path / "one.png")
            (tmp_path / "one.cls").write_text(str(label))
            for kind in ("png", "cls"):
                tar.add(tmp_path / f"one.{kind}", f"{place:03d}.{kind}")
    (tmp_path / "folder").mkdir()
    for place, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{place}.png")
    made = {}
    for name in ("deflated.npz", "shards", "array.npy", "all.tar", "folder"):
        said = facts(reference(tmp_path / name, tmp_path / f"of-{name}.npz", "--images", 30, "--json"))
        made[name] = arrays(tmp_path / f"of-{name}.npz")
        assert said["source"] == name and said["images_sha256"] == images_sha256(images)
    for name, found in made.items():
        labelled = name in ("deflated.npz", "shards", "all.tar")
        assert ({"arr_1", "label_values", "label_counts"} <= found.keys()) == labelled
        for each in found.keys() - {"about"}:
            np.testing.assert_array_equal(found[each], made["deflated.npz"][each])


def test_another_order_keeps_the_same_images_and_the_same_statistics_to_the_bit(tmp_path, source, pictures):
    """The network of this suite sees each image alone; what a real one's batches do is tested below."""
    images, labels = pictures
    order = np.random.RandomState(1).permutation(N)
    np.savez(tmp_path / "shuffled.npz", arr_0=images[order], arr_1=labels[order])
    for name in ("source", "shuffled"):
        facts(reference(tmp_path / f"{name}.npz", tmp_path / f"r-{name}.npz", "--images", 50, "--json"))
    one, other = arrays(tmp_path / "r-source.npz"), arrays(tmp_path / "r-shuffled.npz")
    for name in ("mu", "sigma", "mu_s", "sigma_s", "label_counts"):
        assert one[name].tobytes() == other[name].tobytes()
    kept = [{image.tobytes() for image in each["arr_0"]} for each in (one, other)]
    assert kept[0] == kept[1]
    facts(reference(source, tmp_path / "r-seed.npz", "--images", 50, "--seed", 1, "--json"))
    assert {image.tobytes() for image in arrays(tmp_path / "r-seed.npz")["arr_0"]} != kept[0]


def test_a_real_network_sees_the_same_in_another_order_within_rounding(tmp_path):
    images = load().images[:130]
    for name, order in (("a", np.arange(130)), ("b", np.random.RandomState(1).permutation(130))):
        np.savez(tmp_path / f"{name}.npz", arr_0=images[order])
        facts(reference(tmp_path / f"{name}.npz", tmp_path / f"r-{name}.npz", "--json", suite="embedded"))
    one, other = arrays(tmp_path / "r-a.npz"), arrays(tmp_path / "r-b.npz")
    for name in ("mu", "sigma"):
        scale = np.abs(one[name]).max()
        assert np.abs(one[name] - other[name]).max() < 1e-5 * scale
        print(name, np.abs(one[name] - other[name]).max() / scale)


def test_the_second_command_asks_the_network_nothing(tmp_path, source, monkeypatch):
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    seen = lambda: tiny_suite.Projection.seen  # noqa: E731
    before = seen()
    first = facts(reference(source, tmp_path / "r.npz", "--json"))
    assert first["written"] and seen() == before + N
    content = (tmp_path / "r.npz").read_bytes()
    again = facts(reference(source, tmp_path / "r.npz", "--json"))
    assert not again["written"] and {**again, "written": True} == first
    (tmp_path / "r.npz").unlink()
    assert facts(reference(source, tmp_path / "r.npz", "--json")) == first  # from the cache
    assert (tmp_path / "r.npz").read_bytes() == content
    facts(reference(source, tmp_path / "fewer.npz", "--images", 30, "--json"))  # the same statistics
    assert seen() == before + N
    (cached,) = (tmp_path / "cache" / "features").iterdir()
    cached.write_bytes(cached.read_bytes()[:-40])  # damaged: made again, not believed
    facts(reference(source, tmp_path / "more.npz", "--images", 31, "--json"))
    assert seen() == before + 2 * N


def test_features_that_evaluation_has_kept_are_used(tmp_path, source, pictures):
    extractor = tiny_suite.Projection(tiny_suite.made("tiny").features, "cpu")
    build_reference(pictures[0], extractor, cache=tmp_path / "cache" / "features")
    before = tiny_suite.Projection.seen
    facts(reference(source, tmp_path / "r.npz", "--json", "--cache", tmp_path / "cache"))
    assert tiny_suite.Projection.seen == before


TASK = """
name = "pictures"
dataset = "npz"
resolution = 8
num_classes = 7
input_size = 8
in_channels = 3
samples = 100
suite = "tiny"
"""


@pytest.fixture
def judged(tmp_path, pictures):
    """A call of `harness evaluate` for samples that are not the reference's."""
    samples = np.random.RandomState(5).randint(40, 240, (120, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=samples, arr_1=np.arange(120) % 7)
    (tmp_path / "task.toml").write_text(TASK)
    count = iter(range(100))

    def call(*more):
        out = tmp_path / f"records-{next(count)}.jsonl"
        done = harness(
            "evaluate", tmp_path / "samples.npz", "--protocol", tmp_path / "task.toml", "--json", "--out", out, *more
        )
        if done.exit_code:
            return done
        return {each["metric"]: each for each in json.loads(done.stdout)["records"]}

    call.samples = samples
    return call


def test_evaluation_takes_the_stored_statistics_and_names_the_reference(tmp_path, source, pictures, judged):
    said = facts(reference(source, tmp_path / "r.npz", "--images", 100, "--json"))
    records = judged("--reference", tmp_path / "r.npz")
    own, whole = statistics(seen_by_network(judged.samples).pooled), statistics(seen_by_network(pictures[0]).pooled)
    assert records["fd"]["value"] == pytest.approx(frechet_distance(own, whole), rel=1e-9)  # not of the 100 kept
    assert records["fd"]["evaluation"]["reference_sha256"] == said["reference_sha256"]
    kept = arrays(tmp_path / "r.npz")["arr_0"]
    np.savez(tmp_path / "kept.npz", arr_0=kept, arr_1=arrays(tmp_path / "r.npz")["arr_1"])
    bare = judged("--reference", tmp_path / "kept.npz")
    assert bare["precision"]["value"] == records["precision"]["value"]  # of the 100 kept
    assert bare["fd"]["value"] != records["fd"]["value"]


def test_a_reference_of_all_images_is_the_images(tmp_path, source, judged):
    facts(reference(source, tmp_path / "r.npz", "--json"))
    stored, bare = judged("--reference", tmp_path / "r.npz"), judged("--reference", source)
    for metric in ("fd", "precision"):
        assert stored[metric]["value"] == bare[metric]["value"]
        assert stored[metric]["evaluation"] == bare[metric]["evaluation"]


def test_statistics_of_another_network_are_refused_before_anything_is_seen(tmp_path, source, judged):
    facts(reference(source, tmp_path / "r.npz", "--json", suite="tiny-other"))
    before = tiny_suite.Projection.seen
    message = refused(judged("--reference", tmp_path / "r.npz"))
    assert "holds statistics of tiny-other" in message and "harness data reference --suite" in message
    assert tiny_suite.Projection.seen == before


def edited(path, out, **changed):
    np.savez(out, **{**arrays(path), **changed})
    return out


def test_an_edited_file_is_refused(tmp_path, source, pictures, judged):
    facts(reference(source, tmp_path / "r.npz", "--images", 100, "--json"))
    moved = edited(tmp_path / "r.npz", tmp_path / "moved.npz", mu=np.zeros(6))
    assert "mu and sigma do not match the hash" in refused(judged("--reference", moved))
    other = edited(tmp_path / "r.npz", tmp_path / "other.npz", arr_0=pictures[0][:100])
    assert "its images do not match the hash" in refused(judged("--reference", other))
    for text in ("no JSON", "{}", '{"reference": {"format": 2}}', '{"reference": {"format": 1}}'):
        broken = edited(tmp_path / "r.npz", tmp_path / "broken.npz", about=np.array(text))
        assert "its metadata (array about) cannot be read" in refused(judged("--reference", broken))
    damaged = bytearray((tmp_path / "r.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "r.npz") as archive:
        place = archive.getinfo("sigma.npy").header_offset
    damaged[place + 300] ^= 1
    (tmp_path / "damaged.npz").write_bytes(damaged)
    assert "cannot be read" in refused(judged("--reference", tmp_path / "damaged.npz"))


def test_verify_says_what_a_file_is(tmp_path, source, pictures):
    facts(reference(source, tmp_path / "r.npz", "--images", 100, "--json"))
    verdict = facts(harness("data", "verify", tmp_path / "r.npz", "--json"))
    assert verdict["holds"] and "700 images 8x8x3, 100 kept, statistics of tiny" in verdict["text"]
    for name, changed in (
        ("mu", {"mu": np.zeros(6)}), ("images", {"arr_0": pictures[0][:100]}), ("labels", {"label_counts": np.ones(7)})
    ):  # fmt: skip
        assert name in refused(harness("data", "verify", edited(tmp_path / "r.npz", tmp_path / "e.npz", **changed)))
    found = arrays(tmp_path / "r.npz")
    del found["about"]
    np.savez(tmp_path / "batch.npz", **found)
    verdict = facts(harness("data", "verify", tmp_path / "batch.npz", "--json"))
    assert verdict["holds"] is None and "unverified: no published hash" in verdict["text"]
    assert "no statistics: it is no reference" in refused(harness("data", "verify", source))
    (tmp_path / "VIRTUAL_lsun_bedroom256.npz").write_bytes((tmp_path / "batch.npz").read_bytes())
    assert "fetch it again" in refused(harness("data", "verify", tmp_path / "VIRTUAL_lsun_bedroom256.npz"))
    damaged = bytearray((tmp_path / "batch.npz").read_bytes())
    damaged[1000] ^= 1
    (tmp_path / "batch.npz").write_bytes(damaged)
    assert "checksum" in refused(harness("data", "verify", tmp_path / "batch.npz"))
    (tmp_path / "graph.pb").write_bytes(b"<html>")
    assert "a web page" in refused(harness("data", "verify", tmp_path / "graph.pb"))
    assert "no such file" in refused(harness("data", "verify", tmp_path / "nothing.npz"))


@pytest.mark.parametrize(
    ("source_name", "more", "message"),
    [
        ("digit", (), "did you mean digits"),
        ("npz", (), "name its path with --data"),
        ("source.npz", ("--data", "."), "leave it out"),
        ("source.npz", ("--images", 701), "more than the 700 images"),
        ("source.npz", ("--images", 5), "too small"),
        ("few.npz", (), "too small"),
        ("source.npz", ("--suite", "tinny"), "did you mean tiny"),
        ("source.npz", ("--suite", "adm"), "give --inception FILE"),
        ("source.npz", ("--inception", "x.pb"), "leave out x.pb"),
        ("source.npz", ("--backend", "tensorflow"), "is for suites on"),
        ("source.npz", ("--out", "r.npy"), "give it that ending"),
        ("source.npz", ("--out", "source.npz"), "no reference of `harness data reference`"),
        ("source.npz", ("--out", "there.npz"), "is another reference"),
        ("text.npz", (), "cannot be read"),
        ("empty", (), "no images in it"),
        ("statistics.npz", (), "holds statistics (mu, sigma) and no images"),
    ],
)
def test_bad_input_is_one_line(source_name, more, message, tmp_path, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    np.savez("source.npz", arr_0=pictures[0])
    np.savez("few.npz", arr_0=pictures[0][:19])
    np.savez("statistics.npz", mu=np.zeros(6), sigma=np.eye(6))
    Path("text.npz").write_text("not a zip")
    Path("empty").mkdir()
    facts(reference("source.npz", "there.npz", "--images", 30, "--json"))
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    assert message in refused(harness("data", "reference", source_name, "--out", "r.npz", "--suite", "tiny", *more))
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


def test_features_that_are_not_finite_end_it(tmp_path, source, monkeypatch):
    def broken(self, images):
        pooled = np.zeros((len(images), 6), np.float32)
        pooled[-1] = np.nan
        return Features(pooled=pooled)

    monkeypatch.setattr(tiny_suite.Projection, "__call__", broken)
    done = reference(source, tmp_path / "r.npz")
    assert isinstance(done.exception, RunError) and "of image 511 are not finite" in str(done.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.npz"]


def test_two_at_once_do_not_get_in_each_others_way(tmp_path, source):
    from harness.io import files

    with files.claimed(tmp_path / "r.npz"):
        assert "another process is making" in refused(reference(source, tmp_path / "r.npz"))
    facts(reference(source, tmp_path / "r.npz", "--json"))


CHILD = """
import sys
sys.path.insert(0, {tests!r})
import tiny_suite
from evaluators import streamed_statistics
streamed_statistics.IMAGES_PER_CALL = 20
streamed_statistics.MIN_SAVE_INTERVAL_SECONDS, streamed_statistics.MAX_SAVE_SHARE = 0.0, 1e9
from harness.cli import main
sys.argv = ["harness", "data", "reference", "source.npz", "--out", "r.npz", "--suite", "tiny", "--images", "200"]
with tiny_suite.registered():
    main()
"""


def child(folder):
    code = CHILD.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "TINY_SUITE_LOG": str(folder / "log"), "HARNESS_CACHE": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_killed_in_the_middle_it_leaves_no_half_file_and_continues(tmp_path, pictures):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        np.savez(folder / "source.npz", arr_0=pictures[0])
    process = child(whole)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    dice, kills = random.Random(0), 0
    seen = lambda: len((killed / "log").read_text().splitlines()) if (killed / "log").exists() else 0  # noqa: E731
    for _ in range(3):
        before, process = seen(), child(killed)
        target = before + dice.randint(2, 9)
        while process.poll() is None and seen() < target:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        assert not (killed / "r.npz").exists()
    assert kills == 3
    process = child(killed)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert (killed / "r.npz").read_bytes() == (whole / "r.npz").read_bytes()
    assert sorted(path.name for path in killed.iterdir()) == ["cache", "log", "r.npz", "source.npz"]
    assert [path.suffix for path in (killed / "cache" / "features").iterdir()] == [".npz"]
    calls = -(-N // 20)
    assert calls <= seen() <= calls + kills  # at most the call that was under way is repeated


def test_a_refused_process_leaves_the_claim_of_another_alone(tmp_path):
    """The claimed file may be empty for minutes: as long, a second and a third process are refused."""
    target = tmp_path / "r.npz"
    with files.claimed(target) as partial:
        for _ in range(2):
            with pytest.raises(UserError, match="another process is making"), files.claimed(target):
                pass
        assert partial.exists()
    assert not partial.exists()


def test_a_claim_is_of_the_file_under_the_name(tmp_path, monkeypatch):
    """Where the last holder removes its file between the opening and the locking here, the claim begins again."""
    target, lock, taken = tmp_path / "r.npz", files.lock, []

    def removed_before(descriptor):
        if not taken:
            (tmp_path / "r.npz.partial").unlink()
        taken.append(descriptor)
        return lock(descriptor)

    monkeypatch.setattr(files, "lock", removed_before)
    with files.claimed(target) as partial:
        assert len(taken) == 2 and partial.exists() and files.is_locked(partial)


# Without a protocol ---------------------------------------------------------------------------------------------------


@pytest.fixture
def compared(tmp_path):
    """A call of `harness evaluate` with suite tiny and a reference, and without a protocol; returns its result."""
    count = iter(range(100))

    def call(samples, given, *more):
        out = tmp_path / f"compared-{next(count)}.jsonl"
        return harness(
            "evaluate", samples, "--reference", given, "--suite", "tiny", "--json", "--out", out, *more
        )  # fmt: skip

    return call


def by_metric(done):
    return {each["metric"]: each for each in facts(done)["records"]}


def test_without_a_protocol_sizes_and_classes_are_those_of_the_files(tmp_path, source, judged, compared):
    with_protocol = judged("--reference", source)
    records = by_metric(compared(tmp_path / "samples.npz", source))
    for metric in ("fd", "precision"):
        ours, theirs = records[metric], with_protocol[metric]
        assert ours["value"] == theirs["value"] and ours["evaluation"] == theirs["evaluation"]
        assert (ours["protocol"], ours["dataset"], ours["resolution"], ours["n"]) == ("none", "source", 8, 120)
        assert "protocol_version" not in ours and (theirs["protocol"], theirs["protocol_version"]) == ("pictures", "1")
    sidecar = {"images": 120, "shape": [8, 8, 3], "sha256": "0", "identity": {"protocol": "no such"}}
    (tmp_path / "samples.json").write_text(json.dumps(sidecar))
    assert "no such" in refused(compared(tmp_path / "samples.npz", source))  # a sidecar names one


@pytest.mark.parametrize(
    ("side", "labels"),
    [
        ((8, 8), np.arange(120) * 8 + 40),  # of 1,000 classes
        ((16, 12), None),
        ((8, 8), np.full(120, -1)),
        ((8, 8), np.linspace(0, 1, 120)),
        ((8, 8), np.zeros((120, 10), np.int64)),
    ],
)
def test_other_sizes_and_labels_as_adms_evaluator_takes_them(side, labels, tmp_path, compared):
    images = np.random.RandomState(6).randint(40, 240, (260, *side, 3)).astype(np.uint8)
    given = {} if labels is None else {"arr_1": labels}
    np.savez(tmp_path / "s.npz", arr_0=images[:120], **given)
    np.savez(tmp_path / "r.npz", arr_0=images[120:], arr_1=np.ones((140, 3), np.float32))
    record = by_metric(compared(tmp_path / "s.npz", tmp_path / "r.npz"))["fd"]
    own, other = (statistics(seen_by_network(part).pooled) for part in (images[:120], images[120:]))
    assert record["value"] == pytest.approx(frechet_distance(own, other), rel=1e-9)
    assert (record["protocol"], record["dataset"], record["resolution"]) == ("none", "r", side[0])


def test_a_reference_in_a_folder_has_the_whole_name_of_the_folder(tmp_path, compared):
    images = np.random.RandomState(6).randint(40, 240, (260, 8, 8, 3)).astype(np.uint8)
    (tmp_path / "cfg-1.5").mkdir()
    np.savez(tmp_path / "s.npz", arr_0=images[:120])
    np.savez(tmp_path / "cfg-1.5" / "0.npz", arr_0=images[120:])
    assert by_metric(compared(tmp_path / "s.npz", tmp_path / "cfg-1.5"))["fd"]["dataset"] == "cfg-1.5"


def test_from_python_without_a_protocol_and_the_command_that_repeats_it(tmp_path, source, judged, compared):
    from harness import evaluate
    from reports.commands import reproduction

    result = evaluate(samples=tmp_path / "samples.npz", reference=source, suite="tiny")
    by_command = by_metric(compared(tmp_path / "samples.npz", source))
    assert {each.metric: each.id for each in result.records} == {key: each["id"] for key, each in by_command.items()}
    (command,) = reproduction(result.records[0]).commands
    assert "--reference REFERENCE_FILE" in command and "--protocol" not in command


def test_a_reference_of_another_size_is_refused(tmp_path, source, compared):
    np.savez(tmp_path / "s.npz", arr_0=np.random.RandomState(6).randint(0, 256, (120, 16, 16, 3)).astype(np.uint8))
    assert "use a reference of the samples' resolution" in refused(compared(tmp_path / "s.npz", source))


# Statistics alone -----------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path, pictures):
    """A file of mu and sigma without images, of all pictures."""
    own = statistics(seen_by_network(pictures[0]).pooled)
    np.savez(tmp_path / "stats.npz", mu=own.mean, sigma=own.covariance)
    return tmp_path / "stats.npz"


@pytest.mark.parametrize("protocol", [False, True])
def test_statistics_alone_give_what_they_can_and_the_rest_is_named(
    protocol, tmp_path, source, judged, compared, alone, caplog
):
    whole = judged("--reference", source)
    records = judged("--reference", alone) if protocol else by_metric(compared(tmp_path / "samples.npz", alone))
    assert list(records) == ["fd"]
    assert records["fd"]["value"] == pytest.approx(whole["fd"]["value"], rel=1e-9)
    assert records["fd"]["low"] < records["fd"]["value"] < records["fd"]["high"]
    reference_hash = records["fd"]["evaluation"]["reference_sha256"]
    assert len(reference_hash) == 64 and reference_hash != whole["fd"]["evaluation"]["reference_sha256"]
    assert "stats.npz holds statistics and no images; left out: precision" in caplog.text


def test_statistics_alone_where_they_cannot_be_used(tmp_path, judged, compared, alone):
    samples = tmp_path / "samples.npz"
    for suite, message in (
        ("efficientnet-lite0-96:fd", "does not say of which network"),
        ("torch-fidelity", "--inception"),
    ):
        assert message in refused(compared(samples, alone, "--suite", suite)), suite
    with pytest.raises(UserError, match="all metrics of suite tiny need images"):
        tiny_suite.made("tiny", ("precision", "kid")).without_reference_images(spatial=True)
    said = refused(compared(samples, alone, "--neighbours", tmp_path / "n.png"))
    assert "--neighbours shows training images" in said and "name them with --data" in said
    broken = tmp_path / "broken.npz"
    for arrays_, message in (
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "which has 6 features"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "is not finite"),
    ):
        np.savez(broken, **arrays_)
        assert message in refused(compared(samples, broken))
    assert "it can only be a reference" in refused(compared(alone, alone))
