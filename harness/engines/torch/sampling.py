"""Sampling in torch: weights, network and plan put together; images out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from harness.diffusion import adaptive
from harness.diffusion.adaptive import AdaptivePlan
from harness.diffusion.guidance import NO_GUIDANCE, Guidance, extrapolated
from harness.diffusion.plans import SamplerPlan
from harness.diffusion.sampler_plan import AnyPlan, guided_evaluations, guided_rows
from harness.engines.guidance import check_guidance
from harness.engines.torch.compiling import check_available, compile_sampler
from harness.engines.torch.halving import HalvedBatches, SharedProgress
from harness.engines.torch.ode import solve
from harness.engines.torch.resolve import autocast, set_arithmetic
from harness.engines.torch.sampler import (
    ImageGuidance,
    Predict,
    classifier_guide,
    guided,
    guided_image,
    sample_loop,
)
from harness.errors import RunError, UserError
from harness.frameworks.torch_transfer import to_device
from harness.protocols import UINT8_RULES, Sampling
from harness.randomness import Purpose
from harness.randomness import threefry_torch as random
from harness.runs import checkpoints
from harness.spec import BackboneSpec

# Multiply-adds of a network call on a CPU, at most: about 4 images of a DiT-S/2. Activations then fit in the cache, and the
# overhead of more calls is small. A GPU gets the whole batch at once.
CALL_MACS = 25e9
STAGE_BITS = 32  # steps below 2**32 belong to one stage of a cascade


def load_weights(net: torch.nn.Module, path: Path) -> torch.nn.Module:
    """Copy the tensors of a safetensors file into `net`, in place and one at a time, and return it.

    Raises UserError with the first tensor that does not fit or is missing.
    """
    state = net.state_dict()
    seen = set()
    for name, array in checkpoints.tensors(path):
        if name not in state or tuple(state[name].shape) != array.shape:
            raise UserError(f"{path} does not fit the backbone: it holds {name} {array.shape}")
        with torch.no_grad():
            state[name].copy_(torch.from_numpy(array))
        seen.add(name)
    if missing := sorted(set(state) - seen):
        raise UserError(f"{path} does not fit the backbone: {missing[0]} is missing")
    return net


class WeakGuide(NamedTuple):
    """The weaker network of autoguidance."""

    net: torch.nn.Module
    plan: SamplerPlan  # of its kind of prediction, with the rows of the plan of the network that it guides
    macs: int  # of one evaluation


class _CalledNetwork:
    """A network on its device, called with as many images at once as suit it."""

    def __init__(
        self,
        net: torch.nn.Module,
        macs: int,  # of one evaluation
        *,
        precision: str,
        device: torch.device,
        compile: str,  # "on" or "off"
    ):
        self._net: Callable[..., torch.Tensor] = net.to(device).eval().requires_grad_(False)
        if compile == "on":
            check_available(device)
            self._net = compile_sampler(net, device)
        self._precision, self._device = precision, device
        self._max_images: int | None = None  # in one call of the network; None: any number
        if device.type == "cpu":
            self._max_images = max(1, int(CALL_MACS / max(macs, 1)))
        self.equal_sizes = compile == "on"  # all calls with equally many images: each new size would be compiled anew

    def __call__(self, *arguments: torch.Tensor, same_size_as: int | None = None) -> torch.Tensor:
        """The network's output float32. arguments: its inputs, with the images first.

        same_size_as: if compiled, the calls have the size of those for a batch of this many images, of which N is a
        multiple; None: they are as few as possible.
        """
        count = len(arguments[0])
        calls = self._call_count(count)
        if self.equal_sizes and same_size_as is not None:
            calls = count // same_size_as * self._call_count(same_size_as)
        inputs = zip(*(tensor.tensor_split(calls) for tensor in arguments), strict=True)
        with autocast(self._device, self._precision):
            return torch.cat([self._net(*part).float() for part in inputs])

    def _call_count(self, count: int) -> int:
        """The number of network calls for `count` images: as few as CALL_MACS allows; equal in size if compiled."""
        if self._max_images is None:
            return 1
        calls = max(1, math.ceil(count / self._max_images))
        while self.equal_sizes and count % calls:
            calls += 1
        return calls


class TorchStage:
    """A denoiser or an upsampler under one plan, with guidance by its own prediction, a weaker network or a classifier."""

    def __init__(
        self,
        spec: BackboneSpec,
        net: torch.nn.Module,
        plan: SamplerPlan,
        *,
        arguments: dict[str, Any],
        precision: str,
        device: torch.device,
        guidance: Guidance = NO_GUIDANCE,
        guidance_channels: str = "all",
        weak: WeakGuide | None = None,  # with it, `guidance` is autoguidance
        classifier: torch.nn.Module | None = None,
        classifier_scale: float = 1.0,
        conditioning_noise: float = 0.0,
        number: int = 0,  # of the stage: 0 is the base, 1 the first upsampler
        compile: str = "off",  # or "on"
    ):
        settings: dict[str, Any] = {"precision": precision, "device": device, "compile": compile}
        self._net = _CalledNetwork(net, spec.count(**arguments).macs, **settings)
        self._weak, self._weak_plan = None, plan
        if weak is not None:
            self._weak = _CalledNetwork(weak.net, weak.macs, **settings)
            self._weak_plan = weak.plan
        self._classifier = None if classifier is None else classifier.to(device).eval().requires_grad_(False)
        self._plan, self._precision, self._device, self._stage_number = plan, precision, device, number
        self._guided_rows = guided_rows(plan, guidance)
        self._guidance, self._guidance_channels = guidance, guidance_channels
        self._null_label = spec.null_index(arguments["num_classes"])
        self._classifier_scale, self._conditioning_noise = classifier_scale, conditioning_noise
        self._shape = (arguments["in_channels"], arguments["input_size"], arguments["input_size"])
        self.evaluations = guided_evaluations(plan, guidance)
        self.rows = plan.evaluations  # of the plan

    def draw(
        self,
        seed: int,
        index: torch.Tensor,  # int64 (N,), on the CPU: sample indices
        y: torch.Tensor,  # int64 (N,): labels
        low_res: torch.Tensor | None,  # float32 (N, C, s, s): the input of an upsampler
        advance: Callable[[], None],  # called after each step of the plan
        rows: Sequence[int] = (),  # of the plan, whose predicted images `watch` gets
        watch: Callable[[torch.Tensor], None] = lambda x0: None,  # called with float32 (N, C, H, W) at each of `rows`
    ) -> torch.Tensor:
        """Images, or latents of a latent-space network: float32 (N, C, H, W)."""
        set_arithmetic(self._device, self._precision)
        if low_res is not None and self._conditioning_noise:
            where = (seed, Purpose.CONDITIONING_NOISE, index, self._stage_number)
            noise = random.normal(*where, tuple(low_res.shape[1:]), self._device)
            low_res = low_res + self._conditioning_noise * noise  # (N, C, s, s)

        # The steps of different stages of a cascade never coincide.
        first = self._stage_number << STAGE_BITS
        purpose = Purpose.UPSAMPLER_NOISE if first else Purpose.STEP_NOISE
        step_noise = random.StepNormals(seed, purpose, index, first, self._device)
        initial_noise = step_noise
        if not first:
            initial_noise = random.StepNormals(seed, Purpose.INITIAL_NOISE, index, 0, self._device)

        def noise_of(k: int) -> torch.Tensor:
            """The noise (N, C, H, W) of plan step k."""
            return step_noise(first + 1 + k if first else k, self._shape)

        def call(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            """The network's output float32, computed in one or several calls."""
            arguments = [x, t, y]
            if low_res is not None:
                arguments.append(low_res.repeat(len(x) // len(low_res), 1, 1, 1))  # guidance doubles the batch
            # With an interval, a guided row has twice the images of another, and is computed in twice as many calls.
            mixed = self._guided_rows.any() and not self._guided_rows.all()
            return self._net(*arguments, same_size_as=len(index) if mixed else None)

        def logits(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            assert self._classifier is not None
            with autocast(self._device, self._precision):
                return self._classifier(x, t)

        predict, image_guidance = self._guided(call, y)
        return sample_loop(
            predict,
            self._plan,
            x=initial_noise(first, self._shape),
            noise=noise_of,
            progress=lambda *_: advance(),
            guide=None if self._classifier is None else classifier_guide(logits, y, self._classifier_scale),
            watch=lambda k, x0: watch(x0) if k in rows else None,
            image_guidance=image_guidance,
        )

    def _guided(
        self, call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], y: torch.Tensor
    ) -> tuple[Predict, ImageGuidance | None]:
        """The network `call` of (x, t, labels) for labels `y` under the guidance of the stage, in its output or in its D."""
        scale, channels, rows = self._guidance.scale, self._guidance_channels, self._guided_rows
        weak, rule = self._weak, self._guidance.custom_rule

        def predict(x: torch.Tensor, t: torch.Tensor, row: int) -> torch.Tensor:
            return call(x, t, y)

        if weak is not None:
            return predict, guided_image(lambda x, t: weak(x, t, y), self._weak_plan, scale, extrapolated, rows)
        if rule is None:
            return guided(call, y, scale, channels, self._null_label, rows), None
        check_guidance(scale, channels, self._null_label, needs_null_label=rule.evaluations == 2)
        reference = None
        if rule.evaluations == 2:
            assert self._null_label is not None  # or check_guidance had raised
            unlabelled = torch.full_like(y, self._null_label)

            def reference(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                return call(x, t, unlabelled)

        return predict, guided_image(reference, self._plan, scale, rule.combine, rows, channels)


class TorchOdeStage:
    """A denoiser under an adaptive plan, with or without classifier-free guidance."""

    evaluations = None  # each image has its own
    rows = adaptive.PROGRESS_UNITS

    def __init__(
        self,
        spec: BackboneSpec,
        net: torch.nn.Module,
        plan: AdaptivePlan,
        *,
        arguments: dict[str, Any],
        precision: str,
        device: torch.device,
        guidance: Guidance = NO_GUIDANCE,
        guidance_channels: str = "all",
        compile: str = "off",  # or "on"
    ):
        macs = spec.count(**arguments).macs
        self._net = _CalledNetwork(net, macs, precision=precision, device=device, compile=compile)
        self._plan, self._precision, self._device = plan, precision, device
        self._segments = plan.segments(guidance)
        self._guidance = (guidance.scale, guidance_channels, spec.null_index(arguments["num_classes"]))
        self._shape = (arguments["in_channels"], arguments["input_size"], arguments["input_size"])
        self.counts = np.zeros(0, np.int64)  # (N,): network evaluations of the images of the last `draw`

    def draw(
        self,
        seed: int,
        index: torch.Tensor,
        y: torch.Tensor,
        low_res: torch.Tensor | None,
        advance: Callable[[], None],
        rows: Sequence[int] = (),
        watch: Callable[[torch.Tensor], None] = lambda x0: None,
    ) -> torch.Tensor:
        """Images, or latents of a latent-space network: float32 (N, C, H, W). Arguments as of `TorchStage.draw`.

        low_res: None, and rows: empty, because no upsampler has this sampler and it has no rows. `advance` is called
        PROGRESS_UNITS times.
        """
        assert low_res is None and not rows
        set_arithmetic(self._device, self._precision)
        scale, rule, null_label = self._guidance

        def predict(x: torch.Tensor, t: torch.Tensor, which: torch.Tensor, is_guided: bool) -> torch.Tensor:
            count = len(x)
            if self._net.equal_sizes and count < len(index):  # fill up the batch, so as not to compile anew
                filled = torch.arange(len(index), device=x.device).clamp(max=count - 1)
                x, t, which = x[filled], t[filled], which[filled]
            net = guided(self._net, y[which], scale if is_guided else 1.0, rule, null_label)
            return net(x, t, 0)[:count]

        progress = adaptive.Progress(advance)
        x = random.normal(seed, Purpose.INITIAL_NOISE, index, 0, self._shape, self._device)  # (N, C, H, W)
        x, self.counts = solve(predict, self._plan, self._segments, x, progress.reach)
        progress.reach(1.0)
        return x


class TorchGenerator:
    """A generator (a GAN): one forward pass from a truncated normal latent."""

    evaluations = rows = 1

    def __init__(
        self, net: torch.nn.Module, *, latent_size: int, truncation: float, precision: str, device: torch.device
    ):
        self._net = net.to(device).eval().requires_grad_(False)
        self._latent_size, self._truncation = latent_size, truncation
        self._precision, self._device = precision, device

    @torch.inference_mode()
    def draw(
        self,
        seed: int,
        index: torch.Tensor,
        y: torch.Tensor,
        low_res: torch.Tensor | None,
        advance: Callable[[], None],
        rows: Sequence[int] = (),
        watch: Callable[[torch.Tensor], None] = lambda x0: None,
    ) -> torch.Tensor:
        """Images float32 (N, 3, H, W) from z = truncation x a standard normal cut off at -2 and 2 (BigGAN, sec. 3.1).

        index: sample indices int64 (N,), on the CPU. y: labels int64 (N,). low_res: None, because a generator is the only network of
        its system. rows: empty, because a generator predicts no images on the way.
        """
        assert low_res is None and not rows
        set_arithmetic(self._device, self._precision)
        u = random.uniform(seed, Purpose.INITIAL_NOISE, index, 0, (self._latent_size,), self._device)  # (N, Z)
        # The inverse of the normal distribution function, at u scaled to the interval between the two tails.
        tail = 0.5 * (1 + math.erf(-2 / math.sqrt(2)))  # the probability below -2
        z = torch.special.ndtri(tail + u.double() * (1 - 2 * tail)).clamp(-2, 2) * self._truncation  # (N, Z)
        with autocast(self._device, self._precision):
            images = self._net(z.float(), y, truncation=self._truncation).float()  # (N, 3, H, W)
        advance()
        return images


class TorchSampler:
    """Draws images of one network under one plan. Implements `harness.engines.interfaces.Sampler`."""

    def __init__(
        self,
        spec: BackboneSpec,
        net: torch.nn.Module,
        plan: AnyPlan,
        sampling: Sampling,
        *,
        arguments: dict[str, Any],
        precision: str,
        device: torch.device,
        decode: Callable[[torch.Tensor], torch.Tensor] | None = None,  # latents (N, C, h, w) -> images (N, 3, H, W)
        compile: str = "off",
        batch: int | None = None,  # if compiled, a smaller batch is filled up to this size, so as not to compile anew
    ):
        settings: dict[str, Any] = {
            "arguments": arguments, "precision": precision, "device": device, "compile": compile,
            "guidance": sampling.guidance, "guidance_channels": sampling.guidance_channels,
        }  # fmt: skip
        stage: TorchStage | TorchOdeStage
        if isinstance(plan, AdaptivePlan):
            stage = TorchOdeStage(spec, net, plan, **settings)
        else:
            stage = TorchStage(spec, net, plan, **settings)
        self._chain = TorchChain(
            [stage], decode, seed=sampling.seed, uint8_rule=sampling.uint8_rule, device=device,
            fill=batch if compile == "on" else None,
        )  # fmt: skip
        self.evaluations = self._chain.evaluations

    @property
    def counts(self) -> np.ndarray:
        """See `harness.engines.interfaces.Sampler`."""
        return self._chain.counts

    def draw(self, index: np.ndarray, labels: np.ndarray, advance: Callable[[], None] = lambda: None) -> np.ndarray:
        """Images uint8 (N, H, W, C) of sample indices int64 (N,) with labels int64 (N,)."""
        return self._chain.draw(index, labels, advance)

    def trajectory(
        self, index: np.ndarray, labels: np.ndarray, rows: Sequence[int], count: int, advance: Callable[[], None]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """See `harness.engines.interfaces.Sampler`."""
        return self._chain.trajectory(index, labels, rows, count, advance)


class TorchChain:
    """The networks of a system one after the other, then a decoder of latents. Implements `harness.engines.interfaces.Sampler`.

    An upsampler gets the images of the network before it as uint8, as if read from a file (guided-diffusion
    scripts/super_res_sample.py). A batch for which a GPU's memory does not suffice is sampled in parts.
    """

    def __init__(
        self,
        stages: Sequence[TorchStage | TorchOdeStage | TorchGenerator],
        decode: Callable[[torch.Tensor], torch.Tensor] | None,  # latents (N, C, h, w) -> images (N, 3, H, W)
        *,
        seed: int,
        uint8_rule: str,
        device: torch.device,
        fill: int | None = None,  # smaller batches are filled up to this size, by repeating the last image; None: not
    ):
        self._stages, self._decode = tuple(stages), decode
        self._seed, self._rule, self._device = seed, uint8_rule, device
        self._batches = HalvedBatches(device, fill or 0)
        self.evaluations: int | None = (
            None  # an adaptive stage is the only one: see `harness.systems.checks.check_system`
        )
        if not isinstance(self._stages[0], TorchOdeStage):
            self.evaluations = sum(stage.evaluations for stage in stages if stage.evaluations is not None)
        self.counts = np.zeros(0, np.int64)

    def draw(self, index: np.ndarray, labels: np.ndarray, advance: Callable[[], None] = lambda: None) -> np.ndarray:
        """Images uint8 (N, H, W, C) of sample indices int64 (N,) with labels int64 (N,)."""
        return self.trajectory(index, labels, (), 0, advance)[0]

    def trajectory(
        self, index: np.ndarray, labels: np.ndarray, rows: Sequence[int], count: int, advance: Callable[[], None]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """See `harness.engines.interfaces.Sampler`."""
        progress = SharedProgress(advance, sum(stage.rows for stage in self._stages), len(index))

        def sample(part: slice) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
            wanted = min(max(count - part.start, 0), part.stop - part.start)
            return self._sample(index[part], labels[part], rows, wanted, progress.of(part))

        parts = self._batches.call(sample, len(index))
        self.counts = np.concatenate([counts for _, _, counts in parts])
        predicted = [np.concatenate(images) for images in zip(*(images for _, images, _ in parts), strict=True)]
        return np.concatenate([images for images, _, _ in parts]), predicted

    def _sample(
        self, index: np.ndarray, labels: np.ndarray, rows: Sequence[int], count: int, advance: Callable[[], None]
    ) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """(images, predicted images, evaluations of each image if the stage is adaptive) of images that fit in memory."""
        batch = len(index)  # without the images that fill up the batch, which are cut off again below
        if fill := self._batches.filled(batch) - batch:
            index, labels = (np.pad(each, (0, fill), mode="edge") for each in (index, labels))
        y = to_device(torch.from_numpy(labels), self._device)
        x: torch.Tensor | None = None
        predicted: list[np.ndarray] = []
        first = 0  # row of the chain that is row 0 of the stage
        for stage in self._stages:
            low_res = None
            if x is not None:
                pixels = torch.from_numpy(to_uint8(x, self._rule)).permute(0, 3, 1, 2)
                low_res = to_device(pixels, self._device).float() / 127.5 - 1  # (N, C, s, s)
            x = stage.draw(
                self._seed, torch.from_numpy(index), y, low_res, advance, [row - first for row in rows if row >= first],
                lambda x0: predicted.append(self._to_images(x0[:count])),
            )  # (N, C, H, W)  # fmt: skip
            first += stage.rows
        assert x is not None  # there is at least one stage
        counts = stage.counts[:batch] if isinstance(stage, TorchOdeStage) else np.zeros(0, np.int64)
        return self._to_images(x[:batch]), predicted, counts

    def _to_images(self, x: torch.Tensor) -> np.ndarray:
        """Images float32 (N, C, H, W), or latents, which are decoded, as uint8 (N, H, W, C)."""
        return to_uint8(x if self._decode is None else self._decode(x), self._rule)


def to_uint8(x: torch.Tensor, rule: str) -> np.ndarray:
    """Images (N, C, H, W) of about [-1, 1] as uint8 (N, H, W, C), by a rule of `harness.protocols.UINT8_RULES`.

    Raises RunError where a value is not finite.
    """
    shift, factor, offset = UINT8_RULES[rule]
    if not torch.isfinite(x).all():
        raise RunError("sampling ended in values that are not finite; train longer or sample with float32")
    return ((x + shift) * factor + offset).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
