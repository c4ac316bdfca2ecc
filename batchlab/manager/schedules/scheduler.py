"""Schedules in the manager: looks what is due, decides, and sees to it that the jobs come and end.

Invariant: a due time is decided on by a conditional PUT of its schedule before its job is
submitted, and the job's name follows from schedule and due time. Whatever dies in between, the next
leader submits the same job, once. Nothing is asked of any port while nothing is due.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from batchlab.core.errors import BackendError, BatchlabError, NotFound, UsageError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId, JobState
from batchlab.core.retry import set_within
from batchlab.core.schedules import decisions
from batchlab.core.schedules.decisions import named
from batchlab.core.schedules.model import Run, RunState, Schedule, job_of
from batchlab.manager.jobs.requests import Requests
from batchlab.manager.scaling.worker_registry import Registry
from batchlab.manager.schedules.schedule_store import Shelf
from batchlab.manager.settings import ManagerSettings
from batchlab.manager.state import LiveJob, Ports

log = logging.getLogger(__name__)

NOTES_KEPT = 100
LATE_BY_S = 60.0
"""A schedule with one due time waits no longer than it had to when it was first seen, and this: a
clock that is set back does not hold it up (docs/decisions/0019)."""

_BEFORE_PLANNED = (JobState.SUBMITTED, JobState.PENDING, JobState.SCHEDULED)


class Scheduler:
    """The leader's; `run` until cancelled. `admit` raises UsageError for a job that the grid cannot
    run."""

    def __init__(
        self,
        ports: Ports,
        settings: ManagerSettings,
        lives: Mapping[JobId, LiveJob],
        admit: Callable[[JobDef], None],
        requests: Requests,
        registry: Registry,
    ) -> None:
        self._ports = ports
        self._settings = settings
        self._lives = lives
        self._admit = admit
        self._requests = requests
        self._registry = registry
        self.shelf = Shelf(ports)
        self.notes: list[str] = []
        """What was missed when this manager began to lead, and what it has done about that."""
        self._is_read = asyncio.Event()
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()
        self._met: set[str] = set()
        """Schedules that this manager has looked at."""
        self._submitted: set[JobId] = set()
        """Jobs of unfinished runs that the grid is known to have."""
        self._waits_s: dict[str, tuple[float, float]] = {}
        """For schedules with one due time: that, and when it is, by the monotonic clock."""
        self._next: dict[str, tuple[Schedule, float | None]] = {}
        self._peaks: dict[JobId, dict[str, int]] = {}
        self._cancelling: dict[JobId, asyncio.Task[None]] = {}

    # --- The loop --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Decide on what falls due, as long as this manager leads."""
        try:
            while True:
                await self._round()
                await set_within(self._wake, self._pause_s())
                self._wake.clear()
        finally:
            for task in self._cancelling.values():
                task.cancel()

    def reread(self) -> None:
        """Others may have led: forget what we know, and read the schedules anew."""
        self._is_read.clear()
        self._submitted.clear()
        self._wake.set()

    async def _round(self) -> None:
        try:
            async with self._lock:
                if not self._is_read.is_set():
                    self._is_read.set()  # first: others may lead meanwhile
                    await self._load()
                for name in sorted(self.shelf.schedules):
                    await self._advance_safely(name)
        except BackendError as error:
            log.warning("the schedules wait for the backend: %s", error)

    async def _load(self) -> None:
        try:
            await self.shelf.load()
        except BaseException:
            self._is_read.clear()
            raise

    async def _advance_safely(self, name: str) -> None:
        try:
            await self._advance(name)
            self._met.add(name)
        except BackendError as error:
            log.warning("schedule %s waits for the backend: %s", name, error)
        except Exception:
            # A bug, met by one schedule's data: it must not take the manager with it.
            log.exception("schedule %s met a bug", name)

    def _pause_s(self) -> float:
        """Until the next look: at a due time, and as often as the manager looks at anything."""
        now_s = self._ports.clock.now_s()
        soon = (self.next_s(one) for one in self.shelf.schedules.values())
        first_s = min((one - now_s for one in soon if one is not None), default=math.inf)
        return max(0.001, min(self._settings.tick_s, first_s))

    def next_s(self, schedule: Schedule) -> float | None:
        """The schedule's next due time, worked out once."""
        known = self._next.get(schedule.name)
        if known is None or known[0] is not schedule:
            known = self._next[schedule.name] = schedule, schedule.next_s()
        return known[1]

    # --- One schedule ----------------------------------------------------------------------------

    async def _advance(self, name: str) -> None:
        """All that is to be done for a schedule now."""
        before = self.shelf.schedules[name]
        if before.removed and not before.unfinished:
            return
        after = await self._ended(before)
        after = self._lapsed(after)
        after = await self._started(after)
        if after is not before:
            if not await self.shelf.put(after):
                self._wake.set()
                return  # somebody else has decided; look again
            self._tell(before, after)
        run = after.running
        if run and run.job and run.job not in self._submitted:
            await self._submit(after, run)
        if victim := decisions.replaced(after):
            self._cancel(after, victim)
        await self._get_ready(after)

    async def _get_ready(self, schedule: Schedule) -> None:
        """Have its job at hand for those who want the fleet warm for it."""
        definition, due_s = schedule.definition, self.next_s(schedule)
        if definition.prewarm_s and due_s is not None:
            soon = due_s - self._ports.clock.now_s() <= definition.prewarm_s
            if soon and self.shelf.known_template(definition.template) is None:
                with suppress(NotFound):  # told when it is due
                    await self.shelf.template(definition.template)

    def _lapsed(self, schedule: Schedule) -> Schedule:
        if schedule.paused or schedule.removed:
            return schedule
        now_s = self._ports.clock.now_s()
        at_s = schedule.definition.when.at_s
        if at_s is not None and self._has_waited(schedule, at_s, now_s):
            now_s = max(now_s, at_s)
        due_s = self.next_s(schedule)
        # Where nothing is due, nothing but a clock that was set back is to be looked for.
        if (due_s is None or due_s > now_s) and schedule.through_s - now_s <= decisions.SET_BACK_S:
            return schedule
        return decisions.lapse(schedule, now_s)

    def _has_waited(self, schedule: Schedule, at_s: float, now_s: float) -> bool:
        monotonic_s = self._ports.clock.monotonic_s()
        known = self._waits_s.get(schedule.name)
        if known is None or known[0] != at_s:
            known = self._waits_s[schedule.name] = at_s, monotonic_s + at_s - now_s
        return monotonic_s - known[1] > LATE_BY_S and schedule.next_s() is not None

    async def _started(self, schedule: Schedule) -> Schedule:
        """With the run that may start as one that has its job."""
        while run := decisions.startable(schedule):
            now_s = self._ports.clock.now_s()
            try:
                template = await self.shelf.template(schedule.definition.template)
            except NotFound:
                why = "the bucket has lost its job's definition; add the schedule again"
                schedule = decisions.skipped(schedule, run, now_s, why)
                continue
            if await self.shelf.is_empty(template):
                where = ", ".join(template.input.keys if template.input else ())
                schedule = decisions.skipped(
                    schedule, run, now_s, f"there was no object in {where}"
                )
                continue
            schedule = decisions.started(schedule, run, now_s)
        return schedule

    async def _submit(self, schedule: Schedule, run: Run) -> None:
        """See to it that the run's job is there, whoever may have submitted it before."""
        assert run.job
        try:
            await self._ports.ledger.job(run.job)
        except NotFound:
            if made := await self._made(schedule, run):
                await self._requests.submit(made)
            else:
                return
        self._submitted.add(run.job)

    async def _made(self, schedule: Schedule, run: Run) -> JobDef | None:
        """The run's job; None where this grid cannot run it, which is then how the run ended."""
        assert run.job
        try:
            template = await self.shelf.template(schedule.definition.template)
            made = job_of(schedule, run, template, self._ports.clock.now_s())
            self._admit(made)
        except (UsageError, NotFound) as error:
            ended = self._over(run, "REFUSED", str(error))
            if await self.shelf.put(schedule.with_run(ended)):
                log.warning("schedule %s: its job is refused: %s", schedule.name, error)
            return None
        return replace(made, id=run.job)

    async def _ended(self, schedule: Schedule) -> Schedule:
        """With the run whose job has ended as one that is over."""
        run = schedule.running
        if run is None or run.job is None or run.job not in self._submitted:
            return schedule
        if live := self._lives.get(run.job):
            self._observe(live)
            return schedule
        ledger = self._ports.ledger
        try:
            record = await ledger.job(run.job)
        except NotFound:
            self._submitted.discard(run.job)  # the ledger was lost
            return schedule
        if not record.state.ended:
            return schedule
        self._submitted.discard(run.job)
        over = self._over(run, record.state.value, record.reason, record.ended_s)
        rows = {one.counts.stage: one.counts for one in (await ledger.rows(run.job)).stages}
        planned = [rows[stage.name].planned for stage in record.job.roots()]
        return schedule.with_run(replace(over, tasks=sum(number or 0 for number in planned)))

    def _over(self, run: Run, result: str, reason: str, ended_s: float | None = None) -> Run:
        assert run.job
        self._cancelling.pop(run.job, None)
        return replace(
            run,
            state=RunState.ENDED,
            result=result,
            reason="; ".join(filter(None, (run.reason, reason))),
            ended_s=self._ports.clock.now_s() if ended_s is None else ended_s,
            peak=tuple(sorted(self._peaks.pop(run.job, {}).items())),
        )

    def _observe(self, live: LiveJob) -> None:
        """Note how many instances work for it."""
        count: dict[str, int] = {}
        for seen in self._registry.workers.values():
            if any(held.job == live.id for held in seen.beat.held):
                count[seen.beat.pool] = count.get(seen.beat.pool, 0) + 1
        peak = self._peaks.setdefault(live.id, {})
        for pool, number in count.items():
            peak[pool] = max(peak.get(pool, 0), number)

    def has_begun(self, run: Run) -> bool:
        """Whether the scaling policy knows how much the run's job has to do."""
        live = self._lives.get(run.job) if run.job else None
        if live:
            return live.record.state not in _BEFORE_PLANNED
        return run.job in self._submitted

    def _cancel(self, schedule: Schedule, run: Run) -> None:
        """Cancel the job of the run that is to be replaced; it takes a while, and may be asked for
        again."""
        job = run.job
        if job is None or job not in self._lives or job in self._cancelling:
            return
        log.info("schedule %s: %s is replaced", schedule.name, named(schedule, run))

        async def cancel() -> None:
            try:
                await self._requests.cancel(job)
            except BatchlabError as error:  # it has ended by itself, or the backend is away
                log.warning("%s is not cancelled: %s", job, error)
                self._cancelling.pop(job, None)  # and asked for again, if it still runs

        self._cancelling[job] = asyncio.get_running_loop().create_task(
            cancel(), name=f"replace {job}"
        )

    def _tell(self, before: Schedule, after: Schedule) -> None:
        """Say what has been decided, in the log, and where it was missed to whoever starts us."""
        known = {run.token: run for run in before.runs}
        for run in after.runs:
            was = known.get(run.token)
            if was and was.state is run.state:
                continue
            text = sentence(after, run)
            log.info("%s", text)
            is_new = was is None and not run.asked and after.name not in self._met
            if is_new and (run.reason or run.decided_s - run.due_s > decisions.ON_TIME_S):
                self.notes = [*self.notes, text][-NOTES_KEPT:]


def sentence(schedule: Schedule, run: Run) -> str:
    """What became of a run, for a log or a person."""
    did = {
        RunState.WAITING: "waits for the one before it",
        RunState.RUNNING: f"starts as job {run.job}",
        RunState.ENDED: f"has ended {run.result}",
        RunState.SKIPPED: "is skipped",
    }[run.state]
    text = f"schedule {schedule.name}: {named(schedule, run)} {did}"
    return f"{text}: {run.reason}" if run.reason else text
