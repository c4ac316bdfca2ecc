"""The recorded usage, which never decreases, whichever leader writes last."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.sql import open_memory
from batchlab.core.errors import BackendError, NotFound, Unreachable
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, JobId, JobState, Pool, StageCounts, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import JobRecord, StageRecord
from batchlab.core.pricing.request_costs import RequestCounter, Requests
from batchlab.core.pricing.usage import Account, Accounting, Kind, Meter
from batchlab.core.protocol import json_format, object_keys
from batchlab.manager import recorded_data
from batchlab.manager.context import Context
from batchlab.manager.live_jobs import LiveJobs
from batchlab.manager.recorder import Recorder, ReportQueue
from batchlab.manager.spending import Spending
from batchlab.manager.state import LiveJob, Ports
from batchlab.manager.versioned_document import VersionedDocument
from batchlab.sim.actors import SimClock, SimIds
from batchlab.sim.event_loop import SimLoop
from tests.support.no_fleet import NoFleet

JOB = JobId("sums-1")
MAP = StageName("map")
KIND = Kind("default")


class Bucket(SimObjects):
    """A bucket that counts requests and does not respond to requests for the keys `away`."""

    away: frozenset[str] = frozenset()
    answers_lost = 0
    requests = 0

    async def put(self, key: str, data: bytes, **how: Any) -> str:
        self.requests += 1
        if key in self.away:
            raise Unreachable("The bucket is away.")
        etag = await super().put(key, data, **how)
        if self.answers_lost:
            self.answers_lost -= 1
            raise Unreachable("The answer is lost.")
        return etag

    async def get_if_changed(self, key: str, etag: str | None, *, limit: int | None = None) -> tuple[bytes, str] | None:
        self.requests += 1
        if key in self.away:
            raise Unreachable("The bucket is away.")
        return await super().get_if_changed(key, etag, limit=limit)


class Scene:
    """A bucket that leaders share."""

    def __init__(self) -> None:
        self.objects = Bucket()
        self.rng = random.Random(1)
        self.clock = SimClock(asyncio.get_running_loop(), 1_700_000_000.0)
        self.ports = Ports(
            self.objects,
            None,  # type: ignore[arg-type]
            NoFleet(),
            open_memory(),
            self.clock,
            SimIds(self.rng),
            Patience(self.rng, limit_s=1.0),
        )

    def leader(self) -> Leader:
        return Leader(self)

    async def used(self) -> dict[str, Any]:
        return json_format.loads(await self.objects.get(object_keys.reference_key(JOB)))

    async def bundles(self) -> int:
        return int((await self.used())["account"]["bundles"])


class Leader:
    """A leader with its account and its recorder."""

    def __init__(self, scene: Scene) -> None:
        self.lives = LiveJobs()
        self.written: list[JobId] = []
        self.on_report: Callable[[JobId, float], None] = lambda job, _: self.written.append(job)
        context = Context(scene.ports, pools={"default": Pool("default")}, lives=self.lives)
        self.recorder = context.recorder = Recorder(scene.ports, self.lives, context.registry)
        context.reports = cast(ReportQueue, SimpleNamespace(add=lambda job, took_s: self.on_report(job, took_s)))
        self.tally = RequestCounter()
        self.spending = Spending(context, Accounting(tally=self.tally))

    async def leads(self) -> None:
        await self.recorder.load()
        await self.spending.load()

    async def conducts(self, *, is_new: bool, saves: bool = True) -> LiveJob:
        job = JobDef(JOB, "sums", (StageDef(MAP, handler="m:f"),), 0.0)
        stages = {MAP: StageRecord(StageCounts(MAP))}
        live = LiveJob(JobRecord(job, JobState.RUNNABLE), stages)
        await self.spending.open_account(live, is_new=is_new)
        self.recorder.adopt(live)
        self.lives[JOB] = live
        if saves:
            await self.saves()
        return live

    async def saves(self) -> None:
        """Count the usage, and write the account."""
        await self.spending.close()

    async def ends(self) -> None:
        self.lives.clear()
        await self.saves()


def play(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    SimLoop().run(main())


def test_usage_of_a_deleted_job_is_not_stored() -> None:
    """A deletion waits for a running write of the job's usage, and prevents later writes."""

    async def main() -> None:
        scene = Scene()
        leader = scene.leader()
        await leader.leads()
        await leader.conducts(is_new=True)
        leader.lives.clear()
        await leader.spending.forget(JOB)
        await leader.saves()
        assert await scene.objects.head(object_keys.reference_key(JOB)) is None
        assert leader.written == []
        await leader.conducts(is_new=True)
        leader.lives.clear()
        put, is_held = scene.objects.put, asyncio.Event()

        async def slow(key: str, *args: Any, **options: Any) -> str:
            if key == object_keys.reference_key(JOB):
                is_held.set()
                await asyncio.sleep(1)
            return await put(key, *args, **options)

        scene.objects.put = slow  # type: ignore[method-assign]
        saving = asyncio.create_task(leader.saves())
        await is_held.wait()
        await leader.spending.forget(JOB)
        assert await scene.objects.head(object_keys.reference_key(JOB)) is not None
        await scene.objects.delete([object_keys.reference_key(JOB)])
        await saving
        await leader.saves()
        assert await scene.objects.head(object_keys.reference_key(JOB)) is None

    play(main)


