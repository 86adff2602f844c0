"""Systems: what is registered, what is refused, and small ones drawn from runs that the tests train."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from small_runs import request, workshop

from harness import registry
from harness.cli import group
from harness.data.load import load_data
from harness.errors import UserError
from harness.io.files import sha256_file
from harness.pipeline.sample import sample
from harness.pipeline.sample_system import sample_system
from harness.pipeline.sidecar import read_fields
from harness.pipeline.train import RunSession
from harness.planning.flops_table import sampling_row
from harness.planning.request import make_request
from harness.protocols import get_protocol
from harness.runs.run import build_arguments
from harness.runs.samples import read_samples, read_sidecar
from harness.systems.binding import load_parts
from harness.systems.checks import check_system
from harness.systems.read import get_system, load_system, system_from_dict
from harness.systems.spec import Component, GuidanceClassifier, System
from reports import texts
from reports.rows import Row, columns_of
from reports.texts import guidance_text
from results import paper
from results.records import Record

SMALL = {"input_size": 8, "in_channels": 1, "num_classes": 10}


def harness(*arguments):
    return CliRunner().invoke(group, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of short runs: a base at 8 and at 4 pixels, a classifier, an upsampler."""
    root = tmp_path_factory.mktemp("parts")

    def train(name, backbone, **options):
        wanted = request(backbone, steps=4, **options)
        shop = workshop(root / name, wanted)
        shop.train(4)
        return root / name

    low = make_request(backbone="adm-xs", protocol="digits-4", steps=4, settings={"batch": "24"})
    shop = RunSession(low, load_data(low.protocol, None), root / "low")
    shop.create(workshop(root / "base", request("adm-xs", steps=4)).run.resolved)
    shop.train(4)
    return {
        "base": train("base", "adm-xs"),
        "low": root / "low",
        "classifier": train("classifier", "adm-classifier-xs"),
        "upsampler": train("upsampler", "adm-u-xs", settings={"conditioning_noise": "0.2"}),
        "dit": train("dit", "dit-xs-4"),
    }


def test_every_row_of_tables_2_3_and_5_is_a_system_that_runs_or_says_why_not():
    rows = {(cell.table, cell.row): cell for cell in paper.values() if cell.table in ("Table 2", "Table 3", "Table 5")}
    names = {each.row: each for each in registry.systems if each.row}
    for (table, row), cell in rows.items():
        if (table, row) == ("Table 5", "ft-EMA"):  # the same system as Table 2's
            assert get_system(cell.system).decoder == "ft-ema"
            continue
        system = names[f"{table}: {row}"]
        if table != "Table 5":
            assert system.name == cell.system
        assert get_protocol(system.protocol).resolution == cell.resolution
        if system.unavailable:
            continue
        check_system(system)
        assert system.backbone == cell.backbone
        assert (cell.guidance_scale or 1) == system.base.guidance_scale
        if cell.sampling_steps:
            assert (system.base.steps, system.base.sampler) == (cell.sampling_steps, cell.sampler)
    assert {each.name for each in names.values() if each.unavailable} == {
        "stylegan-xl-256", "stylegan-xl-512", "cdm-256", "ldm-8-g",
    }  # fmt: skip


def test_compute_of_an_image_by_hand():
    system = get_system("adm-g-adm-u-256")
    count = {name: registry.backbones.get(name).count().gflops for name in system.backbone.split("+")}
    assert system.gflops_forward() == pytest.approx(count["adm-64"] + count["adm-u-64-256"])
    expected = 250 * (count["adm-64"] + count["adm-u-64-256"] + 2 * count["adm-classifier-64"])
    assert system.gflops_image() == pytest.approx(expected)
    guided = get_system("dit-xl-2-256-cfg1.5")
    assert guided.evaluations == 500
    assert guided.gflops_image() == pytest.approx(500 * 118.63793664)


def test_an_interval_of_guidance_costs_its_rows_alone():
    """A row inside it evaluates the network twice, a row outside once; the identity without one is as it was."""
    guided = get_system("dit-xl-2-256-cfg1.5")
    within = replace(guided, base=replace(guided.base, guidance_interval="0.1-3"))
    sigma = guided.base.plan().sigma
    inside = int(((sigma >= 0.1) & (sigma <= 3)).sum())
    assert 50 < inside < 200 and within.evaluations == 250 + inside
    assert sampling_row(within)["gflops_guidance"] == pytest.approx(inside * 118.63793664)
    # All that decided images before decides them now, and the interval where there is one.
    assert "guidance_interval" not in guided.as_dict()["base"] and "guidance_interval" in within.as_dict()["base"]
    assert System.from_dict(within.as_dict()).base == within.base
    assert System.from_dict(guided.as_dict()).base == guided.base


