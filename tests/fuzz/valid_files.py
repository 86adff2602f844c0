"""What hostile inputs are made from: valid files of every kind, and the folder of a fuzz."""

import contextlib
import dataclasses
import io
import json
import warnings

import numpy as np
import tiny_suite
from in_process import command
from PIL import Image

import harness
from harness import registry

BACKBONE = "dit-of-fuzz"
OTHERS = [
    None, True, False, "", "x", "a\0b", "\u00e9\n", "\ud800", "%s%n", "../../x", "/", "x" * 5000, "nan", "1e400", -1, 0, 1, 3, 2**31,
    2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf"), [], [[]], [1, "a"], [-1], {}, {"a": 1},
    [{}], [None],
]  # fmt: skip


def tiny():
    """The suite `tiny`, for images of a program."""
    return harness.EvaluationConfig(suite=registry.suites.get("tiny"))


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
