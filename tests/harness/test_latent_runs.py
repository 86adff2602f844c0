"""Runs in latents: from a cache to decoded, measured samples; resumed to the bit; refused where the cache is another."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_suite
import torch
from click.testing import CliRunner
from small_vae import save_vae

from backbones.autoencoders.spec import KNOWN
from evaluators.features.spec import FeatureSpec
from harness import registry
from harness.autoencoders.files import identity_behind_latents
from harness.cli import group
from harness.data import latents
from harness.data.load import training_data
from harness.engines.backend import get_backend
from harness.engines.torch import repa
from harness.errors import UserError
from harness.pipeline.sample import decoder_of
from harness.pipeline.train import RunSession
from harness.planning.plan import missing
from harness.planning.request import make_request
from harness.randomness import Purpose, normal, uniform
from harness.runs.run import Resolved, open_run
from harness.runs.sample_set import default_decoder
from harness.runs.samples import read_samples, read_sidecar, write_samples

TASK = """
name = "latents-32"
dataset = "npz"
resolution = 32
num_classes = 10
space = "latents"
input_size = 4
in_channels = 4
samples = 100
suite = "{suite}"
[recipe]
batch = 12
learning_rate = 1e-3
[sampling]
steps = [3]
guidance_channels = "all"
"""
FIXED = ["--precision", "float32", "--micro-batch", "6", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def suite():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with tiny_suite.registered():
        yield
    torch.set_num_threads(before)


def harness(*words):
    return CliRunner().invoke(group, [str(each) for each in words])


def done(*words):
    result = harness(*words)
    assert result.exit_code == 0, (result.exception, result.output)
    return result


def refused(*words):
    result = harness(*words)
    assert isinstance(result.exception, UserError), (result.exception, result.output)
    text = str(result.exception)
    assert "\n" not in text
    return text + result.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Images, an autoencoder, a cache and a protocol, as a user has them."""
    home = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (60, 4, 4, 3))
    images = np.kron(coarse, np.ones((1, 8, 8, 1))).astype(np.uint8)
    write_samples(home / "images.npz", [images], np.arange(60) % 10, {})
    save_vae(home / "vae", scaling_factor=0.8, shift_factor=0.1)
    (home / "task.toml").write_text(TASK.format(suite="tiny"))
    done("data", "latents", home / "images.npz", "--vae", home / "vae", "--out", home / "cache", "--device", "cpu")
    return home


def words(home, *more, cache="cache"):
    task = ("--backbone", "dit-xs-2", "--protocol", home / "task.toml", "--data", home / cache)
    return (*task, *FIXED, *more)


@pytest.fixture(scope="module")
def ran(home):
    done("run", *words(home, "--steps", "4", "--out", home / "run"))
    return home / "run"


def test_a_run_ends_in_decoded_and_measured_samples(home, ran):
    run, meta = open_run(ran), latents.read_meta(home / "cache")
    assert run.identity["latents"] == {
        "vae_sha256": meta.vae["weights_sha256"], "vae_config_sha256": meta.vae["config_sha256"],
        "scale_factor": 0.8, "shift_factor": 0.1, "sha256": meta.sha256,
    }  # fmt: skip
    assert run.identity["dataset_sha256"] == meta.images["sha256"]
    (path,) = ran.glob("samples/*/samples.npz")
    samples, facts = read_samples(path), read_sidecar(path)
    assert samples.images.shape == (100, 32, 32, 3) and samples.images.std() > 5
    assert path.with_name("grid.png").exists()
    assert facts["identity"]["decoder"]["weights_sha256"] == meta.vae["weights_sha256"]
    records = [json.loads(line) for line in run.records.read_text().splitlines()]
    assert {each["metric"] for each in records} == {"fd", "precision"}
    for each in records:
        drawn = each["sampling"]
        assert drawn["decoder"] == f"vae-{meta.vae['weights_sha256'][:12]}" and drawn["decoder_gflops"] > 0
        assert str(home) not in json.dumps(each)  # a record names no place
    assert drawn["gflops_per_image"] == pytest.approx(facts["record"]["gflops"] * 3)


