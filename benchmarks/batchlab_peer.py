"""Adapter that runs batchlab under the benchmark harness, with two instances of one slot each and default settings.

`run.py` copies this file into the harness's folder of adapters. The harness defines the base class `Adapter`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tasks
from adapters.base import Adapter, tree
from workloads import Lost

from batchlab import Grid
from batchlab.adapters.local.processes import living
from batchlab.core.errors import TaskFailed
from batchlab.runtime.home import Home


class Batchlab(Adapter):
    """Adapter for one backend of batchlab, which the setting `backend` names.

    All backends except `local` use the emulator that the harness names.
    """

    def start(self, workers: int = 2, reliable: bool = False, warm: bool = True) -> None:
        """Start a grid with the same durable settings for all workloads."""
        backend = self.kw["backend"]
        if backend != "local":
            os.environ["BATCHLAB_ENDPOINT"] = self.cfg["aws_endpoint"]
        self.home = Home(Path(self.cfg["work"]) / "grid")
        self.grid = Grid(backend, home=self.home.path, workers=workers, warm=True)
        self.executor = self.grid.executor()
        if warm:
            self.warm_up(workers)

    def map(
        self,
        fn: str,
        args: Sequence[tuple[Any, ...]],
        timeout: float = 240.0,
        on_first: Callable[[], None] | None = None,
    ) -> list[Any]:
        results: list[Any] = []
        for value in self.grid.starmap(tasks.FUNCS[fn], args, return_exceptions=True):
            if on_first and not results:
                on_first()
            results.append(Lost(str(value)) if isinstance(value, TaskFailed) else value)
        return results

    def call(self, fn: str, args: tuple[Any, ...]) -> Any:
        return self.executor.submit(tasks.FUNCS[fn], *args).result()

    def node_pids(self, pid: int) -> list[int]:
        """Return the ids of the worker process above `pid` and of all child processes of the worker."""
        workers = set(living(self.home.fleet).values())
        while pid not in workers:
            pid = _parent(pid)
        return list(tree(pid))

    def stop(self) -> None:
        self.executor.shutdown()
        self.grid.close()


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
