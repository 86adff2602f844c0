"""The digits at hand, but few: the reference's features would otherwise take most of a test's time."""

import numpy as np

from harness.data.digits import load


def write(path, count):
    """The first `count` digits as an .npz file."""
    found = load()
    np.savez(path, arr_0=found.images[:count], arr_1=found.labels[:count])


def task(name, *, suite):
    """The text of a protocol over such a file, for samples that are there: 100 of them."""
    return f"""
name = "{name}"
dataset = "npz"
resolution = 8
image_channels = 1
num_classes = 10
input_size = 8
in_channels = 1
samples = 100
suite = "{suite}"
"""


def protocol(name, *, steps):
    """The same, trained for six steps, sampled with `steps` and judged by the embedded network."""
    return f"""{task(name, suite="embedded")}
[recipe]
steps = 6
batch = 16
learning_rate = 1e-3
flip = false

[sampling]
steps = [{steps}]
clip_denoised = true
"""
