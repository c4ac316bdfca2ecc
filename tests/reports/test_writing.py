"""The data of a job, written from the bucket of a simulated grid, and compared with the ledger, the bill, and the
fleet."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pytest

from batchlab.core.commit import address
from batchlab.core.errors import UsageError
from batchlab.core.model import Failure, FailureKind, JobId, JobState, Pool
from batchlab.core.port_retries import Patience
from batchlab.core.pricing.usage import Accounting
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.core.retry_rule import RetryRule
from batchlab.manager.recorder import ReportQueue
from batchlab.reports.queries import store
from batchlab.reports.tables.build import TableBuilder
from batchlab.reports.tables.gather import JobDataReader
from batchlab.reports.tables.schema import TABLES
from batchlab.reports.tables.write import Writer, fetch, index_of
from batchlab.sim.tasks import AttemptInput, ScriptedAttempt
from batchlab.sim.world import World
from tests.support.reports import simulated_run as told
from tests.support.reports.simulated_run import answers, one
from tests.support.sim.scenes import A, B, C, ended, in_world, job, kill_manager, leader, stage, submitted

POOLS = (Pool("default", 0, 3, 2, instance_type="m7i.large"),)
AGAIN = RetryRule(attempts=3, backoff_s=1.0, jitter=0.0)


def recorded(**more: Any) -> dict[str, Any]:
    return {"pools": POOLS, "accounting": Accounting(), "reports": ReportQueue(), **more}


def patience(world: World) -> Patience:
    return Patience(world.rng("reader"))


async def accounted(world: World, name: str = "job") -> None:
    """Wait until the usage of the job is in the bucket."""
    async with asyncio.timeout(300):
        while not await world.objects.head(object_keys.reference_key(JobId(name))):
            await asyncio.sleep(1.0)


def moody(scene: AttemptInput) -> ScriptedAttempt:
    """Return the behavior of a task: in stage a, every fifth task fails once, and in stage b, one task fails
    permanently. The other tasks take 1 s to 3 s."""
    run_s = 1.0 + scene.task % 3
    first, name = scene.bundle.attempt == 1, scene.stage.name
    if name == A and scene.task % 5 == 0 and first:
        place = '  File "/code/shop.py", line 12, in price\n    raise'
        reason = f"row {scene.task} has no price"
        failure = Failure(0, FailureKind.EXCEPTION, reason, "ValueError", traceback=place)
        return ScriptedAttempt(run_s / 2, failure=failure)
    if name == B and scene.task == 7:
        return ScriptedAttempt(run_s, failure=Failure(0, FailureKind.EXIT, "exit code 3", exit_code=3))
    return ScriptedAttempt(run_s, scene.task)


STAGES = (stage(A, retry=AGAIN), stage(B, A, retry=replace(AGAIN, attempts=2)), stage(C, A, gather="*"))


def test_a_job_with_retries_failures_and_a_gather(tmp_path: Path) -> None:
    async def act(world: World) -> Any:
        made = job(*STAGES, items=40, max_failures=1, tags=(("team", "shop"),), share="research")
        await submitted(world, made)
        assert (await ended(world, made)).state is JobState.SUCCEEDED
        await accounted(world)
        index = await told.written(world.objects, patience(world), made.id, tmp_path, *POOLS)
        ledger = await world.ledger.rows(made.id)
        return index, ledger, await told.bill_of(world, ledger, POOLS)

    index, ledger, bill = in_world(act, script=moody, **recorded())
    assert index.is_final
    with answers(tmp_path) as ask:
        told.check_against_ledger(ask, ledger)
        told.check_against_bill(ask, bill)
        for table in TABLES:
            assert one(ask, f"SELECT count(*) FROM {table.name}") == index.rows[table.name]

        # The next checks are about attempts and fingerprints.
        assert one(ask, "SELECT count(*) FROM attempts WHERE stage = 'a' AND state = 'FAILED'") == 8
        prints = ask(
            "SELECT stage, fingerprint, count(*) AS n FROM attempts WHERE state = 'FAILED' GROUP BY ALL ORDER BY ALL"
        )
        assert prints == [
            {"stage": "a", "fingerprint": prints[0]["fingerprint"], "n": 8},
            {"stage": "b", "fingerprint": prints[1]["fingerprint"], "n": 2},
        ]
        (gone,) = ask("SELECT * FROM tasks WHERE state = 'FAILED'")
        assert (gone["stage"], gone["task"], gone["attempts"]) == ("b", 7, 2)
        assert (gone["run_s"], gone["failed_run_s"]) == (2.0, 4.0)
        (again,) = ask("SELECT * FROM tasks WHERE stage = 'a' AND task = 5")
        assert (again["attempts"], again["run_s"], again["failed_run_s"]) == (2, 3.0, 1.5)
        assert again["ready_s"] < again["started_s"]

        # The times are consistent: no task starts before it is ready, ends before its start, or runs outside of the
        # job's time.
        assert not ask("SELECT * FROM bundles WHERE wait_s < 0 OR started_s < ready_s - 1e-6")
        assert not ask(
            "SELECT t.* FROM tasks t JOIN jobs j USING (job) WHERE t.started_s < "
            "j.submitted_s OR t.ended_s > j.ended_s OR t.ended_s < t.started_s"
        )
        backoff = one(
            ask,
            "SELECT min(r.ready_s - f.ended_s) FROM bundles r JOIN bundles f "
            "ON f.stage = r.stage AND f.attempt = 1 AND r.attempt = 2 "
            "AND r.first_task BETWEEN f.first_task AND f.last_task WHERE r.stage = 'a'",
        )
        assert backoff == pytest.approx(1.0)
        # The bundles of a worker's slots do not overlap, so their slot time is at most the available time.
        (use,) = ask("SELECT sum(took_s * slots) AS busy, max(ended_s) - min(started_s) AS span FROM bundles")
        assert use["busy"] <= use["span"] * 3 * 2 + 1e-6
        assert one(ask, "SELECT tags FROM jobs") == '{"team": "shop"}'
        assert one(ask, "SELECT share FROM jobs") == "research"

        # The next checks are about the sampled fleet.
        assert one(ask, "SELECT count(*) FROM workers WHERE instance IS NULL") == 0
        known = {row["instance"] for row in ask("SELECT instance FROM instances")}
        assert {row["instance"] for row in ask("SELECT instance FROM workers")} <= known
        assert not ask("SELECT * FROM instances WHERE boot_s < 0 OR slots <> 2 OR type <> 'm7i.large'")
        (first, *_) = ask("SELECT * FROM scaling ORDER BY at_s")
        assert (first["before"], first["pool"]) == (0, "default")
        assert "a backlog of" in first["reason"]
        assert one(ask, "SELECT max(in_service) FROM fleet") == 3
        assert one(ask, "SELECT max(busy_slots) FROM fleet") <= 6
        assert one(ask, "SELECT max(visible + in_flight) FROM queues") > 0
        assert not ask("SELECT * FROM duplicates WHERE harmful > 0")


def test_repeated_write_gives_the_same_files(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        made = job(stage(A), stage(B, A), items=20)
        await submitted(world, made)
        await ended(world, made)
        await accounted(world)
        for name in ("first", "second"):
            await told.written(world.objects, patience(world), made.id, tmp_path / name, *POOLS)

    in_world(act, script=moody, **recorded())
    with duckdb.connect(":memory:") as connection:
        for table in TABLES:
            first, second = (
                connection.execute(
                    "SELECT * FROM read_parquet(?) ORDER BY ALL", [str(tmp_path / n / table.file)]
                ).fetchall()
                for n in ("first", "second")
            )
            assert first == second, table.name


def test_a_retry_and_a_gather_that_is_planned_anew(tmp_path: Path) -> None:
    """The second round repairs the failures, and the gather's first plan does not count any more."""

    def script(scene: AttemptInput) -> ScriptedAttempt:
        if scene.stage.name == A and scene.task == 3 and scene.bundle.round == 0:
            return ScriptedAttempt(1.0, failure=Failure(0, FailureKind.EXIT, "exit code 1", exit_code=1))
        return ScriptedAttempt(1.0, scene.task)

    async def act(world: World) -> Any:
        once = RetryRule(attempts=1)
        made = job(stage(A, retry=once), stage(B, A), stage(C, B, gather="*"), items=10)
        await submitted(world, made)
        assert (await ended(world, made)).state is JobState.FAILED
        await accounted(world)
        await told.written(world.objects, patience(world), made.id, tmp_path / "before", *POOLS)
        before = await world.ledger.rows(made.id)
        await world.ask(lambda m: m.job_commands.retry(made.id), "retry")
        assert (await ended(world, made)).state is JobState.SUCCEEDED
        await asyncio.sleep(5.0)
        await told.written(world.objects, patience(world), made.id, tmp_path / "after", *POOLS)
        return before, await world.ledger.rows(made.id)

    before, after = in_world(act, script=script, **recorded())
    with answers(tmp_path / "before") as ask:
        told.check_against_ledger(ask, before)
    with answers(tmp_path / "after") as ask:
        told.check_against_ledger(ask, after)
        assert one(ask, "SELECT attempts FROM tasks WHERE stage = 'a' AND task = 3") == 2
        assert one(ask, "SELECT took_s < ended_s - submitted_s FROM jobs")
        # The records of the first round still exist.
        assert one(ask, "SELECT min(f.at_s) < max(b.ended_s) FROM fleet f, bundles b WHERE b.round = 0")


