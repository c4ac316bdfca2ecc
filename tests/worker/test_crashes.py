"""Crashes and exceeded limits of a task, which affect only this task."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from batchlab.core.model import FailureKind, Ran
from batchlab.core.protocol.settlement import LOSS_LIMIT
from batchlab.worker.child import EXIT_PIPE_LOST
from batchlab.worker.child_process import describe_exit
from batchlab.worker.inflight_message import Handle
from tests.support.processes import is_running
from tests.support.worker.runner import collect, go, opened, until

# --- Failures that end the process ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "code"),
    [
        (["die", 0], 0),
        (["die", 3], 3),
        (["segfault"], -signal.SIGSEGV),
        (["signal", signal.SIGKILL], -signal.SIGKILL),
        (["signal", signal.SIGTERM], -signal.SIGTERM),
        (["close_everything"], EXIT_PIPE_LOST),
        (["close_and_reuse"], EXIT_PIPE_LOST),
    ],
    ids=str,
)
def test_a_crash_costs_exactly_the_task_that_crashed(tmp_path: Path, item: list[Any], code: int) -> None:
    """One bad task must not make its bundle run twice. Every task ran exactly once."""

    async def main() -> None:
        counter = tmp_path / "counter"
        async with opened(tmp_path) as rig:
            items = [*range(20), item, *range(20)]
            ran = await rig.run(items, params={"counter": str(counter)})
            assert [one.task for one in ran] == list(range(41))
            failed = [one for one in ran if one.failure]
            assert [one.task for one in failed] == [20]
            failure = failed[0].failure
            assert failure is not None
            assert failure.kind is FailureKind.CRASH
            assert failure.exit_code == code
            if code == EXIT_PIPE_LOST:
                assert failure.reason == "closed the file descriptors of its process"
            else:
                assert failure.reason.startswith(f"killed its process: {describe_exit(code)}")
        runs = Counter(counter.read_text().split())
        # SIGKILL may have come from outside, so the task gets another attempt, and its neighbors are unaffected.
        assert runs.pop("20") == (LOSS_LIMIT if code == -signal.SIGKILL else 1)
        assert runs == Counter(str(n) for n in range(41) if n != 20)

    go(main())


def test_task_whose_process_is_killed_from_outside_is_not_blamed(tmp_path: Path) -> None:
    async def main() -> None:
        counter = tmp_path / "counter"
        async with opened(tmp_path) as rig:
            items = [1, ["slain", 2], 3]
            ran = await rig.run(items, params={"counter": str(counter)})
            assert [one.value for one in ran] == [1, "spared", 3]
        assert counter.read_text().split() == ["0", "1", "1", "1", "2"]

    go(main())


def test_a_crash_names_its_signal_and_leaves_its_output(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            failure = await rig.failure(["segfault"])
            assert failure.reason == "killed its process: exit -11 (SIGSEGV)"
            assert "in do_segfault" in await rig.log(0)
            await rig.run([["die", 1], ["print", "next"]])
            assert await rig.log(0) == "last words\n"
            assert await rig.log(1) == "next\n"

    go(main())


@pytest.mark.parametrize(
    ("item", "value"),
    [
        (["close_streams"], "closed"),
        (["replace_streams"], "replaced"),
        (["leave_folder"], "left"),
        (["remove_folder"], "removed"),
        (["fork"], "parent"),
        (["fork_and_fail"], "parent"),
        (["thread"], "threaded"),
    ],
    ids=str,
)
def test_effects_of_a_task_on_its_process_do_not_reach_its_neighbor(
    tmp_path: Path, item: list[Any], value: str
) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            got = await rig.values([item, ["print", "mine"], ["cwd"]])
            assert got == [value, "printed", "cwd"]
            assert await rig.log(1) == "mine\n"

    go(main())


def test_a_process_that_ends_between_tasks_or_at_any_time_ends_the_job_all_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            ran = await rig.run([["thread_exit"], *[["sleep", 0.005]] * 10])
            assert [one.task for one in ran] == list(range(11))
            assert sum(one.failure is not None for one in ran) <= 1

    go(main())


def test_only_the_task_that_writes_into_the_pipe_is_to_blame(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            got = await rig.values(["a", ["write_everywhere"], ["sleep", 0.05], "b"])
            assert got == ["a", "crash: wrote into its process's pipe", "slept", "b"]

    go(main())


ENDS_BETWEEN = """
import os
import __main__

def run(item): ...

