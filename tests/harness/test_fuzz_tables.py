"""The TOML of systems and protocols with every value replaced by others: refused in one line, or right; no traceback."""

import datetime
import json

import pytest
from mutations import changed, places

from harness import registry
from harness.errors import UserError
from harness.planning.request import resolve_request
from harness.protocols import from_dict, get_protocol
from harness.systems.checks import check_system
from harness.systems.read import system_from_dict

INF = float("inf")
OTHERS = [
    None, True, "", "x", "a\0b", "\u00e9\n", "x" * 5000, "ldm-xs", -1, 0, 1, 3, 2**31, 10**30, 10**400, 0.5, -0.0, 1e308,
    float("nan"), INF, -INF, [], [[]], [1, "a"], [-1], [10**12], {}, {"a": 1}, datetime.date(2020, 1, 1),
]  # fmt: skip
CLASSES = {"in_channels": 1, "num_classes": 10}
LONGEST = 700  # characters of a message


def stage(backbone, **arguments):
    """A table of every item, of the network's arguments too."""
    spec = registry.backbones.get(backbone)
    full = {name: value for name, value in {**spec.defaults, **arguments}.items() if value is not None}
    full = {name: list(value) if isinstance(value, tuple) else value for name, value in full.items()}
    return {
        "backbone": backbone, "arguments": full, "objective": "epsilon-learned-range", "schedule": "linear",
        "diffusion_steps": 1000, "sampler": "ddpm", "steps": 50, "eta": 0.0, "clip_denoised": True,
        "guidance_scale": 1.0, "guidance_channels": "all", "truncation": 1.0,
    }  # fmt: skip


def cascade():
    upsampler = stage("adm-u-xs", input_size=8, low_res_size=4, **CLASSES)
    return {
        "name": "mine", "protocol": "digits", "uint8_rule": "adm", "label_policy": "random", "decoder": "",
        "base": stage("adm-xs", input_size=4, **CLASSES), "upsamplers": [{**upsampler, "conditioning_noise": 0.1}],
        "classifier": {
            "backbone": "adm-classifier-xs", "arguments": {"input_size": 4, **CLASSES}, "schedule": "linear",
            "diffusion_steps": 1000, "scale": 1.0,
        },
    }  # fmt: skip


def of_one(backbone):
    return {"name": "mine", "protocol": "digits", "base": stage(backbone, input_size=8, **CLASSES)}


def attack(table, take):
    """Every value of `table` replaced by each of the others; how often it was taken, and refused."""
    taken = refused = 0
    for place in places(table):
        for value in OTHERS:
            try:
                take(changed(table, place, value))
                taken += 1
            except UserError as refusal:
                refused += 1
                assert "\n" not in str(refusal) and len(str(refusal)) < LONGEST, (place, value)
            except Exception as error:
                raise AssertionError(f"{place} = {value!r}") from error
    return taken, refused


def take_system(table):
    system = system_from_dict(table, "mine.toml")
    check_system(system)
    assert system.params() > 0 and system.gflops_image() > 0
    json.dumps(system.as_dict(), allow_nan=False)


def take_protocol(table):
    task = from_dict(table, "mine.toml")
    for backbone in ("dit-xs-4", "adm-xs"):
        resolve_request(
            backbone, task, task.recipe, seed=0, framework="torch", data=None, sampling=None, samples=None,
            gradient_checkpointing=False,
        )  # fmt: skip


@pytest.mark.parametrize("table", [cascade(), of_one("dit-xs-2"), of_one("ldm-xs")], ids=["cascade", "dit", "ldm"])
def test_a_system_of_anything(table):
    take_system(table)
    taken, refused = attack(table, take_system)
    assert taken > 20 and refused > 500


def test_a_protocol_of_anything():
    table = get_protocol("digits").as_dict()
    take_protocol(table)
    taken, refused = attack(table, take_protocol)
    assert taken > 50 and refused > 500
