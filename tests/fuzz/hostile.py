"""Hostile inputs from a seed: paths, names, sidecars, runs, records, TOML, checkpoints, sample files and folders.

Input i of a seed is always the same. Each is given to a command, with the entry point of the console script, or to the
Python interface. What may come of it: a result, or one line (`UserError`, `RunError`); never another exception, never more
than PATIENCE seconds, and no file of the user's that is changed or gone.

    python tests/fuzz/hostile.py --inputs 10000 --seed 1        # says at the end what was found, by where it was raised
    python tests/fuzz/hostile.py --seed 1 --input 4711          # one of them, with its traceback
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "harness")]

import tiny_suite
from mutations import changed, mutated, places
from PIL import Image

import harness
from harness import registry
from harness.errors import RunError, UserError

PATIENCE, ROUNDS = 20, 9  # seconds of one input; see `patience`
MEMORY = 6 << 30  # bytes of address space beyond what the process has when it begins
BACKBONE = "dit-of-fuzz"
OTHERS = [
    None, True, False, "", "x", "a\0b", "\u00e9\n", "\ud800", "%s%n", "../../x", "/", "x" * 5000, "nan", "1e400", -1, 0, 1, 3, 2**31,
    2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf"), [], [[]], [1, "a"], [-1], {}, {"a": 1},
    [{}], [None],
]  # fmt: skip


def tiny():
    """The suite `tiny`, for images of a program."""
    return harness.EvaluationConfig(suite=registry.suites.get("tiny"))


class TooSlow(BaseException):
    """Raised by the alarm; nothing in the harness catches it."""


# What is mutated: valid files ------------------------------------------------------------------------------------------

PROTOCOL = {
    "name": "mine", "dataset": "npz", "resolution": 8, "image_channels": 1, "num_classes": 10, "input_size": 8,
    "in_channels": 1, "samples": 100, "suite": "tiny", "recipe": {"learning_rate": 3e-4, "steps": 2, "batch": 8},
    "sampling": {"steps": [2], "clip_denoised": True, "guidance_channels": "all"},
}  # fmt: skip
STUDY = {
    "protocol": "digits", "backbones": [BACKBONE], "seeds": [0, 1], "budgets": {"steps": [2, 4]},
    "sampling": {"steps": [2], "guidance_scales": [1, 1.5], "samples": 100}, "recipe": {"batch": 8},
    "variant": {"flow": {"recipe": {"objective": "sit"}, "sampling": {"sampler": "heun", "steps": [2]}}},
    "backbone": {BACKBONE: {"learning_rate": 1e-3}}, "slurm": {"partition": "gpu", "gpus_per_node": 1},
}  # fmt: skip
SYSTEM = {
    "name": "tiny-system", "protocol": "digits", "label_policy": "random", "uint8_rule": "dit",
    "base": {
        "backbone": BACKBONE, "arguments": {"input_size": 8, "in_channels": 1, "num_classes": 10}, "steps": 2,
        "sampler": "ddim", "clip_denoised": True, "guidance_scale": 1.0, "guidance_channels": "all",
    },
    "weak": {
        "backbone": BACKBONE, "arguments": {"input_size": 8, "in_channels": 1, "num_classes": 10}, "scale": 2.0,
        "interval": "0.3-5",
    },
}  # fmt: skip


def toml(document):
    """The document as TOML: every value as JSON writes it, which TOML reads alike, dictionaries as inline tables."""

    def value(each):
        if isinstance(each, dict):
            return "{ " + ", ".join(f"{json.dumps(key)} = {value(inner)}" for key, inner in each.items()) + " }"
        if isinstance(each, list):
            return "[" + ", ".join(map(value, each)) + "]"
        return {"Infinity": "inf", "-Infinity": "-inf", "NaN": "nan"}.get(json.dumps(each), json.dumps(each))

    return "".join(f"{json.dumps(key)} = {value(each)}\n" for key, each in document.items() if each is not None)


class World:
    """Valid files of every kind in `folder`, made once by the harness itself."""

    def __init__(self, folder):
        import torch
        from safetensors.torch import save_file

        self.folder = folder
        self.torch = torch
        with contextlib.chdir(folder):
            for words in (
                ("train", "--backbone", BACKBONE, "--steps", 2, *BY_HAND, "--device", "cpu", "--out", "run"),
                ("sample", "--run", "run", "--samples", 100, "--sampling-steps", 2),
                ("evaluate", "run/samples/*", *EMBEDDED),
            ):
                words = [str(next(folder.glob(each))) if "*" in str(each) else each for each in words]
                code, _, text = command(*words)
                assert code == 0, text
        self.samples = next((folder / "run" / "samples").iterdir())
        self.images = np.load(self.samples / "samples.npz")["arr_0"]
        self.labels = np.load(self.samples / "samples.npz")["arr_1"]
        net = harness.get_backbone(BACKBONE).build(input_size=8, in_channels=1, num_classes=10)
        self.state = {name: each.detach().clone() for name, each in net.state_dict().items()}
        save_file(self.state, folder / "bare.safetensors")
        torch.save(self.state, folder / "bare.pt")
        torch.save({"model": self.state, "ema": self.state, "opt": {}}, folder / "both.pt")
        torch.save(
            {"state_dict": self.state, "ema": {"shadow_params": list(self.state.values())}}, folder / "list.ckpt"
        )
        np.savez(folder / "weights.npz", **{name: each.numpy() for name, each in self.state.items()})
        np.savez(folder / "stored.npz", arr_0=self.images, arr_1=self.labels)
        np.savez_compressed(folder / "deflated.npz", self.images, self.labels)
        np.savez(folder / "reference.npz", arr_0=self.images, mu=np.zeros(6), sigma=np.eye(6))
        self.bytes = {
            path.name: path.read_bytes()
            for path in folder.iterdir()
            if path.suffix in (".pt", ".npz", ".ckpt", ".safetensors")
        }
        self.records = (folder / "run" / "records.jsonl").read_text()
        self.pictures = []
        for image in self.images[:6]:
            out = io.BytesIO()
            Image.fromarray(image[..., 0]).save(out, "PNG")
            self.pictures.append(out.getvalue())


EMBEDDED = ("--suite", "tiny")
BY_HAND = ("--set", "batch=8", "--precision", "float32", "--micro-batch", 8)


@contextlib.contextmanager
def prepared():
    """A small backbone and the suites `tiny`, known by name meanwhile, as if they were built in."""
    base = registry.backbones.get("dit-xs-4")
    spec = dataclasses.replace(base, name=BACKBONE, defaults={**base.defaults, **SMALL})
    registry.backbones.register(spec, "backbone-harness")
    warned = warnings.filters[:]
    try:
        with tiny_suite.registered():
            yield
    finally:
        warnings.filters[:] = warned
        del registry.backbones._items[BACKBONE], registry.backbones._owners[BACKBONE]


SMALL = {"depth": 1, "width": 32, "heads": 2}


# Hostile text, names and places ----------------------------------------------------------------------------------------


def document(table, draw, dump=json.dumps):
    """Bytes of a document with one to three accidents in its values or in its text."""
    if draw.random() < 0.65:
        for _ in range(draw.choice((1, 1, 2, 3))):
            spots = list(places(table))
            if not spots:
                break
            spot = draw.choice(spots)
            table = draw.choice(
                (
                    lambda t, s=spot: changed(t, s, draw.choice(OTHERS)),
                    lambda t, s=spot: changed(t, s, draw.choice(OTHERS)),
                    lambda t, s=spot: changed(t, s, draw.choice([None, t, list(t), {"x": t}])),
                    lambda t, s=spot: {**t, draw.choice(["x", "", "name", "a\nb", "__class__"]): draw.choice(OTHERS)},
                )
            )(table)
            if not isinstance(table, dict):
                break
    with contextlib.suppress(UnicodeEncodeError):
        data = dump(table).encode("utf-8", "surrogatepass")
        return text_accident(data, draw)
    return b"{}"


def text_accident(data, draw):
    """The bytes of a text with an accident that texts have, or as they are."""
    kind = draw.randrange(16)
    if kind == 0:
        return b"\xef\xbb\xbf" + data
    if kind == 1:
        return data.decode("utf-8", "replace").encode(draw.choice(("utf-16", "utf-32", "utf-16-le")), "replace")
    if kind == 2:
        return data.replace(b"\n", b"\r\n") + b"\xe9\xff"
    if kind == 3:
        return data[: draw.randrange(len(data) + 1)]
    if kind == 4:
        return draw.choice((b"", b"\0" * 9, b"null", b"[]", b"1", b'"x"', b"NaN", b"{}", b"{", b"[[[]]]", b"# x\n"))
    if kind == 5:
        nested = draw.choice((b"[", b'{"a":', b"a.")) * draw.choice((50, 5_000, 200_000))
        return draw.choice((nested, b"a = " + nested, data + nested))
    if kind == 6:  # a number in it becomes a huge one
        digits = [i for i, each in enumerate(data) if chr(each).isdigit()]
        at = draw.choice(digits or [0])
        return data[:at] + draw.choice((b"9" * 30, b"9" * 5000, b"1e999", b"-1", b"0x10", b"NaN")) + data[at + 1 :]
    if kind == 7:  # a key twice
        lines = data.split(b"\n")
        at = draw.randrange(len(lines))
        return b"\n".join([*lines[:at], lines[at], *lines[at:]])
    if kind == 8:
        return mutated(data, np.random.RandomState(draw.randrange(2**31)))
    return data


def name(draw, *known):
    """A word where a name is meant."""
    word = draw.choice(known) if known else "x"
    return draw.choice(
        (
            lambda: word, lambda: word[:-1], lambda: word + word[-1:], lambda: word.upper(), lambda: f" {word} ", lambda: "",
            lambda: "-", lambda: "--", lambda: "-x", lambda: "\u00e9\u4e2d", lambda: "a\nb", lambda: "a\tb", lambda: "../" + word,
            lambda: word + "/", lambda: word + ".toml", lambda: ".toml", lambda: "x" * 5000, lambda: "\udcff" + word, lambda: "%s",
            lambda: "{0}", lambda: "[bold]x[/bold]", lambda: "[/x]", lambda: word + ":", lambda: word + ":1:2:3:4:5:6",
            lambda: ":" + word, lambda: word + "@", lambda: word + "@0", lambda: word + "@-1", lambda: word + "@1e9", lambda: "nan",
            lambda: "inf", lambda: "-1", lambda: "0", lambda: "1e400", lambda: "9" * 30, lambda: "9" * 5000, lambda: "0x10",
            lambda: "1_0", lambda: "\u0665", lambda: "1,,2", lambda: ",", lambda: "1,2,3", lambda: "=", lambda: word + "=", lambda: "=" + word,
            lambda: word + "=1", lambda: word + "==" + word, lambda: "true", lambda: "None", lambda: "*", lambda: "(", lambda: "\\",
            lambda: "$HOME", lambda: "~", lambda: "a;b", lambda: "a|b", lambda: "1x1", lambda: "0x0", lambda: "1e9x1", lambda: "4x", lambda: "0.1-0.8",
            lambda: "0.8-0.1", lambda: "1.5@0.1-", lambda: "1.5@-", lambda: "1.5@nan-1", lambda: "\x1b[31m", lambda: "\u202e" + word,
        )
    )()  # fmt: skip


def place(draw, folder, valid=None):
    """A path, as text, where a file or a folder is meant; `valid` is a file or folder of the kind that is meant."""
    (folder / "places").mkdir(exist_ok=True)
    here = folder / "places" / str(len(list((folder / "places").iterdir())))
    here.mkdir()
    path = here / f"p{draw.randrange(10**6)}"
    suffix = valid.suffix if valid is not None else draw.choice((".npz", ".json", ".png", ".toml", ".pt", ""))
    path = path.with_name(path.name + suffix)
    kind = draw.randrange(40)

    def copied(target):
        target = here / target
        if valid is None or not valid.exists():
            target.write_bytes(b"x" * draw.choice((0, 1, 5000)))
        elif valid.is_dir():
            shutil.copytree(valid, target, dirs_exist_ok=True)
        else:
            shutil.copy(valid, target)
            if valid.with_suffix(".json").exists():
                shutil.copy(valid.with_suffix(".json"), target.with_suffix(".json"))
        return str(target)

    if kind == 0:
        return str(path)
    if kind == 1:
        return str(path / "deeper" / ("x" + suffix))
    if kind == 2:
        return copied(os.fsdecode(b"\xff\xe9 name") + suffix)
    if kind == 3:
        return copied("a\nb" + suffix)
    if kind == 4:
        return str(here / ("x" * 300 + suffix))
    if kind == 5:
        return str(here) + "/x" * 3000 + suffix
    if kind == 6:
        path.symlink_to(path)
        return str(path) + draw.choice(("", "/x"))
    if kind == 7:
        other = here / "other"
        if not other.is_symlink():
            other.symlink_to(path)
        path.symlink_to(other)
        return str(path)
    if kind == 8:
        path.symlink_to(here / "nowhere")
        return str(path)
    if kind == 9:
        path.write_bytes(b"x" * draw.choice((0, 1, 5000)))
        return str(path)
    if kind == 10:
        path.mkdir()
        return str(path)
    if kind == 11:
        path.write_bytes(b"")
        return str(path / ("x" + suffix))
    if kind == 12:
        os.mkfifo(path)
        return str(path)
    if kind == 13:
        with contextlib.chdir(here), contextlib.closing(socket.socket(socket.AF_UNIX)) as door:
            door.bind(path.name)
        return str(path)
    if kind == 14:
        return draw.choice(("/dev/null", "/dev/full", "/dev/zero", "/dev/stdin", "/dev/tty", "/dev/fd/0", "/dev"))
    if kind == 15:
        return draw.choice(
            (
                "/proc/self/x",
                "/sys/x",
                "/proc/self/mem",
                "/proc/self/status",
                "/proc/self/fd",
                "/proc/1/cwd/x",
                "/sys/kernel",
            )
        )
    if kind == 16:
        return copied("plain" + suffix) + draw.choice(("/", "//", "/.", "/..", "/./"))
    if kind == 17:
        return copied(" two  words " + suffix)
    if kind == 18:
        copied("-leading" + suffix)
        return os.path.relpath(here / ("-leading" + suffix), folder)
    if kind == 19:
        return draw.choice(
            ("", ".", "..", "/", "~", "./.", "../..", "-", "--", "-x", "a/..", "//", "*", "[", "?", "**", "[!]")
        )
    if kind == 20:
        return copied("[a]*?" + suffix)
    if kind == 21:
        return copied("a=b,c@d:e" + suffix)
    if kind == 22:
        return draw.choice(("http://x/y.npz", "file:///etc/passwd", "s3://a/b", "C:\\x\\y", "\\\\a\\b", "hf://a/b"))
    if kind == 23:
        return copied("\u00e9\u4e2d\U0001f600" + suffix)
    if kind == 24:
        target = Path(copied("read-only" + suffix))
        target.chmod(0o400 if target.is_file() else 0o500)
        return str(target)
    if kind == 25:
        target = Path(copied("dark" + suffix))
        target.chmod(0)
        return str(target)
    if kind == 26:
        return str(here / "*") + suffix
    if kind == 27:
        return copied("up" + suffix.upper())
    if kind == 28:
        return copied("twice" + suffix + suffix)
    if kind == 29:
        return copied("other" + draw.choice((".txt", ".zip", ".gz", ".tar", ".npy", ".jpg", ".pb", "")))
    if kind == 30:
        return os.path.relpath(copied("relative" + suffix), folder)
    if kind == 31:
        return "../" * 40 + copied("root" + suffix).lstrip("/")
    if kind == 32:
        with path.open("wb") as file:
            file.truncate(draw.choice((1 << 20, 1 << 40)))  # a hole
        return str(path)
    if kind == 33:
        Path(copied("target" + suffix))
        path.symlink_to("target" + suffix)
        return str(path)
    return copied("good" + suffix)


# Inputs, by kind: words of a command, or a function of the Python interface --------------------------------------------


class Case:
    """One input: the files in `folder`, and what is called. may_change: names in the folder that are a command's to write."""

    def __init__(self, world, folder, draw):
        self.world, self.folder, self.draw = world, folder, draw
        self.words, self.call, self.may_change = (), None, set()

    def write(self, file, data):
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def samples(self, file="samples.npz", sidecar=True):
        shutil.copy(self.world.samples / "samples.npz", self.folder / file)
        if sidecar:
            shutil.copy(self.world.samples / "samples.json", (self.folder / file).with_suffix(".json"))
        return self.folder / file

    def run(self):
        shutil.copytree(self.world.folder / "run", self.folder / "run")
        self.may_change.add("run")
        return self.folder / "run"

    def rs(self):
        return np.random.RandomState(self.draw.randrange(2**31))