def test_flops_of_systems():
    done = harness("flops", "--json")
    rows = {(row["name"], row["input_size"]): row for row in json.loads(done.stdout)["rows"]}
    for name, size, printed in (("adm-u-256", 256, 742), ("adm-u-512", 512, 2813), ("adm-256", 256, 1120)):
        row = rows[name, size]
        assert round(row["gflops"]) == row["published_gflops"] == printed and row["difference"] == 0
    assert [each["name"] for each in rows["adm-u-512", 512]["parts"]] == ["adm-128", "adm-u-128-512"]
    done = harness("flops", "--sampling", "--json", "dit-xl-2-256-cfg1.5", "adm-g-256")
    dit, adm = json.loads(done.stdout)["rows"]
    assert dit["gflops_guidance"] == pytest.approx(dit["gflops_unguided"]) == pytest.approx(250 * 118.63793664)
    assert round(dit["gflops_decode"]) == 311 and adm["gflops_decode"] == 0
    assert adm["gflops_guidance"] == pytest.approx(500 * registry.backbones.get("adm-classifier-256").count().gflops)


def test_list_says_which_run_and_why_not():
    rows = json.loads(harness("list", "systems", "--json").stdout)["systems"]
    by_name = {row["name"]: row for row in rows}
    assert by_name["cdm-256"]["runs"] is False and "released" in by_name["cdm-256"]["unavailable"]
    assert by_name["dit-xl-2-256-cfg1.5"]["published_fid"] == 2.27
    # Table 5's rows of one network with other decoders, under names that no other table has
    assert by_name["dit-xl-2-256-cfg1.5-vae-original"]["published_fid"] == 2.46
    assert by_name["dit-xl-2-256-cfg1.5-vae-ft-mse"]["published_fid"] == 2.30
    assert by_name["adm-g-adm-u-256"]["weights"] == ["base", "classifier", "upsampler"]
    assert "cannot be run" in harness("list", "systems").stdout


