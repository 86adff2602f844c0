"""The command line: one module a command, imported when the command is called."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import NoReturn

import click

ONE_WISH_SECONDS = 1.0  # within which several SIGTERMs are one
COMMANDS = {
    # name: (module in this folder, what `harness --help` says)
    "run": ("run", "Train, sample, evaluate and report: the main job."),
    "plan": ("plan", "Say what a run would cost, and write nothing."),
    "study": ("study", "Many runs of one protocol, from a file: launch, continue, show the status, report."),
    "train": ("train", "The first stage of run: train a backbone."),
    "sample": ("sample", "The second stage of run: draw samples from a run, or from a system and its weights."),
    "evaluate": ("evaluate", "The third stage of run: measure a sample set."),
    "compare": ("compare", "Win, loss or tie between two results, and the rule."),
    "report": ("report", "Write the tables and figures from published and measured records."),
    "list": ("list", "Backbones, protocols, data sets and the rest, by name."),
    "weights": ("weights", "Public checkpoints in and out; nothing in them is executed."),
    "data": ("data", "Data sets, latents and references, made or fetched, and checked."),
    "flops": ("flops", "Parameters and theoretical Gflops, beside the published values."),
    "bench": ("bench", "Speed, utilisation and memory of a backbone on this device, beside its roofline."),
    "doctor": ("doctor", "Check this machine: what is installed, what is missing, each with the fix."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported on demand, so that help and list load no framework."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return import_module(f"harness.cli.{COMMANDS[cmd_name][0]}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # The summaries stand above, so that help imports no command.
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]):
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in COMMANDS:
            from harness.registry import unknown

            raise click.UsageError(unknown("command", name, COMMANDS), ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="backbone-harness", prog_name="harness")
def group() -> None:
    """Which generative image backbone is better at the same compute, and is the difference real?

    Start with:  harness run --backbone dit-xs-2
    """
    from harness.io.logs import log_to_stderr

    log_to_stderr()


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 refused, 1 failed, 130 after Ctrl-C or SIGTERM and its checkpoint.

    Of several processes that torchrun started the first says why all of them end; torchrun's own exit code is then 1.
    """
    from harness.distributed.launch import defer_to_rank_zero, is_main_process, report_elastic_error
    from harness.errors import RunError, UserError

    def end(code: int, reason: str, say: Callable[[], object]) -> NoReturn:
        with contextlib.suppress(KeyboardInterrupt):  # torchrun ends this process, for the first has spoken
            defer_to_rank_zero(os.environ)
            say()
            report_elastic_error(os.environ, reason)
        sys.exit(code)

    with _terminable() as terminated:
        try:
            group.main(standalone_mode=False, prog_name="harness")
        except click.ClickException as error:
            end(error.exit_code, error.format_message(), error.show)
        except (click.Abort, KeyboardInterrupt):
            # torchrun sends SIGTERM for reasons of its own, too: that another process has died.
            by = "by torchrun (SIGTERM)" if terminated and "TORCHELASTIC_RUN_ID" in os.environ else ""
            if is_main_process(os.environ):
                click.echo(f"harness: interrupted {by}".strip(), err=True)
            sys.exit(130)
        except BrokenPipeError:
            sys.exit(1)
        except (UserError, RunError) as error:
            end(
                2 if isinstance(error, UserError) else 1, str(error), partial(click.echo, f"harness: {error}", err=True)
            )


@contextlib.contextmanager
def _terminable() -> Iterator[list[float]]:
    """Let SIGTERM do what Ctrl-C does, where nothing else takes it (training does, for its checkpoint); yields a list that
    is empty until it comes."""
    came: list[float] = []

    def handle(number: int, frame: object) -> None:
        # Who stops a job of several processes sends it to each, and some pass it on; but what is raised while Python
        # cleans up is lost, and a later one must count.
        if not came or time.monotonic() - came[-1] > ONE_WISH_SECONDS:
            came.append(time.monotonic())
            raise KeyboardInterrupt

    mine = threading.current_thread() is threading.main_thread()  # signals belong to it
    if not mine or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield came
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if came else signal.SIG_DFL)  # the command is ending
