"""The VQ autoencoders of latent diffusion against diffusers' VQModel, and their sizes and compute against goldens."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from backbones.autoencoders.layout import infer_arguments
from backbones.autoencoders.spec import BY_NAME, SPECS, diffusers_name
from backbones.autoencoders.vq_torch import VQAutoencoder
from harness.autoencoders.load import KL_CONFIG, traced_compute
from harness.errors import UserError

diffusers = pytest.importorskip("diffusers")

VQ = ("vq-f4", "vq-f8")
SMALL = {
    "vq-f4": {"width": 32, "codes": 61, "blocks": 1},
    "vq-f8": {"width": 32, "codes": 61, "multipliers": (1, 2, 1), "attention_resolutions": (64,), "resolution": 256},
}


def built(name, **overrides):
    """A network with random norms and codes instead of their initial values."""
    torch.manual_seed(0)
    net = BY_NAME[name].build(**{**SMALL[name], **overrides}).eval().requires_grad_(False)
    for part in net.modules():
        if isinstance(part, torch.nn.GroupNorm):
            part.weight.uniform_(0.5, 1.5)
            part.bias.normal_(std=0.3)
    net.quantize.embedding.weight.normal_(std=0.5)
    return net


def on_meta(name):
    with torch.device("meta"):
        return BY_NAME[name].build()


# Sizes of the public first stages, measured on the released code (CompVis/latent-diffusion a506df5).
@pytest.mark.parametrize(("name", "params"), [("vq-f4", 55_322_782), ("vq-f8", 67_717_295)])
def test_parameters_to_the_unit(name, params):
    net = on_meta(name)
    assert sum(each.numel() for each in net.parameters()) == params == BY_NAME[name].count().params
    assert {key.split(".")[0] for key in net.state_dict()} == {
        "encoder", "decoder", "quantize", "quant_conv", "post_quant_conv",
    }  # fmt: skip
    assert [key for key in net.state_dict() if key.startswith("quantize")] == ["quantize.embedding.weight"]


def test_attention_lies_where_the_public_configs_say():
    f4, f8 = (set(on_meta(name).state_dict()) for name in VQ)
    attended = {key.rsplit(".", 2)[0] for key in f8 if key.endswith(".q.weight")}
    assert attended == {f"{side}.mid.attn_1" for side in ("encoder", "decoder")} | {
        "encoder.down.3.attn.0", "encoder.down.3.attn.1",
        "decoder.up.3.attn.0", "decoder.up.3.attn.1", "decoder.up.3.attn.2",
    }  # fmt: skip
    assert {key for key in f4 if key.endswith(".q.weight")} == {
        "encoder.mid.attn_1.q.weight", "decoder.mid.attn_1.q.weight",
    }  # fmt: skip
    assert f8 > {"encoder.down.2.downsample.conv.weight", "decoder.up.1.upsample.conv.bias"}
    assert not f8 & {"encoder.down.3.downsample.conv.weight", "decoder.up.0.upsample.conv.bias"}


def to_diffusers(net, arguments):
    """diffusers' VQModel of the same sizes with the same weights."""
    widths = [arguments["width"] * each for each in arguments["multipliers"]]
    attended = [arguments["resolution"] >> i in arguments["attention_resolutions"] for i in range(len(widths))]
    theirs = diffusers.VQModel(
        down_block_types=["AttnDownEncoderBlock2D" if each else "DownEncoderBlock2D" for each in attended],
        up_block_types=["AttnUpDecoderBlock2D" if each else "UpDecoderBlock2D" for each in reversed(attended)],
        block_out_channels=widths,
        layers_per_block=arguments["blocks"],
        latent_channels=arguments["latent_channels"],
        vq_embed_dim=arguments["code_channels"],
        num_vq_embeddings=arguments["codes"],
    )
    tensors = {}
    for key, value in net.state_dict().items():
        name = diffusers_name(key, len(widths))
        tensors[name] = value.flatten(1) if ".attentions." in name and value.dim() == 4 else value
    theirs.double().load_state_dict(tensors, strict=True)
    return theirs.eval()


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("vq-f4", {}), ("vq-f8", {}), ("vq-f4", {"latent_channels": 5, "blocks": 2, "width": 64, "multipliers": (1, 2)})],
    ids=["f4", "attention in a level", "other sizes"],
)
def test_same_weights_give_what_diffusers_gives(name, overrides):
    arguments = {**BY_NAME[name].defaults, **SMALL[name], **overrides}
    net = built(name, **overrides).double()  # in float32 the two agree to about 1e-5, which is rounding
    theirs = to_diffusers(net, arguments)
    torch.manual_seed(1)
    x = torch.rand(2, 3, 32, 48, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        z, other = net.encode(x), theirs.encode(x).latents
        torch.testing.assert_close(z, other, rtol=0, atol=1e-10)
        assert z.shape == (2, arguments["code_channels"], 32 // net.factor, 48 // net.factor) and z.std() > 0.05
        spread = torch.randn_like(z)
        mine, reference = net.decode(spread), theirs.decode(spread).sample
    assert mine.shape == x.shape and mine.std() > 0.05
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-10)


def test_decoding_takes_the_nearest_code():
    net = built("vq-f4")
    z = torch.randn(2, 3, 8, 8)
    codes = net.quantize.embedding.weight.double()
    distances = (z.double().permute(0, 2, 3, 1)[..., None, :] - codes).square().sum(-1)  # (2, 8, 8, K)
    nearest = distances.argmin(-1)
    assert torch.equal(net.quantize.indices(z), nearest) and len(nearest.unique()) > 10
    replaced = codes[nearest].float().permute(0, 3, 1, 2)
    assert torch.equal(net.quantize(z), replaced)
    assert torch.equal(net.decode(z), net.decode(replaced))
    assert not torch.allclose(net.decode(z), net.decoder(net.post_quant_conv(z)), atol=1e-3)


def test_the_nearest_code_does_not_hang_on_rounding():
    net = built("vq-f4")
    net.quantize.embedding.weight[:2] = torch.tensor([[100.0, 0.0, 0.0], [100.0, 1e-3, 0.0]])
    z = torch.tensor([100.0, 5.01e-4, 0.0]).view(1, 3, 1, 1)  # float32 sees |z|^2 to 1e-3 only
    assert net.quantize.indices(z).item() == 1
    assert net.quantize.indices(z.sub(torch.tensor([0, 2e-6, 0]).view(1, 3, 1, 1))).item() == 0


def test_names_are_those_that_diffusers_converts_to():
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    arguments = {**BY_NAME["kl-f8"].defaults, "codes": 1, "width": 32}
    ours = VQAutoencoder(**arguments).state_dict()
    theirs = convert_ldm_vae_checkpoint({**ours}, KL_CONFIG)
    renamed = {diffusers_name(key, 4): value for key, value in ours.items() if not key.startswith("quantize")}
    assert renamed.keys() == theirs.keys()
    assert all(theirs[key].data_ptr() == renamed[key].data_ptr() for key in theirs)


@pytest.mark.parametrize("name", VQ)
def test_arguments_are_read_off_the_shapes(name):
    shapes = {key: tuple(value.shape) for key, value in on_meta(name).state_dict().items()}
    assert infer_arguments(shapes) == BY_NAME[name].defaults


# diffusers' AutoencoderKL under torch's own counter: decode 311.09, encode 136.36 GMAC at 256 pixels.
def test_compute_of_stable_diffusions_autoencoder():
    spec = BY_NAME["kl-f8"]
    assert f"{spec.count().gmacs:.2f} {spec.count('encode').gmacs:.2f}" == "311.09 136.36"
    assert spec.count().params == 83_653_863
    for direction in ("decode", "encode"):
        traced = traced_compute("kl", KL_CONFIG, direction=direction)
        closed = spec.count(direction)
        assert (traced.macs, traced.flops, traced.params) == (closed.macs, closed.flops, closed.params)


@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize(
    ("name", "image_size", "overrides"),
    [(name, 256, {}) for name in VQ]
    + [("vq-f8", 512, {}), ("vq-f8", 64, SMALL["vq-f8"]), ("vq-f4", 32, {"latent_channels": 7, "codes": 11})],
)
def test_closed_form_equals_trace(name, image_size, overrides, direction):
    arguments = BY_NAME[name].arguments(**overrides)
    closed = BY_NAME[name].count(direction, image_size, **overrides)
    traced = traced_compute("vq", arguments, image_size=image_size, direction=direction)
    assert traced.breakdown == closed.breakdown and traced.params == closed.params
    assert closed.source == "closed form" and traced.source == "traced"


@pytest.mark.parametrize("name", VQ)
def test_closed_form_equals_torchs_own_counter(name):
    net, spec = on_meta(name), BY_NAME[name]
    channels, side = spec.defaults["code_channels"], 256 // spec.factor
    for direction, x in (("decode", (1, channels, side, side)), ("encode", (1, 3, 256, 256))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            getattr(net, direction)(torch.zeros(x, device="meta"))
        assert spec.count(direction).macs * 2 == counter.get_total_flops()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"width": 48}, "not divisible by the 32 groups"),
        ({"multipliers": ()}, "multipliers are empty"),
        ({"multipliers": (1, 0)}, r"multipliers\[1\] is 0"),
        ({"attention_resolutions": (48,)}, "no level has attention resolution 48"),
        ({"resolution": 250}, "cannot be halved"),
        ({"codes": None}, "codes is None"),
        ({"heads": 3}, "has no argument 'heads'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(overrides, words):
    with pytest.raises(UserError, match=words) as caught:
        BY_NAME["vq-f4"].build(**overrides)
    assert "\n" not in str(caught.value)


def test_inputs_that_do_not_fit_are_refused():
    net = built("vq-f4")
    with pytest.raises(UserError, match=r"images of shape \(1, 3, 30, 32\).*multiples of 4"):
        net.encode(torch.zeros(1, 3, 30, 32))
    with pytest.raises(UserError, match=r"latents of shape \(1, 4, 8, 8\).*\(N, 3, h, w\)"):
        net.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(UserError, match="direction 'sideways'"):
        BY_NAME["vq-f4"].count("sideways")
    with pytest.raises(UserError, match="image size 30 is not a multiple of its factor 4"):
        BY_NAME["vq-f4"].count("decode", 30)
    with pytest.raises(UserError, match="'kl-f8' is not implemented for 'torch'"):
        BY_NAME["kl-f8"].build()
    assert len({spec.name for spec in SPECS}) == len(SPECS)
