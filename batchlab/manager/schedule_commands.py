"""User commands for schedules: add, pause, resume, remove, and run now.

Invariant: the scheduler decides about due runs before a command changes the schedule. The bucket stores the result of a
command before the manager responds. A client may repeat a command.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from batchlab.core import due_times, schedules
from batchlab.core.errors import BackendError, NotFound, Refused, UsageError
from batchlab.core.job_definition import JobDef
from batchlab.core.protocol import object_keys
from batchlab.core.schedules import Definition, Missed, Overlap, Schedule, ScheduledRun
from batchlab.core.text import join_list
from batchlab.manager.scheduler import Scheduler

READY_S = 10.0
"""Maximum time that a command waits for the first read of the schedules."""
MAX_ATTEMPTS = 20


class ScheduleCommands(Scheduler):
    """Scheduler with user commands. Each user command waits until the scheduler has read the schedules."""

    async def wait_until_read(self) -> None:
        """Return after the scheduler has read the schedules. Raise BackendError after READY_S."""
        try:
            async with asyncio.timeout(READY_S):
                while True:
                    await self._is_read.wait()
                    async with self._lock:
                        if self._is_read.is_set():
                            return
        except TimeoutError:
            raise BackendError("The schedules have not been read yet.", remedy="Try again in some seconds.") from None

    async def all(self) -> list[Schedule]:
        """Return all schedules that users have not removed, sorted by name."""
        await self.wait_until_read()
        by_name = self.store.schedules
        return [by_name[name] for name in sorted(by_name) if not by_name[name].removed]

    async def get(self, name: str) -> Schedule:
        """Return a schedule. Raise NotFound if the schedule does not exist or is removed."""
        await self.wait_until_read()
        return self._existing(name)

    async def prefixes(self, schedule: Schedule) -> list[str]:
        """Return the bucket prefixes whose objects are the input of the schedule's runs."""
        try:
            job = await self.store.template(schedule.definition.template)
        except NotFound:
            return []
        keys, uploaded = job.input.keys if job.input else (), object_keys.raw(job.id)
        return [key for key in keys if key.endswith("/") and not key.startswith(uploaded)]

    def _existing(self, name: str) -> Schedule:
        schedule = self.store.schedules.get(name)
        if schedule is None or schedule.removed:
            raise NotFound(
                f"The schedule {name!r} does not exist.", remedy="`batchlab schedule list` shows the schedules."
            )
        return schedule

    async def add(self, definition: Definition, job: JobDef, *, replacing: bool) -> tuple[Schedule, bool]:
        """Store a schedule, and return the schedule and whether it has changed. Raise Refused if a different schedule
        has the same name, unless `replacing`."""
        when = definition.when
        if when.at_s is None:
            due_times.check(when.cron, when.zone)
        due_times.zone_of(when.zone)
        if definition.missed is Missed.RUN_ALL and definition.overlap is Overlap.REPLACE:
            raise UsageError(
                "The policy runs all missed runs, and also replaces each by the next one.",
                remedy="Use --overlap queue or --missed run-once.",
            )
        if definition.due_param and definition.due_param not in dict(job.params):
            raise UsageError(
                f"Job {job.name} does not have a parameter {definition.due_param!r} for the due time.",
                remedy="Declare it under params: in the job file.",
            )
        self._context.admit(job)
        await self.wait_until_read()
        self._check_dependencies(definition)
        if definition.name in self.store.unreadable:
            raise Refused(
                f"The schedule {definition.name!r} exists, and this batchlab cannot read it.",
                remedy="Was it written by a newer version? Give this one a --name of its own.",
            )
        timeless = replace(job, token="", submitted_s=0.0, start_at_s=None)
        definition = replace(definition, template=await self.store.store_template(timeless))
        now_s = self._clock.now_s()
        before = self.store.schedules.get(definition.name)
        if before and not before.removed and before.definition == definition:
            return before, False
        if when.at_s is not None and when.at_s <= now_s:
            raise UsageError("The time is in the past.", remedy="Give a time in the future.")
        if before is None or before.removed:
            generation = before.generation + 1 if before else 1
            new_schedule = Schedule(definition, generation, added_s=now_s, through_s=now_s)
            async with self._lock:
                if await self.store.put(new_schedule):
                    self._wake.set()
                    return new_schedule, True
            return await self.add(definition, job, replacing=replacing)
        if not replacing:
            raise Refused(
                f"A schedule {definition.name!r} exists already, and it differs: "
                f"{describe_difference(before.definition, definition)}.",
                remedy="Use --replace to change it, or give this one a --name of its own.",
            )

        def change(schedule: Schedule, now_s: float) -> Schedule:
            return replace(schedules.settle(schedule, now_s), definition=definition)

        return await self._change(definition.name, change), True

    def _check_dependencies(self, definition: Definition) -> None:
        """Raise NotFound for a dependency on an unknown schedule, and UsageError for a schedule that is named twice or
        for schedules that would wait for each other."""
        ahead = [dependency.job for dependency in definition.dependencies]
        for name in ahead:
            if ahead.count(name) > 1:
                raise UsageError(
                    f"Schedule {definition.name} names schedule {name} twice as a dependency.", remedy="Name it once."
                )
            if name != definition.name:
                self._existing(name)
        seen: set[str] = set()
        while ahead:
            name = ahead.pop()
            if name == definition.name:
                raise UsageError(
                    f"Schedule {definition.name} would wait for itself.",
                    remedy="Use --overlap for runs of one schedule, and leave out --after.",
                )
            other = self.store.schedules.get(name)
            if other is not None and name not in seen:
                seen.add(name)
                ahead += [dependency.job for dependency in other.definition.dependencies]

    async def pause(self, name: str) -> Schedule:
        """Pause the schedule: no run starts until `resume`, but a running job finishes."""

        def change(schedule: Schedule, now_s: float) -> Schedule:
            if schedule.paused:
                raise Refused(f"Schedule {name} is paused already.", remedy="`batchlab schedule resume` resumes it.")
            return replace(schedules.settle(schedule, now_s), paused=True)

        return await self._change(name, change)

    async def resume(self, name: str) -> Schedule:
        """Resume the schedule for due times after the resumption."""

        def change(schedule: Schedule, now_s: float) -> Schedule:
            if not schedule.paused:
                raise Refused(
                    f"Schedule {name} is not paused.", remedy="`batchlab schedule show` shows when it is due."
                )
            return replace(schedules.settle(schedule, now_s), paused=False)

        return await self._change(name, change)

    async def remove(self, name: str) -> Schedule:
        """Remove the schedule. A running job of the schedule finishes. Raise Refused if another schedule waits for the
        schedule."""

        def change(schedule: Schedule, now_s: float) -> Schedule:
            if waiting := schedules.waiting_for(name, self.store.schedules.values()):
                raise Refused(
                    f"Schedule {waiting[0]} waits for schedule {name}.",
                    remedy=f"Delete {waiting[0]} first, or change it with `batchlab schedule add --replace`.",
                )
            return schedules.remove(schedule, now_s)

        return await self._change(name, change)

    async def run_now(self, name: str, asked: str) -> tuple[Schedule, ScheduledRun]:
        """Start a run of the schedule now. A repeated request with the same `asked` returns the run of the first
        request."""

        def change(schedule: Schedule, now_s: float) -> Schedule:
            return schedules.by_hand(schedule, asked, now_s)

        after = await self._change(name, change)
        return after, next(run for run in after.runs if run.asked == asked)

    async def _change(self, name: str, change: Callable[[Schedule, float], Schedule]) -> Schedule:
        """Decide about the schedule's due runs, then apply `change` and store the changed schedule."""
        await self.wait_until_read()
        async with self._lock:
            for _ in range(MAX_ATTEMPTS):
                self._existing(name)
                await self._advance(name)
                before = self._existing(name)
                after = change(before, self._clock.now_s())
                if after is before or await self.store.put(after):
                    await self._advance(name)
                    self._wake.set()
                    return self.store.schedules[name]
        raise BackendError(f"Schedule {name} changes faster than it is read.", remedy="Try again.")


def describe_difference(old: Definition, new: Definition) -> str:
    words = {
        "when": "when it is due",
        "template": "the job, its code or its input",
        "missed": "what becomes of missed runs",
        "missed_within_s": "how long ago they may be",
        "overlap": "what becomes of overlapping runs",
        "prewarm_s": "how long before it the fleet is warmed",
        "capacity": "the capacity it is warmed to",
        "due_param": "the parameter for the due time",
        "after": "the schedules that it waits for",
        "source": "the job file's place",
        "source_digest": "the job file, or what it names",
        "job": "the job's name",
    }
    other = [text for name, text in words.items() if getattr(old, name) != getattr(new, name)]
    return join_list(other, most=len(words))
