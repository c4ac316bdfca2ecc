"""State of a replay, and its connection to the manager.

Nothing here starts or ends a manager. An absent manager is waited for, because the scenario may
have stopped it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from batchlab.client.http import Client
from batchlab.core.api_types import JobView
from batchlab.core.errors import BackendError, NotFound, Unreachable
from batchlab.core.model import ENDED
from batchlab.runtime.home import Home
from batchlab.scenarios.model.values import Job, Scenario
from batchlab.scenarios.record import InjectedFault, Sample
from batchlab.scenarios.replay.measurements import ObservedJob

RUN_ENDED = "the run was over before"
"""Reason why a fault was not injected."""


@dataclass(frozen=True, slots=True)
class ReplayProgress:
    """Progress of a replay: numbers of jobs.

    `bad` jobs ended without success. `late_s` is the longest delay of a submission, `left_s` an
    estimate of the remaining time, and `doing` lists the current faults.
    """

    at_s: float
    jobs: int
    submitted: int
    ended: int
    bad: int
    late_s: float
    left_s: float
    sample: Sample | None
    doing: tuple[str, ...] = ()


@dataclass(slots=True)
class SubmittedJob:
    """Job that was submitted at `at_s` of the run."""

    due: Job
    at_s: float
    view: JobView

    @property
    def has_ended(self) -> bool:
        return self.view["state"] in ENDED


@dataclass(slots=True)
class RunState:
    """State of a run. `begun_s` is its start (epoch), and `begun_at_s` the same by the event loop's
    clock. `running` has the submitted jobs by id. `cut` has the reason for an early end.
    """

    scenario: Scenario
    seed: int
    jobs: Sequence[Job]
    begun_s: float = 0.0
    begun_at_s: float = 0.0
    running: dict[str, SubmittedJob] = field(default_factory=dict)
    injected: list[InjectedFault] = field(default_factory=list)
    breaking: list[str] = field(default_factory=list)
    cut: str = ""
    took_s: float = 0.0

    def begin(self, now_s: float) -> None:
        """Start the run. `now_s` is the current epoch time."""
        self.begun_s, self.begun_at_s = now_s, asyncio.get_running_loop().time()

    def at_s(self) -> float:
        """Return the seconds since the start of the run."""
        return asyncio.get_running_loop().time() - self.begun_at_s

    async def until(self, at_s: float) -> None:
        """Wait until this second of the run."""
        await asyncio.sleep(max(0.0, at_s - self.at_s()))

    @property
    def open(self) -> list[str]:
        """Return the ids of the unfinished jobs."""
        return [name for name, one in self.running.items() if not one.has_ended]

    @property
    def is_over(self) -> bool:
        return len(self.running) == len(self.jobs) and not self.open

    def told(self) -> list[ObservedJob]:
        return [
            ObservedJob(one.due.template.name, one.view, one.due) for one in self.running.values()
        ]

    def state(self, sample: Sample | None) -> ReplayProgress:
        """Return the progress."""
        ended = [one for one in self.running.values() if one.has_ended]
        return ReplayProgress(
            self.at_s(),
            len(self.jobs),
            len(self.running),
            len(ended),
            sum(one.view["state"] != "SUCCEEDED" for one in ended),
            max((one.at_s - one.due.due_s for one in self.running.values()), default=0.0),
            self._left_s(sample),
            sample,
            tuple(self.breaking),
        )

    def _left_s(self, sample: Sample | None) -> float:
        """Estimate the time until the last arrival and the end of the backlog with the current
        fleet.
        """
        arrivals_s = self.jobs[-1].due_s - self.at_s() if self.jobs else 0.0
        slots = {plan.pool.name: plan.pool.slots for plan in self.scenario.pools}
        works_s = (
            pool.backlog_s / (max(1, pool.in_service, pool.desired) * slots.get(name, 1))
            for name, pool in (sample.pools.items() if sample else ())
        )
        return max(0.0, arrivals_s, *works_s)


T = TypeVar("T")

AGAIN_S = 0.25
AT_ONCE = 12
"""Maximum number of parallel requests."""


class ManagerConnection:
    """Calls of the manager of one home.

    The home's record names the address of a restarted manager.
    """

    def __init__(self, home: Home, *, away_s: float) -> None:
        """Create a connection. Each call waits up to `away_s` for an absent manager."""
        self._home = home
        self._away_s = away_s
        self.unanswered = 0
        """Number of repeated calls to an absent manager."""
        self._client: Client | None = None
        # Its own threads, so that waiting calls do not block fault injection.
        self._threads = ThreadPoolExecutor(AT_ONCE, "replay")

    async def call(self, ask: Callable[[Client], T], *, within_s: float | None = None) -> T:
        """Call the manager and return its answer.

        Raise Unreachable or BackendError if it is absent for too long, and its refusals (NotFound,
        Refused, UsageError) at once.
        """
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + (self._away_s if within_s is None else within_s)
        while True:
            try:
                return await loop.run_in_executor(self._threads, self._asked, ask)
            except NotFound:
                raise
            except BackendError:
                if loop.time() > give_up_s:
                    raise
            self.unanswered += 1
            await asyncio.sleep(AGAIN_S)

    async def glance(self, ask: Callable[[Client], T]) -> T | None:
        """Call the manager once. Return None if it does not answer."""
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._asked, ask)
        except BackendError:
            return None

    def _asked(self, ask: Callable[[Client], T]) -> T:
        record = self._home.record()
        if record is None:
            raise Unreachable(
                f"The manager of the grid in {self._home.path} has ended.",
                remedy=f"Its log is {self._home.manager_log}.",
            )
        client = self._client
        if client is None or client.url != record.url:
            self._let_go()
            client = self._client = Client.of(self._home, record)
        return ask(client)

    def close(self) -> None:
        """Close the connection."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._let_go()

    def _let_go(self) -> None:
        if self._client:
            self._client.close()
        self._client = None
