"""The simulator's runner, which calls real handlers in virtual time, and follows the same rules as the real runner."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.errors import Unreachable
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, FailureKind, JobId, Json, Ran, StageName, TaskSet
from batchlab.core.protocol import values
from batchlab.sim.actors import SimClock
from batchlab.sim.event_loop import SimLoop
from batchlab.worker import code_cache
from batchlab.worker.inflight_message import Handle, Work
from batchlab.worker.inline_child import InlineChildren, SimulatedTaskRunner

T = TypeVar("T")

HANDLERS = """
import sys
import helper

def shout(item, ctx):
    if item == "fail":
        raise ValueError("no")
    if item == "exit":
        sys.exit(2)
    if item == "save":
        return {"file": ctx.save(b"saved", "s.txt")}
    if item == "odd":
        return {1}
    return helper.shout(item)

def read(item):
    return item.read_text()

def late(item):
    import helper_of_helper
    return helper_of_helper.NAME
"""


class Sim:
    """A virtual-time loop with a bucket and a SimulatedTaskRunner. Every task takes `seconds`."""

    def __init__(self, seconds: float = 10.0, objects: SimObjects | None = None) -> None:
        self.loop = SimLoop()
        self.clock = SimClock(self.loop, 1.7e9)
        self.objects = objects or SimObjects()
        self.seconds = seconds
        self.asked: list[int] = []
        self.children = InlineChildren()
        self.runner = SimulatedTaskRunner(self.objects, self.clock, self._duration_s, self.children)
        self.numbers = iter(range(1000))

    def _duration_s(self, work: Work, task: int) -> float:
        self.asked.append(task)
        return self.seconds

    def go(self, coro: Coroutine[Any, Any, T]) -> T:
        async def whole() -> T:
            try:
                return await coro
            finally:
                await self.runner.close()

        with self.children:
            return self.loop.run(whole())

    async def pack(self, tmp_path: Path, name: str = "ours") -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "handlers.py").write_text(HANDLERS)
        (folder / "helper.py").write_text(f"def shout(x): return [{name!r}, x]")
        (folder / "helper_of_helper.py").write_text(f"NAME = {name!r}")
        data = code_cache.pack(folder)
        await self.objects.put(code_cache.key(data), data)
        return code_cache.key(data)

    def work(self, items: list[Json], *, code: str | None = None, budget_s: float | None = None, **stage: Any) -> Work:
        step = StageDef(StageName("s"), **{"handler": "handlers:shout", **stage})
        job = JobDef(JobId("j"), "j", (step,), 0.0, code=code)
        bundle = Bundle(job.id, step.name, TaskSet.span(0, len(items)))
        return Work(job, step, bundle, f"e-{next(self.numbers)}", items, budget_s)

    async def run(self, work: Work, handle: Handle | None = None) -> list[Ran]:
        return [ran async for ran in self.runner.run(work, handle or Handle())]


def test_tasks_take_virtual_time_and_give_real_results(tmp_path: Path) -> None:
    sim = Sim(seconds=3600.0)

    async def main() -> None:
        key = await sim.pack(tmp_path)
        ran = await sim.run(sim.work(["a", "fail", "save", "odd", "exit"], code=key))
        assert sim.clock.monotonic_s() == 5 * 3600.0
        assert [one.run_s for one in ran] == [3600.0] * 5
        assert ran[0].value == ["ours", "a"]
        assert await sim.objects.get(ran[2].value["file"]["$file"]) == b"saved"
        kinds = [one.failure.kind for one in ran if one.failure]
        assert kinds == [FailureKind.EXCEPTION, FailureKind.RESULT, FailureKind.EXIT]
        assert ran[1].failure is not None
        assert 'File "handlers.py", line' in ran[1].failure.traceback
        assert sim.asked == [0, 1, 2, 3, 4]

    sim.go(main())


def test_a_runner_that_is_not_closed_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of a simulated run end without a drain, so their runners are not closed."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    sim = Sim()

    async def main() -> None:
        ran = await sim.run(sim.work([1], code=await sim.pack(tmp_path)))
        assert ran[0].failure is None

    with sim.children:
        sim.loop.run(main())
    assert list(temporary.iterdir()) == []


def test_two_jobs_with_modules_of_the_same_names_do_not_meet(tmp_path: Path) -> None:
    sim = Sim()
    before = set(sys.modules)

    async def main() -> None:
        one, other = await sim.pack(tmp_path, "one"), await sim.pack(tmp_path, "other")
        for key, name in ((one, "one"), (other, "other"), (one, "one")):
            [ran] = await sim.run(sim.work([1], code=key))
            assert ran.value == [name, 1]
            [ran] = await sim.run(sim.work([1], code=key, handler="handlers:late"))
            assert ran.value == name

    sim.go(main())
    assert not {"handlers", "helper", "helper_of_helper"} & (set(sys.modules) - before)


def test_inputs_become_files_and_missing_ones_fail_their_task(tmp_path: Path) -> None:
    sim = Sim()

    async def main() -> None:
        key = await sim.pack(tmp_path)
        await sim.objects.put("raw/j/a", b"0123456789")
        items = [
            values.file_ref("raw/j/a", "a", 10),
            values.part_ref("raw/j/a", 4, 6, name="a", header=(0, 1)),
            values.file_ref("raw/j/gone", "gone", 1),
        ]
        ran = await sim.run(sim.work(items, code=key, handler="handlers:read"))
        assert [one.value for one in ran] == ["0123456789", "045", None]
        assert ran[2].failure is not None
        assert ran[2].failure.kind is FailureKind.INPUT

    sim.go(main())


def test_a_handler_that_cannot_be_loaded_fails_every_task() -> None:
    sim = Sim()

    async def main() -> None:
        ran = await sim.run(sim.work([1, 2], handler="no_such_module:run"))
        assert [one.failure.kind for one in ran if one.failure] == [FailureKind.IMPORT] * 2
        gone = await sim.run(sim.work([1], code=f"code/{'0' * 64}.zip"))
        assert gone[0].failure is not None
        assert gone[0].failure.kind is FailureKind.IMPORT

    sim.go(main())


def test_pickled_functions_and_commands_run_too() -> None:
    sim = Sim()

    async def main() -> None:
        await sim.objects.put("fn", cloudpickle.dumps(lambda x: {x}))
        [ran] = await sim.run(sim.work([4], handler="pickle:fn"))
        assert values.decode(ran.value, lambda _: None, pickles=True) == {4}
        work = sim.work([4], handler=None, command=("cp", "{input}", "{output:o}"))
        [ran] = await sim.run(work)
        assert await sim.objects.get(ran.value["$file"]) == b"4"

    sim.go(main())


def test_a_task_that_takes_longer_than_its_timeout_fails_then() -> None:
    sim = Sim(seconds=100.0)

    async def main() -> None:
        await sim.objects.put("fn", cloudpickle.dumps(lambda x: x))
        [ran] = await sim.run(sim.work([1], handler="pickle:fn", timeout_s=5.0))
        assert ran.failure is not None
        assert ran.failure.reason == "ran longer than its timeout of 5 s"
        assert sim.clock.monotonic_s() == 5.0

    sim.go(main())


def later(seconds: float, act: Callable[[], None]) -> Awaitable[None]:
    async def wait() -> None:
        await asyncio.sleep(seconds)
        act()

    return asyncio.create_task(wait())


@pytest.mark.parametrize(("word", "ended"), [("stop", 3), ("kill", 2), ("until_s", 3)])
def test_inline_runner_obeys_its_handle(word: str, ended: int) -> None:
    sim = Sim(seconds=10.0)

    async def main() -> None:
        await sim.objects.put("fn", cloudpickle.dumps(lambda x: x))
        handle = Handle(until_s=25.0 if word == "until_s" else 1e9)
        if word != "until_s":
            later(25.0, lambda: setattr(handle, word, True))
        seen: list[int | None] = []
        later(15.0, lambda: seen.append(handle.running))
        ran = await sim.run(sim.work(list(range(9)), handler="pickle:fn"), handle)
        assert len(ran) == ended
        assert seen == [1]
        assert handle.running is None
        if word == "kill":
            assert sim.clock.monotonic_s() - 25.0 <= 1.0

    sim.go(main())


def test_the_budget_counts_virtual_time_and_the_first_task_always_starts() -> None:
    sim = Sim(seconds=10.0)

    async def main() -> None:
        await sim.objects.put("fn", cloudpickle.dumps(lambda x: x))
        items: list[Json] = list(range(9))
        assert len(await sim.run(sim.work(items, handler="pickle:fn", budget_s=35.0))) == 4
        assert len(await sim.run(sim.work(items, handler="pickle:fn", budget_s=0.0))) == 1

    sim.go(main())


def test_a_store_that_does_not_answer_propagates() -> None:
    class Silent(SimObjects):
        async def download(self, key: str, path: Path) -> int:
            raise Unreachable("nobody answers")

    sim = Sim(objects=Silent())

    async def main() -> None:
        with pytest.raises(Unreachable):
            await sim.run(sim.work([1], handler="pickle:fn"))

    sim.go(main())


HARMFUL = """
import os

