"""Hostile inputs (`hostile`) end in a result or in one line: never a traceback, a wait, or a changed file of the user's."""

import os
from pathlib import Path

import hostile
import numpy as np
import pytest

import harness
from evaluators.reference import without_cache
from harness.errors import UserError
from harness.io.files import read_json
from harness.io.text import parse_json, read_path, read_toml
from harness.pipeline.evaluate import check_picture
from harness.runs.samples import find_sidecar
from harness.studies import load as load_study
from harness.weights.transfer import refuse_existing
from results.records import Record, to_json
from results.store import append, check_record_file, find_record_files, load

RECORD = Record(
    provenance="measured", metric="fd", value=1.0, system="x", n=100, protocol="digits", resolution=8, dataset="digits"
)  # fmt: skip


def shown(findings):
    return "\n".join(f"{len(texts)} x {where}: {texts[0]}" for where, texts in findings.items())


def test_150_inputs():
    findings, outcomes, slowest = hostile.fuzz(150, seed=1, kinds=[each for each in hostile.KINDS if each != "runs"])
    assert not findings, shown(findings)
    assert sum(number for (_, outcome), number in outcomes.items() if outcome in ("exit 2", "refused")) > 50


@pytest.mark.slow
def test_10000_inputs():
    findings, outcomes, slowest = hostile.fuzz(10_000, seed=2)
    print(dict(outcomes), f"slowest {slowest[0]:.1f} s ({slowest[1]})")
    assert not findings, shown(findings)
    assert sum(outcomes.values()) == 10_000


# What it has found, one by one ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a." * 100_000 + "b = 1", "[" * 100_000, "a = " + "[" * 100_000, "# x\n" * 100_000])
def test_toml_that_python_reads_for_minutes_is_refused(tmp_path, text):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(UserError, match=r"x\.toml"):
        read_toml(tmp_path / "x.toml", "study")


