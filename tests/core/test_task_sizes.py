"""Warnings about tasks that are too short or too long, on both sides of each limit."""

from __future__ import annotations

from typing import Any

import pytest

from batchlab.core.task_sizes import LONG_ON_SPOT_S, MIN_TASKS, TINY_S, TOO_LONG_S, TaskTimes, size_warnings
from batchlab.reports.html.checks import findings
from tests.support.reports.metrics import of_stage

SPOT = "pool default has Spot Instances"


def times(median_s: float, **more: Any) -> TaskTimes:
    return TaskTimes("parse", median_s, **{"tasks": MIN_TASKS, "source": "Half of the tasks took at most", **more})


@pytest.mark.parametrize(
    ("fine", "wrong", "check", "named"),
    [
        (times(TINY_S), times(TINY_S - 0.02), "task size", ("80 ms", "less than 100 ms", "`size`", "`bundle`")),
        (
            times(LONG_ON_SPOT_S, spot=SPOT),
            times(LONG_ON_SPOT_S + 60, spot=SPOT),
            "long tasks on Spot",
            ("11 min 00 s", "more than 10 min 00 s", SPOT, "`size`", "On-Demand"),
        ),
        (times(LONG_ON_SPOT_S + 60), times(LONG_ON_SPOT_S + 60, spot=SPOT), "long tasks on Spot", (SPOT,)),
        (times(TOO_LONG_S), times(TOO_LONG_S + 60), "task length", ("11 h 01 min", "more than 11 h", "`size`")),
        # Without MIN_TASKS tasks, only the times of all tasks of a stage cause a warning.
        (times(0.01, tasks=MIN_TASKS - 1), times(0.01), "task size", ("10 ms",)),
        (times(0.01, tasks=MIN_TASKS - 1, is_whole=True), times(0.01), "task size", ("10 ms",)),
        (times(50_000, tasks=1), times(50_000, tasks=1, is_whole=True), "task length", ("13 h 53 min",)),
    ],
)
def test_a_limit_has_two_sides(fine: TaskTimes, wrong: TaskTimes, check: str, named: tuple[str, ...]) -> None:
    assert size_warnings([fine]) == []
    (warning,) = size_warnings([wrong])
    assert (warning.check, warning.stage, warning.median_s) == (check, "parse", wrong.median_s)
    assert all(text in str(warning) for text in named), str(warning)
    assert warning.to_json().keys() == {"stage", "check", "title", "figure", "setting", "median_s"}


def test_tasks_of_half_a_day_on_spot_have_two_problems() -> None:
    assert [one.check for one in size_warnings([times(TOO_LONG_S + 1, spot=SPOT)])] == [
        "long tasks on Spot",
        "task length",
    ]


@pytest.mark.parametrize(
    ("seen", "figures"),
    [
        (times(0.02), of_stage(tiny=900, median_s=0.02)),
        (times(700, spot=SPOT), of_stage(long_on_spot=3, longest_on_spot_s=700.0)),
        (times(TOO_LONG_S + 1), of_stage(too_long=1, longest_s=41_000.0)),
    ],
)
def test_a_warning_and_the_report_name_the_same_setting(seen: TaskTimes, figures: Any) -> None:
    (warning,) = size_warnings([seen])
    (finding,) = [one for one in findings(figures) if one.setting and one.check == warning.check]
    assert finding.title.replace(figures.stages[0].name, "parse") == warning.title
    assert finding.setting == warning.setting
