"""`harness bench`: speed and utilisation of this device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from harness.cli.flags_from_settings import COUNT, PATH, Value, json_option, plugin_option
from harness.errors import UserError
from harness.io import files

STAGES = ("training", "sampling", "evaluation")


def _parse_stages(text: str) -> tuple[str, ...]:
    """The stages in a text such as "sampling,training", in the order of STAGES. ValueError for an unknown one."""
    from harness.registry import unknown

    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in STAGES:
            raise ValueError(unknown("stage", name, STAGES))
    return tuple(stage for stage in STAGES if stage in names)


@click.command("bench")
@click.option("--backbone", metavar="NAME", help="[default: dit-xl-2 on a GPU, dit-s-8 on a CPU]")
@click.option(
    "--precision", type=click.Choice(["auto", "float32", "tf32", "bfloat16"]), default="auto", show_default=True,
    help="auto: float32 or bfloat16, whichever has the faster matrix products here.",
)  # fmt: skip
@click.option(
    "--batch", type=COUNT, help="Batch size. [default: 256 on a GPU; on a CPU so that a step takes about 1 s]"
)
@click.option(
    "--sampling-steps", type=COUNT, help="Sampler steps for a batch of samples. [default: 10 on a GPU, 2 on a CPU]"
)
@click.option(
    "--compile",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="torch.compile of the network. auto: on a GPU only.",
)
@click.option("--stages", type=Value("stages", _parse_stages), default=",".join(STAGES), show_default=True)
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1. [default: an accelerator if there is one]")
@click.option("--out", type=PATH, metavar="FILE.json", help="Write the measurements to this file.")
@plugin_option
@json_option
def command(out: Path | None, as_json: bool, **options: Any) -> None:
    """Speed of this device: images/s, TFLOP/s, utilisation and memory of a backbone, beside the device's roofline.

    Utilisation (MFU) is the network's operations per second over the peak of the device. A multiply-add is two operations,
    and a training step is three forward passes. The peak comes from the data sheet if the device is known by its full name,
    and from the matrix products measured here if not. Sampling is guided: the network computes two images for each sample.
    On an H100 or H200 the first of these commands measures the paper's DiT-XL/2 at 256 pixels in latents, batch 256, where
    MFU should be 45 % or more:

    \b
        harness bench --out h100.json
        harness bench --backbone dit-s-2 --batch 16 --device cpu
    """
    from harness.engines.torch.bench import measure
    from harness.frameworks.installed import check_installed

    check_installed("torch")
    if out is not None and out.exists():
        raise UserError(f"--out {out} exists already; name another file")
    if out is not None:
        files.check_output(out, "--out")
    measured = measure(
        options["backbone"],
        device=options["device"],
        precision=options["precision"],
        batch=options["batch"],
        sampler_steps=options["sampling_steps"],
        compile=options["compile"],
        stages=options["stages"],
    )
    if as_json:
        click.echo(json.dumps(measured, indent=2))
    else:
        _show(measured)
    if out is not None:  # last, so that what was measured is printed though it cannot be written
        files.write_json(out, measured)


def _show(measured: dict[str, Any]) -> None:
    """Print the measurements (the JSON document of `harness.engines.torch.bench.measure`) as a table."""
    from rich.table import Table

    from harness.cli.tables import print_table

    roofline = measured["roofline"]
    products = ", ".join(f"{name} {value:.3g}" for name, value in roofline["tflops"].items())
    click.echo(f"{roofline['device_name']}, {measured['threads']} threads, torch {measured['torch']}")
    click.echo(f"  matrix products, TFLOP/s  {products}")
    click.echo(f"  memory, GB/s              {roofline['gbytes_per_second']:.3g}")
    compiled = ", compiled" if measured["compile"] == "on" else ""
    click.echo(
        f"{measured['backbone']}{compiled} at {measured['input']}: {measured['params'] / 1e6:,.2f} M parameters, "
        f"{measured['gmacs']:.4g} G multiply-adds in a forward pass on an image"
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("precision", "batch", "images/s", "slowest-fastest", "TFLOP/s", "MFU", "of matmul", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in measured["rows"]:
        batch = f"{row['batch']}" + (f" ({row['micro_batch']})" if row["micro_batch"] != row["batch"] else "")
        # MFU, and the share of the speed of the matrix products that were measured here
        shares = ["-" if row[key] is None else f"{row[key]:.1%}" for key in ("utilisation", "of_measured")]
        table.add_row(
            row["stage"],
            row["precision"],
            batch,
            f"{row['images_per_second']:.4g}",
            f"{row['low']:.3g}-{row['high']:.3g}",
            "-" if row["tflops"] is None else f"{row['tflops']:.3g}",
            *shares,
            "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
            row["note"],
        )
    print_table(table)
    click.echo(
        f"MFU over {measured['peak_tflops']:.3g} TFLOP/s ({measured['peak_from']}); {measured['convention']}. "
        "In brackets: images in one call of the network."
    )
    for warning in measured["remarks"]:  # each is about a speed above the roofline or the peak
        click.echo(f"over 100 %: {warning}.")