def test_next_leader_continues_after_a_kill_between_two_puts() -> None:
    async def main() -> None:
        scene = Scene()
        first = scene.leader()
        await first.leads()
        live = await first.conducts(is_new=True)
        live.account.bundles = 9
        live.account.bill(KIND, 60.0)
        # The leader dies after it has written the job's account and before it writes the grid's account.
        scene.objects.away = frozenset({object_keys.USE})
        await first.ends()
        assert await scene.bundles() == 9
        scene.objects.away = frozenset()
        second = scene.leader()
        await second.leads()
        await second.saves()
        assert second.written == [JOB]
        assert await scene.bundles() == 9
        account = Account.from_json((await scene.used())["account"])
        assert account.billed_s == {KIND: 60.0}
        assert account.is_whole

    play(main)


def test_a_leader_that_stood_still_does_not_write_over_what_the_other_one_has_counted() -> None:
    async def main() -> None:
        scene = Scene()
        first, second = scene.leader(), scene.leader()
        await first.leads()
        live = await first.conducts(is_new=True)
        live.account.bundles, live.account.requests = 3, Requests(sqs=50)
        await first.saves()
        first.spending.meter.total.bill(KIND, 1.0)
        await second.leads()
        other = await second.conducts(is_new=False)
        assert other.account.bundles == 3
        other.account.bundles, other.account.requests = 8, Requests(sqs=20, s3_puts=7)
        second.spending.meter.total.bill(KIND, 100.0)
        await second.ends()
        # The first leader continues, and does not know that another one has led.
        await first.ends()
        assert await scene.bundles() == 8
        requests = Requests(*(await scene.used())["account"]["requests"])
        assert requests == Requests(sqs=50, s3_puts=7)
        books = json_format.loads(await scene.objects.get(object_keys.USE))
        assert Account.from_json(books["meter"]["total"]).billed_s == {KIND: 100.0}

    play(main)


def test_returning_leader_continues_from_the_stored_usage() -> None:
    async def main() -> None:
        scene = Scene()
        first, second = scene.leader(), scene.leader()
        await first.leads()
        live = await first.conducts(is_new=True)
        live.account.bundles = 3
        await first.saves()
        await second.leads()
        (await second.conducts(is_new=False)).account.bundles = 5
        second.spending.caps.max_cost_usd = 7.0
        second.spending.caps.user_caps[JOB] = 2.0
        await second.saves()
        first.lives.clear()
        await first.spending.reread()
        again = await first.conducts(is_new=False)
        assert again.account.bundles == 5
        assert first.spending.caps.max_cost_usd == 7.0
        assert first.spending.caps.user_caps == {JOB: 2.0}

    play(main)


