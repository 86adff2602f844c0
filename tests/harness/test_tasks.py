"""What networks of each kind are trained on, and the chain that draws from them: cascades, generators, rounding."""

import numpy as np
import pytest
import torch
from sampler_plans import ddpm_plan
from scipy import stats

from harness import randomness
from harness.data.images import ImageSet
from harness.diffusion.guidance import Guidance
from harness.diffusion.schedule import Schedule
from harness.diffusion.training import TrainingObjective
from harness.engines.loss_terms import LOSS_TERMS
from harness.engines.torch import sampling
from harness.engines.torch.loss import DenoisingLoss
from harness.engines.torch.loss_functions import LossFunction
from harness.engines.torch.sampling import TorchChain, TorchGenerator, TorchStage, random, to_uint8
from harness.engines.torch.trainer import TorchEngine
from harness.errors import RunError, UserError
from harness.protocols import UINT8_RULES, Recipe
from harness.randomness import Purpose
from harness.registry import backbones
from harness.runs.run import Resolved
from harness.spec import BackboneSpec, Compute

CPU = torch.device("cpu")
SEED = 7
POSITIONS = torch.arange(1000, 1024)
SIZES = {"input_size": 8, "in_channels": 3, "num_classes": 10}


def spec(kind, null_label="num_classes"):
    return BackboneSpec(
        name=f"toy-{kind}", kind=kind, null_label=null_label, builders={"torch": "nowhere:Nothing"},
        closed_form=lambda **arguments: Compute(params=0, rows=()),
        defaults={"input_size": 8, "in_channels": 1, "num_classes": 3, "out_channels": None},
    )  # fmt: skip


def images(count=24, side=8):
    """(float32 (N, 3, S, S) in [-1, 1], int64 (N,))."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=generator)
    return pixels / 127.5 - 1, torch.randint(0, 10, (count,), generator=generator)


def make_task(kind, low=2, null_label="num_classes", **recipe):
    arguments = {**SIZES, **({"low_res_size": low} if kind == "upsampler" else {})}
    return LossFunction(spec(kind, null_label), arguments, recipe=Recipe(**recipe), seed=SEED, device=CPU)


def losses(task, net, x0, y, positions):
    return task.losses(net, x0, task.draws(y, positions))


class Recorder:
    """A function of its inputs that keeps them."""

    def __init__(self, kind="denoiser"):
        self.kind, self.calls = kind, []

    def __call__(self, *inputs):
        self.calls.append(tuple(each.clone() for each in inputs))
        x, t = inputs[:2]
        shade = (t / 1000)[:, None, None, None]
        if self.kind == "classifier":
            return (x.flatten(1)[:, :10] * 3).bfloat16()
        if self.kind == "upsampler":
            shade = shade + inputs[3].mean(dim=(1, 2, 3), keepdim=True)
        return torch.cat([0.5 * x + shade, torch.tanh(x) - shade], dim=1)

    def column(self, at):
        return torch.cat([call[at] for call in self.calls])


def noised(x0, positions=POSITIONS):
    """(t, noise, x_t) of the stream by the numpy reference and DDPM's equation 4."""
    t = randomness.integers(SEED, Purpose.TIMESTEP, positions.numpy(), 0, 1000)
    noise = randomness.normal(SEED, Purpose.TRAINING_NOISE, positions.numpy(), 0, tuple(x0.shape[1:]))
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t][:, None, None, None]
    return torch.from_numpy(t), torch.from_numpy(noise), np.sqrt(abar) * x0.numpy() + np.sqrt(1 - abar) * noise