def test_the_decoder_of_a_run_is_known_from_its_run_file(home, ran, tmp_path):
    """The same identity as the loaded decoder's, also where its files are gone; of a public one with its name."""
    run = open_run(ran)
    assert default_decoder(run) == decoder_of(run, None).identity
    gone = dataclasses.replace(run, source_paths={"vae": str(tmp_path / "gone")})
    assert default_decoder(gone) == default_decoder(run)
    made_by = run.identity["latents"]
    for place in ("ft-ema", "stabilityai/sd-vae-ft-ema"):
        found = identity_behind_latents({**made_by, "shift_factor": 0.0}, place)
        assert found == {
            "name": KNOWN["ft-ema"].record_name, "weights_sha256": made_by["vae_sha256"], "scale_factor": 0.8,
            "config_sha256": made_by["vae_config_sha256"],
        }  # fmt: skip


def sampler_of(home, ran, framework="torch", decoder=None):
    from harness.diffusion.sampler_plan import sampler_plan

    run = open_run(ran)
    request = make_request(backbone="dit-xs-2", protocol=str(home / "task.toml"), framework=framework)
    plan = sampler_plan("ddpm", 3, schedule="linear", diffusion_steps=1000, objective="epsilon-learned-range")
    snapshot = run.ema_checkpoint(4) / "ema.safetensors"
    return get_backend(framework).make_sampler(
        request, run, snapshot, plan, precision="float32", batch=100, decoder=decoder
    )