@pytest.mark.parametrize("answers_lost", [0, 1, 2])
def test_a_job_that_ends_costs_one_put_more_than_the_grids_own(answers_lost: int) -> None:
    async def main() -> None:
        scene = Scene()
        leader = scene.leader()
        await leader.leads()
        live = await leader.conducts(is_new=True)
        live.account.bundles = 4
        scene.objects.requests, scene.objects.answers_lost = 0, answers_lost
        await leader.ends()
        assert scene.objects.requests == (2 if not answers_lost else scene.objects.requests)
        assert scene.objects.requests <= 2 + 3 * answers_lost
        assert await scene.bundles() == 4

    play(main)


def test_a_round_more_is_counted_on_top_and_written_over_what_was_read() -> None:
    async def main() -> None:
        scene = Scene()
        leader = scene.leader()
        await leader.leads()
        (await leader.conducts(is_new=True)).account.bundles = 4
        await leader.ends()
        live = await leader.conducts(is_new=False)
        assert live.account.bundles == 4
        live.account.bundles += 2
        scene.objects.requests = 0
        await leader.ends()
        assert scene.objects.requests == 2
        assert await scene.bundles() == 6

    play(main)


@pytest.mark.parametrize("there", [b"{}", b'{"v":1}', b'{"v":1,"account":{}}', b'{"v":9}', b"\xff"])
def test_usage_record_of_a_later_release_is_unchanged(there: bytes) -> None:
    async def main() -> None:
        scene = Scene()
        await scene.objects.put(object_keys.reference_key(JOB), there)
        leader = scene.leader()
        await leader.leads()
        live = await leader.conducts(is_new=False)
        assert not live.account.is_whole
        await leader.ends()
        assert await scene.objects.get(object_keys.reference_key(JOB)) == there
        assert leader.written == [JOB], "nobody waits for it any more"

    play(main)


@pytest.mark.parametrize("there", [b"", b'{"v":1}', b'{"v":1,"meter":{},"own":[],"cap":null,"caps":{},"jobs":{}}'])
def test_unreadable_usage_records_do_not_prevent_leadership(there: bytes) -> None:
    async def main() -> None:
        scene = Scene()
        await scene.objects.put(object_keys.USE, there)
        leader = scene.leader()
        await leader.leads()
        await leader.saves()
        assert json_format.loads(await scene.objects.get(object_keys.USE))["jobs"] == {}

    play(main)


def test_leader_without_the_bucket_does_not_forget_the_cost_cap() -> None:
    async def main() -> None:
        scene = Scene()
        first, second = scene.leader(), scene.leader()
        await first.leads()
        first.spending.caps.max_cost_usd = 7.0
        await first.saves()
        scene.objects.away = frozenset({object_keys.USE})
        with pytest.raises(Unreachable):
            await second.leads()
        scene.objects.away = frozenset()
        await second.leads()
        assert second.spending.caps.max_cost_usd == 7.0

    play(main)


def test_missing_bucket_is_not_retried_forever() -> None:
    async def main() -> None:
        scene = Scene()
        kept = VersionedDocument(scene.ports, object_keys.USE, lambda _: None)
        tries = 0

        async def gone(*_: Any, **__: Any) -> str:
            nonlocal tries
            tries += 1
            raise NotFound("There is no such bucket.")

        scene.objects.put = gone  # type: ignore[method-assign]
        with pytest.raises(BackendError):
            await kept.write(lambda: b"x")
        assert tries < 20

    play(main)


# --- Recorded history ----------------------------------------------------------------------------


