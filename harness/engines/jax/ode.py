"""The adaptive sampler in jax: `harness.engines.torch.ode` as compiled loops, and the stage that runs them.

All images of a batch are evaluated until the last one is done, because a compiled program has one batch size. Their states
no longer change then, and the evaluations are counted for the others alone.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.stages import Wrapped

from harness.diffusion import adaptive
from harness.diffusion.adaptive import AdaptivePlan
from harness.diffusion.guidance import NO_GUIDANCE, Guidance
from harness.engines.guidance import check_channels, stuck_error
from harness.engines.jax import mesh as devices
from harness.engines.jax.compiling import jit
from harness.engines.jax.errors import errors_in_one_line
from harness.engines.jax.network import CALL_SECONDS, LESS_MEMORY, Network
from harness.engines.jax.sampler import guided
from harness.engines.jax.trainer import matmul_context
from harness.randomness import Purpose
from harness.randomness import threefry_jax as random
from harness.randomness.threefry_jax import Words
from harness.spec import BackboneSpec

# (x (N, C, H, W) as the network sees it, time (N,)) -> (N, C or 2 C, H, W)
Predict = Callable[[Array, Array], Array]


class Carry(NamedTuple):
    """The state between two attempts."""

    x: Array  # float32 (N, C, H, W)
    k: Array  # the same: dx/dt at x
    t: Array  # float32 (N,)
    step: Array  # float32 (N,): size of the next step
    evaluations: Array  # int32 (N,): of the network, for each image


def slope_of(predict: Predict, plan: AdaptivePlan, x: Array, t: Array) -> Array:
    """dx/dt float32 (N, C, H, W). Raises UserError where the network's channels do not fit."""
    return plan.slope(x, _output(predict, plan, x, t), t, jnp)


def begin_segment(
    predict: Predict, plan: AdaptivePlan, carry: Carry, begin: Array, end: Array, cost: int, is_first: bool
) -> Carry:
    """The state at the beginning of a segment. cost: network evaluations of one call of `predict`, 2 with guidance.

    is_first: whether the first step size is to be found; carry.k, t, and then step, are not read.
    """
    t = jnp.full_like(carry.t, begin)
    slope = functools.partial(slope_of, predict, plan)
    k = slope(carry.x, t)
    step, count = carry.step, 1
    if is_first:
        step, count = adaptive.first_step(slope, carry.x, k, t, end, jnp), adaptive.START_EVALUATIONS
    return Carry(carry.x, k, t, step, carry.evaluations + count * cost)


