"""Decoders of latents: what they load, what they refuse, and that nothing that is loaded is executed."""

import hashlib
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from backbones.autoencoders.spec import BY_NAME, KL_DEFAULTS, KNOWN, diffusers_name
from harness.autoencoders import load as load_module
from harness.autoencoders.decoder import Decoder
from harness.autoencoders.files import open_autoencoder, resolve
from harness.autoencoders.load import decoder_compute, load_autoencoder, read_identity
from harness.errors import RunError, UserError

diffusers = pytest.importorskip("diffusers")

SIZES = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
}
SAFE, BIN = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"


def small_kl(**changes):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**{**SIZES, **changes}).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small AutoencoderKL as save_pretrained writes it; tests copy it."""
    folder = tmp_path_factory.mktemp("vae")
    small_kl().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "vae")


def as_bin(folder, tensors=None):
    """The folder with a torch file, of these tensors if given, instead of the safetensors file."""
    if tensors is None:
        tensors = small_kl().state_dict()
    (folder / SAFE).unlink()
    torch.save(tensors, folder / BIN)
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def latents(n=3, channels=4):
    torch.manual_seed(1)
    return torch.randn(n, channels, 4, 6)


def by_diffusers(folder, z, scale=0.18215):
    theirs = diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        return torch.cat([theirs.decode(each[None] / scale).sample for each in z])


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_a_saved_folder_decodes_exactly_as_diffusers_does(folder, monkeypatch):
    decoder = load_autoencoder(str(folder))
    digest = hashlib.sha256((folder / SAFE).read_bytes()).hexdigest()
    assert (decoder.scale_factor, decoder.channels, decoder.factor) == (0.18215, 4, 2)
    assert (decoder.name, decoder.sha256, decoder.notes) == (f"vae-{digest[:12]}", digest, ())
    identity = {"name": decoder.name, "weights_sha256": digest, "scale_factor": 0.18215}
    assert decoder.identity == {**identity, "config_sha256": decoder.identity["config_sha256"]}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "act_fn": "relu"})
    )  # no weight shows it, every pixel does
    other = load_autoencoder(str(folder)).identity
    assert other != decoder.identity and {**other, "config_sha256": ""} == {**identity, "config_sha256": ""}
    (folder / "config.json").write_text(json.dumps({**config, "sample_size": 7, "force_upcast": False}))
    assert load_autoencoder(str(folder)).identity == decoder.identity  # what decides no pixel
    left = {name: value for name, value in config.items() if KL_DEFAULTS.get(name, 0) != value}
    (folder / "config.json").write_text(json.dumps(left))
    assert left != config and load_autoencoder(str(folder)).identity == decoder.identity  # nor what is the default
    monkeypatch.chdir(folder.parent)
    for spelling in (f"./{folder.name}", f"{folder.name}/../{folder.name}/{SAFE}"):
        assert load_autoencoder(spelling).identity == decoder.identity
    (folder / "config.json").write_text(json.dumps(config))
    z = latents() / 10
    images = decoder.decode(z)
    assert images.dtype == torch.float32 and images.shape == (3, 3, 8, 12) and images.std() > 0.01
    assert torch.equal(images, by_diffusers(folder, z).clamp(-1, 1))
    assert torch.equal(decoder.decode(z.numpy()), images)
    assert decoder.decode(z[:0]).shape == (0, 3, 8, 12)


def test_no_latents_give_no_images_of_the_same_channels(tmp_path):
    small_kl(in_channels=1, out_channels=1).save_pretrained(tmp_path / "grey")
    decoder = load_autoencoder(str(tmp_path / "grey"))
    assert decoder.decode(latents()).shape == (3, 1, 8, 12) and decoder.decode(latents()[:0]).shape == (0, 1, 8, 12)


def test_settings_of_the_network_and_their_defaults_are_diffusers():
    from diffusers import AutoencoderKL

    theirs = {each.name: each.default for each in inspect.signature(AutoencoderKL.__init__).parameters.values()}
    elsewhere = {"self", "sample_size", "force_upcast", "scaling_factor", "shift_factor", "latents_mean", "latents_std"}
    assert set(KL_DEFAULTS) == set(theirs) - elsewhere
    assert all(
        theirs[name] == (tuple(value) if isinstance(value, list) else value) for name, value in KL_DEFAULTS.items()
    )


def test_weights_that_are_no_numbers_are_refused(folder, tmp_path):
    net = small_kl()
    with torch.no_grad():
        net.decoder.conv_in.bias[3] = float("nan")
    net.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=r"decoder.conv_in.bias has values that are infinite or not a number"):
        load_autoencoder(str(tmp_path / "vae"))


def test_images_are_clipped_to_their_range(folder):
    net = small_kl()
    with torch.no_grad():
        net.decoder.conv_out.weight.mul_(20)
    net.save_pretrained(folder)
    raw = by_diffusers(folder, latents())
    assert raw.max() > 1.5 and raw.min() < -1.5
    assert torch.equal(load_autoencoder(str(folder)).decode(latents()), raw.clamp(-1, 1))


def test_the_configs_own_scale_is_used(folder):
    decoder = load_autoencoder(str(edit_config(folder, scaling_factor=0.5)))
    assert decoder.scale_factor == 0.5
    assert torch.equal(decoder.decode(latents()), by_diffusers(folder, latents(), scale=0.5).clamp(-1, 1))


def test_a_pipelines_folder_a_file_and_half_precision(folder, tmp_path):
    expected = load_autoencoder(str(folder)).decode(latents())
    assert torch.equal(load_autoencoder(str(tmp_path)).decode(latents()), expected)  # its subfolder is called vae
    assert torch.equal(load_autoencoder(str(folder / SAFE)).decode(latents()), expected)
    as_bin(folder, {name: value.half() for name, value in small_kl().state_dict().items()})
    half = load_autoencoder(str(folder))
    assert next(half.net.parameters()).dtype == torch.float32
    torch.testing.assert_close(half.decode(latents()), expected, rtol=0, atol=0.02)


def test_old_names_of_attention_are_read_as_diffusers_reads_them(folder):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in small_kl().state_dict().items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        tensors[name] = value
    assert sum("proj_attn" in name for name in tensors) == 4
    expected = by_diffusers(as_bin(folder, tensors), latents())  # diffusers renames them too
    assert torch.equal(load_autoencoder(str(folder)).decode(latents()), expected.clamp(-1, 1))


def test_the_layout_of_latent_diffusion(folder, monkeypatch):
    expected = by_diffusers(folder, latents()).clamp(-1, 1)
    arguments = {**BY_NAME["vq-f4"].defaults, "multipliers": (1, 2), "width": 32, "blocks": 1, "codes": 1}
    public = BY_NAME["vq-f4"].build(**arguments).state_dict()  # its names are those of kl-f8 as well
    theirs, tensors = small_kl().state_dict(), {"loss.logvar": torch.zeros(()), "model.other": torch.zeros(2)}
    for name, ours in public.items():
        if not name.startswith("quantize"):
            value = theirs[diffusers_name(name, 2)]
            matrix = "attn_1" in name and ours.dim() == 4
            tensors[f"first_stage_model.{name}"] = value[..., None, None] if matrix else value
    assert len(tensors) == len(theirs) + 2
    file = folder / "model.ckpt"
    torch.save({"state_dict": tensors, "epoch": 3}, file)
    monkeypatch.setattr(load_module, "KL_CONFIG", SIZES)  # what is assumed for a file without a config
    decoder = load_autoencoder("original", weights=file)
    assert decoder.name == "ldm-f8" and decoder.source == str(file)
    assert "not used: 2" in decoder.notes[1] and "assumed" in decoder.notes[2]
    assert torch.equal(decoder.decode(latents()), expected)


def with_prefix(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


NETWORK = {f"unet.{n}.weight": torch.zeros(2, 2) for n in range(300)}  # more tensors than the autoencoder has
LOSS = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(3)}
COUNTERS = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(7)}


def lit_ema(tensors):
    """Names as LDM's LitEma (ldm/modules/ema.py) has them: without dots."""
    return {f"model_ema.{name.replace('.', '')}": value for name, value in tensors.items()}


