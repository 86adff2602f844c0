"""Autoencoders of packages whose code fails: one line that names the distribution and the function."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from harness import registry
from harness.autoencoders.load import load_autoencoder
from harness.autoencoders.tokenizer import Tokenizer
from harness.cli import group
from harness.errors import UserError

SHAPE = (1, 1, 8, 8)


class Halves(nn.Module):
    """Pixels of 2x2 blocks as channels."""

    def encode(self, x):
        return nn.functional.pixel_unshuffle(x, 2)

    def decode(self, z):
        return nn.functional.pixel_shuffle(z, 2)


class EncodeRaises(Halves):
    def encode(self, x):
        raise ValueError("no such\ncode")


class DecodeRaises(Halves):
    def decode(self, z):
        return z @ torch.zeros(3, 3, device=z.device)


class NoDecode(nn.Module):
    encode = Halves.encode


class DecodesToAList(Halves):
    def decode(self, z):
        return [super().decode(z)]


class DecodesSmall(Halves):
    def decode(self, z):
        return z


class EncodesIntegers(Halves):
    def encode(self, x):
        return super().encode(x).long()


@pytest.fixture
def tokenizer(request):
    """The autoencoder "halves" whose network is the class `request.param`, as of the distribution lab-tokens."""
    builder = f"{__name__}:{request.param.__name__}"
    item = Tokenizer(name="halves", builder=builder, channels=4, factor=2, round_trip=0.1, image_channels=1)
    registry.autoencoders.register(item, "lab-tokens")
    yield request.param
    del registry.autoencoders._items["halves"], registry.autoencoders._owners["halves"]


RAISING = {
    EncodeRaises: r"its encode failed: ValueError: no such \(test_tokenizers.py, line \d+\)$",
    DecodeRaises: r"its decode failed: RuntimeError: .*\(test_tokenizers.py, line \d+\)$",
    NoDecode: "its decode failed: AttributeError: 'NoDecode' object has no attribute 'decode'$",
}
WRONG = {
    DecodesToAList: r"expected images \(1, 1, 8, 8\) of floats from decode, came a list$",
    DecodesSmall: r"expected images \(1, 1, 8, 8\) of floats from decode, came torch.float32 \(1, 4, 4, 4\)$",
    EncodesIntegers: r"expected latents \(1, 4, 4, 4\) of floats from encode, came torch.int64 \(1, 4, 4, 4\)$",
}


@pytest.mark.parametrize("tokenizer", [*RAISING, *WRONG], indirect=True)
def test_what_fails_in_it_is_one_line(tokenizer, tmp_path):
    message = r"^autoencoder 'halves' of lab-tokens: " + {**RAISING, **WRONG}[tokenizer]
    decoder = load_autoencoder("halves")
    direction = "encode" if "Encode" in tokenizer.__name__ else "decode"
    with pytest.raises(UserError, match=message):
        decoder.posterior(torch.zeros(SHAPE)) if direction == "encode" else decoder.decode(torch.zeros(1, 4, 4, 4))
    if tokenizer in RAISING:
        with pytest.raises(UserError, match=message):
            decoder.compute(8, direction)
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images, arr_1=np.arange(4))
    words = ("data", "latents", tmp_path / "images.npz", "--vae", "halves", "--device", "cpu", "--out", tmp_path / "o")
    refused = CliRunner().invoke(group, [str(word) for word in words])
    assert isinstance(refused.exception, UserError) and not (tmp_path / "o").exists()


@pytest.mark.parametrize("tokenizer", [Halves], indirect=True)
def test_a_sound_one_comes_back(tokenizer):
    decoder = load_autoencoder("halves")
    x = torch.rand(SHAPE)
    assert torch.equal(decoder.decode(decoder.posterior(x)[:, 0]), x) and decoder.compute(8).gflops == 0
