"""What a framework provides to the pipeline, as types: `Backend`, and the `Engine` and `Sampler` that it makes.

Two modules implement `Backend`: `harness.engines.torch.backend` and `harness.engines.jax.backend`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np

    from harness.autoencoders.decoder import Decoder
    from harness.data.examples import Examples
    from harness.diffusion.sampler_plan import AnyPlan
    from harness.engines.memory import Measured
    from harness.planning.request import Request
    from harness.runs.run import Run
    from harness.systems.binding import LoadedSystem

Network: TypeAlias = Any  # a torch.nn.Module or a flax.nnx.Module, which only the backend that made it uses


# of a checkpoint: (part name, function that returns its tensors by name)
Parts: TypeAlias = "list[tuple[str, Callable[[], Mapping[str, np.ndarray]]]]"


class DeviceInfo(NamedTuple):
    """The device, or the devices of this process, that samples are drawn on."""

    target: Any  # the framework's own object: a torch.device, or a jax.sharding.Mesh
    platform: str  # as --device takes it: "cpu", "cuda:1"
    name: str  # for people: the model of processor or accelerator; with the number of threads on a CPU


class Engine(Protocol):
    """The training state of one run, and the arithmetic of a step."""

    @property
    def loss_terms(self) -> Mapping[str, float]:
        """The terms that are logged, in their order, with their weights in the loss: {"mse": 1, "vb": 1}."""

    def step(self, step: int, interrupted: Callable[[], bool]) -> bool:
        """Do optimiser step `step` (from 1), and return True.

        `interrupted` may be called before each micro-batch. If it returns True, the step is given up: nothing has changed,
        and the result is False.
        """

    def pop_losses(self, wait: bool = True) -> list[tuple[float, ...]]:
        """The values of the loss terms since the last call: a tuple for each step, in the order of `loss_terms`.

        wait: for all of them. If not, the newest step may be left for the next call, so that the device need not run idle.
        """

    def finite(self) -> bool:
        """Whether every weight is finite."""

    def state_dicts(self, *, copy: bool = False) -> Parts:
        """The parts of a checkpoint, one of which is "ema".

        Every process must call the functions, because they gather sharded tensors. The result counts in the main process
        alone; in the others it may be empty.

        copy: of the state as it is now, on the host: the functions may then be called in another thread while later steps
        change the state, and they gather nothing. Without it, they must be called before the next step.
        """

    def load(self, part: str, path: Path) -> None:
        """Restore a part, named as in `state_dicts`, from a safetensors file. Raises UserError if it does not fit."""


class Sampler(Protocol):
    """Draws images of one network, or of the chain of networks of a system."""

    @property
    def evaluations(self) -> int | None:
        """Network evaluations for an image, those that guidance adds included, except a classifier's.

        None: each image has its own number, which is in `counts` once it is drawn.
        """

    @property
    def counts(self) -> np.ndarray:
        """The network evaluations int64 (N,) of each image of the last `draw`, if `evaluations` is None."""

    def draw(self, index: np.ndarray, labels: np.ndarray, advance: Callable[[], None]) -> np.ndarray:
        """Images uint8 (N, H, W, C) of the sample indices int64 (N,) with labels int64 (N,).

        `advance` is called after each sampler step.
        """

    def trajectory(
        self,
        index: np.ndarray,
        labels: np.ndarray,
        rows: Sequence[int],
        count: int,
        advance: Callable[[], None],
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """(what `draw` returns, the images that the first `count` of them were predicted to be at the plan's `rows`).

        rows: ascending, counted from 0 through the plans of all networks, one after the other. Images uint8
        (count, h, w, C), one array for each row; decoded, of latents, and smaller before the last upsampler. The images
        that `draw` returns are unchanged to the bit.
        """


class Backend(Protocol):
    """A framework. All functions raise UserError for a device, precision or mesh that is not available."""

    def measure(
        self,
        request: Request,
        *,
        device: str | None,  # None: an accelerator if there is one
        precision: str,  # "auto" measures which is fastest
        micro_batch: int | None,  # None: the largest that fits the memory
        mesh: str | None,  # "DATAxMODEL"; None: all devices along DATA
        compile: str,  # "auto", "on" or "off"
        deterministic: bool = False,  # only deterministic algorithms on a GPU
    ) -> tuple[Network, Measured]:
        """Build the network of a new run and measure its speed and memory. Returns the network at its initialisation."""

    def make_engine(
        self, request: Request, run: Run, data: Examples, net: Network | None, mesh: str | None = None
    ) -> Engine:
        """The training state of `run` before step 1; `Engine.load` then restores a checkpoint, if there is one.

        net: the network at its initialisation, which the engine takes over and may change; None builds it. mesh:
        "DATAxMODEL" for the processes at work now; None keeps MODEL of the run's mesh and fits DATA to the processes. jax
        ignores it: a run in jax keeps its mesh.
        """

    def make_sampler(
        self,
        request: Request,
        run: Run,
        weights: Path,  # a safetensors file
        plan: AnyPlan,
        *,
        precision: str,
        batch: int,  # images of a full batch; the last one may be smaller
        compile: str = "off",
        decoder: Decoder | None = None,  # of latents
    ) -> Sampler:
        """The sampler of a run's network with these weights, under the request's guidance."""

    def resolve_device(self, device: str | None) -> DeviceInfo:
        """The device of that name; None: an accelerator if there is one."""

    def faster_precision(self, device: DeviceInfo) -> str:
        """The precision of a system that is sampled with "auto": "bfloat16" where it is measured to be faster, or "float32"."""

    def make_chain(
        self,
        loaded: LoadedSystem,
        decoder: Decoder | None,  # of latents
        device: DeviceInfo,
        *,
        seed: int,
        precision: str,
        batch: int,
        compile: str,
    ) -> Sampler:
        """The sampler of a system: its networks, one after the other."""
