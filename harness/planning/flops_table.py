"""The rows of `harness flops`: parameters and theoretical Gflops, with the values that the DiT paper prints."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from harness.diffusion.sampler_plan import not_known
from harness.errors import RunError, UserError
from harness.protocols import get_protocol
from harness.registry import systems
from harness.spec import BackboneSpec, Compute
from harness.systems.spec import System

# columns of the paper's Tables 4 and 6
GFLOPS_COLUMNS = (
    "Flops (G)",
    "Total Flops (G)",
    "Base Flops (G)",
    "Upsampler Flops (G)",
)
PARAMS_COLUMN = "Params (M)"
PROTOCOL_ARGUMENTS = ("input_size", "in_channels", "num_classes")  # builder arguments that a protocol sets


class Published(NamedTuple):
    """The paper's values for a network at one input size, as printed ("19.70"); an empty string if there is none."""

    gflops: str
    params: str  # millions


def published(spec: BackboneSpec, input_size: int | None) -> Published:
    """The paper's values for `spec`, with its default arguments, at an input of `input_size` latent cells or pixels a side.

    The strings are empty if the paper has no values, or if `input_size` is None.
    """
    from results import paper

    columns = (*GFLOPS_COLUMNS, PARAMS_COLUMN)
    cells = [cell for cell in paper.values() if cell.backbone == spec.name and cell.column in columns]
    cells = [cell for cell in cells if cell.resolution is not None]
    native = spec.defaults.get("input_size")
    if not cells or not native or not input_size:
        return Published("", "")
    # The paper gives image resolutions. The network's default input corresponds to the smallest one (32 cells to 256).
    resolution = input_size * min(cell.resolution for cell in cells if cell.resolution is not None) // native
    # reversed, so that the first of several cells of a column counts
    at_size = {cell.column: cell.value for cell in reversed(cells) if cell.resolution == resolution}
    gflops = next((at_size[column] for column in GFLOPS_COLUMNS if column in at_size), "")
    return Published(gflops, at_size.get(PARAMS_COLUMN, ""))


def input_sizes(spec: BackboneSpec) -> list[int | None]:
    """The input sizes to count at: the native one (None: there is none), and twice that if the paper prints Gflops for it."""
    native = spec.defaults.get("input_size")
    return [native, 2 * native] if native and published(spec, 2 * native).gflops else [native]


def make_row(spec: BackboneSpec, overrides: dict[str, Any], *, breakdown: bool, check: str | None) -> dict[str, Any]:
    """The row of a network, as plain data.

    overrides: builder arguments. breakdown: whether the row has the flops by part. check: "fvcore" also counts with that
    package; None: no check. "fvcore_error" says why there is no such count.

    `difference` is our Gflops, rounded to the decimals of the paper's value, minus that value; None without one.
    """
    compute = spec.count(**overrides)
    arguments = spec.arguments(**overrides)
    # The paper varies only the size of the input, so its values hold for the defaults of all other arguments.
    others = {name: value for name, value in arguments.items() if name != "input_size"}
    as_published = all(spec.defaults[name] == value for name, value in others.items())
    printed = published(spec, arguments.get("input_size")) if as_published else Published("", "")
    row: dict[str, Any] = {
        "name": spec.name,
        **{name: arguments.get(name) for name in PROTOCOL_ARGUMENTS},
        "params": compute.params,
        "flops": compute.flops,
        "gflops": compute.gflops,
        "gmacs": compute.gmacs,
        "published_gflops": float(printed.gflops) if printed.gflops else None,
        "published_params_m": float(printed.params) if printed.params else None,
        "difference": None,
        "source": compute.source,
    }
    if printed.gflops:
        decimals = len(printed.gflops.partition(".")[2])
        row["difference"] = round(round(compute.gflops, decimals) - float(printed.gflops), decimals)
        row["published_text"] = printed.gflops
    if check == "fvcore":
        from harness.compute.check_fvcore import count_fvcore

        try:
            row["fvcore_gflops"] = count_fvcore(spec, **overrides) / 1e9
        except RunError as error:  # the other rows have a count
            row["fvcore_error"] = str(error)
    if breakdown:
        row["breakdown"] = breakdown_rows(compute)
    return row