@pytest.mark.parametrize("low", [1, 2, 4, 8])
def test_an_upsampler_learns_to_denoise_given_the_averaged_image(low):
    x0, y = images()
    net = Recorder("upsampler")
    terms = losses(make_task("upsampler", low, null_label=None), net, x0, y, POSITIONS)
    t, noise, xt = noised(x0)
    area = x0.numpy().astype(np.float64).reshape(24, 3, low, 8 // low, low, 8 // low).mean(axis=(3, 5))
    ((seen_x, seen_t, seen_y, seen_low),) = net.calls
    np.testing.assert_allclose(seen_x, xt, atol=3e-6)
    np.testing.assert_allclose(seen_low, area, atol=1e-6)
    assert torch.equal(seen_t, t) and torch.equal(seen_y, y)
    output = Recorder("upsampler")(seen_x, t, y, torch.from_numpy(area).float())
    tables = DenoisingLoss(TrainingObjective.from_recipe(Recipe()))
    expected = tables.terms(output, x0, t, noise)
    assert terms.keys() == LOSS_TERMS["upsampler"].keys() == {"mse", "vb"}
    for name in ("mse", "vb"):
        assert terms[name].shape == (24,) and terms[name].dtype == torch.float32
        torch.testing.assert_close(terms[name], getattr(expected, name), rtol=1e-5, atol=1e-6)


def test_conditioning_noise():
    """What is added to the averaged image is one level for each image, uniform below the recipe's, times noise."""
    x0, y = images(512, side=4)
    positions = torch.arange(5000, 5512)
    plain, noisy, other = (Recorder("upsampler") for _ in range(3))
    losses(make_task("upsampler"), plain, x0, y, positions)
    task = make_task("upsampler", conditioning_noise=0.2)
    whole = losses(task, noisy, x0, y, positions)
    parts = []
    for rows in torch.arange(512).split(37):  # another task, other micro-batches: the same numbers
        again = make_task("upsampler", conditioning_noise=0.2)
        parts.append(losses(again, other, x0[rows], y[rows], positions[rows]))
    for at in range(4):
        assert torch.equal(noisy.column(at), other.column(at))
    for name, values in whole.items():
        torch.testing.assert_close(torch.cat([each[name] for each in parts]), values, rtol=1e-5, atol=1e-6)
    added = (noisy.column(3) - plain.column(3)).double().numpy()  # (512, 3, 2, 2)
    noise = randomness.normal(SEED, Purpose.CONDITIONING_NOISE, positions.numpy(), 0, (3, 2, 2)).astype(np.float64)
    level = (added * noise).sum(axis=(1, 2, 3)) / (noise**2).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(added, level[:, None, None, None] * noise, atol=1e-6)  # nothing else is in it
    assert level.min() >= 0 and level.max() < 0.2
    assert stats.kstest(level, "uniform", args=(0, 0.2)).pvalue > 1e-3
    assert abs(np.corrcoef(level, noisy.column(1).numpy())[0, 1]) < 4 / np.sqrt(512)  # of t
    shifted = Recorder("upsampler")
    losses(task, shifted, x0, y, positions + 1)
    assert not np.isclose(shifted.column(3)[0], noisy.column(3)[0]).any()


def test_a_classifier_learns_the_label_of_the_noised_image():
    x0, y = images()
    net = Recorder("classifier")
    terms = losses(make_task("classifier", label_dropout=0.9), net, x0, y, POSITIONS)
    t, _, xt = noised(x0)
    ((seen_x, seen_t),) = net.calls  # no label goes in
    np.testing.assert_allclose(seen_x, xt, atol=3e-6)
    assert torch.equal(seen_t, t)
    logits = Recorder("classifier")(seen_x, t).double().numpy()
    right = logits[np.arange(24), y.numpy()]
    top = logits.max(axis=1)
    expected = top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - right
    np.testing.assert_allclose(terms["cross_entropy"], expected, rtol=1e-5, atol=1e-6)
    assert terms["accuracy"].tolist() == (right == top).astype(float).tolist()
    assert 0 < terms["accuracy"].mean() < 1 and LOSS_TERMS["classifier"] == {"cross_entropy": 1.0, "accuracy": 0.0}


@pytest.mark.parametrize("kind", ["denoiser", "upsampler"])
def test_labels_are_dropped_where_there_is_a_null_label(kind):
    x0, y = images()
    net, without = Recorder(kind), Recorder(kind)
    losses(make_task(kind, label_dropout=0.5), net, x0, y, POSITIONS)
    dropped = randomness.uniform(SEED, Purpose.LABEL_DROPOUT, POSITIONS.numpy(), 0) < 0.5
    assert 4 < dropped.sum() < 20
    assert net.column(2).tolist() == np.where(dropped, 10, y).tolist()
    losses(make_task(kind, null_label=None, label_dropout=0.5), without, x0, y, POSITIONS)
    assert torch.equal(without.column(2), y)


def test_a_generator_is_not_trained():
    with pytest.raises(UserError, match="'toy-generator' is a generator, which the harness samples and does not train"):
        make_task("generator")


ADM = {"input_size": 8, "in_channels": 3, "num_classes": 10, "width": 32, "attention_resolutions": (4,)}
NETWORKS = {
    "adm-xs": {**ADM, "head_channels": 16, "out_channels": 6},
    "adm-u-xs": {**ADM, "head_channels": 16, "low_res_size": 4, "out_channels": 6},
    "adm-classifier-xs": {**ADM, "head_channels": 16},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_micro_batches_add_up(name):
    """Gradients and terms of 24 images at once and 8 at a time; the orders of float32 sums are what differs."""
    pixels, labels = images()
    stored = ImageSet(
        name="toy",
        images=((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy(),
        labels=labels.numpy(),
    )
    torch.manual_seed(0)
    arguments = backbones.get(name).arguments(**NETWORKS[name])
    net = backbones.get(name).build("torch", **arguments)
    with torch.no_grad():
        for each in net.parameters():
            each.add_(0.05 * torch.randn_like(each))  # output layers begin at zero, and would stop all gradients
    found = []
    for size in (24, 8):
        resolved = Resolved(device="cpu", device_name="test", precision="float32", micro_batch=size, threads=1)
        engine = TorchEngine(
            backbones.get(name), net, arguments=arguments, recipe=Recipe(batch=24, conditioning_noise=0.1),
            seed=SEED, resolved=resolved, data=stored,
        )  # fmt: skip
        net.zero_grad()
        totals = sum(engine._accumulate(range(start, start + size)) for start in range(0, 24, size))
        found.append((totals, [each.grad.double().clone() for each in net.parameters()]))
    (terms, whole), (terms_split, split) = found
    assert engine.loss_terms == LOSS_TERMS[backbones.get(name).kind] and torch.isfinite(terms).all() and terms[0] > 0.1
    torch.testing.assert_close(terms_split, terms, rtol=1e-5, atol=1e-6)
    scale = max(each.abs().max() for each in whole)
    assert all(each.abs().max() > 0 for each in whole)
    for one, other in zip(whole, split, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * scale.item())


# --- sampling: everything around the network is per element here, so that equal means equal to the last bit


class PerElement(torch.nn.Module):
    """Epsilon and variance of every element from its own input, time, label and low-resolution pixel."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, y, low_res=None):
        self.calls.append((x.clone(), y.clone(), None if low_res is None else low_res.clone()))
        shade = (t.float() / 1000 + y.float() / 10)[:, None, None, None]
        if low_res is not None:
            factor = x.shape[-1] // low_res.shape[-1]
            shade = shade + 0.5 * low_res.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        return torch.cat([0.3 * x + shade, x * 0.1 - shade], dim=1)


class Corner(torch.nn.Module):
    """Logits of three classes from three pixels."""

    def forward(self, x, t):
        return x[:, 0, 0, :3] * (1 + t.float() / 1000)[:, None]


def stage(net, size, kind="upsampler", steps=6, **options):
    arguments = {"in_channels": 1, "input_size": size, "num_classes": 3}
    plan = ddpm_plan(Schedule.named("linear"), steps, clip_denoised=True)
    return TorchStage(spec(kind), net, plan, arguments=arguments, precision="float32", device=CPU, **options)


def cascade(seed=SEED):
    """4 to 8 to 16 pixels: base guided by a classifier, upsamplers with all that they can have."""
    nets = [PerElement() for _ in range(3)]
    stages = [
        stage(nets[0], 4, "denoiser", classifier=Corner(), classifier_scale=3.0),
        stage(nets[1], 8, number=1, conditioning_noise=0.2, guidance=Guidance(1.5)),
        stage(nets[2], 16, number=2, conditioning_noise=0.1),
    ]
    return nets, stages, TorchChain(stages, None, seed=seed, uint8_rule="adm", device=CPU)


INDEX = np.arange(64, dtype=np.int64)
LABELS = INDEX % 3


def test_an_image_of_a_cascade_does_not_know_its_batch(monkeypatch):
    floats, steps = [], []
    monkeypatch.setattr(sampling, "to_uint8", lambda x, rule: (floats.append(x.clone()), to_uint8(x, rule))[1])
    results = {}
    for batch in (64, 16, 1):
        floats.clear()
        steps.clear()
        chain = cascade()[2]
        rows = np.split(INDEX, range(batch, 64, batch))
        results[batch] = (
            np.concatenate([chain.draw(each, LABELS[each], lambda: steps.append(1)) for each in rows]),
            *(torch.cat(floats[at::3]) for at in range(3)),
        )
        assert chain.evaluations == 6 + 12 + 6 and len(steps) == 18 * len(rows)
    assert results[64][0].shape == (64, 16, 16, 1) and len(np.unique(results[64][0])) > 50
    for batch in (16, 1):
        for one, other in zip(results[64], results[batch], strict=True):
            assert np.array_equal(one, other)
    assert not np.array_equal(cascade(seed=SEED + 1)[2].draw(INDEX, LABELS), results[64][0])


class Small:
    """A network on a GPU whose memory suffices for `most` images at once; guidance doubles them."""

    def __init__(self, net, most):
        self.net, self.most, self.sizes = net, most, []

    def to(self, device):
        return self

    eval = requires_grad_ = lambda self, *_: self

    def __call__(self, x, *rest):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.net(x, *rest)


def small_cascade(most):
    nets, stages, chain = cascade()
    small = Small(nets[1], most)
    stages[1]._net._net = small
    return small, chain


def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same_images(caplog):
    steps, halved = [], []
    whole, whole_predicted = cascade()[2].trajectory(INDEX, LABELS, (2, 17), 20, lambda: steps.append(1))
    small, chain = small_cascade(most=40)  # 64 images, then 32, are 128 and 64 with guidance; 16 fit
    with caplog.at_level("INFO"):
        images, predicted = chain.trajectory(INDEX, LABELS, (2, 17), 20, lambda: halved.append(1))
    assert small.sizes[:2] == [128, 64] and set(small.sizes[2:]) == {32}
    assert np.array_equal(images, whole) and len(halved) == len(steps) == 18
    for one, other in zip(predicted, whole_predicted, strict=True):
        assert len(one) == 20 and np.array_equal(one, other)
    assert "32 images at once do not fit in the memory of cpu; trying 16" in caplog.text
    small.sizes.clear()
    assert np.array_equal(chain.draw(INDEX, LABELS), whole)
    assert set(small.sizes) == {32}  # what fits is known


def test_where_not_even_one_image_fits_there_is_one_line():
    with pytest.raises(RunError, match="the memory of cpu is too small to sample one image") as caught:
        small_cascade(most=1)[1].draw(INDEX, LABELS)
    assert "\n" not in str(caught.value)


def test_an_upsampler_is_given_the_rounded_image_and_noise():
    nets, stages, chain = cascade()
    chain.draw(INDEX, LABELS)
    low, scales = stages, (0.2, 0.1)
    for number, (net, scale) in enumerate(zip(nets[1:], scales, strict=True), start=1):
        before = TorchChain(low[:number], None, seed=SEED, uint8_rule="adm", device=CPU).draw(INDEX, LABELS)
        side = before.shape[1]
        noise = randomness.normal(SEED, Purpose.CONDITIONING_NOISE, INDEX, number, (1, side, side))
        expected = before.transpose(0, 3, 1, 2) / 127.5 - 1 + scale * noise
        for _, _, given in net.calls[:6]:  # the same at every step
            np.testing.assert_allclose(given[:64], expected, atol=1e-6)  # float32; a level is 8e-3


def test_no_noise_is_used_twice(monkeypatch):
    """Every draw of a chain has a purpose and step of its own, so base and upsamplers share no noise."""
    asked = []
    normal = random.normal
    monkeypatch.setattr(random, "normal", lambda *key: (asked.append((int(key[1]), int(key[3]))), normal(*key))[1])
    cascade()[2].draw(INDEX, LABELS)
    assert len(asked) == 3 * 6 + 2 and len(set(asked)) == len(asked)  # x_T and five steps each, two conditionings
    nets = [PerElement() for _ in range(3)]
    stages = [stage(net, 8, number=number) for number, net in enumerate(nets)]
    TorchChain(stages, None, seed=SEED, uint8_rule="adm", device=CPU).draw(INDEX, LABELS)
    first = np.stack([net.calls[0][0].numpy().ravel() for net in nets])  # x_T: 4096 numbers each
    assert np.abs(np.corrcoef(first) - np.eye(3)).max() < 4 / np.sqrt(4096)
    assert np.allclose(first.std(axis=1), 1, atol=0.06)


def test_guidance_doubles_the_batch_with_its_low_resolution_image():
    net, seen = PerElement(), PerElement()
    low = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    rows, y = torch.arange(5), torch.tensor([0, 1, 2, 0, 1])
    out = stage(net, 8, number=1, guidance=Guidance(2.5)).draw(SEED, rows, y, low, lambda: None)
    for x, labels, given in net.calls:
        assert labels.tolist() == [0, 1, 2, 0, 1, 3, 3, 3, 3, 3]
        assert torch.equal(x[:5], x[5:]) and torch.equal(given, torch.cat([low, low]))

    class ByHand(torch.nn.Module):
        def forward(self, x, t, y, low_res):
            given, free = (seen(x, t, each, low_res) for each in (y, torch.full_like(y, 3)))
            return torch.cat([free[:, :1] + 2.5 * (given - free)[:, :1], given[:, 1:]], dim=1)

    expected = stage(ByHand(), 8, number=1).draw(SEED, rows, y, low, lambda: None)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert (out - stage(PerElement(), 8, number=1).draw(SEED, rows, y, low, lambda: None)).abs().max() > 0.01


def test_within_an_interval_only_its_rows_have_the_doubled_batch(monkeypatch):
    """Of ddpm's 6 rows, at timesteps 999, 799, ..., 0; compiled, all calls have equally many images."""
    low = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    draw = (SEED, torch.arange(6), torch.arange(6) % 3, low, lambda: None)
    plan = ddpm_plan(Schedule.named("linear"), 6)
    inside = (plan.sigma >= 0.5) & (plan.sigma <= 10)
    assert inside.tolist() == [False, False, True, True, True, False]
    settings = {"number": 1, "guidance": Guidance(2.5, "0.5-10")}
    net = PerElement()
    made = stage(net, 8, **settings)
    out = made.draw(*draw)
    assert [len(x) for x, *_ in net.calls] == [12 if each else 6 for each in inside]
    assert [len(given) for *_, given in net.calls] == [12 if each else 6 for each in inside]
    assert made.evaluations == 6 + inside.sum()

    monkeypatch.setattr(sampling, "compile_sampler", lambda net, device: net)
    monkeypatch.setattr(sampling, "check_available", lambda device: None)
    monkeypatch.setattr(sampling, "CALL_MACS", 4.0)  # of the toy, which has none: counts as 1, so 4 images a call
    net = PerElement()
    compiled = stage(net, 8, compile="on", **settings).draw(*draw)
    assert [len(x) for x, *_ in net.calls] == [3] * 2 * made.evaluations
    assert torch.equal(compiled, out)


class Latents(torch.nn.Module):
    """Shows its latent as an image and keeps what it is called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, z, y, *, truncation):
        self.seen.append((z.clone(), y.clone(), truncation))
        return z.reshape(len(z), 1, 4, 4).expand(-1, 3, -1, -1)


@pytest.mark.parametrize("truncation", [1.0, 0.4])
def test_a_generator_starts_from_a_truncated_normal(truncation):
    net = Latents()
    generator = TorchGenerator(net, latent_size=16, truncation=truncation, precision="float32", device=CPU)
    rows, y, steps = torch.arange(4000), torch.arange(4000) % 3, []
    out = generator.draw(SEED, rows, y, None, lambda: steps.append(1))
    ((z, labels, given),) = net.seen
    assert out.shape == (4000, 3, 4, 4) and out.dtype == z.dtype == torch.float32 and torch.equal(labels, y)
    assert (given, generator.evaluations, steps) == (truncation, 1, [1])
    assert z.abs().max() <= 2 * truncation and z.abs().max() > 1.99 * truncation
    law = stats.truncnorm(-2, 2, scale=truncation)
    assert stats.kstest(z.numpy().ravel(), law.cdf).pvalue > 1e-3  # 64,000 numbers
    for row in np.corrcoef(z.numpy().T) - np.eye(16):
        assert np.abs(row).max() < 5 / np.sqrt(4000)
    for batch in (1000, 1):
        parts = [generator.draw(SEED, each, y[each], None, lambda: None) for each in rows[:2000].split(batch)[:50]]
        assert torch.equal(torch.cat(parts), out[: len(parts) * batch])
    assert not torch.equal(generator.draw(SEED + 1, rows, y, None, lambda: None), out)


def test_rounding_is_that_of_the_public_code():
    """Every value of -1.2 ... 1.2 in steps of 1/4096, against the formulas as their authors write them."""
    x = torch.arange(-4916, 4917, dtype=torch.float32) / 4096  # exact, and so are the products below
    value = x.numpy()
    public = {
        "dit": np.clip(127.5 * value + 128.0, 0, 255).astype(np.uint8),
        "adm": ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).numpy(),
        "ldm": (255 * np.clip((value + 1) / 2, 0.0, 1.0)).astype(np.uint8),
        "biggan": np.clip((value + 1) / 2.0 * 256, 0, 255).astype(np.uint8),
    }
    assert public.keys() == UINT8_RULES.keys()
    for rule, expected in public.items():
        rounded = to_uint8(x[:, None, None, None].expand(-1, 3, 1, 1), rule)
        assert rounded.shape == (9833, 1, 1, 3) and rounded.dtype == np.uint8
        assert np.array_equal(rounded[:, 0, 0, 1], expected)
        assert (expected[0], expected[-1]) == (0, 255)
    # What tells them apart; at these inputs LDM's is ADM's.
    assert {rule: int(values[4916]) for rule, values in public.items()} == {
        "dit": 128, "adm": 127, "ldm": 127, "biggan": 128,
    }  # fmt: skip
    assert (public["dit"][4916 + 2048], public["biggan"][4916 + 2048]) == (191, 192)
    for bad in (np.nan, np.inf):
        with pytest.raises(RunError, match="not finite"):
            to_uint8(torch.full((1, 1, 1, 1), bad), "dit")