def part(*points: tuple[float, float], **more: Any) -> dict[str, Any]:
    """Return a job's history with samples of its pool, as pairs of the time and the duration."""
    series = [[at_s, step_s, 0, 0, 0, 0, 1, 0, 1, 0, 1, 4, 0.5] for at_s, step_s in points]
    pool = {"slots": 4, "type": "", "series": series}
    return {**recorded_data.empty_part(), "pools": {"default": pool}, **more}


def times(doc: dict[str, Any]) -> list[float]:
    return [point[0] for point in doc["pools"]["default"]["series"]]


def test_conflicting_leaders_lose_and_duplicate_nothing() -> None:
    """One leader stopped after 4 s. The other leader began with the data that was written at 2 s, and saw the job from
    6 s on."""
    one = part((1, 1), (2, 1), (3, 1), (4, 1), requests=[[4.0, 1.0, 9, 0, 0, 0, 0]])
    one["duplicates"] = {"map": {"event": [2, 0.5]}}
    one["workers"] = {"w-1": ["i-1", "default", 4, 1.0, 4.0]}
    one["instances"] = {"i-1": ["default", "", "", "", 0.0, 1.0, None, "InService", "", 4]}
    other = part((1, 1), (2, 1), (6, 0), (7, 1), requests=[[7.0, 1.0, 5, 3, 0, 0, 0]])
    other["duplicates"] = {"map": {"event": [1, 0.7], "message": [1, 0.0]}}
    other["workers"] = {"w-1": ["i-1", "default", 4, 2.0, 7.0]}
    other["instances"] = {"i-1": ["default", "", "", "", 0.0, 1.0, 7.0, "Terminated", "", 4]}
    both = recorded_data.merge_parts(one, other)
    assert times(both) == [1, 2, 3, 4, 6, 7]
    assert both["duplicates"] == {"map": {"event": [2, 0.7], "message": [1, 0.0]}}
    assert both["workers"] == {"w-1": ["i-1", "default", 4, 1.0, 7.0]}
    assert both["instances"]["i-1"][6] == 7.0
    assert both["requests"] == [[4.0, 1.0, 9, 0, 0, 0, 0], [7.0, 1.0, 9, 3, 0, 0, 0]]
    for again in (one, other, both):
        assert recorded_data.merge_parts(both, again) == both
    assert times(recorded_data.merge_parts(other, one)) == [1, 2, 3, 4, 6, 7]


def test_samples_thinned_by_another_leader_are_not_repeated() -> None:
    assert times(recorded_data.merge_parts(part((4, 4), (5, 1)), part((1, 1), (2, 1), (3, 1)))) == [4, 5]


def test_stored_documents_are_merged_with_live_jobs() -> None:
    job = {"since_s": 3.0, "pools": ["default"], "requests": [], "duplicates": {}}
    ours = {**part((3, 1)), "jobs": {"a": job}, "earlier": {}}
    theirs = {**part((1, 1)), "jobs": {"a": {**job, "since_s": 1.0}}, "earlier": {"a": part()}}
    both = recorded_data.merge_documents(theirs, ours)
    assert both["jobs"] == {"a": {**job, "since_s": 1.0}}
    assert times(both) == [1, 3]
    assert list(both["earlier"]) == ["a"]


def test_a_leader_that_wakes_records_what_the_other_one_has_seen() -> None:
    async def main() -> None:
        scene = Scene()
        first, second = scene.leader(), scene.leader()
        await first.leads()
        await first.conducts(is_new=True)
        first.recorder.record_repeated_outcome(JOB, MAP)
        first.recorder._is_due = True
        await first.recorder.save()
        await second.leads()
        await second.conducts(is_new=False)
        for _ in range(2):
            second.recorder.record_repeated_outcome(JOB, MAP)
        second.recorder._is_due = True
        await second.recorder.save()
        # The first leader does not know of the other one and writes too, but no data is lost.
        first.recorder._is_due = True
        await first.recorder.save()
        await first.ends()
        assert (await scene.used())["record"]["duplicates"] == {MAP: {"event": [3, 0.0]}}

    play(main)