__main__.MemoryGrowth.worn_out = lambda self: os._exit(9)
"""


def test_process_that_keeps_exiting_between_tasks_is_given_up(tmp_path: Path) -> None:
    """A job always ends (I7), even if no task can be identified as the cause."""

    async def main() -> None:
        folder = tmp_path / "code"
        folder.mkdir()
        (folder / "between.py").write_text(ENDS_BETWEEN)
        async with opened(tmp_path) as rig:
            got = await rig.values([1, 2], handler="between:run", folder=folder)
            assert got == ["crash: ended its process before it could begin"] * 2

    go(main())


SLOW_IMPORT = "import time\ntime.sleep(0.5)\ndef run(item): return item"


def test_loading_a_handler_has_a_longer_limit_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        folder = tmp_path / "code"
        folder.mkdir()
        (folder / "slow.py").write_text(SLOW_IMPORT)
        async with opened(tmp_path) as rig:
            how: dict[str, Any] = {"handler": "slow:run", "folder": folder, "timeout_s": 0.2}
            assert await rig.values([1, 2], **how) == [1, 2]
        async with opened(tmp_path) as rig:
            monkeypatch.setattr("batchlab.worker.child_process._IMPORT_S", 0.3)
            reason = "timeout: Loading the handler took longer than 0.3 s."
            assert await rig.values([1, 2], **how) == [reason] * 2

    go(main())


def test_a_program_left_behind_neither_delays_nor_survives(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            [pid, failure, fine] = await rig.values([["linger"], ["die", 1], "fine"])
            assert "killed its process: exit 1" in failure
            assert fine == "fine"
            await until(lambda: not is_running(pid), "the program's end")

    go(main())


# --- Limits --------------------------------------------------------------------------------------


def test_a_task_over_its_timeout_is_ended_with_its_programs(tmp_path: Path) -> None:
    async def main() -> None:
        mark = tmp_path / "pid"
        async with opened(tmp_path) as rig:
            items = ["a", ["sleep_in_program", str(mark)], "b", ["sleep", 0.05]]
            got = await rig.values(items, timeout_s=0.6)
            assert got == ["a", "timeout: ran longer than its timeout of 0.6 s", "b", "slept"]
            assert not is_running(int(mark.read_text()))

    go(main())


def test_the_run_time_of_a_killed_task_is_what_it_had(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            failure = await rig.failure(["sleep", 60], timeout_s=0.25)
            assert 0.25 <= failure.run_s < 5
            assert failure.exit_code is None

    go(main())


def test_many_short_tasks_are_not_one_long_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            got = await rig.values([["sleep", 0.06]] * 20, timeout_s=1.0)
            assert got == ["slept"] * 20

    go(main())


@pytest.mark.parametrize("name", ["grow", "grow_in_program"])
def test_a_task_over_its_memory_limit_is_ended_alone(tmp_path: Path, name: str) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            got = await rig.values(["a", [name, 400], "b"], memory_bytes=200 * 2**20)
            assert got == ["a", "memory: used more than its memory limit of 200 MiB", "b"]
            assert await rig.values([["grow", 400, 0.2]], memory_bytes=600 * 2**20) == [400 * 2**20]

    go(main())


def test_memory_that_a_task_leaked_is_not_charged_to_the_next(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            items = [["leak", 120], ["grow", 150, 0.2], ["leak", 1]]
            got = await rig.values(items, memory_bytes=250 * 2**20)
            assert got[1] == 150 * 2**20
            assert got[0] != got[2], "the second task should have had a fresh process"

    go(main())


def test_kill_ends_the_running_task_promptly_and_yields_nothing_for_it(tmp_path: Path) -> None:
    async def main() -> None:
        mark = tmp_path / "started"
        async with opened(tmp_path) as rig:
            handle = Handle()
            work = await rig.work(["a", ["sleep", 60, str(mark)], "c"])
            got: list[Ran] = []

            async def take() -> None:
                got.extend([one async for one in rig.runner.run(work, handle)])

            running = asyncio.create_task(take())
            await until(mark.exists, "the second task's start")
            await until(lambda: handle.running == 1, "that the handle names it")
            pid = int(mark.read_text())
            handle.kill = True
            took_s = await until(lambda: not is_running(pid), "its end")
            await running
            assert [one.value for one in got] == ["a"]
            assert handle.running is None
            assert took_s < 1  # 0.05 s on an idle machine

    go(main())


def test_stop_lets_the_running_task_end_and_starts_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        mark = tmp_path / "started"
        async with opened(tmp_path) as rig:
            handle = Handle()
            work = await rig.work([["sleep", 0.3, str(mark)], "never"])
            run = asyncio.create_task(collect(rig, work, handle))
            await until(mark.exists, "the first task's start")
            handle.stop = True
            assert [one.value for one in await run] == ["slept"]

            late = Handle(stop=True)
            assert await collect(rig, await rig.work(["never"]), late) == []

    go(main())


def test_no_task_starts_without_a_fresh_look_at_the_control_object(tmp_path: Path) -> None:
    """No task may start after the control lease (I4). `until_s` is the end of the worker's control lease."""

    async def main() -> None:
        async with opened(tmp_path) as rig:
            past = Handle(until_s=rig.clock.monotonic_s() - 0.001)
            assert await collect(rig, await rig.work(["never"]), past) == []
            await rig.values(["warm"])
            soon = Handle(until_s=rig.clock.monotonic_s() + 0.8)
            got = await collect(rig, await rig.work([["sleep", 0.3]] * 100), soon)
            assert 1 <= len(got) <= 4

            moved = Handle(until_s=rig.clock.monotonic_s() + 1.0)
            running = asyncio.create_task(collect(rig, await rig.work([["sleep", 0.25]] * 6), moved))
            while not running.done():
                moved.until_s = rig.clock.monotonic_s() + 1.0
                await asyncio.sleep(0.02)
            assert len(running.result()) == 6

    go(main())


def test_the_budget_stops_starting_but_the_first_task_always_starts(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            assert len(await rig.run([["sleep", 0.15]] * 3, budget_s=0.0)) == 1
            assert 1 <= len(await rig.run([["sleep", 0.1]] * 100, budget_s=0.35)) <= 5
            assert len(await rig.run([["die", 1]] * 100, budget_s=0.0)) == 1
            assert len(await rig.run([1] * 100, budget_s=60.0)) == 100

    go(main())