def of_places(case):
    draw, folder = case.draw, case.folder
    protocol = case.write("protocols/mine.toml", toml(PROTOCOL).encode())
    system = case.write("systems/tiny.toml", toml({**SYSTEM, "weak": None}).encode())
    study = case.write("studies/mine.toml", toml(STUDY).encode())
    samples, data = case.samples(), case.folder / "stored.npz"
    shutil.copy(case.world.folder / "stored.npz", data)
    pictures = folder / "pictures"
    for i, picture in enumerate(case.world.pictures):
        case.write(f"pictures/{i % 2}/{i}.png", picture)
    bare = folder / "bare.safetensors"
    shutil.copy(case.world.folder / bare.name, bare)

    def at(valid=None):
        return place(draw, folder, valid)

    run = case.run() if draw.random() < 0.35 else folder / "no-run"
    evaluate = ("evaluate", samples, *EMBEDDED)
    sample = (
        "sample",
        "--system",
        system,
        "--weights",
        f"base={bare}",
        "--samples",
        2,
        "--sampling-steps",
        1,
        "--device",
        "cpu",
    )
    train = (
        "train", "--backbone", BACKBONE, "--steps", 1, "--set", "batch=2", "--precision", "float32", "--micro-batch", 2,
        "--device", "cpu",
    )  # fmt: skip
    good = str(folder / "out")
    case.words = draw.choice(
        (
            lambda: ("evaluate", "--suite", "tiny", "--out", good, "--", at(samples)),
            lambda: ("evaluate", "--suite", "tiny", "--out", good, "--", at(pictures)),
            lambda: ("evaluate", at(samples), "--suite", "tiny"),
            lambda: (*evaluate, "--protocol", at(protocol)),
            lambda: (*evaluate, "--data", at(data), "--protocol", protocol),
            lambda: (*evaluate, "--reference", at(data)),
            lambda: (*evaluate, "--features-weights", at(bare)),
            lambda: ("evaluate", samples, "--suite", "adm", "--inception", at(bare), "--reference", data),
            lambda: (*evaluate, "--out", at()),
            lambda: (*evaluate, "--cache", at(), "--out", good),
            lambda: (*evaluate, "--neighbours", at(), "--out", good),
            lambda: ("sample", "--run", at(run)),
            lambda: ("sample", "--run", run, "--samples", 100, "--sampling-steps", 2, "--out", at()),
            lambda: (*sample[:2], at(system), *sample[3:], "--out", good),
            lambda: (*sample[:4], f"base={at(bare)}", *sample[5:], "--out", good),
            lambda: (*sample[:4], f"base={at(run)}", *sample[5:], "--out", good),
            lambda: (*sample, "--out", at()),
            lambda: ("sample", "--run", run, "--decoder", at()),
            lambda: (*train, "--out", at()),
            lambda: (*train, "--out", good, "--data", at(data), "--protocol", protocol),
            lambda: (*train, "--out", good, "--protocol", at(protocol)),
            lambda: (*train, "--out", good, "--fork", at(run)),
            lambda: ("plan", "--backbone", BACKBONE, "--protocol", protocol, "--data", at(data), "--device", "meta"),
            lambda: ("plan", "--budget", "1e6", "--protocol", at(protocol)),
            lambda: ("compare", at(run), at(run)),
            lambda: ("compare", run, at(run / "records.jsonl")),
            lambda: ("report", "--results", at(run), "--protocol", "none-of-them", "--out", at(pictures)),
            lambda: ("weights", "inspect", at(bare)),
            lambda: ("weights", "inspect", at(pictures), "--json"),
            lambda: ("weights", "import", at(bare), "--out", good),
            lambda: ("weights", "import", bare, "--out", at()),
            lambda: ("weights", "export", bare, "--format", "dit", "--out", at()),
            lambda: ("data", "prepare", "birds", "--from", at(pictures), "--out", good, "--resolution", 8),
            lambda: ("data", "prepare", "birds", "--from", pictures, "--out", at(), "--resolution", 8),
            lambda: ("data", "prepare", "imagenet", "--from", at(), "--out", at(pictures)),
            lambda: ("data", "reference", at(pictures), "--suite", "tiny", "--out", good + ".npz"),
            lambda: ("data", "reference", at(samples), "--suite", "tiny", "--out", good + ".npz"),
            lambda: ("data", "reference", samples, "--suite", "tiny", "--out", at()),
            lambda: ("data", "reference", samples, "--suite", "tiny", "--out", good + ".npz", "--cache", at()),
            lambda: ("data", "latents", at(data), "--vae", at(), "--out", at()),
            lambda: ("data", "verify", at(data)),
            lambda: ("data", "verify", at(pictures)),
            lambda: ("data", "fetch", "inception", "--url", "file:///nowhere", "--out", at()),
            lambda: ("study", at(study), "--status"),
            lambda: ("flops", BACKBONE, "--protocol", at(protocol)),
            lambda: ("new", "my-net", "--out", at()),
            lambda: ("check", BACKBONE, "--protocol", at(protocol)) if draw.random() < 0.1 else ("new", "n", "--out", at(pictures)),
            lambda: ("bench", "--backbone", BACKBONE, "--stages", "none", "--out", at()),
        )
    )()  # fmt: skip