PLACES = {  # what the file holds -> (autoencoder, its average), whether it is the average that is read, and the entry
    "a prefix": (lambda v, a: with_prefix("vae.", v), False, "vae"),
    "a module beside its loss": (
        lambda v, a: {"state_dict": {**with_prefix("autoencoder.", v), "loss.disc.weight": torch.zeros(3)}},
        False,
        "state_dict.autoencoder",
    ),
    "beside a larger network": (lambda v, a: {"vae": v, "unet": NETWORK}, False, "vae"),
    "names beside a larger network": (lambda v, a: {**with_prefix("vae.", v), **NETWORK}, False, "vae"),
    "both beside a larger network": (lambda v, a: {"vae": v, "vae_ema": a, "unet": NETWORK}, True, "vae_ema"),
    "both under prefixes": (lambda v, a: {**with_prefix("vae.", v), **with_prefix("ema_vae.", a)}, True, "ema_vae"),
    "LDM's training of one, with LitEma": (
        lambda v, a: {"state_dict": {**v, **LOSS, **lit_ema({**a, **LOSS}), **COUNTERS}, "global_step": 7},
        True,
        "state_dict.model_ema",
    ),
    "LitEma in a flat file": (lambda v, a: {**v, **lit_ema(a)}, True, "model_ema"),
    "an average beside plain names": (lambda v, a: {**v, **with_prefix("ema.", a)}, True, "ema"),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_autoencoder_is_found_beside_others_and_under_prefixes(place, folder):
    make, is_average, entry = PLACES[place]
    raw = small_kl().state_dict()
    average = {name: value * 0.5 for name, value in raw.items()}
    as_bin(folder, make(raw, average))
    for asked in (None, entry):
        decoder = load_autoencoder(str(folder), entry=asked)
        expected, found = (average if is_average else raw), decoder.net.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        assert any(repr(entry) in note for note in decoder.notes)
        assert "entry" not in decoder.identity and read_identity(str(folder), "--decoder", asked) == decoder.identity
    for other in open_autoencoder(folder / BIN).other_entries if is_average else ():
        decoder = load_autoencoder(str(folder), entry=other)
        assert all(torch.equal(value, raw[name]) for name, value in decoder.net.state_dict().items())
        assert decoder.identity["entry"] == other
        assert read_identity(str(folder), "--decoder", other) == decoder.identity


@pytest.fixture(params=["model.ckpt", "legacy.ckpt", "model.safetensors"])
def vq(request, tmp_path):
    """A small VQ network, and a file of it in LDM's layout."""
    torch.manual_seed(0)
    net = BY_NAME["vq-f4"].build(width=32, blocks=1, codes=50).eval().requires_grad_(False)
    net.quantize.embedding.weight.normal_()
    tensors = {f"first_stage_model.{name}": value for name, value in net.state_dict().items()}
    tensors |= {"model.diffusion_model.out.2.bias": torch.zeros(3), "betas": torch.ones(5)}
    file = tmp_path / request.param
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, file)
    else:
        zipped = not file.name.startswith("legacy")
        torch.save({"state_dict": tensors, "global_step": 7}, file, _use_new_zipfile_serialization=zipped)
    return net, file


