"""Names, sizes and refusals of the DiT specs."""

import subprocess
import sys

import pytest

from backbones.dit.spec import BLOCKS, SIZES, SPECS
from harness.errors import UserError

BY_NAME = {spec.name: spec for spec in SPECS}


def test_every_size_patch_and_block_has_one_name():
    assert len(BY_NAME) == len(SPECS) == (4 * 3 + 3 * 3) * 4
    paper = [f"dit-{size}-{patch}" for size in ("s", "b", "l", "xl") for patch in (8, 4, 2)]
    small = [f"dit-{size}-{patch}" for size in ("xs", "2xs", "3xs") for patch in (8, 4, 2)]
    suffixes = ("", "-in-context", "-cross-attention", "-adaln")
    expected = {name + suffix for name in [*paper, *small] for suffix in suffixes}
    assert set(BY_NAME) == expected


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_name_and_arguments_agree(spec):
    _, size, patch, *suffix = spec.name.split("-", 3)
    row = SIZES[size]
    assert (spec.defaults["depth"], spec.defaults["width"], spec.defaults["heads"]) == row[:3]
    assert spec.defaults["patch"] == int(patch)
    assert spec.defaults["block"] == (suffix[0] if suffix else "adaln-zero")
    assert spec.defaults["block"] in BLOCKS
    assert spec.null_index(10) == 10


@pytest.mark.parametrize(
    ("name", "overrides", "culprit", "remedy"),
    [
        ("dit-s-8", {"input_size": 28}, "input_size 28", "dit-*-4 or dit-*-2"),
        ("dit-s-4", {"input_size": 6}, "input_size 6", "dit-*-2"),
        ("dit-s-2", {"input_size": 9}, "input_size 9", "even"),
        ("dit-s-2", {"heads": 5}, "width 384", "heads"),
        ("dit-s-2", {"width": 6, "heads": 1}, "width 6", "4"),
        ("dit-s-2", {"num_classes": 0}, "num_classes is 0", "at least 1"),
        ("dit-s-2", {"depth": 1.5}, "depth is 1.5", "whole number"),
        ("dit-s-2", {"out_channels": True}, "out_channels is True", "whole number"),
        ("dit-s-2", {"block": "adaln-one"}, "adaln-one", "adaln-zero"),
        ("dit-s-2", {"colour": 3}, "colour", "input_size"),
    ],
)
@pytest.mark.parametrize("way", ["count", "build"])
def test_arguments_that_do_not_fit_are_refused_in_one_line(name, overrides, culprit, remedy, way):
    spec = BY_NAME[name]
    with pytest.raises(UserError) as refusal:
        spec.count(**overrides) if way == "count" else spec.build(**overrides)
    message = str(refusal.value)
    assert culprit in message and remedy in message and "\n" not in message


def test_specs_and_closed_forms_import_no_framework():
    code = (
        "import sys; from backbones.dit.spec import SPECS; [spec.count() for spec in SPECS];"
        "print(sorted({'torch', 'jax', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
