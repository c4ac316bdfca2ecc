"""Faults of services on every backend: duplicate and late messages, a manager crash, and the loss
of the ledger.

Message faults use the Queue port. No message is lost or held for too long: if this process dies,
the visibility timeout returns its messages. The manager and the ledger recover by themselves.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from batchlab.core.errors import BackendError
from batchlab.core.port_retries import patiently
from batchlab.core.ports import MAX_DELAY_S, Message, Outgoing, Queue
from batchlab.core.protocol import object_keys
from batchlab.runtime import factory, manager_process
from batchlab.runtime.home import ManagerRecord
from batchlab.scenarios.faults.target_grid import (
    EFFECT_TIMEOUT_S,
    NOTHING_HIT,
    FaultResult,
    Rollback,
    TargetGrid,
    complete,
    in_thread,
    wait_for,
)
from batchlab.scenarios.model.values import Fault

_BATCH = 10
_WAIT_S = 1.0
_HELD_S = 10.0
"""Visibility timeout of messages that are only inspected."""
_MARGIN_S = 20.0
_PAUSE_S = 0.1
"""Pause between two receives.

It doubles after each receive that returns known messages, because receives count toward the limit
of the dead-letter queue.
"""


@dataclass
class _QueueState:
    """Messages seen in one queue.

    `taken` has the messages that are hidden from others, by receipt, with their receive times.
    """

    ids: dict[str, set[str]] = field(default_factory=dict)
    """Ids of each body, by the body's digest."""
    given_back: int = 0
    hit: dict[str, str] = field(default_factory=dict)
    """First id of each affected body, by the body's digest."""
    kept_s: list[float] = field(default_factory=list)
    taken: dict[str, tuple[float, Message]] = field(default_factory=dict)

    def fresh(self, batch: Sequence[Message]) -> list[Message]:
        """Return the messages whose body was not seen before."""
        found = []
        for message in batch:
            seen = self.ids.setdefault(_digest(message.body), set())
            if not seen:
                found.append(message)
            seen.add(message.id)
        return found


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _is_hit(message: Message, rate: float) -> bool:
    """Decide by the body, so that the result is the same for every copy."""
    return int(_digest(message.body)[:8], 16) < rate * 16**8


async def duplicates(scene: TargetGrid, fault: Fault) -> FaultResult:
    """Duplicate a share of the messages."""

    async def work(queue: Queue, name: str, met: _QueueState, left_s: Callable[[], float]) -> None:
        async for batch in _received_batches(queue, name, met, left_s, lambda: _HELD_S):
            fresh, everything = batch
            doubled = [one for one in fresh if _is_hit(one, fault.rate)]
            for one in doubled:
                await queue.send(name, [Outgoing(one.body)])
                met.hit[_digest(one.body)] = one.id
            good = await _give_back(queue, name, met, everything)
            met.given_back += sum(one.receipt in good for one in doubled)

    queues, mets = await _run_on_queues(scene, fault, work)
    hit = sum(len(met.hit) for met in mets)
    twice = sum(len(met.ids[digest]) > 1 for met in mets for digest in met.hit)
    given = sum(met.given_back for met in mets)
    came = sum(len(met.ids) for met in mets)
    if not hit:
        return FaultResult(impossible=NOTHING_HIT.format(one="message"))
    return FaultResult(
        tuple(queues),
        f"{hit} of {came} messages that came by were sent a second time, and {given} of those "
        f"originals given back while nobody else had had them; {twice} came by again under a "
        "second id",
    )


