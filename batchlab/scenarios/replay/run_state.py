"""State of a replay, its connection to the manager, and samples of the grid.

A replay does not start or stop a manager. Requests to an absent manager wait, because a fault may have stopped the
manager.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import methodcaller
from typing import TypeVar

from batchlab.client.http import Client
from batchlab.core.api_types import ActivityView, GridView, InstanceView, JobView, PoolView
from batchlab.core.errors import BackendError, NotFound, Unreachable
from batchlab.core.model import ENDED, LifecycleState, Market
from batchlab.core.protocol import object_keys
from batchlab.runtime.home import Home
from batchlab.scenarios.model.values import Job, Scenario
from batchlab.scenarios.record import InjectedFault, InstanceRun, JobRun, PoolSample, Sample
from batchlab.scenarios.replay.measurements import ObservedJob

RUN_ENDED = "the run was over before"
"""Reason why a fault was not injected."""


@dataclass(frozen=True, slots=True)
class ReplayProgress:
    """Progress of a replay, with numbers of jobs in each state.

    `bad` is the number of jobs that ended without success. `late_s` is the longest delay of a submission, `left_s` is
    an estimate of the remaining time, and `doing` lists the current faults.
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
    """State of one run of a replay.

    `begun_s` is the start of the run in epoch time, and `begun_at_s` is the start by the event loop's clock. `running`
    has the submitted jobs by id. `cut` has the reason for an early end of the run.
    """

    scenario: Scenario
    seed: int
    jobs: Sequence[Job]
    begun_s: float = 0.0
    begun_at_s: float = 0.0
    running: dict[str, SubmittedJob] = field(default_factory=dict)
    refused: dict[str, JobRun] = field(default_factory=dict)
    """Jobs whose submission was refused because of a failed dependency, by the id of the job on the grid."""
    injected: list[InjectedFault] = field(default_factory=list)
    breaking: list[str] = field(default_factory=list)
    cut: str = ""
    took_s: float = 0.0

    def begin(self, now_s: float) -> None:
        """Set the start of the run to `now_s`, the current epoch time."""
        self.begun_s, self.begun_at_s = now_s, asyncio.get_running_loop().time()

    def at_s(self) -> float:
        """Return the seconds since the start of the run."""
        return asyncio.get_running_loop().time() - self.begun_at_s

    async def until(self, at_s: float) -> None:
        """Wait until second `at_s` of the run."""
        await asyncio.sleep(max(0.0, at_s - self.at_s()))

    @property
    def open(self) -> list[str]:
        """Return the ids of the unfinished jobs."""
        return [name for name, job in self.running.items() if not job.has_ended]

    @property
    def is_over(self) -> bool:
        return len(self.running) + len(self.refused) == len(self.jobs) and not self.open

    def observed_jobs(self) -> list[ObservedJob]:
        return [ObservedJob(job.due.template.name, job.view, job.due) for job in self.running.values()]

    def progress(self, sample: Sample | None) -> ReplayProgress:
        ended = [job for job in self.running.values() if job.has_ended]
        return ReplayProgress(
            self.at_s(),
            len(self.jobs),
            len(self.running) + len(self.refused),
            len(ended) + len(self.refused),
            sum(job.view["state"] != "SUCCEEDED" for job in ended) + len(self.refused),
            max((job.at_s - job.due.due_s for job in self.running.values()), default=0.0),
            self._rest_s(sample),
            sample,
            tuple(self.breaking),
        )

    def _rest_s(self, sample: Sample | None) -> float:
        """Estimate the time until the last arrival and the end of the backlog with the current fleet."""
        arrivals_s = self.jobs[-1].due_s - self.at_s() if self.jobs else 0.0
        slots = {plan.pool.name: plan.pool.slots for plan in self.scenario.pools}
        works_s = (
            pool.backlog_s / (max(1, pool.in_service, pool.desired) * slots.get(name, 1))
            for name, pool in (sample.pools.items() if sample else ())
        )
        return max(0.0, arrivals_s, *works_s)


T = TypeVar("T")

RETRY_INTERVAL_S = 0.25
MAX_REQUESTS = 12
"""Maximum number of parallel requests to the manager."""


