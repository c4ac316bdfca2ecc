"""Users of a world, who submit jobs and make random requests, or who add a schedule and check its runs.

Invariant: each user of a job makes the job's end possible, and waits for the end. The requests of a user are a function
of the seed alone.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

from batchlab.core.direct_calls import Caller
from batchlab.core.errors import Malformed, NotFound, Refused, Unreachable
from batchlab.core.job_definition import InputDef, JobDef, SplitBy, StageDef
from batchlab.core.model import Control, JobId, JobState, Json, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.core.protocol.mended_inputs import TaskInputs
from batchlab.core.retry_rule import RetryRule
from batchlab.core.schedules import MAX_MISSED, Definition, Missed, Overlap, RunState, Schedule, When, token_of
from batchlab.core.users import Role, owner_name
from batchlab.manager.manager import Manager
from batchlab.manager.retry_rounds import TaskSelection, failed_tasks
from batchlab.manager.schedule_commands import ScheduleCommands
from batchlab.manager.stage_plans import PartWriter
from batchlab.sim.actors import RetryRequest, SimulationError, check
from batchlab.sim.audit_checks import UserChange
from batchlab.sim.faults import USER, FaultKind, Faults
from batchlab.sim.plans import Plan
from batchlab.sim.world import World

MAX_REQUESTS = 8
"""Number of times that a user considers making a request."""

PAUSES_S = (0.0, 0.1, 1.0, 5.0, 20.0)
"""Approximate pauses in seconds between the requests of a user."""

POLL_S = 4.0
"""Minimum time in seconds between two reads of a job by a waiting user.

The minimum keeps reads rare, because reads are the largest cost of a simulated user.
"""


PATIENCE_S = 300.0
"""Seconds that a user waits for a job that a lying worker has touched."""

MAX_RETRIES = 3
"""Number of retries that a choosy user requests at the end."""

REPLY_S = (0.02, 1.0, 30.0)
"""Times in seconds for which clients wait for the outcome of a direct call."""

CRASHED_SHARE = 0.2
"""Share of direct calls whose message is not sent after the commit."""

MAX_INLINE_ITEMS = 20
"""Largest number of items that a client sends within the submission."""


def few_items(job: JobDef) -> list[Json] | None:
    """Return the items that are part of a job's submission, or None if the client writes the items separately."""
    return list(range(job.items)) if job.items is not None and job.items <= MAX_INLINE_ITEMS else None


async def bring_items(world: World, job: JobDef) -> None:
    """Write the parts of a plan, as a client does before it submits a job with separate items."""
    patience = Patience(world.rng(f"client/{job.id}"))
    for stage in job.roots():
        writer = PartWriter(world.objects, patience, job.id, stage.name, 0)
        for item in range(job.items or 0):
            await writer.add(item)
        await writer.commit(TaskSet())