def test_a_job_that_is_cancelled(tmp_path: Path) -> None:
    async def act(world: World) -> Any:
        made = job(stage(A), stage(B, A), items=60)
        await submitted(world, made)
        await asyncio.sleep(15.0)
        await world.ask(lambda m: m.job_commands.cancel(made.id), "cancel")
        assert (await ended(world, made)).state is JobState.CANCELLED
        await accounted(world)
        await told.written(world.objects, patience(world), made.id, tmp_path, *POOLS)
        return await world.ledger.rows(made.id)

    ledger = in_world(act, script=lambda _: ScriptedAttempt(2.0, 1), **recorded())
    with answers(tmp_path) as ask:
        told.check_against_ledger(ask, ledger)
        assert one(ask, "SELECT cancelled FROM jobs") > 0


def test_on_demand_while_the_job_runs(tmp_path: Path) -> None:
    async def act(world: World) -> Any:
        made = job(stage(A), stage(B, A), stage(C, B, gather="*"), items=60)
        await submitted(world, made)
        await asyncio.sleep(90.0)
        index = await told.written(world.objects, patience(world), made.id, tmp_path, *POOLS)
        return index, await world.ledger.rows(made.id)

    index, ledger = in_world(act, script=lambda _: ScriptedAttempt(30.0, 1), **recorded())
    assert not index.is_final
    assert not ledger.job.state.ended
    with answers(tmp_path) as ask:
        (whole,) = ask("SELECT state, ended_s, planned, succeeded FROM jobs")
        assert whole["state"] == "RUNNING"
        assert whole["ended_s"] is None
        assert 0 < whole["succeeded"] < whole["planned"] == 120
        assert one(ask, "SELECT planned FROM stages WHERE stage = 'c'") is None
        states = {row["state"] for row in ask("SELECT DISTINCT state FROM tasks")}
        assert states == {"SUCCEEDED", "PLANNED"}
        assert one(ask, "SELECT count(*) FROM bundles WHERE state = 'PLANNED'") > 0
        assert one(ask, "SELECT count(*) FROM fleet") > 10


