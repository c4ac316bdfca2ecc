"""Limits of the ledger on SimpleDB: texts, names, domains, and regions."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.simpledb import domain, open_simpledb
from batchlab.core.errors import BackendError, NotFound, Throttled, TooLarge, Unreachable, UsageError
from batchlab.core.job_definition import InputDef, SplitBy
from batchlab.core.model import JobId, JobState, TaskSet
from batchlab.core.ports import AddCut, Ending, Finish
from tests.support.contract.ledger_suite import JOB, bundle, cut, done, fold, ledger_in, stage_of, submit
from tests.support.simpledb.fixtures import FAIR, Sdb

pytestmark = pytest.mark.slow

SCATTERED = TaskSet.from_indices(range(0, 30_000, 2))
"""A task set of 200 KB as JSON, which is too large for an item that contains other texts."""


def test_texts_of_any_length_are_stored(rough_simpledb: Sdb) -> None:
    keys = tuple(f"raw/{n:06d}-ä" for n in range(20_000))
    job = replace(JOB, input=InputDef(keys, SplitBy.LINES, 100, header=False))
    large = replace(bundle(0, 1), tasks=SCATTERED)
    outcome = done(large, replace(large, attempt=2), failed=12_000)

    async def main() -> None:
        async with ledger_in(rough_simpledb) as ledger, ledger_in(None) as reference:
            for of in (ledger, reference):
                await submit(of, job)
                await of.apply(AddCut(cut(0, large, left=SCATTERED)))
                await fold(of, outcome)
                await of.apply(Finish(JOB.id, Ending(JobState.FAILED, "\0é" * 70_000, 1.0, {}), 0))
            assert (await ledger.job(JOB.id)).job == job
            assert (await stage_of(ledger)).left == SCATTERED
            ours, theirs = await ledger.dump(), await reference.dump()
            for dump in (ours, theirs):
                # SQLite's text cannot contain NUL.
                dump["jobs"][0]["reason"] = dump["jobs"][0]["reason"].replace("\0", "\ufffd")
            assert ours == theirs
            assert [rows.id for rows in await ledger.jobs()] == [JOB.id]
            await ledger.forget()

    asyncio.run(main())
    rough_simpledb.weather(**FAIR)
    assert set(rough_simpledb.items()) == {"counter/seq"}


def test_a_name_that_is_too_long_is_refused_and_nothing_is_written(simpledb: Sdb) -> None:
    async def main() -> None:
        async with ledger_in(simpledb) as ledger:
            long = replace(JOB, id=JobId("x" * 1021))
            with pytest.raises(TooLarge, match="1024 in a name or value"):
                await submit(ledger, long)
            assert not simpledb.items()

    asyncio.run(main())


def test_missing_or_full_domain_is_reported(simpledb: Sdb) -> None:
    async def main() -> None:
        nowhere = open_simpledb(simpledb.endpoint, "nowhere")
        with pytest.raises(BackendError, match="The SimpleDB domain nowhere does not exist") as caught:
            await nowhere.job(JOB.id)
        assert not isinstance(caught.value, NotFound | Unreachable)
        await nowhere.close()
        async with ledger_in(simpledb) as ledger:
            await submit(ledger)
            simpledb.weather(max_attributes=30)
            with pytest.raises(BackendError, match="holds 10 GB") as caught:
                await fold(ledger, *(done(bundle(n, n + 1)) for n in range(9)))
            assert "batchlab grid rebuild-ledger" in str(caught.value)
            simpledb.weather(**FAIR)
            succeeded = (await ledger.rows(JOB.id)).stages[0].counts.succeeded
            assert succeeded == len(await ledger.bundles(JOB.id)), "whole, either way"

    asyncio.run(main())


def test_region_without_simpledb_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SIMPLEDB"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="SimpleDB is not available in eu-central-1") as caught:
        open_simpledb(Endpoint(region="eu-central-1"), "ledger")
    assert "eu-west-1" in str(caught.value)
    for region in ("us-east-1", "eu-west-1"):
        asyncio.run(open_simpledb(Endpoint(region=region), "ledger").close())


def test_on_aws_the_users_own_configuration_is_used(simpledb: Sdb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_SIMPLEDB", simpledb.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")

    async def main() -> None:
        ledger = open_simpledb(Endpoint(region="eu-central-1"), simpledb.domain)
        await submit(ledger)
        await ledger.close()

    asyncio.run(main())
    assert f"job/{JOB.id}" in simpledb.items()


def test_a_service_that_refuses_for_long_is_throttled(simpledb: Sdb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain, "PATIENCE_S", 0.2)

    async def main() -> None:
        async with ledger_in(simpledb) as ledger:
            simpledb.weather(throttle=1.0)
            with pytest.raises(Throttled, match="try again later"):
                await submit(ledger)
            simpledb.weather(throttle=0.0, lose=1.0)
            with pytest.raises(Unreachable):
                await submit(ledger)
            simpledb.weather(**FAIR)
            await submit(ledger)
            assert (await ledger.job(JOB.id)).job == JOB

    asyncio.run(main())