class User:
    """The user of one job.

    `pace` stretches the pauses between the user's requests. A choosy user retries only some of the failed tasks, or
    requests two retries at once. With `mends`, a choosy user also gives mended inputs to some of the tasks.
    """

    def __init__(
        self, world: World, job: JobDef, faults: Faults, pace: float, is_choosy: bool = False, *, mends: bool = False
    ) -> None:
        self._mends = mends
        self._world = world
        self._choices = world.rng(f"{USER} {job.id} chooses") if is_choosy else None
        self._job = job
        self._faults = faults
        self._pace = pace
        self._name = f"{USER} {job.id}"
        self._requests: list[asyncio.Task[object]] = []
        self._verbs: dict[FaultKind, Callable[[], asyncio.Task[object]]] = {
            FaultKind.CANCELLED: self._cancel,
            FaultKind.PAUSED: partial(self._ask, "pause"),
            FaultKind.RESUMED: partial(self._ask, "resume"),
            FaultKind.RETRIED: self._retry,
            FaultKind.RESUBMITTED: self._submit,
        }

    async def use(self) -> None:
        """Submit the job, make random requests for the job, and wait for the job's end."""
        rng = self._world.rng(self._name)
        await asyncio.sleep(rng.choice([0.0, 0.0, 3.0, 30.0]))
        if few_items(self._job) is None:
            await bring_items(self._world, self._job)
        await self._wait_for_dependencies()
        if not await self._call_directly() and isinstance(await self._submit(), Refused):
            # A dependency has already failed.
            self._job = replace(self._job, after=())
            await self._submit()
        for _ in range(MAX_REQUESTS):
            await self._make_request()
        for request in self._requests:
            await request
        state = await self._wait_for_end()
        retries = MAX_RETRIES if self._choices else int(rng.random() < 0.5)
        while retries and state is not JobState.SUCCEEDED:
            retries -= 1
            await self._retry()
            state = await self._wait_for_end()

    async def _wait_for_dependencies(self) -> None:
        """Wait until the ledger has the jobs on which the job depends."""
        for dependency in self._job.after:
            while True:
                if await self._world.find(dependency.job):
                    break
                await asyncio.sleep(POLL_S)

    async def _make_request(self) -> None:
        """Make a random request of the user, or do nothing."""
        point = self._faults.next(self._name)
        rng = random.Random(point.pick)  # noqa: S311 - simulation
        await asyncio.sleep(rng.choice(PAUSES_S) * rng.uniform(0.5, 1.5) * self._pace)
        kind = self._faults.due(point, USER)
        if kind is None:
            return
        self._faults.happened(point, kind)
        self._world.note(self._name, kind.value)
        request = self._verbs[kind]()
        self._requests.append(request)
        if rng.random() < 0.7:
            await request

    async def _wait_for_end(self) -> JobState | None:
        """Wait for the end of the job, and return the job's state.

        Return None if the ledger lacks the job because the store has damaged the job.
        """
        waited_s = 0.0
        while True:
            record = await self._world.find(self._job.id)
            if record is not None and record.state.ended:
                return record.state
            if self._job.id in self._world.watch.trust.touched:
                # A lying worker may delay a job whose messages it received, until the job's user cancels the job.
                waited_s += max(POLL_S, self._pace / 10)
                if waited_s > PATIENCE_S * self._pace:
                    is_damaged = self._job.id in self._world.damage.jobs
                    if record is None and is_damaged:
                        return None
                    if not is_damaged or self._has_trouble():
                        waited_s = 0.0
                        await self._cancel()
            if record is not None and record.control is Control.PAUSE:
                await self._ask("resume")
            await asyncio.sleep(max(POLL_S, self._pace / 10))

    def _has_trouble(self) -> bool:
        """Return whether `job why` reports a problem of the job.

        The user does not cancel a job that hangs without a cause, because such a job breaks promise I7.
        """
        manager = self._world.manager
        live = manager.lives.get(self._job.id) if manager else None
        return bool(manager and (manager.quarantine.unreadable(self._job.id) or (live and live.trouble)))

    async def _call_directly(self) -> bool:
        """Begin a single call as a client on the grid's machine does, and tell the manager later.

        Return False if the job must be submitted.
        """
        job, world = self._job, self._world
        if not job.is_single_call or len(job.roots()) != 1 or job.start_at_s is not None:
            return False
        rng = world.rng(f"{self._name} calls")
        caller = Caller(world.objects, world.queue, CommitKeys(world.objects), world.clock)
        try:
            call = await caller.commit(job, few_items(job) or ())
        except NotFound:
            return False  # The first manager has not created the secret of the commit keys.
        if rng.random() < CRASHED_SHARE:
            return False  # The client submits the job again after an error of its first attempt.
        try:
            await caller.send(call)
        except NotFound:
            return False
        world.note(self._name, "calls a worker")
        await asyncio.sleep(rng.choice(REPLY_S))
        if await world.objects.head(object_keys.outcome(call.bundle, call.key)):
            await self._start(lambda m: m.job_commands.add_calls([job.id]), "report")
        else:
            await self._submit(is_sent=True)
        return True

    def _submit(self, *, is_sent: bool = False) -> asyncio.Task[object]:
        job, items = self._job, few_items(self._job)

        def submit(manager: Manager) -> object:
            return manager.job_commands.submit(job, items, is_sent=is_sent, role=Role.OPERATE)

        return self._start(submit, "submit")

    def _ask(self, verb: str) -> asyncio.Task[object]:
        job = self._job.id
        return self._start(lambda m: getattr(m.job_commands, verb)(job), verb)

    def _cancel(self) -> asyncio.Task[object]:
        job, acknowledge = self._job.id, self._world.watch.controls.on_cancel_request(self._job.id)

        def on_answer(answer: object) -> None:
            if not isinstance(answer, Refused):
                acknowledge()

        return self._start(lambda m: m.job_commands.cancel(job), "cancel", on_answer)

    def _retry(self) -> asyncio.Task[object]:
        if self._choices and self._choices.random() < 0.7:
            self._requests.append(self._ask_to_retry())
        return self._ask_to_retry()

    def _ask_to_retry(self) -> asyncio.Task[object]:
        job, controls = self._job.id, self._world.watch.controls
        acknowledge = controls.on_retry_request(job)
        seed = self._choices.random() if self._choices and self._choices.random() < 0.7 else None
        requests: list[RetryRequest] = []

        async def retry(manager: Manager) -> object:
            chosen = None if seed is None else await self._choice(manager, seed)
            inputs = self._inputs(chosen, seed) if self._mends and chosen else {}
            requests.append(controls.on_choice(job, chosen, inputs))
            return await manager.job_commands.retry(job, chosen, inputs)

        def on_answer(answer: object) -> None:
            acknowledge()
            requests[-1].is_accepted = not isinstance(answer, Refused)

        return self._start(retry, "retry", on_answer, "some failed tasks" if seed is not None else "")

    def _inputs(self, chosen: TaskSelection, seed: float | None) -> TaskInputs:
        """Return new inputs for some of the chosen tasks."""
        rng = random.Random(f"{seed}/inputs")  # noqa: S311 - simulation
        roots = {stage.name for stage in self._job.roots()}
        inputs: dict[tuple[StageName, int], bytes] = {}
        for stage, tasks in sorted(chosen.items()):
            for task in tasks:
                number = rng.randint(1_000, 9_999)
                item = number if stage in roots else {"key": f"k{number % 3}", "n": number}
                if rng.random() < 0.6:
                    inputs[stage, task] = json.dumps(item).encode()
        return inputs

    async def _choice(self, manager: Manager, seed: float) -> dict[StageName, TaskSet] | None:
        """Return some of the failed tasks, or None if the random choice is empty."""
        rng = random.Random(seed)  # noqa: S311 - simulation
        failed = await failed_tasks(manager.ports, await manager.ports.ledger.job(self._job.id))
        chosen = {
            stage: TaskSet.from_indices(task for task in tasks if rng.random() < 0.5) for stage, tasks in failed.items()
        }
        return {stage: tasks for stage, tasks in chosen.items() if tasks} or None

    def _start(
        self,
        call: Callable[[Manager], object],
        verb: str,
        on_answer: Callable[[object], None] = lambda _: None,
        reason: str = "",
    ) -> asyncio.Task[object]:
        # A report of direct calls does not have a record.
        action = "" if verb == "report" else f"job {verb}"
        change = UserChange(owner_name(self._job.owner), action, self._job.id, reason)

        async def request(manager: Manager) -> object:
            try:
                return await self._world.watch.audits.perform(change, call, manager)
            except (Malformed, NotFound) as error:
                if self._job.id not in self._world.damage.jobs:
                    raise
                # The error of a damaged job becomes a refusal, whose text names the damaged object.
                return Refused(str(error))
            except Unreachable as error:
                if verb != "retry" or self._job.id not in self._world.watch.trust.touched:
                    raise
                return Refused(str(error))  # A lie may have changed the counts of a touched job.

        async def ask() -> object:
            answer = await self._world.ask(request, f"{verb} {self._job.id}")
            on_answer(answer)
            return answer

        return asyncio.create_task(ask(), name=f"{self._name} asks to {verb}")


