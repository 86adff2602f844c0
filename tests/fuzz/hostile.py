"""Hostile inputs from a seed: paths, names, sidecars, runs, records, TOML, checkpoints, sample files and folders.

Input i of a seed is always the same. Each is given to a command, with the entry point of the console script, or to the
Python interface. What may come of it: a result, or one line (`UserError`, `RunError`); never another exception, never more
than PATIENCE seconds, and no file of the user's that is changed or gone.

    python tests/fuzz/hostile.py --inputs 10000 --seed 1        # says at the end what was found, by where it was raised
    python tests/fuzz/hostile.py --seed 1 --input 4711          # one of them, with its traceback
"""

import argparse
import contextlib
import hashlib
import io
import logging
import os
import random
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "harness")]

from cases_of_files import of_checkpoints, of_folders, of_npz, of_python
from cases_of_words import Case, of_names, of_places, of_records, of_runs, of_sidecars, of_toml
from in_process import command
from valid_files import World, prepared

from harness.errors import RunError, UserError

PATIENCE, ROUNDS = 60, 9  # seconds of one input, see `patience`; `check` compiles, and takes up to 30
MEMORY = 6 << 30  # bytes of address space beyond what the process has when it begins


class TooSlow(BaseException):
    """Raised by the alarm; nothing in the harness catches it."""


KINDS = {
    "places": (of_places, 22), "names": (of_names, 16), "sidecars": (of_sidecars, 9), "runs": (of_runs, 7), "records": (of_records, 8),
    "toml": (of_toml, 11), "checkpoints": (of_checkpoints, 11), "npz": (of_npz, 9), "folders": (of_folders, 5), "python": (of_python, 9),
}  # fmt: skip


# Calling, and what is found --------------------------------------------------------------------------------------------


def contents(folder):
    """What lies below a folder, and its content: nothing that exists may change."""
    found = {}
    for path in [Path(top) / each for top, dirs, names in os.walk(folder) for each in (*dirs, *names)]:
        mode = path.lstat()
        if stat.S_ISREG(mode.st_mode):
            with path.open("rb") as file:
                content = hashlib.sha256(file.read(1 << 20)).hexdigest()
            found[path.relative_to(folder)] = (mode.st_mode, mode.st_size, content)
        else:
            found[path.relative_to(folder)] = (mode.st_mode, str(path.readlink()) if path.is_symlink() else None)
    return found


@contextlib.contextmanager
def patience(seconds):
    """TooSlow after so many seconds of computing in the block, or ROUNDS times as many of waiting: others may compute, too."""
    begun, rounds = time.process_time(), 0

    def alarm(*_):
        nonlocal rounds
        rounds += 1
        if rounds == ROUNDS or time.process_time() - begun > seconds:
            raise TooSlow(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def attempt(world, folder, kind, seed, i):
    """None, or (where, text) of what input i of that seed shows; and the outcome in a word."""
    draw = random.Random(f"{seed}-{i}")
    case = Case(world, folder, draw)
    with contextlib.chdir(folder):
        try:
            KINDS[kind][0](case)
        except (MemoryError, OSError, OverflowError):  # this machine does not make it
            return None, "not made"
        before = contents(folder)
        os.environ["HARNESS_CACHE"] = str(folder.parent / "cache")
        filters = warnings.filters[:]

        said = f"{kind}: {' '.join(map(str, case.words))}" if case.call is None else f"{kind}: a call"
        finding, outcome = None, "done"
        try:
            if case.call is not None:
                quiet = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()))
                with patience(PATIENCE), quiet[0], quiet[1]:
                    try:
                        case.call()
                    except (UserError, RunError) as error:
                        outcome = "refused"
                        if "\n" in str(error):
                            finding = ("more than a line", f"{said}: {error}")
                    except TypeError as error:
                        outcome = "refused"
                        if not _at_the_door(error):
                            raise
            else:
                with patience(PATIENCE):
                    code, _, text = command(*case.words)
                outcome = f"exit {code}"
                lines = [each for each in text.splitlines() if each.strip()]
                if code not in (0, 1, 2):
                    finding = (f"exit code {code}", f"{said}: {text[-300:]}")
                elif code and not lines:
                    finding = ("nothing said", said)
                elif "Traceback" in text:
                    finding = ("traceback in the output", f"{said}: {text[-600:]}")
                elif unseen := [each for each in lines if "Warning: " in each and ".py:" in each]:
                    finding = (f"a warning of Python: {unseen[0].split('.py:')[1][-80:]}", f"{said}: {unseen[0]}")
                elif code and "Usage:" not in text and not lines[-1].startswith("harness: ") and "harness: " in text:
                    finding = ("more than a line", f"{said}: {text[-600:]}")
                elif code == 1 and "could not be written" not in text and "disk is full" not in text:
                    finding = (f"exit code 1: {lines[-1][-60:]}", f"{said}: {lines[-1]}") if STRICT else None
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            own = [each for each in frames if _is_ours(each.filename)]
            where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "nowhere"
            shown = str(error)[:200].replace("\n", " | ")
            finding = (f"{type(error).__name__} at {where}", f"{said[:300]}: {shown}")
            if VERBOSE:
                traceback.print_exc()
        finally:
            warnings.filters[:] = filters
        after = contents(folder)
        lost = [
            path
            for path, was in before.items()
            if after.get(path) != was
            and not any(str(path) == each or str(path).startswith(f"{each}/") for each in case.may_change)
        ]
        # a folder's own mode is of no interest, and what a command appends to a record file is its purpose
        lost = [path for path in lost if path not in after or before[path][1] != 0]  # an empty file may be written to
        lost = [path for path in lost if not (path.suffix == ".jsonl" and path in after)]
        if finding is None and lost:
            finding = (f"a file of the user's is changed: {lost[0].suffix}", f"{said}: {lost[:3]}")
    return finding, outcome


