"""Tasks in reused child processes, whose faults do not affect their neighbors."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from batchlab.core.model import FailureKind
from batchlab.core.protocol import values
from batchlab.worker.inflight_message import Handle
from tests.support.worker.runner import children_of, go, opened

# --- Handlers ------------------------------------------------------------------------------------


def test_results_are_in_order_with_the_context(tmp_path: Path) -> None:
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
            assert await rig.runs_left() == []
            assert rig.handle.log == ""

    go(main())


@pytest.mark.parametrize(
    ("handler", "value"), [("same", 5), ("optional", [5, False]), ("by_name", [5, 0]), ("instance", [5, 0])]
)
def test_the_signature_decides_how_a_handler_is_called(tmp_path: Path, handler: str, value: Any) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            assert await rig.values([5], handler=f"acts:{handler}") == [value]

    go(main())


def test_ten_thousand_tiny_tasks_are_one_bundle_like_any(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            await rig.values([1])
            got = await rig.values(list(range(10_000)), handler="acts:same")
            assert got == list(range(10_000))

    go(main())


def test_a_child_starts_without_heavy_modules() -> None:
    code = "import batchlab.worker.child, sys; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"asyncio", "dataclasses", "inspect", "subprocess", "cloudpickle", "shutil", "typer"}
    heavy |= {"pydantic", "yaml", "sqlalchemy", "obstore", "httpx", "socket", "threading"}
    assert heavy & set(told.stdout.split()) == set()


def test_long_tasks_are_measured(tmp_path: Path) -> None:
    """A task that runs for at least 5 ms has its CPU time, peak memory, and sizes in the result."""

    async def main() -> None:
        async with opened(tmp_path) as rig:
            got = await rig.run([[0.05, 64], [0.05, 11], [0.0, 0]], handler="acts:work_of")
            first, second, short = (ran.metrics for ran in got)
            assert first
            assert second
            assert short is None
            for metrics in (first, second):
                assert 0.02 < (metrics.cpu_s or 0) < 1
                assert (metrics.input_bytes, metrics.output_bytes, metrics.input) == (10, 4, "")
            assert (second.memory_bytes or 0) < 100 * 1024**2
            assert (first.memory_bytes or 0) - (second.memory_bytes or 0) > 48 * 1024**2

    go(main())


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
            assert all(failure and failure.kind is FailureKind.EXCEPTION for failure in failures)
            assert [failure.error for failure in failures if failure] == [
                "ValueError",
                "KeyboardInterrupt",
                "MemoryError",
                "BaseException",
                "RecursionError",
                "RuntimeError",
                "UnprintableError",
            ]
            first = failures[0]
            assert first is not None
            assert first.reason == "ValueError: a bad value"
            assert 'File "acts.py", line' in first.traceback
            assert "in do_raise" in first.traceback
            assert all(failure and "batchlab/" not in failure.traceback for failure in failures)
            chained = failures[5]
            assert chained is not None
            assert "cannot save '../unsafe'" in chained.traceback
            assert ran[-1].value == "fine"
            assert len(children_of()) == 1

    go(main())


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [([], 0, "called sys.exit()"), ([3], 3, "called sys.exit(3)"), (["no disk"], 1, "called sys.exit('no disk')")],
)
def test_sys_exit_is_a_failure_with_its_code(tmp_path: Path, args: list[Any], code: int, reason: str) -> None:
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
        ("surrogate", "UTF-8 cannot represent"),
        ("missing", "/nowhere/at/all, which does not exist"),
        ("folder", "0/scratch, which is not a regular file"),
    ],
)
def test_untransferable_result_is_a_failure_with_its_reason(tmp_path: Path, what: str, says: str) -> None:
    """An unpicklable or odd result ends its task as FAILED with a reason (I7)."""

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
        ("good:number", "good:number is not a function: its type is int"),
        ("good:three", "it must take (item) or (item, ctx), and takes (a, b, c)"),
        ("good:none", "it must take (item) or (item, ctx), and takes ()"),
    ],
)
def test_a_handler_that_cannot_be_loaded_fails_the_bundle_with_a_reason(
    tmp_path: Path, handler: str, says: str
) -> None:
    """A job must not be stuck without a reason. A missing handler leads to FAILED tasks with a reason (I7)."""

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
            assert reasons == {(FailureKind.CRASH, "Loading the handler killed its process: exit 5.")}
            assert len(ran) == 500

    go(main())


def test_module_killed_during_its_import_has_not_run(tmp_path: Path) -> None:
    async def main() -> None:
        folder = tmp_path / "code"
        folder.mkdir()
        (folder / "deadly.py").write_text("import os\nos.kill(os.getpid(), 9)\ndef run(item): ...")
        async with opened(tmp_path) as rig:
            [ran] = await rig.run([1], handler="deadly:run", folder=folder)
            assert ran.failure is not None
            assert ran.failure.reason == (
                "Loading the handler killed its process: exit -9 (SIGKILL); the machine may have run out of memory."
            )

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
                object.__setattr__(work.job, "code", "raw/j/x")
            [ran] = [one async for one in rig.runner.run(work, Handle())]
            assert ran.failure is not None
            assert ran.failure.kind is FailureKind.IMPORT
            assert "The job's code cannot be fetched" in ran.failure.reason

    go(main())


# --- The Python API ------------------------------------------------------------------------------


def test_a_pickled_function_takes_and_gives_any_object(tmp_path: Path) -> None:
    async def main() -> None:
        factor = 3
        async with opened(tmp_path) as rig:
            await rig.objects.put("jobs/j/fn", cloudpickle.dumps(lambda x: x * factor))
            items = [values.encode_object(one) for one in (2, "ab", (1, 2), None)]
            got = await rig.run(items, handler="pickle:jobs/j/fn", folder=None)
            decoded = [values.decode(one.value, lambda _: None, pickles=True) for one in got[:3]]
            assert decoded == [6, "ababab", (1, 2) * 3]
            assert got[0].value == 6
            assert got[3].failure is not None
            assert got[3].failure.error == "TypeError"
            await rig.objects.delete(["jobs/j/fn"])
            again = await rig.values([5], handler="pickle:jobs/j/fn", folder=None)
            assert again == [15], "the function should have been kept"
            assert await rig.values([5], handler="pickle:jobs/j/fn") == [15], "with code"
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


def test_environment_of_the_worker_reaches_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setenv("SETTING", "on")
        async with opened(tmp_path) as rig:
            await rig.objects.put("fn", cloudpickle.dumps(lambda key: os.environ.get(key)))
            assert await rig.values(["SETTING"], handler="pickle:fn", folder=None) == ["on"]

    go(main())