async def delays(scene: TargetGrid, fault: Fault) -> FaultResult:
    """Hide a share of the messages for a while."""

    async def work(queue: Queue, name: str, met: _QueueState, left_s: Callable[[], float]) -> None:
        def hidden_s() -> float:
            return min(left_s(), MAX_DELAY_S) + _MARGIN_S

        async for fresh, everything in _received_batches(queue, name, met, left_s, hidden_s):
            late = [one for one in fresh if _is_hit(one, fault.rate)]
            met.hit |= {_digest(one.body): one.id for one in late}
            await _give_back(queue, name, met, [one for one in everything if one not in late])
            over_s = time.monotonic() - MAX_DELAY_S
            due = [one for since_s, one in met.taken.values() if since_s < over_s]
            await _give_back(queue, name, met, due, kept=True)

    queues, mets = await _run_on_queues(scene, fault, work)
    hit, came = (sum(len(met.hit) for met in mets), sum(len(met.ids) for met in mets))
    kept_s = sorted(s for met in mets for s in met.kept_s)
    spread = f", {kept_s[0]:.1f} to {kept_s[-1]:.1f} s each" if kept_s else ""
    if not hit:
        return FaultResult(impossible=NOTHING_HIT.format(one="message"))
    return FaultResult(
        tuple(queues),
        f"{hit} of {came} messages that came by were kept back, {len(kept_s)} of them until "
        f"their receipts were given up{spread}",
    )


async def _give_back(
    queue: Queue, name: str, met: _QueueState, batch: Sequence[Message], *, kept: bool = False
) -> set[str]:
    """Make messages visible again.

    Return the receipts that were still valid, because no other consumer has received the message.
    Record the hold time of `kept` messages.
    """
    good: set[str] = set()
    for start in range(0, len(batch), _BATCH):
        some = [one.receipt for one in batch[start : start + _BATCH]]
        refused = await queue.change_visibility(name, [(one, 0.0) for one in some])
        for receipt in some:
            since_s, _ = met.taken.pop(receipt)
            if receipt not in refused:
                good.add(receipt)
                met.kept_s += [time.monotonic() - since_s] * kept
    return good


async def _take(queue: Queue, name: str, met: _QueueState, wait_s: float, hide_s: float) -> list[Message]:
    """Receive messages and record them at once as hidden."""
    batch = await queue.receive(name, wait_s=wait_s, visibility_s=hide_s, max_messages=_BATCH)
    met.taken.update({message.receipt: (time.monotonic(), message) for message in batch})
    return list(batch)


async def _received_batches(
    queue: Queue, name: str, met: _QueueState, left_s: Callable[[], float], visible_s: Callable[[], float]
) -> Any:
    """Yield batches of new and of all messages until the time is over."""
    pause_s = _PAUSE_S
    while (left := left_s()) > 0:
        # A receive that is cancelled midway would hide messages without a record of them.
        batch = await complete(_take(queue, name, met, min(_WAIT_S, left), visible_s()))
        fresh = met.fresh(batch)
        if batch:
            yield fresh, batch
        pause_s = _PAUSE_S if len(fresh) == len(batch) else 2 * pause_s
        await asyncio.sleep(min(pause_s, max(0.0, left_s())))


QueueWork = Callable[[Queue, str, _QueueState, Callable[[], float]], Coroutine[Any, Any, None]]


async def _run_on_queues(scene: TargetGrid, fault: Fault, work: QueueWork) -> tuple[list[str], list[_QueueState]]:
    """Run the work on the task queues of the fault's pools for its time, and on the events queue if
    the fault names no pool.
    """
    pools = [pool["name"] for pool in (await scene.grid())["pools"]]
    names = [object_keys.tasks_queue(one) for one in pools if fault.pool in ("", one)]
    names += [object_keys.EVENTS] if not fault.pool else []
    ends_s = time.monotonic() + fault.for_s

    def left_s() -> float:
        return 0.0 if scene.over.is_set() else ends_s - time.monotonic()

    mets = [_QueueState() for _ in names]
    queue = scene.backend.open_queue(scene.home, scene.backend.open_clock())
    patient: Queue = patiently(queue, factory.patience())

    async def release(name: str, met: _QueueState) -> None:
        held = [one for _, one in met.taken.values()]
        await _give_back(patient, name, met, held, kept=True)

    async def in_each() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for name, met in zip(names, mets, strict=True):
                    group.create_task(work(patient, name, met, left_s))
        except* BackendError as errors:
            raise errors.exceptions[0] from None

    try:
        async with Rollback(scene.over) as undoing:
            for name, met in zip(names, mets, strict=True):
                undoing.owe(f"the hold on messages of {name}", partial(release, name, met))
            await in_each()
    finally:
        await queue.close()
    return names, mets