def test_stop_after_the_end_is_ignored(tmp_path: Path) -> None:
    """Before, a manager that was stopped at that moment wrote the report again and did not end."""

    async def act(world: World) -> None:
        made = job(stage(A), items=6)
        await submitted(world, made)
        await ended(world, made)
        gathered = await JobDataReader(world.objects, patience(world)).gather(made.id, tmp_path)
        building = TableBuilder(gathered, told.setting(POOLS), tmp_path)
        assert building.run(tmp_path)["tasks"] == 6
        building.interrupt()

    in_world(act, script=moody, **recorded())


def test_recorded_data_survives_the_manager(tmp_path: Path) -> None:
    """At most the last minute is lost with the manager."""

    async def act(world: World) -> Any:
        made = job(stage(A), items=40)
        await submitted(world, made)
        await asyncio.sleep(100.0)
        killed_s = world.clock.now_s()
        kill_manager(world)
        await leader(world)
        await ended(world, made)
        await accounted(world)
        await told.written(world.objects, patience(world), made.id, tmp_path, *POOLS)
        return killed_s

    killed_s = in_world(act, script=lambda _: ScriptedAttempt(30.0, 1), **recorded())
    with answers(tmp_path) as ask:
        before = f"SELECT count(*) FROM fleet WHERE at_s < {killed_s - 60.0}"
        assert one(ask, before) > 30
        assert one(ask, f"SELECT count(*) FROM scaling WHERE at_s < {killed_s}") > 0
        assert one(ask, f"SELECT min(in_service_s) < {killed_s} FROM instances")
        # No samples exist for time without a manager, and no sample is duplicated.
        assert one(ask, "SELECT count(*) = count(DISTINCT at_s) FROM fleet")
        gap = one(
            ask, "SELECT max(at_s - before) FROM (SELECT at_s, lag(at_s) OVER (ORDER BY at_s) AS before FROM fleet)"
        )
        assert gap < 90


class Inside:
    """A reporter that writes the jobs of a world into the world's own bucket."""

    def __init__(self) -> None:
        self.writer: Writer | None = None

    async def write(self, job: JobId) -> None:
        assert self.writer
        await self.writer.write(job)


def test_the_manager_writes_it_at_the_end_of_a_job(tmp_path: Path) -> None:
    reporter = Inside()

    async def act(world: World) -> None:
        patient = patience(world)
        reporter.writer = Writer(world.objects, patient, told.setting(POOLS))
        made = job(stage(A), items=12)
        await submitted(world, made)
        await ended(world, made)
        async with asyncio.timeout(60):
            while not (index := await index_of(world.objects, patient, made.id)):
                await asyncio.sleep(1.0)
        await fetch(world.objects, patient, made.id, index, tmp_path)

    in_world(act, script=moody, **recorded(reports=ReportQueue(reporter)))
    with answers(tmp_path) as ask:
        assert one(ask, "SELECT succeeded FROM jobs") == 12