NAME = "timed"
INPUT = "raw/timed.jsonl"
SCHEDULE_POLL_S = 5.0
LATER_S = 10 * 366 * 86_400.0
PROMISE = "Once for each due time"


class ScheduleUser:
    """The user of one schedule of one job."""

    def __init__(self, world: World, plan: Plan, faults: Faults) -> None:
        self._world = world
        self._faults = faults
        rng = world.rng("schedule")
        self._period_min = rng.choice([1, 1, 2, 5])
        overlap = rng.choice(list(Overlap))
        missed = rng.choice([m for m in Missed if (m, overlap) != (Missed.RUN_ALL, Overlap.REPLACE)])
        self._definition = Definition(
            NAME,
            NAME,
            When(f"*/{self._period_min} * * * *"),
            template="",
            missed=missed,
            overlap=overlap,
            prewarm_s=rng.choice([0.0, 0.0, 30.0]),
            capacity=rng.choice([None, 1, 3]),
        )
        self._lasts_s = rng.uniform(100.0, 900.0)
        pool = rng.choice(plan.pools)
        stage = StageDef(StageName("a"), handler="sim:task", retry=RetryRule(attempts=2), pool=pool.name)
        raw = InputDef((INPUT,), SplitBy.ITEMS)
        self._job = JobDef(JobId("timed-template"), NAME, (stage,), 0.0, input=raw, max_failures=9)
        self._items = rng.choice([1, 3])

    async def use(self) -> None:
        """Add the schedule, wait for a while, and wait until the schedule's last run has ended."""
        lines = "".join(f"{item}\n" for item in range(self._items))
        await self._world.objects.put(INPUT, lines.encode())
        first = await self._add(self._definition, replacing=False)
        await asyncio.sleep(self._lasts_s)
        # The new schedule is not due for ten years, so only runs that already wait can start.
        at_s = self._world.clock.now_s() + LATER_S
        last = await self._add(replace(self._definition, when=When(at_s=at_s)), replacing=True)
        while True:
            # The ledger lacks the jobs during a rebuild.
            if not (await self._read()).unfinished and not self._world.rebuilding:
                break
            await asyncio.sleep(SCHEDULE_POLL_S)
        await self._check(first, last.through_s)

    async def _add(self, definition: Definition, *, replacing: bool) -> Schedule:
        async def ask(schedules: ScheduleCommands) -> Schedule:
            return (await schedules.add(definition, self._job, replacing=replacing))[0]

        return await self._ask(ask)

    async def _read(self) -> Schedule:
        return await self._ask(lambda schedules: schedules.get(NAME))

    async def _ask(self, call: Any) -> Schedule:
        def request(manager: Manager) -> Coroutine[Any, Any, Schedule]:
            assert manager.scheduler
            answer: Coroutine[Any, Any, Schedule] = call(manager.scheduler)
            return answer

        schedule = await self._world.ask(request, "the schedule's user")
        if isinstance(schedule, Refused):
            raise SimulationError(f"a schedule is refused: {schedule}")
        assert isinstance(schedule, Schedule)
        return schedule

    async def _check(self, first: Schedule, until_s: float) -> None:
        """Check that each job belongs to a due time, that each due time has one job, and that the history agrees."""
        schedule = await self._read()
        records = [rows.job for rows in await self._world.ledger.jobs(limit=10_000)]
        by_job = {record.job.id: record for record in records if record.job.token.startswith("schedule/")}
        period_s = self._period_min * 60.0
        for run in schedule.runs:
            if run.job and run.state is RunState.ENDED:
                record = by_job.get(run.job)
                check(record is not None, PROMISE, f"the job of {run} is not there")
                assert record
                check(record.state.value == run.result, PROMISE, f"{run} ended {record.state}")
        for record in by_job.values():
            due_s = datetime.fromisoformat(record.job.token.rsplit("/", 1)[-1]).timestamp()
            check(not due_s % period_s, PROMISE, f"{record.job.id} was due at {due_s:.0f}")
        if self._must_be_whole(first, until_s, period_s):
            due_s = first.added_s - first.added_s % period_s + period_s
            while due_s <= until_s:
                job = object_keys.job_id(NAME, token_of(schedule, due_s))
                check(job in by_job, PROMISE, f"nothing has run at {due_s:.0f}")
                due_s += period_s

    def _must_be_whole(self, first: Schedule, until_s: float, period_s: float) -> bool:
        """Return whether no policy, limit, or clock prevents a run at each due time."""
        definition = self._definition
        return (
            definition.missed is Missed.RUN_ALL
            and definition.overlap is Overlap.QUEUE
            and not self._faults.counts.get(FaultKind.CLOCK_JUMPED, 0)
            and until_s - first.added_s <= MAX_MISSED * period_s
        )