_MAX_JOBS = 10_000
_PAGE = 1000
NO_JOB = "The ledger had no jobs."


class ManagerProcess:
    """Manager of a grid that is a process of this machine."""

    def __init__(self, scene: TargetGrid) -> None:
        self._scene = scene

    async def crash(self, fault: Fault) -> FaultResult:
        """Kill the manager's process, and start another one after the fault's time."""
        scene = self._scene
        before = await scene.grid()
        running = scene.home.record()
        if running is None:
            return FaultResult(impossible="No manager ran here.")
        started: list[ManagerRecord] = []

        def start() -> None:
            started.append(self._start(running.url))

        async with Rollback(scene.over) as undoing:
            await undoing.breaking(
                "the end of the manager",
                partial(in_thread, start),
                partial(in_thread, manager_process.kill_manager, scene.home),
            )
            gone_s = time.monotonic()
            await scene.hold(fault.for_s)
        owner = await scene.leader(after=before["owner"])
        return FaultResult(
            (before["owner"],),
            f"{before['owner']} (pid {running.pid}) was gone, and {owner} led (pid "
            f"{started[-1].pid}) "
            f"{time.monotonic() - gone_s:.1f} s later",
        )

    def _start(self, url: str) -> ManagerRecord:
        scene = self._scene
        return manager_process.start_manager(
            scene.home, scene.backend, pools=scene.pools, parent=scene.parent, port=urlsplit(url).port or 0
        )

    async def lose_ledger(self, fault: Fault) -> FaultResult:
        return await lose_ledger(self._scene, fault)


async def lose_ledger(
    scene: TargetGrid, fault: Fault, *, before: Callable[[Rollback], Awaitable[str]] | None = None
) -> FaultResult:
    """Empty the ledger, and let the manager rebuild it from the bucket after the fault's time.

    `before` first breaks the database and returns its evidence.
    """
    ledger = scene.backend.open_ledger(scene.home)
    found: list[int] = []

    async def forget() -> bool:
        with suppress(BackendError):  # the database may be starting
            await complete(ledger.forget())
            return True
        return False

    try:
        had = len(await ledger.jobs(limit=_MAX_JOBS))
        if not had:
            return FaultResult(impossible=NO_JOB)
        async with Rollback(scene.over) as undoing:
            add_rebuild(scene, undoing, found)
            told = await before(undoing) if before else ""
            await wait_for(forget, "the ledger's answer", within_s=2 * EFFECT_TIMEOUT_S)
            left = len(await ledger.jobs(limit=_MAX_JOBS))
            away_s = await scene.hold(fault.for_s)
    finally:
        await ledger.close()
    return FaultResult(
        ("ledger",),
        f"{told}it had {had} jobs, {left} once it was lost, and {found[-1]} again when it was "
        f"rebuilt from the bucket {away_s:.1f} s later",
    )


def add_rebuild(scene: TargetGrid, undoing: Rollback, found: list[int]) -> None:
    """Register the rebuild of a lost ledger. `found` gets the number of rebuilt jobs."""

    async def rebuild() -> None:
        found.append(await rebuild_ledger(scene))

    # The rebuild itself waits for an absent manager.
    undoing.owe("the loss of the ledger", rebuild, tries=1)


async def count_jobs(scene: TargetGrid) -> int:
    """Count the jobs that the manager lists."""
    number, last = 0, None
    while page := await asyncio.to_thread(scene.client.jobs, limit=_PAGE, before=last):
        number, last = number + len(page), page[-1]["id"]
    return number


async def rebuild_ledger(scene: TargetGrid) -> int:
    """Let the manager rebuild the ledger and return the number of jobs.

    Wait for an absent manager.
    """
    began_s = time.monotonic()
    while True:
        try:
            return await asyncio.to_thread(scene.client.rebuild)
        except BackendError:
            if time.monotonic() - began_s > 2 * EFFECT_TIMEOUT_S:
                raise
            await asyncio.sleep(1.0)
