"""What a ledger in a file bears: kills, rivals, locks, and files that are something else."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from batchlab.adapters.sql import engines
from batchlab.errors import BackendError, Unreachable
from tests.contract.ledger_suite import (
    BATCH,
    INDEX,
    JOB,
    RESIZE,
    ROOT,
    SECOND_PROCESS,
    DumpingLedger,
    bundle,
    counts_of,
    done,
    fold,
    ledger_in,
    many,
    submit,
)


@contextmanager
def second_process(*args: object) -> Iterator[subprocess.Popen[str]]:
    """Another process, which is gone at the end whatever happens."""
    argv = [*SECOND_PROCESS, *map(str, args)]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


async def _check_sums(ledger: DumpingLedger) -> int:
    """What the bundles' rows and the counters say is the same; answers how many are done."""
    dump = await ledger.dump()
    bodies = [row["body"] for row in dump["bundles"] if row["seq"]]
    counted = {row["stage"]: row for row in dump["stages"]}
    assert counted[RESIZE]["failed"] == sum(len(body["no"]) for body in bodies)
    assert counted[RESIZE]["run_us"] == 1_000_000 * len(bodies)
    assert sum(row["stage"] == INDEX for row in dump["bundles"]) == len(bodies), "their follows"
    return len(bodies)


def test_what_was_folded_is_there_when_the_file_is_opened_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with ledger_in(tmp_path / "ledger.sqlite") as ledger:
            await submit(ledger)
            await fold(ledger, done(bundle(0, 5), bundle(0, 5, stage=INDEX)))
            held = await ledger.lease("leader", "a")
            before = await ledger.dump()
        async with ledger_in(tmp_path / "ledger.sqlite") as ledger:
            assert await ledger.dump() == before
            assert await ledger.lease("leader", "b") == held

    asyncio.run(main())


def test_a_killed_process_leaves_whole_calls_and_nothing_else(tmp_path: Path) -> None:
    """Pain 6: no task is lost or doubled at the seam, and what was answered is there."""
    path = tmp_path / "ledger.sqlite"
    with second_process("fold", path) as process:
        while int(answered := _line(process) or pytest.fail("it ended by itself")) < 25 * BATCH:
            pass
        process.kill()
        process.wait()

    async def main() -> None:
        async with ledger_in(path) as ledger, ledger_in(None) as reference:
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


def test_of_processes_racing_for_the_lease_one_gets_it(tmp_path: Path) -> None:
    """They race for making the schema of the fresh file too."""
    path = tmp_path / "ledger.sqlite"
    with ExitStack() as stack:
        rivals = [stack.enter_context(second_process("race", path, f"m-{i}")) for i in range(3)]
        for rival in rivals:
            assert _line(rival) == "ready"
        for rival in rivals:
            assert rival.stdin
            rival.stdin.write("go\n")
            rival.stdin.flush()
        winners = [name for rival in rivals if (name := _line(rival))]
        assert [rival.wait() for rival in rivals] == [0, 0, 0]
    (winner,) = winners

    async def main() -> None:
        async with ledger_in(path) as ledger:
            assert (await ledger.lease("leader", "late")).owner == winner

    asyncio.run(main())


def test_a_reader_sees_whole_transactions_of_another_process(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    looks: set[int] = set()

    async def look_on(writer: subprocess.Popen[str]) -> None:
        async with ledger_in(path) as ledger:
            while writer.poll() is None and len(looks) < 5:
                looks.add(await _check_sums(ledger))

    with second_process("fold", path) as process:
        assert _line(process)
        asyncio.run(look_on(process))
    assert len(looks) > 1, "the writer was too fast to be looked on at"
    assert all(look % BATCH == 0 for look in looks)


def test_two_leaders_fold_the_same_outcomes_once(tmp_path: Path) -> None:
    """Pain 6: a leader that has not noticed yet that it is none does no harm."""
    path = tmp_path / "ledger.sqlite"
    completions = many()[:200]

    async def lead(ledger: DumpingLedger, step: int) -> int:
        new = 0
        for i in range(0, len(completions), step):
            new += sum(await fold(ledger, *completions[i : i + step]))
        return new

    async def main() -> None:
        async with ledger_in(path) as one, ledger_in(path) as other:
            await submit(one)
            await submit(other)
            assert sum(await asyncio.gather(lead(one, 10), lead(other, 7))) == 200
            assert await _check_sums(one) == 200

    asyncio.run(main())


def _lock(path: Path) -> sqlite3.Connection:
    """A foreign transaction that writes, until the connection is closed."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return connection


def test_a_lock_that_is_given_up_in_time_is_waited_for(tmp_path: Path) -> None:
    """The event loop goes on meanwhile, and so do readers."""
    path = tmp_path / "ledger.sqlite"

    async def main() -> None:
        async with ledger_in(path) as ledger, ledger_in(path) as reader:
            await submit(ledger)
            with closing(_lock(path)):
                waiting = asyncio.create_task(fold(ledger, done(bundle(0, 5))))
                assert (await counts_of(reader)).succeeded == 0
                assert not waiting.done()
            assert await waiting == [True]

    asyncio.run(main())


def test_a_lock_that_is_not_given_up_is_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_BUSY_S", 0.05)
    path = tmp_path / "ledger.sqlite"

    async def main() -> None:
        async with ledger_in(path) as ledger:
            await submit(ledger)
            with closing(_lock(path)):
                with pytest.raises(Unreachable, match="locked") as caught:
                    await fold(ledger, done(bundle(0, 5)))
                assert isinstance(caught.value.__cause__, Exception)
                assert (await ledger.job(JOB.id)).job == JOB
            assert await fold(ledger, done(bundle(0, 5))) == [True]

    asyncio.run(main())


def test_a_file_that_cannot_be_opened_is_an_outage(tmp_path: Path) -> None:
    async def main() -> None:
        async with ledger_in(tmp_path / "nowhere" / "ledger.sqlite") as ledger:
            with pytest.raises(Unreachable, match=r"nowhere/ledger\.sqlite"):
                await ledger.jobs()
            (tmp_path / "nowhere").mkdir()
            assert list(await ledger.jobs()) == []

    asyncio.run(main())


def test_a_file_that_is_no_database_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"somebody's letter, not a database. " * 100)
    before = path.read_bytes()

    async def main() -> None:
        async with ledger_in(path) as ledger:
            with pytest.raises(BackendError, match=r"ledger\.sqlite cannot be used"):
                await ledger.jobs()

    asyncio.run(main())
    assert path.read_bytes() == before
