"""Prefect with a server on PostgreSQL, which stores the state of each task. The results are files in local storage.

With the option `background`, the server queues the tasks, and task workers with one slot each run them. Otherwise, a
flow in the driver runs the tasks in threads, which is Prefect's default and has less overhead. If the process of a flow
ends, a repeated flow can skip the tasks with stored results, but Prefect does not repeat the flow by itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

from benchmarks.peers.config import load

CONFIG = load()
# Prefect reads its settings while it is imported.
os.environ |= {
    "PREFECT_API_URL": CONFIG.urls["prefect"],
    "PREFECT_HOME": str(CONFIG.folder / "prefect"),
    "PREFECT_LOGGING_LEVEL": "ERROR",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
}

import prefect  # noqa: E402
from prefect.task_runners import ThreadPoolTaskRunner  # noqa: E402
from prefect.task_worker import serve  # noqa: E402

from benchmarks.peers import tasks  # noqa: E402
from benchmarks.peers.adapters.base import Call, NodeAdapter, OnFirst, collect, ignore  # noqa: E402

SUBMITTERS = 8
"""Threads that submit background tasks, because each submission is a request to the server."""


@prefect.task(retries=3, persist_result=True, cache_policy=prefect.cache_policies.NO_CACHE)
def call(task: str, arguments: list[Any]) -> Any:
    return tasks.call(task, arguments)


@prefect.flow(task_runner=ThreadPoolTaskRunner(max_workers=CONFIG.workers), validate_parameters=False)
def job(task: str, calls: list[list[Any]], timeout_s: float, on_first: OnFirst) -> list[Any]:
    return _collect([call.submit(task, arguments) for arguments in calls], timeout_s, on_first)


def _collect(futures: Sequence[Any], timeout_s: float, on_first: OnFirst) -> list[Any]:
    return collect(futures, lambda future, seconds: future.result(timeout=seconds), timeout_s, on_first)


class Adapter(NodeAdapter):
    """Adapter of Prefect."""

    one_slot = True

    def start(self) -> None:
        self._background = self.config.options["background"]
        if self._background:
            self.start_nodes()

    def node(self, number: int, slots: int) -> list[str]:
        return ["-m", __name__]

    def map(self, task: str, calls: Sequence[Call], timeout_s: float, on_first: OnFirst = ignore) -> list[Any]:
        lists = [list(arguments) for arguments in calls]
        if not self._background:
            return list(job(task, lists, timeout_s, on_first))
        with ThreadPoolExecutor(SUBMITTERS) as submitters:
            futures = list(submitters.map(call.delay, repeat(task), lists))
        return _collect(futures, timeout_s, on_first)

    def call(self, task: str, arguments: Call) -> Any:
        future = call.delay(task, list(arguments)) if self._background else None
        return future.result(timeout=60) if future else call(task, list(arguments))


if __name__ == "__main__":
    serve(call, limit=1)
