"""Three hundred tasks on S3 and SQS, during which workers, the manager, the queue, and the emulator are taken away.

test_kills has the functions and the checks for lost tasks.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.aws.emulators import ministack_python
from tests.support.grid.fixtures import Bring
from tests.system.test_kills import FOUR, Trial, check, do_harm, report

TASKS = 300


def test_three_hundred_tasks_survive_kills_a_purge_and_the_end_of_the_emulator(
    bring_up: Bring, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A killed emulator forgets its queues, but the bucket contains everything that is needed."""
    ministack_python()
    grid = bring_up(FOUR, backend="ministack")
    trial = Trial(grid, tmp_path / "starts")
    trial.submit(tmp_path / "job", TASKS, seconds=0.1)
    place, first = grid.home.place("ministack"), grid.emulator()
    harm: list[tuple[str, Callable[[], object]]] = [
        ("managers killed", grid.kill_manager),
        ("queues purged", grid.purge),
        ("emulators killed", lambda: os.kill(grid.emulator(), signal.SIGKILL)),
        ("managers killed", grid.kill_manager),
    ]
    do_harm(trial, harm, TASKS)
    view = grid.wait(trial.job, within_s=120)
    again = check(trial, view, tmp_path / "out", TASKS)
    report(trial, again, capsys)
    assert grid.emulator() != first
    assert grid.home.place("ministack") == place
    assert trial.done["managers killed"] == 2
    assert trial.done["workers killed"] >= 3
    assert again > 0, "kills in the middle of bundles must have cost some runs"
