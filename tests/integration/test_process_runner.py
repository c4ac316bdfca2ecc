"""Tasks run in warm child processes, and whatever they do to those, their neighbours go on."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from batchlab.adapters.sim.objects import SimObjects
from batchlab.errors import BackendError, Unreachable
from batchlab.model import FailureKind, Ran
from batchlab.protocol import values
from batchlab.worker.child import EXIT_PIPE_LOST
from batchlab.worker.child_process import describe_exit
from batchlab.worker.runner import Handle
from tests.integration.runner_rig import USER_CODE, Rig, alive, children_of, opened, until


def go(coro: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coro)


# --- Handlers ------------------------------------------------------------------------------------


def test_results_come_in_order_with_what_the_context_says(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            items = ["a", {"$$k": 1}, [None, 2.5]]
            got = await rig.run(items, handler="acts:facts", params={"p": [1]}, first=7)
            assert [ran.task for ran in got] == [7, 8, 9]
            assert [ran.value["item"] for ran in got] == items
            first = got[0].value
            assert (first["job"], first["stage"], first["attempt"]) == ("j", "s", 1)
            assert [ran.value["task"] for ran in got] == [7, 8, 9]
            assert [ran.value["params"] for ran in got] == [{"p": [1], "seen": True}] * 3
            assert len({ran.value["scratch"] for ran in got}) == 3
            assert all(0 <= ran.run_s < 5 for ran in got)
            assert list((rig.scratch.root / "run").iterdir()) == []
            assert rig.handle.log == ""

    go(main())


@pytest.mark.parametrize(
    ("handler", "value"),
    [
        ("same", 5),
        ("optional", [5, False]),
        ("by_name", [5, 0]),
        ("instance", [5, 0]),
    ],
)
def test_the_signature_decides_how_a_handler_is_called(
    tmp_path: Path, handler: str, value: Any
) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            assert await rig.values([5], handler=f"acts:{handler}") == [value]

    go(main())


def test_ten_thousand_tiny_tasks_take_a_moment(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            await rig.values([1])
            began_s = time.perf_counter()
            got = await rig.values(list(range(10_000)), handler="acts:same")
            took_s = time.perf_counter() - began_s
            assert got == list(range(10_000))
            # About 0.1 s on an idle machine; this one may be busy.
            assert took_s < 2

    go(main())


def test_a_child_starts_without_heavy_modules() -> None:
    code = "import batchlab.worker.child, sys; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"asyncio", "dataclasses", "inspect", "subprocess", "cloudpickle", "shutil", "typer"}
    heavy |= {"pydantic", "yaml", "sqlalchemy", "obstore", "httpx", "socket", "threading"}
    assert heavy & set(told.stdout.split()) == set()


# --- Failures that leave the process alive -------------------------------------------------------


def test_exceptions_are_failures_with_the_users_frames_only(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            ran = await rig.run(
                [
                    ["raise", "ValueError"],
                    ["raise", "KeyboardInterrupt"],
                    ["raise", "MemoryError"],
                    ["raise", "BaseException"],
                    ["recurse"],
                    ["chain"],
                    ["unprintable"],
                    "fine",
                ]
            )
            failures = [one.failure for one in ran[:-1]]
            assert all(one and one.kind is FailureKind.EXCEPTION for one in failures)
            assert [one.error for one in failures if one] == [
                *("ValueError", "KeyboardInterrupt", "MemoryError", "BaseException"),
                *("RecursionError", "RuntimeError", "UnprintableError"),
            ]
            first = failures[0]
            assert first is not None
            assert first.reason == "ValueError: a bad value"
            assert 'File "acts.py", line' in first.traceback
            assert "in do_raise" in first.traceback
            assert all(one and "batchlab/" not in one.traceback for one in failures)
            chained = failures[5]
            assert chained is not None
            assert "cannot save '../unsafe'" in chained.traceback
            assert ran[-1].value == "fine"
            assert len(children_of()) == 1

    go(main())


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        ([], 0, "called sys.exit()"),
        ([3], 3, "called sys.exit(3)"),
        (["no disk"], 1, "called sys.exit('no disk')"),
    ],
)
def test_sys_exit_is_a_failure_with_its_code(
    tmp_path: Path, args: list[Any], code: int, reason: str
) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            ran = await rig.run([["exit", *args], "fine"])
            failure = ran[0].failure
            assert failure is not None
            assert (failure.kind, failure.exit_code) == (FailureKind.EXIT, code)
            assert failure.reason == reason
            assert ran[1].value == "fine"

    go(main())


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("set", "result['deep'][1] is of type set"),
        ("nan", "result[0] is the number nan"),
        ("bytes", "result is of type bytes"),
        ("generator", "result is of type generator"),
        ("surrogate", "UTF-8 cannot hold"),
        ("missing", "/nowhere/at/all, which does not exist"),
        ("folder", "0/scratch, which does not exist"),
    ],
)
def test_a_result_that_cannot_travel_is_a_failure_that_says_why(
    tmp_path: Path, what: str, says: str
) -> None:
    """Pain: unpicklable and odd results must end as FAILED tasks with a reason (I7)."""

    async def main() -> None:
        async with opened(tmp_path) as rig:
            failure = await rig.failure(["return", what])
            assert failure.kind is FailureKind.RESULT
            assert says in failure.reason

    go(main())


BROKEN = {
    "raises.py": "print('about to fail')\nraise ZeroDivisionError('at import')",
    "needs.py": "import surely_not_installed",
    "script.py": "import sys\nsys.exit(3)",
    "syntax.py": "def handler(:",
    "good.py": "def run(item): ...\nnumber = 3\ndef three(a, b, c): ...\ndef none(): ...",
    "deadly.py": "import os\nos._exit(5)",
}


@pytest.mark.parametrize(
    ("handler", "says"),
    [
        ("missing:run", "There is no module 'missing': add it to the job's code folder."),
        ("needs:run", "needs the module 'surely_not_installed': install it on the workers"),
        ("raises:run", "Loading raises:run failed: ZeroDivisionError: at import"),
        ("script:run", "called sys.exit(3): keep what a script does under"),
        ("syntax:run", "SyntaxError"),
        ("good:walk", "has no function 'walk'; it has none, run, three."),
        ("good:number", "good:number is no function but of type int"),
        ("good:three", "it must take (item) or (item, ctx), and takes (a, b, c)"),
        ("good:none", "it must take (item) or (item, ctx), and takes ()"),
    ],
)
def test_a_handler_that_cannot_be_loaded_fails_the_bundle_with_a_reason(
    tmp_path: Path, handler: str, says: str
) -> None:
    """Pain 1: stuck without a reason. A missing handler is FAILED tasks and a sentence (I7)."""

    async def main() -> None:
        folder = tmp_path / "code"
        folder.mkdir()
        for name, text in BROKEN.items():
            (folder / name).write_text(text)
        async with opened(tmp_path) as rig:
            ran = await rig.run([1, 2], handler=handler, folder=folder)
            assert [one.failure.kind for one in ran if one.failure] == [FailureKind.IMPORT] * 2
            assert ran[0].failure is not None
            assert says in ran[0].failure.reason
            if handler == "raises:run":
                assert await rig.log(0) == "about to fail\n"
                assert 'File "raises.py", line 2' in ran[0].failure.traceback

    go(main())


def test_a_module_that_kills_its_process_fails_the_bundle_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        folder = tmp_path / "code"
        folder.mkdir()
        (folder / "deadly.py").write_text(BROKEN["deadly.py"])
        async with opened(tmp_path) as rig:
            ran = await rig.run([1] * 500, handler="deadly:run", folder=folder)
            reasons = {(one.failure.kind, one.failure.reason) for one in ran if one.failure}
            assert reasons == {
                (FailureKind.CRASH, "Loading the handler killed its process: exit 5.")
            }
            assert len(ran) == 500

    go(main())


@pytest.mark.parametrize("gone", ["missing", "damaged", "no key"])
def test_code_that_cannot_be_had_is_a_failure_of_the_tasks(tmp_path: Path, gone: str) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            work = await rig.work([1])
            assert work.job.code is not None
            if gone == "missing":
                await rig.objects.delete([work.job.code])
            elif gone == "damaged":
                await rig.objects.put(work.job.code, b"junk")
            else:
                object.__setattr__(work.job, "code", "raw/x")
            [ran] = [one async for one in rig.runner.run(work, Handle())]
            assert ran.failure is not None
            assert ran.failure.kind is FailureKind.IMPORT
            assert "The job's code cannot be had" in ran.failure.reason

    go(main())


# --- Failures that take the process along --------------------------------------------------------


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
def test_a_crash_costs_exactly_the_task_that_crashed(
    tmp_path: Path, item: list[Any], code: int
) -> None:
    """Pain 6: one bad task must not make its bundle run twice. Every task ran exactly once."""

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
        assert Counter(counter.read_text().split()) == Counter(str(n) for n in range(41))

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
def test_what_a_task_does_to_its_process_does_not_reach_its_neighbour(
    tmp_path: Path, item: list[Any], value: str
) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            got = await rig.values([item, ["print", "mine"], ["cwd"]])
            assert got == [value, "printed", "cwd"]
            assert await rig.log(1) == "mine\n"

    go(main())


def test_a_process_that_ends_between_tasks_or_at_any_time_ends_the_job_all_the_same(
    tmp_path: Path,
) -> None:
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

__main__.Memory.worn_out = lambda self: os._exit(9)
"""


