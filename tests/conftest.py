"""Options of the test suite: slow tests on demand, and no skip that is not on the list."""

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from harness.frameworks.torchvision import make_importable

sys.path.insert(0, str(Path(__file__).parent))  # for few_digits; pytest's importlib mode leaves it alone


def pytest_configure(config):
    # not the cache of the user who runs the tests; processes that the tests start inherit the variable
    folder = tempfile.TemporaryDirectory(prefix="harness-cache-")
    config.add_cleanup(folder.cleanup)
    os.environ["HARNESS_CACHE"] = folder.name
    # Compiling is most of the time of tests in jax: LLVM does without optimisation, and nothing is compiled twice. Set
    # before jax is imported, and for the processes that tests start.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(folder.name, "compiled")  # noqa: PTH118
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    if (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    ):  # of a shell's background; what the tests start would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    make_importable()  # for the packages that results are held against: diffusers, clean-fid, torch-fidelity


@pytest.fixture(autouse=True)
def cache_of_its_own(monkeypatch, request):
    """Each test begins with an empty cache; the folder is made when something is written."""
    monkeypatch.setenv("HARNESS_CACHE", os.path.join(os.environ["HARNESS_CACHE"], f"{id(request.node):x}"))  # noqa: PTH118


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without PNG, SVG and PDF, which have tests of their own and take nearly all of a report's time."""
    monkeypatch.setattr("reports.render_pool._processors", lambda: 1)  # no workers
    monkeypatch.setattr("reports.render_pool.draw", lambda figure, styles: {})


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--allowed-skips", metavar="FILE", help="fail on a skip whose reason is not a line of FILE")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in set(slow)]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    path = session.config.getoption("--allowed-skips")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not path or reporter is None:
        return
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    allowed = {line.strip() for line in lines if line.strip() and not line.startswith("#")}
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else report.longrepr
        if reason not in allowed:
            reporter.write_line(f"skip that is not on the list {path}: {report.nodeid}: {reason}", red=True)
            session.exitstatus = 1