def system_row(system: System) -> dict[str, Any]:
    """The row of a cascade: the sum of one forward pass of each denoiser, as in Table 6, without a classifier."""
    from results import paper

    computes = [part.compute() for part in system.components]
    total = sum(each.flops for each in computes) / 1e9
    cells = [cell for cell in paper.values() if cell.system == system.name and cell.column == "Total Flops (G)"]
    # the row shows the input of the last component, whose images are the system's
    last_arguments = system.components[-1].spec.arguments(**system.components[-1].arguments)
    row: dict[str, Any] = {
        "name": system.name,
        **{name: last_arguments.get(name) for name in PROTOCOL_ARGUMENTS},
        "params": sum(each.params for each in computes),
        "flops": sum(each.flops for each in computes),
        "gflops": total,
        "gmacs": sum(each.macs for each in computes) / 1e9,
        "published_gflops": float(cells[0].value) if cells else None,
        "published_params_m": None,
        # compared as printed: in whole Gflops
        "difference": round(round(total) - float(cells[0].value)) if cells else None,
        "source": "closed form",
        "parts": [
            {"name": part.backbone, "gflops": each.gflops}
            for part, each in zip(system.components, computes, strict=True)
        ],
    }
    if cells:
        row["published_text"] = cells[0].value
    return row


def cascades() -> list[System]:
    """The systems of several denoisers for which Table 6 prints a total."""
    from results import paper

    printed = {cell.system for cell in paper.values() if cell.column == "Total Flops (G)"}
    return [each for each in systems if each.name in printed and len(each.components) > 1]


def sampling_row(system: System) -> dict[str, Any]:
    """The cost of one image of a system: sampling without guidance, guidance, decoding and their sum."""
    from harness.autoencoders.load import decoder_compute

    if system.unavailable:
        raise UserError(f"system {system.name!r} cannot be counted: {system.unavailable}")
    steps = [part.advances for part in system.components]
    if system.is_adaptive:
        raise UserError(f"system {system.name!r} cannot be counted: {not_known(system.components[0].sampler)}")
    unguided = sum(part.compute().gflops * part.evaluations for part in system.components)
    resolution = get_protocol(system.protocol).resolution
    decode = decoder_compute(system.decoder, resolution).gflops if system.decoder else 0.0
    total = system.gflops_image()
    assert total is not None
    return {
        "name": system.name,
        "backbone": system.backbone,
        "gflops": system.gflops_forward(),
        "steps": steps,
        "evaluations": system.evaluations,
        "gflops_unguided": unguided,
        "gflops_guidance": total - unguided,
        "gflops_decode": decode,
        "gflops_image": total + decode,
    }


def breakdown_rows(compute: Compute) -> list[dict[str, Any]]:
    """Flops by part and kind. The same part of all blocks is one row: `blocks.*.mlp.fc1`, with `times` 28."""
    # (part with * for the numbers of blocks, kind) -> flops in each block
    flops_of_blocks: dict[tuple[str, str], list[int]] = {}
    for (part, kind), flops in compute.breakdown.items():
        pattern = re.sub(r"\.\d+(?=\.)", ".*", part)
        flops_of_blocks.setdefault((pattern, kind), []).append(flops)
    return [
        {"part": part, "kind": kind, "times": len(flops), "flops": sum(flops)}
        for (part, kind), flops in flops_of_blocks.items()
    ]


def footnotes(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each row that differs from the paper, and one line if any count is traced."""
    notes = []
    for row in rows:
        if row["difference"]:
            if row["name"] == "dit-b-4":
                why = "taken for a slip of the paper, as no natural convention gives it with the others"
            else:
                why = "the paper uses another convention"
            notes.append(
                f"{row['name']}: {row['gflops']:.2f} by the convention, {row['published_text']} in the paper; {why}."
            )
    if any(row["source"] == "traced" for row in rows):
        notes.append("traced: counted operator by operator in the torch network, which has no closed form.")
    return notes