class ManagerConnection:
    """Connection to the manager of one home. After a restart, the connection reads the manager's new address from the
    home.
    """

    def __init__(self, home: Home, *, away_s: float) -> None:
        """Create a connection. Each call waits up to `away_s` seconds for an absent manager."""
        self._home = home
        self._away_s = away_s
        self.unanswered = 0
        """Number of calls that were repeated because the manager was absent."""
        self._client: Client | None = None
        # The connection has its own threads, so that waiting calls do not block fault injection.
        self._threads = ThreadPoolExecutor(MAX_REQUESTS, "replay")

    async def call(self, request: Callable[[Client], T], *, within_s: float | None = None) -> T:
        """Call the manager and return the manager's answer.

        Raise Unreachable or BackendError if the manager is absent for too long. Raise the manager's refusals (NotFound,
        Refused, UsageError) at once.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + (self._away_s if within_s is None else within_s)
        while True:
            try:
                return await loop.run_in_executor(self._threads, self._request, request)
            except NotFound:
                raise
            except BackendError:
                if loop.time() > deadline_s:
                    raise
            self.unanswered += 1
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def try_call(self, request: Callable[[Client], T]) -> T | None:
        """Call the manager once. Return None if the manager does not answer."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._request, request)
        except BackendError:
            return None

    def _request(self, request: Callable[[Client], T]) -> T:
        record = self._home.record()
        if record is None:
            raise Unreachable(
                f"The manager of the grid in {self._home.path} has ended.",
                remedy=f"Its log is {self._home.manager_log}.",
            )
        if self._client is None or self._client.url != record.url:
            self._close_client()
            self._client = Client.of(self._home, record)
        return request(self._client)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._close_client()

    def _close_client(self) -> None:
        if self._client:
            self._client.close()
        self._client = None


SAMPLE_INTERVAL_S = 1.0
MAX_ACTIVITIES = 1000
_IN_SERVICE = LifecycleState.IN_SERVICE.value
_PENDING = ("Pending", "Pending:Wait", "Pending:Proceed")
_LAUNCH = re.compile(r"Launching a new (?:EC2 )?instance: (\S+)")
_END = re.compile(r"Terminating (?:EC2 )?instance: (\S+)")


@dataclass(slots=True)
class _InstanceHistory:
    """Observed times of one instance, as epoch times of the manager's clock."""

    view: InstanceView
    pool: str
    ready_s: float | None = None
    ended_s: float | None = None


