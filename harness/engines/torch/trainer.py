"""The training step in torch: AdamW, EMA, micro-batches, autocast. Everything random comes from `harness.randomness`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.data.epoch_sampler import EpochSampler
from harness.data.examples import Examples
from harness.data.read_ahead import ReadAhead
from harness.diffusion.auxiliary import read_auxiliary
from harness.distributed.mesh import MeshShape
from harness.engines import ema
from harness.engines.interfaces import Parts
from harness.engines.learning_rate import learning_rate
from harness.engines.torch import parallel, process_group
from harness.engines.torch.auxiliary import AuxiliaryHeads
from harness.engines.torch.compiling import compile_network
from harness.engines.torch.host_copies import host_copies, peak_bytes, whole_arrays
from harness.engines.torch.loss_functions import Draws, LossFunction
from harness.engines.torch.parallel import local_shard, shard_slice
from harness.engines.torch.resolve import apply_resolved, autocast, set_arithmetic
from harness.errors import UserError
from harness.frameworks.torch_transfer import HostCopy, Packed, queues_copies
from harness.protocols import Recipe
from harness.randomness import Purpose, bits
from harness.runs import checkpoints
from harness.runs.run import Resolved
from harness.spec import BackboneSpec

# Parts of a checkpoint of a run with an auxiliary loss -> key of AdamW's state; "" for the weights.
HEAD_PARTS = {"heads": "", "heads_first_moment": "exp_avg", "heads_second_moment": "exp_avg_sq"}


def build(spec: BackboneSpec, arguments: dict[str, Any], seed: int) -> torch.nn.Module:
    """The network before step 1, initialised by its own rule from torch's generator.

    The seed of that generator is drawn from `harness.randomness` with `seed`. Its state is restored afterwards.
    """
    high, low = (int(word) for word in bits(seed, Purpose.INITIALISATION, np.zeros(1, np.int64), 0, 2)[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(high << 31 | low >> 1)  # the upper 63 of 64 random bits
        return spec.build("torch", **arguments)


class HostBatch(NamedTuple):
    """A micro-batch on the host, with everything that its step draws."""

    packed: (
        Packed  # what is stored of the examples (n, ...), the images of latents if need be, and the tensors of `draws`
    )
    draws: Draws


class TorchEngine:
    """The training state of one run. Implements `harness.engines.interfaces.Engine`."""

    def __init__(
        self,
        spec: BackboneSpec,
        net: torch.nn.Module,
        *,
        arguments: dict[str, Any],
        recipe: Recipe,
        seed: int,
        resolved: Resolved,
        data: Examples,
        images: Examples | None = None,  # that the latents in `data` were made of, for an encoder; None: data
    ):
        self.recipe, self.seed, self.resolved = recipe, seed, resolved
        self.device = apply_resolved(resolved)
        set_arithmetic(self.device, resolved.precision)
        mesh = MeshShape.parse(resolved.mesh)
        self.net = parallel.shard(net, mesh, self.device).to(self.device).train()
        if resolved.compile == "on":
            compile_network(self.net)
        self._parallel = parallel.DataParallelModel(self.net, mesh)
        self._needs_warmup = self._parallel.needs_warmup
        self._queues_copies = queues_copies(self.device)
        trained = {name: weight for name, weight in self.net.named_parameters() if weight.requires_grad}
        self._names, self._weights = list(trained), list(trained.values())
        # By part of a checkpoint; each in the order of _weights.
        self._averages = {part: [weight.detach().clone() for weight in self._weights] for part in ema.parts(recipe)}
        self._auxiliary: AuxiliaryHeads | None = None
        # Of latents: their images, which come in the same order and mirrored alike, because seed and position decide that.
        self._images = None if images is None or images is data else images
        self._image_stream = None if self._images is None else EpochSampler(seed, self._images, recipe.flip)
        self._heads: dict[str, torch.nn.Parameter] = {}  # trained, without EMA, and the same in every process
        if recipe.auxiliary:
            if mesh.model > 1 or resolved.compile == "on":
                what = f"--mesh {mesh}" if mesh.model > 1 else "--compile on"
                raise UserError(f"an auxiliary loss taps into the network, which {what} does not allow; leave it out")
            shape = (arguments["in_channels"], arguments["input_size"])
            if self._images is not None:
                one = self._images.gather(np.zeros(1, np.int64), np.zeros(1, bool))  # (1, H, W, C)
                shape = (one.shape[3], one.shape[1])
            self._auxiliary = AuxiliaryHeads(
                read_auxiliary(recipe.auxiliary), spec, arguments, shape, seed=seed, device=self.device
            )
            self._heads = {
                name: weight for name, weight in self._auxiliary.heads.named_parameters() if weight.requires_grad
            }
        groups: list[Any] = [self._weights] if not self._heads else [self._weights, list(self._heads.values())]
        self._optimizer = torch.optim.AdamW(
            [{"params": group} for group in groups],
            lr=recipe.learning_rate,
            betas=(recipe.beta1, recipe.beta2),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self._loss = LossFunction(spec, arguments, recipe=recipe, seed=seed, device=self.device)
        self.loss_terms = dict(self._loss.loss_terms)
        if self._auxiliary is not None:
            self.loss_terms[self._auxiliary.wanted.name] = self._auxiliary.weight
        self._losses: list[HostCopy] = []  # (terms,) each, of the steps since the last pop_losses
        self._to_model_input, self._stream = data.to_model_input, EpochSampler(seed, data, recipe.flip)
        self._step_bytes: int | None = None  # `peak_bytes` before the first copies of the state
        # On a CPU a thread would take its time from the step's own.
        self._ahead = ReadAhead(self._host_batch) if self._queues_copies else None

    @process_group.translate_dist_errors()
    def step(self, step: int, interrupted: Callable[[], bool]) -> bool:
        """Do optimiser step `step` (from 1) on its global batch, in micro-batches. False: interrupted, nothing changed."""
        recipe = self.recipe
        # This process's share of the loss terms; `pop_losses` sums over processes.
        terms_total = torch.zeros(len(self.loss_terms), dtype=torch.float64, device=self.device)
        buffers = [buffer.clone() for buffer in self.net.buffers()]
        chunks, (following, *_) = self._micro_batches(step), self._micro_batches(step + 1)
        if self._needs_warmup:  # at the first step in this process, see `DataParallelModel.needs_warmup`
            self._accumulate(chunks[0], chunks[0])
            self._check_gradients()  # here, too: DDP may fail at its next pass if a weight got no gradient
            self._undo_passes(buffers)
            self._needs_warmup = False
        for chunk, next_chunk in zip(chunks, [*chunks[1:], following], strict=True):
            if interrupted():
                self._undo_passes(buffers)
                return False
            with self._parallel.micro_batch_context(last=chunk is chunks[-1]):
                terms_total += self._accumulate(chunk, next_chunk)
        self._check_gradients()
        for head in self._heads.values():  # means over the processes, as DDP gives for the network
            assert head.grad is not None
            self._parallel.sum(head.grad).div_(self._parallel.size)
        self._parallel.broadcast_buffers()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        if recipe.clip_norm:
            self._parallel.clip([*self._weights, *self._heads.values()], recipe.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        weights = list(map(local_shard, self._weights))
        with torch.no_grad():
            for part, share in ema.update_weights(recipe, step).items():
                torch._foreach_lerp_(list(map(local_shard, self._averages[part])), weights, share)
        # Where copies are queued, the sum over processes is, too: one that is made later would wait for later steps.
        self._losses.append(HostCopy(self._parallel.sum(terms_total) if self._queues_copies else terms_total))
        return True

    def _micro_batches(self, step: int) -> list[range]:
        """This process's part of the global batch of a step (from 1), in micro-batches: positions in the stream of examples."""
        begin = (step - 1) * self.recipe.batch
        local = self._parallel.local_part(range(begin, begin + self.recipe.batch))
        size = self.resolved.micro_batch
        return [local[start : start + size] for start in range(0, len(local), size)]

    def _undo_passes(self, buffers: list[Tensor]) -> None:
        """Undo forward and backward passes: drop all gradients, and set the network's buffers to `buffers`.

        buffers: copies from before the passes, in the order of `net.buffers()`.
        """
        self._optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.net.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _check_gradients(self) -> None:
        """Raise UserError if a weight has no gradient, because AdamW would silently leave it as it is."""
        if idle := [name for name, weight in zip(self._names, self._weights, strict=True) if weight.grad is None]:
            raise UserError(
                f"parameter {idle[0]} of the network gets no gradient; use it in forward, or set its requires_grad to False"
            )
        if idle := [name for name, weight in self._heads.items() if weight.grad is None]:
            raise UserError(f"parameter {idle[0]} of the auxiliary loss's heads gets no gradient; use it in forward")

    def _accumulate(self, positions: range, following: range | None = None) -> Tensor:
        """Add the gradients of one micro-batch to those of the weights. Returns its loss terms, float64 (terms,).

        Both are sums over its images divided by the global batch, so that those of all micro-batches, in all processes,
        add up to the means of the batch. positions: of its n images in the stream of examples. following: those of the
        micro-batch after it, which is read meanwhile on a GPU; None: it is not known.
        """
        x0, images, draws = self._batch(positions, following)  # (n, C, H, W); images of latents are larger
        # A network's own dropout uses torch's generator, which the first image of the micro-batch seeds.
        word = bits(self.seed, Purpose.NETWORK_DROPOUT, np.array(positions[:1]), 0, 1)[0, 0]
        torch.manual_seed(int(word))

        def call(*inputs: Tensor) -> Tensor:  # the network with autocast, which `LossFunction.losses` leaves to it
            with autocast(self.device, self.resolved.precision):
                return self._parallel.call(*inputs)

        with nullcontext() if self._auxiliary is None else self._auxiliary.tapping(self.net):
            terms = self._loss.losses(call, x0, draws)  # (n,) each
        if self._auxiliary is not None:
            terms[self._auxiliary.wanted.name] = self._auxiliary.loss(images)
        # A term of weight 0, such as the accuracy, is only logged and may have no gradient.
        loss = reduce(torch.add, [weight * terms[name].sum() for name, weight in self.loss_terms.items() if weight])
        # Times size, because DDP and FSDP2 replace gradients by their mean over the processes.
        (loss / self.recipe.batch * self._parallel.size).backward()
        return torch.stack([terms[name].detach().sum() for name in self.loss_terms]).double() / self.recipe.batch

    def _batch(self, positions: range, following: range | None = None) -> tuple[Tensor, Tensor, Draws]:
        """(x0 float32 (n, C, H, W), the images for an encoder, the labels and random numbers that go with it), on the device.

        x0 is in [-1, 1] for pixels, and then the images, too. Arguments as of `_accumulate`.
        """
        if self._ahead is None:
            packed, draws = self._host_batch(positions)
        else:
            packed, draws = self._ahead.take(positions, following)
        stored, *tensors = packed.to_device()
        pixels = None if self._images is None else self._images.to_model_input(tensors.pop(0), lambda shape: None)
        draws = draws.with_tensors(*tensors)
        x0 = self._to_model_input(
            stored, partial(draws.normal, Purpose.POSTERIOR)
        )  # latents: a sample of the posterior
        x0 = x0.contiguous()
        return x0, x0 if pixels is None else pixels.contiguous(), draws

    def _host_batch(self, positions: range) -> HostBatch:
        """The examples at `positions` in the stream. For `ReadAhead`, in another thread: it uses no device and no other state."""
        rows = np.array(positions)
        stored, labels = self._stream.take(rows)
        draws = self._loss.draws(torch.from_numpy(labels), torch.from_numpy(rows))
        images = [] if self._image_stream is None else [torch.from_numpy(self._image_stream.take(rows)[0])]
        return HostBatch(Packed([torch.from_numpy(stored), *images, *draws.tensors()], self.device), draws)

    @process_group.translate_dist_errors()
    def pop_losses(self, wait: bool = True) -> list[tuple[float, ...]]:
        # The newest step may not be finished on the device, and those before it are, or will be while it is computed.
        count = len(self._losses) - (self._queues_copies and not wait)
        if count <= 0:
            return []
        losses, self._losses = self._losses[:count], self._losses[count:]
        values = torch.stack([each.wait() for each in losses])
        rows = (values if self._queues_copies else self._parallel.sum(values)).tolist()
        return [tuple(row) for row in rows]

    @process_group.translate_dist_errors()
    def finite(self) -> bool:
        # A norm is finite only if all elements are. Of sharded weights each process checks its own part.
        norms = torch.stack(torch._foreach_norm(list(map(local_shard, [*self._weights, *self._heads.values()]))))
        return self._parallel.all(torch.isfinite(norms).all())

    def state_dicts(self, *, copy: bool = False) -> Parts:
        parts: list[tuple[str, Callable[[], dict[str, Tensor]]]] = [
            ("model", self.net.state_dict),
            ("ema", self._ema_state_dict),
            ("first_moment", lambda: self._moments("exp_avg")),
            ("second_moment", lambda: self._moments("exp_avg_sq")),
            *((part, partial(self._average, part)) for part in self._averages if part != "ema"),
            *((part, partial(self._head_tensors, part)) for part in (HEAD_PARTS if self._heads else ())),
        ]
        if copy:
            if self._step_bytes is None:
                self._step_bytes = peak_bytes(self.device)
            return host_copies(parts, self.device, self._step_bytes)
        return [(part, partial(whole_arrays, tensors)) for part, tensors in parts]

    def _ema_state_dict(self) -> dict[str, Tensor]:
        """The network's state dict with the average in place of each weight. A shared weight is under all its names."""
        return self.net.state_dict() | self._average("ema")

    def _average(self, part: str) -> dict[str, Tensor]:
        """An average by names of weights, without what is not averaged. A shared weight is under all its names."""
        averages = dict(zip(map(id, self._weights), self._averages[part], strict=True))  # id of a weight -> its average
        state = self.net.state_dict(keep_vars=True)  # the weights themselves, so that their ids can be looked up
        return {name: averages[id(value)] for name, value in state.items() if id(value) in averages}

    def _head_tensors(self, part: str) -> dict[str, Tensor]:
        """The heads of the auxiliary loss, or a moment of AdamW of theirs; the buffers of the heads are in the first part."""
        assert self._auxiliary is not None
        if part == "heads":
            return self._auxiliary.heads.state_dict()
        key = HEAD_PARTS[part]
        states = [self._optimizer.state[weight] for weight in self._heads.values()]
        moments = {name: state[key] for name, state in zip(self._heads, states, strict=True)}
        return {**moments, "step": states[0]["step"].reshape(1)}

    def _moments(self, key: str) -> dict[str, Tensor]:
        """A moment of AdamW by names of weights, and the number of updates, float32 (1,), as "step".

        key: "exp_avg" or "exp_avg_sq".
        """
        states = [self._optimizer.state[weight] for weight in self._weights]  # all with the same "step"
        moments = {name: state[key] for name, state in zip(self._names, states, strict=True)}
        return {**moments, "step": states[0]["step"].reshape(1)}

    @torch.no_grad()
    def load(self, part: str, path: Path) -> None:
        targets = self._load_targets(part)
        is_moment = part.endswith("moment")
        step = None  # AdamW's number of updates, which both moments hold
        seen = set()

        def local_slice(name: str, shape: tuple[int, ...]) -> tuple[slice, ...] | None:
            """The slice of a tensor in the file that this process holds; None for "step", which is read whole.

            UserError for a tensor of another shape: its slice could have the shape of the local shard by chance.
            """
            if name == "step" and is_moment:
                return None
            if name not in targets or tuple(targets[name].shape) != shape:
                raise UserError(f"{path} does not fit this network: {name} {shape} is not in it")
            return shard_slice(targets[name])

        for name, array in checkpoints.tensors(path, local_slice):
            value = torch.from_numpy(array)
            if name == "step" and is_moment:
                step = value.reshape(())
                continue
            seen.add(name)
            local_shard(targets[name]).copy_(value)
        missing = sorted(set(targets) - seen)
        if is_moment and step is None:
            missing.append("step")
        if missing:
            raise UserError(f"{path} does not fit this network: {missing[0]} is missing")
        if step is not None:
            for weight in self._heads.values() if part in HEAD_PARTS else self._weights:
                self._optimizer.state[weight]["step"] = step.clone().to(self.device)

    def _load_targets(self, part: str) -> dict[str, Tensor]:
        """The tensors that `load` fills with a part of a checkpoint, by name.

        part: as in `state_dicts`. A moment of AdamW that the optimizer does not have yet, because no step was done, is
        created in it as zeros.
        """
        if part == "model":
            return self.net.state_dict()
        if part == "ema":
            # The part also holds tensors that are not averaged, such as buffers. They are read into new tensors, which
            # nothing uses: the network's own are loaded with "model".
            averages = set(map(id, self._averages["ema"]))
            state = self._ema_state_dict()
            return {name: value if id(value) in averages else torch.empty_like(value) for name, value in state.items()}
        if part in self._averages:
            return self._average(part)
        if part == "heads":
            assert self._auxiliary is not None
            return self._auxiliary.heads.state_dict()
        if part in HEAD_PARTS:
            for weight in self._heads.values():
                self._optimizer.state[weight].setdefault(HEAD_PARTS[part], torch.zeros_like(weight))
            return {name: self._optimizer.state[weight][HEAD_PARTS[part]] for name, weight in self._heads.items()}
        key = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}[part]
        for weight in self._weights:
            self._optimizer.state[weight].setdefault(key, torch.zeros_like(weight))
        return {
            name: self._optimizer.state[weight][key] for name, weight in zip(self._names, self._weights, strict=True)
        }