def of_names(case):
    draw = case.draw
    known = (
        "dit-xs-2", BACKBONE, "dit-xl-2", "digits", "imagenet-256", "ddpm", "ddim", "heun", "dopri5", "edm-stochastic", "embedded", "tiny",
        "adm", "fd", "karras", "learning_rate", "objective", "ema_decay", "sit", "cpu", "dit-xl-2-256-cfg1.5", "adm-g-256", "pixels",
        "1.5", "400k", "7M", "10:10:20", "shift:3", "4x8", "0.05:0.10",
    )  # fmt: skip

    def some(*words):
        return name(draw, *(words or known))

    plan = ("plan", "--backbone", BACKBONE, "--device", "meta")
    options = (
        "--protocol", "--steps", "--match", "--budget", "--seed", "--set", "--sampling-steps", "--samples", "--sampler", "--eta", "--spacing",
        "--ema-width", "--cfg", "--guidance-channels", "--labels", "--sampling-seed", "--sampling-precision", "--match-sampling",
        "--precision", "--compile", "--micro-batch", "--device", "--mesh", "--framework", "--out", "--data",
    )  # fmt: skip
    setting = f"{some('learning_rate', 'objective', 'schedule', 'batch', 'loss_weight', 'time_distribution', 'ema_widths', 'ema_decay', 'diffusion_steps', 'steps')}={some('1', 'sit', 'linear', 'min-snr:5', 'logit-normal:0:1', '0.05:0.10', 'flow')}"
    case.words = draw.choice(
        (
            lambda: (*plan, draw.choice(options), some()),
            lambda: (*plan, draw.choice(options), some(), draw.choice(options), some()),
            lambda: (*plan, "--set", setting),
            lambda: (*plan, "--set", "objective=sit", "--sampler", some("heun", "euler-maruyama:sbdm:tweedie", "dopri5"), "--spacing", some()),
            lambda: (*plan, "--cfg", some("1.5", "1.5@0.1-0.8", "2:rule@1-2")),
            lambda: ("plan", "--backbone", some()),
            lambda: ("plan", "--budget", some("1e6")),
            lambda: ("plan", "--match", some(f"{BACKBONE}@8")),
            lambda: ("sample", "--system", some("dit-xl-2-256-cfg1.5", "digits-cascade")),
            lambda: ("sample", "--system", some("digits-guided"), "--weights", some("base=x", "classifier=x")),
            lambda: ("sample", "--run", case.run(), draw.choice(("--step", "--sampler", "--spacing", "--cfg", "--samples", "--eta", "--sampling-seed", "--ema-width", "--labels", "--batch", "--framework", "--device", "--decoder", "--entry", "--compile")), some("2", "20", "ddim")),
            lambda: ("sample", "--run", case.run(), "--sampling-steps", 2, "--classes", some("1", "1,2"), "--grid", some("1x2", "2x2")),
            lambda: ("evaluate", case.samples(), *EMBEDDED, draw.choice(("--name", "--allow", "--device", "--backend", "--protocol", "--suite")), some()),
            lambda: ("evaluate", case.samples(sidecar=False), "--suite", some("tiny", "embedded:fd", "pixels:fd,kid", "tiny:fd")),
            lambda: ("evaluate", case.samples(sidecar=False), *EMBEDDED, "--name", some()),
            lambda: ("compare", some(), some(), "--step", some("2")),
            lambda: ("report", "--protocol", some(), "--results", some()),
            lambda: ("list", some("backbones", "systems")),
            lambda: ("flops", some(), some()),
            lambda: ("flops", BACKBONE, "--protocol", some("digits"), "--check", some("fvcore")),
            lambda: ("check", some("nothing")),
            lambda: ("check", BACKBONE, draw.choice(("--framework", "--protocol")), some("x")),
            lambda: ("new", some("my-net"), "--framework", some("torch", "torch,jax"), "--out", "made"),
            lambda: ("new", some("my-net", "class", "torch", "harness")),
            lambda: ("weights", "inspect", shutil.copy(case.world.folder / "both.pt", case.folder), "--entry", some("model", "ema")),
            lambda: ("weights", "inspect", shutil.copy(case.world.folder / "bare.pt", case.folder), "--backbone", some()),
            lambda: ("weights", "export", shutil.copy(case.world.folder / "bare.pt", case.folder), "--format", some("dit", "diffusers", "ldm"), "--out", "made"),
            lambda: ("data", "prepare", some("birds"), "--from", some(), "--out", some(), "--resolution", some("8")),
            lambda: ("data", "reference", some("digits"), "--suite", some("tiny"), "--out", some("made.npz"), "--images", some("5"), "--seed", some("1")),
            lambda: ("data", "fetch", name(draw, "zzz", "yyy")),
            lambda: ("study", case.write("mine.toml", toml(STUDY).encode()), "--status", "--jobs", some("1")),
            lambda: ("study", case.write("mine.toml", toml(STUDY).encode()), "--status", "--launcher", some("local", "slurm"), "--slurm", some("time=1", "partition=gpu")),
            lambda: ("bench", "--stages", some("none"), "--backbone", some()),
            lambda: (some("run", "plan", "list"), some(), some()),
            lambda: ("data", some("verify", "prepare"), some()),
        )
    )()  # fmt: skip


