"""Plans name what a run would refuse; settings that other code has are reachable; what is printed reads right."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from evaluators.suites import get_suite
from harness.cli import group
from harness.diffusion.respacing import space_timesteps
from harness.diffusion.sampler_plan import sampler_plan
from harness.errors import UserError
from harness.planning.plan import make_plan
from harness.planning.request import make_request
from harness.settings import PlanOptions
from reports.texts import measured_text
from results.records import Record, Sampling, to_json
from results.store import append, find_record_files

PROTOCOL = """
name = "mine"
dataset = "npz"
resolution = 8
image_channels = 1
num_classes = 10
input_size = 8
in_channels = 1
samples = 100
suite = "embedded"
"""


def harness(*words):
    return CliRunner().invoke(group, [str(word) for word in words])


# Plans -----------------------------------------------------------------------------------------------------------------


def images(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 255, shape).astype(dtype)


LABELS = np.arange(40) % 10
UNFIT = {  # what --data names: the file's arrays or its bytes, and what a run says
    "no labels": ({"arr_0": images(40, 8, 8, 1)}, "has no labels"),
    "another size": ({"arr_0": images(40, 9, 9, 1), "arr_1": LABELS}, r"has images \(9, 9, 1\)"),
    "colours": ({"arr_0": images(40, 8, 8, 3), "arr_1": LABELS}, r"has images \(8, 8, 3\)"),
    "labels outside": (
        {"arr_0": images(40, 8, 8, 1), "arr_1": LABELS + 1},
        "has label 10, but the protocol has classes",
    ),
    "negative labels": ({"arr_0": images(40, 8, 8, 1), "arr_1": LABELS - 1}, "has label -1"),
    "floats": ({"arr_0": images(40, 8, 8, 1, dtype=np.float32), "arr_1": LABELS}, "float32"),
    "other arrays": ({"mu": np.zeros(4), "sigma": np.eye(4)}, "."),
    "junk": (b"junk", "."),
    "an empty file": (b"", "."),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_plan_names_the_data_that_a_run_refuses(name, tmp_path):
    content, message = UNFIT[name]
    data = tmp_path / "data.npz"
    data.write_bytes(content) if isinstance(content, bytes) else np.savez(data, **content)
    (tmp_path / "mine.toml").write_text(PROTOCOL)
    request = make_request(backbone="dit-xs-4", protocol=str(tmp_path / "mine.toml"), steps=4, data=data)
    missing = make_plan(request, check_files=True).missing
    refused = harness(
        "run", "--backbone", "dit-xs-4", "--protocol", tmp_path / "mine.toml", "--steps", 4, "--data", data, "--out", tmp_path / "run"
    )  # fmt: skip
    assert isinstance(refused.exception, UserError) and not (tmp_path / "run").exists()
    assert len(missing) == 1 and missing[0] in str(refused.exception)
    import re

    assert re.search(message, missing[0]) and "\n" not in missing[0]


def test_a_plan_names_a_prepared_set_that_is_not_whole(tmp_path):
    from harness.data.prepared import is_prepared

    folder = tmp_path / "set"
    source = tmp_path / "from"
    for label in range(3):
        (source / str(label)).mkdir(parents=True)
        from PIL import Image

        Image.fromarray(images(8, 8)).save(source / str(label) / "a.png")
    assert harness("data", "prepare", "mine", "--from", source, "--out", folder, "--resolution", 8).exit_code == 0
    assert is_prepared(folder)
    (tmp_path / "mine.toml").write_text(PROTOCOL.replace('"npz"', '"prepared"').replace("channels = 1", "channels = 3"))
    request = make_request(backbone="dit-xs-4", protocol=str(tmp_path / "mine.toml"), steps=4, data=folder)
    assert make_plan(request, check_files=True).missing == ()
    two = (
        PROTOCOL.replace('"npz"', '"prepared"')
        .replace("channels = 1", "channels = 3")
        .replace("classes = 10", "classes = 2")
    )
    (tmp_path / "two.toml").write_text(two)
    request = make_request(backbone="dit-xs-4", protocol=str(tmp_path / "two.toml"), steps=4, data=folder)
    assert "has label 2" in make_plan(request, check_files=True).missing[0]
    largest = max((each for each in folder.rglob("*") if each.is_file()), key=lambda each: each.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-5])
    request = make_request(backbone="dit-xs-4", protocol=str(tmp_path / "mine.toml"), steps=4, data=folder)
    assert make_plan(request, check_files=True).missing


def test_good_data_are_not_named(tmp_path):
    np.savez(tmp_path / "data.npz", arr_0=images(40, 16, 16, 1), arr_1=LABELS)  # averaged down, as a run does
    (tmp_path / "mine.toml").write_text(PROTOCOL)
    for protocol, data in ((str(tmp_path / "mine.toml"), tmp_path / "data.npz"), ("digits", None)):
        request = make_request(backbone="dit-xs-4", protocol=protocol, steps=4, data=data)
        assert make_plan(request, check_files=True).missing == ()


# guided-diffusion's timestep_respacing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "dpm++-2m"])
@pytest.mark.parametrize(
    ("steps", "spacing", "respacing"),
    [
        (25, "whole-stride", "ddim25"),
        (50, "whole-stride", "ddim50"),
        (40, "10:10:20", "10,10,20"),
        (8, "respaced", "8"),
    ],
)
def test_every_respacing_of_guided_diffusion_is_reachable(sampler, steps, spacing, respacing):
    settings = {"schedule": "linear", "diffusion_steps": 1000, "objective": "epsilon-learned-range"}
    plan = sampler_plan(sampler, steps, spacing=spacing, **settings)
    np.testing.assert_array_equal(plan.table.times, space_timesteps(1000, respacing)[::-1])
    assert plan.steps == steps


def test_by_the_command_line_too():
    words = ("plan", "--backbone", "dit-xs-2", "--sampler", "ddim", "--json", "--sampling-steps")
    for steps, spacing in ((25, "whole-stride"), (40, "10:10:20")):
        request = make_request(
            backbone="dit-xs-2", protocol="digits", sampling={"sampler": "ddim", "steps": (steps,), "spacing": spacing}
        )
        assert make_plan(request).sampling[0].steps == steps
    for text, advice in (
        ("ddim25", "--sampling-steps 25 --spacing whole-stride"),
        ("10,10,20", "--sampling-steps 40 --spacing 10:10:20"),
        ("10:10:20", "--sampling-steps 40 --spacing 10:10:20"),
        ("25:15", "--sampling-steps 40 --spacing 25:15"),
    ):
        done = harness(*words, text)
        assert done.exit_code == 2 and advice in " ".join(done.output.split())
    for steps, spacing, message in (
        (30, "10:10:20", "has 40 timesteps, and the sampler takes 30"),
        (25, "ddim25", "--sampling-steps 25 --spacing whole-stride"),
        (25, "0:25", "not understood"),
        (600, "whole-stride", "no whole stride takes 600"),
        (25, "tailing", "did you mean trailing"),
    ):
        sampler = "euler" if spacing == "tailing" else "ddim"
        with pytest.raises(UserError, match=message):
            sampler_plan(
                sampler, steps, spacing=spacing, schedule="linear", diffusion_steps=1000, objective="epsilon-learned-range"
            )  # fmt: skip
    with pytest.raises(UserError, match="has no spacing 'karras'"):
        sampler_plan(
            "ddim", 25, spacing="karras", schedule="linear", diffusion_steps=1000, objective="epsilon-learned-range"
        )
    assert PlanOptions(backbone="dit-xs-2", sampling_steps="16,32").sampling_steps == (16, 32)


# Guidance below 1 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["0", "0.5", "-1"])
def test_guidance_below_one_is_refused_in_words_that_are_true(scale, tmp_path):
    words = f"guidance scale {float(scale):g} is below 1; 1 samples with the labels and without guidance"
    (tmp_path / "a.toml").write_text(PROTOCOL + f"[sampling]\nguidance_scale = {scale}\n")
    (tmp_path / "b.toml").write_text(
        'name = "b"\nprotocol = "digits"\n[base]\nbackbone = "dit-xs-2"\nsteps = 4\n'
        f"arguments = {{ input_size = 8, in_channels = 1, num_classes = 10 }}\nguidance_scale = {scale}\n"
    )
    for command in (
        ("plan", "--backbone", "dit-xs-2", "--cfg", scale),
        ("run", "--backbone", "dit-xs-2", "--cfg", scale),
        ("plan", "--backbone", "dit-xs-2", "--protocol", tmp_path / "a.toml"),
        ("plan", "--backbone", "dit-xs-2", f"--match-sampling=dit-xs-2@25@cfg{scale}"),
        ("sample", "--system", tmp_path / "b.toml", "--weights", "base=x"),
    ):
        done = harness(*command)
        assert words in " ".join(f"{done.output} {done.exception}".split()), command


# Records -------------------------------------------------------------------------------------------------------------------


def test_records_come_in_the_same_order_again(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.repeat(images(150, 8, 8, 1), 2, axis=0)[:300], arr_1=np.arange(300) % 10)
    features = get_suite("embedded").features.name
    for suite in (f"{features}:precision,fd", f"{features}:fd"):  # in one file
        words = (
            "evaluate", tmp_path / "a.npz", "--protocol", "digits", "--json", "--allow", "duplicates", "--out",
            tmp_path / "q.jsonl", "--suite", suite,
        )  # fmt: skip
        first, second = harness(*words), harness(*words)
        assert first.exit_code == 0, first.output
        assert json.loads(first.stdout) == json.loads(second.stdout)
        assert [each["metric"] for each in json.loads(first.stdout)["records"]] == [
            metric.key for metric in get_suite(suite).metrics
        ]


def record(value=1.0, **changes):
    return Record(
        provenance="measured", metric="fd", value=value, n=300, protocol="digits", resolution=8, dataset="digits",
        system="mine", sampling=Sampling(samples_sha256="0" * 64), **changes,
    )  # fmt: skip


def test_a_folder_is_searched_for_all_records_that_evaluate_wrote(tmp_path):
    folder = tmp_path / "results" / "deep"
    folder.mkdir(parents=True)
    append(folder / "q.jsonl", [record()])
    append(folder / "records.jsonl", [record(2.0, framework="jax")])
    (folder / "newer.jsonl").write_text(to_json(record()).replace('"schema":', '"schema":9') + "\n")
    (folder / "log.jsonl").write_text('{"step": 1, "mse": 0.5}\n')
    (folder / "journal.jsonl").write_text("")
    (folder / "cut.jsonl").write_text(to_json(record())[:50] + "\n" + to_json(record()) + "\n")
    (folder / "broken.jsonl").write_bytes(b"\xff\xfe\x00")
    found = [path.name for path in find_record_files([tmp_path])]
    assert found == ["cut.jsonl", "newer.jsonl", "q.jsonl", "records.jsonl"]
    done = harness("compare", tmp_path, tmp_path, "--json")
    assert "has no records" not in str(done.exception)
    done = harness("report", "--results", tmp_path, "--out", tmp_path / "report")
    assert done.exit_code == 0 and "mine" in done.output
    import harness as package

    assert len(package.load_records(tmp_path)) == 2


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((-0.2, -190.0, 120.0), "0 [-190, 120]"),
        ((-1e-9, -0.004, 0.004), "0.0000 [-0.0040, 0.0040]"),
        ((-0.0, None, None), "0"),
        ((-0.0, -0.0, -0.0), "0 [0, 0]"),
        ((-3.27, -3.33, -3.21), "-3.27 [-3.33, -3.21]"),
    ],
)
def test_a_value_that_rounds_to_zero_has_no_sign(numbers, text):
    assert measured_text(*numbers) == text
