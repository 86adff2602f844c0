"""The command line: one module for each command, imported when the command is called."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import click

TRACEBACK = "HARNESS_TRACEBACK"  # environment variable: errors that are one line come with their traceback
REPEATED_SIGTERM_SECONDS = 1.0  # several SIGTERMs within this time count as one
COMMANDS = {
    # name: (module in this folder, summary in `harness --help`)
    "run": ("run", "Train, sample, evaluate and report: the main job."),
    "plan": ("plan", "Show what a run would cost; nothing is written."),
    "study": ("study", "Many runs of one protocol, from a file: launch, continue, show the status, report."),
    "train": ("train", "The first stage of run: train a backbone."),
    "sample": ("sample", "The second stage of run: sample a run, or a system with its weights."),
    "evaluate": ("evaluate", "The third stage of run: evaluate a sample set."),
    "compare": ("compare", "Win, loss or tie between two results, with the rule."),
    "report": ("report", "Write tables and figures from published and measured records."),
    "list": ("list", "List backbones, systems, protocols, data sets, samplers, suites, features and metrics."),
    "weights": ("weights", "Inspect, import and export public checkpoints; nothing in them is executed."),
    "data": ("data", "Prepare, fetch and verify data sets, latents and references."),
    "flops": ("flops", "Parameters and theoretical Gflops, with the published values."),
    "new": ("new", "Write a package with a backbone of your own, which trains at once."),
    "check": ("check", "Check a backbone: shapes, gradients, batches, labels, compute, torch against JAX."),
    "diagnose": ("diagnose", "Find the stage from which a gap in quality comes."),
    "bench": ("bench", "Speed, utilisation and memory of a backbone on this device, with the roofline of the device."),
    "doctor": ("doctor", "Check this machine: what is installed, what is missing, and how to fix it."),
}


class LazyGroup(click.Group):
    """A group that imports a command when it is called, so that `--help` and `list` import no framework."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return import_module(f"harness.cli.{COMMANDS[cmd_name][0]}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # The summaries are in COMMANDS, so that the help imports no command.
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]):
        # click's own message for an unknown command suggests no similar names.
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

    If torchrun started several processes, only the first one prints the error, and the exit code of torchrun is 1.
    """
    from harness.cli.streams import give_up_stdout, print_anything
    from harness.distributed.launch import defer_to_rank_zero, is_main_process, report_elastic_error
    from harness.errors import RunError, UserError

    def end(code: int, reason: str, print_error: Callable[[], object]) -> NoReturn:
        """Print the error, write `reason` for torchrun's report, and exit with `code`."""
        # Under torchrun, rank 0 prints first, and the others wait. If torchrun then ends this process (SIGTERM, here a
        # KeyboardInterrupt), rank 0 has printed the same error, and this process prints nothing.
        with contextlib.suppress(KeyboardInterrupt):
            defer_to_rank_zero(os.environ)
            print_error()
            report_elastic_error(os.environ, reason)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # Torchrun ends the other processes when this one has ended. Tearing down an interpreter with torch in it takes
            # seconds on a busy machine, in which they would print their errors, too.
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)

    # Threads that wait at a barrier sleep instead of spinning, which takes the processor from other processes: read by
    # OpenMP when torch is imported, and inherited by processes that this one starts.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    print_anything()
    with _terminable() as terminated:
        try:
            _check_working_folder()
            with _traceback_if_wanted():
                group.main(standalone_mode=False, prog_name="harness")
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a full device becomes one line
        except click.ClickException as error:
            end(error.exit_code, error.format_message(), error.show)
        except (click.Abort, KeyboardInterrupt):
            # torchrun also sends SIGTERM when another process has died.
            by = "by torchrun (SIGTERM)" if terminated and "TORCHELASTIC_RUN_ID" in os.environ else ""
            if is_main_process(os.environ):
                click.echo(f"harness: interrupted {by}".strip(), err=True)
            sys.exit(130)
        except BrokenPipeError:  # the reader of stdout has ended, such as `head`; nothing can be printed
            give_up_stdout()
            sys.exit(1)
        except (UserError, RunError) as error:
            end(
                2 if isinstance(error, UserError) else 1, str(error), partial(click.echo, f"harness: {error}", err=True)
            )
        except MemoryError as error:
            reason = str(error).partition("\n")[0] or "nothing says how much"
            text = f"this machine has too little memory ({reason}); ask for less, or use a larger one"
            end(1, text, partial(click.echo, f"harness: {text}", err=True))
        except OSError as error:  # a place that the system refuses, or stdout on a full disk
            give_up_stdout()
            text = f"{error.filename or 'stdout'}: {error.strerror or error}"
            end(1, text, partial(click.echo, f"harness: {text}", err=True))
        except Exception as error:
            from harness.plugins.fault import plugin_fault

            fault = plugin_fault(error)
            if fault is None:  # an error of the harness itself, whose traceback belongs into a bug report
                raise
            text = f"{fault}; {TRACEBACK}=1 in the environment shows the traceback"
            end(1, text, partial(click.echo, f"harness: {text}", err=True))


@contextlib.contextmanager
def _traceback_if_wanted() -> Iterator[None]:
    """Context that prints the traceback of every error, its causes included, where the environment sets TRACEBACK."""
    try:
        yield
    except Exception:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        raise


def _check_working_folder() -> None:
    """UserError where the working folder was deleted: relative paths mean nothing there, and libraries end the process."""
    from harness.errors import UserError

    try:
        Path.cwd()
    except OSError:
        raise UserError("the working folder no longer exists; change to one that does") from None


@contextlib.contextmanager
def _terminable() -> Iterator[list[float]]:
    """Handle SIGTERM like Ctrl-C, unless another handler is set (training sets one, for its checkpoint).

    Yields a list of the times at which SIGTERM arrived, empty at first.
    """
    arrivals: list[float] = []

    def handle(number: int, frame: object) -> None:
        # A process may get the same signal twice: from its sender, and from a process that passes it on. But an
        # exception raised while Python cleans up is lost, so a later signal must raise again.
        if not arrivals or time.monotonic() - arrivals[-1] > REPEATED_SIGTERM_SECONDS:
            arrivals.append(time.monotonic())
            raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()  # only there can a handler be set
    if not in_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield arrivals
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield arrivals
    finally:
        # After a SIGTERM the process is ending already, so another one is ignored.
        signal.signal(signal.SIGTERM, signal.SIG_IGN if arrivals else signal.SIG_DFL)
