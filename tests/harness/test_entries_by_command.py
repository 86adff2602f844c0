"""Where a command reads weights that are no backbone's, --entry chooses one of two networks in a file: feature networks
(evaluate, data reference, diagnose, run) and autoencoders (sample, data latents, run, studies)."""

import json

import numpy as np
import pytest
import tiny_suite
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from small_vae import save_vae

import harness as public
from evaluators.features import FeatureSpec
from evaluators.suites import METRICS, Suite
from harness import registry
from harness.autoencoders.load import read_identity
from harness.cli import group
from harness.data.latents import read_meta
from harness.errors import UserError
from harness.runs.run import open_run
from harness.runs.sample_set import default_decoder
from harness.runs.samples import read_samples, read_sidecar, write_samples
from harness.studies import load as load_study
from harness.studies.expand import expand
from harness.weights.files import open_weights

PROTOCOL = """
name = "latents-32"
dataset = "npz"
resolution = 32
num_classes = 10
space = "latents"
input_size = 4
in_channels = 4
samples = 100
suite = "tiny-file"
[recipe]
batch = 4
[sampling]
steps = [2]
guidance_channels = "all"
"""
CHOOSE = "choose one with --entry"


class Scaled(tiny_suite.Projection):
    """The projection, multiplied by a number that is in the weight file."""

    def __init__(self, spec, device, weights, entry=None):
        super().__init__(spec, device)
        tensors = open_weights(weights, entry=entry).tensors
        self.factor = float(tensors["factor"].read()[0])
        self.sha256 = f"hash of {self.factor}"

    def __call__(self, images):
        found = super().__call__(images)
        return type(found)(pooled=found.pooled * np.float32(self.factor), spatial=found.spatial)


def load(spec, device, weights, entry=None):
    return Scaled(spec, device, weights, entry)


def load_without_entries(spec, device, weights):
    return Scaled(spec, device, weights, "one")


def suite(name, loader):
    features = FeatureSpec(
        name=name, dim=tiny_suite.DIM, classes=None, input_size=8, loader=f"{__name__}:{loader}",
        description="a projection", weights_option="--features-weights",
    )  # fmt: skip
    return Suite(name=name, version=1, features=features, metrics=(METRICS["fd"],))


@pytest.fixture(scope="module", autouse=True)
def suites():
    names = {"tiny-file": "load", "tiny-old": "load_without_entries"}
    for name, loader in names.items():
        registry.suites.register(suite(name, loader), "the tests")
    yield
    for name in names:
        del registry.suites._items[name], registry.suites._owners[name]


def run(*words):
    return CliRunner().invoke(group, [str(word) for word in words])


def done(*words):
    result = run(*words)
    assert result.exit_code == 0, (result.exception, result.output)
    return result


