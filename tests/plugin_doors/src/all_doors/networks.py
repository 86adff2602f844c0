"""Networks in torch."""

import torch
from torch import nn


class Masked(nn.Module):
    """Tokens of 2x2 pixels through a layer; in training half of each image's tokens, chosen at random."""

    def __init__(self, *, input_size, in_channels, num_classes, out_channels):
        super().__init__()
        width, self.side = 16, input_size // 2
        channels = 2 * in_channels if out_channels is None else out_channels
        self.into = nn.Conv2d(in_channels, width, 2, stride=2)
        self.time, self.label = nn.Linear(1, width), nn.Embedding(num_classes + 1, width)
        self.inner = nn.Linear(width, width)
        self.out = nn.ConvTranspose2d(width, channels, 2, stride=2)

    def forward(self, x, t, y):
        assert t.dtype == torch.float32
        c = self.time(t[:, None]) + self.label(y)  # (N, D)
        tokens = self.into(x).flatten(2).transpose(1, 2) + c[:, None]  # (N, T, D)
        if self.training:
            order = torch.rand(tokens.shape[:2], device=x.device).argsort(1)
            rows = order[:, : order.shape[1] // 2, None].expand(-1, -1, tokens.shape[2])
            tokens = tokens.scatter_add(1, rows, torch.relu(self.inner(tokens.gather(1, rows))))
        else:
            tokens = tokens + torch.relu(self.inner(tokens))
        return self.out(tokens.transpose(1, 2).unflatten(2, (self.side, self.side)))  # (N, out_channels, H, W)


class Pixelwise(nn.Module):
    """Two layers at each pixel, without a label."""

    def __init__(self, *, input_size, in_channels, num_classes, out_channels):
        super().__init__()
        self.into, self.time = nn.Linear(in_channels, 16), nn.Linear(1, 16)
        self.out = nn.Linear(16, 2 * in_channels if out_channels is None else out_channels)

    def forward(self, x, t, y):
        assert t.dtype == torch.float32
        h = torch.relu(self.into(x.movedim(1, 3)) + self.time(t[:, None] / 10)[:, None, None])  # (N, H, W, D)
        return self.out(h).movedim(3, 1)


class Quiet(nn.Module):
    """The mean square of taps, times a trained factor."""

    def __init__(self, shapes, tokens):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tapped, tokens):
        return self.scale * sum(x.flatten(1).square().mean(1) for x in tapped.values())  # (N,)


class Blocks(nn.Module):
    """The pixels of 2x2 blocks as channels, turned; normalised with the mean and the spread of digits in [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.linalg.qr(torch.randn(4, 4))[0])
        self.register_buffer("mean", torch.tensor(-0.4))
        self.register_buffer("spread", torch.tensor(0.7))

    def encode(self, images):
        blocks = nn.functional.pixel_unshuffle((images - self.mean) / self.spread, 2)  # (N, 4, h, w)
        mean = torch.einsum("dc,nchw->ndhw", self.turn, blocks)
        return mean, torch.full_like(mean, 0.01)

    def decode(self, latents):
        blocks = torch.einsum("dc,ndhw->nchw", self.turn, latents)
        return nn.functional.pixel_shuffle(blocks, 2) * self.spread + self.mean


class OneWay(Blocks):
    """Forgets to undo the normalisation."""

    def decode(self, latents):
        return nn.functional.pixel_shuffle(torch.einsum("dc,ndhw->nchw", self.turn, latents), 2)


class Steps(nn.Module):
    """A perceptron over all pixels, told the time and the end of a step."""

    def __init__(self, *, input_size, in_channels, num_classes, out_channels):
        super().__init__()
        width, self.side = 256, input_size
        channels = 2 * in_channels if out_channels is None else out_channels
        self.into = nn.Linear(in_channels * input_size**2, width)
        self.time, self.label = nn.Linear(16, width), nn.Embedding(num_classes + 1, width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, channels * input_size**2)

    def forward(self, x, t, y):
        angle = t[:, :, None] * torch.tensor(
            [1.0, 2.0, 4.0, 8.0], device=t.device
        )  # (N, 2, 4): of the time, of the end
        c = self.time(torch.cat([angle.sin(), angle.cos()], 2).flatten(1)) + self.label(y)  # (N, D)
        h = torch.relu(self.into(x.flatten(1)) + c)
        h = h + torch.relu(self.first(h) + c)
        h = h + torch.relu(self.second(h) + c)
        return self.out(h).unflatten(1, (-1, self.side, self.side))
