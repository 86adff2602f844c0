"""Published weight files that are recognised by their hash; most are not, because few publishers state one."""

from __future__ import annotations

from typing import NamedTuple


class Known(NamedTuple):
    """A published file. source: where its hash comes from."""

    name: str
    publisher: str
    source: str


KNOWN = {  # SHA-256 of the whole file
    "a37c32fffd316cd494cf3f35b339936debdc1576dad13fe57c42399a5dbc78b1": Known(
        "256x256_diffusion_uncond.pt",
        "openai/guided-diffusion (jul-2021)",
        "measured equal (2,211,383,297 bytes) by several projects that fetch it; not stated by the publisher",
    ),
}
