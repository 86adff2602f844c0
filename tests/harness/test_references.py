"""`harness data reference`: what is in the file, what is not done twice, and what a kill leaves."""

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
from PIL import Image
from reference_calls import N, arrays, edited, facts, harness, made_pictures, reference, refused, seen_by_network

from evaluators.features import Features
from evaluators.reference import build_reference, images_sha256
from evaluators.reference_file import read_about
from harness.data.digits import load
from harness.errors import RunError, UserError
from harness.io import files


@pytest.fixture(scope="module", autouse=True)
def suites():
    with tiny_suite.registered():
        yield


@pytest.fixture(scope="module")
def pictures():
    return made_pictures()


@pytest.fixture
def source(tmp_path, pictures):
    np.savez(tmp_path / "source.npz", arr_0=pictures[0], arr_1=pictures[1])
    return tmp_path / "source.npz"


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
