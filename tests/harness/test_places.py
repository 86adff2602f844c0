"""Every form in which a place is named, files beside samples that are not ours, text that begins with a byte order mark,
and a stdout of another encoding, through a pipe, or on a full device."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console
from rich.table import Table

import harness as package
from harness.cli import group, tables
from harness.cli.streams import ERRORS, print_anything
from harness.data.digits import load
from harness.data.prepare import prepare
from harness.data.sources import open_index
from harness.errors import UserError
from harness.io.text import read_path, read_paths, read_text
from harness.pipeline.sidecar import read_fields
from harness.protocols import get_protocol
from harness.runs.samples import find_sidecar, write_samples
from harness.studies import load as load_study
from harness.systems.read import get_system

BOM = "\ufeff"


def harness(*arguments):
    return CliRunner().invoke(group, [*map(str, arguments)])


@pytest.fixture(scope="module")
def digits():
    return load()


@pytest.fixture
def samples(tmp_path, digits):
    """A folder of PNG files with a name that needs care, and a link to it."""
    folder = tmp_path / "a b" / "cfg-1.5"
    folder.mkdir(parents=True)
    for i in range(100):
        Image.fromarray(digits.images[i][..., 0] // 2 * 2).save(folder / f"{i}.png")
    (tmp_path / "link").symlink_to(folder)
    (folder.parent / "cfg-1.json").write_text("[1, 2]")  # somebody's, of the same stem
    return folder


FORMS = {
    "here": (lambda folder: folder, "."),
    "above": (lambda folder: _made(folder.parent / "sub"), "../cfg-1.5"),
    "parent": (lambda folder: _made(folder.parent / "sub" / "deeper"), "../../cfg-1.5/../cfg-1.5/"),
    "dots": (lambda folder: _linked(folder), ".."),
    "slash": (lambda folder: folder.parent, "cfg-1.5/"),
    "link": (lambda folder: folder.parents[1], "link"),
    "spaces": (lambda folder: folder.parents[1], "a b/cfg-1.5"),
}


def _made(folder):
    folder.mkdir(parents=True)
    return folder


def _linked(folder):
    return _made(folder / ".hidden")  # a folder inside the samples, from where they are `..`


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One for the module: the features of the digits take most of the time."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def shared_cache(cache, monkeypatch):
    monkeypatch.setenv("HARNESS_CACHE", str(cache))


@pytest.mark.parametrize("form", FORMS)
def test_samples_are_named_in_every_form(samples, monkeypatch, form):
    where, name = FORMS[form]
    monkeypatch.chdir(where(samples))
    done = harness("evaluate", name, "--suite", "embedded-modern", "--out", "r.jsonl", "--json")
    assert done.exit_code == 0, done.exception
    assert {each["system"] for each in json.loads(done.stdout)["records"]} == {"link" if form == "link" else "cfg-1.5"}


@pytest.mark.parametrize("form", [".", "..", "a/..", "./", "a/../"])
def test_every_path_has_a_name(tmp_path, monkeypatch, form):
    monkeypatch.chdir(_made(tmp_path / "x" / "a"))
    monkeypatch.chdir(tmp_path / "x")
    path = read_path(form)
    assert path.name and path.resolve() == Path(form).resolve()
    assert read_paths([form]) == (path,)


def test_a_reference_of_the_working_folder_has_its_name(samples, monkeypatch, tmp_path):
    monkeypatch.chdir(samples)
    done = harness("data", "reference", ".", "--out", tmp_path / "r.npz", "--suite", "embedded", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["source"] == "cfg-1.5"


def test_an_empty_path_is_refused():
    with pytest.raises(ValueError, match="the path is empty"):
        read_path("")
    for words in (
        ("evaluate", ""),
        ("data", "verify", ""),
        ("data", "reference", "", "--out", "x.npz"),
        ("study", ""),
        ("weights", "inspect", ""),
        ("compare", "", "a"),
    ):
        done = harness(*words)
        assert done.exit_code == 2 and "the path is empty" in done.output, words


def test_an_empty_text_is_not_taken_for_the_default():
    """As of a variable of the shell that is not set: the samples would be judged by another protocol or suite."""
    with pytest.raises(ValueError, match="the text is empty"):
        read_text("")
    for words in (
        ("evaluate", "s.npz", "--protocol", ""),
        ("evaluate", "s.npz", "--suite", ""),
        ("plan", "--backbone", "dit-xs-2", "--protocol", ""),
        ("sample", "--run", "r", "--decoder", ""),
        ("diagnose", "r", "--suite", ""),
        ("diagnose", "r", "--protocol", ""),
        ("flops", "--protocol", ""),
        ("check", "dit-xs-2", "--protocol", ""),
        ("data", "latents", "s.npz", "--vae", "", "--out", "o"),
        ("data", "latents", "", "--vae", "ft-ema", "--out", "o"),
        ("data", "reference", "s.npz", "--suite", "", "--out", "r.npz"),
    ):
        done = harness(*words)
        assert done.exit_code == 2 and "is empty" in done.output, (words, done.output, done.exception)
    with pytest.raises(UserError, match="--protocol: the text is empty"):
        package.plan(backbone="dit-xs-2", protocol="")


def test_a_data_set_is_prepared_through_a_link_and_not_over_the_working_folder(tmp_path, monkeypatch, samples):
    source = _made(tmp_path / "in" / "bird").parent
    Image.new("RGB", (9, 9)).save(source / "bird" / "a.png")
    _made(tmp_path / "disk" / "d")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "d")
    assert prepare("mine", source, tmp_path / "out", resolution=8).new
    assert (tmp_path / "disk" / "d" / "meta.json").is_file() and (tmp_path / "out").is_symlink()
    monkeypatch.chdir(_made(tmp_path / "w"))
    done = harness("data", "prepare", "mine", "--from", source, "--out", ".", "--resolution", 8)
    assert "which the data set would replace" in str(done.exception)


def test_names_that_are_no_utf8(tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    folder = tmp_path / odd
    for name in (odd, "b"):
        Image.new("RGB", (9, 9)).save(_made(folder / name) / f"{odd}.png")
    assert len(open_index(folder, "mine").sha256) == 64
    made = prepare("mine", folder, tmp_path / "out", resolution=8)
    assert made.meta.images == 2
    fields = read_fields(folder, "0")
    assert fields.system == "caf?" and json.dumps(fields.as_dict()).encode("utf-8")
    assert read_fields(folder, "0", name=odd).system == "caf?"


NOT_OURS = {
    "a list": "[1, 2]",
    "another document": '{"identity": ["x"], "prompt": "a cat"}',
    "an identity that is no object": '{"identity": 5}',
    "lines": '{"a": 1}\n{"a": 2}\n',
    "no text": "\udcff\udcfe",
    "nothing": "",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("case", NOT_OURS)
def test_json_of_another_program_is_no_sidecar(tmp_path, digits, case, caplog):
    path = tmp_path / "s.npz"
    write_samples(path, [digits.images[:100] // 2 * 2], digits.labels[:100], {})
    (tmp_path / "s.json").write_bytes(NOT_OURS[case].encode("utf-8", "surrogateescape"))
    assert find_sidecar(path) is None
    assert "s.json is not the sidecar of s.npz, by its content; it was not read" in caplog.text
    assert read_fields(path, "0").system == "s"
    if case == "another document":
        done = harness("evaluate", path, "--suite", "embedded-modern", "--json")
        assert done.exit_code == 0, done.exception


def test_a_sidecar_of_ours_is_read_with_a_mark_and_refused_where_it_is_cut(tmp_path, digits):
    path = tmp_path / "s.npz"
    write_samples(path, [digits.images[:2]], digits.labels[:2], {"made": "here"})
    side = tmp_path / "s.json"
    text = side.read_text()
    side.write_text(BOM + text, encoding="utf-8")
    assert find_sidecar(path)["made"] == "here"
    side.write_text(text[:-5])
    with pytest.raises(UserError, match="cannot be read as JSON"):
        find_sidecar(path)


PROTOCOL = """name = "mine"
dataset = "digits"
resolution = 8
image_channels = 1
num_classes = 10
input_size = 8
in_channels = 1
samples = 100
suite = "embedded"
"""
STUDY = 'protocol = "digits"\nbackbones = ["dit-xs-2"]\nseeds = [0]\nbudgets = [10]\n'


def test_toml_may_begin_with_a_byte_order_mark(tmp_path):
    def written(name, text, encoding="utf-8"):
        (tmp_path / name).write_text(BOM + text, encoding=encoding)
        return tmp_path / name

    assert get_protocol(str(written("p.toml", PROTOCOL))).name == "mine"
    system = written("s.toml", 'name = "x"\n')
    with pytest.raises(UserError) as caught:
        get_system(str(system))
    assert "not valid TOML" not in str(caught.value)
    try:
        load_study(written("study.toml", STUDY))
    except UserError as error:
        assert "not valid TOML" not in str(error)
    with pytest.raises(UserError, match="is not valid TOML"):
        get_protocol(str(written("u.toml", PROTOCOL, "utf-16-le")))


def main_process(code, stdout=subprocess.PIPE, **environment):
    """`main` of the command line in its own process, after `code`."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys\nfrom harness.cli import main, group\n{code}\nmain()"],
        stdout=stdout, stderr=subprocess.PIPE, env={**os.environ, **environment}, timeout=60, check=False,
    )  # fmt: skip


