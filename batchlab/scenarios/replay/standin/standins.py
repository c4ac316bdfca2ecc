"""Stand-in tasks, which take exactly the times in the scenario.

The workers receive the module of the stand-ins as a job's code. The module uses only the standard library, so it does
not depend on a worker's version of batchlab.

Format of items and results: {"t": {stage: [seconds, [failing attempts], kills]}, "group_STAGE": group}. An item has an
entry for its own stage and for each stage that follows item by item. A task of a gathering stage finds its entry in the
job's parameters.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

BLOCK_BYTES = 256 * 1024
FILE_BYTES = 16 * 1024 * 1024
"""Size at which a task overwrites its file from the start, so that the disk does not fill up."""
PAGE_BYTES = 4096
HELD_BYTES = 64 * 1024 * 1024
"""Memory in bytes of a task whose stage declares no memory."""


class Task(Protocol):
    """Part of batchlab.core.task_context.Context that stand-ins use."""

    stage: str
    task: int
    attempt: int

    @property
    def params(self) -> dict[str, Any]: ...

    @property
    def scratch(self) -> Path: ...


class ScenarioFailure(Exception):
    """The scenario declares that the task's attempt fails."""


def work(item: Any, ctx: Task) -> Any:
    """Run for the task's time, and then raise ScenarioFailure if the scenario declares a failure of the attempt."""
    begun_s = time.monotonic()
    shape = ctx.params["stages"][ctx.stage]
    entries = _entries(item, ctx, shape)
    seconds, failing, kills = entries[ctx.stage]
    if kills:
        time.sleep(seconds / 2)
        _kill_worker()
    _KINDS[shape["kind"]](begun_s + seconds, shape, ctx)
    if ctx.attempt in failing:
        raise ScenarioFailure(f"attempt {ctx.attempt} fails, as the scenario says")
    rest = {name: entries[name] for name in shape["passes"] if name in entries}
    result: dict[str, Any] = {"t": rest} if rest else {}
    for field, groups in shape["groups"].items():
        result[field] = f"{ctx.task % groups:06d}"
    return result or None


def _entries(item: Any, ctx: Task, shape: dict[str, Any]) -> dict[str, Any]:
    gathered = shape.get("tasks")
    if gathered is not None:
        entries: dict[str, Any] = gathered[ctx.task]
        return entries
    if "t" in item:
        return dict(item["t"])
    # A task that follows several stages has an item with the values of all upstream stages, by stage.
    return {name: entry for value in item.values() for name, entry in value["t"].items()}


def _kill_worker() -> None:
    worker = os.getppid()
    if worker > 1:  # a parent with id 1 is not the worker, because the worker has ended
        os.kill(worker, signal.SIGKILL)
    # The task's process ends when the worker ends.
    time.sleep(60.0)


def _sleep(until_s: float, _shape: dict[str, Any], _ctx: Task) -> None:
    time.sleep(max(0.0, until_s - time.monotonic()))


def _cpu(until_s: float, _shape: dict[str, Any], _ctx: Task) -> None:
    number = 1
    while time.monotonic() < until_s:
        for _ in range(200):
            number = number * 1103515245 + 12345 & 0x7FFFFFFF


def _memory(until_s: float, shape: dict[str, Any], _ctx: Task) -> None:
    # The memory comes from the operating system, so that the memory is released after the task.
    size = max(PAGE_BYTES, int(shape["hold"] or HELD_BYTES))
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for at in range(0, len(memory), PAGE_BYTES):
            memory[at] = 1
            if time.monotonic() >= until_s:
                break
        time.sleep(max(0.0, until_s - time.monotonic()))


def _io(until_s: float, _shape: dict[str, Any], ctx: Task) -> None:
    block = os.urandom(BLOCK_BYTES)
    with (ctx.scratch / "written").open("wb", buffering=0) as file:
        while time.monotonic() < until_s:
            if file.tell() >= FILE_BYTES:
                file.seek(0)
            file.write(block)
            os.fsync(file.fileno())


_KINDS: dict[str, Callable[[float, dict[str, Any], Task], None]] = {
    "sleep": _sleep,
    "cpu": _cpu,
    "memory": _memory,
    "io": _io,
}
