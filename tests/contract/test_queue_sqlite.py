"""The SQLite queue with many processes: wake-ups, killed processes, and constant speed."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.local.sqlite_messages import ReceiveResult, SqliteMessages
from batchlab.adapters.local.sqlite_queue import SqliteQueue
from batchlab.core.errors import BackendError
from batchlab.core.ports import Outgoing, QueueSpec
from tests.support.contract.queue_worlds import SteppedClock

PRELUDE = """
import asyncio, itertools, sys, time
from pathlib import Path
from batchlab.adapters.clock import WallClock
from batchlab.adapters.local.sqlite_queue import SqliteQueue
from batchlab.core.ports import Outgoing, QueueSpec

def say(*words):
    print(*words, flush=True)

def start():
    say("ready")
    sys.stdin.readline()
"""
SEND_WHEN_TOLD = """
async def main(path):
    queue = SqliteQueue(Path(path), WallClock())
    await queue.depth("q")
    say("ready")
    while sys.stdin.readline():
        await queue.send("q", [Outgoing(repr(time.monotonic()))])
"""
SEND_FOR_EVER = """
async def main(path, who):
    queue = SqliteQueue(Path(path), WallClock())
    start()
    for number in itertools.count():
        batch = [f"{who}.{number}.{part}" for part in range(10)]
        await queue.send("q", [Outgoing(body) for body in batch])
        say(number)
"""
WORK_FOR_EVER = """
async def main(path):
    queue = SqliteQueue(Path(path), WallClock())
    start()
    while True:
        messages = await queue.receive("q", max_messages=3)
        refused = await queue.delete("q", [message.receipt for message in messages])
        assert not refused
        say(*(message.body for message in messages))
"""
WORK_TO_THE_END = """
async def main(path):
    queue = SqliteQueue(Path(path), WallClock())
    await queue.ensure(QueueSpec("q", visibility_s=60))
    start()
    while messages := await queue.receive("q", max_messages=3, wait_s=0.5):
        say(*(message.body for message in messages))
        await queue.delete("q", [message.receipt for message in messages])
    await queue.close()
