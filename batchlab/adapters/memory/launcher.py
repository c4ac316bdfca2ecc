"""Simulated instances.

The boot of a simulated instance takes virtual time. Then the launcher calls a function that starts a worker.

Invariant: only the calls and the random source determine the events, so a seed reproduces a run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from random import Random
from typing import Protocol

from batchlab.core.errors import AlreadyExists, BackendError
from batchlab.core.model import Machine, Pool
from batchlab.core.ports import ANY_MACHINE, KEEP_ENDED_S
from batchlab.core.text import KILLED, TERMINATED


class SimInstance(Protocol):
    """A worker process in the simulator.

    `ended` is None while the worker runs, and then describes the end of the worker ("exit 0").
    """

    ended: str | None

    def stop(self, grace_s: float) -> None:
        """Begin to drain the worker. The worker is killed after `grace_s` seconds."""

    def kill(self, reason: str) -> None:
        """End the worker at once and set `ended` to `reason`."""


@dataclass(slots=True)
class _Slot:
    """State of an instance since its launch.

    `booting` is set until the instance has started, and `worker` is set afterward.
    """

    booting: asyncio.TimerHandle | None
    worker: SimInstance | None = None
    ended: str | None = None
    ended_s: float | None = None
    kill: asyncio.TimerHandle | None = None


class SimLauncher:
    """The Launcher port over coroutines of one event loop.

    The boot of an instance takes the pool's `boot_s` plus or minus 25%, drawn from `rng`. `refuse` may return a reason
    not to launch, such as a lack of capacity. The launch then raises a BackendError with the reason as its text.
    `launched` is called with (pool, instance) after a launch, and `ended` with (instance, how) after an end. `crash`
    sets `changed`. The launcher notices at its next call that a worker has exited by itself.
    """

    def __init__(self, start: Callable[[Pool, str], SimInstance], rng: Random) -> None:
        self.changed = asyncio.Event()
        self.refuse: Callable[[Pool, str], str | None] = lambda _pool, _instance: None
        self.launched: Callable[[Pool, str], None] = lambda _pool, _instance: None
        self.ended: Callable[[str, str], None] = lambda _instance, _how: None
        self._start = start
        self._rng = rng
        self._slots: dict[str, _Slot] = {}
        # Machines survive a manager's crash, so the callbacks of machines do not run in the context of the manager. In
        # the simulator, the context of a task decides which crash ends the task.
        self._context = copy_context()

    async def launch(
        self,
        pool: Pool,
        instance: str,
        machine: Machine = ANY_MACHINE,  # noqa: ARG002 - all machines are alike here
    ) -> None:
        if instance in self._slots:
            raise AlreadyExists(f"Instance {instance} already exists.")
        reason = self.refuse(pool, instance)
        if reason is not None:
            raise BackendError(reason)
        delay_s = pool.boot_s * self._rng.uniform(0.75, 1.25)
        loop = asyncio.get_running_loop()
        self._slots[instance] = _Slot(loop.call_later(delay_s, self._boot, pool, instance, context=self._context))
        self.launched(pool, instance)

    async def terminate(self, instance: str, *, grace_s: float) -> None:
        slot = self._slots.get(instance)
        if slot is None or self._refresh(instance, slot) is not None:
            return
        if slot.worker is None:
            self._end(instance, slot, TERMINATED)
            return
        if slot.kill is None:
            self._context.run(slot.worker.stop, grace_s)
        loop = asyncio.get_running_loop()
        due_s = loop.time() + grace_s
        if slot.kill is None or due_s < slot.kill.when():
            if slot.kill is not None:
                slot.kill.cancel()
            slot.kill = loop.call_at(due_s, self._end, instance, slot, KILLED, context=self._context)

    async def running(self) -> Mapping[str, str | None]:
        now_s = asyncio.get_running_loop().time()
        ends: dict[str, str | None] = {}
        forgotten: list[str] = []
        for name, slot in self._slots.items():
            ends[name] = self._refresh(name, slot) if slot.ended is None else slot.ended
            if slot.ended_s is not None and now_s - slot.ended_s > KEEP_ENDED_S:
                forgotten.append(name)
        for name in forgotten:
            del self._slots[name]
        return ends

    def crash(self, instance: str, note: str = KILLED) -> None:
        """End the instance at once, as if its worker had exited by itself.

        Raise KeyError if the instance is unknown.
        """
        self._end(instance, self._slots[instance], note)
        self.changed.set()

    def _boot(self, pool: Pool, instance: str) -> None:
        slot = self._slots[instance]
        slot.booting = None
        slot.worker = self._start(pool, instance)

    def _end(self, instance: str, slot: _Slot, how: str) -> None:
        if self._refresh(instance, slot) is not None:
            return
        if slot.booting is not None:
            slot.booting.cancel()
        if slot.worker is not None:
            slot.worker.kill(how)
        self._settle(instance, slot, how)

    def _refresh(self, instance: str, slot: _Slot) -> str | None:
        if slot.ended is None and slot.worker is not None and slot.worker.ended is not None:
            self._settle(instance, slot, slot.worker.ended)
        return slot.ended

    def _settle(self, instance: str, slot: _Slot, how: str) -> None:
        slot.ended, slot.ended_s = how, asyncio.get_running_loop().time()
        # The worker object is released, so thousands of ended workers do not use memory for ten minutes.
        slot.worker = slot.booting = None
        if slot.kill is not None:
            slot.kill.cancel()
        self.ended(instance, how)


class MemoryState:
    """The fleet's Store port in memory, for a simulation that ends with its process."""

    def __init__(self) -> None:
        self._data: bytes | None = None

    def load(self) -> bytes | None:
        return self._data

    def save(self, data: bytes) -> None:
        self._data = data
