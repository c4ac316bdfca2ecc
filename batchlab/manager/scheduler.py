"""Scheduler, which decides about due runs of schedules, submits the runs' jobs, records the runs' ends, and stores the
schedules.

Invariants: a conditional PUT of the schedule stores the decision about a due time before the job is submitted. The id
of a run's job is derived from the schedule and the due time, so after a crash, the next leader does not submit a second
job for the run. A write of a schedule overwrites only the version that the manager has read. If two managers decide
about one due time, the write of one manager fails, and this manager reads the stored decision. The scheduler does not
call a port while no run is due.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from contextlib import suppress
from dataclasses import replace
from functools import partial

from batchlab.core import schedules
from batchlab.core.errors import AlreadyExists, BackendError, BatchlabError, NotFound, Refused, TooLarge, UsageError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId, JobState
from batchlab.core.port_retries import set_within
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.schedules import RunState, Schedule, ScheduledRun, check_name, job_of
from batchlab.core.users import owner_name
from batchlab.manager.audit_log import DONE, FAILED, UNKNOWN
from batchlab.manager.context import Context, Part
from batchlab.manager.job_commands import JobCommands
from batchlab.manager.state import LiveJob, Ports
from batchlab.manager.versioned_document import MAX_BYTES

log = logging.getLogger(__name__)


_MAX_TEMPLATES = 200


class ScheduleStore:
    """Store of schedules by name, including removed schedules, and of the jobs that the schedules run."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self.schedules: dict[str, Schedule] = {}
        self.unreadable: set[str] = set()
        """Names of schedules with an unknown format or time zone, or of more than MAX_BYTES, which the manager does not
        change."""
        self._etags: dict[str, str] = {}
        self._templates: dict[str, JobDef] = {}

    async def load(self) -> None:
        self.schedules, self._etags, self.unreadable = {}, {}, set()
        async for page in self._ports.objects.list(object_keys.SCHEDULES):
            for info in page:
                await self.read(info.key.removeprefix(object_keys.SCHEDULES).removesuffix(".json"))

    async def read(self, name: str) -> None:
        objects, key = self._ports.objects, object_keys.schedule(name)
        content = None
        with suppress(NotFound):
            try:
                content = await self._ports.patience(partial(objects.get_if_changed, key, None, limit=MAX_BYTES))
            except TooLarge as error:
                self._forget(name)
                self._reject(name, error)
                return
        self._forget(name)
        if content:
            try:
                schedule = schedules.from_bytes(content[0])
                schedule.next_s()
                self.schedules[name] = schedule
                self._etags[name] = content[1]
            except (BackendError, UsageError, KeyError, TypeError, ValueError) as error:
                self._reject(name, error)

    def _forget(self, name: str) -> None:
        self.schedules.pop(name, None)
        self._etags.pop(name, None)
        self.unreadable.discard(name)

    def _reject(self, name: str, error: Exception) -> None:
        """Note that a schedule is unreadable. A damaged or very large schedule, a schedule of a later release, or an
        unknown time zone must not block other schedules."""
        log.error("schedule %s cannot be read and is ignored: %r", name, error)
        self.unreadable.add(name)

    async def put(self, schedule: Schedule) -> bool:
        """Write the schedule over the version that this manager has read. If another manager has changed the schedule,
        read the new version of the schedule and return False."""
        name, objects = schedule.name, self._ports.objects
        etag, before = self._etags.get(name), self.schedules.get(name)
        schedule = replace(schedule, number=before.number + 1 if before else 0)
        put = partial(
            objects.put, object_keys.schedule(name), schedules.to_bytes(schedule), if_absent=etag is None, if_match=etag
        )
        try:
            self._etags[name] = await self._ports.patience(put)
        except (AlreadyExists, NotFound):
            # Another manager has changed the schedule, or the write succeeded and its response was lost.
            await self.read(name)
            return self.schedules.get(name) == schedule
        self.schedules[name] = schedule
        return True

    async def store_template(self, job: JobDef) -> str:
        """Store a schedule's job, and return the job's object key, which is derived from the content."""
        data = json_format.to_bytes(json_format.job_to_json(job))
        key = object_keys.template(hashlib.sha256(data).hexdigest())
        with suppress(AlreadyExists):
            put = partial(self._ports.objects.put, key, data, if_absent=True)
            await self._ports.patience(put)
        return key

    async def template(self, key: str) -> JobDef:
        """Return the schedule's job stored under an object key. Raise NotFound if the object does not exist."""
        if key not in self._templates:
            data = await self._ports.patience(partial(self._ports.objects.get, key))
            while len(self._templates) >= _MAX_TEMPLATES:
                del self._templates[next(iter(self._templates))]
            self._templates[key] = json_format.job_from_json(json_format.loads(data))
        return self._templates[key]

    def cached_template(self, key: str) -> JobDef | None:
        return self._templates.get(key)

    async def is_empty(self, job: JobDef) -> bool:
        """Return whether no object of the bucket matches the prefixes that are the job's input."""
        keys = job.input.keys if job.input else ()
        if not keys or not all(key.endswith("/") for key in keys):
            return False
        for key in keys:
            async for page in self._ports.objects.list(key):
                # The S3 console marks a folder with an empty object named like the folder.
                if any(not info.key.endswith("/") for info in page):
                    return False
        return True


