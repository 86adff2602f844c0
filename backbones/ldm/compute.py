"""Closed-form compute and parameters of an LDM; the convention is `harness.compute.CONVENTION`.

It reproduces the Gflops of the DiT paper's Table 6: 104 for LDM-4 and 57 for LDM-8.
"""

from __future__ import annotations

from typing import Any

from backbones.ldm.layout import CONTEXT_TOKENS, ldm_layout
from backbones.unet.compute import Tally, count_parts, count_timestep
from harness.spec import Compute


def count(**arguments: Any) -> Compute:
    """Compute of one forward pass on one latent, by part. Takes every argument of the builder.

    Parameters include the class embedding, which the LDM paper's numbers leave out.
    """
    layout = ldm_layout(arguments)
    tally = Tally("model.diffusion_model.")
    count_timestep(tally, layout)
    context = (CONTEXT_TOKENS, arguments["context_width"], arguments["transformer_depth"])
    count_parts(tally, layout, scale_shift=False, context=context)
    tally.norm("out.0", layout.channels, layout.side**2)
    outputs = arguments["out_channels"] or arguments["in_channels"]
    tally.conv("out.2", layout.channels, outputs, kernel_area=9, positions=layout.side**2)
    labels = arguments["num_classes"] + arguments["null_class"]  # null_class is a bool
    tally.params += labels * arguments["context_width"]  # label table: a look-up is free
    return tally.compute()
