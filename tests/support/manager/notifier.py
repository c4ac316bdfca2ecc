"""A bucket, a clock, and notification targets that several managers share, and jobs that notify these targets."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.sql import open_memory
from batchlab.core.job_definition import JobDef, NotifyDef, StageDef
from batchlab.core.model import JobId, JobState, StageCounts, StageName
from batchlab.core.notifications import NotDelivered, Notification, NotificationSettings, Target
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Ending, JobRecord, StageRecord
from batchlab.core.protocol import json_format, object_keys
from batchlab.manager.context import Context, NotificationChannels
from batchlab.manager.cost_caps import CostCaps
from batchlab.manager.counters import Counters
from batchlab.manager.live_jobs import LiveJobs
from batchlab.manager.notifier import Notifier
from batchlab.manager.state import LiveJob, Ports, WorkerStatus
from batchlab.sim.actors import SimClock, SimIds
from batchlab.sim.event_loop import SimLoop
from tests.support.no_fleet import NoFleet

MAP = StageName("map")
OPS = Target("ops", "webhook", "https://hooks.example.org/s3cret-path")
ENDING = Ending(JobState.FAILED, "2 tasks failed", 1_700_000_100.0, {})
EPOCH_S = 1_700_000_000.0


class Scene:
    """A bucket, a clock, and notification targets with scripted answers, which several managers share."""

    def __init__(self, *targets: Target) -> None:
        loop = asyncio.get_running_loop()
        self.clock = SimClock(loop, EPOCH_S)
        self.objects = SimObjects()
        self.targets = list(targets)
        self.secrets: dict[str, frozenset[str]] = {}
        self.tried: list[tuple[float, Notification]] = []
        self.reached: list[Target] = []
        self.answers: Callable[[int], NotDelivered | None] = lambda _: None
        rng = random.Random(1)
        self.ports = Ports(
            self.objects,
            None,  # type: ignore[arg-type]
            NoFleet(),
            open_memory(),
            self.clock,
            SimIds(rng),
            Patience(rng, limit_s=0.0),
        )
        self.lives = LiveJobs()
        self.workers: dict[str, WorkerStatus] = {}
        self.counts = Counters()

    async def deliver(self, target: Target, one: Notification) -> None:
        self.tried.append((self.clock.now_s() - EPOCH_S, one))
        self.reached.append(target)
        if error := self.answers(len(self.tried)):
            raise error

    def directory(self) -> NotificationSettings:
        return NotificationSettings(tuple(self.targets), secrets=self.secrets)

    def manager(self) -> Notifier:
        channels = NotificationChannels(self.directory, self.deliver)
        context = Context(self.ports, lives=self.lives, counts=self.counts, channels=channels)
        context.registry.workers = self.workers
        caps = SimpleNamespace(cap_of=lambda _: 5.0, max_cost_usd=None)
        made = Notifier(context, channels, cast(CostCaps, caps))
        made.explain = self.explain
        return made

    async def explain(self, job: JobId) -> str:
        return f"{job} waits for capacity."

    async def led(self, manager: Notifier, seconds: float) -> None:
        """Let the notifier's manager lead for this time."""
        await manager.load()
        running = asyncio.create_task(manager.run())
        ticks = asyncio.create_task(self._tick(manager))
        await asyncio.sleep(seconds)
        for one in (running, ticks):
            one.cancel()
        await asyncio.gather(running, ticks, return_exceptions=True)

    async def _tick(self, manager: Notifier) -> None:
        while True:
            await manager.observe()
            await asyncio.sleep(1.0)

    def told(self) -> list[str]:
        return [one.moment for _, one in self.tried]

    async def kept(self) -> dict[str, Any]:
        return json_format.loads(await self.objects.get(object_keys.NOTIFICATIONS))


def play(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    SimLoop().run(main())


def a_job(name: str = "sums", *notify: NotifyDef, planned: int = 10, **counts: int) -> LiveJob:
    job = JobDef(
        JobId(f"{name}-1"), name, (StageDef(MAP, handler="m:f"),), EPOCH_S, notify=notify, tags=(("team", "blue"),)
    )
    record = StageRecord(StageCounts(MAP, planned, **counts))
    return LiveJob(JobRecord(job, JobState.RUNNABLE), {MAP: record})


def a_notification(live: LiveJob) -> Notification:
    return Notification("", "ended", live.id, "ops", None, "{}", EPOCH_S)