MAX_NOTES = 100
LATE_BY_S = 60.0
"""Maximum delay of a schedule with a single due time, if the wall clock was set back (decision 0019)."""

_BEFORE_PLANNED = (JobState.SUBMITTED, JobState.PENDING, JobState.SCHEDULED)


class Scheduler(Part):
    def __init__(self, context: Context, requests: JobCommands) -> None:
        super().__init__(context)
        self._requests = requests
        self.store = ScheduleStore(context.ports)
        self.notes: list[str] = []
        """Notes about runs missed before the start of this manager, with the decision about each run."""
        self._is_read = asyncio.Event()
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()
        self._processed: set[str] = set()
        self._submitted: set[JobId] = set()
        """Jobs of unfinished runs that are in the ledger."""
        self._waits_s: dict[str, tuple[float, float]] = {}
        """Due time of each schedule that runs only once, by the wall clock and by the monotonic clock."""
        self._next: dict[str, tuple[Schedule, float | None]] = {}
        self._peaks: dict[JobId, dict[str, int]] = {}
        self._cancelling: dict[JobId, asyncio.Task[None]] = {}

    async def run(self) -> None:
        try:
            while True:
                await self._round()
                await set_within(self._wake, self._pause_s())
                self._wake.clear()
        finally:
            for task in self._cancelling.values():
                task.cancel()

    def reload(self) -> None:
        """Request a new read of the schedules from the bucket, because another manager may have led."""
        self._is_read.clear()
        self._submitted.clear()
        self._wake.set()

    async def _round(self) -> None:
        try:
            async with self._lock:
                if not self._is_read.is_set():
                    self._is_read.set()  # set before the read, because another manager may lead during the read
                    try:
                        await self.store.load()
                    except BaseException:
                        self._is_read.clear()
                        raise
                for name in sorted(self.store.schedules):
                    await self._advance_safely(name)
        except BackendError as error:
            log.warning("the schedules wait for the backend: %s", error)

    async def _advance_safely(self, name: str) -> None:
        try:
            await self._advance(name)
            self._processed.add(name)
        except BackendError as error:
            log.warning("schedule %s waits for the backend: %s", name, error)
        except Exception:
            # An unexpected error of one schedule must not end the manager.
            log.exception("schedule %s met a bug", name)

    def _pause_s(self) -> float:
        """Return the seconds until the next due time of any schedule, at most one tick."""
        now_s = self._clock.now_s()
        soon = (self.next_s(schedule) for schedule in self.store.schedules.values())
        first_s = min((due_s - now_s for due_s in soon if due_s is not None), default=math.inf)
        return max(0.001, min(self._settings.tick_s, first_s))

    def next_s(self, schedule: Schedule) -> float | None:
        """Return the schedule's next due time from a cache."""
        cached = self._next.get(schedule.name)
        if cached is None or cached[0] is not schedule:
            cached = self._next[schedule.name] = schedule, schedule.next_s()
        return cached[1]

    async def _advance(self, name: str) -> None:
        before = self.store.schedules[name]
        if before.removed and not before.unfinished:
            return
        after = await self._with_ended_run(before)
        after = self._with_lapsed_runs(after)
        after = await self._with_started_run(after)
        if after is not before:
            if not await self.store.put(after):
                self._wake.set()
                return  # another manager has changed the schedule, so the scheduler's next pass decides again
            self._log_decisions(before, after)
        run = after.running
        if run and run.job and run.job not in self._submitted:
            await self._submit(after, run)
        if victim := schedules.replaced_run(after):
            self._cancel(after, victim)
        await self._load_template(after)

    async def _load_template(self, schedule: Schedule) -> None:
        """Cache the job of a schedule whose prewarming has begun."""
        definition, due_s = schedule.definition, self.next_s(schedule)
        if definition.prewarm_s and due_s is not None:
            soon = due_s - self._clock.now_s() <= definition.prewarm_s
            if soon and self.store.cached_template(definition.template) is None:
                with suppress(NotFound):  # the missing job is reported at the schedule's due time
                    await self.store.template(definition.template)

    def _with_lapsed_runs(self, schedule: Schedule) -> Schedule:
        if schedule.paused or schedule.removed:
            return schedule
        now_s = self._clock.now_s()
        at_s = schedule.definition.when.at_s
        if at_s is not None and self._has_waited(schedule, at_s, now_s):
            now_s = max(now_s, at_s)
        due_s = self.next_s(schedule)
        # If no run is due, only a clock that was set back requires a decision.
        if (due_s is None or due_s > now_s) and schedule.through_s - now_s <= schedules.SET_BACK_S:
            return schedule
        return schedules.decide_due_times(schedule, now_s)

    def _has_waited(self, schedule: Schedule, at_s: float, now_s: float) -> bool:
        monotonic_s = self._clock.monotonic_s()
        wait = self._waits_s.get(schedule.name)
        if wait is None or wait[0] != at_s:
            wait = self._waits_s[schedule.name] = at_s, monotonic_s + at_s - now_s
        return monotonic_s - wait[1] > LATE_BY_S and schedule.next_s() is not None

    async def _with_started_run(self, schedule: Schedule) -> Schedule:
        """Return the schedule. Mark the next run that may start as started."""
        while run := schedules.startable(schedule):
            now_s = self._clock.now_s()
            try:
                template = await self.store.template(schedule.definition.template)
            except NotFound:
                why = "the bucket has lost its job's definition; add the schedule again"
                schedule = schedules.skip(schedule, run, now_s, why)
                continue
            if await self.store.is_empty(template):
                where = ", ".join(template.input.keys if template.input else ())
                schedule = schedules.skip(schedule, run, now_s, f"there was no object in {where}")
                continue
            if lost := [one.job for one in schedule.definition.dependencies if one.job in self.store.unreadable]:
                why = f"the schedule {lost[0]}, for which it waits, cannot be read"
                schedule = schedules.skip(schedule, run, now_s, why)
                continue
            after = schedules.dependencies_of(schedule, run, self.store.schedules)
            if after is None:
                break  # a later pass starts the run, after the other schedule has started its run
            schedule = schedules.start(schedule, replace(run, after=tuple(map(str, after))), now_s)
        return schedule

    async def _submit(self, schedule: Schedule, run: ScheduledRun) -> None:
        assert run.job
        try:
            await self._ledger.job(run.job)
        except NotFound:
            if (job_def := await self._job_for(schedule, run)) is None:
                return
            try:
                await self._requests.submit(job_def, reason=f"schedule {schedule.name}")
            except Refused as error:
                # A run whose job was deleted would otherwise block the next runs of the schedule.
                await self._refuse(schedule, run, error)
                return
        self._submitted.add(run.job)

    def _note_cancellation(self, schedule: Schedule, job: JobDef, error: BatchlabError | None = None) -> None:
        """Note in the audit log what the manager has done for the user who added the schedule."""
        if audit := self._context.audit:
            outcome = DONE if error is None else UNKNOWN if isinstance(error, BackendError) else FAILED
            reason = f"schedule {schedule.name}" + (f": {error}" if error else "")
            record = audit.record(owner_name(job.owner), "", "job cancel", job.id, outcome=outcome, reason=reason)
            # The scheduler repeats a cancellation that fails, so the number of these records is limited.
            (audit.note_refusal if error else audit.note)(record)

    async def _job_for(self, schedule: Schedule, run: ScheduledRun) -> JobDef | None:
        """Return the job of a schedule's run. If this grid cannot run the job, record the end of the run and return
        None."""
        assert run.job
        try:
            template = await self.store.template(schedule.definition.template)
            job_def = job_of(schedule, run, template, self._clock.now_s())
            self._context.admit(job_def)
        except (UsageError, NotFound) as error:
            await self._refuse(schedule, run, error)
            return None
        return replace(job_def, id=run.job)

    async def _refuse(self, schedule: Schedule, run: ScheduledRun, error: BatchlabError) -> None:
        """Record the end of a run whose job this grid refuses."""
        if await self.store.put(schedule.with_run(self._ended_run(run, "REFUSED", str(error)))):
            log.warning("schedule %s: its job is refused: %s", schedule.name, error)

    async def _with_ended_run(self, schedule: Schedule) -> Schedule:
        """Return the schedule. Mark its run as ended if the job of the run has ended."""
        run = schedule.running
        if run is None or run.job is None or run.job not in self._submitted:
            return schedule
        if live := self._lives.get(run.job):
            self._observe(live)
            return schedule
        ledger = self._ledger
        try:
            record = await ledger.job(run.job)
        except NotFound:
            self._submitted.discard(run.job)
            return schedule
        if not record.state.ended:
            return schedule
        self._submitted.discard(run.job)
        over = self._ended_run(run, record.state.value, record.reason, record.ended_s)
        rows = {stage_record.counts.stage: stage_record.counts for stage_record in (await ledger.rows(run.job)).stages}
        planned = [rows[stage.name].planned for stage in record.job.roots()]
        return schedule.with_run(replace(over, tasks=sum(number or 0 for number in planned)))

    def _ended_run(self, run: ScheduledRun, result: str, reason: str, ended_s: float | None = None) -> ScheduledRun:
        assert run.job
        self._cancelling.pop(run.job, None)
        return replace(
            run,
            state=RunState.ENDED,
            result=result,
            reason="; ".join(filter(None, (run.reason, reason))),
            ended_s=self._clock.now_s() if ended_s is None else ended_s,
            peak=tuple(sorted(self._peaks.pop(run.job, {}).items())),
        )

    def _observe(self, live: LiveJob) -> None:
        """Record the peak number of instances that hold bundles of the job, by pool."""
        count: dict[str, int] = {}
        for worker_status in self._registry.workers.values():
            if any(held.job == live.id for held in worker_status.beat.held):
                count[worker_status.beat.pool] = count.get(worker_status.beat.pool, 0) + 1
        peak = self._peaks.setdefault(live.id, {})
        for pool, number in count.items():
            peak[pool] = max(peak.get(pool, 0), number)

    def has_begun(self, run: ScheduledRun) -> bool:
        """Return whether the scaling policy knows the work of the run's job, or the job waits for another job."""
        live = self._lives.get(run.job) if run.job else None
        if live:
            return bool(live.waits_for) or live.record.state not in _BEFORE_PLANNED
        return run.job in self._submitted

    def _cancel(self, schedule: Schedule, run: ScheduledRun) -> None:
        """Cancel the job of a replaced run in a separate asyncio task, because a cancellation takes seconds."""
        job = run.job
        if job is None or job not in self._lives or job in self._cancelling:
            return
        log.info("schedule %s: %s is replaced", schedule.name, check_name(schedule, run))

        job_def = self._lives[job].job

        async def cancel() -> None:
            try:
                await self._requests.cancel(job)
                self._note_cancellation(schedule, job_def)
            except BatchlabError as error:  # the job has already ended, or the backend does not answer
                log.warning("%s is not cancelled: %s", job, error)
                self._note_cancellation(schedule, job_def, error)
                self._cancelling.pop(job, None)  # the scheduler's next pass cancels the job again if it still runs

        self._cancelling[job] = asyncio.get_running_loop().create_task(cancel(), name=f"replace {job}")

    def _log_decisions(self, before: Schedule, after: Schedule) -> None:
        """Log the scheduler's decisions. Store notes about missed runs for the command that started this manager."""
        runs = {run.token: run for run in before.runs}
        for run in after.runs:
            was = runs.get(run.token)
            if was and was.state is run.state:
                continue
            text = describe_run(after, run)
            log.info("%s", text)
            is_new = was is None and not run.asked and after.name not in self._processed
            if is_new and (run.reason or run.decided_s - run.due_s > schedules.ON_TIME_S):
                self.notes = [*self.notes, text][-MAX_NOTES:]


def describe_run(schedule: Schedule, run: ScheduledRun) -> str:
    did = {
        RunState.WAITING: "waits for the one before it",
        RunState.RUNNING: f"starts as job {run.job}",
        RunState.ENDED: f"has ended {run.result}",
        RunState.SKIPPED: "is skipped",
    }[run.state]
    text = f"schedule {schedule.name}: {check_name(schedule, run)} {did}"
    return f"{text}: {run.reason}" if run.reason else text
