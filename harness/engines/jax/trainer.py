"""The training step in jax: AdamW, EMA, micro-batches, a compute dtype. Everything random comes from `harness.randomness`.

Weights are float32 and stay on the devices, in buffers that each step gives to the next. Checkpoints hold them under
torch's names and in torch's shapes, so a snapshot is sampled, exported or read by either framework.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from backbones.flax_layers import initial_rngs, set_compute_dtype
from backbones.flax_weights import state_from_torch, state_to_torch
from harness.data.epoch_sampler import EpochSampler
from harness.data.examples import Examples
from harness.engines.jax import mesh as devices
from harness.engines.jax.compiling import jit
from harness.engines.jax.errors import one_line
from harness.engines.jax.loss_functions import LossFunction
from harness.errors import UserError
from harness.protocols import Recipe
from harness.randomness import Purpose
from harness.randomness import bits as words
from harness.randomness import threefry_jax as random
from harness.randomness.threefry_jax import Words
from harness.randomness.threefry_jax import words as as_words
from harness.runs import checkpoints
from harness.runs.run import Resolved
from harness.spec import BackboneSpec

EMA_RAMP_LAG = 10  # with ema_ramp the decay at step s is (1 + s) / (10 + s), as in TensorFlow's moving averages
COMPUTE_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
LESS_MEMORY = (
    "continue it in smaller micro-batches with --fork RUN --out NEW --micro-batch N, or --gradient-checkpointing"
)


def build(spec: BackboneSpec, arguments: dict[str, Any], seed: int) -> nnx.Module:
    """The network as it stands before step 1: its own initialisation, from jax's generator keyed by ours."""
    with one_line(f"the initialisation of {spec.name}", "choose a smaller backbone"):
        return spec.builder("jax")(**spec.arguments(**arguments), rngs=initial_rngs(seed))


class State(NamedTuple):
    """What training changes, all of it on the devices."""

    params: nnx.State
    rest: nnx.State  # what is not trained by gradients: positions, running statistics
    ema: nnx.State  # of params
    adam: optax.ScaleByAdamState


