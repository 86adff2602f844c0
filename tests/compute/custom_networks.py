"""Networks with operations of their own: an operator of torch.library, a torch.autograd.Function, a branch for meta tensors."""

import torch
from torch import nn

from harness.spec import BackboneSpec, Compute, ComputeRow

DEFAULTS = {"input_size": 8, "in_channels": 3, "num_classes": 5, "out_channels": None}
TOKENS, WIDTH, STATES = 64, 8, 4
OUTSIDE = (
    TOKENS * (9 * 3 * WIDTH + 9 * WIDTH * 6) + 3 * WIDTH
)  # flops of Base: two convolutions, time, label is a table


def by_products(x, a):
    """sum over the states of x_d a_ds: x (N, T, D), a (D, S) -> (N, T, D)."""
    return torch.einsum("ntd,ds->ntd", x, a)


def composed(x, a):
    """The same as a matrix product for each channel, counted: N T D S."""
    return (x.permute(2, 0, 1).flatten(1)[:, :, None] @ a[:, None]).sum(-1).T.reshape(x.shape)


@torch.library.custom_op("doors_test::mix", mutates_args=())
def mix(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return composed(x, a)


@mix.register_fake
def _(x, a):
    return torch.empty_like(x)


mix.register_autograd(
    lambda ctx, gradient: (
        gradient * ctx.saved_tensors[1].sum(1),
        (gradient * ctx.saved_tensors[0]).sum((0, 1))[:, None].expand(-1, STATES).contiguous(),
    ),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Mix(torch.autograd.Function):
    """A kernel with a branch for tensors without values, as those that run on a GPU alone have."""

    @staticmethod
    def forward(ctx, x, a):
        ctx.save_for_backward(x, a)
        return torch.empty_like(x) if x.is_meta else composed(x, a)

    @staticmethod
    def backward(ctx, gradient):
        x, a = ctx.saved_tensors
        return gradient * a.sum(1), (gradient * x).sum((0, 1))[:, None].expand(-1, STATES)


mix_by_function = Mix.apply  # bound before anything is traced


class Base(nn.Module):
    def __init__(self, *, input_size, in_channels, num_classes, out_channels):
        super().__init__()
        self.label, self.time = nn.Embedding(num_classes + 1, WIDTH), nn.Linear(3, WIDTH)
        self.into = nn.Conv2d(in_channels, WIDTH, 3, padding=1)
        self.out = nn.Conv2d(WIDTH, out_channels or 2 * in_channels, 3, padding=1)
        self.a = nn.Parameter(torch.randn(WIDTH, STATES))

    def forward(self, x, t, y):
        t = t.float() / 1000
        c = self.label(y) + self.time(torch.stack([t, t.cos(), t.sin()], 1))
        h = self.into(x) + c[:, :, None, None]
        h = h + self.mix(h.flatten(2).transpose(1, 2), self.a).transpose(1, 2).unflatten(2, h.shape[2:])
        return self.out(torch.nn.functional.silu(h))


class ByOperator(Base):
    def mix(self, x, a):
        return mix(x, a)


class ByFunction(Base):
    def mix(self, x, a):
        return mix_by_function(x, a)


class ByBranch(Base):
    def mix(self, x, a):
        return torch.empty_like(x) if x.device.type == "meta" else composed(x, a)


class ByProduct(Base):
    """A matrix product of four for each channel."""

    def mix(self, x, a):
        return composed(x, a)


class ByElements(Base):
    """The same element by element, and summed."""

    def mix(self, x, a):
        return (x[..., None] * a).sum(-1)


class ByCholesky(Base):
    """An operator of torch of which the convention knows nothing."""

    def mix(self, x, a):
        return x * torch.linalg.cholesky_ex(torch.eye(WIDTH, device=x.device)).L.diagonal() + a.mean()


class Moves(Base):
    """What torch.jit writes down otherwise: pixel_shuffle, flip, padding="same"."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.same = nn.Conv2d(WIDTH, WIDTH, 3, padding="same", groups=2)

    def forward(self, x, t, y):
        h = torch.nn.functional.pixel_shuffle(torch.nn.functional.pixel_unshuffle(x, 2), 2).flip(3)
        c = self.label(y) + self.time(t.float()[:, None].expand(-1, 3))
        return self.out(torch.nn.functional.silu(self.same(self.into(h))) + c[:, :, None, None]) + self.a.mean()


def half_of_the_flops(**arguments):
    return Compute(params=1, rows=(ComputeRow("into", "conv", 1000),))


def spec_of(network, **fields):
    fields = {"null_label": "num_classes", "defaults": DEFAULTS, **fields}
    return BackboneSpec(
        name=f"custom-{network.__name__.lower()}", builders={"torch": f"{__name__}:{network.__name__}"}, **fields
    )
