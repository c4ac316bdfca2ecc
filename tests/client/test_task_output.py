"""Output of tasks and progress of a map in the calling program."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, cast

from batchlab.client import task_output
from batchlab.client.grid_link import Link
from batchlab.client.task_output import MAX_SHOWN_BYTES, Progress
from batchlab.core.errors import NotFound
from batchlab.core.model import Bundle, JobId, Outcome, StageName, TaskSet

T = TypeVar("T")


class FakeLink:
    """A link whose bucket has one log."""

    def __init__(self, log: bytes | None) -> None:
        self.log = log
        self.objects = self

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        if self.log is None:
            raise NotFound(f"There is no object {key}.")
        return self.log[start:stop]

    async def patience(self, call: Callable[[], Awaitable[T]]) -> T:
        return await call()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(coroutine)


def shown(log: bytes | None, *spans: tuple[int, int, int]) -> str:
    tasks = TaskSet.span(0, 3)
    bundle = Bundle(JobId("job-1"), StageName("map"), tasks)
    outcome = Outcome(bundle, "e", "w", 0.0, 1.0, log="logs/job-1/x", log_spans=spans)
    stream = io.StringIO()
    task_output.show(cast(Link, FakeLink(log)), outcome, stream)
    return stream.getvalue()


def test_each_line_has_the_name_of_its_task() -> None:
    assert shown(b"----one\ntwo\nthree", (2, 12, 17), (0, 4, 12)) == "[map/0] one\n[map/0] two\n[map/2] three\n"


def test_no_output_reads_nothing() -> None:
    assert shown(None) == ""


def test_output_of_a_worker_is_escaped() -> None:
    assert shown(b"a\x1b[2J\xff\r\n", (1, 0, 8)) == "[map/1] a\\x1b[2J?\n"


def test_long_output_is_cut() -> None:
    text = shown(b"x" * (2 * MAX_SHOWN_BYTES), (0, 0, 2 * MAX_SHOWN_BYTES))
    assert len(text) < MAX_SHOWN_BYTES + 200
    assert text.endswith("[...] Further output is in the log of job job-1.\n")


def test_lost_output_is_reported() -> None:
    assert shown(None, (0, 0, 5)).endswith("cannot be read: There is no object logs/job-1/x.\n")


def test_progress_is_one_line() -> None:
    stream = io.StringIO()
    progress = Progress("sum", 20, stream)
    for ended in (0, 5, 5, 20):
        progress.update(ended)
    progress.close()
    assert stream.getvalue() == "\rsum: 0 of 20 tasks\rsum: 5 of 20 tasks\rsum: 20 of 20 tasks\n"