eaten = []

def run(item):
    if item == "exit":
        os._exit(0)
    if item == "loop":
        while True:
            pass
    if item == "eat":
        while True:
            eaten.append(bytearray(1 << 24))
    if item == "print":
        print("said by a handler")
    return item
"""


def test_a_handler_that_ends_its_process_loops_or_eats_memory_fails_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sim = Sim(seconds=0.1)

    async def main() -> list[Ran]:
        folder = tmp_path / "harmful"
        folder.mkdir()
        (folder / "harmful.py").write_text(HARMFUL)
        data = code_cache.pack(folder)
        await sim.objects.put(code_cache.key(data), data)
        step: dict[str, Any] = {"code": code_cache.key(data), "handler": "harmful:run"}
        ran = await sim.run(sim.work(["exit", 1, "loop", "print"], **step, timeout_s=0.5))
        return [*ran, *await sim.run(sim.work(["eat", 2], **step, memory_bytes=300 << 20))]

    ran = sim.go(main())
    kinds = [one.failure.kind if one.failure else one.value for one in ran]
    assert kinds == [FailureKind.CRASH, 1, FailureKind.TIMEOUT, "print", FailureKind.MEMORY, 2]
    assert ran[0].failure is not None
    assert ran[0].failure.exit_code == 0
    assert "said by a handler" in capsys.readouterr().err


def test_a_module_that_ends_its_process_fails_every_task(tmp_path: Path) -> None:
    sim = Sim()

    async def main() -> list[Ran]:
        folder = tmp_path / "ending"
        folder.mkdir()
        (folder / "ending.py").write_text("import os\nos._exit(3)\n")
        data = code_cache.pack(folder)
        await sim.objects.put(code_cache.key(data), data)
        return await sim.run(sim.work([1, 2], code=code_cache.key(data), handler="ending:run"))

    ran = sim.go(main())
    assert [one.failure.exit_code for one in ran if one.failure] == [3, 3]
