"""Small files that ask for much are refused at once and in little memory; large honest ones are read."""

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch

from harness.errors import UserError
from harness.weights import pickles
from harness.weights.containers import LONGEST_DIRECTORY, LONGEST_HEADER, LONGEST_PICKLE, open_file
from harness.weights.files import open_weights
from harness.weights.tensors import Stored, row_major_strides

MANY = 100_000
SECONDS, MEGABYTES = 4, 500  # measured: 1.0 s and 106 MB at most, but for the header (420 MB)


def text(content):
    return b"X" + struct.pack("<I", len(content)) + content


def integer(value, width):
    return b"\x8a" + bytes([width]) + value.to_bytes(width, "little")


def tensor(shape, strides):
    """A dictionary of one tensor, as torch writes it."""

    def numbers(values):
        return b"(" + b"".join(integer(value, 7) for value in values) + b"t"

    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"K\x10tQ"
    arguments = storage + b"K\x00" + numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)R"
    return b"}(" + text(b"w") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tRu."


MODULUS = sys.hash_info.modulus
ONES = b"(" + b"K\x01" * MANY
CALLED = b"h\x00h\x01R" * MANY + b"."
DICTIONARY = b"ccollections\nOrderedDict\nq\x00"
MORE = r"asks for more than weights need \(over 1,200,000 steps"
PROGRAMS = {  # pickles, each with what the refusal says
    "lists": (b"]" * 3_000_000 + b".", MORE),
    "sizes": (b"ctorch\nSize\nq\x00" + ONES + b"l\x85q\x01" + CALLED, "more than 64 axes"),
    "wrapped sizes": (
        b"ctorch._tensor\n_rebuild_from_type_v2\nq\x00(ctorch\nSize\nN" + ONES + b"l\x85tq\x01" + CALLED,
        "leaves more or less than one value",
    ),
    "encodings": (b"c_codecs\nencode\nq\x00" + text(b"x" * MANY) + b"\x85q\x01" + CALLED, MORE),
    "dictionaries": (DICTIONARY + b"(" + b"K\x01N\x86" * MANY + b"l\x85q\x01" + CALLED, MORE),
    "arguments": (b"ctorch._utils\n_rebuild_parameter\nq\x00" + ONES + b"tq\x01" + CALLED, MORE),
    "names": (b"\x80\x04" + (text(b"a" * 900_000) + b"\x94") * 2 + b"h\x00h\x01\x93" * MANY + b".", "more than a line"),
    "keys that collide": (
        b"}(" + b"".join(integer(k * MODULUS, 11) + b"N" for k in range(1, 60_000)) + b"u.",
        "no tensors by name",
    ),
    "tuples as keys": (ONES + b"tq\x000}(" + b"h\x00N" * 30_000 + b"u.", "no tensors by name"),
    "places that collide": (b"N" + b"".join(b"p%d\n" % (k * MODULUS) for k in range(1, 60_000)) + b".", "out of reach"),
    "axes": (tensor([1] * 40_000, [1] * 40_000), "more than 64 axes"),
    "large axes": (tensor([2**47] * 60_000 + [0], [0] * 60_001), "more than 64 axes"),
    "length": (text(b"a" * LONGEST_PICKLE) + b".", "asks for more than weights need"),
}
LEGACY = ("lists", "sizes", "axes", "keys that collide")
FILES = {  # other files, by what `make` does for them
    "deflated": "was compressed after it was saved",
    "deflated beside": "was compressed after it was saved",
    "directory": "more members than weights have",
    "overlapping": "is not where the directory says",
    "header": "asks for more than weights need",
    "header axes": "more than 64 axes",
}
EXPECTED = {
    **{name: message for name, (_, message) in PROGRAMS.items()},
    **{f"legacy {name}": PROGRAMS[name][1] for name in LEGACY},
    **FILES,
}


def zipped(path, program, method=zipfile.ZIP_STORED, beside=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("a/data.pkl"), program, compress_type=method)
        archive.writestr(zipfile.ZipInfo("a/data/0"), bytes(64))
        archive.writestr(zipfile.ZipInfo("a/version"), b"3\n", compress_type=beside)


