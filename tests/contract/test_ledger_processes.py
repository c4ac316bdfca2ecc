"""A ledger that several processes use, with kills, concurrent writers, and readers."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import ExitStack

import pytest

from tests.support.contract.ledger_suite import (
    BATCH,
    INDEX,
    RESIZE,
    DumpingLedger,
    Place,
    bundle,
    done,
    fold,
    ledger_in,
    line,
    many,
    place,
    second_process,
    submit,
)

pytestmark = pytest.mark.slow

__all__ = ["place"]


async def _check_sums(ledger: DumpingLedger) -> int:
    """Check that the rows of bundles agree with the counters, and return the number of completed bundles."""
    dump = await ledger.dump()
    bodies = [row["body"] for row in dump["bundles"] if row["seq"]]
    counted = {row["stage"]: row for row in dump["stages"]}
    assert counted[RESIZE]["failed"] == sum(len(body["no"]) for body in bodies)
    assert counted[RESIZE]["run_us"] == 1_000_000 * len(bodies)
    assert sum(row["stage"] == INDEX for row in dump["bundles"]) == len(bodies), "their follows"
    return len(bodies)


def test_folded_rows_survive_a_restart(place: Place) -> None:
    async def main() -> None:
        async with ledger_in(place) as ledger:
            await submit(ledger)
            await fold(ledger, done(bundle(0, 5), bundle(0, 5, stage=INDEX)))
            held = await ledger.lease("leader", "a")
            before = await ledger.dump()
        async with ledger_in(place) as ledger:
            assert await ledger.dump() == before
            assert await ledger.lease("leader", "b") == held

    asyncio.run(main())


def test_a_killed_process_leaves_whole_calls_and_nothing_else(place: Place) -> None:
    """After a kill, no task is lost or doubled, and every answered call is stored."""
    with second_process("fold", place) as process:
        while int(answered := line(process) or pytest.fail("it ended by itself")) < 25 * BATCH:
            pass
        process.kill()
        process.wait()

    async def main() -> None:
        async with ledger_in(place) as ledger, ledger_in(None) as reference:
            folded = await _check_sums(ledger)
            assert folded >= int(answered)
            assert folded % BATCH == 0
            completions = many()[: folded + 2 * BATCH]
            new = await fold(ledger, *completions)
            assert new == [False] * folded + [True] * 2 * BATCH
            await submit(reference)
            await fold(reference, *completions)
            assert await ledger.dump() == await reference.dump()

    asyncio.run(main())


def test_only_one_of_two_processes_gets_the_lease(place: Place) -> None:
    """The processes also race for the creation of the schema."""
    with ExitStack() as stack:
        rivals = [stack.enter_context(second_process("race", place, f"m-{i}")) for i in range(2)]
        for rival in rivals:
            assert line(rival) == "ready"
        for rival in rivals:
            assert rival.stdin
            rival.stdin.write("go\n")
            rival.stdin.flush()
        winners = [name for rival in rivals if (name := line(rival))]
        assert [rival.wait() for rival in rivals] == [0, 0]
    (winner,) = winners

    async def main() -> None:
        async with ledger_in(place) as ledger:
            assert (await ledger.lease("leader", "late")).owner == winner

    asyncio.run(main())


def test_reader_sees_whole_transactions_of_another_process(place: Place) -> None:
    looks: set[int] = set()

    async def look_on(writer: subprocess.Popen[str]) -> None:
        async with ledger_in(place) as ledger:
            while writer.poll() is None and len(looks) < 5:
                looks.add(await _check_sums(ledger))

    with second_process("fold", place) as process:
        assert line(process)
        asyncio.run(look_on(process))
    assert len(looks) > 1, "the writer was too fast to be looked on at"
    assert all(look % BATCH == 0 for look in looks)


def test_two_leaders_fold_the_same_outcomes_once(place: Place) -> None:
    """A former leader that has not noticed the loss of its lease does no harm."""
    completions = many()[:200]

    async def lead(ledger: DumpingLedger, step: int) -> int:
        new = 0
        for i in range(0, len(completions), step):
            new += sum(await fold(ledger, *completions[i : i + step]))
        return new

    async def main() -> None:
        async with ledger_in(place) as one, ledger_in(place) as other:
            await submit(one)
            await submit(other)
            assert sum(await asyncio.gather(lead(one, 10), lead(other, 7))) == 200
            assert await _check_sums(one) == 200

    asyncio.run(main())