STRICT, VERBOSE = False, False


def _at_the_door(error):
    """Whether Python refused the call itself: a keyword that is not known, one twice, or one that is missing."""
    ours = [each for each in traceback.extract_tb(error.__traceback__) if _is_ours(each.filename)]
    return all(Path(each.filename).name == "setting.py" for each in ours)


def _is_ours(file):
    packages = ("harness", "evaluators", "results", "reports", "backbones")
    return "/tests/" not in file and any(f"/{each}/" in file for each in packages)


def fuzz(inputs, seed, kinds=None, only=None, report=lambda *_: None):
    """(findings by where, number of outcomes by kind, the slowest input's seconds) of `inputs` inputs; `only`: of that one."""
    findings, outcomes, slowest = defaultdict(list), Counter(), (0.0, None)
    kinds = kinds or list(KINDS)
    weights = [KINDS[each][1] for each in kinds]
    cache, umask = os.environ.get("HARNESS_CACHE"), os.umask(0o022)
    levels = {each: logging.getLogger(each).level for each in ("harness", "evaluators", "results", "reports")}
    limit = resource.getrlimit(resource.RLIMIT_AS)
    stdin = os.dup(0)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as top, prepared():
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.environ["HARNESS_CACHE"] = str(Path(top) / "cache")
        (Path(top) / "world").mkdir()
        world = World(Path(top) / "world")
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limit[1]))
        try:
            for i in range(inputs) if only is None else [only]:
                kind = random.Random(f"kind-{seed}-{i}").choices(kinds, weights)[0]
                folder = Path(top) / f"case-{i}"
                folder.mkdir()
                begun = time.perf_counter()
                finding, outcome = attempt(world, folder, kind, seed, i)
                seconds = time.perf_counter() - begun
                slowest = max(slowest, (seconds, f"input {i}, {kind}"), key=lambda each: each[0])
                outcomes[kind, outcome] += 1
                if finding:
                    findings[finding[0]].append(f"input {i} of seed {seed}: {finding[1]}")
                report(i, kind, outcome, seconds, finding)
                _removed(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limit)
            os.umask(umask)
            os.dup2(stdin, 0)
            os.close(stdin)
            os.close(null)
            os.environ.pop("HARNESS_CACHE") if cache is None else os.environ.update(HARNESS_CACHE=cache)
            for each, level in levels.items():
                logging.getLogger(each).setLevel(level)
    return findings, outcomes, slowest


def _removed(folder):
    for top, dirs, _ in os.walk(folder):
        for each in dirs:
            if not (path := Path(top) / each).is_symlink():
                path.chmod(0o755)
    shutil.rmtree(folder)


def main():
    global STRICT, VERBOSE
    words = argparse.ArgumentParser()
    words.add_argument("--inputs", type=int, default=300)
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--kind", action="append")
    words.add_argument("--input", type=int)
    words.add_argument("--strict", action="store_true", help="also show what ends with exit code 1")
    given = words.parse_args()
    STRICT, VERBOSE = given.strict, given.input is not None
    begun = time.perf_counter()

    def report(i, kind, outcome, seconds, finding):
        if seconds > 5:
            print(f"slow: input {i} {kind} {outcome} {seconds:.1f} s", flush=True)
        if finding or given.input is not None:
            print(f"{i} {kind} {outcome} {finding}", flush=True)

    findings, outcomes, slowest = fuzz(given.inputs, given.seed, given.kind, given.input, report)
    for (kind, outcome), number in sorted(outcomes.items()):
        print(f"{kind:12} {outcome:10} {number}")
    print(
        f"{sum(outcomes.values())} inputs, {time.perf_counter() - begun:.0f} s, slowest {slowest[0]:.1f} s ({slowest[1]})"
    )
    for where, texts in sorted(findings.items(), key=lambda each: -len(each[1])):
        print(f"{len(texts):4} x {where}\n       {texts[0]}")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
