"""The training step in jax: AdamW, EMA, micro-batches, a compute dtype. Everything random comes from `harness.randomness`.

Weights are float32 and stay on the devices, in buffers that each step donates to the next. Checkpoints hold them under
torch's names and in torch's shapes, so that either framework can sample from them, export them and load them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from backbones.flax_layers import dropout_rngs, initial_rngs, set_compute_dtype
from backbones.flax_weights import state_from_torch, state_to_torch
from harness.data.epoch_sampler import EpochSampler
from harness.data.examples import Examples
from harness.engines import ema
from harness.engines.interfaces import Parts
from harness.engines.jax import mesh as devices
from harness.engines.jax.compiling import jit
from harness.engines.jax.errors import errors_in_one_line
from harness.engines.jax.loss_functions import LossFunction
from harness.engines.learning_rate import learning_rate
from harness.errors import UserError
from harness.protocols import Recipe
from harness.randomness import Purpose, bits
from harness.randomness import threefry_jax as random
from harness.randomness.threefry_jax import Words, words
from harness.runs import checkpoints
from harness.runs.run import Resolved
from harness.spec import BackboneSpec

COMPUTE_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}  # by precision; None: the dtype of the weights, float32
LESS_MEMORY = (
    "continue it in smaller micro-batches with --fork RUN --out NEW --micro-batch N, or --gradient-checkpointing"
)


def build(spec: BackboneSpec, arguments: dict[str, Any], seed: int) -> nnx.Module:
    """The network before step 1, initialised by its own rule from jax's generator.

    The key of that generator is drawn from `harness.randomness` with `seed`.
    """
    with errors_in_one_line(f"the initialisation of {spec.name}", "choose a smaller backbone"):
        return spec.call_builder(spec.builder("jax"), **spec.arguments(**arguments), rngs=initial_rngs(seed))


def split(net: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """A network as (graph definition, its nnx.Params, the rest of its state, such as running statistics and RNG keys)."""
    graph, params, *others = nnx.split(net, nnx.Param, ...)  # in two lines for the type checker
    (rest,) = others
    return graph, params, rest


class State(NamedTuple):
    """Everything that a training step changes. All of it is on the devices."""

    params: nnx.State
    rest: nnx.State  # all but nnx.Params: position tables, running statistics, RNG keys
    averages: dict[str, nnx.State]  # of params, by part of a checkpoint: "ema", ...
    adam: optax.ScaleByAdamState


class JaxEngine:
    """The training state of one run. Implements `harness.engines.interfaces.Engine`."""

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
        self._losses: list[Array] = []  # (terms,) each, of the steps since the last pop_losses

        set_compute_dtype(net, COMPUTE_DTYPES[resolved.precision])
        graph, params, rest = split(net)
        self._adam = optax.scale_by_adam(recipe.beta1, recipe.beta2)
        parts = ema.parts(recipe)
        shapes = State(
            params, rest, averages=dict.fromkeys(parts, params), adam=jax.eval_shape(self._adam.init, params)
        )
        self._shardings = devices.weight_shardings(self._mesh, shapes)  # a sharding in place of each array
        with errors_in_one_line("the set-up of training", LESS_MEMORY):
            self._state = State(
                params=devices.to_device(params, self._shardings.params),
                rest=devices.to_device(rest, self._shardings.rest),
                averages={part: devices.to_device(params, self._shardings.averages[part]) for part in parts},
                # jit makes the moments in shards: no device holds them whole.
                adam=jax.jit(self._adam.init, out_shardings=self._shardings.adam)(params),
            )
        self._compile(graph)

    def _compile(self, graph: nnx.GraphDef) -> None:
        """Make the jitted functions of a step, which compile at their first call with each size of micro-batch.

        `_step` is a whole step of one micro-batch. Otherwise a step is `_first_gradients`, `_more_gradients` for every
        further micro-batch, and `_update`. `_finite` says whether all arrays of a tree are finite.
        """
        loss_function, recipe, seed = self._loss, self.recipe, self.seed
        optimizer = self._adam
        replicated, platform = devices.replicated(self._mesh), self._mesh.devices.flat[0].platform

        def gradients(params: nnx.State, rest: nnx.State, batch: Batch) -> tuple[nnx.State, nnx.State, Array]:
            """(gradients, `rest` after the pass, loss terms (terms,)) of one micro-batch.

            Gradients and loss terms are sums over its images divided by the global batch, so that those of all
            micro-batches add up to the means of the batch.
            """

            def loss(params: nnx.State) -> tuple[Array, tuple[Array, nnx.State]]:
                net = nnx.merge(graph, params, rest)
                call = partial(net, **dropout_rngs(net, batch.key))
                x0 = self._to_model_input(
                    batch.stored, partial(random.normal, seed, Purpose.POSTERIOR, batch.positions, 0)
                )
                terms = loss_function.losses(call, x0, batch.labels, batch.positions)  # (n,) each
                sums = jnp.stack([terms[name].sum() for name in loss_function.loss_terms]) / recipe.batch  # (terms,)
                weights = jnp.asarray(list(loss_function.loss_terms.values()), jnp.float32)
                return (sums * weights).sum(), (sums, nnx.state(net, nnx.Not(nnx.Param)))

            grads, (sums, rest_after) = jax.grad(loss, has_aux=True)(params)
            return grads, rest_after, sums

        def update(state: State, grads: nnx.State, rest: nnx.State, lr: Array, shares: dict[str, Array]) -> State:
            """The state after an update by AdamW (Loshchilov and Hutter 2019) and one of the averages.

            shares: of the new weights in each average, by its part; for the EMA 1 - decay.
            """
            if recipe.clip_norm:
                grads, _ = optax.clip_by_global_norm(recipe.clip_norm).update(grads, optax.EmptyState())
            updates, adam = optimizer.update(grads, state.adam)
            params = jax.tree.map(
                lambda p, adam_update: p - lr * (adam_update + recipe.weight_decay * p), state.params, updates
            )
            averages = {
                part: jax.tree.map(partial(_towards, shares[part]), average, params)
                for part, average in state.averages.items()
            }
            return State(params, rest, averages, adam)

        def step(state: State, batch: Batch, lr: Array, shares: dict[str, Array]) -> tuple[State, Array]:
            grads, rest, sums = gradients(state.params, state.rest, batch)
            return update(state, grads, rest, lr, shares), sums

        def more_gradients(
            grads: nnx.State, sums: Array, params: nnx.State, rest: nnx.State, batch: Batch
        ) -> tuple[nnx.State, nnx.State, Array]:
            """`gradients` of another micro-batch, with `grads` and `sums` of the earlier ones added."""
            added, rest, more_sums = gradients(params, rest, batch)
            return jax.tree.map(jnp.add, grads, added), rest, sums + more_sums

        shardings = self._shardings
        gradient_shardings = (shardings.params, shardings.rest, replicated)  # of what `gradients` returns
        self._step = jit(step, platform, donate_argnums=0, out_shardings=(shardings, replicated))
        self._first_gradients = jit(gradients, platform, out_shardings=gradient_shardings)
        self._more_gradients = jit(more_gradients, platform, donate_argnums=(0, 1), out_shardings=gradient_shardings)
        self._update = jit(update, platform, donate_argnums=0, out_shardings=shardings)
        self._finite = jax.jit(
            lambda tree: jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
        )

    def step(self, step: int, interrupted: Callable[[], bool]) -> bool:
        """Do optimiser step `step` (from 1) on its global batch, in micro-batches. False: interrupted, nothing changed."""
        recipe = self.recipe
        lr = np.float32(learning_rate(recipe, step))
        # Rounded to float32 only here: 1 - 0.9999 in float32 would lose four digits.
        shares = {part: np.float32(share) for part, share in ema.update_weights(recipe, step).items()}
        positions = (step - 1) * recipe.batch + np.arange(recipe.batch)  # in the stream of examples
        chunks = np.split(positions, range(self.resolved.micro_batch, recipe.batch, self.resolved.micro_batch))
        with errors_in_one_line(f"training step {step}", LESS_MEMORY), matmul_context(self.resolved.precision):
            if len(chunks) == 1:
                self._state, sums = self._step(self._state, self._batch(positions), lr, shares)
            else:
                state = self._state  # stays as it is until the update, so that an interruption changes nothing
                rest, grads, sums = state.rest, None, None
                for chunk in chunks:
                    if interrupted():
                        return False
                    if grads is None:
                        grads, rest, sums = self._first_gradients(state.params, rest, self._batch(chunk))
                    else:
                        grads, rest, sums = self._more_gradients(grads, sums, state.params, rest, self._batch(chunk))
                    jax.block_until_ready(sums)  # so that Ctrl-C waits for a single micro-batch
                self._state = self._update(state, grads, rest, lr, shares)
            if self._losses:  # at most one step is prepared while another computes, so that Ctrl-C acts soon
                self._losses[-1].block_until_ready()
        self._losses.append(sums)
        return True

    def _batch(self, positions: np.ndarray) -> Batch:
        """The examples at `positions`, int64 (n,), of the stream, as they are stored, divided over the devices."""
        stored, labels = self._stream.take(positions)
        # A network's own dropout uses jax's generator, which the first image of the micro-batch keys.
        key = bits(self.seed, Purpose.NETWORK_DROPOUT, positions[:1], 0, 2)[0]  # (2,) uint32
        put = partial(devices.to_device, shardings=devices.batch_sharding(self._mesh))
        return Batch(
            stored=put(stored),
            labels=put(labels.astype(np.int32)),
            positions=Words(*map(put, words(positions))),
            key=devices.to_device(key, devices.replicated(self._mesh)),
        )

    def pop_losses(self, wait: bool = True) -> list[tuple[float, ...]]:
        losses, self._losses = self._losses, []
        with errors_in_one_line("training", LESS_MEMORY):
            return [tuple(map(float, np.asarray(terms))) for terms in losses]

    def finite(self) -> bool:
        with errors_in_one_line("training", LESS_MEMORY):  # the devices may fail after a step has returned
            return bool(self._finite(self._state.params))

    def state_dicts(self, *, copy: bool = False) -> Parts:
        state = self._state
        with errors_in_one_line("reading the weights from the devices", LESS_MEMORY):
            # AdamW's number of updates, in both moments under the name that torch's engine gives it.
            count = {"step": np.asarray([devices.gather(state.adam.count)], np.float32)}
        parts: Parts = [
            ("model", lambda: self._arrays(nnx.merge_state(state.params, state.rest))),
            ("ema", lambda: self._arrays(nnx.merge_state(state.averages["ema"], state.rest))),
            ("first_moment", lambda: {**self._arrays(state.adam.mu), **count}),
            ("second_moment", lambda: {**self._arrays(state.adam.nu), **count}),
            *((part, partial(self._arrays, average)) for part, average in state.averages.items() if part != "ema"),
        ]
        if copy:
            # Some arrays share the memory of a device, which the next step writes to.
            copies = [
                (part, {name: array if array.flags.owndata else array.copy() for name, array in arrays().items()})
                for part, arrays in parts
            ]
            return [(part, partial(dict, arrays)) for part, arrays in copies]
        return parts

    @staticmethod
    def _arrays(state: nnx.State) -> dict[str, np.ndarray]:
        """Whole arrays on the host, by torch's names and in torch's shapes, in every process. All must call this."""
        with errors_in_one_line("reading the weights from the devices", LESS_MEMORY):
            return state_to_torch(without_rngs(state), devices.gather)

    def load(self, part: str, path: Path) -> None:
        weights = dict(checkpoints.tensors(path))
        state = self._state
        try:
            if part == "model":
                merged = state_from_torch(without_rngs(nnx.merge_state(state.params, state.rest)), weights)
                params, rest = nnx.split_state(merged, nnx.Param, ...)
                rest = nnx.merge_state(state.rest, rest)  # the keys of generators are not in the file
                self._state = state._replace(
                    params=devices.to_device(params, self._shardings.params),
                    rest=devices.to_device(rest, self._shardings.rest),
                )
            elif part == "ema":
                merged = state_from_torch(without_rngs(nnx.merge_state(state.averages["ema"], state.rest)), weights)
                params, _ = nnx.split_state(merged, nnx.Param, ...)  # the rest is loaded with "model"
                self._replace_average(part, params)
            elif part in state.averages:
                self._replace_average(part, state_from_torch(state.averages[part], weights))
            else:
                name = {"first_moment": "mu", "second_moment": "nu"}[part]
                count = np.asarray(weights.pop("step")[0], np.int32)
                moment = state_from_torch(getattr(state.adam, name), weights)
                shardings = self._shardings.adam
                moment = devices.to_device(moment, getattr(shardings, name))
                adam = state.adam._replace(count=devices.to_device(count, shardings.count), **{name: moment})
                self._state = state._replace(adam=adam)
        except (UserError, KeyError) as error:
            raise UserError(f"{path} does not fit this network: {error}") from error

    def _replace_average(self, part: str, average: nnx.State) -> None:
        average = devices.to_device(average, self._shardings.averages[part])
        self._state = self._state._replace(averages={**self._state.averages, part: average})


def _towards(share: Array, average: Array, weight: Array) -> Array:
    return average + share * (weight - average)


class Batch(NamedTuple):
    """One micro-batch on the devices."""

    stored: Array  # (n, ...): images or latents as the data set stores them, from `Examples.gather`
    labels: Array  # int32 (n,)
    positions: Words  # (n,), in the stream
    key: Array  # uint32 (2,): key of the generator for the network's dropout


def matmul_context(precision: str) -> AbstractContextManager[object]:
    """Context for calls of a network in `precision`: how matrix products of float32 arrays are computed.

    "float32": in full float32, because TPUs and GPUs use fewer bits by default. "bfloat16": by that default; the operands of
    most products are bfloat16 then, see COMPUTE_DTYPES.
    """
    return jax.default_matmul_precision("highest") if precision == "float32" else nullcontext()


def without_rngs(state: nnx.State) -> nnx.State:
    """The state without its generators, which checkpoints do not hold."""
    return nnx.filter_state(state, nnx.Not(nnx.RngState))
