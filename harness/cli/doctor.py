"""`harness doctor`: what is installed on this machine, what is missing, and how to fix it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
from importlib import metadata
from typing import NamedTuple

import click

from harness.cli.flags_from_settings import json_option
from harness.io.processors import BUSY, load, processors
from harness.io.progress import Bar

SIDE = 512  # rows and columns of the matrices in the timed product
PRODUCTS = 5  # timed products; the fastest one counts
MAX_SECONDS = 0.5  # for all products; at least one is timed

OPTIONAL = (
    # import name, distribution, purpose, extra that installs it
    # optax is what to look for: jax alone may be there without the rest of the extra
    ("optax", "jax", "networks in JAX (--framework jax, --backend jax)", "jax"),
    ("cleanfid", "clean-fid", "suite clean (clean-fid's resize)", "clean-fid"),
    ("pyarrow", "pyarrow", "data sets in parquet files (harness data prepare)", "parquet"),
    ("submitit", "submitit", "studies on a SLURM cluster (harness study --launcher slurm)", "slurm"),
    ("tensorboard", "tensorboard", "losses in TensorBoard (--logger tensorboard)", "tensorboard"),
    ("wandb", "wandb", "losses in Weights & Biases (--logger wandb)", "wandb"),
    ("fvcore", "fvcore", "an independent count of Gflops (harness flops --check fvcore)", "fvcore"),
    ("diffusers", "diffusers", "benchmarks against its DiT", "diffusers"),
)


class Finding(NamedTuple):
    """One line of the report."""

    status: str  # "ok", "note" (it works, with a limitation) or "lacks" (something needed is missing or fails)
    what: str
    fix: str = ""


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Show what is installed, what is missing and how to fix it. Exit code 1 if something that is needed fails."""
    parts = {
        "the machine": _system,
        "torch": _torch,
        "the processor": _processor,
        "feature extractors": _features,
        "plug-ins": _plugins,
        "optional packages": _optional,
    }
    findings: list[Finding] = []
    with Bar("doctor", len(parts), "parts") as bar:
        for name, check in parts.items():
            bar.advance(0, name)  # shows the name of the part that begins
            findings += check()
            bar.advance()
    if as_json:
        click.echo(json.dumps({"findings": [each._asdict() for each in findings]}, indent=2))
    else:
        for each in findings:
            label = {"ok": "  ok  ", "note": " note ", "lacks": "FAILED"}[each.status]
            click.echo(f"{label} {each.what}" + (f"\n        -> {each.fix}" if each.fix else ""))
    if any(each.status == "lacks" for each in findings):
        raise SystemExit(1)


def _system() -> list[Finding]:
    """Python, processors, memory and disk."""
    import psutil

    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(".")
    findings = [
        Finding("ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding(
            "ok",
            f"{processors()} processors, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB memory free",
        ),
    ]
    findings += _sharing()
    low = disk.free < 2e9
    findings.append(
        Finding(
            "note" if low else "ok", f"{disk.free / 1e9:.1f} GB free in this folder", "free some disk" if low else ""
        )
    )
    return findings


def _sharing() -> list[Finding]:
    """What this process does not have of the machine's processors: by a quota, by its binding, or by others' work."""
    usable, of_machine, findings = processors(), os.cpu_count() or 1, []
    if usable < of_machine:
        findings.append(
            Finding("note", f"{usable} of this machine's {of_machine} processors may be used (quota or binding)")
        )
    if (running := load()) > BUSY * of_machine:
        findings.append(
            Finding(
                "note", f"others use this machine: {running:.1f} processes have run on average in the last minute",
                "speeds measured now are too low, and change",
            )
        )  # fmt: skip
    return findings


