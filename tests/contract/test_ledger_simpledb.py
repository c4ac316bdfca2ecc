"""The ledger on SimpleDB: processes that end between two calls, limits, and concurrent writers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from batchlab.adapters.simpledb import domain
from batchlab.adapters.simpledb.ledger import SimpleDbLedger
from batchlab.core.errors import Throttled, Unreachable
from batchlab.core.model import Control, JobId, JobState
from batchlab.core.ports import AddJob, Ending, Fold, JobHistory, Ledger, Reopening, Round
from tests.support.contract.ledger_lives import Call, answer, anything
from tests.support.contract.ledger_suite import (
    CALLS,
    INDEX,
    JOB,
    RESIZE,
    TOTAL,
    DumpingLedger,
    bundle,
    counts_of,
    cut,
    done,
    fold,
    ledger_in,
    rows_of,
    submit,
)
from tests.support.simpledb.fixtures import FAIR, Sdb

_TOKEN = replace(JOB, token="once")


def _past() -> JobHistory:
    bundles = [bundle(n, n + 1) for n in range(60)]
    first = Round(
        (),
        (replace(cut(0, *bundles), planned=70),),
        {INDEX: 60},
        tuple(done(one, replace(one, stage=INDEX)) for one in bundles),
        tuple({TOTAL: 0} for _ in bundles),
        Ending(JobState.FAILED, "no luck", 50.0, {RESIZE: 10}),
    )
    again = Round((Reopening(RESIZE, cancelled=10),), (), {}, (), (), None)
    return JobHistory(_TOKEN, JobState.SUBMITTED, (first, again), Control.PAUSE)


async def _restore(ledger: Ledger) -> bool:
    return await ledger.restore(_past(), over=await rows_of(ledger))


LIFE: list[tuple[str, Call]] = [
    ("add", lambda of: of.apply(AddJob(_TOKEN, JobState.SUBMITTED, cut(0, bundle(0, 5))))),
    *((f"call {n}", call) for n, call in enumerate(CALLS) if n),
    ("restore", _restore),
    ("fold", lambda of: of.apply(Fold([done(bundle(n, n + 1, attempt=9)) for n in range(30)], [{}] * 30))),
    ("forget", lambda of: of.forget([JOB.id])),
    ("add again", lambda of: of.apply(AddJob(_TOKEN, JobState.SUBMITTED))),
    ("forget all", lambda of: of.forget()),
]


def test_a_process_may_end_between_any_two_calls(simpledb: Sdb, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted change has either happened or not, and can be repeated. At the end, no trace of the interruptions
    remains."""
    monkeypatch.setattr(domain, "PATIENCE_S", 0.0)

    async def dies_after(calls: int, mortal: Ledger, call: Call) -> bool:
        """Return whether the process died before the end of its call."""
        simpledb.weather(stop_after=calls)
        try:
            await call(mortal)
        except Throttled:
            return True
        finally:
            simpledb.weather(**FAIR)
        return False

    async def main() -> int:
        deaths = 0
        async with ledger_in(None) as reference, ledger_in(simpledb) as mortal, ledger_in(simpledb) as survivor:
            before = await survivor.dump()
            for name, call in LIFE:
                await call(reference)
                after = await reference.dump()
                calls = 0
                while await dies_after(calls, mortal, call):
                    deaths += 1
                    assert await survivor.dump() in (before, after), (name, calls)
                    calls += 1
                assert await survivor.dump() == after, name
                before = after
        return deaths

    deaths = asyncio.run(main())
    assert deaths > 80
    left = {name.split("/")[0] for name in simpledb.items()}
    assert left == {"counter"}, "of a job there is nothing"


