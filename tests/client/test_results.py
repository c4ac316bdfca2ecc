"""The return of results: when the client requests them, and the error for a missing result."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import cast

from batchlab.adapters.memory.objects import SimObjects
from batchlab.client.grid_link import Link
from batchlab.client.results import GAP_S, decode_all, gap_s
from batchlab.core.errors import TaskFailed
from batchlab.core.model import JobId, Json
from batchlab.core.protocol.bundle_inputs import JobObjects


class FakeLink:
    """A link to an empty bucket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects = SimObjects()
        self.files = None
        self.run = asyncio.run


def told(folder: Path, encoded: Json) -> TaskFailed:
    own = JobObjects(JobId("sums-1"), is_python=True)
    (value,) = decode_all(cast(Link, FakeLink(folder)), "sums-1", "parse", [3], [encoded], own)
    assert isinstance(value, TaskFailed)
    assert value.task == 3
    return value


def test_unreadable_result_names_its_task(tmp_path: Path) -> None:
    found = told(tmp_path, {"$pickle": "bm90IGEgcGlja2xl"})
    assert str(found).startswith("The result of task parse/3 cannot be read here: ")
    assert found.__cause__


def test_missing_result_names_its_task(tmp_path: Path) -> None:
    gone = {"$file": "jobs/sums-1/files/x", "name": "x", "size": 1, "origin": ""}
    assert str(told(tmp_path, gone)).startswith("The result of task parse/3 cannot be fetched: ")


def test_questions_are_as_rare_as_their_answers_may_be_late() -> None:
    assert gap_s(0.0) == 0.0
    assert gap_s(1.0) == 0.1
    assert gap_s(3600.0) == GAP_S
    assert gap_s(3600.0, most_s=0.05) == 0.05


def test_last_results_are_requested_without_delay() -> None:
    """The gap is also a tenth of the estimated remaining time. In this test, one of 200 tasks of 0.1 s is left."""
    assert gap_s(20.0, 1 / 199) == 0.1 * 20.0 / 199
    assert gap_s(20.0, 0.0) == 0.0
    assert gap_s(1.0, math.inf) == gap_s(1.0)
