"""Fixtures of all tests, and the options of a test run."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import ROOT, order, selection
from tests.support.aws.emulators import localstack, ministack, moto
from tests.support.browser import browser
from tests.support.postgres.server import frail_server, postgres, postgres_server
from tests.support.simpledb.fixtures import rough_simpledb, simpledb, simpledb_url

__all__ = [
    "browser",
    "ffmpeg",
    "frail_server",
    "localstack",
    "ministack",
    "moto",
    "postgres",
    "postgres_server",
    "rough_simpledb",
    "shared_data",
    "simpledb",
    "simpledb_url",
]

# An example's duration depends on the load of the machine, so examples do not have a deadline.
settings.register_profile("batchlab", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("batchlab")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all",
        action="store_true",
        dest="all_tests",
        help="also run the slow tests: the ones that need grids of processes, containers, services"
        " that are started for a test, a browser, time that passes, or minutes of computing",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite on every core, unless `-n` or `--pdb` is given. A run of named files
    stays in one process, which starts faster."""
    option = config.option
    is_worker = hasattr(config, "workerinput")
    if (
        not is_worker
        and getattr(option, "numprocesses", 0) is None  # with 0, xdist is off
        and not (option.usepdb or option.collectonly)
        and selection.names_whole_suite(config)
    ):
        option.numprocesses = "auto"


@pytest.hookimpl(optionalhook=True)  # xdist may be off
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of processes that `-n auto` starts: one for each core, and with `--all`
    four more, since the longest slow tests mostly wait. xdist's own variable has precedence."""
    if asked := os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return int(asked)
    return (os.cpu_count() or 1) + (4 if config.option.all_tests else 0)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of slow tests, reset SIGINT, and request long time slices in a parallel run.

    A run that a shell started in the background ignores SIGINT, and its child processes inherit that. Tests interrupt
    themselves and their child processes, so each process of a run begins with Python's handler.

    With Linux's usual slices of a few milliseconds instead of 0.1 s, simulations need 20% more CPU
    time. Processes that a test starts keep the usual slices, and run first. Without a recent
    `chrt` nothing changes.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The options are set here, because CI also runs tests without pyproject.toml, against the installed package.
    config.addinivalue_line("markers", "slow: runs only with --all, or if its file is named")
    if hasattr(config, "workerinput"):
        longer = ["chrt", "--reset-on-fork", "--other", "--sched-runtime", "100000000"]
        with suppress(FileNotFoundError):
            subprocess.run([*longer, "--pid", "0", str(os.getpid())], capture_output=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the folders of slow tests, unless `--all` or the command line names them."""
    if config.option.all_tests or collection_path not in selection.SLOW_FOLDERS:
        return None
    return selection.is_left_out(collection_path, selection.given_paths(config)) or None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect slow tests that the command line does not ask for, and order the others. Each
    process of a run does the same, since xdist compares their lists."""
    if not config.option.all_tests:
        given = selection.given_paths(config)
        left_out = [item for item in items if selection.is_slow(item) and not selection.is_named(item, given)]
        config.hook.pytest_deselected(items=left_out)
        dropped = set(left_out)
        items[:] = [item for item in items if item not in dropped]
    processes: int = getattr(config, "workerinput", {}).get("workercount", 1)
    if processes > 1:
        items[:] = [items[n] for n in order.dealt([item.nodeid for item in items], processes)]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Exclude the collected tests from garbage collection, since they remain until the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def ffmpeg() -> None:
    """Skip the test without ffmpeg, which the media job needs; fail in CI."""
    if shutil.which("ffmpeg") is None:
        if os.environ.get("CI"):
            pytest.fail("CI promises ffmpeg, but it is not installed")
        pytest.skip("ffmpeg is not installed")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real traces and claims. Skip the test without it; fail in CI."""
    folder = Path(os.environ.get("BATCHLAB_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI promises the reference data, but {folder} is not there")
        pytest.skip("the reference data is not on this machine")
    return folder