def test_fold_with_a_lost_answer_is_new_after_another_fold(simpledb: Sdb, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two leaders believes that the other one was first."""
    one, two, three = (bundle(n, n + 1) for n in range(3))

    async def main() -> None:
        async with ledger_in(simpledb) as mine, ledger_in(simpledb) as other:
            assert isinstance(mine, SimpleDbLedger)
            assert isinstance(other, SimpleDbLedger)
            await submit(mine)
            ask, puts = mine._store._call, 0

            def lose(operation: str, **given: Any) -> Any:
                nonlocal puts
                is_put = operation == "put_attributes" and given["ItemName"].startswith("job/")
                puts += is_put
                answer = ask(operation, **given)
                if is_put and puts == 1:
                    assert other._fold(Fold([done(three)], [{}])).new == [True]
                    raise Unreachable("The answer was lost.")
                return answer

            monkeypatch.setattr(mine._store, "_call", lose)
            assert await fold(mine, done(one), done(two)) == [True, True]
            assert puts == 2, "asked once more, and nothing changed by that"
            assert await fold(other, done(one), done(two), done(three)) == [False] * 3
            assert (await counts_of(mine)).succeeded == 3

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(4))
def test_random_lives_are_those_of_the_sql_ledger(seed: int, rough_simpledb: Sdb) -> None:
    """Two ledgers on the domain take turns, and the result is compared with SQLite."""
    rng = Random(seed)

    async def main() -> None:
        async with ledger_in(None) as reference, ledger_in(rough_simpledb) as one, ledger_in(rough_simpledb) as other:
            ledgers = [one, other]
            for _ in range(40):
                call = anything(rng)
                answers = [await answer(call, of) for of in (reference, rng.choice(ledgers))]
                assert answers[0] == answers[1]
                assert await rng.choice(ledgers).dump() == await reference.dump()

    asyncio.run(main())


def test_many_writers_and_a_reader_keep_the_sums(simpledb: Sdb) -> None:
    """Each writer believes that it leads, and a reader always sees a consistent state."""
    simpledb.weather(throttle=0.05, lose=0.02, short=0.1)
    outcomes = [done(bundle(n, n + 1), bundle(n, n + 1, stage=INDEX), failed=n % 2) for n in range(120)]

    async def write(seed: int, of: DumpingLedger) -> int:
        mine, new = Random(seed).sample(outcomes, len(outcomes)), 0
        for i in range(0, len(mine), 8):
            new += sum(await _patiently_fold(of, mine[i : i + 8]))
        return new

    async def read(of: DumpingLedger, writing: asyncio.Event) -> int:
        looks = 0
        while not writing.is_set():
            dump = await of.dump()
            folded = [row for row in dump["bundles"] if row["seq"]]
            counts = next(row for row in dump["stages"] if row["stage"] == RESIZE)
            assert counts["failed"] + counts["succeeded"] == len(folded)
            assert sum(row["stage"] == INDEX for row in dump["bundles"]) == len(folded)
            looks += 1
        return looks

    async def main() -> None:
        ended = asyncio.Event()
        async with (
            ledger_in(simpledb) as a,
            ledger_in(simpledb) as b,
            ledger_in(simpledb) as c,
            ledger_in(simpledb) as reader,
        ):
            await submit(a)
            looking = asyncio.create_task(read(reader, ended))
            await asyncio.gather(*(write(n, of) for n, of in enumerate((a, b, c))))
            ended.set()
            assert await looking > 1
            records = await reader.bundles(JOB.id, done=True)
            assert sorted(r.bundle.tasks.first for r in records) == list(range(120))
            seqs = [r.seq or 0 for r in records]
            assert seqs == sorted(set(seqs))

    asyncio.run(main())


async def _patiently_fold(of: Ledger, some: Any) -> list[bool]:
    while True:
        try:
            return await fold(of, *some)
        except (Throttled, Unreachable):
            await asyncio.sleep(0.05)


def test_overtaken_writer_is_asked_to_repeat(simpledb: Sdb) -> None:
    """A call for several jobs uses one transaction per job."""
    twin = replace(JOB, id=JobId("photos-2"))
    mine, its = done(bundle(0, 5)), done(replace(bundle(0, 5), job=twin.id))

    async def main() -> None:
        async with ledger_in(simpledb) as slow, ledger_in(simpledb) as fast:
            await submit(slow)
            await submit(slow, twin)
            await fold(slow, done(bundle(7, 8)))  # the numbers of the slow ledger are older from now on
            folding = slow._heads.commit  # type: ignore[attr-defined]
            loop = asyncio.get_running_loop()

            def overtaken(head: Any, book: Any, rows: Any) -> bool:
                came: bool = folding(head, book, rows)
                other = fold(fast, done(replace(bundle(8, 9), job=twin.id)))
                asyncio.run_coroutine_threadsafe(other, loop).result()
                return came

            slow._heads.commit = overtaken  # type: ignore[attr-defined]
            with pytest.raises(Throttled, match="photos-2"):
                await fold(slow, mine, its)
            slow._heads.commit = folding  # type: ignore[attr-defined]
            assert await fold(slow, mine, its) == [False, True]
            seqs = [r.seq or 0 for r in await slow.bundles(twin.id)]
            assert seqs == sorted(set(seqs))

    asyncio.run(main())


def test_a_watcher_misses_nothing_though_numbers_are_given_in_blocks(simpledb: Sdb) -> None:
    """Two leaders hold blocks of numbers, but the seqs follow the order of folding."""

    async def main() -> None:
        async with ledger_in(simpledb) as one, ledger_in(simpledb) as other:
            await submit(one)
            last = -1
            for n in range(12):
                await fold((one, other)[n % 2], done(bundle(n, n + 1)))
                page = await one.bundles(JOB.id, after_seq=last)
                assert [r.bundle.tasks.first for r in page] == [n]
                last = page[-1].seq or 0

    asyncio.run(main())


def test_every_read_is_consistent(simpledb: Sdb) -> None:
    """An eventually consistent read could return a job without its bundles. The server counts eventually consistent
    reads under a separate name."""
    simpledb.weather(lag_s=60.0)
    before = simpledb.asked()

    async def main() -> None:
        async with ledger_in(simpledb) as ledger:
            for _, call in LIFE[:-3]:
                await call(ledger)
            await ledger.bundles(JOB.id)
            await ledger.jobs(active=True)
            await ledger.forget()

    asyncio.run(main())
    after = simpledb.asked()
    used = {action for action, count in after.items() if count > before.get(action, 0)}
    assert used == {
        "BatchDeleteAttributes",
        "BatchPutAttributes",
        "DeleteAttributes",
        "GetAttributes",
        "PutAttributes",
        "Select",
    }, "what docs/contributing/ledger.md says the manager's role needs"