"""


class _Child:
    """A process that runs one of the programs above."""

    def __init__(self, program: str, path: Path, *args: object) -> None:
        script = f"{PRELUDE}{program}\nasyncio.run(main(*sys.argv[1:]))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(path), *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hears(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def start(self) -> None:
        """Wait until the process is ready, and let it continue."""
        assert self.hears() == "ready\n"
        self.tell()

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def kill(self) -> list[str]:
        """Kill the process with SIGKILL, and return the remaining whole lines of its output."""
        self.process.kill()
        # communicate() would skip the text that readline has buffered.
        assert self.process.stdout is not None
        rest = self.process.stdout.read()
        self.process.communicate()
        return rest.splitlines()[: rest.count("\n")]


Scenario = Callable[[SqliteQueue, Path, SteppedClock], Coroutine[Any, Any, None]]


def _run(tmp_path: Path, scenario: Scenario) -> None:
    path = tmp_path / "queue.db"
    clock = SteppedClock()

    async def run() -> None:
        queue = SqliteQueue(path, clock)
        try:
            await queue.ensure(QueueSpec("q", visibility_s=30))
            await scenario(queue, path, clock)
        finally:
            await queue.close()

    asyncio.run(run())


async def _drained(queue: SqliteQueue) -> list[str]:
    found: list[str] = []
    while messages := await queue.receive("q", wait_s=0):
        found += [message.body for message in messages]
        await queue.delete("q", [message.receipt for message in messages])
    return found


def test_send_from_another_process_wakes_a_receiver(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async def scenario(queue: SqliteQueue, path: Path, _: SteppedClock) -> None:
        sender = _Child(SEND_WHEN_TOLD, path)
        assert await asyncio.to_thread(sender.hears) == "ready\n"
        waits_s = []
        for _turn in range(15):
            receive = asyncio.create_task(queue.receive("q", wait_s=20))
            await asyncio.sleep(0.02)
            sender.tell()
            (message,) = await receive
            waits_s.append(time.monotonic() - float(message.body))
            await queue.delete("q", [message.receipt])
        sender.kill()
        record_property("median_wake_up_ms", sorted(waits_s)[7] * 1000)
        # Receivers look once a second by themselves, so a receive within half a second proves a wake-up.
        assert sorted(waits_s)[7] < 0.5
        assert list((path.parent / "wake" / "q").iterdir()) == []

    _run(tmp_path, scenario)


def test_a_killed_sleeper_does_not_take_a_wake_up_with_it(tmp_path: Path) -> None:
    async def scenario(queue: SqliteQueue, path: Path, _: SteppedClock) -> None:
        bells = path.parent / "wake" / "q"
        sleepers = [_Child(WORK_FOR_EVER, path) for _ in range(3)]
        for sleeper in sleepers:
            await asyncio.to_thread(sleeper.start)
        deadline_s = time.monotonic() + 20
        while not bells.exists() or len(list(bells.iterdir())) < 3:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.02)
        for sleeper in sleepers:
            sleeper.kill()
        receive = asyncio.create_task(queue.receive("q", wait_s=20))
        await asyncio.sleep(0.05)
        began_s = time.monotonic()
        await queue.send("q", [Outgoing("a")])
        assert [message.body for message in await receive] == ["a"]
        assert time.monotonic() - began_s < 0.9
        await queue.send("q", [Outgoing("b")])
        assert list(bells.iterdir()) == []

    _run(tmp_path, scenario)


def test_killed_senders_leave_whole_batches_and_lose_none_that_was_confirmed(tmp_path: Path) -> None:
    """No message is lost between the queue and a sender that is killed."""

    async def scenario(queue: SqliteQueue, path: Path, _: SteppedClock) -> None:
        confirmed: set[str] = set()
        for turn in range(4):
            senders = [_Child(SEND_FOR_EVER, path, f"{turn}-{who}") for who in range(2)]
            for sender in senders:
                await asyncio.to_thread(sender.start)
            await asyncio.sleep(0.02 + 0.013 * turn)
            for who, sender in enumerate(senders):
                confirmed |= {f"{turn}-{who}.{number}" for number in sender.kill()}
        found = await _drained(queue)
        assert len(found) == len(set(found))
        batches = [body.rpartition(".")[0] for body in found]
        assert {batches.count(batch) for batch in set(batches)} == {10}
        assert confirmed <= set(batches)
        assert len(set(batches) - confirmed) <= 8 < len(confirmed)

    _run(tmp_path, scenario)
    with sqlite3.connect(tmp_path / "queue.db") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT total FROM queues").fetchone() == (0,)
    db.close()


def test_messages_of_killed_workers_return_at_the_timeout(tmp_path: Path) -> None:
    async def scenario(queue: SqliteQueue, path: Path, clock: SteppedClock) -> None:
        sent = [str(number) for number in range(3000)]
        for start in range(0, len(sent), 10):
            await queue.send("q", [Outgoing(body) for body in sent[start : start + 10]])
        done: list[str] = []
        for turn in range(3):
            workers = [_Child(WORK_FOR_EVER, path) for _ in range(2)]
            for worker in workers:
                await asyncio.to_thread(worker.start)
            await asyncio.sleep(0.02 + 0.013 * turn)
            for worker in workers:
                done += " ".join(worker.kill()).split()
        depth = await queue.depth("q")
        assert depth.in_flight <= 6 * 3
        assert done
        clock.ahead_s += 31
        left = await _drained(queue)
        assert len(done) == len(set(done))
        assert not set(done) & set(left)
        # A worker that was killed after its delete and before its report has done its work.
        assert len(set(sent) - set(done) - set(left)) <= 6 * 3
        assert len(left) == depth.in_flight + depth.visible

    _run(tmp_path, scenario)


def test_many_processes_open_one_new_file_and_share_the_work(tmp_path: Path) -> None:
    path = tmp_path / "new" / "queue.db"
    workers = [_Child(WORK_TO_THE_END, path) for _ in range(6)]
    assert [worker.hears() for worker in workers] == ["ready\n"] * 6

    async def send() -> None:
        queue = SqliteQueue(path, SteppedClock())
        for number in range(0, 600, 10):
            await queue.send("q", [Outgoing(str(number + part)) for part in range(10)])
        await queue.close()

    asyncio.run(send())
    for worker in workers:
        worker.tell()
    outputs = [worker.process.communicate(timeout=60)[0].split() for worker in workers]
    assert [worker.process.returncode for worker in workers] == [0] * 6
    done = [body for output in outputs for body in output]
    assert sorted(done, key=int) == [str(number) for number in range(600)]
    assert sum(bool(output) for output in outputs) > 1


def test_a_new_file_may_be_opened_by_many_at_the_same_instant(tmp_path: Path) -> None:
    def open_one(path: Path, barrier: threading.Barrier) -> None:
        messages = SqliteMessages(path, SteppedClock())
        barrier.wait()
        messages.ensure(QueueSpec("q"))
        messages.close()

    with ThreadPoolExecutor(8) as pool:
        for number in range(60):
            barrier = threading.Barrier(8)
            path = tmp_path / f"{number}.db"
            opened = [pool.submit(open_one, path, barrier) for _ in range(8)]
            for one in opened:
                one.result()


def test_a_sleeping_receive_looks_next_to_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []
    look = SqliteMessages.receive

    def counted(self: SqliteMessages, queue: str, *how: Any) -> ReceiveResult:
        looks.append(queue)
        return look(self, queue, *how)

    async def scenario(queue: SqliteQueue, _path: Path, _clock: SteppedClock) -> None:
        await asyncio.gather(*(queue.receive("q", wait_s=1.5) for _ in range(10)))

    monkeypatch.setattr(SqliteMessages, "receive", counted)
    _run(tmp_path, scenario)
    # A receiver looks at once, when it has registered its bell, after LOOK_S, and at the end.
    assert 10 <= len(looks) <= 40


def test_every_query_is_a_range_of_an_index(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    clock = SteppedClock()
    messages = SqliteMessages(path, clock, max_in_flight=1)
    plans: list[str] = []

    def explain(statement: str) -> None:
        if statement.strip().startswith(("SELECT", "UPDATE", "DELETE")):
            rows = db.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall()
            plans.extend(f"{row[3]}  <-  {statement}" for row in rows)

    messages.ensure(QueueSpec("dead"))
    messages.ensure(QueueSpec("q", dead_letters="dead", max_receives=1, retention_s=1000))
    db = sqlite3.connect(path)
    messages._db.set_trace_callback(explain)
    messages.send("q", [Outgoing("a"), Outgoing("b")])
    (held,) = messages.receive("q", 10, 5).messages
    assert messages.receive("q", 10, 5).over_limit
    assert messages.change_visibility("q", [(held.receipt, 6)]) == []
    messages.undo("q", [held])
    messages.depth("q")
    (held,) = messages.receive("q", 10, 5).messages
    assert messages.delete("q", [held.receipt]) == []
    clock.ahead_s += 2000
    messages.receive("q", 10, 5)
    messages.depth("q")
    messages.purge("q")
    messages.remove("q")
    messages.close()
    db.close()
    assert len(plans) > 30
    assert [plan for plan in plans if plan.startswith("SCAN") or "TEMP B-TREE" in plan] == []


def test_file_that_is_not_a_queue_is_a_backend_error(tmp_path: Path) -> None:
    (tmp_path / "queue.db").write_bytes(b"this is not a database" * 100)

    async def check() -> None:
        queue = SqliteQueue(tmp_path / "queue.db", SteppedClock())
        with pytest.raises(BackendError) as caught:
            await queue.depth("q")
        assert isinstance(caught.value.__cause__, sqlite3.Error)
        await queue.close()

    asyncio.run(check())
