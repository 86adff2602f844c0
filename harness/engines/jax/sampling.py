"""Sampling in jax: weights, network and plan put together; images out."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.stages import Wrapped

from harness.diffusion.adaptive import AdaptivePlan
from harness.diffusion.guidance import NO_GUIDANCE, Guidance, extrapolated
from harness.diffusion.guidance_rules import GuidanceRule
from harness.diffusion.plans import SamplerPlan
from harness.diffusion.sampler_plan import AnyPlan, guided_evaluations, guided_rows
from harness.engines.guidance import check_guidance, divergence_error
from harness.engines.jax import mesh as devices
from harness.engines.jax.compiling import jit
from harness.engines.jax.errors import errors_in_one_line
from harness.engines.jax.network import CALL_SECONDS, LESS_MEMORY, Network
from harness.engines.jax.ode import JaxOdeStage
from harness.engines.jax.plan_arrays import PlanArrays, PlanForm, split_plan
from harness.engines.jax.sampler import (
    Carry,
    Guide,
    ImageGuidance,
    Predict,
    classifier_guide,
    first_carry,
    guided,
    guided_image,
    predicted_image,
    sample_steps,
)
from harness.engines.jax.trainer import matmul_context
from harness.errors import RunError
from harness.protocols import UINT8_RULES, Sampling
from harness.randomness import Purpose
from harness.randomness import threefry_jax as random
from harness.randomness.threefry_jax import Words, words
from harness.runs import checkpoints
from harness.spec import BackboneSpec

# weights of the network, of a classifier, and of a weaker network
States: TypeAlias = tuple[nnx.State, nnx.State | None, nnx.State | None]
# of the plan of the network, and of that of a weaker network
Arrays: TypeAlias = tuple[PlanArrays, PlanArrays | None]


class WeakGuide(NamedTuple):
    """The weaker network of autoguidance."""

    net: Network
    plan: SamplerPlan  # of its kind of prediction, with the rows of the plan of the network that it guides


def load_weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, by name."""
    return dict(checkpoints.tensors(path))


