"""Nothing in a weight file is executed: hostile pickles leave no trace, and their tensors can still be listed."""

import argparse
import io
import pickle
import random
import sys
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from harness.errors import UserError
from harness.weights import pickles
from harness.weights.containers import open_file
from harness.weights.files import open_weights
from harness.weights.load import load_into
from harness.weights.transfer import import_file, inspect_file


class Planted:
    """Pickles as the call of a function with arguments."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Setter:
    """A real, importable class whose __setstate__ writes a file."""

    def __setstate__(self, state):
        open(state["path"], "w").close()  # noqa: PTH123 - as an attacker would


def hostile(kind, trace):
    """An object that writes the file `trace` when it is unpickled carelessly."""
    import os

    touch = f"touch {trace}"
    if kind == "os.system":
        return Planted(os.system, touch)
    if kind == "nested eval":
        return Planted(eval, Planted(str, f"__import__('pathlib').Path({str(trace)!r}).touch()"))
    if kind == "getattr":
        return Planted(Planted(getattr, os, "system"), touch)
    if kind == "load from bytes":
        return Planted(torch.storage._load_from_bytes, torch_bytes(Planted(os.system, touch)))
    setter = Setter()
    setter.__dict__["path"] = str(trace)
    return setter


class Pickler(pickle._Pickler):
    """Writes what the C pickler would refuse: a module, by name; a call whose function is itself a call."""

    def save_reduce(self, func, args, state=None, listitems=None, dictitems=None, *, obj=None, **_):
        if isinstance(func, Planted):
            self.save(func)
            self.save(args)
            self.write(pickle.REDUCE)
        else:
            super().save_reduce(func, args, state, listitems, dictitems, obj=obj)

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, types.ModuleType):
            self.write(b"ctorch.serialization\nos\n")  # the module as an attribute of another
            return
        if isinstance(obj, Planted):
            self.save_reduce(obj.function, obj.arguments, obj=obj)
            return
        super().save(obj, save_persistent_id)


PICKLER = types.SimpleNamespace(Pickler=Pickler, dump=pickle.dump, __name__="pickle")


def torch_bytes(value, **how):
    stream = io.BytesIO()
    torch.save(value, stream, pickle_module=PICKLER, **how)
    return stream.getvalue()


KINDS = ("os.system", "nested eval", "getattr", "load from bytes", "setstate")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_pickle_does_not_run(kind, zipped, state, spec, net, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "hostile.pt"
    planted = {"first": hostile(kind, trace), **state, "last": [hostile(kind, trace)]}
    path.write_bytes(torch_bytes(planted, _use_new_zipfile_serialization=zipped))

    document = inspect_file(path)
    assert document["tensors"] == len(state) and document["backbone"] == "dit-xs-4"
    assert document["not_loaded"]
    assert (document["code"] == []) == (kind == "setstate")  # a class of no known harm is listed like any other
    for name, tensor in open_weights(path).tensors.items():
        assert tensor.read().tobytes() == state[name].numpy().tobytes()
    if document["code"]:
        with pytest.raises(UserError, match="Nothing was run"):
            import_file(path, tmp_path / "out.safetensors")
        with pytest.raises(UserError, match="unpickling it would run"):
            load_into(net, path, spec)
        assert not (tmp_path / "out.safetensors").exists()
    assert not trace.exists()

    # The plant works: a careless reader is caught by it.
    sys.modules.setdefault(Setter.__module__, types.ModuleType(Setter.__module__)).Setter = Setter
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_what_is_listed_was_never_imported(state, tmp_path):
    """A callback of a package that is not installed, as in Lightning's checkpoints; an argparse.Namespace."""
    module = types.ModuleType("absent_package.callbacks")
    module.Saver = type("Saver", (), {"__module__": module.__name__})
    saver = module.Saver()
    saver.best = 3
    sys.modules |= {"absent_package": types.ModuleType("absent_package"), module.__name__: module}
    try:
        torch.save(
            {"state_dict": state, "callbacks": {module.Saver: saver}, "args": argparse.Namespace(a=1)},
            tmp_path / "a.ckpt",
        )
    finally:
        del sys.modules[module.__name__], sys.modules["absent_package"]
    weights = open_weights(tmp_path / "a.ckpt")
    assert set(weights.symbols) >= {"absent_package.callbacks.Saver", "argparse.Namespace"}
    assert weights.code == () and module.__name__ not in sys.modules
    assert weights.wrapping == "Lightning checkpoint" and set(weights.other_names) == {"callbacks", "args"}
    assert import_file(tmp_path / "a.ckpt")[0].exists()


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02\x82\x01.",  # EXT1: a class by its number in copyreg
        b"\x80\x05\x97.",  # a buffer from elsewhere
        b"\x80\x02K\x01)R.",  # a call of a number
        b"\x80\x02]}b",  # cut short
        b"\x80\x02}(]K\x01u.",  # an unhashable key
        b"\x80\x02h\x07.",  # from an empty memo
        b"\x80\x020.",  # popping nothing
        b"not a pickle",
        b"",
    ],
)
def test_odd_programs_are_refused_or_inert(program):
    try:
        reading = pickles.read(io.BytesIO(program), {})
    except pickles.Malformed:
        return
    assert program == b"\x80\x02}(]K\x01u." and isinstance(next(iter(reading.value)), pickles.Call)