def of_sidecars(case):
    draw = case.draw
    path = case.samples()
    sidecar = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_bytes(document(sidecar, draw))
    if draw.random() < 0.6:
        case.words = ("evaluate", path, *EMBEDDED, "--out", case.folder / "r.jsonl")
        return
    run = case.run()
    shutil.copy(path.with_suffix(".json"), run / "samples" / case.world.samples.name / "samples.json")
    case.words = draw.choice(
        (
            ("sample", "--run", run, "--samples", 100, "--sampling-steps", 2),
            ("evaluate", run / "samples" / case.world.samples.name, *EMBEDDED),
            ("evaluate", run, *EMBEDDED),
            ("compare", run, run),
        )
    )


def of_runs(case):
    draw, run = case.draw, case.run()
    step = run / "checkpoints" / "step-00000002"
    file = draw.choice(
        (run / "run.json", run / "run.json", step / "state.json", run / "snapshots" / step.name / "state.json")
    )
    file.write_bytes(document(json.loads(file.read_text()), draw))
    if draw.random() < 0.2:
        other = draw.choice([each for each in run.rglob("*") if each.is_file()])
        other.write_bytes(mutated(other.read_bytes(), case.rs()))
    if draw.random() < 0.1:
        (run / "log.jsonl").write_bytes(text_accident((run / "log.jsonl").read_bytes(), draw))
    case.words = draw.choice(
        (
            ("sample", "--run", run, "--samples", 100, "--sampling-steps", draw.choice((1, 2))),
            ("sample", "--run", run, "--classes", "1", "--grid", "1x2", "--sampling-steps", 1),
            ("evaluate", run / "samples" / case.world.samples.name, *EMBEDDED),
            ("compare", run, run),
            ("report", "--results", run, "--protocol", "none-of-them"),
            ("train", "--backbone", BACKBONE, "--steps", 2, "--set", "batch=8", "--precision", "float32", "--micro-batch", 8, "--device", "cpu", "--out", run),
            ("train", "--backbone", BACKBONE, "--steps", 3, "--set", "batch=8", "--device", "cpu", "--out", run),
            ("train", "--backbone", BACKBONE, "--steps", 3, "--set", "batch=8", "--device", "cpu", "--out", "other", "--fork", run),
            ("sample", "--system", case.write("tiny.toml", toml({**SYSTEM, "weak": None}).encode()), "--weights", f"base={run}", "--samples", 2, "--device", "cpu"),
            ("weights", "inspect", run / "snapshots" / step.name / "ema.safetensors"),
            ("data", "verify", run),
        )
    )  # fmt: skip


