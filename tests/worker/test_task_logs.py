"""The stored output of tasks, which is limited in size."""

from __future__ import annotations

import asyncio
from pathlib import Path

from batchlab.worker import task_log
from batchlab.worker.inflight_message import Handle
from tests.support.worker.runner import collect, go, opened


def test_everything_a_task_prints_is_its_own(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            await rig.values([["print", "one"], "silent", ["print_everywhere"], ["print", "ü☃"]])
            assert rig.handle.log.startswith("logs/j/s/")
            assert rig.handle.log.endswith("/e-1.log")
            assert await rig.log(0) == "one\n"
            assert await rig.log(1) == ""
            assert await rig.log(2) == "out err\nraw\nc\nprogram\nits errors\nlate\n"
            assert await rig.log(3) == "ü☃\n"
            assert [task for task, _, _ in rig.handle.log_spans] == [0, 2, 3]

    go(main())


def test_output_before_a_timeout_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            items = [["print", "a"], ["print_and_hang", "working"], ["print", "b"]]
            assert "timeout" in (await rig.values(items, timeout_s=0.3))[1]
            assert [await rig.log(task) for task in range(3)] == ["a\n", "working\n", "b\n"]

    go(main())


def test_long_output_keeps_its_head_and_tail(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            await rig.values([["print", "before"], ["chatter", 30_000], ["print", "after"]])
            text = await rig.log(1)
            assert len(text) < task_log.TASK_BYTES + 100
            assert text.startswith(f"{0:099d}\n{1:099d}\n")
            assert text.endswith(f"{29_998:099d}\n{29_999:099d}\n")
            assert "batchlab left out 1951424 bytes" in text
            assert await rig.log(0) == "before\n"
            assert await rig.log(2) == "after\n"

    go(main())


def test_a_task_that_never_stops_printing_does_not_fill_the_disk(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            largest = 0
            work = await rig.work([["chatter", 10**9]], timeout_s=1.5)
            handle = Handle()
            run = asyncio.create_task(collect(rig, work, handle))
            log = rig.scratch.execution(work.execution) / "log"
            while not run.done():
                await asyncio.sleep(0.01)
                largest = max(largest, log.stat().st_size if log.exists() else 0)
            assert largest > 2 * task_log.TASK_BYTES
            assert largest < 100 * task_log.TASK_BYTES
            [(_, start, end)] = handle.log_spans
            assert start == 0
            assert end < task_log.TASK_BYTES + 100

    go(main())


def test_many_chatty_tasks_share_what_one_execution_may_keep(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.truncate(70 * 2**20)
    start = log.stat().st_size
    with log.open("ab") as file:
        file.write(b"h" * 10_000 + b"t" * 10_000)
    assert task_log.share(0) == task_log.TASK_BYTES
    end = task_log.trim(str(log), start)
    assert end == log.stat().st_size
    with log.open("rb") as file:
        file.seek(start)
        assert file.read() == b"%b\n[... batchlab left out 15904 bytes ...]\n%b" % (b"h" * 2048, b"t" * 2048)


def test_output_of_a_running_task_can_be_read(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            items = [["print", "before"], ["print_and_hang", "working"], ["print", "after"]]
            work, handle = await rig.work(items, timeout_s=1.0), Handle()
            run = asyncio.create_task(collect(rig, work, handle))
            seen = None
            while not run.done() and not (seen and seen.task == 1 and seen.data):
                await asyncio.sleep(0.01)
                seen = handle.peek(4) if handle.peek else None
            assert seen is not None
            # The log contains the end of the task's own output, and no output of its neighbor.
            assert (seen.task, seen.log_at, seen.start) == (1, 7, 11)
            assert seen.data == b"ing\n"
            await run
            assert handle.peek is None

    go(main())
