"""Several processes of one run, joined by jax.distributed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from harness.distributed.group import ProcessGroup
from harness.engines.jax.mesh import start
from harness.io import progress


class JaxProcessGroup(ProcessGroup):
    """The processes that JAX_NUM_PROCESSES counts; see `harness.engines.jax.mesh`."""

    def __init__(self) -> None:
        start()
        self.size, self.index = jax.process_count(), jax.process_index()
        if not self.is_main:  # one of many voices is enough; errors are said on stderr all the same
            progress.silence()
            sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - as long as the process lives

    def barrier(self, where: str) -> None:
        multihost_utils.sync_global_devices(where)

    def broadcast(self, value: int) -> int:
        return int(multihost_utils.broadcast_one_to_all(np.int32(value)))

    def all_max(self, value: int) -> int:
        return int(multihost_utils.process_allgather(np.int32(value)).max())