def test_vq_decodes_as_its_network_does(vq):
    net, file = vq
    decoder = load_autoencoder(str(file))
    assert (decoder.kind, decoder.scale_factor, decoder.channels, decoder.factor) == ("vq", 1.0, 3, 4)
    assert decoder.name == f"vq-{decoder.sha256[:12]}" and any("not used: 2" in note for note in decoder.notes)
    z = latents(channels=3)
    expected = torch.cat([net.decode(each[None]) for each in z]).clamp(-1, 1)
    assert torch.equal(decoder.decode(z), expected)
    assert decoder.gmacs(64) == BY_NAME["vq-f4"].count("decode", 64, width=32, blocks=1, codes=50).gmacs
    refused(lambda: load_autoencoder("vq-f4", weights=file), "is not vq-f4: width is 32 instead of 128")
    refused(lambda: load_autoencoder("ft-ema", weights=file), "a VQ autoencoder, which ft-ema is not")


def test_a_named_vq_file(tmp_path, monkeypatch):
    spec = BY_NAME["vq-f4"]
    small = {**spec.defaults, "width": 32, "blocks": 1}
    monkeypatch.setitem(BY_NAME, "vq-f4", type(spec)(**{**vars(spec), "defaults": small}))
    file = tmp_path / "vq.ckpt"
    tensors = BY_NAME["vq-f4"].build().state_dict()
    torch.save(tensors, file)
    decoder = load_autoencoder("vq-f4", weights=file)
    assert decoder.name == "vq-f4" and decoder.notes == ()
    assert not any(each.requires_grad for each in decoder.net.parameters())
    torch.save({"state_dict": {**tensors, "loss.discriminator.main.0.bias": torch.zeros(2)}}, file)  # as vq-f4.zip has
    assert any("not used: 1" in note for note in load_autoencoder("vq-f4", weights=file).notes)
    refused(lambda: load_autoencoder("vq-f8", weights=file), "is not vq-f8: ", "it is vq-f4")