def test_state_given_to_a_name_changes_nothing():
    """BUILD on a class or function would set attributes of the real one, were it there."""
    program = b"\x80\x02ccollections\nOrderedDict\n}U\x04evilK\x01sb."
    value = pickles.read(io.BytesIO(program), {}).value
    assert value == pickles.Symbol("collections", "OrderedDict")


def test_a_key_nested_very_deep_does_not_overflow_the_stack():
    program = b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s."
    assert len(pickles.read(io.BytesIO(program), {}).value) == 1


def test_plain_pickles_and_programs_are_refused_by_what_they_are(tmp_path):
    path = tmp_path / "x"
    for data, message in (
        (pickle.dumps({"a": 1}), "a pickle, but not one of torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b"", "empty"),
        (b"hello", "neither a torch file nor"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            open_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({"a": 1}, 2))
        archive.writestr("m/constants.pkl", b"")
        archive.writestr("m/code/m.py", b"")
    with pytest.raises(UserError, match="a TorchScript archive without a module"):
        open_file(path)
    with pytest.raises(UserError, match="No such file"):
        open_file(tmp_path / "nowhere.pt")


def test_of_a_torchscript_archive_the_tensors_are_read_and_nothing_is_run(tmp_path):
    """As openai/CLIP publishes its weights."""

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 2, bias=False)
            self.blocks = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).half()
            self.scale = torch.nn.Parameter(torch.arange(3.0))
            self.register_buffer("size", torch.tensor(7))
            self.number = 5

        def forward(self, x):
            return self.conv(x)

    net = Inner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch call it deprecated
        torch.jit.script(net).save(tmp_path / "net.pt")
    weights = open_weights(tmp_path / "net.pt")
    weights.refuse_code()
    expected = net.state_dict()
    assert weights.container == "TorchScript" and weights.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        stored = weights.tensors[name]
        np.testing.assert_array_equal(stored.read(), tensor.numpy())
        assert stored.read().dtype == tensor.numpy().dtype


def test_a_tensor_cannot_reach_beyond_its_bytes_nor_fill_the_memory(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, path)
    with pytest.raises(UserError, match="repeats its elements"):
        open_file(path)
    torch.save({"a": torch.zeros(4)}, path)
    data = path.read_bytes().replace(b"K\x04\x85", b"K\x05\x85")  # the shape in data.pkl
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        open_file(path)


@pytest.mark.parametrize("write", ["zip", "legacy", "safetensors"])
def test_damage_anywhere_is_refused_or_harmless(write, tmp_path):
    """Bytes changed at random in everything but the tensors: a refusal or a reading, never another error."""
    path = tmp_path / "x"
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int64)}
    if write == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(
            {"ema": tensors, "args": argparse.Namespace(a=1)}, path, _use_new_zipfile_serialization=write == "zip"
        )
    data = path.read_bytes()
    if write == "zip":  # its checksum would notice: change the pickle inside, and the directory
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = next(name for name in members if name.endswith("data.pkl"))
    draw = random.Random(0)
    outcomes = []
    for turn in range(600):
        inner = write == "zip" and turn % 2 == 0
        damaged = bytearray(members[name] if inner else data)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        if inner:
            with zipfile.ZipFile(path, "w") as archive:
                for each, content in members.items():
                    archive.writestr(each, bytes(damaged) if each == name else content)
        else:
            path.write_bytes(damaged)
        try:
            for tensor in open_weights(path).tensors.values():
                tensor.read()
            outcomes.append("read")
        except UserError as refusal:
            assert str(refusal).isprintable() and str(path) in str(refusal)
            outcomes.append("refused")
    assert {"read", "refused"} == set(outcomes)