def test_processes_that_only_ever_end_between_tasks_do_not_go_on_for_ever(tmp_path: Path) -> None:
    """I7: a job always ends, also where nobody can be caught in the act."""

    async def main() -> None:
        folder = tmp_path / "code"
        folder.mkdir()
        (folder / "between.py").write_text(ENDS_BETWEEN)
        async with opened(tmp_path) as rig:
            got = await rig.values([1, 2], handler="between:run", folder=folder)
            assert got == ["crash: ended its process before it could begin"] * 2

    go(main())


SLOW_IMPORT = "import time\ntime.sleep(0.5)\ndef run(item): return item"


def test_loading_a_handler_has_a_longer_limit_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        folder = tmp_path / "code"
        folder.mkdir()
        (folder / "slow.py").write_text(SLOW_IMPORT)
        async with opened(tmp_path) as rig:
            how: dict[str, Any] = {"handler": "slow:run", "folder": folder, "timeout_s": 0.2}
            assert await rig.values([1, 2], **how) == [1, 2]
        async with opened(tmp_path) as rig:
            monkeypatch.setattr("batchlab.worker.limits._IMPORT_S", 0.3)
            reason = "timeout: Loading the handler took longer than 0.3 s."
            assert await rig.values([1, 2], **how) == [reason] * 2

    go(main())