def of_records(case):
    draw = case.draw
    lines = []
    for line in case.world.records.splitlines():
        for seed in range(draw.choice((1, 1, 3))):
            table = json.loads(line)
            if seed:
                table["training"] = {**(table.get("training") or {}), "seed": seed}
                table["value"] = draw.random()
                table.pop("id", None)
            elif draw.random() < 0.5:
                lines.append(line.encode())
            lines.append(document(table, draw, lambda each: json.dumps(each, separators=(",", ":"))))
    data = b"\n".join(lines) + draw.choice((b"\n", b"", b"\n\n", b"\r\n", b'{"'))
    path = case.write("a/records.jsonl", data)
    other = case.write("b/records.jsonl", case.world.records.encode())
    case.words = draw.choice(
        (
            ("compare", path, other), ("compare", path.parent, other.parent), ("compare", path, path, "--json"),
            ("evaluate", case.samples(), *EMBEDDED, "--out", path),
        )
    )  # fmt: skip
    case.may_change.add("a/records.jsonl")  # a torn last line is cut off, on purpose
    if draw.random() < 0.3:
        case.call = lambda: harness.load_records(str(path))


def of_toml(case):
    draw = case.draw
    kind = draw.choice(("protocol", "study", "system"))
    table = {"protocol": PROTOCOL, "study": STUDY, "system": SYSTEM}[kind]
    if kind == "system" and draw.random() < 0.6:
        table = {key: value for key, value in table.items() if key != "weak"}
    path = case.write("mine.toml", document(table, draw, toml))
    shutil.copy(case.world.folder / "stored.npz", case.folder)
    shutil.copy(case.world.folder / "bare.safetensors", case.folder)
    case.words = {
        "protocol": draw.choice(
            (
                ("plan", "--backbone", BACKBONE, "--protocol", path, "--data", "stored.npz", "--device", "meta"),
                ("plan", "--budget", "1e3", "--protocol", path),
                ("flops", BACKBONE, "--protocol", path),
                ("evaluate", case.samples(sidecar=draw.random() < 0.3), "--protocol", path, "--data", "stored.npz"),
                ("train", "--backbone", BACKBONE, "--protocol", path, "--data", "stored.npz", "--steps", 1, "--device", "cpu", "--precision", "float32", "--micro-batch", 8)
                if draw.random() < 0.2
                else ("check", "nothing", "--protocol", path),
            )
        ),
        "study": draw.choice((("study", path, "--status"), ("study", path, "--status", "--json"), ("study", path, "--report"))),
        "system": ("sample", "--system", path, "--weights", "base=bare.safetensors", "--weights" if "weak" in table else "--samples", "weak=bare.safetensors" if "weak" in table else 2, "--samples", 2, "--sampling-steps", 1, "--device", "cpu"),
    }[kind]  # fmt: skip