def safetensors(path, header):
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def make(folder):
    for name, (program, _) in PROGRAMS.items():
        zipped(folder / name, b"\x80\x02" + program)
    head = b"".join(pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    for name in LEGACY:
        end = pickle.dumps(["0"] if "axes" in name else [], 2)
        (folder / f"legacy {name}").write_bytes(head + b"\x80\x02" + PROGRAMS[name][0] + end)
    zipped(folder / "deflated", b"\x80\x02" + b"]" * 10_000_000 + b".", zipfile.ZIP_DEFLATED)
    zipped(folder / "deflated beside", b"\x80\x02}.", beside=zipfile.ZIP_DEFLATED)
    directory = b"PK\x03\x04" + bytes(LONGEST_DIRECTORY)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), 0, 0)
    (folder / "directory").write_bytes(directory + end)
    zipped(folder / "overlapping", b"\x80\x02}.")
    data = (folder / "overlapping").read_bytes()
    at = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)  # the second member, said to be where the first is
    (folder / "overlapping").write_bytes(data[: at + 42] + bytes(4) + data[at + 46 :])
    safetensors(folder / "header", b'{"w":[' + b"[]," * (LONGEST_HEADER // 3) + b"1]}")
    axes = ",".join([str(2**47)] * 300_000)
    safetensors(folder / "header axes", b'{"w":{"dtype":"F32","shape":[%s,0],"data_offsets":[0,0]}}' % axes.encode())


READ = """
import json, resource, sys, time
from pathlib import Path
from harness.weights.files import open_weights
resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))  # here: preexec_fn would fork, which jax warns of
def peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) / 1024
found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        pass
    before, begin = peak(), time.process_time()
    try:
        said = f"read: {open_weights(path)}"[:200]
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    found[path.name] = time.process_time() - begin, peak() - before, said
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each file leads to, in a process of its own that may take no more than 2 GB."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the memory that a process takes is measured on Linux alone")
    folder = tmp_path_factory.mktemp("bombs")
    make(folder)
    words = [sys.executable, "-c", READ, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_asks_for_much_is_refused_at_once(name, outcomes):
    import re

    seconds, megabytes, said = outcomes[name]
    assert said.startswith("UserError: ") and re.search(EXPECTED[name], said) and "\n" not in said
    assert seconds < SECONDS and megabytes < MEGABYTES


def test_the_optimiser_of_a_training_run_is_no_obstacle(state, tmp_path):
    """A train.py checkpoint whose optimiser has 100,000 entries, and one with 9,000 tensors."""
    entries = {n: {"step": n, "lr": 0.5} for n in range(MANY)}
    torch.save({"ema": state, "opt": {"state": entries}}, tmp_path / "numbers.pt")
    assert len(open_weights(tmp_path / "numbers.pt").tensors) == len(state)
    entries = {n: dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros(1)) for n in range(3000)}
    entries = {n: {**each, "step": torch.tensor(1.0)} for n, each in entries.items()}
    torch.save({"ema": state, "opt": {"state": entries}}, tmp_path / "tensors.pt")
    assert len(open_file(tmp_path / "tensors.pt").value["opt"]["state"]) == 3000


def test_each_storage_of_the_file_adds_to_the_budget(monkeypatch, tmp_path):
    torch.save({str(n): torch.zeros(1) for n in range(300)}, tmp_path / "a.pt")
    monkeypatch.setattr(pickles.Budget.__init__, "__defaults__", (100,))
    assert len(open_weights(tmp_path / "a.pt").tensors) == 300
    monkeypatch.setattr("harness.weights.pickles.MAX_UNITS", 5000)
    with pytest.raises(UserError, match="asks for more than weights need"):
        open_weights(tmp_path / "a.pt")
    torch.save({str(n): torch.zeros(1) for n in range(3)}, tmp_path / "b.pt")
    monkeypatch.setattr("harness.weights.pickles.UNITS_A_STORAGE", 1)
    with pytest.raises(UserError, match=r"over 10[123] steps"):
        open_weights(tmp_path / "b.pt")


def test_keys_that_are_no_names_stand_in(tmp_path):
    program = b"\x80\x02}(K\x07K\x01" + integer(MODULUS, 9) + b"K\x02G?\xf0\x00\x00\x00\x00\x00\x00K\x03u."
    first, *others = pickles.read(io.BytesIO(program), {}).value
    assert first == 7 and [type(key) for key in others] == [pickles.Call, pickles.Call]
    assert [key.arguments for key in others] == [MODULUS, 1.0]


def test_strides_row_by_row():
    assert (
        row_major_strides((2, 3, 5)) == tuple(s // 8 for s in np.empty((2, 3, 5)).strides)
        and row_major_strides(()) == ()
    )


@pytest.mark.parametrize("config", ["[" * 200_000, '{"sample_size": 8, "x": "' + "a" * (1 << 20) + '"}'])
def test_a_config_that_is_none_is_left_alone(config, bare):
    (bare.parent / "config.json").write_text(config)
    assert open_weights(bare).config is None


# Checksums -----------------------------------------------------------------------------------------------------------


def views(kind):
    values = torch.arange(48.0).reshape(1, 3, 4, 4) + 1000
    if kind == "channels last":
        return values.to(memory_format=torch.channels_last)
    if kind == "turned":
        return values.reshape(6, 8).T
    return {"whole": values, "part": values.reshape(-1)[4:20], "every other": values.reshape(-1)[2:30:2]}[kind]


@pytest.mark.parametrize("kind", ["whole", "part", "channels last", "turned", "every other"])
def test_damage_is_noticed_however_the_tensor_lies(kind, tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": views(kind)}, path)
    assert (open_file(path).value["w"].read() == views(kind).numpy()).all()
    data = bytearray(path.read_bytes())
    data[data.index(np.float32(1006).tobytes()) + 2] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(UserError, match="do not match their checksum"):
        open_file(path).value["w"].read()


def test_a_shared_storage_is_checked_once_and_in_pieces(monkeypatch, tmp_path):
    base = torch.randn(3000)
    torch.save({"a": base[5:1000], "b": base[2000:], "c": base}, tmp_path / "a.pt")
    monkeypatch.setattr("harness.weights.tensors.BLOCK", 1 << 10)
    read, fill = [], Stored._fill

    def counted(self, out, start=None):
        read.append(out.nbytes)
        fill(self, out, start)

    monkeypatch.setattr(Stored, "_fill", counted)
    tensors = open_file(tmp_path / "a.pt").value
    for name, expected in (("a", base[5:1000]), ("b", base[2000:]), ("c", base)):
        np.testing.assert_array_equal(tensors[name].read(), expected.numpy())
    assert read == [995 * 4, *[1024] * 11, 736, 4000, 12000]


def test_the_description_of_the_tensors_is_checked_too(bare):
    data = bare.read_bytes()
    damaged = data.replace(b"final_layer.linear.bias", b"final_layer.linear.bats", 1)
    assert damaged != data and zlib.crc32(damaged) != zlib.crc32(data)
    bare.write_bytes(damaged)
    with pytest.raises(UserError, match="does not match its checksum"):
        open_file(bare)
