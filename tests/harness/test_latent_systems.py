"""Systems that work in latents: the base's latents, and the images that a real small decoder makes of them."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from small_vae import save_vae

from backbones.autoencoders.vq_torch import VQAutoencoder
from harness import registry
from harness.autoencoders.load import load_autoencoder as load_decoder
from harness.autoencoders.load import read_identity
from harness.cli import group
from harness.engines.torch.sampling import to_uint8
from harness.errors import UserError
from harness.randomness import Purpose
from harness.randomness import threefry_torch as random
from harness.runs.samples import read_samples, read_sidecar

TASK = """
name = "latents-32"
dataset = "npz"
resolution = 32
num_classes = 10
space = "latents"
input_size = {side}
in_channels = {channels}
samples = 16
suite = "embedded"
"""
SYSTEM = """
name = "small"
protocol = "{task}"
decoder = "{decoder}"
uint8_rule = "ldm"
label_policy = "balanced"
[base]
backbone = "{backbone}"
objective = "epsilon-fixed"
schedule = "sqrt-linear"
sampler = "ddim-ldm"
steps = 4
eta = 1.0
guidance_scale = 1.5
arguments = {{ input_size = {side}, in_channels = {channels}, num_classes = 10 }}
"""
VQ = {
    "resolution": 32, "image_channels": 3, "width": 32, "multipliers": (1, 2, 2), "blocks": 1,
    "attention_resolutions": (), "latent_channels": 3, "code_channels": 3, "codes": 64,
}  # fmt: skip


def files(folder, backbone, side, channels, decoder):
    """A protocol and a system of the user's, in TOML."""
    (folder / "task.toml").write_text(TASK.format(side=side, channels=channels))
    system = SYSTEM.format(task=folder / "task.toml", decoder=decoder, backbone=backbone, side=side, channels=channels)
    (folder / "system.toml").write_text(system)
    return folder / "system.toml"


def network(backbone, side, channels):
    """Every weight drawn, also those that are zero before training."""
    sizes = {"input_size": side, "in_channels": channels, "num_classes": 10, "out_channels": channels}
    torch.manual_seed(0)
    net = registry.backbones.get(backbone).build("torch", **sizes)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    return net


def sample(*arguments):
    done = CliRunner().invoke(group, ["sample", *map(str, arguments), "--samples", "12", "--batch", "5"])
    assert done.exit_code == 0, done.exception
    return read_samples(done.stdout.split()[-1])


def reference(net, decode, side, channels, scale=1.5):
    """The same images by the equations, in float64 but for network and decoder: labels, noise, DDIM, guidance."""
    labels = np.arange(12) % 10
    y, rows = torch.from_numpy(labels), torch.arange(12)
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    x = random.normal(0, Purpose.INITIAL_NOISE, rows, 0, (channels, side, side)).double()
    steps = [751, 501, 251, 1]
    with torch.inference_mode():
        for k, t in enumerate(steps):
            now, before = abar[t], abar[steps[k + 1]] if k + 1 < len(steps) else abar[0]
            times = torch.full((12,), t)
            conditional, plain = (net(x.float(), times, label).double() for label in (y, torch.full_like(y, 10)))
            eps = plain + scale * (conditional - plain)
            sigma = np.sqrt((1 - before) / (1 - now) * (1 - now / before))
            x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
            noise = random.normal(0, Purpose.STEP_NOISE, rows, k, (channels, side, side)).double()
            x = np.sqrt(before) * x0 + np.sqrt(1 - before - sigma**2) * eps + sigma * noise
        return to_uint8(decode(x.float()), "ldm"), labels


def assert_same(samples, images, labels):
    """But for the rounding of a grey level."""
    assert np.array_equal(samples.labels, labels) and samples.images.shape == images.shape == (12, 32, 32, 3)
    apart = np.abs(samples.images.astype(int) - images.astype(int))
    assert apart.max() <= 1 and (apart > 0).mean() < 0.005
    assert len(np.unique(images)) > 20