@dataclass(frozen=True)
class Program:
    """What the compiled functions of a stage depend on. Stages with equal programs share them: see `_compiled`."""

    graph: nnx.GraphDef
    classifier: nnx.GraphDef | None
    form: PlanForm
    mesh: Mesh
    shape: tuple[int, int, int]  # of x: (C, H, W)
    weak: nnx.GraphDef | None
    weak_form: PlanForm | None
    guidance: tuple[float, str, int | None]  # scale, rule of channels, null label
    rule: GuidanceRule | None  # of a package
    classifier_scale: float
    conditioning_noise: float
    stage_number: int

    def prepare(self, seed: int, index: Words, low_res: Array | None) -> tuple[Carry, Array | None]:
        """The state before the first row, of the initial noise, and `low_res` with its conditioning noise added."""
        if low_res is not None and self.conditioning_noise:
            noise = random.normal(seed, Purpose.CONDITIONING_NOISE, index, self.stage_number, low_res.shape[1:])
            low_res = low_res + self.conditioning_noise * noise  # (N, C, s, s)
        if self.stage_number:  # of an upsampler
            x = self._upsampler_noise(seed, index, np.asarray(0, np.uint32))
        else:
            x = random.normal(seed, Purpose.INITIAL_NOISE, index, 0, self.shape)
        return first_carry(self.form, x), low_res

    def steps(
        self,
        seed: int,
        states: States,
        arrays: Arrays,
        carry: Carry,
        first: Array,
        end: Array,
        index: Words,
        y: Array,
        low_res: Array | None,
    ) -> tuple[Carry, Array]:
        """The state after rows first ... end - 1 of the plan, and whether all of x is finite (bool scalar).

        states: the weights of the networks. Other arguments as in `JaxStage.draw`.
        """

        def noise_of(k: Array) -> Array:
            """The noise float32 (N, C, H, W) of plan row k."""
            word = k.astype(jnp.uint32)
            if self.stage_number:  # of an upsampler, whose word 0 is x_T
                return self._upsampler_noise(seed, index, word + np.uint32(1))
            return random.normal(seed, Purpose.STEP_NOISE, index, Words(np.asarray(0, np.uint32), word), self.shape)

        predict, guide, image_guidance = self._predict(states, arrays, y, low_res)
        carry = sample_steps(predict, self.form, arrays[0], carry, first, end, noise_of, guide, image_guidance)
        return carry, jnp.isfinite(carry.x).all()

    def prediction(
        self, states: States, arrays: Arrays, carry: Carry, k: Array, y: Array, low_res: Array | None
    ) -> Array:
        """The image float32 (N, C, H, W) that row k of the plan predicts; arguments as in `steps`."""
        predict, guide, image_guidance = self._predict(states, arrays, y, low_res)
        return predicted_image(predict, self.form, arrays[0], carry.x, k, guide, image_guidance)

    def _predict(
        self, states: States, arrays: Arrays, y: Array, low_res: Array | None
    ) -> tuple[Predict, Guide | None, ImageGuidance | None]:
        """The network, under classifier-free guidance if that is wanted; a classifier's guide; another guidance of D."""
        net = nnx.merge(self.graph, states[0])

        def call(x: Array, t: Array, y: Array) -> Array:
            if low_res is None:
                return net(x, t, y)
            return net(x, t, y, jnp.tile(low_res, (len(x) // len(low_res), 1, 1, 1)))  # for the two halves of guidance

        guide = None
        if self.classifier is not None:
            guide = classifier_guide(nnx.merge(self.classifier, states[1]), y, self.classifier_scale)
        (scale, channels, null_label), plan_arrays = self.guidance, arrays[0]

        def predict(x: Array, t: Array, row: Array) -> Array:
            return call(x, t, y)

        if self.weak is not None:
            assert self.weak_form is not None and arrays[1] is not None
            weak = nnx.merge(self.weak, states[2])
            return (
                predict,
                guide,
                guided_image(lambda x, t: weak(x, t, y), self.weak_form, arrays[1], scale, extrapolated),
            )
        if self.rule is None:
            # Otherwise the scale says it: with 1 no row is guided, with another all are.
            is_guided = plan_arrays.is_guided if self.form.mixes_guidance else None
            return guided(call, y, scale, channels, null_label, is_guided), guide, None
        check_guidance(scale, channels, null_label, needs_null_label=self.rule.evaluations == 2)
        reference = None
        if self.rule.evaluations == 2:
            assert null_label is not None  # or check_guidance had raised
            unlabelled = jnp.full_like(y, null_label)

            def reference(x: Array, t: Array) -> Array:
                return call(x, t, unlabelled)

        return predict, guide, guided_image(reference, self.form, plan_arrays, scale, self.rule.combine, channels)

    def _upsampler_noise(self, seed: int, index: Words, word: Array | np.ndarray) -> Array:
        """Noise float32 (N, C, H, W) of the random step (stage number) x 2**32 + word: no two stages share a random step.

        word: uint32, 0 for x_T, k + 1 for plan row k.
        """
        step = Words(np.asarray(self.stage_number, np.uint32), word)
        return random.normal(seed, Purpose.UPSAMPLER_NOISE, index, step, self.shape)


@functools.lru_cache(maxsize=16)
def _compiled(program: Program) -> tuple[Wrapped, Wrapped, Wrapped]:
    """`Program.prepare`, `steps` and `prediction`, compiled at their first calls and kept for the next stage like this."""
    replicated, batch_sharding = devices.replicated(program.mesh), devices.batch_sharding(program.mesh)
    platform = program.mesh.devices.flat[0].platform
    # Argument 0 is the seed, which `threefry_jax` needs at tracing time.
    return (
        jit(program.prepare, platform, static_argnums=0, out_shardings=(batch_sharding, batch_sharding)),
        jit(program.steps, platform, static_argnums=0, out_shardings=(batch_sharding, replicated)),
        jit(program.prediction, platform, out_shardings=batch_sharding),
    )


class JaxStage:
    """A denoiser or an upsampler under one plan, with guidance by its own prediction, a weaker network or a classifier."""

    def __init__(
        self,
        spec: BackboneSpec,
        net: Network,
        plan: SamplerPlan,
        *,
        arguments: Mapping[str, Any],
        precision: str,
        mesh: Mesh,
        guidance: Guidance = NO_GUIDANCE,
        guidance_channels: str = "all",
        weak: WeakGuide | None = None,  # with it, `guidance` is autoguidance
        classifier: Network | None = None,
        classifier_scale: float = 1.0,
        conditioning_noise: float = 0.0,
        number: int = 0,  # of the stage: 0 is the base, 1 the first upsampler
    ):
        self._plan, self._precision = plan, precision
        is_guided = guided_rows(plan, guidance)
        form, arrays = split_plan(plan, is_guided)
        weak_form, weak_arrays = (None, None) if weak is None else split_plan(weak.plan, is_guided)
        self._arrays: Arrays = (arrays, weak_arrays)
        program = Program(
            graph=net.graph,
            classifier=None if classifier is None else classifier.graph,
            form=form,
            mesh=mesh,
            shape=(arguments["in_channels"], arguments["input_size"], arguments["input_size"]),
            weak=None if weak is None else weak.net.graph,
            weak_form=weak_form,
            guidance=(guidance.scale, guidance_channels, spec.null_index(arguments["num_classes"])),
            rule=guidance.custom_rule,
            classifier_scale=classifier_scale,
            conditioning_noise=conditioning_noise,
            stage_number=number,
        )
        self._states: States = (
            net.state,
            None if classifier is None else classifier.state,
            None if weak is None else weak.net.state,
        )
        self._prepare, self._steps, self._prediction = _compiled(program)
        self.evaluations = guided_evaluations(plan, guidance)
        self.rows = plan.evaluations  # of the plan
        self._steps_per_call = 1  # plan rows in one call of the device; `draw` doubles it while calls are short

    def draw(
        self,
        seed: int,
        index: Words,  # (N,): sample indices
        y: Array,  # int32 (N,): labels
        low_res: Array | None,  # float32 (N, C, s, s): the input of an upsampler
        advance: Callable[[], None],  # called after each step of the plan
        rows: Sequence[int] = (),  # ascending rows of the plan, whose predicted images `watch` gets
        watch: Callable[[Array], None] = lambda x0: None,  # called with float32 (N, C, H, W) at each of `rows`
    ) -> Array:
        """Images, or latents of a latent-space network: float32 (N, C, H, W).

        The images predicted at `rows` cost one more evaluation each: the loop on the device does not keep them.
        """
        done, states, arrays = 0, self._states, self._arrays
        with errors_in_one_line("sampling", LESS_MEMORY), matmul_context(self._precision):
            carry, low_res = self._prepare(seed, index, low_res)
            while done < self.rows:
                if done in rows:
                    watch(self._prediction(states, arrays, carry, np.int32(done), y, low_res))
                stops = [row for row in (*rows, self.rows) if row > done]
                end, began = min(done + self._steps_per_call, *stops), time.monotonic()
                carry, finite = self._steps(
                    seed, states, arrays, carry, np.int32(done), np.int32(end), index, y, low_res
                )
                if not bool(finite):
                    raise divergence_error(self._plan, end)
                if done and time.monotonic() - began < CALL_SECONDS / 2:  # not the first call, which may have compiled
                    self._steps_per_call *= 2
                for _ in range(done, end):
                    advance()
                done = end
        return carry.x


class JaxChain:
    """The networks of a system one after the other, then a decoder of latents. Implements `harness.engines.interfaces.Sampler`.

    Every batch is filled up to the same size, so that each stage is compiled once. An upsampler gets the images of the
    network before it as uint8, as if read from a file.
    """

    def __init__(
        self,
        stages: Sequence[JaxStage | JaxOdeStage],
        decode: Callable[[np.ndarray], np.ndarray] | None,  # latents (N, C, h, w) -> images (N, 3, H, W)
        *,
        seed: int,
        uint8_rule: str,
        mesh: Mesh,
        batch: int,
    ):
        self._stages, self._decode = tuple(stages), decode
        self._seed, self._rule, self._mesh = seed, uint8_rule, mesh
        # The batch, rounded up to a multiple of the number of devices.
        self._size = -(-batch // mesh.devices.size) * mesh.devices.size
        self.evaluations: int | None = (
            None  # an adaptive stage is the only one: see `harness.systems.checks.check_system`
        )
        if not isinstance(self._stages[0], JaxOdeStage):
            self.evaluations = sum(stage.evaluations for stage in stages if stage.evaluations is not None)
        self.counts = np.zeros(0, np.int64)

    def draw(self, index: np.ndarray, labels: np.ndarray, advance: Callable[[], None] = lambda: None) -> np.ndarray:
        """Images uint8 (N, H, W, C) of sample indices int64 (N,) with labels int64 (N,)."""
        return self.trajectory(index, labels, (), 0, advance)[0]

    def trajectory(
        self, index: np.ndarray, labels: np.ndarray, rows: Sequence[int], count: int, advance: Callable[[], None]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """See `harness.engines.interfaces.Sampler`."""
        batch_sharding = devices.batch_sharding(self._mesh)

        def to_full_batch(values: Array | np.ndarray) -> Array:
            """`values` (n, ...) with rows repeated up to `_size`, divided over the devices."""
            values = np.resize(values, (self._size, *values.shape[1:]))  # repeats from the first row on
            return devices.to_device(values, batch_sharding)

        index_words, y = Words(*map(to_full_batch, words(index))), to_full_batch(labels.astype(np.int32))
        x: np.ndarray | None = None
        predicted: list[np.ndarray] = []
        first = 0  # row of the chain that is row 0 of the stage
        for stage in self._stages:
            low_res = None
            if x is not None:
                low_res = to_full_batch(to_uint8(x, self._rule).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
            last = stage.draw(
                self._seed, index_words, y, low_res, advance, [row - first for row in rows if row >= first],
                lambda x0: predicted.append(self._to_images(devices.gather(x0)[:count])),
            )  # fmt: skip
            x = devices.gather(last)[: len(index)]  # (N, C, H, W)
            first += stage.rows
        assert x is not None  # there is at least one stage
        if isinstance(stage, JaxOdeStage):
            self.counts = stage.counts[: len(index)]
        return self._to_images(x), predicted

    def _to_images(self, x: np.ndarray) -> np.ndarray:
        """Images float32 (N, C, H, W), or latents, which are decoded, as uint8 (N, H, W, C)."""
        if self._decode is not None:
            x = self._decode(np.array(x))  # (N, 3, H, W); a copy, because arrays of jax are read-only
        return to_uint8(x, self._rule)


def make_run_sampler(
    spec: BackboneSpec,
    net: Network,
    plan: AnyPlan,
    sampling: Sampling,
    *,
    arguments: Mapping[str, Any],
    precision: str,
    mesh: Mesh,
    batch: int,
    decode: Callable[[np.ndarray], np.ndarray] | None = None,  # latents (N, C, h, w) -> images (N, 3, H, W)
) -> JaxChain:
    """The sampler of one network under one plan, and under the guidance of `sampling`."""
    settings: dict[str, Any] = {
        "arguments": arguments, "precision": precision, "mesh": mesh,
        "guidance": sampling.guidance, "guidance_channels": sampling.guidance_channels,
    }  # fmt: skip
    stage: JaxStage | JaxOdeStage
    if isinstance(plan, AdaptivePlan):
        stage = JaxOdeStage(spec, net, plan, **settings)
    else:
        stage = JaxStage(spec, net, plan, **settings)
    return JaxChain([stage], decode, seed=sampling.seed, uint8_rule=sampling.uint8_rule, mesh=mesh, batch=batch)


def to_uint8(x: np.ndarray, rule: str) -> np.ndarray:
    """Images float32 (N, C, H, W) of about [-1, 1] as uint8 (N, H, W, C), by a rule of `harness.protocols.UINT8_RULES`.

    Raises RunError where a value is not finite.
    """
    if not np.isfinite(x).all():
        raise RunError("sampling ended in values that are not finite; train longer or sample with float32")
    shift, factor, offset = map(np.float32, UINT8_RULES[rule])
    return np.ascontiguousarray(((x + shift) * factor + offset).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1))