def test_duplicates_are_counted(tmp_path: Path) -> None:
    """A finished bundle has two copies. One copy is recognized, and the other one runs again in vain."""

    async def act(world: World) -> None:
        made = job(stage(A, bundle=1), items=30)
        await submitted(world, made)
        while True:
            await asyncio.sleep(5.0)
            if found := await world.ledger.bundles(made.id, done=True):
                break
        for losses in (0, 1):
            copy = replace(found[0].bundle, losses=losses)
            key = await CommitKeys(world.objects).stored(made.id)
            sent = address(made, copy, key, items=["x"], now_s=world.clock.now_s())
            await world.queue.send(sent.queue, [sent.message])
        assert (await ended(world, made)).state is JobState.SUCCEEDED
        await accounted(world)
        await told.written(world.objects, patience(world), made.id, tmp_path, *POOLS)

    in_world(act, script=lambda _: ScriptedAttempt(40.0, 1), **recorded())
    with answers(tmp_path) as ask:
        twice = {row["kind"]: row for row in ask("SELECT * FROM duplicates")}
        assert twice["message"]["seen"] == twice["execution"]["seen"] == 1
        assert twice["event"]["seen"] == 2  # both copies were reported again
        assert twice["execution"]["wasted_slot_s"] == pytest.approx(40.0, abs=1.0)
        assert all(row["seen"] == row["harmless"] for row in twice.values())
        assert one(ask, "SELECT sum(run_s) FROM attempts") == 30 * 40.0


def test_grid_without_accounting_or_sampling_has_tables(tmp_path: Path) -> None:
    """The tables then contain the data of the outcomes and the derived bill of `cost bill`, for any text in an
    error."""
    odd = 'a \0 row\'s "price" \\u0000 \N{SNOWMAN}\n' + 600 * "x"

    def script(scene: AttemptInput) -> ScriptedAttempt:
        failing = scene.task == 4
        return ScriptedAttempt(1.0, 1, Failure(0, FailureKind.EXCEPTION, odd, odd) if failing else None)

    async def act(world: World) -> Any:
        made = job(stage(A, retry=RetryRule(attempts=1)), items=10)
        await submitted(world, made)
        await ended(world, made)
        await told.written(world.objects, patience(world), made.id, tmp_path, *POOLS)
        return await world.ledger.rows(made.id)

    ledger = in_world(act, script=script, pools=POOLS)
    with answers(tmp_path) as ask:
        told.check_against_ledger(ask, ledger)
        assert one(ask, "SELECT is_whole FROM jobs") is False
        reason = one(ask, "SELECT reason FROM attempts WHERE state = 'FAILED'")
        assert reason == odd.replace("\0", "\N{REPLACEMENT CHARACTER}")[:500]
        assert one(ask, "SELECT cost_usd FROM jobs") > 0
        assert one(ask, "SELECT sum(cost_usd) = (SELECT cost_usd FROM jobs) FROM cost")
        assert one(ask, "SELECT count(*) FROM fleet") == 0
        assert one(ask, "SELECT count(*) FROM workers") > 0


def test_bucket_has_complete_tables_and_detects_stale_ones(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        once = RetryRule(attempts=1)
        made = job(stage(A, retry=once), items=6)
        patient = patience(world)
        writer = Writer(world.objects, patient, told.setting(POOLS))
        with pytest.raises(UsageError, match="nothing of a job"):
            await writer.write(made.id)
        await submitted(world, made)
        await asyncio.sleep(1.0)
        await writer.write(made.id)
        assert await index_of(world.objects, patient, made.id) is None  # the job still runs
        assert (await ended(world, made)).state is JobState.FAILED
        await writer.write(made.id)
        index = await index_of(world.objects, patient, made.id)
        assert index
        await fetch(world.objects, patient, made.id, index, tmp_path)
        await world.ask(lambda m: m.job_commands.retry(made.id), "retry")
        assert await index_of(world.objects, patient, made.id) is None  # the job runs again

    def script(scene: AttemptInput) -> ScriptedAttempt:
        failing = scene.task == 2 and scene.bundle.round == 0
        failure = Failure(0, FailureKind.EXIT, "exit code 1", exit_code=1) if failing else None
        return ScriptedAttempt(1.0, 1, failure=failure)

    in_world(act, script=script, **recorded())
    with store.open_store([tmp_path]) as connection:
        assert store.run_query(connection, "SELECT succeeded, failed FROM jobs")[1] == [(5, 1)]
