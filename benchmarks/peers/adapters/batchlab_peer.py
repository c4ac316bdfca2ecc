"""batchlab, with two instances of one slot each and default settings, which are durable."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from batchlab import Grid
from batchlab.adapters.local.processes import living
from batchlab.core.errors import TaskFailed
from batchlab.runtime.home import Home
from benchmarks.peers import processes
from benchmarks.peers.adapters.base import BaseAdapter, Call, OnFirst, ignore
from benchmarks.peers.tasks import TASKS
from benchmarks.peers.workloads import Lost


class Adapter(BaseAdapter):
    """Adapter of batchlab, for the backend that the option `backend` names."""

    def start(self) -> None:
        backend = self.config.options["backend"]
        if backend != "local":
            os.environ["BATCHLAB_ENDPOINT"] = self.config.urls["aws"]
        self._home = Home(self.config.folder / "grid")
        self._grid = Grid(backend, home=self._home.path, workers=self.config.workers, warm=True)
        self._executor = self._grid.executor()

    def map(self, task: str, calls: Sequence[Call], timeout_s: float, on_first: OnFirst = ignore) -> list[Any]:
        results: list[Any] = []
        for value in self._grid.starmap(TASKS[task], calls, return_exceptions=True):
            if not results:
                on_first()
            results.append(Lost(str(value)) if isinstance(value, TaskFailed) else value)
        return results

    def call(self, task: str, arguments: Call) -> Any:
        return self._executor.submit(TASKS[task], *arguments).result()

    def node_pids(self, pid: int) -> list[int]:
        workers = set(living(self._home.fleet).values())
        while pid not in workers:
            pid = processes.parent(pid)
        return processes.tree(pid)

    def stop(self) -> None:
        self._executor.shutdown()
        self._grid.close()
