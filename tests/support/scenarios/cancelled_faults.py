"""Faults that a test cancels at each wait, and a manager for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass, field
from typing import Any, cast

from batchlab.client.http import Client
from batchlab.scenarios.faults.target_grid import FaultResult, NothingHit
from tests.scenarios.test_fault_table import grid, instance

CALL_S = 0.002
"""The duration of a simulated call in its thread before the call has its effect. A coroutine that is canceled meanwhile
ends before that."""


class Manager(Client):
    """A manager of a grid with two instances and one job. Each look at the grid reports another leader. `rebuilds`
    counts the calls of `rebuild`."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.rebuilds = 0
        self.looks = 0
        self.closed = False

    def grid(self) -> Any:
        self.looks += 1
        found = grid(a=[instance(name, "InService", 1.0) for name in self.names])
        return {**found, "owner": f"manager-{self.looks}"}

    def jobs(self, *, before: str | None = None, **_: object) -> list[Any]:
        return [] if before else [{"id": "j-1"}]

    def rebuild(self) -> int:
        time.sleep(CALL_S)
        self.rebuilds += 1
        return 3

    def close(self) -> None:
        self.closed = True


@dataclass
class Steps:
    """A runner of a fault that cancels the fault at its wait number `at`."""

    at: int
    waits: int = 0
    cancelled: bool = field(default=False, init=False)

    async def run(self, doing: Coroutine[Any, Any, FaultResult]) -> FaultResult | None:
        try:
            return await _Counted(doing, self)
        except asyncio.CancelledError:
            return None

    def waiting(self) -> None:
        self.waits += 1
        if self.waits == self.at:
            task = asyncio.current_task()
            assert task
            self.cancelled = True
            task.cancel()


class _Counted(Awaitable[FaultResult]):
    """A wrapper of a coroutine that reports each wait of the coroutine."""

    def __init__(self, doing: Coroutine[Any, Any, FaultResult], steps: Steps) -> None:
        self._doing = doing
        self._steps = steps

    def __await__(self) -> Generator[Any, Any, FaultResult]:
        inner = self._doing.__await__()
        told: Callable[[], Any] = lambda: next(inner)  # noqa: E731 - one of two
        while True:
            try:
                waited_for = told()
            except StopIteration as end:
                return cast("FaultResult", end.value)
            self._steps.waiting()
            try:
                yield waited_for
            except BaseException as error:  # noqa: BLE001 - handed on
                told = _thrown(inner, error)
            else:
                told = lambda: next(inner)  # noqa: E731 - one of two


def _thrown(inner: Generator[Any, Any, Any], error: BaseException) -> Callable[[], Any]:
    return lambda: inner.throw(error)


def at_every_wait(world: Callable[[], Any], harm: Callable[[Any], Coroutine[Any, Any, FaultResult]]) -> int:
    """Run a fault repeatedly in a fresh world, canceled at its first wait, its second, and so on. No damage may remain
    after any run. Return the number of waits of the fault."""
    at = 1
    while True:
        there, steps = world(), Steps(at)

        why = ""
        try:
            seen = asyncio.run(steps.run(harm(there)))
        except NothingHit as error:
            seen, why = None, error.message
        assert there.stands() == [], f"cancelled at its wait number {at}"
        if not steps.cancelled:
            # No client calls the services in this test, so the fault may find nothing to hit.
            assert (seen and seen.evidence) or "there were none" in why, (seen, why)
            return at
        at += 1