class GridSampler:
    """Samples of a grid since the call of `begin`."""

    def __init__(self, link: ManagerConnection) -> None:
        self.samples: list[Sample] = []
        self.grid: GridView | None = None
        """Latest view of the grid."""
        self._link = link
        self._begun_s = 0.0
        self._lives: dict[str, _InstanceHistory] = {}
        self._activities: dict[tuple[str, int], ActivityView] = {}

    @property
    def last(self) -> Sample | None:
        """Return the latest sample."""
        return self.samples[-1] if self.samples else None

    def begin(self, begun_s: float) -> None:
        self._begun_s = begun_s

    async def has_in_service(self, sizes: Mapping[str, int]) -> bool:
        """Return whether each pool has the number of instances in service that `sizes` requires."""
        grid = await self._link.try_call(Client.grid)
        numbers = {pool["name"]: _pool_sample(pool).in_service for pool in grid["pools"]} if grid else {}
        return all(numbers.get(name, -1) >= size for name, size in sizes.items())

    def is_down_to(self, sizes: Mapping[str, int]) -> bool:
        """Return whether each pool in the latest view has the size in `sizes` and does not have terminating
        instances.
        """
        if self.last is None or self.grid is None:
            return False
        ended = LifecycleState.TERMINATED.value
        alive = {
            pool["name"]: sum(instance["state"] != ended for instance in pool["instances"])
            for pool in self.grid["pools"]
        }
        pools = self.last.pools
        return all(
            alive.get(name, 0) <= size and pools[name].desired <= size for name, size in sizes.items() if name in pools
        )

    async def sample(self, now_s: float) -> None:
        """Take a sample of the grid at the epoch time `now_s`. If the manager does not answer, skip the sample."""
        grid = await self._link.try_call(Client.grid)
        if grid is None:
            return
        self.grid = grid
        tasks = {object_keys.tasks_queue(pool["name"]) for pool in grid["pools"]}
        queues = [queue for queue in grid["queues"] if queue["name"] in tasks]
        self.samples.append(
            Sample(
                now_s - self._begun_s,
                {pool["name"]: _pool_sample(pool) for pool in grid["pools"]},
                sum(queue["visible"] + queue["delayed"] for queue in queues),
                sum(queue["in_flight"] for queue in queues),
            )
        )
        seen = set()
        for pool in grid["pools"]:
            for instance in pool["instances"]:
                seen.add(instance["id"])
                self._record(pool["name"], instance, now_s)
        for name, life in self._lives.items():
            if name not in seen and life.ended_s is None:
                life.ended_s = now_s

    def _record(self, pool: str, view: InstanceView, now_s: float) -> None:
        life = self._lives.setdefault(view["id"], _InstanceHistory(view, pool))
        life.view = view
        if view["state"] != LifecycleState.TERMINATED.value:
            # An instance may be missing in a single view, for example during a change of the leader.
            life.ended_s = None
        elif life.ended_s is None:
            life.ended_s = now_s
        if view["state"] == _IN_SERVICE and life.ready_s is None:
            life.ready_s = now_s

    async def read_activities(self) -> None:
        """Read the available scaling activities of all pools."""
        for pool in self.grid["pools"] if self.grid else ():
            read = methodcaller("activities", pool=pool["name"], limit=MAX_ACTIVITIES)
            for activity in await self._link.try_call(read) or ():
                self._activities[activity["pool"], activity["id"]] = activity

    def instances(self) -> tuple[InstanceRun, ...]:
        """Return every instance of the run, sorted by launch.

        An instance that was launched before the run counts from the start of the run.
        """
        ready, ended = self._times(_LAUNCH), self._times(_END)
        runs = []
        for name, life in self._lives.items():
            view, ended_s = life.view, life.ended_s
            if ended_s is not None:
                ended_s = min(ended_s, ended.get(name, ended_s))
                if ended_s < self._begun_s:
                    continue
            ready_s = self._run_time(ready.get(name, life.ready_s))
            runs.append(
                InstanceRun(
                    name,
                    life.pool,
                    view["type"],
                    view["market"],
                    view["zone"],
                    max(0.0, view["launched_s"] - self._begun_s),
                    None if ready_s is None else max(0.0, ready_s),
                    self._run_time(ended_s),
                    view["note"],
                )
            )
        return tuple(sorted([*runs, *self._unseen(ended)], key=lambda run: run.launched_s))

    def _run_time(self, at_s: float | None) -> float | None:
        return None if at_s is None else at_s - self._begun_s

    def _unseen(self, ended: Mapping[str, float]) -> Iterator[InstanceRun]:
        """Yield the instances that existed only between two samples, according to the scaling activities."""
        for activity in self._activities.values():
            launch = _LAUNCH.match(activity["description"])
            if launch and launch[1] not in self._lives and activity["at_s"] >= self._begun_s:
                launched_s = activity["at_s"] - self._begun_s
                ready_s, ended_s = self._run_time(activity["ended_s"]), self._run_time(ended.get(launch[1]))
                market = Market.ON_DEMAND.value
                yield InstanceRun(launch[1], activity["pool"], "", market, "", launched_s, ready_s, ended_s)

    def _times(self, what: re.Pattern[str]) -> dict[str, float]:
        times: dict[str, float] = {}
        for activity in self._activities.values():
            match = what.match(activity["description"])
            if match and activity["ended_s"] is not None and activity["status"] == "Successful":
                times[match[1]] = activity["ended_s"]
        return times


def _pool_sample(pool: PoolView) -> PoolSample:
    states: Sequence[str] = [instance["state"] for instance in pool["instances"]]
    in_service, pending = states.count(_IN_SERVICE), sum(state in _PENDING for state in states)
    return PoolSample(pool["desired"], in_service, pending, pool["backlog_tasks"], pool["backlog_s"])