def test_image_i_does_not_know_its_company(folder, vq):
    for path, channels in ((folder, 4), (vq[1], 3)):
        decoder, z = load_autoencoder(str(path)), latents(5, channels)
        together = decoder.decode(z)
        for i in range(5):
            assert torch.equal(decoder.decode(z[i : i + 1])[0], together[i])
        assert torch.equal(decoder.decode(z.flip(0)).flip(0), together)
        batched = replace(decoder, batch=2).decode(z)
        torch.testing.assert_close(batched, together, rtol=0, atol=1e-5)


def test_autocast_does_not_reach_the_decoder(folder):
    decoder, z = load_autoencoder(str(folder)), latents()
    expected = decoder.decode(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decoder.decode(z), expected)


def test_an_image_that_is_not_finite_is_a_failure(folder):
    z = latents()
    z[1, 0, 0, 0] = float("nan")
    with pytest.raises(RunError, match=r"image 1 of 3 is not finite"):
        load_autoencoder(str(folder)).decode(z)
    with pytest.raises(RunError, match=r"image 1 of 3 is not finite"):
        replace(load_autoencoder(str(folder)), batch=2).decode(z)


def test_latents_of_another_shape_are_refused(folder):
    decoder = load_autoencoder(str(folder))
    refused(lambda: decoder.decode(torch.zeros(1, 3, 4, 4)), "float32 (1, 3, 4, 4)", "(N, 4, h, w)")
    refused(lambda: decoder.decode(torch.zeros(4, 4, 4)), "(N, 4, h, w)")
    refused(lambda: decoder.decode(torch.zeros(1, 4, 4, 4, dtype=torch.uint8)), "uint8")


class Planted:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_torch_file_is_not_run(folder, tmp_path, zipped):
    target = tmp_path / "ran"
    (folder / SAFE).unlink()
    tensors = {**small_kl().state_dict(), "callbacks": Planted(target)}
    torch.save(tensors, folder / BIN, _use_new_zipfile_serialization=zipped)
    refused(
        lambda: load_autoencoder(str(folder)),
        BIN,
        "posix.system" if os.name == "posix" else "system",
        "Nothing was run",
    )
    assert not target.exists()
    (folder / BIN).write_bytes(pickle.dumps(Planted(target)))
    refused(lambda: load_autoencoder(str(folder)), BIN)
    assert not target.exists()


