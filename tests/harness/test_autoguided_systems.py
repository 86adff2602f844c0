"""Autoguidance: a system of a run and a weaker run, sampled in torch and jax, and counted wherever it is stated."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from small_runs import request, workshop

from backbones.dit.flax_model import DiT
from harness import registry
from harness.cli import group
from harness.diffusion.guidance import Guidance
from harness.engines.jax.sampling import _compiled
from harness.engines.torch import systems as torch_systems
from harness.errors import UserError
from harness.io.files import sha256_file
from harness.pipeline.sample_system import sample_system
from harness.pipeline.sidecar import read_fields
from harness.planning.flops_table import sampling_row
from harness.runs.samples import read_samples, read_sidecar
from harness.systems.binding import load_parts, with_steps
from harness.systems.checks import check_system
from harness.systems.read import get_system, system_from_dict
from harness.systems.spec import Component, GuidanceClassifier, System, WeakNetwork
from reports.texts import guidance_text
from results.records import Record

SMALL = {"input_size": 8, "in_channels": 1, "num_classes": 10}
COUNT = 12
PATCHES = {2: "base", 4: "weak"}  # of the system's two networks


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A run, and one of fewer parameters, half the steps and another objective."""
    root = tmp_path_factory.mktemp("parts")
    workshop(root / "good", request("dit-xs-2", steps=4)).train(4)
    workshop(root / "weak", request("dit-xs-4", steps=2, settings={"objective": "epsilon-fixed"})).train(2)
    return {"base": root / "good", "weak": root / "weak"}


@pytest.fixture
def images(monkeypatch):
    """Part of the system: the images that its network computed in this test, in torch or jax."""
    counts = {"base": 0, "weak": 0}
    read, call = torch_systems.read_network, DiT.__call__

    def counted_network(part, source):
        net = read(part, source)
        name = PATCHES[part.spec.arguments(**part.arguments)["patch"]]
        net.register_forward_hook(lambda module, inputs, out: counts.update({name: counts[name] + len(inputs[0])}))
        return net

    def counted_call(self, x, *rest, **options):
        name = PATCHES[self.patch]
        jax.debug.callback(lambda _: counts.update({name: counts[name] + len(x)}), x[0, 0, 0, 0])
        return call(self, x, *rest, **options)

    monkeypatch.setattr(torch_systems, "read_network", counted_network)
    monkeypatch.setattr(DiT, "__call__", counted_call)
    _compiled.cache_clear()
    yield counts
    _compiled.cache_clear()


@pytest.mark.parametrize(("interval", "frameworks"), [("", ["torch"]), ("0.5-20", ["torch", "jax"])])
def test_its_images_are_made_by_the_evaluations_that_are_stated(interval, frameworks, parts, images, tmp_path):
    system = get_system("digits-autoguided")
    system = replace(system, weak=replace(system.weak, scale=8.0, interval=interval))
    loaded = with_steps(load_parts(system, parts), 6)
    assert loaded.notes == (
        "weak: objective epsilon-fixed, as its run was trained; the system has epsilon-learned-range",
    )
    sigma = loaded.system.base.plan().sigma
    guided = int(((sigma >= 0.5) & (sigma <= 20)).sum()) if interval else 6
    assert 0 < guided < 6 or not interval
    base = registry.backbones.get("dit-xs-2").count(**SMALL).gflops
    weak = loaded.system.weak.compute().gflops  # without variance channels
    row = sampling_row(loaded.system)
    assert row["gflops_unguided"] == pytest.approx(6 * base) and row["gflops_guidance"] == pytest.approx(guided * weak)

    made, settings = {}, {"count": COUNT, "seed": 3, "precision": "float32", "batch": COUNT, "device": "cpu"}
    for framework in frameworks:
        images.update(base=0, weak=0)
        path = sample_system(loaded, folder=tmp_path, framework=framework, **settings)
        jax.effects_barrier()
        assert images == {"base": 6 * COUNT, "weak": guided * COUNT}
        assert read_sidecar(path)["evaluations"] == loaded.system.evaluations == row["evaluations"] == 6 + guided
        made[framework] = read_samples(path).images
        about = read_fields(path, sha256_file(path))
        assert about.sampling.evaluations == 6 + guided and about.framework == framework
        assert about.sampling.gflops_per_image == pytest.approx(6 * base + guided * weak)
        assert (about.sampling.guidance_scale, about.sampling.guidance_interval) == (8.0, interval or None)
        assert about.training.gflops == pytest.approx(3 * 24 * (4 * base + 2 * weak))
    apart = np.abs(made["torch"].astype(int) - made[frameworks[-1]])
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01 and made["torch"].std() > 10

    plain = replace(loaded, system=replace(loaded.system, weak=None), sources={"base": loaded.sources["base"]})
    alone = read_samples(sample_system(plain, folder=tmp_path, **settings)).images
    assert np.abs(alone.astype(int) - made["torch"]).mean() > 0.5

    assert about.backbone == "dit-xs-2+dit-xs-4" and about.sampling.settings == "autoguided by dit-xs-4"
    record = Record(
        provenance="measured", metric="fd", value=1.0, n=COUNT, protocol="digits", resolution=8, dataset="digits",
        **about.arguments(),
    )  # fmt: skip
    assert guidance_text(record) == f"8{'@' + interval if interval else ''} (autoguidance)"


