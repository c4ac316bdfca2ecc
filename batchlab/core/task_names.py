"""Names of tasks: `parse/3` for one, and `parse/3,7-9` for several of a stage.

Invariant: names that are written here can be read here. Only this module combines a stage and an
index.
"""

from __future__ import annotations

import re

from batchlab.core.errors import UsageError
from batchlab.core.model import StageName

_TASK = re.compile(r"(?:(?P<stage>[^/]+)/)?(?P<index>[0-9]{1,15})")
_RANGE = re.compile(r"([0-9]{1,15})(?:-([0-9]{1,15}))?")


def task_name(stage: str, task: int) -> str:
    """Return a task's name, such as `parse/3`."""
    return f"{stage}/{task}"


def attempt_name(stage: str, task: int, attempt: int) -> str:
    """Return an attempt's name, such as `parse/3#2`. The first attempt has the name of its task."""
    return task_name(stage, task) + (f"#{attempt}" if attempt > 1 else "")


def with_task(reason: str, stage: str, task: int, why: str) -> str:
    """Return a job's `reason` with a task's own: `1 task failed; task parse/3: ValueError: bad`."""
    return f"{reason}; task {task_name(stage, task)}: {why}"


def without_task(reason: str, stage: str, task: int, why: str) -> str:
    """Return the reason that was passed to `with_task` with this task."""
    return reason.removesuffix(with_task("", stage, task, why))


def parse_task(text: str) -> tuple[StageName | None, int]:
    """Return stage and index of `parse/3`, or None and the index of `3`.

    Raise UsageError if the text is not such a name.
    """
    found = _TASK.fullmatch(text.strip())
    if found is None:
        raise UsageError(
            f"{text!r} names no task.", remedy="Write the stage and the index, such as parse/3."
        )
    return StageName(found["stage"]) if found["stage"] else None, int(found["index"])


def parse_tasks(text: str) -> tuple[StageName, list[tuple[int, int]]]:
    """Return stage and ranges [first, last + 1) of `parse/3,7-9`.

    Raise UsageError if the text is not such a name.
    """
    stage, _, ranges = text.strip().rpartition("/")
    found: list[tuple[int, int]] = []
    for one in ranges.split(","):
        match = _RANGE.fullmatch(one.strip())
        first = int(match[1]) if match else 0
        last = int(match[2] or match[1]) if match else -1
        if not stage or "/" in stage or last < first:
            raise UsageError(f"{text!r} names no tasks.", remedy="Write for example parse/3,7-9.")
        found.append((first, last + 1))
    return StageName(stage), found