class Theirs:
    """diffusers' own decode of what the sampler hands over, by the equation."""

    def __init__(self, folder):
        from diffusers import AutoencoderKL

        self.vae = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()

    @torch.no_grad()
    def decode(self, x):
        return self.vae.decode(torch.as_tensor(x) / 0.8 + 0.1).sample.clamp(-1, 1)


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_the_images_are_diffusers_decodings_of_the_latents_in_both_frameworks(home, ran, framework, monkeypatch):
    (path,) = ran.glob("samples/*/samples.npz")
    kept = read_samples(path)
    if framework == "jax":
        run = open_run(ran)
        honoured = dataclasses.replace(run.resolved, threads=get_backend("jax").devices.threads())
        monkeypatch.setattr(f"{__name__}.open_run", lambda folder: dataclasses.replace(run, resolved=honoured))
    drawn = sampler_of(home, ran, framework, Theirs(home / "vae")).draw(np.arange(100), kept.labels, lambda: None)
    apart = np.abs(drawn.astype(int) - kept.images)
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(home, ran, tmp_path):
    done("train", *words(home, "--steps", "2", "--out", tmp_path / "run"))
    done("train", *words(home, "--steps", "4", "--out", tmp_path / "run"))
    for file in ("log.jsonl", "snapshots/step-00000004/ema.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (ran / file).read_bytes()


def shop_of(home, folder, framework):
    request = make_request(
        backbone="dit-xs-2", protocol=str(home / "task.toml"), data=home / "cache", framework=framework, steps=3
    )
    request = dataclasses.replace(request, arguments={**request.arguments, "depth": 1, "width": 32, "heads": 2})
    shop = RunSession(request, training_data(request.protocol, request.data), folder)
    threads = torch.get_num_threads()
    if framework == "jax":
        from harness.engines.jax import mesh

        threads = mesh.threads()
    shop.create(Resolved(device="cpu", device_name="test", precision="float32", micro_batch=12, threads=threads))
    return shop


def test_both_frameworks_learn_the_same_latents(home, tmp_path):
    """x0 by its equation from the cache, and three losses from one initialisation."""
    import jax
    from flax import nnx

    from backbones.flax_weights import from_torch
    from harness.engines.torch.trainer import build

    found, positions = latents.load(home / "cache"), np.arange(55, 67)  # over the end of an epoch
    one, other = (shop_of(home, tmp_path / name, name) for name in ("torch", "jax"))
    net = build(one.request.spec, one.request.arguments, 0)
    state = {name: value.numpy().copy() for name, value in net.state_dict().items()}
    flax_net = nnx.eval_shape(lambda: one.request.spec.build("jax", **other.request.arguments))
    nnx.update(flax_net, jax.tree.map(jax.numpy.asarray, from_torch(flax_net, state)))
    in_torch = get_backend("torch").make_engine(one.request, one.run, one.data, net)
    in_jax = get_backend("jax").make_engine(other.request, other.run, other.data, flax_net)

    x0, _, draws = in_torch._batch(range(55, 67))
    rows = in_torch._stream.rows(positions)
    view = (uniform(0, Purpose.FLIP, positions, 0) < 0.5).astype(int)
    assert 0 < view.sum() < 12
    mean, std = (found.latents[rows, view, moment].astype(np.float64) for moment in (0, 1))
    expected = (mean + std * normal(0, Purpose.POSTERIOR, positions, 0, (4, 4, 4)) - 0.1) * 0.8
    np.testing.assert_allclose(x0.numpy(), expected, atol=2e-6)
    dropped = uniform(0, Purpose.LABEL_DROPOUT, positions, 0) < 0.1
    np.testing.assert_array_equal(draws.y.numpy(), np.where(dropped, 10, found.labels[rows]))

    for step in (1, 2, 3):
        for engine in (in_torch, in_jax):
            assert engine.step(step, lambda: False)
    np.testing.assert_allclose(in_torch.pop_losses(), in_jax.pop_losses(), rtol=2e-5)


def test_a_cache_by_another_autoencoder_is_refused_with_both_hashes(home, ran, tmp_path):
    save_vae(tmp_path / "vae", seed=1, scaling_factor=0.8, shift_factor=0.1)
    done("data", "latents", home / "images.npz", "--vae", tmp_path / "vae", "--out", tmp_path / "cache")
    text = refused("train", *words(home, "--steps", "6", "--out", ran, cache=tmp_path / "cache"))
    mine, other = (latents.read_meta(each).vae["weights_sha256"] for each in (home / "cache", tmp_path / "cache"))
    assert f"latents.vae_sha256 is '{mine}' there and '{other}' here" in text


def test_a_cache_that_is_whole_is_known_again_without_a_framework(home, tmp_path):
    """By the files of its autoencoder; another one is loaded, and refused with what differs."""
    code = (
        "import sys\nfrom harness.cli import main\n"
        f"sys.argv = ['harness', 'data', 'latents', {str(home / 'images.npz')!r}, '--vae', {str(home / 'vae')!r},"
        f" '--out', {str(home / 'cache')!r}]\n"
        "main()\nassert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert f"{home / 'cache'}: exists already, the same latents" in found.stdout
    save_vae(tmp_path / "vae", seed=1, scaling_factor=0.8, shift_factor=0.1)
    text = refused("data", "latents", home / "images.npz", "--vae", tmp_path / "vae", "--out", home / "cache")
    assert "holds latents of something else (vae.name is" in text


def test_images_in_place_of_latents_and_latents_of_another_size_are_refused_with_the_command(home, tmp_path):
    from harness.data.prepared import is_prepared

    text = refused("run", *words(home, cache="nothing"))
    assert (
        "nothing does not exist; make it by `harness data latents FILE.npz --vae ft-ema --out npz-32-latents`" in text
    )
    for name in ("images.npy", "labels.npy", "meta.json"):
        (tmp_path / name).touch()
    assert is_prepared(tmp_path)  # at a glance
    text = refused("run", *words(home, cache=tmp_path))
    assert f"holds images; encode them once by `harness data latents {tmp_path} --vae ft-ema --out" in text
    (tmp_path / "large.toml").write_text(TASK.format(suite="tiny").replace("input_size = 4", "input_size = 8"))
    text = refused("train", "--backbone", "dit-xs-2", "--protocol", tmp_path / "large.toml", "--data", home / "cache")
    assert "the cache has latents 4x4x4 of images of 32 pixels, protocol 'latents-32' wants latents 4x8x8" in text
    (tmp_path / "coarse.toml").write_text(TASK.format(suite="tiny").replace("input_size = 4", "input_size = 2"))
    text = refused("train", "--backbone", "dit-xs-2", "--protocol", tmp_path / "coarse.toml")
    assert "`harness data latents FILE.npz --vae DIR --out npz-32-latents`" in text  # no autoencoder with a name
    assert "images of 3 channels, latents of 4 channels, a cell for 16x16 pixels" in text
    (lack,) = missing(make_request(backbone="dit-xl-2", protocol="imagenet-256"))
    prepare, encode, run = (
        lack.index(part)
        for part in (
            "`harness data prepare imagenet --from PATH --out imagenet-256 --resolution 256`",
            "`harness data latents imagenet-256 --vae ft-ema --out imagenet-256-latents`",
            "--data imagenet-256-latents",
        )
    )
    assert prepare < encode < run


def test_the_decoder_is_the_autoencoder_of_the_cache_unless_another_is_named(home, ran, tmp_path):
    run = shutil.copytree(ran, tmp_path / "run")
    places = json.loads((run / "run.json").read_text())
    gone = {**places, "places": {**places["places"], "vae": str(tmp_path / "gone")}}
    (run / "run.json").write_text(json.dumps(gone))
    sample = ("sample", "--run", run, "--samples", "4", "--sampling-steps", "3")
    text = refused(*sample)
    assert "is not available from" in text and "--decoder DIR" in text
    done(*sample, "--decoder", home / "vae")
    other = save_vae(tmp_path / "other", seed=2, scaling_factor=0.8, shift_factor=0.1)
    shutil.copytree(other, tmp_path / "gone")
    assert "has other weights by now" in refused(*sample)
    done(*sample, "--decoder", other)  # of one's own choice it may be another
    shutil.rmtree(tmp_path / "gone")
    shutil.copytree(home / "vae", tmp_path / "gone")
    config = json.loads((tmp_path / "gone" / "config.json").read_text())
    (tmp_path / "gone" / "config.json").write_text(json.dumps({**config, "norm_num_groups": 2}))
    assert "has other settings by now" in refused(*sample)
    first, second = (read_samples(each).images for each in run.glob("samples/*-n4-*/samples.npz"))
    assert not np.array_equal(first, second)
    for config, says in (
        ({"scaling_factor": 0.9, "shift_factor": 0.1}, "has scale_factor 0.9, and the run"),
        ({"scaling_factor": 0.8}, "has shift_factor 0.0, and the run"),
        ({"levels": 3, "scaling_factor": 0.8, "shift_factor": 0.1}, "has pixels a side 16, and the run"),
        ({"channels": 3, "scaling_factor": 0.8, "shift_factor": 0.1}, "has channels of latents 3, and the run"),
    ):
        save_vae(tmp_path / "wrong", **config)
        assert says in refused(*sample, "--decoder", tmp_path / "wrong")
        shutil.rmtree(tmp_path / "wrong")
    assert "belongs to runs in latents" in refused(
        "run", "--backbone", "dit-xs-4", "--steps", "1", "--set", "batch=2", "--decoder", "ft-ema", *FIXED[:2],
        "--micro-batch", "2", "--out", tmp_path / "pixels",
    )  # fmt: skip
    assert "a system has its own" in refused("sample", "--system", "ldm-4", "--decoder", "ft-ema")


def test_what_is_gone_is_said_before_anything_is_measured(home, tmp_path, monkeypatch):
    """The autoencoder, then the images to judge by; `plan` says it, too, and names the same flag."""
    monkeypatch.setattr(RunSession, "measure", lambda *_, **__: pytest.fail("measured"))
    cache = shutil.copytree(home / "cache", tmp_path / "cache")
    meta = json.loads((cache / "meta.json").read_text())
    task = ("--backbone", "dit-xs-2", "--protocol", home / "task.toml", "--data", cache, *FIXED)

    def changed(name):
        places = {**meta["places"], name: str(tmp_path / "gone")}
        (cache / "meta.json").write_text(json.dumps({**meta, "places": places}))

    changed("vae")
    text = refused("run", *task, "--out", tmp_path / "run")
    assert "the autoencoder behind" in text and "--decoder DIR" in text
    (lack,) = json.loads(done("plan", *task, "--json").stdout)["missing"]
    assert (
        lack
        == f"the autoencoder behind {cache} is no longer at {tmp_path / 'gone'}; give it, or another one, with --decoder DIR"
    )
    changed("images")
    assert "the images behind" in refused("run", *task, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_images_to_judge_by_are_those_of_the_cache_or_named(home, ran, tmp_path):
    run = shutil.copytree(ran, tmp_path / "run")
    (path,) = run.glob("samples/*/samples.npz")
    (run / "records.jsonl").unlink()
    done("evaluate", path)
    assert len((run / "records.jsonl").read_text().splitlines()) == 2
    facts = json.loads((run / "run.json").read_text())
    facts["places"]["images"] = str(tmp_path / "gone.npz")
    (run / "run.json").write_text(json.dumps(facts))
    text = refused("evaluate", path)
    assert "the images behind" in text and "--reference PATH" in text
    shutil.copy(home / "images.npz", tmp_path / "gone.npz")
    done("evaluate", path)
    rng = np.random.default_rng(9)
    write_samples(tmp_path / "gone.npz", [rng.integers(0, 256, (60, 32, 32, 3), np.uint8)], np.arange(60) % 10, {})
    assert "holds other images" in refused("evaluate", path)
    done("run", *words(home, "--steps", "4", "--out", run, "--reference", home / "images.npz"))


def test_without_the_files_of_its_suite_a_run_ends_with_samples_and_the_command_that_measures_them(home, tmp_path):
    (tmp_path / "task.toml").write_text(TASK.format(suite="adm").replace("latents-32", "imagenet-256"))
    shared = ("--backbone", "dit-xs-2", "--protocol", tmp_path / "task.toml", "--data", home / "cache", *FIXED)
    result = done("run", *shared, "--steps", "1", "--out", tmp_path / "run")
    assert "suite 'adm' needs --inception FILE and --reference FILE" in result.stderr
    (path,) = (tmp_path / "run").glob("samples/*/samples.npz")
    command = f"harness evaluate {path.parent} --inception classify_image_graph_def.pb --reference VIRTUAL_"
    assert command in result.stdout and not (tmp_path / "run" / "records.jsonl").exists()
    text = refused("run", *shared, "--inception", tmp_path / "none.pb", "--out", tmp_path / "other")
    assert "none.pb: no such file" in text and not (tmp_path / "other").exists()


def load_tokens(spec, device):
    """The mean colours of four by four patches as tokens."""
    return lambda images: torch.nn.functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2)


@pytest.fixture
def colours(monkeypatch):
    """An encoder of images of 32 pixels, registered as "colours"."""
    spec = FeatureSpec(
        name="colours", dim=3, classes=None, input_size=32, loader="nowhere:load", description="mean colours",
        tokens=f"{__name__}:load_tokens",
    )  # fmt: skip
    monkeypatch.setattr(repa, "PROJECTOR_WIDTH", 16)
    before = {**vars(registry.features)}
    registry.features._items, registry.features._owners = dict(before["_items"]), dict(before["_owners"])
    registry.features.register(spec)
    yield
    vars(registry.features).update(before)


ALIGNED = ("--set", "auxiliary=repa:colours:blocks.0", "--set", "flip=true")


def test_the_encoder_of_an_auxiliary_loss_sees_the_images_behind_the_latents(home, colours, tmp_path):
    out = tmp_path / "aligned"
    done("run", *words(home, *ALIGNED, "--steps", "4", "--out", out))
    run = open_run(out)
    rows = [json.loads(line) for line in run.log.read_text().splitlines()]
    assert all(-1 <= row["repa"] <= 1 and row["repa"] != 0 for row in rows)
    record = json.loads(run.records.read_text().splitlines()[0])
    heads = 4 * (16 * 192 + 16 * 16 + 3 * 16)  # multiply-adds of the projector at 4 tokens of DiT-XS, 192 wide
    assert record["training"]["auxiliary_gflops"] == pytest.approx(4 * 12 * 3 * heads / 1e9)
    request = make_request(
        backbone="dit-xs-2", protocol=str(home / "task.toml"), data=home / "cache", steps=4,
        settings={"auxiliary": "repa:colours:blocks.0", "flip": "true"},
    )  # fmt: skip
    data = training_data(request.protocol, home / "cache")
    engine = get_backend("torch").make_engine(request, run, data, None)
    _, images, _ = engine._batch(range(48))
    positions = np.arange(48)
    pixels = np.load(home / "images.npz")["arr_0"][engine._stream.rows(positions)]
    mirrored = uniform(0, Purpose.FLIP, positions, 0) < 0.5
    pixels[mirrored] = pixels[mirrored, :, ::-1]
    assert 10 < mirrored.sum() < 38
    np.testing.assert_allclose(images.numpy(), pixels.transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)


def test_images_that_an_encoder_needs_are_asked_for_before_the_first_step(home, colours, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(home / "cache", cache)
    meta = json.loads((cache / "meta.json").read_text())
    meta["places"]["images"] = str(tmp_path / "gone.npz")
    (cache / "meta.json").write_text(json.dumps(meta))
    said = refused("train", *words(home, *ALIGNED, "--steps", "4", "--out", tmp_path / "run", cache=cache))
    assert "gone.npz); put them back, because the encoder of the auxiliary loss needs them" in said