def test_what_an_image_costs_is_printed():
    done = CliRunner().invoke(group, ["flops", "--sampling", "--json", "digits-autoguided"])
    (row,) = json.loads(done.stdout)["rows"]
    weak = registry.backbones.get("dit-xs-4").count(**SMALL).gflops
    assert row["evaluations"] == 100 and row["gflops_guidance"] == pytest.approx(50 * weak)


FILE = {
    "name": "mine",
    "protocol": "digits",
    "base": {"backbone": "dit-xs-2", "steps": 5, "arguments": SMALL},
    "weak": {"backbone": "dit-xs-4", "scale": 2, "interval": "0.3-", "arguments": SMALL},
}


def test_a_file_states_it_and_the_identity_of_other_systems_stays():
    system = system_from_dict(FILE, "mine.toml")
    check_system(system)
    assert system.guidance == Guidance(2.0, "0.3-") and list(system.parts) == ["base", "weak"]
    assert System.from_dict(system.as_dict()).weak == system.weak
    assert "noise_scale" not in system.as_dict()["weak"]
    louder = replace(
        system, base=replace(BASE, **FLOW, sampler="heun", noise_scale=2.0), weak=replace(WEAK, **FLOW, noise_scale=2.0)
    )
    check_system(louder)
    np.testing.assert_array_equal(louder.weak_plan().x0_from_output, louder.base.plan().x0_from_output)
    assert System.from_dict(louder.as_dict()).weak == louder.weak
    plain = replace(system, weak=None)
    assert "weak" not in plain.as_dict() and "guidance_rule" not in plain.as_dict()["base"]
    assert System.from_dict(plain.as_dict()).weak is None


BASE, WEAK = (
    Component(backbone="dit-xs-2", arguments=SMALL, steps=5),
    WeakNetwork(backbone="dit-xs-4", arguments=SMALL, scale=2.0),
)
FLOW = {"objective": "velocity", "schedule": "flow"}  # of both networks
ODE = {**FLOW, "sampler": "dopri5", "steps": Component.steps}
CLASSIFIER = GuidanceClassifier(backbone="adm-classifier-xs", arguments=SMALL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weak": replace(WEAK, scale=1.0)}, "weak: scale 1 must be above 1"),
        ({"base": replace(BASE, guidance_scale=2.0)}, "excludes classifier-free guidance of the base"),
        ({"classifier": CLASSIFIER}, "excludes a classifier"),
        (
            {"weak": replace(WEAK, schedule="cosine")},
            "the weak network was trained on noise of schedule cosine, and the base that it guides has linear",
        ),
        ({"weak": replace(WEAK, diffusion_steps=500)}, "of diffusion_steps 500, and the base that it guides has 1000"),
        ({"base": replace(BASE, **FLOW, sampler="heun", noise_scale=2.0), "weak": replace(WEAK, **FLOW)}, "noise_scale 1.0, and .* 2.0"),
        ({"base": replace(BASE, **ODE), "weak": replace(WEAK, **FLOW)}, "an adaptive sampler is for systems of one network"),
        (
            {"base": replace(BASE, **ODE, guidance_rule="mine", guidance_scale=2.0), "weak": None},
            "unknown guidance rule 'mine'",
        ),
        ({"weak": replace(WEAK, objective="velocity")}, "velocity needs a schedule in continuous time"),
        ({"weak": replace(WEAK, arguments={**SMALL, "input_size": 16})}, "has input_size 16 and the base that it guides 8"),
        ({"weak": replace(WEAK, arguments={**SMALL, "num_classes": 7})}, "weak has 7 classes"),
        ({"weak": replace(WEAK, backbone="adm-u-xs")}, "weak is 'adm-u-xs', of kind upsampler; it must be a denoiser"),
        ({"weak": replace(WEAK, interval="900-")}, "guidance 2@900- guides none of the 5 ddpm steps"),
        ({"weak": replace(WEAK, interval="0.10-3")}, "weak: interval '0.10-3': write '0.1-3'"),
        ({"weak": replace(WEAK, interval="x")}, "weak: interval: 'x' is not an interval"),
        ({"base": replace(BASE, guidance_rule="mine")}, "base: guidance_rule: .* scale 1 is no guidance, so it has no rule"),
        (
            {"base": replace(BASE, guidance_rule="mine", guidance_scale=2.0), "weak": None},
            "unknown guidance rule 'mine'",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(change, words):
    with pytest.raises(UserError, match=words) as error:
        check_system(replace(System(name="mine", protocol="digits", base=BASE, weak=WEAK), **change))
    assert "\n" not in str(error.value)


def test_items_of_a_file_are_checked():
    for change, words in (
        ({"backbone": "dit-xs-4"}, r"\[weak\]: scale is missing"),
        ({"backbone": "dit-xs-4", "scale": 2, "steps": 5}, r"\[weak\]: unknown item 'steps'"),
        ({"backbone": "dit-xs-4", "scale": "2"}, r"scale = '2' must be of type float"),
    ):
        with pytest.raises(UserError, match=words):
            system_from_dict({**FILE, "weak": change}, "mine.toml")


def test_runs_that_do_not_fit_are_refused(parts, tmp_path):
    system = get_system("digits-autoguided")
    with pytest.raises(UserError, match="needs weights of weak: give --weights weak=FILE"):
        load_parts(system, {"base": parts["base"]})
    workshop(tmp_path / "cosine", request("dit-xs-4", steps=1, settings={"schedule": "cosine"})).train(1)
    with pytest.raises(UserError, match="the weak network was trained on noise of schedule cosine"):
        load_parts(system, {**parts, "weak": tmp_path / "cosine"})