GOOD = {"name": "mine", "protocol": "digits", "base": {"backbone": "adm-xs", "steps": 5, "arguments": SMALL}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bse": {}}, "unknown item 'bse'; did you mean base"),
        ({"base": {"backbone": "adm-xs", "step": 5}}, r"\[base\]: unknown item 'step'; did you mean steps"),
        ({"base": {"steps": 5}}, "backbone is missing"),
        ({"base": {"backbone": "adm-xs", "steps": 5.5}}, "steps = 5.5 must be of type int"),
        ({"uint8_rule": "floor"}, "unknown uint8_rule 'floor'"),
        ({"row": "Table 2: mine"}, "row is for the built-in systems"),
        ({"upsamplers": {}}, r"written \[\[upsamplers\]\]"),
        ({"base": {"backbone": "adm-xs", "eta": float("nan")}}, "eta must be a finite number"),
        (
            {"base": {"backbone": "adm-xs", "arguments": {"dropout": float("nan")}}},
            "dropout = nan is no argument of a network",
        ),
        (
            {"base": {"backbone": "adm-xs", "arguments": {"multipliers": [1, float("inf")]}}},
            r"multipliers = \[1, inf\] is no argument of a network",
        ),
        ({"name": "adm-g-256"}, "the name 'adm-g-256' is that of a built-in system"),
        ({"name": "a\0b"}, "must be printable"),
        ({"base": {"backbone": "adm-xs", "steps": 10**30}}, "steps = 10+ is out of range"),
        (
            {"base": {"backbone": "adm-xs", "arguments": {"width": "64\n"}}},
            r"width = '64\\n' is no argument of a network",
        ),
    ],
)
def test_a_broken_file_is_refused_by_item(change, words):
    with pytest.raises(UserError, match=words):
        system_from_dict({**GOOD, **change}, "mine.toml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"base": Component(backbone="adm-u-xs")},
            "base is 'adm-u-xs', of kind upsampler; it must be a denoiser or generator",
        ),
        ({"classifier": GuidanceClassifier(backbone="adm-xs")}, "classifier is 'adm-xs', of kind denoiser"),
        ({"base": Component(backbone="adm-xs", arguments=SMALL, guidance_scale=2.0)}, "has no null label"),
        (
            {"base": Component(backbone="adm-xs", arguments={**SMALL, "num_classes": 7})},
            "7 classes and protocol 'digits'",
        ),
        ({"base": Component(backbone="adm-xs", arguments={**SMALL, "input_size": 16})}, "makes images of 16x16x1"),
        ({"base": Component(backbone="adm-xs", arguments=SMALL, steps=1001)}, "1001 sampling steps"),
        ({"base": Component(backbone="adm-xs", arguments=SMALL, sampler="ddmp")}, "unknown sampler 'ddmp'"),
        ({"base": Component(backbone="adm-xs", arguments=SMALL, eta=2.0)}, "base: eta 2 must lie in 0 to 1"),
        (
            {"base": Component(backbone="adm-xs", arguments=SMALL, guidance_scale=0.5)},
            "guidance scale 0.5 is below 1; 1 samples with the labels",
        ),
        ({"base": Component(backbone="adm-xs", arguments=SMALL, conditioning_noise=0.1)}, "and 'adm-xs' is none"),
        ({"base": Component(backbone="adm-xs", arguments=SMALL, sampler="ddim-ldm", steps=300)}, "250 steps fit"),
        (
            {"base": Component(backbone="adm-xs", arguments=SMALL, guidance_channels="x")},
            "unknown guidance_channels 'x'",
        ),
        ({"base": Component(backbone="adm-xs", arguments=SMALL, truncation=0.5)}, "truncation is a generator's"),
        ({"base": Component(backbone="adm-xs", arguments=SMALL, diffusion_steps=2**31)}, "give 1 to 100,000"),
        (
            {"base": Component(backbone="biggan-deep-256", truncation=2.0)},
            "truncation 2 must lie above 0 and be at most 1",
        ),
        ({"base": Component(backbone="biggan-deep-256", guidance_scale=2.0)}, "guidance_scale is a diffusion's"),
        ({"base": Component(backbone="ldm-xs", arguments=SMALL, guidance_interval="1-2")}, "scale 1 is no guidance"),
        (
            {"base": Component(backbone="ldm-xs", arguments=SMALL, guidance_scale=2.0, guidance_interval="x")},
            "base: guidance_interval: 'x' is not an interval",
        ),
        (
            {"base": Component(backbone="ldm-xs", arguments=SMALL, guidance_scale=2.0, guidance_interval="900-")},
            "guidance 2@900- guides none of the 250 ddpm steps",
        ),
        (
            {"base": Component(backbone="ldm-xs", arguments={**SMALL, "null_class": False}, guidance_scale=1.5)},
            "has no null label",
        ),
        (
            {"upsamplers": (Component(backbone="adm-u-xs", arguments={**SMALL, "in_channels": 3, "low_res_size": 8}),)},
            "upsampler takes 3 channels and base makes 1",
        ),
        (
            {"classifier": GuidanceClassifier(backbone="adm-classifier-xs", arguments=SMALL, schedule="cosine")},
            "was trained on noise of schedule cosine, and the base that it guides has linear",
        ),
        (
            {"classifier": GuidanceClassifier(backbone="adm-classifier-xs", arguments=SMALL, scale=0.0)},
            "scale 0 must be positive",
        ),
        (
            {
                "base": Component(
                    backbone="adm-xs", arguments=SMALL, objective="edm", schedule="ve", sampler="euler", steps=5
                ),
                "classifier": GuidanceClassifier(backbone="adm-classifier-xs", arguments=SMALL, schedule="ve"),
            },
            "the objective edm gives its network x and t in other units",
        ),
        ({"decoder": "ft-ema", "upsamplers": (Component(backbone="adm-u-xs", arguments=SMALL),)}, "after a decoder"),
        (
            {"classifier": GuidanceClassifier(backbone="adm-classifier-xs", arguments={**SMALL, "input_size": 16})},
            "the classifier has input_size 16 and the base that it guides 8",
        ),
        (
            {"upsamplers": (Component(backbone="adm-u-xs", arguments={**SMALL, "input_size": 16, "low_res_size": 4}),)},
            "made for images of 4 pixels and base makes them of 8",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        check_system(replace(system_from_dict(GOOD, "mine.toml"), **change))


def test_weights_that_do_not_fit_are_refused(parts, tmp_path):
    system = get_system("digits-guided")
    with pytest.raises(UserError, match="needs weights of classifier: give --weights classifier=FILE"):
        load_parts(system, {"base": parts["base"]})
    with pytest.raises(UserError, match="has no part 'upsampler'; it has base, classifier"):
        load_parts(system, {"base": parts["base"], "classifier": parts["classifier"], "upsampler": parts["upsampler"]})
    with pytest.raises(UserError, match="the run is of adm-classifier-xs"):
        load_parts(system, {"base": parts["classifier"], "classifier": parts["classifier"]})
    with pytest.raises(UserError, match="no such file or folder"):
        load_parts(system, {"base": parts["base"], "classifier": tmp_path / "nothing"})
    with pytest.raises(UserError, match="the classifier has input_size 8 and the base that it guides 4"):
        load_parts(system, {"base": parts["low"], "classifier": parts["classifier"]})
    cosine = workshop(tmp_path / "cosine", request("adm-classifier-xs", steps=1, settings={"schedule": "cosine"}))
    cosine.train(1)
    with pytest.raises(UserError, match="was trained on noise of schedule cosine"):
        load_parts(system, {"base": parts["base"], "classifier": tmp_path / "cosine"})
    noisy = get_system("digits-cascade-augmented")
    noisy = replace(noisy, upsamplers=(replace(noisy.upsamplers[0], conditioning_noise=0.5),))
    with pytest.raises(UserError, match="trained with conditioning_noise 0.2, and the system gives it 0.5"):
        load_parts(noisy, {"base": parts["low"], "upsampler": parts["upsampler"]})
    with pytest.raises(UserError, match="cannot be run: neither code nor weights"):
        load_parts(get_system("cdm-256"), {})


def test_what_a_run_brings_otherwise_is_said(parts, tmp_path, caplog):
    """A base of another schedule than the system's (or its TOML's) is drawn with its own, and not without a word."""
    plain = replace(get_system("digits-guided"), name="plain", classifier=None)
    assert load_parts(plain, {"base": parts["base"]}).notes == ()
    noisy = replace(plain, base=replace(plain.base, schedule="cosine", diffusion_steps=500))
    bound = load_parts(noisy, {"base": parts["base"]})
    assert (bound.system.base.schedule, bound.system.base.diffusion_steps) == ("linear", 1000)
    assert bound.notes == (
        "base: schedule linear, as its run was trained; the system has cosine",
        "base: diffusion_steps 1000, as its run was trained; the system has 500",
    )
    settings = {"count": 4, "seed": 0, "precision": "float32", "batch": None, "device": "cpu"}
    with caplog.at_level(logging.INFO, "harness"):
        sample_system(bound, folder=tmp_path, **settings)
    assert caplog.messages[:2] == list(bound.notes)


# those that users train; SiT's weights are SiT's
OURS = [
    each.name for each in registry.systems if not each.row and not each.unavailable and not each.name.startswith("sit-")
]


def test_a_run_with_scaled_noise_is_a_part_of_a_system(tmp_path):
    """It is sampled with its own noise, and said if the system has another; without an item nothing changes."""
    settings = {"objective": "jit", "noise_scale": "2"}
    workshop(tmp_path / "scaled", request("adm-xs", steps=1, settings=settings, sampling={"sampler": "euler"})).train(1)
    plain = replace(get_system("digits-guided"), name="plain", classifier=None, uint8_rule="dit")  # a run's
    assert "noise_scale" not in json.dumps(get_system("digits-guided").as_dict())  # as in identities of before
    flow = replace(plain, base=replace(plain.base, objective="x0", schedule="flow", sampler="euler", steps=3))
    bound = load_parts(flow, {"base": tmp_path / "scaled"})
    assert bound.notes == ("base: noise_scale 2.0, as its run was trained; the system has 1.0",)
    assert bound.system.base.noise_scale == 2.0 and bound.system.base.plan().table.initial_noise == 2.0
    said = replace(flow, base=replace(flow.base, noise_scale=2.0))
    assert load_parts(said, {"base": tmp_path / "scaled"}).notes == ()
    data = json.loads(json.dumps(said.as_dict()))
    assert data["base"]["noise_scale"] == 2.0 and type(said).from_dict(data).as_dict() == said.as_dict()
    path = sample_system(bound, folder=tmp_path, count=4, seed=0, precision="float32", batch=None, device="cpu")
    side = json.loads(path.with_name("samples.json").read_text())
    assert side["identity"]["system"]["base"]["noise_scale"] == 2.0 and side["record"]["training"]["noise_scale"] == 2.0
    # the same run, sampled as a run, gives the same images
    (own,) = sample(run=tmp_path / "scaled", sampler="euler", samples=4, sampling_steps=3, batch=4).samples
    np.testing.assert_array_equal(read_samples(path).images, read_samples(own).images)
    for change, words in (
        ({"noise_scale": 2.0}, "noise_scale 2 needs a schedule in continuous time"),
        ({"noise_scale": -1.0, "schedule": "flow"}, "noise_scale -1 must be positive"),
    ):
        with pytest.raises(UserError, match=words):
            check_system(replace(plain, base=replace(plain.base, **change)))
    scaled = replace(flow, classifier=replace(get_system("digits-guided").classifier, schedule="flow", noise_scale=2.0))
    with pytest.raises(UserError, match="trained on noise of noise_scale 2.0, and the base that it guides has 1.0"):
        check_system(scaled)


@pytest.mark.parametrize("name", OURS)
def test_the_parts_of_our_own_systems_are_what_training_makes(name):
    """A run takes its sizes from its protocol and its backbone; a system that it does not fit could not be trained."""
    system = get_system(name)
    for part in system.parts.values():
        wanted = part.spec.arguments(**part.arguments)
        side = wanted["input_size"]
        pixels = {"input_size": side, "resolution": side, "in_channels": get_protocol(system.protocol).image_channels}
        task = replace(get_protocol(system.protocol), space="pixels", **pixels)
        if wanted.get("num_classes") == 0:  # trained on the same images without their classes
            task = replace(task, num_classes=0)
        trained = part.spec.arguments(**build_arguments(part.spec, task))
        assert trained == wanted, part.backbone


def test_settings_of_a_system_are_its_own(parts):
    done = harness("sample", "--system", "digits-guided", "--cfg", "2", "--weights", f"base={parts['base']}")
    assert done.exit_code != 0 and "--cfg is fixed by the system" in str(done.exception)
    done = harness("sample", "--system", "digits-guided", "--spacing", "trailing", "--weights", f"base={parts['base']}")
    assert done.exit_code != 0 and "--spacing is fixed by the system" in str(done.exception)
    done = harness("sample")
    assert "give either --run DIR or --system NAME" in str(done.exception)
    done = harness("sample", "--run", parts["classifier"])
    assert "a part of a system" in str(done.exception)
    done = harness("run", "--backbone", "adm-u-xs")
    assert "cannot generate images alone" in str(done.exception)


def test_steps_that_do_not_fit_are_refused_before_anything_is_drawn(parts, tmp_path):
    weights = ("--weights", f"base={parts['low']}", "--weights", f"upsampler={parts['upsampler']}")
    drawing = ("--sampling-steps", "2,1001", "--samples", 4, "--out", tmp_path / "out")
    done = harness("sample", "--system", "digits-cascade", *weights, *drawing)
    assert "1001 sampling steps do not lie in 1 to 1000" in str(done.exception)
    assert not (tmp_path / "out").exists()


def drawn(parts, out, *arguments):
    done = harness("sample", *arguments, "--samples", 40, "--sampling-steps", 4, "--out", out, "--device", "cpu")
    assert done.exit_code == 0, done.exception
    return Path(done.stdout.split()[-1])


def test_a_cascade_from_runs_is_drawn_measured_and_reported(parts, tmp_path):
    arguments = (
        "--system", "digits-cascade-augmented",
        "--weights", f"base={parts['low']}", "--weights", f"upsampler={parts['upsampler']}",
    )  # fmt: skip
    path = drawn(parts, tmp_path / "runs", *arguments)
    samples = read_samples(path, classes=10)
    assert samples.images.shape == (40, 8, 8, 1) and len(np.unique(samples.images)) > 2
    assert path.with_name("grid.png").exists()
    facts = read_sidecar(path)
    assert facts["evaluations"] == 8
    assert facts["identity"]["system"]["upsamplers"][0]["conditioning_noise"] == 0.1
    assert facts["identity"]["weights"]["upsampler"]["training_steps"] == 4
    about = read_fields(path, sha256_file(path))
    assert (about.sampling.steps, about.sampling.stage_steps) == (4, "4 + 4")
    assert about.sampling.settings == "adm-u-xs by ddpm, conditioning noise 0.1"
    record = Record(
        provenance="measured",
        metric="fd",
        value=1.0,
        n=40,
        protocol="digits",
        resolution=8,
        dataset="digits",
        **about.arguments(),
    )
    assert columns_of(Row(records={("fd", ""): record}))["Sampling steps"].text == "4 + 4"
    assert texts.row_metadata(record)["system settings"].startswith("adm-u-xs by ddpm, conditioning noise 0.1 (")
    before = path.read_bytes()
    assert drawn(parts, tmp_path / "runs", *arguments) == path and path.read_bytes() == before  # found, not drawn

    system = load_file(tmp_path, conditioning_noise=0.0)
    other = drawn(parts, tmp_path / "runs", "--system", system, *arguments[2:])
    assert other != path and not np.array_equal(read_samples(other).images, samples.images)

    done = harness("evaluate", path, "--json")
    assert "too few" in str(done.exception)  # 40 are not enough to measure, and it is told which protocol they are of


def test_what_a_record_says_of_a_system(parts, tmp_path):
    weights = ("--weights", f"base={parts['base']}", "--weights", f"classifier={parts['classifier']}")
    path = drawn(parts, tmp_path, "--system", "digits-guided", *weights, "--sampling-seed", 5)
    about = read_fields(path, sha256_file(path))
    assert about.system == "digits-guided" and about.backbone == "adm-xs+adm-classifier-xs"
    sizes = {"input_size": 8, "in_channels": 1, "num_classes": 10}
    base, classifier = (registry.backbones.get(name).count(**sizes) for name in about.backbone.split("+"))
    sampling, training = about.sampling, about.training
    assert about.params == base.params + classifier.params and about.gflops == base.gflops
    assert (sampling.steps, sampling.evaluations, sampling.seed, sampling.uint8_rule) == (4, 4, 5, "adm")
    assert (sampling.guidance_scale, sampling.guidance_channels) == (1.0, "classifier")
    assert sampling.gflops_per_image == pytest.approx(4 * base.gflops + 4 * 2 * classifier.gflops)
    assert (training.steps, training.images) == (4, 96) and (sampling.stage_steps, sampling.settings) == (None, None)
    assert training.gflops == pytest.approx(3 * 96 * (base.gflops + classifier.gflops))
    record = Record(
        provenance="measured",
        metric="fd",
        value=1.0,
        n=40,
        protocol="digits",
        resolution=8,
        dataset="digits",
        **about.arguments(),
    )
    assert guidance_text(record) == "1 (classifier)"


def load_file(folder, conditioning_noise):
    """A user's own cascade, from a TOML file."""
    path = folder / "mine.toml"
    path.write_text(
        f"""
        name = "mine"
        protocol = "digits"
        uint8_rule = "adm"
        [base]
        backbone = "adm-xs"
        clip_denoised = true
        arguments = {{ input_size = 4, in_channels = 1, num_classes = 10, attention_resolutions = [4] }}
        [[upsamplers]]
        backbone = "adm-u-xs"
        clip_denoised = true
        conditioning_noise = {conditioning_noise}
        arguments = {{ input_size = 8, low_res_size = 4, in_channels = 1, num_classes = 10 }}
        """
    )
    assert load_system(path).base.arguments["attention_resolutions"] == (4,)
    return path


def test_a_classifier_guides(parts, tmp_path):
    weights = ("--weights", f"base={parts['base']}", "--weights", f"classifier={parts['classifier']}")
    path = drawn(parts, tmp_path, "--system", "digits-guided", *weights)
    strong = System(**{**vars(get_system("digits-guided")), "name": "strong"})
    strong = replace(strong, classifier=replace(strong.classifier, scale=50.0))
    registry.systems.register(strong) if "strong" not in registry.systems else None
    other = drawn(parts, tmp_path, "--system", "strong", *weights)
    record = read_sidecar(path)["record"]
    assert record["sampling"]["gflops_per_image"] > 4 * record["gflops"]
    assert not np.array_equal(read_samples(path).images, read_samples(other).images)


def test_weights_that_change_after_they_were_named_are_not_drawn_with(parts, tmp_path):
    folder = tmp_path / "base.safetensors"
    folder.write_bytes(next(parts["base"].glob("snapshots/*/ema.safetensors")).read_bytes())
    bound = load_parts(replace(get_system("digits-guided"), name="plain", classifier=None), {"base": folder})
    folder.write_bytes(next(parts["base"].glob("checkpoints/*/model.safetensors")).read_bytes())
    settings = {"count": 4, "seed": 0, "precision": "float32", "batch": None, "device": "cpu"}
    with pytest.raises(UserError, match="has changed since sampling began"):
        sample_system(bound, folder=tmp_path / "out", **settings)


def test_a_run_of_another_family_takes_the_place_of_the_base(parts, tmp_path):
    base = replace(get_system("digits-guided"), name="plain", classifier=None)
    bound = load_parts(base, {"base": parts["dit"]})
    assert bound.system.backbone == "dit-xs-4" and bound.sources["base"].steps == 4