def test_json_with_brackets_too_deep_is_no_json(tmp_path):
    (tmp_path / "x.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="nested too deep"):
        read_json(tmp_path / "x.json", "sidecar")
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json('{"a":' * 200_000)


def test_a_name_with_a_line_end_leaves_a_message_of_one_line():
    for name in ("a\nb", "a\rb", "a\x1b[31mb", "a\x85b", "a\u2028b"):
        assert str(UserError(f"{name} is missing")).isprintable()
    assert (
        str(UserError("caf\u00e9 \u4e2d \udcff")) == "caf\u00e9 \u4e2d \udcff"
    )  # what terminals show, and bytes of names


def test_a_file_that_is_too_long_is_not_read(tmp_path):
    for name in ("records.jsonl", "x.json", "x.toml", "s.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)  # a hole, which takes no place
    assert "larger than" in load([tmp_path / "records.jsonl"]).problems[0].reason
    for call in (lambda: read_json(tmp_path / "x.json", "run"), lambda: read_toml(tmp_path / "x.toml", "study")):
        with pytest.raises(UserError, match="larger than"):
            call()
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((2, 8, 8, 1), np.uint8))
    assert find_sidecar(tmp_path / "s.npz") is None


def test_a_path_with_a_zero_byte_is_none():
    with pytest.raises(ValueError, match="zero byte"):
        read_path("a\0b")


@pytest.mark.parametrize(
    "words",
    [
        ("weights", "inspect", "PIPE"), ("weights", "import", "PIPE", "--out", "made"), ("study", "PIPE", "--status"),
        ("flops", "dit-xs-2", "--protocol", "PIPE.toml"), ("compare", "PIPE", "PIPE"), ("compare", "with-pipes", "with-pipes"), ("data", "verify", "PIPE"),
        ("evaluate", "PIPE", "--suite", "tiny"), ("evaluate", "s.npz", "--suite", "tiny", "--reference", "PIPE"),
        ("evaluate", "s.npz", "--suite", "tiny", "--out", "PIPE"), ("evaluate", "s.npz", "--suite", "adm", "--inception", "PIPE"),
        ("evaluate", "s.npz", "--suite", "adm", "--inception", "PIPE", "--reference", "s.npz"), ("sample", "--run", "PIPE"),
        ("sample", "--system", "PIPE.toml"), ("data", "prepare", "x", "--from", "PIPE", "--out", "made"),
        ("data", "reference", "PIPE", "--suite", "tiny", "--out", "made.npz"), ("sample", "--run", "with-pipes"),
        ("train", "--backbone", "dit-xs-2", "--protocol", "fashion-mnist-32", "--data", "idx", "--out", "made"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_nothing_waits_for_a_pipe(tmp_path, monkeypatch, words):
    """A pipe that nobody writes to, where a file is meant."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "PIPE",
        "PIPE.toml",
        "with-pipes/run.json",
        "with-pipes/x.jsonl",
        "with-pipes/records.jsonl",
        "idx/train-images-idx3-ubyte",
        "idx/train-labels-idx1-ubyte",
        "s.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    np.savez("s.npz", arr_0=np.random.RandomState(0).randint(0, 256, (120, 8, 8, 1)).astype(np.uint8))
    with hostile.prepared(), hostile.patience(5):
        code, out, text = hostile.command(*words)
    assert code == 2 and not out and text.splitlines()[-1].startswith("harness: "), text


@pytest.mark.parametrize(
    "content", [b"mine", b"a\nb", b"\x89PNG\r\n", b'{"epoch": 1}', b'{"epoch":1}\n', b"PK\x03\x04\n\n"]
)
def test_a_file_of_something_else_gets_no_records(tmp_path, content):
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    for call in (check_record_file, lambda path: append(path, [RECORD])):
        with pytest.raises(UserError, match="something else than records"):
            call(path)
    assert path.read_bytes() == content


def test_a_record_file_that_was_cut_is_one(tmp_path):
    for content in (b"", b"\n", to_json(RECORD).encode()[:40], to_json(RECORD).encode() + b"\n"):
        (tmp_path / "r.jsonl").write_bytes(content)
        check_record_file(tmp_path / "r.jsonl")
        append(tmp_path / "r.jsonl", [RECORD])
        assert (tmp_path / "r.jsonl").read_text().strip() == to_json(RECORD)


def test_a_link_to_nothing_is_not_replaced(tmp_path):
    (tmp_path / "n.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match="is a link to nothing"):
        check_picture(tmp_path / "n.png")
    assert (tmp_path / "n.png").is_symlink()


def test_a_picture_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "n.png").write_bytes(b"a picture of the user's")
    with pytest.raises(UserError, match="no picture of neighbours"):
        check_picture(tmp_path / "n.png")


def test_a_folder_that_cannot_be_searched_is_one_line(tmp_path, monkeypatch):
    def rglob(self, pattern):
        raise OSError(22, "Invalid argument", str(tmp_path / "self"))
        yield

    monkeypatch.setattr("pathlib.Path.rglob", rglob)
    with pytest.raises(UserError, match="cannot be searched for records"):
        find_record_files([tmp_path])


def test_weights_are_not_written_over_a_link_to_nothing(tmp_path):
    (tmp_path / "w.pt").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="exists and is not overwritten"):
        refuse_existing(tmp_path / "w.pt")


def test_labels_that_are_no_classes_are_refused(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "s.npz", arr_0=images, arr_1=np.full(60, 10**13))
    with pytest.raises(UserError, match="no number of a class"):
        harness.evaluate(samples=tmp_path / "s.npz", reference=tmp_path / "s.npz", suite="embedded")


def test_a_cache_that_no_system_can_name_is_a_warning(caplog):
    with without_cache(Path("x\0")):
        Path("x\0").mkdir()
    assert "computed again next time" in caplog.text


def test_links_in_a_circle_and_names_too_long_are_no_paths(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for path in (tmp_path / "a" / "x", tmp_path / ("x" * 300), "x\ud800"):
        with pytest.raises(ValueError, match="is no path"):
            read_path(path)


def test_a_number_that_no_float_holds_is_no_number(tmp_path):
    (tmp_path / "s.toml").write_text(f'protocol = "digits"\nbackbones = ["dit-xs-4"]\n[sampling]\neta = {10**400}\n')
    with pytest.raises(UserError, match="must be a number"):
        load_study(tmp_path / "s.toml")
