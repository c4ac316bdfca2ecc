"""Notifications other than ends, the frequency of writes to the outbox, and manual test notifications."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.errors import NotFound, Unreachable
from batchlab.core.model import Bundle, Control, JobId, JobState, StageCounts, TaskSet
from batchlab.core.notifications import NotDelivered, Notification, Target
from batchlab.core.ports import StageRecord
from batchlab.core.protocol.messages import Beat, HeldBundle
from batchlab.manager.state import Outstanding, WorkerStatus
from tests.support.manager.notifier import ENDING, MAP, OPS, Scene, a_job, a_notification, play

# --- Writes --------------------------------------------------------------------------------------


class Counted(SimObjects):
    """A bucket that counts the writes and the written bytes of the outbox."""

    puts = 0
    size = 0

    async def put(self, key: str, data: bytes, **how: Any) -> str:
        self.puts += 1
        self.size += len(data)
        return await super().put(key, data, **how)


def test_outbox_is_written_rarely_during_an_outage_of_a_target() -> None:
    """Before, the whole outbox of two megabytes was written after each try, twice a second for a day."""

    async def main() -> None:
        scene = Scene(OPS)
        objects = Counted()
        scene.objects = objects
        scene.ports = replace(scene.ports, objects=objects)
        scene.answers = lambda _: NotDelivered("It is away.")
        manager = scene.manager()
        for number in range(200):
            live = a_job(f"j{number}")
            one = replace(a_notification(live), id=str(number))
            manager.outbox.pending[one.id] = one
        await manager.ended(a_job("last"), ENDING)
        assert objects.puts == 1
        await scene.led(manager, 3600.0)
        assert len(scene.tried) > 2000
        assert objects.puts <= 3600 / 60 + 20
        # The next manager still learns which tries were made.
        kept = {one["id"]: one["attempts"] for one in (await scene.kept())["pending"]}
        assert len(kept) == 201
        assert all(attempts > 10 for attempts in kept.values())
        # When the target works again, many delivered notifications share one write.
        scene.answers = lambda _: None
        before = objects.puts
        second = scene.manager()
        await scene.led(second, 1800.0)
        assert not second.outbox.pending
        assert objects.puts - before < 70
        assert (await scene.kept())["pending"] == []

    play(main)


def test_first_delivery_is_written_at_once() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        manager = scene.manager()
        running = asyncio.create_task(manager.run())
        for number in range(3):
            await manager.ended(a_job(f"j{number}"), ENDING)
            await asyncio.sleep(1.1)
            assert (await scene.kept())["pending"] == []
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    play(main)


def test_outbox_is_written_after_an_outage_of_the_bucket() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        manager = scene.manager()
        await manager.ended(a_job(), ENDING)
        put, tries = scene.objects.put, 0

        async def away(*_: Any, **__: Any) -> str:
            nonlocal tries
            tries += 1
            raise Unreachable("The bucket is away.")

        scene.objects.put = away  # type: ignore[method-assign]
        running = asyncio.create_task(manager.run())
        await asyncio.sleep(600.0)
        assert len((await scene.kept())["pending"]) == 1
        assert tries < 20
        scene.objects.put = put  # type: ignore[method-assign]
        await asyncio.sleep(61.0)
        assert (await scene.kept())["pending"] == []
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    play(main)


def test_a_delivery_that_meets_a_bug_takes_no_manager_with_it() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        tries = 0

        async def deliver(target: Target, one: Notification) -> None:
            nonlocal tries
            tries += 1
            if tries < 3:
                raise UnicodeError("label too long")

        scene.deliver = deliver  # type: ignore[method-assign]
        manager = scene.manager()
        await manager.ended(a_job(), ENDING)
        running = asyncio.create_task(manager.run())
        await asyncio.sleep(1.0)
        assert "label too long" in manager.trouble("sums-1")
        await asyncio.sleep(60.0)
        assert not running.done()
        assert [one.state for one in manager.outbox.log] == ["delivered"]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    play(main)


# --- Other notifications -------------------------------------------------------------------------


def test_too_many_failures_are_notified_once() -> None:
    async def main() -> None:
        scene = Scene(replace(OPS, on=("failures",), failures=3))
        live = scene.lives[JobId("sums-1")] = a_job(failed=2)
        manager = scene.manager()
        await scene.led(manager, 5.0)
        assert scene.told() == []
        for failed in (3, 4):
            live.stages[MAP] = StageRecord(StageCounts(MAP, 10, failed=failed))
            await scene.led(manager, 5.0)
        await scene.led(scene.manager(), 5.0)  # the next manager does not send a notification either
        assert scene.told() == ["failures"]

    play(main)


def test_stuck_job_is_notified_once_with_its_reason() -> None:
    async def main() -> None:
        scene = Scene(replace(OPS, on=("stuck",), stuck_s=60.0))
        live = scene.lives[JobId("sums-1")] = a_job(succeeded=1)
        manager = scene.manager()
        await scene.led(manager, 300.0)
        ((at, one),) = scene.tried
        assert 60 <= at <= 62
        assert json.loads(one.body)["why"] == "sums-1 waits for capacity."
        live.stages[MAP] = StageRecord(StageCounts(MAP, 10, succeeded=2))
        await scene.led(manager, 300.0)
        assert scene.told() == ["stuck", "stuck"], "it has moved, and stands still again"
        assert scene.tried[0][1].id != scene.tried[1][1].id

    play(main)


@pytest.mark.parametrize("why", ["paused", "scheduled", "runs", "retries later", "capped"])
def test_a_job_that_is_not_meant_to_move_is_not_stuck(why: str) -> None:
    async def main() -> None:
        scene = Scene(replace(OPS, on=("stuck",), stuck_s=60.0))
        live = scene.lives[JobId("sums-1")] = a_job()
        bundle = Bundle(live.id, MAP, TaskSet.span(0, 1))
        if why == "paused":
            live.record = replace(live.record, control=Control.PAUSE)
        elif why == "scheduled":
            live.record = replace(live.record, state=JobState.SCHEDULED)
        elif why == "capped":
            live.is_held = True
        elif why == "retries later":
            live.outstanding = {MAP: {bundle.id: Outstanding(bundle, 10**9)}}
        else:
            held = HeldBundle("q", "r", live.id, MAP, bundle.id, True)
            beat = Beat("w-1", "i-1", "default", 1.0, 1, 1, (held,), 1)
            scene.workers["i-1"] = WorkerStatus(beat, 0.0, {held: 0.0})
        await scene.led(scene.manager(), 300.0)
        assert scene.told() == []

    play(main)


def test_cap_that_delays_a_job_is_notified_once() -> None:
    async def main() -> None:
        scene = Scene(replace(OPS, on=("capped",)))
        live = scene.lives[JobId("sums-1")] = a_job()
        manager = scene.manager()
        await scene.led(manager, 5.0)
        for text in ("spent 4.9 of 5 USD", "spent 4.95 of 5 USD"):
            live.capped = text
            await scene.led(manager, 5.0)
        ((_, one),) = scene.tried
        assert json.loads(one.body)["why"] == "spent 4.9 of 5 USD"

    play(main)


def test_shutdown_waits_for_first_deliveries_up_to_a_limit() -> None:
    async def main() -> None:
        scene = Scene(OPS, replace(OPS, name="hangs", to="https://slow.example.org/"))
        release = asyncio.Event()

        async def deliver(target: Target, one: Notification) -> None:
            await asyncio.sleep(0.5)
            if target.name == "hangs":
                await release.wait()
            scene.tried.append((0.0, one))

        scene.deliver = deliver  # type: ignore[method-assign]
        manager = scene.manager()
        running = asyncio.create_task(manager.run())
        await manager.ended(a_job(), ENDING)
        begun_s = scene.clock.monotonic_s()
        await manager.wait_for_attempts(3.0)
        assert scene.clock.monotonic_s() - begun_s == pytest.approx(3.0, abs=0.1)
        release.set()
        await manager.wait_for_attempts(3.0)
        assert scene.clock.monotonic_s() - begun_s == pytest.approx(3.0, abs=0.2)
        assert len(scene.tried) == 2
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    play(main)


# --- Manual tests --------------------------------------------------------------------------------


def test_a_test_is_sent_once_and_logged() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        scene.answers = lambda n: NotDelivered("It is away.") if n == 1 else None
        manager = scene.manager()
        assert await manager.test("ops") == "It is away."
        assert await manager.test("ops") == ""
        with pytest.raises(NotFound, match="not have a target 'oops'") as caught:
            await manager.test("oops")
        assert "ops" in caught.value.remedy
        states: Sequence[str] = [one["state"] for one in (await scene.kept())["log"]]
        assert states == ["given up", "delivered"]

    play(main)
