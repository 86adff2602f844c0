"""The command line as a process of its own that starts at once: forked from a server that has loaded everything.

What the tests of kills need: many processes, real ones, without the seconds that a framework takes to load.
"""

import dataclasses
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = [
    "torch",
    "torch._dynamo",  # seconds; the first optimizer imports it, whether anything is compiled or not
    "backbones.dit.torch_model",
    "harness.cli.train",
    "harness.cli.sample",
    "harness.engines.torch.backend",
    "harness.engines.torch.trainer",
    "harness.engines.torch.process_group",
    "evaluators.features.efficientnet_lite0",
    "harness.conformance.suite",
    "harness.conformance.torch_network",
    "harness.pipeline.evaluate",
    "harness.pipeline.measure",
    "harness.pipeline.plan",
    "harness.pipeline.report",
    "harness.pipeline.sample",
    "harness.pipeline.train",
    "reports.grid",
    __name__,
]


NARROW = "dit-narrow"  # a backbone of these processes, whose steps and checkpoints take milliseconds


def start(words, folder, shortest_seconds):
    """The process of `harness WORDS`, started in `folder`; checkpoints come `shortest_seconds` apart."""
    return started(_main, [*map(str, words)], str(folder), shortest_seconds)


def run(words, folder, path=()):
    """`harness WORDS` in `folder` with the packages in the folders `path` installed, when it has ended; at most 300 s.

    Its report, if it writes one, is without drawings.
    """
    with tempfile.TemporaryDirectory() as said:
        words, path = [*map(str, words)], [*map(str, path)]
        process = started(_main_with_packages, words, str(folder), path, said, dict(os.environ))
        process.join(300)
        if process.exitcode is None:
            process.kill()
        out, err = ((Path(said) / name).read_text() for name in ("out", "err"))
        return CompletedProcess(words, process.exitcode, out, err)


def started(function, *arguments):
    """A process that calls a function of a module that can be imported."""
    CONTEXT.set_forkserver_preload(PRELOAD)
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def _main(words, folder, shortest_seconds):
    os.chdir(folder)
    with Path("output.txt").open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from harness.pipeline import training_loop

    training_loop.MIN_CHECKPOINT_SECONDS, training_loop.CHECKPOINT_SHARE = shortest_seconds, 1.0
    _call(words)


def _main_with_packages(words, folder, path, said, environment):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        with (Path(said) / name).open("w") as file:
            os.dup2(file.fileno(), number)
    sys.path[:0] = path  # as PYTHONPATH does; no registry has been read yet
    from reports import render_pool

    render_pool._processors, render_pool.draw = lambda: 1, lambda figure, styles: {}
    _call(words)


def _call(words):
    import torch

    from harness.cli import main
    from harness.registry import backbones

    torch.set_num_threads(1)
    spec = backbones.get("dit-xs-4")
    narrow = {**spec.defaults, "depth": 2, "width": 48, "heads": 4}
    backbones.register(dataclasses.replace(spec, name=NARROW, defaults=narrow))
    sys.argv = ["harness", *words]
    main()
