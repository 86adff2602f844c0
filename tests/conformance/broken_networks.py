"""A small network that a package could bring, and one class for each way in which it can be wrong."""

import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.spec import BackboneSpec, Compute, ComputeRow

DEFAULTS = {"input_size": 8, "in_channels": 2, "num_classes": 5, "out_channels": None, "width": 8}


class Good(nn.Module):
    """Two convolutions, with a shift by time and label between them."""

    labels = 1  # rows of the table beside the classes

    def __init__(self, *, input_size, in_channels, num_classes, out_channels, width):
        super().__init__()
        if input_size % 2:
            raise UserError(f"input_size {input_size} is odd")
        self.into = nn.Conv2d(in_channels, width, 3, padding=1)
        self.time = nn.Linear(2, width)
        self.label = nn.Embedding(num_classes + self.labels, width)
        self.out = nn.Conv2d(width, out_channels or 2 * in_channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        times = torch.stack([(t.float() / 100).sin(), (t.float() / 100).cos()], 1)  # (N, 2)
        return self.time(times) + self.label(y)  # (N, D)

    def hidden(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.relu(self.into(x) + self.condition(t, y)[:, :, None, None])  # (N, D, H, W)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.out(self.hidden(x, t, y))  # (N, C or 2 C, H, W)


class _KeptAside(torch.autograd.Function):
    """x, whose copies for the backward pass autograd does not know of."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = [x * 1.0 for _ in range(4)]
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.kept[0].isfinite()


class KeepsAside(Good):
    def hidden(self, x, t, y):
        return _KeptAside.apply(super().hidden(x, t, y))


class Masked(nn.Module):
    """Tokens through a layer; in training a random half of each image's tokens, and a learned one in place of the others."""

    kept = 0.5

    def __init__(self, *, input_size, in_channels, num_classes, out_channels, width):
        super().__init__()
        self.into = nn.Linear(in_channels, width)
        self.time, self.label = nn.Linear(2, width), nn.Embedding(num_classes + 1, width)
        self.inner = nn.Linear(width, width)
        self.hidden = nn.Parameter(torch.full((width,), 0.1))
        self.out = nn.Linear(width, out_channels or 2 * in_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angle = t.float() / 100
        c = self.time(torch.stack([angle.sin(), angle.cos()], 1)) + self.label(y)  # (N, D)
        tokens = self.into(x.flatten(2).transpose(1, 2)) + c[:, None]  # (N, T, D)
        if self.training:
            order = torch.rand(tokens.shape[:2], device=x.device).argsort(1)  # (N, T)
            rows = order[:, : int(self.kept * order.shape[1])][..., None].expand(-1, -1, tokens.shape[2])
            seen = torch.relu(self.inner(tokens.gather(1, rows)))
            tokens = tokens + self.hidden.expand_as(tokens).scatter(1, rows, seen)
        else:
            tokens = tokens + torch.relu(self.inner(tokens)) + 0 * self.hidden
        return self.out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class SkipsForTheBatch(Good):
    """Stochastic depth that leaves a layer out for all images at once."""

    kept = 0.5

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.inner = nn.Conv2d(arguments["width"], arguments["width"], 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.into(x) + self.condition(t, y)[:, :, None, None]
        return self.out(h + self.branch(h))

    def branch(self, h: Tensor) -> Tensor:
        if self.training and torch.rand(()) > self.kept:
            return torch.zeros_like(h)
        return self.inner(h)


class SkipsImages(SkipsForTheBatch):
    """The same for each image on its own."""

    def branch(self, h: Tensor) -> Tensor:
        kept = torch.rand(len(h), 1, 1, 1, device=h.device) < self.kept
        return self.inner(h) * kept / self.kept if self.training else self.inner(h)


class FloatTime(Good):
    """Takes float32 times alone, of size 1."""

    def condition(self, t, y):
        assert t.dtype == torch.float32
        return super().condition(100 * t, y)


class WrongChannels(Good):
    def __init__(self, **arguments):
        super().__init__(**{**arguments, "out_channels": 3})


class IgnoresOutChannels(Good):
    def __init__(self, **arguments):
        super().__init__(**{**arguments, "out_channels": 2 * arguments["in_channels"]})


class Complex(Good):
    """Complex parameters, as Fourier layers are often written."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.twist = nn.Parameter(torch.ones(1, dtype=torch.complex64))

    def forward(self, x, t, y):
        return (super().forward(x, t, y) * self.twist).real


class IgnoresTime(Good):
    def condition(self, t, y):
        return super().condition(t * 0, y)


class IgnoresLabel(Good):
    def condition(self, t, y):
        return super().condition(t, y * 0)


class WritesIntoImage(Good):
    def forward(self, x, t, y):
        return super().forward(x.mul_(2), t, y)


class WritesIntoLabel(Good):
    def forward(self, x, t, y):
        y[:] = (y + 1) % 5
        return super().forward(x, t, y)


class Random(Good):
    calls = 0

    def hidden(self, x, t, y):
        Random.calls += 1
        return super().hidden(x, t, y) * (1 + 0.01 * (Random.calls % 7))


class IdleParameter(Good):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.idle = nn.Parameter(torch.zeros(3))


class HalfFrozen(Good):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.into.requires_grad_(False)


class Float64(Good):
    def forward(self, x, t, y):
        return super().forward(x, t, y).double()


class BatchNorm(Good):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.norm = nn.BatchNorm2d(arguments["width"])

    def hidden(self, x, t, y):
        return self.norm(super().hidden(x, t, y))


class BatchMean(Good):
    def hidden(self, x, t, y):
        h = super().hidden(x, t, y)
        return h - h.mean(0, keepdim=True)


class DropoutAlways(Good):
    def hidden(self, x, t, y):
        return torch.nn.functional.dropout(super().hidden(x, t, y), 0.1)


class TimeOfTheFirst(Good):
    def condition(self, t, y):
        return super().condition(t[:1].expand(len(t)), y)


class SumOverBatch(Good):
    def hidden(self, x, t, y):
        return super().hidden(x, t, y).cumsum(0)


class NullIsClassZero(Good):
    labels = 0

    def condition(self, t, y):
        return super().condition(t, y % 5)


class LogOfTime(Good):
    def condition(self, t, y):
        return super().condition(t.float().log(), y)


class TwoExperts(Good):
    """One of two branches for each image, by its label: right, though one image does not use both."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.other = nn.Conv2d(arguments["in_channels"], arguments["width"], 1)

    def hidden(self, x, t, y):
        other = self.other(x) + self.condition(t, y)[:, :, None, None]  # (N, D, H, W)
        return torch.where((y % 2 == 0)[:, None, None, None], super().hidden(x, t, y), other)


class OtherInTraining(Good):
    def hidden(self, x, t, y):
        return super().hidden(x, t, y) * (2 if self.training else 1)


class NoRowForNull(Good):
    labels = 0


class Tuple(Good):
    def forward(self, x, t, y):
        return super().forward(x, t, y), None


class WithoutArguments(nn.Module):
    def __init__(self):
        super().__init__()


class OneSize(Good):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.position = nn.Parameter(torch.zeros(1, arguments["width"], 8, 8))

    def hidden(self, x, t, y):
        return super().hidden(x, t, y) + self.position


class HiddenState(Good):
    """Random features that are neither parameter nor buffer."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.features = torch.randn(1, arguments["width"], 1, 1)

    def hidden(self, x, t, y):
        return super().hidden(x, t, y) * self.features


class IntegerTimes(Good):
    def condition(self, t, y):
        return self.label(y) + self.time(torch.eye(1000)[t][:, :2] + t[:, None] / 1000)


class NotFinite(Good):
    def forward(self, x, t, y):
        return super().forward(x, t, y) / 0 * 0


class Detached(Good):
    def forward(self, x, t, y):
        return super().forward(x, t, y).detach()


class Sort(torch.autograd.Function):
    """An operation that knows no bfloat16."""

    @staticmethod
    def forward(ctx, x):
        if x.dtype == torch.bfloat16:
            raise RuntimeError("my_kernel is not implemented for BFloat16")
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class KnowsNoBfloat16(Good):
    def forward(self, x, t, y):
        return Sort.apply(super().forward(x, t, y))


def half_of_the_flops(**arguments):
    return Compute(params=1, rows=(ComputeRow("into", "conv", 1000),))


def spec_of(network: type, name: str = "on-trial", **fields) -> BackboneSpec:
    """The spec of a class of this module."""
    fields = {"null_label": "num_classes", "defaults": DEFAULTS, **fields}
    return BackboneSpec(name=name, builders={"torch": f"{__name__}:{network.__name__}"}, **fields)