class JaxEngine:
    """Training state of one run. Implements `harness.pipeline.training_loop.Engine`."""

    def __init__(
        self,
        spec: BackboneSpec,
        net: nnx.Module,
        *,
        arguments: dict[str, Any],
        recipe: Recipe,
        seed: int,
        resolved: Resolved,
        data: Examples,
    ):
        self.recipe, self.seed, self.resolved = recipe, seed, resolved
        self._mesh = devices.apply_resolved(resolved)
        self._loss = LossFunction(spec, arguments, recipe=recipe, seed=seed)
        self.loss_terms = self._loss.loss_terms
        self._to_model_input, self._stream = data.to_model_input, EpochSampler(seed, data, recipe.flip)
        self._losses: list[Array] = []  # (terms,) each, on the devices

        set_compute_dtype(net, COMPUTE_DTYPES[resolved.precision])
        graph, params, rest = nnx.split(net, nnx.Param, ...)
        self._adam = optax.scale_by_adam(recipe.beta1, recipe.beta2)
        state = State(params, rest, params, jax.eval_shape(self._adam.init, params))
        self._layout = devices.layout(self._mesh, state)
        with one_line("the set-up of training", LESS_MEMORY):
            self._state = State(
                *(devices.place(part, where) for part, where in zip(state[:3], self._layout[:3], strict=True)),
                jax.jit(self._adam.init, out_shardings=self._layout.adam)(params),
            )
        del net, params, rest, state
        self._compile(graph)

    def _compile(self, graph: nnx.GraphDef) -> None:
        """The functions of a step; each is traced at its first call, once for a size of micro-batch."""
        task, recipe, seed = self._loss, self.recipe, self.seed
        optimizer = self._adam
        whole, platform = devices.everywhere(self._mesh), self._mesh.devices.flat[0].platform

        def gradients(params: nnx.State, rest: nnx.State, batch: Batch) -> tuple[nnx.State, nnx.State, Array]:
            """Gradients of one micro-batch, scaled by the global batch; the new `rest`; its share of the terms."""

            def loss(params: nnx.State) -> tuple[Array, tuple[Array, nnx.State]]:
                net = nnx.merge(graph, params, rest)
                call = partial(net, **_random(net, batch.key))
                x0 = self._to_model_input(
                    batch.stored, partial(random.normal, seed, Purpose.POSTERIOR, batch.positions, 0)
                )
                terms = task.losses(call, x0, batch.labels, batch.positions)  # (n,) each
                sums = jnp.stack([terms[name].sum() for name in task.terms]) / recipe.batch  # (terms,)
                weights = jnp.asarray(list(task.terms.values()), jnp.float32)
                return (sums * weights).sum(), (sums, nnx.state(net, nnx.Not(nnx.Param)))

            found, (sums, rest_after) = jax.grad(loss, has_aux=True)(params)
            return found, rest_after, sums

        def update(state: State, found: nnx.State, rest: nnx.State, rate: Array, share: Array) -> State:
            """AdamW (Loshchilov and Hutter 2019) with torch's order of terms, then the average."""
            if recipe.clip_norm:
                found, _ = optax.clip_by_global_norm(recipe.clip_norm).update(found, optax.EmptyState())
            moves, adam = optimizer.update(found, state.adam)
            params = jax.tree.map(lambda p, m: p - rate * (m + recipe.weight_decay * p), state.params, moves)
            ema = jax.tree.map(lambda average, p: average + share * (p - average), state.ema, params)
            return State(params, rest, ema, adam)

        def step(state: State, batch: Batch, rate: Array, share: Array) -> tuple[State, Array]:
            found, rest, sums = gradients(state.params, state.rest, batch)
            return update(state, found, rest, rate, share), sums

        def more(found: nnx.State, sums: Array, params: nnx.State, rest: nnx.State, batch: Batch):
            added, rest, more_sums = gradients(params, rest, batch)
            return jax.tree.map(jnp.add, found, added), rest, sums + more_sums

        layout = self._layout
        self._step = jit(step, platform, donate_argnums=0, out_shardings=(layout, whole))
        self._first = jit(gradients, platform, out_shardings=(layout.params, layout.rest, whole))
        self._more = jit(more, platform, donate_argnums=(0, 1), out_shardings=(layout.params, layout.rest, whole))
        self._update = jit(update, platform, donate_argnums=0, out_shardings=layout)
        self._finite = jax.jit(
            lambda tree: jnp.stack([jnp.isfinite(each).all() for each in jax.tree.leaves(tree)]).all()
        )

    def step(self, step: int, interrupted: Callable[[], bool]) -> bool:
        """Optimiser step `step` (from 1) on its global batch, in micro-batches. False: interrupted, nothing changed."""
        recipe = self.recipe
        rate = np.float32(recipe.learning_rate * min(1.0, step / recipe.warmup_steps if recipe.warmup_steps else 1.0))
        keep = min(recipe.ema_decay, (1 + step) / (EMA_RAMP_LAG + step)) if recipe.ema_ramp else recipe.ema_decay
        share = np.float32(1 - keep)  # of the new weights: in float32, 1 - 0.9999 would lose four digits
        positions = (step - 1) * recipe.batch + np.arange(recipe.batch)  # in the endless stream of images
        chunks = np.split(positions, range(self.resolved.micro_batch, recipe.batch, self.resolved.micro_batch))
        with one_line(f"training step {step}", LESS_MEMORY), exact(self.resolved.precision):
            if len(chunks) == 1:
                self._state, sums = self._step(self._state, self._batch(positions), rate, share)
            else:
                state, found, rest, sums = self._state, None, self._state.rest, None
                for chunk in chunks:
                    if interrupted():
                        return False
                    if found is None:
                        found, rest, sums = self._first(state.params, rest, self._batch(chunk))
                    else:
                        found, rest, sums = self._more(found, sums, state.params, rest, self._batch(chunk))
                    jax.block_until_ready(sums)  # so that Ctrl-C waits for one micro-batch, not for all of them
                self._state = self._update(state, found, rest, rate, share)
            if self._losses:  # one step is prepared while another computes, and no more: a step is soon interrupted
                self._losses[-1].block_until_ready()
        self._losses.append(sums)
        return True

    def _batch(self, positions: np.ndarray) -> Batch:
        """What is stored of the examples at `positions` of the stream, divided over the devices."""
        stored, labels = self._stream.take(positions)
        # A network's own dropout draws from jax's generator, keyed by the first image of the micro-batch.
        key = words(self.seed, Purpose.NETWORK_DROPOUT, positions[:1], 0, 2)[0]  # (2,) uint32
        sharding = devices.on_batch(self._mesh)
        values = Batch(stored, labels.astype(np.int32), as_words(positions), key)
        where = jax.tree.map(lambda _: sharding, values)._replace(key=devices.everywhere(self._mesh))
        return devices.place(values, where)

    def pop_losses(self) -> list[tuple[float, ...]]:
        losses, self._losses = self._losses, []
        with one_line("training", LESS_MEMORY):
            return [tuple(map(float, np.asarray(each))) for each in losses]

    def finite(self) -> bool:
        with one_line("training", LESS_MEMORY):  # what a step ends with may fail after it has returned
            return bool(self._finite(self._state.params))

    def state_dicts(self) -> list[tuple[str, Callable[[], dict[str, np.ndarray]]]]:
        state = self._state
        with one_line("the reading of a checkpoint's part from the devices", LESS_MEMORY):
            count = {"step": np.asarray([devices.gather(state.adam.count)], np.float32)}
        return [
            ("model", lambda: self._arrays(nnx.merge_state(state.params, state.rest))),
            ("ema", lambda: self._arrays(nnx.merge_state(state.ema, state.rest))),
            ("first_moment", lambda: {**self._arrays(state.adam.mu), **count}),
            ("second_moment", lambda: {**self._arrays(state.adam.nu), **count}),
        ]

    @staticmethod
    def _arrays(state: nnx.State) -> dict[str, np.ndarray]:
        with one_line("the reading of a checkpoint's part from the devices", LESS_MEMORY):
            return state_to_torch(_saved(state), devices.gather)

    def load(self, part: str, path: Path) -> None:
        weights = dict(checkpoints.tensors(path))
        state = self._state
        try:
            if part == "model":
                both = state_from_torch(_saved(nnx.merge_state(state.params, state.rest)), weights)
                params, rest = nnx.split_state(both, nnx.Param, ...)
                rest = nnx.merge_state(state.rest, rest)  # keys of generators are in no file
                self._state = state._replace(
                    params=devices.place(params, self._layout.params), rest=devices.place(rest, self._layout.rest)
                )
            elif part == "ema":
                both = state_from_torch(_saved(nnx.merge_state(state.ema, state.rest)), weights)
                params, _ = nnx.split_state(both, nnx.Param, ...)  # what is not averaged comes with "model"
                self._state = state._replace(ema=devices.place(params, self._layout.ema))
            else:
                name = {"first_moment": "mu", "second_moment": "nu"}[part]
                count = np.asarray(weights.pop("step")[0], np.int32)
                moment = state_from_torch(getattr(state.adam, name), weights)
                placed = devices.place(moment, getattr(self._layout.adam, name))
                adam = state.adam._replace(count=devices.place(count, self._layout.adam.count), **{name: placed})
                self._state = state._replace(adam=adam)
        except (UserError, KeyError) as error:
            raise UserError(f"{path} does not fit this network: {error}") from error


class Batch(NamedTuple):
    """One micro-batch as it goes to the devices."""

    stored: Array  # (n, ...), as `Examples.gather` has it
    labels: Array  # int32 (n,)
    positions: Words  # (n,), in the stream
    key: Array  # uint32 (2,), of the network's dropout


def exact(precision: str) -> Any:
    """The context in which float32 means float32: TPUs and GPUs multiply in less by default."""
    return jax.default_matmul_precision("highest") if precision == "float32" else nullcontext()


def _random(net: nnx.Module, key: Array) -> dict[str, Any]:
    """The generator of dropout, for networks that take one."""
    if "rngs" not in inspect.signature(type(net).__call__).parameters:
        return {}
    return {"rngs": nnx.Rngs(dropout=jax.random.wrap_key_data(key, impl="threefry2x32"))}


def _saved(state: nnx.State) -> nnx.State:
    """What of a state goes to a file: all but generators."""
    return nnx.filter_state(state, nnx.Not(nnx.RngState))