def test_a_program_left_behind_neither_delays_nor_survives(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            [pid, failure, fine] = await rig.values([["linger"], ["die", 1], "fine"])
            assert "killed its process: exit 1" in failure
            assert fine == "fine"
            await until(lambda: not alive(pid), "the program's end")

    go(main())


# --- Limits --------------------------------------------------------------------------------------


def test_a_task_over_its_timeout_is_ended_with_its_programs(tmp_path: Path) -> None:
    async def main() -> None:
        mark = tmp_path / "pid"
        async with opened(tmp_path) as rig:
            items = ["a", ["sleep_in_program", str(mark)], "b", ["sleep", 0.05]]
            got = await rig.values(items, timeout_s=0.3)
            assert got == ["a", "timeout: ran longer than its timeout of 0.3 s", "b", "slept"]
            assert not alive(int(mark.read_text()))

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
            got = await rig.values([["sleep", 0.03]] * 20, timeout_s=0.3)
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
            took_s = await until(lambda: not alive(pid), "its end")
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


async def collect(rig: Rig, work: Any, handle: Handle) -> list[Ran]:
    return [one async for one in rig.runner.run(work, handle)]


def test_no_task_starts_without_a_fresh_look_at_the_control_object(tmp_path: Path) -> None:
    """I4: `until_s` is when the worker's knowledge of the job's control object ends."""

    async def main() -> None:
        async with opened(tmp_path) as rig:
            past = Handle(until_s=rig.clock.monotonic_s() - 0.001)
            assert await collect(rig, await rig.work(["never"]), past) == []
            await rig.values(["warm"])
            soon = Handle(until_s=rig.clock.monotonic_s() + 0.4)
            got = await collect(rig, await rig.work([["sleep", 0.15]] * 100), soon)
            assert 1 <= len(got) <= 4

            moved = Handle(until_s=rig.clock.monotonic_s() + 0.3)
            running = asyncio.create_task(collect(rig, await rig.work([["sleep", 0.1]] * 6), moved))
            while not running.done():
                moved.until_s = rig.clock.monotonic_s() + 0.3
                await asyncio.sleep(0.02)
            assert len(running.result()) == 6

    go(main())


def test_the_budget_stops_starting_but_the_first_task_always_starts(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            assert len(await rig.run([["sleep", 0.15]] * 3, budget_s=0.0)) == 1
            assert 2 <= len(await rig.run([["sleep", 0.1]] * 100, budget_s=0.35)) <= 5
            assert len(await rig.run([["die", 1]] * 100, budget_s=0.0)) == 1
            assert len(await rig.run([1] * 100, budget_s=60.0)) == 100

    go(main())


# --- The children --------------------------------------------------------------------------------


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


def test_as_many_runs_as_slots_go_on_at_once(tmp_path: Path) -> None:
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


def test_the_loop_stays_free_while_tasks_run(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            run = asyncio.create_task(rig.run([["sleep", 0.4]]))
            beats = 0
            while not run.done():
                await asyncio.sleep(0.01)
                beats += 1
            assert beats > 10

    go(main())


def test_close_ends_every_child_and_run_and_removes_what_they_left(tmp_path: Path) -> None:
    async def main() -> None:
        mark = tmp_path / "started"
        async with opened(tmp_path) as rig:
            await rig.values(["idle"])
            work = await rig.work(["a", ["sleep", 60, str(mark)]])
            run = asyncio.create_task(collect(rig, work, Handle()))
            await until(mark.exists, "the task's start")
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
from tests.integration.runner_rig import opened

async def main():
    async with opened(Path(sys.argv[1])) as rig:
        await rig.run([["sleep_in_program", sys.argv[2]]])

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_and_their_programs_die_with_the_worker(tmp_path: Path, number: int) -> None:
    """Pain 11: orphans. However the worker ends, nothing of it runs on."""

    async def main() -> None:
        mark = tmp_path / "pid"
        worker = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(mark)])
        try:
            await until(lambda: mark.exists() and mark.read_text(), "the program's start")
            [child] = children_of(worker.pid)
            program = int(mark.read_text())
            assert alive(child)
            assert alive(program)
            worker.send_signal(number)
            await until(lambda: not alive(child) and not alive(program), "their end")
        finally:
            worker.kill()
            worker.wait()

    go(main())


def test_a_child_that_cannot_start_is_nobodys_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


class Silent(SimObjects):
    async def get(self, key: str) -> bytes:
        raise Unreachable("nobody answers")


def test_a_store_that_does_not_answer_is_nobodys_failure(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path, Silent()) as rig:
            with pytest.raises(Unreachable):
                await rig.run([1])
            assert list((rig.scratch.root / "run").iterdir()) == []

    go(main())


# --- The Python API ------------------------------------------------------------------------------


def test_a_pickled_function_takes_and_gives_any_object(tmp_path: Path) -> None:
    async def main() -> None:
        factor = 3
        async with opened(tmp_path) as rig:
            await rig.objects.put("jobs/j/fn", cloudpickle.dumps(lambda x: x * factor))
            items = [values.encode_object(one) for one in (2, "ab", (1, 2), None)]
            got = await rig.run(items, handler="pickle:jobs/j/fn", folder=None)
            decoded = [values.decode(one.value, lambda _: None) for one in got[:3]]
            assert decoded == [6, "ababab", (1, 2) * 3]
            assert got[0].value == 6
            assert got[3].failure is not None
            assert got[3].failure.error == "TypeError"
            await rig.objects.delete(["jobs/j/fn"])
            again = await rig.values([5], handler="pickle:jobs/j/fn", folder=None)
            assert again == [15], "the function should have been kept"
            failure = await rig.failure(1, handler="pickle:jobs/j/none", folder=None)
            assert failure.kind is FailureKind.IMPORT

    go(main())


def test_an_unpicklable_result_is_a_failure(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            function = cloudpickle.dumps(lambda _: itertools.chain.from_iterable(i for i in [[1]]))
            await rig.objects.put("fn", function)
            failure = await rig.failure(1, handler="pickle:fn", folder=None)
            assert failure.kind is FailureKind.RESULT
            assert "cannot be pickled" in failure.reason
            junk = {"$pickle": "gARjbm93aGVyZQpub3RoaW5nCi4="}
            failure = await rig.failure(junk, handler="pickle:fn", folder=None)
            assert failure.kind is FailureKind.INPUT
            assert "Its item cannot be read: ModuleNotFoundError" in failure.reason

    go(main())


def test_environment_of_the_worker_reaches_its_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setenv("SETTING", "on")
        async with opened(tmp_path) as rig:
            await rig.objects.put("fn", cloudpickle.dumps(lambda key: os.environ.get(key)))
            assert await rig.values(["SETTING"], handler="pickle:fn", folder=None) == ["on"]

    go(main())