def cut(path, keep=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def damaged_bin(folder, keep, **options):
    (folder / SAFE).unlink()
    torch.save(small_kl().state_dict(), folder / BIN, **options)
    cut(folder / BIN, keep)


def without(folder, *, drop=None, add=None, reshape=None):
    tensors = small_kl().state_dict()
    if drop:
        del tensors[drop]
    if add:
        tensors[add] = torch.zeros(1)
    if reshape:
        tensors[reshape] = torch.zeros(7)
    as_bin(folder, tensors)


LEGACY = {"_use_new_zipfile_serialization": False}
BROKEN = {
    "no weights": (lambda f: (f / SAFE).unlink(), ["holds no", SAFE, BIN]),
    "no config": (lambda f: (f / "config.json").unlink(), ["has no config.json", SAFE]),
    "config is not JSON": (lambda f: cut(f / "config.json"), ["config.json is not valid JSON"]),
    "another model's config": (lambda f: edit_config(f, _class_name="VQModel"), ["describes VQModel", "AutoencoderKL"]),
    "config that builds nothing": (lambda f: edit_config(f, up_block_types=["Nope"] * 2), ["gives no network", "Nope"]),
    "config without sizes": (lambda f: edit_config(f, block_out_channels=None), ["no list of block_out_channels"]),
    "scale of nought": (lambda f: edit_config(f, scaling_factor=0), ["scaling_factor is 0"]),
    "scale in words": (lambda f: edit_config(f, scaling_factor="one"), ["scaling_factor is 'one'"]),
    "config of odd form": (lambda f: (f / "config.json").write_text("[1]"), ["describes no network"]),
    "standardised latents": (lambda f: edit_config(f, latents_mean=[0.1] * 4), ["has a latents_mean"]),
    "a shift that is no number": (lambda f: edit_config(f, shift_factor="0.1"), ["shift_factor is '0.1'"]),
    "cut safetensors": (lambda f: cut(f / SAFE), [SAFE, "cut short"]),
    "cut torch file": (lambda f: damaged_bin(f, 0.6), [BIN, "damaged or cut short"]),
    "cut legacy file": (lambda f: damaged_bin(f, 0.6, **LEGACY), [BIN, "cut short"]),
    "legacy head alone": (lambda f: damaged_bin(f, 0.001, **LEGACY), [BIN, "damaged or no weight file"]),
    "empty file": (lambda f: (f / SAFE).write_bytes(b""), [SAFE, "is empty"]),
    "pointer": (lambda f: (f / SAFE).write_text("version https://git-lfs.github.com/spec/v1\n"), ["git lfs pull"]),
    "a key is missing": (lambda f: without(f, drop="decoder.conv_in.bias"), ["decoder.conv_in.bias is missing"]),
    "a key too many": (lambda f: without(f, add="decoder.extra"), ["decoder.extra is unexpected"]),
    "a wrong shape": (lambda f: without(f, reshape="decoder.conv_in.bias"), ["conv_in.bias is (7,)", "has (64,)"]),
    "other sizes": (lambda f: small_kl(layers_per_block=2).save_pretrained(f / "x"), None),
    "not tensors": (lambda f: as_bin(f, [1, 2]), ["holds no state dict, but a list"]),
    "another network": (
        lambda f: as_bin(f, {"blocks.0.weight": torch.zeros(2)}),
        ["no autoencoder", "blocks.0.weight"],
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_loaded_is_refused_in_one_line(folder, what):
    breaking, words = BROKEN[what]
    breaking(folder)
    if words is None:
        shutil.copy(folder / "x" / SAFE, folder / SAFE)
        words = ["more) is unexpected"]
    refused(lambda: load_autoencoder(str(folder)), *words)


def test_names(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    assert resolve("ft-ema") is resolve("stabilityai/sd-vae-ft-ema") is KNOWN["ft-ema"]
    assert resolve("original") is resolve("CompVis/stable-diffusion-v1-4") is KNOWN["original"]
    refused(lambda: resolve("ft-emma"), "unknown decoder 'ft-emma'", "ft-ema", "path")
    refused(lambda: resolve("vaes/mine"), "decoder vaes/mine: no such file or folder", "vq-f8")
    refused(
        lambda: load_autoencoder("ft-mse", weights="nowhere"),
        "nowhere: no such file or folder",
        "--weights decoder=PATH",
    )
    refused(lambda: load_autoencoder("vae", weights=folder), "is a path already")
    refused(
        lambda: load_autoencoder("ft-ema", weights=folder),
        "is not ft-ema: its config.json has block_out_channels [32, 64]",
    )
    for name in ("vq-f4", "vq-f8"):
        refused(
            lambda name=name: load_autoencoder(name),
            f"decoder {name} needs its weights",
            "model.ckpt",
            "--weights decoder=PATH",
        )


# 311.09: diffusers' AutoencoderKL under torch's own counter.
def test_compute_needs_no_weights(folder):
    assert {name: round(decoder_compute(name).gmacs, 2) for name in KNOWN} == {
        "ft-ema": 311.09, "ft-mse": 311.09, "original": 311.09, "vq-f4": 335.39, "vq-f8": 236.27,
    }  # fmt: skip
    assert round(decoder_compute("ft-ema", direction="encode").gmacs, 2) == 136.36
    assert 4 < decoder_compute("ft-ema", 512).gmacs / decoder_compute("ft-ema").gmacs < 4.5
    refused(lambda: decoder_compute(str(folder)), "is a path")
    decoder = load_autoencoder(str(folder))
    assert decoder.compute(64).source == "traced"
    assert decoder.compute(64).params == sum(each.numel() for each in small_kl().parameters())
    # attention grows 16 fold with twice the side, 2 * 256 ** 2 * 64 at 32 pixels, and all else 4 fold
    assert decoder.compute(64).macs == 4 * decoder.compute(32).macs + 12 * 2 * 256**2 * 64
    refused(lambda: decoder.compute(63), "63 is not a multiple of the autoencoder's factor 2")
    refused(lambda: decoder.compute(64, "sideways"), "unknown direction 'sideways'")


CACHED = """
import json, sys
from harness.autoencoders import load
from harness.autoencoders.load import load_autoencoder
from harness.errors import UserError

load.KL_CONFIG = json.loads(sys.argv[1])  # the cached network is a small one

decoder = load_autoencoder("ft-ema")
print(decoder.name, decoder.source, decoder.sha256)
decoder = load_autoencoder("original")
print(decoder.name, decoder.source, decoder.sha256)
try:
    load_autoencoder("ft-mse")
except UserError as error:
    print(error)
"""


def test_the_hub_without_a_network(folder, tmp_path):
    revision = "0" * 40
    repository = tmp_path / "hub" / "models--stabilityai--sd-vae-ft-ema"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(folder, repository / "snapshots" / revision)
    digest = hashlib.sha256((folder / SAFE).read_bytes()).hexdigest()
    original = tmp_path / "hub" / "models--CompVis--stable-diffusion-v1-4"
    shutil.copytree(repository / "refs", original / "refs")
    shutil.copytree(as_bin(folder), original / "snapshots" / revision / "vae")  # no safetensors: the other is taken
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CACHED, json.dumps(SIZES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    first, with_bin, second, *rest = done.stdout.splitlines()
    old = hashlib.sha256((folder / BIN).read_bytes()).hexdigest()
    assert with_bin == f"ldm-f8 CompVis/stable-diffusion-v1-4@{revision} {old}"
    assert first == f"sd-vae-ft-ema stabilityai/sd-vae-ft-ema@{revision} {digest}"
    assert not rest and second.startswith("decoder ft-mse: stabilityai/sd-vae-ft-mse is not in the cache")
    assert "https://huggingface.co/stabilityai/sd-vae-ft-mse" in second and "--weights decoder=PATH" in second


def test_naming_a_decoder_imports_no_framework():
    code = "import sys, harness.autoencoders.load as d; d.decoder_compute('ft-ema'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "diffusers", "jax", "huggingface_hub"} & set(done.stdout.split())
    assert Decoder.__module__ == "harness.autoencoders.decoder"