def attempt_steps(
    predict: Predict, plan: AdaptivePlan, carry: Carry, end: Array, attempts: Array | int, cost: int
) -> Carry:
    """The state after at most `attempts` steps of each image that is not at `end`. May be traced."""
    weights, error_weights, shares = (
        jnp.asarray(each, jnp.float32)
        for each in (adaptive.STAGE_WEIGHTS, adaptive.ERROR_WEIGHTS, adaptive.STAGE_TIMES)
    )

    def attempt(state: tuple[Array, Carry]) -> tuple[Array, Carry]:
        number, (x, k, t, step, evaluations) = state
        is_active = t > end
        is_last = step >= t - end
        tried = jnp.where(is_last, t - end, step)
        t_1 = jnp.where(is_last, end, t - tried)

        def stage(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            slopes, _ = state
            after = adaptive.stage_state(x, slopes, weights[i], -tried)
            at = jnp.where(shares[i] == 1, t_1, t - shares[i] * tried)
            return slopes.at[i].set(slope_of(predict, plan, after, at)), after

        slopes = jnp.zeros((adaptive.STAGES, *x.shape), x.dtype).at[0].set(k)
        slopes, after = jax.lax.fori_loop(1, adaptive.STAGES, stage, (slopes, x))
        accepted, new_step = adaptive.judged(x, after, slopes, error_weights, tried, step, jnp)
        moves = is_active & accepted
        wide = moves[:, None, None, None]
        return number + 1, Carry(
            jnp.where(wide, after, x),
            jnp.where(wide, slopes[-1], k),
            jnp.where(moves, t_1, t),
            jnp.where(is_active, new_step, step),
            evaluations + jnp.where(is_active, adaptive.STEP_EVALUATIONS * cost, 0),
        )

    def goes_on(state: tuple[Array, Carry]) -> Array:
        return (state[0] < attempts) & (state[1].t > end).any()

    return jax.lax.while_loop(goes_on, attempt, (jnp.asarray(0, jnp.int32), carry))[1]


def last_image(predict: Predict, plan: AdaptivePlan, x: Array) -> Array:
    """The image float32 (N, C, H, W) that is predicted at the end of t."""
    t = jnp.full(len(x), plan.end, jnp.float32)
    return plan.image(x, _output(predict, plan, x, t), t, jnp)


def _output(predict: Predict, plan: AdaptivePlan, x: Array, t: Array) -> Array:
    out = predict(*plan.network_inputs(x, t, jnp)).astype(jnp.float32)
    check_channels(plan, out.shape[1], x.shape[1])  # at tracing time
    return out[:, : x.shape[1]]


@dataclass(frozen=True)
class OdeProgram:
    """What the compiled functions of an adaptive stage depend on. Stages with equal programs share them."""

    graph: nnx.GraphDef
    plan: AdaptivePlan
    mesh: Mesh
    shape: tuple[int, int, int]  # of x: (C, H, W)
    guidance: tuple[float, str, int | None]  # scale, rule of channels, null label

    def prepare(self, seed: int, index: Words) -> Carry:
        """The state before the first segment, of the initial noise."""
        x = np.float32(self.plan.initial_noise) * random.normal(seed, Purpose.INITIAL_NOISE, index, 0, self.shape)
        zero = jnp.zeros(len(x), jnp.float32)
        return Carry(x, jnp.zeros_like(x), zero, zero, jnp.zeros(len(x), jnp.int32))

    def begin(
        self, is_guided: bool, is_first: bool, state: nnx.State, carry: Carry, begin: Array, end: Array, y: Array
    ) -> Carry:
        """See `begin_segment`. state: the network's weights. y: int32 (N,), labels."""
        predict = self._predict(is_guided, state, y)
        return begin_segment(predict, self.plan, carry, begin, end, 2 if is_guided else 1, is_first)

    def attempts(
        self, is_guided: bool, state: nnx.State, carry: Carry, end: Array, attempts: Array, y: Array
    ) -> tuple[Carry, Array, Array]:
        """(see `attempt_steps`, t and the next step of each image (N,))."""
        predict = self._predict(is_guided, state, y)
        carry = attempt_steps(predict, self.plan, carry, end, attempts, 2 if is_guided else 1)
        return carry, carry.t, carry.step

    def last(self, is_guided: bool, state: nnx.State, carry: Carry, y: Array) -> Carry:
        """The state with the image that is predicted at the end of t in place of x."""
        image = last_image(self._predict(is_guided, state, y), self.plan, carry.x)
        return carry._replace(x=image, evaluations=carry.evaluations + (2 if is_guided else 1))

    def _predict(self, is_guided: bool, state: nnx.State, y: Array) -> Predict:
        scale, rule, null_label = self.guidance
        net = guided(nnx.merge(self.graph, state), y, scale if is_guided else 1.0, rule, null_label)
        return lambda x, t: net(x, t, jnp.asarray(0))


@functools.lru_cache(maxsize=16)
def _compiled(program: OdeProgram) -> tuple[Wrapped, Wrapped, Wrapped, Wrapped]:
    """`OdeProgram.prepare`, `begin`, `attempts` and `last`, compiled at their first calls."""
    replicated, batch_sharding = devices.replicated(program.mesh), devices.batch_sharding(program.mesh)
    platform = program.mesh.devices.flat[0].platform
    return (
        jit(program.prepare, platform, static_argnums=0, out_shardings=batch_sharding),
        jit(program.begin, platform, static_argnums=(0, 1), out_shardings=batch_sharding),
        jit(program.attempts, platform, static_argnums=0, out_shardings=(batch_sharding, replicated, replicated)),
        jit(program.last, platform, static_argnums=0, out_shardings=batch_sharding),
    )


class JaxOdeStage:
    """A denoiser under an adaptive plan, with or without classifier-free guidance."""

    evaluations = None  # each image has its own
    rows = adaptive.PROGRESS_UNITS

    def __init__(
        self,
        spec: BackboneSpec,
        net: Network,
        plan: AdaptivePlan,
        *,
        arguments: Mapping[str, Any],
        precision: str,
        mesh: Mesh,
        guidance: Guidance = NO_GUIDANCE,
        guidance_channels: str = "all",
    ):
        self._plan, self._precision, self._state = plan, precision, net.state
        self._segments = plan.segments(guidance)
        program = OdeProgram(
            graph=net.graph,
            plan=plan,
            mesh=mesh,
            shape=(arguments["in_channels"], arguments["input_size"], arguments["input_size"]),
            guidance=(guidance.scale, guidance_channels, spec.null_index(arguments["num_classes"])),
        )
        self._prepare, self._begin, self._attempts, self._last = _compiled(program)
        self._attempts_per_call = 1  # in one call of the device; `draw` doubles it while calls are short
        self.counts = np.zeros(0, np.int64)  # (N,): network evaluations of the images of the last `draw`

    def draw(
        self,
        seed: int,
        index: Words,  # (N,): sample indices
        y: Array,  # int32 (N,): labels
        low_res: Array | None,
        advance: Callable[[], None],
        rows: Sequence[int] = (),
        watch: Callable[[Array], None] = lambda x0: None,
    ) -> Array:
        """Images, or latents of a latent-space network: float32 (N, C, H, W).

        low_res: None, and rows: empty, because no upsampler has this sampler and it has no rows. `advance` is called
        PROGRESS_UNITS times.
        """
        assert low_res is None and not rows
        plan, state, progress = self._plan, self._state, adaptive.Progress(advance)
        with errors_in_one_line("sampling", LESS_MEMORY), matmul_context(self._precision):
            carry: Carry = self._prepare(seed, index)
            for number, segment in enumerate(self._segments):
                end, is_guided, attempts = np.float32(segment.end), segment.is_guided, 0
                carry = self._begin(is_guided, number == 0, state, carry, np.float32(segment.begin), end, y)
                slowest = segment.begin
                while slowest > end:
                    began = time.monotonic()
                    carry, t, step = self._attempts(is_guided, state, carry, end, np.int32(self._attempts_per_call), y)
                    slowest = float(np.asarray(t).max())
                    tried = self._attempts_per_call
                    if attempts and time.monotonic() - began < CALL_SECONDS / 2:  # not the first call: it compiles
                        self._attempts_per_call *= 2
                    attempts += tried
                    if adaptive.is_stuck(np.asarray(t), float(end), np.asarray(step), attempts):
                        raise stuck_error(plan, slowest)
                    progress.reach((plan.begin - slowest) / (plan.begin - plan.end))
            if plan.has_last_step:
                carry = self._last(self._segments[-1].is_guided, state, carry, y)
        progress.reach(1.0)
        self.counts = devices.gather(carry.evaluations).astype(np.int64)
        return carry.x
