"""CPython's own tests of concurrent.futures, with the executor of a grid.

The tests come from the package `test` of the Python that runs them. A test in DIFFERENCES must fail, so that the table
stays true. docs/python-api.md lists the same differences.
"""

from __future__ import annotations

import os
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchlab import Grid, GridExecutor
from tests.support.grid.python_api import warm_grid

try:
    from test.test_concurrent_futures import executor, test_as_completed, test_init, test_shutdown, test_wait, util
except ImportError:
    if os.environ.get("CI"):
        raise
    pytest.skip("this Python does not have the package test.test_concurrent_futures", allow_module_level=True)

_NAMES_THE_TYPE = "The test starts a program that imports the executor's type from concurrent.futures."

DIFFERENCES = {
    "test_max_workers_negative": "The pools of the grid set the number of workers, so `max_workers` is not accepted.",
    "test_interpreter_shutdown": _NAMES_THE_TYPE,
    "test_submit_after_interpreter_shutdown": _NAMES_THE_TYPE,
    "test_hang_gh83386": _NAMES_THE_TYPE,
}
"""Tests that fail with the executor of a grid, and the reasons. test_executor_shutdown.py has tests of its own for the
exit of Python."""

CHANCE = {
    "test_cancel_futures": "The test needs a call that has begun before `shutdown`, and a grid may not have received "
    "a call yet. test_shutdown_can_cancel_pending_calls waits for such a call."
}
"""Tests that fail or pass by chance with the executor of a grid, and the reasons."""

_grid: Grid
_folder: Path


@pytest.fixture(scope="module", autouse=True)
def grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    global _grid, _folder
    _folder = tmp_path_factory.mktemp("events")
    with warm_grid(tmp_path_factory.mktemp("grid")) as _grid:
        yield


def executor_type(max_workers: int, **options: Any) -> GridExecutor:
    """Return an executor of the grid, whose pools set the number of workers."""
    return _grid.executor(**options)


class Event:
    """An event that this process sets and a worker waits for."""

    def __init__(self, _: object = None) -> None:
        self._path = _folder / str(time.monotonic_ns())

    def set(self) -> None:
        self._path.touch()

    def wait(self) -> None:
        while not self._path.exists():
            time.sleep(0.01)


def suite(tests: Any, mixin: Any = util.ExecutorMixin) -> type[unittest.TestCase]:
    """Return a test case with the tests of CPython's class `tests`."""
    body: dict[str, Any] = {"executor_type": staticmethod(executor_type), "worker_count": 2, "create_event": Event}
    for name in DIFFERENCES:
        if test := getattr(tests, name, None):
            body[name] = unittest.expectedFailure(test)
    for name, reason in CHANCE.items():
        if test := getattr(tests, name, None):
            body[name] = unittest.skip(reason)(test)
    bases = (tests, util.BaseTestCase) if mixin is None else (tests, mixin, util.BaseTestCase)
    return type(tests.__name__, bases, body)


TestExecutor = suite(executor.ExecutorTest)
TestWait = suite(test_wait.WaitTests)
TestAsCompleted = suite(test_as_completed.AsCompletedTests)
TestShutdown = suite(test_shutdown.ExecutorShutdownTest)
TestInitializer = suite(test_init.InitializerMixin, None)
TestFailingInitializer = suite(test_init.FailingInitializerMixin, None)


def test_each_difference_is_a_test_of_cpython() -> None:
    suites = (TestExecutor, TestWait, TestAsCompleted, TestShutdown, TestInitializer, TestFailingInitializer)
    assert all(any(hasattr(one, name) for one in suites) for name in (*DIFFERENCES, *CHANCE))
