"""A grid with work, faults that a test injects, and a check of the results."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from batchlab.core.errors import BackendError
from batchlab.scenarios.faults.fault_injection import FaultInjector, injector_for
from batchlab.scenarios.faults.proxy import FaultProxy
from batchlab.scenarios.model.values import Fault, FaultName
from batchlab.scenarios.record import InjectedFault
from tests.support.grid.local_grid import LocalGrid
from tests.support.waiting import until

T = TypeVar("T")

WORK = """\
import time

def triple(item):
    time.sleep({seconds})
    return item * 3

def total(values):
    return sum(values)
"""
JOB = """\
name: harm
input: {files: items.jsonl, split: items}
stages:
  - {name: triple, python: work:triple, retry: 3, bundle: 1}
  - {name: total, python: work:total, gather: all, retry: 3}
"""


def number(pattern: str, seen: InjectedFault) -> float:
    """Return the number that a pattern finds in the evidence of a fault."""
    found = re.search(pattern, seen.evidence)
    assert found, seen
    return float(found[1])


def numbers(text: str) -> list[int]:
    """Return all whole numbers in a text, in order."""
    return [int(one) for one in re.findall(r"(?<![\d.])\d+(?![\d.])", text)]


@dataclass
class Work:
    """A job with a known result. `hurt` injects a fault into the job's grid."""

    grid: LocalGrid
    front: FaultProxy | None
    job: str

    def injecting(self, do: Callable[[FaultInjector], Coroutine[Any, Any, T]]) -> T:
        async def run() -> T:
            grid = self.grid
            injector = injector_for(
                backend=grid.backend,
                home=grid.home,
                client=grid.client,
                pools=grid.pools,
                parent=True,
                front=self.front,
            )
            try:
                return await do(injector)
            finally:
                await injector.close()

        return asyncio.run(run())

    def hurt(self, name: FaultName, **more: Any) -> InjectedFault:
        seen = self.injecting(lambda injector: injector.inject(Fault(name, 0.0, **more), 0.0))
        print(f"{self.grid.backend.name}, {name}: {seen.impossible or seen.evidence}")
        return seen


@dataclass
class Bench:
    """A grid that several tests inject faults into."""

    grid: LocalGrid
    folder: Path
    front: FaultProxy | None = None
    numbers: Iterator[int] = field(default_factory=count)

    @contextmanager
    def work(
        self, tasks: int, seconds: float, *, up: int = 2, is_begun: bool = True, within_s: float = 90.0
    ) -> Iterator[Work]:
        """Submit a job once `up` instances are in service, and with `is_begun` wait for the first result. On exit, the
        job must succeed with correct results."""
        folder = self.folder / f"job-{next(self.numbers)}"
        folder.mkdir()
        (folder / "work.py").write_text(WORK.format(seconds=seconds))
        (folder / "items.jsonl").write_text("".join(f"{i}\n" for i in range(tasks)))
        (folder / "job.yaml").write_text(JOB)
        until(lambda: len(self.in_service()) >= up, within_s)
        job = self.grid.submit(folder / "job.yaml", token=folder.name)["id"]
        if is_begun:
            until(lambda: self.succeeded(job) > 0, within_s)
        yield Work(self.grid, self.front, job)
        view = self.grid.wait(job, within_s=within_s)
        assert view["state"] == "SUCCEEDED", view
        results = self.grid.results(view, folder / "out")
        assert results["total"] == [3 * sum(range(tasks))]

    def in_service(self) -> list[str]:
        try:
            pools = self.grid.client.grid()["pools"]
        except BackendError:  # the last fault has closed the connections
            return []
        return [one["id"] for pool in pools for one in pool["instances"] if one["state"] == "InService"]

    def succeeded(self, job: str) -> int:
        """Return the number of succeeded tasks in the job's first stage."""
        return self.grid.client.job(job)["stages"][0]["succeeded"]