def test_an_ldm_and_its_first_stage_come_from_one_checkpoint(tmp_path):
    net = network("ldm-xs", 8, 3)
    torch.manual_seed(1)
    first_stage = VQAutoencoder(**VQ).eval()
    state = {
        **net.state_dict(),
        **{f"first_stage_model.{name}": each for name, each in first_stage.state_dict().items()},
    }
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.ckpt")
    torch.save(first_stage.state_dict(), tmp_path / "vq.pt")
    system = files(tmp_path, "ldm-xs", 8, 3, tmp_path / "model.ckpt")
    out = ("--out", tmp_path / "out")
    samples = sample("--system", system, "--weights", f"base={tmp_path / 'model.ckpt'}", *out)
    images, labels = reference(net.eval(), load_decoder(str(tmp_path / "vq.pt")).decode, 8, 3)
    assert_same(samples, images, labels)
    facts = read_sidecar(samples.path)
    assert facts["evaluations"] == 8 and facts["record"]["sampling"]["decoder_gflops"] > 0
    assert facts["identity"]["decoder"]["weights_sha256"] == facts["identity"]["weights"]["base"]["sha256"]


def test_a_dit_decodes_through_an_autoencoder_of_diffusers(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, scaling_factor=0.5,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    net = network("dit-xs-2", 8, 4)
    torch.save(net.state_dict(), tmp_path / "dit.pt")
    system = files(tmp_path, "dit-xs-2", 8, 4, tmp_path / "vae")
    samples = sample("--system", system, "--weights", f"base={tmp_path / 'dit.pt'}", "--out", tmp_path / "out")
    images, labels = reference(net.eval(), lambda z: vae.decode(z / 0.5).sample, 8, 4)
    assert_same(samples, images, labels)


def test_a_decoder_in_several_parts(tmp_path):
    """As diffusers saves it with max_shard_size: an index and its parts."""
    from diffusers import AutoencoderKL

    whole = save_vae(tmp_path / "whole", width=8)
    AutoencoderKL.from_pretrained(whole).save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    one, several = (load_decoder(str(tmp_path / name)) for name in ("whole", "parts"))
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one.decode(latents), several.decode(latents))
    assert one.identity["config_sha256"] == several.identity["config_sha256"]
    for name, decoder in (("whole", one), ("parts", several)):
        assert read_identity(str(tmp_path / name), "--vae DIR") == decoder.identity
    next((tmp_path / "parts").glob("*1-of*.safetensors")).unlink()
    with pytest.raises(UserError, match="which is not there; fetch all parts"):
        load_decoder(str(tmp_path / "parts"))


def test_the_entry_of_a_decoder_is_chosen(tmp_path, caplog):
    caplog.set_level("INFO", "harness")
    torch.manual_seed(1)
    raw = VQAutoencoder(**VQ).eval().state_dict()
    average = {name: each * 0.9 for name, each in raw.items()}
    torch.save({"model": raw, "ema": average}, tmp_path / "both.pt")
    torch.save({"model_ema1": raw, "model_ema2": average}, tmp_path / "two.pt")
    usual, same, chosen = (load_decoder(str(tmp_path / "both.pt"), entry=entry) for entry in (None, "ema", "model"))
    assert "ema" in caplog.text  # which entry was read
    assert usual.identity == same.identity and "entry" not in usual.identity  # identities of before stay
    assert chosen.identity == {**usual.identity, "entry": "model"}
    latents = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(usual.decode(latents), chosen.decode(latents))
    with pytest.raises(UserError, match="choose one with --entry"):
        load_decoder(str(tmp_path / "two.pt"))
    net = network("ldm-xs", 8, 3)
    torch.save(net.state_dict(), tmp_path / "ldm.pt")
    system = files(tmp_path, "ldm-xs", 8, 3, tmp_path / "two.pt")
    words = ("--system", system, "--weights", f"base={tmp_path / 'ldm.pt'}", "--entry", "decoder=model_ema2")
    samples = sample(*words, "--out", tmp_path / "out")
    facts = read_sidecar(samples.path)
    assert facts["identity"]["decoder"]["entry"] == facts["entries"]["decoder"] == "model_ema2"
    decode = load_decoder(str(tmp_path / "two.pt"), entry="model_ema2").decode
    assert_same(samples, *reference(net.eval(), decode, 8, 3))


@pytest.mark.parametrize(("side", "channels"), [(16, 3), (8, 4)])
def test_latents_that_the_decoder_does_not_take_are_refused(tmp_path, side, channels):
    torch.save(VQAutoencoder(**VQ).state_dict(), tmp_path / "vq.pt")
    torch.save(network("ldm-xs", side, channels).state_dict(), tmp_path / "ldm.pt")
    system = files(tmp_path, "ldm-xs", side, channels, tmp_path / "vq.pt")
    arguments = ["sample", "--system", system, "--weights", f"base={tmp_path / 'ldm.pt'}", "--out", tmp_path / "out"]
    done = CliRunner().invoke(group, [str(each) for each in arguments])
    assert f"makes {channels} channels that decode to {side * 4} pixels" in str(done.exception)