def _torch() -> list[Finding]:
    """torch, its libraries for several processes, the CUDA devices and torch.compile."""
    try:
        import torch

        from harness.engines.torch.compiling import unavailable_reason
    except ImportError as error:
        return [Finding("lacks", f"torch does not import: {error}", "pip install torch")]
    findings = [Finding("ok", f"torch {torch.__version__}, {torch.get_num_threads()} threads")]
    collectives = [name for name, available in _collectives() if available]
    findings.append(
        Finding("ok", f"several processes by {' and '.join(collectives)} (torchrun --nproc-per-node N -m harness ...)")
        if collectives
        else Finding(
            "note",
            "this torch cannot run several processes as one job",
            "for torchrun, install a torch with torch.distributed",
        )
    )
    if torch.cuda.is_available():
        findings += [
            Finding("ok", f"cuda:{index} {torch.cuda.get_device_name(index)}")
            for index in range(torch.cuda.device_count())
        ]
    else:
        findings.append(
            Finding("note", "no CUDA device: runs use the CPU", "small backbones such as dit-xs-2 train in minutes")
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := unavailable_reason(device):
        findings.append(Finding("note", "--compile auto leaves networks uncompiled here", reason))
    else:
        findings.append(Finding("ok", f"torch.compile on {device.type} (--compile)"))
    return findings


def _processor() -> list[Finding]:
    """The CPU and its speed in bfloat16; [] without torch, which `_torch` reports."""
    try:
        import torch

        from harness.engines.torch.resolve import device_name
    except ImportError:
        return []
    name = device_name(torch.device("cpu"))
    return [Finding("ok", f"cpu {name}, matrix products in bfloat16 {relative_to_float32(_bfloat16_speed_ratio())}")]


def relative_to_float32(ratio: float) -> str:
    """A speed as text, given its ratio to the speed of float32."""
    times = max(ratio, 1 / ratio)
    if times < 1.05:
        return "as fast as in float32"
    decimals = 1 if times < 10 else 0
    return f"{times:.{decimals}f} times {'as fast as' if ratio > 1 else 'slower than'} in float32"


def _collectives() -> list[tuple[str, bool]]:
    """(name, whether this torch has it) of each library for several processes."""
    import torch

    if not torch.distributed.is_available():
        return []
    return [
        ("gloo (CPU)", torch.distributed.is_gloo_available()),
        ("NCCL (CUDA)", torch.cuda.is_available() and torch.distributed.is_nccl_available()),
    ]


def _bfloat16_speed_ratio() -> float:
    """Speed of a matrix product in bfloat16 on this CPU, divided by that in float32. A slow product is timed only once."""
    import time

    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(SIDE, SIDE, dtype=dtype)
        times: list[float] = []
        while len(times) < PRODUCTS and sum(times) < MAX_SECONDS:
            begin = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - begin)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _features() -> list[Finding]:
    """Whether each feature extractor can be loaded; one that needs a file of the user is not tried."""
    from harness import registry

    findings = []
    for spec in registry.features:
        if flag := getattr(spec, "weights_option", ""):  # a file that the user must give
            findings.append(Finding("note", f"features {spec.name} need weights", f"give them with {flag} FILE"))
            continue
        try:
            spec.load("cpu")
            findings.append(Finding("ok", f"features {spec.name}"))
        except Exception as error:  # a plug-in can raise anything; report it
            findings.append(
                Finding("lacks", f"features {spec.name}: {error}", "pip install --force-reinstall backbone-harness")
            )
    return findings


def _plugins() -> list[Finding]:
    """The plug-ins, those that failed to load, and registries that are empty because the installation is broken."""
    from harness import registry

    findings = []
    for noun in (
        "backbones",
        "protocols",
        "datasets",
        "samplers",
        "objectives",
        "features",
        "metrics",
        "suites",
        "systems",
    ):
        items = getattr(registry, noun)
        names = items.names()
        others = sorted({items.owner(name) for name in names} - {registry.OWN_DISTRIBUTION})
        findings += [Finding("ok", f"plug-in {owner} adds {noun}") for owner in others]
        findings += [
            Finding(
                "lacks",
                f"plug-in {each.distribution} ({each.entry_point}): {each.reason}",
                f"fix or uninstall {each.distribution}",
            )
            for each in items.problems
        ]
        if not names:
            findings.append(Finding("lacks", f"no {noun} are registered", "pip install backbone-harness again"))
    return findings


def _optional() -> list[Finding]:
    """The packages of OPTIONAL."""
    findings = []
    for module, distribution, purpose, extra in OPTIONAL:
        if importlib.util.find_spec(module):
            findings.append(Finding("ok", f"{distribution} {metadata.version(distribution)}: {purpose}"))
        else:
            findings.append(
                Finding(
                    "note", f"{distribution} is not installed: {purpose}", f"pip install 'backbone-harness[{extra}]'"
                )
            )
    return findings