# --- Earlier reporters ---------------------------------------------------------------------------


def test_requests_until_the_end_of_a_job_belong_to_it() -> None:
    """The job gets all requests if it ends before the first count."""

    async def main() -> None:
        scene = Scene()
        leader = scene.leader()
        await leader.leads()
        await leader.conducts(is_new=True, saves=False)
        leader.spending.close_ended()
        leader.tally.sqs()
        await leader.ends()
        account = Account.from_json((await scene.used())["account"])
        assert account.requests == Requests(sqs=1)
        assert leader.spending.meter.nobody.requests == Requests()

    play(main)


def test_worker_that_still_reports_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The manager reports first. If it were forgotten, all of its requests would be counted again."""
    monkeypatch.setattr("batchlab.core.pricing.usage.MAX_PROCESSES", 3)
    meter = Meter()
    for n in range(1, 10):
        meter.count_requests("manager", Requests(sqs=n), {}, {})
        meter.count_requests(f"w-{n}", Requests(sqs=1), {}, {})
    assert meter.total.requests.sqs == 9 + 9


@pytest.mark.parametrize("saves", [False, True])
def test_unwritten_round_is_reported_with_the_next(saves: bool) -> None:
    """A job is retried between two saves, and the record of its first round was lost before. The record must also
    survive a save of the account during the next round."""

    async def main() -> None:
        scene = Scene()
        leader = scene.leader()
        took: list[float] = []
        leader.on_report = lambda _, took_s: took.append(took_s)
        await leader.leads()
        for round_, seconds in enumerate((600.0, 1.0, 2.0)):
            await leader.conducts(is_new=not round_, saves=saves)
            leader.spending.close_ended()
            leader.recorder.record_repeated_outcome(JOB, MAP)
            await asyncio.sleep(seconds)
            leader.lives.clear()
            leader.spending.close_ended()
        assert took == []
        await leader.saves()
        assert took == [600.0]
        assert (await scene.used())["record"]["duplicates"] == {MAP: {"event": [3, 0.0]}}
        assert leader.spending._ended == {}

    play(main)


def test_a_clock_that_is_set_back_makes_no_long_job_a_short_one() -> None:
    """Before, the performance data of such a job was not written."""

    async def main() -> None:
        scene = Scene()
        leader = scene.leader()
        took: list[float] = []
        leader.on_report = lambda _, took_s: took.append(took_s)
        await leader.leads()
        await leader.conducts(is_new=True)
        await asyncio.sleep(600.0)
        scene.clock.jump(-3600.0)
        await leader.ends()
        assert took == [600.0]

    play(main)


def test_new_jobs_share_the_cap_of_the_grid_before_the_next_tick() -> None:
    async def main() -> None:
        lives = LiveJobs()
        context = Context(Scene().ports, pools={"default": Pool("default")}, lives=lives)
        spending = Spending(context, Accounting(rates=lambda _: 3600.0, max_cost_usd=10.0))
        spending.update_budgets()
        left_usd = [spending.caps.remaining_usd()]
        for name in ("a", "b"):
            job = JobDef(JobId(name), "sums", (StageDef(MAP, handler="m:f"),), 0.0)
            live = LiveJob(JobRecord(job, JobState.RUNNABLE), {MAP: StageRecord(StageCounts(MAP, planned=2))})
            live.add_outstanding([(Bundle(job.id, MAP, TaskSet.span(0, 2)), 0.0)])
            lives[job.id] = live
            spending.add_budget(live)
            assert live.budget is not None
            left_usd.append(live.budget.left_usd)
        # A task of unknown duration counts as one second of a slot that is in use 80% of the time.
        assert left_usd == pytest.approx([10.0, 7.5, 5.0])
        spending.update_budgets()
        assert spending.caps.remaining_usd() == pytest.approx(5.0)

    SimLoop().run(main())
