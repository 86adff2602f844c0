"""Where commands write: nothing of the harness lies among the user's images, a cache only saves time, notes are read, what
was measured is printed though it cannot be kept, and what cannot be written is refused before it is measured."""

import errno
import json
import os

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from evaluators import reference as reference_module
from evaluators import streamed_statistics
from harness.cli import group
from harness.data.cache_dir import cache_folder
from harness.data.digits import load
from harness.errors import UserError
from harness.images import spool
from harness.images.source import from_batches
from harness.io import files
from harness.pipeline import evaluate as evaluate_module
from harness.runs.samples import write_samples


def harness(*arguments):
    return CliRunner().invoke(group, [*map(str, arguments)])


def evaluate(*arguments):
    return harness("evaluate", *arguments, "--suite", "embedded-modern")


@pytest.fixture(scope="module")
def digits():
    return load()


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cached(module_cache, monkeypatch):
    """For tests that are not about the cache: the features of the digits take most of the time."""
    monkeypatch.setenv("HARNESS_CACHE", str(module_cache))


@pytest.fixture
def classes(tmp_path, digits, monkeypatch):
    """Samples in class folders, as out/0, out/1; the working folder is beside them."""
    for i in range(120):
        folder = tmp_path / "out" / str(digits.labels[i] % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[i][..., 0] // 2 * 2).save(folder / f"{i:04d}.png")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "out"


@pytest.fixture
def packed(tmp_path, digits):
    write_samples(tmp_path / "s.npz", [digits.images[:120] // 2 * 2], digits.labels[:120], {})
    (tmp_path / "s.json").unlink()
    return tmp_path / "s.npz"


def tree(folder):
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*"))


def test_nothing_of_ours_lies_among_the_users_images(tmp_path, classes):
    before = tree(classes)
    done = evaluate(classes / "0", "--json", "--allow", "duplicates", "--allow", "too-few")
    if done.exit_code:  # 60 images are too few for the suite; the whole folder has enough
        done = evaluate(classes, "--json")
    assert done.exit_code == 0, done.exception
    assert tree(classes) == before and tree(tmp_path / "work") == ["records.jsonl"]
    assert [each.name[:9] for each in (cache_folder() / "features").iterdir()] == ["features-"]
    evaluate(classes, "--json", "--cache", tmp_path / "mine", "--name", "again")
    assert tree(tmp_path / "mine")[0] == "features"


def test_the_cache_has_one_place_which_the_user_moves(tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder(tmp_path / "c") == tmp_path / "c" and cache_folder() == tmp_path / "a"
    monkeypatch.delenv("HARNESS_CACHE")
    assert cache_folder() == tmp_path / "b" / "backbone-harness"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == cache_folder().home() / ".cache" / "backbone-harness"


def read_only(monkeypatch):
    """Writing a cache fails as in a read-only folder; the tests may run as root, whom modes do not stop."""

    def fail(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(reference_module, "_write_cache", fail)
    monkeypatch.setattr(streamed_statistics, "_write", fail)


def test_a_cache_that_cannot_be_written_is_a_warning(packed, tmp_path, monkeypatch):
    read_only(monkeypatch)
    done = evaluate(packed, "--json")
    assert done.exit_code == 0 and len(json.loads(done.stdout)["records"]) == 3
    assert "warning: " in done.stderr and "cannot be written (Read-only file system)" in done.stderr


def test_a_cache_below_a_file_is_a_warning_too(packed, tmp_path):
    (tmp_path / "file").write_text("x")
    done = evaluate(packed, "--json", "--cache", tmp_path / "file")
    assert done.exit_code == 0 and "warning: " in done.stderr
    with monkey_spool(0), spool.spooled(from_batches([np.zeros((3, 4, 4, 3), np.uint8)]), tmp_path / "file") as kept:
        assert len(kept.array()) == 3


class monkey_spool:
    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before, spool.IN_MEMORY_BYTES = spool.IN_MEMORY_BYTES, self.size

    def __exit__(self, *_):
        spool.IN_MEMORY_BYTES = self.before


def test_notes_go_to_stderr_and_into_json(classes, tmp_path, digits, cached):
    (classes / "0" / "readme.txt").write_text("x")
    (classes / "1" / "b.heic").write_text("x")
    (classes / "lost+found").mkdir()
    for name in ("0", "1"):
        image = next((classes / name).glob("*.png"))
        Image.open(image).convert("LA" if name == "0" else "P").convert("LA" if name == "0" else "L").save(image)
    done = evaluate(classes, "--json")
    notes = json.loads(done.stdout)["notes"]
    for text in (
        "2 files that are no images",
        "lost+found",
        "format that is not read",
        "opaque alpha channel was dropped",
    ):
        assert sum(text in each for each in notes) == 1, text
        assert done.stderr.count(text) == 1, text
    assert all(each.startswith(f"{classes}: ") for each in notes)
    # a second evaluation, which finds its records, says the same
    assert "lost+found" in str(json.loads(evaluate(classes, "--json").stdout)["notes"])
    np.savez(tmp_path / "ref.npz", arr_0=digits.images)
    done = harness("data", "reference", classes, "--out", tmp_path / "r.npz", "--suite", "embedded", "--json")
    notes = json.loads(done.stdout)["notes"]
    assert sum("opaque alpha" in each for each in notes) == 1 and done.stderr.count("opaque alpha") == 1
    (classes / "2").mkdir()
    shutil_free = [classes / "2" / "a.png"]
    Image.new("RGB", (9, 9)).save(shutil_free[0])
    words = ("data", "prepare", "mine", "--from", classes, "--out", tmp_path / "p", "--resolution", 8, "--json")
    for _ in range(2):  # made, and found again
        done = harness(*words)
        assert any("lost+found" in each for each in json.loads(done.stdout)["notes"])
        assert done.stderr.count("lost+found") == 1


def test_joined_sample_sets_are_named(tmp_path, digits, cached):
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("a", "b"):
        np.savez(folder / f"{name}.npz", digits.images[:60] // 2 * 2, digits.labels[:60])
    done = evaluate(folder, "--json", "--out", tmp_path / "r.jsonl", "--allow", "duplicates")
    assert "2 shards were joined: a.npz, b.npz" in done.stderr


BAD_OUTPUTS = {
    "a folder": lambda folder: ("--out", folder),
    "a device": lambda folder: ("--out", "/dev/full"),
    "below a file": lambda folder: ("--out", folder / "s.npz" / "r.jsonl"),
    "a picture that is a folder": lambda folder: ("--neighbours", folder),
    "a picture of another kind": lambda folder: ("--neighbours", folder / "n.bmp"),
    "a picture without an ending": lambda folder: ("--neighbours", folder / "n"),
    "a picture below a file": lambda folder: ("--neighbours", folder / "s.npz" / "n.png"),
}


@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_what_cannot_be_written_is_refused_before_anything_is_measured(packed, tmp_path, monkeypatch, case):
    monkeypatch.setattr(evaluate_module, "evaluate_and_record", lambda *_, **__: pytest.fail("it was measured"))
    done = evaluate(packed, *BAD_OUTPUTS[case](tmp_path))
    assert isinstance(done.exception, UserError), done.exception
    assert "\n" not in str(done.exception)


def test_a_name_that_is_too_long_is_no_path(packed, tmp_path):
    done = evaluate(packed, "--out", tmp_path / ("n" * 300))
    assert done.exit_code == 2 and "is no path: File name too long" in " ".join(done.output.split())


def test_a_reference_that_cannot_be_written_is_refused_before_the_images_are_read(packed, tmp_path):
    (tmp_path / "r.npz").mkdir()
    for out in (tmp_path / "r.npz", packed / "r.npz"):
        done = harness("data", "reference", packed, "--out", out, "--suite", "embedded")
        assert isinstance(done.exception, UserError), done.exception


def test_what_was_measured_is_printed_though_the_disk_is_full(packed, tmp_path, monkeypatch, cached):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "append", full)
    done = evaluate(packed, "--json", "--out", tmp_path / "r.jsonl")
    assert "the disk is full" in str(done.exception) and type(done.exception).__mro__[1].__name__ == "RunError"
    assert len(json.loads(done.stdout)["records"]) == 3


def test_a_picture_that_fails_takes_no_number_with_it(packed, tmp_path, monkeypatch, cached):
    write = files.write_bytes

    def full(path, *arguments, **options):
        if path.suffix != ".png":
            return write(path, *arguments, **options)
        with files.explained(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_bytes", full)
    done = evaluate(packed, "--json", "--out", tmp_path / "r.jsonl", "--neighbours", tmp_path / "n.png")
    assert done.exit_code == 0 and len(json.loads(done.stdout)["records"]) == 3
    assert "n.png could not be written" in done.stderr and len((tmp_path / "r.jsonl").read_text().splitlines()) == 3