ARROWS = """import click
from rich.console import Console
@group.command("arrows")
def arrows():
    click.echo("FID \\u2193 1.0 \\u00b1 0.2 caf\\udce9")
    Console(width=60).print("IS \\u2191 2.0")
from harness.cli import COMMANDS, LazyGroup
COMMANDS["arrows"] = ("arrows", "")
LazyGroup.get_command = lambda self, ctx, name: arrows
sys.argv = ["harness", "arrows"]"""


@pytest.mark.parametrize("encoding", ["iso-8859-1", "ascii", "utf-8"])
def test_output_of_any_encoding(encoding):
    done = main_process(ARROWS, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    text = done.stdout.decode("utf-8" if encoding == "ascii" else encoding)
    assert "1.0" in text and "2.0" in text
    if encoding != "utf-8":
        assert "IS ^ 2.0" in text


def test_stdout_on_a_full_device_and_a_reader_that_has_gone():
    for code in (ARROWS, ARROWS.replace('"FID', '"x" * 100_000 + "FID')):
        with open("/dev/full", "wb") as full:  # noqa: PTH123
            done = main_process(code, stdout=full)
        assert done.returncode == 1, done.stderr
        assert done.stderr.decode() == "harness: stdout: No space left on device\n"
    read, write = os.pipe()
    os.close(read)
    done = main_process(ARROWS, stdout=write)
    os.close(write)
    assert done.returncode == 1 and done.stderr == b""


def test_a_working_folder_that_is_gone_is_one_line(tmp_path):
    gone = str(_made(tmp_path / "gone"))
    code = f"import os; os.chdir({gone!r}); os.rmdir({gone!r}); sys.argv = ['harness', 'evaluate', 's.npz']"
    done = main_process(code)
    assert done.returncode == 2
    assert done.stderr.decode() == "harness: the working folder no longer exists; change to one that does\n"


def test_characters_that_an_encoding_lacks():
    print_anything()
    assert "\u2193 \u00b1 \u00d7 \u4e2d".encode("ascii", ERRORS) == b"v +- x ?"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", ERRORS)


@pytest.mark.parametrize("width", [None, 20])
def test_a_table_never_cuts_a_number(monkeypatch, capsys, width):
    table = Table(box=None)
    for i in range(30):
        table.add_column(f"column {i}", no_wrap=True)
    table.add_row(*(f"{1000 + i}.123456789" for i in range(30)))
    if width is not None:
        monkeypatch.setattr(tables, "table_console", lambda: Console(width=width, force_terminal=True, no_color=True))
    tables.print_table(table)
    text = capsys.readouterr().out
    assert all(f"{1000 + i}.123456789" in text for i in range(30)) and "\u2026" not in text


def test_records_in_a_narrow_pipe_are_not_cut(tmp_path, digits, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    path = tmp_path / ("n" * 60 + ".npz")
    np.savez(path, digits.images[:100] // 2 * 2, digits.labels[:100])
    done = harness("evaluate", path, "--suite", "embedded-modern")
    assert done.exit_code == 0 and "\u2026" not in done.stdout and "..." not in done.stdout
    assert io.StringIO(done.stdout).read().replace("\n", "").count("n" * 60) >= 1