def of_checkpoints(case):
    draw, torch = case.draw, case.world.torch
    kind = draw.randrange(10)
    if kind < 4:
        file = draw.choice(("bare.safetensors", "bare.pt", "both.pt", "list.ckpt", "weights.npz"))
        data = case.world.bytes[file]
        if file.endswith(".safetensors") and draw.random() < 0.5:
            size = int.from_bytes(data[:8], "little")
            header = document(json.loads(data[8 : 8 + size]), draw)
            data = (
                (len(header) if draw.random() < 0.9 else draw.choice((0, 1 << 62, 5))).to_bytes(8, "little")
                + header
                + data[8 + size :]
            )
        else:
            data = mutated(data, case.rs())
        path = case.write(file, data)
    else:
        state = dict(case.world.state)
        for _ in range(draw.choice((0, 1, 1, 2))):
            key = draw.choice(list(state))
            state[key] = _damaged(state[key], draw, torch)
        prefix = draw.choice(
            ("", "", "module.", "_orig_mod.", "model.", "a.b.c.", "module.module.model.", "ema.", ".", "\u00e9.")
        )
        state = {prefix + key: value for key, value in state.items()}
        if draw.random() < 0.2:
            del state[draw.choice(list(state))]
        if draw.random() < 0.2:
            state[draw.choice(("x", 1, None, ("a",), b"b", "pos_embed.x", "", "\0"))] = torch.zeros(2)
        nested = draw.choice(
            (
                lambda: state, lambda: {"model": state}, lambda: {"model": state, "ema": state}, lambda: {"ema": {"shadow": state, "decay": 1}},
                lambda: {"a": {"b": {"c": {"d": state}}}}, lambda: [state, state], lambda: (state,), lambda: list(state.values()),
                lambda: {"ema": {"shadow_params": list(state.values())}, "model": None}, lambda: {"state_dict": state, "state_dict_ema": {}},
                lambda: {1: state, "ema": [1, 2]}, lambda: {"model": {**state, "self": 1}, "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
                lambda: {"ema_model": state, "model_ema": state, "ema": state}, lambda: torch.zeros(3), dict, lambda: None, lambda: _cycle(state),
            )
        )()  # fmt: skip
        path = case.folder / draw.choice(("a.pt", "a.ckpt", "a.bin", "a.pth", "a.safetensors"))
        if path.suffix == ".safetensors" or draw.random() < 0.1:
            from safetensors.torch import save_file

            tensors = {str(key): value.contiguous().clone() for key, value in state.items() if _plain(value)}
            try:
                save_file(tensors, path)
            except Exception:
                torch.save(nested, path)
        else:
            torch.save(nested, path, _use_new_zipfile_serialization=draw.random() < 0.8)
        if draw.random() < 0.1:
            path.write_bytes(mutated(path.read_bytes(), case.rs()))
    if draw.random() < 0.1:  # a folder of parts
        shutil.copy(path, case.folder / "model-00001-of-00002.safetensors")
        index = {
            "metadata": {"total_size": 1},
            "weight_map": dict.fromkeys(case.world.state, "model-00001-of-00002.safetensors"),
        }
        folder = case.folder / "parts"
        folder.mkdir()
        shutil.copy(path, folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_bytes(document(index, draw))
        path = draw.choice((folder, folder / "model.safetensors.index.json"))
    system = case.write("tiny.toml", toml({**SYSTEM, "weak": None}).encode())
    backbone = draw.choice(((), ("--backbone", BACKBONE), ("--backbone", BACKBONE), ("--backbone", "adm-xs")))
    case.words = draw.choice(
        (
            ("weights", "inspect", path, *backbone), ("weights", "inspect", path, *backbone, "--json"),
            ("weights", "import", path, *backbone, "--out", "made"),
            ("weights", "export", path, *backbone, "--format", draw.choice(("dit", "diffusers", "guided-diffusion")), "--out", "made"),
            ("sample", "--system", system, "--weights", f"base={path}", "--samples", 2, "--sampling-steps", 1, "--device", "cpu"),
            ("sample", "--system", system, "--weights", f"base={path}", "--samples", 2, "--sampling-steps", 1, "--device", "cpu"),
            ("data", "verify", path),
            ("evaluate", case.samples(), "--suite", "adm", "--inception", path, "--reference", "samples.npz"),
            ("evaluate", case.samples(), "--suite", "embedded:fd", "--features-weights", path),
        )
    )  # fmt: skip


def _damaged(tensor, draw, torch):
    """The tensor in another dtype, shape or form, or something else instead of it."""
    return draw.choice(
        (
            lambda: tensor.to(
                draw.choice(
                    (torch.float64, torch.int32, torch.bool, torch.complex64, torch.bfloat16, torch.float8_e4m3fn)
                )
            ),
            lambda: tensor[None],
            lambda: tensor.reshape(-1),
            lambda: tensor[:0],
            lambda: tensor.sum(),
            lambda: torch.full_like(tensor, float("nan")),
            lambda: tensor.to_sparse() if tensor.ndim == 2 else tensor,
            lambda: tensor.expand(1, *tensor.shape),
            lambda: torch.nn.Parameter(tensor),
            lambda: tensor.to("meta"),
            lambda: draw.choice((None, 1, "x", [], {}, tensor.numpy(), b"x", (tensor, tensor))),
        )
    )()


def _plain(value):
    torch = sys.modules["torch"]
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
    )


def _cycle(state):
    table = {"model": dict(state)}
    table["self"] = table
    return table


def of_npz(case):
    draw = case.draw
    images, labels = case.world.images, case.world.labels
    kind = draw.randrange(8)
    if kind < 3:
        file = draw.choice(("stored.npz", "deflated.npz", "reference.npz"))
        path = case.write(file, mutated(case.world.bytes[file], case.rs()))
    else:
        images = draw.choice(
            (
                images, images, images.astype(draw.choice(("f4", "f8", "i8", "?", ">u2", "S3", "c8", "M8[s]"))), images[:, :0], images[:0],
                images[:1], images[..., 0], images[None], images.transpose(0, 3, 1, 2), np.repeat(images, draw.choice((2, 3, 4)), axis=3), images.T,
                np.zeros((), "u1"), np.array([None]), np.zeros_like(images), images[:, ::-1], np.asfortranarray(images),
                np.zeros(3, [("a", "u1")]), np.tile(images, (1, draw.choice((2, 50)), 2, 1)), images // 255,
            )
        )  # fmt: skip
        labels = draw.choice(
            (
                labels, labels, labels.astype("f4"), labels + 1, labels - 5, labels[:3], labels[:, None], labels.astype("U3"), labels * 2**40,
                labels * np.nan, labels.astype("?"), np.array(3), np.array([None] * len(labels)), np.zeros((0,), "i8"), labels.astype("u8"),
            )
        )  # fmt: skip
        arrays = {"arr_0": images, "arr_1": labels}
        if draw.random() < 0.3:
            arrays.pop(draw.choice(list(arrays)))
        if draw.random() < 0.3:
            d = draw.choice((1, 6, 6, 6, 7, 0))
            arrays["mu"] = draw.choice(
                (np.zeros(d), np.full(d, np.nan), np.zeros((d, 1)), np.zeros(d, "f2"), np.array("x"), np.full(d, 1e308))
            )
            arrays["sigma"] = draw.choice((np.eye(d), -np.eye(d), np.full((d, d), np.inf), np.eye(d)[None], np.eye(d, dtype="c8"), np.triu(np.ones((d, d))), np.eye(d) * 1e300))  # fmt: skip
        if draw.random() < 0.1:
            arrays[draw.choice(("x", "arr_2", "meta", "mu_s", "../x"))] = np.zeros(2)
        path = case.folder / draw.choice(("s.npz", "s.npz", "s.npz", "s.npy"))
        if path.suffix == ".npy":
            np.save(path, images, allow_pickle=True)
        else:
            draw.choice((np.savez, np.savez_compressed))(path, **arrays)
    samples = case.samples("good.npz")
    protocol = case.write("mine.toml", toml(PROTOCOL).encode())
    case.words = draw.choice(
        (
            ("evaluate", path, *EMBEDDED), ("evaluate", path, *EMBEDDED, "--reference", samples), ("evaluate", path, *EMBEDDED, "--reference", path),
            ("evaluate", samples, *EMBEDDED, "--reference", path), ("evaluate", samples, "--suite", "tiny:fd", "--reference", path, "--json"),
            ("evaluate", path, *EMBEDDED, "--neighbours", "n.png"), ("data", "reference", path, "--suite", "tiny", "--out", "made.npz"),
            ("data", "verify", path), ("data", "reference", path, "--suite", "tiny", "--out", "made.npz", "--images", "3"),
            ("plan", "--backbone", BACKBONE, "--protocol", protocol, "--data", path, "--device", "meta"),
            ("evaluate", samples, *EMBEDDED, "--protocol", protocol, "--data", path),
            ("data", "prepare", "x", "--from", path, "--out", "made", "--resolution", 8), ("data", "latents", path, "--vae", "nowhere", "--out", "made"),
        )
    )  # fmt: skip
    if draw.random() < 0.1:
        case.call = lambda: harness.evaluate_images(
            _batches(draw, images), draw.choice(("digits", "tiny", 3)), name="x", config=tiny()
        )


def _batches(draw, images):
    return draw.choice(
        (iter([images]), iter([]), images, [images, None], iter([images[:2], images[..., :0]]), None, "x")
    )


def of_folders(case):
    draw, folder = case.draw, case.folder / "tree"
    folder.mkdir()
    for _ in range(draw.choice((0, 1, 2, 3))):
        top = draw.choice(("0", "1", "2", "007", "a", "__MACOSX", "lost+found", "@eaDir", ".hidden", "cache", "-1", "1.5", " ", "\u00e9", os.fsdecode(b"\xff"), "a\nb", "n01440764", "9" * 30))  # fmt: skip
        (folder / top).mkdir(exist_ok=True)
    for i in range(draw.choice((0, 1, 3, 8))):
        within = draw.choice([folder, *(each for each in folder.iterdir() if each.is_dir())])
        stem = draw.choice(
            (f"{i}", f"x{i}", "._x", f" {i}", os.fsdecode(b"\xe9") + str(i), f"a\n{i}", f"-{i}", "9" * 200 + str(i))
        )
        path = within / (
            stem
            + draw.choice(
                (
                    ".png",
                    ".png",
                    ".png",
                    ".PNG",
                    ".jpg",
                    ".bmp",
                    ".gif",
                    ".tif",
                    ".jfif",
                    ".txt",
                    ".json",
                    ".npz",
                    ".tar",
                    ".cls",
                    "",
                )
            )
        )
        kind = draw.randrange(14)
        with contextlib.suppress(FileExistsError):
            if kind == 0:
                path.symlink_to(draw.choice((path, "/nowhere", "..", "/dev/zero")))
            elif kind == 1:
                os.mkfifo(path)
            elif kind == 2:
                path.mkdir()
            elif kind == 3:
                path.write_bytes(b"")
            elif kind in (4, 5):
                path.write_bytes(mutated(draw.choice(case.world.pictures), case.rs()))
            elif kind == 6:
                out = io.BytesIO()
                mode = draw.choice(("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "HSV"))
                with contextlib.suppress(OSError, ValueError, KeyError):
                    Image.new(mode, draw.choice(((8, 8), (8, 9), (1, 1), (1, 3000), (0, 4)))).save(
                        out, draw.choice(("PNG", "TIFF", "GIF", "BMP", "JPEG", "WEBP"))
                    )
                path.write_bytes(out.getvalue())
            else:
                path.write_bytes(draw.choice(case.world.pictures))
    if draw.random() < 0.1:
        for each in folder.iterdir():
            if not each.is_symlink():
                each.chmod(draw.choice((0, 0o400, 0o755)))
    target = folder
    if draw.random() < 0.25:  # the same in a tar
        import tarfile

        target = case.folder / "tree.tar"
        form = draw.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
        with tarfile.open(target, "w", format=form) as archive, contextlib.suppress(OSError, UnicodeError):
            archive.add(folder, draw.choice(("tree", ".", "", "../x", "/x")))
        if draw.random() < 0.5:
            target.write_bytes(mutated(target.read_bytes(), case.rs()))
    samples = case.samples("good.npz", sidecar=False)
    case.words = draw.choice(
        (
            ("evaluate", target, *EMBEDDED, "--out", "r.jsonl"), ("evaluate", target, *EMBEDDED, "--protocol", "digits"), ("evaluate", samples, *EMBEDDED, "--reference", target),
            ("data", "reference", target, "--suite", "tiny", "--out", "made.npz"), ("data", "prepare", "x", "--from", target, "--out", "made", "--resolution", 8),
            ("data", "prepare", "imagenet", "--from", target, "--out", "made", "--resolution", 8), ("data", "verify", target), ("compare", target, target),
            ("evaluate", folder / "*.png", *EMBEDDED), ("weights", "inspect", target), ("report", "--results", target, "--protocol", "none-of-them", "--out", "page"),
        )
    )  # fmt: skip


def of_python(case):
    """The Python interface with values of other types."""
    draw = case.draw
    things = [
        *OTHERS, b"x", Path("x"), Path("a\0b"), 1 + 2j, object(), int, lambda: 1, iter([1]), {1, 2}, np.float32(3), np.int64(2),
        np.array([1, 2]), np.nan, range(3), "1,2", ("a", 1), [Path()], {"a": None}, {1: 2}, "digits", BACKBONE, "ddim", "2", np.zeros((2, 8, 8, 1), "u1"),
    ]  # fmt: skip

    def some():
        return draw.choice(things)

    def some_but_none():  # None: the suite of the protocol, whose network takes its time
        return draw.choice([each for each in things if each is not None])

    samples = case.samples()
    shared = {"backbone": BACKBONE, "device": "meta"}
    names = ("protocol", "steps", "match", "budget", "seed", "data", "framework", "settings", "precision", "compile", "micro_batch", "device", "mesh", "out", "sampling_steps", "samples", "sampler", "eta", "spacing", "ema_width", "cfg", "guidance_channels", "labels", "sampling_seed", "match_sampling")  # fmt: skip
    case.call = draw.choice(
        (
            lambda: harness.plan(**{**shared, draw.choice(names): some()}),
            lambda: harness.plan(**{**shared, draw.choice(names): some(), draw.choice(names): some()}),
            lambda: harness.plan(backbone=some()),
            lambda: harness.train(**{**shared, draw.choice(("loggers", "logger", "fork", "gradient_checkpointing", "protocol", "data", "seed")): some()}),
            lambda: harness.sample(run=some()),
            lambda: harness.sample(system=some(), weights=some()),
            lambda: harness.sample(system="digits-guided", weights={some_key(draw): some()}),
            lambda: harness.evaluate(some(), suite="tiny"),
            lambda: harness.evaluate(samples, suite=some_but_none()),
            lambda: harness.evaluate(samples, suite="tiny", **{draw.choice(("protocol", "data", "reference", "features_weights", "backend", "device", "name", "out", "cache", "neighbours", "allow")): some()}),
            lambda: harness.evaluate_images(some(), "digits", name="x", config=tiny()),
            lambda: harness.evaluate_images(iter([case.world.images]), "digits", some(), name="x", config=tiny()),
            lambda: harness.evaluate_images(iter([case.world.images]), "digits", name="x", config=some_but_none()),
            lambda: harness.evaluate_images(iter([case.world.images]), some(), name="x", config=tiny()),
            lambda: harness.evaluate_images(iter([case.world.images]), "digits", name=some(), config=tiny()),
            lambda: harness.evaluate_images(iter([case.world.images]), "digits", name="x", config=tiny(), count=some()),
            lambda: harness.evaluate_images(iter([case.world.images, some()]), "digits", name="x", config=tiny()),
            lambda: harness.evaluate_images(iter([case.world.images]), "digits", name="x", config=tiny(), labels=some()),
            lambda: harness.compare(some(), some()),
            lambda: harness.compare(samples, samples, step=some()),
            lambda: harness.report(results=some(), protocol="none-of-them"),
            lambda: harness.load_records(some()),
            lambda: harness.get_backbone(some()),
            lambda: harness.get_protocol(some()),
            lambda: harness.register_backbone(some()),
            lambda: harness.get_backbone(BACKBONE).count(**{draw.choice(("input_size", "in_channels", "num_classes", "depth", "x")): some()}),
            lambda: harness.get_backbone(BACKBONE).build("torch", **{draw.choice(("input_size", "in_channels", "num_classes", "depth", "x")): draw.choice((1, 3, "x", None, -1, [], 0.5))}),
            lambda: harness.get_backbone(BACKBONE).build(some()),
        )
    )  # fmt: skip
    case.loose = True


def some_key(draw):
    return draw.choice(("base", "classifier", "x", "", 1, None))


KINDS = {
    "places": (of_places, 22), "names": (of_names, 16), "sidecars": (of_sidecars, 9), "runs": (of_runs, 7), "records": (of_records, 8),
    "toml": (of_toml, 11), "checkpoints": (of_checkpoints, 11), "npz": (of_npz, 9), "folders": (of_folders, 5), "python": (of_python, 9),
}  # fmt: skip


# Calling, and what is found --------------------------------------------------------------------------------------------


def command(*words):
    """(exit code, stdout, stderr) of `harness WORDS` in this process. Whatever is no exit is raised."""
    from harness.cli import main

    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    argv, code = sys.argv, 0
    sys.argv = ["harness", *map(str, words)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.argv = argv
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8", "replace"))
    return code, *texts


def contents(folder):
    """What lies below a folder, and its content: nothing that exists may change."""
    found = {}
    for path in [Path(top) / each for top, dirs, names in os.walk(folder) for each in (*dirs, *names)]:
        mode = path.lstat()
        if stat.S_ISREG(mode.st_mode):
            with path.open("rb") as file:
                content = hashlib.sha256(file.read(1 << 20)).hexdigest()
            found[path.relative_to(folder)] = (mode.st_mode, mode.st_size, content)
        else:
            found[path.relative_to(folder)] = (mode.st_mode, str(path.readlink()) if path.is_symlink() else None)
    return found


@contextlib.contextmanager
def patience(seconds):
    """TooSlow after so many seconds of computing in the block, or ROUNDS times as many of waiting: others may compute, too."""
    begun, rounds = time.process_time(), 0

    def alarm(*_):
        nonlocal rounds
        rounds += 1
        if rounds == ROUNDS or time.process_time() - begun > seconds:
            raise TooSlow(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def attempt(world, folder, kind, seed, i):
    """None, or (where, text) of what input i of that seed shows; and the outcome in a word."""
    draw = random.Random(f"{seed}-{i}")
    case = Case(world, folder, draw)
    with contextlib.chdir(folder):
        try:
            KINDS[kind][0](case)
        except (MemoryError, OSError, OverflowError):  # this machine does not make it
            return None, "not made"
        before = contents(folder)
        os.environ["HARNESS_CACHE"] = str(folder.parent / "cache")
        filters = warnings.filters[:]

        said = f"{kind}: {' '.join(map(str, case.words))}" if case.call is None else f"{kind}: a call"
        finding, outcome = None, "done"
        try:
            if case.call is not None:
                quiet = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()))
                with patience(PATIENCE), quiet[0], quiet[1]:
                    try:
                        case.call()
                    except (UserError, RunError) as error:
                        outcome = "refused"
                        if "\n" in str(error):
                            finding = ("more than a line", f"{said}: {error}")
                    except TypeError as error:
                        outcome = "refused"
                        if not _at_the_door(error):
                            raise
            else:
                with patience(PATIENCE):
                    code, _, text = command(*case.words)
                outcome = f"exit {code}"
                lines = [each for each in text.splitlines() if each.strip()]
                if code not in (0, 1, 2):
                    finding = (f"exit code {code}", f"{said}: {text[-300:]}")
                elif code and not lines:
                    finding = ("nothing said", said)
                elif "Traceback" in text:
                    finding = ("traceback in the output", f"{said}: {text[-600:]}")
                elif unseen := [each for each in lines if "Warning: " in each and ".py:" in each]:
                    finding = (f"a warning of Python: {unseen[0].split('.py:')[1][-80:]}", f"{said}: {unseen[0]}")
                elif code and "Usage:" not in text and not lines[-1].startswith("harness: ") and "harness: " in text:
                    finding = ("more than a line", f"{said}: {text[-600:]}")
                elif code == 1 and "could not be written" not in text and "disk is full" not in text:
                    finding = (f"exit code 1: {lines[-1][-60:]}", f"{said}: {lines[-1]}") if STRICT else None
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            own = [each for each in frames if _is_ours(each.filename)]
            where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "nowhere"
            shown = str(error)[:200].replace("\n", " | ")
            finding = (f"{type(error).__name__} at {where}", f"{said[:300]}: {shown}")
            if VERBOSE:
                traceback.print_exc()
        finally:
            warnings.filters[:] = filters
        after = contents(folder)
        lost = [
            path
            for path, was in before.items()
            if after.get(path) != was
            and not any(str(path) == each or str(path).startswith(f"{each}/") for each in case.may_change)
        ]
        # a folder's own mode is of no interest, and what a command appends to a record file is its purpose
        lost = [path for path in lost if path not in after or before[path][1] != 0]  # an empty file may be written to
        lost = [path for path in lost if not (path.suffix == ".jsonl" and path in after)]
        if finding is None and lost:
            finding = (f"a file of the user's is changed: {lost[0].suffix}", f"{said}: {lost[:3]}")
    return finding, outcome


STRICT, VERBOSE = False, False


def _at_the_door(error):
    """Whether Python refused the call itself: a keyword that is not known, one twice, or one that is missing."""
    ours = [each for each in traceback.extract_tb(error.__traceback__) if _is_ours(each.filename)]
    return all(Path(each.filename).name == "setting.py" for each in ours)


def _is_ours(file):
    packages = ("harness", "evaluators", "results", "reports", "backbones")
    return "/tests/" not in file and any(f"/{each}/" in file for each in packages)


def fuzz(inputs, seed, kinds=None, only=None, report=lambda *_: None):
    """(findings by where, number of outcomes by kind, the slowest input's seconds) of `inputs` inputs; `only`: of that one."""
    findings, outcomes, slowest = defaultdict(list), Counter(), (0.0, None)
    kinds = kinds or list(KINDS)
    weights = [KINDS[each][1] for each in kinds]
    cache, umask = os.environ.get("HARNESS_CACHE"), os.umask(0o022)
    levels = {each: logging.getLogger(each).level for each in ("harness", "evaluators", "results", "reports")}
    limit = resource.getrlimit(resource.RLIMIT_AS)
    stdin = os.dup(0)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as top, prepared():
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.environ["HARNESS_CACHE"] = str(Path(top) / "cache")
        (Path(top) / "world").mkdir()
        world = World(Path(top) / "world")
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limit[1]))
        try:
            for i in range(inputs) if only is None else [only]:
                kind = random.Random(f"kind-{seed}-{i}").choices(kinds, weights)[0]
                folder = Path(top) / f"case-{i}"
                folder.mkdir()
                begun = time.perf_counter()
                finding, outcome = attempt(world, folder, kind, seed, i)
                seconds = time.perf_counter() - begun
                slowest = max(slowest, (seconds, f"input {i}, {kind}"), key=lambda each: each[0])
                outcomes[kind, outcome] += 1
                if finding:
                    findings[finding[0]].append(f"input {i} of seed {seed}: {finding[1]}")
                report(i, kind, outcome, seconds, finding)
                _removed(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limit)
            os.umask(umask)
            os.dup2(stdin, 0)
            os.close(stdin)
            os.close(null)
            os.environ.pop("HARNESS_CACHE") if cache is None else os.environ.update(HARNESS_CACHE=cache)
            for each, level in levels.items():
                logging.getLogger(each).setLevel(level)
    return findings, outcomes, slowest


def _removed(folder):
    for top, dirs, _ in os.walk(folder):
        for each in dirs:
            if not (path := Path(top) / each).is_symlink():
                path.chmod(0o755)
    shutil.rmtree(folder)


def main():
    global STRICT, VERBOSE
    words = argparse.ArgumentParser()
    words.add_argument("--inputs", type=int, default=300)
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--kind", action="append")
    words.add_argument("--input", type=int)
    words.add_argument("--strict", action="store_true", help="also show what ends with exit code 1")
    given = words.parse_args()
    STRICT, VERBOSE = given.strict, given.input is not None
    begun = time.perf_counter()

    def report(i, kind, outcome, seconds, finding):
        if seconds > 5:
            print(f"slow: input {i} {kind} {outcome} {seconds:.1f} s", flush=True)
        if finding or given.input is not None:
            print(f"{i} {kind} {outcome} {finding}", flush=True)

    findings, outcomes, slowest = fuzz(given.inputs, given.seed, given.kind, given.input, report)
    for (kind, outcome), number in sorted(outcomes.items()):
        print(f"{kind:12} {outcome:10} {number}")
    print(
        f"{sum(outcomes.values())} inputs, {time.perf_counter() - begun:.0f} s, slowest {slowest[0]:.1f} s ({slowest[1]})"
    )
    for where, texts in sorted(findings.items(), key=lambda each: -len(each[1])):
        print(f"{len(texts):4} x {where}\n       {texts[0]}")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
