"""Schedules in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from batchlab.core.job_definition import InputDef, JobDef, SplitBy
from batchlab.core.model import JobId
from batchlab.core.protocol import object_keys
from batchlab.core.schedules import Definition, Schedule, When
from batchlab.manager.manager import Manager
from batchlab.manager.schedule_commands import ScheduleCommands
from batchlab.sim.tasks import ScriptedAttempt
from batchlab.sim.world import MANAGER, WORKER, World
from tests.support.sim.scenes import A, in_world, leader, stage

INPUT = "raw/numbers.jsonl"
MINUTE = 60.0
HOUR = 3600.0
BRISK = replace(MANAGER, tick_s=5.0)
SLOW = replace(MANAGER, tick_s=60.0, wait_s=20.0, control_lease_s=60.0, lease_ttl_s=300.0)
UNHURRIED: dict[str, Any] = {
    "manager_settings": SLOW,
    "worker_settings": replace(WORKER, wait_s=20.0, control_lease_s=60.0, beat_s=60.0),
}
"""Settings for scenes of many virtual hours, in which the default settings would mostly cause polling."""
BERLIN = "Europe/Berlin"
LORD_HOWE = "Australia/Lord_Howe"


def template(**changes: Any) -> JobDef:
    raw = InputDef((INPUT,), SplitBy.ITEMS)
    made = JobDef(JobId("nightly-template"), "nightly", (stage(A),), 0.0, input=raw, token="t")
    return replace(made, **changes)


def definition(cron: str = "* * * * *", zone: str = "UTC", **changes: Any) -> Definition:
    return replace(Definition("nightly", "nightly", When(cron, zone), ""), **changes)


def begins(world: World, at: str) -> None:
    """Set the world's clock before any component reads it."""
    world.clock.jump(datetime.fromisoformat(at).replace(tzinfo=UTC).timestamp() - world.clock.now_s())


async def ask(world: World, call: Callable[[ScheduleCommands], Coroutine[Any, Any, Any]]) -> Any:
    def of(manager: Manager) -> Coroutine[Any, Any, Any]:
        assert manager.scheduler
        return call(manager.scheduler)

    return await world.ask(of, "schedule")


async def added(world: World, made: Definition, job: JobDef | None = None) -> None:
    await world.objects.put(INPUT, b'{"key": 1}\n')
    await leader(world)
    answer = await ask(world, lambda s: s.add(made, job or template(), replacing=False))
    assert not isinstance(answer, Exception), answer


async def shown(world: World) -> Schedule:
    found = await ask(world, lambda s: s.get("nightly"))
    assert isinstance(found, Schedule), found
    return found


def until(world: World, at: str) -> Coroutine[Any, Any, None]:
    to_s = datetime.fromisoformat(at).replace(tzinfo=UTC).timestamp()
    return asyncio.sleep(to_s - world.clock.now_s())


async def jobs(world: World) -> list[str]:
    """Return the due times of the schedule's jobs from the bucket. Each job must have exactly one definition."""
    found = []
    for rows in await world.ledger.jobs(limit=1000):
        assert await world.objects.head(object_keys.spec(rows.id))
        found.append(dict(rows.job.job.tags)["due"])
    return sorted(found)


def states(schedule: Schedule) -> list[str]:
    """Return the due time of day and the result of each run of the schedule."""
    zone = schedule.definition.when.tz
    return [f"{datetime.fromtimestamp(run.due_s, zone):%H:%M} {run.result or run.state.value}" for run in schedule.runs]


def in_time(act: Callable[[World], Coroutine[Any, Any, None]], run_s: float = 1.0, **more: Any) -> None:
    settings: dict[str, Any] = {"manager_settings": BRISK, "sql": False, "schedules": True}
    in_world(act, script=lambda _: ScriptedAttempt(run_s, {"n": 1}), **{**settings, **more})
