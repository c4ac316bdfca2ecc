"""The format of a task's name, and its parser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import batchlab
from batchlab.core.errors import UsageError
from batchlab.core.job_definition import attempt_name, parse_task, parse_tasks, task_name

PACKAGE = Path(batchlab.__file__).parent
TASK = r"\{(\w+\.)*(\w+\[['\"])?task(['\"]\])?\}"
OTHERWISE = re.compile(rf"\}}[\[/: ]{TASK}|task {TASK} of ", re.IGNORECASE)
PLACES = {"sim/tasks.py", "jobs/results.py", "client/debug/task_folder.py", "worker/task_executor.py"}
"""Files with folder names and seeds, which are not names for a person."""


def test_task_names_round_trip() -> None:
    assert parse_task(task_name("parse", 3)) == ("parse", 3)
    assert parse_task(" 3 ") == (None, 3)
    assert attempt_name("parse", 3, 1) == task_name("parse", 3) == "parse/3"
    assert attempt_name("parse", 3, 2) == "parse/3#2"
    assert parse_tasks("parse/3,7-9") == ("parse", [(3, 4), (7, 10)])


@pytest.mark.parametrize("text", ["", "parse", "parse/", "/3", "parse[3]", "parse:3", "parse/-3", "parse/3/4", "a/²"])
def test_invalid_task_name_is_refused_in_both_forms(text: str) -> None:
    with pytest.raises(UsageError, match="is not the name of a task"):
        parse_task(text)
    with pytest.raises(UsageError, match="is not a list of tasks"):
        parse_tasks(text)


@pytest.mark.parametrize("text", ["3", "parse/9-7", "parse/1,,2", "parse/1-", "parse/x"])
def test_invalid_range_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a list of tasks"):
        parse_tasks(text)


def test_no_other_place_spells_a_task() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if OTHERWISE.search(path.read_text())
    }
    assert found - PLACES == {"core/job_definition.py"}
