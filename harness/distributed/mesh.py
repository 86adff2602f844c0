"""The shape of a device mesh, `--mesh DATAxMODEL`, the same for both frameworks."""

from __future__ import annotations

import re
from typing import NamedTuple

from harness.errors import UserError


class MeshShape(NamedTuple):
    """Devices along the two axes of a mesh: batches are sharded over both, weights over `model` alone (FSDP)."""

    data: int
    model: int

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """The shape that `text` gives as "DATAxMODEL", as in "4x2". Raises UserError for any other form."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise UserError(f"--mesh {text} is not of the form DATAxMODEL, as in 4x2")
        return cls(int(match[1]), int(match[2]))

    @property
    def size(self) -> int:
        """The number of devices in the mesh."""
        return self.data * self.model

    def __str__(self) -> str:
        return f"{self.data}x{self.model}"
