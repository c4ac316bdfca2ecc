"""The audit log on a bucket that refuses writes and loses answers, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.errors import BackendError, Throttled, Unreachable
from batchlab.core.port_retries import Patience
from batchlab.core.protocol import object_keys
from batchlab.manager import audit_log
from batchlab.manager.audit_log import AuditFilter, AuditLog, AuditRecord, Change
from batchlab.manager.state import Ports
from batchlab.sim.actors import SimClock, SimIds
from batchlab.sim.event_loop import SimLoop

CHANGES = 12
STATUSES = (200, 200, 403, 409, 503, 500)


class Bucket(SimObjects):
    """A bucket that refuses puts, and loses the answers to puts, with the probability `fault_rate`."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng
        self.fault_rate = 0.0
        self.are_answers_lost = False

    async def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        assert if_absent
        await asyncio.sleep(self._rng.uniform(0.0, 0.2))
        fault = self._rng.random() / self.fault_rate if self.fault_rate else 2.0
        if fault < 0.5:
            raise Throttled("503 Slow Down")
        etag = await super().put(key, data, if_absent=True)
        if fault < 1.0 or self.are_answers_lost:
            raise Unreachable("The answer is lost.")
        return etag


class Scene:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.bucket = Bucket(self.rng)
        clock = SimClock(asyncio.get_running_loop(), 1_700_000_000.0)
        absent: Any = None
        patience = Patience(self.rng, limit_s=0.3)
        self.ports = Ports(self.bucket, absent, absent, absent, clock, SimIds(self.rng), patience)
        self.audit = AuditLog(self.ports)

    async def change(self, number: int, made: dict[str, str]) -> None:
        """Make a change, as the manager's API does, and add the expected outcome of its record to `made`."""
        await asyncio.sleep(self.rng.uniform(0.0, 3.0))
        change = Change(self.audit, "sam", "operate", "job pause", f"job-{number}")
        status = self.rng.choice(STATUSES)
        try:
            await change.store(f"job-{number}", [f"values {number}"])
        except BackendError as error:
            made[f"job-{number}"] = "failed"
            change.end(503, str(error))
            return
        await asyncio.sleep(self.rng.uniform(0.0, 3.0))
        expected = {200: "done", 403: "refused", 409: "failed"}
        made[f"job-{number}"] = expected.get(status, "unknown")
        change.end(status, "an error")

    async def records(self) -> list[AuditRecord]:
        return (await AuditLog(self.ports).page(AuditFilter(), 1000))[0]


def play(seed: int, main: Callable[[Scene], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        await main(Scene(seed))

    SimLoop().run(run())


@pytest.mark.parametrize("seed", range(30))
def test_each_change_has_one_record_with_its_outcome(seed: int) -> None:
    """The bucket fails often, and no record is lost, listed twice, or wrong."""

    async def main(scene: Scene) -> None:
        scene.bucket.fault_rate = scene.rng.choice([0.3, 0.6, 0.9])
        made: dict[str, str] = {}
        await asyncio.gather(*(scene.change(number, made) for number in range(CHANGES)))
        scene.bucket.fault_rate = 0.0
        await scene.audit.flush()
        records = await scene.records()
        assert sorted((one.object, one.outcome) for one in records) == sorted(made.items())
        for one in records:
            # The reason of a failed change has the error before the values.
            values = f"values {one.object.removeprefix('job-')}"
            assert one.reason == values if one.outcome == "done" else one.reason.endswith(f"; {values}")

    play(seed, main)


def test_calls_after_a_lost_answer_are_counted_once() -> None:
    async def main(scene: Scene) -> None:
        def call() -> None:
            scene.audit.note_call(scene.audit.record("sam", "submit", "job submit", "job"))

        scene.bucket.are_answers_lost = True
        call()
        with suppress(BackendError):
            await scene.audit.flush()
        call()
        scene.bucket.are_answers_lost = False
        await scene.audit.flush()
        assert [one.count for one in await scene.records()] == [1, 1]

    play(0, main)


def test_a_user_may_change_again_after_a_minute() -> None:
    async def main(scene: Scene) -> None:
        async def fail(count: int) -> int:
            """Make changes that fail, and return how many of them began."""
            begun = 0
            for _ in range(count):
                change = Change(scene.audit, "sam", "operate", "job pause", "none")
                try:
                    await change.store("none")
                    begun += 1
                    change.end(404, "The job does not exist.")
                except Throttled as error:
                    change.end(503, str(error))
            return begun

        assert await fail(2 * audit_log.MAX_REFUSALS) == audit_log.MAX_REFUSALS
        await asyncio.sleep(audit_log.REFUSALS_S)
        assert await fail(1) == 1
        await scene.audit.flush()
        # The log stores the records of changes that did not begin together, so they need few objects.
        keys = [info.key async for page in scene.bucket.list(object_keys.AUDIT) for info in page]
        assert len(keys) < 2 * (audit_log.MAX_REFUSALS + 1) + 20
        assert sum(one.count for one in await scene.records()) == 2 * audit_log.MAX_REFUSALS + 1

    play(0, main)