def refused(*words):
    result = run(*words)
    assert isinstance(result.exception, UserError), (result.exception, result.output)
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Images, a weight file with two feature networks and one with two autoencoders, and each autoencoder alone."""
    home = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(1)
    for name in ("images", "samples"):
        images = np.kron(rng.integers(0, 256, (100, 4, 4, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
        write_samples(home / f"{name}.npz", [images], np.arange(100) % 10, {})
        (home / f"{name}.json").unlink()
    factor = {"factor": torch.tensor([2.0]), "other": torch.zeros(1)}
    torch.save({"one": factor, "two": {**factor, "factor": torch.tensor([3.0])}}, home / "features.pt")
    states = {}
    for seed, name in enumerate(("one", "two")):
        folder = save_vae(home / name, seed=seed, scaling_factor=0.8)
        states[name] = load_file(folder / "diffusion_pytorch_model.safetensors")
    (home / "both").mkdir()
    (home / "both" / "config.json").write_bytes((home / "one" / "config.json").read_bytes())
    torch.save(states, home / "both" / "diffusion_pytorch_model.bin")
    (home / "protocol.toml").write_text(PROTOCOL)
    return home


def evaluation(home, tmp_path, *words):
    fixed = ("--reference", home / "images.npz", "--suite", "tiny-file", "--cache", tmp_path / "cache", "--json")
    return ("evaluate", home / "samples.npz", *fixed, "--out", tmp_path / "records.jsonl", *words)


def test_evaluate_reads_the_entry_of_a_feature_network(home, tmp_path):
    weights = ("--features-weights", home / "features.pt")
    assert CHOOSE in refused(*evaluation(home, tmp_path, *weights))
    assert "has no entry 'three'" in refused(*evaluation(home, tmp_path, *weights, "--entry", "three"))
    values = {}
    for entry in ("one", "two"):
        document = json.loads(done(*evaluation(home, tmp_path, *weights, "--entry", entry)).stdout)
        values[entry] = document["records"][0]["value"]
    assert values["two"] / values["one"] == pytest.approx((3 / 2) ** 2, rel=1e-4)
    result = public.evaluate(
        home / "samples.npz", reference=home / "images.npz", suite="tiny-file", features_weights=home / "features.pt",
        entry="two", cache=tmp_path / "cache", out=tmp_path / "python.jsonl",
    )  # fmt: skip
    assert result.records[0].value == values["two"]


def test_an_entry_belongs_to_a_weight_file(home, tmp_path):
    text = refused(*evaluation(home, tmp_path, "--suite", "embedded", "--entry", "one"))
    assert "suite 'embedded' includes the weights of its network; leave out --entry 'one'" in text
    words = ("--suite", "tiny-old", "--features-weights", home / "features.pt")
    done(*evaluation(home, tmp_path, *words))
    text = refused(*evaluation(home, tmp_path, *words, "--entry", "two"))
    assert "features tiny-old take no entry of a weight file" in text


def test_a_reference_is_made_with_the_entry(home, tmp_path):
    words = (
        "data",
        "reference",
        home / "images.npz",
        "--suite",
        "tiny-file",
        "--features-weights",
        home / "features.pt",
    )
    assert CHOOSE in refused(*words, "--out", tmp_path / "r.npz", "--cache", tmp_path / "c")
    for entry, factor in (("one", 2.0), ("two", 3.0)):
        made = done(*words, "--entry", entry, "--out", tmp_path / f"{entry}.npz", "--cache", tmp_path / "c", "--json")
        assert json.loads(made.stdout)["features_sha256"] == f"hash of {factor}"


def latents(home, out, *words):
    return ("data", "latents", home / "images.npz", "--device", "cpu", "--out", out, *words)


def test_latents_runs_and_samples_are_of_the_entry_of_an_autoencoder(home, tmp_path):
    both = ("--vae", home / "both")
    assert CHOOSE in refused(*latents(home, tmp_path / "cache", *both))
    done(*latents(home, tmp_path / "one", "--vae", home / "one"))
    assert "entry" not in read_meta(tmp_path / "one").vae, "identities of files with one entry are as they were"
    for entry in ("one", "two"):
        done(*latents(home, tmp_path / f"both-{entry}", *both, "--entry", entry))
    again = done(*latents(home, tmp_path / "both-two", *both, "--entry", "two"))
    assert "exists already, the same latents" in again.stdout
    assert "vae.entry is 'two' there and 'one' here" in refused(
        *latents(home, tmp_path / "both-two", *both, "--entry", "one")
    )
    arrays = {name: np.load(tmp_path / name / "latents.npy") for name in ("one", "both-one", "both-two")}
    np.testing.assert_array_equal(arrays["one"], arrays["both-one"])
    assert np.abs(arrays["one"] - arrays["both-two"]).max() > 0.01

    # A run in these latents decodes by the same entry, without being told.
    words = (
        "--backbone", "dit-xs-2", "--protocol", home / "protocol.toml", "--data", tmp_path / "both-two",
        "--precision", "float32", "--micro-batch", "4", "--device", "cpu", "--steps", "2", "--out", tmp_path / "run",
        "--features-weights", home / "features.pt",
    )  # fmt: skip
    assert CHOOSE in refused("run", *words) and not (tmp_path / "run").exists(), "before the training, which takes long"
    assert "--entry 'stranger': a run has the weight files decoder, features" in refused(
        "run", *words, "--entry", "stranger=one"
    )
    assert "--entry decoder='one' is of --decoder" in refused(
        "run", *words, "--entry", "decoder=one", "--entry", "features=two"
    )
    done("run", *words, "--entry", "features=two", "--no-report")
    trained = open_run(tmp_path / "run")
    (path,) = (tmp_path / "run").glob("samples/*/samples.npz")
    decoder = read_sidecar(path)["identity"]["decoder"]
    assert decoder["entry"] == "two" and default_decoder(trained) == decoder
    assert trained.identity["latents"]["vae_entry"] == "two"
    assert read_identity(str(home / "both"), "--decoder", "two") == decoder, "what a study knows its samples by"

    # Samples by another decoder: of a file with two, the entry that is named.
    sample = ("sample", "--run", tmp_path / "run", "--samples", "8")
    assert CHOOSE in refused(*sample, "--decoder", home / "both")
    assert "--entry 'base': the weights of a run are its own" in refused(*sample, "--entry", "base=one")
    assert "--entry decoder='one' is of --decoder" in refused(*sample, "--entry", "decoder=one")
    drawn = {}
    for name, more in (
        ("own", ()),
        ("alone", ("--decoder", home / "one")),
        ("one", ("--decoder", home / "both", "--entry", "decoder=one")),
        ("two", ("--decoder", home / "both", "--entry", "decoder=two")),
    ):
        drawn[name] = done(*sample, *more).stdout.split("\n")[0]
    images = {name: read_samples(tmp_path / path).images for name, path in drawn.items()}
    np.testing.assert_array_equal(images["one"], images["alone"])
    np.testing.assert_array_equal(images["two"], images["own"])
    assert (images["one"] != images["two"]).mean() > 0.2
    assert drawn["two"] == drawn["own"] and len(set(drawn.values())) == 3


def test_a_plan_names_a_file_of_two_networks_as_a_run_refuses_it(home, tmp_path):
    done(*latents(home, tmp_path / "cache", "--vae", home / "one"))
    words = ("--backbone", "dit-xs-2", "--protocol", home / "protocol.toml", "--data", tmp_path / "cache", "--steps", 2)
    features, decoder = ("--features-weights", home / "features.pt"), ("--decoder", home / "both")

    def missing(*more):
        document = json.loads(done("plan", *words, *more, "--json").stdout)
        assert bool(document["missing_evaluator_files"]) == ("--features-weights" not in more)
        return document["missing"]

    for file, part in ((features, "features"), (decoder, "decoder")):
        (sentence,) = missing(*file)
        assert CHOOSE in sentence and sentence in refused("run", *words, *file, "--out", tmp_path / "run")
        (sentence,) = missing(*file, "--entry", f"{part}=three")
        assert "has no entry 'three'; it has one, two" in sentence
        assert missing(*file, "--entry", f"{part}=two") == []
    assert missing() == [] and not (tmp_path / "run").exists()
    (sentence,) = missing("--features-weights", tmp_path / "nothing.pt")
    assert "nothing.pt: no such file" in sentence
    assert "--entry decoder='two' is of --decoder" in refused("plan", *words, "--entry", "decoder=two")
    pixels = ("plan", "--backbone", "dit-xs-2", "--decoder", home / "both")
    assert "--decoder belongs to runs in latents, and protocol 'digits' is in pixels" in refused(*pixels)
    text = done("plan", *words, *features).stdout
    assert CHOOSE in next(line for line in text.splitlines() if line.startswith("missing  "))
    torch.save({"one": {}}, home / "one" / "diffusion_pytorch_model.bin")  # the autoencoder of the latents, by now
    (home / "one" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "moved.safetensors")
    try:
        assert "holds no tensors by name" in missing()[0]
    finally:
        (tmp_path / "moved.safetensors").rename(home / "one" / "diffusion_pytorch_model.safetensors")
        (home / "one" / "diffusion_pytorch_model.bin").unlink()


def test_a_study_hands_its_entries_on(tmp_path):
    study = tmp_path / "study.toml"
    study.write_text('protocol = "digits"\nbackbones = ["dit-xs-2"]\nentry = ["decoder=one", "features=two"]\n')
    (run,) = expand(load_study(study)).runs
    assert run.options[0].entry == {"decoder": "one", "features": "two"}
    words = " ".join(run.commands[0])
    assert "--entry decoder=one" in words and "--entry features=two" in words
