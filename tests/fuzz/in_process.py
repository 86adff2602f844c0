"""`harness WORDS` in this process, as the console script runs it."""

import contextlib
import io
import sys


def command(*words):
    """(exit code, stdout, stderr) of `harness WORDS` in this process. Whatever is no exit is raised."""
    from harness.cli import main

    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    argv, code = sys.argv, 0
    sys.argv = ["harness", *map(str, words)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.argv = argv
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8", "replace"))
    return code, *texts
