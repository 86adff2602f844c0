"""Several processes of one run, joined by jax.distributed."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

from harness.distributed.group import ProcessGroup, silence_output
from harness.engines.jax.mesh import initialize


class JaxProcessGroup(ProcessGroup):
    """The JAX_NUM_PROCESSES processes of this run: see `harness.engines.jax.mesh`."""

    def __init__(self) -> None:
        initialize()
        self.size, self.index = jax.process_count(), jax.process_index()
        if not self.is_main:
            silence_output()

    def barrier(self, where: str) -> None:
        multihost_utils.sync_global_devices(where)

    def broadcast(self, value: int) -> int:
        return int(multihost_utils.broadcast_one_to_all(np.int32(value)))  # jax has 32-bit integers by default

    def all_max(self, value: int) -> int:
        return int(multihost_utils.process_allgather(np.int32(value)).max())
