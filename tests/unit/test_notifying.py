"""Who is told what and when: once per moment, again until it is delivered, whoever leads."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from batchlab.adapters.sim.objects import SimObjects
from batchlab.adapters.sql import open_memory
from batchlab.directory import Directory
from batchlab.errors import NotFound, Unreachable
from batchlab.jobdef import JobDef, NotifyDef, StageDef
from batchlab.manager.counts import Counts
from batchlab.manager.live import LiveJob, Outstanding, Ports, Seen
from batchlab.manager.notifying import GIVE_UP_S, MOST_PENDING, Notifying, Outlets
from batchlab.model import Bundle, Control, JobId, JobState, StageCounts, StageName, TaskSet
from batchlab.notification import NotDelivered, Notification, Target
from batchlab.patience import Patience
from batchlab.ports import Ending, JobRecord, StageRecord
from batchlab.protocol import naming, wire
from batchlab.sim.clocks import SimClock, SimIds
from batchlab.sim.loop import SimLoop
from tests.no_fleet import NoFleet

T = TypeVar("T")
MAP = StageName("map")
OPS = Target("ops", "webhook", "https://hooks.example.org/s3cret-path")
ENDING = Ending(JobState.FAILED, "2 tasks failed", 1_700_000_100.0, {})
EPOCH_S = 1_700_000_000.0


class Scene:
    """What several managers share: a bucket, a clock, and targets that answer as they are told."""

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
        self.lives: dict[JobId, LiveJob] = {}
        self.workers: dict[str, Seen] = {}
        self.counts = Counts()

    async def deliver(self, target: Target, one: Notification) -> None:
        self.tried.append((self.clock.now_s() - EPOCH_S, one))
        self.reached.append(target)
        if error := self.answers(len(self.tried)):
            raise error

    def directory(self) -> Directory:
        return Directory(tuple(self.targets), secrets=self.secrets)

    def manager(self) -> Notifying:
        made = Notifying(
            self.ports,
            self.lives,
            self.workers,
            Outlets(self.directory, self.deliver),
            self.counts,
            lambda _: "5.0/None",
        )
        made.explain = self.explain
        return made

    async def explain(self, job: JobId) -> str:
        return f"{job} waits for capacity."

    async def led(self, manager: Notifying, seconds: float) -> None:
        """Let it lead for so long."""
        await manager.load()
        running = asyncio.create_task(manager.run())
        ticks = asyncio.create_task(self._tick(manager))
        await asyncio.sleep(seconds)
        for one in (running, ticks):
            one.cancel()
        await asyncio.gather(running, ticks, return_exceptions=True)

    async def _tick(self, manager: Notifying) -> None:
        while True:
            await manager.observe()
            await asyncio.sleep(1.0)

    def told(self) -> list[str]:
        return [one.moment for _, one in self.tried]

    async def kept(self) -> dict[str, Any]:
        return wire.loads(await self.objects.get(naming.NOTIFICATIONS))


def play(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    SimLoop().run(main())


def a_job(name: str = "sums", *notify: NotifyDef, planned: int = 10, **counts: int) -> LiveJob:
    job = JobDef(
        JobId(f"{name}-1"),
        name,
        (StageDef(MAP, handler="m:f"),),
        EPOCH_S,
        notify=notify,
        tags=(("team", "blue"),),
    )
    record = StageRecord(StageCounts(MAP, planned, **counts))
    return LiveJob(JobRecord(job, JobState.RUNNABLE), {MAP: record})


# --- Ends ----------------------------------------------------------------------------------------


def test_an_end_is_in_the_bucket_before_anybody_goes_on() -> None:
    async def main() -> None:
        scene = Scene(OPS, replace(OPS, name="happy", on=("succeeded",)))
        live = a_job(succeeded=8, failed=2)
        await scene.manager().ended(live, ENDING)  # and that manager dies here
        (kept,) = (await scene.kept())["pending"]
        assert (kept["target"], kept["moment"]) == ("ops", "failed")
        await scene.led(scene.manager(), 1.0)
        ((_, one),) = scene.tried
        assert json.loads(one.body) == {
            "v": 1,
            "id": one.id,
            "moment": "failed",
            "at_s": ENDING.ended_s,
            "job": {
                "id": "sums-1",
                "name": "sums",
                "state": "FAILED",
                "reason": "2 tasks failed",
                "round": 0,
                "tags": {"team": "blue"},
                "submitted_s": EPOCH_S,
                "ended_s": ENDING.ended_s,
            },
            "tasks": {"planned": 10, "succeeded": 8, "failed": 2, "cancelled": 0},
        }
        after = await scene.kept()
        assert after["pending"] == []
        assert after["log"][0]["state"] == "delivered"
        assert scene.counts.deliveries["webhook", "delivered"] == 1

    play(main)


def test_the_same_end_told_again_is_the_same_notification() -> None:
    """A leader that died between the bucket and the ledger has its work repeated."""

    async def main() -> None:
        scene = Scene(OPS)
        live = a_job()
        first = scene.manager()
        await first.ended(live, ENDING)
        await scene.led(first, 1.0)
        second = scene.manager()
        await second.load()
        await second.ended(live, ENDING)
        await scene.led(second, 1.0)
        assert scene.told() == ["failed"]
        retried = a_job()
        retried.round = 1
        await second.ended(retried, ENDING)
        await scene.led(second, 1.0)
        assert scene.told() == ["failed", "failed"]
        assert len({one.id for _, one in scene.tried}) == 2, "another round is another end"

    play(main)


def test_an_end_waits_for_the_bucket() -> None:
    async def main() -> None:
        scene = Scene(OPS)

        async def away(*_: Any, **__: Any) -> str:
            raise Unreachable("The bucket is away.")

        scene.objects.put = away  # type: ignore[method-assign]
        with pytest.raises(Unreachable):
            await scene.manager().ended(a_job(), ENDING)

    play(main)


def test_a_bucket_that_is_gone_is_not_tried_for_ever() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        tries = 0

        async def gone(*_: Any, **__: Any) -> str:
            nonlocal tries
            tries += 1
            raise NotFound("There is no such bucket.")

        scene.objects.put = gone  # type: ignore[method-assign]
        with pytest.raises(NotFound):
            await scene.manager().ended(a_job(), ENDING)
        assert tries < 20

    play(main)


def test_a_job_that_nobody_waits_for_costs_no_request() -> None:
    async def main() -> None:
        scene = Scene(replace(OPS, on=("succeeded",)))
        await scene.manager().ended(a_job(), ENDING)
        with pytest.raises(NotFound):
            await scene.kept()

    play(main)


def test_a_job_is_told_to_one_of_the_grids_targets_that_it_may_name() -> None:
    async def main() -> None:
        chat = Target("chat", "webhook", "https://hooks.example.org/s3cret", on=(), jobs=True)
        scene = Scene(chat)
        live = a_job("sums", NotifyDef("target", "chat", ("failed",)))
        await scene.manager().ended(live, ENDING)
        assert b"s3cret" not in await scene.objects.get(naming.NOTIFICATIONS)
        await scene.led(scene.manager(), 1.0)
        (target,) = scene.reached
        assert (target.kind, target.to, target.job) == ("webhook", chat.to, "sums-1")

    play(main)


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (NotifyDef("target", "ops", ("failed",)), "no target 'ops' that jobs may name"),
        (NotifyDef("webhook", "http://127.0.0.1/"), "the manager's own machine"),
        (
            NotifyDef("webhook", "https://h.example/", secret="env:BATCHLAB_NOTIFY_A"),
            "BATCHLAB_NOTIFY_A may not sign",
        ),
    ],
)
def test_what_the_operator_does_not_allow_any_more_is_given_up(own: NotifyDef, told: str) -> None:
    """Whatever was admitted, and whoever has written it into the bucket."""

    async def main() -> None:
        scene = Scene(replace(OPS, on=("capped",)))
        await scene.manager().ended(a_job("sums", own), ENDING)
        await scene.led(scene.manager(), 1.0)
        assert scene.tried == []
        (kept,) = (await scene.kept())["log"]
        assert kept["state"] == "given up"
        assert told in kept["error"]

    play(main)


def test_a_jobs_own_target_is_told_though_the_job_is_forgotten() -> None:
    async def main() -> None:
        scene = Scene()
        own = NotifyDef("sns", "arn:aws:sns:eu-central-1:123456789012:batch", ("failed",))
        await scene.manager().ended(a_job("mine", own), ENDING)
        await scene.led(scene.manager(), 1.0)
        assert [(one.target, one.own) for _, one in scene.tried] == [("mine-1#1", own)]

    play(main)


# --- Tries ---------------------------------------------------------------------------------------


def test_tries_come_ever_later_and_survive_the_manager() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        scene.answers = lambda n: NotDelivered("It is away.") if n <= 5 else None
        first = scene.manager()
        await first.ended(a_job(), ENDING)
        await scene.led(first, 10.0)
        assert [at for at, _ in scene.tried] == pytest.approx([0, 2, 6])
        assert first.trouble("sums-1").endswith("tries so far: 3, the last: It is away")
        assert "s3cret" not in first.trouble("sums-1")
        second = scene.manager()
        await scene.led(second, 100.0)
        assert [at for at, _ in scene.tried] == pytest.approx([0, 2, 6, 14, 30, 62])
        assert [one.attempts for _, one in scene.tried] == [0, 1, 2, 3, 4, 5]
        assert len({one.id for _, one in scene.tried}) == 1
        assert second.trouble("sums-1") == ""
        assert scene.counts.deliveries == {("webhook", "failed"): 5, ("webhook", "delivered"): 1}

    play(main)


def test_what_no_try_can_mend_is_given_up_at_once() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        scene.answers = lambda _: NotDelivered("It is a redirect.", final=True)
        manager = scene.manager()
        await manager.ended(a_job(), ENDING)
        await scene.led(manager, 5000.0)
        assert len(scene.tried) == 1
        (one,) = manager.book.log
        assert (one.state, one.error, one.attempts) == ("given up", "It is a redirect.", 1)

    play(main)


def test_after_a_day_it_is_given_up() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        scene.answers = lambda _: NotDelivered("It is away.")
        manager = scene.manager()
        await manager.ended(a_job(), replace(ENDING, ended_s=EPOCH_S))
        await scene.led(manager, 2 * GIVE_UP_S)
        assert GIVE_UP_S <= scene.tried[-1][0] < GIVE_UP_S + 1000
        assert 90 < len(scene.tried) < 120, "every quarter of an hour in the end"
        assert manager.book.log[-1].state == "given up"
        assert not manager.book.pending

    play(main)


def test_a_target_that_is_gone_is_given_up() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        await scene.manager().ended(a_job(), ENDING)
        scene.targets.clear()
        manager = scene.manager()
        await scene.led(manager, 1.0)
        assert "no target 'ops' any more" in manager.book.log[0].error
        assert not scene.tried

    play(main)


def test_one_target_that_is_slow_holds_up_no_other() -> None:
    async def main() -> None:
        scene = Scene(OPS, replace(OPS, name="slow", to="https://slow.example.org/"))
        done: list[str] = []

        async def deliver(target: Target, one: Notification) -> None:
            await asyncio.sleep(100.0 if target.name == "slow" else 0.0)
            done.append(target.name)

        scene.deliver = deliver  # type: ignore[method-assign]
        manager = scene.manager()
        for number in range(20):
            await manager.ended(a_job(f"j{number}"), ENDING)
        await scene.led(manager, 250.0)
        assert done == ["ops"] * 20 + ["slow"] * 4, "two at a time"

    play(main)


def test_two_leaders_lose_nothing_of_each_other() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        one, two = scene.manager(), scene.manager()
        await one.load()
        await two.load()
        await one.ended(a_job("a"), ENDING)
        await two.ended(a_job("b"), ENDING)
        await one.ended(a_job("c"), ENDING)
        assert {kept["job"] for kept in (await scene.kept())["pending"]} == {"a-1", "b-1", "c-1"}
        await scene.led(scene.manager(), 1.0)
        await two.ended(a_job("d"), ENDING)
        kept = await scene.kept()
        assert [one["job"] for one in kept["pending"]] == ["d-1"], "what was told stays told"

    play(main)


def test_what_waits_is_bounded() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        manager = scene.manager()
        for number in range(MOST_PENDING):
            live = a_job(f"j{number}")
            one = replace(_notification(live), id=str(number))
            manager.book.pending[one.id] = one
        await manager.ended(a_job("last"), ENDING)
        assert len(manager.book.pending) == MOST_PENDING
        assert [one.id for one in manager.book.log] == ["0"]

    play(main)


def _notification(live: LiveJob) -> Notification:
    return Notification("", "ended", live.id, "ops", None, "{}", EPOCH_S)


# --- What is written -----------------------------------------------------------------------------


class Counted(SimObjects):
    """Counts how often the book is written, and how much of it."""

    puts = 0
    size = 0

    async def put(self, key: str, data: bytes, **how: Any) -> str:
        self.puts += 1
        self.size += len(data)
        return await super().put(key, data, **how)


def test_while_a_target_is_away_the_book_is_written_seldom() -> None:
    """It was written whole after each try: two megabytes, twice a second, for a day."""

    async def main() -> None:
        scene = Scene(OPS)
        objects = Counted()
        scene.objects = objects
        scene.ports = replace(scene.ports, objects=objects)
        scene.answers = lambda _: NotDelivered("It is away.")
        manager = scene.manager()
        for number in range(200):
            live = a_job(f"j{number}")
            one = replace(_notification(live), id=str(number))
            manager.book.pending[one.id] = one
        await manager.ended(a_job("last"), ENDING)
        assert objects.puts == 1
        await scene.led(manager, 3600.0)
        assert len(scene.tried) > 2000
        assert objects.puts <= 3600 / 60 + 20
        # What it has tried is known to the next one all the same.
        kept = {one["id"]: one["attempts"] for one in (await scene.kept())["pending"]}
        assert len(kept) == 201
        assert all(attempts > 10 for attempts in kept.values())
        # And when the target is back, many that are delivered share a write.
        scene.answers = lambda _: None
        before = objects.puts
        second = scene.manager()
        await scene.led(second, 1800.0)
        assert not second.book.pending
        assert objects.puts - before < 70
        assert (await scene.kept())["pending"] == []

    play(main)


def test_what_was_delivered_is_written_at_once_where_nothing_was_just_before() -> None:
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


def test_a_bucket_that_is_away_meanwhile_gets_it_later() -> None:
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
        assert [one.state for one in manager.book.log] == ["delivered"]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    play(main)


# --- Other moments -------------------------------------------------------------------------------


def test_too_many_failures_are_told_once() -> None:
    async def main() -> None:
        scene = Scene(replace(OPS, on=("failures",), failures=3))
        live = scene.lives[JobId("sums-1")] = a_job(failed=2)
        manager = scene.manager()
        await scene.led(manager, 5.0)
        assert scene.told() == []
        for failed in (3, 4):
            live.stages[MAP] = StageRecord(StageCounts(MAP, 10, failed=failed))
            await scene.led(manager, 5.0)
        await scene.led(scene.manager(), 5.0)  # nor by the next manager
        assert scene.told() == ["failures"]

    play(main)


def test_a_job_that_stands_still_is_told_once_with_the_reason() -> None:
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
            live.capped = "its cost is capped"
        elif why == "retries later":
            live.outstanding = {MAP: {bundle.id: Outstanding(bundle, 10**9)}}
        else:
            held = wire.Held("q", "r", live.id, MAP, bundle.id, True)
            beat = wire.Beat("w-1", "i-1", "default", 1.0, 1, 1, (held,), 1)
            scene.workers["i-1"] = Seen(beat, 0.0, {held: 0.0})
        await scene.led(scene.manager(), 300.0)
        assert scene.told() == []

    play(main)


def test_a_cap_that_holds_a_job_back_is_told_once() -> None:
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


def test_who_ends_waits_for_what_was_not_tried_yet_but_not_for_ever() -> None:
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
        await manager.tried(3.0)
        assert scene.clock.monotonic_s() - begun_s == pytest.approx(3.0, abs=0.1)
        release.set()
        await manager.tried(3.0)
        assert scene.clock.monotonic_s() - begun_s == pytest.approx(3.0, abs=0.2)
        assert len(scene.tried) == 2
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    play(main)


# --- Tests by hand -------------------------------------------------------------------------------


def test_a_test_is_sent_once_and_logged() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        scene.answers = lambda n: NotDelivered("It is away.") if n == 1 else None
        manager = scene.manager()
        assert await manager.test("ops") == "It is away."
        assert await manager.test("ops") == ""
        with pytest.raises(NotFound, match="no target 'oops'") as caught:
            await manager.test("oops")
        assert "ops" in caught.value.remedy
        states: Sequence[str] = [one["state"] for one in (await scene.kept())["log"]]
        assert states == ["given up", "delivered"]

    play(main)
