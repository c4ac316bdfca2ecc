"""Child processes of a worker, which are reused, limited in number, bound to one code folder, and end with the
worker."""

from __future__ import annotations

import asyncio
import errno
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.errors import BackendError, Unreachable
from batchlab.worker import child_process
from batchlab.worker.child_process import TICK_S, ChildProcess
from batchlab.worker.inflight_message import Handle
from tests.support.processes import is_running
from tests.support.worker.runner import USER_CODE, children_of, collect, go, opened, until


def test_children_are_reused_for_the_same_code_and_only_for_it(tmp_path: Path) -> None:
    async def main() -> None:
        other = tmp_path / "other"
        other.mkdir()
        (other / "acts.py").write_text("import os\ndef facts(item): return {'pid': os.getpid()}\n")
        async with opened(tmp_path, slots=1) as rig:
            pids = [
                (await rig.run([1], handler="acts:facts", folder=folder))[0].value["pid"]
                for folder in (USER_CODE, USER_CODE, other, other, USER_CODE)
            ]
            assert pids[0] == pids[1]
            assert pids[2] == pids[3]
            assert len(set(pids)) == 3
            assert children_of() == {pids[4]}

    go(main())


def test_one_task_runs_per_slot(tmp_path: Path) -> None:
    async def main() -> None:
        marks = [tmp_path / str(n) for n in range(3)]
        async with opened(tmp_path, slots=2) as rig:
            works = [await rig.work([["sleep", 0.4, str(mark)]]) for mark in marks]
            runs = [asyncio.create_task(collect(rig, work, Handle())) for work in works]
            await until(lambda: sum(mark.exists() for mark in marks) == 2, "two at once")
            done = await asyncio.gather(*runs)
            assert all(one[0].value == "slept" for one in done)
            starts = sorted(mark.stat().st_mtime for mark in marks)
            assert starts[2] - starts[0] > 0.3

    go(main())


def test_event_loop_stays_responsive_while_tasks_run(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            run = asyncio.create_task(rig.run([["sleep", 0.4]]))
            beats = 0
            while not run.done():
                await asyncio.sleep(0.01)
                beats += 1
            assert beats > 10

    go(main())


def test_worker_looks_for_answers_of_long_tasks_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, a worker looked for answers without a pause while the tasks of a bundle took longer than `TICK_S`."""
    looks = 0
    answers = ChildProcess.answers

    async def counted(self: ChildProcess, wait_s: float, *, gather_s: float) -> list[Any]:
        nonlocal looks
        looks += 1
        return await answers(self, wait_s, gather_s=gather_s)

    monkeypatch.setattr(ChildProcess, "answers", counted)

    async def main() -> None:
        async with opened(tmp_path) as rig:
            await collect(rig, await rig.work([["sleep", 0.3]] * 4), Handle())

    go(main())
    assert looks < 3 * 1.2 / TICK_S


def test_close_ends_every_child_and_run_and_removes_what_they_left(tmp_path: Path) -> None:
    async def main() -> None:
        mark = tmp_path / "started"
        async with opened(tmp_path) as rig:
            await rig.values(["idle"])
            work = await rig.work(["a", ["sleep", 60, str(mark)]])
            run = asyncio.create_task(collect(rig, work, Handle()))
            await until(mark.exists, "the task's start")
            await asyncio.sleep(2 * TICK_S)  # the worker gathers answers for up to TICK_S
            await rig.runner.close()
            assert children_of() == set()
            assert [one.value for one in await run] == ["a"]
            assert [path.name for path in rig.scratch.root.iterdir()] == ["code"]

    go(main())


def test_a_run_that_is_given_up_leaves_no_process(tmp_path: Path) -> None:
    async def main() -> None:
        mark = tmp_path / "started"
        async with opened(tmp_path) as rig:
            work = await rig.work(["a", ["sleep", 60, str(mark)]])
            run = asyncio.create_task(collect(rig, work, Handle()))
            await until(mark.exists, "the task's start")
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            await until(lambda: children_of() == set(), "the child's end")
            assert await rig.values(["next"]) == ["next"]

    go(main())


WORKER = """
import asyncio, sys
from pathlib import Path
from typing import Any
from tests.support.processes import is_running
from tests.support.worker.runner import opened

async def main():
    async with opened(Path(sys.argv[1])) as rig:
        await rig.run([["sleep_in_program", sys.argv[2]]])

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_and_their_programs_die_with_the_worker(tmp_path: Path, number: int) -> None:
    """A worker must not leave orphans. No child continues, however the worker ends."""

    async def main() -> None:
        mark = tmp_path / "pid"
        worker = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(mark)])
        try:
            await until(lambda: mark.exists() and mark.read_text(), "the program's start")
            [child] = children_of(worker.pid)
            program = int(mark.read_text())
            assert is_running(child)
            assert is_running(program)
            worker.send_signal(number)
            await until(lambda: not is_running(child) and not is_running(program), "their end")
        finally:
            worker.kill()
            worker.wait()

    go(main())


def test_a_child_that_cannot_start_is_nobodys_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            monkeypatch.setattr(sys, "executable", "/bin/false")
            with pytest.raises(BackendError, match=r"could not start \(exit 1\)"):
                await rig.run([1])
            monkeypatch.setattr(sys, "executable", "/nowhere/python")
            with pytest.raises(BackendError, match="cannot run tasks"):
                await rig.run([1])
            monkeypatch.undo()
            assert await rig.values([1]) == [1]

    go(main())


def test_a_worker_removes_the_files_of_a_killed_worker(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            for name in ("values", "functions", "run", "spare/spare-0", "code"):
                (rig.scratch.root / name / "left").mkdir(parents=True)
            rig.runner.prepare()
            assert list(rig.scratch.root.glob("**/left")) == [rig.scratch.root / "code" / "left"]
            assert await rig.values([1]) == [1]

    go(main())


def test_a_failed_kill_does_not_occupy_a_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened(tmp_path, slots=1) as rig:
            pids: list[int] = []

            def fail(pid: int) -> None:
                pids.append(pid)
                raise OSError(errno.EMFILE, "Too many open files")

            with monkeypatch.context() as patch:
                patch.setattr(child_process, "kill_family", fail)
                with pytest.raises(BackendError, match="Too many open files"):
                    await asyncio.wait_for(rig.run([["sleep", 60]], timeout_s=0.2), 20)
            assert pids
            assert not any(Path(f"/proc/{pid}").exists() for pid in pids), "the child is reaped"
            assert [ran.value for ran in await asyncio.wait_for(rig.run([1]), 20)] == [1]

    go(main())


class Silent(SimObjects):
    async def get(self, key: str, *, limit: int | None = None) -> bytes:
        raise Unreachable("nobody answers")


def test_a_store_that_does_not_answer_is_nobodys_failure(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path, Silent()) as rig:
            with pytest.raises(Unreachable):
                await rig.run([1])
            assert await rig.runs_left() == []

    go(main())
