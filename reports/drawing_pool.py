"""Many figures drawn at once: by this process and helpers of its own, each with a share of the panels.

The helpers are plain child processes (not of `multiprocessing`, which would run a caller's script a second time). They
get figures and give back bytes through their pipes; the bytes are those that one process would draw.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reports.charts import Figure, Style
from reports.drawing import draw

MOST_HELPERS = 7
WORTH_A_HELPER = 12  # panels: about what a helper draws in the time that it takes to begin
_ROOT = Path(__file__).resolve().parent.parent
_SCRIPT = (
    f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from reports.drawing_pool import help_to_draw; help_to_draw()"
)

Files = dict[str, bytes]  # "png", "svg", "pdf" -> what is in the file


def draw_all(
    figures: Sequence[Figure],
    styles: Mapping[str, Style],
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Files]:
    """The files of every figure, by its name, in the order given. progress: called as ("figures", drawn, in all)."""
    drawn: dict[str, Files] = {}

    def keep(files: dict[str, Files]) -> None:
        drawn.update(files)
        if progress is not None:
            progress("figures", len(drawn), len(figures))

    keep({})
    cost = sum(map(_cost, figures))
    helpers = min(_processors() - 1, MOST_HELPERS, int(cost / WORTH_A_HELPER) - 1, len(figures) - 1)
    shares = _shares(figures, max(helpers, 0) + 1)
    with ThreadPoolExecutor(max_workers=max(len(shares) - 1, 1)) as threads:
        helped = [threads.submit(_by_helper, share, styles) for share in shares[1:]]
        for figure in shares[0]:
            keep({figure.name: draw(figure, styles)})
        for share, each in zip(shares[1:], helped, strict=True):
            files = each.result()
            keep(files if files is not None else {figure.name: draw(figure, styles) for figure in share})
    return {figure.name: drawn[figure.name] for figure in figures}


def help_to_draw() -> None:
    """What a helper does: figures from standard input, files to standard output."""
    share, styles = pickle.load(sys.stdin.buffer)
    pickle.dump({figure.name: draw(figure, styles) for figure in share}, sys.stdout.buffer)


def _by_helper(share: Sequence[Figure], styles: Mapping[str, Style]) -> dict[str, Files] | None:
    """The files of a share, or None where the helper failed (no memory, no more processes): it is drawn here then."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT], input=pickle.dumps((share, dict(styles))), capture_output=True, check=True
        )
        return pickle.loads(done.stdout)
    except (OSError, subprocess.CalledProcessError, pickle.UnpicklingError, EOFError):
        return None


def _shares(figures: Sequence[Figure], count: int) -> list[list[Figure]]:
    """`count` shares of about the same cost: the dearest figure goes where the least is."""
    shares: list[list[Figure]] = [[] for _ in range(count)]
    costs = [0.0] * count
    for figure in sorted(figures, key=lambda figure: (-_cost(figure), figure.name)):
        least = costs.index(min(costs))
        shares[least].append(figure)
        costs[least] += _cost(figure)
    return shares


def _cost(figure: Figure) -> float:
    return max(len(figure.panels), 1)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
